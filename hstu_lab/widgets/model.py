"""Notebook 02: attention weights and recommendation quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ipywidgets
import matplotlib
import numpy as np

from hstu_lab.ops import reference
from hstu_lab.widgets.base import EDGE, STYLE, Explorer, Figure


def matrices(panels: Mapping[str, Sequence], xlabel: str = "looks at", ylabel: str = "position", shared: bool = True) -> Figure:
    """Square pictures side by side: panels is {title: matrix (Q, K)}; white is zero. Masks (bool) are black and white.

    Signed values run from blue to red, others from white to blue; one scale of colours for all, or one each without `shared`.
    """
    values = {title: np.asarray(matrix) for title, matrix in panels.items()}
    if shared:
        limits = dict.fromkeys(values, _limits(list(values.values())))
    else:
        limits = {title: _limits([matrix]) for title, matrix in values.items()}
    masks = all(matrix.dtype == bool for matrix in values.values())
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure((3.3 if shared else 3.5) * len(values) + (0.8 if shared else 0), 3.4)
        for axes, (title, matrix) in zip(figure.subplots(1, len(values), squeeze=False)[0], values.items()):
            least, most = limits[title]
            colours = "Greys" if masks else "RdBu_r" if least < 0 else "Blues"
            image = axes.imshow(matrix.astype(float), cmap=colours, vmin=least, vmax=most, interpolation="nearest")
            axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
            if not shared:
                figure.colorbar(image, ax=axes, shrink=0.7)
        if shared and not masks:
            figure.colorbar(image, ax=figure.axes, shrink=0.8)
    return figure


def _limits(values: Sequence[np.ndarray]) -> tuple[float, float]:
    """Ends of a scale of colours: symmetric about zero where a value is negative, else from zero."""
    most = max(float(abs(matrix).max()) for matrix in values) or 1e-12
    return (-most if any((matrix < 0).any() for matrix in values) else 0.0), most


def quality_bars(scores: Mapping[str, float], metric: str = "HR@10", title: str = "") -> Figure:
    """One bar a recommender, with its score at the end."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(7.5, 1.0 + 0.42 * len(scores))
        axes = figure.subplots()
        axes.barh(list(scores), list(scores.values()), color=["#0072b2", *["#999999"] * (len(scores) - 1)], **EDGE)
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

    def draw(user: str, layer: int, head: int) -> tuple[str, Figure]:
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
