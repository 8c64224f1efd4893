"""Notebook 03: operators under a device's ceilings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import ipywidgets
import matplotlib
import numpy as np

from hstu_lab.measure import format_seconds
from hstu_lab.widgets.base import EDGE, STYLE, Explorer, Figure, source_line

BOUND_COLOURS = {
    "matrix": "#0072b2", "memory": "#e69f00", "special functions": "#cc79a7", "instructions": "#56b4e9", "waiting": "#009e73",
    "launch": "#999999",
}  # fmt: skip


def roofline_plot(operators: Sequence, device, dtype: str = "bf16", title: str = "", *, summed: bool = True) -> Figure:
    """Where a device's ceilings leave each `roofline.Operator` (modelled): left the roofline, right the time of all its launches.

    summed: the operators run one after another, so that their sum has a meaning. Colours say what an operator is bound by;
    operators without a matrix product have no place on the left. A pink dash is one operator's ceiling of special functions.
    """
    from hstu_lab.roofline import predict

    predictions = [predict(op, device, dtype) for op in operators]
    peak, tera = device.peak(dtype), 1e12 if device.peak(dtype) > 1e13 else 1e9
    dots = [(n, p) for n, p in enumerate(predictions, 1) if p.operator.flops]
    reached = [p.flops_per_second / tera for _, p in dots]
    low, high = min([device.ridge(dtype), *(p.operator.intensity for _, p in dots)]) / 4, 8 * max(device.ridge(dtype), 256)
    floor = min([peak / tera / 30, *reached]) / 2.5
    with matplotlib.rc_context(STYLE):
        figure = Figure(10.5, max(3.8, 1.4 + 0.26 * len(predictions)))
        left, right = figure.subplots(1, 2, width_ratios=(5, 4))
        ridge = device.ridge(dtype)
        left.plot([low, ridge, high], [device.bandwidth * low / tera, peak / tera, peak / tera], color="#444444", linewidth=1.5)
        left.annotate(f"{peak / tera:.4g}", (high, peak / tera), (0, 4), textcoords="offset points", ha="right", fontsize=8)
        left.axvline(ridge, color="#bbbbbb", linewidth=1, linestyle="--")
        left.annotate(f"ridge {ridge:.0f}", (ridge, floor), (3, 5), textcoords="offset points", fontsize=8, color="#666666")
        labels: dict[tuple[float, float], list[int]] = {}
        for (number, p), y in zip(dots, reached):
            x = p.operator.intensity
            if p.operator.special:
                pink = device.special * p.operator.flops / p.operator.special / tera
                left.plot(x, pink, "_", color=BOUND_COLOURS["special functions"], markersize=14, markeredgewidth=2)
            left.plot(x, y, "o", color=BOUND_COLOURS[p.bound], markersize=9, markeredgecolor="white")
            same = (at for at in labels if max(abs(math.log10(x / at[0])), abs(math.log10(y / at[1]))) < 0.12)
            labels.setdefault(next(same, (x, y)), []).append(number)
        for at, numbers in labels.items():
            text = ", ".join(map(str, numbers))
            left.annotate(text, at, (7, -9), textcoords="offset points", fontsize=9, weight="bold")
        left.set(xscale="log", yscale="log", xlim=(low, high), ylim=(floor, 3 * peak / tera), title=title or device.name)
        left.set(xlabel="FLOP per byte", ylabel=f"{'TFLOP' if tera == 1e12 else 'GFLOP'}/s ({dtype}, modelled)")
        _bound_bars(right, [(f"{n}  {p.operator.name}", p) for n, p in enumerate(predictions, 1)])
        total = sum(p.seconds for p in predictions)
        right.set_title(f"{format_seconds(total)} in all (modelled)" if summed else "Time of each (modelled)")
        shown = {p.bound for p in predictions}
        handles = [matplotlib.patches.Patch(color=colour, label=kind) for kind, colour in BOUND_COLOURS.items() if kind in shown]
        figure.legend(handles=handles, loc="outside lower right", ncols=4, frameon=False, fontsize=9, title="bound by")
    return figure


def _bound_bars(axes, rows: Sequence[tuple]) -> None:
    """(label, Prediction) as bars of milliseconds, coloured by what binds them."""
    times = [1e3 * p.seconds for _, p in rows]
    axes.barh(range(len(rows)), times, color=[BOUND_COLOURS[p.bound] for _, p in rows], **EDGE)
    for row, ((_, p), ms) in enumerate(zip(rows, times)):
        each = f" ({p.operator.count} x {format_seconds(p.seconds / p.operator.count)})" if p.operator.count > 1 else ""
        axes.annotate(
            f"{format_seconds(p.seconds)}{each}", (ms, row), (3, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=9, ha="left")
    axes.tick_params(axis="y", length=0, pad=_widest([label for label, _ in rows]))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="ms, all launches", xlim=(0, max(times) * 1.6 or 1))


def _widest(labels: Sequence[str]) -> float:
    """Points that left-aligned labels of size 9 need."""
    return 5.2 * max(map(len, labels))


def wave_plot(device, tiles: Mapping[str, int]) -> Figure:
    """Wave quantisation (modelled): time in whole waves, and the share of SMs at work, against output tiles.

    tiles: {label: output tiles of a product}, drawn as dots.
    """
    from hstu_lab.roofline import wave_quantisation

    most = max([4 * device.sms, *tiles.values()])
    counts = np.arange(1, most + 1)
    busy = np.array([1 / wave_quantisation(int(n), device.sms) for n in counts])
    with matplotlib.rc_context(STYLE):
        figure = Figure(10, 3.4)
        left, right = figure.subplots(1, 2)
        left.plot(counts, np.ceil(counts / device.sms), color="#0072b2", drawstyle="steps-pre", label="whole waves")
        left.plot(counts, counts / device.sms, color="#999999", linestyle="--", linewidth=1, label="spread evenly")
        left.set(xlabel="output tiles", ylabel="time, in waves", title=f"{device.name}: {device.sms} SMs", ylim=(0, None))
        left.legend(frameon=False, fontsize=9)
        right.plot(counts, 100 * busy, color="#0072b2", linewidth=1)
        for (label, n), colour in zip(tiles.items(), ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#444444") * len(tiles)):
            right.plot(n, 100 * busy[n - 1], "o", color=colour, label=f"{label}: {n} tiles, {busy[n - 1]:.0%}")
        right.set(xlabel="output tiles", ylabel="% of SMs at work", title="The sawtooth (modelled)", ylim=(0, 105))
        if tiles:
            right.legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def prediction_bars(panels: Mapping[str, Mapping[str, Sequence]], xlabel: str = "ms (modelled)") -> Figure:
    """Stacked bars of predicted time by operator: panels is {title: {label: [roofline.Prediction, ...]}}, side by side."""
    names = list(dict.fromkeys(p.operator.name for rows in panels.values() for row in rows.values() for p in row))
    palette = ("#999999", "#0072b2", "#e69f00", "#56b4e9", "#009e73", "#444444", "#cc79a7", "#d55e00", "#f0e442")
    colours = dict(zip(names, palette * len(names)))
    with matplotlib.rc_context(STYLE):
        figure = Figure(10, 1.5 + 0.36 * max(map(len, panels.values())))
        for axes, (title, rows) in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items()):
            starts = dict.fromkeys(rows, 0.0)
            for name in names:
                widths = [1e3 * sum(p.seconds for p in row if p.operator.name == name) for row in rows.values()]
                axes.barh(list(rows), widths, left=list(starts.values()), color=colours[name], label=name, height=0.75)
                starts = {label: start + width for (label, start), width in zip(starts.items(), widths)}
            for row, ms in enumerate(starts.values()):
                axes.annotate(f"{ms:.2f} ms", (ms, row), (4, 0), textcoords="offset points", va="center", weight="bold")
            axes.grid(axis="y", visible=False)
            axes.set(xlabel=xlabel, title=title, xlim=(0, max(starts.values()) * 1.2 or 1))
        axes.invert_yaxis()
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    return figure


def against(rows: Mapping[str, tuple[float, float]], names: tuple[str, str], title: str = "", source: str = "") -> Figure:
    """Pairs of times (seconds), e.g. predicted and measured, one below the other on a logarithmic axis, with their ratio."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(8, (1.7 if source else 1.4) + 0.5 * len(rows))
        axes, at = figure.subplots(), np.arange(len(rows))
        values = [1e3 * seconds for pair in rows.values() for seconds in pair]
        for shift, name, colour, pair in ((-0.19, names[0], "#56b4e9", 0), (0.19, names[1], "#0072b2", 1)):
            axes.barh(at + shift, values[pair::2], height=0.36, color=colour, label=name, **EDGE)
        for row, (first, second) in enumerate(rows.values()):
            axes.annotate(f"{second / first:.2f}x", (1e3 * max(first, second), row), (5, 0), textcoords="offset points",
                          va="center", weight="bold")  # fmt: skip
        axes.set_yticks(at, list(rows))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(xscale="log", xlabel="ms, logarithmic", title=title, xlim=(min(values) / 3, max(values) * 4))
        axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5) if max(values) < 80 * min(values) else (1,)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=9)
        source_line(figure, source)
    return figure


