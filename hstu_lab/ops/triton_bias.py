"""The relative bias inside the attention kernel: prepared once for all heads and tiles, looked up in the kernel's loop.

The matrix B x H x N x N of biases is never in memory. A position bias depends on the distance alone: a row a head, read in pairs.
The time bias of a tile of keys in order of time is a few steps, at columns that the preparation finds by bisection.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from hstu_lab.ops.reference import RelativeBias, time_thresholds
from hstu_lab.ops.triton_runtime import add, least, most
from hstu_lab.ops.triton_tiles import Tiles

CELLS = tl.constexpr(((127 + 31) << 2) + 1)
"""Cells of the float32 numbers 0 .. 2^31 by exponent and two bits of mantissa; those of fractions are never used."""

CHUNK = tl.constexpr(8)
"""Key tiles that a program of the preparation works on at a time."""


@triton.jit
def position_bias_of(pairs, PLAIN: tl.constexpr):
    """Half the position bias (R, 2 * C) from pointers (R, C) to pairs of float32: one load for two columns.

    Assembly, since a tl.load would be staged through shared memory: the pipeliner would copy every looked-up element there.
    """
    if PLAIN:
        first = pairs.to(tl.pointer_type(tl.float32), bitcast=True)
        left, right = tl.load(first), tl.load(first + 1)
    else:
        left, right = tl.inline_asm_elementwise(
            "ld.global.nc.v2.f32 {$0, $1}, [$2];", "=f,=f,l", [pairs], dtype=(tl.float32, tl.float32), is_pure=True, pack=1
        )
    return tl.reshape(tl.join(left, right), (pairs.shape[0], 2 * pairs.shape[1]))


@triton.jit
def cell_of(seconds):
    """Index of the quarter octave that holds each of non-negative int32 `seconds`: 0 for 0, at most one threshold in each."""
    return seconds.to(tl.float32).to(tl.int32, bitcast=True) >> 21


@triton.jit
def bucket_of(seconds, cells):
    """Time bucket of non-negative int32 differences."""
    entry = tl.load(cells + cell_of(seconds))
    return (entry >> 32).to(tl.int32) + tl.where(seconds >= entry.to(tl.int32), 1, 0)


@triton.jit
def time_bias_of(seconds, lut, WIDE: tl.constexpr, PLAIN: tl.constexpr):
    """Half the time bias of non-negative int32 differences; `lut` holds (threshold, value below it, value from it on).

    Four words an entry where values are exact; two in half precision, the values as a pair of float16: what a lookup costs is
    the width of its entry.
    """
    if PLAIN:
        entry = lut + cell_of(seconds) * (4 if WIDE else 2)
        threshold = tl.load(entry)
        if WIDE:
            below = tl.load(entry + 1).to(tl.float32, bitcast=True)
            above = tl.load(entry + 2).to(tl.float32, bitcast=True)
        else:
            below = (tl.load(entry + 1) & 65535).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            above = (tl.load(entry + 1) >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        value = tl.where(seconds >= threshold, above, below)
    elif WIDE:
        threshold, below, above, _ = tl.inline_asm_elementwise(
            """{
            .reg .f32 number; .reg .b32 cell; .reg .b64 entry;
            cvt.rn.f32.s32 number, $4;
            mov.b32 cell, number;
            shr.u32 cell, cell, 21;
            mad.wide.u32 entry, cell, 16, $5;
            ld.global.nc.v4.b32 {$0, $1, $2, $3}, [entry];
            }""",
            "=r,=f,=f,=r,r,l", [seconds, lut],
            dtype=(tl.int32, tl.float32, tl.float32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
        value = tl.where(seconds >= threshold, above, below)
    else:
        value = tl.inline_asm_elementwise(
            """{
            .reg .f32 number; .reg .b32 cell, threshold, pair; .reg .b64 entry; .reg .pred above; .reg .b16 low, high;
            cvt.rn.f32.s32 number, $1;
            mov.b32 cell, number;
            shr.u32 cell, cell, 21;
            mad.wide.u32 entry, cell, 8, $2;
            ld.global.nc.v2.b32 {threshold, pair}, [entry];
            setp.ge.s32 above, $1, threshold;
            @above shr.u32 pair, pair, 16;
            mov.b32 {low, high}, pair;
            cvt.f32.f16 $0, low;
            }""",
            "=f,r,l", [seconds, lut], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return value


@triton.jit
def load_now(pointers, PLAIN: tl.constexpr):
    """What `pointers` point to, 16 or 32 bits each. In assembly, since the pipeliner would stage a tl.load of the loop through
    shared memory, at the price of a barrier."""
    if PLAIN:
        return tl.load(pointers)
    else:
        if pointers.dtype.element_ty.primitive_bitwidth == 16:
            bits = tl.inline_asm_elementwise(
                "ld.global.nc.b16 $0, [$1];", "=h,l", [pointers], dtype=tl.int16, is_pure=True, pack=1
            )
        else:
            bits = tl.inline_asm_elementwise(
                "ld.global.nc.b32 $0, [$1];", "=r,l", [pointers], dtype=tl.int32, is_pure=True, pack=1
            )
        return bits.to(pointers.dtype.element_ty, bitcast=True)


@triton.jit(do_not_specialize=["batch", "positions", "buckets", "origin", "table_len", "max_tiles", "max_tiles_k"])
def prepare_kernel(
    Position, TimeBias, Times, Offsets, NumCandidates, PositionTable, Steps, Lut, Relative, FastTiles, Ordered, Lowest, Bounds,
    Thresholds, Cells, batch, position_head, time_head, positions, buckets, origin, table_len, max_tiles, max_tiles_k, scale,
    HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr, HAS_CANDIDATES: tl.constexpr, LADDER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BISECT: tl.constexpr, CHUNK: tl.constexpr, SCAN: tl.constexpr,
    TABLE_BLOCK: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """What `attention_kernel` wants of the bias, for all heads and tiles.

    Programs (row tile and part, b < batch): times as int32 seconds since the sequence's first; of each key tile before the row
    tile its smallest bucket, the bucket boundaries in it, and for every row the column where each lies (Bounds, a byte each); how
    many tiles from the start hold at most LADDER boundaries (FastTiles); how far the times ascend (Ordered). Programs (any,
    batch + head): the tables of the head, times `scale` (position) and halved (time).
    """
    # The tables of the heads first: they are the longest chain of loads, and programs start in order of their number.
    tile, part, b = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS, tl.num_programs(1) - 1 - tl.program_id(1)
    if b >= batch:
        head = b - batch
        if HAS_POSITION:
            # Two copies of the reversed row, the second shifted by one, so that any pair of neighbours is aligned in one.
            part = tl.program_id(0)
            while part * TABLE_BLOCK < 2 * table_len:
                at = part * TABLE_BLOCK + tl.arange(0, TABLE_BLOCK)
                shift = tl.where(at >= table_len, 1, 0)
                distance = least(most(origin - (at - shift * table_len - shift), 0), positions - 1)
                value = tl.load(Position + head * position_head + distance).to(tl.float32)
                tl.store(PositionTable + head * 2 * table_len + at, scale * value, mask=at < 2 * table_len)
                part += tl.num_programs(0)
        if HAS_TIME:  # noqa: SIM102 - a compile-time and a run-time condition
            if tl.program_id(0) == 0:
                step = tl.arange(0, 256)
                value = 0.5 * tl.load(TimeBias + head * time_head + least(step, buckets - 1)).to(tl.float32)
                tl.store(Steps + head * 256 + step, value)
                cell = tl.arange(0, 1024)
                entry = tl.load(Cells + least(cell, CELLS - 1))
                bucket = (entry >> 32).to(tl.int32)
                below = 0.5 * tl.load(TimeBias + head * time_head + bucket).to(tl.float32)
                above = 0.5 * tl.load(TimeBias + head * time_head + least(bucket + 1, buckets - 1)).to(tl.float32)
                if WIDE:
                    lut = Lut + (head * CELLS + cell) * 4
                    tl.store(lut, entry.to(tl.int32), mask=cell < CELLS)
                    tl.store(lut + 1, below.to(tl.int32, bitcast=True), mask=cell < CELLS)
                    tl.store(lut + 2, above.to(tl.int32, bitcast=True), mask=cell < CELLS)
                else:
                    lut = Lut + (head * CELLS + cell) * 2
                    low = least(most(below, -65504.0), 65504.0).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 65535
                    high = least(most(above, -65504.0), 65504.0).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
                    tl.store(lut, entry.to(tl.int32), mask=cell < CELLS)
                    tl.store(lut + 1, low | (high << 16), mask=cell < CELLS)
    elif HAS_TIME:
        start, end = tl.load(Offsets + b), tl.load(Offsets + b + 1)
        length = (end - start).to(tl.int32)
        m0 = tile * BLOCK_M
        if m0 < length:
            history = length
            if HAS_CANDIDATES:
                history = length - tl.load(NumCandidates + b).to(tl.int32)
            full_tiles = least(m0 + 1, history) // BLOCK_N
            fast = full_tiles
            if tile == 0:
                # Attention believes the columns below only as far as the times ascend from the start of the sequence.
                ordered = length
                share = (length + PARTS - 1) // PARTS
                for first in range(1 + part * share, least(1 + (part + 1) * share, length), SCAN):
                    column = first + tl.arange(0, SCAN)
                    at = Times + start + least(column, length - 1)
                    back = tl.load(at) < tl.load(at - 1)
                    ordered = least(ordered, tl.reduce(tl.where(back & (column < length), column, length), 0, least))
                tl.store(Ordered + b * PARTS + part, ordered)
            if (part == 0) | (part * CHUNK < full_tiles):
                rows = m0 + tl.arange(0, BLOCK_M)
                first_time = tl.load(Times + start)
                q_time = tl.load(Times + start + least(rows, length - 1)) - first_time
                tl.store(Relative + start + rows, q_time.to(tl.int32), mask=rows < tl.where(part == 0, length, 0))
                q_least = tl.reduce(q_time, 0, least).to(tl.int32)
                q_most = tl.reduce(q_time, 0, most).to(tl.int32)
                now = q_time + first_time
                for first in range(part * CHUNK, full_tiles, PARTS * CHUNK):
                    tiles = first + tl.arange(0, CHUNK)
                    real = tiles < full_tiles
                    base = Times + start + tiles * BLOCK_N
                    k_least = (tl.load(base, mask=real, other=0) - first_time).to(tl.int32)
                    k_most = (tl.load(base + BLOCK_N - 1, mask=real, other=0) - first_time).to(tl.int32)
                    lowest = bucket_of(most(q_least - k_most, 0), Cells)
                    highest = bucket_of(most(q_most - k_least, 0), Cells)
                    slow = (q_least < k_most) | (highest - lowest > LADDER) | (highest < lowest)
                    fast = least(fast, tl.reduce(tl.where(slow, least(tiles, full_tiles), full_tiles), 0, least))
                    tl.store(Lowest + (b * max_tiles + tile) * max_tiles_k + tiles, lowest + ((highest - lowest) << 8), mask=real)
                    # The keys of a tile come in order of time: where a row's bucket changes is a column, found by bisection.
                    if PARTS > 1:
                        # Long sequences: tile after tile, so that no work is done for those without a boundary.
                        steps = tl.where(real & (slow == 0), lowest + ((highest - lowest) << 8), 0)
                        for index in range(0, CHUNK):
                            step = tl.reduce(tl.where(tiles == first + index, steps, 0), 0, add)
                            bucket, boundaries = step & 255, step >> 8
                            if boundaries > 0:
                                keys = Times + start + (first + index) * BLOCK_N
                                word = tl.full((BLOCK_M,), 0, tl.int32)
                                for number in range(0, boundaries):
                                    latest = now - tl.load(Thresholds + bucket + number + 1)
                                    passed = tl.full((BLOCK_M,), 0, tl.int32)
                                    for halving in tl.static_range(1, BISECT + 1):
                                        k_at = tl.load(keys + (passed + ((BLOCK_N >> halving) - 1)))
                                        passed += tl.where(k_at <= latest, BLOCK_N >> halving, 0)
                                    passed += tl.where(tl.load(keys + passed) <= latest, 1, 0)
                                    word += passed << (8 * number)
                                to = Bounds + ((b * max_tiles + tile) * max_tiles_k + first + index).to(tl.int64) * BLOCK_M
                                tl.store(to + tl.arange(0, BLOCK_M), word)
                    else:
                        # Short ones: all tiles at once, so that few loads wait for each other.
                        crossed = tl.where(real & (slow == 0), highest - lowest, 0)
                        busiest = tl.reduce(crossed, 0, most)
                        if busiest > 0:
                            word = tl.full((CHUNK, BLOCK_M), 0, tl.int32)
                            for number in tl.static_range(0, LADDER):
                                if busiest > number:
                                    inside = (crossed > number)[:, None]
                                    latest = q_time[None, :] - tl.load(Thresholds + lowest + number + 1)[:, None]
                                    passed = tl.full((CHUNK, BLOCK_M), 0, tl.int32)
                                    for halving in tl.static_range(1, BISECT + 1):
                                        where = base[:, None] + passed + ((BLOCK_N >> halving) - 1)
                                        k_at = tl.load(where, mask=inside, other=0) - first_time
                                        passed += tl.where(k_at <= latest, BLOCK_N >> halving, 0)
                                    k_at = tl.load(base[:, None] + passed, mask=inside, other=0) - first_time
                                    passed += tl.where(k_at <= latest, 1, 0)
                                    word += passed << (8 * number)
                            to = Bounds + ((b * max_tiles + tile) * max_tiles_k + tiles[:, None]).to(tl.int64) * BLOCK_M
                            tl.store(to + tl.arange(0, BLOCK_M)[None, :], word, mask=(crossed > 0)[:, None])
            tl.store(FastTiles + (b * max_tiles + tile) * PARTS + part, fast)


@triton.jit
def passed_by(bound, low, high, PLAIN: tl.constexpr):
    """1 where bound > low + high, else 0, for whole numbers: a saturating subtraction, which the floating-point unit does at
    twice the rate of a comparison and a selection. `high` are constants and `low` two numbers a thread: neither takes registers.
    """
    x = bound[:, None] - low[None, :]
    if PLAIN:
        return least(most(x - high[None, :], 0.0), 1.0)
    else:
        high = tl.broadcast_to(high[None, :], x.shape)
        return tl.inline_asm_elementwise("sub.sat.f32 $0, $1, $2;", "=f,f,f", [x, high], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def position_pairs(p_rows, p_shift, p_columns, n0, PLAIN: tl.constexpr):
    """Scaled position bias of the tile at key n0: rows p_rows, each p_shift pairs earlier."""
    return position_bias_of((p_rows + n0 // 2)[:, None] + (p_columns[None, :] - p_shift[:, None]), PLAIN)


@triton.jit
def with_steps(half, crossed, word, value, following, steps, low, high, LADDER: tl.constexpr, PLAIN: tl.constexpr):
    """half, which holds the tile's first time bias `value`, and for each bucket boundary a step at each row's own column."""
    for number in tl.static_range(0, LADDER):
        if crossed > number:
            if number > 0:
                value = following
                following = load_now(steps + number + 1, PLAIN)
            bound = ((word >> (8 * number)) & 255).to(tl.float32)
            half += (following - value) * passed_by(bound, low, high, PLAIN)
    return half


@functools.cache
def bucket_tables(num_buckets: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(thresholds, cells) of `bucket_of` and the fast loop.

    thresholds (num_buckets + 8,) int32: smallest seconds of each bucket, then unreachable ones. cells (CELLS,) int64: for
    every quarter octave of seconds the bucket at its start (upper half) and the threshold inside it (lower half).
    Raises ValueError where a threshold does not fit in int32.
    """
    inner = time_thresholds(num_buckets)
    unreachable = 2**31 - 1
    if inner and inner[-1] >= unreachable:
        raise ValueError(f"{num_buckets} time buckets reach beyond 2^31 seconds: the kernels take at most 72")
    thresholds = [0, *inner, *[unreachable] * 8]
    starts = [0.0] * (127 << 2) + [2.0**octave * (1 + quarter / 4) for octave in range(31) for quarter in range(4)] + [2.0**31]
    cells = []
    for start, stop in zip(starts, [*starts[1:], 2.0**32]):
        inside = [t for t in inner if start <= t < stop and t > start]
        if len(inside) > 1:
            raise ValueError(f"{num_buckets} time buckets: two thresholds {inside} in a quarter octave")
        bucket = sum(t <= start for t in inner)
        cells.append(bucket << 32 | (inside[0] if inside else unreachable))
    as_tensor = functools.partial(torch.tensor, device=device)
    return as_tensor(thresholds, dtype=torch.int32), as_tensor(cells, dtype=torch.int64)


