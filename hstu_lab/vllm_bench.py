"""Measure the vLLM engine on the GPU that is here and write what was seen to data/measured/<device>/vllm_*.json.

    python -m hstu_lab.vllm_bench [--out FOLDER] [--replicas 8] [--seconds 1.5]

Weights are random (times do not depend on them) and made here; users and items are drawn from a seed. Every figure of an
engine stands beside the null model's, whose forward pass does nothing: what is left is the host's share.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import cProfile
import dataclasses
import functools
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import pstats
import random
import re
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hstu_lab import measure, ops
from hstu_lab.config import ModelConfig, preset
from hstu_lab.measure import Measurement, Record
from hstu_lab.model import EventEncoder, HSTUStack, SavedConfig, TaskHeads
from hstu_lab.vllm_engine import Engine, EngineOptions
from hstu_lab.vllm_load import TASKS, Cell, Users, closed_loop, fill, open_loop

HISTORIES = (128, 256, 512, 1024)
OPTIONS = EngineOptions(
    kv_cache_memory_bytes=10 << 30, block_size=64, max_num_seqs=256, max_num_batched_tokens=16384, dtype="bfloat16", ops="triton",
    cuda_graphs="FULL", prompt_embeds=False, micro_batch=512,
)  # fmt: skip


def serving_config(name: str = "gr-3b", **changes) -> ModelConfig:
    """The preset without side features and users: the stack, the item table and the heads, which is what the engine holds."""
    return preset(name).replace(num_users=0, side_features=(), **changes)


def random_checkpoint(config: ModelConfig, folder: pathlib.Path, dtype: torch.dtype, device: str = "cpu") -> pathlib.Path:
    """A checkpoint of random weights that vLLM can load, written to `folder`; biases and tables are no zeros."""
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        parts = nn.ModuleDict({"encoder": EventEncoder(config), "stack": HSTUStack(config), "heads": TaskHeads(config)})
        for name, parameter in parts.named_parameters():
            if "bias" in name or "down" in name:
                nn.init.normal_(parameter, std=0.02)
        tensors = {name: tensor.to(dtype) for name, tensor in parts.state_dict().items()}
        for name, rows in config.tables:
            tensors[f"tables.embeddings.{name}.weight"] = (torch.randn(rows, config.d_model) * 0.1).to(dtype)
        tensors["tables.item_features"] = torch.zeros(len(config.side_features), config.num_items, dtype=torch.int64)
        tensors["known_items"] = torch.arange(config.num_items) > 0
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"config": config.to_json(), "format": "pt"})
    (folder / "config.json").write_text(json.dumps(SavedConfig(config).to_dict(), indent=1) + "\n")
    return folder


def runner_of(engine: Engine):
    """vLLM's model runner, in this process."""
    return engine.engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


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


def make_null(engine: Engine) -> None:
    """From here on the engine schedules, samples and answers as ever, and computes nothing."""
    runner = runner_of(engine)
    runner.model = NullModel(runner.get_model())
    runner.sampler.loop = NullLoop(runner.sampler.loop)


def random_histories(config: ModelConfig, count: int, length: int, seed: int) -> list[list[int]]:
    users = Users(config, Cell("topk", length, 0.0), 1, seed)
    return [users._events(length) for _ in range(count)]


# ---- one engine, one step


def seconds_of(run, repeats: int) -> tuple[float, ...]:
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
    return tuple(samples)


def decode_steps(engine: Engine, batch: int, history: int, steps: int = 40) -> tuple[float, ...]:
    """Seconds of engine steps in which `batch` requests add one item each."""
    with engine.held():
        for prompt in random_histories(engine.config, batch, history, batch):
            engine.submit_steps(prompt, [], steps + 6)
        for _ in range(4):
            engine.turn()
        samples = seconds_of(engine.turn, steps)
        while engine.turn():
            pass
    return samples


