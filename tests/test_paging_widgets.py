"""Notebook 08's views and exercises: pool, tables and timeline are the engine's; the checks tell right from nearly right."""

import matplotlib
import pytest

from hstu_lab import checks, widgets
from hstu_lab.paged_kv import PagedEngine

READS, GENERATES, SCORES, WAITS = widgets.ACTIVITIES
FRAME = widgets.Frame(
    work={0: (GENERATES, 1), 1: (READS, 6)}, preempted=(2,), waiting=(2,), cached={1: 4},
    tables={0: (3, 1), 1: (3, 2)}, filled={0: 6, 1: 8}, named=frozenset({3, 2, 5}),
)  # fmt: skip


def patches(axes, colour):
    found = [p for p in axes.patches if p.get_facecolor() == matplotlib.colors.to_rgba(colour)]
    return [tuple(round(v, 2) for v in (p.get_x(), p.get_y(), p.get_width(), p.get_height())) for p in found]


def said(axes):
    return [text.get_text() for text in axes.texts]


@pytest.fixture
def frames(tiny_model):
    return serve(tiny_model, num_blocks=12)


def serve(model, **switches):
    engine = PagedEngine(model, **({"num_blocks": 6, "block_size": 4, "max_tokens": 12, "max_running": 3} | switches))
    engine.add(range(1, 10), "slate", 5)
    engine.add(range(1, 13), "score", candidates=range(1, 9))
    engine.add(range(20, 30), "slate", 3)
    return widgets.watch(engine)


def test_a_run_is_told_step_by_step(frames):
    assert frames[0].work == {0: (READS, 9), 1: (READS, 3)}
    assert frames[0].tables[0] != frames[0].tables[1]
    assert frames[1].work[0] == (GENERATES, 1)
    kinds = [[kind for kind, _ in frame.work.values()] for frame in frames]
    assert sum(count for frame in frames for kind, count in frame.work.values() if kind == SCORES) == 8
    assert sum(kind == GENERATES for step in kinds for kind in step) == 4 + 2
    assert frames[-1].tables == {}
    for frame in frames:
        assert all(-(-frame.filled[request] // 4) <= len(table) for request, table in frame.tables.items())


def test_the_pool_shows_who_holds_each_block_and_how_full_it_is():
    pool, tables = widgets.block_map(FRAME, num_blocks=6, block_size=4, columns=4).axes
    first, second = widgets.request_colour(0), widgets.request_colour(1)
    assert patches(pool, first) == [(1, 0, 0.47, 0.88), (3, 0, 0.94, 0.44)], "half of block 1, its half of block 3"
    assert patches(pool, second) == [(2, 0, 0.94, 0.88), (3, 0.44, 0.94, 0.44)]
    assert patches(pool, "#cccccc") == [(1, 1, 0.94, 0.88)], "block 5 is named and held by nobody"
    assert said(pool) == list("012345")
    assert said(tables) == ["3", "1", "3", "2"]
    assert [label.get_text() for label in tables.get_yticklabels()] == ["request 0", "request 1"]
    assert [label.get_text() for label in tables.get_xticklabels()] == ["0", "4"]


def test_an_empty_pool_is_drawn():
    frame = widgets.Frame({}, (), (), {}, {}, {}, frozenset())
    assert (
        widgets.block_map(frame, num_blocks=3, block_size=4).png() == widgets.block_map(frame, num_blocks=3, block_size=4).png()
    )


def test_the_timeline_has_a_cell_for_what_each_request_did():
    later = widgets.Frame({0: (SCORES, 5), 2: (READS, 3)}, (), (), {2: 8}, {}, {}, frozenset())
    top, bottom = widgets.scheduler_timeline([FRAME, later], 12).axes
    assert patches(top, widgets.ACTIVITIES[GENERATES]) == [(0.5, 0, 1, 0.9)]
    assert patches(top, widgets.ACTIVITIES[READS]) == [(0.5, 1, 1, 0.9), (1.5, 2, 1, 0.9)]
    assert patches(top, widgets.ACTIVITIES[SCORES]) == [(1.5, 0, 1, 0.9)]
    assert patches(top, widgets.ACTIVITIES[WAITS]) == [(0.5, 2, 1, 0.9)]
    assert sorted(said(top)) == ["", "3", "5", "6", "✕"]
    names = ["request 0", "request 1 (4 cached)", "request 2 (8 cached)"]
    assert [label.get_text() for label in top.get_yticklabels()] == names
    assert [p.get_height() for p in bottom.patches] == [6, 3, 1, 0, 0, 5]
    assert bottom.lines[0].get_ydata()[0] == 12


def test_the_animator_steps_through_the_run(frames):
    explorer = widgets.paging_explorer(frames, num_blocks=12, block_size=4)
    assert explorer.label.value.startswith("step 1: 0 reads its history (9), 1 reads its history (3); ")
    before = bytes(explorer.image.value)
    explorer.controls["step"].value = len(frames)
    assert explorer.label.value.endswith("; 0 of 12 blocks held")
    assert bytes(explorer.image.value) != before
    classes = {name for child in explorer.children for name in child._dom_classes}
    assert {"paging-play", "paging-step", "paging-label", "paging-image"} <= classes


def test_the_scheduler_explorer_serves_again(tiny_model):
    explorer = widgets.schedule_explorer(
        lambda **switches: serve(tiny_model, **switches), num_blocks=[4, 6, 20], max_tokens=[4, 12, 40]
    )
    roomy = explorer.label.value
    before = bytes(explorer.image.value)
    explorer.controls["num_blocks"].value = 4
    assert explorer.label.value != roomy
    assert bytes(explorer.image.value) != before
    explorer.controls["max_tokens"].value = 4
    assert "preemption" in explorer.label.value
    explorer.controls["chunked"].value = False
    assert "fit" in explorer.label.value, "12 tokens in a step of 4: the engine's own refusal is shown"


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("full-hit-prefix", lambda tokens, cached, size, task: len(tokens) // size * size),
        ("full-hit-prefix", lambda tokens, cached, size, task: (len(tokens) - 1) // size * size),
        ("copy-on-write", lambda table, references, computed, count, size: max(-(-(computed + count) // size) - len(table), 0)),
        ("copy-on-write", lambda table, refs, computed, count, size: max(-(-(computed + count) // size) - len(table), 0) + 1),
        ("m-falcon", lambda history, candidates, micro, cached: history + candidates),
        ("m-falcon", lambda history, candidates, micro, cached: candidates + history * (1 if cached else candidates // micro)),
    ],
)
def test_an_answer_that_is_nearly_right_is_told_why(name, wrong, capsys):
    assert not checks.check(name, wrong)
    assert "raised" not in capsys.readouterr().out
