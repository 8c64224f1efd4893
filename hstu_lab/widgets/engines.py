"""Notebook 07: int8 ranges, builds by phase, and the latency cliff at the edges of an engine's profiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ipywidgets
import matplotlib
import numpy as np

from hstu_lab import roofline
from hstu_lab.config import ModelConfig, preset
from hstu_lab.hardware import DEVICES
from hstu_lab.onnx_precision import LEVELS, best_range
from hstu_lab.widgets.base import EDGE, STYLE, Explorer, Figure, source_line

EDGE_SETS = {
    "one engine: 2048": (2048,),
    "two: 512, 2048": (512, 2048),
    "powers of two: 64 … 2048": (64, 128, 256, 512, 1024, 2048),
    "every 256": tuple(range(256, 2049, 256)),
}


def stack_ms(config: ModelConfig, batch: int, length: int, device: str, dtype: str = "fp16") -> float:
    """Milliseconds that the device's ceilings allow for the stack over `length` events (modelled)."""
    ops = roofline.stack(config, batch, length, dtype=dtype)
    return roofline.total([roofline.predict(op, DEVICES[device], dtype) for op in ops]) * 1e3


def padded_length(length: int, edges: Sequence[int]) -> int | None:
    """The engine's length that a history of `length` is padded to; None where every engine is too short."""
    return next((edge for edge in sorted(edges) if length <= edge), None)