def graph_replays(engine: Engine) -> dict[int, tuple[float, ...]]:
    """Seconds of one replay of the captured decode graphs, by batch; the inputs are those of the last step."""
    found = {}
    for descriptor, entry in getattr(runner_of(engine).model, "concrete_cudagraph_entries", {}).items():
        if entry.cudagraph is None or descriptor.num_tokens not in (1, 8, 64):
            continue
        events = [torch.cuda.Event(enable_timing=True) for _ in range(31)]
        events[0].record()
        for event in events[1:]:
            for _ in range(10):
                entry.cudagraph.replay()
            event.record()
        torch.cuda.synchronize()
        found[descriptor.num_tokens] = tuple(a.elapsed_time(b) / 1e4 for a, b in itertools.pairwise(events))
    return found


def step(engine: Engine, suffix: str = "", history: int = 512) -> list[Measurement]:
    """A decode step through the engine and as graph replay; a slate and a topk for one user alone."""
    history = min(history, engine.config.max_history - 50)
    found = []

    def note(*measurement) -> None:
        found.append(Measurement(*measurement))
        print(found[-1], flush=True)

    config = engine.config
    for batch in (1, 8, 64):
        note(f"engine step B={batch} N={history}{suffix}", decode_steps(engine, batch, history))
        if not suffix and engine.in_process:  # the graph's inputs are those of the batch that ran last
            for size, replays in graph_replays(engine).items():
                if size == batch:
                    note(f"graph replay B={size} N={history}", replays, 10, "cuda events")
    by_steps = "slate, an item a step,"
    for turn, (task, k) in enumerate((TASKS | {by_steps: TASKS["slate"]}).items()):
        prompts = iter(random_histories(config, 30, history, 2 * turn + bool(suffix)))
        send = engine.submit_steps if task == by_steps else getattr(engine, f"submit_{task}")
        note(f"{task} alone N={history}{suffix}", seconds_of(lambda: send(next(prompts), [], k).result(), 30))  # noqa: B023
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


# ---- candidates


