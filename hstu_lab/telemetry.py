"""Telemetry of a running recommender: histograms of fixed size, per-stage timers, counters and throughput.

A histogram answers percentiles within one per cent whatever it was fed, so that a service that has answered a billion
requests holds as little as one that has answered ten, and two processes' histograms add up.
"""

from __future__ import annotations

import array
import contextlib
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping

RELATIVE_ERROR = 0.01
LOWEST, HIGHEST = 1e-6, 1e9
_GROWTH = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
_SCALE = 1 / math.log(_GROWTH)
_BUCKETS = math.ceil(math.log(HIGHEST / LOWEST) * _SCALE)
PERCENTILES = (50, 95, 99)


class Histogram:
    """Values of one quantity in log-spaced buckets (13 KiB): percentiles within `RELATIVE_ERROR`, exact count, sum, min and max.

    Bucket i holds [LOWEST * g^i, LOWEST * g^(i+1)), as in DDSketch (Masson et al. 2019). Values below `LOWEST` are reported
    as the smallest value seen, values beyond `HIGHEST` as the largest. Every method may be called from any thread.
    """

    def __init__(self):
        self._counts = array.array("Q", bytes(8 * (_BUCKETS + 1)))
        self._below = 0
        self._lock = threading.Lock()
        self.count, self.sum, self.min, self.max = 0, 0.0, math.inf, -math.inf

    def add(self, value: float, count: int = 1) -> None:
        """Count `value` (any unit, not negative) `count` times. Raises ValueError on a negative, NaN or infinite value."""
        if not 0 <= value < math.inf:
            raise ValueError(f"a histogram takes finite values from 0 on, got {value}")
        if count < 1:
            raise ValueError(f"count is {count}: give a positive number")
        with self._lock:
            if value < LOWEST:
                self._below += count
            else:
                self._counts[min(int(math.log(value / LOWEST) * _SCALE), _BUCKETS)] += count
            self.count += count
            self.sum += value * count
            self.min, self.max = min(self.min, value), max(self.max, value)

    @property
    def mean(self) -> float:
        """Exact mean; NaN while empty."""
        return self.sum / self.count if self.count else math.nan

    def percentile(self, p: float) -> float:
        """The smallest value that at least p per cent of the values do not exceed, within `RELATIVE_ERROR`; NaN while empty.

        Raises ValueError where p is outside 0..100.
        """
        return self.percentiles((p,))[0]

    def percentiles(self, ps: tuple[float, ...] = PERCENTILES) -> list[float]:
        """`percentile` of each of `ps`, all of one moment."""
        if bad := [p for p in ps if not 0 <= p <= 100]:
            raise ValueError(f"percentile {bad[0]} is outside 0..100")
        with self._lock:
            counts, below, count, low, high = self._counts[:], self._below, self.count, self.min, self.max
        return [_percentile(p, counts, below, count, low, high) for p in ps]

    def buckets(self) -> list[tuple[float, int]]:
        """(upper bound, number of values below it) of each bucket in use, ascending: a cumulative histogram."""
        with self._lock:
            counts, seen = self._counts[:], self._below
        rows = [(LOWEST, seen)] if seen else []
        for i, n in enumerate(counts):
            if n:
                seen += n
                rows.append((LOWEST * _GROWTH ** (i + 1) if i < _BUCKETS else math.inf, seen))
        return rows

    def to_dict(self) -> dict[str, float]:
        """count, mean, min, max, p50, p95, p99; only the count while empty."""
        if not self.count:
            return {"count": 0}
        names = (f"p{p}" for p in PERCENTILES)
        return {"count": self.count, "mean": self.mean, "min": self.min, "max": self.max, **dict(zip(names, self.percentiles()))}


def _percentile(p: float, counts: array.array, below: int, count: int, low: float, high: float) -> float:
    if not count:
        return math.nan
    rank = max(math.ceil(p / 100 * count), 1)
    if rank <= max(below, 1):
        return low
    i = next(i for i, seen in enumerate(itertools.accumulate(counts, initial=below)) if rank <= seen) - 1
    if rank == count or i == _BUCKETS:
        return high
    # The middle of the bucket in the sense of relative error.
    return min(max(LOWEST * _GROWTH**i * 2 * _GROWTH / (1 + _GROWTH), low), high)


