"""How a launch of the attention kernel is cut into tiles, and the cuts that were fastest where they were measured."""

from __future__ import annotations

import dataclasses

import torch

from hstu_lab.ops.reference import RelativeBias
from hstu_lab.ops.triton_runtime import interpreted


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How one launch is cut: query and key rows of a tile, warps, pipeline stages, heads that share L2, registers a thread,
    bucket boundaries that a tile of the fast loop may hold (at most 4).

    after: add the position bias to the product, instead of starting the product from it. block_s: key rows of a tile where every
    score may need a mask or a bucket of its own. exact: the exact SiLU in half precision too. tma: let the tensor memory
    accelerator read the keys where it can.
    """

    block_m: int
    block_n: int
    block_s: int
    num_warps: int = 4
    num_stages: int = 2
    group: int = 16
    maxnreg: int | None = None
    ladder: int = 4
    exact: bool = False
    tma: bool = True
    after: bool = False


def default_tiles(dtype: torch.dtype, d: int, max_len: int, pairs: int, bias: RelativeBias | None, capability: int = 90) -> Tiles:
    """Tiles that were fastest on an H200 among those tried (below capability 90: that spill nothing on an A100).

    `pairs` is sequences times heads, `d` the head width.
    """
    if interpreted():
        return Tiles(16, 16, 16)
    if dtype == torch.float32:
        return Tiles(32, 32, 32) if d <= 64 else Tiles(32, 16, 16)
    if d > 128:
        return Tiles(64, 32, 32)
    if capability < 90:
        return Tiles(128, 64, 32, num_warps=8, num_stages=3) if d <= 64 else Tiles(64, 64, 32)
    biased = bias is not None and (bias.position is not None or bias.time is not None)
    timed = bias is not None and bias.time is not None
    if not biased:
        if d > 64:
            return Tiles(64, 64, 32, num_stages=3, group=4) if max_len <= 4096 else Tiles(128, 64, 32, group=8)
        return Tiles(64, 64, 64, num_stages=3) if max_len <= 2048 else Tiles(128, 64, 64, num_warps=8, num_stages=3, maxnreg=128)
    if pairs * max_len <= 2**14:
        return Tiles(32, 64, 64)
    if d <= 64:
        return Tiles(64, 64, 32, maxnreg=128, after=timed)
    if not timed:
        return Tiles(64, 64, 32, num_stages=3, maxnreg=168)
    if max_len <= 2048:
        return Tiles(64, 32, 32, num_stages=3, maxnreg=168, after=True)
    return Tiles(64, 64, 64, num_stages=3, maxnreg=255, group=4, after=True)
