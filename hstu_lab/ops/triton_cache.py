"""The row cache's three kernels: look up (gather hits, list misses), fetch misses from host memory, publish and evict.

The state that they share is described in `hstu_lab.hot_cache`, which also holds their definitions in plain PyTorch.

A step is three short launches, so what the host does for each counts: Triton's own launch looks at every argument to find the
kernel that fits, and asks the driver about every tensor's address (35 us for a dozen of them on the H200's host). `launch` does
that once for each cache; afterwards it calls the compiled kernel with plain addresses.
"""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from hstu_lab.ops.triton_runtime import add, interpreted

LISTS = ["Ids", "MissAt", "MissRank", "Want", "Counts"]
"""Whatever their alignment and length, one compiled kernel serves."""


def launch(compiled: dict, key: tuple, kernel, grid: int, arguments: tuple, constants: dict, stream=None, warps: int = 4) -> None:
    """Run `kernel` on `grid` programs of the stream (torch.cuda.Stream; default: the current one).

    compiled: of the cache whose tensors the arguments are; the first call with a key compiles, later ones reuse. The key must
    tell apart all that Triton specialises on and that is not fixed for the cache.
    """
    known = compiled.get(key)
    if known is None:
        with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
            done = kernel[(grid,)](*arguments, **constants, num_warps=warps)
        if not interpreted():
            compiled[key] = done
        return
    stream = (stream or torch.cuda.current_stream(arguments[0].device)).cuda_stream
    # The table alone stays a tensor: its pinned memory may have another address on the device.
    plain = [a.data_ptr() if isinstance(a, Tensor) and a.is_cuda else a for a in arguments]
    known.run(grid, 1, 1, stream, known.function, known.packed_metadata, None, None, None, *plain, *constants.values())


