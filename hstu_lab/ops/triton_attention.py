"""Pointwise SiLU attention over jagged sequences, fused: the scores never leave the multiprocessor.

There is no softmax, so a tile of keys needs nothing from the tiles before it: the loop is two matrix products around one
SiLU. What decides the speed is how much of the SiLU hides behind the matrix products, hence
SiLU(x) = x/2 * (1 + tanh(x/2)): one special-function operation an element, where an exponential and a division cost two.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hstu_lab.ops.reference import RelativeBias, time_thresholds
from hstu_lab.ops.triton_runtime import add, check_dtype, interpreted, least, most, silu_of_half

CELLS = tl.constexpr(((127 + 31) << 2) + 1)
"""Cells of the float32 numbers 0 .. 2^31 by exponent and two bits of mantissa; those of fractions are never used."""

LADDER = 2
"""Bucket boundaries that a tile of the fast loop may cross; tiles that cross more look every element up."""


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
def time_bias_of(seconds, lut, PLAIN: tl.constexpr):
    """Half the time bias of non-negative int32 differences; `lut` holds (threshold, value below it, value from it on, 0)."""
    entry = lut + cell_of(seconds) * 4
    if PLAIN:
        threshold = tl.load(entry)
        below = tl.load(entry + 1).to(tl.float32, bitcast=True)
        above = tl.load(entry + 2).to(tl.float32, bitcast=True)
    else:
        threshold, below, above, _ = tl.inline_asm_elementwise(
            "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=f,=f,=r,l", [entry],
            dtype=(tl.int32, tl.float32, tl.float32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    return tl.where(seconds >= threshold, above, below)


@triton.jit(do_not_specialize=["batch", "positions", "buckets", "origin", "table_len", "max_tiles", "max_tiles_k"])
def prepare_kernel(
    Position, TimeBias, Times, Offsets, NumCandidates, PositionTable, Steps, Lut, Relative, FastTiles, Lowest, Cells,
    batch, position_head, time_head, positions, buckets, origin, table_len, max_tiles, max_tiles_k, scale,
    HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr, HAS_CANDIDATES: tl.constexpr, LADDER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, TABLE_BLOCK: tl.constexpr,
):  # fmt: skip
    """What `attention_kernel` wants of the bias, for all heads and tiles.

    Programs (tile, b < batch): times as int32 seconds since the sequence's first; the smallest bucket of each key tile; how
    many tiles from the start cross at most LADDER boundaries. Programs (part, batch + head): tables of the head, halved.
    """
    tile, b = tl.program_id(0), tl.program_id(1)
    if b >= batch:
        head = b - batch
        if HAS_POSITION:
            # Two copies of the reversed row, the second shifted by one, so that any pair of neighbours is aligned in one.
            part = tile
            while part * TABLE_BLOCK < 2 * table_len:
                at = part * TABLE_BLOCK + tl.arange(0, TABLE_BLOCK)
                shift = tl.where(at >= table_len, 1, 0)
                distance = least(most(origin - (at - shift * table_len - shift), 0), positions - 1)
                value = tl.load(Position + head * position_head + distance).to(tl.float32)
                tl.store(PositionTable + head * 2 * table_len + at, scale * value, mask=at < 2 * table_len)
                part += tl.num_programs(0)
        if HAS_TIME:
            if tile == 0:
                step = tl.arange(0, 256)
                value = scale * tl.load(TimeBias + head * time_head + least(step, buckets - 1)).to(tl.float32)
                tl.store(Steps + head * 256 + step, value)
                cell = tl.arange(0, 1024)
                entry = tl.load(Cells + least(cell, CELLS - 1))
                bucket = (entry >> 32).to(tl.int32)
                below = scale * tl.load(TimeBias + head * time_head + bucket).to(tl.float32)
                above = scale * tl.load(TimeBias + head * time_head + least(bucket + 1, buckets - 1)).to(tl.float32)
                lut = Lut + (head * CELLS + cell) * 4
                tl.store(lut, entry.to(tl.int32), mask=cell < CELLS)
                tl.store(lut + 1, below.to(tl.int32, bitcast=True), mask=cell < CELLS)
                tl.store(lut + 2, above.to(tl.int32, bitcast=True), mask=cell < CELLS)
    elif HAS_TIME:
        start, end = tl.load(Offsets + b), tl.load(Offsets + b + 1)
        length = (end - start).to(tl.int32)
        m0 = tile * BLOCK_M
        if m0 < length:
            history = length
            if HAS_CANDIDATES:
                history = length - tl.load(NumCandidates + b).to(tl.int32)
            rows = m0 + tl.arange(0, BLOCK_M)
            first_time = tl.load(Times + start)
            q_time = tl.load(Times + start + least(rows, length - 1)) - first_time
            tl.store(Relative + start + rows, q_time.to(tl.int32), mask=rows < length)
            q_least = tl.reduce(q_time, 0, least).to(tl.int32)
            q_most = tl.reduce(q_time, 0, most).to(tl.int32)
            full_tiles = least(m0 + 1, history) // BLOCK_N
            fast = full_tiles
            for first in range(0, full_tiles, CHUNK):
                tiles = first + tl.arange(0, CHUNK)
                columns = tiles[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
                k_time = tl.load(Times + start + least(columns, length - 1)) - first_time
                k_least = tl.reduce(k_time, 1, least).to(tl.int32)
                k_most = tl.reduce(k_time, 1, most).to(tl.int32)
                in_order = q_least >= k_most
                lowest = bucket_of(tl.where(in_order, q_least - k_most, 0), Cells)
                highest = bucket_of(tl.where(in_order, q_most - k_least, 0), Cells)
                slow = (q_least < k_most) | (highest - lowest > LADDER)
                fast = least(fast, tl.reduce(tl.where(slow, least(tiles, full_tiles), full_tiles), 0, least))
                lowest = tl.where(highest > lowest, lowest + 1024, lowest)
                tl.store(Lowest + (b * max_tiles + tile) * max_tiles_k + tiles, lowest, mask=tiles < full_tiles)
            tl.store(FastTiles + b * max_tiles + tile, fast)


@triton.jit(do_not_specialize=["pairs", "heads", "max_tiles", "max_tiles_k", "origin", "table_len"])
def attention_kernel(
    Q, K, V, KTiles, VTiles, Out, Offsets, NumCandidates, Relative, FastTiles, Lowest, PositionTable, Steps, Lut, Thresholds,
    q_row, q_head, k_row, k_head, v_row, v_head, pairs, heads, max_tiles, max_tiles_k, origin, table_len, half_scale, out_scale,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr, GROUP: tl.constexpr, NUM_CONTEXT: tl.constexpr, HAS_CANDIDATES: tl.constexpr, HAS_POSITION: tl.constexpr,
    HAS_TIME: tl.constexpr, EXACT: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    PLAIN: tl.constexpr, LADDER: tl.constexpr, PREFETCH: tl.constexpr, PRESCALED: tl.constexpr, BRANCH: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M queries of one (sequence, head) against all keys it may see, in tiles of BLOCK_N."""
    # Programs start in order of their number: the heaviest tiles first, in groups of heads whose keys fit in L2 together.
    pid = tl.program_id(0)
    group = pid // (GROUP * max_tiles)
    within = pid - group * (GROUP * max_tiles)
    members = least(GROUP, pairs - group * GROUP)
    tile = max_tiles - 1 - within // members
    pair = group * GROUP + within % members
    b = pair // heads
    head = pair - b * heads
    start = tl.load(Offsets + b)
    length = (tl.load(Offsets + b + 1) - start).to(tl.int32)
    m0 = tile * BLOCK_M
    if m0 < length:
        history = length
        if HAS_CANDIDATES:
            history = length - tl.load(NumCandidates + b).to(tl.int32)
        start = start.to(tl.int64)
        rows = m0 + tl.arange(0, BLOCK_M)
        position = least(rows, history)
        dims, value_dims = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
        columns = tl.arange(0, BLOCK_N)
        q_rows = Q + (start + rows[:, None]) * q_row + head * q_head + dims[None, :]
        q = tl.load(q_rows, mask=(rows[:, None] < length) & (dims[None, :] < D), other=0.0)

        if PRESCALED:
            # half_scale is a power of two: exact, and one multiplication a score less.
            q = (q.to(tl.float32) * half_scale).to(q.dtype)

        full_end = least(m0 + 1, history) // BLOCK_N * BLOCK_N
        fast_end = full_end
        if HAS_TIME:
            row_tile = b * max_tiles + tile
            fast_end = tl.load(FastTiles + row_tile) * BLOCK_N
            q_time = tl.load(Relative + start + rows, mask=rows < length, other=0)
        key_end = least(history, m0 + BLOCK_M)
        if NUM_CONTEXT > 1:
            key_end = most(key_end, least(history, NUM_CONTEXT))

        if HAS_POSITION:
            # Pointer arithmetic in 64 bits, so that the compiler turns columns into immediate offsets of the loads.
            odd = position & 1
            p_rows = PositionTable.to(tl.pointer_type(tl.int64), bitcast=True) + head * table_len
            p_rows += ((odd * (table_len + 1) + origin - position) // 2).to(tl.int64)
            p_columns = tl.arange(0, BLOCK_N // 2).to(tl.int64)
        if HAS_TIME:
            steps = Steps + head * 256
            lut = Lut + head * (CELLS * 4)
        if not TMA:
            k_tile = K + head * k_head + (columns[None, :] * k_row + dims[:, None])
            v_tile = V + head * v_head + (columns[:, None] * v_row + value_dims[None, :])
        acc = tl.full((BLOCK_M, DV_PAD), 0.0, tl.float32)

        # Tiles that every query of this tile sees whole.
        if HAS_TIME:
            low_next = tl.load(Lowest + row_tile * max_tiles_k)
            k_time_next = tl.load(Relative + start + columns, mask=columns < length, other=0)
        for n0 in range(0, fast_end, BLOCK_N):
            scores = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
            if HAS_POSITION:
                scores = position_bias_of((p_rows + n0 // 2)[:, None] + p_columns[None, :], PLAIN)
            if HAS_TIME:
                if PREFETCH >= 2:
                    k_time = k_time_next
                    k_time_next = tl.load(Relative + start + n0 + BLOCK_N + columns, mask=n0 + BLOCK_N + columns < length, other=0)
                else:
                    k_time = tl.load(Relative + start + n0 + columns)
                if PREFETCH >= 1:
                    low = low_next
                    low_next = tl.load(Lowest + row_tile * max_tiles_k + least(n0 // BLOCK_N + 1, max_tiles_k - 1))
                else:
                    low = tl.load(Lowest + row_tile * max_tiles_k + n0 // BLOCK_N)
                if BRANCH:
                    crossed = low >= 1024
                    low = low & 0xFF
                    base = tl.load(steps + low)
                    if crossed:
                        bias = base
                        for step in tl.static_range(1, LADDER + 1):
                            reached = (q_time - tl.load(Thresholds + low + step))[:, None] >= k_time[None, :]
                            bias = tl.where(reached, tl.load(steps + low + step), bias)
                        scores += bias
                    else:
                        scores += base
                else:
                    low = low & 0xFF
                    bias = tl.load(steps + low)
                    for step in tl.static_range(1, LADDER + 1):
                        reached = (q_time - tl.load(Thresholds + low + step))[:, None] >= k_time[None, :]
                        bias = tl.where(reached, tl.load(steps + low + step), bias)
                    scores += bias
            if TMA:
                k = KTiles.load([(start + n0).to(tl.int32), head * D]).T
            else:
                if D_PAD == D:
                    k = tl.load(k_tile + (start + n0) * k_row)
                else:
                    k = tl.load(k_tile + (start + n0) * k_row, mask=dims[:, None] < D, other=0.0)
            half = tl.dot(q, k, scores, input_precision=PRECISION)
            if not PRESCALED:
                half *= half_scale
            weights = silu_of_half(half, EXACT).to(q.dtype)
            if TMA:
                v = VTiles.load([(start + n0).to(tl.int32), head * DV])
            else:
                if DV_PAD == DV:
                    v = tl.load(v_tile + (start + n0) * v_row)
                else:
                    v = tl.load(v_tile + (start + n0) * v_row, mask=value_dims[None, :] < DV, other=0.0)
            acc = tl.dot(weights, v, acc, input_precision=PRECISION)

        # Tiles on the diagonal, at the end of the history, or (with a time bias) across many buckets.
        last_key = least(position, history - 1)
        near = tl.arange(0, BLOCK_S)
        p_near = tl.arange(0, BLOCK_S // 2).to(tl.int64)
        k_tile = K + head * k_head + (near[None, :] * k_row + dims[:, None])
        v_tile = V + head * v_head + (near[:, None] * v_row + value_dims[None, :])
        for n0 in range(fast_end, key_end, BLOCK_S):
            keys = n0 + near
            scores = tl.full((BLOCK_M, BLOCK_S), 0.0, tl.float32)
            if HAS_POSITION:
                scores = position_bias_of((p_rows + n0 // 2)[:, None] + p_near[None, :], PLAIN)
            if HAS_TIME:
                k_time = tl.load(Relative + start + keys, mask=keys < history, other=0)
                scores += time_bias_of(tl.abs(q_time[:, None] - k_time[None, :]), lut, PLAIN)
            k = tl.load(k_tile + (start + n0) * k_row, mask=(keys[None, :] < history) & (dims[:, None] < D), other=0.0)
            half = tl.dot(q, k, scores, input_precision=PRECISION)
            if not PRESCALED:
                half *= half_scale
            allowed = keys[None, :] <= last_key[:, None]
            if NUM_CONTEXT > 1:
                allowed = allowed | ((position[:, None] < NUM_CONTEXT) & (keys[None, :] < least(NUM_CONTEXT, history)))
            # SiLU(0) is 0; masking the weights instead would cost twice as much, on half-precision pairs.
            weights = silu_of_half(tl.where(allowed, half, 0.0), EXACT).to(q.dtype)
            v = tl.load(
                v_tile + (start + n0) * v_row, mask=(keys[:, None] < history) & (value_dims[None, :] < DV), other=0.0
            )
            acc = tl.dot(weights, v, acc, input_precision=PRECISION)

        if HAS_CANDIDATES:
            # A candidate's own key: one product a row, no tile.
            if m0 + BLOCK_M > history:
                own = (rows >= history) & (rows < length)
                k_own = tl.load(
                    K + (start + rows[:, None]) * k_row + head * k_head + dims[None, :],
                    mask=own[:, None] & (dims[None, :] < D), other=0.0,
                )  # fmt: skip
                v_own = tl.load(
                    V + (start + rows[:, None]) * v_row + head * v_head + value_dims[None, :],
                    mask=own[:, None] & (value_dims[None, :] < DV), other=0.0,
                )  # fmt: skip
                scores = tl.reduce(q.to(tl.float32) * k_own.to(tl.float32), 1, add)
                if HAS_POSITION:
                    scores += tl.load(PositionTable + head * 2 * table_len + origin)
                if HAS_TIME:
                    scores += tl.load(steps)
                if not PRESCALED:
                    scores *= half_scale
                acc += silu_of_half(scores, EXACT)[:, None] * v_own.to(tl.float32)

        o_rows = Out + ((start + rows[:, None]) * heads + head) * DV + value_dims[None, :]
        tl.store(
            o_rows, (acc * out_scale).to(Out.dtype.element_ty), mask=(rows[:, None] < length) & (value_dims[None, :] < DV)
        )


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How one launch is cut: query and key rows of a tile, warps, pipeline stages, heads that share L2, TMA or plain loads."""

    block_m: int
    block_n: int
    block_s: int
    num_warps: int = 4
    num_stages: int = 2
    group: int = 16
    tma: bool = False
    maxnreg: int | None = None
    ladder: int = LADDER
    prefetch: int = 0
    branch: bool = False


def default_tiles(q: Tensor, d: int, max_len: int) -> Tiles:
    if interpreted():
        return Tiles(16, 16, 16)
    if q.dtype == torch.float32:
        return Tiles(32, 32, 32, 4, 2) if d <= 64 else Tiles(32, 16, 16, 4, 2)
    return Tiles(128, 64, 64, 8, 3)


@functools.cache
def bucket_tables(num_buckets: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(thresholds, cells) of `bucket_of` and the fast loop.

    thresholds (num_buckets + LADDER + 1,) int32: smallest seconds of each bucket, then unreachable ones. cells (129,) int64:
    for every quarter octave of seconds the bucket at its start (upper half) and the threshold inside it (lower half).
    Raises ValueError where a threshold does not fit in int32.
    """
    inner = time_thresholds(num_buckets)
    unreachable = 2**31 - 1
    if inner and inner[-1] >= unreachable:
        raise ValueError(f"{num_buckets} time buckets reach beyond 2^31 seconds: the kernels take at most 72")
    thresholds = [0, *inner, *[unreachable] * 4]
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


def attention_jagged(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, *, divisor: float, bias: RelativeBias | None = None,
    times: Tensor | None = None, num_candidates: Tensor | None = None, num_context: int = 0, max_len: int | None = None,
    tiles: Tiles | None = None,
) -> Tensor:  # fmt: skip
    check_dtype(q=q, k=k, v=v)
    total, heads, d = q.shape
    dv = v.shape[2]
    batch = offsets.shape[0] - 1
    out = torch.empty(total, heads, dv, dtype=q.dtype, device=q.device)
    if total == 0:
        return out
    if max_len is None:
        max_len = total if batch == 1 else int(offsets.diff().max())
    tiles = tiles or default_tiles(q, max(d, dv), max_len)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    offsets = offsets.long()
    max_tiles, max_tiles_k = triton.cdiv(max_len, tiles.block_m), triton.cdiv(max_len, tiles.block_n)
    prescaled = math.log2(d) % 2 == 0
    position = bias.position if bias else None
    time = bias.time if bias else None
    if time is not None and times is None:
        raise ValueError("times is None: a time bias needs the time of every token")
    pad = max(tiles.block_m, num_context) + tiles.block_n
    pad += pad % 2
    origin = max_len + max_len % 2
    table_len = 0 if position is None else origin + pad + 2
    table = steps = lut = relative = fast_tiles = lowest = thresholds = cells = None
    if bias and (position is not None or time is not None):
        new = functools.partial(torch.empty, device=q.device, dtype=torch.int32)
        if position is not None:
            table = new(heads, 2, table_len, dtype=torch.float32)
        if time is not None:
            thresholds, cells = bucket_tables(time.shape[1], q.device)
            steps, lut = new(heads, 256, dtype=torch.float32), new(heads, CELLS.value, 4)
            relative, fast_tiles, lowest = new(total), new(batch, max_tiles), new(batch, max_tiles, max_tiles_k)
            times = times.long()
        prepare_kernel[(max_tiles, batch + heads)](
            position, time, times, offsets, num_candidates, table, steps, lut, relative, fast_tiles, lowest, cells, batch,
            0 if position is None else position.stride(0), 0 if time is None else time.stride(0),
            0 if position is None else position.shape[1], 0 if time is None else time.shape[1], origin, table_len, max_tiles, max_tiles_k,
            0.5 if prescaled else d**0.5, HAS_POSITION=position is not None, HAS_TIME=time is not None, HAS_CANDIDATES=num_candidates is not None,
            LADDER=tiles.ladder, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, CHUNK=4 if interpreted() else 16, TABLE_BLOCK=512,
        )  # fmt: skip
    d_pad, dv_pad = max(16, triton.next_power_of_2(d)), max(16, triton.next_power_of_2(dv))
    keys = values = None
    if tiles.tma:
        keys = TensorDescriptor(k, [total, heads * d], [k.stride(0), 1], [tiles.block_n, d])
        values = TensorDescriptor(v, [total, heads * dv], [v.stride(0), 1], [tiles.block_n, dv])
    pairs = batch * heads
    options = {} if tiles.maxnreg is None else {"maxnreg": tiles.maxnreg}
    attention_kernel[(pairs * max_tiles,)](
        q, k, v, keys, values, out, offsets, num_candidates, relative, fast_tiles, lowest, table, steps, lut, thresholds,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        pairs, heads, max_tiles, max_tiles_k, origin, table_len, 0.5 * d**-0.5, 1 / divisor,
        D=d, DV=dv, D_PAD=d_pad, DV_PAD=dv_pad, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_S=tiles.block_s, GROUP=tiles.group,
        NUM_CONTEXT=num_context, HAS_CANDIDATES=num_candidates is not None, HAS_POSITION=position is not None,
        HAS_TIME=time is not None,
        EXACT=q.dtype == torch.float32 or interpreted(), TMA=tiles.tma, PLAIN=interpreted(),
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", LADDER=tiles.ladder, PREFETCH=tiles.prefetch, PRESCALED=prescaled, BRANCH=tiles.branch,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, **options,
    )  # fmt: skip
    return out
