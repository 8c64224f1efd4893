"""Tensor parallelism over heads: parts of a checkpoint, each run by a thread, together give what the whole gives."""

import concurrent.futures
import os
import threading

import pytest
import torch

from hstu_lab.config import preset
from hstu_lab.model import HSTUStack
from hstu_lab.ops import reference
from hstu_lab.vllm_engine import ENVIRONMENT, Engine, EngineOptions


@pytest.fixture(scope="module", autouse=True)
def _vllm_environment():
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


class Group:
    """Collectives of threads that stand for GPUs."""

    def __init__(self, size: int):
        self.size, self.parts, self.barrier = size, [None] * size, threading.Barrier(size, timeout=30)

    def collect(self, rank: int, x):
        self.parts[rank] = x
        self.barrier.wait()
        parts = list(self.parts)
        self.barrier.wait()
        return parts


@pytest.mark.parametrize("size", [2, 4])
def test_parts_of_the_heads_give_the_whole(size):
    from hstu_lab.vllm_plugin.parallel import ParallelOps, own_heads, own_part

    config = preset("small").replace(num_layers=2, d_model=32)
    generator = torch.Generator().manual_seed(size)
    whole = HSTUStack(config).eval()
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    x, lengths = torch.randn(3, 20, config.d_model, generator=generator) * 5 + 3, torch.tensor([20, 1, 7])
    times = torch.randint(0, 10**6, (3, 20), generator=generator)
    group = Group(size)

    @torch.inference_mode()
    def run(rank: int):
        ops = ParallelOps(
            reference, lambda x: torch.cat(group.collect(rank, x), dim=-1), lambda x: sum(group.collect(rank, x))
        )  # fmt: skip
        part = HSTUStack(own_heads(config, size), ops).eval()
        part.load_state_dict({n: own_part(f"stack.{n}", t, config, rank, size) for n, t in whole.state_dict().items()})
        return part.dense(x, lengths, times)

    with torch.inference_mode(), concurrent.futures.ThreadPoolExecutor(size) as pool:
        expected = whole.dense(x, lengths, times)
        for got in pool.map(run, range(size)):
            for row, length in enumerate(lengths):
                torch.testing.assert_close(got[row, :length], expected[row, :length], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("size", "message"), [(3, "must divide num_heads, 4"), (8, "must divide"), (4, "d_model, 64; lower it")])
def test_what_cannot_be_shared_out_is_refused(size, message):
    from hstu_lab.vllm_plugin.parallel import own_heads

    with pytest.raises(ValueError, match=f"tensor_parallel_size is {size}.*{message}"):
        own_heads(preset("small"), size)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_serve_one_model(tiny_checkpoint, tiny_model, tiny_world):
    """vLLM's own tensor parallelism on the CPU: two workers, a head each."""
    from hstu_lab.tokens import encode_history

    histories = [tiny_world.history(i) for i in range(20)]
    tokens = [
        encode_history(h.items.tolist()[:53], h.actions.tolist()[:53], h.timestamps.tolist()[:53], i + 1, tiny_model.config)
        for i, h in enumerate(histories)
    ]
    candidates = [list(range(1, 30))] * 20
    answers = []
    for size in (1, 2):
        options = EngineOptions(kv_cache_memory_bytes=4 << 20, tensor_parallel_size=size)
        with Engine(tiny_checkpoint, options) as engine:
            lists = [[g.items for g in f(tokens, [[]] * 20, 10)] for f in (engine.topk, engine.slate)]
            answers.append((lists, torch.stack(engine.score(tokens, candidates))))
    assert answers[0][0] == answers[1][0]
    torch.testing.assert_close(answers[0][1], answers[1][1], atol=2e-6, rtol=1e-5)
