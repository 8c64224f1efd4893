"""Notebook 10: hit ratios of eviction policies over a trace, what a cache costs and saves, and the recorded traces."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import ipywidgets
import matplotlib
import numpy as np

from hstu_lab import cache_policies
from hstu_lab.cache_policies import NAMES, POLICIES
from hstu_lab.cache_prediction import play
from hstu_lab.cache_traces import Trace, synthetic_trace
from hstu_lab.widgets.base import EDGE, STYLE, Explorer, Figure, source_line

POLICY_COLOURS = {
    "lru": "#56b4e9", "lfu": "#999999", "fifo": "#cccccc", "s3-fifo": "#cc79a7", "sieve": "#f0e442", "arc": "#009e73",
    "w-tinylfu": "#e69f00", "counts": "#444444", "predicted": "#d55e00", "cache": "#d55e00", "belady": "#0072b2",
}  # fmt: skip
WINDOWS = 40


def over_time(hits: np.ndarray, windows: int = WINDOWS) -> np.ndarray:
    """Hit ratio (windows,) in equal parts of a run (T,) bool."""
    return np.array([part.mean() if len(part) else np.nan for part in np.array_split(hits, windows)])


def hit_ratio_lines(runs: Mapping[str, np.ndarray], title: str = "", shift: float | None = None) -> Figure:
    """Hit ratio over a trace: runs is {policy: (T,) bool or ratios (windows,)}. shift: share at which the catalogue changed."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(8, 3.4)
        axes = figure.subplots()
        for name, hits in runs.items():
            ratio = over_time(hits) if hits.dtype == bool else hits
            end = np.arange(1, len(ratio) + 1) / len(ratio)
            width = 2.2 if name in ("predicted", "cache") else 1.3
            axes.plot(end, ratio, color=POLICY_COLOURS.get(name), linewidth=width, label=NAMES.get(name, name))
        if shift is not None:
            axes.axvline(shift, color="#444444", linestyle="--", linewidth=1)
        axes.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
        axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
        axes.set(xlabel="of the trace", ylabel="hits", title=title or "Hit ratio over time", ylim=(0, None))
        figure.legend(loc="outside right center", frameon=False, fontsize=9)
    return figure


def gap_bars(traces: Mapping[str, Sequence[Mapping]], source: str = "") -> Figure:
    """Recorded traces (`cache_bench traces`): the classics as dots, the cache as a bar, Belady's bound as a line."""
    cells = [(name, cell) for name, rows in traces.items() for cell in rows]
    with matplotlib.rc_context(STYLE):
        figure = Figure(10, 3.8)
        axes = figure.subplots()
        place = np.arange(len(cells)) + np.repeat(np.arange(len(traces)), [len(rows) for rows in traces.values()]) * 0.6
        axes.bar(place, [cell["cache"] for _, cell in cells], color=POLICY_COLOURS["cache"], width=0.7, label="hot cache", **EDGE)
        for name in POLICIES:
            values = [cell["policies"][name] for _, cell in cells]
            axes.plot(place, values, "o", color=POLICY_COLOURS[name], markersize=4.5, label=NAMES[name], markeredgecolor="white")
        bound = [cell["belady"] for _, cell in cells]
        axes.hlines(bound, place - 0.42, place + 0.42, color=POLICY_COLOURS["belady"], linewidth=2.2, label="Belady")
        for x, (_, cell) in zip(place, cells):
            axes.annotate(
                f"{cell['closed']:+.0%}", (x, cell["belady"]), (0, 4), textcoords="offset points", ha="center", fontsize=8
            )
        axes.set_xticks(place, [f"{name.replace(' ', chr(10))}\n{cell['share']:.0%}" for name, cell in cells], fontsize=8)
        axes.grid(axis="x", visible=False)
        axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
        axes.set(title="Hits in the second half; above: share of the distance to Belady closed", ylim=(0, 1))
        figure.legend(loc="outside right center", frameon=False, fontsize=8)
        source_line(figure, source)
    return figure


def lookup_milliseconds(rows: int, hit_ratio: float, width: int, *, gather: float, bus: float, value_bytes: int = 2) -> float:
    """Modelled ms of a lookup of `rows` rows: hits read and written at `gather` bytes/s, misses over the bus at `bus`."""
    bytes_of_rows = rows * width * value_bytes
    return 1e3 * (2 * bytes_of_rows * hit_ratio / gather + bytes_of_rows * (1 - hit_ratio) / bus)


