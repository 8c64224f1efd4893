"""Views of notebook 10: what they say follows from what they are given, and every control changes the picture."""

import numpy as np
import pytest

from hstu_lab import widgets
from hstu_lab.cache_policies import simulate
from hstu_lab.cache_traces import synthetic_trace
from hstu_lab.measure import read_record


def test_lookup_time_is_hits_at_one_rate_and_misses_at_another():
    got = widgets.lookup_milliseconds(1000, 0.75, 500, gather=1e9, bus=1e8)
    assert got == pytest.approx(1e3 * (2 * 0.75e6 / 1e9 + 0.25e6 / 1e8))


def test_hit_ratio_over_time():
    hits = np.array([True] * 40 + [False] * 40)
    assert widgets.over_time(hits, 4).tolist() == [1, 1, 0, 0]
    figure = widgets.hit_ratio_lines({"lru": hits, "belady": np.array([1.0, 0.5])}, shift=0.5)
    drawn = figure.axes[0].lines
    assert drawn[0].get_ydata().mean() == pytest.approx(0.5)
    assert list(drawn[1].get_ydata()) == [1.0, 0.5]


def test_the_cache_explorer_answers_every_control():
    explorer = widgets.cache_explorer(gather=3e12, bus=5e10)
    seen = {bytes(explorer.image.value)}
    for control, value in (("policy", "lru"), ("share", 0.2), ("skew", 1.2), ("drift", 2.0), ("policy", "predicted")):
        explorer.controls[control].value = value
        assert bytes(explorer.image.value) not in seen, control
        seen.add(bytes(explorer.image.value))
    explorer.controls["policy"].value = "counts"
    trace = synthetic_trace(1200, 250, skew=1.2, drift=2.0, seed=1)
    assert f"{simulate('counts', trace.items, 50, 250)[600:].mean():.1%} hits" in explorer.label.value


def test_the_trace_explorer_moves():
    trace = synthetic_trace(3000, 100)
    runs = {name: simulate(name, trace.items, 10) for name in ("lru", "belady")}
    explorer = widgets.trace_explorer(trace, runs, window=500)
    explorer.controls["start"].value = 1000
    assert explorer.label.value == f"LRU: {runs['lru'][1000:1500].mean():.1%} of 500 accesses hit"
    before = bytes(explorer.image.value)
    explorer.controls["policy"].value = "belady"
    assert explorer.label.value.startswith("Belady")
    assert bytes(explorer.image.value) != before


def test_the_recorded_traces_are_drawn_as_they_are():
    record = read_record("cache_traces")
    cells = {name: entry["cells"] for name, entry in record.data["traces"].items()}
    figure = widgets.gap_bars(cells, record.label)
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == [cell["cache"] for rows in cells.values() for cell in rows]
    for rows in cells.values():
        for cell in rows:
            best = max(value for name, value in cell["policies"].items() if name != "predicted")
            assert cell["closed"] == pytest.approx((cell["cache"] - best) / (cell["belady"] - best))
    assert widgets.cost_bars({"cache": 1.0, "all in HBM": 0.5}, {"cache": 1.0, "all in HBM": 2.0}).png()


def test_lookups_are_drawn_where_they_were_measured():
    cases = [{"asked": kind, "where": where, "seconds": seconds, "hit ratio": ratio}
             for kind, where, seconds, ratio in (("all hits", "hot cache, LRU", 1e-4, 1.0), ("all hits", "HBM", 2e-5, None),
                                                 ("Zipf", "hot cache, LRU", 3e-4, 0.9))]  # fmt: skip
    left, right = widgets.lookup_bars(cases).axes
    assert [bar.get_width() for bar in left.patches] == pytest.approx([100, 20])
    assert [bar.get_width() for bar in right.patches] == pytest.approx([300])
    assert [text.get_text() for text in right.texts] == ["300 (90% hits)"]
