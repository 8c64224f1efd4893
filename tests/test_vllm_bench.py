"""The benchmark of the engine, whole, with a tiny model and no GPU: every part is measured, and no part takes another with it."""

import multiprocessing
import os
import pathlib
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import serving
import torch

from hstu_lab import measure, vllm_bench, vllm_replicas
from hstu_lab.vllm_bench import PARTS, Bench, null, runner_of
from hstu_lab.vllm_engine import Engine, EngineOptions
from hstu_lab.vllm_load import Cell, Users, closed_loop, random_checkpoint, random_histories, serving_config
from hstu_lab.vllm_replicas import Replicas, own_share_first

get_context = multiprocessing.get_context
OPTIONS = EngineOptions(kv_cache_memory_bytes=8 << 20, max_num_seqs=64, prompt_embeds=False, micro_batch=16)


class Thread(threading.Thread):
    """Stands for a process, so that a test need not import vLLM again; its end of the pipe is its own."""

    def __init__(self, target, args, daemon):
        pipe, *rest = args
        own = Connection(os.dup(pipe.fileno()))

        def run():
            with own:
                target(own, *rest)

        super().__init__(target=run, daemon=True)

    def kill(self):
        """Whoever is killed says nothing more: threads of these tests end when their pipe does."""


class Shape(NamedTuple):
    """What vLLM knows of a graph that it captured."""

    num_tokens: int


class Context:
    Process, Pipe = Thread, staticmethod(multiprocessing.Pipe)


@pytest.fixture(autouse=True)
def _threads(monkeypatch):
    monkeypatch.setattr(vllm_replicas.multiprocessing, "get_context", lambda _: Context)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_checkpoint(serving_config("tiny"), tmp_path_factory.mktemp("bench"), torch.float32)


def bench(folder, out, only=PARTS, **changes):
    return Bench(folder, 2, 0.05, out, options=OPTIONS, only=only, histories=(24,), sizes=(24, 16, 8), patience=100, **changes)


@pytest.mark.timeout(300)
def test_every_part_is_measured_and_one_can_be_measured_again(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_bench, "STEPS", 4)
    monkeypatch.setattr(vllm_replicas, "IN_FLIGHT", 6)
    assert bench(folder, tmp_path).run() == []
    steps, loads, candidates = (measure.read_record(n, root=tmp_path) for n in ("vllm_step", "vllm_load", "vllm_candidates"))
    names = [m.name for m in steps.measurements]
    for suffix in ("", " null", " alone"):
        for what in ("engine step", "engine step, own processor time", "slate in one step, an item"):
            assert f"{what} B=8 N=4{suffix}" in names
    assert set(loads.data["table"]) == {f"{t} history=24 {w}" for t in ("topk", "slate") for w in ("cold", "90% warm")}
    for cell, row in loads.data["table"].items():
        assert row["engines"]["requests/s"] > 0, cell
        assert row["null"]["requests/s"] > 0, cell
        assert row["half"]["offered/s"] == pytest.approx(row["engines"]["requests/s"] / 2, rel=1e-3), cell
        assert row["engines"]["replicas"] == 2
    assert loads.data["table"]["topk history=24 cold"]["x1"]["replicas"] == 1
    assert candidates.data["engine scores: cached against fresh, largest difference"] < 1e-5
    for engines in ("1 engine", "2 engines"):
        for seen in candidates.data[f"users/s at saturation, {engines}"].values():
            assert len(seen) == 3
            assert min(seen) > 0
    assert set(steps.data["parts"]) == set(PARTS)

    def broken(self):
        raise RuntimeError("a cable is loose")

    monkeypatch.setattr(Bench, "half", broken)
    assert bench(folder, tmp_path, ("half", "null")).run() == ["half"]
    again = measure.read_record("vllm_load", root=tmp_path)
    assert again.data["parts"]["half"] == "failed: a cable is loose"
    assert again.data["parts"]["null"] > loads.data["parts"]["null"]
    assert again.data["table"]["topk history=24 cold"]["x1"] == loads.data["table"]["topk history=24 cold"]["x1"]


def test_the_null_model_computes_nothing_and_leaves_no_trace(folder):
    with Engine(folder, OPTIONS) as engine:
        prompts = random_histories(engine.config, 4, 20, 0)
        wanted = [[g.items for g in send(prompts, [[]] * 4, 5)] for send in (engine.topk, engine.slate)]
        model, calls = runner_of(engine).get_model(), []
        hook = model.register_forward_hook(lambda *_: calls.append(1))
        with null(engine):
            for send in (engine.topk, engine.slate):
                send(random_histories(engine.config, 4, 20, 1), [[]] * 4, 5)
            assert not calls
        assert [[g.items for g in send(prompts, [[]] * 4, 5)] for send in (engine.topk, engine.slate)] == wanted
        assert calls
        hook.remove()


