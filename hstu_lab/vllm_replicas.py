"""Engines in processes of their own, told what to do over a pipe: replicas that take a load together, on one GPU or several.

The first word of a process is "ready" or "failed: ...". Every wait has an end, and a message that says who kept whom waiting.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
import itertools
import multiprocessing
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from hstu_lab import measure, ops
from hstu_lab.measure import Record
from hstu_lab.vllm_engine import Engine, EngineOptions
from hstu_lab.vllm_load import TASKS, Cell, Users, closed_loop, fill, open_loop, random_histories, serving_config

IN_FLIGHT = 128
"""Requests that each engine has under closed-loop load."""
LONGEST_LOAD = 20.0
ATTEMPTS = 3
WARM_UP = tuple(Cell(task, history, warm) for history in (1024, 256, 512) for task in TASKS for warm in (0.0, 0.9))


def compile_jobs() -> list[Callable]:
    """Calls that compile the stack's kernels of plain rows."""
    triton_ops, config = ops.get("triton"), serving_config()
    d, wide = config.d_model, config.num_heads * 4 * config.d_qk
    rand = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    weights, biases = {n: rand(n, d) for n in (wide, d)}, {n: rand(n) for n in (wide, d)}
    jobs: list[Callable] = []
    for rows in (8, 64, 512, 2048, 8192):
        x = rand(rows, d)
        jobs += [
            functools.partial(triton_ops.project_silu, x, weights[wide], biases[wide]),
            functools.partial(triton_ops.project_residual, x, weights[d], biases[d], x),
        ]
    x = rand(64, d)
    return [
        *jobs,
        functools.partial(triton_ops.layer_norm, x, biases[d], biases[d], 1e-6),
        functools.partial(triton_ops.norm_gate, x, rand(64, wide)[:, :d], biases[d], biases[d], 1e-6),
    ]


@contextlib.contextmanager
def shared_gpu() -> Iterator[None]:
    """NVIDIA's Multi-Process Service for the processes that are started inside: their kernels run side by side on the GPUs.

    Without it a GPU gives its processes turns, one process at a time. Enter before this process uses CUDA. It is a daemon of this
    user and changes no setting of a GPU. Raises RuntimeError where it is missing, or no process can use a GPU through it.
    """
    control = shutil.which("nvidia-cuda-mps-control", path=f"{os.environ.get('PATH', os.defpath)}:/usr/local/nvidia/bin")
    if control is None:
        raise RuntimeError("nvidia-cuda-mps-control is not installed: it comes with NVIDIA's driver")
    with tempfile.TemporaryDirectory(prefix="mps-") as folder, contextlib.ExitStack() as undo:
        pipe, log = pathlib.Path(folder, "pipe"), pathlib.Path(folder, "log")
        pipe.mkdir(), log.mkdir()
        before = dict(os.environ)
        undo.callback(lambda: (os.environ.clear(), os.environ.update(before)))
        path = f"{os.environ.get('PATH', os.defpath)}:{pathlib.Path(control).parent}"  # where it looks for its server
        os.environ |= {"CUDA_MPS_PIPE_DIRECTORY": str(pipe), "CUDA_MPS_LOG_DIRECTORY": str(log), "PATH": path}
        subprocess.run([control, "-d"], check=True, timeout=20)
        undo.callback(subprocess.run, [control], input="quit -t 5\n", text=True, timeout=20, stdout=subprocess.DEVNULL)
        if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):  # the daemon counts for its clients those that it sees
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(len(visible.split(",")))))
        try:
            subprocess.run([sys.executable, "-c", TAKE_GPU], check=True, timeout=60)
        except subprocess.SubprocessError as error:
            logs = "".join(path.read_text(errors="replace") for path in sorted(log.iterdir()) if path.is_file())
            raise RuntimeError(f"no process can use the GPU through {control}: {error}\n{logs[-2000:]}") from error
        yield


TAKE_GPU = """
import ctypes
cuda, device, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p()
for call, *arguments in (
    (cuda.cuInit, 0), (cuda.cuDeviceGet, ctypes.byref(device), 0), (cuda.cuDevicePrimaryCtxRetain, ctypes.byref(context), device),
):
    if wrong := call(*arguments):
        raise SystemExit(f"{call.__name__}: CUDA's error {wrong}")
"""
"""A program that ends with 0 where a process can use the first GPU."""