def cost_bars(milliseconds: Mapping[str, float], gigabytes: Mapping[str, float], source: str = "") -> Figure:
    """Time of one request's rows, and GPU memory held, of the places that a table can be in."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(10, 2.6)
        for axes, values, unit, title in zip(
            figure.subplots(1, 2), (milliseconds, gigabytes), ("ms", "GB"), ("Rows of one request", "GPU memory"), strict=True
        ):
            colours = [POLICY_COLOURS["cache"] if "cache" in name else "#999999" for name in values]
            axes.barh(list(values), list(values.values()), color=colours, **EDGE)
            for row, value in enumerate(values.values()):
                axes.annotate(f"{value:.3g} {unit}", (value, row), (4, 0), textcoords="offset points", va="center", weight="bold")
            axes.invert_yaxis()
            axes.grid(axis="y", visible=False)
            axes.set(xlabel=unit, title=title, xlim=(0, max(values.values()) * 1.3))
        source_line(figure, source)
    return figure


def lookup_bars(cases: Sequence[Mapping], source: str = "", time: str = "seconds") -> Figure:
    """Recorded lookups (`cache_bench gpu fbgemm`): microseconds by where the rows are, a panel for each kind of traffic.

    time: "seconds" as called, or "GPU seconds", in which the host has no part.
    """
    kinds, places = (list(dict.fromkeys(case[key] for case in cases)) for key in ("asked", "where"))
    found = {(case["asked"], case["where"]): case for case in cases}
    longest = 1e6 * max(case[time] for case in cases)
    with matplotlib.rc_context(STYLE):
        figure = Figure(10, 0.8 + 0.3 * len(places))
        for axes, kind in zip(np.atleast_1d(figure.subplots(1, len(kinds), sharey=True)), kinds):
            here = [(place, found[kind, place]) for place in places if (kind, place) in found]
            colours = [POLICY_COLOURS["cache"] if place.startswith("hot cache") else "#999999" for place, _ in here]
            axes.barh([place for place, _ in here], [1e6 * case[time] for _, case in here], color=colours, **EDGE)
            for place, case in here:
                hits = "" if case["hit ratio"] is None else f" ({case['hit ratio']:.0%} hits)"
                axes.annotate(f"{1e6 * case[time]:.0f}{hits}", (1e6 * case[time], place), (4, 0),
                              textcoords="offset points", va="center", fontsize=8)  # fmt: skip
            axes.grid(axis="y", visible=False)
            axes.set(title=kind, xlabel="us", xlim=(0, 1.6 * longest))
        axes.invert_yaxis()
        source_line(figure, source)
    return figure


def cache_dashboard(runs: Mapping[str, np.ndarray], milliseconds: Mapping[str, float], gigabytes: Mapping[str, float]) -> Figure:
    """Hit ratio over time, modelled time of a request's rows and GPU memory, side by side."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(10, 3)
        figure.set_layout_engine("none")  # finding the margins takes a third of the time, and a widget draws this anew each time
        margins = {"left": 0.06, "right": 0.985, "bottom": 0.17, "top": 0.9, "wspace": 0.46}
        left, middle, right = figure.subplots(1, 3, width_ratios=(3, 2, 2), gridspec_kw=margins)
        for name, hits in runs.items():
            left.plot(np.linspace(0, 100, WINDOWS), over_time(hits), color=POLICY_COLOURS[name], label=NAMES[name])
        left.set(xlabel="% of the trace", ylabel="hit ratio", title="Hits over time", ylim=(0, 1))
        left.legend(frameon=False, fontsize=8)
        for axes, values, title in ((middle, milliseconds, "ms a request (modelled)"), (right, gigabytes, "GB of GPU memory")):
            axes.barh(list(values), list(values.values()), color=["#d55e00", "#999999", "#cccccc"], **EDGE)
            axes.invert_yaxis()
            axes.grid(axis="y", visible=False)
            axes.set(title=title)
    return figure


EXPLORED, EXPLORED_ROWS = 1200, 250


@functools.lru_cache(maxsize=256)
def _explored(skew: float, drift: float, share: float, policy: str) -> np.ndarray:
    trace = synthetic_trace(EXPLORED, EXPLORED_ROWS, skew=skew, drift=drift, seed=1)
    capacity = max(int(share * EXPLORED_ROWS), 1)
    if policy == "predicted":
        return play(trace, capacity, rehearsed=0).hits
    return cache_policies.simulate(policy, trace.items, capacity, EXPLORED_ROWS)


