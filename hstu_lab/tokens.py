"""Tokens: a history as a list of integers that say everything the model knows of it.

An event is `item + V * (action + A * level)`: V items, A actions, and the gap to the previous event quantised to one of
`num_time_levels` levels. A user is a token too, above all events. Two equal token lists therefore have equal keys and
values in every layer, which is what lets a serving engine share a cached prefix. A bare item (action 0, level 0) is a
candidate or a generated item; it takes the time of the event before it.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from hstu_lab.config import ModelConfig

LONGEST_GAP = 10 * 365 * 86400
"""Seconds of the last level: longer gaps are counted as this."""


@functools.lru_cache
def level_seconds(num_levels: int) -> tuple[int, ...]:
    """Seconds that each level stands for: 0, 1, 2, ... then growing by a constant factor up to `LONGEST_GAP`."""
    ratio = LONGEST_GAP ** (1 / max(num_levels - 2, 1))
    seconds = [0]
    for level in range(1, num_levels):
        seconds.append(max(seconds[-1] + 1, round(ratio ** (level - 1))))
    return tuple(seconds)


def quantise_gaps(timestamps: Sequence[float], num_levels: int) -> list[int]:
    """Level of each event of one history (oldest first, Unix seconds); the first event's is 0.

    The error of a level is made up for by the next one, so the time that the levels add up to never drifts: it trails the
    true time by less than the quantisation step of the last gap, and depends on the events so far only.
    """
    seconds, levels, now = level_seconds(num_levels), [], None
    for timestamp in timestamps:
        moment = int(timestamp)
        if now is None:
            now = moment
        level = max(bisect.bisect_right(seconds, moment - now) - 1, 0)
        now += seconds[level]
        levels.append(level)
    return levels


def pack(item, action, level, config: ModelConfig):
    """Token of an event; takes and returns integers or integer tensors and arrays alike."""
    return item + config.num_items * (action + config.num_actions * level)


def user_token(user: int, config: ModelConfig) -> int:
    """Token of the user with that table row (0: unknown)."""
    return config.user_token_base + user


def unpack(tokens: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """tokens (...) int64 -> item, action, level, user, each (...) int64.

    A user token has item = action = level = 0; an event has user = -1.
    """
    is_user = tokens >= config.user_token_base
    event = tokens.masked_fill(is_user, 0)
    item, rest = event % config.num_items, event // config.num_items
    user = torch.where(is_user, tokens - config.user_token_base, -1)
    return item, rest % config.num_actions, rest // config.num_actions, user


def encode_history(
    items: Sequence[int], actions: Sequence[int], timestamps: Sequence[float], user: int, config: ModelConfig, slide: int = 1
) -> list[int]:
    """One history, oldest first, as tokens: the user token, then the last events, at most `config.max_history`.

    Levels are computed before the history is cut, so that a user's tokens stay the same while the history grows. A longer one
    loses its oldest events `slide` at a time: its tokens, and all that a serving engine has cached for them, then stay the same
    for `slide` events more, where a window that moves with every event would be another prefix each time.
    """
    levels = quantise_gaps(timestamps, config.num_time_levels)
    start = -(-max(len(levels) - config.max_history, 0) // slide) * slide
    events = [pack(int(i), int(a), lv, config) for i, a, lv in zip(items[start:], actions[start:], levels[start:])]
    return [user_token(user, config), *events] if config.num_users else events