def roofline_explorer(config, devices: Sequence) -> Explorer:
    """Choose the work and the device: every operator of the stack of a model like `config` moves on the roofline (modelled).

    Work: prefill of whole histories, or decode of one more event after them. CSS classes: roofline-work, roofline-length,
    roofline-batch, roofline-head-size, roofline-dtype, roofline-device, roofline-label, roofline-image.
    """
    from hstu_lab import roofline

    by_name = {device.name: device for device in devices}

    def draw(work: str, length: int, batch: int, head_size: int, dtype: str, device: str) -> tuple[str, Figure]:
        shaped = config.replace(num_heads=max(config.d_model // head_size, 1), d_qk=head_size, d_v=head_size)
        operators = roofline.stack(shaped, batch, length if work == "prefill" else 1, length, dtype)
        predictions = [roofline.predict(op, by_name[device], dtype) for op in operators]
        slowest = max(predictions, key=lambda p: p.seconds)
        seconds = roofline.total(predictions)
        text = (
            f"{work}, {batch} x {length}, {shaped.num_heads} heads of {head_size}: {1e3 * seconds:.3g} ms, "
            f"{roofline.flops(operators) / seconds / 1e12:.3g} TFLOP/s; longest: {slowest.operator.name}, {slowest.bound}"
        )
        return text, roofline_plot(operators, by_name[device], dtype, f"{work}: {device}")

    def choice(name: str, options: Sequence, value) -> ipywidgets.SelectionSlider:
        style = {"description_width": "initial"}
        return ipywidgets.SelectionSlider(
            options=options, value=value, description=name, style=style, layout={"width": "60%"}, continuous_update=False
        )

    return Explorer(
        "roofline", draw,
        work=ipywidgets.Dropdown(options=["prefill", "decode"], description="work"),
        length=choice("history length", [2**n for n in range(6, 14)], 512),
        batch=choice("batch", [2**n for n in range(11)], 8),
        head_size=choice("head size", [16, 32, 64, 128, 256], config.d_qk),
        dtype=ipywidgets.Dropdown(options=["bf16", "tf32", "fp32", "int8"], description="dtype"),
        device=ipywidgets.Dropdown(options=list(by_name), description="device"),
    )  # fmt: skip
