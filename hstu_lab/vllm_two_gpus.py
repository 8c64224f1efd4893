"""Measure one model on two GPUs and write what was seen to data/measured/<device>/vllm_two_gpus.json.

    python -m hstu_lab.vllm_two_gpus [--out FOLDER] [--seconds 1] [--only PART,PART] [--patience 240] [--cpu]

Two ways are vLLM's own: tensor parallel (every GPU holds half of each layer's heads) and data parallel (an engine a GPU behind
one asynchronous front end). The third is an engine's process after another, half of them on each GPU. All must answer alike.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import os
import pathlib
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence

import torch

from hstu_lab import measure
from hstu_lab.measure import Record
from hstu_lab.model import load_config
from hstu_lab.vllm_bench import OPTIONS
from hstu_lab.vllm_engine import ENVIRONMENT, EngineOptions, engine_arguments, loop_sizes
from hstu_lab.vllm_load import TASKS, Cell, Users, random_checkpoint, random_histories, serving_config
from hstu_lab.vllm_replicas import IN_FLIGHT, Replicas, end_on_sigterm, keep, replica, resumed, run_parts, run_until_answered

PARTS = ("answers", "steps", "tensor", "data", "replicas")
"""In this order: equal lists; steps of tensor parallelism, and its rates; those of data parallelism and of engines apart."""
TURNS = 3
"""Loads by which two ways are compared, in turns; one before them meets what is compiled, or read from disk, at first use."""
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
        self.options, self.size, self.turn = options, size, 0

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
        """Requests a second, so many always in flight for each engine, over at least `seconds` and as many answers.

        The clock starts when each place has been answered twice: whatever had to be compiled is.
        """
        in_flight *= self.size
        users, times, first = Users(config, cell, 1), [], 2 * in_flight - 1

        def over() -> bool:
            return len(times) > first + in_flight and times[-1] - times[first] >= seconds

        async def one() -> None:
            while not over():
                await self.topk(next(users), TASKS["topk"])
                if not over():
                    times.append(time.perf_counter())

        await asyncio.gather(*(one() for _ in range(in_flight)))
        return (len(times) - 1 - first) / (times[-1] - times[first])


def data_parallel(connection, folder: pathlib.Path, options: EngineOptions, size: int) -> None:
    """A process with vLLM's data parallelism over `size` engines: answers lists, or takes load."""

    async def serve() -> None:
        engine, config = DataParallel(folder, options, size), load_config(folder)
        await engine.start()
        await asyncio.gather(*(engine.topk(p, 100) for p in random_histories(config, 64, config.max_history // 2, size)))
        connection.send("ready")
        while (order := await asyncio.to_thread(connection.recv)) is not None:
            word, *arguments = order
            if word == "lists":
                connection.send([await asyncio.gather(*(engine.topk(prompt, 20) for prompt in arguments[0]))])
            else:
                connection.send(await engine.load(config, *arguments))
        engine.engine.shutdown()

    try:
        asyncio.run(serve())
    except Exception as error:
        traceback.print_exc()
        with contextlib.suppress(OSError):
            connection.send(f"failed: {error!r}")


class TwoGpus:
    """Every way to run one model on two GPUs; each part is a method, and independent of the others' failures.

    The engines that are compared start together, and each part waits for its own, until `patience` seconds after the start. The
    independent engines, which are many, start when the others have gone: then all processors, and both GPUs, are theirs.
    """

    def __init__(
        self, root: pathlib.Path, seconds: float, out: pathlib.Path | None, note: str = "", exact: EngineOptions = EXACT,
        options: EngineOptions = OPTIONS, preset: str = "gr-3b", replicas: int = 4, dtype: torch.dtype = torch.bfloat16,
        histories: Sequence[int] = (512, 2000), patience: float = 240, only: Sequence[str] = PARTS,
    ):  # fmt: skip
        if unknown := set(only) - set(PARTS):
            raise SystemExit(f"--only {sorted(unknown)[0]}: there are {', '.join(PARTS)}")
        self.only, self.seconds, self.out, self.count, self.options = only, seconds, out, replicas, options
        self.cells = [Cell(task, histories[0], 0.0) for task in TASKS]
        self.long = Cell("topk", histories[-1], 0.0)
        self.record = Record.here("vllm_two_gpus", command=f"python -m hstu_lab.vllm_two_gpus --seconds {seconds}", note=note)
        if set(only) != set(PARTS):
            self.record = resumed(self.record, out)
        self.record.data |= {
            "options": dataclasses.asdict(options), "exact": dataclasses.asdict(exact), "replicas a GPU": replicas,
            "parts": self.record.data.get("parts", {}) | dict.fromkeys(only, "not reached"),
        }  # fmt: skip
        self.small = random_checkpoint(serving_config("small"), root / "small", torch.float32)
        self.large = random_checkpoint(serving_config(preset), root / preset, dtype)
        self.start, self.patience, self.up = time.monotonic(), patience, {}
        two = functools.partial(dataclasses.replace, tensor_parallel_size=2)
        ways = {
            "answers": {
                "one engine": self._engine(self.small, exact),
                "tensor parallel, 2 GPUs": self._engine(self.small, two(exact)),
                "data parallel, 2 GPUs": (data_parallel, self.small, exact, 2),
            },
            "tensor": {"1 GPU": self._engine(self.large, options), "2 GPUs": self._engine(self.large, two(options))},
            "data": {"1 GPU": (data_parallel, self.large, options, 1), "2 GPUs": (data_parallel, self.large, options, 2)},
        }
        self.ways = {
            part: {
                name: Replicas(1, lambda _, arguments=arguments: arguments, target, daemon=False, patience=patience / 3)
                for name, (target, *arguments) in each.items()
            }
            for part, each in ways.items()
            if part in only or (part == "tensor" and "steps" in only)
        }

    def _engine(self, folder: pathlib.Path, options: EngineOptions, number: int = 0, total: int = 1, gpu: int | None = None):
        return replica, folder, options, number, total, gpu, [*self.cells, self.long]

    def run(self) -> list[str]:
        """Every part of `only`; those that failed."""
        try:
            return run_parts({part: getattr(self, part) for part in PARTS if part in self.only}, self.start, self._note)
        finally:
            self._close()

    def _note(self, part: str, error: Exception | None) -> None:
        missing = self.record.data.get("not up in time", {}).get(part, [])
        measured = f"measured without {', '.join(missing)}" if missing else "measured"
        self.record.data["parts"][part] = f"failed: {error}" if error else measured
        measure.write_record(self.record, self.out)

    def _close(self) -> None:
        groups = [group for each in self.ways.values() for group in each.values()]
        for member in (member for group in groups for member in group.every):
            member.send(None)
        deadline = time.monotonic() + 5
        for group in groups:
            group.close(deadline)
        self.ways.clear()

    def _ready(self, part: str) -> dict[str, Replicas]:
        """The engines of a part that are up in time; what keeps the others is printed."""
        if part in self.up:
            return self.up[part]
        for name, group in self.ways[part].items():
            print(f"{part}: {name}", end=": ", flush=True)
            with contextlib.suppress(RuntimeError):
                group.start(max(self.start + self.patience - time.monotonic(), 0))
        late = self.record.data.setdefault("not up in time", {})
        late[part] = [name for name, group in self.ways[part].items() if group.every[0].gone]
        self.up[part] = {name: group for name, group in self.ways[part].items() if not group.every[0].gone}
        return self.up[part]

    def _rate(self, name: str, rate: float, samples: Sequence[float] = ()) -> None:
        self.record.data.setdefault("requests/s", {})[name] = rate
        if samples:
            self.record.data.setdefault("requests/s, each load", {})[name] = list(samples)
        print(f"{name:56s} {rate:7.0f} requests/s  {[round(x) for x in samples] or ''}", flush=True)

    def _load(self, cell: Cell, group: Replicas) -> float:
        seen = run_until_answered(group, cell, self.seconds)
        if names := seen.get("compiled"):
            print(f"{cell}: {', '.join(names)} compiled in its window", flush=True)
        return seen["requests/s"]

    def _compare(self, name: str, groups: Mapping[str, Replicas], once: Callable[[Replicas], float]) -> None:
        """The mean of what each says, in turns, so that whatever grows warm with time favours none."""
        rates = [{way: once(group) for way, group in groups.items()} for _ in range(1 + TURNS)][1:]
        for way in groups:
            samples = [turn[way] for turn in rates]
            self._rate(f"{name}, {way}", statistics.mean(samples), samples)

    def answers(self) -> None:
        """How many lists of each way equal the first way's, which is one engine on one GPU."""
        config = load_config(self.small)
        prompts = random_histories(config, 200, config.max_history // 2, 5)
        seen = {name: group.tell("lists", prompts)[0] for name, group in self._ready("answers").items()}
        expected = seen["one engine"]
        for name, answers in seen.items():
            for task, lists, wanted in zip(("topk", "slate"), answers, expected):
                equal = sum(a == b for a, b in zip(lists, wanted))
                self.record.data.setdefault("equal lists", {})[f"{name}, {task}"] = f"{equal} of {len(wanted)}"
                print(f"{name:28s} {task:6s} lists equal: {equal} of {len(wanted)}", flush=True)

    def steps(self) -> None:
        """Steps of one engine on one GPU and, tensor parallel, on two."""
        for name, group in self._ready("tensor").items():
            found = group.tell("step")[0]
            keep(self.record, [dataclasses.replace(m, name=f"{m.name}, one engine, {name}") for m in found])

    def tensor(self) -> None:
        """Requests/s of one engine on one GPU and, tensor parallel, on two."""
        groups = self._ready("tensor")
        for cell in (*self.cells, self.long):
            self._compare(f"{cell}, one engine", groups, functools.partial(self._load, cell))

    def data(self) -> None:
        """Requests/s through vLLM's asynchronous front end, over one engine and, data parallel, two."""
        groups = self._ready("data")
        for cell in (self.cells[0], self.long):
            self._compare(
                f"{cell}, vLLM's front end", groups, lambda g, cell=cell: g.tell("rate", cell, IN_FLIGHT, self.seconds)[0]
            )

    def replicas(self) -> None:
        """Requests/s of independent engines that share one GPU, and of as many on each of two."""
        self._close()
        total = 2 * self.count
        gpus = 2 if torch.cuda.device_count() > 1 else 1
        group = Replicas(
            total, lambda i: self._engine(self.large, self.options, i, total, i % gpus if gpus > 1 else None)[1:],
            patience=self.patience,
        )  # fmt: skip
        try:
            group.start(self.patience)
            for cell in self.cells:
                for members, on in ((group.every[::2], "1 GPU"), (group.every, f"{gpus} GPU(s)")):
                    seen = group.some(members).run(cell, self.seconds)
                    self._rate(f"{cell}, {seen['replicas']} engines, {on}", seen["requests/s"])
        finally:
            group.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=None, help="folder for the record (default: data/measured)")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of one load")
    parser.add_argument("--note", default="", help="what readers of the record must know of this machine")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--patience", type=float, default=240, help="seconds after the start that engines have to come up")
    parser.add_argument("--cpu", action="store_true", help="a tiny model without GPUs, to try this program; no record")
    arguments = parser.parse_args()
    if not arguments.cpu and torch.cuda.device_count() < 2:
        raise SystemExit(f"{torch.cuda.device_count()} GPUs are visible: this needs two")
    only = arguments.only.split(",")
    end_on_sigterm()
    with tempfile.TemporaryDirectory() as temporary:
        root = pathlib.Path(temporary)
        if arguments.cpu:
            bench = TwoGpus(root, arguments.seconds, root, "", CPU, CPU, "small", 1, torch.float32, (96, 200), 600, only)
        else:
            bench = TwoGpus(
                root, arguments.seconds, arguments.out, arguments.note, patience=arguments.patience, only=only
            )  # fmt: skip
        return 1 if bench.run() else 0


if __name__ == "__main__":
    raise SystemExit(main())
