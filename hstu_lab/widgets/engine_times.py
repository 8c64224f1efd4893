"""Notebook 07: the same work in several engines, and the kinds of kernels that its time goes to."""

from __future__ import annotations

import re
from collections.abc import Mapping

import matplotlib
import numpy as np

from hstu_lab.widgets.base import EDGE, STYLE, Figure, source_line

KERNEL_KINDS = {
    "products": r"nvjet|gemm|cutlass|xmma|linear_kernel|cublas|matmul|(?<![a-z])fc",
    "scores to weights": r"attention|masked_fill|mulsel|gat(res|eql)",
    "norms and gates": r"norm|mea|sqrdiv",
    "copies, casts and turns": r"copy|memcpy|memset|clone|permut|transpose|restra|shuffle|reformat|catarray",
}
"""Kinds of kernels by what their names contain, the first that fits; what fits none is "other pointwise".

TensorRT's compiler names a kernel after its operators, three letters each: `GatResAdd…Sel` gathers, reshapes, adds … selects.
"""
OTHER = "other pointwise"
COLOURS = {
    "products": "#0072b2",
    "scores to weights": "#d55e00",
    "norms and gates": "#009e73",
    "copies, casts and turns": "#cc79a7",
    OTHER: "#bbbbbb",
}


def kernel_kind(name: str) -> str:
    """The kind of a kernel by its name."""
    return next((kind for kind, pattern in KERNEL_KINDS.items() if re.search(pattern, name.lower())), OTHER)


def time_by_kind(kernels: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each kind, in `COLOURS`' order, from seconds by kernel name."""
    spent = dict.fromkeys(COLOURS, 0.0)
    for name, seconds in kernels.items():
        spent[kernel_kind(name)] += seconds
    return spent


def kernel_times(engines: Mapping[str, Mapping[str, float]], title: str, source: str = "") -> Figure:
    """One bar an engine, {engine: {kernel: seconds}}, its milliseconds on the GPU split by kind of kernel."""
    rows = {engine: time_by_kind(kernels) for engine, kernels in engines.items()}
    with matplotlib.rc_context(STYLE):
        figure = Figure(8, 1.5 + 0.38 * len(rows))
        axes, starts = figure.subplots(), np.zeros(len(rows))
        for kind, colour in COLOURS.items():
            widths = np.array([row[kind] for row in rows.values()]) * 1e3
            axes.barh(list(rows), widths, left=starts, color=colour, label=kind, **EDGE)
            starts += widths
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="ms on the GPU", title=title)
        axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.28))
        source_line(figure, source)
    return figure


def engine_ways(ways: Mapping[str, Mapping[str, float]], title: str, source: str = "") -> Figure:
    """Grouped bars, {way: {work: ms}}, on a logarithmic axis; each bar carries its number."""
    work = list(dict.fromkeys(name for row in ways.values() for name in row))
    height = 0.8 / len(work)
    with matplotlib.rc_context(STYLE):
        figure = Figure(8, 1.2 + 0.24 * len(work) * len(ways))
        axes = figure.subplots()
        for i, (name, colour) in enumerate(zip(work, ("#0072b2", "#e69f00", "#009e73", "#cc79a7"))):
            places = [(j + (i - (len(work) - 1) / 2) * height, row[name]) for j, row in enumerate(ways.values()) if name in row]
            bars = axes.barh([y for y, _ in places], [ms for _, ms in places], height, color=colour, label=name, **EDGE)
            axes.bar_label(bars, fmt="%.3g", fontsize=8, padding=2)
        axes.set_yticks(range(len(ways)), list(ways))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="ms, logarithmic", xscale="log", title=title)
        axes.margins(x=0.15)
        axes.legend(frameon=False, fontsize=9)
        source_line(figure, source)
    return figure
