"""Candidates as prompt tokens: how a request asks for scores of given items against a history that is already cached.

The prompt is the history, a mark, then the candidates. Tokens from `config.token_limit` up say "candidate": the attention
backend lets each of them see the history and itself only, wherever vLLM cuts the prompt into chunks. The mark is another
one for every request: vLLM names a cached block by all tokens up to its end, so that the history's blocks are found again
and those behind the mark are not, and every candidate is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hstu_lab.config import ModelConfig

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
