"""Traces of row accesses: from logs, from requests over them, and synthetic ones with a chosen skew, drift and shift."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import os
import zipfile
from pathlib import Path

import numpy as np
from numba import njit

from hstu_lab.cache_policies import INSIDE, new_state, step


@dataclasses.dataclass(frozen=True)
class Trace:
    """Accesses in order: row items (T,) asked for by users (T,) at times (T,) Unix seconds, all int64.

    Neighbours of one user and time make a request. Without users or times, leave them out: those signals are then constant.
    Raises ValueError where lengths differ or an id is negative.
    """

    name: str
    items: np.ndarray
    users: np.ndarray | None = None
    times: np.ndarray | None = None

    def __post_init__(self):
        items = np.ascontiguousarray(self.items, dtype=np.int64)
        object.__setattr__(self, "items", items)
        for field, default in (("users", np.zeros(len(items))), ("times", np.arange(len(items)))):
            given = getattr(self, field)
            object.__setattr__(self, field, np.ascontiguousarray(default if given is None else given, dtype=np.int64))
        if not len(self.items) == len(self.users) == len(self.times) or self.items.ndim != 1:
            raise ValueError(f"trace {self.name!r}: items, users and times differ in length")
        if len(items) and min(items.min(), self.users.min()) < 0:
            raise ValueError(f"trace {self.name!r}: an item or a user is negative: number them from 0")

    @property
    def num_items(self) -> int:
        return int(self.items.max(initial=-1)) + 1

    @property
    def starts(self) -> np.ndarray:
        """(R,) positions at which a request starts."""
        new = (self.users[1:] != self.users[:-1]) | (self.times[1:] != self.times[:-1])
        return np.concatenate([np.zeros(min(1, len(self.items)), np.int64), new.nonzero()[0] + 1])

    def first(self, count: int) -> Trace:
        return Trace(self.name, self.items[:count], self.users[:count], self.times[:count])


def request_trace(trace: Trace, last: int = 50, every: int = 10, name: str = "") -> Trace:
    """What serving would ask for: at every `every`-th event of a user a request for his last `last` items, oldest first."""
    history: dict[int, list[int]] = {}
    items, users, times = [], [], []
    for item, user, at in zip(trace.items.tolist(), trace.users.tolist(), trace.times.tolist()):
        events = history.setdefault(user, [])
        events.append(item)
        if len(events) % every == 0:
            window = events[-last:]
            items += window
            users += [user] * len(window)
            times += [at] * len(window)
    return Trace(name or f"{trace.name} requests", np.array(items), np.array(users), np.array(times))


def synthetic_trace(
    accesses: int, num_items: int = 1000, *, skew: float = 0.9, drift: float = 0.0, shift: float | None = None,
    users: int = 50, returning: float = 0.0, seed: int = 0,
) -> Trace:  # fmt: skip
    """Zipf popularity of exponent `skew` that drifts: `drift` of the ranks change hands over the trace, one swap after another.

    shift: at this share of the trace (0 to 1) all ids are replaced by a new catalogue of as many. returning: share of accesses
    that repeat what the same user asked for 5 to 50 of his accesses ago. Times are seconds, about one access each.
    """
    random = np.random.default_rng(seed)
    weight = np.arange(1, num_items + 1, dtype=np.float64) ** -skew
    ranks = np.searchsorted(np.cumsum(weight) / weight.sum(), random.random(accesses)).clip(max=num_items - 1)
    order = random.permutation(num_items)
    items = np.empty(accesses, np.int64)
    swaps = int(drift * num_items)
    bounds = np.linspace(0, accesses, swaps + 1).astype(int)
    for start, end in itertools.pairwise(bounds) if swaps else [(0, accesses)]:
        items[start:end] = order[ranks[start:end]]
        a, b = int(num_items * random.random() ** 3), random.integers(num_items)  # popular ranks change more often
        order[a], order[b] = order[b], order[a]
    asked = random.integers(0, users, accesses)
    if returning:
        past: list[list[int]] = [[] for _ in range(users)]
        again, back = random.random(accesses) < returning, random.integers(5, 51, accesses)
        for t, user in enumerate(asked.tolist()):
            if again[t] and len(past[user]) >= back[t]:
                items[t] = past[user][-back[t]]
            past[user].append(items[t])
    if shift is not None:
        items[int(shift * accesses) :] += num_items
    return Trace("synthetic", items, asked, np.cumsum(random.exponential(1.0, accesses)).astype(np.int64))


def movielens_trace(path: str | os.PathLike) -> Trace:
    """MovieLens-1M's ratings in time order (equal times in the file's order): a film a row. path: its zip. Raises OSError."""
    with zipfile.ZipFile(path) as archive:
        text = archive.read("ml-1m/ratings.dat")
    ratings = np.array(text.replace(b"::", b" ").split(), dtype=np.int64).reshape(-1, 4)
    return _numbered("ML-1M items", ratings[:, 1], ratings[:, 0], ratings[:, 3])


def review_trace(path: str | os.PathLike, name: str = "") -> Trace:
    """A (gzipped) table with columns user_id, item_id and time, separated by tabs or commas, in time order of its lines."""
    with gzip.open(path, "rt") if Path(path).suffix == ".gz" else open(path) as file:
        header = file.readline().strip()
        separator = "\t" if "\t" in header else ","
        columns = header.split(separator)
        rows = np.loadtxt(file, delimiter=separator, dtype=np.int64, ndmin=2)
    if missing := {"user_id", "item_id", "time"} - set(columns):
        raise ValueError(f"{path}: no column {sorted(missing)[0]!r}: its first line is {header!r}")
    item, user, at = (rows[:, columns.index(name)] for name in ("item_id", "user_id", "time"))
    return _numbered(name or Path(path).name.split(".")[0], item, user, at)


def _numbered(name: str, items: np.ndarray, users: np.ndarray, times: np.ndarray) -> Trace:
    """In time order, items and users numbered from 0."""
    order = np.argsort(times, kind="stable")
    return Trace(
        name, np.unique(items[order], return_inverse=True)[1], np.unique(users[order], return_inverse=True)[1], times[order]
    )


@dataclasses.dataclass(frozen=True)
class Stalls:
    """Per request: rows waited for, and rows moved over the bus, on demand only and with the next request's rows prefetched."""

    demand: float
    prefetched: float
    moved_on_demand: float
    moved_with_prefetch: float


