"""Every interactive view: a pure function that returns a figure, and `Explorer`, which puts controls above it.

Milliseconds everywhere. A stage has the same colour in every figure (Okabe and Ito's palette, safe for colour-blind eyes).
"""

from __future__ import annotations

import io
import math
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence

import ipywidgets
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as _Figure

from hstu_lab.measure import format_seconds
from hstu_lab.ops import reference

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


# 01_events_and_tables


def taste_drift(log, user: int, lags: int = 15) -> Figure:
    """How tastes drift in an `EventLog`: one user's events by session and category, and, for all users, how alike sessions are.

    Alike: the cosine between the numbers of events of each category in two sessions, averaged over users and sessions.
    """
    category = log.catalog.features["category"][log.items]
    mix = np.zeros((len(log), log.sessions.max() + 1, category.max() + 1))
    np.add.at(mix, (np.repeat(np.arange(len(log)), np.diff(log.offsets)), log.sessions, category), 1)
    unit = mix / np.maximum(np.linalg.norm(mix, axis=2, keepdims=True), 1)

    def alike(a, b) -> float:
        return (a * b).sum(2)[a.any(2) & b.any(2)].mean()

    shown = mix[user, : log.history(user).sessions[-1] + 1]
    shown = shown[:, shown.any(0)]
    shown = shown[:, np.argsort(np.arange(len(shown)) @ shown / shown.sum(0))]
    with matplotlib.rc_context(STYLE):
        figure = Figure(10, 3.4)
        left, right = figure.subplots(1, 2)
        image = left.imshow(shown.T, cmap="Blues", aspect="auto", interpolation="nearest")
        figure.colorbar(image, ax=left, label="events")
        left.grid(visible=False)
        left.xaxis.get_major_locator().set_params(integer=True)
        left.set(xlabel="session", ylabel="category, the earliest on top", title=f"What {log.users[user]} looked at", yticks=[])
        apart = range(1, min(lags, mix.shape[1] - 1) + 1)
        right.plot(apart, [alike(unit[:, k:], unit[:, :-k]) for k in apart], "o-", color="#0072b2", label="same user")
        right.axhline(alike(unit, np.roll(unit, 1, axis=0)), color="#999999", linestyle="--", label="two users")
        right.set(xlabel="sessions apart", ylabel="cosine", title="How alike two sessions are", ylim=(0, None))
        right.legend(frameon=False, fontsize=9)
    return figure


PART_COLOURS = {
    "items": "#0072b2",
    "side features": "#56b4e9",
    "users": "#009e73",
    "encoder": "#f0e442",
    "stack": "#d55e00",
    "heads": "#cc79a7",
    "feed-forward": "#999999",
}


def parameter_parts(config) -> dict[str, int]:
    """The parameter calculator's groups, summed into parts: items, side features, users, encoder, stack, heads."""
    from hstu_lab.tables import parameter_groups

    tables = {"tables.item": "items", "tables.user": "users"}
    parts: dict[str, int] = {}
    for group in parameter_groups(config):
        top = group.name.split(".")[0]
        part = tables.get(group.name, "side features") if top == "tables" else top
        parts[part] = parts.get(part, 0) + group.count
    return parts


def parameter_bars(models: Mapping[str, Mapping[str, int]]) -> Figure:
    """Parameters (modelled) of models: {model: {part: count}}, the parts being those of `PART_COLOURS`.

    Above, one stacked bar a model on a linear axis. Below, the last model's parts on a logarithmic axis, with their bytes.
    """
    parts = list(models.values())[-1]
    with matplotlib.rc_context(STYLE):
        figure = Figure(8.5, 1.9 + 0.34 * (len(models) + len(parts)))
        linear, logarithmic = figure.subplots(2, 1, height_ratios=(len(models) + 0.4, len(parts)))
        starts = dict.fromkeys(models, 0.0)
        for part, colour in PART_COLOURS.items():
            widths = [model.get(part, 0) / 1e9 for model in models.values()]
            if any(widths):
                linear.barh(list(models), widths, left=list(starts.values()), color=colour, label=part, **_EDGE)
            starts = {name: start + width for (name, start), width in zip(starts.items(), widths)}
        for row, total in enumerate(starts.values()):
            linear.annotate(
                f"{total:.2f} B" if total >= 0.1 else f"{1000 * total:.3g} M",
                (total, row),
                (4, 0),
                textcoords="offset points",
                va="center",
                weight="bold",
            )
        linear.set(title="Parameters in billions (modelled)", xlim=(0, max(starts.values()) * 1.12 or 1))
        logarithmic.barh(list(parts), list(parts.values()), color=[PART_COLOURS[part] for part in parts], **_EDGE)
        for row, count in enumerate(parts.values()):
            text = f"{count:,}: {_bytes(4 * count)} in fp32, {_bytes(2 * count)} in fp16"
            logarithmic.annotate(text, (count, row), (4, 0), textcoords="offset points", va="center", fontsize=9)
        most = max(parts.values())
        logarithmic.set(
            xscale="log", xlim=(max(min(parts.values()), 1) / 4, most * (4 * most / max(min(parts.values()), 1)) ** 0.9)
        )
        logarithmic.set(xlabel="parameters, logarithmic", title=f"{list(models)[-1]}, part by part")
        for axes in (linear, logarithmic):
            axes.invert_yaxis()
            axes.grid(axis="y", visible=False)
        figure.legend(*linear.get_legend_handles_labels(), loc="outside upper right", ncols=7, frameon=False, fontsize=9)
    return figure