class StageTimer:
    """Wall-clock milliseconds of the named stages of one request.

    >>> timer = StageTimer()
    >>> with timer("stack"):
    ...     pass
    >>> list(timer.stages)
    ['stack']

    A stage entered twice adds up; one left by an exception counts too. `synchronize` waits for the GPU at each edge, so that
    its work is charged to the stage that queued it rather than to the one that first reads a result.
    """

    def __init__(self, *, synchronize: bool = False, clock: Callable[[], float] = time.perf_counter):
        self.stages: dict[str, float] = {}
        self._clock = clock
        self._synchronize = _synchronize_cuda if synchronize else lambda: None

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._synchronize()
        start = self._clock()
        try:
            yield
        finally:
            self._synchronize()
            self.stages[stage] = self.stages.get(stage, 0.0) + (self._clock() - start) * 1e3

    @property
    def total(self) -> float:
        """Milliseconds of all stages together."""
        return sum(self.stages.values())


def _synchronize_cuda() -> None:
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class _Strategy:
    """What one strategy has answered so far."""

    def __init__(self):
        self.total = Histogram()
        self.stages: dict[str, Histogram] = {}
        self.start, self.end = math.inf, -math.inf


class Telemetry:
    """Latencies per strategy and stage, throughput and named counters of one recommender. Thread-safe."""

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._lock = threading.Lock()
        self._strategies: dict[str, _Strategy] = {}
        self.counters: dict[str, int] = {}

    def observe(self, strategy: str, stages: Mapping[str, float], total: float, *, requests: int = 1) -> None:
        """Count a finished call: milliseconds per stage and altogether. A batch of `requests` users gave each this latency."""
        now = self._clock()
        with self._lock:
            entry = self._strategies.setdefault(strategy, _Strategy())
            entry.start, entry.end = min(entry.start, now - total / 1e3), max(entry.end, now)
            histograms = [(entry.stages.setdefault(name, Histogram()), ms) for name, ms in stages.items()]
        entry.total.add(total, requests)
        for histogram, milliseconds in histograms:
            histogram.add(milliseconds, requests)

    def count(self, name: str, n: int = 1) -> None:
        """Add n to the counter of that name (errors, rejected, repairs...)."""
        with self._lock:
            self.counters[name] = self.counters.get(name, 0) + n

    def throughput(self, strategy: str) -> float:
        """Requests per second from the start of the strategy's first request to the end of its last; NaN where it has none."""
        entry = self._strategies.get(strategy)
        if entry is None or entry.end <= entry.start:
            return math.nan
        return entry.total.count / (entry.end - entry.start)

    def summary(self) -> dict:
        """{"strategies": {name: {"total": histogram, "stages": {stage: histogram}, "throughput": 1/s}}, "counters": {...}}.

        A histogram is `Histogram.to_dict()`, in milliseconds.
        """
        with self._lock:
            entries = {name: (entry, dict(entry.stages)) for name, entry in self._strategies.items()}
            counters = dict(self.counters)
        strategies = {
            name: {
                "total": entry.total.to_dict(),
                "stages": {stage: histogram.to_dict() for stage, histogram in stages.items()},
                "throughput": self.throughput(name),
            }
            for name, (entry, stages) in entries.items()
        }
        return {"strategies": strategies, "counters": counters}

    def table(self) -> str:
        """One line a strategy and one a stage of it: requests, p50, p95, p99, mean (ms), requests per second; then counters."""
        lines = [f"{'strategy / stage':<22}{'count':>8}{'p50':>10}{'p95':>10}{'p99':>10}{'mean':>10}{'per s':>10}"]
        summary = self.summary()
        for name, entry in summary["strategies"].items():
            lines.append(_row(name, entry["total"], f"{entry['throughput']:>10.1f}"))
            lines += [_row(f"  {stage}", histogram, "") for stage, histogram in entry["stages"].items()]
        if summary["counters"]:
            lines.append("counters: " + ", ".join(f"{name} {n}" for name, n in sorted(summary["counters"].items())))
        return "\n".join(lines)


def _row(name: str, histogram: dict[str, float], tail: str) -> str:
    numbers = "".join(f"{histogram[key]:>10.3f}" for key in ("p50", "p95", "p99", "mean"))
    return f"{name:<22}{histogram['count']:>8}{numbers}{tail}"
