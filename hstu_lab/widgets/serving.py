"""Notebooks 08 and 09: prefix reuse, steps of the engine, blocks of the KV pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ipywidgets
import matplotlib

from hstu_lab.widgets.base import EDGE, STYLE, Explorer, Figure, plain_log

PREFILL, DECODE, EMPTY, WAITING = "#56b4e9", "#0072b2", "#e69f00", "#d55e00"


def prefix_reuse(rows: Mapping[int, tuple[int, int]], predicted: Mapping[int, int] | None = None) -> Figure:
    """What a returning user costs: rows is {events: (prompt tokens, cached tokens)}; dots are tokens computed, one a visit.

    predicted: {events: tokens to compute}, drawn as a line. The axis of tokens is logarithmic.
    """
    events = sorted(rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure(7.5, 3.4)
        axes = figure.subplots()
        axes.plot(events, [rows[n][0] for n in events], color="#999999", label="whole prompt (no cache)")
        if predicted:
            axes.plot(sorted(predicted), [predicted[n] for n in sorted(predicted)], color=DECODE, linewidth=1, label="predicted")
        computed = [rows[n][0] - rows[n][1] for n in events]
        axes.plot(events, computed, ".", color=WAITING, markersize=4, label="computed by vLLM")
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:.0f}")
        axes.set(xlabel="events of history at this visit", ylabel="tokens", title="Tokens a returning user costs, measured here")
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def serving_steps(steps: Sequence[Sequence[int]], milliseconds: Mapping[str, float]) -> Figure:
    """Continuous batching: steps lists, for each engine step, the new tokens of every request in it (1: one item generated).

    milliseconds: {way of serving: ms a request}, as bars beside it.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(10, 3.2)
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        number = range(1, len(steps) + 1)
        decoding = [sum(count == 1 for count in step) for step in steps]
        reading = [len(step) - count for step, count in zip(steps, decoding)]
        left.bar(number, decoding, color=DECODE, label="generates an item", width=0.85)
        left.bar(number, reading, bottom=decoding, color=PREFILL, label="has its history read", width=0.85)
        left.grid(axis="x", visible=False)
        left.set(xlabel="engine step", ylabel="requests in the step", title="All at once: who shares a step")
        figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=9)
        right.barh(list(milliseconds), list(milliseconds.values()), color=["#999999", DECODE], **EDGE)
        for row, value in enumerate(milliseconds.values()):
            right.annotate(f"{value:.1f} ms", (value, row), (4, 0), textcoords="offset points", va="center", weight="bold")
        right.invert_yaxis()
        right.grid(axis="y", visible=False)
        right.set(xlabel="ms a request", title="Measured here", xlim=(0, max(milliseconds.values(), default=0) * 1.3 or 1))
    return figure


