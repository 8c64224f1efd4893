"""HSTU attention by CuTe DSL on torch tensors: Hopper's kernel, Ampere's below it, each compiled once for what it is asked.

Ahead of time and without a GPU too: `compile_attention` shows PTX, machine code and resources of either generation.
"""

from __future__ import annotations

import functools

import cutlass
import cutlass.cute as cute
import torch
from cuda.bindings import driver
from cutlass import Float32, Int32, Int64
from cutlass.cute.runtime import make_ptr
from torch import Tensor

from hstu_lab.ops.cute_ampere import AmpereAttention, AmpereTiles
from hstu_lab.ops.cute_hopper import HopperAttention, HopperTiles
from hstu_lab.ops.cute_tiles import target

DTYPES = {torch.bfloat16: cutlass.BFloat16, torch.float16: cutlass.Float16}
WIDTHS = (64, 128)
GROUP = 16
"""(Sequence, head) pairs whose tiles are worked off together, so that their keys and values stay in L2."""


def default_tiles(width: int, capability: int) -> HopperTiles | AmpereTiles:
    """Hopper: what was fastest on an H200 at long histories. Others, by Ampere's kernel: the largest that spills nothing."""
    if capability == 90:
        return HopperTiles()
    return AmpereTiles(128, 64) if width == 64 else AmpereTiles(64, 64)


def unsupported(q: Tensor, k: Tensor, v: Tensor, bias=None, num_candidates: Tensor | None = None, num_context: int = 0) -> str:
    """Why the CuTe kernels do not compute this attention, "" where they do."""
    if q.device.type != "cuda":
        return f"q is on {q.device}: a CUDA device is needed"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return "compute capability 8.0 or newer is needed"
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return "q, k and v must all be bfloat16 or all float16"
    if q.shape[2] not in WIDTHS or v.shape[2] != q.shape[2]:
        return f"head widths are {q.shape[2]} and {v.shape[2]}: both must be 64 or both 128"
    if bias is not None and (bias.position is not None or bias.time is not None):
        return "a relative bias is not fused in them"
    if num_candidates is not None:
        return "candidates are not masked by them"
    if num_context > 1:
        return "a context prefix is not masked by them"
    return ""


def attention_jagged(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, *, divisor: float, max_len: int | None = None,
    tiles: HopperTiles | AmpereTiles | None = None, group: int = GROUP,
) -> Tensor:  # fmt: skip
    """Causal attention over jagged sequences, no bias; shapes as in `hstu_lab.ops.reference.attention_jagged`.

    `max_len` bounds the length of a sequence; without it the number is read back from the device.
    Raises ValueError for what `unsupported` names.
    """
    if reason := unsupported(q, k, v):
        raise ValueError(reason)
    total, heads, d = q.shape
    out = torch.empty(total, heads, d, dtype=q.dtype, device=q.device)
    if total == 0:
        return out
    if max_len is None:
        max_len = int(offsets.diff().max())
    q, k, v = (t if _readable(t) else t.clone(memory_format=torch.contiguous_format) for t in (q, k, v))
    offsets = offsets.long().contiguous()
    processors, capability = device_facts(q.device)
    tiles = tiles or default_tiles(d, capability)
    strides = [Int64(s) for t in (q, k, v) for s in t.stride()[:2]]
    pointers = [_pointer(DTYPES[q.dtype], t.data_ptr(), 16) for t in (q, k, v, out)]
    pointers.append(_pointer(Int64, offsets.data_ptr(), 8))
    sizes = [Int32(offsets.shape[0] - 1), Int32(heads), Int32(max_len)]
    scales = [Float32(0.5 * d**-0.5), Float32(1 / divisor), Int32(group)]
    stream = driver.CUstream(torch.cuda.current_stream(q.device).cuda_stream)
    with torch.cuda.device(q.device):
        kernel = compiled(d, q.dtype, tiles)
        if isinstance(tiles, AmpereTiles):
            kernel(*pointers, *sizes, *strides, *scales, stream)
        else:
            # The next piece of work, shared by all blocks of this launch.
            counter = torch.zeros(1, dtype=torch.int32, device=q.device)
            pointers.append(_pointer(Int32, counter.data_ptr(), 4))
            kernel(*pointers, Int32(total), *sizes, *strides, *scales, Int32(processors), stream)
    return out


@functools.cache
def device_facts(device: torch.device) -> tuple[int, int]:
    """(streaming multiprocessors, compute capability as 80 or 90)."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, 10 * properties.major


def _readable(t: Tensor) -> bool:
    return t.stride(2) == 1 and t.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in t.stride()[:2])


def _pointer(element, address: int, align: int):
    return make_ptr(element, address, cute.AddressSpace.gmem, assumed_align=align)


@functools.cache
def compiled(width: int, dtype: torch.dtype, tiles: HopperTiles | AmpereTiles, options: str = ""):
    """The compiled kernel; takes the arguments of its class's `__call__`. No GPU is needed to compile it."""
    hopper = isinstance(tiles, HopperTiles)
    element = DTYPES[dtype]
    arguments = [_pointer(element, 16, 16)] * 4 + [_pointer(Int64, 8, 8)]
    arguments += [_pointer(Int32, 4, 4), Int32(1)] if hopper else []
    arguments += [Int32(1)] * 3 + [Int64(8)] * 6 + [Float32(1)] * 2 + [Int32(1)] * (2 if hopper else 1)
    kernel = (HopperAttention if hopper else AmpereAttention)(width, element, tiles)
    arch = "sm_90a" if hopper else "sm_80"
    with target(arch):
        return cute.compile(kernel, *arguments, driver.CUstream(0), options=f"{options} --gpu-arch {arch}".strip())
