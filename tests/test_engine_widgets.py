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
    assert labels == {"its own length", "padded to the engine's length", "recorded engines", "refused", "this history"}
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


def test_kernels_are_told_apart_by_their_names():
    kinds = {
        "nvjet_sm90_hsh_256x128_64x4_1x2_h_bz_coopA_bias_TNT": "products",
        "sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x64": "products",
        "linear_kernel": "products",
        "__myl_GatResAddMulAddNegExpAddDivMulSel": "scores to weights",
        "__myl_MulTraResCasMeaSub": "norms and gates",
        "__myl_NegExpResAddDivMulSliResTraSliResTraSliResTraSli": "copies, casts and turns",
        "attention_kernel": "scores to weights",
        "triton_poi_fused__to_copy_add_arange_bitwise_and_masked_fill_mul_silu_sub": "scores to weights",
        "triton_per_fused__to_copy_add_native_layer_norm_view_9": "norms and gates",
        "Memcpy DtoD (Device -> Device)": "copies, casts and turns",
        "void at::native::elementwise_kernel<128, 4>": "other pointwise",
    }
    assert {name: widgets.kernel_kind(name) for name in kinds} == kinds


def test_bars_add_up_to_the_kernels_they_are_made_of():
    engines_ = {"a": {"gemm_1": 1e-3, "gemm_2": 2e-3, "copy": 5e-4}, "b": {"attention": 4e-3}}
    axes = widgets.kernel_times(engines_, "test").axes[0]
    widths = {container.get_label(): [bar.get_width() for bar in container] for container in axes.containers}
    assert widths["products"] == pytest.approx([3, 0])
    assert np.sum(list(widths.values()), axis=0) == pytest.approx([3.5, 4])


def test_each_way_shows_its_numbers_where_it_has_them():
    ways = {"eager": {"batch 1": 2.4, "batch 8": 13.3}, "ONNX Runtime": {"batch 1": 90.0}}
    axes = widgets.engine_ways(ways, "test", "recorded somewhere").axes[0]
    assert [[bar.get_width() for bar in container] for container in axes.containers] == [[2.4, 90.0], [13.3]]
    assert {"2.4", "13.3", "90"} <= {text.get_text() for text in axes.texts}
    assert axes.get_xscale() == "log"
