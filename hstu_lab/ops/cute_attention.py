"""Launches the CuTe DSL attention kernels on torch tensors, compiled once for each width, element type and choice of tiles."""

from __future__ import annotations

import functools

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64
from cutlass.cute.runtime import make_ptr
from torch import Tensor

from cuda.bindings import driver
from hstu_lab.ops.cute_hopper import HopperAttention, HopperTiles

DTYPES = {torch.bfloat16: cutlass.BFloat16, torch.float16: cutlass.Float16}
GROUP = 32
"""(Sequence, head) pairs whose tiles are worked off together, so that their keys and values stay in L2."""


@functools.cache
def compiled(width: int, dtype: torch.dtype, tiles: HopperTiles):
    """The compiled kernel; takes the arguments of `HopperAttention.__call__`."""
    element = DTYPES[dtype]
    pointers = [_pointer(element, 16, 16)] * 4 + [_pointer(Int64, 8, 8), _pointer(Int32, 4, 4)]
    scalars = [Int32(1)] * 4 + [Int64(8)] * 6 + [Float32(1)] * 2 + [Int32(1)] * 2
    return cute.compile(HopperAttention(width, element, tiles), *pointers, *scalars, driver.CUstream(0))


def _pointer(element, address: int, align: int):
    return make_ptr(element, address, cute.AddressSpace.gmem, assumed_align=align)


def attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, *, divisor: float, max_len: int, tiles: HopperTiles, group: int = GROUP
) -> Tensor:
    total, heads, d = q.shape
    out = torch.empty(total, heads, d, dtype=q.dtype, device=q.device)
    element = DTYPES[q.dtype]
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    compiled(d, q.dtype, tiles)(
        *(_pointer(element, t.data_ptr(), 16) for t in (q, k, v, out)), _pointer(Int64, offsets.data_ptr(), 8),
        _pointer(Int32, counter.data_ptr(), 4), Int32(total), Int32(offsets.shape[0] - 1), Int32(heads), Int32(max_len),
        Int64(q.stride(0)), Int64(q.stride(1)), Int64(k.stride(0)), Int64(k.stride(1)), Int64(v.stride(0)), Int64(v.stride(1)),
        Float32(0.5 * d**-0.5), Float32(1 / divisor), Int32(group), Int32(processors),
        driver.CUstream(torch.cuda.current_stream(q.device).cuda_stream),
    )  # fmt: skip
    return out
