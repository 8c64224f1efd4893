"""Candidates as prompt tokens: how a request asks for scores of given items against a history that is already cached.

The prompt is the history, a mark, then the candidates. Tokens from `config.token_limit` up say "candidate": the attention
backend lets each of them see the history and itself only, wherever vLLM cuts the prompt into chunks. The mark is another
one for every request: vLLM names a cached block by all tokens up to its end, so that the history's blocks are found again
and those behind the mark are not, and every candidate is computed.

The answer takes the way of every answer: where others have the log-probabilities of their best items, such a request has the
logits of its candidates' tasks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate

from hstu_lab.config import TASKS, ModelConfig
from hstu_lab.vllm_plugin.seen_items import RequestRows, slots_of, to_device

MARKS = 1 << 16


def prompt(history: Sequence[int], items: Sequence[int], number: int, config: ModelConfig) -> list[int]:
    """Tokens of a request that scores `items` (table rows) after the tokens of `history`; `number` tells requests apart."""
    return [*history, config.token_limit + config.num_items + number % MARKS, *(config.token_limit + item for item in items)]


def strip(tokens: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """tokens (T,) int64 -> tokens of `hstu_lab.tokens` (T,), bare items for candidates and 0 for a mark, and which are either."""
    is_candidate = tokens >= config.token_limit
    item = tokens - config.token_limit
    item = item.masked_fill(item >= config.num_items, 0)
    return torch.where(is_candidate, item, tokens), is_candidate


class TaskScores(RequestRows):
    """Answers requests with `SamplingParams.extra_args["candidates"]` (how many) by task logits, not by items."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams):
        """Raises ValueError where `candidates` is not a whole number from 1 up."""
        count = (sampling_params.extra_args or {}).get("candidates")
        if count is not None and not (isinstance(count, int) and count > 0):
            raise ValueError("extra_args['candidates'] must be a whole number from 1 up")

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        super().update_state(batch_update)
        slots_of(self.layers).with_candidates["scores"] = bool(self.requests)

    @staticmethod
    def _add(params: SamplingParams, prompt: list[int] | None, generated: list[int]) -> tuple[int, int] | None:
        count = (params.extra_args or {}).get("candidates")
        return None if count is None else (len(prompt) - count, count)

    def apply(self, logits: Tensor) -> Tensor:
        """The sampler calls `write` instead."""
        return logits

    def write(self, best: Tensor) -> None:
        """best (B, n) float32, in place: such a request's row begins with three logits a candidate, in the prompt's order."""
        slots = slots_of(self.layers)
        if self._changed:
            rows, counts = np.array(list(self.requests)), np.array([count for _, count in self.requests.values()])
            order = np.concatenate([np.arange(count) for count in counts])
            starts = np.array([start for start, _ in self.requests.values()])
            self._where = to_device([np.repeat(rows, counts), order, np.repeat(starts, counts) + order], self.device)
            self._changed = False
        rows, order, places = self._where
        size = slots.gaps.shape[1]
        found = slots.step.block_table[rows, places // size].long() * size + places % size
        columns = len(TASKS) * order.unsqueeze(1) + torch.arange(len(TASKS), device=self.device)
        best[rows.unsqueeze(1), columns] = slots.task_logits(found)
