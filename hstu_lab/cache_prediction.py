"""A cache policy that learns on line when each row will be asked for again, from what a recommender sees of its users.

`play(trace, capacity)` runs the predictor beside every classic policy of `cache_policies`, all demand-only, and one real cache
that follows the predictor while it helps and the best classic policy while it does not (its `Played` says when).

The predictor is a network of one hidden layer on `FEATURES`: how recently and how often a row was asked for, who asked last,
where in that user's request it stood, how soon that user tends to return and whether he has meanwhile. It regresses the logarithm
of the accesses until the row's next use, cut at `HORIZON` times the capacity (a relaxed Belady boundary: Song et al., Learning
Relaxed Belady, NSDI 2020), on rows sampled as they are asked for and as they lie in the cache; the label comes with the next
use, or with the end of the horizon. On a miss the row of the longest prediction goes, of `SAMPLE` and the one asked for.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numba import njit

from hstu_lab import cache_policies
from hstu_lab.cache_policies import INSIDE, NUMBER_OF_POLICIES, POLICIES, VICTIM, new_state, step
from hstu_lab.cache_traces import Trace

FEATURES = (
    "accesses since the last use", "the gap before", "the gap before that", "uses, decayed over 128 accesses",
    "uses, decayed over 1,024", "uses, decayed over 8,192", "uses, decayed over 65,536", "uses an access, in all",
    "place in the last user's request", "length of that user's request before", "accesses between that user's requests",
    "accesses since that user's last request", "that user has not returned since", "that user has returned once since",
    "seconds since that user's last request", "requests of that user so far", "accesses since first seen",
    "place in the request, in tens", "seconds since the last use", "seconds of the gap before",
    "accesses since the request of the user before him who asked", "he has not returned since", "he has returned once since",
    "place in his request, in tens", "accesses between his requests", "seconds since his last request",
)  # fmt: skip
F, HIDDEN = len(FEATURES), 32
WEIGHTS = HIDDEN * (F + 2) + 1
HORIZON = 10
"""Labels are cut at this many accesses times the capacity."""
SAMPLE = 32
LEARNING_RATE = 2e-3
REHEARSED = 300_000
"""A short first part is gone through again until this many accesses have been learned from."""
BATCH = 64
SMOOTHING = 0.005
"""Decisions use a running mean of the weights, to which each step adds this share."""
DECAYS = 4
FAR = 1e6

jit = njit(cache=True, nogil=True, fastmath=True)


@dataclasses.dataclass(frozen=True)
class Played:
    """One run over a trace. hits (T,) bool of the real cache; shadow {policy: (T,) bool} of every policy on its own, "predicted"
    included; leader (T,) int8: which was followed, an index into `policies`. outlook (N,) float32: for each row, after the last
    access, minus the logarithm of the accesses predicted until its next use (-inf for a row never seen): what
    `hot_cache.HotCache.prioritise` takes."""

    trace: Trace
    capacity: int
    hits: np.ndarray
    shadow: dict[str, np.ndarray]
    leader: np.ndarray
    outlook: np.ndarray
    policies: tuple[str, ...] = (*POLICIES, "predicted")

    @property
    def second_half(self) -> slice:
        return slice(len(self.hits) // 2, len(self.hits))

    def report(self, part: slice | None = None) -> str:
        """What was followed, in words."""
        led = self.leader[self.second_half if part is None else part]
        share = {self.policies[k]: float((led == k).mean()) for k in np.unique(led)}
        predicted = share.pop("predicted", 0.0)
        others = [f"{cache_policies.NAMES[name]} {value:.0%}" for name, value in sorted(share.items(), key=lambda x: -x[1])]
        if predicted > 0.995 or not others:
            return "prediction led all the time"
        return f"prediction led {predicted:.0%} of the time; where it did not help the cache followed {', '.join(others[:3])}"


@jit
def _log(x):
    return math.log2(x + 1.0)


@jit
def _features(x, i, t, now, row, counts, counted, last_user, user):
    """x (F,) of row i at access t. row, user: per-row and per-user numbers, as `_play` keeps them."""
    last, gap1, gap2, uses, first, place, visit, at, wall, place2, visit2 = row[i]
    u = last_user[i, 0]
    visits, user_last, user_gap, user_length, user_time = user[u, 0], user[u, 1], user[u, 2], user[u, 3], user[u, 4]
    x[0] = _log(t - last) / 8
    x[1] = _log(gap1) / 8
    x[2] = _log(gap2) / 8
    for k in range(DECAYS):
        x[3 + k] = _log(8 * counts[i, k] * math.exp2(-(t - counted[i]) / (1 << (7 + 3 * k)))) / 4
    x[7] = _log(1e5 * uses / (t + 1.0)) / 8
    x[8] = _log(place) / 4
    x[9] = _log(user_length) / 4
    x[10] = _log(user_gap) / 8
    x[11] = _log(t - user_last) / 8
    x[12] = 1.0 if visits == visit else 0.0
    x[13] = 1.0 if visits == visit + 1 else 0.0
    x[14] = _log(max(now - user_time, 0.0)) / 8
    x[15] = _log(visits) / 4
    x[16] = _log(t - first) / 8
    x[17] = min(place / 50 - 0.2, 2.0)
    x[18] = _log(max(now - at, 0.0)) / 8
    x[19] = _log(wall) / 8
    u = last_user[i, 1]
    if u < 0:
        x[20:] = 2.0
        x[21] = x[22] = 0.0
        return
    x[20] = _log(t - user[u, 1]) / 8
    x[21] = 1.0 if user[u, 0] == visit2 else 0.0
    x[22] = 1.0 if user[u, 0] == visit2 + 1 else 0.0
    x[23] = min(place2 / 50 - 0.2, 2.0)
    x[24] = _log(user[u, 2]) / 8
    x[25] = _log(max(now - user[u, 4], 0.0)) / 8


@jit
def _predict(x, w, h):
    """log2(accesses until the next use + 1) / 8; leaves the hidden layer in h."""
    y = w[WEIGHTS - 1]
    for j in range(HIDDEN):
        a = w[HIDDEN * F + j]
        for k in range(F):
            a += w[j * F + k] * x[k]
        a = a if a > 0 else np.float32(0.05) * a
        h[j] = a
        y += w[HIDDEN * (F + 1) + j] * a
    return y


@jit
def _learn(x, target, w, h, g):
    """Add the gradient of half the squared error to g."""
    e = _predict(x, w, h) - np.float32(target)
    for j in range(HIDDEN):
        down = e * w[HIDDEN * (F + 1) + j] * (np.float32(1.0) if h[j] > 0 else np.float32(0.05))
        for k in range(F):
            g[j * F + k] += down * x[k]
        g[HIDDEN * F + j] += down
        g[HIDDEN * (F + 1) + j] += e * h[j]
    g[WEIGHTS - 1] += e


@jit
def _adam(w, g, m, v, rate, steps, count):
    steps[0] += 1
    c1 = np.float32(1 - 0.9 ** min(steps[0], 1000))
    c2 = np.float32(1 - 0.999 ** min(steps[0], 20000))
    for p in range(WEIGHTS):
        d = g[p] / np.float32(count)
        m[p] = np.float32(0.9) * m[p] + np.float32(0.1) * d
        v[p] = np.float32(0.999) * v[p] + np.float32(0.001) * d * d
        w[p] -= np.float32(rate) * (m[p] / c1) / (math.sqrt(v[p] / c2) + np.float32(1e-6))
        g[p] = 0


@jit
def _play(
    items, users, times, num_items, capacity, horizon, sample, rate, w, m, v, steps, smooth, seed, states, half_life, hits,
    shadow, leader, outlook,
):  # fmt: skip
    """One pass over a trace. states: the classic policies beside it, used only where `hits` is not empty."""
    np.random.seed(seed)
    follow = len(hits) > 0
    # last use, two gaps, uses, first use, place, visit, second of it, seconds of the gap; place and visit of the user before
    row = np.zeros((num_items, 11))
    row[:, 0], row[:, 1], row[:, 2], row[:, 4], row[:, 8] = -1e5, FAR, FAR, -1, 1e9
    counts, counted, last_user = np.zeros((num_items, DECAYS)), np.zeros(num_items), np.full((num_items, 2), -1)
    user = np.zeros((users.max() + 1, 6))  # visits, last access, gap, length, second, place
    own = np.empty(capacity, np.int64)
    at = np.full(num_items, -1)
    size = 0
    real, real_at, real_size, hand = np.empty(capacity, np.int64), np.full(num_items, -1), 0, 0
    seen_x, seen_item = np.zeros((horizon, F), np.float32), np.full(horizon, -1)
    seen_time, before, done = np.zeros(horizon, np.int64), np.full(horizon, -1), np.zeros(horizon, np.bool_)
    newest, write = np.full(num_items, -1), 0
    x, h, g, batch = np.zeros(F, np.float32), np.zeros(HIDDEN, np.float32), np.zeros(WEIGHTS, np.float32), 0
    furthest = math.log2(2.0 * horizon) / 8
    predicted = NUMBER_OF_POLICIES
    score, lead = np.zeros(predicted + 1), predicted
    fade, margin = math.exp2(-1.0 / half_life), 0.5 / math.sqrt(half_life)
    for t in range(len(items)):
        i, u, now = items[t], users[t], times[t]
        if t == 0 or u != users[t - 1] or now != times[t - 1]:
            if user[u, 0] > 0:
                gap = t - user[u, 1] + user[u, 5]
                user[u, 2] = gap if user[u, 0] == 1 else 0.5 * user[u, 2] + 0.5 * gap
                user[u, 3] = user[u, 5]
            user[u, 0] += 1
            user[u, 5] = 0
        q = newest[i]
        while q >= 0 and seen_item[q] == i and not done[q]:
            done[q] = True
            _learn(seen_x[q], math.log2(t - seen_time[q] + 1.0) / 8, w, h, g)
            batch += 1
            older = before[q]
            if older >= 0 and seen_time[older] > seen_time[q]:
                break
            q = older
        newest[i] = -1
        if batch >= BATCH:
            _adam(w, g, m, v, rate, steps, batch)
            batch = 0
            share = np.float32(max(1.0 / steps[0], SMOOTHING))
            for p in range(WEIGHTS):
                smooth[p] += share * (w[p] - smooth[p])
        if row[i, 4] < 0:
            row[i, 4] = t
        row[i, 8] = max(now - row[i, 7], 0.0)
        row[i, 7] = now
        row[i, 2] = row[i, 1]
        row[i, 1] = min(t - row[i, 0], FAR)
        row[i, 0] = t
        row[i, 3] += 1
        for k in range(DECAYS):
            counts[i, k] = counts[i, k] * math.exp2(-(t - counted[i]) / (1 << (7 + 3 * k))) + 1
        counted[i] = t
        if last_user[i, 0] != u:
            last_user[i, 1], row[i, 9], row[i, 10] = last_user[i, 0], row[i, 5], row[i, 6]
            last_user[i, 0] = u
        row[i, 5], row[i, 6] = user[u, 5], user[u, 0]
        user[u, 5] += 1
        user[u, 1], user[u, 4] = t, now

        hit, victim = at[i] >= 0, np.int64(-1)
        if not hit and size < capacity:
            own[size], at[i] = i, size
            size += 1
        elif not hit:
            _features(x, i, t, now, row, counts, counted, last_user, user)
            longest, victim = _predict(x, smooth, h), i
            for s in range(min(sample, capacity)):
                c = own[s] if capacity <= sample else own[np.random.randint(capacity)]
                _features(x, c, t, now, row, counts, counted, last_user, user)
                y = _predict(x, smooth, h)
                if y > longest:
                    longest, victim = y, c
            if victim != i:
                own[at[victim]], at[i] = i, at[victim]
                at[victim] = -1
        for s in range(2):  # the row asked for, every other time, and one that lies in the cache
            if s == 0 and np.random.random() < 0.5:
                continue
            c = i if s == 0 else own[np.random.randint(size)]
            q = write
            write = (write + 1) % horizon
            if seen_item[q] >= 0 and not done[q]:
                _learn(seen_x[q], furthest, w, h, g)
                batch += 1
            _features(seen_x[q], c, t, now, row, counts, counted, last_user, user)
            seen_item[q], seen_time[q], done[q], before[q] = c, t, False, newest[c]
            newest[c] = q

        if not follow:
            continue
        shadow[predicted, t] = hit
        for p in range(predicted):
            shadow[p, t] = step(states[p], i)
        for p in range(predicted + 1):
            score[p] = score[p] * fade + (1 - fade if shadow[p, t] else 0.0)
        best = np.argmax(score[:predicted])
        if lead == predicted:
            lead = best if score[best] > score[predicted] + margin else lead
        elif score[predicted] >= score[best]:
            lead = predicted
        elif score[best] > score[lead] + margin:
            lead = best
        leader[t] = lead
        hits[t] = real_at[i] >= 0
        if not hits[t]:
            if real_size < capacity:
                real[real_size], real_at[i] = i, real_size
                real_size += 1
            elif (at[i] >= 0) if lead == predicted else (states[lead].item[INSIDE, i] == 1):
                old = victim if lead == predicted else states[lead].number[VICTIM]
                if old < 0 or real_at[old] < 0:
                    while True:
                        hand = (hand + 1) % capacity
                        old = real[hand]
                        if (at[old] < 0) if lead == predicted else (states[lead].item[INSIDE, old] == 0):
                            break
                real[real_at[old]], real_at[i] = i, real_at[old]
                real_at[old] = -1
    for i in range(len(outlook)):
        if row[i, 3] > 0:
            _features(x, i, len(items), times[-1], row, counts, counted, last_user, user)
            outlook[i] = -_predict(x, smooth, h)


@dataclasses.dataclass
class Network:
    """The predictor's weights (WEIGHTS,) float32, the state of its optimiser (Adam), and the running mean that decides."""

    weights: np.ndarray
    mean: np.ndarray
    square: np.ndarray
    steps: np.ndarray
    smooth: np.ndarray

    @classmethod
    def new(cls, seed: int = 0) -> Network:
        """Random hidden weights; the prediction starts at 1,024 accesses for every row."""
        random = np.random.default_rng(seed)
        weights = np.zeros(WEIGHTS, np.float32)
        weights[: HIDDEN * F] = random.standard_normal(HIDDEN * F) * math.sqrt(2 / F)
        weights[HIDDEN * (F + 1) : -1] = random.standard_normal(HIDDEN) * 0.05
        weights[-1] = 10 / 8
        return cls(weights, np.zeros(WEIGHTS, np.float32), np.zeros(WEIGHTS, np.float32), np.zeros(1, np.int64),
                   weights.copy())  # fmt: skip


