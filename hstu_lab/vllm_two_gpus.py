"""Measure one model on two GPUs and write what was seen to data/measured/<device>/vllm_two_gpus.json.

    python -m hstu_lab.vllm_two_gpus [--out FOLDER] [--seconds 1]

Two ways are vLLM's own: tensor parallel (every GPU holds half of each layer's heads) and data parallel (an engine a GPU behind
one asynchronous front end). The third is an engine's process after another, half of them on each GPU. All must answer alike.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import functools
import multiprocessing
import os
import pathlib
import tempfile
import time
import traceback

import torch

from hstu_lab import measure
from hstu_lab.measure import Record
from hstu_lab.vllm_bench import OPTIONS, Replicas, random_checkpoint, random_histories, serving_config
from hstu_lab.vllm_engine import ENVIRONMENT, EngineOptions, engine_arguments, loop_sizes
from hstu_lab.vllm_load import TASKS, Cell, Users

EXACT = EngineOptions(
    kv_cache_memory_bytes=1 << 30, dtype="float32", ops="triton", cuda_graphs="FULL", prompt_embeds=False, graph_tokens=256,
)  # fmt: skip
"""Lists are compared in float32: in bfloat16 the order of a sum over GPUs decides between items that all but tie."""
CPU = dataclasses.replace(EXACT, kv_cache_memory_bytes=64 << 20, ops="reference", cuda_graphs="NONE")


class DataParallel:
    """vLLM's asynchronous engine over `size` engines; made and used inside one event loop."""

    def __init__(self, folder: pathlib.Path, options: EngineOptions, size: int):
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
        from vllm import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        memory = {} if current_platform.is_cpu() else {"gpu_memory_utilization": 0.05}
        arguments = engine_arguments(folder, options) | memory | {"data_parallel_size": size}
        self.engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments, enable_log_requests=False))
        self.options, self.turn = options, 0

    async def start(self) -> None:
        await self.engine.collective_rpc("use_recommendation_sampler", args=(loop_sizes(self.options),))

    async def topk(self, prompt: list[int], k: int) -> list[int]:
        """The k best items, best first, ties by lower id."""
        from hstu_lab.vllm_engine import Engine

        self.turn += 1
        params, name = Engine._params(1, k, seen=[]), f"request-{self.turn}"
        async for output in self.engine.generate({"prompt_token_ids": prompt}, params, name):
            if output.finished:
                flat = output.outputs[0].logprobs
                best = dict(zip(flat.token_ids[: k + 1], flat.logprobs[: k + 1]))
                return sorted(best, key=lambda item: (-best[item], item))[:k]
        raise RuntimeError("vLLM ended the request without an answer")

    async def load(self, config, cell: Cell, in_flight: int, seconds: float) -> float:
        """Requests a second, so many always in flight."""
        users, finished, begin = Users(config, cell, 1), 0, time.perf_counter() + 0.5

        async def one() -> None:
            nonlocal finished
            while (now := time.perf_counter()) < begin + seconds:
                await self.topk(next(users), TASKS["topk"])
                finished += begin <= now and time.perf_counter() < begin + seconds

        await asyncio.gather(*(one() for _ in range(in_flight)))
        return finished / seconds


