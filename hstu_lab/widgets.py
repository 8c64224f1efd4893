"""Every interactive view: a pure function that returns a figure, and `Explorer`, which puts controls above it.

Milliseconds everywhere. A stage has the same colour in every figure (Okabe and Ito's palette, safe for colour-blind eyes).
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence

import ipywidgets
import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as _Figure

STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "figure.dpi": 100,
}
STAGE_COLOURS = {"tokens": "#999999", "encoder": "#56b4e9", "stack": "#0072b2", "ranking": "#e69f00"}
_SPARE_COLOURS = ("#009e73", "#cc79a7", "#d55e00", "#f0e442")
_EDGE = {"edgecolor": "white", "linewidth": 0.8}


class Figure(_Figure):
    """A matplotlib figure that a notebook shows as PNG, whatever its back end."""

    def __init__(self, width: float, height: float):
        super().__init__(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(self)

    def png(self) -> bytes:
        """The picture as PNG bytes, the same for the same figure."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()

    _repr_png_ = png


def stage_colours(stages: Sequence[str]) -> dict[str, str]:
    """Colour of each stage; those without one of their own take spare colours in order."""
    spare = iter(_SPARE_COLOURS * (1 + len(stages)))
    return {stage: STAGE_COLOURS.get(stage) or next(spare) for stage in stages}


def stage_waterfall(stages: Mapping[str, float], title: str = "Where the time goes") -> Figure:
    """One request as a waterfall: stages (name -> ms) in order, each bar starting where the one before ended."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(7.5, 1.1 + 0.38 * (len(stages) + 1))
        _waterfall(figure.subplots(), stages, title)
    return figure


def _waterfall(axes, stages: Mapping[str, float], title: str) -> None:
    colours, start, total = stage_colours(list(stages)), 0.0, sum(stages.values())
    for row, (stage, width) in enumerate(stages.items()):
        axes.barh(row, width, left=start, color=colours[stage], **_EDGE)
        share = f" ({width / total:.0%})" if total else ""
        axes.annotate(f"{width:.2f} ms{share}", (start + width, row), (4, 0), textcoords="offset points", va="center")
        start += width
    axes.barh(len(stages), total, color="#444444", **_EDGE)
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
            axes.barh(list(rows), widths, left=list(starts.values()), color=colours[stage], label=stage, **_EDGE)
            starts = {name: start + width for (name, start), width in zip(starts.items(), widths)}
        for row, total in enumerate(starts.values()):
            axes.annotate(f"{total:.2f} ms", (total, row), (4, 0), textcoords="offset points", va="center", weight="bold")
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="ms", title=title, xlim=(0, max(starts.values(), default=0) * 1.15 or 1))
        if stages:
            figure.legend(loc="outside upper right", ncols=len(stages), frameon=False, fontsize=9)
        if source:
            figure.supxlabel(textwrap.fill(source, 125), fontsize=7, color="#666666", x=0.01, ha="left")
    return figure


def latency_by_length(rows: Mapping[int, Mapping[str, float]], length: int | None = None) -> Figure:
    """Stage times against history length: rows is {events: {stage: ms}}; with `length`, that row's waterfall stands beside it."""
    rows = dict(sorted(rows.items()))
    stages = list(dict.fromkeys(stage for row in rows.values() for stage in row))
    with matplotlib.rc_context(STYLE):
        figure = Figure(10 if length is not None else 7.5, 3.2)
        panels = figure.subplots(1, 2 if length is not None else 1, squeeze=False)[0]
        if length is not None:
            _waterfall(panels[0], rows[length], f"{length} events")
        axes, bottom = panels[-1], [0.0] * len(rows)
        ticks = [str(n) for n in rows]
        for stage, colour in stage_colours(stages).items():
            heights = [row.get(stage, 0.0) for row in rows.values()]
            axes.bar(ticks, heights, bottom=bottom, color=colour, label=stage, width=0.8, **_EDGE)
            bottom = [b + h for b, h in zip(bottom, heights)]
        if length is not None:
            axes.get_xticklabels()[ticks.index(str(length))].set_weight("bold")
        axes.tick_params(axis="x", rotation=90 if len(rows) > 12 else 0)
        axes.grid(axis="x", visible=False)
        axes.set(xlabel="events of history", ylabel="ms", title="Latency against history length")
        axes.legend(frameon=False, fontsize=9)
    return figure


class Explorer(ipywidgets.VBox):
    """Controls above a label and a picture: every change of a control calls `draw(**values) -> (text, Figure)`.

    `controls` maps an argument of `draw` to its widget. CSS classes: `<name>-<argument>` on each control, `<name>-label` and
    `<name>-image` on the answer. An error of the first drawing is raised; a later one is shown in the label.
    """

    def __init__(self, name: str, draw: Callable[..., tuple[str, _Figure]], **controls: ipywidgets.Widget):
        self.controls, self._draw = controls, draw
        self.label = ipywidgets.Label().add_class(f"{name}-label")
        self.image = ipywidgets.Image(format="png", layout=ipywidgets.Layout(max_width="100%")).add_class(f"{name}-image")
        for argument, control in controls.items():
            control.add_class(f"{name}-{argument.replace('_', '-')}")
            control.observe(self._changed, names="value")
        self._redraw()
        super().__init__([*controls.values(), self.label, self.image])

    def _redraw(self) -> None:
        text, figure = self._draw(**{argument: control.value for argument, control in self.controls.items()})
        self.image.value = figure.png()
        self.label.value = text

    def _changed(self, _change) -> None:
        try:
            self._redraw()
        except Exception as error:
            self.label.value = f"{type(error).__name__}: {error}"


def time_lengths(recommender, history, lengths: Sequence[int], repeats: int = 3) -> dict[int, dict[str, float]]:
    """Stage times (ms) of a real recommendation from the last n events of `history`, for each n: the median of `repeats` runs."""
    rows = {}
    for n in lengths:
        runs = [recommender.recommend(history[len(history) - n :]).stages for _ in range(repeats)]
        rows[n] = sorted(runs, key=lambda stages: sum(stages.values()))[repeats // 2]
    return rows


def latency_explorer(recommender, histories: Sequence) -> Explorer:
    """Choose a user and how much of the history to send: each step runs a real recommendation and draws its stages.

    CSS classes: latency-user, latency-length, latency-label, latency-image.
    """
    histories = {history.user: history for history in histories}
    longest = min(min(len(h) for h in histories.values()), recommender.config.max_history)
    seen: dict[str, dict[int, dict[str, float]]] = {}

    def draw(user: str, length: int) -> tuple[str, _Figure]:
        rows = seen.setdefault(user, {})
        rows |= time_lengths(recommender, histories[user], [length])
        return f"{length} events of {user}: {sum(rows[length].values()):.2f} ms (measured here)", latency_by_length(rows, length)

    users = ipywidgets.Dropdown(options=list(histories), description="user")
    step = max(longest // 16, 1)
    length = ipywidgets.IntSlider(
        value=1 + step * (longest // step // 2), min=1, max=longest, step=step, description="history length",
        style={"description_width": "initial"}, continuous_update=False,
    )  # fmt: skip
    return Explorer("latency", draw, user=users, length=length)
