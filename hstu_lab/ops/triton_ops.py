"""The Triton operators behind `hstu_lab.ops.get("triton")`: forward only, same names and shapes as `reference`.

On a CUDA device kernels are compiled at first use. Without one, set TRITON_INTERPRET=1 before the first import: they then
run in Triton's interpreter, in float32 or float16, far slower than the oracle: for reading and testing.
"""

from __future__ import annotations

import torch

from hstu_lab.ops.reference import RelativeBias
from hstu_lab.ops.triton_attention import attention_jagged
from hstu_lab.ops.triton_linear import project_residual, project_silu
from hstu_lab.ops.triton_memory import dense_to_jagged, gather_sum, jagged_to_dense, layer_norm, norm_gate
from hstu_lab.ops.triton_paged import attention_paged
from hstu_lab.ops.triton_runtime import interpreted

name = "triton"

__all__ = [
    "RelativeBias", "attention_jagged", "attention_paged", "dense_to_jagged", "gather_sum", "jagged_to_dense", "layer_norm",
    "name", "norm_gate", "project_residual", "project_silu",
]  # fmt: skip


def require() -> None:
    """Raise ImportError where these operators cannot run."""
    if not interpreted() and not torch.cuda.is_available():
        raise ImportError('ops "triton" needs a CUDA device; set TRITON_INTERPRET=1 to run its kernels in Triton\'s interpreter')
