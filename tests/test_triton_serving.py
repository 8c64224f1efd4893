"""A serving step's attention against the oracle: short and long requests in one step, idle ones, candidates, padding."""

import random

import pytest
import torch
from triton_cases import DEVICE, GPU, LIMITS, error, poison, random_bias, reference, triton_serving


def new_rows(cache, counts, seq_lens, table, total):
    """What the cache holds of each sequence's last `counts` tokens, padded to `total` rows."""
    page = cache.shape[1]
    rows = [cache[table[b, p // page], p % page] for b, n in enumerate(seq_lens) for p in range(n - counts[b], n)]
    return torch.nn.functional.pad(torch.stack(rows), (0, 0, 0, 0, 0, total - len(rows)))


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
    k, v = new_rows(keys, counts, seq_lens, table, len(q)), new_rows(values, counts, seq_lens, table, len(q))
    got = triton_serving.attention_step(q, k, v, keys, values, *where, tiles, **known)[: sum(counts)]
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
