"""Load for the service: visits as the log has them, at random times (open loop) or by a number of clients (closed loop).

An open loop sends when a user would come, answered or not, and counts from that moment, so that a stalled server cannot hide
its queue. A closed loop waits for answers: it finds the peak, and says little about latency. Only loopback addresses are
accepted, and every run is bounded in requests and seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import math
import random
import time
import urllib.parse
from collections.abc import Sequence

import aiohttp

from hstu_lab.config import ACTIONS
from hstu_lab.event_log import EventLog
from hstu_lab.server import is_loopback
from hstu_lab.telemetry import Histogram

MOST_REQUESTS, MOST_SECONDS = 200_000, 3_600
KV_USAGE = "vllm:kv_cache_usage_perc"
PREFIX_HITS, PREFIX_QUERIES = "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"


class LoadError(ValueError):
    """A load that is refused, or a service that cannot be reached; the message names the field and the remedy."""


@dataclasses.dataclass(frozen=True)
class Visit:
    """A user comes with the first `length` events of the history that the log has."""

    user: int
    length: int


def visits(log: EventLog) -> list[Visit]:
    """Every session of the log as a visit at its start, in order of time: lengths and return rate are the log's own."""
    found = []
    for user in range(len(log)):
        history = log.history(user)
        starts = [i for i in range(1, len(history)) if history.sessions[i] != history.sessions[i - 1]]
        found += [(int(history.timestamps[i - 1]), user, i) for i in [*starts, len(history)]]
    return [Visit(user, length) for _, user, length in sorted(found)]


def return_rate(sample: Sequence[Visit]) -> float:
    """Share of the visits whose user has been here before."""
    return 1 - len({visit.user for visit in sample}) / len(sample) if sample else math.nan


def bodies(log: EventLog, number: int, *, task: str = "topk", deadline_ms: int = 1000, seed: int = 0) -> list[dict]:
    """`number` consecutive visits from a random moment of the log (the log again where it ends) as bodies of `/recommend`."""
    every = visits(log)
    start = random.Random(seed).randrange(max(len(every) - number, 1))
    return [_body(log, visit, task, deadline_ms) for visit in itertools.islice(itertools.cycle(every), start, start + number)]


def _body(log: EventLog, visit: Visit, task: str, deadline_ms: int) -> dict:
    history = log.history(visit.user)[: visit.length]
    rows = zip(history.items.tolist(), history.actions.tolist(), history.timestamps.tolist())
    events = [{"item": log.catalog.ids[i], "action": ACTIONS[a], "timestamp": t} for i, a, t in rows]
    return {"user": str(history.user), "events": events, "task": task, "deadline_ms": deadline_ms}


@dataclasses.dataclass
class LoadResult:
    """What became of a run. Latencies (ms) are those of answers, from the moment that the request was due."""

    mode: str
    offered: float
    seconds: float = 0.0
    outcomes: dict[str, int] = dataclasses.field(default_factory=dict)
    latency: Histogram = dataclasses.field(default_factory=Histogram)
    kv_usage: float = 0.0
    prefix_hits: float = 0.0

    @property
    def sent(self) -> int:
        return sum(self.outcomes.values())

    @property
    def goodput(self) -> float:
        """Answers a second that came within their deadline."""
        return self.outcomes.get("200", 0) / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict:
        """offered (requests/s, or clients of a closed loop), goodput (answers/s), ms percentiles, outcomes, and of vLLM the
        peak share of the KV cache held by requests and the share of prompt tokens found in it."""
        p50, p95, p99 = self.latency.percentiles() if self.latency.count else (math.nan,) * 3
        return {
            "mode": self.mode, "offered": self.offered, "sent": self.sent, "seconds": self.seconds, "goodput": self.goodput,
            "p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "outcomes": self.outcomes, "kv_usage": self.kv_usage,
            "prefix_hits": self.prefix_hits,
        }  # fmt: skip


