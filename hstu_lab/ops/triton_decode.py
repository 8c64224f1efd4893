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

from hstu_lab.ops.reference import RelativeBias
from hstu_lab.ops.triton_bias import bucket_of, bucket_tables
from hstu_lab.ops.triton_runtime import add, capability, interpreted, least, most, processors, silu_of_half

MOST_TOKENS = 32
"""Tokens of a step up to which its layers are computed here."""


@dataclasses.dataclass(frozen=True)
class DecodeTiles:
    """Output columns of a program of each projection and its warps, keys of a tile of the attention, its warps and splits."""

    enter: int = 16
    enter_warps: int = 4
    keys: int = 128
    keys_warps: int = 4
    splits: int = 2
    leave: int = 8
    leave_warps: int = 4
    pdl: bool = True


@triton.jit
def add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def normed(x, shift, NormWeight, NormBias, depth, eps, DEPTH: tl.constexpr, FULL: tl.constexpr):
    """LayerNorm of rows x (groups, M, chunk) float32 over groups and chunk; `depth` (groups, 1, chunk) is the column.

    Both moments in one sweep, about the number `shift` (M,) of each row: one of its elements, so that nothing cancels.
    """
    weight = tl.load(NormWeight + depth, mask=depth < DEPTH, other=0.0).to(tl.float32)
    bias = tl.load(NormBias + depth, mask=depth < DEPTH, other=0.0).to(tl.float32)
    x -= shift[None, :, None]
    if not FULL:
        x = tl.where(depth < DEPTH, x, 0.0)
    mean, square = tl.reduce(tl.reduce((x, x * x), 2, add_both), 0, add_both)
    mean /= DEPTH
    scale = 1 / tl.sqrt(most(square / DEPTH - mean * mean, 0.0) + eps)
    return (x - mean[None, :, None]) * scale[None, :, None] * weight + bias


