"""The row cache's kernels against their definitions in PyTorch, on random states."""

import copy

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_cases import DEVICE, GPU

from hstu_lab import hot_cache

interpret = triton.knobs.runtime.interpret
triton.knobs.runtime.interpret = not GPU  # only while the kernels are defined
from hstu_lab.ops import triton_cache  # noqa: E402

triton.knobs.runtime.interpret = interpret

ROWS, WIDTH, SPARES = 40, 12, 5
here = pytest.param(DEVICE, marks=[pytest.mark.gpu] if GPU else [])


def random_state(generator, slots, dtype, filled):
    """A cache in the middle of its life: some rows mapped, some slots empty, some spares used up."""
    table = torch.randint(-100, 100, (ROWS, WIDTH), generator=generator).to(dtype)
    scales = torch.rand(ROWS, generator=generator) + 0.5 if dtype == torch.int8 else None
    place = torch.randperm(slots, generator=generator)
    spare = place[:SPARES].int()
    spare[torch.rand(SPARES, generator=generator) < 0.3] = -1
    resident = torch.randperm(ROWS, generator=generator)[: slots - SPARES - 3]
    slot_of = torch.full((ROWS,), -1, dtype=torch.int32)
    id_of = torch.full((slots,), -1)
    slot_of[resident] = place[SPARES : SPARES + len(resident)].int()
    id_of[place[SPARES : SPARES + len(resident)]] = resident
    id_of[spare[spare >= 0].long()] = -2
    rows = torch.zeros(slots, WIDTH, dtype=dtype)
    rows[slot_of[resident].long()] = table[resident]
    slot_scales = None if scales is None else torch.zeros(slots)
    if scales is not None:
        slot_scales[slot_of[resident].long()] = scales[resident]
    return hot_cache.CacheState(
        table, scales, rows, slot_scales, slot_of, id_of, torch.randperm(slots, generator=generator),
        50 * torch.randperm(slots, generator=generator).int(), torch.zeros(ROWS, dtype=torch.int64),
        torch.rand(ROWS, generator=generator), spare, torch.tensor([0, 0, filled]),
    )  # fmt: skip


def moved(state, device):
    fields = {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in vars(state).items()}
    if device == "cuda":
        fields["table"] = state.table.pin_memory()
    return hot_cache.CacheState(**fields)


def step(kernels, state, ids, copy_out, clock, device, choice):
    out = torch.full((len(ids), WIDTH), -7.0, dtype=torch.float32, device=device) if copy_out else None
    lists = torch.full((2, max(len(ids), 1)), -9, dtype=torch.int32, device=device)
    want = torch.full((max(len(ids), SPARES),), -9, dtype=torch.int64, device=device)
    counts = torch.zeros(2, dtype=torch.int32, device=device)
    kernels.lookup(ids, state, out, *lists, want, counts, clock)
    before = None if out is None else out.clone()
    kernels.fetch(ids, state, out, *lists, counts)
    misses = counts.tolist()
    kernels.publish(state, want, counts, *choice)
    assert counts.tolist() == [0, 0]
    return before, out, misses


