"""The command line: bad input gets one clear line on stderr and no traceback; good users are served."""

import gzip
import json
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

from hstu_lab import settings
from hstu_lab.__main__ import main
from hstu_lab.event_log import EventsError
from hstu_lab.events import write_events


@pytest.fixture(scope="module")
def events(tmp_path_factory, tiny_world):
    path = tmp_path_factory.mktemp("events") / "log.jsonl"
    write_events(tiny_world.select(range(12)), path)
    return path


@pytest.fixture
def run(tiny_checkpoint, capsys):
    """main() with the tiny checkpoint and strategy eager -> (status, stdout, stderr)."""

    def call(*arguments, checkpoint=tiny_checkpoint, command="recommend"):
        extra = ["--checkpoint", str(checkpoint), "--strategy", "eager"] if command != "train" else []
        status = main([command, *map(str, arguments), *extra])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return status, captured.out, captured.err

    return call


def _row(**changes):
    row = {"user": "u1", "item": "i1", "action": "click", "timestamp": 1_700_000_000} | changes
    return json.dumps({key: value for key, value in row.items() if value is not ...})


def test_ten_items_with_scores_and_stages(run, events):
    status, out, _ = run("--events", events, "--user", "u3")
    assert status == 0
    assert out.startswith("10 items for user u3")
    for word in ("engagement", "retention", "monetization", "tokens", "encoder", "stack", "ranking", "measured here"):
        assert word in out


def test_json_is_json_and_nothing_else(run, events, tiny_world):
    status, out, _ = run("--events", events, "--user", "u3", "--task", "slate", "--json")
    answer = json.loads(out)
    assert status == 0
    assert (answer["task"], answer["strategy"], len(answer["items"])) == ("slate", "eager", 10)
    seen = set(tiny_world.history(tiny_world.index("u3")).items.tolist())
    assert not seen & {item["row"] for item in answer["items"]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (_row(item=...), ["row 1", "item", "missing"]),
        (_row(action="teleport"), ["row 1", "action", "unknown action"]),
        (_row(timestamp=float("nan")), ["row 1", "timestamp", "NaN"]),
        (_row(timestamp=-5), ["row 1", "timestamp", "negative"]),
        (_row(timestamp=4_000_000_000), ["row 1", "timestamp", "future"]),
        (_row(timestamp=1_700_000_000_000), ["row 1", "timestamp", "milliseconds"]),
        (_row(item="no-such-item"), ["row 1", "item", "unknown"]),
        (_row(dwell=-1), ["row 1", "dwell", "negative"]),
        ("not json", ["row 1", "JSON"]),
        ("", ["no events"]),
    ],
)
def test_a_file_without_a_good_row(run, tmp_path, text, said):
    path = tmp_path / "bad.jsonl"
    path.write_text(text + "\n" if text else "")
    status, out, err = run("--events", path)
    assert status == 2
    assert out == ""
    assert len(err.strip().splitlines()) == 1, err
    for word in [str(path), *said]:
        assert word.lower() in err.lower(), (word, err)


def _truncated_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ml-1m/ratings.dat", "1::1::5::978300760\n" * 1000)
        archive.writestr("ml-1m/movies.dat", "1::Film (2000)::Drama\n")
    path.write_bytes(path.read_bytes()[:-100])


def _truncated_gzip(path):
    path.write_bytes(gzip.compress((_row() + "\n").encode() * 1000)[:-20])


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("cut.zip", _truncated_zip),
        ("cut.jsonl.gz", _truncated_gzip),
        ("binary.jsonl", lambda p: p.write_bytes(bytes(range(256)) * 64)),
        ("binary.parquet", lambda p: p.write_bytes(bytes(range(256)) * 64)),
        ("binary.zip", lambda p: p.write_bytes(bytes(range(256)) * 64)),
        ("empty.zip", lambda p: p.write_bytes(b"")),
        ("empty.parquet", lambda p: p.write_bytes(b"")),
        ("what.txt", lambda p: p.write_text("hello")),
        ("missing.jsonl", lambda p: None),
        ("folder", lambda p: p.mkdir()),
    ],
)
def test_a_broken_file(run, tmp_path, name, write):
    path = tmp_path / name
    write(path)
    status, out, err = run("--events", path)
    assert status == 2
    assert out == ""
    assert len(err.strip().splitlines()) == 1, err
    assert name in err


