"""Figures draw the numbers they are given, and moving a control runs a real recommendation and redraws."""

import json
import types

import ipywidgets
import matplotlib
import numpy as np
import pytest
import torch

from hstu_lab import events, widgets
from hstu_lab.config import preset
from hstu_lab.model import HSTU, save_checkpoint
from hstu_lab.pipeline import STAGES, Recommender

STAGE_TIMES = {"tokens": 0.25, "encoder": 0.5, "stack": 3.0, "ranking": 1.25}
PNG = b"\x89PNG\r\n\x1a\n"


def bars(axes):
    return [(round(p.get_x(), 9), round(p.get_width(), 9)) for p in axes.patches]


def said(axes):
    return [text.get_text() for text in axes.texts]


def test_a_waterfall_starts_each_bar_where_the_last_one_ended():
    axes = widgets.stage_waterfall(STAGE_TIMES, "t").axes[0]
    assert bars(axes) == [(0, 0.25), (0.25, 0.5), (0.75, 3.0), (3.75, 1.25), (0, 5.0)]
    assert [label.get_text() for label in axes.get_yticklabels()] == [*STAGE_TIMES, "total"]
    assert said(axes) == ["0.25 ms (5%)", "0.50 ms (10%)", "3.00 ms (60%)", "1.25 ms (25%)", "5.00 ms"]
    assert axes.get_title(loc="left") == "t"


def test_strategies_stack_their_stages_and_show_their_totals():
    rows = {"eager": STAGE_TIMES, "vllm": {"tokens": 0.25, "stack": 1.0}}
    axes = widgets.strategy_waterfall(rows, source="recorded somewhere").axes[0]
    # Stage by stage, both strategies: a stage that a strategy lacks has no width.
    assert bars(axes) == [(0, 0.25), (0, 0.25), (0.25, 0.5), (0.25, 0), (0.75, 3.0), (0.25, 1.0), (3.75, 1.25), (1.25, 0)]
    assert said(axes) == ["5.00 ms", "1.25 ms"]
    assert "recorded somewhere" in [t.get_text() for t in axes.figure.texts]


