"""Measure the vLLM engine on the GPU that is here and write what was seen to data/measured/<device>/vllm_*.json.

    python -m hstu_lab.vllm_bench [--out FOLDER] [--replicas 8] [--seconds 1.5] [--only PART,PART] [--mps] [--cpu]

Weights are random (times do not depend on them) and made here; users and items are drawn from a seed. Every figure of an
engine stands beside the null model's, whose forward pass does nothing: what is left is the host's share. A record names the parts
that it has and those that it lacks; `--only` measures some parts and keeps the others of the record in `--out`.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import dataclasses
import datetime
import functools
import io
import multiprocessing
import os
import pathlib
import pstats
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hstu_lab import measure
from hstu_lab.candidate_bench import stack_process
from hstu_lab.measure import Measurement, Record
from hstu_lab.vllm_engine import Engine, EngineOptions
from hstu_lab.vllm_load import TASKS, Cell, random_checkpoint, random_histories, seconds_of, serving_config
from hstu_lab.vllm_replicas import Replicas, end_on_sigterm, keep, load, resumed, run_parts, shared_gpu

HISTORIES = (128, 256, 512, 1024)
OPTIONS = EngineOptions(
    kv_cache_memory_bytes=10 << 30, block_size=64, max_num_seqs=256, max_num_batched_tokens=16384, dtype="bfloat16", ops="triton",
    cuda_graphs="FULL", prompt_embeds=False, micro_batch=512,
)  # fmt: skip
CPU = EngineOptions(kv_cache_memory_bytes=64 << 20, max_num_seqs=64, prompt_embeds=False, micro_batch=32)
"""To try the program without a GPU."""
STEPS = 40
PARTS = ("step", "telling", "null", "candidates", "half", "table", "fewer", "alone")
"""In this order: one engine's steps, the loads that the goals name, the null model's, candidates, latencies at half of the peaks,
all other loads, fewer engines, and the steps again once the other engines are gone."""


def worker_of(engine: Engine):
    """vLLM's worker, in this process."""
    return engine.engine.engine_core.engine_core.model_executor.driver_worker.worker


def runner_of(engine: Engine):
    """vLLM's model runner, in this process."""
    return worker_of(engine).model_runner


class NullModel:
    """Stands for the model in vLLM's runner and computes nothing: what a step still costs is the host's share."""

    def __init__(self, model):
        self._model = model
        self._logits = model.known_items.float()

    def __getattr__(self, name: str):
        return getattr(self._model, name)

    def __call__(self, input_ids=None, **_) -> Tensor:
        return self._model.item_matrix[:1].expand(len(input_ids), -1)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        return self._logits.expand(len(hidden_states), -1).clone()


class NullLoop:
    """Stands for the loop that generates slates: the same items for all, at once."""

    def __init__(self, loop):
        self.count = loop.count
        self._items = torch.arange(1, loop.count + 1, device=loop.nothing.device)
        self._scores = torch.zeros(loop.count, device=loop.nothing.device)

    def __call__(self, rows: Tensor, *_) -> tuple[Tensor, Tensor]:
        return self._items.expand(len(rows), -1), self._scores.expand(len(rows), -1)


@contextlib.contextmanager
def null(engine: Engine) -> Iterator[None]:
    """Inside, the engine (which has answered before) schedules, samples and answers as ever, and computes nothing."""
    runner = runner_of(engine)
    model, loop, steady = runner.model, runner.sampler.loop, worker_of(engine).steady
    runner.model, runner.sampler.loop = NullModel(runner.get_model()), NullLoop(loop)
    chosen = torch.zeros(2, runner.max_num_reqs, dtype=torch.int32, device=runner.device)
    steady.run = lambda size: chosen[:, :size].clone()
    try:
        yield
    finally:
        runner.model, runner.sampler.loop = model, loop
        del steady.run
        engine.reset_prefix_cache()  # nothing was computed of what it holds


# ---- one engine, one step


def decode_steps(
    engine: Engine, batch: int, history: int, steps: int = 0, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, ...]:
    """Seconds, by that clock, of engine steps (as many as STEPS) in which `batch` requests add one item each."""
    steps = steps or STEPS
    with engine.held():
        for prompt in random_histories(engine.config, batch, history, batch):
            engine.submit_steps(prompt, [], steps + 6)
        for _ in range(4):
            engine.turn()
        samples = seconds_of(engine.turn, steps, clock)
        while engine.turn():
            pass
    return samples