def test_good_users_are_served_and_bad_rows_counted(run, events, tmp_path):
    path = tmp_path / "mixed.jsonl"
    bad = [_row(user="u2", action="teleport"), _row(user="u4", timestamp=None), "{", _row(item="ghost")]
    lines = events.read_text().splitlines()
    path.write_text("\n".join([*bad[:2], *lines, lines[0], *bad[2:]]) + "\n")
    status, out, err = run("--events", path, "--mode", "batch", "--json")
    answers = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert len(answers) == 12
    assert "4 rejected" in err
    assert "duplicate" in err
    rejects = [json.loads(line) for line in (tmp_path / "mixed.jsonl.rejected.jsonl").read_text().splitlines()]
    assert len(rejects) == 4
    assert {reject["field"] for reject in rejects} >= {"action", "timestamp", "item"}


def test_a_batch_prints_as_it_goes_and_keeps_what_it_has(run, events, monkeypatch):
    from hstu_lab.pipeline import Recommender

    whole, calls = Recommender.recommend_batch, []

    def batch(self, histories, **names):
        calls.append((len(histories), names.get("strategy")))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(self, histories, **names)

    monkeypatch.setattr(Recommender, "recommend_batch", batch)
    status, out, err = run("--events", events, "--mode", "batch", "--batch-size", "5", "--json")
    assert (status, err) == (130, "interrupted\n")
    assert len({json.loads(line)["user"] for line in out.splitlines()}) == 10
    assert calls == [(5, None), (5, "eager"), (2, "eager")]


def test_a_long_history_is_cut_and_said(run, tmp_path, tiny_world):
    path = tmp_path / "long.jsonl"
    ids = tiny_world.catalog.ids
    path.write_text("\n".join(_row(item=ids[1 + i % 300], timestamp=1_600_000_000 + i) for i in range(100_000)))
    status, out, _ = run("--events", path)
    assert status == 0
    assert "oldest events left out" in out


def test_a_synthetic_log_for_presets_without_user_rows_and_beyond_this_machine(tmp_path, capsys, monkeypatch):
    from hstu_lab import events as reader

    class World(reader.World):
        def generate(self, num_users=None, **more):
            assert self.config.preset == "ml-1m", "the log was made before the memory was looked at"
            return super().generate(num_users or 12, **more)

    monkeypatch.setattr(reader, "World", World)
    assert main(["train", "--preset", "ml-1m", "--steps", "1", "--out", str(tmp_path / "run"), "--json"]) == 0
    assert (tmp_path / "run" / "model.safetensors").is_file()
    monkeypatch.setattr("hstu_lab.environment.memory_bytes", lambda: 16 << 30)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["train", "--preset", "gr-3b", "--steps", "1", "--out", str(tmp_path / "large")]) == 2
    err = capsys.readouterr().err
    assert err.strip().splitlines()[-1].startswith("error: preset gr-3b: to train its 3,202,198,531 parameters takes 47.7 GiB")
    assert not (tmp_path / "large").exists()


@pytest.mark.parametrize("mode", ["single", "batch"])
def test_an_identifier_of_any_characters_neither_breaks_a_line_nor_steers_the_terminal(run, tmp_path, mode):
    path = tmp_path / "log.jsonl"
    path.write_text(_row(user="ü\n\x1b[31m\u2028") + "\n")
    status, out, _ = run("--events", path, "--mode", mode)
    assert status == 0
    assert r"ü\n\x1b[31m\u2028" in out
    assert "\x1b" not in out
    assert len(run("--events", path, "--mode", mode, "--json")[1].strip().split("\n")) == 1


def test_a_user_who_is_not_there(run, events):
    status, _, err = run("--events", events, "--user", "nobody")
    assert status == 2
    assert "nobody" in err
    assert len(err.strip().splitlines()) == 1


def _break_version(folder):
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    config = json.loads((folder / "config.json").read_text())["hstu"] | {"schema_version": 999}
    save_file(load_file(path), path, metadata={"config": json.dumps(config)})


def _break_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_break_version, "schema_version is 999"),
        (_break_weights, "model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors"),
        (lambda f: (f / "model.safetensors").unlink(), "python -m hstu_lab train"),
        (lambda f: (f / "catalog.json").write_text("[]"), "catalog.json"),
        (lambda f: (f / "catalog.json").unlink(), "catalog.json"),
        (lambda f: (f / "users.json").write_text("{}"), "users.json"),
        (lambda f: (f / "users.json").write_text('["u1", "u1"]'), "different user ids"),
    ],
)
def test_a_broken_checkpoint(run, events, tiny_checkpoint, tmp_path, spoil, said):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    spoil(folder)
    status, out, err = run("--events", events, checkpoint=folder)
    assert status == 2
    assert out == ""
    assert said in err
    assert len(err.strip().splitlines()) == 1, err


