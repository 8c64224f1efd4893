"""Candidates as prompt tokens: how a request asks for scores of given items against a history that is already cached.

The prompt is the history, a mark, then the candidates. Tokens from `config.token_limit` up say "candidate": the attention
backend lets each of them see the history and itself only, wherever vLLM cuts the prompt into chunks. The mark is another
one for every request: vLLM names a cached block by all tokens up to its end, so that the history's blocks are found again
and those behind the mark are not, and every candidate is computed.

The answer takes the way of every answer: the request's row of logits holds three numbers for each candidate and a zero to
compare them with, and vLLM returns their log-probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def columns(candidates: int) -> int:
    """Entries of the row of logits that carry the scores of so many candidates: three each, and the zero behind them."""
    return candidates * len(TASKS) + 1


class TaskScores(RequestRows):
    """Puts task logits in place of item logits for requests with `SamplingParams.extra_args["candidates"]` (how many)."""

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
        """logits (B, V): rows of such requests become task logits, three a candidate in the prompt's order, then 0, then -inf."""
        if not self.requests:
            return logits
        slots = slots_of(self.layers)
        if self._changed:
            rows = [row for row, (_, count) in self.requests.items() for _ in range(count)]
            order = [i for _, count in self.requests.values() for i in range(count)]
            places = [start + i for start, count in self.requests.values() for i in range(count)]
            ends = [len(TASKS) * count for _, count in self.requests.values()]
            self._where = to_device([rows, order, places], self.device)
            self._ends = to_device([list(self.requests), ends], self.device)
            self._changed = False
        rows, order, places = self._where
        size = slots.gaps.shape[1]
        found = slots.step.block_table[rows, places // size].long() * size + places % size
        scores = slots.task_logits(found)
        logits[self._ends[0]] = -torch.inf
        logits[rows.unsqueeze(1), len(TASKS) * order.unsqueeze(1) + torch.arange(len(TASKS), device=self.device)] = scores
        logits[self._ends[0], self._ends[1]] = 0.0
        return logits
