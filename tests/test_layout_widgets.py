"""The pictures of notebook 05 draw what the algebra and the model say, and follow their controls."""

import itertools

import pytest

from hstu_lab import widgets


def said(axes):
    return [text.get_text() for text in axes.texts]


def test_bank_map_draws_pieces_and_passes():
    figure = widgets.bank_map(8, 64, 0, 3, "column", 2)
    tile, banks = figure.axes
    assert said(tile)[8:12] == ["4-7", "0-3", "12-15", "8-11"]  # row 1 of the swizzled tile
    assert len(tile.patches) == 64 + 8
    assert [bar.get_height() for bar in banks.patches] == [1] * 32
    assert banks.get_title(loc="left") == "1 pass for 8 threads"
    plain = widgets.bank_map(8, 64, 0, 0, "column", 2).axes[1]
    assert [bar.get_height() for bar in plain.patches] == [0] * 8 + [8] * 4 + [0] * 20
    assert plain.get_title(loc="left") == "8 passes for 8 threads"


def test_bank_explorer_follows_its_controls():
    explorer = widgets.bank_explorer()
    before = bytes(explorer.image.value)
    assert explorer.label.value.startswith("8 passes")
    explorer.controls["swizzle_bits"].value = 2
    assert explorer.label.value.startswith("2 passes")
    assert bytes(explorer.image.value) != before
    explorer.controls["access"].value = "row"
    assert explorer.label.value.startswith("1 pass where")
    explorer.controls["padding"].value = 16
    assert "padding wastes 20 % of the memory" in explorer.label.value
    assert "banks-swizzle-bits" in explorer.controls["swizzle_bits"]._dom_classes


def test_owner_map_names_thread_and_register():
    axes = widgets.owner_map(["C"]).axes[0]
    assert said(axes)[:4] == ["0.0", "0.1", "1.0", "1.1"]
    assert len(said(axes)) == 16 * 8


@pytest.mark.parametrize("order", ["one by one", "behind", "ahead"])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_a_schedule_keeps_order_and_never_runs_two_things_on_one_unit(order, groups):
    plan = widgets.schedule(order, groups, 1.0, 1.5, 6)
    assert len(plan) == 3 * 6 * groups
    for unit in (("scores", "values"), ("SiLU",)):
        times = sorted((start, end) for _, work, start, end in plan if work in unit)
        assert all(end <= start + 1e-9 for (_, end), (start, _) in itertools.pairwise(times))
    for group in range(groups):
        scores, silu, values = (
            [(s, e) for g, work, s, e in plan if g == group and work == name] for name in ("scores", "SiLU", "values")
        )
        for (_, scored), (begun, weighed), (used, _) in zip(sorted(scores), sorted(silu), sorted(values)):
            assert scored <= begun
            assert weighed <= used


def test_orders_hide_what_they_promise():
    shares = [widgets.tensor_share(order, 1, 1.0, 2.0) for order in ("one by one", "behind", "ahead")]
    assert shares == pytest.approx([1 / 2, 2 / 3, 1.0], abs=0.03)
    assert widgets.tensor_share("one by one", 2, 1.0, 2.0) > 0.95
    with pytest.raises(ValueError, match="order is 'sideways'"):
        widgets.schedule("sideways", 1, 1.0, 1.0, 1)


def test_overlap_is_drawn_for_each_order_and_follows_its_controls():
    figure = widgets.overlap_map(["one by one", "ahead"], 1, 1.0, 2.0, tiles=3)
    assert [len(axes.patches) for axes in figure.axes] == [9, 9]
    assert "busy 50 %" in figure.axes[0].get_title(loc="left")
    explorer = widgets.overlap_explorer()
    explorer.controls["groups"].value = 2
    assert "busy 99 %" in explorer.label.value
    assert len(widgets.schedule("ahead", 1, 1.0, 2.0, 3)) == 9
    assert set(widgets.UNIT_COLOURS) == {"scores", "SiLU", "values"}
    assert len(widgets.GROUP_COLOURS) == 8


def test_step_waterfall_tells_gain_and_distance():
    figure = widgets.step_waterfall({"first": 4e-3, "second": 1e-3}, 0.5e-3, "t", "recorded on X")
    axes = figure.axes[0]
    assert said(axes) == ["4 ms, 12 % of the roofline", "1 ms, 4.00x as fast as the bar above, 50 % of the roofline"]
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [(0, 4), (0, 1), (1, 3)]
    assert figure.get_supxlabel() == "recorded on X"
