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
    kernel_bench.gpu_tests(record, ["tests/test_a.py"], workers=2)  # of a second part: beside the first
    assert record.data["tests"]["passed"] == 2 * ["tests.a::good"]
    assert not list(tmp_path.iterdir())


def test_every_file_of_gpu_tests_is_in_a_part(monkeypatch):
    told = []
    monkeypatch.setattr(kernel_bench, "gpu_tests", lambda record, files, workers: told.extend(files))
    for part in ("tests", "serving"):
        kernel_bench.PARTS[part][1](None)
    assert sorted(told) == sorted([*map(str, pathlib.Path("tests").glob("test_triton_*.py")), "tests/test_measure.py"])


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


def test_a_run_of_another_name_leaves_the_records_of_the_first_alone(monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(measure, "require_gpu", lambda: None)
    monkeypatch.setattr(kernel_bench, "run_parts", lambda parts, command, out, resume: ran.append((parts, command, out, resume)))
    for name in ([], ["--name", "triton-9.9"]):
        monkeypatch.setattr(sys, "argv", ["kernel_bench", "attention", "special", "--out", str(tmp_path), *name])
        kernel_bench.main()
    assert [{part: record for part, (record, _) in parts.items()} for parts, *_ in ran] == [
        {"attention": "triton_attention", "special": "triton_calibration"},
        {"attention": "triton-9.9_attention", "special": "triton-9.9_calibration"},
    ]
    assert [command for _, command, *_ in ran] == [
        "python -m hstu_lab.kernel_bench", "python -m hstu_lab.kernel_bench --name triton-9.9"
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["kernel_bench", "--name", "Triton 9"])
    with pytest.raises(measure.MeasureError, match=r"'Triton 9'.*use lower-case"):
        kernel_bench.main()


def test_the_target_of_a_paged_case():
    cases = [
        "decode B=8 N=1024 H=16 d=64 page=16",
        "decode B=64 N=1024 H=16 d=64 page=16",
        "extend 512 B=32 N=4096 H=4 d=64 page=16",
    ]
    assert [kernel_bench.paged_target(case) for case in cases] == [None, 0.75, 0.6]


def test_the_ledger_takes_the_worst_of_each_kind():
    records = kernel_bench.read_records()
    before = {goal.what: goal for goal in kernel_bench.ledger(records)}
    records["paged"].data["share of roofline"]["decode B=8 N=1024 H=16 d=64 page=16"] = 0.01  # held to nothing
    records["paged"].data["share of roofline"]["decode B=128 N=1024 H=16 d=64 page=16"] = 0.02
    records["paged"].data["share of roofline, each alone"]["extend 32 B=32 N=4096 H=4 d=64 page=64"] = 0.03
    records["attention"].data["ratios"]["d=64 N=random to 1024 bias=none"]["speed over flash"] = 0.04
    records["attention"].data["ratios"]["d=64 N=512 bias=position+time"]["speed over flash"] = 0.01  # with a bias
    after = {goal.what: goal for goal in kernel_bench.ledger(records)}
    assert {what: after[what].value for what in after if after[what] != before[what]} == {
        "decode, batch >= 64: share": 0.02,
        "extend, slowest, each alone": 0.03,
        "slowest case without bias: speed over flash": 0.04,
    }


def test_a_run_with_a_record_missing_is_named():
    with pytest.raises(measure.MeasureError, match=r"triton-0_correctness\.json: no such record"):
        kernel_bench.read_records("triton-0")