@functools.cache
def copying(width: int, copy: bool, scaled: bool) -> dict:
    """Constants of the kernels that copy rows."""
    padded = triton.next_power_of_2(width)
    return {"ROWS": max(1, (256 if interpreted() else 4096) // padded), "WIDTH": padded, "COPY": copy, "SCALED": scaled}


@triton.jit(do_not_specialize=["count", "clock"], do_not_specialize_on_alignment=LISTS)
def lookup_kernel(
    Ids, SlotOf, Slots, SlotScales, Out, LastUsed, Uses, Claimed, MissAt, MissRank, Want, Counts, count, width, clock,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, COPY: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """ROWS ids: copy the rows that are there, list those that are not, and each missing id once."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    given = row < count
    index = tl.load(Ids + row, mask=given, other=0)
    # Not a load: each warp would do its own, and rows are published meanwhile; one that sees a miss where the others see a hit
    # would leave its part of the row unwritten. An atomic is done once, and its result handed to all warps.
    slot = tl.atomic_or(SlotOf + index, 0, mask=given, sem="relaxed")
    hit = given & (slot >= 0)
    where = tl.where(hit, slot, 0).to(tl.int64)
    if COPY:
        column = tl.arange(0, WIDTH)
        inside = hit[:, None] & (column[None, :] < width)
        x = tl.load(Slots + where[:, None] * width + column[None, :], mask=inside, other=0)
        if SCALED:
            x = x.to(tl.float32) * tl.load(SlotScales + where, mask=hit, other=0.0)[:, None]
        tl.store(Out + row.to(tl.int64)[:, None] * width + column[None, :], x.to(Out.dtype.element_ty), mask=inside)
    tl.store(LastUsed + where, clock, mask=hit)
    tl.atomic_add(Uses + where, 1, mask=hit, sem="relaxed")
    miss = given & (slot < 0)
    before = tl.atomic_xchg(Claimed + index, clock, mask=miss, sem="relaxed")
    first = miss & (before != clock)
    zero = row * 0
    at = tl.atomic_add(Counts + zero, 1, mask=miss, sem="relaxed")
    rank = tl.atomic_add(Counts + 1 + zero, 1, mask=first, sem="relaxed")
    tl.store(MissAt + at, row, mask=miss)
    tl.store(MissRank + at, tl.where(first, rank, -1), mask=miss)
    tl.store(Want + rank, index, mask=first)


def lookup(
    ids: Tensor, state, out: Tensor | None, miss_at: Tensor, miss_rank: Tensor, want: Tensor, counts: Tensor, clock: int,
    stream=None,
) -> None:  # fmt: skip
    """See `hot_cache.lookup`."""
    count, width = ids.shape[0], state.slots.shape[1]
    if count == 0:
        return
    constants = copying(width, out is not None, state.slots.dtype == torch.int8)
    arguments = (
        ids, state.slot_of, state.slots, state.slot_scales, state.slots if out is None else out, state.last_used, state.uses,
        state.claimed, miss_at, miss_rank, want, counts, count, width, clock,
    )  # fmt: skip
    key = "lookup", out is not None and out.dtype
    launch(state.compiled, key, lookup_kernel, -(-count // constants["ROWS"]), arguments, constants, stream)


@triton.jit(do_not_specialize_on_alignment=LISTS)
def fetch_kernel(
    Ids, Table, TableScales, Out, Slots, SlotScales, MissAt, MissRank, Counts, Spare, spares, width,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, COPY: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Misses in turn, ROWS at a time: the row from host memory, over the bus, to the output and to a spare slot."""
    column = tl.arange(0, WIDTH)
    lane = tl.arange(0, ROWS)
    misses = tl.load(Counts)
    for start in range(tl.program_id(0) * ROWS, misses, tl.num_programs(0) * ROWS):
        given = start + lane < misses
        at = tl.load(MissAt + start + lane, mask=given, other=0).to(tl.int64)
        rank = tl.load(MissRank + start + lane, mask=given, other=-1)
        index = tl.load(Ids + at, mask=given, other=0)
        inside = given[:, None] & (column[None, :] < width)
        x = tl.load(Table + index[:, None] * width + column[None, :], mask=inside, other=0)
        slot = tl.load(Spare + rank, mask=given & (rank >= 0) & (rank < spares), other=-1).to(tl.int64)
        kept = slot >= 0
        tl.store(Slots + slot[:, None] * width + column[None, :], x, mask=inside & kept[:, None])
        if SCALED:
            scale = tl.load(TableScales + index, mask=given, other=0.0)
            tl.store(SlotScales + slot, scale, mask=kept)
            x = x.to(tl.float32) * scale[:, None]
        if COPY:
            tl.store(Out + at[:, None] * width + column[None, :], x.to(Out.dtype.element_ty), mask=inside)


def fetch(
    ids: Tensor, state, out: Tensor | None, miss_at: Tensor, miss_rank: Tensor, counts: Tensor, programs: int = 64, stream=None
) -> None:
    """See `hot_cache.fetch`. `programs` bounds how much of the GPU waits for the bus."""
    count, width = ids.shape[0], state.slots.shape[1]
    if count == 0:
        return
    constants = copying(width, out is not None, state.slots.dtype == torch.int8)
    arguments = (
        ids, state.table, state.table_scales, state.slots if out is None else out, state.slots, state.slot_scales,
        miss_at, miss_rank, counts, state.spare, state.spare.shape[0], width,
    )  # fmt: skip
    grid = 1 if interpreted() else min(programs, -(-count // constants["ROWS"]))
    launch(state.compiled, ("fetch", out is not None and out.dtype), fetch_kernel, grid, arguments, constants, stream)


@triton.jit(do_not_specialize=["clock", "hand", "in_use"], do_not_specialize_on_alignment=LISTS)
def publish_kernel(
    SlotOf, IdOf, LastUsed, Uses, Priority, Want, Counts, Spare, Totals, spares, slots, clock, hand, in_use,
    SPARES: tl.constexpr, SAMPLE: tl.constexpr, BY: tl.constexpr,
):  # fmt: skip
    """One program: map the fetched rows, then unmap one victim for each spare slot used: the least of SAMPLE slots' rows."""
    r = tl.arange(0, SPARES)
    given = r < spares
    wanted = tl.load(Counts + 1)
    spare = tl.load(Spare + r, mask=given, other=-1)
    used = given & (spare >= 0) & (r < wanted)
    index = tl.load(Want + r, mask=used, other=0)
    used = used & (tl.load(SlotOf + index, mask=used, other=0) < 0)
    tl.debug_barrier()  # threads that hold the same element must all have read it before one of them changes it
    tl.store(SlotOf + index, spare, mask=used)
    tl.store(IdOf + spare, index, mask=used)
    tl.store(LastUsed + spare, clock, mask=used)
    tl.store(Uses + spare, 1, mask=used)
    tl.debug_barrier()  # what follows reads the maps that other threads have just written
    empty = given & (used | (spare < 0))
    rank = tl.associative_scan(empty.to(tl.int32), 0, add) - 1
    filled = tl.load(Totals + 2).to(tl.int32)
    victim = tl.where(rank < slots - filled, filled + rank, -1)
    sampling = empty & (victim < 0)
    least = tl.full((SPARES,), float("inf"), tl.float32)
    for s in range(tl.minimum(tl.reduce(sampling.to(tl.int32), 0, add), 1) * SAMPLE):
        candidate = ((hand + (rank * SAMPLE + s).to(tl.int64)) % slots).to(tl.int32)
        candidate = tl.where(sampling & (rank * SAMPLE + s < slots), candidate, 0)
        owner = tl.load(IdOf + candidate, mask=sampling, other=-2)
        last = tl.load(LastUsed + candidate, mask=sampling, other=0)
        free = sampling & (rank * SAMPLE + s < slots) & (owner >= 0) & (last < in_use)
        if BY == 0:
            value = (last - clock).to(tl.float32)
        elif BY == 1:
            value = tl.load(Uses + candidate, mask=free, other=0).to(tl.float32)
        else:
            value = tl.load(Priority + owner, mask=free, other=0.0)
        better = free & (value < least)
        least = tl.where(better, value, least)
        victim = tl.where(better, candidate, victim)
    valid = empty & (victim >= 0)
    old = tl.load(IdOf + victim, mask=valid, other=-1)
    mapped = valid & (old >= 0)
    mapped = mapped & (tl.load(SlotOf + old, mask=mapped, other=-1) == victim)
    tl.store(SlotOf + old, -1, mask=mapped)
    tl.store(IdOf + victim, -2, mask=valid)
    tl.store(Spare + r, tl.where(empty, victim, spare), mask=given)
    taken = tl.reduce(empty.to(tl.int64), 0, add)
    tl.store(Totals, tl.load(Totals) + tl.load(Counts))
    tl.store(Totals + 1, tl.load(Totals + 1) + tl.reduce(used.to(tl.int64), 0, add))
    tl.store(Totals + 2, tl.where(filled + taken < slots, filled + taken, slots))
    tl.debug_barrier()
    tl.store(Counts + tl.arange(0, 2), tl.full((2,), 0, tl.int32))


@functools.cache
def publishing(spares: int, by: int) -> dict:
    return {"SPARES": triton.next_power_of_2(spares), "SAMPLE": 16, "BY": by}


def publish(state, want: Tensor, counts: Tensor, by: int, clock: int, hand: int, in_use: int, stream=None) -> None:
    """See `hot_cache.publish`."""
    spares, priority = state.spare.shape[0], state.priority
    arguments = (
        state.slot_of, state.id_of, state.last_used, state.uses, state.last_used if priority is None else priority, want,
        counts, state.spare, state.totals, spares, state.id_of.shape[0], clock, hand, in_use,
    )  # fmt: skip
    constants = publishing(spares, by)
    launch(state.compiled, ("publish", by, priority is None), publish_kernel, 1, arguments, constants, stream, warps=16)


@triton.jit
def gather_kernel(Ids, Table, Out, count, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    index = tl.load(Ids + row, mask=row < count, other=0)
    inside = (row < count)[:, None] & (column[None, :] < width)
    x = tl.load(Table + index[:, None] * width + column[None, :], mask=inside, other=0)
    tl.store(Out + row.to(tl.int64)[:, None] * width + column[None, :], x, mask=inside)


def gather(table: Tensor, ids: Tensor, out: Tensor) -> Tensor:
    """Rows of `table` (N, D), in device memory or pinned host memory (then over the bus, row by row), to out (T, D)."""
    count, width = ids.shape[0], table.shape[1]
    padded = triton.next_power_of_2(width)
    rows = max(1, (256 if interpreted() else 4096) // padded)
    gather_kernel[(triton.cdiv(count, rows),)](ids, table, out, count, width, ROWS=rows, WIDTH=padded, num_warps=4)
    return out
