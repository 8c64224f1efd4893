"""The operators that only move memory: norms, embedding rows, jagged and dense copies. One pass over the data each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hstu_lab.ops.triton_runtime import add, interpreted, least, most

MAX_TABLES = 8


@triton.jit
def norm_kernel(
    X, Gate, Weight, Bias, Out, x_row, gate_row, rows, width, eps,
    WIDTH_PAD: tl.constexpr, ROWS: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    """ROWS rows at a time: LayerNorm(X) * weight + bias, times Gate where there is one; moments in float32. Where Out is int8, to
    the nearest of -128 to 127: weight and bias are then those of the result in steps."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH_PAD)
    inside = (row[:, None] < rows) & (column[None, :] < width)
    row = row.to(tl.int64)
    x = tl.load(X + row[:, None] * x_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_GATE:
        gate = tl.load(Gate + row[:, None] * gate_row + column[None, :], mask=inside, other=0.0)
    weight = tl.load(Weight + column, mask=column < width, other=0.0).to(tl.float32)
    bias = tl.load(Bias + column, mask=column < width, other=0.0).to(tl.float32)
    mean = tl.reduce(x, 1, add) / width
    centred = tl.where(column[None, :] < width, x - mean[:, None], 0.0)
    variance = tl.reduce(centred * centred, 1, add) / width
    y = centred * (1 / tl.sqrt(variance + eps))[:, None] * weight[None, :] + bias[None, :]
    if HAS_GATE:
        y = y * gate.to(tl.float32)
    if Out.dtype.element_ty == tl.int8:
        # Where floats are 1 apart, adding rounds half to even, and the integer is the sum's lowest byte.
        y = (least(most(y, -128.0), 127.0) + 12582912.0).to(tl.int32, bitcast=True) & 255
    tl.store(Out + row[:, None] * width + column[None, :], y.to(Out.dtype.element_ty), mask=inside)


@triton.jit
def last_kernel(
    X, Lengths, Weight, Bias, Hidden, Scaled, length, width, eps, scale, WIDTH_PAD: tl.constexpr
):  # fmt: skip
    """One sequence: LayerNorm of row Lengths - 1 of its `length` rows (Hidden), and the same at the norm `scale` (Scaled)."""
    b = tl.program_id(0)
    column = tl.arange(0, WIDTH_PAD)
    inside = column < width
    row = b.to(tl.int64) * length + most(tl.load(Lengths + b) - 1, 0)
    x = tl.load(X + row * width + column, mask=inside, other=0.0).to(tl.float32)
    mean = tl.reduce(x, 0, add) / width
    centred = tl.where(inside, x - mean, 0.0)
    variance = tl.reduce(centred * centred, 0, add) / width
    y = centred * (1 / tl.sqrt(variance + eps)) * tl.load(Weight + column, mask=inside, other=0.0).to(tl.float32)
    y += tl.load(Bias + column, mask=inside, other=0.0).to(tl.float32)
    at = b.to(tl.int64) * width + column
    tl.store(Hidden + at, y.to(Hidden.dtype.element_ty), mask=inside)
    y *= scale / most(tl.sqrt(tl.reduce(y * y, 0, add)), 1e-12)
    tl.store(Scaled + at, y.to(Scaled.dtype.element_ty), mask=inside)


def _norm(x: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    width = x.shape[-1]
    x2 = x.reshape(-1, width)
    gate2 = None if gate is None else gate.reshape(-1, width)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = x2.shape[0]
    if rows == 0:
        return out
    width_pad = triton.next_power_of_2(width)
    per_program = 1 if interpreted() else max(1, 2048 // width_pad)
    norm_kernel[(triton.cdiv(rows, per_program),)](
        x2, gate2, weight, bias, out, x2.stride(0), 0 if gate2 is None else gate2.stride(0), rows, width, eps,
        WIDTH_PAD=width_pad, ROWS=per_program, HAS_GATE=gate is not None, num_warps=min(16, max(4, width_pad // 512)),
    )  # fmt: skip
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension. x (..., D), weight and bias (D,) -> (..., D)."""
    return _norm(x, None, weight, bias, eps)


def norm_gate(attended: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm(attended) * gate, the norm spanning all heads. attended and gate (..., H * dv) -> the same shape."""
    return _norm(attended, gate, weight, bias, eps)


@triton.jit
def gather_sum_kernel(
    T0, T1, T2, T3, T4, T5, T6, T7, Ids, Out, ids_row, count, width, TABLES: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS output rows, WIDTH columns: one row of each table, added in float32."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (row[:, None] < count) & (column[None, :] < width)
    total = tl.full((ROWS, WIDTH), 0.0, tl.float32)
    tables = (T0, T1, T2, T3, T4, T5, T6, T7)
    for table in tl.static_range(TABLES):
        index = tl.load(Ids + table * ids_row + row, mask=row < count, other=0).to(tl.int64)
        total += tl.load(tables[table] + index[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(Out + row[:, None] * width + column[None, :], total.to(Out.dtype.element_ty), mask=inside)


def gather_sum(tables: list[Tensor], ids: Tensor) -> Tensor:
    """Sum of one row from each table. tables: F <= 8 contiguous (rows_f, D) of one dtype; ids (F, T) -> (T, D).

    Summed in float32. Raises ValueError for more tables, other layouts or mixed dtypes.
    """
    if not 1 <= len(tables) <= MAX_TABLES or len(tables) != ids.shape[0]:
        raise ValueError(
            f"{len(tables)} tables and {ids.shape[0]} rows of ids: give one row of ids for each of 1 to {MAX_TABLES}"
        )
    if any(t.dtype != tables[0].dtype or t.shape[1] != tables[0].shape[1] or not t.is_contiguous() for t in tables):
        raise ValueError("the tables differ in dtype or width, or are not contiguous: make them alike")
    width, count = tables[0].shape[1], ids.shape[1]
    out = torch.empty(count, width, dtype=tables[0].dtype, device=ids.device)
    if count == 0:
        return out
    block = min(triton.next_power_of_2(width), 1024)
    per_program = max(1, (64 if interpreted() else 2048) // block)
    ids = ids if ids.stride(1) == 1 else ids.contiguous()
    gather_sum_kernel[(triton.cdiv(count, per_program), triton.cdiv(width, block))](
        *tables, *[tables[0]] * (MAX_TABLES - len(tables)), ids, out, ids.stride(0), count, width,
        TABLES=len(tables), ROWS=per_program, WIDTH=block, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def jagged_dense_kernel(
    Jagged, Dense, Offsets, length, width, fill, TO_DENSE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """Rows of one sequence between jagged (T, width) and dense (B, length, width); padding becomes `fill`."""
    b = tl.program_id(1)
    start = tl.load(Offsets + b)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    real = (row < tl.load(Offsets + b + 1) - start)[:, None] & (row < length)[:, None] & (column < width)[None, :]
    jagged = Jagged + (start + row[:, None]) * width + column[None, :]
    dense = Dense + (b.to(tl.int64) * length + row[:, None]) * width + column[None, :]
    if TO_DENSE:
        value = tl.load(jagged, mask=real, other=0)
        value = tl.where(real, value, fill)
        tl.store(dense, value.to(Dense.dtype.element_ty), mask=(row < length)[:, None] & (column < width)[None, :])
    else:
        tl.store(jagged, tl.load(dense, mask=real, other=0), mask=real)


def _copy_rows(jagged: Tensor, dense: Tensor, offsets: Tensor, fill: float, to_dense: bool) -> None:
    batch, length = dense.shape[:2]
    width = dense[0, 0].numel() if dense.numel() else 0
    if width == 0:
        return
    block = min(triton.next_power_of_2(width), 1024)
    rows = max(1, min((64 if interpreted() else 2048) // block, triton.next_power_of_2(length)))
    fill = float(fill) if dense.dtype.is_floating_point else int(fill)
    jagged_dense_kernel[(triton.cdiv(length, rows), batch, triton.cdiv(width, block))](
        jagged, dense, offsets, length, width, fill, TO_DENSE=to_dense, ROWS=rows, WIDTH=block
    )


def jagged_to_dense(values: Tensor, offsets: Tensor, length: int, fill: float = 0) -> Tensor:
    """(T, ...) -> (B, length, ...), right-padded with `fill`; rows beyond `length` are dropped."""
    out = torch.empty(offsets.shape[0] - 1, length, *values.shape[1:], dtype=values.dtype, device=values.device)
    _copy_rows(values.contiguous(), out, offsets, fill, to_dense=True)
    return out


def dense_to_jagged(dense: Tensor, offsets: Tensor, total: int | None = None) -> Tensor:
    """(B, N, ...) -> (T, ...): row i of sequence b for every i < offsets[b + 1] - offsets[b].

    `total` is T where the caller knows it; otherwise it is read back from the device.
    """
    total = int(offsets[-1]) if total is None else total
    out = torch.empty(total, *dense.shape[2:], dtype=dense.dtype, device=dense.device)
    _copy_rows(out, dense.contiguous(), offsets, 0, to_dense=False)
    return out
