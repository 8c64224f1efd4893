"""The whole model on Triton's operators against the same model on the oracle's: every pass, and captured in a CUDA graph."""

import pytest
import torch
from torch import nn
from triton_cases import DEVICE, GPU, LIMITS, error, reference, triton_ops

from hstu_lab.config import preset
from hstu_lab.model import HSTU, KVCache
from hstu_lab.tokens import pack, unpack

DTYPES = [pytest.param(d, marks=[pytest.mark.gpu]) for d in LIMITS] if GPU else [torch.float32]
LENGTHS = [300, 1, 64, 129] if GPU else [17, 1, 9]


class Rows(nn.Module):
    """The item table alone, as a plain embedding: TorchRec is not everywhere that Triton is."""

    def __init__(self, config):
        super().__init__()
        self.config, self.item = config, nn.Embedding(config.num_items, config.d_model)

    def forward(self, tokens, offsets):
        return self.item(unpack(tokens, self.config)[0])


def build(ops, dtype):
    config = preset("tiny")
    if GPU:
        config = config.replace(d_model=128, num_heads=2, d_qk=64, d_v=64, max_seq_len=512)
    torch.manual_seed(0)
    model = HSTU(config, Rows(config), ops)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1 if parameter.dim() > 1 else 0.5)
    return model.eval().requires_grad_(False).to(DEVICE, dtype)


def histories(config, lengths, seed):
    g = torch.Generator().manual_seed(seed)
    draw = [torch.randint(1, most, (sum(lengths),), generator=g) for most in (config.num_items, config.num_actions)]
    levels = torch.randint(0, config.num_time_levels // 2, (sum(lengths),), generator=g)
    return pack(*draw, levels, config).to(DEVICE), torch.tensor([0, *lengths], device=DEVICE).cumsum(0)


def passes(model, config, dtype):
    """Hidden states of one jagged pass with candidates, of prefill, decode and candidates over a cache."""
    tokens, offsets = histories(config, LENGTHS, seed=1)
    candidates = torch.tensor([min(7, n) for n in LENGTHS], device=DEVICE)
    yield "jagged", model.jagged(tokens, offsets)
    yield "candidates in one pass", model.jagged(tokens, offsets, candidates, max_len=max(LENGTHS))
    cache = KVCache(config, len(LENGTHS), device=DEVICE, dtype=dtype)
    yield "prefill", model.extend(tokens, offsets, cache, max_queries=max(LENGTHS))
    one = torch.arange(len(LENGTHS) + 1, device=DEVICE)
    for seed in (2, 3):
        yield f"decode {seed}", model.extend(histories(config, [1] * len(LENGTHS), seed)[0], one, cache, max_queries=1)
    several = [3] * len(LENGTHS)
    yield "candidates over the cache", model.score_candidates(*histories(config, several, 4), cache)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pass_agrees_with_the_oracle(dtype):
    ours, oracle = build(triton_ops, dtype), build(reference, torch.float32)
    assert ours.stack.ops is triton_ops
    assert oracle.stack.ops is reference
    oracle.load_state_dict(ours.state_dict())  # the same rounded weights
    config = ours.config
    both = zip(passes(ours, config, dtype), passes(oracle, config, torch.float32), strict=True)
    for (name, got), (_, expected) in both:
        assert error(got, expected) < 2 * LIMITS[dtype], name


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
def test_the_model_is_captured_in_a_cuda_graph():
    model = build(triton_ops, torch.bfloat16)
    tokens, offsets = histories(model.config, LENGTHS, seed=1)
    run = captured(lambda: model.jagged(tokens, offsets, max_len=max(LENGTHS)))
    fresh, _ = histories(model.config, LENGTHS, seed=5)
    expected = model.jagged(fresh, offsets)
    tokens.copy_(fresh)
    assert torch.equal(run(), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
def test_decoding_is_captured_and_replayed_token_by_token():
    model = build(triton_ops, torch.bfloat16)
    eager, graphed = (KVCache(model.config, len(LENGTHS), device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    one = torch.arange(len(LENGTHS) + 1, device=DEVICE)
    token, _ = histories(model.config, [1] * len(LENGTHS), 10)
    run = captured(lambda: model.extend(token, one, graphed, max_queries=1))
    for cache in (eager, graphed):  # capturing and its warm-up wrote tokens of their own
        cache.seq_lens.zero_()
        cache.last_times.zero_()
        cache.at_most = 0
        model.extend(*histories(model.config, LENGTHS, seed=1), cache, max_queries=max(LENGTHS))
    for seed in range(20, 24):
        fresh, _ = histories(model.config, [1] * len(LENGTHS), seed)
        token.copy_(fresh)
        assert torch.equal(run(), model.extend(fresh, one, eager, max_queries=1))
    assert torch.equal(graphed.seq_lens, eager.seq_lens)


def captured(fn):
    """`fn` as a CUDA graph: a function that replays it and returns what it wrote."""
    fn()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fn()

    def replay():
        graph.replay()
        return out.clone()

    return replay
