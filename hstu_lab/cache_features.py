"""What a cache can know of its rows and users, kept up to date access by access, and the predictor's features made of it.

Three kinds. *The row's own past*: how recently and how often it was asked for, and by whom last; how often the rows numbered next
to it were, which often came into the catalogue together with it. *Its holders*: a row lies in the
last requests of several users and is wanted again when the first of them returns; how likely a user is to return within some
accesses follows from counts of how long users of his pace stayed away (by accesses and by seconds), and how likely the row is to
be asked for again then from its place in his last request. *What it follows*: which rows the same user asks for after which,
counted as they come; a row is expected as often as the users of the moment have just asked for rows that it follows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit

HORIZONS = (0.5, 2.0, 8.0)
"""A holder's return is foretold within these multiples of the capacity, in accesses."""
FADES = (30.0, 200.0, 1000.0)
"""Accesses after which what a user's step lets expect has lost all but 1/e of its weight."""
FEATURES = (
    "accesses since the last use", "the gap before", "the gap before that", "uses, decayed over 32 accesses",
    "uses, decayed over 128", "uses, decayed over 512", "uses, decayed over 2,048", "uses, decayed over 8,192",
    "uses, decayed over 32,768", "uses, decayed over 131,072", "uses an access, in all",
    "place in the last user's request", "length of that user's request before", "accesses between that user's requests",
    "accesses since that user's last request", "that user has not returned since", "that user has returned once since",
    "seconds since that user's last request", "requests of that user so far", "accesses since first seen",
    "place in the request, in tens", "seconds since the last use", "seconds of the gap before",
    "accesses since the request of the user before him who asked", "he has not returned since", "he has returned once since",
    "place in his request, in tens", "accesses between his requests", "seconds since his last request",
    "expected after users' last steps, 30 accesses", "expected, 200 accesses", "expected, 1,000 accesses",
    "expected against its share of uses, 30 accesses", "expected against its share, 200 accesses",
    "holders expected back within 0.5 x capacity", "holders back within 2 x", "holders back within 8 x",
    "the likeliest holder, 2 x", "holders",
    "holders expected back by the clock, 0.5 x capacity", "holders back by the clock, 2 x", "holders back by the clock, 8 x",
    "that user's last gap", "the one before", "seconds of it", "seconds of the one before", "seconds between his requests",
    "uses of the rows nearby, decayed over 1,024 accesses", "uses nearby, decayed over 16,384",
    "to come in the request under way", "accesses until then", "place of the request under way", "1 / accesses until then",
)  # fmt: skip
F = len(FEATURES)
HOLDERS = 16
DECAYS = 7
"""Uses of a row are counted with this many half-lives: 32 accesses, and four times as many from one to the next."""
NEARBY, NEAR_HALF_LIVES = 16, (1024, 16384)
"""Rows numbered alike but for the remainder by NEARBY are neighbours; their uses are counted together, with these half-lives."""
FAR = 1e6
PACES, BINS, QUARTERS = 24, 100, 4
"""Users are told apart by the logarithm of their usual gap; the time until they return is counted in quarter octaves."""
REMEMBERED = 32
"""Last rows of a user, new to him, whose expectations are taken back when he asks for the row they foretold."""
FOLLOWING = 20
"""A row follows another if the same user asks for it within so many new rows."""
PAIRS, MET = 2**27, 2**26
"""Entries of the tables of successors (uint16), and of what a user has had (uint8), at most: beyond, columns are shared."""

jit = njit(cache=True, nogil=True, fastmath=True)

LAST, GAP, GAP_BEFORE, USES, FIRST, PLACE, VISIT, AT, SECONDS, PLACE_BEFORE, VISIT_BEFORE = range(11)
VISITS, ASKED, PACE, LENGTH, WHEN, SO_FAR, PACE_SECONDS, AWAY, AWAY_BEFORE, SECONDS_AWAY, SECONDS_AWAY_BEFORE = range(11)
WHO, SHIFT, A_SECOND, EXPECTED_AT, CAPACITY = range(5)


