"""The oracle: every operator of the model in plain PyTorch, written to be read.

Shapes: B sequences, T tokens of all sequences laid end to end (jagged), H heads, d width of a head, N = max_seq_len.
A jagged tensor comes with `offsets` (B + 1, int64): sequence b owns rows offsets[b] to offsets[b + 1].
Half-precision input is computed in float32 and returned in its own dtype; float64 input stays float64.

Formulas: Zhai et al., "Actions Speak Louder than Words" (arXiv:2402.17152), eq. 1-3; the bias is that of
meta-recsys/generative-recommenders, here one row per head.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

name = "reference"


@functools.lru_cache
def time_thresholds(num_buckets: int) -> tuple[int, ...]:
    """Smallest difference in whole seconds of buckets 1 .. num_buckets - 1; integers, so that every engine agrees.

    Log-spaced with base e^0.301 as in Meta's repository, made strictly increasing where rounding would repeat a value.
    """
    thresholds = []
    for bucket in range(1, num_buckets):
        thresholds.append(max(math.ceil(math.exp(0.301 * bucket)), thresholds[-1] + 1 if thresholds else 1))
    return tuple(thresholds)


def time_bucket(seconds: Tensor, num_buckets: int) -> Tensor:
    """Bucket (same shape, int64) of absolute time differences in seconds (integer tensor)."""
    thresholds = torch.tensor(time_thresholds(num_buckets), dtype=seconds.dtype, device=seconds.device)
    return torch.bucketize(seconds, thresholds, right=True)


@dataclasses.dataclass(frozen=True)
class RelativeBias:
    """Learned bias rab_ij = position[h, p_i - p_j] + time[h, bucket(|t_i - t_j|)]; a missing part counts as zero.

    position: (H, N). time: (H, num_buckets).
    """

    position: Tensor | None = None
    time: Tensor | None = None

    def __call__(
        self, q_pos: Tensor, k_pos: Tensor, q_time: Tensor | None, k_time: Tensor | None, buckets: Tensor | None = None
    ) -> Tensor | None:
        """Bias (..., H, Q, K) for query positions/times (..., Q) and key positions/times (..., K), seconds as integers.

        `buckets` (..., Q, K) are the time buckets, where the caller has them already.
        """
        total = None
        if self.position is not None:
            distance = (q_pos.unsqueeze(-1) - k_pos.unsqueeze(-2)).clamp(0, self.position.shape[1] - 1)
            total = _look_up(self.position, distance)
        if self.time is not None:
            if buckets is None:
                if q_time is None or k_time is None:
                    raise ValueError("times is None: a time bias needs the time of every token")
                buckets = pairwise_buckets(q_time, k_time, self.time.shape[1])
            by_time = _look_up(self.time, buckets)
            total = by_time if total is None else total + by_time
        return total


def pairwise_buckets(q_time: Tensor, k_time: Tensor, num_buckets: int) -> Tensor:
    """Time buckets (..., Q, K) between query times (..., Q) and key times (..., K), seconds as integers."""
    return time_bucket((q_time.unsqueeze(-1) - k_time.unsqueeze(-2)).abs(), num_buckets)


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    # table (H, R), index (..., Q, K) -> (..., H, Q, K). Of six ways to say this, index_select along the rows is the quickest
    # on a CPU, forward and backward.
    return table.index_select(1, index.flatten()).unflatten(1, index.shape).movedim(0, -3)


def visible(q_pos: Tensor, k_pos: Tensor, num_context: int = 0) -> Tensor:
    """Mask (..., Q, K) of history keys that a query may see: causal, with a prefix of num_context that sees itself whole."""
    q, k = q_pos.unsqueeze(-1), k_pos.unsqueeze(-2)
    allowed = k <= q
    return allowed | ((q < num_context) & (k < num_context)) if num_context > 1 else allowed


def pointwise_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, bias: Tensor | None, divisor: float) -> Tensor:
    """sum_j SiLU(q_i.k_j / sqrt(d) + bias_ij) v_j / divisor over the allowed pairs; no softmax.

    q (..., H, Q, d), k (..., H, K, d), v (..., H, K, dv), allowed (..., 1 or H, Q, K) bool -> (..., H, Q, dv).
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(dtype) @ k.to(dtype).transpose(-1, -2) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias.to(dtype)
    weights = F.silu(scores).masked_fill(~allowed, 0.0)
    return (weights @ v.to(dtype) / divisor).to(q.dtype)


