"""Candidate scoring through the real engine: scores equal to one pass of the ranker, however vLLM cuts, shares and evicts."""

import contextlib
import random

import pytest
import torch

from hstu_lab.model import load_checkpoint
from hstu_lab.tokens import encode_history
from hstu_lab.vllm_engine import Engine, EngineError, EngineOptions
from hstu_lab.vllm_load import random_checkpoint, random_histories, serving_config

pytestmark = pytest.mark.timeout(120)
TINY_BLOCK = 2 * 16 * 2 * (16 + 16) * 4


@pytest.fixture(scope="module")
def case(tiny_model, tiny_world):
    """Ten histories as tokens, with block edges among their lengths; 40 candidates each; what one pass of the ranker says."""
    config = tiny_model.config
    lengths = [1, 14, 15, 16, 31, 32, 40, 47, 52, 53]
    tokens = []
    for user, length in enumerate(lengths):
        h = tiny_world.history(user + 20)
        columns = (column.tolist()[:length] for column in (h.items, h.actions, h.timestamps))
        tokens.append(encode_history(*columns, user + 1, config))
    generator = torch.Generator().manual_seed(0)
    candidates = torch.randint(1, config.num_items, (len(tokens), 40), generator=generator)
    offsets = torch.tensor([0, *map(len, tokens)]).cumsum(0)
    with torch.inference_mode():
        expected = tiny_model.rank(torch.tensor([t for history in tokens for t in history]), offsets, candidates)
    assert expected.std(dim=1).min() > 1e-3, "all candidates score alike: the tests show nothing"
    return tokens, candidates.tolist(), expected


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"micro_batch": 7, "prompt_embeds": False},
        {"enable_prefix_caching": False},
        {"cached_scores": False},
        {"max_num_batched_tokens": 24, "max_num_seqs": 8, "micro_batch": 40},
        {"max_num_batched_tokens": 80, "enable_chunked_prefill": False},
    ],
    ids=["default", "micro-batches", "no-prefix-cache", "all-by-vllm", "chunked", "never-chunked"],
)
def test_scores_are_those_of_one_pass(tiny_checkpoint, case, options):
    tokens, candidates, expected = case
    with Engine(tiny_checkpoint, EngineOptions(kv_cache_memory_bytes=120 * TINY_BLOCK, **options)) as engine:
        for _ in range(2):  # the second time the histories are cached, and the candidates must be computed all the same
            for got, wanted in zip(engine.score(tokens, candidates), expected, strict=True):
                torch.testing.assert_close(got, wanted, atol=2e-6, rtol=1e-5)


def test_scores_lists_and_slates_share_steps_and_prefixes(tiny_checkpoint, tiny_model, case):
    """All three kinds of request at once, in a cache so small that some are preempted."""
    tokens, candidates, expected = case
    with Engine(tiny_checkpoint, EngineOptions(kv_cache_memory_bytes=400 * TINY_BLOCK)) as engine:
        alone = engine.topk(tokens, [[]] * 10, 50), engine.slate(tokens, [[]] * 10, 10)
    with Engine(tiny_checkpoint, EngineOptions(kv_cache_memory_bytes=24 * TINY_BLOCK, micro_batch=16)) as engine:
        futures = [
            (engine.submit_score(t, c), engine.submit_topk(t, [], 50), engine.submit_slate(t, [], 10))
            for t, c in zip(tokens, candidates)
        ]
        for i, (score, topk, slate) in enumerate(futures):
            torch.testing.assert_close(score.result(), expected[i], atol=2e-6, rtol=1e-5)
            assert topk.result().items == alone[0][i].items
            assert slate.result().items == alone[1][i].items


@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_scores_by_kernels_and_graphs(tmp_path):
    """Histories with a tail and without one, in groups for which there is a graph and for which there is none."""
    config = serving_config("tiny")
    folder = random_checkpoint(config, tmp_path / "tiny", torch.float32)
    prompts = [random_histories(config, 1, length, length)[0] for length in (1, 14, 15, 16, 31, 32, 40, 47, 48, 53)]
    lists = [random.Random(i).sample(range(1, config.num_items), 40) for i in range(10)]
    with Engine(folder, EngineOptions(kv_cache_memory_bytes=200 * TINY_BLOCK, cached_scores=False)) as engine:
        expected = engine.score(prompts, lists)
    options = {"ops": "triton", "cuda_graphs": "FULL", "graph_tokens": 64, "prompt_embeds": False, "micro_batch": 40}
    with Engine(folder, EngineOptions(kv_cache_memory_bytes=200 * TINY_BLOCK, **options)) as engine:
        engine.score(prompts, lists)
        ours = engine.cached_scores
        for scores in (ours, None):
            engine.cached_scores = scores
            for count in (40, 13):
                for users in (range(10), [3], [3, 5, 8], [9], [0, 4, 9]):
                    got = engine.score([prompts[i] for i in users], [lists[i][:count] for i in users])
                    for i, chances in zip(users, got, strict=True):
                        torch.testing.assert_close(chances, expected[i][:count], atol=2e-5, rtol=1e-4)
        assert len(ours._graphs) == 32


