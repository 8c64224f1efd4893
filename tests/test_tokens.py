"""A token says everything and gives it back; quantised gaps never drift; a growing history keeps its prefix."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hstu_lab.config import PRESETS, preset
from hstu_lab.tokens import LONGEST_GAP, encode_history, level_seconds, pack, quantise_gaps, unpack, user_token

CONFIGS = [preset("tiny"), preset("tiny").replace(num_users=0), preset("gr-3b")]


@pytest.mark.parametrize("config", CONFIGS, ids=["tiny", "no users", "gr-3b"])
@given(data=st.data())
def test_tokens_give_back_what_was_packed(config, data):
    below = [config.num_items, config.num_actions, config.num_time_levels]
    rows = data.draw(st.lists(st.tuples(*(st.integers(0, limit - 1) for limit in below)), min_size=1, max_size=8))
    tokens = [pack(item, action, level, config) for item, action, level in rows]
    assert all(0 <= token < config.user_token_base for token in tokens)
    item, action, level, user = unpack(torch.tensor(tokens), config)
    assert list(zip(item.tolist(), action.tolist(), level.tolist())) == rows
    assert user.tolist() == [-1] * len(rows)


def test_distinct_events_have_distinct_tokens():
    config = preset("tiny").replace(num_items=3, num_time_levels=4)
    tokens = [
        pack(item, action, level, config)
        for level in range(config.num_time_levels)
        for action in range(config.num_actions)
        for item in range(config.num_items)
    ]
    assert tokens == list(range(config.user_token_base))


def test_numbers_arrays_and_tensors_pack_alike():
    config = preset("small")
    columns = np.array([[5, 1, 300], [2000, 6, 511], [1, 0, 0]]).T
    one_by_one = [pack(*row, config) for row in columns.T.tolist()]
    assert pack(*columns, config).tolist() == one_by_one
    assert pack(*torch.tensor(columns), config).tolist() == one_by_one


def test_a_bare_item_is_its_own_token():
    assert pack(17, 0, 0, preset("tiny")) == 17


def test_user_tokens_give_back_the_user_and_no_event():
    config = preset("tiny")
    tokens = torch.tensor([user_token(0, config), user_token(300, config), 7])
    item, action, level, user = unpack(tokens, config)
    assert user.tolist() == [0, 300, -1]
    assert item.tolist() == [0, 0, 7]
    assert action.tolist() == level.tolist() == [0, 0, 0]
    assert tokens.max() == config.token_limit - 1


@pytest.mark.parametrize("num_levels", [2, 3, 16, *sorted({p.num_time_levels for p in PRESETS.values()})])
def test_levels_rise_from_zero_to_the_longest_gap(num_levels):
    seconds = level_seconds(num_levels)
    assert len(seconds) == num_levels
    assert seconds[:2] == (0, 1)
    assert all(a < b for a, b in itertools.pairwise(seconds))
    if num_levels > 2:
        assert seconds[-1] == LONGEST_GAP


GAPS = st.lists(st.one_of(st.integers(0, 90), st.integers(0, LONGEST_GAP)), max_size=60)


@given(gaps=GAPS, start=st.integers(0, 2**31), num_levels=st.sampled_from([2, 16, 64, 512]))
def test_quantised_gaps_never_drift(gaps, start, num_levels):
    """The quantised clock is never ahead, and behind by less than the step above the level it just took."""
    times = start + np.cumsum([0, *gaps])
    seconds, now = level_seconds(num_levels), start
    for true, level in zip(times.tolist(), quantise_gaps(times, num_levels)):
        now += seconds[level]
        assert now <= true
        if level + 1 < num_levels:
            assert true - now < seconds[level + 1] - seconds[level]


def test_levels_rounded_one_by_one_would_drift():
    """What the correction is for: equal gaps between two levels, 1,000 times over."""
    seconds = level_seconds(512)
    gap = next(b - 1 for a, b in itertools.pairwise(seconds) if b - a > 60)
    times = np.arange(1001) * gap
    below = max(s for s in seconds if s <= gap)
    total = sum(seconds[level] for level in quantise_gaps(times, 512))
    assert times[-1] - 1000 * below > 60_000
    assert times[-1] - total < 1000


def test_the_first_level_is_zero_and_no_events_have_none():
    assert quantise_gaps([], 512) == []
    assert quantise_gaps([1_700_000_000.9], 512) == [0]
    assert quantise_gaps([1_700_000_000, 1_700_000_000, 1_700_000_003], 512) == [0, 0, 3]


def history(length, config, seed=0):
    rng = np.random.default_rng(seed)
    times = 1_700_000_000 + np.cumsum(rng.integers(0, 100_000, length))
    return rng.integers(1, config.num_items, length), rng.integers(1, config.num_actions, length), times


@pytest.mark.parametrize("num_users", [0, 301])
def test_an_encoded_history_holds_the_user_and_every_event(num_users):
    config = preset("tiny").replace(num_users=num_users)
    items, actions, times = history(20, config)
    tokens = encode_history(items, actions, times, 7, config)
    assert all(type(token) is int for token in tokens)
    events = tokens[config.num_context :]
    item, action, level, _ = unpack(torch.tensor(events), config)
    assert (item.tolist(), action.tolist()) == (items.tolist(), actions.tolist())
    assert level.tolist() == quantise_gaps(times, config.num_time_levels)
    assert tokens[: config.num_context] == [user_token(7, config)][: config.num_context]
    assert len(encode_history([], [], [], 7, config)) == config.num_context


def test_a_growing_history_keeps_its_prefix():
    config = preset("tiny")
    items, actions, times = history(config.max_history, config)
    whole = encode_history(items, actions, times, 7, config)
    for n in range(len(items)):
        assert encode_history(items[:n], actions[:n], times[:n], 7, config) == whole[: n + 1]


@pytest.mark.parametrize("column", [0, 1, 2])
def test_any_change_of_an_event_changes_its_token_and_none_before(column):
    config = preset("tiny")
    columns = history(20, config)
    before = encode_history(*columns, 7, config)
    items, actions, times = columns
    other = (items[12] % 500 + 1, actions[12] % 6 + 1, (times[11] + times[12]) // 2)
    columns[column][12] = other[column]
    after = encode_history(*columns, 7, config)
    assert before[:13] == after[:13]
    assert before[13] != after[13]


def test_a_long_history_is_cut_after_its_gaps_are_known():
    config = preset("tiny")
    items, actions, times = history(200, config)
    tokens = encode_history(items, actions, times, 7, config)
    assert len(tokens) == 1 + config.max_history
    whole = encode_history(items, actions, times, 7, config.replace(max_seq_len=300))
    assert tokens == [whole[0], *whole[-config.max_history :]]
    levels = unpack(torch.tensor(tokens[1:]), config)[2]
    assert levels[0] > 0, "the first event that is kept still knows its gap"


def test_a_window_that_slides_in_steps_keeps_its_beginning():
    """Between two jumps every visit's tokens begin with the last visit's; a jump drops `slide` events at once."""
    config = preset("tiny")
    items, actions, times = history(200, config)
    visits = [encode_history(items[:n], actions[:n], times[:n], 7, config, slide=6) for n in range(1, 200)]
    jumps = [n for n, (old, new) in enumerate(itertools.pairwise(visits), 2) if new[: len(old)] != old]
    assert jumps == list(range(config.max_history + 1, 200, 6))
    lengths = {len(tokens) - 1 for tokens in visits[config.max_history :]}
    assert lengths == set(range(config.max_history - 5, config.max_history + 1))
    whole = encode_history(items, actions, times, 7, config.replace(max_seq_len=300))
    assert all(tokens[1:] == whole[n - len(tokens) + 2 : n + 1] for n, tokens in enumerate(visits, 1))
    assert config.slide == 6