@njit(cache=True)
def _prefetched(state, items, starts, first):
    """LRU; during a request the rows of the next one come in. Rows waited for and rows moved, from request `first` on."""
    waited, moved = 0, 0
    for r in range(len(starts)):
        end = starts[r + 1] if r + 1 < len(starts) else len(items)
        after = starts[r + 2] if r + 2 < len(starts) else len(items)
        for t in range(starts[r], end):
            missing = state.item[INSIDE, items[t]] == 0
            if missing and r >= first:
                waited += 1
        for t in range(starts[r], after):
            if not step(state, items[t]) and r >= first:
                moved += 1
    return waited, moved


def stalls(trace: Trace, capacity: int, hits: np.ndarray) -> Stalls:
    """Second half of the trace: demand-only `hits` (T,) against prefetching, where each request's ids are known one request
    ahead (it waits in the queue while the one before is computed) and its rows have arrived by its turn."""
    starts = trace.starts
    first = int(np.searchsorted(starts, len(trace.items) // 2))
    requests = max(len(starts) - first, 1)
    waited, moved = _prefetched(new_state("lru", trace.num_items, capacity), trace.items, starts, first)
    missed = int((~hits[starts[first] if first < len(starts) else len(hits) :]).sum())
    return Stalls(missed / requests, waited / requests, missed / requests, moved / requests)