@contextlib.contextmanager
def compilations() -> Iterator[list[tuple[float, str]]]:
    """What Triton compiles in this process from now on: when each was done (`time.perf_counter`), and the kernel's name."""
    from triton import knobs

    seen: list[tuple[float, str]] = []

    def note(*, src, cache_hit: bool, **_) -> None:
        if not cache_hit:
            seen.append((time.perf_counter(), src.name))

    before, knobs.compilation.listener = getattr(knobs.compilation, "listener", None), note
    try:
        yield seen
    finally:
        knobs.compilation.listener = before


def own_share_first(jobs: Sequence, number: int, total: int) -> list:
    """The jobs in turn, beginning with share `number` of `total`.

    Triton keeps compiled kernels on disk: engines that start together each compile a share, and find the others' there.
    """
    turn = number * len(jobs) // total
    return [*jobs[turn:], *jobs[:turn]]


def warm_up(engine: Engine, cells: Sequence[Cell], number: int = 0, total: int = 1) -> None:
    """Compile what loads will need: Triton makes variants of a kernel for some numbers of rows, seconds each at first use."""
    jobs = [(in_flight, cell) for in_flight in (100, 7, 1) for cell in cells]
    for in_flight, cell in own_share_first(jobs, number, total):
        cell = Cell(cell.task, min(cell.history, engine.config.max_history), cell.warm)
        users = Users(engine.config, cell, 16, in_flight)
        fill(engine, cell, users)
        closed_loop(engine, cell, users, in_flight, 0.1)


def replica(
    connection, folder: pathlib.Path, options: EngineOptions, number: int, total: int, gpu: int | None = None,
    cells: Sequence[Cell] = WARM_UP, warm_users: int = 64,
) -> None:  # fmt: skip
    """One engine in a process of its own; does what it is told, when it is told. `gpu` counts those that are visible."""
    try:
        if gpu is not None:  # before CUDA is first asked for
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7").split(",")
            os.environ["CUDA_VISIBLE_DEVICES"] = visible[gpu]
        if options.ops == "triton":
            for job in own_share_first(compile_jobs(), number, total):
                job()
        with Engine(folder, options) as engine:
            longest = min(512, engine.config.max_history)
            for task, k in TASKS.items():
                getattr(engine, task)(random_histories(engine.config, 64, longest, number), [[]] * 64, k)
            if options.ops == "triton":
                warm_up(engine, cells, number, total)
            connection.send("ready")
            with compilations() as compiled:
                _obey(connection, engine, number, warm_users, compiled)
    except Exception as error:
        traceback.print_exc()
        with contextlib.suppress(OSError):
            connection.send(f"failed: {error!r}")


def _obey(connection, engine: Engine, number: int, warm_users: int, compiled: list[tuple[float, str]]) -> None:
    from hstu_lab import vllm_bench
    from hstu_lab.candidate_bench import candidates_load, engine_candidates

    nulls = contextlib.ExitStack()
    orders = {
        "step": lambda suffix="": vllm_bench.step(engine, suffix),
        "profiles": lambda: vllm_bench.profiles(engine),
        "candidates": lambda *sizes: engine_candidates(engine, *sizes),
        "candidates_load": lambda *how: candidates_load(engine, *how),
        "lists": lambda prompts: [[g.items for g in send(prompts, [[]] * len(prompts), k)]
                                  for send, k in ((engine.topk, 20), (engine.slate, 10))],
        "null": lambda: nulls.enter_context(vllm_bench.null(engine)),
        "real": nulls.close,
    }  # fmt: skip
    runs = itertools.count(1000 * number)
    while (order := connection.recv()) is not None:
        word, *arguments = order
        if word != "load":
            connection.send(orders[word](*arguments))
            continue
        cell, rate, in_flight, seconds = arguments
        users = Users(engine.config, cell, warm_users, draw := next(runs))  # new users each time
        fill(engine, cell, users)

        def when(word: str) -> float:
            """What all replicas do together: say that it is this one's turn, hear the time, and make it one of this clock."""
            connection.send(word)
            return time.perf_counter() + max(connection.recv() - time.time(), 0)

        time.sleep(max((begin := when("filled")) - time.perf_counter(), 0))
        if rate is None:

            def through() -> float:
                nonlocal begin
                begin = when("through")
                return begin

            outcome = closed_loop(engine, cell, users, in_flight, seconds, through)
        else:
            outcome = open_loop(engine, cell, users, rate, seconds, draw)
        names = tuple(name for done, name in compiled if done > begin)
        connection.send(dataclasses.replace(outcome, compiled=names))


def _apart(target: Callable, *arguments) -> None:
    os.setpgid(0, 0)
    target(*arguments)


