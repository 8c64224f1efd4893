"""Attention of new queries over a paged KV cache: decode, chunked extend, and candidates, in one kernel.

Without a softmax the keys can be split among programs at will: partial sums add. Decode reads every key and value once and
computes next to nothing, so it is split until the memory system is full; a long chunk of queries is bound by the matrix unit.
"""

from __future__ import annotations

import dataclasses
import functools
import types

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hstu_lab.ops.reference import RelativeBias
from hstu_lab.ops.triton_bias import bucket_of, bucket_tables
from hstu_lab.ops.triton_runtime import add, capability, check_dtype, interpreted, least, most, processors, silu_of_half, use_tma

LIST_ROWS = tl.constexpr(1 << 16)
"""An entry of a tile list is LIST_ROWS * sequence + tile of its queries; NO_TILE is a tile that no sequence has."""
NO_TILE = LIST_ROWS.value - 1


@dataclasses.dataclass(frozen=True)
class PagedTiles:
    """Query and key rows of a tile, warps, pipeline stages, parts that the keys are split into."""

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 3
    splits: int = 1
    maxnreg: int | None = None


@triton.jit
def listed_tile(TileList, BLOCK_M: tl.constexpr):
    """(sequence, first query) of this program's entry of a tile list."""
    entry = tl.load(TileList + tl.program_id(1))
    return entry // LIST_ROWS, entry % LIST_ROWS * BLOCK_M


@triton.jit
def paged_bias(
    Position, TimeBias, Cells, q_position, k_position, q_time, k_time, positions, head, position_head, time_head,
    HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr,
):  # fmt: skip
    """Half the bias (M, N), looked up element by element; 0 where there is none."""
    bias = 0.0
    if HAS_POSITION:
        distance = least(most(q_position[:, None] - k_position[None, :], 0), positions - 1)
        bias += 0.5 * tl.load(Position + head * position_head + distance).to(tl.float32)
    if HAS_TIME:
        apart = tl.abs(q_time[:, None] - k_time[None, :])
        bucket = bucket_of(least(apart, 2147483646).to(tl.int32), Cells)
        bias += 0.5 * tl.load(TimeBias + head * time_head + bucket).to(tl.float32)
    return bias


@triton.jit
def load_page(table, index, PLAIN: tl.constexpr):
    """Pages table[index], int32; the table's entries, 32 or 64 bits each, are below 2^31. In assembly, so that the pipeliner
    does not stage them through shared memory, a barrier each."""
    if PLAIN:
        return tl.load(table + index).to(tl.int32)
    else:
        return tl.inline_asm_elementwise(
            "ld.global.nc.b32 $0, [$1];", "=r,l", [table + index], dtype=tl.int32, is_pure=True, pack=1
        )  # fmt: skip