def _bytes(count: float) -> str:
    """Bytes in decimal units, three digits: 12.8 GB."""
    power = min(int(math.log10(max(count, 1) * 1.0005) // 3), 4)
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def parameter_explorer(config) -> Explorer:
    """Choose width, layers, items and users of a model like `config`; see what it weighs. Sizes that cannot work say why.

    CSS classes: parameters-d-model, parameters-layers, parameters-items, parameters-users, parameters-label, parameters-image.
    """

    def draw(d_model: int, layers: int, items: int, users: int) -> tuple[str, _Figure]:
        head = d_model // config.num_heads
        parts = parameter_parts(
            config.replace(d_model=d_model, num_layers=layers, num_items=items, num_users=users, d_qk=head, d_v=head)
        )
        total = sum(parts.values())
        tables = sum(count for part, count in parts.items() if part in ("items", "side features", "users"))
        text = f"{total:,} parameters: {_bytes(4 * total)} in fp32, {_bytes(2 * total)} in fp16; {tables / total:.1%} in tables"
        return text, parameter_bars({"this model": parts})

    def slider(name: str, value: int, choices: Sequence[int]) -> ipywidgets.SelectionSlider:
        options = [(f"{n:,}", n) for n in sorted({*choices, value})]
        style = {"description_width": "initial"}
        return ipywidgets.SelectionSlider(
            options=options, value=value, description=name, style=style, layout={"width": "60%"}, continuous_update=False
        )

    sizes = [digit * 10**power for power in range(3, 8) for digit in (1, 3)]
    return Explorer(
        "parameters", draw,
        d_model=slider("d_model", config.d_model, [config.num_heads * n for n in (4, 8, 16, 32, 64, 128)]),
        layers=slider("layers", config.num_layers, range(1, 49)),
        items=slider("items", config.num_items, [n for n in sizes if n <= 10**6]),
        users=slider("users", config.num_users, [0, *sizes]),
    )  # fmt: skip


# 09_vllm_serving

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
        right.barh(list(milliseconds), list(milliseconds.values()), color=["#999999", DECODE], **_EDGE)
        for row, value in enumerate(milliseconds.values()):
            right.annotate(f"{value:.1f} ms", (value, row), (4, 0), textcoords="offset points", va="center", weight="bold")
        right.invert_yaxis()
        right.grid(axis="y", visible=False)
        right.set(xlabel="ms a request", title="Measured here", xlim=(0, max(milliseconds.values(), default=0) * 1.3 or 1))
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
        right.barh(list(bars), list(bars.values()), color=[DECODE, "#999999"], **_EDGE)
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

    def draw(events: int, users: int) -> tuple[str, _Figure]:
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


# 02_hstu_model


def matrices(panels: Mapping[str, Sequence], xlabel: str = "looks at", ylabel: str = "position") -> Figure:
    """Square pictures side by side: panels is {title: matrix (Q, K)}; one scale of colours for all, white is zero."""
    values = {title: np.asarray(matrix, dtype=float) for title, matrix in panels.items()}
    most = max(max(abs(v).max() for v in values.values()), 1e-12)
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(3.3 * len(values) + 0.8, 3.4)
        for axes, (title, matrix) in zip(figure.subplots(1, len(values), squeeze=False)[0], values.items()):
            image = axes.imshow(matrix, cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest")
            axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
        figure.colorbar(image, ax=figure.axes, shrink=0.8)
    return figure


def quality_bars(scores: Mapping[str, float], metric: str = "HR@10", title: str = "") -> Figure:
    """One bar a recommender, with its score at the end."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(7.5, 1.0 + 0.42 * len(scores))
        axes = figure.subplots()
        axes.barh(list(scores), list(scores.values()), color=["#0072b2", *["#999999"] * (len(scores) - 1)], **_EDGE)
        for row, score in enumerate(scores.values()):
            axes.annotate(f"{score:.3f}", (score, row), (4, 0), textcoords="offset points", va="center", weight="bold")
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(xlabel=metric, title=title, xlim=(0, max(scores.values()) * 1.15 or 1))
    return figure


def attention_weights(model, tokens: Sequence[int]) -> list:
    """What every layer's attention weighs one history with: per layer (H, N, N), SiLU(scores + bias) / max_seq_len, causal.

    tokens: of `tokens.encode_history`.
    """
    import torch
    import torch.nn.functional as F

    tokens = torch.as_tensor(tokens)
    offsets, position = torch.tensor([0, len(tokens)]), torch.arange(len(tokens))
    times, weights = model.times(tokens, offsets), []
    allowed = reference.visible(position, position, model.config.num_context)

    def attend(_, q, k, v, bias):
        rab = bias(position, position, times, times) if bias else 0
        scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5 + rab
        weights.append(F.silu(scores).masked_fill(~allowed, 0) / model.config.max_seq_len)
        return torch.einsum("hqk,khd->qhd", weights[-1], v)

    with torch.no_grad():
        model.stack(model.embed(tokens, offsets), attend)
    return weights


def attention_explorer(model, histories: Mapping[str, Sequence[int]]) -> Explorer:
    """Choose a user, a layer and a head; see what each position weighs. histories is {user: tokens}.

    CSS classes: attention-user, attention-layer, attention-head, attention-label, attention-image.
    """

    def draw(user: str, layer: int, head: int) -> tuple[str, _Figure]:
        weights = attention_weights(model, histories[user])[layer - 1][head - 1]
        share = float((weights < 0).sum() / (weights != 0).sum())
        figure = matrices({f"{user}: layer {layer}, head {head}": weights})
        return f"{share:.0%} of the weights are negative: SiLU can push away as well as attract", figure

    config = model.config
    return Explorer(
        "attention", draw,
        user=ipywidgets.Dropdown(options=list(histories), description="user"),
        layer=ipywidgets.IntSlider(value=1, min=1, max=config.num_layers, description="layer"),
        head=ipywidgets.IntSlider(value=1, min=1, max=config.num_heads, description="head"),
    )  # fmt: skip


# 03_roofline

BOUND_COLOURS = {"matrix": "#0072b2", "memory": "#e69f00", "special functions": "#cc79a7", "launch": "#999999"}


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
        handles = [matplotlib.patches.Patch(color=colour, label=bound) for bound, colour in BOUND_COLOURS.items()]
        figure.legend(handles=handles, loc="outside lower right", ncols=4, frameon=False, fontsize=9, title="bound by")
    return figure


def _bound_bars(axes, rows: Sequence[tuple]) -> None:
    """(label, Prediction) as bars of milliseconds, coloured by what binds them."""
    times = [1e3 * p.seconds for _, p in rows]
    axes.barh(range(len(rows)), times, color=[BOUND_COLOURS[p.bound] for _, p in rows], **_EDGE)
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
            axes.barh(at + shift, values[pair::2], height=0.36, color=colour, label=name, **_EDGE)
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
        if source:
            figure.supxlabel(textwrap.fill(source, 125), fontsize=7, color="#666666", x=0.01, ha="left")
    return figure


def roofline_explorer(config, devices: Sequence) -> Explorer:
    """Choose the work and the device: every operator of the stack of a model like `config` moves on the roofline (modelled).

    Work: prefill of whole histories, or decode of one more event after them. CSS classes: roofline-work, roofline-length,
    roofline-batch, roofline-head-size, roofline-dtype, roofline-device, roofline-label, roofline-image.
    """
    from hstu_lab import roofline

    by_name = {device.name: device for device in devices}

    def draw(work: str, length: int, batch: int, head_size: int, dtype: str, device: str) -> tuple[str, _Figure]:
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


# 04_triton_kernels

TILE_COLOURS = {"skipped": "#eeeeee", "whole": "#0072b2", "masked": "#e69f00"}
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

    def draw(length: int, block_m: int, block_n: int) -> tuple[str, _Figure]:
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
        _source_line(figure, source)
    return figure


def share_bars(rows: Mapping[str, float], target: Callable[[str], float | None], title: str = "", source: str = "") -> Figure:
    """Shares of a ceiling as bars with their targets (None: there is none); orange where the target is missed."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(8.5, 1.4 + 0.26 * len(rows))
        axes = figure.subplots()
        for row, (name, share) in enumerate(rows.items()):
            wanted = target(name)
            colour = "#999999" if wanted is None else "#0072b2" if share >= wanted else "#e69f00"
            axes.barh(row, 100 * share, color=colour, **_EDGE)
            axes.annotate(
                f"{share:.1%}", (100 * max(share, wanted or 0), row), (4, 0), textcoords="offset points", va="center", fontsize=9
            )
            if wanted is not None:
                axes.plot([100 * wanted] * 2, [row - 0.4, row + 0.4], color="#444444", linewidth=1.5)
        axes.set_yticks(range(len(rows)), list(rows), fontsize=9)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="% of the ceiling; dark line: the target", title=title, xlim=(0, 100 * max(rows.values()) * 1.12))
        _source_line(figure, source)
    return figure


def _source_line(figure: Figure, source: str) -> None:
    if source:
        figure.supxlabel(textwrap.fill(source, 125), fontsize=7, color="#666666", x=0.01, ha="left")