class Member:
    """One process and the pipe to it. One that fails, or is silent for too long, is ended: its answers would come out of turn.

    One that is no `daemon` may have started others, which end with it.
    """

    def __init__(self, number: int, target: Callable, arguments: tuple, daemon: bool):
        context = multiprocessing.get_context("spawn")
        self.number, (self.pipe, theirs) = number, context.Pipe()
        self.daemon = daemon
        run = target if daemon else functools.partial(_apart, target)
        self.process = context.Process(target=run, args=(theirs, *arguments), daemon=daemon)
        self.process.start()
        theirs.close()  # so that the end of the process ends a wait
        self.gone = False

    def send(self, order) -> None:
        with contextlib.suppress(OSError):  # `hear` will tell
            if not self.gone:
                self.pipe.send(order)

    def hear(self, word: str | None, seconds: float, doing: str):
        """The next thing that the process says, which must be `word` where that is given; else it is ended: RuntimeError."""
        try:
            said = self.pipe.recv() if self.pipe.poll(seconds) else f"nothing within {seconds:.3g} s"
        except (EOFError, OSError):
            said = "no more: its process ended"
        bad = isinstance(said, str) and said.startswith(("failed", "nothing", "no more"))
        if bad or (word is not None and said != word):
            self.end(0)
            raise RuntimeError(f"engine {self.number}, {doing}, said {said!r}; its messages, if any, are above")
        return said

    def end(self, seconds: float = 5) -> None:
        """Tell the process to end, and end it where it does not."""
        self.send(None)
        self.gone = True
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        if not self.daemon:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)


def _hear_all(members: Sequence[Member], word: str | None, seconds: float, doing: str) -> tuple[list, list[RuntimeError]]:
    """What those that are there say, and what is to be said of those that do not."""
    said, failed = [], []
    for member in members:
        if not member.gone:
            try:
                said.append(member.hear(word, seconds, doing))
            except RuntimeError as error:
                failed.append(error)
    return said, failed


class Replicas:
    """Engines, each in its own process: `target(connection, *arguments(number))`, whose first word is "ready".

    Those that have processes of their own (several GPUs behind one engine) must not be `daemon`. `patience`: seconds within which
    an engine must answer what is no load.
    """

    def __init__(
        self, count: int, arguments: Callable[[int], tuple], target: Callable = replica, daemon: bool = True, patience: float = 60
    ):
        self.every = [Member(number, target, arguments(number), daemon) for number in range(count)]
        self.patience = patience

    @classmethod
    def of_one_gpu(cls, count: int, folder: pathlib.Path, options: EngineOptions, patience: float = 60) -> Replicas:
        return cls(count, lambda number: (folder, options, number, count), patience=patience)

    @property
    def members(self) -> list[Member]:
        """Those that are there. Raises RuntimeError where none is."""
        if not (members := [member for member in self.every if not member.gone]):
            raise RuntimeError("no engine is left")
        return members

    def some(self, members: Sequence[Member]) -> Replicas:
        """The same engines, of which only those take part."""
        group = copy.copy(self)
        group.every = list(members)
        return group

    def start(self, seconds: float = 240) -> None:
        """Wait until the engines are up; go on with those that come up in time. Raises RuntimeError where none does."""
        deadline = time.monotonic() + seconds
        for member in self.every:
            for error in _hear_all([member], "ready", max(deadline - time.monotonic(), 0), "starting")[1]:
                print(error, flush=True)
        print(f"{sum(not member.gone for member in self.every)} of {len(self.every)} engines are up", flush=True)
        self.members  # noqa: B018 - raises where none is

    def tell(self, *order, first_only: bool = False, patience: float | None = None) -> list:
        """What the engines answer to one order. Raises RuntimeError of one that fails or is silent for too long."""
        members = self.members[:1] if first_only else self.members
        for member in members:
            member.send(order)
        said, failed = _hear_all(members, None, patience or self.patience, f"at {order[0]!r}")
        if failed:
            raise failed[0]
        return said

    def run(self, cell: Cell, seconds: float, rate: float | None = None) -> dict:
        """Requests a second of all replicas together and percentiles of the latency; `rate` asks for open-loop load."""
        members, doing, patience = self.members, f"at {cell}", 3 * self.patience
        for member in members:
            member.send(("load", cell, None if rate is None else rate / len(members), IN_FLIGHT, seconds))
        failed: list[RuntimeError] = []
        for word in ("filled", "through")[: 1 + (rate is None)]:
            failed += _hear_all(members, word, patience, doing)[1]
            start = time.time() + 0.1
            for member in members:
                member.send(start)
        outcomes, more = _hear_all([m for m in members if not m.gone], None, seconds + patience, doing)
        if failed := failed + more:  # the others have gone through it all the same, and are ready for what comes next
            raise failed[0]
        latencies = sorted(x for outcome in outcomes for x in outcome.latencies)
        names = collections.Counter(name for outcome in outcomes for name in outcome.compiled)
        at = lambda p: latencies[min(int(p * len(latencies)), len(latencies) - 1)] if latencies else None  # noqa: E731
        return {
            "requests/s": sum(len(o.latencies) / o.seconds for o in outcomes), "requests": len(latencies), "p50 s": at(0.5),
            "p95 s": at(0.95), "p99 s": at(0.99), "cached": statistics.mean(o.cached for o in outcomes),
            "replicas": len(members), **({} if rate is None else {"offered/s": rate}),
            **({"compiled": dict(names)} if names else {}),
        }  # fmt: skip

    def close(self, deadline: float | None = None) -> None:
        """End them all, by `deadline` (time.monotonic)."""
        deadline = time.monotonic() + 5 if deadline is None else deadline
        for member in self.every:
            member.send(None)
        for member in self.every:
            if not member.gone:
                member.end(max(deadline - time.monotonic(), 0))


