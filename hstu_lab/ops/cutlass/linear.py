"""The layer's two projections by CUTLASS: matrix product, bias, then SiLU or the residual sum in the epilogue."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from hstu_lab.ops.cutlass import build
from hstu_lab.ops.cutlass.build import LinearConfig

AMPERE, HOPPER = build.KERNELS["cutlass sm_80 128x128"], build.KERNELS["cutlass sm_90 128x128"]


class _Arguments(ctypes.Structure):
    """`LinearArguments` of linear.h."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("x", "weight", "bias", "residual", "out")],
        *[(name, ctypes.c_longlong) for name in ("x_row", "residual_row")],
        *[(name, ctypes.c_int) for name in ("rows", "columns", "depth", "processors", "raster", "swizzle")],
    )


class LaunchFailed(RuntimeError):
    """CUTLASS or CUDA refused a launch; the message says which and why."""


def unsupported(x: Tensor, weight: Tensor, *others: Tensor | None) -> str:
    """Why these operands are not for the CUTLASS kernels, "" where they are. x (..., K), weight (N, K)."""
    if x.device.type != "cuda":
        return f"x is on {x.device}: a CUDA device is needed"
    if x.dtype not in (torch.bfloat16, torch.float16) or any(t is not None and t.dtype != x.dtype for t in (weight, *others)):
        return "operands must all be bfloat16 or all float16"
    columns, depth = weight.shape
    if columns % 8 or depth % 8:
        return f"weight is {columns} x {depth}: both must be multiples of 8"
    return ""


def project_silu(x: Tensor, weight: Tensor, bias: Tensor, config: LinearConfig | None = None, **order: int) -> Tensor:
    """SiLU(x W^T + b). x (..., D), weight (E, D), bias (E,) -> (..., E), dense.

    `order`: raster (1 along rows, 2 along columns) and swizzle (tiles that share L2) of a Hopper kernel. Raises ValueError for
    what the kernels do not take, LaunchFailed, and what `build.build` raises.
    """
    return _linear(x, weight, bias, None, config, **order)


def project_residual(
    y: Tensor, weight: Tensor, bias: Tensor, x: Tensor, config: LinearConfig | None = None, **order: int
) -> Tensor:
    """x + y W^T + b. y (..., E), weight (D, E), bias (D,), x (..., D) -> (..., D). Otherwise as `project_silu`."""
    return _linear(y, weight, bias, x, config, **order)


def _linear(x, weight, bias, residual, config, raster: int = 2, swizzle: int = 4) -> Tensor:
    if reason := unsupported(x, weight, bias, residual):
        raise ValueError(reason)
    columns, depth = weight.shape
    out = torch.empty(*x.shape[:-1], columns, dtype=x.dtype, device=x.device)
    rows = out.numel() // columns
    if rows == 0:
        return out
    x, weight, bias = _readable(x.reshape(-1, depth)), _readable(weight.contiguous()), _readable(bias.contiguous())
    residual = None if residual is None else _readable(residual.reshape(-1, columns))
    processors, capability = _device(x.device)
    config = config or (HOPPER if capability == 90 else AMPERE)
    functions = _functions(config, str(x.dtype).removeprefix("torch."), residual is not None)
    arguments = _Arguments(
        x.data_ptr(), weight.data_ptr(), bias.data_ptr(), 0 if residual is None else residual.data_ptr(), out.data_ptr(),
        x.stride(0), 0 if residual is None else residual.stride(0), rows, columns, depth, processors, raster, swizzle,
    )  # fmt: skip
    stream = ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream)
    with torch.cuda.device(x.device):
        code = functions.hstu_linear(ctypes.byref(arguments), stream)
    if code:
        raise LaunchFailed(f"{rows} x {depth} by {columns} x {depth}: {functions.hstu_error(code).decode()} ({config})")
    return out


def _readable(t: Tensor) -> Tensor:
    """`t`, copied where 16-byte loads could not read it row by row."""
    aligned = t.data_ptr() % 16 == 0 and t.stride(-1) == 1 and all(s % 8 == 0 for s in t.stride()[:-1])
    return t if aligned else t.clone(memory_format=torch.contiguous_format)


@functools.cache
def _functions(config: LinearConfig, dtype: str, residual: bool) -> ctypes.CDLL:
    return build.build(config, dtype, residual).functions


@functools.cache
def _device(device: torch.device) -> tuple[int, int]:
    """(streaming multiprocessors, compute capability as 80 or 90)."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, 10 * properties.major
