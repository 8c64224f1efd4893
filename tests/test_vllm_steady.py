"""Steps that go round vLLM's preparations give what vLLM's own give, and only such steps do."""

import contextlib
import random

import pytest
import torch

from hstu_lab.vllm_bench import worker_of
from hstu_lab.vllm_engine import Engine, EngineOptions

pytestmark = pytest.mark.timeout(120)
TINY_BLOCK = 2 * 16 * 2 * (16 + 16) * 4
"""Bytes of a block of 16 tokens of the tiny preset, in float32."""


@pytest.fixture(scope="module")
def prompts(draw_prompts):
    return draw_prompts(6, (1, 2, 7, 14, 15, 16, 17, 30, 31, 32, 40, 47))


@contextlib.contextmanager
def counted(engine, steady=True):
    """How many requests the steady steps inside had; without `steady` vLLM makes them all."""
    worker, sizes = worker_of(engine), []
    kept, run = worker.steady, worker.steady.run
    worker.steady = kept if steady else None
    kept.run = lambda size: sizes.append(size) or run(size)
    try:
        yield sizes
    finally:
        worker.steady = kept
        del kept.run


def steps(engine, jobs, draw=None):
    """Answers to (prompt, seen, n) sent together, or with `draw` in bursts between the turns."""
    futures, left = [], list(jobs)
    with engine.held():
        while left or not all(future.done() for future in futures):
            for _ in range(draw.choice((0, 0, 1, 3)) if draw else len(left)):
                if left:
                    futures.append(engine.submit_steps(*left.pop(0)))
            engine.turn()
    return [future.result() for future in futures]


def agree(got, expected):
    assert [answer.items for answer in got] == [answer.items for answer in expected]
    for a, b in zip(got, expected):
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-5, rtol=1e-5)


def jobs_of(prompts, draw):
    return [(p, sorted(draw.sample(range(1, 501), draw.choice((0, 3, 200)))), draw.randrange(1, 17)) for p in prompts]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("blocks", [300, 14])
def test_steady_steps_change_no_item(tiny_checkpoint, engine, prompts, blocks, seed):
    """Requests that come and go, whose blocks fill up, and, with few blocks, that are preempted and come back."""
    jobs = jobs_of(prompts, random.Random(seed))
    with counted(engine, steady=False) as sizes:
        expected = steps(engine, jobs)
    assert not sizes
    options = EngineOptions(kv_cache_memory_bytes=blocks * TINY_BLOCK)
    with Engine(tiny_checkpoint, options) as other, counted(other) as sizes:
        agree(steps(other, jobs, random.Random(seed)), expected)
        agree(steps(other, jobs), expected)  # prefixes are cached
    assert len(sizes) > 10
    assert max(sizes) > 1


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [300, 14])
def test_graphs_of_steady_steps_change_no_item(tiny_checkpoint, prompts, blocks):
    jobs = jobs_of(prompts, random.Random(0))
    options = EngineOptions(
        kv_cache_memory_bytes=blocks * TINY_BLOCK, ops="triton", cuda_graphs="FULL", graph_tokens=64, prompt_embeds=False
    )
    with Engine(tiny_checkpoint, options) as engine:
        with counted(engine, steady=False) as sizes:
            expected = steps(engine, jobs)
        assert not sizes
        with counted(engine) as sizes:
            agree(steps(engine, jobs, random.Random(0)), expected)
            agree(steps(engine, jobs), expected)  # prefixes are cached
        assert set(sizes) <= set(worker_of(engine).steady.graphs)
    assert len(sizes) > 10


def test_every_step_but_the_first_is_steady(engine, prompts):
    with counted(engine) as sizes:
        steps(engine, [(prompt, [], 10) for prompt in prompts[:3]])
    assert sizes == [3] * 9


def best_of_five(engine):
    return engine._params(6, 5, seen=[])


def not_masked(engine):
    return engine._params(6, 0)


def biased(engine):
    params = engine._params(6, 0, seen=[])
    params.logit_bias = {7: 100.0}
    return params


@pytest.mark.parametrize("params", [best_of_five, not_masked, biased])
def test_whoever_wants_anything_else_keeps_the_batch_on_vllms_way(engine, prompts, params):
    answers = []
    for steady in (True, False):
        with engine.held(), counted(engine, steady) as sizes:
            futures = [engine.submit_steps(prompts[0], [], 6)]
            futures.append(engine._enqueue(10**6 + steady, prompts[1], params(engine), lambda answer: answer.tokens))
            while engine.turn():
                pass
        assert not sizes
        answers.append((futures[0].result().items, futures[1].result()))
    assert answers[0] == answers[1]
    assert len(answers[0][1]) == 6


def test_more_pairs_than_there_is_room_for_are_vllms(engine, prompts, monkeypatch):
    from hstu_lab.vllm_plugin import steady

    expected = steps(engine, [(prompts[2], [1, 2, 3], 6)])
    monkeypatch.setattr(steady, "PAIRS", 2)
    with counted(engine) as sizes:
        agree(steps(engine, [(prompts[2], [1, 2, 3], 6)]), expected)
    assert not sizes


def test_a_prompt_that_ends_in_chunks_of_one_token_is_no_steady_step(tiny_checkpoint, engine, prompts):
    jobs = [(prompt, [], 4) for prompt in prompts[3:6]]
    expected = steps(engine, jobs)
    options = EngineOptions(kv_cache_memory_bytes=8 << 20, max_num_seqs=2, max_num_batched_tokens=2, enable_prefix_caching=False)
    with Engine(tiny_checkpoint, options) as other:
        agree(steps(other, jobs), expected)


def test_captured_steps_pad_and_copy(engine, prompts, monkeypatch):
    """Graphs are stood for by what they replay: the step of as many requests, into the same place."""
    steady, replays = worker_of(engine).steady, []

    class Graph:
        def replay(self):
            size, (_, chosen) = next((size, entry) for size, entry in steady.graphs.items() if entry[0] is self)
            replays.append(size)
            chosen.copy_(steady._next(size))

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(steady, "graphs", {})
    jobs = jobs_of(prompts, random.Random(9))
    with counted(engine, steady=False):
        expected = steps(engine, jobs)
    with torch.inference_mode():
        steady.capture([1, 4, 8])
    for count in (1, 3, 7):
        agree(steps(engine, jobs[:count]), expected[:count])
    agree(steps(engine, jobs, random.Random(1)), expected)
    assert set(replays) == {1, 4, 8}