def end_on_sigterm() -> None:
    """Let SIGTERM end this program as an exception would, so that the engines, and what they started, end as well."""

    def stop(*_) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # timeout(1) tells a program and its process group: twice
        sys.exit("stopped")

    signal.signal(signal.SIGTERM, stop)


def resumed(record: Record, out: pathlib.Path | None) -> Record:
    """`record` with what one of that name in `out` holds, if it is of the same device and versions; for a run of some parts."""
    old = measure.earlier(record, out)
    if old is None or old.versions != record.versions:
        return record
    return dataclasses.replace(record, measurements=old.measurements, data=old.data)


def run_parts(parts: Mapping[str, Callable[[], None]], since: float, after: Callable[[str, Exception | None], None]) -> list[str]:
    """Run every part, whatever becomes of the others; those that failed. `since` (time.monotonic) is when the program started.

    `after` is told of each part when it is over, with what ended it before its time.
    """
    failed = []
    for part, run in parts.items():
        print(f"--- {part}, {time.monotonic() - since:.0f} s after the start", flush=True)
        wrong = None
        try:
            run()
        except Exception as error:
            traceback.print_exc()
            failed.append(part)
            wrong = error
        after(part, wrong)
    print(f"--- done, {time.monotonic() - since:.0f} s after the start; failed: {', '.join(failed) or 'none'}", flush=True)
    return failed


def keep(record: Record, measurements: Sequence[measure.Measurement]) -> None:
    """Put these into the record, in place of those of the same names."""
    names = {m.name for m in measurements}
    record.measurements[:] = [m for m in record.measurements if m.name not in names] + list(measurements)


def run_until_answered(group: Replicas, cell: Cell, seconds: float, rate: float | None = None) -> dict:
    """`group.run`, and again for four times as long where nothing finished within it: that is no rate."""
    while not (seen := group.run(cell, seconds, rate))["requests"] and seconds < LONGEST_LOAD:
        seconds *= 4
    return seen


def load(record: Record, group: Replicas, key: str, cells: Sequence[Cell], seconds: float, out, half: bool = False) -> None:
    """Requests/s of every cell to record.data["table"], and, with `half`, latencies at half of it under open-loop load.

    A load in which kernels were compiled, seconds each, tells of the compiler: it is taken again, ATTEMPTS times in all, and the
    last one kept.
    """
    table = record.data.setdefault("table", {})
    for cell in cells:
        row = table.setdefault(str(cell), {})
        rate = row["engines"]["requests/s"] / 2 if half else None
        for attempt in range(1, ATTEMPTS + 1):
            seen = run_until_answered(group, cell, seconds, rate)
            if not (names := seen.get("compiled")) or attempt == ATTEMPTS:
                break
            print(f"{cell!s:28s} {key:8s} taken again: {', '.join(names)} compiled in its window", flush=True)
        row[key] = seen
        p50, p99 = (1e3 * (seen[name] or 0) for name in ("p50 s", "p99 s"))
        print(f"{cell!s:28s} {key:8s} {seen['requests/s']:7.0f}/s  p50 {p50:6.1f} ms  p99 {p99:6.1f} ms"
              f"  cached {seen['cached']:.2f}", flush=True)  # fmt: skip
        measure.write_record(record, out)
