"""Notebook 05: where elements lie in shared memory, who holds them in registers, and what runs beside what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ipywidgets
import matplotlib
import numpy as np
from matplotlib.patches import Rectangle

from hstu_lab.widgets.base import EDGE, STYLE, Explorer, Figure, source_line

GROUP_COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#a6d854", "#f0e442", "#e69f00", "#d55e00", "#cc79a7")
"""Of the eight groups of four banks: a 16-byte piece lies in one of them, where rows are aligned."""

BANKS, PIECE = 32, 8
"""Banks of shared memory; half-precision elements of a 16-byte piece."""

UNIT_COLOURS = {"scores": "#0072b2", "SiLU": "#e69f00", "values": "#56b4e9"}


def _algebra():
    """`ops.cute_layouts`, imported when it is needed: the DSL takes two seconds, and the other views do without it."""
    from hstu_lab.ops import cute_layouts

    return cute_layouts


def bank_map(rows: int, columns: int, padding: int, swizzle_bits: int, access: str, index: int) -> Figure:
    """A tile of half-precision elements in shared memory, by 16-byte pieces, and the banks that eight threads load at once.

    Left: colour and number say which four of the 32 banks hold a piece; outlined are the pieces of one access. Right: words
    that each bank must deliver; the highest bar is the number of passes. Computed by CuTe's layout algebra, not measured.
    """
    algebra = _algebra()
    offsets = algebra.shared_offsets(rows, columns, padding, swizzle_bits)
    touched = algebra.pieces_touched(access, rows, columns, index)
    words = algebra.words_per_bank(offsets, touched)
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(9.6, 3.6)
        tile, banks = figure.subplots(1, 2, width_ratios=(1.1, 1))
        for row in range(rows):
            for piece in range(columns // PIECE):
                group = int(offsets[row, piece * PIECE]) // PIECE % 8
                tile.add_patch(Rectangle((piece, row), 1, 1, facecolor=GROUP_COLOURS[group], **EDGE))
                text = f"{4 * group}-{4 * group + 3}"
                tile.text(piece + 0.5, row + 0.5, text, ha="center", va="center", fontsize=8, color="#222222")
        for row, piece in touched:
            tile.add_patch(Rectangle((piece + 0.04, row + 0.04), 0.92, 0.92, fill=False, edgecolor="black", linewidth=2))
        tile.set(xlim=(0, columns // PIECE), ylim=(rows, 0), xlabel="16-byte piece of the row", ylabel="row")
        tile.set_title("banks of each piece")
        tile.set_xticks(np.arange(columns // PIECE) + 0.5, range(columns // PIECE))
        tile.set_yticks(np.arange(rows) + 0.5, range(rows))
        banks.bar(range(BANKS), words, color=[GROUP_COLOURS[bank // 4] for bank in range(BANKS)])
        banks.set(xlabel="bank", ylabel="words to deliver", ylim=(0, 8.5), xlim=(-0.7, BANKS - 0.3))
        passes = int(words.max())
        banks.set_title(f"{passes} pass{'es' if passes > 1 else ''} for {len(touched)} threads")
    return figure


def bank_explorer() -> Explorer:
    """Choose padding, swizzle and access of an 8 x 64 tile; the map and the number of passes follow (computed).

    CSS classes: banks-padding, banks-swizzle-bits, banks-access, banks-index, banks-label, banks-image.
    """

    def draw(padding: int, swizzle_bits: int, access: str, index: int) -> tuple[str, Figure]:
        algebra = _algebra()
        offsets = algebra.shared_offsets(8, 64, padding, swizzle_bits)
        words = algebra.words_per_bank(offsets, algebra.pieces_touched(access, 8, 64, index))
        wasted = 100 * padding / (64 + padding)
        passes = f"{words.max()} pass{'es' if words.max() > 1 else ''}"
        text = f"{passes} where 1 would do at best; padding wastes {wasted:.0f} % of the memory"
        return text, bank_map(8, 64, padding, swizzle_bits, access, index)

    return Explorer(
        "banks", draw,
        padding=ipywidgets.SelectionSlider(options=[0, 4, 8, 16], value=0, description="padding"),
        swizzle_bits=ipywidgets.IntSlider(min=0, max=3, value=0, description="swizzle bits"),
        access=ipywidgets.ToggleButtons(options=["column", "row"], value="column", description="access"),
        index=ipywidgets.IntSlider(min=0, max=7, value=0, description="index"),
    )  # fmt: skip


def owner_map(operands: Sequence[str]) -> Figure:
    """Which thread of a warp holds which element of mma.m16n8k16's operands, coloured by thread (CuTe's tables, computed)."""
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(10.5, 4.8)
        shapes = [_algebra().mma_owners(operand).shape for operand in operands]
        axes = figure.subplots(1, len(operands), width_ratios=[shape[1] for shape in shapes], squeeze=False)[0]
        colours = matplotlib.colormaps["tab20"]
        for one, operand in zip(axes, operands):
            owners = _algebra().mma_owners(operand)
            rows, columns = min(owners.shape[0], 16), owners.shape[1]
            for row in range(rows):
                for column in range(columns):
                    thread, value = owners[row, column]
                    one.add_patch(Rectangle((column, row), 1, 1, facecolor=colours(thread % 20), alpha=0.55, **EDGE))
                    one.text(column + 0.5, row + 0.5, f"{thread}.{value}", ha="center", va="center", fontsize=6.5)
            names = {"A": ("k", "m"), "B": ("k", "n"), "C": ("n", "m"), "wgmma C": ("n", "m")}
            one.set(xlim=(0, columns), ylim=(rows, 0), xlabel=names[operand][0], ylabel=names[operand][1])
            one.set_xticks(np.arange(0, columns, 2) + 0.5, range(0, columns, 2))
            one.set_yticks(np.arange(0, rows, 2) + 0.5, range(0, rows, 2))
            one.set_title(operand if owners.shape[0] <= 16 else f"{operand}, first 16 rows")
    return figure


def schedule(order: str, groups: int, product: float, silu: float, tiles: int) -> list[tuple[int, str, float, float]]:
    """(warpgroup, work, start, end) of an attention loop over `tiles` key tiles.

    A model with two units, each doing one thing at a time. product: time of one of a tile's two matrix products on the tensor
    core; silu: of its SiLU on the special-function units. order "one by one" waits for everything, "behind" leaves the last
    tile's second product running beside the SiLU, "ahead" starts the next tile's scores as well. Raises ValueError for another
    order.
    """
    if order not in ("one by one", "behind", "ahead"):
        raise ValueError(f"order is {order!r}: use one by one, behind or ahead")
    # Work of one warpgroup: name -> (unit, duration, names it waits for).
    jobs: dict[tuple[int, str, int], tuple[str, float, list[tuple[int, str, int]]]] = {}
    for g in range(groups):
        for i in range(tiles):
            # What must be over before the scores of tile i may be issued.
            before = {"one by one": [("values", i - 1)], "behind": [("SiLU", i - 1)], "ahead": [("SiLU", i - 2)]}[order]
            jobs[g, "scores", i] = ("tensor", product, [(g, *b) for b in before if b[1] >= 0])
            jobs[g, "SiLU", i] = ("special", silu, [(g, "scores", i)])
            late = [(g, "scores", i + 1)] if order == "behind" and i + 1 < tiles else []
            jobs[g, "values", i] = ("tensor", product, [(g, "SiLU", i), *late])
    free, ends, done = {"tensor": 0.0, "special": 0.0}, {}, []
    waiting = dict(jobs)
    while waiting:
        ready = {job: max([ends[w] for w in work[2]], default=0.0) for job, work in waiting.items()
                 if all(w in ends for w in work[2])}  # fmt: skip
        job = min(ready, key=lambda j: (max(ready[j], free[waiting[j][0]]), ready[j], j[2], j[0]))
        unit, duration, _ = waiting.pop(job)
        start = max(ready[job], free[unit])
        free[unit] = ends[job] = start + duration
        done.append((job[0], job[1], start, start + duration))
    return done


def tensor_share(order: str, groups: int, product: float, silu: float, tiles: int = 64) -> float:
    """Share of the time that the tensor core works in `schedule`."""
    plan = schedule(order, groups, product, silu, tiles)
    return 2 * product * tiles * groups / max(end for *_, end in plan)


def overlap_map(orders: Sequence[str], groups: int, product: float, silu: float, tiles: int = 5) -> Figure:
    """Timelines of `schedule` for each order: the two units above each other; modelled, not measured."""
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(9.6, 0.7 + 1.25 * len(orders))
        axes = figure.subplots(len(orders), 1, sharex=True, squeeze=False)[:, 0]
        plans = [schedule(order, groups, product, silu, tiles) for order in orders]
        last = max(end for plan in plans for *_, end in plan)
        for one, order, plan in zip(axes, orders, plans):
            for group, work, start, end in plan:
                row = 1 if work == "SiLU" else 0
                one.add_patch(Rectangle((start, row + 0.06), end - start, 0.88, facecolor=UNIT_COLOURS[work], **EDGE))
                one.text((start + end) / 2, row + 0.5, f"{group + 1}", ha="center", va="center", fontsize=7, color="white")
            one.set(ylim=(2, 0), xlim=(0, last))
            one.set_yticks([0.5, 1.5], ["tensor core", "SiLU units"])
            share, who = tensor_share(order, groups, product, silu), f"{groups} warpgroup{'s' * (groups > 1)}"
            one.set_title(f"{order}, {who}: tensor core busy {100 * share:.0f} % of a long loop (modelled)", fontsize=9)
        axes[-1].set_xlabel("time, in products of one tile")
        handles = [matplotlib.patches.Patch(color=colour, label=work) for work, colour in UNIT_COLOURS.items()]
        figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8)
    return figure


def overlap_explorer() -> Explorer:
    """Choose order, warpgroups and head width of the attention loop; the timeline follows (modelled).

    CSS classes: overlap-order, overlap-groups, overlap-width, overlap-label, overlap-image.
    """

    def draw(order: str, groups: int, width: int) -> tuple[str, Figure]:
        silu = 2 * 64 / width
        share = tensor_share(order, groups, 1.0, silu)
        return f"tensor core busy {100 * share:.0f} % of a long loop (modelled)", overlap_map([order], groups, 1.0, silu)

    return Explorer(
        "overlap", draw,
        order=ipywidgets.ToggleButtons(options=["one by one", "behind", "ahead"], value="one by one", description="order"),
        groups=ipywidgets.IntSlider(min=1, max=3, value=1, description="warpgroups"),
        width=ipywidgets.ToggleButtons(options=[64, 128], value=64, description="head width"),
    )  # fmt: skip


def step_waterfall(steps: Mapping[str, float], floor: float, title: str = "", source: str = "") -> Figure:
    """Seconds of one piece of work step by step, and what each step bought; a line where the roofline says it must end.

    `floor`: seconds that the roofline allows. `source` labels the numbers.
    """
    names, seconds = list(steps), list(steps.values())
    with matplotlib.rc_context(STYLE):
        figure = Figure(9.6, 1.5 + 0.42 * len(names))
        axes = figure.subplots()
        for row, now in enumerate(seconds):
            before = seconds[row - 1] if row else now
            axes.barh(row, 1e3 * now, color="#0072b2", **EDGE)
            if before > now:
                axes.barh(row, 1e3 * (before - now), left=1e3 * now, color="#cde3f2", **EDGE)
            gain = f", {before / now:.2f}x as fast as the bar above" if row else ""
            text = f"{1e3 * now:.3g} ms{gain}, {100 * floor / now:.0f} % of the roofline"
            axes.annotate(text, (1e3 * max(before, now), row), (5, 0), textcoords="offset points", va="center", fontsize=8.5)
        axes.axvline(1e3 * floor, color="#444444", linewidth=1.5)
        axes.set_yticks(range(len(names)), names)
        axes.set(
            ylim=(len(names) - 0.4, -0.6), xlim=(0, 1e3 * max(seconds) * 2.1), xlabel="ms; dark line: the roofline", title=title
        )
        axes.grid(axis="y", visible=False)
        source_line(figure, source)
    return figure
