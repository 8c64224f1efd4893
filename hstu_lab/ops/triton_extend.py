"""Chunks of queries over the paged cache on Hopper, without a bias, in Gluon: Triton with the machine's parts in the open.

Four warps that compute nothing have the tensor memory accelerator copy keys and values, page by page where pages are shorter than
half a tile, so that the warps that compute never wait for an address. What they have read they report one by one, at named
barriers: a report through shared memory (mbarrier.arrive) would have them wait for each other first, three times a tile.

For many queries four groups of four warps read the same tiles, each at its own pace, so that the tanh of one runs beside the
products of another. More warps in step with each other were slower: all of them want the same unit at the same time.
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

FIRST_BARRIER = gl.constexpr(8)
"""Of a program's 16 named barriers the compiler takes its own from 0; from here on there is one a buffer: keys, then values."""

QUERIES = gl.constexpr(64)
"""Queries of a group of four warps: what one matrix instruction takes."""

SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=2))

# The same functions under the names of Triton 3.9 and of 3.6.
synchronize = getattr(gl, "barrier", None) or gl.thread_barrier
copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@dataclasses.dataclass(frozen=True)
class ExtendTiles:
    """Key rows of a tile, tiles of keys held in shared memory (at most 4, for want of named barriers), registers a thread at the
    start, programs that an SM holds, parts that the keys are split into.

    groups: of four warps and 64 queries each (1 or 4). registers: a thread's, of the groups after the first; the first takes over
    what the copying warps give back. overlap: a product stays in flight while the next begins, and queries stay in shared memory.
    That wants more registers than a thread of four groups can have: ptxas would have every single matrix instruction wait for the
    one before (its warning C7512).
    """

    block_n: int
    stages: int
    maxnreg: int
    resident: int
    splits: int = 1
    groups: int = 1
    registers: int = 0
    overlap: bool = True

    @property
    def queries(self) -> int:
        """Queries of a program."""
        return QUERIES.value * self.groups


@gluon.constexpr_function
def threads_of(groups):
    """Those that meet at a buffer: the ones that compute, and the two warps that fill it."""
    return 32 * (4 * groups + 2)


@gluon.jit
def silu_of_half(half):
    """SiLU(2 * half) with one hardware tanh."""
    tanh = gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [half], dtype=gl.float32, is_pure=True, pack=1)
    return half * tanh + half


