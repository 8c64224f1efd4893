"""The stack and the ranker as modules to trace: `hstu_lab.model`'s formulas over padded batches, laid out for engines.

Two things differ from `HSTUStack.dense` and `.candidates`, and neither changes a value. Attention runs heads first,
(H, B, Q, K): that is how look-ups in a bias table (H, R) come out, so that nothing as large as the scores has to be turned.
And candidates attend to the history's keys and to themselves only, so that the pairs that M-FALCON's mask forbids are not
computed; in one sequence they all stand at the same place and time, so that one row of bias serves them all.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hstu_lab.model import HSTU
from hstu_lab.ops import reference


class StackPart(nn.Module):
    """Right-padded histories -> next-item logits and hidden state of each one's last event."""

    def __init__(self, model: HSTU):
        super().__init__()
        self.stack = _with_reference_ops(model.stack)
        self.register_buffer("item_matrix", model.item_matrix().detach())
        self.logits = model.logits

    def forward(self, x: Tensor, times: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, N, d_model), times (B, N) seconds, lengths (B,) -> logits (B, num_items), hidden (B, d_model)."""
        history = _History(self.stack.config, times, lengths)

        def attend(_, q, k, v, bias):
            return history.attend(*map(_heads_first, (q, k, v)), bias).movedim(0, 2)

        hidden = self.stack(x, attend)
        end = (lengths - 1).view(-1, 1, 1).expand(-1, 1, x.shape[2])
        last = hidden.gather(1, end).squeeze(1)
        return self.logits(last, self.item_matrix), last


class RankerPart(nn.Module):
    """Right-padded histories and C candidates each, in one masked pass -> task probabilities of the candidates."""

    def __init__(self, model: HSTU):
        super().__init__()
        self.stack, self.heads = _with_reference_ops(model.stack), model.heads

    def forward(self, x_history: Tensor, x_candidates: Tensor, times: Tensor, lengths: Tensor) -> Tensor:
        """x_history (B, N, d_model), x_candidates (B, C, d_model), times (B, N), lengths (B,) -> (B, C, 3)."""
        num_history = x_history.shape[1]
        history = _History(self.stack.config, times, lengths)

        def attend(_, q, k, v, bias):
            q, k, v = map(_heads_first, (q, k, v))
            known = k[:, :, :num_history], v[:, :, :num_history]
            before = history.attend(q[:, :, :num_history], *known, bias)
            after = history.attend_candidates(*(each[:, :, num_history:] for each in (q, k, v)), *known, bias)
            return torch.cat([before, after], dim=2).movedim(0, 2)

        hidden = self.stack(torch.cat([x_history, x_candidates], dim=1), attend)
        return self.heads(hidden[:, num_history:]).sigmoid()


class _History:
    """Masks, distances and time buckets of right-padded histories, made once for all layers."""

    def __init__(self, config, times: Tensor, lengths: Tensor):
        self.config = config
        position = torch.arange(times.shape[1], device=times.device)
        self.inside = position < lengths.unsqueeze(1)
        self.allowed = (
            reference.visible(position, position, config.num_context) & self.inside.unsqueeze(1) & self.inside.unsqueeze(2)
        )
        self.distance = (position.unsqueeze(1) - position).clamp(min=0).unsqueeze(0)
        self.distance_to_end = (lengths.unsqueeze(1) - position).clamp(0, config.max_seq_len - 1)
        self.buckets = self.buckets_to_end = None
        if config.rab == "position+time":
            self.buckets = reference.pairwise_buckets(times, times, config.num_time_buckets)
            now = times.gather(1, (lengths - 1).clamp(min=0).unsqueeze(1))
            self.buckets_to_end = reference.pairwise_buckets(now, times, config.num_time_buckets).squeeze(1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: reference.RelativeBias | None) -> Tensor:
        """q, k (H, B, N, d_qk), v (H, B, N, d_v) of the histories -> (H, B, N, d_v)."""
        rab = _add(bias, self.distance, self.buckets)
        return reference.pointwise_attention(q, k, v, self.allowed, rab, self.config.max_seq_len)

    def attend_candidates(
        self, q: Tensor, k: Tensor, v: Tensor, history_k: Tensor, history_v: Tensor, bias: reference.RelativeBias | None
    ) -> Tensor:
        """q, k (H, B, C, d_qk), v (H, B, C, d_v) of candidates, keys and values of the histories -> (H, B, C, d_v)."""
        divisor, allowed = self.config.max_seq_len, self.inside.unsqueeze(1)
        row = _add(bias, self.distance_to_end, self.buckets_to_end)
        seen = reference.pointwise_attention(q, history_k, history_v, allowed, None if row is None else row.unsqueeze(2), divisor)
        itself = (q * k).sum(-1, keepdim=True) * q.shape[-1] ** -0.5
        for table in () if bias is None else (bias.position, bias.time):
            if table is not None:  # no distance, no time between
                itself = itself + table[:, 0].view(-1, 1, 1, 1)
        return seen + F.silu(itself) * v / divisor


def _add(bias: reference.RelativeBias | None, distance: Tensor, buckets: Tensor | None) -> Tensor | None:
    """Position and time bias (H, ...) for distances and buckets of shape (...)."""
    if bias is None:
        return None
    total = _look_up(bias.position, distance)
    return total if buckets is None else total + _look_up(bias.time, buckets)


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    return table.index_select(1, index.flatten()).unflatten(1, index.shape)


def _heads_first(x: Tensor) -> Tensor:
    return x.movedim(2, 0)


def _with_reference_ops(stack: nn.Module) -> nn.Module:
    # Fused kernels cannot be traced. The copy is shallow: it shares every parameter.
    stack = copy.copy(stack)
    stack.ops = reference
    return stack