class Knowledge(NamedTuple):
    """Of N rows and U users. row (N, 11), user (U, 11): fields named above. counts (N, DECAYS), counted (N,): decayed uses, and
    when; near (N / NEARBY + 1, 3): the same of neighbours. asked_by (N, 2): the last user, the one before. holder (N, HOLDERS)
    users, held (N, HOLDERS, 2): at which of his requests, at which place. gaps, chance (2, PACES, BINS + 1): returns by pace and
    gap (accesses, seconds) and requests in all; cumulated. stayed (2, 10, 100): by length and place, rows asked for again at the
    next request, of how many; stays (10, 100) the ratio. follows (N, C): how often one row followed another. forerun (N,).
    expected (3, C). met (U, M): what a user has had. path (U, REMEMBERED, 2): his last new rows, and when; steps (U,). back
    (U, 7): chances of his return, by accesses and by seconds, as of the access in the last column. now (5,): fields named above.
    """

    row: np.ndarray
    user: np.ndarray
    counts: np.ndarray
    counted: np.ndarray
    near: np.ndarray
    asked_by: np.ndarray
    holder: np.ndarray
    held: np.ndarray
    gaps: np.ndarray
    chance: np.ndarray
    stayed: np.ndarray
    stays: np.ndarray
    follows: np.ndarray
    forerun: np.ndarray
    expected: np.ndarray
    met: np.ndarray
    path: np.ndarray
    steps: np.ndarray
    back: np.ndarray
    now: np.ndarray