def test_lengths_are_drawn_in_order_with_the_current_one_beside():
    rows = {40: STAGE_TIMES, 5: {"tokens": 0.1, "stack": 0.2}}
    waterfall, columns = widgets.latency_by_length(rows, 5).axes
    assert said(waterfall)[-1] == "0.30 ms"
    assert [label.get_text() for label in columns.get_xticklabels()] == ["5", "40"]
    tops = [max(p.get_y() + p.get_height() for p in columns.patches if p.get_x() // 1 == x) for x in (-1, 0)]
    assert tops == pytest.approx([0.3, 5.0])
    assert len(widgets.latency_by_length(rows).axes) == 1


def test_a_stage_keeps_its_colour_in_every_figure():
    assert set(STAGES) == set(widgets.STAGE_COLOURS)
    colours = widgets.stage_colours(["tokens", "fetch", "stack", "post"])
    assert colours["stack"] == widgets.STAGE_COLOURS["stack"]
    assert len(set(colours.values())) == 4


@pytest.mark.parametrize("stages", [{}, {"stack": 0.0}, STAGE_TIMES])
def test_figures_are_png_and_the_same_every_time(stages):
    figures = [lambda: widgets.stage_waterfall(stages), lambda: widgets.strategy_waterfall({"eager": stages})]
    for figure in figures:
        assert figure()._repr_png_().startswith(PNG)
        assert figure().png() == figure().png()


def test_an_explorer_redraws_on_change_and_shows_what_went_wrong():
    def draw(length):
        if length == 13:
            raise RuntimeError("engine died")
        return f"length {length}", widgets.stage_waterfall({"stack": float(length)})

    slider = ipywidgets.IntSlider(value=3, min=1, max=20)
    explorer = widgets.Explorer("demo", draw, length=slider)
    assert explorer.label.value == "length 3"
    before = bytes(explorer.image.value)
    assert before.startswith(PNG)
    slider.value = 4
    assert explorer.label.value == "length 4"
    assert bytes(explorer.image.value) != before
    slider.value = 13
    assert explorer.label.value == "RuntimeError: engine died"
    slider.value = 4
    assert explorer.label.value == "length 4"
    assert "demo-length" in slider._dom_classes
    assert "demo-label" in explorer.label._dom_classes
    assert "demo-image" in explorer.image._dom_classes

    slider.value = 13
    with pytest.raises(RuntimeError, match="engine died"):
        widgets.Explorer("demo", draw, length=slider)


def test_drift_is_drawn_of_every_session_and_fades():
    log = events.World(preset("tiny")).generate(60)
    left, right, _ = widgets.taste_drift(log, 3, lags=8).axes
    history = log.history(3)
    shown = left.images[0].get_array()
    assert shown.sum() == len(history)
    assert shown.sum(0).tolist() == np.bincount(history.sessions).tolist()
    assert len(shown) == len(set(log.catalog.features["category"][history.items].tolist()))
    same, strangers = (line.get_ydata() for line in right.lines)
    assert len(same) == 8
    assert 1 > same[0] > same[-1] > strangers[0] > 0


PARTS = {"items": 2_000_000, "users": 3_000_000_000, "stack": 50_000_000}


def test_parameters_stack_to_the_total_and_show_their_bytes():
    linear, logarithmic = widgets.parameter_bars({"described": {"stack": 150_000_000}, "model": PARTS}).axes
    assert said(linear) == ["0.15 B", "3.05 B"]
    ends = [p.get_x() + p.get_width() for p in linear.patches]
    assert max(ends) == pytest.approx(3.052)
    assert [p.get_width() for p in logarithmic.patches] == list(PARTS.values())
    assert [label.get_text() for label in logarithmic.get_yticklabels()] == list(PARTS)
    assert said(logarithmic)[0] == "2,000,000: 8 MB in fp32, 4 MB in fp16"
    assert said(logarithmic)[1] == "3,000,000,000: 12 GB in fp32, 6 GB in fp16"


def test_parts_have_colours_and_add_up():
    config = preset("tiny")
    parts = widgets.parameter_parts(config)
    assert set(parts) <= set(widgets.PART_COLOURS)
    assert parts["items"] == config.num_items * config.d_model
    assert parts["side features"] == (17 + 65) * config.d_model
    assert sum(parts.values()) == sum(p.numel() for p in HSTU(config).parameters())


def test_the_parameter_explorer_counts_the_model_that_is_set():
    explorer = widgets.parameter_explorer(preset("small"))
    controls = explorer.controls
    assert explorer.label.value.startswith(
        f"{sum(widgets.parameter_parts(preset('small')).values()):,} parameters: 1.47 MB in fp32, "
    )
    before = bytes(explorer.image.value)
    for name, value in {"d_model": 128, "layers": 5, "items": 10_000, "users": 0}.items():
        controls[name].value = value
    changed = preset("small").replace(d_model=128, num_layers=5, num_items=10_000, num_users=0, d_qk=32, d_v=32)
    total = sum(p.numel() for p in HSTU(changed).parameters())
    assert explorer.label.value.startswith(f"{total:,} parameters: ")
    assert bytes(explorer.image.value) != before
    controls["items"].value = 1_000_000
    assert "over 2^31: lower num_time_levels" in explorer.label.value


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (999.6, "1 kB"), (12_345, "12.3 kB"), (12.8e9, "12.8 GB"), (3e15, "3e+03 TB")]
)
def test_bytes_are_short(count, text):
    assert widgets.format_bytes(count) == text


@pytest.fixture(scope="module")
def recommender(tmp_path_factory):
    config, folder = preset("tiny"), tmp_path_factory.mktemp("checkpoint")
    world = events.World(config, seed=3)
    log = world.generate(4, seed=3)
    torch.manual_seed(0)
    model = HSTU(config)
    model.tables.item_features[:] = torch.as_tensor(np.asarray(world.catalog.item_features(config)))
    save_checkpoint(model, folder)
    world.catalog.save(folder / "catalog.json")
    (folder / "users.json").write_text(json.dumps(log.users))
    with Recommender(folder, strategy="eager") as made:
        yield types.SimpleNamespace(made=made, histories=[log.history(i) for i in range(len(log))])


def test_matrices_have_a_scale_that_fits_what_they_hold():
    signed, counts, mask = np.array([[-2.0, 1.0]]), np.array([[0, 30]]), np.array([[True, False]])

    def scales(**options):
        figure = widgets.matrices(**options)
        pictures = [axes.images[0] for axes in figure.axes if axes.images]
        return [(image.get_cmap().name, *image.get_clim()) for image in pictures], len(figure.axes) - len(pictures)

    assert scales(panels={"a": signed, "b": counts}) == ([("RdBu_r", -30.0, 30.0)] * 2, 1)
    assert scales(panels={"a": signed, "b": counts}, shared=False) == ([("RdBu_r", -2.0, 2.0), ("Blues", 0.0, 30.0)], 2)
    assert scales(panels={"a": mask}) == ([("Greys", 0.0, 1.0)], 0), "a mask needs no scale"


