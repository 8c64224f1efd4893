"""What the cache knows of rows and users, on traces small enough to work out by hand."""

import math

import numpy as np
import pytest

from hstu_lab.cache_features import FEATURES, F, features, new_knowledge, observe

AT = {name: at for at, name in enumerate(FEATURES)}


def watched(accesses, items=12, users=4, capacity=4, knowledge=None):
    """Knowledge after (item, user, second) accesses, and a function that gives one feature of a row."""
    known = new_knowledge(items, users, capacity) if knowledge is None else knowledge
    before = None
    for t, (i, u, now) in enumerate(accesses):
        starts = before is None or (u, now) != before[1:]
        observe(known, t, i, u, now, starts, now - before[2] if before else 0)
        before = i, u, now
    x = np.zeros(F, np.float32)

    def feature(name, row, t=None):
        features(x, known, row, len(accesses) if t is None else t, before[2])
        assert np.isfinite(x).all()
        return x[AT[name]]

    return known, feature


def test_names_are_distinct_and_as_many_as_values():
    assert len(AT) == F
    watched([(0, 0, 0)])[1](FEATURES[0], 11)  # a row never asked for has features too


def test_rows_to_come_in_the_request_under_way():
    """User 0 asked for rows 0 to 5; back for rows 2, 3, ..., he has asked for two of them."""
    first = [(i, 0, 0) for i in range(6)]
    _, feature = watched([*first, (9, 1, 1), (2, 0, 2), (3, 0, 2)])
    assert [feature("to come in the request under way", i) for i in (1, 3, 4, 5, 9)] == [0, 0, 1, 1, 0]
    assert [feature("1 / accesses until then", i) for i in (4, 5)] == [1, 0.5]
    assert feature("accesses until then", 5) == pytest.approx(math.log2(3) / 4)
    assert feature("that user has returned once since", 4) == 1


def test_what_followed_a_row_is_expected_and_no_longer_once_it_came():
    asked = [(1, 0, 0), (2, 0, 1), (3, 1, 2), (1, 2, 3)]
    _, feature = watched(asked)
    soon = "expected after users' last steps, 30 accesses"
    assert feature(soon, 2) > feature(soon, 3)
    _, feature = watched([*asked, (2, 2, 4)])
    assert feature(soon, 2) < 0.4 * watched(asked)[1](soon, 2)
    # User 0 has had row 2: his asking for another row after which it came does not let it be expected.
    _, feature = watched([(4, 1, 0), (2, 1, 1), (2, 0, 2), (4, 0, 3)])
    assert feature(soon, 2) == pytest.approx(0, abs=0.05)


def test_holders_who_return_quickly_make_a_row_likely():
    """User 0 asks for row 0 every fourth access, user 1 for row 1 every hundredth or so; others fill the time."""
    accesses, held = [], [0, 0]
    for t in range(4000):
        if t % 4 == 0:
            accesses.append((0, 0, t))
        elif t % 101 == 1:
            accesses.append((1, 1, t))
        else:
            accesses.append((2 + t % 10, 2 + t % 2, t))
    _, feature = watched(accesses)
    held = [feature("holders expected back within 0.5 x capacity", i) for i in (0, 1)]
    assert held[0] > 2 * held[1]
    by_the_clock = [feature("holders expected back by the clock, 0.5 x capacity", i) for i in (0, 1)]
    assert by_the_clock[0] > 2 * by_the_clock[1]


def test_a_user_s_gaps():
    _, feature = watched([(0, 0, 100), (1, 1, 110), (2, 1, 110), (0, 0, 130), (1, 1, 131), (0, 0, 190)])
    assert feature("that user's last gap", 0) == pytest.approx(math.log2(3) / 8)
    assert feature("the one before", 0) == pytest.approx(math.log2(4) / 8)
    assert feature("seconds of it", 0) == pytest.approx(math.log2(61) / 8)
    assert feature("seconds of the one before", 0) == pytest.approx(math.log2(31) / 8)


def test_rows_numbered_alike_share_a_count():
    _, feature = watched([(3, 0, 0), (9, 0, 1), (20, 0, 2)], items=40)
    near = "uses nearby, decayed over 16,384"
    assert feature(near, 5) == pytest.approx(math.log2(1 + 8 * 2) / 4, rel=1e-3)
    assert feature(near, 31) == pytest.approx(math.log2(1 + 8 * 1) / 4, rel=1e-3)
    assert feature(near, 35) == 0


def test_large_tables_share_columns(monkeypatch):
    import hstu_lab.cache_features as module

    monkeypatch.setattr(module, "PAIRS", 64)
    monkeypatch.setattr(module, "MET", 16)
    known, feature = watched([(i % 12, i % 4, i) for i in range(200)])
    assert known.follows.shape == (12, 5)
    assert known.met.shape == (4, 4)
    assert all(np.isfinite(feature("expected, 1,000 accesses", i)) for i in range(12))