class Client:
    """Sends to one service: `base` is http://127.0.0.1:PORT, `token` its bearer token. An asynchronous context manager."""

    def __init__(self, base: str, token: str | None = None):
        parts = urllib.parse.urlsplit(base)
        if parts.scheme != "http" or not is_loopback(parts.hostname or ""):
            raise LoadError(f"url {base!r}: load is sent to this machine only, give http://127.0.0.1:PORT")
        self.base, self.headers = base.rstrip("/"), {"Authorization": f"Bearer {token}"} if token else {}

    async def __aenter__(self) -> Client:
        timeout = aiohttp.ClientTimeout(total=90)
        self.session = aiohttp.ClientSession(headers=self.headers, connector=aiohttp.TCPConnector(limit=0), timeout=timeout)
        return self

    async def __aexit__(self, *_) -> None:
        await self.session.close()

    async def send(self, body: dict, path: str = "/recommend") -> str:
        """The outcome: a status as text, or "lost" where the connection broke."""
        try:
            async with self.session.post(self.base + path, json=body) as answer:
                await answer.read()
                return str(answer.status)
        except (aiohttp.ClientError, TimeoutError, ConnectionError):
            return "lost"

    async def check(self) -> dict:
        """What /ready says. Raises LoadError where the service is not ready."""
        try:
            async with self.session.get(f"{self.base}/ready") as answer:
                said = await answer.json()
        except (aiohttp.ContentTypeError, ValueError) as error:
            raise LoadError(f"url {self.base}: something else answers there (status {answer.status}, no JSON)") from error
        except (aiohttp.ClientError, TimeoutError) as error:
            raise LoadError(
                f"url {self.base}: no service answers ({error}); start one with `python -m hstu_lab serve`"
            ) from error
        if answer.status != 200:
            why = said.get("error", {}).get("message", f"something else answers there (status {answer.status})")
            remedy = {401: "; set HSTU_LAB_TOKEN", 503: "; wait until /ready is green"}.get(answer.status, "")
            raise LoadError(f"url {self.base}: {why}{remedy}")
        return said

    async def metrics(self, *names: str) -> list[float]:
        """Sums over the labels of /metrics' samples of those names; 0 where there is none."""
        lines = []
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with self.session.get(f"{self.base}/metrics") as answer:
                lines = (await answer.text()).splitlines()
        return [sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{n} ", f"{n}{{"))) for n in names]


async def _send(client: Client, body: dict, due: float, result: LoadResult) -> None:
    outcome = await client.send(body)
    if outcome == "200":
        result.latency.add(max((time.monotonic() - due) * 1e3, 0.0))
    result.outcomes[outcome] = result.outcomes.get(outcome, 0) + 1


@contextlib.asynccontextmanager
async def _measured(client: Client, result: LoadResult):
    async def watch() -> None:
        while True:
            result.kv_usage = max(result.kv_usage, *await client.metrics(KV_USAGE))
            await asyncio.sleep(0.25)

    before = await client.metrics(PREFIX_HITS, PREFIX_QUERIES)
    start, watcher = time.monotonic(), asyncio.create_task(watch())
    try:
        yield
    finally:
        result.seconds = time.monotonic() - start
        watcher.cancel()
        hits, queries = (b - a for a, b in zip(before, await client.metrics(PREFIX_HITS, PREFIX_QUERIES)))
        result.prefix_hits = hits / queries if queries else 0.0


def _bounded(seconds: float, requests: float) -> None:
    if not 0 < seconds <= MOST_SECONDS:
        raise LoadError(f"seconds is {seconds}: give more than 0 and at most {MOST_SECONDS}")
    if not 0 < requests <= MOST_REQUESTS:
        raise LoadError(f"{requests:.0f} requests are asked for: give 1 to {MOST_REQUESTS:,}, by a lower rate or fewer seconds")


async def open_loop(client: Client, sample: Sequence[dict], rate: float, seconds: float, *, seed: int = 0) -> LoadResult:
    """Poisson arrivals of `rate` requests/s for `seconds`; then waits for the answers that are out. Bodies are taken in turn."""
    _bounded(seconds, rate * seconds)
    choose, result, tasks = random.Random(seed), LoadResult("open", rate), []
    source = itertools.cycle(sample)
    async with _measured(client, result):
        start = due = time.monotonic()
        while (due := due + choose.expovariate(rate)) < start + seconds:
            await asyncio.sleep(max(due - time.monotonic(), 0))
            tasks.append(asyncio.create_task(_send(client, next(source), due, result)))
        await asyncio.gather(*tasks)
    return result


async def closed_loop(client: Client, sample: Sequence[dict], clients: int, seconds: float) -> LoadResult:
    """`clients` that each send their next request when the last one is answered."""
    _bounded(seconds, clients)
    result, source, end = LoadResult("closed", clients), itertools.cycle(sample), time.monotonic() + seconds

    async def one() -> None:
        while time.monotonic() < end and result.sent < MOST_REQUESTS:
            await _send(client, next(source), time.monotonic(), result)

    async with _measured(client, result):
        await asyncio.gather(*(one() for _ in range(clients)))
    return result


def knee(rows: Sequence[dict], limit_ms: float, *, most_refused: float = 0.01) -> float:
    """The highest offered rate up to which every row has p99 <= limit_ms and at most that share unanswered; 0 if none has."""
    best = 0.0
    for row in sorted(rows, key=lambda row: row["offered"]):
        refused = 1 - row["outcomes"].get("200", 0) / max(row["sent"], 1)
        if not row["p99_ms"] <= limit_ms or refused > most_refused:
            break
        best = row["offered"]
    return best


async def sweep(client: Client, sample: Sequence[dict], rates: Sequence[float], seconds: float, *, report=print) -> list[dict]:
    """An open loop at each rate, lowest first, one line of `report` each; rows as `LoadResult.to_dict`."""
    rows = []
    for rate in sorted(rates):
        row = (await open_loop(client, sample, rate, seconds, seed=int(rate))).to_dict()
        rows.append(row)
        report(line(row))
    return rows


def line(row: dict) -> str:
    """One row as text."""
    outcomes = ", ".join(f"{name}: {count}" for name, count in sorted(row["outcomes"].items()))
    unit = "clients" if row["mode"] == "closed" else "req/s  "
    return (
        f"{row['offered']:8.4g} {unit} goodput {row['goodput']:7.1f}/s  p50 {row['p50_ms']:7.1f}  p95 {row['p95_ms']:7.1f}  "
        f"p99 {row['p99_ms']:7.1f} ms  KV {row['kv_usage']:4.1%}  "
        f"found {row['prefix_hits']:4.0%}  {outcomes}"
    )