def test_moving_the_slider_runs_a_real_recommendation(recommender):
    made, histories = recommender.made, recommender.histories
    explorer = widgets.latency_explorer(made, histories)
    slider, users = explorer.controls["length"], explorer.controls["user"]
    longest = min(*map(len, histories), made.config.max_history)
    assert slider.max == longest
    answered = made.telemetry.summary()["strategies"]["eager"]["total"]["count"]
    before = bytes(explorer.image.value)
    slider.value = slider.min
    assert made.telemetry.summary()["strategies"]["eager"]["total"]["count"] > answered
    assert explorer.label.value.startswith(f"1 event of {histories[0].user}: ")
    assert float(explorer.label.value.split(": ")[1].split(" ms")[0]) > 0
    assert bytes(explorer.image.value) != before
    users.value = histories[1].user
    assert f" of {histories[1].user}: " in explorer.label.value


def test_lengths_are_timed_on_the_latest_events(recommender, monkeypatch):
    made, history = recommender.made, recommender.histories[0]
    asked = []
    real = made.recommend
    monkeypatch.setattr(made, "recommend", lambda part: asked.append(part) or real(part))
    rows = widgets.time_lengths(made, history, [1, 5], repeats=3)
    assert set(rows) == {1, 5}
    assert set(rows[5]) == set(STAGES)
    assert [len(part) for part in asked] == [1, 1, 1, 5, 5, 5]
    assert (asked[-1].items == history.items[-5:]).all()


def test_what_a_returning_user_costs_is_the_prompt_less_the_cache():
    axes = widgets.prefix_reuse({9: (10, 0), 10: (11, 8), 8: (9, 8)}, {10: 3}).axes[0]
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["whole prompt (no cache)"] == [[8, 9], [9, 10], [10, 11]]
    assert lines["computed by vLLM"] == [[8, 1], [9, 10], [10, 3]]
    assert lines["predicted"] == [[10, 3]]
    assert len(widgets.prefix_reuse({1: (2, 0)}).axes[0].lines) == 2


def test_a_step_shows_who_reads_and_who_generates():
    left, right = widgets.serving_steps([[30, 12], [1, 5, 9], [1, 1]], {"alone": 8.0, "together": 2.0}).axes
    assert [p.get_height() for p in left.patches] == [0, 1, 2, 2, 2, 0]  # generating, then reading on top of it
    assert [p.get_y() for p in left.patches][3:] == [0, 1, 2]
    assert said(right) == ["8.0 ms", "2.0 ms"]


@pytest.mark.parametrize(("tokens", "users", "blocks", "fitting"), [(16, 3, 1, 3), (17, 3, 2, 2), (80, 3, 5, 0), (1, 9, 1, 4)])
def test_histories_take_whole_blocks_of_the_pool(tokens, users, blocks, fitting):
    pool = {"num_blocks": 4, "block_size": 16}
    assert widgets.kv_blocks(tokens, users, **pool) == (blocks, fitting)
    left, right = widgets.kv_pool(tokens, users, block_bytes=2**20, max_seq_len=96, **pool).axes
    picture = left.images[0].get_array()
    assert picture.shape == (users, 96)
    for user, row in enumerate(picture.tolist()):
        held = [1] * tokens + [2] * (16 * blocks - tokens) if user < fitting else [3] * 16 * blocks
        assert row == held + [0] * (96 - 16 * blocks)
    assert said(right) == [f"{users * blocks}.0 MiB", f"{users * 6}.0 MiB"]
    assert left.get_title(loc="left") == f"{fitting} of {users} histories of {tokens} tokens fit"


def test_the_pool_is_redrawn_for_another_length_or_number_of_users():
    explorer = widgets.kv_explorer(preset("tiny"), num_blocks=10, block_bytes=8192)
    events, users = explorer.controls["events"], explorer.controls["users"]
    assert events.max == preset("tiny").max_history
    events.value, users.value = 31, 4
    assert explorer.label.value == "32 tokens take 2 blocks; 4 of 4 users fit: 8 of 10 blocks, 0.1 MiB"
    before = bytes(explorer.image.value)
    events.value = 32
    assert explorer.label.value == "33 tokens take 3 blocks; 3 of 4 users fit: 9 of 10 blocks, 0.1 MiB"
    assert bytes(explorer.image.value) != before
    assert [name for name in events._dom_classes if name.startswith("kv-")] == ["kv-events"]
    assert [name for name in users._dom_classes if name.startswith("kv-")] == ["kv-users"]


