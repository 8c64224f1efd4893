"""The stack and the ranker as modules to trace: `hstu_lab.model`'s formulas over padded batches, laid out for engines.

What differs from `HSTUStack.dense` and `.candidates` changes no value that is read, and leaves an engine less to move:

- Attention runs heads first, (H, B, Q, K): that is how look-ups in a bias table (H, R) come out, so that nothing as large as the
  scores is turned. Keys are turned once, by the same transpose that splits the heads.
- Masked pairs are multiplied by 0, and the others by the power of two that keeps A V within float16: one factor, the same for
  all layers, in place of a selection and two divisions. A query sees no key after it, so right-padding needs no mask of its own.
- Candidates attend to the history's keys and to themselves only, so that the pairs that M-FALCON's mask forbids are not computed;
  in one sequence they all stand at the same place and time, so that one row of bias serves them all.
- Ids that name no item get the logit `MASKED`, not minus infinity: int8 engines do not keep infinities.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hstu_lab.config import ModelConfig
from hstu_lab.model import HSTU, HSTUStack
from hstu_lab.onnx_precision import MASKED
from hstu_lab.ops import reference


class StackPart(nn.Module):
    """Right-padded histories -> next-item logits and hidden state of each one's last event."""

    def __init__(self, model: HSTU):
        super().__init__()
        self.stack, self.buckets = _with_reference_ops(model.stack), TimeBuckets(model.config)
        self.register_buffer("item_matrix", model.item_matrix().detach())
        self.register_buffer("shift", torch.where(model.known_items, 0.0, MASKED).to(self.item_matrix.dtype))

    def forward(self, x: Tensor, times: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, N, d_model), times (B, N) seconds, lengths (B,) -> logits (B, num_items), hidden (B, d_model)."""
        history = _History(self.stack.config, self.buckets, times, lengths)

        def attend(_, q, k, v, bias):
            return history.attend(*_heads_first(q, k, v), bias).movedim(0, 2)

        for layer in self.stack.layers:
            x = layer(x, attend)
        return self.last(x, lengths)

    def last(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and hidden state of each history's last event from the layers' output x (B, N, d_model)."""
        end = (lengths - 1).view(-1, 1, 1).expand(-1, 1, x.shape[2])
        last = _norm(self.stack, x.gather(1, end).squeeze(1))
        length = last.norm(dim=-1, keepdim=True).clamp(min=1e-12)  # F.normalize, without its expansion
        return last / (length * self.stack.config.temperature) @ self.item_matrix.t() + self.shift, last


class RankerPart(nn.Module):
    """Right-padded histories and C candidates each, in one masked pass -> task probabilities of the candidates."""

    def __init__(self, model: HSTU):
        super().__init__()
        self.stack, self.buckets, self.heads = _with_reference_ops(model.stack), TimeBuckets(model.config), model.heads

    def forward(self, x_history: Tensor, x_candidates: Tensor, times: Tensor, lengths: Tensor) -> Tensor:
        """x_history (B, N, d_model), x_candidates (B, C, d_model), times (B, N), lengths (B,) -> (B, C, 3)."""
        num_history = x_history.shape[1]
        history = _History(self.stack.config, self.buckets, times, lengths)

        def attend(_, q, k, v, bias):
            q, k, v = _heads_first(q, k, v)
            known = k[..., :num_history], v[:, :, :num_history]
            before = history.attend(q[:, :, :num_history], *known, bias)
            own = q[:, :, num_history:], k[..., num_history:], v[:, :, num_history:]
            return torch.cat([before, history.attend_candidates(*own, *known, bias)], dim=2).movedim(0, 2)

        x = torch.cat([x_history, x_candidates], dim=1)
        for layer in self.stack.layers:
            x = layer(x, attend)
        return self.scores(x[:, num_history:])

    def scores(self, x: Tensor) -> Tensor:
        """Task probabilities (B, C, 3) from the layers' output for candidates, x (B, C, d_model)."""
        return self.heads(_norm(self.stack, x)).sigmoid()


