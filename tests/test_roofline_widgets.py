"""Notebook 03's views and exercises: what is drawn is what `roofline` predicts; the checks tell right from nearly right."""

import math

import pytest
import torch

from hstu_lab import checks, roofline, widgets
from hstu_lab.config import preset
from hstu_lab.hardware import DEVICES

GR3B = preset("gr-3b")
A100, H100 = DEVICES["A100-SXM4-80GB"], DEVICES["H100-SXM5-80GB"]


def said(axes):
    return [text.get_text() for text in axes.texts]


def dots(axes):
    return [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_marker() == "o"]


def test_every_product_is_on_the_roofline_and_every_operator_among_the_bars():
    operators = roofline.stack(GR3B, 8, 512)
    left, right = widgets.roofline_plot(operators, A100).axes
    products = [op for op in operators if op.flops]
    wanted = [(op.intensity, roofline.predict(op, A100).flops_per_second / 1e12) for op in products]
    assert dots(left) == [pytest.approx(dot) for dot in wanted]
    assert all(y <= min(312, 2.039 * x) for x, y in dots(left))
    assert [p.get_width() for p in right.patches] == pytest.approx([1e3 * roofline.predict(op, A100).seconds for op in operators])
    assert [label.get_text() for label in right.get_yticklabels()][1] == "2  UVQK + SiLU"
    assert right.get_title(loc="left") == "2.36 ms in all (modelled)"
    assert "in all" not in widgets.roofline_plot(operators, A100, summed=False).axes[1].get_title(loc="left")


def test_the_legend_names_what_binds_and_nothing_else():
    operators = roofline.stack(GR3B, 8, 512)
    (legend,) = widgets.roofline_plot(operators, A100).legends
    assert {text.get_text() for text in legend.get_texts()} == {roofline.predict(op, A100).bound for op in operators}


def test_dots_in_one_place_share_a_label():
    same = [roofline.gemm(str(n), 512, 1024, 1024) for n in range(3)]
    left = widgets.roofline_plot([*same, roofline.gemm("other", 1, 1024, 1024)], A100).axes[0]
    assert {"1, 2, 3", "4"} <= set(said(left))


def test_the_dash_is_the_ceiling_of_special_functions():
    operator = roofline.attention(GR3B, 8, 512, 512)
    left = widgets.roofline_plot([operator], H100).axes[0]
    (dash,) = (line.get_ydata()[0] for line in left.lines if line.get_marker() == "_")
    assert dash == pytest.approx(4 * 64 * H100.special / 1e12)  # 4 d FLOPs for each tanh


@pytest.mark.parametrize("operators", [roofline.stack(GR3B, 1, 1, 8192), [roofline.Operator("norm", 0.0, 8.0)]])
def test_a_roofline_is_drawn_of_any_work(operators):
    for dtype in ("bf16", "fp32", "int8"):
        assert widgets.roofline_plot(operators, A100, dtype).png().startswith(b"\x89PNG")


def test_waves_are_whole():
    left, right = widgets.wave_plot(A100, {"half": 54, "one more": 109}).axes
    steps = left.lines[0].get_ydata()
    assert (steps[107], steps[108], steps[215], steps[216]) == (1, 2, 2, 3)
    assert dots(right) == [(54, pytest.approx(50)), (109, pytest.approx(100 * 109 / 216))]
    assert [t.get_text() for t in right.get_legend().get_texts()] == ["half: 54 tiles, 50%", "one more: 109 tiles, 50%"]


def test_bars_of_operators_add_up_on_every_device():
    row = [roofline.predict(op, A100) for op in roofline.stack(GR3B, 1, 512)]
    first, second = widgets.prediction_bars({"one": {"a": row, "b": row[:2]}, "two": {"a": row, "b": row * 2}}).axes
    assert said(first) == [f"{1e3 * roofline.total(row):.2f} ms", f"{1e3 * roofline.total(row[:2]):.2f} ms"]
    assert said(second)[1] == f"{2e3 * roofline.total(row):.2f} ms"
    ends = [p.get_x() + p.get_width() for p in first.patches]
    assert max(ends) == pytest.approx(1e3 * roofline.total(row))