@pytest.mark.parametrize(("length", "m", "n"), [(8, 2, 2), (10, 4, 2), (9, 2, 4), (7, 16, 16)])
def test_tiles_are_skipped_only_where_no_query_sees_a_key(length, m, n):
    causal = np.tril(np.ones((length, length), dtype=bool))
    kinds = widgets.tile_kinds(length, m, n)
    for (row, column), kind in np.ndenumerate(kinds):
        seen = causal[row * m : (row + 1) * m, column * n : (column + 1) * n]
        whole = seen.all() and (column + 1) * n <= length
        assert kind == (0 if not seen.any() else 1 if whole else 2), (row, column)
    axes = widgets.tile_map(length, [(m, n)]).axes[0]
    assert len(axes.patches) == kinds.size
    assert axes.get_title(loc="left").startswith(f"{m} x {n}: {np.count_nonzero(kinds)} of {kinds.size}, ")


def test_other_tiles_are_counted_and_drawn_again():
    explorer = widgets.tile_explorer()
    before = bytes(explorer.image.value)
    explorer.controls["length"].value = 100
    explorer.controls["block_m"].value, explorer.controls["block_n"].value = 64, 32
    assert explorer.label.value == "2 tiles whole, 4 masked, 2 skipped"
    assert bytes(explorer.image.value) != before


def test_rates_are_drawn_by_length_with_their_source():
    figure = widgets.rates_by_length({"d=64": {"ours": {512: 1.0, 1024: 3.0}}, "d=128": {"ours": {512: 2.0}}}, "recorded on X")
    left, right = figure.axes
    assert left.lines[0].get_xydata().tolist() == [[512, 1], [1024, 3]]
    assert right.lines[0].get_xydata().tolist() == [[512, 2]]
    assert left.get_ylim()[0] == 0
    assert right.get_ylim()[1] > 3
    assert figure.get_supxlabel() == "recorded on X"


def test_a_missed_target_shows():
    goals = {"a": 0.75, "b": 0.75}
    axes = widgets.share_bars({"a": 0.5, "b": 0.75, "c": 0.1}, goals.get).axes[0]
    assert [p.get_width() for p in axes.patches] == [50, 75, 10]
    assert [p.get_facecolor()[:3] for p in axes.patches] == [
        matplotlib.colors.to_rgb(c) for c in ("#e69f00", "#0072b2", "#999999")
    ]
    assert said(axes) == ["50.0%", "75.0%", "10.0%"]
    assert [line.get_xdata()[0] for line in axes.lines] == [75, 75]


def test_clocks_of_every_unit_and_the_recorded_ones_are_drawn():
    clocks = dict(zip(widgets.UNIT_CLOCKS, (256.0, 128.0, 64.0, 32.0, 200.0)))
    axes = widgets.unit_clocks({"ours": clocks, "other": dict.fromkeys(clocks, 10.0)}, {"ours": 500.0}).axes[0]
    assert [patch.get_width() for patch in axes.patches] == [*clocks.values(), *[10] * 5]
    assert [list(line.get_xdata()) for line in axes.lines] == [[500, 500]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ours", "other"]
    assert axes.get_xlim()[1] > 500


def test_the_table_of_replicas_shows_peak_ceiling_and_latencies_in_order():
    entry = lambda rate: {"requests/s": rate, "p50 s": 0.02, "p99 s": 0.1}  # noqa: E731
    table = {
        "slate history=256 cold": {"engines": entry(4000.0), "null": entry(9000.0), "half": entry(2000.0)},
        "topk history=1024 90% warm": {"engines": entry(5000.0)},
        "topk history=512 cold": {"engines": entry(3000.0), "null": entry(8000.0), "half": entry(1500.0)},
        "topk history=256 cold": {"engines": entry(0.0), "half": entry(1.0)},
    }
    left, right = widgets.replica_table(table, "recorded on a device").axes
    assert [label.get_text() for label in left.get_yticklabels()] == [
        "topk history=256 cold", "topk history=512 cold", "topk history=1024 90% warm", "slate history=256 cold"
    ]  # fmt: skip
    assert [bar.get_width() for bar in left.patches] == [0, 3000, 5000, 4000]
    assert said(left) == ["none finished: no rate", "3,000", "5,000", "4,000"]
    assert left.lines[0].get_xdata().tolist() == [8000, 9000]
    assert [line.get_xdata().tolist() for line in right.lines[:2]] == [pytest.approx([100, 100]), pytest.approx([20, 20])]