def parts_of(max_tiles_k: int) -> int:
    """Programs that share the preparation of one row tile: one a chunk of key tiles, since its loads wait for each other."""
    chunks = triton.cdiv(max_tiles_k, CHUNK.value)
    return 1 if chunks < 4 else min(8, triton.next_power_of_2(chunks))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one launch shares with its preparation: sizes, and where the bias tables go (None where there is no such bias)."""

    max_tiles: int
    max_tiles_k: int
    origin: int
    table_len: int
    position_table: Tensor | None = None
    steps: Tensor | None = None
    lut: Tensor | None = None
    relative: Tensor | None = None
    fast_tiles: Tensor | None = None
    ordered: Tensor | None = None
    lowest: Tensor | None = None
    bounds: Tensor | None = None
    thresholds: Tensor | None = None
    cells: Tensor | None = None
    after: bool = False
    parts: int = 1

    def prepare_arguments(self, bias: RelativeBias, times: Tensor | None, offsets: Tensor, num_candidates: Tensor | None, d: int):
        """Run-time arguments of `prepare_kernel` by name."""
        position, time = bias.position, bias.time
        return {
            "Position": position, "TimeBias": time, "Times": times, "Offsets": offsets, "NumCandidates": num_candidates,
            "PositionTable": self.position_table, "Steps": self.steps, "Lut": self.lut, "Relative": self.relative,
            "FastTiles": self.fast_tiles, "Ordered": self.ordered, "Lowest": self.lowest, "Bounds": self.bounds,
            "Thresholds": self.thresholds,
            "Cells": self.cells, "batch": offsets.shape[0] - 1,
            "position_head": 0 if position is None else position.stride(0), "time_head": 0 if time is None else time.stride(0),
            "positions": 0 if position is None else position.shape[1], "buckets": 0 if time is None else time.shape[1],
            "origin": self.origin, "table_len": self.table_len, "max_tiles": self.max_tiles, "max_tiles_k": self.max_tiles_k,
            "scale": 0.5 if self.after else d**0.5,
        }  # fmt: skip

    def attention_arguments(self):
        """Those run-time arguments of `attention_kernel` that come from the plan, by name."""
        return {
            "Relative": self.relative, "FastTiles": self.fast_tiles, "Ordered": self.ordered, "Lowest": self.lowest,
            "Bounds": self.bounds, "PositionTable": self.position_table, "Steps": self.steps, "Lut": self.lut,
            "max_tiles": self.max_tiles,
            "max_tiles_k": self.max_tiles_k, "origin": self.origin, "table_len": self.table_len,
        }  # fmt: skip


def plan(
    tiles: Tiles,
    bias: RelativeBias | None,
    device: torch.device,
    *,
    batch: int,
    heads: int,
    total: int,
    max_len: int,
    num_context: int,
) -> Plan:
    """Sizes and empty tables for `total` rows of `batch` sequences, none longer than `max_len`."""
    max_tiles, max_tiles_k = triton.cdiv(max_len, tiles.block_m), triton.cdiv(max_len, tiles.block_n)
    parts = parts_of(max_tiles_k)
    origin = max_tiles * tiles.block_m  # no row of any tile lies beyond
    beyond = max(tiles.block_m, num_context) + max(tiles.block_n, tiles.block_s)
    table_len = origin + beyond + beyond % 2 + 2
    new = functools.partial(torch.empty, device=device, dtype=torch.int32)
    tables = {}
    if bias is not None and bias.position is not None:
        tables["position_table"] = new(heads, 2, table_len, dtype=torch.float32)
    if bias is not None and bias.time is not None:
        thresholds, cells = bucket_tables(bias.time.shape[1], device)
        tables |= {
            "steps": new(heads, 256, dtype=torch.float32), "lut": new(heads, CELLS.value, 4), "relative": new(total),
            "fast_tiles": new(batch, max_tiles, parts), "ordered": new(batch, parts), "thresholds": thresholds, "cells": cells,
            "lowest": new(batch, max_tiles, max_tiles_k), "bounds": new(batch, max_tiles, max_tiles_k, tiles.block_m),
        }  # fmt: skip
    return Plan(max_tiles, max_tiles_k, origin, table_len, after=tiles.after, parts=parts, **tables)