@pytest.fixture
def scheduled(monkeypatch):
    """Tokens of each step that vLLM's scheduler makes."""
    from vllm.v1.core.sched.scheduler import Scheduler

    seen, schedule = [], Scheduler.schedule

    def noting(self, *args, **kwargs):
        out = schedule(self, *args, **kwargs)
        seen.append(out.total_num_scheduled_tokens)
        return out

    monkeypatch.setattr(Scheduler, "schedule", noting)
    return seen


@contextlib.contextmanager
def launches(engine):
    """The steps for cached histories inside: each one's requests."""
    scores, seen = engine.cached_scores, []
    launch = scores.launch
    scores.launch = lambda requests: seen.append(list(requests)) or launch(requests)
    try:
        yield seen
    finally:
        del scores.launch


@pytest.mark.parametrize("cached_scores", [True, False])
def test_a_cached_history_is_not_computed_again(tiny_checkpoint, case, scheduled, cached_scores):
    """54 tokens are cached after a first pass: what scoring computes is the rest of the last block and the candidates; as tokens
    of vLLM's, also a mark."""
    tokens, candidates, _ = case
    options = EngineOptions(kv_cache_memory_bytes=120 * TINY_BLOCK, cached_scores=cached_scores)
    with Engine(tiny_checkpoint, options) as engine:
        engine.topk(tokens[-1:], [[]], 5)
        assert sum(scheduled) == len(tokens[-1]) == 54
        assert not any(engine.cached_score_totals().values())
        for _ in range(2):
            scheduled.clear()
            if cached_scores:
                with launches(engine) as seen:
                    engine.score(tokens[-1:], candidates[-1:])
                assert [(len(request.tail), len(request.items)) for [request] in seen] == [(54 % 16, 40)]
                assert not scheduled
            else:
                engine.score(tokens[-1:], candidates[-1:])
                assert sum(scheduled) == 54 % 16 + 1 + 40
        whole = {"requests": 2, "candidates": 2 * 40, "cached_tokens": 2 * 48, "tail_tokens": 2 * 6}
        assert engine.cached_score_totals() == (whole if cached_scores else {})


def test_many_users_share_a_step_and_every_block_comes_back(tiny_checkpoint, case):
    tokens, candidates, expected = case
    with Engine(tiny_checkpoint, EngineOptions(kv_cache_memory_bytes=200 * TINY_BLOCK)) as engine:
        pool = engine.cached_scores.pool
        engine.topk(tokens, [[]] * 10, 5)
        free = pool.get_num_free_blocks()
        with launches(engine) as seen, engine.held():
            futures = [engine.submit_score(tokens[i % 10], candidates[i % 10]) for i in range(20)]
            while engine.turn():
                pass
        for i, future in enumerate(futures):
            torch.testing.assert_close(future.result(), expected[i % 10], atol=2e-6, rtol=1e-5)
        assert [len(requests) for requests in seen] == [8, 8, 4]
        assert pool.get_num_free_blocks() == free == 199  # vLLM keeps one for itself
        assert not any(block.ref_cnt for block in pool.blocks[1:])


@pytest.mark.parametrize("seed", range(2))
def test_histories_that_are_evicted_are_computed_again(tiny_checkpoint, case, seed):
    """Blocks for two or three users: borrowing evicts others' histories, never the request's own."""
    tokens, candidates, expected = case
    draw = random.Random(seed)
    with Engine(tiny_checkpoint, EngineOptions(kv_cache_memory_bytes=16 * TINY_BLOCK, micro_batch=24)) as engine:
        with launches(engine) as seen:
            for _ in range(12):
                burst = draw.sample(range(10), draw.randrange(1, 5))
                others = [engine.submit_slate(tokens[i], [], 3) for i in burst[1:]]
                scores = [engine.submit_score(tokens[i], candidates[i]) for i in burst]
                for i, future in zip(burst, scores, strict=True):
                    torch.testing.assert_close(future.result(), expected[i], atol=2e-6, rtol=1e-5)
                for future in others:
                    future.result()
        assert len(seen) > 4
        assert not any(block.ref_cnt for block in engine.cached_scores.pool.blocks[1:])


