"""The stack and the ranker with what is ours as one node each, for engines that take operators of ours.

`hstu_lab.onnx_parts` spells attention out, and an engine that does not fuse it keeps B x H x N x N scores in memory. Here a
graph says `hstu_lab::HstuAttention`, `NormGate` and `LastEvent` instead; `hstu_lab.tensorrt_kernels` puts compiled kernels in
their place, and of the products around them. `REFERENCE` lets `onnx.reference` run the nodes, for calibration and tests. The
length is fixed, batch is free.
"""

from __future__ import annotations

import types

import numpy as np
import torch
from onnx.reference.op_run import OpRun
from torch import Tensor

from hstu_lab.config import ModelConfig
from hstu_lab.onnx_parts import RankerPart, StackPart
from hstu_lab.ops import reference

DOMAIN = "hstu_lab"


class FusedStackPart(StackPart):
    """`StackPart` with two nodes of ours a layer and one at the end. Padding is computed, and read by nobody."""

    def forward(self, x: Tensor, times: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, N, d_model), times (B, N) seconds, lengths (B,) -> logits (B, num_items), hidden (B, d_model)."""
        return self.last(_run(self.stack, x, times, None), lengths)

    def last(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """`StackPart.last` with all that concerns one event in one node."""
        norm, like = self.stack.final_norm, x[:, 0]
        hidden, scaled = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::LastEvent", (x, lengths, norm.weight, norm.bias),
            {"eps": norm.eps, "scale": 1 / self.stack.config.temperature},
            dtypes=(x.dtype, x.dtype), shapes=(like.shape, like.shape), version=1,
        )  # fmt: skip
        return scaled @ self.item_matrix.t() + self.shift, hidden


class FusedRankerPart(RankerPart):
    """`RankerPart` likewise. A history and its candidates are moved together first: what follows a history are candidates."""

    def forward(self, x_history: Tensor, x_candidates: Tensor, times: Tensor, lengths: Tensor) -> Tensor:
        """x_history (B, N, d_model), x_candidates (B, C, d_model), times (B, N), lengths (B,) -> (B, C, 3)."""
        (num_history, d), count = x_history.shape[1:], x_candidates.shape[1]
        total, end = num_history + count, lengths.unsqueeze(1)
        row = torch.arange(total, device=times.device).unsqueeze(0)
        source = torch.where(row < end, row, (row - end + num_history).clamp(max=total - 1))
        now = times.gather(1, (end - 1).clamp(min=0)).expand(-1, count)
        x = torch.cat([x_history, x_candidates], dim=1).gather(1, source.unsqueeze(2).expand(-1, -1, d))
        x = _run(self.stack, x, torch.cat([times, now], dim=1).gather(1, source), total - lengths)
        ranked = (row[:, :count] + end).unsqueeze(2).expand(-1, -1, d)
        return self.scores(x.gather(1, ranked))


FUSED = {"stack": FusedStackPart, "ranker": FusedRankerPart}


def _run(stack, x: Tensor, times: Tensor, candidates: Tensor | None) -> Tensor:
    """All layers, without the last norm; the last candidates (B,) rows of a sequence are candidates."""
    config: ModelConfig = stack.config
    ops = types.SimpleNamespace(**vars(reference))
    ops.norm_gate = _norm_gate

    def attend(_, q, k, v, bias):
        tables = (None, None) if bias is None else (bias.position, bias.time)
        attributes = {"divisor": config.max_seq_len, "num_context": config.num_context}
        return _node("HstuAttention", (q, k, v, times, candidates, *tables), attributes, v)

    for layer in stack.layers:
        x = layer(x, attend, ops)
    return x


def _norm_gate(attended: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return _node("NormGate", (attended, gate, weight, bias), {"eps": eps}, gate)


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


class LastEvent(OpRun):
    op_domain = DOMAIN

    def _run(self, x, lengths, weight, bias, eps=None, scale=None):
        last = torch.tensor(x[np.arange(len(lengths)), lengths - 1])
        hidden = reference.layer_norm(last, torch.tensor(weight), torch.tensor(bias), eps)
        return hidden.numpy(), (torch.nn.functional.normalize(hidden, dim=-1) * scale).numpy()


class GatherElements(OpRun):
    """onnx's own takes at most 64 rows."""

    op_domain = ""

    def _run(self, data, indices, axis=None):
        return (np.take_along_axis(data, indices, axis=axis or 0),)


REFERENCE = [HstuAttention, NormGate, LastEvent, GatherElements]
