"""Notebooks 00 and 11: the latency waterfall and the latency explorer."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import ipywidgets
import matplotlib

from hstu_lab.widgets.base import EDGE, STYLE, Explorer, Figure, source_line, stage_colours


def stage_waterfall(stages: Mapping[str, float], title: str = "Where the time goes") -> Figure:
    """One request as a waterfall: stages (name -> ms) in order, each bar starting where the one before ended."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(7.5, 1.1 + 0.38 * (len(stages) + 1))
        _waterfall(figure.subplots(), stages, title)
    return figure


def _waterfall(axes, stages: Mapping[str, float], title: str) -> None:
    colours, start, total = stage_colours(list(stages)), 0.0, sum(stages.values())
    for row, (stage, width) in enumerate(stages.items()):
        axes.barh(row, width, left=start, color=colours[stage], **EDGE)
        share = f" ({width / total:.0%})" if total else ""
        axes.annotate(f"{width:.2f} ms{share}", (start + width, row), (4, 0), textcoords="offset points", va="center")
        start += width
    axes.barh(len(stages), total, color="#444444", **EDGE)
    axes.annotate(f"{total:.2f} ms", (total, len(stages)), (4, 0), textcoords="offset points", va="center", weight="bold")
    axes.set_yticks(range(len(stages) + 1), [*stages, "total"])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="ms", title=title, xlim=(0, (total or 1) * 1.22))


def strategy_waterfall(
    rows: Mapping[str, Mapping[str, float]], title: str = "Stages of every strategy", source: str = ""
) -> Figure:
    """One stacked bar a strategy: rows is {strategy: {stage: ms}}; the total stands at the end of each bar.

    source: where the numbers come from (`Record.label`), in small print below.
    """
    stages = list(dict.fromkeys(stage for row in rows.values() for stage in row))
    colours = stage_colours(stages)
    with matplotlib.rc_context(STYLE):
        figure = Figure(7.5, (1.6 if source else 1.3) + 0.42 * len(rows))
        axes = figure.subplots()
        starts = dict.fromkeys(rows, 0.0)
        for stage in stages:
            widths = [row.get(stage, 0.0) for row in rows.values()]
            axes.barh(list(rows), widths, left=list(starts.values()), color=colours[stage], label=stage, **EDGE)
            starts = {name: start + width for (name, start), width in zip(starts.items(), widths)}
        for row, total in enumerate(starts.values()):
            axes.annotate(f"{total:.2f} ms", (total, row), (4, 0), textcoords="offset points", va="center", weight="bold")
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="ms", title=title, xlim=(0, max(starts.values(), default=0) * 1.15 or 1))
        if stages:
            figure.legend(loc="outside upper right", ncols=len(stages), frameon=False, fontsize=9)
        source_line(figure, source)
    return figure


def latency_by_length(rows: Mapping[int, Mapping[str, float]], length: int | None = None) -> Figure:
    """Stage times against history length: rows is {events: {stage: ms}}; with `length`, that row's waterfall stands beside it."""
    rows = dict(sorted(rows.items()))
    stages = list(dict.fromkeys(stage for row in rows.values() for stage in row))
    with matplotlib.rc_context(STYLE):
        figure = Figure(10 if length is not None else 7.5, 3.2)
        panels = figure.subplots(1, 2 if length is not None else 1, squeeze=False)[0]
        if length is not None:
            _waterfall(panels[0], rows[length], _events(length))
        axes, bottom = panels[-1], [0.0] * len(rows)
        ticks = [str(n) for n in rows]
        for stage, colour in stage_colours(stages).items():
            heights = [row.get(stage, 0.0) for row in rows.values()]
            axes.bar(ticks, heights, bottom=bottom, color=colour, label=stage, width=0.8, **EDGE)
            bottom = [b + h for b, h in zip(bottom, heights)]
        if length is not None:
            axes.get_xticklabels()[ticks.index(str(length))].set_weight("bold")
        axes.tick_params(axis="x", rotation=90 if len(rows) > 12 else 0)
        axes.grid(axis="x", visible=False)
        axes.set(xlabel="events of history", ylabel="ms", title="Latency against history length")
        axes.legend(frameon=False, fontsize=9)
    return figure


def _events(count: int) -> str:
    return f"{count} event" if count == 1 else f"{count} events"


def time_lengths(recommender, history, lengths: Sequence[int], repeats: int = 3) -> dict[int, dict[str, float]]:
    """Stage times (ms) of real recommendations from the last n events of `history`, for each n: medians of `repeats` runs."""
    rows = {}
    for n in lengths:
        runs = [recommender.recommend(history[len(history) - n :]).stages for _ in range(repeats)]
        rows[n] = {stage: statistics.median(run[stage] for run in runs) for stage in runs[0]}
    return rows


def latency_explorer(recommender, histories: Sequence) -> Explorer:
    """Choose a user and how much of the history to send: each step runs a real recommendation and draws its stages.

    CSS classes: latency-user, latency-length, latency-label, latency-image.
    """
    histories = {history.user: history for history in histories}
    longest = min(min(len(h) for h in histories.values()), recommender.config.max_history)
    seen: dict[str, dict[int, dict[str, float]]] = {}

    def draw(user: str, length: int) -> tuple[str, Figure]:
        rows = seen.setdefault(user, {})
        rows |= time_lengths(recommender, histories[user], [length])
        text = f"{_events(length)} of {user}: {sum(rows[length].values()):.2f} ms (measured here)"
        return text, latency_by_length(rows, length)

    users = ipywidgets.Dropdown(options=list(histories), description="user")
    step = max(longest // 16, 1)
    length = ipywidgets.IntSlider(
        value=1 + step * (longest // step // 2), min=1, max=longest, step=step, description="history length",
        style={"description_width": "initial"}, continuous_update=False,
    )  # fmt: skip
    return Explorer("latency", draw, user=users, length=length)