@triton.jit
def page_and_slot(n0, near, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Index into the table, and slot in its page, of keys n0 + near; n0 is a multiple of BLOCK_N."""
    if BLOCK_N % PAGE == 0:  # said so, slots do not change from tile to tile
        index, slot = n0 // PAGE + near // PAGE, near % PAGE
    else:
        index, slot = (n0 + near) // PAGE, (n0 + near) % PAGE
    return index, slot


@triton.jit
def paged_scores(
    q, page_now, KeyTiles, keys_of_head, table, SlotTimes, Position, TimeBias, Cells, n0, bias_position, q_time, positions, head,
    position_head, time_head, time_page, k_page, k_slot, k_head, half_scale, D: tl.constexpr, D_PAD: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_N: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """Scores (M, BLOCK_N) of keys from n0 on, in units that half_scale turns into half a score, bias included."""
    near = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, D_PAD)
    keys = n0 + near
    index, slot = page_and_slot(n0, near, PAGE, BLOCK_N)
    # A tile within one page is one copy by the tensor memory accelerator; else every key row finds its own page.
    page = (page_now if TMA else load_page(table, index, PLAIN)).to(tl.int64)
    if TMA:
        k = KeyTiles.load([(page * PAGE + n0 % PAGE).to(tl.int32), head * k_head]).T
    else:
        k_rows = keys_of_head + (slot * k_slot)[None, :] + dims[:, None] + (page * k_page)[None, :]
        if D_PAD == D:
            k = tl.load(k_rows)
        else:
            k = tl.load(k_rows, mask=dims[:, None] < D, other=0.0)
    scores = tl.dot(q, k, input_precision=PRECISION)
    if HAS_POSITION or HAS_TIME:
        k_time = tl.full((BLOCK_N,), 0, tl.int64)
        if HAS_TIME:
            k_time = tl.load(SlotTimes + page * time_page + (n0 % PAGE + near if TMA else slot))
        bias = paged_bias(
            Position, TimeBias, Cells, bias_position, keys, q_time, k_time, positions, head, position_head, time_head,
            HAS_POSITION, HAS_TIME,
        )  # fmt: skip
        scores += bias * (1 / half_scale)
    return scores


@triton.jit
def paged_values(
    page_now, ValueTiles, values_of_head, table, n0, head, v_page, v_slot, v_head, DV: tl.constexpr, DV_PAD: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """Values (BLOCK_N, DV_PAD) of keys from n0 on."""
    index, slot = page_and_slot(n0, tl.arange(0, BLOCK_N), PAGE, BLOCK_N)
    value_dims = tl.arange(0, DV_PAD)
    page = (page_now if TMA else load_page(table, index, PLAIN)).to(tl.int64)
    if TMA:
        v = ValueTiles.load([(page * PAGE + n0 % PAGE).to(tl.int32), head * v_head])
    else:
        v_rows = values_of_head + (slot * v_slot)[:, None] + value_dims[None, :] + (page * v_page)[:, None]
        if DV_PAD == DV:
            v = tl.load(v_rows)
        else:
            v = tl.load(v_rows, mask=value_dims[None, :] < DV, other=0.0)
    return v


@triton.jit(do_not_specialize=["heads", "tiles_m", "splits", "table_row", "positions", "total"])
def paged_kernel(
    Q, KeyCache, ValueCache, KeyTiles, ValueTiles, Out, BlockTable, QueryOffsets, SeqLens, QueryTimes, SlotTimes, OwnKeys,
    OwnValues, HistoryLens, TileList, Position, TimeBias, Cells,
    q_row, q_head, k_page, k_slot, k_head, v_page, v_slot, v_head, time_page, own_k_row, own_k_head, own_v_row, own_v_head,
    position_head, time_head, table_row, total, heads, tiles_m, splits, positions, half_scale, out_scale,
    D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr, PAGE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, NUM_CONTEXT: tl.constexpr, HAS_CANDIDATES: tl.constexpr, HAS_HISTORY: tl.constexpr,
    HAS_LIST: tl.constexpr, HAS_POSITION: tl.constexpr, HAS_TIME: tl.constexpr, EXACT: tl.constexpr, TMA: tl.constexpr,
    BIAS_ROWS: tl.constexpr, PRECISION: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one (sequence, head) against one part of the cached keys; Out is (splits, total, heads, DV)."""
    head = tl.program_id(0) % heads
    split = tl.program_id(0) // heads
    b = tl.program_id(1) // tiles_m
    m0 = (tiles_m - 1 - tl.program_id(1) % tiles_m) * BLOCK_M
    if HAS_LIST:
        b, m0 = listed_tile(TileList, BLOCK_M)
    start = tl.load(QueryOffsets + b).to(tl.int64)
    count = (tl.load(QueryOffsets + b + 1) - start).to(tl.int32)
    if m0 < count:
        seq_len = tl.load(SeqLens + b).to(tl.int32)
        rows = m0 + tl.arange(0, BLOCK_M)
        dims, value_dims, near = tl.arange(0, D_PAD), tl.arange(0, DV_PAD), tl.arange(0, BLOCK_N)
        real = rows < count
        q_rows = Q + (start + rows[:, None]) * q_row + head * q_head + dims[None, :]
        q = tl.load(q_rows, mask=real[:, None] & (dims[None, :] < D), other=0.0)
        if HAS_CANDIDATES:
            position = tl.full((BLOCK_M,), 0, tl.int32) + seq_len
            visible = seq_len
            full = seq_len
        else:
            position = seq_len - count + rows
            visible = least(seq_len, seq_len - count + m0 + BLOCK_M)
            full = least(seq_len, seq_len - count + m0 + 1)
            if NUM_CONTEXT > 1:
                visible = most(visible, least(seq_len, NUM_CONTEXT))
        own = position
        history = seq_len
        if HAS_HISTORY:
            history = tl.load(HistoryLens + b).to(tl.int32)
            position = least(position, history)
            full = least(full, history)
        last_key = least(position, history - 1)
        # One query (BIAS_ROWS 1) wants one row of bias, though the matrix product computes sixteen.
        biased = tl.arange(0, BIAS_ROWS)
        bias_position = position
        if BIAS_ROWS == 1 and not HAS_CANDIDATES:
            bias_position = most(least(seq_len - 1, history) + biased, 0)
        q_time = tl.full((BIAS_ROWS,), 0, tl.int64)
        if HAS_TIME:
            q_time = tl.load(QueryTimes + start + m0 + biased, mask=m0 + biased < count, other=0)
        # This program's share of the keys, in whole tiles.
        per_split = ((visible + BLOCK_N - 1) // BLOCK_N + splits - 1) // splits * BLOCK_N
        first = split * per_split
        end = least(visible, first + per_split)
        full_end = most(first, least(end, full) // BLOCK_N * BLOCK_N)
        table = BlockTable + b.to(tl.int64) * table_row
        keys_of_head = KeyCache + head * k_head
        values_of_head = ValueCache + head * v_head
        acc = tl.full((BLOCK_M, DV_PAD), 0.0, tl.float32)

        # Keys that every query of this tile sees.
        coming = 0
        if TMA:
            coming = load_page(table, least(first // PAGE, table_row - 1), PLAIN)
        for n0 in range(first, full_end, BLOCK_N):
            page = coming
            if TMA:
                coming = load_page(table, least((n0 + BLOCK_N) // PAGE, table_row - 1), PLAIN)
            half = paged_scores(
                q, page, KeyTiles, keys_of_head, table, SlotTimes, Position, TimeBias, Cells, n0, bias_position, q_time,
                positions, head, position_head, time_head, time_page, k_page, k_slot, k_head, half_scale, D, D_PAD, PAGE, BLOCK_N,
                HAS_POSITION, HAS_TIME, TMA, PRECISION, PLAIN,
            )  # fmt: skip
            weights = silu_of_half(half * half_scale, EXACT).to(q.dtype)
            v = paged_values(
                page, ValueTiles, values_of_head, table, n0, head, v_page, v_slot, v_head, DV, DV_PAD, PAGE, BLOCK_N, TMA, PLAIN
            )
            acc = tl.dot(weights, v, acc, input_precision=PRECISION)

        # The diagonal and the end of the history.
        for n0 in range(full_end, end, BLOCK_N):
            keys = n0 + near
            written = keys < end
            page = tl.load(table + keys // PAGE, mask=written, other=0).to(tl.int64)
            k_rows = page * k_page + (keys % PAGE) * k_slot
            v_rows = page * v_page + (keys % PAGE) * v_slot
            k_time = tl.full((BLOCK_N,), 0, tl.int64)
            if HAS_TIME:
                k_time = tl.load(SlotTimes + page * time_page + keys % PAGE, mask=written, other=0)
            bias = paged_bias(
                Position, TimeBias, Cells, bias_position, keys, q_time, k_time, positions, head, position_head, time_head,
                HAS_POSITION, HAS_TIME,
            )  # fmt: skip
            k = tl.load(keys_of_head + k_rows[None, :] + dims[:, None], mask=written[None, :] & (dims[:, None] < D), other=0.0)
            half = tl.dot(q, k, input_precision=PRECISION) * half_scale + bias
            allowed = keys[None, :] <= last_key[:, None]
            if HAS_HISTORY:
                allowed = allowed | (keys[None, :] == own[:, None])
            if NUM_CONTEXT > 1:
                allowed = allowed | ((position[:, None] < NUM_CONTEXT) & (keys[None, :] < least(NUM_CONTEXT, seq_len)))
            allowed = allowed & written[None, :]
            weights = silu_of_half(tl.where(allowed, half, 0.0), EXACT).to(q.dtype)
            # Slots that no token was written to may hold anything, and 0 x NaN is NaN: they are not even loaded.
            v = tl.load(
                values_of_head + v_rows[:, None] + value_dims[None, :],
                mask=written[:, None] & (value_dims[None, :] < DV), other=0.0,
            )  # fmt: skip
            acc = tl.dot(weights, v, acc, input_precision=PRECISION)

        if HAS_CANDIDATES:  # noqa: SIM102 - a compile-time and a run-time condition
            if split == 0:
                k_own = tl.load(
                    OwnKeys + (start + rows[:, None]) * own_k_row + head * own_k_head + dims[None, :],
                    mask=real[:, None] & (dims[None, :] < D), other=0.0,
                )  # fmt: skip
                v_own = tl.load(
                    OwnValues + (start + rows[:, None]) * own_v_row + head * own_v_head + value_dims[None, :],
                    mask=real[:, None] & (value_dims[None, :] < DV), other=0.0,
                )  # fmt: skip
                half = tl.reduce(q.to(tl.float32) * k_own.to(tl.float32), 1, add) * half_scale
                if HAS_POSITION:
                    half += 0.5 * tl.load(Position + head * position_head).to(tl.float32)
                if HAS_TIME:
                    half += 0.5 * tl.load(TimeBias + head * time_head).to(tl.float32)
                acc += silu_of_half(half, EXACT)[:, None] * v_own.to(tl.float32)

        o_rows = Out + ((split.to(tl.int64) * total + start + rows[:, None]) * heads + head) * DV + value_dims[None, :]
        tl.store(o_rows, (acc * out_scale).to(Out.dtype.element_ty), mask=real[:, None] & (value_dims[None, :] < DV))


@triton.jit(do_not_specialize=["splits"])
def sum_splits_kernel(Parts, Out, size, splits, BLOCK: tl.constexpr):
    """Out = sum of the `splits` parts of `size` elements, in order: the same result every time."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for split in range(splits):
        total += tl.load(Parts + split * size.to(tl.int64) + at, mask=at < size, other=0.0)
    tl.store(Out + at, total.to(Out.dtype.element_ty), mask=at < size)


def default_tiles(dtype: torch.dtype, d: int, page: int, max_queries: int, capability: int = 90) -> PagedTiles:
    """Tiles that were fastest on an H200 among those tried, before any split; `d` is the head width."""
    if interpreted():
        return PagedTiles(16, 16)
    if dtype == torch.float32:
        return PagedTiles(16, 32, num_stages=2)
    # A tile of 64 keys inside one page of 64 or more can be copied whole; shorter pages are gathered, better in longer tiles.
    block_n = 64 if page >= 64 or d > 128 else 128
    if max_queries <= 16:
        return PagedTiles(16, block_n)
    if max_queries <= 32:
        return PagedTiles(32, block_n)
    if capability < 90 or d > 128 or max_queries <= 64:
        return PagedTiles(64, 64)
    if d > 64:
        return PagedTiles(64, 64, maxnreg=168)
    if page < 64:
        return PagedTiles(128, 128, num_warps=8, maxnreg=128)
    return PagedTiles(64, 64, num_stages=4) if max_queries <= 128 else PagedTiles(128, 64, num_warps=8, maxnreg=128)


def _split(tiles: PagedTiles, q: Tensor, max_queries: int, max_keys: int, pairs: int) -> PagedTiles:
    """Split the keys until the programs fill the GPU a few times over, or a part would be shorter than two tiles."""
    if interpreted():
        return dataclasses.replace(tiles, splits=2 if max_keys > 32 else 1)
    programs = pairs * triton.cdiv(max_queries, tiles.block_m)
    # Decode is over the sooner the more programs read; matrix work is better left in longer loops.
    a_processor = (4, 2) if max_queries <= 16 else (2.5, 1.5)
    wanted = int(a_processor[q.shape[2] > 64] * processors(q)) // programs
    return dataclasses.replace(tiles, splits=max(1, min(wanted, triton.cdiv(max_keys, 2 * tiles.block_n), 16)))


@functools.cache
def _gluon() -> types.ModuleType | None:
    """`triton_extend`; None where this Triton has no Gluon as that module knows it (it is experimental)."""
    try:
        from hstu_lab.ops import triton_extend
    except (ImportError, AttributeError):
        return None
    return triton_extend


def _extend_tiles(q: Tensor, caches: tuple[Tensor, Tensor], max_queries: int, max_keys: int, pairs: int):
    """Tiles of `triton_extend` where that kernel is made for the work and the faster one, else None."""
    (_, page, _, d), dv = caches[0].shape, caches[1].shape[3]
    if max_queries <= 64 or capability(q) != 90 or not use_tma(*caches) or _gluon() is None:
        return None
    if not _gluon().takes(q.dtype, d, dv, page) or any(cache.stride(0) != page * cache.stride(1) for cache in caches):
        return None
    tiles = _gluon().default_tiles(d, max_queries)
    programs = pairs * triton.cdiv(max_queries, tiles.queries)
    wanted = tiles.resident * processors(q) // programs
    return dataclasses.replace(tiles, splits=max(1, min(wanted, triton.cdiv(max_keys, 8 * tiles.block_n), 16)))


def _summed(parts: Tensor, out: Tensor) -> Tensor:
    """`out`, after the sum over the first dimension of `parts` has been written to it, unless it is `parts` itself."""
    if parts is not out:
        block = 1024
        sum_splits_kernel[(triton.cdiv(out.numel(), block),)](parts, out, out.numel(), parts.shape[0], BLOCK=block)
    return out


def _as_rows(cache: Tensor, block: int) -> TensorDescriptor:
    """A cache (blocks, page, H, d) as rows of all heads, read in tiles of `block` rows of one head."""
    blocks, page, heads, d = cache.shape
    return TensorDescriptor(cache, [blocks * page, (heads - 1) * cache.stride(2) + d], [cache.stride(1), 1], [block, d])


def attention_paged(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, query_offsets: Tensor, seq_lens: Tensor, *,
    divisor: float, bias: RelativeBias | None = None, query_times: Tensor | None = None, slot_times: Tensor | None = None,
    candidates: tuple[Tensor, Tensor] | None = None, num_context: int = 0, history_lens: Tensor | None = None,
    max_queries: int | None = None, tiles: PagedTiles | None = None, tile_list: Tensor | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of new queries over a paged KV cache; shapes as in `hstu_lab.ops.reference.attention_paged`.

    `max_queries` bounds the queries of one sequence; without it the number is read back from the device, which waits for it
    (and cannot be captured in a CUDA graph). `tile_list` (L,) int32 names the query tiles to compute, where not all are wanted:
    the rows of the others are left as they are in `out` (T, H, dv). Raises TypeError or ValueError for what the kernel does not
    take.
    """
    check_dtype(q=q, key_cache=key_cache, value_cache=value_cache)
    total, heads, d = q.shape
    dv, page = value_cache.shape[3], key_cache.shape[1]
    batch = query_offsets.shape[0] - 1
    if page & (page - 1):
        raise ValueError(f"block_size is {page}: the paged kernel takes powers of two")
    out = torch.empty(total, heads, dv, dtype=q.dtype, device=q.device) if out is None else out
    if total == 0:
        return out
    if max_queries is None:
        max_queries = total if batch == 1 else int(query_offsets.diff().max())
    time = bias.time if bias else None
    position = bias.position if bias else None
    if time is not None and (query_times is None or slot_times is None):
        raise ValueError("query_times or slot_times is None: a time bias needs the time of every token")
    plain = all(x is None for x in (position, time, candidates, history_lens, tile_list)) and num_context <= 1
    if tiles is None and plain:
        tiles = _extend_tiles(q, (key_cache, value_cache), max_queries, block_table.shape[1] * page, batch * heads)
    if tiles is None:
        tiles = default_tiles(q.dtype, max(d, dv), page, max_queries, capability(q))
        tiles = _split(tiles, q, max_queries, block_table.shape[1] * page, batch * heads)
    own_k, own_v = candidates or (None, None)
    if any(t is not None and t.stride(-1) != 1 for t in (q, key_cache, value_cache, own_k, own_v, block_table, slot_times)):
        raise ValueError("the last dimension of q, the caches, the block table and the candidates must be contiguous")
    parts = out if tiles.splits == 1 else torch.empty(tiles.splits, *out.shape, dtype=torch.float32, device=q.device)
    if not isinstance(tiles, PagedTiles):
        options = {"divisor": divisor, "max_queries": max_queries, "tiles": tiles}
        _gluon().launch(q, key_cache, value_cache, parts, block_table, query_offsets, seq_lens, **options)
        return _summed(parts, out)
    cells = None if time is None else bucket_tables(time.shape[1], q.device)[1]
    tiles_m = triton.cdiv(max_queries, tiles.block_m)
    strides = [*q.stride()[:2], *key_cache.stride()[:3], *value_cache.stride()[:3], 0 if time is None else slot_times.stride(0)]
    for own in (own_k, own_v):
        strides += [0, 0] if own is None else own.stride()[:2]
    strides += [0 if table is None else table.stride(0) for table in (position, time)]
    d_pad, dv_pad = max(16, triton.next_power_of_2(d)), max(16, triton.next_power_of_2(dv))
    key_tiles = value_tiles = None
    tma = page % tiles.block_n == 0 and d == d_pad and dv == dv_pad and use_tma(key_cache, value_cache)
    tma = tma and all(cache.stride(0) == page * cache.stride(1) for cache in (key_cache, value_cache))
    if tma:
        key_tiles, value_tiles = (_as_rows(cache, tiles.block_n) for cache in (key_cache, value_cache))
    paged_kernel[(heads * tiles.splits, batch * tiles_m if tile_list is None else len(tile_list))](
        q, key_cache, value_cache, key_tiles, value_tiles, parts, block_table, query_offsets, seq_lens, query_times, slot_times,
        own_k, own_v, history_lens, tile_list, position, time, cells, *strides, block_table.stride(0), total, heads, tiles_m,
        tiles.splits,
        0 if position is None else position.shape[1], 0.5 * d**-0.5, 1 / divisor,
        D=d, DV=dv, D_PAD=d_pad, DV_PAD=dv_pad, PAGE=page,
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, NUM_CONTEXT=num_context, HAS_CANDIDATES=candidates is not None,
        HAS_HISTORY=history_lens is not None, HAS_LIST=tile_list is not None, HAS_POSITION=position is not None,
        HAS_TIME=time is not None, EXACT=q.dtype == torch.float32 or interpreted(), TMA=tma,
        BIAS_ROWS=1 if max_queries == 1 else tiles.block_m, PLAIN=interpreted(),
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        **({} if tiles.maxnreg is None else {"maxnreg": tiles.maxnreg}),
    )  # fmt: skip
    return _summed(parts, out)
