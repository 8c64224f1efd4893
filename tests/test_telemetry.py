"""Percentiles are within the promised error whatever is fed in, merging is adding, and the counts of threads add up."""

import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hstu_lab.telemetry import HIGHEST, LOWEST, RELATIVE_ERROR, Histogram, StageTimer, Telemetry

VALUES = st.lists(st.floats(LOWEST, HIGHEST), min_size=1, max_size=200)
PERCENT = st.floats(0, 100)


def filled(values) -> Histogram:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    return histogram


def nearest_rank(values, p):
    return sorted(values)[max(math.ceil(p / 100 * len(values)), 1) - 1]


@given(VALUES, PERCENT)
def test_percentiles_are_within_one_per_cent(values, p):
    got = filled(values).percentile(p)
    assert got == pytest.approx(nearest_rank(values, p), rel=RELATIVE_ERROR + 1e-9)
    assert min(values) <= got <= max(values)


@given(st.lists(st.floats(0, 1e300), min_size=1, max_size=50))
def test_values_outside_the_buckets_keep_count_and_extremes(values):
    histogram = filled(values)
    assert histogram.count == len(values)
    assert (histogram.min, histogram.max) == (min(values), max(values))
    assert histogram.percentile(100) == pytest.approx(max(values), rel=RELATIVE_ERROR + 1e-9, abs=LOWEST)
    assert min(values) <= histogram.percentile(50) <= max(values)


@given(VALUES)
def test_buckets_are_cumulative(values):
    buckets = filled(values).buckets()
    assert [count for _, count in buckets] == sorted({count for _, count in buckets})
    assert buckets[-1][1] == len(values)
    for bound, count in buckets:
        # A value on the edge of a bucket may fall on either side of it in floating point.
        below = sum(v < bound * (1 - 1e-9) for v in values)
        assert below <= count <= sum(v <= bound * (1 + 1e-9) for v in values)


def test_a_histogram_does_not_grow():
    histogram = filled([5.0])
    before = len(histogram._counts)
    for i in range(10_000):
        histogram.add(1e-3 * i)
    assert len(histogram._counts) == before == len(Histogram()._counts)
    assert histogram.count == 10_001


def test_weighted_values_count_as_many():
    a, b = Histogram(), filled([2.0, 2.0, 2.0, 7.0])
    a.add(2.0, 3)
    a.add(7.0)
    assert a.to_dict() == b.to_dict()
    assert a.to_dict()["p50"] == pytest.approx(2.0, rel=0.01)


def test_an_empty_histogram_says_so():
    empty = Histogram()
    assert math.isnan(empty.percentile(50))
    assert math.isnan(empty.mean)
    assert empty.to_dict() == {"count": 0}


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_impossible_values_are_refused_and_not_counted(value):
    histogram = filled([1.0])
    with pytest.raises(ValueError, match="finite values from 0 on"):
        histogram.add(value)
    assert histogram.count == 1


@pytest.mark.parametrize(("call", "message"), [(lambda h: h.percentile(101), "outside"), (lambda h: h.add(1.0, 0), "count is 0")])
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(filled([1.0]))


def test_threads_lose_nothing():
    telemetry = Telemetry()

    def work():
        for _ in range(2000):
            telemetry.observe("eager", {"stack": 1.0}, 2.0)
            telemetry.count("rejected")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entry = telemetry.summary()["strategies"]["eager"]
    assert entry["total"]["count"] == entry["stages"]["stack"]["count"] == 8000
    assert telemetry.counters == {"rejected": 8000}


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_the_timer_charges_each_stage_its_own_time():
    clock = Clock()
    timer = StageTimer(clock=clock)
    for stage, seconds in (("encoder", 0.25), ("stack", 0.5), ("encoder", 0.25)):
        with timer(stage):
            clock.now += seconds
        clock.now += 3
    assert timer.stages == {"encoder": 500.0, "stack": 500.0}
    assert timer.total == 1000.0


def test_a_stage_that_raises_is_timed_and_raises():
    clock = Clock()
    timer = StageTimer(clock=clock)

    def stage():
        with timer("stack"):
            clock.now += 1
            raise RuntimeError("engine died")

    with pytest.raises(RuntimeError, match="engine"):
        stage()
    assert timer.stages == {"stack": 1000.0}


def test_telemetry_adds_up_requests_throughput_and_counters():
    clock = Clock()
    telemetry = Telemetry(clock=clock)
    for milliseconds in (100, 300):
        clock.now += milliseconds / 1e3
        telemetry.observe("eager", {"stack": milliseconds * 0.75}, milliseconds)
    clock.now += 2.0
    telemetry.observe("vllm", {"stack": 2000.0}, 2000.0, requests=8)
    telemetry.count("errors")
    telemetry.count("errors", 2)

    eager, vllm = (telemetry.summary()["strategies"][name] for name in ("eager", "vllm"))
    assert eager["total"]["mean"] == 200.0
    assert eager["stages"]["stack"]["max"] == 225.0
    assert eager["throughput"] == pytest.approx(2 / 0.4)
    assert vllm["total"]["count"] == 8
    assert vllm["throughput"] == pytest.approx(8 / 2.0)
    assert vllm["total"]["p99"] == pytest.approx(2000.0, rel=0.01)
    assert math.isnan(telemetry.throughput("onnx"))

    table = telemetry.table().splitlines()
    assert [line.split()[0] for line in table] == ["strategy", "eager", "stack", "vllm", "stack", "counters:"]
    assert float(table[3].split()[2]) == pytest.approx(2000.0, rel=0.01)
    assert table[-1] == "counters: errors 3"
