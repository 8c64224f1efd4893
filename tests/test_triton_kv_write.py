"""The kernels that write a step to the paged cache against their oracle in plain PyTorch, over random serving steps."""

import random
import types

import pytest
import torch
from triton_cases import DEVICE, GPU

from hstu_lab.ops import reference, triton_ops
from hstu_lab.vllm_plugin.slots import CANDIDATE, Slots


def step(draw: random.Random, page: int, blocks_each: int, done: list[int], padding: int = 0):
    """Metadata of a step that adds a random number of tokens to each sequence; `done` counts those there already."""
    g = torch.Generator().manual_seed(draw.randrange(2**31))
    table = 1 + torch.randperm(len(done) * blocks_each, generator=torch.Generator().manual_seed(7)).view(len(done), -1)
    counts = [draw.choice([0, 1, draw.randrange(0, blocks_each * page - n + 1)]) for n in done]
    counts = [min(count, blocks_each * page - n) for count, n in zip(counts, done)]
    slots = [
        table[b, (n + i) // page].item() * page + (n + i) % page for b, n in enumerate(done) for i in range(counts[b])
    ] + [-1] * padding  # fmt: skip
    done[:] = [n + count for n, count in zip(done, counts)]
    gaps = torch.randint(-1, 10**6, (len(slots),), generator=g)
    gaps[torch.rand(len(slots), generator=g) < 0.2] = CANDIDATE
    metadata = types.SimpleNamespace(
        slots=torch.tensor(slots, dtype=torch.int64, device=DEVICE), block_table=table.int().to(DEVICE),
        query_offsets=torch.tensor([0, *counts]).cumsum(0).int().to(DEVICE), seq_lens=torch.tensor(done).int().to(DEVICE),
    )  # fmt: skip
    return metadata, gaps.to(DEVICE), torch.randint(-1, 50, (len(slots),), generator=g).to(DEVICE)


@pytest.mark.parametrize("page", [4, 16])
def test_gaps_items_times_and_history_lengths(page):
    """Steps upon steps on one cache: what both keep of every slot, and what they tell the layers."""
    draw, done = random.Random(page), [0, 0, 0, 0]
    ours, oracle = Slots(triton_ops), Slots(reference)
    assert ours.fused
    assert not oracle.fused
    cache = torch.empty(1 + 4 * 12, page, 2, 8, device=DEVICE)
    for _ in range(4):
        metadata, gaps, items = step(draw, page, 12, done, padding=draw.randrange(3))
        for slots in (ours, oracle):
            slots.note(gaps, items, metadata, cache)
            noted = metadata.query_times[metadata.slots >= 0], metadata.history_lens
            slots.noted = [*noted, slots.gaps[1:], slots.items[1:], slots.times[1:]]
        for got, expected in zip(ours.noted, oracle.noted, strict=True):
            assert got.equal(expected)
    assert any(done)
    assert oracle.noted[1].lt(metadata.seq_lens).any(), "no candidate was drawn: the test shows nothing"
    logits = torch.zeros(4, 45, device=DEVICE)
    masked = logits.clone()
    oracle.mask_items(masked, metadata.seq_lens, metadata.block_table)
    ours.mask_items(logits, metadata.seq_lens, metadata.block_table)
    assert logits.equal(masked)
    assert 0 < masked.isinf().sum() < masked.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])], ids=str)
@pytest.mark.parametrize(("heads", "d"), [(2, 16), (3, 25)])
def test_keys_and_values_of_strided_views(dtype, heads, d):
    """Views into one projection, as the layer makes them; slots shuffled, padding between."""
    g = torch.Generator().manual_seed(d)
    _, k, v = torch.randn(9, 3 * heads * d, generator=g).to(dtype).to(DEVICE).unflatten(1, (3, heads, d)).unbind(1)
    slots = torch.tensor([7, 30, -1, 12, 4, 31, -1, 19], device=DEVICE)  # the ninth token is padding without a slot
    caches = [torch.full((8, 4, heads, 2 * d), 7.0, dtype=dtype, device=DEVICE) for _ in range(2)]
    Slots(triton_ops).write_kv(k, v, caches[0], slots)
    Slots(reference).write_kv(k, v, caches[1], slots)
    assert caches[0].equal(caches[1])
    assert (caches[0] == 7.0).all(-1).all(-1).sum() == 32 - 6
