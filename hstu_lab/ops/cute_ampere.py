"""HSTU attention for Ampere in CuTe DSL: cp.async into swizzled shared memory, ldmatrix, mma.sync m16n8k16, two stages.

The kernel takes plain pointers and numbers, so that its PTX can be launched by anybody.
"""

from __future__ import annotations

import dataclasses

import cutlass
import cutlass.cute as cute
from cuda.bindings import driver
from cutlass import Float32, Int32, Int64
from cutlass.cute.nvgpu import cpasync, warp
from cutlass.utils import SmemAllocator

from hstu_lab.ops.cute_tiles import locate, silu_of_half, write_rows

WARPS = 4


@dataclasses.dataclass(frozen=True)
class AmpereTiles:
    """Queries of a block (64 or 128) and keys of a tile."""

    queries: int = 128
    keys: int = 64


class AmpereAttention:
    """The kernel for one head width (64 or 128), element type and choice of tiles. `__call__` is compiled by `cute.compile`."""

    def __init__(self, width: int, dtype: type[cutlass.Numeric], tiles: AmpereTiles):
        self.d, self.dtype, self.tiles = width, dtype, tiles
        self.queries, self.keys = tiles.queries, tiles.keys
        self.threads = 32 * WARPS

    def shared_bytes(self) -> int:
        """Of a block: queries, and two stages of keys and values."""
        return 2 * self.d * (self.queries + 4 * self.keys)

    @cute.jit
    def __call__(
        self, q: cute.Pointer, k: cute.Pointer, v: cute.Pointer, out: cute.Pointer, offsets: cute.Pointer, batch: Int32,
        heads: Int32, max_len: Int32, q_row: Int64, q_head: Int64, k_row: Int64, k_head: Int64, v_row: Int64, v_head: Int64,
        half_scale: Float32, out_scale: Float32, group: Int32, stream: driver.CUstream,
    ):  # fmt: skip
        max_tiles = cute.ceil_div(max_len, self.queries)
        strides = [Int32(stride) for stride in (q_row, q_head, k_row, k_head, v_row, v_head)]
        self.kernel(
            q, k, v, out, offsets, batch * heads, heads, max_tiles, *strides, half_scale, out_scale, group
        ).launch(
            grid=(batch * heads * max_tiles, 1, 1), block=(self.threads, 1, 1), smem=self.shared_bytes(), stream=stream,
            min_blocks_per_mp=1,
        )  # fmt: skip

    def tiled_mma(self) -> cute.TiledMma:
        """Four warps below each other, 16 rows each; two instructions side by side, so that ldmatrix loads four matrices."""
        op = warp.MmaF16BF16Op(self.dtype, Float32, (16, 8, 16))
        return cute.make_tiled_mma(op, cute.make_layout((WARPS, 1, 1)), permutation_mnk=(16 * WARPS, 16, 16))

    def shared_layout(self, shape: tuple[int, ...]) -> cute.ComposedLayout:
        """Rows of 64 elements whose 16-byte pieces are permuted by the row: ldmatrix and cp.async touch every bank once."""
        swizzle = cute.make_composed_layout(cute.make_swizzle(3, 3, 3), 0, cute.make_layout((8, 64), stride=(64, 1)))
        return cute.tile_to_shape(swizzle, shape, (0, 1, 2)[: len(shape)])

    @cute.kernel
    def kernel(
        self, q: cute.Pointer, k: cute.Pointer, v: cute.Pointer, out: cute.Pointer, offsets: cute.Pointer, pairs: Int32,
        heads: Int32, max_tiles: Int32, q_row: Int32, q_head: Int32, k_row: Int32, k_head: Int32, v_row: Int32, v_head: Int32,
        half_scale: Float32, out_scale: Float32, group: Int32,
    ):  # fmt: skip
        d, queries, keys = self.d, self.queries, self.keys
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        sequence, head, tile = locate(block, pairs, heads, max_tiles, group)
        bounds = cute.make_tensor(offsets, cute.make_layout(1 << 30))
        start = bounds[sequence]
        length = Int32(bounds[sequence + 1] - start)
        m0 = tile * queries

        memory = SmemAllocator()
        sQ = memory.allocate_tensor(self.dtype, self.shared_layout((queries, d)), 128)
        sK = memory.allocate_tensor(self.dtype, self.shared_layout((keys, d, 2)), 128)
        sV = memory.allocate_tensor(self.dtype, self.shared_layout((keys, d, 2)), 128)
        if m0 < length:
            q_rows, k_rows, v_rows = (
                base + (start * row + head * step)
                for base, row, step in ((q, q_row, q_head), (k, k_row, k_head), (v, v_row, v_head))
            )
            count = cute.ceil_div(cutlass.min(length, m0 + queries), keys)
            self.fetch(q_rows, q_row, sQ, m0, length, thread)
            self.fetch(k_rows, k_row, sK[None, None, 0], (count - 1) * keys, length, thread)
            self.fetch(v_rows, v_row, sV[None, None, 0], (count - 1) * keys, length, thread)
            cute.arch.cp_async_commit_group()

            mma = self.tiled_mma()
            part = mma.get_slice(thread)
            sVt = cute.composition(sV, cute.make_ordered_layout((d, keys, 2), order=(1, 0, 2)))
            rQ = part.make_fragment_A(part.partition_A(sQ))
            rK = part.make_fragment_B(part.partition_B(sK[None, None, 0]))
            rV = part.make_fragment_B(part.partition_B(sVt[None, None, 0]))
            S = cute.make_rmem_tensor(part.partition_shape_C((queries, keys)), Float32)
            P = cute.make_rmem_tensor(S.shape, self.dtype)
            O = cute.make_rmem_tensor(part.partition_shape_C((queries, d)), Float32)
            cS = part.partition_C(cute.make_identity_tensor((queries, keys)))
            straight = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(False, 4), self.dtype)
            turned = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(True, 4), self.dtype)
            copy_q = cute.make_tiled_copy_A(straight, mma).get_slice(thread)
            copy_k = cute.make_tiled_copy_B(straight, mma).get_slice(thread)
            copy_v = cute.make_tiled_copy_B(turned, mma).get_slice(thread)
            from_q, from_k, from_v = copy_q.partition_S(sQ), copy_k.partition_S(sK), copy_v.partition_S(sVt)
            O.fill(0.0)
            for i in cutlass.range(count, unroll=1):
                n0, stage = (count - 1 - i) * keys, i % 2
                if i + 1 < count:
                    self.fetch(k_rows, k_row, sK[None, None, 1 - stage], n0 - keys, length, thread)
                    self.fetch(v_rows, v_row, sV[None, None, 1 - stage], n0 - keys, length, thread)
                cute.arch.cp_async_commit_group()
                cute.arch.cp_async_wait_group(1)
                cute.arch.sync_threads()
                if i == 0:
                    cute.copy(straight, from_q, copy_q.retile(rQ))
                S.fill(0.0)
                for j in cutlass.range_constexpr(d // 16):
                    cute.copy(straight, from_k[None, None, j, stage], copy_k.retile(rK)[None, None, j])
                    cute.gemm(mma, S, rQ[None, None, j], rK[None, None, j], S)
                if n0 + keys > m0 + 1:
                    for e in cutlass.range_constexpr(cute.size(S)):
                        row, column = cS[e]
                        S[e] = S[e] if column + n0 <= row + m0 else Float32(0)
                for e in cutlass.range_constexpr(cute.size(S)):
                    S[e] = silu_of_half(S[e] * half_scale)
                P.store(S.load().to(self.dtype))
                weights = self.as_operand(P)
                for j in cutlass.range_constexpr(keys // 16):
                    cute.copy(turned, from_v[None, None, j, stage], copy_v.retile(rV)[None, None, j])
                    cute.gemm(mma, O, weights[None, None, j], rV[None, None, j], O)
                cute.arch.sync_threads()
            self.finish(O, sQ, out, mma, thread, start, length, head, heads, m0, out_scale)

    @cute.jit
    def fetch(self, base, stride, shared, row0, length, thread):
        """Start copying rows row0 ... of one head; rows beyond the sequence repeat its last one and get weight zero."""
        rows = 32 * WARPS // (self.d // 8)
        column = thread % (self.d // 8)
        atom = cute.make_copy_atom(cpasync.CopyG2SOp(cache_mode=cpasync.LoadCacheMode.GLOBAL), self.dtype, num_bits_per_copy=128)
        pieces = cute.logical_divide(shared, (None, 8))
        for i in cutlass.range_constexpr(cute.size(shared, mode=[0]) // rows):
            row = i * rows + thread // (self.d // 8)
            source = base + Int64(cutlass.min(row0 + row, length - 1)) * stride + column * 8
            source = cute.make_tensor(source.align(16), cute.make_layout(8))
            cute.copy(atom, source, pieces[row, (None, column)])

    @cute.jit
    def as_operand(self, P):
        """The result of one product ((2, 2), M, N / 8) as the first operand of the next ((2, 2, 2), M, N / 16)."""
        halves = cute.logical_divide(P.layout, (None, None, 2))
        return cute.make_tensor(
            P.iterator,
            cute.make_layout(
                ((halves.shape[0], halves.shape[2][0]), halves.shape[1], halves.shape[2][1]),
                stride=((halves.stride[0], halves.stride[2][0]), halves.stride[1], halves.stride[2][1]),
            ),
        )

    @cute.jit
    def finish(self, O, sO, out, mma, thread, start, length, head, heads, m0, out_scale):
        """Divide, round, and write the rows that exist: through shared memory, so that a thread stores 16 bytes at a time."""
        d = self.d
        rounded = cute.make_fragment_like(O, self.dtype)
        rounded.store((O.load() * out_scale).to(self.dtype))
        pairs = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), self.dtype, num_bits_per_copy=32)
        copy = cute.make_tiled_copy_C(pairs, mma).get_slice(thread)
        cute.copy(pairs, copy.retile(rounded), copy.partition_D(sO))
        cute.arch.sync_threads()
        rows = out + ((start + m0) * heads + head) * d
        layout = cute.make_layout((self.queries, d), stride=(cute.assume(Int64(heads) * d, divby=8), 1))
        write_rows(sO, cute.make_tensor(rows.align(16), layout), self.queries, d, length - m0, thread)