def test_settings_are_checked_by_name(run, events, tmp_path, monkeypatch):
    config = tmp_path / "own.toml"
    config.write_text("batch_size = 0\n")
    status, _, err = run("--events", events, "--config", config)
    assert status == 2
    assert "batch_size" in err
    monkeypatch.setenv("HSTU_LAB_TASK", "tops")
    status, _, err = run("--events", events)
    assert status == 2
    assert "task" in err
    assert "tops" in err


def test_settings_in_another_encoding_are_one_line(run, events, tmp_path):
    config = tmp_path / "own.toml"
    config.write_bytes("# größer\ntask = 'slate'\n".encode("latin-1"))
    status, _, err = run("--events", events, "--config", config)
    assert (status, len(err.strip().splitlines())) == (2, 1), err
    assert f"{config}: not TOML" in err


def test_a_variable_that_is_set_to_nothing_is_not_set(run, events, monkeypatch):
    monkeypatch.setenv("HSTU_LAB_EVENTS", "")
    monkeypatch.setenv("HSTU_LAB_BATCH_SIZE", "")
    assert run("--events", events)[0] == 0


def test_a_step_of_fewer_tokens_than_requests_is_refused_before_vllm_is_asked(run, events, monkeypatch):
    monkeypatch.setenv("HSTU_LAB_MAX_NUM_BATCHED_TOKENS", "16")
    assert run("--events", events) == (
        2, "", "error: setting max_num_batched_tokens is 16: give at least max_num_seqs, 64, or lower that\n",
    )  # fmt: skip
    monkeypatch.setenv("HSTU_LAB_MAX_NUM_SEQS", "16")
    assert run("--events", events)[0] == 0


def test_a_variable_that_no_setting_has_is_named(monkeypatch, caplog):
    monkeypatch.setattr(settings.log.parent, "propagate", True)
    monkeypatch.setenv("HSTU_LAB_TOKEN", "x")
    settings.load_settings()
    assert not caplog.messages
    monkeypatch.setenv("HSTU_LAB_BATCHSIZE", "3")
    settings.load_settings()
    said = "HSTU_LAB_BATCHSIZE is set, but there is no such setting; unset it, or was batch_size meant?"
    assert set(caplog.messages) == {said}


def test_the_other_variables_are_those_that_the_package_reads():
    sources = pathlib.Path(settings.__file__).parent.rglob("*.py")
    read = {name for path in sources for name in re.findall(r"HSTU_LAB_([A-Z_]+)", path.read_text())}
    assert read - {field.upper() for field in settings.Settings.model_fields} <= set(settings.OTHER_VARIABLES)
    assert set(settings.OTHER_VARIABLES[:3]) <= read


def test_an_unknown_field_of_the_settings_is_named_with_the_known_ones(run, events, tmp_path):
    config = tmp_path / "own.toml"
    config.write_text("batch_sise = 3\n")
    _, _, err = run("--events", events, "--config", config)
    assert "batch_sise" in err
    assert "no such field" in err
    assert "batch_size" in err
    assert str(config) in err


