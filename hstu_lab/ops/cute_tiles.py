"""What the CuTe DSL kernels of both generations share: the order of the tiles, and the SiLU."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32


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
