"""Work that nobody waits for is dropped by vLLM itself, and the others' answers stay what they were."""

from hstu_lab.vllm_engine import Engine, EngineOptions


def test_aborted_requests_leave_the_engine_and_the_others_are_answered(tiny_checkpoint, tiny_model):
    base = tiny_model.config.user_token_base
    prompts = [[base + 1 + i, *range(1 + i, 20 + i)] for i in range(12)]
    with Engine(tiny_checkpoint, EngineOptions(kv_cache_memory_bytes=4 << 20, max_num_seqs=4)) as engine:
        wanted = [answer.items for answer in engine.slate(prompts, [[]] * 12, 10)]
        scheduler = engine.engine.engine_core.engine_core.scheduler
        for drop in (set(range(0, 12, 2)), set(range(12))):
            engine.reset_prefix_cache()
            first = next(engine._ids) + 1
            futures = [engine.submit_slate(prompt, [], 10) for prompt in prompts]
            engine.abort({f"request-{first + i}" for i in drop})
            kept = [i for i in range(12) if i not in drop]
            assert [futures[i].result(60).items for i in kept] == [wanted[i] for i in kept]
            again = engine.slate(prompts[:1], [[]], 3)[0].items
            assert again == wanted[0][:3]
            assert scheduler.get_num_unfinished_requests() == 0
            assert not engine._waiting
            assert not any(futures[i].done() for i in drop), "they were begun anew or answered"
            assert scheduler.kv_cache_manager.usage == 0
        engine.abort({"request-0", "nobody"})
        assert engine.slate(prompts[:1], [[]], 3)[0].items == wanted[0][:3]


def test_who_cancels_late_stops_nobody_else(tiny_checkpoint):
    with Engine(tiny_checkpoint, EngineOptions(kv_cache_memory_bytes=8 << 20)) as engine:
        with engine.held():
            asked = (engine.submit_topk([3, 4], [], 5), engine.submit_slate([3, 4], [], 10), engine.submit_score([3, 4], [5]))
            for future in asked:
                assert future.cancel()
            while engine.turn():
                pass
        assert len(engine.topk([[3, 4]], [[]], 5)[0].items) == 5