@triton.jit
def part_of(
    rows, columns, DEPTH: tl.constexpr, GROUPS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """This program's part of a projection: (depth, columns, rows, and which of the weights and of the inputs are there).

    Depth is (GROUPS, 1, CHUNK), the masks (GROUPS or 1, BLOCK_N or ROWS, CHUNK or 1).
    """
    group, chunk = tl.arange(0, GROUPS)[:, None, None], tl.arange(0, CHUNK)[None, None, :]
    depth = group * CHUNK + chunk
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    w_mask = (column < columns)[None, :, None]
    x_mask = (row < rows)[None, :, None]
    if GROUPS * CHUNK != DEPTH:
        w_mask, x_mask = w_mask & (depth < DEPTH), x_mask & (depth < DEPTH)
    return depth, column, row, w_mask, x_mask


@triton.jit(do_not_specialize=["rows", "columns"])
def enter_kernel(
    X, NormWeight, NormBias, Weight, Bias, Slots, Out, Cache, x_row, c_page, c_slot, c_head, rows, columns, slots, eps,
    DEPTH: tl.constexpr, GROUPS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, HAS_CACHE: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of SiLU(LN(X) W^T + b) for ROWS rows: U and Q to Out (T, 2, WIDTH), K and V to their slots of the cache."""
    depth, column, row, w_mask, x_mask = part_of(rows, columns, DEPTH, GROUPS, CHUNK, ROWS, BLOCK_N)
    # Every warp takes a part of the depth, so that no two read the same weights.
    w = tl.load(Weight + column.to(tl.int64)[None, :, None] * DEPTH + depth, mask=w_mask, other=0.0)
    bias = tl.load(Bias + column, mask=column < columns, other=0.0).to(tl.float32)
    if HAS_CACHE:
        slot = tl.load(Slots + row, mask=row < slots, other=-1).to(tl.int64)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(X + row.to(tl.int64)[None, :, None] * x_row + depth, mask=x_mask, other=0.0).to(tl.float32)
    shift = tl.load(X + row.to(tl.int64) * x_row, mask=row < rows, other=0.0).to(tl.float32)
    y = normed(x, shift, NormWeight, NormBias, depth, eps, DEPTH, GROUPS * CHUNK == DEPTH).to(w.dtype)
    acc = tl.reduce(tl.dot(w, tl.permute(y, (0, 2, 1)), input_precision=PRECISION), 0, add)
    out = silu_of_half(0.5 * (acc + bias[:, None]), EXACT).to(Out.dtype.element_ty)
    # Columns are those of U, V, Q and K, one after another, each by heads.
    part, within = column // WIDTH, column % WIDTH
    inside = (column < columns)[:, None] & (row < rows)[None, :]
    to = Out + row.to(tl.int64)[None, :] * (2 * WIDTH) + (part // 2 * WIDTH + within)[:, None]
    tl.store(to, out, mask=inside & (part % 2 == 0)[:, None])
    if HAS_CACHE:
        at = within // D * c_head + within % D + tl.where(part == 1, D, 0)
        to = Cache + (slot // PAGE * c_page + slot % PAGE * c_slot)[None, :] + at[:, None]
        tl.store(to, out.to(Cache.dtype.element_ty), mask=inside & (part % 2 == 1)[:, None] & (slot >= 0)[None, :])


@triton.jit(do_not_specialize=["batch", "table_row", "time_page", "longest"])
def plan_kernel(
    BlockTable, QueryOffsets, SeqLens, HistoryLens, QueryTimes, SlotTimes, Cells, Plan, Buckets, table_row, time_page, longest,
    batch, BATCH_PAD: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, HAS_TIME: tl.constexpr,
):  # fmt: skip
    """What one token sees, for all layers: Plan (T, 4) its sequence, its last key, its own key and how many keys, 0 for padding;
    Buckets (T, longest) the time bucket of each."""
    token = tl.program_id(1)
    lane = tl.arange(0, BATCH_PAD)
    ends = tl.load(QueryOffsets + 1 + lane, mask=lane < batch, other=1 << 30)
    b = tl.reduce((ends <= token).to(tl.int32), 0, add)
    known = b < batch
    b = least(b, batch - 1)
    own = tl.load(SeqLens + b).to(tl.int32) - tl.load(QueryOffsets + b + 1).to(tl.int32) + token
    last = least(own, tl.load(HistoryLens + b).to(tl.int32) - 1)
    count = tl.where(known, last + 1 + tl.where(own > last, 1, 0), 0)
    if tl.program_id(0) == 0:
        to = Plan + token * 4
        tl.store(to, b)
        tl.store(to + 1, last)
        tl.store(to + 2, own)
        tl.store(to + 3, count)
    if HAS_TIME:
        index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        there = index < count
        key = tl.where(index <= last, index, own)
        page = tl.load(BlockTable + b.to(tl.int64) * table_row + key // PAGE, mask=there, other=0).to(tl.int64)
        apart = tl.abs(tl.load(QueryTimes + token) - tl.load(SlotTimes + page * time_page + key % PAGE, mask=there, other=0))
        bucket = bucket_of(least(apart, 2147483646).to(tl.int32), Cells)
        tl.store(Buckets + token.to(tl.int64) * longest + index, bucket, mask=there)


@triton.jit
def rows_of(Cache, table, key, there, head, c_page, c_slot, c_head, PAGE: tl.constexpr):
    """Address (N,) of the keys of one head; of any where there is none."""
    page = tl.load(table + key // PAGE, mask=there, other=0, cache_modifier=".cg").to(tl.int64)
    return Cache + head * c_head + (page * c_page + key % PAGE * c_slot)


@triton.jit
def fetch(rows, bytes):
    """Have L2 fetch so many bytes from each address."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;", "=r,l,r", [rows, bytes], dtype=tl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["table_row", "splits", "positions", "longest", "total"])
def attend_kernel(
    Projected, Cache, Parts, BlockTable, Plan, Buckets, Position, TimeBias, c_page, c_slot, c_head, position_head, time_head,
    table_row, total, longest, splits, positions, half_scale, out_scale, HEADS: tl.constexpr, D: tl.constexpr,
    D_PAD: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr,
    EXACT: tl.constexpr, FETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token and head against its part of the keys; Parts is (splits, total, heads, D) float32, zeros for padding."""
    head = tl.program_id(0) % HEADS
    split = tl.program_id(0) // HEADS
    token = tl.program_id(1)
    b = tl.load(Plan + token * 4, cache_modifier=".cg")
    last = tl.load(Plan + token * 4 + 1, cache_modifier=".cg")
    own = tl.load(Plan + token * 4 + 2, cache_modifier=".cg")
    count = tl.load(Plan + token * 4 + 3, cache_modifier=".cg")
    table = BlockTable + b.to(tl.int64) * table_row
    share = ((count + splits - 1) // splits + 7) // 8 * 8
    first = split * share
    end = least(count, first + share)
    near, dims = tl.arange(0, BLOCK_N), tl.arange(0, D_PAD)
    if PDL:
        # The cached keys and values come from memory while the projection still runs; L2 sees what that one adds.
        if FETCH:
            for n0 in range(first, end, 2 * BLOCK_N):
                wanted = least(n0 + tl.arange(0, 2 * BLOCK_N), end - 1)
                key = tl.where(wanted <= last, wanted, own)
                rows = rows_of(Cache, table, key, key >= 0, head, c_page, c_slot, c_head, PAGE)
                fetch(rows, tl.full((2 * BLOCK_N,), FETCH, tl.int32))
        gdc_wait()
        gdc_launch_dependents()
    q = tl.load(Projected + token.to(tl.int64) * (2 * HEADS * D) + HEADS * D + head * D + dims, mask=dims < D, other=0.0)
    q = q.to(tl.float32)
    acc = tl.full((D_PAD,), 0.0, tl.float32)
    for n0 in range(first, end, BLOCK_N):
        index = n0 + near
        there = index < end
        key = tl.where(index <= last, index, own)
        rows = rows_of(Cache, table, key, there, head, c_page, c_slot, c_head, PAGE)
        inside = there[:, None] & (dims < D)[None, :]
        k = tl.load(rows[:, None] + dims[None, :], mask=inside, other=0.0, cache_modifier=".cg")
        v = tl.load(rows[:, None] + D + dims[None, :], mask=inside, other=0.0, cache_modifier=".cg")
        half = tl.full((BLOCK_N,), 0.0, tl.float32)
        if HAS_POSITION:
            distance = least(most(last + tl.where(own > last, 1, 0) - key, 0), positions - 1)
            half += 0.5 * tl.load(Position + head * position_head + distance, mask=there, other=0.0).to(tl.float32)
        if HAS_TIME:
            bucket = tl.load(Buckets + token.to(tl.int64) * longest + index, mask=there, other=0, cache_modifier=".cg")
            half += 0.5 * tl.load(TimeBias + head * time_head + bucket, mask=there, other=0.0).to(tl.float32)
        half += tl.reduce(k.to(tl.float32) * q[None, :], 1, add) * half_scale
        weights = silu_of_half(tl.where(there, half, 0.0), EXACT)
        acc += tl.reduce(v.to(tl.float32) * weights[:, None], 0, add)
    to = Parts + ((split.to(tl.int64) * total + token) * HEADS + head) * D + dims
    tl.store(to, acc * out_scale, mask=dims < D)


@triton.jit(do_not_specialize=["rows", "columns"])
def leave_kernel(
    Parts, Projected, NormWeight, NormBias, Weight, Bias, Residual, Out, x_row, rows, columns, eps,
    DEPTH: tl.constexpr, GROUPS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr, HAS_NORM: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of Residual + y W^T + b for ROWS rows: y = LN(sum of Parts) * U, or U itself; U is Projected[:, 0]."""
    depth, column, row, w_mask, x_mask = part_of(rows, columns, DEPTH, GROUPS, CHUNK, ROWS, BLOCK_N)
    inside = (column < columns)[:, None] & (row < rows)[None, :]
    row = row.to(tl.int64)
    w = tl.load(Weight + column.to(tl.int64)[None, :, None] * DEPTH + depth, mask=w_mask, other=0.0)
    bias = tl.load(Bias + column, mask=column < columns, other=0.0).to(tl.float32)
    gates = Projected + row[None, :, None] * (2 * DEPTH) + depth
    # Written two kernels ago, which has ended.
    x = tl.load(Residual + row[None, :] * x_row + column[:, None], mask=inside, other=0.0, cache_modifier=".cg")
    if HAS_NORM:
        gate = tl.load(gates, mask=x_mask, other=0.0, cache_modifier=".cg")
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if HAS_NORM:
        parts = Parts + row[None, :, None] * DEPTH + depth
        attended = tl.load(parts, mask=x_mask, other=0.0)
        for split in tl.static_range(1, SPLITS):
            attended += tl.load(parts + split * rows.to(tl.int64) * DEPTH, mask=x_mask, other=0.0)
        shift = tl.load(Parts + row * DEPTH, mask=row < rows, other=0.0)
        y = normed(attended, shift, NormWeight, NormBias, depth, eps, DEPTH, GROUPS * CHUNK == DEPTH)
        y = (y * gate.to(tl.float32)).to(w.dtype)
    else:
        y = tl.load(gates, mask=x_mask, other=0.0)
    acc = tl.reduce(tl.dot(w, tl.permute(y, (0, 2, 1)), input_precision=PRECISION), 0, add)
    acc += bias[:, None] + x.to(tl.float32)
    tl.store(Out + row[None, :] * columns + column[:, None], acc.to(Out.dtype.element_ty), mask=inside)


def default_tiles(tokens: int, heads: int, like: Tensor) -> DecodeTiles:
    """Tiles for a step of `tokens` tokens, the fastest on an H200 among those tried."""
    if interpreted():
        return DecodeTiles(16, 2, 16, 4, 2, 16, 2, pdl=False)
    pdl = capability(like) >= 90
    if tokens > 8:
        return DecodeTiles(enter=32, splits=2, leave=16, leave_warps=8, pdl=pdl)
    return DecodeTiles(splits=max(1, min(2 * processors(like) // (tokens * heads), 8)), pdl=pdl)


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """What the tokens of a step see, for all of its layers: see `plan_step`."""

    tokens: Tensor
    buckets: Tensor | None


def plan_step(
    block_table: Tensor, query_offsets: Tensor, seq_lens: Tensor, history_lens: Tensor, tokens: int, *, page: int,
    bias: RelativeBias | None, query_times: Tensor | None, slot_times: Tensor | None,
) -> StepPlan:  # fmt: skip
    """Which keys each of `tokens` new tokens sees, and their time buckets; `bias` of any layer says which parts there are.

    page: the cache's block size; shapes of the rest as in `attention_paged`, tokens behind query_offsets[-1] are padding.
    """
    timed = bias is not None and bias.time is not None
    batch, longest, device = query_offsets.shape[0] - 1, block_table.shape[1] * page, block_table.device
    plan = torch.empty(tokens, 4, dtype=torch.int32, device=device)
    buckets = torch.empty(tokens, longest, dtype=torch.int32, device=device) if timed else None
    block = 64 if interpreted() else 256
    plan_kernel[(triton.cdiv(longest, block) if timed else 1, tokens)](
        block_table, query_offsets, seq_lens, history_lens, query_times, slot_times,
        bucket_tables(bias.time.shape[1], device)[1] if timed else None, plan, buckets, block_table.stride(0),
        slot_times.stride(0) if timed else 0, longest, batch, BATCH_PAD=max(16, triton.next_power_of_2(batch)), PAGE=page,
        BLOCK=block, HAS_TIME=timed,
    )  # fmt: skip
    return StepPlan(plan, buckets)


def _groups(depth: int, warps: int) -> tuple[int, int]:
    """Parts of the depth and how long they are: as many as warps, 16 at the least, powers of two."""
    padded = max(16, triton.next_power_of_2(depth))
    groups = max(1, min(warps, padded // 16))
    return groups, padded // groups


def _padded(rows: int) -> int:
    """Rows of a tile."""
    return 8 if rows <= 8 and not interpreted() else 16


def _common(x: Tensor, tiles: DecodeTiles) -> dict:
    """Arguments that the kernels share."""
    exact = x.dtype == torch.float32
    options = {"launch_pdl": True} if tiles.pdl else {}
    return {
        "EXACT": exact or interpreted(), "PRECISION": "ieee" if exact else "tf32", "PDL": tiles.pdl, "num_stages": 1, **options
    }  # fmt: skip


def takes(tokens: int, d_model: int, cache: Tensor, dtype: torch.dtype) -> bool:
    """Whether `decode_layer` takes a step of so many tokens (T, d_model) of `dtype` with this cache, and is the quicker way."""
    widest = max(d_model, cache.shape[2] * cache.shape[3] // 2)
    dtypes = (torch.float32, torch.float16) if interpreted() else (torch.float16, torch.bfloat16)
    return 0 < tokens <= MOST_TOKENS and widest <= 2048 and dtype == cache.dtype and dtype in dtypes


def _enter(x: Tensor, norm, linear, slots: Tensor, cache: Tensor | None, width: int, d: int, tiles: DecodeTiles) -> Tensor:
    """SiLU(LN(x) W^T + b), its first and third `width` columns as (T, 2, width), the others to the cache."""
    rows, depth = x.shape
    out = torch.empty(rows, 2, width, dtype=x.dtype, device=x.device)
    padded = _padded(rows)
    groups, chunk = _groups(depth, tiles.enter_warps)
    enter_kernel[(triton.cdiv(linear.out_features, tiles.enter), triton.cdiv(rows, padded))](
        x, norm.weight, norm.bias, linear.weight, linear.bias, slots, out, cache, x.stride(0),
        *((0, 0, 0) if cache is None else cache.stride()[:3]), rows, linear.out_features, len(slots), norm.eps,
        DEPTH=depth, GROUPS=groups, CHUNK=chunk, ROWS=padded, BLOCK_N=tiles.enter, WIDTH=width, D=d,
        PAGE=1 if cache is None else cache.shape[1], HAS_CACHE=cache is not None, **_common(x, tiles),
        num_warps=tiles.enter_warps,
    )  # fmt: skip
    return out


def _leave(parts: Tensor | None, projected: Tensor, norm, linear, x: Tensor, tiles: DecodeTiles) -> Tensor:
    """x + y W^T + b, where y is LN(sum of parts) * projected[:, 0]; without parts that itself."""
    rows, width = projected.shape[0], projected.shape[2]
    result = torch.empty(rows, linear.out_features, dtype=x.dtype, device=x.device)
    padded = _padded(rows)
    groups, chunk = _groups(width, tiles.leave_warps)
    common = _common(x, tiles)
    del common["EXACT"]
    leave_kernel[(triton.cdiv(linear.out_features, tiles.leave), triton.cdiv(rows, padded))](
        parts, projected, None if norm is None else norm.weight, None if norm is None else norm.bias, linear.weight, linear.bias,
        x, result, x.stride(0), rows, linear.out_features, 0.0 if norm is None else norm.eps,
        DEPTH=width, GROUPS=groups, CHUNK=chunk, ROWS=padded, BLOCK_N=tiles.leave, SPLITS=1 if parts is None else len(parts),
        HAS_NORM=parts is not None, **common, num_warps=tiles.leave_warps,
    )  # fmt: skip
    return result


def project_normed(x: Tensor, norm, linear) -> Tensor:
    """SiLU(LN(x) W^T + b) for a few rows x (T, D) -> (T, 1 or more, E), of which [:, 0] counts; norm and linear are modules."""
    tiles = default_tiles(len(x), 1, x)
    return _enter(x, norm, linear, x[:0, 0], None, linear.out_features, linear.out_features, tiles)


def project_onto(y: Tensor, linear, x: Tensor) -> Tensor:
    """x + y[:, 0] W^T + b for a few rows: y from `project_normed`, x (T, D) -> (T, D). x must be older than y."""
    return _leave(None, y, None, linear, x, default_tiles(len(x), 1, x))


def decode_layer(
    x: Tensor, layer, cache: Tensor, slots: Tensor, block_table: Tensor, plan: StepPlan, *, divisor: float,
    tiles: DecodeTiles | None = None,
) -> Tensor:  # fmt: skip
    """One HSTU layer for the new tokens of a step: x (T, d_model) -> (T, d_model); their keys and values go to the cache.

    layer: an `hstu_lab.model.HSTULayer` with d_qk = d_v = d. cache (blocks, block_size, H, 2 d), keys before values; slots (at
    most T,), negative for padding; block_table (B, blocks); plan from `plan_step`. Rows of padding come out undefined.
    """
    rows = len(x)
    page, heads, d = cache.shape[1], cache.shape[2], cache.shape[3] // 2
    width = heads * d
    tiles = tiles or default_tiles(rows, heads, x)
    position, time = (layer.bias.position, layer.bias.time) if layer.bias else (None, None)
    projected = _enter(x, layer.norm, layer.uvqk, slots, cache, width, d, tiles)
    parts = torch.empty(tiles.splits, rows, width, dtype=torch.float32, device=x.device)
    row_bytes = 2 * d * cache.element_size()
    common = _common(x, tiles)
    del common["PRECISION"]
    attend_kernel[(heads * tiles.splits, rows)](
        projected, cache, parts, block_table, plan.tokens, plan.buckets, position, time, *cache.stride()[:3],
        0 if position is None else position.stride(0), 0 if time is None else time.stride(0), block_table.stride(0), rows,
        0 if time is None else plan.buckets.stride(0), tiles.splits, 0 if position is None else position.shape[1],
        0.5 * d**-0.5, 1 / divisor, HEADS=heads, D=d, D_PAD=max(16, triton.next_power_of_2(d)), PAGE=page, BLOCK_N=tiles.keys,
        HAS_POSITION=position is not None, HAS_TIME=time is not None, FETCH=0 if row_bytes % 16 else row_bytes,
        **common, num_warps=tiles.keys_warps,
    )  # fmt: skip
    return _leave(parts, projected, layer.attention_norm, layer.out, x, tiles)
