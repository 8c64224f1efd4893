"""Load on one engine in this process: requests of one kind, closed-loop (always so many in flight) or open-loop (Poisson).

Callbacks run in the engine's own thread, so that a closed loop costs no switch between threads.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import random
import threading
import time

from hstu_lab.config import ModelConfig
from hstu_lab.tokens import pack

TASKS = {"topk": 100, "slate": 10}
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
    """Latencies in seconds of the requests that finished in the window of `seconds`, and the mean share of cached tokens."""

    seconds: float
    latencies: list[float]
    cached: float


class Users:
    """Prompts without end. Warm ones go round `count` users: the same first events each time, new ones behind them."""

    def __init__(self, config: ModelConfig, cell: Cell, count: int, seed: int = 0):
        draw = random.Random(seed)
        self.config, self.draw = config, draw
        self.kept = int(cell.history * cell.warm)
        self.fresh = cell.history - self.kept
        self.base = [self._events(self.kept) for _ in range(count)] if self.kept else [[]]
        self.tail = self._events(self.fresh)
        self.turn = itertools.cycle(range(len(self.base)))

    def _events(self, count: int) -> list[int]:
        c, draw = self.config, self.draw
        return [pack(draw.randrange(1, c.num_items), draw.randrange(1, c.num_actions), draw.randrange(c.num_time_levels), c)
                for _ in range(count)]  # fmt: skip

    def __next__(self) -> list[int]:
        # A first event of its own makes every block behind it new to the prefix cache.
        return self.base[next(self.turn)] + self._events(1) + self.tail[1:]


def submit(engine, cell: Cell, prompt: list[int]):
    send = engine.submit_topk if cell.task == "topk" else engine.submit_slate
    return send(prompt, [], TASKS[cell.task])


def fill(engine, cell: Cell, users: Users) -> None:
    """Visit every user once, so that the warm part of the histories is cached."""
    if users.kept:
        for future in [submit(engine, Cell("topk", cell.history, cell.warm), next(users)) for _ in users.base]:
            future.result()


def closed_loop(engine, cell: Cell, users: Users, in_flight: int, seconds: float, ramp: float = 0.5) -> Outcome:
    """Keep `in_flight` requests in the engine. Once all are there, count those that finish in the `seconds` after `ramp`."""
    latencies, shares, finished = [], [], threading.Event()
    begin = end = math.inf
    left = [in_flight]

    def send() -> None:
        prompt, sent = next(users), time.perf_counter()
        submit(engine, cell, prompt).add_done_callback(lambda future: done(future, sent, len(prompt)))

    def done(future, sent: float, tokens: int) -> None:
        now = time.perf_counter()
        if begin <= now < end:
            latencies.append(now - sent)
            shares.append(future.result().cached_tokens / tokens)
        if now < end:
            send()
        else:
            left[0] -= 1
            if not left[0]:
                finished.set()

    for _ in range(in_flight):
        send()
    # Not before: on a busy machine the first may have come back before the last is sent.
    begin = time.perf_counter() + ramp
    end = begin + seconds
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
