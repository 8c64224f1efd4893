"""What every Triton kernel here shares: device functions, and whether kernels are interpreted or compiled.

Kernels call no library function of Triton that is itself `@triton.jit` (`tl.sum`, `tl.zeros`, `tl.cdiv`, ...): such functions
are fixed to the interpreter or to the compiler when Triton is imported, and here one process uses both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def add(a, b):
    return a + b


@triton.jit
def least(a, b):
    return tl.minimum(a, b)


@triton.jit
def most(a, b):
    return tl.maximum(a, b)


@triton.jit
def silu_of_half(half, EXACT: tl.constexpr):
    """SiLU(2 * half): exact in float32, or with one hardware tanh (relative error 2^-11)."""
    if EXACT:
        return 2 * half / (1 + tl.exp(-2 * half))
    else:
        tanh = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [half], dtype=tl.float32, is_pure=True, pack=1)
        return half * tanh + half


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when this module was imported)."""
    return not isinstance(add, triton.runtime.JITFunction)


def capability(tensor: Tensor) -> int:
    """Compute capability of the GPU that holds `tensor`, as 80 or 90; 0 in the interpreter."""
    return 0 if interpreted() else 10 * torch.cuda.get_device_capability(tensor.device)[0]


def processors(tensor: Tensor) -> int:
    """Streaming multiprocessors of the GPU that holds `tensor`."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def check_dtype(**tensors: Tensor) -> None:
    """Raise TypeError unless all have one dtype that the kernels take: float32, float16 or bfloat16."""
    dtypes = {t.dtype for t in tensors.values()}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float16, torch.bfloat16}:
        given = ", ".join(f"{name} {t.dtype}" for name, t in tensors.items())
        raise TypeError(f"{given}: give all in one of float32, float16, bfloat16")
    if interpreted() and torch.bfloat16 in dtypes:
        raise TypeError("Triton's interpreter computes bfloat16 matrix products wrongly: give float32 or float16")


def use_tma(*tensors: Tensor) -> bool:
    """Whether the tensor memory accelerator (compute capability 9 and up) can read these, tile by tile.

    It wants 16-byte aligned addresses and strides, and half precision here, where tiles are large.
    """
    if capability(tensors[0]) < 90:
        return False
    return all(
        t.element_size() == 2 and t.data_ptr() % 16 == 0 and all(s * 2 % 16 == 0 for s in t.stride()[:-1]) for t in tensors
    )
