"""The operators behind `hstu_lab.ops.get("cutlass")`: forward only, same names and shapes as `reference`.

Matrix-bound work goes to the fastest kernel that the record knows for the shape (CUTLASS, CuTe DSL or Triton;
`hstu_lab.ops.dispatch.said()` lists what was taken and why); what CUTLASS does not offer goes to Triton's operators.
"""

from __future__ import annotations

from torch import Tensor

from hstu_lab.ops import triton_ops
from hstu_lab.ops.cute_attention import attention_jagged as cute_attention
from hstu_lab.ops.cute_attention import device_facts, unsupported
from hstu_lab.ops.cute_hopper import HopperTiles
from hstu_lab.ops.cutlass import build, linear
from hstu_lab.ops.dispatch import choose
from hstu_lab.ops.reference import RelativeBias
from hstu_lab.ops.triton_memory import dense_to_jagged, gather_sum, jagged_to_dense, layer_norm, norm_gate
from hstu_lab.ops.triton_paged import attention_paged

name = "cutlass"
require = triton_ops.require

__all__ = [
    "RelativeBias", "attention_jagged", "attention_paged", "dense_to_jagged", "gather_sum", "jagged_to_dense", "layer_norm",
    "name", "norm_gate", "project_residual", "project_silu",
]  # fmt: skip

TRITON = "triton"
HOPPER_ATTENTION = {
    "cute 64 keys x3 behind": HopperTiles(64, 3, 3, "behind", 1),
    "cute 64 keys x2 ahead": HopperTiles(64, 2, 4, "ahead", 2),
}
"""Hopper attention kernels that the dispatcher knows, by name: keys of a tile, consumer warpgroups, order of work."""

_ATTENTION = frozenset({TRITON, *HOPPER_ATTENTION})


def attention_jagged(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, *, divisor: float, bias: RelativeBias | None = None,
    times: Tensor | None = None, num_candidates: Tensor | None = None, num_context: int = 0, max_len: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention over jagged sequences; shapes as in `reference.attention_jagged`, `max_len` as in Triton's."""
    plain = not unsupported(q, k, v, bias, num_candidates, num_context) and device_facts(q.device)[1] == 90
    if plain and q.shape[0]:
        max_len = max_len or int(offsets.diff().max())
        shape = {"d": q.shape[2], "max_len": max_len, "pairs": (offsets.shape[0] - 1) * q.shape[1]}
        kernel = choose("attention", TRITON, _ATTENTION, **shape).kernel
        if kernel in HOPPER_ATTENTION:
            return cute_attention(q, k, v, offsets, divisor=divisor, max_len=max_len, tiles=HOPPER_ATTENTION[kernel])
    return triton_ops.attention_jagged(
        q, k, v, offsets, divisor=divisor, bias=bias, times=times, num_candidates=num_candidates, num_context=num_context,
        max_len=max_len,
    )  # fmt: skip


def project_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU(x W^T + b). x (..., D), weight (E, D), bias (E,) -> (..., E)."""
    config = _config("project_silu", x, weight, bias)
    return linear.project_silu(x, weight, bias, config) if config else triton_ops.project_silu(x, weight, bias)


def project_residual(y: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """x + y W^T + b. y (..., E), weight (D, E), bias (D,), x (..., D) -> (..., D)."""
    config = _config("project_residual", y, weight, bias, x)
    return linear.project_residual(y, weight, bias, x, config) if config else triton_ops.project_residual(y, weight, bias, x)


def _config(op: str, x: Tensor, weight: Tensor, *others: Tensor) -> build.LinearConfig | None:
    """The CUTLASS kernel to take, None for Triton's."""
    if linear.unsupported(x, weight, *others):
        return None
    capability = device_facts(x.device)[1]
    known = frozenset({TRITON, *(n for n, config in build.KERNELS.items() if config.capability == capability)})
    columns, depth = weight.shape
    kernel = choose(op, TRITON, known, rows=x.numel() // max(depth, 1), columns=columns, depth=depth).kernel
    return build.KERNELS.get(kernel)