def data_parallel(connection, folder: pathlib.Path, options: EngineOptions, size: int) -> None:
    """A process with vLLM's data parallelism over `size` engines: answers lists, or takes load."""

    async def serve() -> None:
        engine = DataParallel(folder, options, size)
        await engine.start()
        config = serving_config_of(folder)
        await asyncio.gather(*(engine.topk(p, 100) for p in random_histories(config, 64, config.max_history // 2, size)))
        connection.send("ready")
        while (order := await asyncio.to_thread(connection.recv)) is not None:
            if isinstance(order, list):
                connection.send([await asyncio.gather(*(engine.topk(prompt, 20) for prompt in order))])
            else:
                connection.send(await engine.load(config, *order))
        engine.engine.shutdown()

    try:
        asyncio.run(serve())
    except Exception:
        traceback.print_exc()
        connection.send("failed")


def serving_config_of(folder: pathlib.Path):
    """The config of a checkpoint."""
    from hstu_lab.model import load_config

    return load_config(folder)


class Served:
    """Engines of one kind in processes of their own, started at once and used one kind after another."""

    def __init__(self, name: str, make):
        self.name, self.group, self.up = name, None, False
        try:
            self.group = make()
        except Exception:
            traceback.print_exc()

    def start(self, seconds: float) -> None:
        if self.group is None:
            return
        try:
            self.group.start(seconds)
            self.up = True
        except Exception as error:
            print(f"{self.name}: {error}", flush=True)


class OneProcess(Replicas):
    """`Replicas` of one process, of any function."""

    def __init__(self, target, *arguments):
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self.pipes, self.processes = [ours], [context.Process(target=target, args=(theirs, *arguments))]
        self.processes[0].start()

    def ask(self, order, seconds: float = 60):
        self.pipes[0].send(order)
        if not self.pipes[0].poll(seconds):
            raise RuntimeError(f"no answer within {seconds} s")
        answer = self.pipes[0].recv()
        if answer == "failed":
            raise RuntimeError("the process failed: see its messages above")
        return answer


def answers(record: Record, engines: dict[str, Served], prompts: list[list[int]]) -> None:
    """How many lists of each way equal the first way's, which is one engine on one GPU."""
    expected = None
    for name, served in engines.items():
        if not served.up:
            continue
        seen = served.group.ask(prompts)
        expected = expected or seen
        for task, lists, wanted in zip(("topk", "slate"), seen, expected):
            equal = sum(a == b for a, b in zip(lists, wanted))
            record.data.setdefault("equal lists", {})[f"{name}, {task}"] = f"{equal} of {len(wanted)}"
            print(f"{name:28s} {task:6s} lists equal: {equal} of {len(wanted)}", flush=True)


def run(
    out: pathlib.Path | None, seconds: float, exact: EngineOptions = EXACT, options: EngineOptions = OPTIONS,
    preset: str = "gr-3b", replicas: int = 4, dtype: torch.dtype = torch.bfloat16, history: int = 512, note: str = "",
    patience: float = 85,
) -> Record:  # fmt: skip
    """Answers first, then times; every part is independent of the others' failures.

    Engines that are not up after `patience` seconds are left out.
    """
    from hstu_lab.vllm_bench import replica

    record = Record.here("vllm_two_gpus", command=f"python -m hstu_lab.vllm_two_gpus --seconds {seconds}", note=note)
    record.data |= {"options": dataclasses.asdict(options), "exact": dataclasses.asdict(exact), "replicas a GPU": replicas}
    parallel = functools.partial(dataclasses.replace, tensor_parallel_size=2)
    with tempfile.TemporaryDirectory() as temporary:
        root = pathlib.Path(temporary)
        small = random_checkpoint(serving_config("small"), root / "small", torch.float32)
        large = random_checkpoint(serving_config(preset), root / preset, dtype)
        config = serving_config("small")
        same = {
            "one engine": Served("one", lambda: OneProcess(replica, small, exact, 0, 1, 64)),
            "tensor parallel, 2 GPUs": Served("tp", lambda: OneProcess(replica, small, parallel(exact), 0, 1, 64)),
            "data parallel, 2 GPUs": Served("dp", lambda: OneProcess(data_parallel, small, exact, 2)),
        }
        timed = {
            "tp": Served("tensor parallel", lambda: OneProcess(replica, large, parallel(options), 0, 1, 64)),
            "dp1": Served("data parallel 1", lambda: OneProcess(data_parallel, large, options, 1)),
            "dp2": Served("data parallel 2", lambda: OneProcess(data_parallel, large, options, 2)),
            "replicas": Served("replicas", lambda: Replicas(2 * replicas, large, options, gpus=2)),
        }
        deadline = time.time() + patience
        for served in (*same.values(), *timed.values()):
            served.start(max(deadline - time.time(), 0.1))
        print(f"--- started within {time.time() - deadline + patience:.0f} s", flush=True)
        prompts = random_histories(config, 200, config.max_history // 2, 5)
        parts = {
            "answers": lambda: answers(record, same, prompts),
            "tensor parallel": lambda: tensor_parallel(record, timed, history, seconds),
            "replicas": lambda: replicas_of_two(record, timed["replicas"].group, history, seconds),
            "data parallel": lambda: asynchronous(record, timed, history, seconds),
        }
        for name, part in parts.items():
            try:
                part()
            except Exception as error:
                print(f"{name}: {error!r}", flush=True)
            measure.write_record(record, out)
        for served in (*same.values(), *timed.values()):
            if served.group is not None:
                served.group.close()
    return record


def note_load(record: Record, name: str, rate: float) -> None:
    record.data.setdefault("requests/s", {})[name] = rate
    print(f"{name:56s} {rate:7.0f} requests/s", flush=True)


def tensor_parallel(record: Record, timed: dict[str, Served], history: int, seconds: float) -> None:
    """Steps, lists and throughput of one engine on one GPU and on two."""
    cell = Cell("topk", history, 0.0)
    for name, group in (("1 GPU", timed["replicas"].group), ("tensor parallel, 2 GPUs", timed["tp"].group)):
        every = group.pipes
        group.pipes = every[:1]
        try:
            found = group.tell("step", first_only=True)[0]
            record.measurements += [dataclasses.replace(m, name=f"{m.name}, {name}") for m in found]
            note_load(record, f"{cell}, one engine, {name}", group.run(cell, seconds)["requests/s"])
        finally:
            group.pipes = every


def replicas_of_two(record: Record, group: Replicas, history: int, seconds: float) -> None:
    """Requests/s of half of the replicas, which share one GPU, and of all."""
    every = group.pipes
    for task in TASKS:
        cell = Cell(task, history, 0.0)
        for count in (len(every) // 2, len(every)):
            group.pipes = every[::2] if count < len(every) else every
            try:
                rate = group.run(cell, seconds)["requests/s"]
            finally:
                group.pipes = every
            note_load(record, f"{cell}, {count} engines, {1 + (count == len(every))} GPU(s)", rate)


def asynchronous(record: Record, timed: dict[str, Served], history: int, seconds: float) -> None:
    """Requests/s through vLLM's asynchronous front end, over one engine and two."""
    for name, served in (("1 GPU", timed["dp1"]), ("data parallel, 2 GPUs", timed["dp2"])):
        cell = Cell("topk", history, 0.0)
        if served.up:
            note_load(record, f"{cell}, vLLM's front end, {name}", served.group.ask((cell, 256, seconds)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=None, help="folder for the record (default: data/measured)")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of one load")
    parser.add_argument("--note", default="", help="what readers of the record must know of this machine")
    parser.add_argument("--cpu", action="store_true", help="a tiny model without GPUs, to try this program; no record")
    arguments = parser.parse_args()
    if arguments.cpu:
        with tempfile.TemporaryDirectory() as out:
            run(pathlib.Path(out), arguments.seconds, CPU, CPU, "small", 1, torch.float32, 96, patience=400)
    elif torch.cuda.device_count() < 2:
        raise SystemExit(f"{torch.cuda.device_count()} GPUs are visible: this needs two")
    else:
        run(arguments.out, arguments.seconds, note=arguments.note)


if __name__ == "__main__":
    main()
