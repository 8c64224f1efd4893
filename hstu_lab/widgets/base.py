"""What every view shares: the style, `Figure`, and `Explorer`, which puts controls above a picture.

Milliseconds everywhere. A stage has the same colour in every figure (Okabe and Ito's palette, safe for colour-blind eyes).
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Sequence

import ipywidgets
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as _Figure
from matplotlib.ticker import LogLocator, NullFormatter

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
EDGE = {"edgecolor": "white", "linewidth": 0.8}


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


def plain_log(axis) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5, which do not lie over each other as matplotlib's minor ones do."""
    axis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axis.set_major_formatter("{x:,.6g}")
    axis.set_minor_formatter(NullFormatter())


def source_line(figure: Figure, source: str) -> None:
    """Where the numbers come from (`Record.label`), in small print below."""
    if source:
        figure.supxlabel(textwrap.fill(source, 125), fontsize=7, color="#666666", x=0.01, ha="left")


def format_bytes(count: float) -> str:
    """Bytes in decimal units, three digits: 12.8 GB."""
    power = min(int(math.log10(max(count, 1) * 1.0005) // 3), 4)
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
