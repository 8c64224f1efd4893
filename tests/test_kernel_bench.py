"""The benchmark keeps in its record which GPU tests passed and which did not."""

import importlib
import json
import pathlib
import sys

import pytest
import torch
from triton_cases import GPU  # noqa: F401 - first: it decides whether Triton's kernels are interpreted

from hstu_lab import kernel_bench, measure

REPORT = """<testsuites><testsuite>
<testcase classname="tests.a" name="good"/>
<testcase classname="tests.a" name="wrong"><failure message="no"/></testcase>
<testcase classname="tests.a" name="broken"><error message="no"/></testcase>
<testcase classname="tests.a" name="left out"><skipped/></testcase>
</testsuite></testsuites>"""


def test_passed_and_failed_are_told_apart(monkeypatch, tmp_path):
    def run(command, check):
        assert command[-1] == "tests/test_a.py"
        assert command[command.index("-m", 3) + 1] == "gpu"
        (report,) = (word.removeprefix("--junitxml=") for word in command if word.startswith("--junitxml="))
        pathlib.Path(report).write_text(REPORT)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kernel_bench.subprocess, "run", run)
    record = measure.Record.here("x", command="python -m x")
    kernel_bench.gpu_tests(record, ["tests/test_a.py"], workers=2)
    assert record.data["tests"] == {"passed": ["tests.a::good"], "failed": ["tests.a::wrong", "tests.a::broken"]}
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_report_is_no_success(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kernel_bench.subprocess, "run", lambda command, check: None)
    record = measure.Record.here("x", command="python -m x")
    with pytest.raises(FileNotFoundError):
        kernel_bench.gpu_tests(record, ["tests/test_a.py"], workers=2)
    assert "tests" not in record.data


def test_parts_are_all_or_those_named_and_no_others(capsys):
    parser = kernel_bench.parts_parser("What it does.\n\nMore.", {"one": 1, "two": 2})
    assert parser.parse_args([]).parts == ["one", "two"]
    assert parser.parse_args(["two"]).parts == ["two"]
    with pytest.raises(SystemExit):
        parser.parse_args(["two", "three"])
    assert "there is no part 'three': use some of one, two" in capsys.readouterr().err


def part(number, fails=False):
    def run(record):
        record.data.setdefault("seen", []).append(number)
        if fails:
            raise KeyboardInterrupt

    return run


def records_in(folder):
    return {path.stem: json.loads(path.read_text()) for path in folder.rglob("*.json")}


def test_parts_of_one_record_are_kept_together(tmp_path):
    kernel_bench.run_parts({"a": ("one", part(1)), "b": ("one", part(2)), "c": ("two", part(3))}, "python -m x", tmp_path)
    written = records_in(tmp_path)
    assert {name: record["data"]["seen"] for name, record in written.items()} == {"one": [1, 2], "two": [3]}
    assert {name: record["data"]["parts"] for name, record in written.items()} == {"one": ["a", "b"], "two": ["c"]}
    assert {record["command"] for record in written.values()} == {"python -m x"}


def test_a_run_cut_short_is_taken_up_where_it_ended(tmp_path, monkeypatch, capsys):
    parts = {"a": ("one", part(1)), "b": ("one", part(2, fails=True)), "c": ("two", part(3))}
    with pytest.raises(KeyboardInterrupt):
        kernel_bench.run_parts(parts, "python -m x", tmp_path)
    assert {name: record["data"]["parts"] for name, record in records_in(tmp_path).items()} == {"one": ["a"]}
    parts["b"] = ("one", part(2))
    kernel_bench.run_parts(parts, "python -m x", tmp_path, resume=True)
    assert {name: record["data"]["seen"] for name, record in records_in(tmp_path).items()} == {"one": [1, 2], "two": [3]}
    assert "--- a: in " in capsys.readouterr().out
    # Of another source nothing is taken over.
    monkeypatch.setattr(kernel_bench, "source", lambda: "other")
    kernel_bench.run_parts({"c": ("two", part(4))}, "python -m x", tmp_path, resume=True)
    assert records_in(tmp_path)["two"]["data"] == {"seen": [4], "parts": ["c"], "source": "other"}


@pytest.mark.parametrize("module", ["kernel_bench", "cutlass_bench", "decode_bench"])
def test_without_a_gpu_a_benchmark_says_so_and_where_the_records_are(module, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [module, "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"PyTorch .* sees none; .*recorded so far: nvidia-h200.*data/measured"):
        importlib.import_module(f"hstu_lab.{module}").main()
    assert not list(tmp_path.iterdir())
