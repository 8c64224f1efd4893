"""Notebook 09: what a service does as load grows, and where its knee is."""

from __future__ import annotations

from collections.abc import Sequence

import ipywidgets
import matplotlib

from hstu_lab.widgets.base import EDGE, STYLE, Explorer, Figure, plain_log, source_line

OUTCOMES = {"answered": "#0072b2", "refused (429)": "#e69f00", "too late (504)": "#d55e00", "other errors": "#444444"}
_LINES = {"p50_ms": "#56b4e9", "p95_ms": "#0072b2", "p99_ms": "#d55e00"}


def outcome_rates(row: dict) -> dict[str, float]:
    """Requests a second of a row of `hstu_lab.load.sweep` by what became of them."""
    counts = {"answered": "200", "refused (429)": "429", "too late (504)": "504"}
    rates = {name: row["outcomes"].get(status, 0) / row["seconds"] for name, status in counts.items()}
    return rates | {"other errors": max(row["sent"] / row["seconds"] - sum(rates.values()), 0.0)}


def load_curve(rows: Sequence[dict], limit_ms: float, knee: float, chosen: float | None = None, source: str = "") -> Figure:
    """Latency against offered load, with the limit and the knee, and beside it what became of the requests.

    rows: of `hstu_lab.load.sweep`; knee: requests/s, of `hstu_lab.load.knee`; chosen: an offered rate to mark.
    """
    rows = sorted(rows, key=lambda row: row["offered"])
    offered = [row["offered"] for row in rows]
    with matplotlib.rc_context(STYLE):
        figure = Figure(10, 3.8)
        left, right = figure.subplots(1, 2)
        for name, colour in _LINES.items():
            left.plot(offered, [row[name] for row in rows], "o-", color=colour, label=name.removesuffix("_ms"), markersize=4)
        left.axhline(limit_ms, color="#444444", linestyle="--", linewidth=1)
        if knee:
            left.axvline(knee, color="#009e73", linewidth=6, alpha=0.35)
        left.set(
            yscale="log",
            xlabel="requests/s offered",
            ylabel="ms, answers",
            title=f"the knee at p99 ≤ {limit_ms:.0f} ms: {knee:.4g}/s",
        )
        plain_log(left.yaxis)
        left.legend(frameon=False, fontsize=9)
        bottom, position = [0.0] * len(rows), range(len(rows))
        for name, colour in OUTCOMES.items():
            heights = [outcome_rates(row)[name] for row in rows]
            right.bar(position, heights, bottom=bottom, color=colour, label=name, **EDGE)
            bottom = [low + height for low, height in zip(bottom, heights)]
        if chosen is not None:
            left.axvline(chosen, color="#444444", linewidth=1)
            right.axvspan(offered.index(chosen) - 0.5, offered.index(chosen) + 0.5, color="#eeeeee", zorder=0)
        right.set_xticks(position, [f"{rate:.4g}" for rate in offered])
        right.grid(axis="x", visible=False)
        right.set(xlabel="requests/s offered", ylabel="requests/s", title="what became of them")
        right.legend(frameon=False, fontsize=9)
        source_line(figure, source)
    return figure


def load_explorer(rows: Sequence[dict], knee, limits: Sequence[float] = (20, 50, 100, 200, 500), source: str = "") -> Explorer:
    """Choose an offered load and a limit of p99: see latency, answers and the knee. `knee` is `hstu_lab.load.knee`.

    CSS classes: load-offered, load-limit, load-label, load-image.
    """
    by_rate = {row["offered"]: row for row in rows}

    def draw(offered: float, limit: float) -> tuple[str, Figure]:
        row, best = by_rate[offered], knee(rows, limit)
        text = (
            f"{offered:.4g} requests/s: p99 {row['p99_ms']:.1f} ms, {row['goodput']:.1f} answers/s, "
            f"{row['prefix_hits']:.0%} of the tokens found in the cache; within {limit:.0f} ms up to {best:.4g} requests/s"
        )
        return text, load_curve(rows, limit, best, offered, source)

    def choice(name: str, options: Sequence[float], value: float) -> ipywidgets.SelectionSlider:
        labels = [(f"{option:.4g}", option) for option in options]
        return ipywidgets.SelectionSlider(options=labels, value=value, description=name, continuous_update=False)

    rates = sorted(by_rate)
    return Explorer(
        "load", draw, offered=choice("requests/s", rates, rates[0]), limit=choice("p99, ms", limits, limits[len(limits) // 2])
    )
