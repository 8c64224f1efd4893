"""HSTU attention for Hopper in CuTe DSL: TMA loads, wgmma, one producer warp and two or three consumer warpgroups.

No softmax means that tiles of keys are independent, so a consumer keeps the tensor core busy on its own: while it turns the
scores of one tile into weights (SiLU, on the special-function units), products of its other tiles and of its neighbours run.
One block a multiprocessor takes tiles of queries off a counter until none is left.
"""

from __future__ import annotations

import dataclasses

import cutlass
import cutlass.cute as cute
from cuda.bindings import driver
from cutlass import Float32, Int32, Int64
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.utils import LayoutEnum, SmemAllocator, hopper_helpers

from hstu_lab.ops.cute_tiles import locate, silu_of_half, write_rows

ROWS = 64
"""Queries of one consumer warpgroup: the M of a wgmma."""


@dataclasses.dataclass(frozen=True)
class HopperTiles:
    """Keys of a tile, consumer warpgroups (of 64 queries each), stages of the key and value pipelines, and the order of work.

    order "ahead": the next tile's scores are computed while this tile's SiLU runs, in a second set of registers.
    order "behind": one set of registers; the last tile's second product runs beside this tile's SiLU.
    """

    keys: int = 64
    groups: int = 3
    stages: int = 3
    order: str = "behind"
    unroll: int = 1

    def __post_init__(self):
        if self.keys not in (64, 128) or self.groups not in (2, 3) or self.order not in ("ahead", "behind") or self.stages < 2:
            raise ValueError(f"{self}: keys 64 or 128, groups 2 or 3, at least 2 stages, order ahead or behind")

    @property
    def queries(self) -> int:
        return ROWS * self.groups

    @property
    def registers(self) -> tuple[int, int]:
        """Registers a thread of (producer, consumer)."""
        return {2: (24, 240), 3: (32, 160)}[self.groups]


