"""The yardsticks of training: leave-one-out by full ranking, and two baselines under the same protocol.

The last event of every user is held out; all known items that the user's history does not hold are ranked for it. The target
always stays in, and of equal scores the lower item id comes first, as in serving.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from hstu_lab.event_log import EventLog
from hstu_lab.model import HSTU
from hstu_lab.tokens import encode_history, pack, quantise_gaps

KS = (10, 50, 200)


class TrainingError(ValueError):
    """Training or its evaluation cannot start or go on; the message names the field or file and the remedy."""


def hidden_states(model: HSTU, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Right-padded tokens (B, S + 1), lengths (B,), each sequence's last token a target -> hidden states (B, S, d_model).

    Position i is to predict token i + 1. No target is read, but with `config.target_time_bias` the bias sees its time.
    """
    batch, columns = tokens.shape
    offsets = torch.arange(batch + 1, device=tokens.device)
    times = model.times(tokens.flatten(), offsets * columns).view(batch, columns)
    x = model.embed(tokens[:, :-1].flatten(), offsets * (columns - 1)).view(batch, columns - 1, -1)
    query_times = times[:, 1:] if model.config.target_time_bias else None
    return model.stack.dense(x, lengths - 1, times[:, :-1], query_times)


def evaluate(
    model: HSTU,
    log: EventLog,
    *,
    ks: Sequence[int] = KS,
    users: Sequence[int] | None = None,
    user_rows: Sequence[int] | None = None,
    batch_size: int = 64,
) -> dict[str, float]:
    """HR@K and NDCG@K of the held-out events: {"HR@10": ..., "NDCG@10": ..., ...}.

    users: indices of `log`, by default everybody with two events or more. user_rows (U,): table row of each user of `log`; by
    default index + 1, as in the log trained on. Raises TrainingError where a user has fewer than two events.
    """
    config, device = model.config, model.known_items.device
    rows = np.arange(1, len(log) + 1) if user_rows is None else np.asarray(user_rows)

    def scores(batch: np.ndarray) -> Tensor:
        sequences = []
        for user in batch.tolist():
            h = log.history(user)
            past = encode_history(h.items[:-1].tolist(), h.actions[:-1].tolist(), h.timestamps[:-1].tolist(), rows[user], config)
            level = quantise_gaps(h.timestamps.tolist(), config.num_time_levels)[-1] if config.target_time_bias else 0
            sequences.append(torch.tensor([*past, pack(0, 0, level, config)]))
        lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)
        hidden = hidden_states(model, torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).to(device), lengths)
        return model.logits(hidden[torch.arange(len(batch), device=device), lengths - 2]).cpu()

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return _leave_one_out(log, scores, ks, users, batch_size)
    finally:
        model.train(was_training)


def evaluate_baseline(
    baseline: MostPopular | Markov, log: EventLog, *, ks: Sequence[int] = KS, users: Sequence[int] | None = None
) -> dict[str, float]:
    """`evaluate` for a baseline: same held-out events, same exclusions, same order of ties."""

    def scores(batch: np.ndarray) -> Tensor:
        return torch.from_numpy(np.stack([baseline.scores(log.history(user).items[:-1]) for user in batch.tolist()]))

    return _leave_one_out(log, scores, ks, users, 256)


def compare(model: HSTU, log: EventLog) -> dict[str, dict[str, float]]:
    """Metrics of the model and of both baselines on the same held-out events."""
    return {
        "hstu": evaluate(model, log),
        "most_popular": evaluate_baseline(MostPopular(log), log),
        "markov": evaluate_baseline(Markov(log), log),
    }


def _leave_one_out(
    log: EventLog, scores: Callable[[np.ndarray], Tensor], ks: Sequence[int], users: Sequence[int] | None, batch_size: int
) -> dict[str, float]:
    sizes = np.diff(log.offsets)
    chosen = np.flatnonzero(sizes >= 2) if users is None else np.asarray(users, dtype=np.int64)
    if not len(chosen) or sizes[chosen].min() < 2:
        raise TrainingError("events: leave-one-out needs users with two events or more; give longer histories")
    chosen = chosen[np.argsort(sizes[chosen], kind="stable")]
    unknown, ranks = torch.from_numpy(~log.catalog.known), []
    for batch in np.split(chosen, range(batch_size, len(chosen), batch_size)):
        excluded = unknown.repeat(len(batch), 1)
        for row, user in zip(excluded, batch.tolist()):
            row[torch.from_numpy(log.history(user).items[:-1])] = True
        targets = torch.from_numpy(log.items[log.offsets[batch + 1] - 1])
        ranks.append(target_ranks(scores(batch), targets, excluded))
    rank = torch.cat(ranks).double()
    hits = {f"HR@{k}": (rank < k).double().mean().item() for k in ks}
    return hits | {f"NDCG@{k}": ((rank < k) / (rank + 2).log2()).mean().item() for k in ks}


def target_ranks(scores: Tensor, targets: Tensor, excluded: Tensor) -> Tensor:
    """How many items come before each target (B,); scores (B, V), excluded (B, V) bool, but never the target itself.

    Higher scores come first, of equal ones the lower id. NaN never helps: such a target is last, such an item before it.
    """
    ids, target = torch.arange(scores.shape[1]), targets.unsqueeze(1)
    own = scores.gather(1, target)
    after = (scores < own) | ((scores == own) & (ids > target)) | (ids == target)
    return (~after & ~excluded).sum(1)


# ---- baselines


def training_events(log: EventLog) -> Iterator[tuple[int, int]]:
    """(start, end) of every user's events but the last, in the columns of `log`."""
    return ((start, max(end - 1, start)) for start, end in zip(log.offsets[:-1].tolist(), log.offsets[1:].tolist()))


class MostPopular:
    """Recommends everybody the items with most training events."""

    def __init__(self, log: EventLog):
        items = np.concatenate([log.items[start:end] for start, end in training_events(log)])
        self.counts = np.bincount(items, minlength=log.catalog.num_items).astype(np.float64)

    def scores(self, history: np.ndarray) -> np.ndarray:
        """Scores (num_items,) float64 of the next item after item rows `history`, oldest first."""
        return self.counts


class Markov:
    """First-order chain: how often the item followed the history's last item in training, plus its popularity share.

    The same order as add-one back-off: (transitions + share) / (all transitions from the last item + 1).
    """

    def __init__(self, log: EventLog):
        popularity = MostPopular(log).counts
        self.share = popularity / max(popularity.sum(), 1)
        spans = [(start, end) for start, end in training_events(log) if end - start > 1]
        before = np.concatenate([log.items[:0], *(log.items[start : end - 1] for start, end in spans)])
        after = np.concatenate([log.items[:0], *(log.items[start + 1 : end] for start, end in spans)])
        order = np.argsort(before, kind="stable")
        self.after, self.offsets = after[order], np.searchsorted(before[order], np.arange(len(popularity) + 1))

    def scores(self, history: np.ndarray) -> np.ndarray:
        """Scores (num_items,) float64 of the next item after item rows `history`, oldest first."""
        start, end = self.offsets[history[-1]], self.offsets[history[-1] + 1]
        return np.bincount(self.after[start:end], minlength=len(self.share)) + self.share