def attention_dense(q, k, v, lengths, *, divisor, bias=None, times=None, time_buckets=None, num_context=0):
    """Causal attention over right-padded sequences.

    q, k (B, N, H, d), v (B, N, H, dv), lengths (B,), times (B, N) -> (B, N, H, dv). `time_buckets` (B, N, N) stands for
    `times` where they are computed once for all layers, or where the query's time is not its own.
    Rows at or beyond a sequence's length come out as zero.
    """
    position = torch.arange(q.shape[1], device=q.device)
    inside = position < lengths.unsqueeze(-1)
    allowed = visible(position, position, num_context) & inside.unsqueeze(-2) & inside.unsqueeze(-1)
    rab = bias(position, position, times, times, time_buckets) if bias else None
    out = pointwise_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), allowed.unsqueeze(1), rab, divisor)
    return out.transpose(1, 2)


def attention_candidates(q, k, v, lengths, num_history, *, divisor, bias=None, times=None, time_buckets=None, num_context=0):
    """History and candidates in one dense pass (M-FALCON's mask): a candidate sees the whole history and itself.

    q, k, v (B, N + C, H, d): the first N = num_history rows are right-padded history of `lengths` (B,), the others candidates,
    all at position lengths[b]; times (B, N + C) or time_buckets (B, N + C, N + C) -> (B, N + C, H, dv).
    """
    rows = q.shape[1]
    index = torch.arange(rows, device=q.device)
    is_candidate = index >= num_history
    position = torch.where(is_candidate, lengths.unsqueeze(-1), index)
    is_history = index < lengths.unsqueeze(-1).clamp(max=num_history)
    allowed = visible(position, position, num_context) & is_history.unsqueeze(-2)
    allowed = allowed & (is_history | is_candidate).unsqueeze(-1)
    allowed = allowed | ((index.unsqueeze(-1) == index) & is_candidate)
    rab = bias(position, position, times, times, time_buckets) if bias else None
    out = pointwise_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), allowed.unsqueeze(1), rab, divisor)
    return out.transpose(1, 2)


def attention_jagged(
    q, k, v, offsets, *, divisor, bias=None, times=None, num_candidates=None, num_context=0, max_len=None
):  # fmt: skip
    """Attention over jagged sequences. q, k (T, H, d), v (T, H, dv), offsets (B + 1,), times (T,) -> (T, H, dv).

    The last num_candidates[b] (B,) rows of a sequence are candidates: they see the history and themselves only, and all
    stand at the position after the history. `max_len` bounds the length of a sequence: kernels want it, the oracle does not.
    """
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=q.dtype, device=q.device)
    bounds = offsets.tolist()
    counts = [0] * (len(bounds) - 1) if num_candidates is None else num_candidates.tolist()
    for (start, end), candidates in zip(itertools.pairwise(bounds), counts):
        if start == end:
            continue
        history = end - start - candidates
        index = torch.arange(end - start, device=q.device)
        position = index.clamp(max=history)
        allowed = visible(position, position, num_context) & (index < history)
        allowed = allowed | ((index.unsqueeze(-1) == index) & (index >= history))
        t = None if times is None else times[start:end]
        rab = bias(position, position, t, t) if bias else None
        heads = (x[start:end].transpose(0, 1) for x in (q, k, v))
        out[start:end] = pointwise_attention(*heads, allowed, rab, divisor).transpose(0, 1)
    return out


