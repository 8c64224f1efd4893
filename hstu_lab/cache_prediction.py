"""A cache policy that learns on line when each row will be asked for again, from what a recommender sees of its users.

`play(trace, capacity)` runs the predictor beside every classic policy of `cache_policies`, all demand-only, and one real cache
that follows the predictor while it helps and the best classic policy while it does not (its `Played` says when). `Watch` is the
same predictor on line, beside a `hot_cache.HotCache` that serves.

The predictor is a network of one hidden layer on `cache_features.FEATURES`. It tells the chance that a row is asked for within
each of `BINS` spans, given that it was not before (a discrete-time hazard: Singer and Willett, 1993), learned on rows sampled as
they are asked for, later, and as they lie in the cache. A span is learned from as soon as it is over or the row asked for: who
waits for the last span learns of uses at once and of rows that nobody used much later, and takes rows to be in demand that are
not. On a miss the row of the least *index* goes, of `SAMPLE` and the one asked for: the best ratio, over how long one might keep
it, of the chance of a hit to the slot's time that it costs (the index of Gittins, 1979). The longest expected wait would be the
wrong rule: a row that comes soon or never is worth its slot for a while.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numba import njit

from hstu_lab import cache_policies
from hstu_lab.cache_features import F, features, new_knowledge, observe
from hstu_lab.cache_policies import INSIDE, NUMBER_OF_POLICIES, POLICIES, VICTIM, new_state, step
from hstu_lab.cache_traces import Trace

HIDDEN = 32
BINS, SHORTEST = 5, 0.5
"""Spans end at SHORTEST x capacity and double from there."""
WEIGHTS = HIDDEN * (F + 1) + BINS * (HIDDEN + 1)
LONGEST = SHORTEST * 2 ** (BINS - 1)
SAMPLED = 4
"""Rows sampled at an access: the one asked for (every other time), one asked for of late (LONGEST), two that lie in the cache.
They are remembered until the last span is over."""
SAMPLE, POOL = 64, 24
"""Rows looked at on a miss; of them, the least of the miss before, looked at again (as Redis does)."""
LEARNING_RATE, STEADY, LEAST = 2e-3, 4000, 0.15
"""After STEADY steps the rate falls with the root of their number, to LEAST of what it was."""
REHEARSED = 300_000
"""A short first part is gone through again until this many accesses have been learned from."""
BATCH = 64
SMOOTHING, SMOOTHEST = 20.0, 7e-4
"""Decisions use a running mean of the weights, over a twentieth of all steps: each adds SMOOTHING / steps, or SMOOTHEST."""
NEVER = 1e9
LONG = 32
"""Policies are compared over two half-lives, the longer so many times the shorter: one is quick, the other exact."""

jit = njit(cache=True, nogil=True, fastmath=True)


@dataclasses.dataclass(frozen=True)
class Played:
    """One run over a trace. hits (T,) bool of the real cache; shadow {policy: (T,) bool} of every policy on its own, "predicted"
    included; leader (T,) int8: which was followed, an index into `policies`. outlook (N,) float32: for each row, after the last
    access, the logarithm of its index (-inf for a row never seen): what `hot_cache.HotCache.prioritise` takes. network: the
    predictor as it is then, for a `Watch` to go on with."""

    trace: Trace
    capacity: int
    hits: np.ndarray
    shadow: dict[str, np.ndarray]
    leader: np.ndarray
    outlook: np.ndarray
    network: Network
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
def _hidden(x, w, h):
    for j in range(HIDDEN):
        a = w[HIDDEN * F + j]
        for f in range(F):
            a += w[j * F + f] * x[f]
        h[j] = a if a > 0 else np.float32(0.05) * a


@jit
def _output(w, h, b):
    z = w[WEIGHTS - BINS + b]
    for j in range(HIDDEN):
        z += w[HIDDEN * (F + 1) + b * HIDDEN + j] * h[j]
    return z


@jit
def _index(x, w, h):
    """log2 of the best chance of a hit for the time in a slot, in capacities."""
    _hidden(x, w, h)
    waiting, cost, best, start, end = 1.0, 0.0, 1e-9, 0.0, SHORTEST
    for b in range(BINS):
        still = waiting / (1 + math.exp(_output(w, h, b)))
        cost += (end - start) * (waiting + still) / 2
        best = max(best, (1 - still) / cost)
        waiting, start, end = still, end, 2 * end
    return math.log2(best)


@jit
def _learn(x, b, came, w, h, g):
    """Add to g the gradient of the log-likelihood of span b: the row, not asked for before, came within it, or did not."""
    _hidden(x, w, h)
    out = HIDDEN * (F + 1) + b * HIDDEN
    e = np.float32(1 / (1 + math.exp(-_output(w, h, b))) - (1.0 if came else 0.0))
    g[WEIGHTS - BINS + b] += e
    for j in range(HIDDEN):
        d = e * w[out + j] * (np.float32(1.0) if h[j] > 0 else np.float32(0.05))
        g[out + j] += e * h[j]
        for f in range(F):
            g[j * F + f] += d * x[f]
        g[HIDDEN * F + j] += d


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
def _keep(pool, value, c, y):
    """Row c, of index y, in the place of the greatest of the pool, unless that is less."""
    most = 0
    for p in range(POOL):
        if pool[p] == c:
            return
        if value[p] > value[most]:
            most = p
    if y < value[most]:
        pool[most], value[most] = c, y


@jit
def _standard(x, scale):
    """x (F,) less its mean, by its deviation."""
    for f in range(F):
        x[f] = min(max((x[f] - scale[0, f]) * scale[1, f], np.float32(-4.0)), np.float32(4.0))


@jit
def _measure(x, scale, moments):
    """Take x (F,) into the running moments (3, F), and now and then those into the scale (2, F)."""
    moments[2, 0] += 1
    seen = moments[2, 0]
    share = max(1.0 / seen, 1e-4)
    for f in range(F):
        d = x[f] - moments[0, f]
        moments[0, f] += share * d
        moments[1, f] += share * (d * d * (1 - share) - moments[1, f])
    if seen % 200 == 0 and (seen <= 2000 or seen % 2000 == 0):
        for f in range(F):
            scale[0, f] = moments[0, f]
            scale[1, f] = 1 / math.sqrt(moments[1, f] + 1e-6) if moments[1, f] > 1e-8 else 0.0


@jit
def _lead(score, lead, margin):
    """Whom to follow: another one that is clearly better of late, or better in the long run and not clearly worse of late."""
    late, long = np.argmax(score[0]), np.argmax(score[1])
    if score[0, late] > score[0, lead] + margin[0]:
        return late
    last = score.shape[1] - 1
    if lead != last and score[1, last] >= score[1, long] and score[0, last] >= score[0, lead] - margin[0]:
        return last
    if score[1, long] > score[1, lead] + margin[1] and score[0, long] >= score[0, lead] - margin[0]:
        return long
    return lead


@jit
def _play(
    items, users, times, capacity, horizon, sample, rate, k, w, m, v, steps, smooth, scale, moments, seed, states, half_life,
    hits, shadow, leader, outlook,
):  # fmt: skip
    """One pass over a trace. k: Knowledge. states: the classic policies beside it, used only where `hits` is not empty."""
    np.random.seed(seed)
    follow, num_items = len(hits) > 0, len(k.row)
    own, at, size = np.empty(capacity, np.int64), np.full(num_items, -1), 0
    real, real_at, real_size, hand = np.empty(capacity, np.int64), np.full(num_items, -1), 0, 0
    seen_x, seen_item = np.zeros((horizon, F), np.float32), np.full(horizon, -1)
    seen_time, before, done = np.zeros(horizon, np.int64), np.full(horizon, -1), np.zeros(horizon, np.bool_)
    newest, write = np.full(num_items, -1), 0
    x, h, over = np.zeros(F, np.float32), np.zeros(HIDDEN, np.float32), np.zeros(BINS, np.int64)
    g, batch = np.zeros(WEIGHTS, np.float32), 0
    pool, value = np.full(POOL, -1), np.full(POOL, NEVER)
    predicted = NUMBER_OF_POLICIES
    score, lead, lives = np.zeros((2, predicted + 1)), predicted, (half_life, LONG * half_life)
    fade = (math.exp2(-1.0 / lives[0]), math.exp2(-1.0 / lives[1]))
    # Hits come in runs (the phases of a loop), so their short mean swings more than that of independent draws.
    margin = (2.0 / math.sqrt(lives[0]), 0.25 / math.sqrt(lives[1]))
    for t in range(len(items)):
        i, u, now = items[t], users[t], times[t]
        end = SHORTEST * capacity
        for b in range(BINS):
            while over[b] != write and t - seen_time[over[b]] > end:
                if not done[over[b]]:
                    _learn(seen_x[over[b]], b, False, w, h, g)
                    batch += 1
                over[b] = (over[b] + 1) % horizon
            end *= 2
        q = newest[i]
        while q >= 0 and seen_item[q] == i and not done[q]:
            done[q] = True
            b, end = 0, SHORTEST * capacity
            while b < BINS and t - seen_time[q] > end:
                b, end = b + 1, 2 * end
            if b == BINS:
                break
            _learn(seen_x[q], b, True, w, h, g)
            batch += 1
            older = before[q]
            if older >= 0 and seen_time[older] > seen_time[q]:
                break
            q = older
        newest[i] = -1
        if batch >= BATCH:
            _adam(w, g, m, v, rate * min(max(math.sqrt(STEADY / (steps[0] + 1)), LEAST), 1.0), steps, batch)
            batch = 0
            share = np.float32(max(min(SMOOTHING / steps[0], 1.0), SMOOTHEST))
            for p in range(WEIGHTS):
                smooth[p] += share * (w[p] - smooth[p])
        starts = t == 0 or u != users[t - 1] or now != times[t - 1]
        observe(k, t, i, u, now, starts, now - times[t - 1] if t > 0 else 0)

        hit, victim = at[i] >= 0, np.int64(-1)
        if not hit and size < capacity:
            own[size], at[i] = i, size
            size += 1
        elif not hit:
            features(x, k, i, t, now)
            _standard(x, scale)
            refused = _index(x, smooth, h)
            for p in range(POOL):
                value[p] = NEVER
                if capacity <= sample:  # all rows are looked at anyway
                    pool[p] = -1
                elif pool[p] >= 0 and at[pool[p]] >= 0:
                    features(x, k, pool[p], t, now)
                    _standard(x, scale)
                    value[p] = _index(x, smooth, h)
            for s in range(capacity if capacity <= sample else sample - POOL):
                c = own[s] if capacity <= sample else own[np.random.randint(capacity)]
                features(x, k, c, t, now)
                _standard(x, scale)
                _keep(pool, value, c, _index(x, smooth, h))
            p = np.argmin(value)
            victim = pool[p] if value[p] < refused else i
            if victim != i:
                own[at[victim]], at[i] = i, at[victim]
                at[victim] = -1
        for s in range(SAMPLED):
            if s == 0 and np.random.random() < 0.5:
                continue
            c = own[np.random.randint(size)]
            if s < 2:
                c = i if s == 0 else items[t - np.random.randint(min(t, int(LONGEST * capacity)) + 1)]
            q = write
            write = (write + 1) % horizon
            features(seen_x[q], k, c, t, now)
            _measure(seen_x[q], scale, moments)
            _standard(seen_x[q], scale)
            seen_item[q], seen_time[q], done[q], before[q] = c, t, False, newest[c]
            newest[c] = q

        if not follow:
            continue
        shadow[predicted, t] = hit
        for p in range(predicted):
            shadow[p, t] = step(states[p], i)
        for p in range(predicted + 1):
            for life in range(2):
                score[life, p] = score[life, p] * fade[life] + (1 - fade[life] if shadow[p, t] else 0.0)
        lead = _lead(score, lead, margin)
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
    _outlook(k, np.arange(len(outlook)), len(items), times[-1], smooth, scale, outlook)


@jit
def _outlook(k, rows, t, now, smooth, scale, outlook):
    """The index of every row of `rows` that has been asked for, after t accesses, at time now."""
    x, h = np.zeros(F, np.float32), np.zeros(HIDDEN, np.float32)
    for r in range(len(rows)):
        if k.row[rows[r], 3] > 0:
            features(x, k, rows[r], t, now)
            _standard(x, scale)
            outlook[r] = _index(x, smooth, h)


@jit
def _see(k, t, items, user, now, seconds):
    for j in range(len(items)):
        observe(k, t + j, items[j], user, now, j == 0, seconds if j == 0 else 0)


@dataclasses.dataclass
class Network:
    """The predictor's weights (WEIGHTS,) float32, the state of its optimiser (Adam), the running mean that decides, and the
    scale (2, F) and moments (3, F) of its features."""

    weights: np.ndarray
    mean: np.ndarray
    square: np.ndarray
    steps: np.ndarray
    smooth: np.ndarray
    scale: np.ndarray
    moments: np.ndarray

    @classmethod
    def new(cls, seed: int = 0) -> Network:
        """Random hidden weights; the prediction starts at one in five for every span and row."""
        random = np.random.default_rng(seed)
        weights = np.zeros(WEIGHTS, np.float32)
        weights[: HIDDEN * F] = random.standard_normal(HIDDEN * F) * math.sqrt(2 / F)
        weights[HIDDEN * (F + 1) : -BINS] = random.standard_normal(HIDDEN * BINS) * 0.05
        weights[-BINS:] = -1.5
        scale = np.zeros((2, F), np.float32)
        scale[1] = 1
        return cls(weights, np.zeros(WEIGHTS, np.float32), np.zeros(WEIGHTS, np.float32), np.zeros(1, np.int64),
                   weights.copy(), scale, np.zeros((3, F)))  # fmt: skip


class Watch:
    """The predictor beside a cache that serves: requests are told to it as they come, and it tells what it expects of rows.

    network: as `play` has trained it, for a cache of `capacity` rows; its weights stay as they are, while what is known of rows
    and users moves on. num_items, num_users: of the table and of those who ask, ids from 0.
    """

    def __init__(self, network: Network, num_items: int, num_users: int, capacity: int):
        self.network, self.accesses, self._now = network, 0, None
        self._known = new_knowledge(num_items, num_users, capacity)

    def see(self, items: np.ndarray, user: int, now: int) -> None:
        """One request: rows items (T,) int64 that a user asks for at Unix second now. Raises ValueError where time goes back."""
        if self._now is not None and now < self._now:
            raise ValueError(f"a request at {now} after one at {self._now}: tell them in order of time")
        _see(self._known, self.accesses, items, user, now, now - (now if self._now is None else self._now))
        self.accesses, self._now = self.accesses + len(items), now

    def outlook(self, rows: np.ndarray | None = None) -> np.ndarray:
        """For rows (R,) int64, by default all of the table: (R,) float32 for `HotCache.prioritise`, -inf for one never asked for.

        It holds for the moment: rows of users who have just been are wanted, those of users who stay away go stale.
        """
        rows = np.arange(len(self._known.row)) if rows is None else rows
        expected = np.full(len(rows), -np.inf, np.float32)
        if self.accesses:
            _outlook(self._known, rows, self.accesses, self._now, self.network.smooth, self.network.scale, expected)
        return expected


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
    accesses, num_items, horizon = len(trace.items), trace.num_items, max(int(SAMPLED * LONGEST * capacity), 1024) + 64
    half_life = half_life or min(max(8 * capacity, 512), 4096)
    names = (*POLICIES, "predicted")
    nothing = np.empty(0, np.bool_)
    states = tuple(new_state(name, num_items, capacity) for name in POLICIES)
    everyone = int(trace.users.max(initial=0)) + 1

    def run(part, hits, shadow, leader, outlook):
        learner = [getattr(network, field.name) for field in dataclasses.fields(network)]
        known = new_knowledge(num_items, everyone, capacity)
        _play(part.items, part.users, part.times, capacity, horizon, SAMPLE, LEARNING_RATE, known, *learner, seed, states,
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
    return Played(trace, capacity, hits, dict(zip(names, shadow)), leader, outlook, network)
