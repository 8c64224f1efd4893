"""Notebook 01: what drifts in a log, and where the parameters live."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ipywidgets
import matplotlib
import numpy as np

from hstu_lab.widgets.base import EDGE, STYLE, Explorer, Figure, format_bytes


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
                linear.barh(list(models), widths, left=list(starts.values()), color=colour, label=part, **EDGE)
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
        logarithmic.barh(list(parts), list(parts.values()), color=[PART_COLOURS[part] for part in parts], **EDGE)
        for row, count in enumerate(parts.values()):
            text = f"{count:,}: {format_bytes(4 * count)} in fp32, {format_bytes(2 * count)} in fp16"
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


def parameter_explorer(config) -> Explorer:
    """Choose width, layers, items and users of a model like `config`; see what it weighs. Sizes that cannot work say why.

    CSS classes: parameters-d-model, parameters-layers, parameters-items, parameters-users, parameters-label, parameters-image.
    """

    def draw(d_model: int, layers: int, items: int, users: int) -> tuple[str, Figure]:
        head = d_model // config.num_heads
        parts = parameter_parts(
            config.replace(d_model=d_model, num_layers=layers, num_items=items, num_users=users, d_qk=head, d_v=head)
        )
        total = sum(parts.values())
        tables = sum(count for part, count in parts.items() if part in ("items", "side features", "users"))
        sizes = f"{format_bytes(4 * total)} in fp32, {format_bytes(2 * total)} in fp16"
        text = f"{total:,} parameters: {sizes}; {tables / total:.1%} in tables"
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