def graph_replays(engine: Engine, batch: int, history: int) -> dict[str, tuple[float, ...]]:
    """Seconds of one replay of the graphs of a decode step with as many requests, by name: the model's, which vLLM captured, and
    that of a steady step, which masks and chooses the items as well. None without graphs."""
    worker, runner, graphs = worker_of(engine), runner_of(engine), {}
    steady, worker.steady = worker.steady, None
    try:
        decode_steps(engine, batch, history, 2)  # vLLM's way: a graph's inputs stay those of its last step
    finally:
        worker.steady = steady
    for descriptor, entry in getattr(runner.model, "concrete_cudagraph_entries", {}).items():
        if entry.cudagraph is not None and descriptor.num_tokens == batch:
            graphs["graph replay"] = entry.cudagraph
    if steady is not None and batch in steady.graphs:
        graphs["graph replay with choice"] = steady.graphs[batch][0]
    found = {}
    for name, graph in graphs.items():
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(30)]
        for start, end in pairs:
            runner.seq_lens[:batch] = history + 1  # a steady step lengthens every request
            start.record()
            for _ in range(10):
                graph.replay()
            end.record()
        torch.cuda.synchronize()
        found[name] = tuple(start.elapsed_time(end) / 1e4 for start, end in pairs)
    return found


