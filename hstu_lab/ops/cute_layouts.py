"""Layouts, swizzles and tiled MMAs as CuTe DSL's own algebra computes them, evaluated on the CPU and handed out as arrays.

A layout is a function from coordinates to an offset; the DSL evaluates static ones while it traces. Banks: shared memory has 32
of 4 bytes; 16-byte accesses of a warp are served eight threads at a time (CUDA C++ Best Practices Guide, shared memory).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import cutlass
import cutlass.cute as cute
import numpy as np
from cutlass.cute.nvgpu import warp, warpgroup

from hstu_lab.ops.cute_tiles import target

BANKS, BANK_BYTES = 32, 4
PIECE = 8
"""Half-precision elements of a 16-byte access."""


def evaluate(fn: Callable):
    """What `fn()` returns when the DSL traces it: layout algebra is allowed inside, tensors are not. Takes about 0.1 s."""
    found = []

    @cute.jit
    def trace(wanted: cutlass.Constexpr, into: cutlass.Constexpr):
        into.append(wanted())

    with target("sm_90a"):
        cute.compile(trace, fn, found, options="--gpu-arch sm_90a")
    return found[0]


@functools.lru_cache(maxsize=256)
def shared_offsets(rows: int, columns: int, padding: int = 0, swizzle_bits: int = 0) -> np.ndarray:
    """Offsets in elements (rows, columns) of a row-major tile in shared memory.

    padding: elements between rows. swizzle_bits: that many bits of a piece's number are XORed with bits of its row's (0 to 3);
    with 64 half-precision columns, 3 bits are the 128-byte swizzle that TMA, ldmatrix and wgmma agree on.
    """

    def offsets():
        layout = cute.make_layout((rows, columns), stride=(columns + padding, 1))
        if swizzle_bits:
            shift = (columns // PIECE).bit_length() - 1
            layout = cute.make_composed_layout(cute.make_swizzle(swizzle_bits, 3, shift), 0, layout)
        return [[layout((i, j)) for j in range(columns)] for i in range(rows)]

    return np.array(evaluate(offsets))


def pieces_touched(access: str, rows: int, columns: int, index: int = 0) -> list[tuple[int, int]]:
    """(row, piece) of the eight 16-byte pieces that eight threads touch at once.

    access "row": neighbours in row `index`, as a copy from global memory writes them. "column": piece `index` of eight rows,
    as ldmatrix reads an 8 x 8 matrix. Raises ValueError for another access.
    """
    if access == "row":
        return [(index % rows, piece) for piece in range(min(8, columns // PIECE))]
    if access == "column":
        return [(row, index % (columns // PIECE)) for row in range(min(8, rows))]
    raise ValueError(f"access is {access!r}: use row or column")


def words_per_bank(offsets: np.ndarray, touched: list[tuple[int, int]]) -> np.ndarray:
    """How many different 4-byte words each of the 32 banks must deliver; the largest is the number of passes."""
    words = {(2 * int(offsets[row, PIECE * piece + element])) // BANK_BYTES for row, piece in touched for element in range(PIECE)}
    return np.bincount([word % BANKS for word in words], minlength=BANKS)


@functools.lru_cache(maxsize=16)
def mma_owners(operand: str, width: int = 8) -> np.ndarray:
    """(thread, register) of every element of an MMA's operand: an array (rows, columns, 2).

    operand "A" (16 x 16), "B" (8 x 16, transposed) or "C" (16 x 8) of Ampere's mma.m16n8k16; "wgmma C" (64 x `width`) of
    Hopper's accumulator. Raises ValueError for another operand.
    """
    shapes = {"A": (16, 16), "B": (8, 16), "C": (16, 8), "wgmma C": (64, width)}
    if operand not in shapes:
        raise ValueError(f"operand is {operand!r}: use one of {', '.join(shapes)}")

    def table():
        if operand == "wgmma C":
            major = warpgroup.OperandMajorMode.K
            op = warpgroup.MmaF16BF16Op(
                cutlass.BFloat16, cutlass.Float32, (64, width, 16), warpgroup.OperandSource.SMEM, major, major
            )
        else:
            op = warp.MmaF16BF16Op(cutlass.BFloat16, cutlass.Float32, (16, 8, 16))
        mma = cute.make_tiled_mma(op)
        layout = {"A": mma.tv_layout_A, "B": mma.tv_layout_B}.get(operand, mma.tv_layout_C)
        threads, values = cute.size(layout, mode=[0]), cute.size(layout, mode=[1])
        return [(t, v, layout((t, v))) for t in range(threads) for v in range(values)]

    owners = np.zeros((*shapes[operand], 2), dtype=int)
    for thread, value, at in evaluate(table):
        owners[at % shapes[operand][0], at // shapes[operand][0]] = thread, value
    return owners


def product_feeds_product(width: int = 64) -> bool:
    """Whether a 64 x `width` result of Hopper's wgmma lies in registers exactly as the next product's first operand must.

    It does: register 8k + i of a thread is element i of the k-th 64 x 16 slice. That is why weights never leave the registers.
    """

    def orders():
        major = warpgroup.OperandMajorMode
        first = warpgroup.MmaF16BF16Op(
            cutlass.BFloat16, cutlass.Float32, (64, width, 16), warpgroup.OperandSource.SMEM, major.K, major.K
        )
        second = warpgroup.MmaF16BF16Op(
            cutlass.BFloat16, cutlass.Float32, (64, 64, 16), warpgroup.OperandSource.RMEM, major.K, major.MN
        )
        result, operand = cute.make_tiled_mma(first).tv_layout_C, cute.make_tiled_mma(second).tv_layout_A
        pairs = []
        for thread in range(128):
            for value in range(width // 2):
                here, slice_, within = result((thread, value)), value // 8, value % 8
                pairs.append((here, operand((thread, within)) + 64 * 16 * slice_))
        return pairs

    return all(have == want for have, want in evaluate(orders))
