"""A serving step's attention against the oracle: short and long requests in one step, idle ones, candidates, padding."""

import random

import pytest
import torch
from triton_cases import BIASES, DEVICE, GPU, LIMITS, error, poison, random_bias, reference, triton_candidates, triton_serving

from hstu_lab.config import preset
from hstu_lab.model import HSTULayer
from hstu_lab.ops.triton_paged import PagedTiles


def step_case(seed: int, dtype=torch.float32, heads=2, d=16, page=4, longest=48, padding=3, splits=None):
    """(got, expected) of a step of five requests, 0 to `longest` new tokens each, some ending in candidates."""
    draw, g = random.Random(seed), torch.Generator().manual_seed(seed)
    seq_lens = [draw.randrange(1, longest) for _ in range(5)]
    counts = [draw.choice([0, 1, min(17, n), draw.randrange(1, n + 1)]) for n in seq_lens]
    counts[seed % 5] = max(1, counts[seed % 5])
    history = [n if draw.random() < 0.5 else draw.randrange(1, n + 1) for n in seq_lens]
    pages = -(-longest // page)
    table = torch.randperm(5 * pages, generator=g).view(5, pages).int()
    keys, values = torch.randn(2, 5 * pages, page, heads, d, generator=g).to(dtype).to(DEVICE)
    q = torch.randn(sum(counts) + padding, heads, d, generator=g).to(dtype).to(DEVICE)
    rab = random_bias("both", heads, 64, 64, dtype, g)
    where = table.to(DEVICE), torch.tensor([0, *counts]).cumsum(0).int().to(DEVICE), torch.tensor(seq_lens).int().to(DEVICE)
    known = {
        "divisor": 64, "bias": rab, "query_times": torch.randint(0, 10**6, (len(q),), generator=g).to(DEVICE),
        "slot_times": torch.randint(0, 10**6, (5 * pages, page), generator=g).to(DEVICE),
        "history_lens": torch.tensor(history).int().to(DEVICE),
    }  # fmt: skip
    for b, (n, count, h) in enumerate(zip(seq_lens, counts, history)):  # candidates have the time of the last event
        for position in range(h, n):
            known["slot_times"][table[b, position // page], position % page] = 777
        new = torch.arange(n - count, n)
        known["query_times"][sum(counts[:b]) + (new >= h).nonzero().flatten().to(DEVICE)] = 777
    tiles = triton_serving.list_tiles(
        *where, known["history_lens"], q, page, bias=rab, query_times=known["query_times"], slot_times=known["slot_times"]
    )
    assert (tiles.long is None) == (len(q) <= triton_serving.SHORT)
    poison()
    got = triton_serving.attention_step(q, keys, values, *where, tiles, **known)[: sum(counts)]
    known["bias"] = reference.RelativeBias(rab.position.float(), rab.time.float())
    known["query_times"] = known["query_times"][: sum(counts)]
    expected = reference.attention_paged(q[: sum(counts)].float(), keys.float(), values.float(), *where, **known)
    return got, expected


@pytest.mark.skipif(GPU, reason="the interpreter's small tiles; the GPU test draws longer sequences")
@pytest.mark.parametrize("seed", range(5))
def test_a_step_of_any_mixture(seed):
    assert error(*step_case(seed)) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
def test_steps_on_the_gpu(dtype):
    for seed in range(30):
        page, d, longest = random.Random(seed).choice([(16, 64, 900), (64, 64, 300), (16, 128, 60), (128, 128, 900)])
        assert error(*step_case(seed, dtype, d=d, page=page, longest=longest, padding=seed)) <= LIMITS[dtype], seed


@pytest.mark.parametrize(("counts", "padding"), [([1, 1, 1], 0), ([0, 40, 16, 17, 100], 9), ([16] * 5, 0), ([0, 0, 33], 64)])
def test_every_query_has_one_tile(counts, padding):
    offsets = torch.tensor([0, *counts]).cumsum(0).int().to(DEVICE)
    q = torch.empty(sum(counts) + padding, 2, 16, device=DEVICE)
    lens = offsets.diff() + 5
    history = torch.tensor([n + 5 if b % 2 else 25 for b, n in enumerate(counts)]).int().to(DEVICE)
    table, times = (
        torch.arange(8 * len(counts), device=DEVICE).view(-1, 8),
        torch.zeros(8 * len(counts), 16, device=DEVICE).long(),
    )
    query_times = torch.zeros(len(q), device=DEVICE).long()
    tiles = triton_serving.list_tiles(
        table, offsets, lens, history, q, 16, bias=None, query_times=query_times, slot_times=times
    )  # fmt: skip
    rows = []
    lists = [(tiles.short, triton_serving.SHORT)]
    if tiles.long is not None:
        lists += [(tiles.long, tiles.long_tiles.block_m), (tiles.alike, tiles.alike_tiles.block_m)]
    for listed, high in lists:
        for entry in listed.tolist():
            b, tile = divmod(entry, 1 << 16)
            if tile * high < counts[b] and listed is not tiles.short:
                assert (listed is tiles.alike) == (5 + tile * high >= history[b])
            rows += [(b, row) for row in range(tile * high, min(tile * high + high, counts[b]))]
    assert sorted(rows) == [(b, row) for b, count in enumerate(counts) for row in range(count)]


def candidates_case(seed: int, dtype=torch.float32, heads=2, d=16, page=4, longest=48, bias="both", tiles=None):
    """(got, expected) of three users' candidates, whose own keys and values are not in the cache."""
    draw, g = random.Random(seed), torch.Generator().manual_seed(seed)
    history = [draw.choice([0, 1, draw.randrange(1, longest), longest]) for _ in range(3)]
    counts = [draw.choice([0, 1, draw.randrange(1, longest)]) for _ in history]
    counts[seed % 3] = max(counts[seed % 3], 1)
    pages = -(-2 * longest // page)
    table = torch.randperm(3 * pages, generator=g).view(3, pages)
    keys, values = torch.full((2, 3 * pages, page, heads, d), torch.nan)
    for b, n in enumerate(history):
        for p in range(n):
            for cache in (keys, values):
                cache[table[b, p // page], p % page] = torch.randn(heads, d, generator=g)
    keys, values = keys.to(dtype).to(DEVICE), values.to(dtype).to(DEVICE)
    q, k, v = torch.randn(sum(counts), 3, heads, d, generator=g).to(dtype).to(DEVICE).unbind(1)
    rab = random_bias(bias, heads, 64, 64, dtype, g)
    offsets = torch.tensor([0, *counts]).cumsum(0).int().to(DEVICE)
    lens, seq_lens = (torch.tensor(x).int().to(DEVICE) for x in (history, [h + c for h, c in zip(history, counts)]))
    times = torch.randint(0, 10**6, (3,), generator=g).repeat_interleave(torch.tensor(counts)).to(DEVICE)
    slot_times = torch.randint(0, 10**6, (3 * pages, page), generator=g).to(DEVICE)
    table = table.int().to(DEVICE)
    buckets = triton_candidates.time_buckets(rab, table, offsets, seq_lens, lens, times, slot_times)
    poison()
    got = triton_candidates.attention_candidates(
        q, keys, values, table, offsets, seq_lens, lens, buckets, divisor=64, bias=rab, own=(k, v), max_queries=max(counts),
        tiles=tiles,
    )  # fmt: skip
    if rab is not None:
        rab = reference.RelativeBias(*(None if part is None else part.float() for part in (rab.position, rab.time)))
    expected = reference.attention_paged(
        q.float(), keys.float().nan_to_num(), values.float().nan_to_num(), table, offsets, lens, divisor=64, bias=rab,
        query_times=times, slot_times=slot_times, candidates=(k.float(), v.float()),
    )  # fmt: skip
    return got, expected


def test_candidates_refuse_a_block_table_that_the_compiled_kernel_cannot_read():
    q, cache, lens = (torch.zeros(*shape, device=DEVICE) for shape in ((1, 1, 16), (2, 4, 1, 16), (1,)))
    where = torch.tensor([[0, 1]], device=DEVICE), torch.tensor([0, 1], device=DEVICE), lens.int(), lens.int()
    with pytest.raises(TypeError, match=r"block_table is torch.int64: .* give block_table.int\(\)"):
        triton_candidates.attention_candidates(q, cache, cache, *where, None, divisor=8)


@pytest.mark.skipif(GPU, reason="the interpreter's small tiles; the GPU test draws longer histories")
@pytest.mark.parametrize("bias", BIASES)
def test_candidates_without_a_place_in_the_cache(bias):
    for seed in range(2):
        assert error(*candidates_case(seed, bias=bias)) < 1e-5
    assert error(*candidates_case(2, heads=1, d=25, page=8, bias=bias)) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
def test_candidates_on_the_gpu(dtype):
    for seed in range(20):
        page, d, longest = random.Random(seed).choice([(16, 64, 900), (64, 64, 300), (16, 128, 200), (32, 64, 1100)])
        tiles = None if seed % 2 or d > 64 or dtype == torch.float32 else PagedTiles(64, 128, splits=4)
        assert error(*candidates_case(seed, dtype, d=d, page=page, longest=longest, tiles=tiles)) <= LIMITS[dtype], seed


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if GPU else [torch.float32], ids=str)
def test_a_layer_for_candidates_only(dtype):
    """Against the model's layer over the oracle; the cache is not written."""
    config = preset("tiny").replace(num_heads=3, d_qk=25, d_v=25, d_model=50)
    layer, g = HSTULayer(config, 0), torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=g)
    cache = torch.randn(12, 16, 3, 50, generator=g).to(dtype).to(DEVICE)
    x = torch.randn(29, 50, generator=g).to(dtype).to(DEVICE)
    layer, before = layer.to(dtype).to(DEVICE), cache.clone()
    table = torch.randperm(12, generator=g).view(2, 6).int().to(DEVICE)
    offsets, history = torch.tensor([0, 20, 29]).int().to(DEVICE), torch.tensor([37, 0]).int().to(DEVICE)
    seq_lens = history + offsets.diff()
    times = torch.tensor([5000, 9]).repeat_interleave(torch.tensor([20, 9])).to(DEVICE)
    slot_times = torch.randint(0, 5000, (12, 16), generator=g).to(DEVICE)
    buckets = triton_candidates.time_buckets(layer.bias, table, offsets, seq_lens, history, times, slot_times)
    poison()
    got = triton_candidates.candidates_layer(
        x, layer, cache, table, offsets, seq_lens, history, buckets, divisor=64, max_queries=20
    )
    assert cache.equal(before)

    def attend(_, q, k, v, bias):
        keys, values = cache.float().split(25, dim=-1)
        return reference.attention_paged(
            q, keys, values, table, offsets, history, divisor=64, bias=bias, query_times=times, slot_times=slot_times,
            candidates=(k, v),
        )  # fmt: skip

    assert error(got, layer.float()(x.float(), attend)) <= LIMITS[dtype]
