"""The stack and the ranker with attention and gated norm as one node each, for engines that take operators of ours.

`hstu_lab.onnx_parts` spells attention out, and an engine that does not fuse it keeps B x H x N x N scores in memory. Here a
graph says `hstu_lab::HstuAttention` and `hstu_lab::NormGate` instead; `hstu_lab.tensorrt_kernels` puts compiled kernels in their
place, and `REFERENCE` lets `onnx.reference` run them for a test. The length is fixed, batch is free.
"""

from __future__ import annotations

import types

import numpy as np
import torch
from onnx.reference.op_run import OpRun
from torch import Tensor

from hstu_lab.config import ModelConfig
from hstu_lab.model import HSTU
from hstu_lab.onnx_parts import RankerPart, StackPart
from hstu_lab.ops import reference

DOMAIN = "hstu_lab"


class FusedStackPart(StackPart):
    """`StackPart` with two nodes of ours a layer, with `projections` four. Padding is computed, and read by nobody."""

    def __init__(self, model: HSTU, projections: bool = False):
        super().__init__(model)
        self.projections = projections

    def forward(self, x: Tensor, times: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, N, d_model), times (B, N) seconds, lengths (B,) -> logits (B, num_items), hidden (B, d_model)."""
        return self.last(_run(self.stack, x, times, None, self.projections), lengths)

    def last(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """`StackPart.last` in products: a row picked by 0 and 1 needs no index for each of its columns, and the norm is not
        `ReduceL2`, which TensorRT 8.6 misreads."""
        position = torch.arange(x.shape[1], device=x.device)
        picked = (position == (lengths - 1).unsqueeze(1)).to(x.dtype).unsqueeze(1)
        norm = self.stack.final_norm
        last = reference.layer_norm((picked @ x).squeeze(1), norm.weight, norm.bias, norm.eps)
        length = (last.unsqueeze(1) @ last.unsqueeze(2)).squeeze(2).sqrt().clamp(min=1e-12)
        return last / (length * self.stack.config.temperature) @ self.item_matrix.t() + self.shift, last


class FusedRankerPart(RankerPart):
    """`RankerPart` likewise. A history and its candidates are moved together first: what follows a history are candidates."""

    def __init__(self, model: HSTU, projections: bool = False):
        super().__init__(model)
        self.projections = projections

    def forward(self, x_history: Tensor, x_candidates: Tensor, times: Tensor, lengths: Tensor) -> Tensor:
        """x_history (B, N, d_model), x_candidates (B, C, d_model), times (B, N), lengths (B,) -> (B, C, 3)."""
        (num_history, d), count = x_history.shape[1:], x_candidates.shape[1]
        total, end = num_history + count, lengths.unsqueeze(1)
        row = torch.arange(total, device=times.device).unsqueeze(0)
        source = torch.where(row < end, row, (row - end + num_history).clamp(max=total - 1))
        now = times.gather(1, (end - 1).clamp(min=0)).expand(-1, count)
        x = torch.cat([x_history, x_candidates], dim=1).gather(1, source.unsqueeze(2).expand(-1, -1, d))
        x = _run(self.stack, x, torch.cat([times, now], dim=1).gather(1, source), total - lengths, self.projections)
        ranked = (row[:, :count] + end).unsqueeze(2).expand(-1, -1, d)
        return self.scores(x.gather(1, ranked))


def _run(stack, x: Tensor, times: Tensor, candidates: Tensor | None, projections: bool) -> Tensor:
    """All layers, without the last norm; the last candidates (B,) rows of a sequence are candidates."""
    config: ModelConfig = stack.config
    times = times - times[:, :1]  # differences count; an old TensorRT keeps seconds in 32 bits
    ops = types.SimpleNamespace(**vars(reference))
    ops.norm_gate = _norm_gate
    if projections:
        ops.project_silu, ops.project_residual = _project_silu, _project_residual

    def attend(_, q, k, v, bias):
        tables = (None, None) if bias is None else (bias.position, bias.time)
        attributes = {"divisor": config.max_seq_len, "num_context": config.num_context}
        return _node("HstuAttention", (q, k, v, times, candidates, *tables), attributes, v)

    for layer in stack.layers:
        x = layer(x, attend, ops)
    return x


def _norm_gate(attended: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return _node("NormGate", (attended, gate, weight, bias), {"eps": eps}, gate)


def _project_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    like = x.new_empty(1).expand(*x.shape[:-1], weight.shape[0])
    return _node("ProjectSilu", (x, weight, bias), {}, like)


def _project_residual(y: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return _node("ProjectResidual", (y, weight, bias, x), {}, x)


def _node(name: str, inputs: tuple[Tensor | None, ...], attributes: dict, like: Tensor) -> Tensor:
    return torch.onnx.ops.symbolic(f"{DOMAIN}::{name}", inputs, attributes, dtype=like.dtype, shape=like.shape, version=1)


# ---- the same nodes for `onnx.reference.ReferenceEvaluator(model, new_ops=REFERENCE)`


class HstuAttention(OpRun):
    op_domain = DOMAIN

    def _run(self, q, k, v, times, candidates=None, position=None, time=None, divisor=None, num_context=None):
        batch, length = times.shape
        q, k, v, times, candidates, position, time = (
            None if given is None else torch.tensor(given) for given in (q, k, v, times, candidates, position, time)
        )
        bias = None if position is None else reference.RelativeBias(position, time)
        out = reference.attention_jagged(
            *(each.flatten(0, 1) for each in (q, k, v)), torch.arange(batch + 1) * length, divisor=divisor, bias=bias,
            times=times.flatten(), num_candidates=candidates, num_context=num_context,
        )  # fmt: skip
        return (out.unflatten(0, (batch, length)).numpy(),)


class NormGate(OpRun):
    op_domain = DOMAIN

    def _run(self, attended, gate, weight, bias, eps=None):
        return (reference.norm_gate(*map(torch.tensor, (attended, gate, weight, bias)), eps).numpy(),)


class ProjectSilu(OpRun):
    op_domain = DOMAIN

    def _run(self, x, weight, bias):
        return (reference.project_silu(*map(torch.tensor, (x, weight, bias))).numpy(),)


class ProjectResidual(OpRun):
    op_domain = DOMAIN

    def _run(self, y, weight, bias, x):
        return (reference.project_residual(*map(torch.tensor, (y, weight, bias, x))).numpy(),)


class GatherElements(OpRun):
    """onnx's own takes at most 64 rows."""

    op_domain = ""

    def _run(self, data, indices, axis=None):
        return (np.take_along_axis(data, indices, axis=axis or 0),)


REFERENCE = [HstuAttention, NormGate, ProjectSilu, ProjectResidual, GatherElements]
