"""Notebooks 04 and 05: tiles, rates and shares of a ceiling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import ipywidgets
import matplotlib
import numpy as np

from hstu_lab.widgets.base import EDGE, STYLE, Explorer, Figure, source_line

TILE_COLOURS = {"skipped": "#eeeeee", "whole": "#0072b2", "masked": "#e69f00"}
UNIT_CLOCKS = {
    "tensor cores": "#0072b2", "special functions": "#d55e00", "float32": "#009e73", "conversions": "#cc79a7", "issue": "#999999"
}  # fmt: skip
_TILE_EDGE = {"edgecolor": "white", "linewidth": 0.5}


def tile_kinds(length: int, block_m: int, block_n: int) -> np.ndarray:
    """What a causal kernel does with each tile, (query tiles, key tiles): 0 skipped, 1 computed whole, 2 computed and masked."""
    first = np.arange(0, length, block_m)[:, None]
    keys = np.arange(0, length, block_n)[None, :]
    last = np.minimum(first + block_m, length) - 1
    return np.where(keys > last, 0, np.where(keys + block_n - 1 <= first, 1, 2))


def tile_map(length: int, tiles: Sequence[tuple[int, int]]) -> Figure:
    """Which tiles of a causal `length` x `length` score matrix are computed, for each (block_m, block_n); computed, not measured.

    Titles give the scores computed over the scores that count, queries x keys / causal pairs.
    """
    useful = length * (length + 1) / 2
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(3.4 * len(tiles), 3.9)
        for axes, (block_m, block_n) in zip(figure.subplots(1, len(tiles), squeeze=False)[0], tiles):
            kinds = tile_kinds(length, block_m, block_n)
            for (row, column), kind in np.ndenumerate(kinds):
                corner, size = (column * block_n, row * block_m), (block_n, block_m)
                axes.add_patch(
                    matplotlib.patches.Rectangle(corner, *size, facecolor=list(TILE_COLOURS.values())[kind], **_TILE_EDGE)
                )
            axes.plot([0, length], [0, length], color="#444444", linewidth=0.8)
            wasted = np.count_nonzero(kinds) * block_m * block_n / useful
            axes.set_title(f"{block_m} x {block_n}: {np.count_nonzero(kinds)} of {kinds.size}, {wasted:.2f}x")
            axes.set(xlim=(0, length), ylim=(length, 0), aspect="equal", xlabel="keys", ylabel="queries")
        handles = [matplotlib.patches.Patch(color=colour, label=kind) for kind, colour in TILE_COLOURS.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def tile_explorer() -> Explorer:
    """Choose the length and the tiles of a causal kernel; the map of its tiles follows (computed, not measured).

    CSS classes: tiles-length, tiles-block-m, tiles-block-n, tiles-label, tiles-image.
    """

    def draw(length: int, block_m: int, block_n: int) -> tuple[str, Figure]:
        kinds = tile_kinds(length, block_m, block_n)
        skipped, whole, masked = (np.count_nonzero(kinds == kind) for kind in range(3))
        return f"{whole} tiles whole, {masked} masked, {skipped} skipped", tile_map(length, [(block_m, block_n)])

    def choice(name: str, options: Sequence[int], value: int) -> ipywidgets.SelectionSlider:
        return ipywidgets.SelectionSlider(options=options, value=value, description=name, continuous_update=False)

    return Explorer(
        "tiles", draw, length=choice("events", [100, 256, 500, 1000, 1024, 2000], 1000),
        block_m=choice("queries", [32, 64, 128, 256], 128), block_n=choice("keys", [32, 64, 128, 256], 64),
    )  # fmt: skip


def rates_by_length(panels: Mapping[str, Mapping[str, Mapping[int, float]]], source: str = "") -> Figure:
    """TFLOP/s against sequence length: panels is {title: {series: {length: TFLOP/s}}}, side by side; `source` labels them."""
    palette = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#444444")
    with matplotlib.rc_context(STYLE):
        figure = Figure(10, 4)
        for axes, (title, series) in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items()):
            for (name, points), colour in zip(series.items(), palette * len(series)):
                axes.plot(list(points), list(points.values()), "o-", color=colour, label=name, markersize=5)
            lengths = sorted({length for points in series.values() for length in points})
            axes.set_xscale("log", base=2)
            axes.set_xticks(lengths, list(map(str, lengths)))
            axes.set(xlabel="events in each sequence", title=title)
        highest = max(rate for series in panels.values() for points in series.values() for rate in points.values())
        figure.axes[0].set(ylabel="useful TFLOP/s", ylim=(0, 1.08 * highest))
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, fontsize=9)
        source_line(figure, source)
    return figure


def share_bars(rows: Mapping[str, float], target: Callable[[str], float | None], title: str = "", source: str = "") -> Figure:
    """Shares of a ceiling as bars with their targets (None: there is none); orange where the target is missed."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(8.5, 1.4 + 0.26 * len(rows))
        axes = figure.subplots()
        for row, (name, share) in enumerate(rows.items()):
            wanted = target(name)
            colour = "#999999" if wanted is None else "#0072b2" if share >= wanted else "#e69f00"
            axes.barh(row, 100 * share, color=colour, **EDGE)
            axes.annotate(
                f"{share:.1%}", (100 * max(share, wanted or 0), row), (4, 0), textcoords="offset points", va="center", fontsize=9
            )
            if wanted is not None:
                axes.plot([100 * wanted] * 2, [row - 0.4, row + 0.4], color="#444444", linewidth=1.5)
        axes.set_yticks(range(len(rows)), list(rows), fontsize=9)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="% of the ceiling; dark line: the target", title=title, xlim=(0, 100 * max(rows.values()) * 1.12))
        source_line(figure, source)
    return figure


def unit_clocks(
    rows: Mapping[str, Mapping[str, float]], recorded: Mapping[str, float], title: str = "", source: str = ""
) -> Figure:
    """Clocks a tile that each unit is busy, {kernel: {unit: clocks}}, as bars; a dark line at a tile's `recorded` clocks."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(8.5, 1.5 + 0.85 * len(rows))
        axes = figure.subplots()
        for row, (name, clocks) in enumerate(rows.items()):
            for number, (unit, colour) in enumerate(UNIT_CLOCKS.items()):
                y = row + 0.15 * (number - (len(UNIT_CLOCKS) - 1) / 2)
                axes.barh(y, clocks[unit], height=0.15, color=colour, label=unit if row == 0 else None, **EDGE)
                axes.annotate(
                    f"{clocks[unit]:.0f}", (clocks[unit], y), (3, 0), textcoords="offset points", va="center", fontsize=7
                )
            if name in recorded:
                axes.plot([recorded[name]] * 2, [row - 0.42, row + 0.42], color="#444444", linewidth=1.5)
        axes.set_yticks(range(len(rows)), list(rows), fontsize=9)
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.grid(axis="y", visible=False)
        longest = max([*recorded.values(), *(clocks for units in rows.values() for clocks in units.values())])
        axes.set(xlabel="clocks a tile of 64 x 64; dark line: recorded", title=title, xlim=(0, 1.1 * longest))
        figure.legend(
            *axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(UNIT_CLOCKS), frameon=False, fontsize=9
        )
        source_line(figure, source)
    return figure
