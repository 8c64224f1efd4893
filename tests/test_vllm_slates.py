"""Slates that the device generates in one step: the same items as an item a step gives, with whatever else shares the step."""

import contextlib

import pytest
import torch

from hstu_lab.vllm_engine import Engine, EngineOptions


@pytest.fixture(scope="module")
def prompts(draw_prompts):
    return draw_prompts(5, (1, 2, 15, 16, 17, 31, 32, 40, 53))


def by_steps(engine, prompts, seen, n):
    return [engine.submit_steps(prompt, items, n).result() for prompt, items in zip(prompts, seen)]


def agree(got, expected):
    assert [answer.items for answer in got] == [answer.items for answer in expected]
    for a, b in zip(got, expected):
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n", [1, 7, 10])
def test_one_step_gives_what_ten_steps_give(engine, prompts, n):
    seen = [list(range(1 + 3 * i, 200 + 7 * i)) for i in range(len(prompts))]
    expected = by_steps(engine, prompts, seen, n)
    for _ in range(2):  # the second time from the cache
        agree(engine.slate(prompts, seen, n), expected)
    assert {item for answer in expected for item in answer.items}.isdisjoint(range(25, 200))


def test_slates_share_steps_with_lists_and_scores(engine, prompts):
    slates, lists, scores = by_steps(engine, prompts, [[]] * 9, 10), engine.topk(prompts, [[]] * 9, 20), None
    scores = engine.score(prompts, [[5, 6, 7]] * 9)
    engine.reset_prefix_cache()
    with engine.held():
        futures = []
        for prompt in prompts:
            futures.append((engine.submit_score(prompt, [5, 6, 7]), engine.submit_slate(prompt, [], 10)))
            futures[-1] += (engine.submit_topk(prompt, [], 20), engine.submit_steps(prompt, [], 10))
        while engine.turn():
            pass
    for i, (score, slate, topk, steps) in enumerate(futures):
        torch.testing.assert_close(score.result(), scores[i], atol=1e-6, rtol=1e-5)
        assert slate.result().items == slates[i].items == steps.result().items
        assert topk.result().items == lists[i].items


def test_a_slate_takes_one_step(engine, prompts, monkeypatch):
    from vllm.v1.core.sched.scheduler import Scheduler

    planned, schedule = [], Scheduler.schedule
    monkeypatch.setattr(Scheduler, "schedule", lambda *args: planned.append(step := schedule(*args)) or step)
    for send, steps in ((engine.submit_slate, 1), (engine.submit_steps, 10)):
        planned.clear()
        send(prompts[5], [], 10).result()
        assert sum(step.total_num_scheduled_tokens > 0 for step in planned) == steps


def test_when_all_items_are_seen_nothing_is_left(engine, prompts):
    for left in (3, 0):
        seen = list(range(1, 501 - left))
        got, expected = engine.slate(prompts[:1], [seen], 10)[0], by_steps(engine, prompts[:1], [seen], 10)[0]
        assert len(got.items) == left
        agree([got], [expected])


def test_cached_blocks_of_a_longer_history_begin_a_slate(engine, prompts):
    """The hidden state at a block's end is found there, though the request that computed the block went on."""
    engine.reset_prefix_cache()
    engine.topk([prompts[8]], [[]], 5)
    for length in (16, 32, 48):
        short = prompts[8][:length]
        got = engine.slate([short], [[]], 10)[0]
        assert got.cached_tokens == length
        agree([got], by_steps(engine, [short], [[]], 10))


def test_what_does_not_fit_goes_by_steps(tiny_checkpoint, prompts):
    options = EngineOptions(kv_cache_memory_bytes=8 << 20, enable_chunked_prefill=False, max_num_batched_tokens=64)
    with Engine(tiny_checkpoint, options) as engine:
        longest = [prompts[8][0], *range(1, 55)]
        agree(engine.slate([longest], [[]], 10), by_steps(engine, [longest], [[]], 10))


def test_a_captured_loop_pads_and_copies(engine, prompts, monkeypatch):
    """Graphs are stood for by what they replay: the loop over their inputs, into their outputs."""
    runner = engine.engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    loop, recorded = runner.sampler.loop, []

    class Graph:
        replays = 0

        def replay(self):
            Graph.replays += 1
            _, inputs, outputs = next(entry for entry in loop.graphs.values() if entry[0] is self)
            for output, value in zip(outputs, loop._generate(inputs[0], inputs[1], inputs[2].t())):
                output.copy_(value)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: contextlib.nullcontext(recorded.append(graph)))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(loop, "graphs", {})
    expected = by_steps(engine, prompts, [[3, 400]] * 9, 10)
    with torch.inference_mode():
        loop.capture([1, 8, 12])
    assert sorted(loop.graphs) == [1, 8, 12]
    with engine.held():
        futures = [engine.submit_slate(prompt, [3, 400], 10) for prompt in prompts]  # nine of twelve places
        while engine.turn():
            pass
    agree([future.result() for future in futures], expected)
    agree(engine.slate(prompts[:1], [[3, 400]], 10), expected[:1])
    assert Graph.replays >= 2


@pytest.mark.parametrize("extra", [{"slate": 0}, {"slate": "7"}])
def test_what_is_no_length_is_refused(extra):
    from vllm import SamplingParams

    from hstu_lab.vllm_plugin.slates import SlateRows

    with pytest.raises(ValueError, match="slate"):
        SlateRows.validate_params(SamplingParams(extra_args=extra))
