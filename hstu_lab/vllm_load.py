"""Load on one engine in this process: requests of one kind, closed-loop (always so many in flight) or open-loop (Poisson).

Callbacks run in the engine's own thread, so that a closed loop costs no switch between threads.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import json
import math
import pathlib
import random
import threading
import time
from collections.abc import Callable

import torch
from safetensors.torch import save_file
from torch import nn

from hstu_lab.config import TASK_NAMES, ModelConfig, preset
from hstu_lab.model import EventEncoder, HSTUStack, SavedConfig, TaskHeads
from hstu_lab.tokens import level_seconds, pack

FIRST_WAVE_SECONDS = 120.0
TASKS = dict(zip(TASK_NAMES, (100, 10), strict=True))
"""Items that one request asks for."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One kind of load: `history` events a request, of which `warm` (a share) are cached from that user's last visit."""

    task: str
    history: int
    warm: float

    def __str__(self) -> str:
        return f"{self.task} history={self.history} {'cold' if not self.warm else f'{self.warm:.0%} warm'}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Latencies in seconds of the requests that finished in the window of `seconds`, and the mean share of cached tokens.

    `compiled`: kernels that were compiled since the window began, by name. They kept the requests waiting.
    """

    seconds: float
    latencies: list[float]
    cached: float
    compiled: tuple[str, ...] = ()


class Users:
    """Prompts without end. Warm ones go round `count` users: the same first events each time, new ones behind them."""

    def __init__(self, config: ModelConfig, cell: Cell, count: int, seed: int = 0):
        draw = random.Random(seed)
        self.config, self.draw = config, draw
        self.kept = int(cell.history * cell.warm)
        self.fresh = cell.history - self.kept
        # The kernel for whole prompts takes histories of less than 2^31 seconds.
        self.levels = bisect.bisect(level_seconds(config.num_time_levels), (2**31 - 1) // config.max_seq_len)
        self.base = [self._events(self.kept) for _ in range(count)] if self.kept else [[]]
        self.tail = self._events(self.fresh)
        self.turn = itertools.cycle(range(len(self.base)))

    def _events(self, count: int) -> list[int]:
        c, draw = self.config, self.draw
        return [pack(draw.randrange(1, c.num_items), draw.randrange(1, c.num_actions), draw.randrange(self.levels), c)
                for _ in range(count)]  # fmt: skip

    def __next__(self) -> list[int]:
        # A first event of its own makes every block behind it new to the prefix cache.
        return self.base[next(self.turn)] + self._events(1) + self.tail[1:]


def random_histories(config: ModelConfig, count: int, length: int, seed: int) -> list[list[int]]:
    """So many cold prompts of `length` events."""
    users = Users(config, Cell("topk", length, 0.0), 1, seed)
    return [users._events(length) for _ in range(count)]


def seconds_of(run: Callable[[], object], repeats: int, clock: Callable[[], float] = time.perf_counter) -> tuple[float, ...]:
    """Seconds that each of so many runs took by that clock."""
    samples = []
    for _ in range(repeats):
        start = clock()
        run()
        samples.append(clock() - start)
    return tuple(samples)


def submit(engine, cell: Cell, prompt: list[int]):
    send = engine.submit_topk if cell.task == "topk" else engine.submit_slate
    return send(prompt, [], TASKS[cell.task])


def fill(engine, cell: Cell, users: Users) -> None:
    """Visit every user once, so that the warm part of the histories is cached."""
    if users.kept:
        for future in [submit(engine, Cell("topk", cell.history, cell.warm), next(users)) for _ in users.base]:
            future.result()


def closed_loop(
    engine, cell: Cell, users: Users, in_flight: int, seconds: float, when: Callable[[], float] = time.perf_counter
) -> Outcome:
    """Keep `in_flight` requests in the engine; count those that finish within `seconds` once the first of each is answered.

    So a kernel that is compiled for the first of them is no part of the rate. `when` is asked then, and tells at which
    `time.perf_counter()` to begin. Raises RuntimeError where the first answers do not come within FIRST_WAVE_SECONDS.
    """
    latencies, shares, through, finished = [], [], threading.Event(), threading.Event()
    begin = end = math.inf
    left, answered = [in_flight], itertools.count(1)

    def send(first: bool = False) -> None:
        prompt, sent = next(users), time.perf_counter()
        submit(engine, cell, prompt).add_done_callback(lambda future: done(future, sent, len(prompt), first))

    def done(future, sent: float, tokens: int, first: bool) -> None:
        now = time.perf_counter()
        if begin <= now < end:
            latencies.append(now - sent)
            shares.append(future.result().cached_tokens / tokens)
        if first and next(answered) == in_flight:
            through.set()
        if now < end:
            send()
        else:
            left[0] -= 1
            if not left[0]:
                finished.set()

    for _ in range(in_flight):
        send(first=True)
    if not through.wait(FIRST_WAVE_SECONDS):
        end = -math.inf
        raise RuntimeError(f"{cell}: {next(answered) - 1} of the first {in_flight} answers within {FIRST_WAVE_SECONDS:.0f} s")
    start = when()
    begin, end = start, start + seconds
    finished.wait()
    return Outcome(seconds, latencies, sum(shares) / max(len(shares), 1))


def open_loop(engine, cell: Cell, users: Users, rate: float, seconds: float, seed: int = 0) -> Outcome:
    """Poisson arrivals at `rate` a second, whether or not the engine keeps up; latencies count from the planned arrival."""
    draw, latencies, shares, waiting = random.Random(seed), [], [], []

    def done(planned: float, tokens: int, future) -> None:
        latencies.append(time.perf_counter() - planned)
        shares.append(future.result().cached_tokens / tokens)

    now = begin = time.perf_counter()
    while True:
        now += draw.expovariate(rate)
        if now > begin + seconds:
            break
        prompt = next(users)
        while (left := now - time.perf_counter()) > 0:
            time.sleep(left)
        future = submit(engine, cell, prompt)
        future.add_done_callback(functools.partial(done, now, len(prompt)))
        waiting.append(future)
    for future in waiting:
        future.result()
    return Outcome(seconds, latencies, sum(shares) / max(len(shares), 1))


# ---- a model to load


def serving_config(name: str = "gr-3b", **changes) -> ModelConfig:
    """The preset without side features and users: the stack, the item table and the heads, which is what the engine holds."""
    return preset(name).replace(num_users=0, side_features=(), **changes)


def random_checkpoint(config: ModelConfig, folder: pathlib.Path, dtype: torch.dtype, device: str = "cpu") -> pathlib.Path:
    """A checkpoint of random weights that vLLM can load, written to `folder`; biases and tables are no zeros."""
    with torch.random.fork_rng([] if device == "cpu" else None), torch.device(device):
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
