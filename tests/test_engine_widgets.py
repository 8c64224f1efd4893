"""The figures of notebook 07 show the numbers they are given; the cliff's text agrees with the roofline."""

import numpy as np
import pytest

from hstu_lab import roofline, widgets
from hstu_lab.config import preset
from hstu_lab.hardware import DEVICES
from hstu_lab.widgets import engines

A100 = "A100-SXM4-80GB"


def test_a_history_is_padded_to_the_next_engine():
    edges = (512, 64, 2048)
    found = {n: widgets.padded_length(n, edges) for n in (1, 64, 65, 512, 513, 2048, 2049)}
    assert found == {1: 64, 64: 64, 65: 512, 512: 512, 513: 2048, 2048: 2048, 2049: None}


def test_the_text_says_what_the_roofline_says():
    ops = roofline.stack(preset("gr-3b"), 8, 1024, dtype="fp16")
    paid = roofline.total([roofline.predict(op, DEVICES[A100], "fp16") for op in ops]) * 1e3
    text = widgets.cliff_text((512, 1024), 600, 8, A100)
    assert f"600 events padded to 1024: {paid:.2f} ms for" in text
    assert "(modelled)" in text
    assert widgets.cliff_text((512,), 512, 1, A100).endswith("one event more: refused (modelled)")
    assert widgets.cliff_text((512,), 513, 1, A100) == "513 events: refused, the longest engine takes 512"


def test_the_steps_of_the_cliff_are_the_engines_lengths():
    figure = widgets.profile_cliff((256, 1024), 300, 1, A100, {256: 0.4, 1024: 1.5}, "recorded on a test")
    axes = figure.axes[0]
    steps = [line for line in axes.lines if line.get_color() == "#d55e00" and len(line.get_xdata())]
    assert [list(line.get_xdata()) for line in steps] == [[0, 256], [256, 1024]]
    assert steps[1].get_ydata()[0] == pytest.approx(engines.stack_ms(preset("gr-3b"), 1, 1024, A100))
    labels = {text.get_text() for text in axes.get_legend().get_texts()}
    assert labels == {"its own length", "padded to the engine's length", "recorded engines", "refused"}
    assert "(modelled)" in axes.get_title(loc="left")
    assert figure.png() == widgets.profile_cliff((256, 1024), 300, 1, A100, {256: 0.4, 1024: 1.5}, "recorded on a test").png()


def test_every_control_of_the_cliff_redraws():
    explorer = widgets.cliff_explorer()
    pictures = [explorer.image.value]
    for name, value in {"length": 528, "edges": "one engine: 2048", "batch": 8, "device": "L4-24GB"}.items():
        explorer.controls[name].value = value
        assert explorer.image.value not in pictures, name
        pictures.append(explorer.image.value)
    assert explorer.label.value.startswith("528 events padded to 2048")


def test_the_chosen_range_lies_where_both_errors_are_least():
    magnitudes = np.abs(np.random.default_rng(0).standard_t(3, 50_000))
    right = widgets.int8_ranges(magnitudes, "t").axes[1]
    lines = {line.get_label(): line for line in right.lines}
    both = lines["both"]
    least = both.get_xdata()[np.argmin(both.get_ydata())]
    assert lines["chosen range"].get_xdata()[0] == pytest.approx(least, rel=0.15)


def test_the_phases_of_a_build_add_up():
    given = {"a": {"x": 1.0, "y": 2.0, "z": 0.001}, "b": {"x": 0.5, "y": 0.5}}
    axes = widgets.build_phases(given).axes[0]
    ends = {}
    for bar in axes.patches:
        ends[round(bar.get_y() + bar.get_height() / 2)] = max(
            ends.get(round(bar.get_y() + bar.get_height() / 2), 0), bar.get_x() + bar.get_width()
        )
    assert sorted(ends.values()) == pytest.approx([1.0, 3.001])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["x", "y", "other"]