def new_knowledge(num_items: int, users: int, capacity: int) -> Knowledge:
    """Nothing known yet."""
    columns, had = max(min(num_items, PAIRS // num_items), 1), max(min(num_items, MET // users), 1)
    row = np.zeros((num_items, 11))
    row[:, LAST], row[:, GAP], row[:, GAP_BEFORE], row[:, FIRST], row[:, SECONDS] = -1e5, FAR, FAR, -1, 1e9
    chance = np.full((2, PACES, BINS + 1), 1e-3)
    chance[:, :, BINS] = 1
    stayed = np.ones((2, 10, 100))
    stayed[1] = 2
    return Knowledge(
        row, np.zeros((users, 11)), np.zeros((num_items, DECAYS)), np.zeros(num_items),
        np.zeros((num_items // NEARBY + 1, 3)), np.full((num_items, 2), -1), np.full((num_items, HOLDERS), -1),
        np.zeros((num_items, HOLDERS, 2)), np.zeros((2, PACES, BINS + 1)), chance, stayed, np.full((10, 100), 0.5),
        np.zeros((num_items, columns), np.uint16), np.zeros(num_items, np.float32), np.zeros((3, columns), np.float32),
        np.zeros((users, had), np.uint8), np.zeros((users, REMEMBERED, 2)), np.zeros(users, np.int64),
        np.full((users, 7), -1.0), np.array([0, -1, 1, 0, capacity], np.float64),
    )  # fmt: skip


@jit
def _log(x):
    return math.log2(x + 1.0)


@jit
def _bin(x):
    return min(int(QUARTERS * _log(x)), BINS - 1)


@jit
def _pace(visits, gap):
    return min(int(_log(gap)), PACES - 1) if visits >= 2 else 0


# ---- what an access tells


@jit
def _decayed(count, accesses, half_life):
    return count * math.exp2(-accesses / half_life)


@jit
def _start_of_request(k, t, u, now, seconds):
    """User u asks again, at access t and second `now`, `seconds` after the request before of whomever."""
    user = k.user[u]
    length_before = k.user[int(k.now[WHO]), SO_FAR]
    if length_before > 0:
        k.now[A_SECOND] += 0.0005 * (max(seconds, 0.0) / length_before - k.now[A_SECOND])
    k.now[WHO], k.now[SHIFT] = u, -1
    again = user[VISITS] >= 2
    if user[VISITS] > 0:
        away, seconds_away, length = t - user[ASKED], max(now - user[WHEN], 0.0), int(user[SO_FAR])
        k.gaps[0, _pace(user[VISITS], user[PACE]), _bin(away)] += 1
        k.gaps[1, _pace(user[VISITS], user[PACE_SECONDS]), _bin(seconds_away)] += 1
        k.stayed[1, min(length, 99) // 10, : min(length, 100)] += 1
        share = 0.5 if again else 1.0
        user[PACE] += share * (away + length - user[PACE])
        user[PACE_SECONDS] += share * (seconds_away - user[PACE_SECONDS])
        user[LENGTH] = length
        user[AWAY_BEFORE], user[SECONDS_AWAY_BEFORE] = user[AWAY], user[SECONDS_AWAY]
        user[AWAY], user[SECONDS_AWAY] = away, seconds_away
    user[VISITS] += 1
    user[SO_FAR] = 0
    k.gaps[0, _pace(user[VISITS], user[PACE]), BINS] += 1
    k.gaps[1, _pace(user[VISITS], user[PACE_SECONDS]), BINS] += 1


@jit
def _cumulate(k):
    for kind in range(2):
        for pace in range(PACES):
            total = 0.0
            for b in range(BINS):
                total += k.gaps[kind, pace, b]
                k.chance[kind, pace, b] = total
            k.chance[kind, pace, BINS] = max(k.gaps[kind, pace, BINS], total) + 1.0
    k.stays[:] = np.minimum(k.stayed[0] / k.stayed[1], 1.0)


@jit
def _hold(k, i, u):
    """Row i lies in the request of user u, in the place of the holder who has been away longest if there is no room."""
    user, place, longest = k.user, 0, 1e18
    for s in range(HOLDERS):
        h = k.holder[i, s]
        if h == u:
            if k.held[i, s, 0] == user[u, VISITS] - 1:
                k.stayed[0, min(int(user[u, LENGTH]), 99) // 10, min(int(k.held[i, s, 1]), 99)] += 1
                if k.now[SHIFT] < 0:
                    k.now[SHIFT] = k.held[i, s, 1] - user[u, SO_FAR]
            place = s
            break
        since = -2.0 if h < 0 else user[h, ASKED] if k.held[i, s, 0] == user[h, VISITS] else -1.0
        if since < longest:
            longest, place = since, s
    k.holder[i, place] = u
    k.held[i, place, 0], k.held[i, place, 1] = user[u, VISITS], user[u, SO_FAR]


@jit
def _expect(k, t, i, u):
    """User u has asked for row i for the first time: rows that followed it with others are expected, what was expected came."""
    columns, width = k.follows.shape[1], k.met.shape[1]
    if k.met[u, i % width]:
        return
    k.met[u, i % width] = 1
    before, c = k.now[EXPECTED_AT], i % columns
    k.now[EXPECTED_AT] = t
    for back in range(min(k.steps[u], REMEMBERED)):
        s = (k.steps[u] - 1 - back) % REMEMBERED
        j = int(k.path[u, s, 0])
        chance = k.follows[j, c] / (k.forerun[j] + 3)
        for f in range(3):
            k.expected[f, c] -= chance * math.exp(-(before - k.path[u, s, 1]) / FADES[f])
        if back < FOLLOWING and k.follows[j, c] < 65535:
            k.follows[j, c] += 1
    s = k.steps[u] % REMEMBERED
    k.path[u, s, 0], k.path[u, s, 1] = i, t
    k.steps[u] += 1
    k.forerun[i] += 1
    share = np.float32(1.0) / (k.forerun[i] + 3)
    follows, met = k.follows[i], k.met[u]
    for f in range(3):
        fade, expected = np.float32(math.exp(-(t - before) / FADES[f])), k.expected[f]
        if width == columns:
            for j in range(columns):
                expected[j] = expected[j] * fade + follows[j] * share * np.float32(1 - met[j])
        else:
            for j in range(columns):
                expected[j] = expected[j] * fade + follows[j] * share


@jit
def observe(k, t, i, u, now, starts, seconds):
    """Access t: user u asks for row i at second `now`. starts: a request starts, `seconds` after the access before."""
    if starts:
        _start_of_request(k, t, u, now, seconds)
    if t % 1000 == 0:
        _cumulate(k)
    row, user = k.row[i], k.user[u]
    if row[FIRST] < 0:
        row[FIRST] = t
    row[SECONDS] = max(now - row[AT], 0.0)
    row[AT] = now
    row[GAP_BEFORE] = row[GAP]
    row[GAP] = min(t - row[LAST], FAR)
    row[LAST] = t
    row[USES] += 1
    for d in range(DECAYS):
        k.counts[i, d] = _decayed(k.counts[i, d], t - k.counted[i], 32 << 2 * d) + 1
    k.counted[i] = t
    near = k.near[i // NEARBY]
    for d in range(2):
        near[d] = _decayed(near[d], t - near[2], NEAR_HALF_LIVES[d]) + 1
    near[2] = t
    if k.asked_by[i, 0] != u:
        k.asked_by[i, 1], row[PLACE_BEFORE], row[VISIT_BEFORE] = k.asked_by[i, 0], row[PLACE], row[VISIT]
        k.asked_by[i, 0] = u
    row[PLACE], row[VISIT] = user[SO_FAR], user[VISITS]
    _hold(k, i, u)
    user[SO_FAR] += 1
    user[ASKED], user[WHEN] = t, now
    _expect(k, t, i, u)


# ---- what it lets expect


@jit
def _past(chance, away):
    """Of the users of a pace, how many had returned after `away`: linear between the edges of the bins."""
    at = QUARTERS * _log(away)
    b = min(int(at), BINS - 1)
    below = chance[b - 1] if b > 0 else 0.0
    return below + (chance[b] - below) * min(at - b, 1.0)


@jit
def _return(k, u, t, now):
    """back (7,) of user u, worked out once an access."""
    user, back = k.user[u], k.back[u]
    if back[6] == t:
        return back
    back[6] = t
    for kind in range(2):
        if kind == 0:
            chance, away, a_step = k.chance[0, _pace(user[VISITS], user[PACE])], t - user[ASKED], 1.0
        else:
            chance, away = k.chance[1, _pace(user[VISITS], user[PACE_SECONDS])], max(now - user[WHEN], 0.0)
            a_step = k.now[A_SECOND]
        past = _past(chance, away)
        left = max(chance[BINS] - past, 1e-9)
        for h in range(3):
            back[3 * kind + h] = min((_past(chance, away + a_step * HORIZONS[h] * k.now[CAPACITY]) - past) / left, 1.0)
    return back


@jit
def _holders(x, y, k, i, t, now):
    """x (8,): features of row i's holders; y (4,): of its place in the request under way."""
    x[:] = y[:] = 0
    y[1] = 2.0
    current = int(k.now[WHO])
    for s in range(HOLDERS):
        u = k.holder[i, s]
        if u < 0:
            continue
        user, visit, place = k.user[u], k.held[i, s, 0], k.held[i, s, 1]
        if u == current and user[VISITS] == visit + 1:
            until = place - k.now[SHIFT] - (user[SO_FAR] - 1)
            if until > 0 and k.now[SHIFT] >= 0:
                y[0], y[1], y[3] = 1.0, _log(until) / 4, 1.0 / until
            continue
        if user[VISITS] != visit:
            continue
        length = user[LENGTH] if u == current else user[SO_FAR]
        stays = k.stays[min(int(length), 99) // 10, min(int(place), 99)]
        x[4] += 1
        back = _return(k, u, t, now)
        for h in range(3):
            x[h] += stays * back[h]
            x[5 + h] += stays * back[3 + h]
        x[3] = max(x[3], stays * back[1])
    for h in range(8):
        x[h] = _log(x[h]) / 2 if h == 4 else _log(100 * x[h]) / 4
    y[2] = k.user[current, SO_FAR] / 50


@jit
def features(x, k, i, t, now):
    """x (F,) of row i at access t and second `now`."""
    row, u = k.row[i], k.asked_by[i, 0]
    user = k.user[u]
    x[0] = _log(t - row[LAST]) / 8
    x[1] = _log(row[GAP]) / 8
    x[2] = _log(row[GAP_BEFORE]) / 8
    for d in range(DECAYS):
        x[3 + d] = _log(8 * _decayed(k.counts[i, d], t - k.counted[i], 32 << 2 * d)) / 4
    x[10] = _log(1e5 * row[USES] / (t + 1.0)) / 8
    x[11] = _log(row[PLACE]) / 4
    x[12] = _log(user[LENGTH]) / 4
    x[13] = _log(user[PACE]) / 8
    x[14] = _log(t - user[ASKED]) / 8
    x[15] = 1.0 if user[VISITS] == row[VISIT] else 0.0
    x[16] = 1.0 if user[VISITS] == row[VISIT] + 1 else 0.0
    x[17] = _log(max(now - user[WHEN], 0.0)) / 8
    x[18] = _log(user[VISITS]) / 4
    x[19] = _log(t - row[FIRST]) / 8
    x[20] = min(row[PLACE] / 50 - 0.2, 2.0)
    x[21] = _log(max(now - row[AT], 0.0)) / 8
    x[22] = _log(row[SECONDS]) / 8
    for g in range(AWAY, SECONDS_AWAY_BEFORE + 1):
        x[42 + g - AWAY] = _log(user[g]) / 8
    x[46] = _log(user[PACE_SECONDS]) / 8
    near = k.near[i // NEARBY]
    for d in range(2):
        x[47 + d] = _log(8 * _decayed(near[d], t - near[2], NEAR_HALF_LIVES[d])) / 4
    u = k.asked_by[i, 1]
    x[23:29] = 2.0
    x[24] = x[25] = 0.0
    if u >= 0:
        user = k.user[u]
        x[23] = _log(t - user[ASKED]) / 8
        x[24] = 1.0 if user[VISITS] == row[VISIT_BEFORE] else 0.0
        x[25] = 1.0 if user[VISITS] == row[VISIT_BEFORE] + 1 else 0.0
        x[26] = min(row[PLACE_BEFORE] / 50 - 0.2, 2.0)
        x[27] = _log(user[PACE]) / 8
        x[28] = _log(max(now - user[WHEN], 0.0)) / 8
    share, c = math.log2((row[USES] + 1.0) / (t + 1.0)), i % k.follows.shape[1]
    for f in range(3):
        soon = max(k.expected[f, c], np.float32(0.0)) * math.exp(-(t - k.now[EXPECTED_AT]) / FADES[f])
        x[29 + f] = _log(1000 * soon) / 4
        if f < 2:
            x[32 + f] = (math.log2(soon + 1e-3) - share) / 4
    _holders(x[34:42], x[49:], k, i, t, now)
