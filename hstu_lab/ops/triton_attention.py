"""Pointwise SiLU attention over jagged sequences, fused: the scores never leave the multiprocessor.

There is no softmax, so a tile of keys needs nothing from the tiles before it: the loop is two matrix products around one
SiLU. What decides the speed is how much of the SiLU hides behind the matrix products, hence
SiLU(x) = x/2 * (1 + tanh(x/2)): one special-function operation an element, where an exponential and a division cost two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hstu_lab.ops.reference import RelativeBias
from hstu_lab.ops.triton_bias import CELLS, CHUNK, load_now, plan, position_pairs, prepare_kernel, time_bias_of, with_steps
from hstu_lab.ops.triton_runtime import add, capability, check_dtype, interpreted, least, most, silu_of_half, use_tma
from hstu_lab.ops.triton_tiles import Tiles, default_tiles


@triton.jit
def key_scores(
    q, KTiles, k_tile, start, n0, head, k_row, dims, p_rows, p_shift, p_columns, D: tl.constexpr, D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, INIT: tl.constexpr, TMA: tl.constexpr, PLAIN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """q K^T (BLOCK_M, BLOCK_N) on top of the position bias."""
    scores = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    if INIT:
        scores = position_pairs(p_rows, p_shift, p_columns, n0, PLAIN)
    if TMA:
        k = KTiles.load([(start + n0).to(tl.int32), head * D]).T
    else:
        if D_PAD == D:
            k = tl.load(k_tile + (start + n0) * k_row)
        else:
            k = tl.load(k_tile + (start + n0) * k_row, mask=dims[:, None] < D, other=0.0)
    return tl.dot(q, k, scores, input_precision=PRECISION)


@triton.jit
def add_values(
    weights, acc, VTiles, v_tile, start, n0, head, v_row, value_dims, DV: tl.constexpr, DV_PAD: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + weights V for the tile of keys at n0."""
    if TMA:
        v = VTiles.load([(start + n0).to(tl.int32), head * DV])
    else:
        if DV_PAD == DV:
            v = tl.load(v_tile + (start + n0) * v_row)
        else:
            v = tl.load(v_tile + (start + n0) * v_row, mask=value_dims[None, :] < DV, other=0.0)
    return tl.dot(weights, v, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["pairs", "heads", "max_tiles", "max_tiles_k", "origin", "table_len"])
