"""Times are those of one call; a record says where it was made, comes back whole, and is refused by name when it cannot."""

import functools
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from hstu_lab import environment, measure
from hstu_lab.measure import (
    Goal,
    MeasureError,
    Measurement,
    Record,
    data_root,
    list_records,
    peak_copy_bandwidth,
    read_record,
    write_record,
)


def test_a_sleep_takes_as_long_as_it_sleeps():
    result = measure.measure(lambda: time.sleep(0.01), name="sleep", repeats=5, min_time=0, work={"flops": 1e6, "bytes": 1e3})
    assert result.calls == 1
    assert len(result.samples) == 5
    assert 0.01 <= result.min <= result.median < 0.1
    assert result.flops_per_second == 1e6 / result.median
    assert result.bytes_per_second == 1e3 / result.median


def test_a_short_function_is_timed_in_groups_and_reported_per_call():
    result = measure.measure(lambda: None, name="nothing", repeats=5, min_time=0.01)
    assert result.calls > 100
    assert 0 < result.median < 1e-5
    assert 5 <= len(result.samples) <= 2 * measure._MOST_SAMPLES


def test_measuring_lasts_at_least_about_min_time():
    start = time.perf_counter()
    result = measure.measure(lambda: time.sleep(0.002), name="sleep", repeats=1, min_time=0.1)
    assert 0.05 < sum(result.samples) <= time.perf_counter() - start


def test_inputs_take_turns():
    seen = []
    measure.measure(seen.append, name="turns", inputs=[(0,), (1,), (2,)], warmup=3, repeats=6, min_time=0)
    timed = seen[4:]
    assert timed[:6] == [0, 1, 2, 0, 1, 2]
    assert abs(timed.count(0) - timed.count(2)) <= 1


def test_what_cannot_be_timed_is_refused():
    with pytest.raises(MeasureError, match="at least one tuple of inputs"):
        measure.measure(print, name="x", inputs=[])
    with pytest.raises(MeasureError, match="has no samples"):
        Measurement("x", ())


@pytest.mark.parametrize("options", [{"cuda_graph": True}, {"device": "cuda"}])
def test_gpu_timing_without_a_gpu_is_refused(options, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MeasureError, match="no GPU is here"):
        measure.measure(print, name="x", **options)


def test_functions_that_are_compared_take_turns():
    seen = []
    fns = {name: functools.partial(run, seen, name) for name, run in (("quick", list.append), ("slow", append_slowly))}
    quick, slow = measure.measure_in_turns(fns, warmup=1, repeats=4, min_time=0, work={"slow": {"flops": 6.0}}, device="cpu")
    assert (quick.name, slow.name, len(quick.samples), len(slow.samples)) == ("quick", "slow", 4, 4)
    assert (dict(quick.work), dict(slow.work), slow.calls) == ({}, {"flops": 6.0}, 1)
    timed = seen[-4 * (quick.calls + 1) :]
    assert timed == 4 * (quick.calls * ["quick"] + ["slow"])
    assert slow.min >= 0.002


def append_slowly(seen, name):
    time.sleep(0.002)
    seen.append(name)


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_gpu_time_is_the_kernels_not_the_launch(cuda_graph):
    """A kernel that counts clocks to three million takes a millisecond at least (no GPU runs at 3 GHz), whoever shares the GPU.

    The host launches it half a second late, which a replay leaves out.
    """

    def late():
        time.sleep(0.5 if cuda_graph else 0)
        torch.cuda._sleep(3_000_000)

    result = measure.measure(late, name="spin", warmup=1, repeats=5, min_time=0, cuda_graph=cuda_graph, device="cuda")
    assert (result.clock, result.calls) == ("cuda graph" if cuda_graph else "cuda events", 1)
    assert 1e-3 < result.min < 0.5


@pytest.mark.gpu
def test_a_replay_holds_many_short_kernels():
    """Starting a graph takes longer than one of them: few calls a replay would time the start."""
    one = torch.zeros(1, device="cuda")
    result = measure.measure(lambda: one.add_(1), name="add", repeats=5, min_time=0.01, cuda_graph=True)
    assert result.calls > 20
    torch.cuda.synchronize()
    assert one.item() >= result.calls * len(result.samples)


def test_percentiles_interpolate():
    result = Measurement("x", tuple(float(i) for i in range(100, -1, -1)))
    assert (result.p5, result.median, result.p95, result.min) == (5.0, 50.0, 95.0, 0.0)
    assert Measurement("x", (1.0, 2.0)).percentile(25) == 1.25


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1.234, "1.23 s"), (0.00012, "120 us"), (0.5, "500 ms"), (3.2e-8, "32 ns"), (0.0, "0 ns"), (0.9996, "1 s"),
        (0.9994e-3, "999 us"), (0.9996e-3, "1 ms"), (999.7e-9, "1 us"), (1234.5, "1234 s"),
    ],
)  # fmt: skip
def test_seconds_are_shown_in_the_unit_that_fits(seconds, text):
    assert measure.format_seconds(seconds) == text


def test_the_copy_ruler_counts_both_directions():
    result = peak_copy_bandwidth("cpu", size=1 << 22)
    assert result.work == {"bytes": 2 << 22}
    assert 1e8 < result.bytes_per_second < 1e13


def record(name="attention", **changes) -> Record:
    made = Record.here(
        name,
        measurements=[Measurement("dense", (0.00123456, 0.2, 3e-7), 4, "wall", {"flops": 12.0})],
        data={"rows": [{"n": 1, "ms": [1.5, 2.5]}], "note": "é"},
        note="a note",
        command="python -m hstu_lab benchmark",
    )
    for field, value in changes.items():
        setattr(made, field, value)
    return made