def profile_cliff(
    edges: Sequence[int], length: int, batch: int, device: str, recorded: Mapping[int, float] | None = None, source: str = ""
) -> Figure:
    """What a history costs where it is padded to the next of `edges`, beside what its own length would cost.

    `recorded`: {length: ms} of real engines to mark; `source` says where they come from. The lines are modelled.
    """
    config, longest = preset("gr-3b"), max(edges)
    exact = np.unique(np.append(np.linspace(1, 2048, 97).astype(int), edges))
    tight = [stack_ms(config, batch, int(n), device) for n in exact]
    starts, steps = [0, *sorted(edges)[:-1]], [stack_ms(config, batch, edge, device) for edge in sorted(edges)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(7.5, 3.6 if source else 3.3)
        axes = figure.subplots()
        for start, end, ms in zip(starts, sorted(edges), steps):
            axes.plot([start, end], [ms, ms], color="#d55e00", linewidth=2, solid_capstyle="butt")
            axes.fill_between(exact, tight, ms, where=(exact >= start) & (exact <= end), color="#d55e00", alpha=0.15, linewidth=0)
        axes.plot(exact, tight, color="#0072b2", label="its own length")
        axes.plot([], [], color="#d55e00", linewidth=2, label="padded to the engine's length")
        if recorded:
            axes.plot(list(recorded), list(recorded.values()), "k^", markersize=6, label="recorded engines")
        if longest < 2048:
            axes.axvspan(longest, 2048, color="#cccccc", hatch="//", alpha=0.4, label="refused")
        axes.axvline(length, color="#444444", linestyle=":", label="this history")
        axes.set(
            xlim=(0, 2048),
            ylim=(0, None),
            xlabel="events of history",
            ylabel="ms",
            title=f"gr-3b stack, batch {batch}, {device} (modelled)",
        )
        axes.legend(fontsize=9, loc="lower right", framealpha=0.9, edgecolor="none")
        source_line(figure, source)
    return figure


def cliff_text(edges: Sequence[int], length: int, batch: int, device: str) -> str:
    """The same in one line, for one more event as well."""
    config, at = preset("gr-3b"), padded_length(length, edges)
    if at is None:
        return f"{length} events: refused, the longest engine takes {max(edges)}"
    own, paid = stack_ms(config, batch, length, device), stack_ms(config, batch, at, device)
    after = padded_length(length + 1, edges)
    more = "refused" if after is None else f"{stack_ms(config, batch, after, device):.2f} ms"
    return f"{length} events padded to {at}: {paid:.2f} ms for {own:.2f} ms of work; one event more: {more} (modelled)"


def cliff_explorer(recorded: Mapping[int, Mapping[int, float]] | None = None, source: str = "") -> Explorer:
    """Choose lengths to build engines for, a history and a device. `recorded`: {batch: {length: ms}} of real engines.

    CSS classes: cliff-edges, cliff-length, cliff-batch, cliff-device, cliff-label, cliff-image.
    """

    def draw(edges: str, length: int, batch: int, device: str) -> tuple[str, Figure]:
        chosen = EDGE_SETS[edges]
        return cliff_text(chosen, length, batch, device), profile_cliff(
            chosen, length, batch, device, (recorded or {}).get(batch), source
        )

    wide = {"description_width": "initial"}
    return Explorer(
        "cliff",
        draw,
        edges=ipywidgets.Dropdown(options=list(EDGE_SETS), value="powers of two: 64 … 2048", description="engines", style=wide),
        length=ipywidgets.IntSlider(
            value=512, min=16, max=2048, step=16, description="history", continuous_update=False, style=wide
        ),
        batch=ipywidgets.Dropdown(options=[1, 8], description="batch"),
        device=ipywidgets.Dropdown(options=list(DEVICES), value="A100-SXM4-80GB", description="device"),
    )


def int8_ranges(magnitudes: np.ndarray, title: str) -> Figure:
    """How often a tensor takes which magnitude, and the mean squared error of int8 for each range that the scale could cover."""
    largest, chosen = float(magnitudes.max()), best_range(magnitudes).step * LEVELS
    ends = largest * np.linspace(0.05, 1, 80)
    clipped = [np.square(np.maximum(magnitudes - end, 0)).mean() for end in ends]
    rounded = [(magnitudes <= end).mean() * (end / LEVELS) ** 2 / 12 for end in ends]
    with matplotlib.rc_context(STYLE):
        figure = Figure(8, 3)
        left, right = figure.subplots(1, 2)
        left.hist(magnitudes, bins=80, color="#56b4e9", log=True)
        left.axvline(chosen, color="#d55e00")
        left.set(xlabel="magnitude", ylabel="values", title=title)
        right.plot(ends, clipped, color="#cc79a7", label="clipping")
        right.plot(ends, rounded, color="#009e73", label="rounding")
        right.plot(ends, np.add(clipped, rounded), color="#444444", label="both")
        right.axvline(chosen, color="#d55e00", label="chosen range")
        right.set(
            xlabel="range of the scale", ylabel="mean squared error", title="What a range costs", ylim=(0, max(rounded) * 2)
        )
        right.legend(frameon=False, fontsize=9)
    return figure


def build_phases(seconds: Mapping[str, Mapping[str, float]]) -> Figure:
    """Where builds spent their time: {engine: {phase: s}} as stacked bars; phases below a fiftieth of the longest are joined."""
    longest = max(sum(phases.values()) for phases in seconds.values())
    names = list(dict.fromkeys(p for phases in seconds.values() for p in phases))
    shown = [n for n in names if max(phases.get(n, 0) for phases in seconds.values()) > longest / 50]
    rows = {
        e: {n: phases.get(n, 0.0) for n in shown} | {"other": sum(v for n, v in phases.items() if n not in shown)}
        for e, phases in seconds.items()
    }
    colours = ("#0072b2", "#56b4e9", "#009e73", "#e69f00", "#cc79a7", "#d55e00", "#f0e442", "#444444")
    with matplotlib.rc_context(STYLE):
        figure = Figure(8, 0.9 + 0.32 * len(rows))
        axes, starts = figure.subplots(), dict.fromkeys(rows, 0.0)
        for name, colour in zip([*shown, "other"], (*colours[: len(shown)], "#cccccc")):
            widths = [row[name] for row in rows.values()]
            axes.barh(list(rows), widths, left=list(starts.values()), color=colour, label=name, **EDGE)
            starts = {engine: start + width for (engine, start), width in zip(starts.items(), widths)}
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="seconds, measured here", title="Building, by phase")
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