class HopperAttention:
    """The kernel for one head width (64 or 128), element type and choice of tiles. `__call__` is compiled by `cute.compile`."""

    def __init__(self, width: int, dtype: type[cutlass.Numeric], tiles: HopperTiles):
        self.d, self.dtype, self.tiles = width, dtype, tiles
        self.keys, self.groups, self.stages = tiles.keys, tiles.groups, tiles.stages
        self.threads = 128 * (1 + tiles.groups)
        self.producer_registers, self.consumer_registers = tiles.registers

    def shared_bytes(self) -> int:
        """Of a block: queries, outputs, and all stages of keys and values; barriers come on top, within 1 KiB."""
        return 2 * self.d * 2 * (self.tiles.queries + self.stages * self.keys) + 1024

    @cute.jit
    def __call__(
        self, q: cute.Pointer, k: cute.Pointer, v: cute.Pointer, out: cute.Pointer, offsets: cute.Pointer, counter: cute.Pointer,
        total: Int32, batch: Int32, heads: Int32, max_len: Int32, q_row: Int64, q_head: Int64, k_row: Int64, k_head: Int64,
        v_row: Int64, v_head: Int64, half_scale: Float32, out_scale: Float32, group: Int32, processors: Int32,
        stream: driver.CUstream,
    ):  # fmt: skip
        d, keys = self.d, self.keys
        q_row, q_head, k_row, k_head, v_row, v_head = (
            cute.assume(x, divby=8) for x in (q_row, q_head, k_row, k_head, v_row, v_head)
        )
        mQ = cute.make_tensor(q, cute.make_layout((total, d, heads), stride=(q_row, 1, q_head)))
        mK = cute.make_tensor(k, cute.make_layout((total, d, heads), stride=(k_row, 1, k_head)))
        mV = cute.make_tensor(v, cute.make_layout((d, total, heads), stride=(1, v_row, v_head)))
        mO = cute.make_tensor(out, cute.make_layout((total, d, heads), stride=(cute.assume(Int64(d) * heads, divby=8), 1, d)))
        mOffsets = cute.make_tensor(offsets, cute.make_layout(batch + 1))
        mCounter = cute.make_tensor(counter, cute.make_layout(1))

        row_major, column_major = LayoutEnum.ROW_MAJOR, LayoutEnum.COL_MAJOR
        q_layout = hopper_helpers.make_smem_layout_a(row_major, (ROWS, keys, d), self.dtype, self.groups)
        k_layout = hopper_helpers.make_smem_layout_b(row_major, (ROWS, keys, d), self.dtype, self.stages)
        v_layout = hopper_helpers.make_smem_layout_b(column_major, (ROWS, d, keys), self.dtype, self.stages)
        load = cpasync.CopyBulkTensorTileG2SOp()
        one = (None, None, 0)
        tma_q, tQ = cpasync.make_tiled_tma_atom(load, mQ, cute.slice_(q_layout, one), (ROWS, d))
        tma_k, tK = cpasync.make_tiled_tma_atom(load, mK, cute.slice_(k_layout, one), (keys, d))
        tma_v, tV = cpasync.make_tiled_tma_atom(load, mV, cute.slice_(v_layout, one), (d, keys))

        @cute.struct
        class Storage:
            q_full: cute.struct.MemRange[Int64, 1]
            q_empty: cute.struct.MemRange[Int64, 1]
            k_full: cute.struct.MemRange[Int64, self.stages]
            k_empty: cute.struct.MemRange[Int64, self.stages]
            v_full: cute.struct.MemRange[Int64, self.stages]
            v_empty: cute.struct.MemRange[Int64, self.stages]
            work_full: cute.struct.MemRange[Int64, 2]
            work_empty: cute.struct.MemRange[Int64, 2]
            work: cute.struct.MemRange[Int32, 8]
            sQ: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(q_layout)], 1024]
            sO: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(q_layout)], 1024]
            sK: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(k_layout)], 1024]
            sV: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(v_layout)], 1024]

        self.storage = Storage
        max_tiles = cute.ceil_div(max_len, self.tiles.queries)
        self.kernel(
            tma_q, tQ, tma_k, tK, tma_v, tV, mO, mOffsets, mCounter, q_layout, k_layout, v_layout,
            batch * heads, heads, max_tiles, group, half_scale, out_scale,
        ).launch(
            grid=(processors, 1, 1), block=(self.threads, 1, 1), smem=Storage.size_in_bytes(), stream=stream, min_blocks_per_mp=1
        )  # fmt: skip

    def qk_mma(self) -> cute.TiledMma:
        """64 x keys scores: both operands from shared memory, made anew where it is used: a use sets its accumulate flag."""
        major = warpgroup.OperandMajorMode
        shape = (ROWS, self.keys)
        return hopper_helpers.make_trivial_tiled_mma(self.dtype, self.dtype, major.K, major.K, Float32, (1, 1, 1), shape)

    def pv_mma(self) -> cute.TiledMma:
        """64 x width outputs: the weights from registers, values from shared memory."""
        major = warpgroup.OperandMajorMode
        return hopper_helpers.make_trivial_tiled_mma(
            self.dtype, self.dtype, major.K, major.MN, Float32, (1, 1, 1), (ROWS, self.d), warpgroup.OperandSource.RMEM
        )

    @cute.kernel
    def kernel(
        self, tma_q: cute.CopyAtom, tQ: cute.Tensor, tma_k: cute.CopyAtom, tK: cute.Tensor, tma_v: cute.CopyAtom,
        tV: cute.Tensor, mO: cute.Tensor, mOffsets: cute.Tensor, mCounter: cute.Tensor, q_layout: cute.ComposedLayout,
        k_layout: cute.ComposedLayout, v_layout: cute.ComposedLayout, pairs: Int32, heads: Int32, max_tiles: Int32,
        group: Int32, half_scale: Float32, out_scale: Float32,
    ):  # fmt: skip
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.warp_idx()
        store = SmemAllocator().allocate(self.storage)
        sQ = store.sQ.get_tensor(q_layout.outer, swizzle=q_layout.inner)
        sO = store.sO.get_tensor(q_layout.outer, swizzle=q_layout.inner)
        sK = store.sK.get_tensor(k_layout.outer, swizzle=k_layout.inner)
        sV = store.sV.get_tensor(v_layout.outer, swizzle=v_layout.inner)
        bars = {
            name: getattr(store, name).data_ptr()
            for name in ("q_full", "q_empty", "k_full", "k_empty", "v_full", "v_empty", "work_full", "work_empty")
        }
        work = store.work.get_tensor(cute.make_layout((4, 2)))
        consumers = 4 * self.groups
        if warp == 0:
            with cute.arch.elect_one():
                cute.arch.mbarrier_init(bars["q_full"], 1)
                cute.arch.mbarrier_init(bars["q_empty"], consumers)
                for s in cutlass.range_constexpr(self.stages):
                    for name in ("k", "v"):
                        cute.arch.mbarrier_init(bars[f"{name}_full"] + s, 1)
                        cute.arch.mbarrier_init(bars[f"{name}_empty"] + s, consumers)
                for s in cutlass.range_constexpr(2):
                    cute.arch.mbarrier_init(bars["work_full"] + s, 1)
                    cute.arch.mbarrier_init(bars["work_empty"] + s, consumers)
            cute.arch.mbarrier_init_fence()
            for atom in (tma_q, tma_k, tma_v):
                cpasync.prefetch_descriptor(atom)
        cute.arch.sync_threads()

        if warp < 4:
            cute.arch.setmaxregister_decrease(self.producer_registers)
            if warp == 0:
                self.produce(
                    tma_q, tQ, tma_k, tK, tma_v, tV, sQ, sK, sV, bars, work, mOffsets, mCounter, pairs, heads, max_tiles, group
                )
        else:
            cute.arch.setmaxregister_increase(self.consumer_registers)
            self.consume(sQ, sK, sV, sO, bars, work, mO, thread % 128, warp // 4 - 1, half_scale, out_scale)

    @cute.jit
    def produce(
        self, tma_q, tQ, tma_k, tK, tma_v, tV, sQ, sK, sV, bars, work, mOffsets, mCounter, pairs, heads, max_tiles, group
    ):  # fmt: skip
        """One warp: takes tiles of queries off the counter, heaviest first, and streams what they need into shared memory."""
        d, keys = self.d, self.keys
        tile, blocks = cute.arch.block_idx()[0], cute.arch.grid_dim()[0]
        loaded, done = Int32(0), Int32(0)
        while tile < pairs * max_tiles:
            sequence, head, row_tile = locate(tile, pairs, heads, max_tiles, group)
            m0 = row_tile * self.tiles.queries
            start = Int32(mOffsets[sequence])
            length = Int32(mOffsets[sequence + 1]) - start
            if m0 < length:
                slot = done % 2
                cute.arch.mbarrier_wait(bars["work_empty"] + slot, (done // 2 % 2) ^ 1)
                with cute.arch.elect_one():
                    work[0, slot], work[1, slot], work[2, slot], work[3, slot] = start, length, head, m0
                    cute.arch.mbarrier_arrive(bars["work_full"] + slot)
                qs, qg = self.partition(
                    tma_q, sQ, cute.domain_offset((start + m0, 0), tQ[None, None, head]), (ROWS, d), (None, 0)
                )
                ks, kg = self.partition(tma_k, sK, cute.domain_offset((start, 0), tK[None, None, head]), (keys, d), (None, 0))
                vs, vg = self.partition(tma_v, sV, cute.domain_offset((0, start), tV[None, None, head]), (d, keys), (0, None))
                cute.arch.mbarrier_wait(bars["q_empty"], (done % 2) ^ 1)
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(bars["q_full"], self.groups * ROWS * d * 2)
                for g in cutlass.range_constexpr(self.groups):
                    cute.copy(tma_q, qg[None, g], qs[None, g], tma_bar_ptr=bars["q_full"])
                count = cute.ceil_div(cutlass.min(length, m0 + self.tiles.queries), keys)
                for i in cutlass.range(count, unroll=1):
                    stage, phase = loaded % self.stages, loaded // self.stages % 2
                    for atom, name, source, target in ((tma_k, "k", kg, ks), (tma_v, "v", vg, vs)):
                        full, empty = bars[f"{name}_full"] + stage, bars[f"{name}_empty"] + stage
                        cute.arch.mbarrier_wait(empty, phase ^ 1)
                        with cute.arch.elect_one():
                            cute.arch.mbarrier_arrive_and_expect_tx(full, keys * d * 2)
                        cute.copy(atom, source[None, count - 1 - i], target[None, stage], tma_bar_ptr=full)
                    loaded += 1
                done += 1
            ticket = Int32(0)
            if cute.arch.lane_idx() == 0:
                ticket = cute.arch.atomic_add(mCounter.iterator, Int32(1))
            tile = blocks + cute.arch.shuffle_sync(ticket, 0)
        slot = done % 2
        cute.arch.mbarrier_wait(bars["work_empty"] + slot, (done // 2 % 2) ^ 1)
        with cute.arch.elect_one():
            work[2, slot] = Int32(-1)
            cute.arch.mbarrier_arrive(bars["work_full"] + slot)

    @cute.jit
    def partition(self, atom, shared, source, tile, where):
        """(shared memory by stage, source by tile) as the TMA atom `atom` copies them."""
        tiles = cute.local_tile(source, tile, where)
        return cpasync.tma_partition(atom, 0, cute.make_layout(1), cute.group_modes(shared, 0, 2), cute.group_modes(tiles, 0, 2))

    @cute.jit
    def arrive(self, bar):
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(bar)

    @cute.jit
    def wait_full(self, bars, name: cutlass.Constexpr, used: Int32):
        cute.arch.mbarrier_wait(bars[f"{name}_full"] + used % self.stages, used // self.stages % 2)

    @cute.jit
    def release(self, bars, name: cutlass.Constexpr, used: Int32):
        self.arrive(bars[f"{name}_empty"] + used % self.stages)

    @cute.jit
    def scores(self, tQ, tK, S, bars, used: Int32):
        """Start S = Q K^T of the next key tile."""
        self.wait_full(bars, "k", used)
        mma = self.qk_mma()
        warpgroup.fence()
        stage = used % self.stages
        for i in cutlass.range_constexpr(cute.size(tQ, mode=[2])):
            mma.set(warpgroup.Field.ACCUMULATE, i != 0)
            cute.gemm(mma, S, tQ[None, None, i], tK[None, None, i, stage], S)
        warpgroup.commit_group()

    @cute.jit
    def weigh(self, P, tV, O, bars, used: Int32):
        """Start O += P V of a key tile."""
        self.wait_full(bars, "v", used)
        mma = self.pv_mma()
        warpgroup.fence()
        stage = used % self.stages
        for i in cutlass.range_constexpr(cute.size(P, mode=[2])):
            mma.set(warpgroup.Field.ACCUMULATE, True)
            cute.gemm(mma, O, P[None, None, i], tV[None, None, i, stage], O)
        warpgroup.commit_group()

    @cute.jit
    def mask(self, S, cS, row0):
        """Zero where the key comes after the query; SiLU(0) is 0."""
        for i in cutlass.range_constexpr(cute.size(S)):
            row, column = cS[i]
            S[i] = S[i] if column <= row + row0 else Float32(0)

    @cute.jit
    def silu(self, S, half_scale):
        for i in cutlass.range_constexpr(cute.size(S)):
            S[i] = silu_of_half(S[i] * half_scale)

    @cute.jit
    def round(self, S, P):
        """P = S in half precision: what a thread holds of a product's result is what it must hold of the next one's operand."""
        cute.make_tensor(P.iterator, S.layout).store(S.load().to(self.dtype))

    @cute.jit
    def consume(self, sQ, sK, sV, sO, bars, work, mO, thread, wg, half_scale, out_scale):
        """One warpgroup: 64 queries at a time against all keys they may see, from the diagonal down."""
        d, keys = self.d, self.keys
        qk, pv = self.qk_mma().get_slice(thread), self.pv_mma().get_slice(thread)
        tQ = qk.make_fragment_A(qk.partition_A(sQ))[None, None, None, wg]
        tK = qk.make_fragment_B(qk.partition_B(sK))
        tV = pv.make_fragment_B(pv.partition_B(sV))
        cS = qk.partition_C(cute.make_identity_tensor((ROWS, keys)))
        S, N = (qk.make_fragment_C(qk.partition_shape_C((ROWS, keys))) for _ in range(2))
        P = cute.make_rmem_tensor(pv.partition_shape_A((ROWS, keys)), self.dtype)
        O = pv.make_fragment_C(pv.partition_shape_C((ROWS, d)))
        used, done = Int32(0), Int32(0)
        head = Int32(0)
        while head >= 0:
            slot = done % 2
            cute.arch.mbarrier_wait(bars["work_full"] + slot, done // 2 % 2)
            start, length, head, m0 = work[0, slot], work[1, slot], work[2, slot], work[3, slot]
            cute.arch.sync_warp()
            self.arrive(bars["work_empty"] + slot)
            if head >= 0:
                row0 = m0 + ROWS * wg
                count = cute.ceil_div(cutlass.min(length, m0 + self.tiles.queries), keys)
                mine = cute.ceil_div(cutlass.min(length, row0 + ROWS), keys)
                mine = mine if row0 < length else Int32(0)
                cute.arch.mbarrier_wait(bars["q_full"], done % 2)
                for _ in cutlass.range(count - mine, unroll=1):
                    for name in ("k", "v"):
                        self.wait_full(bars, name, used)
                        self.release(bars, name, used)
                    used += 1
                if mine > 0:
                    # Only the first tile crosses the diagonal: both its start and row0 are multiples of 64.
                    O.fill(0.0)
                    self.scores(tQ, tK, S, bars, used)
                    cut = row0 - (mine - 1) * keys
                    if mine * keys > length:
                        self.blank(sV, bars, used, length - (mine - 1) * keys, thread, wg)
                    if cutlass.const_expr(self.tiles.order == "ahead"):
                        used = self.ahead(tQ, tK, tV, S, N, cS, P, O, bars, used, mine, cut, half_scale)
                    else:
                        used = self.behind(tQ, tK, tV, S, cS, P, O, bars, used, mine, cut, half_scale)
                self.arrive(bars["q_empty"])
                if mine > 0:
                    self.finish(O, sO[None, None, wg], mO, thread, wg, start, length, head, row0, out_scale)
                done += 1

    @cute.jit
    def ahead(self, tQ, tK, tV, S, N, cS, P, O, bars, used, mine, cut, half_scale):
        """Scores of tile i + 1 and weighted values of tile i - 1 run while tile i goes through the SiLU."""
        warpgroup.wait_group(0)
        self.release(bars, "k", used)
        self.mask(S, cS, cut)
        for i in cutlass.range(mine - 1, unroll=self.tiles.unroll):
            self.scores(tQ, tK, N, bars, used + 1)
            self.silu(S, half_scale)
            warpgroup.wait_group(1)
            if i > 0:
                self.release(bars, "v", used - 1)
            self.round(S, P)
            self.weigh(P, tV, O, bars, used)
            warpgroup.wait_group(1)
            self.release(bars, "k", used + 1)
            S.store(N.load())
            used += 1
        self.silu(S, half_scale)
        warpgroup.wait_group(0)
        if mine > 1:
            self.release(bars, "v", used - 1)
        self.round(S, P)
        self.weigh(P, tV, O, bars, used)
        warpgroup.wait_group(0)
        self.release(bars, "v", used)
        return used + 1

    @cute.jit
    def blank(self, sV, bars, used, valid, thread, wg):
        """Zero the values after the sequence's end, which are its neighbour's: their weight is zero, but 0 x NaN is NaN.

        Every warpgroup does it before its own products, so it does not matter which of them is first.
        """
        self.wait_full(bars, "v", used)
        stage, at_once = used % self.stages, 128 // self.d
        for row in cutlass.range(valid + thread // self.d, self.keys, at_once, unroll=1):
            sV[thread % self.d, row, stage] = self.dtype(0)
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.barrier(barrier_id=wg + 1, number_of_threads=128)

    @cute.jit
    def behind(self, tQ, tK, tV, S, cS, P, O, bars, used, mine, cut, half_scale):
        """Weighted values of tile i - 1 run while tile i goes through the SiLU."""
        warpgroup.wait_group(0)
        self.release(bars, "k", used)
        self.mask(S, cS, cut)
        self.silu(S, half_scale)
        self.round(S, P)
        for _ in cutlass.range(mine - 1, unroll=1):
            self.scores(tQ, tK, S, bars, used + 1)
            self.weigh(P, tV, O, bars, used)
            warpgroup.wait_group(1)
            self.release(bars, "k", used + 1)
            self.silu(S, half_scale)
            warpgroup.wait_group(0)
            self.release(bars, "v", used)
            self.round(S, P)
            used += 1
        self.weigh(P, tV, O, bars, used)
        warpgroup.wait_group(0)
        self.release(bars, "v", used)
        return used + 1

    @cute.jit
    def finish(self, O, sO, mO, thread, wg, start, length, head, row0, out_scale):
        """Divide, round, and write the rows that exist: through shared memory, so that a thread stores 16 bytes at a time."""
        rounded = cute.make_fragment_like(O, self.dtype)
        rounded.store((O.load() * out_scale).to(self.dtype))
        barrier = wg + 1
        cute.arch.barrier(barrier_id=barrier, number_of_threads=128)
        atom = cute.make_copy_atom(cute.nvgpu.warp.StMatrix8x8x16bOp(False, 4), self.dtype)
        copy = cute.make_tiled_copy_C(atom, self.pv_mma()).get_slice(thread)
        cute.copy(atom, copy.retile(rounded), copy.partition_D(sO))
        cute.arch.barrier(barrier_id=barrier, number_of_threads=128)
        gO = cute.local_tile(cute.domain_offset((start + row0, 0), mO[None, None, head]), (ROWS, self.d), (0, 0))
        write_rows(sO, gO, ROWS, self.d, length - row0, thread)