def replica_table(table: Mapping[str, Mapping[str, Mapping]], source: str, wanted: float = 4000) -> Figure:
    """Requests/s of engines that share a GPU: table is the record's {cell: {"engines": ..., "null": ..., "half": ...}}.

    Beside a warm cell stands the share of its tokens that vLLM found cached: whole blocks. Left the peak (the null model's, where
    measured, as a tick: what the host alone allows), right p50 and p99 at half of it.
    """
    cells = sorted(table, key=lambda cell: ("slate" in cell, int(cell.split("history=")[1].split()[0]), "warm" in cell))
    with matplotlib.rc_context(STYLE):
        figure = Figure(10, 1.2 + 0.28 * len(cells))
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        rows = range(len(cells))
        rates = [table[cell]["engines"]["requests/s"] for cell in cells]
        left.barh(rows, rates, color=[DECODE if "warm" in cell else PREFILL for cell in cells], **EDGE)
        ceilings = [(row, table[cell]["null"]["requests/s"]) for row, cell in zip(rows, cells) if "null" in table[cell]]
        left.plot([rate for _, rate in ceilings], [row for row, _ in ceilings], "|", color="#444444", markersize=10)
        left.axvline(wanted, color=WAITING, linestyle="--", linewidth=1)
        for row, rate in zip(rows, rates):
            left.annotate(
                f"{rate:,.0f}" if rate else "none finished: no rate",
                (rate, row),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        found = [table[cell]["engines"].get("cached") for cell in cells]
        left.set_yticks(rows, [f"{cell} (found: {share:.0%})" if share else cell for cell, share in zip(cells, found)])
        left.set(xlabel=f"requests/s (dashed: {wanted:,.0f})", title="Peak, closed loop")
        half = [table[cell].get("half", {}) if rate else {} for cell, rate in zip(cells, rates)]
        for name, colour in (("p99 s", WAITING), ("p50 s", DECODE)):
            seen = [(row, 1e3 * entry[name]) for row, entry in zip(rows, half) if entry.get(name) is not None]
            right.plot([x for _, x in seen], [row for row, _ in seen], "o", color=colour, label=name[:3])
        right.axvline(200, color="#444444", linestyle="--", linewidth=1)
        right.set_xscale("log")
        plain_log(right.xaxis)
        right.set(xlabel="ms (dashed: 200)", title="At half the peak, open loop")
        right.invert_yaxis()
        right.legend(frameon=False, fontsize=9)
        for axes in (left, right):
            axes.grid(axis="y", visible=False)
        figure.suptitle(source, fontsize=8)
    return figure


def kv_pool(tokens: int, users: int, *, num_blocks: int, block_bytes: int, block_size: int, max_seq_len: int) -> Figure:
    """A paged KV cache as `users` histories of `tokens` tokens fill it: one row a user, one column a token.

    num_blocks: blocks that requests may hold; block_bytes: keys and values of one block in all layers. Beside it what all
    users together need, against room for max_seq_len tokens for everybody.
    """
    blocks, fitting = kv_blocks(tokens, users, num_blocks=num_blocks, block_size=block_size)
    cells = [[0] * max_seq_len for _ in range(users)]
    for user, row in enumerate(cells):
        filled, reserved = min(tokens, max_seq_len), min(blocks * block_size, max_seq_len)
        row[:reserved] = [1] * filled + [2] * (reserved - filled) if user < fitting else [3] * reserved
    colours = {"no memory held": "#f2f2f2", "a token": DECODE, "empty slot of a block": EMPTY, "waits: no block free": WAITING}
    mib = block_bytes / 2**20
    bars = {"paged": users * blocks * mib, "all reserved": users * -(-max_seq_len // block_size) * mib}
    with matplotlib.rc_context(STYLE):
        figure = Figure(10, 3.4)
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        palette = matplotlib.colors.ListedColormap(list(colours.values()))
        left.imshow(
            cells, cmap=palette, vmin=0, vmax=3, aspect="auto", interpolation="nearest", extent=(0, max_seq_len, users, 0)
        )
        left.set_xticks(range(0, max_seq_len + 1, max(max_seq_len // 8, 1)))
        left.grid(visible=False)
        left.set(xlabel="token", ylabel="user", title=f"{fitting} of {users} histories of {tokens} tokens fit")
        patches = [matplotlib.patches.Patch(color=colour, label=label) for label, colour in colours.items()]
        figure.legend(handles=patches, loc="outside lower left", ncols=4, frameon=False, fontsize=8)
        right.barh(list(bars), list(bars.values()), color=[DECODE, "#999999"], **EDGE)
        right.axvline(num_blocks * mib, color="#444444", linestyle="--", linewidth=1)
        for row, value in enumerate(bars.values()):
            right.annotate(f"{value:.1f} MiB", (value, row), (6, 0), textcoords="offset points", va="center", weight="bold")
        right.invert_yaxis()
        right.grid(axis="y", visible=False)
        right.set(
            xlabel="MiB (dashed: the pool)",
            title="Needed by all (modelled)",
            xlim=(0, max(*bars.values(), num_blocks * mib) * 1.25),
        )
    return figure


def kv_blocks(tokens: int, users: int, *, num_blocks: int, block_size: int) -> tuple[int, int]:
    """Blocks that a history of `tokens` tokens takes, and how many of `users` such histories the pool holds at once."""
    blocks = max(-(-tokens // block_size), 1)
    return blocks, min(users, num_blocks // blocks)


def kv_explorer(config, *, num_blocks: int, block_bytes: int, block_size: int = 16) -> Explorer:
    """Choose the events of a history and the number of users: see whose blocks fit and what they weigh.

    CSS classes: kv-events, kv-users, kv-label, kv-image.
    """

    def draw(events: int, users: int) -> tuple[str, Figure]:
        tokens = events + config.num_context
        blocks, fitting = kv_blocks(tokens, users, num_blocks=num_blocks, block_size=block_size)
        held = fitting * blocks
        text = (
            f"{tokens} tokens take {blocks} blocks; {fitting} of {users} users fit: {held} of {num_blocks} blocks, "
            f"{held * block_bytes / 2**20:.1f} MiB"
        )
        return text, kv_pool(
            tokens, users, num_blocks=num_blocks, block_bytes=block_bytes, block_size=block_size, max_seq_len=config.max_seq_len
        )

    def slider(name: str, value: int, most: int) -> ipywidgets.IntSlider:
        style = {"description_width": "initial"}
        return ipywidgets.IntSlider(value=value, min=1, max=most, description=name, style=style, continuous_update=False)

    events = slider("events of history", config.max_history // 2, config.max_history)
    return Explorer("kv", draw, events=events, users=slider("users at once", 32, 128))