def silent(connection, number):
    connection.send("ready")
    while (order := connection.recv()) is not None:
        if number != 1:
            connection.send([number, *order])
        elif order == ("fall",):
            raise SystemExit


def test_who_is_silent_or_falls_is_left_out_and_the_others_go_on(capsys):
    for order, said in (("stare", "nothing within 0.2 s"), ("fall", "no more")):
        group = Replicas(3, lambda number: (number,), silent, patience=0.2)
        group.start(20)
        with pytest.raises(RuntimeError, match=f"engine 1, at '{order}', said '{said}"):
            group.tell(order)
        assert group.tell("again") == [[0, "again"], [2, "again"]], "in turn, and of those that are left"
        group.close()
    assert "3 of 3 engines are up" in capsys.readouterr().out


def test_those_that_do_not_come_up_in_time_are_left_out():
    def late(connection, number):
        if number:
            time.sleep(0.5)
        silent(connection, 0)

    group = Replicas(2, lambda number: (number,), late)
    group.start(0.2)
    assert [member.number for member in group.members] == [0]
    group.close()
    group = Replicas(1, lambda number: (1,), late)
    with pytest.raises(RuntimeError, match="no engine is left"):
        group.start(0.1)


@pytest.mark.parametrize("seconds", [20, 0])
def test_what_an_engine_started_ends_with_it(monkeypatch, seconds):
    monkeypatch.setattr(vllm_replicas.multiprocessing, "get_context", get_context)
    member = vllm_replicas.Member(0, serving.with_child, (), daemon=False)
    child = member.hear(None, 60, "starting")
    member.end(seconds)
    end = time.monotonic() + 5
    while time.monotonic() < end and pathlib.Path(f"/proc/{child}/stat").exists():
        if pathlib.Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        assert not pathlib.Path(f"/proc/{child}/stat").exists()


