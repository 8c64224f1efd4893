"""A layer of a small serving step in three launches, against the layer of the model over the oracle's operators."""

import copy
import random
import types

import pytest
import torch
from triton_cases import DEVICE, GPU, LIMITS, error, poison, reference, triton_decode

from hstu_lab.config import preset
from hstu_lab.model import HSTULayer


def layer_case(
    seed, *, heads=2, d=16, d_model=32, page=4, longest=40, dtype=torch.float32, rab="position+time", padding=2, counts=None,
    mix=True,
):  # fmt: skip
    """A layer and a step of four sequences: how many tokens are new, and whether some of them are candidates, is drawn."""
    draw, g = random.Random(seed), torch.Generator().manual_seed(seed)
    config = preset("tiny").replace(
        num_heads=heads, d_qk=d, d_v=d, d_model=d_model, num_users=0, side_features=(), rab=rab, max_seq_len=longest + 24
    )
    layer = HSTULayer(config, 0)
    for name, parameter in layer.named_parameters():
        small = "bias" in name or parameter.dim() == 1
        torch.nn.init.normal_(parameter, std=0.3 if small else parameter.shape[-1] ** -0.5, generator=g)
        if name.endswith("norm.weight"):
            parameter.data += 1
    seq_lens = [draw.randrange(1, longest) for _ in range(4)]
    counts = [min(c, n) for c, n in zip(counts or [draw.choice([0, 1, 1, 2, 5]) for _ in seq_lens], seq_lens)]
    counts[seed % 4] = max(counts[seed % 4], 1)
    history = [draw.randrange(1, n + 1) if mix and draw.random() < 0.5 else n for n in seq_lens]
    pages = -(-longest // page)
    table = torch.randperm(4 * pages, generator=g).view(4, pages)
    where = [[table[b, p // page].item() * page + p % page for p in range(n)] for b, n in enumerate(seq_lens)]
    cache = torch.full((4 * pages * page, heads, 2 * d), torch.nan)
    old = torch.tensor([slot for slots, count in zip(where, counts) for slot in slots[: len(slots) - count]], dtype=torch.int64)
    cache[old] = torch.randn(len(old), heads, 2 * d, generator=g)
    new = [slot for slots, count in zip(where, counts) for slot in slots[len(slots) - count :]]
    step = types.SimpleNamespace(
        slots=torch.tensor(new + [-1] * padding), block_table=table.int(),
        query_offsets=torch.tensor([0, *counts]).cumsum(0).int(), seq_lens=torch.tensor(seq_lens).int(),
        history_lens=torch.tensor(history).int(), query_times=torch.randint(0, 10**6, (len(new) + padding,), generator=g),
    )  # fmt: skip
    for name, value in vars(step).items():
        setattr(step, name, value.to(DEVICE))
    x = torch.randn(len(new) + padding, d_model, generator=g)
    slot_times = torch.randint(0, 10**6, (4 * pages, page), generator=g).to(DEVICE)
    cache = cache.view(4 * pages, page, heads, 2 * d).to(dtype).to(DEVICE)
    return layer.to(dtype).to(DEVICE), x.to(dtype).to(DEVICE), cache, step, slot_times, config


def expected_of(layer, x, cache, step, slot_times, config):
    """(output rows, cache afterwards) by the oracle, in float32."""
    count = int(step.query_offsets[-1])
    cache = cache.float()

    def attend(_, q, k, v, bias):
        cache.flatten(0, 1)[step.slots[:count]] = torch.cat([k, v], dim=-1)
        return reference.attention_paged(
            q, *cache.split(config.d_qk, dim=-1), step.block_table, step.query_offsets, step.seq_lens,
            divisor=config.max_seq_len, bias=bias, query_times=step.query_times[:count], slot_times=slot_times,
            history_lens=step.history_lens,
        )  # fmt: skip

    return copy.deepcopy(layer).float()(x[:count].float(), attend), cache


def decoded(layer, x, cache, step, slot_times, config, tiles=None):
    cache = cache.clone()
    poison()
    plan = triton_decode.plan_step(
        step.block_table, step.query_offsets, step.seq_lens, step.history_lens, len(x), page=cache.shape[1], bias=layer.bias,
        query_times=step.query_times, slot_times=slot_times,
    )  # fmt: skip
    out = triton_decode.decode_layer(x, layer, cache, step.slots, step.block_table, plan, divisor=config.max_seq_len, tiles=tiles)
    return out[: int(step.query_offsets[-1])], cache


def check(case, limit, tiles=None):
    (expected, after), (got, cache) = expected_of(*case), decoded(*case, tiles=tiles)
    assert error(got, expected) <= limit
    written = ~after.isnan()
    assert cache.isnan().equal(~written), "another slot was written, or one was not"
    assert error(cache[written], after[written]) <= limit


@torch.inference_mode()
@pytest.mark.skipif(GPU, reason="the interpreter's small tiles; the GPU test draws longer sequences")
@pytest.mark.parametrize("seed", range(5))
def test_a_layer_of_a_small_step(seed):
    check(layer_case(seed), 1e-5)


@torch.inference_mode()
@pytest.mark.skipif(GPU, reason="sizes for the interpreter")
@pytest.mark.parametrize("rab", ["none", "position"])
def test_odd_widths_and_parts_of_the_bias(rab):
    """Heads of 25 columns: nothing is a power of two, and a tile of columns spans heads and parts of the projection."""
    check(layer_case(11, heads=3, d=25, d_model=50, rab=rab, page=8), 1e-5)


@torch.inference_mode()
@pytest.mark.skipif(GPU, reason="sizes for the interpreter")
def test_more_new_tokens_than_a_tile_and_half_precision():
    check(layer_case(5, counts=[20, 0, 0, 0], longest=64, mix=False), 1e-5)
    check(layer_case(6, dtype=torch.float16), LIMITS[torch.float16])


@torch.inference_mode()
def test_a_block_that_another_request_fills_in_the_same_step():
    """vLLM lets a request begin with such a block: its keys count, not what lay there before."""
    layer, x, cache, step, slot_times, config = layer_case(
        3, counts=[2, 1, 1, 1], mix=False, page=4, longest=40, dtype=torch.float16 if GPU else torch.float32
    )  # fmt: skip
    a, b = sorted(range(4), key=lambda i: -int(step.seq_lens[i]))[:2]
    new = int(step.seq_lens[a] - step.query_offsets.diff()[a]) // 4  # the block that sequence a writes to
    last = int(step.seq_lens[b]) - 1
    assert last // 4 > 0, "the case has no earlier block to share"
    shared = min(new, last // 4 - 1)
    step.block_table[b, shared] = step.block_table[a, new]
    cache.nan_to_num_(0.5)
    check((layer, x, cache, step, slot_times, config), LIMITS[layer.uvqk.weight.dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_layers_on_the_gpu(dtype):
    """Also that the result is the same every time, whatever the order in which programs end."""
    sizes = [(16, 64, 1024, 32), (4, 32, 512, 16), (3, 25, 50, 64), (8, 128, 1024, 16)]
    for seed in range(12):
        draw = random.Random(seed)
        heads, d, d_model, page = sizes[seed % 4]
        case = layer_case(
            seed, heads=heads, d=d, d_model=d_model, page=page, longest=draw.choice([60, 300, 1100]), dtype=dtype,
            counts=draw.choice([None, [1, 1, 1, 1], [12, 0, 3, 1]]),
        )  # fmt: skip
        check(case, LIMITS[dtype])
        (first, _), (second, _) = decoded(*case), decoded(*case)
        assert first.equal(second)