def cache_explorer(*, gather: float, bus: float, rows: int = 16_384, width: int = 1024, table_rows: int = 3_100_000) -> Explorer:
    """Choose cache size, skew, drift and policy of a synthetic trace: hit ratio over time, ms of a request's rows, GPU memory.

    gather, bus: bytes/s of hits (read plus written) and of rows over the bus, from a record; the times are modelled from them
    for a request of `rows` rows of a table of `table_rows` x `width` float16. CSS classes: cache-share, cache-skew, cache-drift,
    cache-policy, cache-label, cache-image.
    """

    def draw(share: float, skew: float, drift: float, policy: str) -> tuple[str, Figure]:
        runs = {name: _explored(skew, drift, share, name) for name in dict.fromkeys(("lru", policy, "belady"))}
        ratio = float(runs[policy][EXPLORED // 2 :].mean())
        milliseconds = {
            "cache": lookup_milliseconds(rows, ratio, width, gather=gather, bus=bus),
            "all in HBM": lookup_milliseconds(rows, 1.0, width, gather=gather, bus=bus),
            "pinned host": lookup_milliseconds(rows, 0.0, width, gather=gather, bus=bus),
        }
        whole = table_rows * width * 2e-9
        gigabytes = {"cache": share * whole, "all in HBM": whole, "pinned host": 0.0}
        text = f"{NAMES[policy]}: {ratio:.1%} hits in the second half; {milliseconds['cache']:.3f} ms, {share * whole:.2f} GB"
        return text, cache_dashboard(runs, milliseconds, gigabytes)

    def slider(name: str, options: Sequence[float], value: float) -> ipywidgets.SelectionSlider:
        return ipywidgets.SelectionSlider(options=options, value=value, description=name, continuous_update=False)

    policies = ipywidgets.Dropdown(
        options=[(NAMES[p], p) for p in (*POLICIES, "predicted")], value="predicted", description="policy"
    )
    return Explorer(
        "cache", draw, share=slider("size", [0.01, 0.02, 0.05, 0.1, 0.2, 0.5], 0.1),
        skew=slider("skew", [0.0, 0.5, 0.8, 1.0, 1.2], 0.8), drift=slider("drift", [0.0, 0.5, 1.0, 2.0], 0.5), policy=policies,
    )  # fmt: skip


def trace_map(trace: Trace, start: int, count: int, hits: np.ndarray | None = None) -> Figure:
    """`count` accesses from `start`: one dot an access, its row's rank by popularity against time; misses stand out."""
    part = slice(start, min(start + count, len(trace.items)))
    uses = np.bincount(trace.items, minlength=trace.num_items)
    rank = np.empty(trace.num_items, np.int64)
    rank[np.argsort(-uses, kind="stable")] = np.arange(1, trace.num_items + 1)
    y, x = rank[trace.items[part]], np.arange(part.start, part.stop)
    hit = np.zeros(len(y), bool) if hits is None else hits[part]
    with matplotlib.rc_context(STYLE):
        figure = Figure(8, 3.2)
        axes = figure.subplots()
        axes.plot(x[hit], y[hit], ".", color="#56b4e9", markersize=3, label="hit")
        axes.plot(x[~hit], y[~hit], ".", color="#d55e00", markersize=3, label="asked for" if hits is None else "miss")
        axes.set_yscale("log")
        axes.set(xlabel="access", ylabel="row, by popularity", title=f"{trace.name}: which rows are asked for when")
        figure.legend(loc="outside right center", frameon=False, fontsize=9)
    return figure


def trace_explorer(trace: Trace, runs: Mapping[str, np.ndarray], window: int = 1000) -> Explorer:
    """Move through a trace and choose a policy: see its hits and misses. runs: {policy: (T,) bool}.

    CSS classes: trace-start, trace-policy, trace-label, trace-image.
    """

    def draw(start: int, policy: str) -> tuple[str, Figure]:
        part = runs[policy][start : start + window]
        return f"{NAMES.get(policy, policy)}: {part.mean():.1%} of {len(part)} accesses hit", trace_map(
            trace, start, window, runs[policy]
        )

    last = max(len(trace.items) - window, 0)
    start = ipywidgets.IntSlider(
        value=last // 2, min=0, max=last, step=max(window // 2, 1), description="from access", continuous_update=False,
        style={"description_width": "initial"},
    )  # fmt: skip
    policy = ipywidgets.Dropdown(options=[(NAMES.get(p, p), p) for p in runs], description="policy")
    return Explorer("trace", draw, start=start, policy=policy)
