"""Tensor parallelism over heads: every GPU holds the same fraction of each layer's heads, and their keys and values.

A layer of fewer heads is a layer like any other; two places see all heads. The norm behind the attention spans them, so its
moments are joined; the output projection sums over them, so its parts are added up.
"""

from __future__ import annotations

import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hstu_lab.config import ModelConfig


class ParallelOps:
    """The operators of one GPU among several: those of `ops`, save the two that span heads.

    gather(x (T, n)) -> (T, n x GPUs) and reduce(x) -> the sum over GPUs are vLLM's collectives.
    """

    def __init__(self, ops: types.ModuleType, gather: Callable[[Tensor], Tensor], reduce: Callable[[Tensor], Tensor]):
        self.name, self._gather, self._reduce = ops.name, gather, reduce
        self.layer_norm, self.project_silu = ops.layer_norm, ops.project_silu
        self.attention_paged, self.attention_jagged = ops.attention_paged, ops.attention_jagged

    def norm_gate(self, attended: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """LayerNorm over the heads of all GPUs, times gate; attended and gate (T, own heads x dv)."""
        x = attended.float()
        variance, mean = torch.var_mean(x, dim=-1, correction=0)
        # Variances and means of equal parts, joined without the cancellation of E[x^2] - E[x]^2 (Chan et al. 1979).
        means, variances = self._gather(torch.stack([mean, variance], dim=-1)).unflatten(-1, (-1, 2)).unbind(-1)
        mean = means.mean(-1, keepdim=True)
        variance = (variances + (means - mean) ** 2).mean(-1, keepdim=True)
        y = (x - mean) * (variance + eps).rsqrt() * weight.float() + bias.float()
        return (y * gate.float()).to(attended.dtype)

    def project_residual(self, y: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
        """x + y W^T + b, the products of all GPUs added up. y (T, own heads x dv), weight (d_model, own heads x dv)."""
        return x + self._reduce(F.linear(y, weight)) + bias


def own_heads(config: ModelConfig, size: int) -> ModelConfig:
    """The config of one of `size` GPUs. Raises ValueError where the heads cannot be shared out, naming the remedy."""
    heads, rest = divmod(config.num_heads, size)
    if rest or not heads:
        raise ValueError(f"tensor_parallel_size is {size}: it must divide num_heads, {config.num_heads}")
    if heads * (config.d_qk + config.d_v) < config.d_model:
        raise ValueError(f"tensor_parallel_size is {size}: a slot would be narrower than d_model, {config.d_model}; lower it")
    return config.replace(num_heads=heads)


def own_part(name: str, tensor: Tensor, config: ModelConfig, rank: int, size: int) -> Tensor:
    """The part of a checkpoint's tensor that GPU `rank` of `size` holds; `config` is the whole model's."""
    if size == 1 or ".layers." not in name:
        return tensor
    if ".uvqk." in name:  # rows of U, V, Q, K, each by heads
        u, k = config.num_heads * config.d_v, config.num_heads * config.d_qk
        return torch.cat([part.chunk(size)[rank] for part in tensor.split([u, u, k, k])])
    if ".out.weight" in name:
        return tensor.chunk(size, dim=1)[rank]
    if ".attention_norm." in name or name.endswith(("position_bias", "time_bias")):
        return tensor.chunk(size)[rank]
    return tensor
