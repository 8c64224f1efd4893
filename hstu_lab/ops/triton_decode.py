"""A layer of a small serving step in three launches: what a decode step costs is launches and waiting, hardly arithmetic.

Layer by layer the weights are read once, by as many programs as there are multiprocessors; each normalises the few rows
again, which is cheaper than a launch that does it for all. Keys and values go from the projection straight to the paged
cache, and the attention's parts, split along the keys, are added up by the projection behind it: without a softmax they are
plain sums, in a fixed order, the same every time.

On compute capability 9.0 a kernel starts while the one before it still runs (programmatic dependent launch) and loads what
that one does not write, weights and cached keys and values, before it waits for it.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hstu_lab.ops.triton_attention import bucket_of, bucket_tables
from hstu_lab.ops.triton_runtime import add, capability, interpreted, least, most, processors, silu_of_half

MOST_TOKENS = 16
"""Tokens of a step up to which its layers are computed here."""


@dataclasses.dataclass(frozen=True)
class DecodeTiles:
    """Output columns of a program of each projection and its warps, keys of a tile of the attention, its warps and splits."""

    enter: int = 32
    enter_warps: int = 8
    keys: int = 256
    keys_warps: int = 8
    splits: int = 2
    leave: int = 16
    leave_warps: int = 8
    pdl: bool = True
    maxnreg: int | None = None


@triton.jit
def normed(x, NormWeight, NormBias, depth, eps, DEPTH: tl.constexpr, FULL: tl.constexpr):
    """LayerNorm of rows x (groups, M, chunk) float32 over groups and chunk; `depth` (groups, 1, chunk) is the column."""
    weight = tl.load(NormWeight + depth, mask=depth < DEPTH, other=0.0).to(tl.float32)
    bias = tl.load(NormBias + depth, mask=depth < DEPTH, other=0.0).to(tl.float32)
    mean = tl.reduce(tl.reduce(x, 2, add), 0, add) / DEPTH
    centred = x - mean[None, :, None]
    if not FULL:
        centred = tl.where(depth < DEPTH, centred, 0.0)
    variance = tl.reduce(tl.reduce(centred * centred, 2, add), 0, add) / DEPTH
    return centred * (1 / tl.sqrt(variance + eps))[None, :, None] * weight + bias


@triton.jit(do_not_specialize=["rows", "columns"])
def enter_kernel(
    X, NormWeight, NormBias, Weight, Bias, Slots, Out, Cache, x_row, c_page, c_slot, c_head, rows, columns, slots, eps,
    DEPTH: tl.constexpr, GROUPS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of SiLU(LN(X) W^T + b) for ROWS rows: U and Q to Out (T, 2, WIDTH), K and V to their slots of the cache."""
    group, chunk = tl.arange(0, GROUPS)[:, None, None], tl.arange(0, CHUNK)[None, None, :]
    depth = group * CHUNK + chunk
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    w_mask = (column < columns)[None, :, None]
    x_mask = (row < rows)[None, :, None]
    if GROUPS * CHUNK != DEPTH:
        w_mask, x_mask = w_mask & (depth < DEPTH), x_mask & (depth < DEPTH)
    # Every warp takes a part of the depth, so that no two read the same weights.
    w = tl.load(Weight + column.to(tl.int64)[None, :, None] * DEPTH + depth, mask=w_mask, other=0.0)
    bias = tl.load(Bias + column, mask=column < columns, other=0.0).to(tl.float32)
    slot = tl.load(Slots + row, mask=row < slots, other=-1).to(tl.int64)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(X + row.to(tl.int64)[None, :, None] * x_row + depth, mask=x_mask, other=0.0).to(tl.float32)
    y = normed(x, NormWeight, NormBias, depth, eps, DEPTH, GROUPS * CHUNK == DEPTH).to(w.dtype)
    acc = tl.reduce(tl.dot(w, tl.permute(y, (0, 2, 1)), input_precision=PRECISION), 0, add)
    out = silu_of_half(0.5 * (acc + bias[:, None]), EXACT).to(Out.dtype.element_ty)
    # Columns are those of U, V, Q and K, one after another, each by heads.
    part, within = column // WIDTH, column % WIDTH
    inside = (column < columns)[:, None] & (row < rows)[None, :]
    to = Out + row.to(tl.int64)[None, :] * (2 * WIDTH) + (part // 2 * WIDTH + within)[:, None]
    tl.store(to, out, mask=inside & (part % 2 == 0)[:, None])
    at = within // D * c_head + within % D + tl.where(part == 1, D, 0)
    to = Cache + (slot // PAGE * c_page + slot % PAGE * c_slot)[None, :] + at[:, None]
    tl.store(to, out.to(Cache.dtype.element_ty), mask=inside & (part % 2 == 1)[:, None] & (slot >= 0)[None, :])


@triton.jit
def key_bias(
    Position, TimeBias, Cells, SlotTimes, slot, keys, there, q_position, q_time, positions, head, position_head, time_head,
    HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr,
):  # fmt: skip
    """Half the bias (N,) of keys in those slots for one query."""
    bias = tl.full(keys.shape, 0.0, tl.float32)
    if HAS_POSITION:
        distance = least(most(q_position - keys, 0), positions - 1)
        bias += 0.5 * tl.load(Position + head * position_head + distance, mask=there, other=0.0).to(tl.float32)
    if HAS_TIME:
        # Noted in this very step, by a kernel that has ended: from L2, where it surely is.
        apart = tl.abs(q_time - tl.load(SlotTimes + slot, mask=there, other=0, cache_modifier=".cg"))
        bucket = bucket_of(least(apart, 2147483646).to(tl.int32), Cells)
        bias += 0.5 * tl.load(TimeBias + head * time_head + bucket, mask=there, other=0.0).to(tl.float32)
    return bias


@triton.jit
def weighted(q, k, v, bias, there, half_scale, EXACT: tl.constexpr):
    """Sum (D,) over keys of SiLU(score) v. q (D,), k and v (N, D), bias and there (N,)."""
    half = tl.reduce(k.to(tl.float32) * q[None, :], 1, add) * half_scale + bias
    weights = silu_of_half(tl.where(there, half, 0.0), EXACT)
    return tl.reduce(v.to(tl.float32) * weights[:, None], 0, add)


@triton.jit
def slots_of(table, keys, there, PAGE: tl.constexpr):
    """Slot (N,) int64 of the keys; 0 where there is none."""
    return tl.load(table + keys // PAGE, mask=there, other=0, cache_modifier=".cg").to(tl.int64) * PAGE + keys % PAGE


@triton.jit
def cached_rows(base, slot, dims, there, c_page, c_slot, PAGE: tl.constexpr, D: tl.constexpr):
    """Rows (N, D_PAD) of one head in those slots."""
    rows = base + (slot // PAGE * c_page + slot % PAGE * c_slot)[:, None] + dims[None, :]
    return tl.load(rows, mask=there[:, None] & (dims < D)[None, :], other=0.0, cache_modifier=".cg")


@triton.jit
def keys_of_tile(
    q, keys_of_head, table, keys, there, dims, Position, TimeBias, Cells, SlotTimes, position, q_time, positions, head,
    position_head, time_head, c_page, c_slot, half_scale, HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr,
    PAGE: tl.constexpr, D: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """What the keys (N,) of one sequence add to the output (D,) of one query and head."""
    slot = slots_of(table, keys, there, PAGE)
    k = cached_rows(keys_of_head, slot, dims, there, c_page, c_slot, PAGE, D)
    v = cached_rows(keys_of_head + D, slot, dims, there, c_page, c_slot, PAGE, D)
    bias = key_bias(
        Position, TimeBias, Cells, SlotTimes, slot, keys, there, position, q_time, positions, head, position_head, time_head,
        HAS_POSITION, HAS_TIME,
    )  # fmt: skip
    return weighted(q, k, v, bias, there, half_scale, EXACT)


@triton.jit(do_not_specialize=["batch", "slots", "splits", "table_row", "positions", "total"])
def attend_kernel(
    Projected, Cache, Parts, BlockTable, QueryOffsets, SeqLens, HistoryLens, QueryTimes, SlotTimes, Slots, Position, TimeBias,
    Cells, c_page, c_slot, c_head, position_head, time_head, table_row, total, batch, slots, splits, positions, half_scale,
    out_scale, HEADS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
    NEW: tl.constexpr, PAGES: tl.constexpr, BATCH_PAD: tl.constexpr, SLOTS_PAD: tl.constexpr, HAS_POSITION: tl.constexpr,
    HAS_TIME: tl.constexpr, EXACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token and head against its part of the cached keys; Parts is (splits, total, heads, D) float32."""
    head = tl.program_id(0) % HEADS
    split = tl.program_id(0) // HEADS
    token = tl.program_id(1)
    lane = tl.arange(0, BATCH_PAD)
    ends = tl.load(QueryOffsets + 1 + lane, mask=lane < batch, other=1 << 30, cache_modifier=".cg")
    b = tl.reduce((ends <= token).to(tl.int32), 0, add)
    if b < batch:
        start = tl.load(QueryOffsets + b, cache_modifier=".cg").to(tl.int32)
        count = tl.load(QueryOffsets + b + 1, cache_modifier=".cg").to(tl.int32) - start
        seq_len = tl.load(SeqLens + b, cache_modifier=".cg").to(tl.int32)
        history = tl.load(HistoryLens + b, cache_modifier=".cg").to(tl.int32)
        table = BlockTable + b.to(tl.int64) * table_row
        old = seq_len - count
        own = old + token - start
        position = least(own, history)
        last = least(position, history - 1)
        q_time = tl.full((1,), 0, tl.int64)
        if HAS_TIME:
            q_time = tl.load(QueryTimes + token + tl.arange(0, 1), cache_modifier=".cg")
        dims = tl.arange(0, D_PAD)
        keys_of_head = Cache + head * c_head
        # This program's share of the keys that were cached before this step.
        seen = least(old, last + 1)
        share = ((seen + splits - 1) // splits + 15) // 16 * 16
        first = split * share
        end = least(seen, first + share)
        keys = first + tl.arange(0, BLOCK_N)
        there = keys < end
        slot = slots_of(table, keys, there, PAGE)
        k = cached_rows(keys_of_head, slot, dims, there, c_page, c_slot, PAGE, D)
        v = cached_rows(keys_of_head + D, slot, dims, there, c_page, c_slot, PAGE, D)
        bias = key_bias(
            Position, TimeBias, Cells, SlotTimes, slot, keys, there, position, q_time, positions, head, position_head, time_head,
            HAS_POSITION, HAS_TIME,
        )  # fmt: skip
        # A request may begin with a block that another one fills in this very step.
        number, near = tl.arange(0, SLOTS_PAD), first // PAGE + tl.arange(0, PAGES)
        new_slots = tl.load(Slots + number, mask=number < slots, other=-1, cache_modifier=".cg").to(tl.int32)
        pages = tl.load(table + near, mask=near * PAGE < end, other=-1, cache_modifier=".cg").to(tl.int32)
        filling = tl.where(new_slots >= 0, new_slots // PAGE, -2)
        stale = tl.reduce(tl.reduce((pages[:, None] == filling[None, :]).to(tl.int32), 1, most), 0, most)
        fresh = old + tl.arange(0, NEW)
        fresh_there = (fresh <= tl.where(split == 0, last, -1)) | (fresh == tl.where(split == 0, own, -1))
        fresh_slot = slots_of(table, fresh, fresh_there, PAGE)
        fresh_bias = key_bias(
            Position, TimeBias, Cells, SlotTimes, fresh_slot, fresh, fresh_there, position, q_time, positions, head,
            position_head, time_head, HAS_POSITION, HAS_TIME,
        )  # fmt: skip
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        q = tl.load(Projected + token.to(tl.int64) * (2 * HEADS * D) + HEADS * D + head * D + dims, mask=dims < D, other=0.0).to(
            tl.float32
        )
        k_new = cached_rows(keys_of_head, fresh_slot, dims, fresh_there, c_page, c_slot, PAGE, D)
        v_new = cached_rows(keys_of_head + D, fresh_slot, dims, fresh_there, c_page, c_slot, PAGE, D)
        if stale > 0:
            k = cached_rows(keys_of_head, slot, dims, there, c_page, c_slot, PAGE, D)
            v = cached_rows(keys_of_head + D, slot, dims, there, c_page, c_slot, PAGE, D)
        acc = weighted(q, k, v, bias, there, half_scale, EXACT)
        acc += weighted(q, k_new, v_new, fresh_bias, fresh_there, half_scale, EXACT)
        for n0 in range(first + BLOCK_N, end, BLOCK_N):
            more = n0 + tl.arange(0, BLOCK_N)
            acc += keys_of_tile(
                q, keys_of_head, table, more, more < end, dims, Position, TimeBias, Cells, SlotTimes, position, q_time, positions,
                head, position_head, time_head, c_page, c_slot, half_scale, HAS_POSITION, HAS_TIME, PAGE, D, EXACT,
            )  # fmt: skip
        if split == 0:
            for n0 in range(old + NEW, own + 1, NEW):
                newer = n0 + tl.arange(0, NEW)
                acc += keys_of_tile(
                    q, keys_of_head, table, newer, (newer <= last) | (newer == own), dims, Position, TimeBias, Cells, SlotTimes,
                    position, q_time, positions, head, position_head, time_head, c_page, c_slot, half_scale, HAS_POSITION,
                    HAS_TIME, PAGE, D, EXACT,
                )  # fmt: skip
        to = Parts + ((split.to(tl.int64) * total + token) * HEADS + head) * D + dims
        tl.store(to, acc * out_scale, mask=dims < D)
    else:  # padding: zeros, since what lies there could be anything
        dims = tl.arange(0, D_PAD)
        to = Parts + ((split.to(tl.int64) * total + token) * HEADS + head) * D + dims
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        tl.store(to, tl.full((D_PAD,), 0.0, tl.float32), mask=dims < D)


@triton.jit(do_not_specialize=["rows", "columns"])
def leave_kernel(
    Parts, Projected, NormWeight, NormBias, Weight, Bias, Residual, Out, x_row, rows, columns, eps,
    DEPTH: tl.constexpr, GROUPS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of Residual + (LN(sum of Parts) * U) W^T + b for ROWS rows; U is Projected[:, 0]."""
    group, chunk = tl.arange(0, GROUPS)[:, None, None], tl.arange(0, CHUNK)[None, None, :]
    depth = group * CHUNK + chunk
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    w_mask = (column < columns)[None, :, None]
    x_mask = (row < rows)[None, :, None]
    if GROUPS * CHUNK != DEPTH:
        w_mask, x_mask = w_mask & (depth < DEPTH), x_mask & (depth < DEPTH)
    inside = (column < columns)[:, None] & (row < rows)[None, :]
    row = row.to(tl.int64)
    w = tl.load(Weight + column.to(tl.int64)[None, :, None] * DEPTH + depth, mask=w_mask, other=0.0)
    bias = tl.load(Bias + column, mask=column < columns, other=0.0).to(tl.float32)
    # Written two kernels ago, which has ended.
    gate = tl.load(Projected + row[None, :, None] * (2 * DEPTH) + depth, mask=x_mask, other=0.0, cache_modifier=".cg")
    x = tl.load(Residual + row[None, :] * x_row + column[:, None], mask=inside, other=0.0, cache_modifier=".cg")
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    parts = Parts + row[None, :, None] * DEPTH + depth
    attended = tl.load(parts, mask=x_mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        attended += tl.load(parts + split * rows.to(tl.int64) * DEPTH, mask=x_mask, other=0.0)
    y = normed(attended, NormWeight, NormBias, depth, eps, DEPTH, GROUPS * CHUNK == DEPTH)
    y = (y * gate.to(tl.float32)).to(w.dtype)
    acc = tl.reduce(tl.dot(w, tl.permute(y, (0, 2, 1)), input_precision=PRECISION), 0, add)
    acc += bias[:, None] + x.to(tl.float32)
    tl.store(Out + row[None, :] * columns + column[:, None], acc.to(Out.dtype.element_ty), mask=inside)


def default_tiles(tokens: int, heads: int, like: Tensor) -> DecodeTiles:
    """Tiles for a step of `tokens` tokens."""
    if interpreted():
        return DecodeTiles(16, 2, 16, 4, 2, 16, 2, pdl=False)
    splits = max(1, min(2 * processors(like) // (tokens * heads), 8))
    return DecodeTiles(splits=splits, pdl=capability(like) >= 90)


def _groups(depth: int, warps: int) -> tuple[int, int]:
    """Parts of the depth and how long they are: as many as warps, 16 at the least, powers of two."""
    padded = max(16, triton.next_power_of_2(depth))
    groups = max(1, min(warps, padded // 16))
    return groups, padded // groups


def takes(x: Tensor, cache: Tensor) -> bool:
    """Whether `decode_layer` takes a step of tokens x (T, d_model) with this cache and is the quicker way."""
    widest = max(x.shape[1], cache.shape[2] * cache.shape[3] // 2)
    dtypes = (torch.float32, torch.float16) if interpreted() else (torch.float16, torch.bfloat16)
    return 0 < len(x) <= MOST_TOKENS and widest <= 2048 and x.dtype == cache.dtype and x.dtype in dtypes


def decode_layer(
    x: Tensor, layer, cache: Tensor, slots: Tensor, block_table: Tensor, query_offsets: Tensor, seq_lens: Tensor,
    history_lens: Tensor, *, divisor: float, query_times: Tensor | None, slot_times: Tensor | None,
    tiles: DecodeTiles | None = None,
) -> Tensor:  # fmt: skip
    """One HSTU layer for the new tokens of a step: x (T, d_model) -> (T, d_model); their keys and values go to the cache.

    layer: an `hstu_lab.model.HSTULayer` with d_qk = d_v = d. cache (blocks, block_size, H, 2 d), keys before values; slots (at
    most T,), negative for padding; shapes of the rest as in `attention_paged`. Rows of padding come out undefined.
    """
    rows, d_model = x.shape
    page, heads, d = cache.shape[1], cache.shape[2], cache.shape[3] // 2
    width = heads * d
    tiles = tiles or default_tiles(rows, heads, x)
    eps, bias = layer.eps, layer.bias
    position, time = (bias.position, bias.time) if bias else (None, None)
    batch = query_offsets.shape[0] - 1
    padded = 8 if rows <= 8 and not interpreted() else 16
    options = {"launch_pdl": True} if tiles.pdl else {}
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    exact = x.dtype == torch.float32 or interpreted()
    projected = torch.empty(rows, 2, width, dtype=x.dtype, device=x.device)
    columns = layer.uvqk.out_features
    groups, chunk = _groups(d_model, tiles.enter_warps)
    enter_kernel[(triton.cdiv(columns, tiles.enter), triton.cdiv(rows, padded))](
        x, layer.norm.weight, layer.norm.bias, layer.uvqk.weight, layer.uvqk.bias, slots, projected, cache, x.stride(0),
        *cache.stride()[:3], rows, columns, len(slots), eps,
        DEPTH=d_model, GROUPS=groups, CHUNK=chunk, ROWS=padded, BLOCK_N=tiles.enter, WIDTH=width, D=d, PAGE=page, EXACT=exact,
        PRECISION=precision, PDL=tiles.pdl, num_warps=tiles.enter_warps, num_stages=1, **options,
    )  # fmt: skip
    parts = torch.empty(tiles.splits, rows, width, dtype=torch.float32, device=x.device)
    attend_kernel[(heads * tiles.splits, rows)](
        projected, cache, parts, block_table, query_offsets, seq_lens, history_lens, query_times, slot_times, slots, position,
        time, None if time is None else bucket_tables(time.shape[1], x.device)[1], *cache.stride()[:3],
        0 if position is None else position.stride(0), 0 if time is None else time.stride(0), block_table.stride(0), rows, batch,
        len(slots), tiles.splits, 0 if position is None else position.shape[1], 0.5 * d**-0.5, 1 / divisor,
        HEADS=heads, D=d, D_PAD=max(16, triton.next_power_of_2(d)), PAGE=page, BLOCK_N=tiles.keys, NEW=16,
        PAGES=max(4, 2 * tiles.keys // page), BATCH_PAD=max(16, triton.next_power_of_2(batch)),
        SLOTS_PAD=max(16, triton.next_power_of_2(len(slots))),
        HAS_POSITION=position is not None, HAS_TIME=time is not None, EXACT=exact, PDL=tiles.pdl, num_warps=tiles.keys_warps,
        num_stages=1, **options, **({} if tiles.maxnreg is None else {"maxnreg": tiles.maxnreg}),
    )  # fmt: skip
    result = torch.empty(rows, d_model, dtype=x.dtype, device=x.device)
    groups, chunk = _groups(width, tiles.leave_warps)
    leave_kernel[(triton.cdiv(d_model, tiles.leave), triton.cdiv(rows, padded))](
        parts, projected, layer.attention_norm.weight, layer.attention_norm.bias, layer.out.weight, layer.out.bias, x, result,
        x.stride(0), rows, d_model, eps,
        DEPTH=width, GROUPS=groups, CHUNK=chunk, ROWS=padded, BLOCK_N=tiles.leave, SPLITS=tiles.splits, PRECISION=precision,
        PDL=tiles.pdl, num_warps=tiles.leave_warps, num_stages=1, **options,
    )  # fmt: skip
    return result
