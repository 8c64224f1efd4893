"""What the CuTe DSL kernels of both generations share: the order of the tiles, and the SiLU."""

from __future__ import annotations

import contextlib
import os
import warnings

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32


@contextlib.contextmanager
def target(arch: str):
    """Trace and compile for `arch` ("sm_80", "sm_90a"), whatever GPU is here; the DSL's remarks on unrolled loops stay quiet."""
    held = os.environ.get("CUTE_DSL_ARCH")
    os.environ["CUTE_DSL_ARCH"] = arch
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This static loop has")
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            yield
    finally:
        os.environ.pop("CUTE_DSL_ARCH") if held is None else os.environ.update(CUTE_DSL_ARCH=held)


@cute.jit
def locate(index: Int32, pairs: Int32, heads: Int32, max_tiles: Int32, group: Int32):
    """(sequence, head, tile of queries) of the index-th piece of work.

    `group` (sequence, head) pairs at a time, so that their keys fit in L2 together; within a group the longest rows first.
    """
    first = index // (group * max_tiles) * group
    within = index - first * max_tiles
    members = cutlass.min(group, pairs - first)
    pair = first + within % members
    return pair // heads, pair % heads, max_tiles - 1 - within // members


@cute.jit
def silu_of_half(half: Float32) -> Float32:
    """SiLU(2 * half) with one special-function operation."""
    return half * cute.math.tanh(half, fastmath=True) + half


@cute.jit
def write_rows(shared, out, rows: cutlass.Constexpr, width: cutlass.Constexpr, valid: Int32, thread: Int32):
    """Copy the first `valid` of `rows` rows from shared to global memory with 128 threads, 16 bytes at a time."""
    per_row = width // 8
    wide = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), shared.element_type, num_bits_per_copy=128)
    threads = cute.make_layout((128 // per_row, per_row), stride=(per_row, 1))
    copy = cute.make_tiled_copy_tv(wide, threads, cute.make_layout((1, 8))).get_slice(thread)
    source, target = copy.partition_S(shared), copy.partition_D(out)
    where = copy.partition_S(cute.make_identity_tensor((rows, width)))
    values = cute.make_fragment_like(source)
    cute.copy(wide, source, values)
    for i in cutlass.range_constexpr(cute.size(values, mode=[1])):
        if where[0, i, 0][0] < valid:
            cute.copy(wide, values[None, i, None], target[None, i, None])