def test_a_bad_strategy_names_the_variable_it_came_from_and_the_choices(events, capsys, monkeypatch):
    monkeypatch.setenv("HSTU_LAB_STRATEGY", "vlm")
    assert main(["recommend", "--events", str(events)]) == 2
    err = capsys.readouterr().err
    assert "setting strategy (HSTU_LAB_STRATEGY) is 'vlm'" in err
    assert "'auto'" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["recommend", "--strategy", "vlm"], "--strategy: invalid choice: 'vlm'"),
        (["recommend", "--users", "-3"], "--users: -3 is no whole number from 1 on"),
        (["recommend", "--users", "3"], "--mode batch"),
        (["recommend", "--mode", "batch", "--users", "3", "--user", "u1"], "--users 3: one user was asked for"),
        (["recommend", "--strategy", "vllm", "--hot-cache-rows", "8"], "--hot-cache-rows: strategy vllm keeps whole tables"),
        (["serve", "--strategy", "vllm", "--hot-cache-rows", "8"], "--hot-cache-rows: strategy vllm keeps whole tables"),
        (["recommend", "--strategy", "eager", "--precision", "int8"], "--precision int8: no stage of strategy eager has it"),
        (["export", "--target", "sm_80"], "--to tensorrt"),
        (["export", "--kernels"], "--kernels is for engines: add --to tensorrt"),
        (["export", "--to", "tensorrt", "--kernels"], "--kernels compute in fp16 and int8: add --precision"),
        (["export", "--events", "log.jsonl"], "--events is the log that int8 is calibrated with"),
        (["serve", "--port", "70000"], "--port: 70000 is no port"),
        (["serve", "--checkpoint", "nowhere"], "checkpoint nowhere: no model.safetensors there"),
        (["serve", "--token-file", "nowhere"], "--token-file nowhere"),
        (["load", "--seconds", "-1"], "--seconds: -1 is no number above 0"),
        (["load", "--record", "My load"], "record name 'My load': use lower-case letters"),
        (["train", "--minutes", "soon"], "--minutes: soon is no number above 0"),
        (["train", "--seed", "-1"], "--seed: -1 is no whole number from 0"),
        (["train", "--seed", str(2**63)], "is no whole number from 0 to 2^63 - 1"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        ([], "COMMAND"),
    ],
)
def test_a_flag_that_cannot_be_is_one_line(capsys, arguments, said):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert out == ""
    assert len(err.strip().splitlines()) == 1, err


def test_serve_refuses_a_strategy_that_cannot_run_before_it_listens(capsys, monkeypatch):
    from hstu_lab import environment

    reason = "no NVIDIA GPU to run engines"
    found = environment.Doctor(environment.machine(), (), (environment.Strategy("tensorrt", False, reason),))
    monkeypatch.setattr(environment, "doctor", lambda: found)
    assert main(["serve", "--strategy", "tensorrt"]) == 2
    assert f"strategy tensorrt cannot run here: {reason}" in capsys.readouterr().err