class CachedUsers:
    """A stack with the histories of B users in a paged cache, as the engine keeps them; scores candidates against them."""

    def __init__(self, stack: HSTUStack, x: Tensor, times: Tensor, history: int, count: int, page: int = 32):
        config, (self.users, rows) = stack.config, x.shape[:2]
        self.stack, self.x, self.history, self.count, self.page = stack, x, history, count, page
        per_user = -(-rows // page)
        shape = (config.num_layers, self.users * per_user, page, config.num_heads, 2 * config.d_qk)
        self.caches = torch.zeros(shape, device="cuda", dtype=x.dtype)
        self.table = torch.randperm(self.users * per_user, device="cuda").view(self.users, per_user).int()
        self.slot_times = torch.zeros(self.users * per_user, page, dtype=torch.int64, device="cuda")
        self.times, self.steps = times, {}
        self.run(0, history)

    def step(self, first: int, count: int) -> tuple[Tensor, ...]:
        """What an engine has ready before a step: its rows, slots, times, and the lengths of its sequences."""
        if (first, count) not in self.steps:
            where = torch.arange(first, first + count, device="cuda")
            slots = (self.table[:, where // self.page].long() * self.page + where % self.page).flatten()
            times = self.times[:, first : first + count].flatten()
            self.slot_times.view(-1)[slots] = times
            offsets = torch.arange(self.users + 1, device="cuda", dtype=torch.int32) * count
            lens = torch.full((self.users,), first + count, device="cuda", dtype=torch.int32)
            rows = self.x[:, first : first + count].flatten(0, 1)
            self.steps[first, count] = rows, slots, times, offsets, lens, lens.clamp(max=self.history)
        return self.steps[first, count]

    def run(self, first: int, count: int) -> Tensor:
        """Hidden states (B, count, d_model) of the rows from `first` on; those behind the history are candidates.

        As a step of any mixture, which is how the engine runs them.
        """
        from hstu_lab.ops.triton_kv_write import write_kv
        from hstu_lab.ops.triton_serving import attention_step, list_tiles

        x, slots, times, offsets, seq_lens, history = self.step(first, count)
        where, listed, divisor = (self.table, offsets, seq_lens), [], self.stack.config.max_seq_len

        def attend(layer, q, k, v, bias):
            write_kv(k, v, self.caches[layer], slots)
            keys, values = self.caches[layer].tensor_split(2, dim=-1)
            known = {"bias": bias, "query_times": times, "slot_times": self.slot_times}
            if not listed:
                listed.append(list_tiles(*where, history, q, self.page, **known))
            return attention_step(q, keys, values, *where, *listed, divisor=divisor, history_lens=history, **known)

        return self.stack(x, attend).unflatten(0, (self.users, count))

    def score(self, first: int, count: int) -> Tensor:
        """The same for rows that are all candidates: nothing of them is written to the cache, since nobody reads it."""
        from hstu_lab.ops.triton_candidates import candidates_layer, time_buckets

        x, _, times, offsets, seq_lens, history = self.step(first, count)
        stack, where = self.stack, (self.table, offsets, seq_lens, history)
        buckets = time_buckets(stack.layers[0].bias, *where, times, self.slot_times)
        for layer, cache in zip(stack.layers, self.caches):
            x = candidates_layer(x, layer, cache, *where, buckets, divisor=stack.config.max_seq_len, max_queries=count)
        x = stack.ops.layer_norm(x, stack.final_norm.weight, stack.final_norm.bias, stack.config.norm_eps)
        return x.unflatten(0, (self.users, count))


def stack_candidates(record: Record, stack: HSTUStack, users: int, history: int, count: int, micro: int) -> dict[str, Callable]:
    """The stack alone, by name: one pass over everything, against the cache, and the history again for each few; all ran once."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(users, history + count, stack.config.d_model, device="cuda", generator=generator).bfloat16()
    times = (torch.arange(history + count, device="cuda").clamp(max=history - 1) * 60).expand(users, -1).contiguous()
    cache = CachedUsers(stack, x, times, history, count)

    def one_pass_of(of_them: int) -> Callable[[], Tensor]:
        length = history + of_them
        offsets = torch.arange(users + 1, device="cuda") * length
        number = torch.full((users,), of_them, device="cuda")
        rows, seconds = x[:, :length].flatten(0, 1), times[:, :length].flatten()
        return lambda: stack.jagged(rows, offsets, seconds, number, length).unflatten(0, (users, length))

    one_pass, few = one_pass_of(count), one_pass_of(micro)
    expected = one_pass()[:, history:].float()
    for way, run in (("candidates only", cache.score), ("any mixture", cache.run)):
        got = run(history, count).float()
        error = ((got - expected).norm() / expected.norm()).item()
        record.data[f"hidden states of {users} users: {way} against one pass, relative error"] = error
    ways = {
        "one pass": one_pass,
        "cached": lambda: cache.score(history, count),
        "cached, step of any mixture": lambda: cache.run(history, count),
        f"cached, {micro} at a time": lambda: [cache.score(i, micro) for i in range(history, history + count, micro)],
        f"history again for each {micro}": lambda: [few() for _ in range(count // micro)],
    }
    for run in ways.values():
        run()  # compiles what it needs
    return {f"stack {count} candidates N={history} users={users} {name}": run for name, run in ways.items()}


@torch.inference_mode()
def candidates(record: Record, ready: Callable[[], None] = lambda: None) -> None:
    """512 candidates after 1,024 events, the stack alone: GPU time of graph replays."""
    with torch.device("cuda"):
        stack = HSTUStack(serving_config(), ops.get("triton")).bfloat16().eval()
    for name, parameter in stack.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter, std=0.02)
    ways: dict[str, Callable] = {}
    for users in (1, 4, 8):
        ways |= stack_candidates(record, stack, users, 1024, 512, 64)
    ready()
    for name, run in ways.items():
        record.measurements.append(measure.measure(run, name=name, repeats=20, cuda_graph=True))
        print(record.measurements[-1], flush=True)


def engine_candidates(engine: Engine, history: int = 1024, count: int = 512, micro: int = 64) -> tuple[list[Measurement], float]:
    """512 candidates after 1,024 events through the engine; and the largest difference of cached and fresh scores."""
    found = []

    def note(name: str, samples) -> None:
        found.append(Measurement(f"engine {count} candidates N={history} {name}", samples))
        print(found[-1], flush=True)

    prompts = random_histories(engine.config, 12, history, 7)
    items = [random.Random(i).sample(range(1, engine.config.num_items), count) for i in range(11)]
    fresh = engine.score(prompts[:1], items[:1])[0]
    cached = engine.score(prompts[:1], items[:1])[0]
    for size in (count, micro):
        engine.micro_batch = size
        turn = iter(items)
        note(f"cached, {size} at a time", seconds_of(lambda: engine.score(prompts[:1], [next(turn)]), 10))  # noqa: B023
    engine.micro_batch, others = count, iter(prompts[1:])
    note("one pass", seconds_of(lambda: engine.score([next(others)], items[:1]), 10))

    def again() -> None:
        for first in range(0, count, micro):
            engine.reset_prefix_cache()
            engine.score(prompts[:1], [items[0][first : first + micro]])

    note(f"history again for each {micro}", seconds_of(again, 3))
    return found, (cached - fresh).abs().max().item()


# ---- load on one or more replicas


def compile_kernels(first: int, total: int) -> None:
    """Compile the stack's kernels, beginning with share `first` of `total`: replicas that start together share the work.

    Triton keeps compiled kernels on disk; what another process compiled meanwhile is found there.
    """
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
    jobs += [
        functools.partial(triton_ops.layer_norm, x, biases[d], biases[d], 1e-6),
        functools.partial(triton_ops.norm_gate, x, rand(64, wide)[:, :d], biases[d], biases[d], 1e-6),
    ]
    turn = first * len(jobs) // total
    for job in jobs[turn:] + jobs[:turn]:
        job()


def warm_up(engine: Engine) -> None:
    """Compile what loads will need: Triton makes variants of a kernel for some numbers of rows, seconds each at first use."""
    for in_flight in (100, 7, 1):
        for history in (1024, 256, 512):
            for task, warm in itertools.product(TASKS, (0.0, 0.9)):
                cell = Cell(task, min(history, engine.config.max_history), warm)
                users = Users(engine.config, cell, 16, in_flight)
                fill(engine, cell, users)
                closed_loop(engine, cell, users, in_flight, 0.15, ramp=0.0)


def replica(
    connection, folder: pathlib.Path, options: EngineOptions, seed: int, count: int, warm_users: int, gpu: int | None = None
) -> None:
    """One engine in a process of its own; does what it is told, when it is told. `gpu` counts those that are visible."""
    try:
        if gpu is not None:  # before CUDA is first asked for
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7").split(",")
            os.environ["CUDA_VISIBLE_DEVICES"] = visible[gpu]
        if options.ops == "triton":
            compile_kernels(seed, count)
        with Engine(folder, options) as engine:
            longest = min(512, engine.config.max_history)
            for task, k in TASKS.items():
                getattr(engine, task)(random_histories(engine.config, 64, longest, seed), [[]] * 64, k)
            if options.ops == "triton":
                warm_up(engine)
            connection.send("ready")
            runs = itertools.count(1000 * seed)
            while (order := connection.recv()) is not None:
                if isinstance(order, list):
                    nothing = [[]] * len(order)
                    connection.send(
                        [[g.items for g in send(order, nothing, k)] for send, k in ((engine.topk, 20), (engine.slate, 10))]
                    )
                elif order == "step":
                    connection.send(step(engine))
                elif order == "profiles":
                    connection.send(profiles(engine))
                elif order == "candidates":
                    connection.send(engine_candidates(engine))
                elif order == "null":
                    make_null(engine)
                    connection.send(step(engine, " null") if seed == 0 else [])
                else:
                    cell, rate, in_flight, seconds = order
                    users = Users(engine.config, cell, warm_users, draw := next(runs))  # new users each time
                    fill(engine, cell, users)
                    connection.send("filled")
                    time.sleep(max(connection.recv() - time.time(), 0))
                    if rate is None:
                        connection.send(closed_loop(engine, cell, users, in_flight, seconds))
                    else:
                        connection.send(open_loop(engine, cell, users, rate, seconds, draw))
    except Exception:
        traceback.print_exc()
        connection.send("failed")


class Replicas:
    """Engines, each in its own process, that start a load together; on one GPU, or in turn on several."""

    def __init__(self, count: int, folder: pathlib.Path, options: EngineOptions, warm_users: int = 64, gpus: int = 1):
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for i in range(count):
            ours, theirs = context.Pipe()
            arguments = theirs, folder, options, i, count, warm_users, i % gpus if gpus > 1 else None
            process = context.Process(target=replica, args=arguments, daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def start(self, seconds: float = 240) -> None:
        """Wait until the engines are up; go on with those that come up. Raises RuntimeError where none does."""
        up = [pipe for pipe in self.pipes if pipe.poll(seconds) and pipe.recv() == "ready"]
        print(f"{len(up)} of {len(self.pipes)} engines are up", flush=True)
        self.pipes = up
        if not up:
            raise RuntimeError("no engine came up: see their messages above")

    def wait(self, word: str, seconds: float = 150) -> None:
        for pipe in self.pipes:
            said = pipe.recv() if pipe.poll(seconds) else "nothing"
            if said != word:
                raise RuntimeError(f"a replica said {said!r}, not {word!r}: see its messages above")

    def run(self, cell: Cell, seconds: float, rate: float | None = None, in_flight: int = 128) -> dict:
        """Requests a second of all replicas together and percentiles of the latency; `rate` asks for open-loop load."""
        share = None if rate is None else rate / len(self.pipes)
        for pipe in self.pipes:
            pipe.send((cell, share, in_flight, seconds))
        self.wait("filled")
        for pipe in self.pipes:
            pipe.send(time.time() + 0.1)
        outcomes = [pipe.recv() for pipe in self.pipes]
        if "failed" in outcomes:
            raise RuntimeError("a replica failed")
        latencies = sorted(x for outcome in outcomes for x in outcome.latencies)
        at = lambda p: latencies[min(int(p * len(latencies)), len(latencies) - 1)] if latencies else None  # noqa: E731
        return {
            "requests/s": sum(len(o.latencies) / o.seconds for o in outcomes), "requests": len(latencies), "p50 s": at(0.5),
            "p95 s": at(0.95), "p99 s": at(0.99), "cached": statistics.mean(o.cached for o in outcomes),
            **({} if rate is None else {"offered/s": rate}),
        }  # fmt: skip

    def tell(self, word: str, first_only: bool = False) -> list:
        """What the replicas answer to one word; those of a failed one raise RuntimeError."""
        pipes = self.pipes[:1] if first_only else self.pipes
        for pipe in pipes:
            pipe.send(word)
        answers = [pipe.recv() for pipe in pipes]
        if "failed" in answers:
            raise RuntimeError(f"a replica failed at {word!r}: see its messages above")
        return answers

    def close(self) -> None:
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()


def load(
    record: Record,
    group: Replicas,
    key: str,
    cells: list[Cell],
    seconds: float,
    out,
    half: bool = False,
    count: int | None = None,
) -> None:
    """Requests/s of every cell to record.data["table"], and, with `half`, latencies at half of it under open-loop load.

    `count` of the replicas take part; None: all.
    """
    table = record.data.setdefault("table", {})
    if count is not None:
        some = copy.copy(group)
        some.pipes = group.pipes[:count]
        return load(record, some, key, cells, seconds, out, half)
    for cell in cells:
        row = table.setdefault(str(cell), {})
        seen = row[key] = group.run(cell, seconds, rate=max(row["engines"]["requests/s"] / 2, 1) if half else None)
        p50, p99 = (1e3 * (seen[name] or 0) for name in ("p50 s", "p99 s"))
        print(f"{cell!s:28s} {key:8s} {seen['requests/s']:7.0f}/s  p50 {p50:6.1f} ms  p99 {p99:6.1f} ms"
              f"  cached {seen['cached']:.2f}", flush=True)  # fmt: skip
        measure.write_record(record, out)


def stack_process(connection) -> None:
    """The stack's candidates in a process of their own, whose kernels compile while the engines start."""
    record = Record.here("vllm_candidates", command="python -m hstu_lab.vllm_bench")

    def ready() -> None:
        connection.send("ready")
        connection.recv()

    try:
        candidates(record, ready)
        connection.send(record)
    except Exception:
        traceback.print_exc()
        connection.send("failed")


def run(
    folder: pathlib.Path,
    replicas: int,
    seconds: float,
    out: pathlib.Path | None,
    note: str = "",
    options: EngineOptions = OPTIONS,
) -> None:
    """Everything, the most telling first, each record written as soon as there is something to write."""
    command = f"python -m hstu_lab.vllm_bench --replicas {replicas} --seconds {seconds}"
    steps, loads = (Record.here(name, command=command, note=note) for name in ("vllm_step", "vllm_load"))
    loads.data |= {"replicas": replicas, "seconds": seconds, "options": dataclasses.asdict(options)}
    steps.data["options"] = dataclasses.asdict(options)
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    context.Process(target=stack_process, args=(theirs,), daemon=True).start()
    group = Replicas(replicas, folder, options)
    telling = [Cell(task, history, warm) for task, history in (("topk", 512), ("slate", 256)) for warm in (0.0, 0.9)]
    others = [Cell(task, history, warm) for history in HISTORIES for task in TASKS for warm in (0.0, 0.9)]
    others = [cell for cell in others if cell not in telling]
    start = time.time()

    def said(what: str) -> None:
        print(f"--- {what}, {time.time() - start:.0f} s after the start", flush=True)

    group.start()
    loads.data["replicas"] = len(group.pipes)
    said("ready")
    steps.measurements += group.tell("step", first_only=True)[0]
    measure.write_record(steps, out)
    load(loads, group, "engines", telling, seconds, out)
    said("candidates")
    if pipe.poll(1) and pipe.recv() == "ready":
        pipe.send("go")
        if isinstance(record := pipe.recv(), Record):
            engine_seen, difference = group.tell("candidates", first_only=True)[0]
            record.measurements += engine_seen
            record.note = note
            record.data["engine scores: cached against fresh, largest difference"] = difference
            measure.write_record(record, out)
            print(json.dumps(record.data, indent=1), flush=True)
    said("half the peak")
    load(loads, group, "half", telling, seconds, out, half=True)
    said("the whole table")
    load(loads, group, "engines", others, seconds, out)
    load(loads, group, "half", others, seconds, out, half=True)
    said("fewer replicas")
    for count in (1, 2, 3, 4):
        if count < len(group.pipes):
            load(loads, group, f"x{count}", [cell for cell in telling if not cell.warm], seconds, out, count=count)
    said("null")
    steps.measurements += group.tell("null")[0]
    measure.write_record(steps, out)
    load(loads, group, "null", telling + others, seconds / 2, out)
    said("done")
    group.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=None, help="folder for the records (default: data/measured)")
    parser.add_argument("--replicas", type=int, default=8, help="engines on the GPU")
    parser.add_argument("--seconds", type=float, default=1.5, help="length of one load")
    parser.add_argument("--note", default="", help="what readers of the records must know of this machine")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = random_checkpoint(serving_config(), pathlib.Path(temporary) / "gr-3b", torch.bfloat16)
        run(folder, arguments.replicas, arguments.seconds, arguments.out, arguments.note)


if __name__ == "__main__":
    main()
