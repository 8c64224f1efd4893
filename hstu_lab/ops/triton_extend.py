"""Chunks of queries over the paged cache on Hopper, without a bias, in Gluon: Triton with the machine's parts in the open.

A warp that computes nothing has the tensor memory accelerator copy keys and values, page by page where pages are shorter than a
tile, so that the four warps that compute never wait for an address.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

WIDTH = gl.constexpr(64)
"""Columns of one copy: 128 bytes of half precision, the widest row that shared memory swizzles. Wider heads are two parts."""

QUERIES = gl.constexpr(64)
"""Rows of one matrix instruction of four warps: the queries of a program."""

SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=2))

# The same functions under the names of Triton 3.9 and of 3.6.
synchronize = getattr(gl, "barrier", None) or gl.thread_barrier
copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@dataclasses.dataclass(frozen=True)
class ExtendTiles:
    """Key rows of a tile, tiles of keys held in shared memory, registers a thread at the start (the warps that compute take over
    those of the copying one), programs that an SM holds, parts that the keys are split into."""

    block_n: int
    stages: int
    maxnreg: int
    resident: int
    splits: int = 1


@gluon.jit
def silu_of_half(half):
    """SiLU(2 * half) with one hardware tanh."""
    tanh = gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [half], dtype=gl.float32, is_pure=True, pack=1)
    return half * tanh + half


@gluon.jit
def rows_of(table, n0, last_page, PAGE: gl.constexpr, BLOCK_N: gl.constexpr):
    """Rows of the cache where the pages of keys n0 .. n0 + BLOCK_N lie."""
    ROWS: gl.constexpr = PAGE if PAGE < BLOCK_N else BLOCK_N
    rows = ()
    for piece in gl.static_range(BLOCK_N // ROWS):
        key = n0 + piece * ROWS
        page = gl.load(table + gl.minimum(key // PAGE, last_page)).to(gl.int32)
        rows = rows + (page * PAGE + key % PAGE,)  # noqa: RUF005 - Triton knows no star
    return rows


@gluon.jit
def feed(
    KeyTiles, ValueTiles, table, keys, values, barriers, first, tiles, last_page, k_column, v_column, D: gl.constexpr,
    PAGE: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The copying warp: tiles of keys and values into buffers as they fall free."""
    ROWS: gl.constexpr = PAGE if PAGE < BLOCK_N else BLOCK_N
    PARTS: gl.constexpr = D // WIDTH
    keys_ready, keys_free, values_ready, values_free = barriers
    rows = rows_of(table, first, last_page, PAGE, BLOCK_N)
    for number in range(0, tiles):
        following = rows_of(table, first + (number + 1) * BLOCK_N, last_page, PAGE, BLOCK_N)  # read before it is wanted
        slot = number % STAGES
        mbarrier.wait(keys_free.index(slot), (number // STAGES + 1) & 1)
        mbarrier.expect(keys_ready.index(slot), BLOCK_N * D * 2)
        for piece in gl.static_range(BLOCK_N // ROWS):
            for part in gl.static_range(PARTS):
                to = keys.index(slot * PARTS + part).slice(piece * ROWS, ROWS)
                copy_tile(KeyTiles, [rows[piece], k_column + part * WIDTH], keys_ready.index(slot), to)
        mbarrier.wait(values_free.index(slot), (number // STAGES + 1) & 1)
        mbarrier.expect(values_ready.index(slot), BLOCK_N * D * 2)
        for piece in gl.static_range(BLOCK_N // ROWS):
            for part in gl.static_range(PARTS):
                to = values.index(slot * PARTS + part).slice(piece * ROWS, ROWS)
                copy_tile(ValueTiles, [rows[piece], v_column + part * WIDTH], values_ready.index(slot), to)
        rows = following


@gluon.jit
def key_scores(queries, keys, slot, zeros, PARTS: gl.constexpr, WAIT: gl.constexpr):
    """Products of the queries and the keys in a buffer: begun, or (WAIT) done."""
    scores = hopper.warpgroup_mma(
        queries.index(0), keys.index(slot * PARTS).permute((1, 0)), zeros, use_acc=False, is_async=not WAIT
    )  # fmt: skip
    for part in gl.static_range(1, PARTS):
        scores = hopper.warpgroup_mma(
            queries.index(part), keys.index(slot * PARTS + part).permute((1, 0)), scores, is_async=not WAIT
        )  # fmt: skip
    return scores


@gluon.jit
def weights_of(scores, half_scale, SCALED: gl.constexpr, dtype: gl.constexpr, layout: gl.constexpr):
    """SiLU of the scores, as the left side of the product with the values."""
    return gl.convert_layout(silu_of_half(scores if SCALED else scores * half_scale).to(dtype), layout)


@gluon.jit
def one_by_one(
    queries, keys, values, barriers, acc, zeros, fast, half_scale, D: gl.constexpr, STAGES: gl.constexpr, SCALED: gl.constexpr,
    dtype: gl.constexpr, weights_layout: gl.constexpr,
):  # fmt: skip
    """acc after `fast` tiles that every query sees whole. The product with the values of one runs on beside the scores of the
    next; other programs of the SM use what is idle."""
    PARTS: gl.constexpr = D // WIDTH
    keys_ready, keys_free, values_ready, values_free = barriers
    for i in range(0, fast):
        slot = i % STAGES
        mbarrier.wait(keys_ready.index(slot), i // STAGES & 1)
        scores = key_scores(queries, keys, slot, zeros, PARTS, False)
        if PARTS == 1:
            scores, left = hopper.warpgroup_mma_wait(0, [scores, acc[0]])
            acc = (left,)
        else:
            scores, left, right = hopper.warpgroup_mma_wait(0, [scores, acc[0], acc[1]])
            acc = (left, right)
        synchronize()
        mbarrier.arrive(keys_free.index(slot))
        mbarrier.arrive(values_free.index((i + STAGES - 1) % STAGES), pred=i > 0)
        weights = weights_of(scores, half_scale, SCALED, dtype, weights_layout)
        mbarrier.wait(values_ready.index(slot), i // STAGES & 1)
        left = hopper.warpgroup_mma(weights, values.index(slot * PARTS), acc[0], is_async=True)
        if PARTS == 1:
            acc = (left,)
        else:
            acc = (left, hopper.warpgroup_mma(weights, values.index(slot * 2 + 1), acc[1], is_async=True))
    if PARTS == 1:
        acc = (hopper.warpgroup_mma_wait(0, [acc[0]]),)
    else:
        acc = hopper.warpgroup_mma_wait(0, [acc[0], acc[1]])
    synchronize()
    mbarrier.arrive(values_free.index((fast + STAGES - 1) % STAGES), pred=fast > 0)
    return acc


@gluon.jit
def attend(
    Q, Out, queries, keys, values, barriers, q_row, q_head, total, heads, head, split, start, count, m0, seq_len, first, end,
    full, tiles, half_scale, out_scale, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """The four computing warps."""
    PARTS: gl.constexpr = D // WIDTH
    dtype: gl.constexpr = Q.dtype.element_ty
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    load_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    keys_ready, keys_free, values_ready, values_free = barriers

    load_rows = m0 + gl.arange(0, QUERIES, gl.SliceLayout(1, load_layout))
    load_dims = gl.arange(0, WIDTH, gl.SliceLayout(0, load_layout))
    for part in gl.static_range(PARTS):
        q_rows = Q + (start + load_rows[:, None]) * q_row + head * q_head + part * WIDTH + load_dims[None, :]
        q = gl.load(q_rows, mask=load_rows[:, None] < count, other=0.0)
        if SCALED:
            q = (q * half_scale).to(dtype)
        queries.index(part).store(q)
    hopper.fence_async_shared()
    synchronize()

    zeros = gl.full((QUERIES, BLOCK_N), 0.0, gl.float32, scores_layout)
    acc = (gl.full((QUERIES, WIDTH), 0.0, gl.float32, out_layout),)
    if PARTS == 2:
        acc = acc + acc
    fast = gl.maximum(gl.minimum(end, full) - first, 0) // BLOCK_N
    acc = one_by_one(queries, keys, values, barriers, acc, zeros, fast, half_scale, D, STAGES, SCALED, dtype, weights_layout)

    # The diagonal and the end of the history.
    rows = seq_len - count + m0 + gl.arange(0, QUERIES, gl.SliceLayout(1, scores_layout))
    columns = gl.arange(0, BLOCK_N, gl.SliceLayout(0, scores_layout))
    value_rows = gl.arange(0, BLOCK_N, gl.SliceLayout(1, load_layout))
    for i in range(fast, tiles):
        slot = i % STAGES
        n0 = first + i * BLOCK_N
        mbarrier.wait(keys_ready.index(slot), i // STAGES & 1)
        mbarrier.wait(values_ready.index(slot), i // STAGES & 1)
        if n0 + BLOCK_N > end:
            # Slots that no token was written to may hold anything, and 0 x NaN is NaN.
            for part in gl.static_range(PARTS):
                v = values.index(slot * PARTS + part)
                read = v.load(load_layout)
                v.store(gl.where((value_rows < end - n0)[:, None], read, 0.0))
            hopper.fence_async_shared()
            synchronize()
        scores = key_scores(queries, keys, slot, zeros, PARTS, True)
        if not SCALED:
            scores *= half_scale
        allowed = (columns[None, :] <= (rows - n0)[:, None]) & (columns < end - n0)[None, :]
        weights = weights_of(gl.where(allowed, scores, 0.0), half_scale, True, dtype, weights_layout)
        summed = hopper.warpgroup_mma(weights, values.index(slot * PARTS), acc[0])
        if PARTS == 1:
            acc = (summed,)
        else:
            acc = (summed, hopper.warpgroup_mma(weights, values.index(slot * 2 + 1), acc[1]))
        synchronize()
        mbarrier.arrive(keys_free.index(slot))
        mbarrier.arrive(values_free.index(slot))

    out_rows = m0 + gl.arange(0, QUERIES, gl.SliceLayout(1, out_layout))
    out_dims = gl.arange(0, WIDTH, gl.SliceLayout(0, out_layout))
    to = Out + ((split.to(gl.int64) * total + start + out_rows[:, None]) * heads + head) * D + out_dims[None, :]
    for part in gl.static_range(PARTS):
        gl.store(to + part * WIDTH, (acc[part] * out_scale).to(Out.dtype.element_ty), mask=out_rows[:, None] < count)


@gluon.jit(do_not_specialize=["table_row", "total", "heads", "tiles_m", "splits"])
def extend_kernel(
    Q, KeyTiles, ValueTiles, Out, BlockTable, QueryOffsets, SeqLens, q_row, q_head, k_head, v_head, table_row, total, heads,
    tiles_m, splits, half_scale, out_scale, D: gl.constexpr, PAGE: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """QUERIES queries of one (sequence, head) against one part of the cached keys; Out is (splits, total, heads, D).

    SCALED: half_scale is a power of two, and loses nothing where the queries take it.
    """
    PARTS: gl.constexpr = D // WIDTH
    dtype: gl.constexpr = Q.dtype.element_ty
    head = gl.program_id(0) % heads
    split = gl.program_id(0) // heads
    b = gl.program_id(1) // tiles_m
    m0 = (tiles_m - 1 - gl.program_id(1) % tiles_m) * QUERIES
    start = gl.load(QueryOffsets + b).to(gl.int64)
    count = (gl.load(QueryOffsets + b + 1) - start).to(gl.int32)
    seq_len = gl.load(SeqLens + b).to(gl.int32)
    visible = gl.minimum(seq_len, seq_len - count + m0 + QUERIES)
    full = gl.minimum(seq_len, seq_len - count + m0 + 1)
    per_split = ((visible + BLOCK_N - 1) // BLOCK_N + splits - 1) // splits * BLOCK_N
    first = split * per_split
    end = gl.where(m0 < count, gl.minimum(visible, first + per_split), first)
    tiles = gl.maximum((end - first + BLOCK_N - 1) // BLOCK_N, 0)
    last_page = gl.maximum(seq_len - 1, 0) // PAGE
    table = BlockTable + b.to(gl.int64) * table_row

    queries = gl.allocate_shared_memory(dtype, [PARTS, QUERIES, WIDTH], SHARED)
    keys = gl.allocate_shared_memory(dtype, [STAGES * PARTS, BLOCK_N, WIDTH], SHARED)
    values = gl.allocate_shared_memory(dtype, [STAGES * PARTS, BLOCK_N, WIDTH], SHARED)
    # One allocation for each purpose: of one, the compiler would take a wait and an arrival to touch the same barrier.
    keys_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    keys_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    barriers = (keys_ready, keys_free, values_ready, values_free)
    for slot in gl.static_range(STAGES):
        for purpose in gl.static_range(4):
            mbarrier.init(barriers[purpose].index(slot), count=1)
    hopper.fence_async_shared()
    gl.warp_specialize(
        [
            (attend, (
                Q, Out, queries, keys, values, barriers, q_row, q_head, total, heads, head, split, start, count, m0, seq_len,
                first, end, full, tiles, half_scale, out_scale, D, BLOCK_N, STAGES, SCALED,
            )),
            (feed, (
                KeyTiles, ValueTiles, table, keys, values, barriers, first, tiles, last_page, head * k_head, head * v_head, D,
                PAGE, BLOCK_N, STAGES,
            )),
        ],
        [1],
        [24],
    )  # fmt: skip


def takes(dtype: torch.dtype, d: int, dv: int, page: int) -> bool:
    """Whether the kernel is made for such heads and pages."""
    return dtype != torch.float32 and d == dv and d in (64, 128) and page >= 8


def default_tiles(d: int, pairs: int, max_queries: int, processors: int) -> ExtendTiles:
    """Tiles that were fastest on an H200 among those tried, before any split; `pairs` is sequences times heads.

    Four programs an SM where all are on the GPU at once only so: each holds fewer keys and has too few registers to keep a
    product in flight, but what one leaves idle the others use.
    """
    if d > 64:
        return ExtendTiles(64, 3, 128, 2)
    three, four = ExtendTiles(64, 4, 80, 3), ExtendTiles(64, 2, 64, 4)
    programs = pairs * -(-max_queries // QUERIES.value)
    return four if three.resident * processors < programs <= four.resident * processors else three


def _tiles_of(cache: Tensor, d: int, rows: int) -> TensorDescriptor:
    """Rows of all heads (..., heads, d), read in tiles of `rows` rows and WIDTH columns."""
    count, columns = cache.shape[:-2].numel(), (cache.shape[-2] - 1) * cache.stride(-2) + d
    return TensorDescriptor(cache, [count, columns], [cache.stride(-3), 1], [rows, WIDTH.value], SHARED.value)


def launch(
    q: Tensor, key_cache: Tensor, value_cache: Tensor, parts: Tensor, block_table: Tensor, query_offsets: Tensor,
    seq_lens: Tensor, *, divisor: float, max_queries: int, tiles: ExtendTiles,
) -> None:  # fmt: skip
    """Attention of each query to the cached keys up to itself, for as many parts of the keys as `parts` has: its shape is
    (splits, T, H, d), or (T, H, d) for one. Other shapes as in `hstu_lab.ops.triton_paged.attention_paged`."""
    total, heads, d = q.shape
    page = key_cache.shape[1]
    tiles_m = -(-max_queries // QUERIES.value)
    descriptors = [_tiles_of(cache, d, min(page, tiles.block_n)) for cache in (key_cache, value_cache)]
    extend_kernel[(heads * tiles.splits, (len(query_offsets) - 1) * tiles_m)](
        q, *descriptors, parts, block_table, query_offsets, seq_lens, *q.stride()[:2], key_cache.stride(2), value_cache.stride(2),
        block_table.stride(0), total, heads, tiles_m, tiles.splits, 0.5 * d**-0.5, 1 / divisor, D=d, PAGE=page,
        BLOCK_N=tiles.block_n, STAGES=tiles.stages, SCALED=d == 64, num_warps=4, maxnreg=tiles.maxnreg,
    )  # fmt: skip