@pytest.mark.parametrize("ops", ["triton", "cutlass"])
def test_operators_that_want_a_gpu_are_refused_in_one_line(run, events, monkeypatch, ops):
    import torch

    for name in [name for name in sys.modules if name.startswith(("hstu_lab.ops.triton_ops", "hstu_lab.ops.cutlass_ops"))]:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(name, raising=False)  # `from hstu_lab.ops import ...` looks there first
    monkeypatch.setattr("hstu_lab.ops.triton_runtime.interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out, err = run("--events", events, "--ops", ops)
    assert (status, out) == (2, "")
    assert f"ops '{ops}' cannot run here" in err
    assert "reference" in err
    assert len(err.strip().splitlines()) == 1, err


@pytest.mark.parametrize("command", ["recommend", "benchmark", "serve", "load", "doctor", "train", "export"])
def test_the_help_of_a_command_leaves_no_option_unexplained(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    listed = "".join(re.split(r"^(?:options|with --to tensorrt):$", capsys.readouterr().out, flags=re.MULTILINE)[1:])
    options = re.split(r"^  (?=-)", listed, flags=re.MULTILINE)[1:]
    assert len(options) > 4
    for option in options:  # "--name METAVAR", then two spaces or a new line, then words
        assert re.match(r"-\S+(,? \S+)*\s{2,}\w+", option), option


def test_flags_beat_environment_beat_file(run, events, tmp_path, monkeypatch):
    config = tmp_path / "own.toml"
    config.write_text('task = "slate"\n')
    assert json.loads(run("--events", events, "--json", "--config", config)[1])["task"] == "slate"
    monkeypatch.setenv("HSTU_LAB_TASK", "topk")
    assert json.loads(run("--events", events, "--json", "--config", config)[1])["task"] == "topk"
    assert json.loads(run("--events", events, "--json", "--config", config, "--task", "slate")[1])["task"] == "slate"


def test_the_log_goes_where_it_is_told(run, events, tmp_path):
    log = tmp_path / "run.log"
    assert run("--events", events, "--log-level", "info", "--log-file", log)[0] == 0
    assert "starting strategy eager" in log.read_text()


def test_benchmark_prints_percentiles(run, events):
    status, out, _ = run("--events", events, "--users", "6", "--task", "topk", "--json", command="benchmark")
    (row,) = json.loads(out)
    assert status == 0
    assert 0 < row["p50"] <= row["p95"] <= row["p99"]
    assert row["users per second"] > 0


def test_movielens_without_its_checkpoint_names_the_training_command(tmp_path, capsys, monkeypatch):
    from hstu_lab import pipeline

    monkeypatch.setattr(pipeline, "CHECKPOINTS", tmp_path)
    with zipfile.ZipFile(tmp_path / "ml-1m.zip", "w") as archive:
        archive.writestr("ml-1m/ratings.dat", "1::1::5::978300760\n")
        archive.writestr("ml-1m/movies.dat", "1::Film (2000)::Drama\n")
        archive.writestr("ml-1m/users.dat", "1::F::1::10::48067\n")
    assert main(["recommend", "--events", str(tmp_path / "ml-1m.zip"), "--user", "1"]) == 2
    err = capsys.readouterr().err
    assert "python -m hstu_lab train --events" in err
    assert "--preset ml-1m" in err


def test_a_log_of_ones_own_is_trained_on_and_found_again_and_no_checkpoint_of_another_is_lost(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hstu_lab.pipeline.CHECKPOINTS", tmp_path / "checkpoints")
    for name, items in (("mine", "abcd"), ("yours", "efghij")):
        rows = [_row(user=user, item=item, timestamp=1000 * i) for user in ("ann", "bob") for i, item in enumerate(items[:-1])]
        (tmp_path / f"{name}.jsonl").write_text("\n".join([*rows, _row(user="cem", item=items[-1])]) + "\n")
        assert main(["train", "--events", str(tmp_path / f"{name}.jsonl"), "--preset", "tiny", "--steps", "2", "--json"]) == 0
    for name, left in (("mine", {"d"}), ("yours", {"j"})):
        capsys.readouterr()
        flags = ["--events", str(tmp_path / f"{name}.jsonl"), "--user", "ann", "--strategy", "eager", "--json"]
        assert main(["recommend", *flags]) == 0
        assert {item["item_id"] for item in json.loads(capsys.readouterr().out)["items"]} == left


def test_defects_keep_their_traceback(monkeypatch, events, tiny_checkpoint):
    """Only the package's own errors become one line: a bug must not hide."""
    from hstu_lab.pipeline import Recommender

    def broken(*_, **__):
        raise ValueError("a bug")

    monkeypatch.setattr(Recommender, "recommend", broken)
    with pytest.raises(ValueError, match="a bug"):
        main(["recommend", "--events", str(events), "--checkpoint", str(tiny_checkpoint), "--strategy", "eager"])


@pytest.mark.timeout(240)
def test_export_to_onnx_and_to_engines_for_an_a100(tiny_checkpoint, tmp_path, capsys, monkeypatch, events):
    monkeypatch.setenv("HSTU_LAB_DATA", str(tmp_path / "data"))
    common = ["export", "--checkpoint", str(tiny_checkpoint), "--json"]
    assert main([*common, "--precision", "int8", "--events", str(events), "--out", str(tmp_path / "onnx")]) == 0
    assert json.loads(capsys.readouterr().out) == [str(tmp_path / "onnx" / f"{p}.onnx") for p in ("encoder", "ranker", "stack")]
    engines = ["--to", "tensorrt", "--precision", "fp16", "--target", "sm_80", "--batch-size", "4", "--out", str(tmp_path / "e")]
    assert main([*common, *engines]) == 0
    first = json.loads(capsys.readouterr().out)
    assert [name.split("/")[-1].rsplit("-", 1)[0] for name in first] == [
        f"{p}-fp16-sm_80" for p in ("encoder", "stack", "ranker")
    ]
    assert main([*common[:-1], *engines]) == 0
    assert capsys.readouterr().out.count("for sm_80: ") == 3


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--to", "tensorrt", "--target", "sm_13"], "target 'sm_13': TensorRT for RTX"),
        (
            ["--to", "tensorrt", "--precision", "fp16", "--target", "sm_80", "--kernels", "--checkpoint", "nowhere"],
            "cannot run compiled kernels of ours; TensorRT 8.5 and 8.6 can, or export without them",
        ),
        (["--precision", "int8", "--events", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--checkpoint", "nowhere"], "nowhere/model.safetensors: no such file"),
    ],
)
def test_an_export_that_cannot_be_is_one_line(capsys, flags, said):
    assert main(["export", *flags]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.strip().splitlines()) == 1, err


def test_as_a_process(events, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "hstu_lab", "recommend", "--events", str(tmp_path / "none.jsonl")],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert "none.jsonl" in done.stderr
    assert "Traceback" not in done.stderr


def test_errors_of_the_reader_are_the_packages_own():
    assert EventsError.__module__.startswith("hstu_lab")