class TimeBuckets(nn.Module):
    """`reference.time_bucket` in octal digits: a digit counts how many of its seven thresholds the difference has reached.

    Two look-ups where a search by halves takes six, and integers all the way. The count is a sum over an axis, which engines do
    not fuse with what follows: in TensorRT 8.6 a search by halves ran anew for every head of the first layer.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        edges = (0, *reference.time_thresholds(config.num_time_buckets))
        self.dtype = torch.int32 if edges[-1] < 2**31 - 1 else torch.int64
        self.never, self.digits = torch.iinfo(self.dtype).max, 1
        while 8**self.digits < len(edges):
            self.digits += 1
        for digit in range(self.digits):
            step = 8 ** (self.digits - 1 - digit)
            starts = [(8 * prefix + i) * step for prefix in range(8**digit) for i in range(1, 8)]
            rows = torch.tensor([edges[start] if start < len(edges) else self.never for start in starts])
            self.register_buffer(f"edges_{digit}", rows.view(-1, 7).to(self.dtype), persistent=False)

    def forward(self, q_time: Tensor, k_time: Tensor) -> Tensor:
        """Buckets (..., Q, K) of times (..., Q) and (..., K), seconds as integers."""
        seconds = (q_time.unsqueeze(-1) - k_time.unsqueeze(-2)).abs().clamp(max=self.never - 1).to(self.dtype)
        bucket = self._digit(seconds, self.edges_0[0])
        for digit in range(1, self.digits):
            bucket = bucket * 8 + self._digit(seconds, F.embedding(bucket, getattr(self, f"edges_{digit}")))
        return bucket

    @staticmethod
    def _digit(seconds: Tensor, edges: Tensor) -> Tensor:
        # TensorRT 8.6 sums no integers. A count of seven is exact in every float.
        return (seconds.unsqueeze(-1) >= edges).float().sum(-1).int()


class _History:
    """Masks, distances and time buckets of right-padded histories, made once for all layers."""

    def __init__(self, config: ModelConfig, buckets: TimeBuckets, times: Tensor, lengths: Tensor):
        position = torch.arange(times.shape[1], device=times.device)
        # A sum over N events may exceed float16's 65504, so that about the root of N is divided off before it, the rest after.
        before = 2.0 ** round(math.log2(config.max_seq_len) / 2)
        self.after = before / config.max_seq_len
        self.gate = reference.visible(position, position, config.num_context).float() / before
        self.gate_at_end = (position < lengths.unsqueeze(1)).float().unsqueeze(1) / before
        self.distance = (position.unsqueeze(1) - position).clamp(min=0).unsqueeze(0)
        self.distance_to_end = (lengths.unsqueeze(1) - position).clamp(0, config.max_seq_len - 1)
        self.buckets = self.buckets_to_end = None
        if config.rab == "position+time":
            self.buckets = buckets(times, times)
            now = times.gather(1, (lengths - 1).clamp(min=0).unsqueeze(1))
            self.buckets_to_end = buckets(now, times).squeeze(1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: reference.RelativeBias | None) -> Tensor:
        """q (H, B, N, d_qk), k (H, B, d_qk, N), v (H, B, N, d_v) of the histories -> (H, B, N, d_v)."""
        return _attention(q, k, v, self.gate, _add(bias, self.distance, self.buckets)) * self.after

    def attend_candidates(
        self, q: Tensor, k: Tensor, v: Tensor, history_k: Tensor, history_v: Tensor, bias: reference.RelativeBias | None
    ) -> Tensor:
        """q (H, B, C, d_qk), k (H, B, d_qk, C), v (H, B, C, d_v) of candidates, the histories' k and v -> (H, B, C, d_v)."""
        row = _add(bias, self.distance_to_end, self.buckets_to_end)
        seen = _attention(q, history_k, history_v, self.gate_at_end, None if row is None else row.unsqueeze(2))
        itself = (q * k.transpose(2, 3)).sum(-1, keepdim=True) * q.shape[-1] ** -0.5
        for table in () if bias is None else (bias.position, bias.time):
            if table is not None:  # no distance, no time between
                itself = itself + table[:, 0].view(-1, 1, 1, 1)
        return (seen + F.silu(itself) * self.gate[0, 0] * v) * self.after


def _attention(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, bias: Tensor | None) -> Tensor:
    """sum_j SiLU(q_i.k_j / sqrt(d) + bias_ij) gate_ij v_j; k is (H, B, d_qk, K)."""
    scores = q @ k * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    return F.silu(scores) * gate @ v


def _add(bias: reference.RelativeBias | None, distance: Tensor, buckets: Tensor | None) -> Tensor | None:
    """Position and time bias (H, ...) for distances and buckets of shape (...)."""
    if bias is None:
        return None
    total = _look_up(bias.position, distance)
    return total if buckets is None else total + _look_up(bias.time, buckets)


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    return table.index_select(1, index.flatten()).unflatten(1, index.shape)


def _heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, H, d) -> (H, B, N, d), keys (H, B, d, N)."""
    return q.permute(2, 0, 1, 3), k.permute(2, 0, 3, 1), v.permute(2, 0, 1, 3)


def _norm(stack: HSTUStack, x: Tensor) -> Tensor:
    norm = stack.final_norm
    return reference.layer_norm(x, norm.weight, norm.bias, norm.eps)


def _with_reference_ops(stack: HSTUStack) -> HSTUStack:
    # Fused kernels cannot be traced. The copy is shallow: it shares every parameter.
    stack = copy.copy(stack)
    stack.ops = reference
    return stack
