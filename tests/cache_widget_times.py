"""How long notebook 10's widgets take to answer (300 ms wanted): python tests/cache_widget_times.py

Not a test: times depend on the machine. Every control is moved through its values, the predictor and LRU in turn; the predictor's
runs are played when asked for. The first answer, which loads compiled code, is left out.
"""

import itertools
import time

import numpy as np

from hstu_lab import widgets
from hstu_lab.cache_policies import simulate
from hstu_lab.cache_traces import synthetic_trace


def answered(explorer, control, value):
    """Milliseconds until the picture has changed, None where the value was the same."""
    if explorer.controls[control].value == value:
        return None
    start = time.perf_counter()
    explorer.controls[control].value = value
    return 1e3 * (time.perf_counter() - start)


def said(name, times):
    times = np.array([t for t in times if t is not None])[1:]
    late = int((times > 300).sum())
    print(f"{name}: {len(times)} answers, median {np.median(times):.0f} ms, longest {times.max():.0f} ms, {late} over 300 ms")


def main():
    explorer = widgets.cache_explorer(gather=3e12, bus=5e10)
    settings = itertools.product(("lru", "predicted"), (0.01, 0.05, 0.1, 0.2, 0.5), (0.0, 0.8, 1.2), (0.0, 2.0))
    said("cache explorer", [answered(explorer, *move) for setting in settings
                            for move in zip(("policy", "share", "skew", "drift"), setting)])  # fmt: skip
    trace = synthetic_trace(20_000, 800)
    explorer = widgets.trace_explorer(trace, {name: simulate(name, trace.items, 80) for name in ("lru", "belady")})
    moves = [move for start in range(0, 18_000, 1500) for move in (("start", start), ("policy", "lru"), ("policy", "belady"))]
    said("trace explorer", [answered(explorer, *move) for move in moves])


if __name__ == "__main__":
    main()