@gluon.jit
def release(barrier, threads, awaited):
    """A warp says that it has read a buffer, if anybody waits for that, and goes on: no warp waits for another."""
    gl.inline_asm_elementwise(
        "{ .reg .pred awaited; setp.ne.s32 awaited, $3, 0; @awaited bar.arrive $1, $2; mov.b32 $0, $1; }", "=r,r,r,r",
        [barrier, threads, awaited], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def await_release(barrier, threads):
    """A copying warp waits until all computing warps have read a buffer; `threads` are theirs and those of two copying warps.

    The two wait at instructions of their own: `bar.sync` would promise that it is the same one.
    """
    gl.inline_asm_elementwise(
        "barrier.sync $1, $2; mov.b32 $0, $1;", "=r,r,r", [barrier, threads], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def rows_of(table, n0, last_page, PAGE: gl.constexpr, COUNT: gl.constexpr):
    """Rows of the cache where the pages of keys n0 .. n0 + COUNT lie; n0 is a multiple of COUNT."""
    rows = ()
    if PAGE < COUNT:
        for piece in gl.static_range(COUNT // PAGE):
            page = gl.load(table + gl.minimum(n0 // COUNT * (COUNT // PAGE) + piece, last_page)).to(gl.int32)
            rows = rows + (page * PAGE,)  # noqa: RUF005 - Triton knows no star
    else:
        page = gl.load(table + gl.minimum(n0 // PAGE, last_page)).to(gl.int32)
        rows = (page * PAGE + n0 % PAGE,)
    return rows


@gluon.jit
def feed(
    source, D: gl.constexpr, PAGE: gl.constexpr, BARRIER: gl.constexpr, GROUPS: gl.constexpr, HALF: gl.constexpr
):  # fmt: skip
    """A copying warp: the first or second half of each tile of keys, or of values, into buffers as they fall free."""
    Tiles, table, buffers, ready, first, tiles, last_page, column = source
    PARTS: gl.constexpr = D // WIDTH
    STAGES: gl.constexpr = buffers.shape[0] // PARTS
    BLOCK_N: gl.constexpr = buffers.shape[1]
    THREADS: gl.constexpr = threads_of(GROUPS)
    COUNT: gl.constexpr = BLOCK_N // 2
    ROWS: gl.constexpr = PAGE if PAGE < COUNT else COUNT
    rows = rows_of(table, first + HALF * COUNT, last_page, PAGE, COUNT)
    for number in range(0, tiles):
        n0 = first + (number + 1) * BLOCK_N + HALF * COUNT
        following = rows_of(table, n0, last_page, PAGE, COUNT)  # read before it is wanted
        slot = number % STAGES
        if number >= STAGES:
            await_release(BARRIER + slot, THREADS)
        mbarrier.expect(ready.index(slot), COUNT * D * 2)
        for piece in gl.static_range(COUNT // ROWS):
            for part in gl.static_range(PARTS):
                to = buffers.index(slot * PARTS + part).slice(HALF * COUNT + piece * ROWS, ROWS)
                copy_tile(Tiles, [rows[piece], column + part * WIDTH], ready.index(slot), to)
        rows = following


@gluon.jit
def key_scores(queries, keys, slot, zeros, PARTS: gl.constexpr, ASYNC: gl.constexpr):
    """Products of the queries and the keys in a buffer: done, or (ASYNC) begun."""
    scores = hopper.warpgroup_mma(
        queries[0], keys.index(slot * PARTS).permute((1, 0)), zeros, use_acc=False, is_async=ASYNC
    )  # fmt: skip
    for part in gl.static_range(1, PARTS):
        scores = hopper.warpgroup_mma(queries[part], keys.index(slot * PARTS + part).permute((1, 0)), scores, is_async=ASYNC)
    return scores


@gluon.jit
def weights_of(scores, half_scale, SCALED: gl.constexpr, dtype: gl.constexpr, layout: gl.constexpr):
    """SiLU of the scores, as the left side of the product with the values."""
    return gl.convert_layout(silu_of_half(scores if SCALED else scores * half_scale).to(dtype), layout)


@gluon.jit
def whole_tiles(
    queries, keys, values, keys_ready, values_ready, acc, zeros, fast, tiles, half_scale, D: gl.constexpr, STAGES: gl.constexpr,
    SCALED: gl.constexpr, OVERLAP: gl.constexpr, THREADS: gl.constexpr, dtype: gl.constexpr, weights_layout: gl.constexpr,
):  # fmt: skip
    """acc after `fast` tiles that every query sees whole. With OVERLAP the product with the values of one runs on beside the
    scores of the next; other warps of the SM use what is idle."""
    PARTS: gl.constexpr = D // WIDTH
    for i in range(0, fast):
        slot = i % STAGES
        before = (i + STAGES - 1) % STAGES
        mbarrier.wait(keys_ready.index(slot), i // STAGES & 1)
        scores = key_scores(queries, keys, slot, zeros, PARTS, OVERLAP)
        if OVERLAP:
            if PARTS == 1:
                scores, left = hopper.warpgroup_mma_wait(0, [scores, acc[0]])
                acc = (left,)
            else:
                scores, left, right = hopper.warpgroup_mma_wait(0, [scores, acc[0], acc[1]])
                acc = (left, right)
        release(FIRST_BARRIER + slot, THREADS, i + STAGES < tiles)
        release(FIRST_BARRIER + STAGES + before, THREADS, (i > 0) & (i + STAGES - 1 < tiles))
        weights = weights_of(scores, half_scale, SCALED, dtype, weights_layout)
        mbarrier.wait(values_ready.index(slot), i // STAGES & 1)
        left = hopper.warpgroup_mma(weights, values.index(slot * PARTS), acc[0], is_async=OVERLAP)
        if PARTS == 1:
            acc = (left,)
        else:
            acc = (left, hopper.warpgroup_mma(weights, values.index(slot * 2 + 1), acc[1], is_async=OVERLAP))
    if OVERLAP:
        if PARTS == 1:
            acc = (hopper.warpgroup_mma_wait(0, [acc[0]]),)
        else:
            acc = hopper.warpgroup_mma_wait(0, [acc[0], acc[1]])
    release(FIRST_BARRIER + STAGES + (fast + STAGES - 1) % STAGES, THREADS, (fast > 0) & (fast + STAGES - 1 < tiles))
    return acc


@gluon.jit
def attend(
    work, D: gl.constexpr, SCALED: gl.constexpr, OVERLAP: gl.constexpr, GROUPS: gl.constexpr, GROUP: gl.constexpr
):  # fmt: skip
    """Four computing warps: 64 queries against the program's tiles."""
    (
        Q, Out, queries, keys, values, keys_ready, values_ready, q_row, out_row, count, m0, seq_len, first, end, tiles,
        half_scale, out_scale,
    ) = work  # fmt: skip
    PARTS: gl.constexpr = D // WIDTH
    STAGES: gl.constexpr = keys.shape[0] // PARTS
    BLOCK_N: gl.constexpr = keys.shape[1]
    THREADS: gl.constexpr = threads_of(GROUPS)
    dtype: gl.constexpr = Q.dtype.element_ty
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    queries_layout: gl.constexpr = gl.DotOperandLayout(0, scores_layout, 2)
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    load_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    m0 += GROUP * QUERIES
    Q += m0.to(gl.int64) * q_row
    Out += m0.to(gl.int64) * out_row
    left = count - m0
    position = seq_len - left
    wanted = gl.where(left > 0, gl.maximum(gl.minimum(end, position + QUERIES) - first + BLOCK_N - 1, 0) // BLOCK_N, 0)
    fast = gl.minimum(gl.maximum(gl.minimum(end, position + 1) - first, 0) // BLOCK_N, wanted)

    load_rows = gl.arange(0, QUERIES, gl.SliceLayout(1, load_layout))
    load_dims = gl.arange(0, WIDTH, gl.SliceLayout(0, load_layout))
    q_rows = Q + load_rows[:, None] * q_row + load_dims[None, :]
    for part in gl.static_range(PARTS):
        q = gl.load(q_rows + part * WIDTH, mask=load_rows[:, None] < left, other=0.0)
        if SCALED:
            q = (q * half_scale).to(dtype)
        queries.index(GROUP * PARTS + part).store(q)
    hopper.fence_async_shared()
    synchronize()
    held = ()
    for part in gl.static_range(PARTS):
        shared = queries.index(GROUP * PARTS + part)
        # From registers where they have room: shared memory has enough to do with keys and values.
        held = held + (shared if OVERLAP else shared.load(queries_layout),)  # noqa: RUF005 - Triton knows no star

    zeros = gl.full((QUERIES, BLOCK_N), 0.0, gl.float32, scores_layout)
    acc = (gl.full((QUERIES, WIDTH), 0.0, gl.float32, out_layout),)
    if PARTS == 2:
        acc = acc + acc
    acc = whole_tiles(
        held, keys, values, keys_ready, values_ready, acc, zeros, fast, tiles, half_scale, D, STAGES, SCALED, OVERLAP,
        THREADS, dtype, weights_layout,
    )  # fmt: skip

    # The diagonal and the end of the history.
    rows = position + gl.arange(0, QUERIES, gl.SliceLayout(1, scores_layout))
    columns = gl.arange(0, BLOCK_N, gl.SliceLayout(0, scores_layout))
    value_rows = gl.arange(0, BLOCK_N, gl.SliceLayout(1, load_layout))
    for i in range(fast, wanted):
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
        scores = key_scores(held, keys, slot, zeros, PARTS, False)
        if not SCALED:
            scores *= half_scale
        allowed = (columns[None, :] <= (rows - n0)[:, None]) & (columns < end - n0)[None, :]
        weights = weights_of(gl.where(allowed, scores, 0.0), half_scale, True, dtype, weights_layout)
        summed = hopper.warpgroup_mma(weights, values.index(slot * PARTS), acc[0])
        if PARTS == 1:
            acc = (summed,)
        else:
            acc = (summed, hopper.warpgroup_mma(weights, values.index(slot * 2 + 1), acc[1]))
        release(FIRST_BARRIER + slot, THREADS, i + STAGES < tiles)
        release(FIRST_BARRIER + STAGES + slot, THREADS, i + STAGES < tiles)

    # The tiles that other groups still want.
    for i in range(wanted, tiles):
        slot = i % STAGES
        mbarrier.wait(keys_ready.index(slot), i // STAGES & 1)
        mbarrier.wait(values_ready.index(slot), i // STAGES & 1)
        release(FIRST_BARRIER + slot, THREADS, i + STAGES < tiles)
        release(FIRST_BARRIER + STAGES + slot, THREADS, i + STAGES < tiles)

    out_rows = gl.arange(0, QUERIES, gl.SliceLayout(1, out_layout))
    out_dims = gl.arange(0, WIDTH, gl.SliceLayout(0, out_layout))
    to = Out + out_rows[:, None] * out_row + out_dims[None, :]
    for part in gl.static_range(PARTS):
        gl.store(to + part * WIDTH, (acc[part] * out_scale).to(Out.dtype.element_ty), mask=out_rows[:, None] < left)


@gluon.jit(do_not_specialize=["table_row", "total", "heads", "tiles_m", "splits"])
def extend_kernel(
    Q, KeyTiles, ValueTiles, Out, BlockTable, QueryOffsets, SeqLens, q_row, q_head, k_head, v_head, table_row, total, heads,
    tiles_m, splits, half_scale, out_scale, D: gl.constexpr, PAGE: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, SCALED: gl.constexpr, OVERLAP: gl.constexpr, GROUPS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """64 * GROUPS queries of one (sequence, head) against one part of the cached keys; Out is (splits, total, heads, D).

    SCALED: half_scale is a power of two, and loses nothing where the queries take it.
    """
    PARTS: gl.constexpr = D // WIDTH
    dtype: gl.constexpr = Q.dtype.element_ty
    head = gl.program_id(0) % heads
    split = gl.program_id(0) // heads
    b = gl.program_id(1) // tiles_m
    m0 = (tiles_m - 1 - gl.program_id(1) % tiles_m) * QUERIES * GROUPS
    start = gl.load(QueryOffsets + b).to(gl.int64)
    count = (gl.load(QueryOffsets + b + 1) - start).to(gl.int32)
    seq_len = gl.load(SeqLens + b).to(gl.int32)
    visible = gl.minimum(seq_len, seq_len - count + m0 + QUERIES * GROUPS)
    per_split = ((visible + BLOCK_N - 1) // BLOCK_N + splits - 1) // splits * BLOCK_N
    first = split * per_split
    end = gl.where(m0 < count, gl.minimum(visible, first + per_split), first)
    tiles = gl.maximum((end - first + BLOCK_N - 1) // BLOCK_N, 0)
    last_page = gl.maximum(seq_len - 1, 0) // PAGE
    table = BlockTable + b.to(gl.int64) * table_row

    queries = gl.allocate_shared_memory(dtype, [GROUPS * PARTS, QUERIES, WIDTH], SHARED)
    keys = gl.allocate_shared_memory(dtype, [STAGES * PARTS, BLOCK_N, WIDTH], SHARED)
    values = gl.allocate_shared_memory(dtype, [STAGES * PARTS, BLOCK_N, WIDTH], SHARED)
    keys_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    values_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(keys_ready.index(slot), count=2)
        mbarrier.init(values_ready.index(slot), count=2)
    hopper.fence_async_shared()

    Q += start * q_row + head * q_head
    Out += ((split.to(gl.int64) * total + start) * heads + head) * D
    out_row = heads * D
    work = (
        Q, Out, queries, keys, values, keys_ready, values_ready, q_row, out_row, count, m0, seq_len, first, end, tiles,
        half_scale, out_scale,
    )  # fmt: skip
    from_keys = (KeyTiles, table, keys, keys_ready, first, tiles, last_page, head * k_head)
    from_values = (ValueTiles, table, values, values_ready, first, tiles, last_page, head * v_head)
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (attend, (work, D, SCALED, OVERLAP, GROUPS, 0)),
                (feed, (from_keys, D, PAGE, FIRST_BARRIER, GROUPS, 0)),
                (feed, (from_keys, D, PAGE, FIRST_BARRIER, GROUPS, 1)),
                (feed, (from_values, D, PAGE, FIRST_BARRIER + STAGES, GROUPS, 0)),
                (feed, (from_values, D, PAGE, FIRST_BARRIER + STAGES, GROUPS, 1)),
            ],
            [1, 1, 1, 1],
            [24, 24, 24, 24],
        )
    else:
        gl.static_assert(GROUPS == 4)
        gl.warp_specialize(
            [
                (attend, (work, D, SCALED, OVERLAP, GROUPS, 0)),
                (attend, (work, D, SCALED, OVERLAP, GROUPS, 1)),
                (attend, (work, D, SCALED, OVERLAP, GROUPS, 2)),
                (attend, (work, D, SCALED, OVERLAP, GROUPS, 3)),
                (feed, (from_keys, D, PAGE, FIRST_BARRIER, GROUPS, 0)),
                (feed, (from_keys, D, PAGE, FIRST_BARRIER, GROUPS, 1)),
                (feed, (from_values, D, PAGE, FIRST_BARRIER + STAGES, GROUPS, 0)),
                (feed, (from_values, D, PAGE, FIRST_BARRIER + STAGES, GROUPS, 1)),
            ],
            [4, 4, 4, 1, 1, 1, 1],
            [REGISTERS, REGISTERS, REGISTERS, 24, 24, 24, 24],
        )


def takes(dtype: torch.dtype, d: int, dv: int, page: int) -> bool:
    """Whether the kernel is made for such heads and pages."""
    return dtype != torch.float32 and d == dv and d in (64, 128) and page >= 8


def default_tiles(d: int, max_queries: int) -> ExtendTiles:
    """Tiles that were fastest on an H200 among those tried, before any split.

    For few queries, those with the most keys on their way. For many, four groups share each tile: a quarter of the copies, and
    one group's tanh beside another's products. Not where more than a fifth of their queries would be missing.
    """
    if d > 64:
        return ExtendTiles(64, 3, 128, 2)
    shared = ExtendTiles(64, 4, 96, 1, groups=4, registers=112, overlap=False)
    empty = -max_queries % shared.queries
    return shared if 4 * empty <= max_queries else ExtendTiles(64, 4, 80, 3)


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
    tiles_m = -(-max_queries // tiles.queries)
    descriptors = [_tiles_of(cache, d, min(page, tiles.block_n // 2)) for cache in (key_cache, value_cache)]
    extend_kernel[(heads * tiles.splits, (len(query_offsets) - 1) * tiles_m)](
        q, *descriptors, parts, block_table, query_offsets, seq_lens, *q.stride()[:2], key_cache.stride(2), value_cache.stride(2),
        block_table.stride(0), total, heads, tiles_m, tiles.splits, 0.5 * d**-0.5, 1 / divisor, D=d, PAGE=page,
        BLOCK_N=tiles.block_n, STAGES=tiles.stages, SCALED=d == 64, OVERLAP=tiles.overlap,
        GROUPS=tiles.groups, REGISTERS=tiles.registers, num_warps=4, maxnreg=tiles.maxnreg,
    )  # fmt: skip