def test_where_no_block_is_free_vllm_lets_the_candidates_wait(tiny_checkpoint, case, scheduled):
    tokens, candidates, expected = case
    with Engine(tiny_checkpoint, EngineOptions(kv_cache_memory_bytes=64 * TINY_BLOCK)) as engine:
        engine.topk(tokens[-1:], [[]], 5)
        pool = engine.cached_scores.pool
        with engine.held(), launches(engine) as seen:
            taken = pool.get_new_blocks(pool.get_num_free_blocks() - 3)  # those of the three pages
            future = engine.submit_score(tokens[-1], candidates[-1])
            engine.turn()
            assert not seen
            assert not future.done()
            pool.free_blocks(taken)
            while engine.turn():
                pass
        torch.testing.assert_close(future.result(), expected[-1], atol=2e-6, rtol=1e-5)


def test_a_wrong_token_is_named_though_the_pages_before_it_are_cached(tiny_checkpoint, case):
    with Engine(tiny_checkpoint, EngineOptions(kv_cache_memory_bytes=64 * TINY_BLOCK)) as engine:
        engine.topk(case[0][-1:], [[]], 5)
        for wrong in (-1, 1 << 30, "one"):
            with pytest.raises(EngineError, match="vLLM refused the request"):
                engine.score([[*case[0][-1][:50], wrong]], [[1]])
        assert engine.score(case[0][-1:], [[1]])[0].shape == (1, 3)


def test_a_step_that_fails_is_told_to_all_who_wait(tiny_checkpoint, case):
    tokens, candidates, _ = case
    with Engine(tiny_checkpoint, EngineOptions(kv_cache_memory_bytes=120 * TINY_BLOCK)) as engine:
        engine.topk(tokens, [[]] * 10, 5)

        def broken(*_):
            raise RuntimeError("no kernel")

        engine.cached_scores._step = broken
        with engine.held():
            futures = [engine.submit_score(t, c) for t, c in zip(tokens, candidates, strict=True)]
        for future in futures:
            with pytest.raises(EngineError, match="no kernel"):
                future.result(timeout=20)


def test_who_cancelled_or_was_aborted_keeps_nobody_else_from_an_answer(tiny_checkpoint, case):
    tokens, candidates, expected = case
    with Engine(tiny_checkpoint, EngineOptions(kv_cache_memory_bytes=120 * TINY_BLOCK)) as engine:
        engine.topk(tokens, [[]] * 10, 5)
        with engine.held():
            futures = [engine.submit_score(t, c) for t, c in zip(tokens, candidates, strict=True)]
            futures[3].cancel()
            engine.abort({engine._incoming[4].request_id})
            engine.turn()
            engine.abort({engine._to_score[0].request_id})
            while engine.turn():
                pass
        for i in set(range(10)) - {3, 4, 9}:
            torch.testing.assert_close(futures[i].result(timeout=0), expected[i], atol=2e-6, rtol=1e-5)
        assert [future.done() for future in futures].count(True) == 8


def test_candidates_that_are_no_items_are_refused(tiny_checkpoint, case):
    with Engine(tiny_checkpoint, EngineOptions(kv_cache_memory_bytes=64 * TINY_BLOCK)) as engine:
        for candidates in ([501], [-1]):
            with pytest.raises(EngineError, match="from 0 to 500"):
                engine.score(case[0][:1], [candidates])
        with pytest.raises(EngineError, match="after a prompt of tokens"):
            engine.score([torch.zeros(3, 37)], [[1]])
        assert engine.score(case[0][:1], [[]])[0].shape == (0, 3)


def test_where_a_step_has_no_room_for_candidates_the_rest_works(tiny_checkpoint, case):
    options = EngineOptions(kv_cache_memory_bytes=64 * TINY_BLOCK, max_num_batched_tokens=64, enable_chunked_prefill=False)
    with Engine(tiny_checkpoint, options) as engine:
        assert len(engine.topk(case[0][:1], [[]], 5)[0].items) == 5
        with pytest.raises(EngineError, match="raise max_num_batched_tokens"):
            engine.score(case[0][:1], [[1]])


def test_the_checkpoint_holds_the_heads(tiny_checkpoint):
    assert any(name.startswith("heads.") for name in load_checkpoint(tiny_checkpoint).state_dict())
