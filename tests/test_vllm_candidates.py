"""Candidate scoring through the real engine: scores equal to one pass of the ranker, however vLLM cuts, shares and evicts."""

import pytest
import torch

from hstu_lab.model import load_checkpoint
from hstu_lab.tokens import encode_history
from hstu_lab.vllm_engine import Engine, EngineError, EngineOptions

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
        {"max_num_batched_tokens": 24, "max_num_seqs": 8, "micro_batch": 40},
        {"max_num_batched_tokens": 80, "enable_chunked_prefill": False},
    ],
    ids=["default", "micro-batches", "no-prefix-cache", "chunked", "never-chunked"],
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


def test_a_cached_history_is_not_computed_again(tiny_checkpoint, case, monkeypatch):
    """53 tokens are cached after a first pass: what scoring schedules is the rest of the last block, the mark, the candidates."""
    from vllm.v1.core.sched.scheduler import Scheduler

    scheduled, schedule = [], Scheduler.schedule

    def noting(self, *args, **kwargs):
        out = schedule(self, *args, **kwargs)
        scheduled.append(out.total_num_scheduled_tokens)
        return out

    monkeypatch.setattr(Scheduler, "schedule", noting)
    tokens, candidates, _ = case
    with Engine(tiny_checkpoint, EngineOptions(kv_cache_memory_bytes=120 * TINY_BLOCK)) as engine:
        engine.topk(tokens[-1:], [[]], 5)
        assert sum(scheduled) == len(tokens[-1]) == 54
        for _ in range(2):
            scheduled.clear()
            engine.score(tokens[-1:], candidates[-1:])
            assert sum(scheduled) == 54 % 16 + 1 + 40


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
