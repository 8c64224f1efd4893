"""The layer's two projections, each one kernel: matrix product, bias, then SiLU or the residual sum, without a trip to memory.

Of int8 values (`project_int8`) the product is exact in int32 and becomes a float in the same place.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hstu_lab.ops.triton_runtime import check_dtype, interpreted, least, processors, silu_of_half, use_tma


@dataclasses.dataclass(frozen=True)
class LinearTiles:
    """Output rows and columns of a tile, depth of a step, warps, pipeline stages, row tiles that share L2."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3
    group: int = 8


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    X, Weight, XTiles, WeightTiles, Steps, Bias, Residual, Out, x_row, residual_row, rows, columns, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, SILU: tl.constexpr,
    EXACT: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of SiLU(X W^T + b), or of X W^T + b, and Residual where there is one. X (rows, depth), Weight (columns, depth);
    where Steps (columns,) are given, both are int8 and a product's column is so many times their integers'."""
    pid = tl.program_id(0)
    tiles_n = (columns + BLOCK_N - 1) // BLOCK_N
    tiles_m = (rows + BLOCK_M - 1) // BLOCK_M
    # Neighbouring programs share rows of X and of W in L2.
    first = pid // (GROUP * tiles_n) * GROUP
    members = least(GROUP, tiles_m - first)
    within = pid % (GROUP * tiles_n)
    m0 = (first + within % members) * BLOCK_M
    n0 = within // members * BLOCK_N
    row, column, inner = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    acc = tl.full((BLOCK_M, BLOCK_N), 0, tl.float32 if Steps is None else tl.int32)
    x_tile = X + row.to(tl.int64)[:, None] * x_row + inner[None, :]
    w_tile = Weight + column.to(tl.int64)[None, :] * depth + inner[:, None]
    for k0 in range(0, depth, BLOCK_K):
        if TMA:
            x = XTiles.load([m0, k0])
            w = WeightTiles.load([n0, k0]).T
        else:
            x = tl.load(x_tile + k0, mask=(row < rows)[:, None] & (k0 + inner < depth)[None, :], other=0)
            w = tl.load(w_tile + k0, mask=(column < columns)[None, :] & (k0 + inner < depth)[:, None], other=0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    if Steps is not None:
        acc = acc.to(tl.float32) * tl.load(Steps + column, mask=column < columns, other=0.0)[None, :]
    acc += tl.load(Bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    row = row.to(tl.int64)
    if SILU:
        acc = silu_of_half(0.5 * acc, EXACT)
    elif Residual is not None:
        acc += tl.load(Residual + row[:, None] * residual_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(Out + row[:, None] * columns + column[None, :], acc.to(Out.dtype.element_ty), mask=inside)


def tiles_for(rows: int, columns: int, size: int, processors: int) -> LinearTiles:
    """Tiles for so many rows and columns of a result of elements of `size` bytes, 2 or 1, on so many multiprocessors."""
    if rows <= 32:
        return LinearTiles(16, 64, 128, 4, 5)
    # Three stages of the large tile leave room for two programs on an SM, which four would not.
    for tiles in (LinearTiles(128, 128, 128 // size, 8, 3), LinearTiles(64, 128, 128 // size, 4, 4)):
        if triton.cdiv(rows, tiles.block_m) * triton.cdiv(columns, tiles.block_n) >= 1.5 * processors:
            return tiles
    return LinearTiles(64, 32, 128, 4, 4)


def _default_tiles(x: Tensor, rows: int, columns: int) -> LinearTiles:
    if interpreted():
        return LinearTiles(16, 16, 16)
    if x.dtype == torch.float32:
        return LinearTiles(64, 64, 16, 4, 2)
    return tiles_for(rows, columns, x.element_size(), processors(x))


def _linear(x: Tensor, weight: Tensor, steps: Tensor | None, bias: Tensor, residual: Tensor | None, tiles) -> Tensor:
    columns, depth = weight.shape
    x2 = x.reshape(-1, depth)
    rows = x2.shape[0]
    out = torch.empty(*x.shape[:-1], columns, dtype=bias.dtype, device=x.device)
    if rows == 0:
        return out
    x2, weight = (t if t.stride(1) == 1 else t.contiguous() for t in (x2, weight))
    weight = weight.contiguous()
    residual2 = None if residual is None else residual.reshape(-1, columns)
    tiles = tiles or _default_tiles(x, rows, columns)
    tma = use_tma(x2, weight)
    x_tiles = w_tiles = None
    if tma:
        x_tiles = TensorDescriptor(x2, [rows, depth], [x2.stride(0), 1], [tiles.block_m, tiles.block_k])
        w_tiles = TensorDescriptor(weight, [columns, depth], [depth, 1], [tiles.block_n, tiles.block_k])
    linear_kernel[(triton.cdiv(rows, tiles.block_m) * triton.cdiv(columns, tiles.block_n),)](
        x2, weight, x_tiles, w_tiles, steps, bias, residual2, out, x2.stride(0), 0 if residual2 is None else residual2.stride(0),
        rows, columns, depth, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k, GROUP=tiles.group,
        SILU=residual is None, EXACT=bias.dtype == torch.float32 or interpreted(), TMA=tma,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32", num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return out


def project_silu(x: Tensor, weight: Tensor, bias: Tensor, tiles: LinearTiles | None = None) -> Tensor:
    """SiLU(x W^T + b). x (..., D), weight (E, D), bias (E,) -> (..., E)."""
    check_dtype(x=x, weight=weight, bias=bias)
    return _linear(x, weight, None, bias, None, tiles)


def project_residual(y: Tensor, weight: Tensor, bias: Tensor, x: Tensor, tiles: LinearTiles | None = None) -> Tensor:
    """x + y W^T + b. y (..., E), weight (D, E), bias (D,), x (..., D) -> (..., D)."""
    check_dtype(y=y, weight=weight, bias=bias, x=x)
    return _linear(y, weight, None, bias, x, tiles)


def project_int8(
    x: Tensor, weight: Tensor, steps: Tensor, bias: Tensor, residual: Tensor | None = None, tiles: LinearTiles | None = None
) -> Tensor:
    """SiLU(steps * (x W^T) + b), or residual + steps * (x W^T) + b. x (..., D) and weight (E, D) int8, steps (E,) float32, the
    step of x times that of a row of the weight; bias (E,) and residual (..., E) of the result's dtype -> (..., E)."""
    if {x.dtype, weight.dtype} != {torch.int8} or steps.dtype != torch.float32:
        raise TypeError(f"x is {x.dtype}, weight {weight.dtype}, steps {steps.dtype}: give int8, int8, float32")
    return _linear(x, weight, steps, bias, residual, tiles)