def test_a_record_comes_back_whole(tmp_path):
    written = record()
    path = write_record(written, tmp_path)
    assert path == tmp_path / environment.device_slug() / "attention.json"
    back = read_record("attention", root=tmp_path)
    assert back["dense"].samples == (0.001235, 0.2, 3e-7)
    back.measurements = written.measurements
    assert back == written
    assert back.versions["torch"] == torch.__version__
    assert list_records(tmp_path) == [path]
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_record_file_is_sorted_plain_json_without_nan(tmp_path):
    path = write_record(record(), tmp_path)
    text = path.read_text()
    fields = json.loads(text)
    assert list(fields) == sorted(fields)
    assert fields["measurements"][0]["samples"] == [0.001235, 0.2, 3e-7]
    assert '"samples": [0.001235, 0.2, 3e-07]' in text, "numbers of one list stand on one line"
    with pytest.raises(MeasureError, match=r"attention\.json"):
        write_record(record(data={"x": float("nan")}), tmp_path)
    assert path.read_text() == text, "a refused record must leave the old one"


def test_the_label_says_device_date_versions_and_file(tmp_path):
    made = record(device="NVIDIA H200", date="2026-11-23T10:00:00+00:00", versions={"torch": "2.11.0+cu130", "numpy": "2.4"})
    assert made.label == "recorded on NVIDIA H200, 2026-11-23, torch 2.11.0+cu130"
    path = write_record(made, tmp_path)
    assert made.label.endswith(f" ({path})")
    assert read_record("attention", device="NVIDIA H200", root=tmp_path).label == made.label


def test_own_device_wins_then_the_newest(tmp_path):
    for device, date in (("NVIDIA A100", "2026-01-01"), ("NVIDIA H200", "2026-02-02"), ("NVIDIA L4", "2025-01-01")):
        write_record(record(device=device, date=date), tmp_path)
    assert read_record("attention", root=tmp_path).device == "NVIDIA H200"
    write_record(record(date="2020-01-01"), tmp_path)
    assert read_record("attention", root=tmp_path).device == environment.device_name()
    assert read_record("attention", device="nvidia-a100", root=tmp_path).date == "2026-01-01"


def test_a_missing_record_names_the_path_and_the_command(tmp_path):
    with pytest.raises(MeasureError, match=r"nvidia-h200/attention\.json: no such record: make it with: python make\.py"):
        read_record("attention", device="nvidia-h200", root=tmp_path, command="python make.py")
    write_record(record(device="NVIDIA A100"), tmp_path)
    with pytest.raises(MeasureError, match="make it with: python -m hstu_lab benchmark"):
        read_record("attention", device="nvidia-h200", root=tmp_path)
    with pytest.raises(MeasureError, match="no measurement 'sparse'; there are: dense"):
        read_record("attention", root=tmp_path)["sparse"]


def edit(change):
    def damage(path):
        fields = json.loads(path.read_text())
        change(fields)
        path.write_text(json.dumps(fields))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(b""), "not a readable record"),
        (lambda p: p.write_bytes(b"\x80\x04\xff" * 9), "not a readable record"),
        (lambda p: p.write_text(p.read_text()[:100]), "not a readable record"),
        (lambda p: p.write_text("[]"), "not a readable record"),
        (edit(lambda f: f.pop("device")), "not a readable record.*device"),
        (edit(lambda f: f["measurements"][0].update(samples=[])), "no samples"),
        (edit(lambda f: f.update(schema_version=99)), "schema_version is 99, this release reads 1"),
    ],
)
def test_a_damaged_record_is_refused_in_one_line(tmp_path, damage, message):
    path = write_record(record(), tmp_path)
    damage(path)
    with pytest.raises(MeasureError, match=message) as raised:
        read_record("attention", root=tmp_path, command="python -m hstu_lab benchmark")
    assert str(path) in str(raised.value)
    assert "make it again with: python -m hstu_lab benchmark" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["", "../escape", "Upper", "a b"])
def test_names_that_are_no_file_names_are_refused(tmp_path, name):
    with pytest.raises(MeasureError, match="record name"):
        write_record(record(name), tmp_path)


def test_the_command_of_a_script_is_recorded_and_a_notebook_must_say(tmp_path, monkeypatch):
    script = tmp_path / "probe.py"
    script.write_text("from hstu_lab.measure import Record\nprint(Record.here('x').command)\n")
    done = subprocess.run([sys.executable, script, "--flag", "a b"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"python {script} --flag 'a b'"
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "ipykernel_launcher", "-f", "kernel.json"])
    with pytest.raises(MeasureError, match="say command="):
        Record.here("x")
    assert Record.here("x", command="make x").command == "make x"


def test_the_data_folder_can_be_moved(tmp_path, monkeypatch):
    monkeypatch.delenv("HSTU_LAB_DATA", raising=False)
    assert data_root() == measure.Path(measure.__file__).parents[1] / "data"
    monkeypatch.setenv("HSTU_LAB_DATA", str(tmp_path / "elsewhere"))
    path = write_record(record())
    assert path.is_relative_to(tmp_path / "elsewhere" / "measured")
    assert oct(os.stat(path).st_mode)[-3:] == "644"
    assert read_record("attention").path == path


@pytest.mark.parametrize(
    ("value", "at_least", "met"), [(1.6, True, True), (1.59, True, False), (1.6, False, True), (1.61, False, False)]
)
def test_a_goal_is_held_to_its_target_from_one_side(value, at_least, met):
    goal = Goal("x", value, 1.6, at_least)
    assert goal.met == met
    assert str(goal).startswith("met " if met else "MISSED ")