def attention_paged(
    q, key_cache, value_cache, block_table, query_offsets, seq_lens, *, divisor, bias=None, query_times=None, slot_times=None,
    candidates=None, num_context=0, history_lens=None, max_queries=None,
):  # fmt: skip
    """Attention of new queries over a paged KV cache.

    q (T, H, d) of all sequences end to end, query_offsets (B + 1,); key_cache (blocks, block_size, H, d), value_cache
    (blocks, block_size, H, dv), slot_times (blocks, block_size); block_table (B, most blocks) int; seq_lens (B,) counts the
    cached tokens -> (T, H, dv).

    Without `candidates`, the queries are the last tokens of their sequence, already written to the cache. With
    `candidates` = (k, v) of shapes (T, H, d), (T, H, dv), every query is a candidate at position seq_lens[b]: it sees the
    cached history and its own k and v. `max_queries` bounds the queries of a sequence: kernels want it, the oracle does not.

    With `history_lens` (B,), the tokens of a sequence from history_lens[b] on are candidates that lie in the cache like any
    other: each sees the history and itself, at position history_lens[b].
    """
    offsets, seq_lens = query_offsets.long(), seq_lens.long()
    counts = offsets.diff()
    most, longest = int(counts.max()), int(seq_lens.max())
    blocks = block_table[:, : -(-longest // key_cache.shape[1])].long()
    keys, values = (cache[blocks].flatten(1, 2)[:, :longest] for cache in (key_cache, value_cache))
    k_pos = torch.arange(longest, device=q.device).expand(len(counts), -1)
    # Slots that no token was written to may hold anything, and 0 x NaN is NaN.
    values = values.masked_fill((k_pos >= seq_lens.unsqueeze(-1)).view(*k_pos.shape, 1, 1), 0)
    q_pos = (seq_lens - counts).unsqueeze(-1) + torch.arange(most, device=q.device)
    k_time = None if slot_times is None else slot_times[blocks].flatten(1, 2)[:, :longest]
    q_time = None if query_times is None else jagged_to_dense(query_times, offsets, most)
    allowed = k_pos.unsqueeze(-2) < seq_lens.view(-1, 1, 1)
    if candidates is None:
        own = q_pos.unsqueeze(-1) == k_pos.unsqueeze(-2)
        if history_lens is not None:
            history = history_lens.long().unsqueeze(-1)
            q_pos, allowed = torch.minimum(q_pos, history), allowed & ((k_pos < history).unsqueeze(-2) | own)
        allowed = allowed & (visible(q_pos, k_pos, num_context) | own)
    else:
        q_pos = seq_lens.unsqueeze(-1).expand(-1, most)
        k_pos = torch.cat([k_pos, q_pos], dim=1)
        k_time = None if k_time is None or q_time is None else torch.cat([k_time, q_time], dim=1)
        own_keys, own_values = (jagged_to_dense(x, offsets, most) for x in candidates)
        keys, values = torch.cat([keys, own_keys], dim=1), torch.cat([values, own_values], dim=1)
        itself = torch.eye(most, dtype=torch.bool, device=q.device).expand(len(counts), -1, -1)
        allowed = torch.cat([allowed.expand(-1, most, -1), itself], dim=2)
    rab = bias(q_pos, k_pos, q_time, k_time) if bias else None
    heads = (x.transpose(1, 2) for x in (jagged_to_dense(q, offsets, most), keys, values))
    out = pointwise_attention(*heads, allowed.unsqueeze(1), rab, divisor).transpose(1, 2)
    return dense_to_jagged(out, offsets)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension. x (..., D), weight and bias (D,)."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def norm_gate(attended: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm(attended) * gate, the norm spanning all heads. attended and gate (..., H * dv) -> the same shape."""
    return F.layer_norm(attended, attended.shape[-1:], weight, bias, eps) * gate


def project_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU(x W^T + b). x (..., D), weight (E, D), bias (E,) -> (..., E)."""
    return F.silu(F.linear(x, weight, bias))


def project_residual(y: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """x + y W^T + b. y (..., E), weight (D, E), bias (D,), x (..., D) -> (..., D)."""
    return x + F.linear(y, weight, bias)


def gather_sum(tables: list[Tensor], ids: Tensor) -> Tensor:
    """Sum of one row from each table. tables: F of (rows_f, D); ids (F, T) -> (T, D), summed in float32."""
    total = sum(table[index].to(torch.promote_types(table.dtype, torch.float32)) for table, index in zip(tables, ids))
    return total.to(tables[0].dtype)


def jagged_to_dense(values: Tensor, offsets: Tensor, length: int, fill: float = 0) -> Tensor:
    """(T, ...) -> (B, length, ...), right-padded with `fill`; rows beyond `length` are dropped."""
    lengths = offsets.diff()
    out = values.new_full((len(lengths), length, *values.shape[1:]), fill)
    inside = torch.arange(length, device=values.device) < lengths.unsqueeze(-1)
    kept = torch.arange(values.shape[0], device=values.device) - torch.repeat_interleave(offsets[:-1], lengths)
    out[inside] = values[kept < length]
    return out


def dense_to_jagged(dense: Tensor, offsets: Tensor) -> Tensor:
    """(B, N, ...) -> (T, ...): row i of sequence b for every i < offsets[b + 1] - offsets[b]."""
    inside = torch.arange(dense.shape[1], device=dense.device) < offsets.diff().unsqueeze(-1)
    return dense[inside]