def test_pairs_show_second_over_first():
    figure = widgets.against({"fast": (1e-3, 2e-3), "slow": (1e-2, 5e-3)}, ("predicted", "clock"), source="seen somewhere")
    (axes,) = figure.axes
    assert said(axes) == ["2.00x", "0.50x"]
    assert [p.get_width() for p in axes.patches] == [1, 10, 2, 5]
    assert "seen somewhere" in [text.get_text() for text in figure.texts]


def test_every_control_moves_the_operators():
    explorer = widgets.roofline_explorer(GR3B, [A100, H100])
    assert explorer.label.value.startswith("prefill, 8 x 512, 16 heads of 64: 2.36 ms, 241 TFLOP/s; longest: UVQK + SiLU, matrix")
    changes = {"device": H100.name, "length": 4096, "batch": 64, "head_size": 32, "dtype": "fp32", "work": "decode"}
    for name, value in changes.items():
        before, label = bytes(explorer.image.value), explorer.label.value
        explorer.controls[name].value = value
        assert bytes(explorer.image.value) != before, name
        assert explorer.label.value != label, name
    assert "decode, 64 x 4096, 32 heads of 32" in explorer.label.value
    assert "attention, memory" in explorer.label.value


@pytest.mark.parametrize(("rab", "bound"), [("none", "special functions"), ("position+time", "instructions")])
def test_narrow_heads_are_bound_by_tanh_on_hopper_or_by_their_bias(rab, bound):
    explorer = widgets.roofline_explorer(GR3B.replace(rab=rab), [H100])
    explorer.controls["length"].value, explorer.controls["head_size"].value = 8192, 16
    assert explorer.label.value.endswith(f"longest: attention, {bound}")


def candidate_flops(heads, d_qk, d_v, history, candidates):
    return 2 * heads * (history * (history + 1) / 2 + candidates * (history + 1)) * (d_qk + d_v)


def smallest_batch(k, n, ridge, width=2):
    per_row = 2 * k * n - ridge * width * (k + n)
    return math.ceil(ridge * width * k * n / per_row) if per_row > 0 else None


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("candidate-flops", candidate_flops, lambda h, dq, dv, n, c: 2 * h * (n + c) * (n + c + 1) / 2 * (dq + dv)),
        ("candidate-flops", candidate_flops, lambda h, dq, dv, n, c: 4 * h * (n * (n + 1) / 2 + c * (n + 1)) * dq),
        ("candidate-flops", candidate_flops, lambda h, dq, dv, n, c: 2 * h * (n * n / 2 + c * n) * (dq + dv)),
        ("candidate-flops", candidate_flops, lambda h, *rest: candidate_flops(1, *rest)),
        ("smallest-batch", smallest_batch, lambda k, n, ridge, width=2: math.ceil(ridge * width / 2)),
        ("smallest-batch", smallest_batch, lambda k, n, ridge, width=2: smallest_batch(k, n, ridge, 2)),
        ("smallest-batch", smallest_batch, lambda *size: (smallest_batch(*size) or 0) + 1),
        ("smallest-batch", smallest_batch, lambda *size: smallest_batch(*size) or 0),
    ],
)
def test_the_checks_tell_right_from_nearly_right(name, right, wrong):
    assert checks.check(name, right, strict=True)
    assert not checks.check(name, wrong)


def test_a_trace_counts_work_and_leaves_views_out():
    a, b = torch.randn(4, 8), torch.randn(16, 8)
    product, silu = roofline.trace(lambda: torch.nn.functional.silu(a @ b.t().contiguous().t().t()).view(64))[-2:]
    assert (product.name, product.flops, product.bytes) == ("mm", 2 * 4 * 8 * 16, 4 * (32 + 128 + 64))
    assert (silu.name, silu.flops, silu.bytes) == ("silu", 0, 4 * 128)
    assert roofline.trace(lambda: a.t().unsqueeze(0).expand(3, -1, -1)[0, 1:]) == []
    assert [op.name for op in roofline.trace(lambda: a.clone().add_(1))] == ["clone", "add_"]
    (added,) = roofline.trace(lambda: a + b[:1].expand(4, -1))
    assert added.bytes == 4 * (32 + 32 + 32)