def slates_together(engine: Engine, batch: int, history: int) -> tuple[float, ...]:
    """Seconds an item of slates for `batch` users that the device generates in one step of the engine, histories cached."""
    prompts, size = random_histories(engine.config, batch, history, batch), engine.config.slate_size

    def run() -> None:
        for prompt in prompts:
            engine.submit_slate(prompt, [], size)
        while engine.turn():
            pass

    with engine.held():
        run()
        return tuple(seconds / size for seconds in seconds_of(run, STEPS // 4))


def step(engine: Engine, suffix: str = "", history: int = 512) -> list[Measurement]:
    """A decode step through the engine (wall time, and the host's own time), as graph replay, and one item of slates that take
    one step; then a slate and a topk for one user alone."""
    config, found = engine.config, []
    history = min(history, config.max_history - 50)

    def note(*measurement) -> None:
        found.append(Measurement(*measurement))
        print(found[-1], flush=True)

    for batch in (1, 8, 64):
        case = f"B={batch} N={history}{suffix}"
        note(f"engine step {case}", decode_steps(engine, batch, history))
        if not suffix and engine.in_process:
            for name, replays in graph_replays(engine, batch, history).items():
                note(f"{name} {case}", replays, 10, "cuda events")
        # Far below the wall time, something else ran in between: on the GPU, or on the host's processors.
        note(f"engine step, own processor time {case}", decode_steps(engine, batch, history, clock=time.thread_time), 1, "cpu")
        note(f"slate in one step, an item {case}", slates_together(engine, batch, history), config.slate_size)
    by_steps = "slate, an item a step,"
    for turn, (task, k) in enumerate((TASKS | {by_steps: TASKS["slate"]}).items()):
        prompts = iter(random_histories(config, STEPS, history, 2 * turn + bool(suffix)))
        send = engine.submit_steps if task == by_steps else getattr(engine, f"submit_{task}")
        note(f"{task} alone N={history}{suffix}", seconds_of(lambda: send(next(prompts), [], k).result(), STEPS))  # noqa: B023
    return found


def host_profile(engine: Engine, run: Callable[[], object], rows: int = 30) -> str:
    """cProfile of `run` in the engine's own thread as a table, the functions that cost most by themselves first."""
    profile, text = cProfile.Profile(), io.StringIO()
    profile.runcall(run)
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(rows)
    return re.sub(r"\n\s*\n", "\n", re.sub(r"\S*/", "", text.getvalue()))


def device_profile(run: Callable[[], object], rows: int = 16) -> str:
    """Kernels of `run` by their time on the GPU, as a table."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    events = sorted(seen.key_averages(), key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in events)
    lines = [f"{e.self_device_time_total:9.0f} us {e.count:5d} x {e.key[:90]}" for e in events[:rows]]
    return "\n".join([f"{total:9.0f} us in all", *lines])


def profiles(engine: Engine, batch: int = 8, history: int = 512, steps: int = 200) -> str:
    """Where `steps` decode steps and 64 requests of either task spend the host's time, and the GPU's."""
    parts, config = [], engine.config
    parts += [f"--- host: {steps} decode steps B={batch} N={history}"]
    parts += [host_profile(engine, lambda: decode_steps(engine, batch, history, steps))]
    if next(runner_of(engine).get_model().parameters()).is_cuda:
        parts += [f"--- GPU: 20 decode steps B={batch} N={history}"]
        parts += [device_profile(lambda: decode_steps(engine, batch, history, 20))]
    for task, k in TASKS.items():
        prompts = random_histories(config, 64, history, 11)
        send = getattr(engine, "submit_" + task)

        def many() -> None:
            # Without the engine's thread, so that the profiler sees both halves: adding requests and stepping.
            for prompt in prompts:  # noqa: B023
                send(prompt, [], k)  # noqa: B023
            while engine.turn():
                pass

        parts += [f"--- host: 64 x {task} N={history}"]
        with engine.held():
            parts += [host_profile(engine, many)]
            if next(runner_of(engine).get_model().parameters()).is_cuda:
                prompts = random_histories(config, 64, history, 12)
                parts += [f"--- GPU: 64 x {task} N={history}", device_profile(many)]
    return "\n".join(parts)


# ---- everything


class Bench:
    """Engines on one GPU, and the records of what they were seen to do; each part is a method."""

    def __init__(
        self, folder: pathlib.Path, replicas: int, seconds: float, out: pathlib.Path | None, note: str = "",
        options: EngineOptions = OPTIONS, only: Sequence[str] = PARTS, histories: Sequence[int] = HISTORIES,
        sizes: Sequence[int] = (1024, 512, 64), patience: float = 60, mps: bool = False,
    ):  # fmt: skip
        if unknown := set(only) - set(PARTS):
            raise SystemExit(f"--only {sorted(unknown)[0]}: there are {', '.join(PARTS)}")
        self.seconds, self.out, self.only, self.sizes = seconds, out, only, sizes
        command = f"python -m hstu_lab.vllm_bench --replicas {replicas} --seconds {seconds}{' --mps' * mps}"
        names = ("vllm_step", "vllm_load", "vllm_candidates")
        self.records = {name: Record.here(name, command=command, note=note) for name in names}
        if set(only) != set(PARTS):
            self.records = {name: resumed(record, out) for name, record in self.records.items()}
        self.steps, self.loads, self.candidates_seen = self.records.values()
        for record in (self.steps, self.loads):
            record.data["options"] = dataclasses.asdict(options)
        self.loads.data |= {"replicas": replicas, "seconds": seconds, "multi-process service": mps}
        wanted = [("topk", 512), ("slate", 256)] if 512 in histories else [(task, histories[0]) for task in TASKS]
        self.telling_cells = [Cell(task, history, warm) for task, history in wanted for warm in (0.0, 0.9)]
        every = [Cell(task, history, warm) for history in histories for task in TASKS for warm in (0.0, 0.9)]
        self.others = [cell for cell in every if cell not in self.telling_cells]
        self.start, self.pipe = time.monotonic(), None
        if "candidates" in only and options.ops == "triton":
            context = multiprocessing.get_context("spawn")
            self.pipe, theirs = context.Pipe()
            context.Process(target=stack_process, args=(theirs,), daemon=True).start()
        self.group = Replicas.of_one_gpu(replicas, folder, options, patience)

    def run(self) -> list[str]:
        """Every part of `only`, whatever becomes of the others; the parts that failed."""
        self.group.start()
        self.loads.data["replicas"] = len(self.group.members)
        if self.pipe is not None and not self.pipe.poll(120):  # nothing compiles while steps are timed
            print("the stack's candidates are not ready after 120 s: left out", flush=True)
            self.pipe = None
        for record in self.records.values():
            record.data.setdefault("parts", {}).update(dict.fromkeys(self.only, "not reached"))
        parts = {part: functools.partial(self._run, part) for part in PARTS if part in self.only}
        failed = run_parts(parts, self.start, self._note)
        self.group.close()
        return failed

    def _run(self, part: str) -> None:
        self.group.members  # noqa: B018 - raises where none is left
        getattr(self, part)()

    def _note(self, part: str, error: Exception | None) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        for record in self.records.values():
            record.data["parts"][part] = f"failed: {error}" if error else now
            if record.measurements or "table" in record.data:
                measure.write_record(record, self.out)

    def _load(self, key: str, cells: Sequence[Cell], seconds: float, group: Replicas | None = None, half: bool = False) -> None:
        load(self.loads, group or self.group, key, cells, seconds, self.out, half)

    @contextlib.contextmanager
    def _computing_nothing(self) -> Iterator[None]:
        self.group.tell("null")
        try:
            yield
        finally:
            with contextlib.suppress(RuntimeError):  # the next part tells that none is left
                self.group.tell("real")

    def step(self) -> None:
        load_average = os.getloadavg()[0]
        keep(self.steps, self.group.tell("step", first_only=True)[0])
        self.steps.data["load average of the host before the steps"] = load_average

    def telling(self) -> None:
        self._load("engines", self.telling_cells, self.seconds)

    def null(self) -> None:
        with self._computing_nothing():
            keep(self.steps, self.group.tell("step", " null", first_only=True)[0])
            self._load("null", self.telling_cells, self.seconds / 2)

    def candidates(self) -> None:
        record = self.candidates_seen
        if self.pipe is not None and self.pipe.recv() == "ready":
            self.pipe.send("go")
            seen = self.pipe.recv() if self.pipe.poll(120) else "nothing within 120 s"
            if not isinstance(seen, Record):
                raise RuntimeError(f"the stack's candidates said {seen!r}: see its messages above")
            keep(record, seen.measurements)
            record.data |= seen.data
        found, difference = self.group.tell("candidates", *self.sizes, first_only=True)[0]
        keep(record, found)
        record.data["engine scores: cached against fresh, largest difference"] = difference
        history, count, _ = self.sizes
        for engines in sorted({1, len(self.group.members)}):
            rates: dict[str, list[float]] = {"cached": [], "one pass": []}
            for turn in range(4):  # the first compiles; then by turns, so that the GPU's clock is the same for both
                for way, seen in rates.items():
                    order = "candidates_load", way == "cached", history, count, self.seconds
                    rate = sum(self.group.tell(*order, first_only=engines == 1))
                    seen.extend([rate] * (turn > 0))
            record.data[f"users/s at saturation, {engines} engine{'s' * (engines > 1)}"] = rates
            print(f"{engines} engines: {rates}", flush=True)

    def half(self) -> None:
        self._load("half", self.telling_cells, self.seconds, half=True)

    def table(self) -> None:
        self._load("engines", self.others, self.seconds)
        self._load("half", self.others, self.seconds, half=True)
        with self._computing_nothing():
            self._load("null", self.others, self.seconds / 2)

    def fewer(self) -> None:
        for count in range(1, min(5, len(self.group.members))):
            cold = [cell for cell in self.telling_cells if not cell.warm]
            self._load(f"x{count}", cold, self.seconds, self.group.some(self.group.members[:count]))

    def alone(self) -> None:
        self.group.some(self.group.members[1:]).close()
        keep(self.steps, self.group.tell("step", " alone", first_only=True)[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=None, help="folder for the records (default: data/measured)")
    parser.add_argument("--replicas", type=int, default=8, help="engines on the GPU")
    parser.add_argument("--seconds", type=float, default=1.5, help="length of one load")
    parser.add_argument("--note", default="", help="what readers of the records must know of this machine")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}; the record keeps its other parts")
    parser.add_argument("--mps", action="store_true", help="engines share the GPU through NVIDIA's Multi-Process Service")
    parser.add_argument("--cpu", action="store_true", help="a small model without a GPU, to try this program; no record")
    arguments = parser.parse_args()
    only = arguments.only.split(",")
    end_on_sigterm()
    with tempfile.TemporaryDirectory() as temporary, shared_gpu() if arguments.mps else contextlib.nullcontext():
        root = pathlib.Path(temporary)
        if arguments.cpu:
            folder = random_checkpoint(serving_config("small"), root / "small", torch.float32)
            bench = Bench(folder, 2, 0.3, root, options=CPU, only=only, histories=(96,), sizes=(96, 32, 8), patience=300)
        else:
            folder = random_checkpoint(serving_config(), root / "gr-3b", torch.bfloat16)
            bench = Bench(
                folder, arguments.replicas, arguments.seconds, arguments.out, arguments.note, only=only, mps=arguments.mps
            )
        return 1 if bench.run() else 0


if __name__ == "__main__":
    raise SystemExit(main())
