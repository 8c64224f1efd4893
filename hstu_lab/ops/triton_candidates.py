"""Attention of candidates over a paged history (M-FALCON): each sees the history and itself, and none sees another.

All candidates of a request stand at one position and one time, so that one row of bias serves a whole tile of them, and no
tile of keys is ever masked in part except the history's last. A candidate's own key and value can come straight from the
projection: nothing of it need be written to the cache. Source: Zhai et al. 2024 (arXiv:2402.17152), section 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hstu_lab.ops.reference import RelativeBias
from hstu_lab.ops.triton_bias import bucket_of, bucket_tables, load_now
from hstu_lab.ops.triton_linear import project_residual, project_silu
from hstu_lab.ops.triton_memory import layer_norm
from hstu_lab.ops.triton_paged import PagedTiles, listed_tile, sum_splits_kernel
from hstu_lab.ops.triton_runtime import add, check_dtype, interpreted, least, most, processors, silu_of_half


@triton.jit(do_not_specialize=["table_row", "time_page", "buckets_row"])
def buckets_kernel(
    BlockTable, QueryOffsets, SeqLens, HistoryLens, QueryTimes, SlotTimes, Cells, Buckets, table_row, time_page, buckets_row,
    PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Time bucket of BLOCK keys of a history as its candidates see them; nothing for a sequence without new candidates."""
    b = tl.program_id(1).to(tl.int64)
    history = tl.load(HistoryLens + b).to(tl.int32)
    start, end = tl.load(QueryOffsets + b).to(tl.int64), tl.load(QueryOffsets + b + 1).to(tl.int64)
    if (history < tl.load(SeqLens + b).to(tl.int32)) & (end > start):
        keys = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        there = keys < history
        page = tl.load(BlockTable + b * table_row + keys // PAGE, mask=there, other=0).to(tl.int64)
        time = tl.load(SlotTimes + page * time_page + keys % PAGE, mask=there, other=0)
        apart = tl.abs(tl.load(QueryTimes + end - 1) - time)
        bucket = bucket_of(least(apart, 2147483646).to(tl.int32), Cells)
        tl.store(Buckets + b * buckets_row + keys, bucket, mask=there | (keys == 0))  # the first is looked up in any case


@triton.jit
def bias_row(
    Position, TimeBias, bucket, keys, history, positions, head, position_head, time_head, HAS_POSITION: tl.constexpr,
    HAS_TIME: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """Half the bias (N,) of the keys."""
    bias = tl.full(keys.shape, 0.0, tl.float32)
    if HAS_POSITION:
        distance = least(most(history - keys, 0), positions - 1)
        bias += 0.5 * load_now(Position + head * position_head + distance, PLAIN).to(tl.float32)
    if HAS_TIME:
        bias += 0.5 * load_now(TimeBias + head * time_head + bucket, PLAIN).to(tl.float32)
    return bias


@triton.jit(do_not_specialize=["tiles_m", "total", "splits", "table_row", "positions", "buckets_row"])
def candidates_kernel(
    Q, Keys, Values, OwnKeys, OwnValues, Out, BlockTable, QueryOffsets, SeqLens, HistoryLens, TileList, Buckets, Position,
    TimeBias, q_row, q_head, k_page, k_slot, k_head, v_page, v_slot, v_head, own_k_row, own_k_head, own_v_row, own_v_head,
    position_head, time_head, table_row, buckets_row, tiles_m, total, splits, positions, half_scale, out_scale,
    D: tl.constexpr, D_PAD: tl.constexpr, PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, PLAIN: tl.constexpr,
    HEADS: tl.constexpr, HAS_LIST: tl.constexpr, HAS_OWN: tl.constexpr, SELF: tl.constexpr,
):  # fmt: skip
    """BLOCK_M candidates of one (sequence, head) against a part of its history, the first part with themselves if SELF; Out is
    (splits, total, heads, D)."""
    head, split = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    b = tl.program_id(1) // tiles_m
    m0 = tl.program_id(1) % tiles_m * BLOCK_M
    if HAS_LIST:
        b, m0 = listed_tile(TileList, BLOCK_M)
    start = tl.load(QueryOffsets + b).to(tl.int64)
    count = (tl.load(QueryOffsets + b + 1) - start).to(tl.int32)
    if m0 < count:
        history = tl.load(HistoryLens + b).to(tl.int32)
        rows, near, dims = m0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, D_PAD)
        real = (rows < count)[:, None] & (dims < D)[None, :]
        token = start + rows[:, None]
        q = tl.load(Q + token * q_row + head * q_head + dims[None, :], mask=real, other=0.0)
        table = BlockTable + b.to(tl.int64) * table_row
        buckets = Buckets + b.to(tl.int64) * buckets_row
        keys_of_head, values_of_head = Keys + head * k_head, Values + head * v_head
        acc = tl.full((BLOCK_M, D_PAD), 0.0, tl.float32)
        share = (history // BLOCK_N + splits - 1) // splits * BLOCK_N
        first = split * share
        full = least(first + share, history // BLOCK_N * BLOCK_N)
        last = most(history - 1, 0)
        # Two tiles ahead, since each look-up waits for the one before it.
        bucket = tl.full((BLOCK_N,), 0, tl.int32)
        now = load_now(buckets + least(first + near, last), PLAIN) if HAS_TIME else bucket
        bias = bias_row(
            Position, TimeBias, now, first + near, history, positions, head, position_head, time_head, HAS_POSITION, HAS_TIME,
            PLAIN,
        )  # fmt: skip
        if HAS_TIME:
            bucket = load_now(buckets + least(first + BLOCK_N + near, last), PLAIN)
        page = load_now(table + least(first + near, last) // PAGE, PLAIN)
        for n0 in range(first, full, BLOCK_N):
            coming_page = load_now(table + least(n0 + BLOCK_N + near, last) // PAGE, PLAIN)
            coming = bias_row(
                Position, TimeBias, bucket, n0 + BLOCK_N + near, history, positions, head, position_head, time_head,
                HAS_POSITION, HAS_TIME, PLAIN,
            )  # fmt: skip
            if HAS_TIME:
                bucket = load_now(buckets + least(n0 + 2 * BLOCK_N + near, last), PLAIN)
            slot = (n0 + near) % PAGE if BLOCK_N % PAGE else near % PAGE
            k_rows = keys_of_head + (page.to(tl.int64) * k_page + slot * k_slot)[None, :] + dims[:, None]
            v_rows = values_of_head + (page.to(tl.int64) * v_page + slot * v_slot)[:, None] + dims[None, :]
            if D_PAD == D:
                k = tl.load(k_rows)
                v = tl.load(v_rows)
            else:
                k = tl.load(k_rows, mask=(dims < D)[:, None], other=0.0)
                v = tl.load(v_rows, mask=(dims < D)[None, :], other=0.0)
            half = tl.dot(q, k, input_precision=PRECISION) * half_scale + bias[None, :]
            acc = tl.dot(silu_of_half(half, EXACT).to(q.dtype), v, acc, input_precision=PRECISION)
            bias = coming
            page = coming_page
        if (split == splits - 1) & (history % BLOCK_N > 0):
            end = history // BLOCK_N * BLOCK_N
            page = load_now(table + least(end + near, last) // PAGE, PLAIN)
            bucket = load_now(buckets + least(end + near, last), PLAIN) if HAS_TIME else bucket
            bias = bias_row(
                Position, TimeBias, bucket, end + near, history, positions, head, position_head, time_head, HAS_POSITION,
                HAS_TIME, PLAIN,
            )  # fmt: skip
            slot = (end + near) % PAGE
            there = end + near < history
            k_rows = keys_of_head + (page.to(tl.int64) * k_page + slot * k_slot)[None, :] + dims[:, None]
            v_rows = values_of_head + (page.to(tl.int64) * v_page + slot * v_slot)[:, None] + dims[None, :]
            # Slots that no token was written to may hold anything, and 0 x NaN is NaN: they are not even loaded.
            k = tl.load(k_rows, mask=there[None, :] & (dims < D)[:, None], other=0.0)
            v = tl.load(v_rows, mask=there[:, None] & (dims < D)[None, :], other=0.0)
            half = tl.dot(q, k, input_precision=PRECISION) * half_scale + bias[None, :]
            half = tl.where(there[None, :], half, 0.0)
            acc = tl.dot(silu_of_half(half, EXACT).to(q.dtype), v, acc, input_precision=PRECISION)
        if SELF:  # noqa: SIM102 - a compile-time and a run-time condition
            if split == 0:
                if HAS_OWN:
                    k_own = tl.load(OwnKeys + token * own_k_row + head * own_k_head + dims[None, :], mask=real, other=0.0)
                    v_own = tl.load(OwnValues + token * own_v_row + head * own_v_head + dims[None, :], mask=real, other=0.0)
                else:
                    own = tl.load(SeqLens + b).to(tl.int32) - count + rows
                    own_page = tl.load(table + own // PAGE, mask=rows < count, other=0).to(tl.int64)[:, None]
                    own = (own % PAGE)[:, None]
                    k_own = tl.load(keys_of_head + own_page * k_page + own * k_slot + dims[None, :], mask=real, other=0.0)
                    v_own = tl.load(values_of_head + own_page * v_page + own * v_slot + dims[None, :], mask=real, other=0.0)
                half = tl.reduce(q.to(tl.float32) * k_own.to(tl.float32), 1, add) * half_scale
                if HAS_POSITION:
                    half += 0.5 * tl.load(Position + head * position_head).to(tl.float32)
                if HAS_TIME:
                    half += 0.5 * tl.load(TimeBias + head * time_head).to(tl.float32)
                acc += silu_of_half(half, EXACT)[:, None] * v_own.to(tl.float32)
        o_rows = Out + ((split.to(tl.int64) * total + token) * HEADS + head) * D + dims[None, :]
        tl.store(o_rows, (acc * out_scale).to(Out.dtype.element_ty), mask=real)


def default_tiles(like: Tensor) -> PagedTiles:
    """Tiles for queries `like` (T, H, d), the fastest on an H200 among those tried."""
    total, heads, d = like.shape
    if interpreted():
        return PagedTiles(16, 16, splits=2)
    if like.dtype == torch.float32:
        return PagedTiles(16, 32, num_stages=2)
    if d > 64:
        return PagedTiles(64, 64 if d <= 128 else 32)
    programs = heads * triton.cdiv(total, 64)
    if programs > 2 * processors(like):
        return PagedTiles(128, 64, num_stages=2)
    # One user's candidates do not fill the GPU; in small steps the parts of others would be added up with theirs.
    return PagedTiles(64, 128, num_stages=2, splits=2 if total > 64 and programs <= processors(like) else 1)


def time_buckets(
    bias: RelativeBias | None, block_table: Tensor, query_offsets: Tensor, seq_lens: Tensor, history_lens: Tensor,
    query_times: Tensor, slot_times: Tensor,
) -> Tensor | None:  # fmt: skip
    """Time buckets (B, longest) int32 of every cached event as the step's candidates of its sequence see it, for all layers.

    Their time is that of the sequence's last new token. None where the bias has no part of time; only rows of sequences with new
    candidates, up to their history, are written. Shapes as in `attention_paged`.
    """
    if bias is None or bias.time is None:
        return None
    page, block = slot_times.shape[1], 64 if interpreted() else 128
    longest = block_table.shape[1] * page
    buckets = torch.empty(len(seq_lens), longest, dtype=torch.int32, device=block_table.device)
    buckets_kernel[(triton.cdiv(longest, block), len(seq_lens))](
        block_table, query_offsets, seq_lens, history_lens, query_times, slot_times,
        bucket_tables(bias.time.shape[1], block_table.device)[1], buckets, block_table.stride(0), slot_times.stride(0), longest,
        PAGE=page, BLOCK=block,
    )  # fmt: skip
    return buckets


def attention_candidates(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, query_offsets: Tensor, seq_lens: Tensor,
    history_lens: Tensor, buckets: Tensor | None, *, divisor: float, bias: RelativeBias | None = None,
    own: tuple[Tensor, Tensor] | None = None, max_queries: int | None = None, tiles: PagedTiles | None = None,
    tile_list: Tensor | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of candidates to the first `history_lens` (B,) cached events of their sequence, and to themselves.

    q (T, H, d): all new tokens are candidates, `max_queries` of a sequence at the most (without it T). Or tile_list (L,) int32
    names the tiles of `tiles.block_m` queries that are (see `hstu_lab.ops.triton_serving.list_tiles`), and the other rows of
    `out` (T, H, d) are left as they are, or undefined where `tiles.splits` is above 1. own: keys and values (T, H, d) of the
    candidates, which then need not be in the cache. buckets from `time_buckets`; other shapes as in `attention_paged`. Raises
    TypeError for dtypes that the kernel does not take.
    """
    check_dtype(q=q, key_cache=key_cache, value_cache=value_cache, **({} if own is None else {"own keys": own[0]}))
    total = len(q)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    tiles = tiles or default_tiles(q)
    tiles_m = triton.cdiv(max_queries or total, tiles.block_m)
    programs = len(history_lens) * tiles_m if tile_list is None else len(tile_list)
    if not programs:
        return out
    parts = out if tiles.splits == 1 else torch.empty(tiles.splits, *out.shape, dtype=torch.float32, device=q.device)
    _attend(
        q, key_cache, value_cache, block_table, query_offsets, seq_lens, history_lens, buckets, parts, tiles, programs, tiles_m,
        divisor, bias, own, tile_list,
    )  # fmt: skip
    if tiles.splits > 1:
        sum_splits_kernel[(triton.cdiv(out.numel(), 1024),)](parts, out, out.numel(), tiles.splits, BLOCK=1024)
    return out


def _attend(
    q, key_cache, value_cache, block_table, query_offsets, seq_lens, history_lens, buckets, parts, tiles, programs, tiles_m,
    divisor, bias, own, tile_list, itself: bool = True,
) -> None:  # fmt: skip
    if block_table.dtype != torch.int32:  # its entries are loaded past the pipeliner, 32 bits each
        raise TypeError(f"block_table is {block_table.dtype}: candidates take int32, give block_table.int()")
    total, heads, d = q.shape
    own_keys, own_values = own or (None, None)
    position, time = (bias.position, bias.time) if bias else (None, None)
    candidates_kernel[(heads * tiles.splits, programs)](
        q, key_cache, value_cache, own_keys, own_values, parts, block_table, query_offsets, seq_lens, history_lens, tile_list,
        block_table if buckets is None else buckets, position, time, *q.stride()[:2], *key_cache.stride()[:3],
        *value_cache.stride()[:3], *(0 if own is None else stride for rows in (own or (q, q)) for stride in rows.stride()[:2]),
        *(0 if part is None else part.stride(0) for part in (position, time)), block_table.stride(0),
        0 if buckets is None else buckets.stride(0), tiles_m, total, tiles.splits,
        0 if position is None else position.shape[1], 0.5 * d**-0.5, 1 / divisor,
        D=d, D_PAD=max(16, triton.next_power_of_2(d)), PAGE=key_cache.shape[1], BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n,
        HAS_POSITION=position is not None, HAS_TIME=time is not None, EXACT=q.dtype == torch.float32 or interpreted(),
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", PLAIN=interpreted(), HEADS=heads,
        HAS_LIST=tile_list is not None, HAS_OWN=own is not None, SELF=itself, num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )  # fmt: skip


@triton.jit(do_not_specialize=["total"])
def combine_kernel(
    Parts, Projected, NormWeight, NormBias, Position, TimeBias, Out, p_row, position_head, time_head, total, eps, half_scale,
    out_scale, HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, SPLITS: tl.constexpr,
    HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One candidate: the parts of its attention added up, itself added, LN of that times U. Projected (T, [U, V, Q, K])."""
    token = tl.program_id(0).to(tl.int64)
    head, dim = tl.arange(0, HEADS_PAD), tl.arange(0, D_PAD)[None, :]
    column = head[:, None] * D + dim
    inside = (head < HEADS)[:, None] & (dim < D)
    row = Projected + token * p_row + column
    u = tl.load(row, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(row + HEADS * D, mask=inside, other=0.0).to(tl.float32)
    q = tl.load(row + 2 * HEADS * D, mask=inside, other=0.0).to(tl.float32)
    k = tl.load(row + 3 * HEADS * D, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(NormWeight + column, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(NormBias + column, mask=inside, other=0.0).to(tl.float32)
    parts = Parts + token * HEADS * D + column
    attended = tl.load(parts, mask=inside, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        attended += tl.load(parts + split * total.to(tl.int64) * HEADS * D, mask=inside, other=0.0).to(tl.float32)
    half = tl.reduce(q * k, 1, add) * half_scale
    if HAS_POSITION:
        half += 0.5 * tl.load(Position + head * position_head, mask=head < HEADS, other=0.0).to(tl.float32)
    if HAS_TIME:
        half += 0.5 * tl.load(TimeBias + head * time_head, mask=head < HEADS, other=0.0).to(tl.float32)
    attended += silu_of_half(half, EXACT)[:, None] * v * out_scale
    mean = tl.reduce(tl.reduce(attended, 1, add), 0, add) / (HEADS * D)
    centred = tl.where(inside, attended - mean, 0.0)
    variance = tl.reduce(tl.reduce(centred * centred, 1, add), 0, add) / (HEADS * D)
    y = (centred * (1 / tl.sqrt(variance + eps)) * weight + bias) * u
    tl.store(Out + token * HEADS * D + column, y.to(Out.dtype.element_ty), mask=inside)


def candidates_layer(
    x: Tensor, layer, cache: Tensor, block_table: Tensor, query_offsets: Tensor, seq_lens: Tensor, history_lens: Tensor,
    buckets: Tensor | None, *, divisor: float, max_queries: int | None = None, tiles: PagedTiles | None = None,
) -> Tensor:  # fmt: skip
    """One HSTU layer for a step of candidates only: x (T, d_model) -> (T, d_model). Nothing is written to the cache.

    layer: an `hstu_lab.model.HSTULayer` with d_qk = d_v = d; cache (blocks, block_size, H, 2 d), keys before values; the rest as
    in `attention_candidates`.
    """
    heads, d, eps, total = layer.heads, layer.d_v, layer.eps, len(x)
    projected = project_silu(layer_norm(x, layer.norm.weight, layer.norm.bias, eps), layer.uvqk.weight, layer.uvqk.bias)
    q = projected[:, 2 * heads * d : 3 * heads * d].unflatten(1, (heads, d))
    tiles = tiles or default_tiles(q)
    whole = tiles.splits == 1
    parts = torch.empty(tiles.splits, total, heads * d, dtype=x.dtype if whole else torch.float32, device=x.device)
    tiles_m = triton.cdiv(max_queries or total, tiles.block_m)
    keys, values = cache.tensor_split(2, dim=-1)
    _attend(
        q, keys, values, block_table, query_offsets, seq_lens, history_lens, buckets, parts, tiles, len(seq_lens) * tiles_m,
        tiles_m, divisor, layer.bias, None, None, itself=False,
    )  # fmt: skip
    y = torch.empty(total, heads * d, dtype=x.dtype, device=x.device)
    position, time = (layer.bias.position, layer.bias.time) if layer.bias else (None, None)
    norm = layer.attention_norm
    combine_kernel[(total,)](
        parts, projected, norm.weight, norm.bias, position, time, y, projected.stride(0),
        *(0 if part is None else part.stride(0) for part in (position, time)), total, eps, 0.5 * d**-0.5, 1 / divisor,
        HEADS=heads, HEADS_PAD=triton.next_power_of_2(heads), D=d, D_PAD=triton.next_power_of_2(d), SPLITS=tiles.splits,
        HAS_POSITION=position is not None, HAS_TIME=time is not None, EXACT=x.dtype == torch.float32 or interpreted(),
    )  # fmt: skip
    return project_residual(y, layer.out.weight, layer.out.bias, x)


def candidates_stack(
    x: Tensor, stack, caches: Sequence[Tensor], block_table: Tensor, query_offsets: Tensor, seq_lens: Tensor,
    history_lens: Tensor, query_times: Tensor, slot_times: Tensor, count: int,
) -> Tensor:  # fmt: skip
    """All layers of an `hstu_lab.model.HSTUStack`, and its last norm, for candidates only: x (T, d_model) -> (T, d_model).

    At most `count` of a sequence. caches: of each layer, as in `candidates_layer`; the rest as in `time_buckets`.
    """
    where = block_table, query_offsets, seq_lens, history_lens
    buckets = time_buckets(stack.layers[0].bias, *where, query_times, slot_times)
    for layer, cache in zip(stack.layers, caches):
        x = candidates_layer(x, layer, cache, *where, buckets, divisor=stack.config.max_seq_len, max_queries=count)
    return stack.ops.layer_norm(x, stack.final_norm.weight, stack.final_norm.bias, stack.config.norm_eps)