def play(
    trace: Trace, capacity: int, *, network: Network | None = None, half_life: int | None = None, seed: int = 0,
    rehearsed: int = REHEARSED,
) -> Played:  # fmt: skip
    """Run the predictor, the classic policies and the cache that follows the best of them over a trace, from empty caches.

    network: one to go on with (changed in place); by default a new one, which goes through the first half of a short trace until
    it has learned from `rehearsed` accesses, before the run that counts. half_life: accesses over which hit ratios are compared
    (default: 8 x capacity, 512 to 4,096). Raises ValueError for a capacity below 1.
    """
    if capacity < 1:
        raise ValueError(f"capacity is {capacity}: give at least one row")
    accesses, num_items, horizon = len(trace.items), trace.num_items, max(HORIZON * capacity, 1024)
    half_life = half_life or min(max(8 * capacity, 512), 4096)
    names = (*POLICIES, "predicted")
    nothing = np.empty(0, np.bool_)
    states = tuple(new_state(name, num_items, capacity) for name in POLICIES)

    def run(part, hits, shadow, leader, outlook):
        learner = network.weights, network.mean, network.square, network.steps, network.smooth
        _play(part.items, part.users, part.times, num_items, capacity, horizon, SAMPLE, LEARNING_RATE, *learner, seed, states,
              half_life, hits, shadow, leader, outlook)  # fmt: skip

    if network is None:
        network = Network.new(seed)
        half = trace.first(accesses // 2)
        for _ in range(min((rehearsed - len(half.items)) // max(len(half.items), 1), 10) if len(half.items) else 0):
            run(half, nothing, nothing[None], np.empty(0, np.int8), np.empty(0, np.float32))
    hits, shadow = np.empty(accesses, np.bool_), np.empty((len(names), accesses), np.bool_)
    leader = np.empty(accesses, np.int8)
    outlook = np.full(num_items, -np.inf, np.float32)
    if accesses:
        run(trace, hits, shadow, leader, outlook)
    return Played(trace, capacity, hits, dict(zip(names, shadow)), leader, outlook)