@pytest.mark.parametrize("device", [here])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6), count=st.integers(0, 30), copy_out=st.booleans(), filled=st.sampled_from([17, 20]),
    by=st.integers(0, 2), hand=st.integers(0, 19), in_use=st.integers(2, 100),
)  # fmt: skip
def test_a_step_does_what_the_definition_says(dtype, device, seed, count, copy_out, filled, by, hand, in_use):
    generator = torch.Generator().manual_seed(seed)
    state = random_state(generator, 20, dtype, filled)
    ids = torch.randint(0, ROWS, (count,), generator=generator)
    ours = moved(copy.deepcopy(state), device)
    choice = by, 100, hand, in_use
    wanted = step(hot_cache, state, ids, copy_out, 100, "cpu", choice)
    got = step(triton_cache, ours, ids.to(device), copy_out, 100, device, choice)
    assert got[2] == wanted[2]
    for ours_out, wanted_out in zip(got[:2], wanted[:2]):
        assert (ours_out is None and wanted_out is None) or torch.equal(ours_out.cpu(), wanted_out)
    assert torch.equal(ours.totals.cpu(), state.totals)
    assert torch.equal(ours.claimed.cpu(), state.claimed)
    # Which missing row takes which spare slot is a race; what is cached then must be whole and current.
    slot_of = ours.slot_of.cpu().long()
    resident = (slot_of >= 0).nonzero().squeeze(1)
    assert len(resident) == int((state.slot_of >= 0).sum())
    assert torch.equal(ours.id_of.cpu()[slot_of[resident]], resident)
    assert torch.equal(ours.slots.cpu()[slot_of[resident]], state.table[resident])
    if dtype == torch.int8:
        assert torch.equal(ours.slot_scales.cpu()[slot_of[resident]], state.table_scales[resident])
    assert torch.equal(ours.spare.cpu(), state.spare), "other victims"


@pytest.mark.parametrize("device", [here])
@pytest.mark.parametrize("by", [0, 1, 2])
@pytest.mark.parametrize(("hand", "in_use", "filled"), [(0, 10**6, 1000), (900, 100, 1000), (77, 0, 1000), (5, 10**6, 980)])
def test_victims_are_the_least_of_their_samples(device, by, hand, in_use, filled, monkeypatch):
    rows, slots, spares, clock = 2000, 1000, 40, 10**6
    generator = torch.Generator().manual_seed(hand + by)
    monkeypatch.setattr(triton_cache, "publishing", lambda spares, by: {"SPARES": 64, "SAMPLE": 16, "BY": by})

    def state():
        generator.manual_seed(hand)
        place = torch.randperm(slots, generator=generator)
        spare, held = place[:spares].int(), place[spares:]
        resident = torch.randperm(rows, generator=generator)[: len(held)]
        slot_of, id_of = torch.full((rows,), -1, dtype=torch.int32), torch.full((slots,), -2)
        slot_of[resident], id_of[held] = held.int(), resident
        last = clock - torch.randint(0, 200, (slots,), generator=generator)
        last[torch.rand(slots, generator=generator) < 0.3] = 50
        priority = torch.randn(rows, generator=generator)
        priority[torch.rand(rows, generator=generator) < 0.1] = -torch.inf
        priority[torch.rand(rows, generator=generator) < 0.1] = torch.inf
        empty = torch.zeros(rows, WIDTH)
        return hot_cache.CacheState(
            empty, None, empty[:slots].clone(), None, slot_of, id_of, last,
            torch.randint(0, 9, (slots,), generator=generator).int(), torch.zeros(rows, dtype=torch.int64), priority, spare,
            torch.tensor([0, 0, filled]),
        )  # fmt: skip

    wanted, ours = state(), moved(state(), device)
    want = (wanted.slot_of < 0).nonzero().squeeze(1)[:37]
    for kernels, each, where in ((hot_cache, wanted, "cpu"), (triton_cache, ours, device)):
        counts = torch.tensor([50, len(want)], dtype=torch.int32, device=where)
        asked = torch.cat([want, torch.full((20,), -9)]).to(where)
        kernels.publish(each, asked, counts, by, clock, hand, in_use)
    for name in ("spare", "slot_of", "id_of", "totals", "last_used", "uses"):
        assert torch.equal(getattr(ours, name).cpu(), getattr(wanted, name)), name
    found = 40 if in_use else 3  # a spare for each row that came in, or only those that were left over
    assert int((wanted.spare >= 0).sum()) == found


@pytest.mark.parametrize("device", [here])
def test_gather(device):
    table = torch.randn(9, 33)
    ids = torch.tensor([0, 8, 3, 3])
    where = table.pin_memory() if device == "cuda" else table
    out = torch.full((4, 33), float("nan"), device=device)
    assert torch.equal(triton_cache.gather(where, ids.to(device), out).cpu(), table[ids])