def attention_kernel(
    Q, K, V, KTiles, VTiles, Out, Offsets, NumCandidates, Relative, FastTiles, Ordered, Lowest, Bounds, PositionTable, Steps,
    Lut, q_row, q_head, k_row, k_head, v_row, v_head, pairs, heads, max_tiles, max_tiles_k, origin, table_len, half_scale,
    out_scale, D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, GROUP: tl.constexpr, NUM_CONTEXT: tl.constexpr, HAS_CANDIDATES: tl.constexpr,
    HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr, EXACT: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    PLAIN: tl.constexpr, LADDER: tl.constexpr, AFTER: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr,
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
        local = tl.arange(0, BLOCK_M)
        rows = m0 + local
        position = least(rows, history)
        dims, value_dims = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
        columns = tl.arange(0, BLOCK_N)
        q_rows = Q + (start + rows[:, None]) * q_row + head * q_head + dims[None, :]
        q = tl.load(q_rows, mask=(rows[:, None] < length) & (dims[None, :] < D), other=0.0)

        full_end = least(m0 + 1, history) // BLOCK_N * BLOCK_N
        fast_end = full_end
        if HAS_TIME:
            row_tile = b * max_tiles + tile
            ordered = tl.load(Ordered + b * PARTS)
            fast_end = tl.load(FastTiles + row_tile * PARTS)
            for part in tl.static_range(1, PARTS):
                ordered = least(ordered, tl.load(Ordered + b * PARTS + part))
                fast_end = least(fast_end, tl.load(FastTiles + row_tile * PARTS + part))
            fast_end = least(fast_end, ordered // BLOCK_N) * BLOCK_N
            lowest = Lowest + row_tile * max_tiles_k
            bounds = Bounds + row_tile.to(tl.int64) * (max_tiles_k * BLOCK_M)
        else:
            lowest = Offsets
            bounds = Offsets
        key_end = least(history, m0 + BLOCK_M)
        if NUM_CONTEXT > 1:
            key_end = most(key_end, least(history, NUM_CONTEXT))

        if HAS_POSITION:
            # Pointer arithmetic in 64 bits, so that the compiler turns columns into immediate offsets of the loads.
            table = PositionTable.to(tl.pointer_type(tl.int64), bitcast=True) + head * table_len
            p_shift = tl.full((BLOCK_M,), 0, tl.int64)
            from_row = position
            if not HAS_CANDIDATES:
                # Rows 8 apart want the same pairs, 4 later: said so, the compiler loads them once.
                upper = local & 8
                from_row = m0 + (local - upper)
                p_shift = (upper // 2).to(tl.int64)
            odd = from_row & 1
            p_rows = table + ((odd * (table_len + 1) + origin - from_row) // 2).to(tl.int64)
            p_columns = tl.arange(0, BLOCK_N // 2).to(tl.int64)
        else:
            p_rows = rows
            p_shift = rows
            p_columns = columns
        if HAS_TIME:
            lut = Lut + head * (CELLS * (4 if WIDE else 2))
        k_tile = K
        v_tile = V
        if not TMA:
            k_tile = K + head * k_head + (columns[None, :] * k_row + dims[:, None])
            v_tile = V + head * v_head + (columns[:, None] * v_row + value_dims[None, :])
        acc = tl.full((BLOCK_M, DV_PAD), 0.0, tl.float32)

        # Tiles that every query of this tile sees whole.
        eighths = (8 * tl.arange(0, BLOCK_N // 8)).to(tl.float32)
        high = tl.reshape(tl.broadcast_to(eighths[:, None], (BLOCK_N // 8, 8)), (BLOCK_N,))
        low = tl.reshape(tl.broadcast_to(tl.arange(0, 8).to(tl.float32)[None, :], (BLOCK_N // 8, 8)), (BLOCK_N,))
        if HAS_TIME:
            # What a tile wants from memory far away is read while the tile before it is at work.
            coming = tl.load(lowest)
            coming_word = tl.load(bounds + local)
        for n0 in range(0, fast_end, BLOCK_N):
            if HAS_TIME:
                crossed = coming
                word = coming_word
                following_tile = least(n0 // BLOCK_N + 1, max_tiles_k - 1)
                coming = load_now(lowest + following_tile, PLAIN)
                coming_word = load_now(bounds + following_tile * BLOCK_M + local, PLAIN)
                steps = Steps + head * 256 + (crossed & 255)
                value = load_now(steps, PLAIN)
                following = load_now(steps + 1, PLAIN)
            scores = key_scores(
                q, KTiles, k_tile, start, n0, head, k_row, dims, p_rows, p_shift, p_columns, D, D_PAD, BLOCK_M, BLOCK_N,
                HAS_POSITION and not AFTER, TMA, PLAIN, PRECISION,
            )  # fmt: skip
            half = scores * half_scale
            if HAS_POSITION and AFTER:
                by_position = position_pairs(p_rows, p_shift, p_columns, n0, PLAIN)
                if HAS_TIME:
                    by_position += value  # here, since a thread's pairs are half as many as its scores
                half += by_position
            elif HAS_TIME:
                half += value
            if HAS_TIME:
                half = with_steps(half, crossed >> 8, word, value, following, steps, low, high, LADDER, PLAIN)
            weights = silu_of_half(half, EXACT).to(q.dtype)
            acc = add_values(weights, acc, VTiles, v_tile, start, n0, head, v_row, value_dims, DV, DV_PAD, TMA, PRECISION)

        # Tiles on the diagonal, at the end of the history, or (with a time bias) across many buckets.
        last_key = least(position, history - 1)
        near = tl.arange(0, BLOCK_S)
        p_near = tl.arange(0, BLOCK_S // 2).to(tl.int64)
        k_tile = K + head * k_head + (near[None, :] * k_row + dims[:, None])
        v_tile = V + head * v_head + (near[:, None] * v_row + value_dims[None, :])
        if HAS_TIME:
            q_time = tl.load(Relative + start + rows, mask=rows < length, other=0)
        for n0 in range(fast_end, key_end, BLOCK_S):
            # Columns counted from n0: from 0, the compiler would compare in 64 bits.
            there = near < history - n0
            scores = tl.full((BLOCK_M, BLOCK_S), 0.0, tl.float32)
            if HAS_POSITION and not AFTER:
                scores = position_pairs(p_rows, p_shift, p_near, n0, PLAIN)
            if HAS_TIME:
                k_time = tl.load(Relative + start + n0 + near, mask=there, other=0)
                by_time = time_bias_of(tl.abs(q_time[:, None] - k_time[None, :]), lut, WIDE, PLAIN)
            if D_PAD == D:
                k = tl.load(k_tile + (start + n0) * k_row, mask=there[None, :], other=0.0)
            else:
                k = tl.load(k_tile + (start + n0) * k_row, mask=there[None, :] & (dims[:, None] < D), other=0.0)
            if DV_PAD == DV:
                v = tl.load(v_tile + (start + n0) * v_row, mask=there[:, None], other=0.0)
            else:
                v = tl.load(v_tile + (start + n0) * v_row, mask=there[:, None] & (value_dims[None, :] < DV), other=0.0)
            if HAS_POSITION and not AFTER:
                # Without this ptxas finds the bias to be written into a product under way, and then runs every matrix
                # instruction of the kernel one at a time (its warning C7515). Its price: a loop with a barrier is not pipelined.
                tl.debug_barrier()
            half = tl.dot(q, k, scores, input_precision=PRECISION) * half_scale
            if HAS_POSITION and AFTER:
                half += position_pairs(p_rows, p_shift, p_near, n0, PLAIN)
            if HAS_TIME:
                half += by_time
            allowed = near[None, :] <= (last_key - n0)[:, None]
            if NUM_CONTEXT > 1:
                allowed = allowed | ((position[:, None] < NUM_CONTEXT) & (near[None, :] < least(NUM_CONTEXT, history) - n0))
            # SiLU(0) is 0; masking the weights instead would cost twice as much, on half-precision pairs.
            weights = silu_of_half(tl.where(allowed, half, 0.0), EXACT).to(q.dtype)
            acc = tl.dot(weights, v, acc, input_precision=PRECISION)

        if HAS_CANDIDATES:  # noqa: SIM102
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
                half = tl.reduce(q.to(tl.float32) * k_own.to(tl.float32), 1, add) * half_scale
                if HAS_POSITION:
                    half += tl.load(PositionTable + head * 2 * table_len + origin) * (1.0 if AFTER else half_scale)
                if HAS_TIME:
                    half += tl.load(Steps + head * 256)
                acc += silu_of_half(half, EXACT)[:, None] * v_own.to(tl.float32)

        o_rows = Out + ((start + rows[:, None]) * heads + head) * DV + value_dims[None, :]
        tl.store(o_rows, (acc * out_scale).to(Out.dtype.element_ty), mask=(rows[:, None] < length) & (value_dims[None, :] < DV))


def attention_jagged(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, *, divisor: float, bias: RelativeBias | None = None,
    times: Tensor | None = None, num_candidates: Tensor | None = None, num_context: int = 0, max_len: int | None = None,
    tiles: Tiles | None = None,
) -> Tensor:  # fmt: skip
    """Attention over jagged sequences; shapes as in `hstu_lab.ops.reference.attention_jagged`. offsets[-1] must be T.

    `max_len` bounds the length of a sequence; without it the number is read back from the device, which waits for it (and
    cannot be captured in a CUDA graph). The times of a sequence must lie within 2^31 - 1 seconds (68 years). Half-precision
    input uses tanh in hardware, float32 the exact SiLU and IEEE products. Raises TypeError or ValueError for what the
    kernels do not take.
    """
    check_dtype(q=q, k=k, v=v)
    total, heads, d = q.shape
    dv = v.shape[2]
    batch = offsets.shape[0] - 1
    has_position = bias is not None and bias.position is not None
    has_time = bias is not None and bias.time is not None
    if has_time and times is None:
        raise ValueError("times is None: a time bias needs the time of every token")
    out = torch.empty(total, heads, dv, dtype=q.dtype, device=q.device)
    if total == 0:
        return out
    if max_len is None:
        max_len = total if batch == 1 else int(offsets.diff().max())
    tiles = tiles or default_tiles(q.dtype, max(d, dv), max_len, batch * heads, bias, capability(q))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    offsets = offsets.long()
    shared = plan(tiles, bias, q.device, batch=batch, heads=heads, total=total, max_len=max_len, num_context=num_context)
    flags = {"HAS_POSITION": has_position, "HAS_TIME": has_time, "HAS_CANDIDATES": num_candidates is not None}
    if has_position or has_time:
        prepare_kernel[(shared.max_tiles * shared.parts, batch + heads)](
            **shared.prepare_arguments(bias, times.long() if has_time else None, offsets, num_candidates, d), **flags,
            LADDER=tiles.ladder, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BISECT=tiles.block_n.bit_length() - 1,
            CHUNK=CHUNK, SCAN=1024 if shared.parts == 1 else 256,
            TABLE_BLOCK=512, WIDE=q.dtype == torch.float32,
            PARTS=shared.parts, num_warps=4 if shared.parts == 1 else 1,
        )  # fmt: skip
    d_pad, dv_pad = max(16, triton.next_power_of_2(d)), max(16, triton.next_power_of_2(dv))
    tma = tiles.tma and d == d_pad and dv == dv_pad and k.stride(1) == d and v.stride(1) == dv and use_tma(k, v)
    keys = values = None
    if tma:
        keys = TensorDescriptor(k, [total, heads * d], [k.stride(0), 1], [tiles.block_n, d])
        values = TensorDescriptor(v, [total, heads * dv], [v.stride(0), 1], [tiles.block_n, dv])
    full = q.dtype == torch.float32
    attention_kernel[(batch * heads * shared.max_tiles,)](
        Q=q, K=k, V=v, KTiles=keys, VTiles=values, Out=out, Offsets=offsets, NumCandidates=num_candidates,
        **shared.attention_arguments(), q_row=q.stride(0), q_head=q.stride(1), k_row=k.stride(0), k_head=k.stride(1),
        v_row=v.stride(0), v_head=v.stride(1), pairs=batch * heads, heads=heads, half_scale=0.5 * d**-0.5, out_scale=1 / divisor,
        D=d, DV=dv, D_PAD=d_pad, DV_PAD=dv_pad, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_S=tiles.block_s,
        GROUP=tiles.group, NUM_CONTEXT=num_context, **flags, EXACT=full or tiles.exact or interpreted(), WIDE=full,
        PARTS=shared.parts, AFTER=tiles.after, LADDER=tiles.ladder, TMA=tma, PLAIN=interpreted(),
        PRECISION="ieee" if full else "tf32", num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        **({} if tiles.maxnreg is None else {"maxnreg": tiles.maxnreg}),
    )  # fmt: skip
    return out