def test_sigterm_twice_ends_once():
    program = """
import time
from hstu_lab.vllm_replicas import end_on_sigterm
end_on_sigterm()
try:
    print("up", flush=True)
    time.sleep(60)
finally:
    time.sleep(0.5)
    print("cleared away", flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "up\n"
        process.terminate()
        time.sleep(0.2)
        process.terminate()
        assert process.stdout.read() == "cleared away\n"


def test_shares_cover_all_jobs():
    assert [own_share_first(range(6), number, 3) for number in range(3)] == [
        [0, 1, 2, 3, 4, 5], [2, 3, 4, 5, 0, 1], [4, 5, 0, 1, 2, 3],
    ]  # fmt: skip


def test_the_clock_of_a_load_starts_after_the_first_wave(folder):
    """A kernel that is compiled for the first requests is no part of the rate."""
    with Engine(folder, OPTIONS) as engine:
        answered, cell = [], Cell("topk", 24, 0.0)
        submit = engine.submit_topk

        def counting(*arguments):
            future = submit(*arguments)
            future.add_done_callback(lambda _: answered.append(time.perf_counter()))
            return future

        engine.submit_topk = counting
        begun = []

        def when():
            begun.append((len(answered), time.perf_counter()))
            return begun[0][1]

        outcome = closed_loop(engine, cell, Users(engine.config, cell, 1), 8, 0.3, when)
    assert begun[0][0] >= 8
    assert len(outcome.latencies) == sum(begun[0][1] <= at < begun[0][1] + 0.3 for at in answered)


def test_a_part_that_does_not_exist_is_refused(folder, tmp_path):
    with pytest.raises(SystemExit, match="there are step, telling"):
        bench(folder, tmp_path, ("steps",))


def test_replays_are_timed_with_the_inputs_of_such_a_step(folder, monkeypatch):
    """Graphs are stood for by what notes the lengths that they would read."""

    class Event(SimpleNamespace):
        def record(self):
            self.at = time.perf_counter()

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    class Graph:
        def __init__(self):
            self.lengths = []

        def replay(self):
            self.lengths.append(runner_of(engine).seq_lens[:4].tolist())
            runner_of(engine).seq_lens[:4] += 1

    with Engine(folder, OPTIONS) as engine:  # on a CPU vLLM puts its own in these places
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        whole, model, other = (Graph() for _ in range(3))
        steady = vllm_bench.worker_of(engine).steady
        monkeypatch.setattr(steady, "take", lambda _: pytest.fail("the graph of vLLM would keep older inputs"))
        monkeypatch.setattr(steady, "graphs", {4: (whole, None), 8: (other, None)})
        entries = {Shape(num): SimpleNamespace(cudagraph=graph) for num, graph in ((4, model), (8, other), (16, None))}
        monkeypatch.setattr(runner_of(engine).model, "concrete_cudagraph_entries", entries, raising=False)
        found = vllm_bench.graph_replays(engine, 4, 9)
        assert vllm_bench.worker_of(engine).steady is steady
    assert set(found) == {"graph replay", "graph replay with choice"}
    for graph, seconds in zip((model, whole), found.values()):
        assert graph.lengths == [[10 + i] * 4 for _ in seconds for i in range(10)]
        assert min(seconds) > 0
    assert not other.lengths


def test_a_load_in_which_kernels_were_compiled_is_taken_again(tmp_path, capsys):
    class Group:
        answers = iter([{"linear": 2}, {}, {}])

        def run(self, cell, seconds, rate):
            compiled = next(self.answers)
            row = {"requests": 5, "requests/s": 5.0, "p50 s": 0.1, "p99 s": 0.1, "cached": 0.0}
            return row | ({"compiled": compiled} if compiled else {})

    record = measure.Record.here("a_load", command="here")
    vllm_replicas.load(record, Group(), "engines", [Cell("topk", 24, 0.0)], 0.1, tmp_path)
    assert "taken again: linear compiled" in capsys.readouterr().out
    assert "compiled" not in record.data["table"]["topk history=24 cold"]["engines"]
    assert next(Group.answers) == {}, "a load without compilations is kept"


def test_a_load_in_which_nothing_finished_is_taken_again_for_longer():
    class Slow:
        def run(self, cell, seconds, rate):
            return {"requests": int(seconds / self.takes)}

    for takes, seconds in ((0.1, 1), (3.0, 4), (1000.0, 64)):
        group, seen = Slow(), []
        group.takes = takes
        group.run = lambda cell, length, rate, run=group.run, seen=seen: seen.append(length) or run(cell, length, rate)
        answer = vllm_replicas.run_until_answered(group, Cell("topk", 24, 0.0), 1)
        assert (seen[-1], answer["requests"]) == (seconds, int(seconds / takes))


def test_compilations_are_noted_by_name_and_only_the_first(tmp_path, monkeypatch):
    import triton
    from triton.compiler import ASTSource

    from hstu_lab.ops.triton_kv_write import note_kernel

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    kernel = triton.JITFunction(note_kernel.fn)
    pointers = {"Gaps": "*i32", "Items": "*i32", "Slots": "*i64", "SlotGaps": "*i32", "SlotItems": "*i32", "count": "i32"}
    source = ASTSource(kernel, {**pointers, "BLOCK": "constexpr"}, {"BLOCK": 64})
    monkeypatch.setattr(triton.knobs.compilation, "listener", None)  # engines of other tests, threads here, leave theirs
    with vllm_replicas.compilations() as seen:
        for _ in range(2):
            triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", 80, 32))
    assert [name for _, name in seen] == ["note_kernel"]
    assert triton.knobs.compilation.listener is None


def test_sharing_a_gpu_says_what_is_missing_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="nvidia-cuda-mps-control is not installed"), vllm_replicas.shared_gpu():
        pass
    control = tmp_path / "nvidia-cuda-mps-control"
    log = 'echo "no way" > $CUDA_MPS_LOG_DIRECTORY/control.log'
    control.write_text(f'#!/bin/sh\nif [ "$1" = -d ]; then {log}; else /bin/cat >> {tmp_path}/said; fi\n')
    control.chmod(0o755)
    monkeypatch.setattr(vllm_replicas, "TAKE_GPU", "import os; raise SystemExit(os.environ['CUDA_VISIBLE_DEVICES'] != '0')")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    before = dict(os.environ)
    with vllm_replicas.shared_gpu():
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0", "the daemon counts anew what it sees"
    assert (tmp_path / "said").read_text() == "quit -t 5\n"
    monkeypatch.setattr(vllm_replicas, "TAKE_GPU", "raise SystemExit(1)")
    with pytest.raises(RuntimeError, match=r"(?s)no process can use the GPU.*no way"), vllm_replicas.shared_gpu():
        pass
    assert dict(os.environ) == before
