"""Trouble for a running service, and the account of what became of every request. Loopback only, bounded, stops by itself."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import json
import os
import pathlib
import random
import signal
import time

import aiohttp
from serving import EVENT, TOKEN, Served, running

from hstu_lab.load import bodies

MOST, LONGEST_START = 16, 400
KV_CACHE_MB = 32
"""Small, so that it is soon resident as a whole: memory that grows is then a leak and no page touched for the first time."""
ANSWERED = {"200", "422", "429", "503", "504"}
"""What a request that was sent and read to the end may become; anything else is a crash or a lost request."""
JUNK = (
    b"",
    b"{",
    b"null",
    b"[[[[",
    b'{"user": 1e999}',
    b"\xff",
    b'{"user": "u1", "events": [{"item": 3}]}',
    b'{"user": "\\ud800"}',
)


@dataclasses.dataclass
class Account:
    """Outcomes by kind of request, and what went wrong."""

    outcomes: dict[str, collections.Counter] = dataclasses.field(default_factory=dict)
    faults: list[str] = dataclasses.field(default_factory=list)
    kills: int = 0
    recoveries: list[float] = dataclasses.field(default_factory=list)
    memory: dict[str, list[int]] = dataclasses.field(default_factory=lambda: collections.defaultdict(list))

    @property
    def requests(self) -> int:
        return sum(sum(counter.values()) for counter in self.outcomes.values())

    def note(self, kind: str, outcome: str, allowed: set[str] = ANSWERED) -> None:
        self.outcomes.setdefault(kind, collections.Counter())[outcome] += 1
        if outcome not in allowed:
            self.faults.append(f"{kind}: {outcome}")

    def __str__(self) -> str:
        lines = [
            f"  {kind:<16} " + ", ".join(f"{o}: {n}" for o, n in sorted(c.items())) for kind, c in sorted(self.outcomes.items())
        ]
        lines.append(f"  {self.kills} kills of the engine, back after {', '.join(f'{s:.1f} s' for s in self.recoveries) or '-'}")
        for name, sizes in self.memory.items():
            lines.append(f"  memory of the {name}: {sizes[len(sizes) // 4] >> 20} MiB warm, in the end {sizes[-1] >> 20} MiB")
        return "\n".join(lines)


def resident(pid: int) -> int:
    """Bytes of a process."""
    return int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Trouble:
    """Sends to one server; `run` for some seconds, then `settle`."""

    def __init__(self, server: Served, session: aiohttp.ClientSession, sample: list[dict], seed: int):
        self.server, self.session, self.sample = server, session, sample
        self.choose, self.account, self.first = random.Random(seed), Account(), {}

    async def post(
        self, kind: str, body: dict | None = None, raw: bytes | None = None, allowed: set[str] = ANSWERED
    ) -> dict | None:
        data = json.dumps(body).encode() if raw is None else raw
        try:
            async with self.session.post(f"{self.server.base}/recommend", data=data) as answer:
                text = await answer.json()
                if answer.status != 200 and not text["error"]["message"]:
                    self.account.faults.append(f"{kind}: {answer.status} without a message")
                if answer.status in (429, 503) and "Retry-After" not in answer.headers:
                    self.account.faults.append(f"{kind}: {answer.status} without Retry-After")
                self.account.note(kind, str(answer.status), allowed)
                return text if answer.status == 200 else None
        except (aiohttp.ClientError, TimeoutError, ConnectionError, ValueError) as error:
            self.account.note(kind, f"lost ({type(error).__name__})")
            return None

    def valid(self, **changes) -> dict:
        return self.choose.choice(self.sample) | {"task": self.choose.choice(["topk", "slate"]), "deadline_ms": 20_000} | changes

    async def steady(self) -> None:
        """A client that asks, reads, and asks again; the same question must get the same answer, also after a restart."""
        while time.monotonic() < self.end:
            body = self.valid()
            answer = await self.post("steady", body)
            if answer is None:
                await asyncio.sleep(0.5)
                continue
            key = json.dumps([body["user"], body["task"], len(body["events"])])
            items = [item["item_id"] for item in answer["items"]]
            if self.first.setdefault(key, items) != items:
                self.account.faults.append(f"the answer to {key} changed")

    async def overload(self) -> None:
        await asyncio.gather(*(self.post("10x overload", self.valid()) for _ in range(10 * MOST)))

    async def malformed(self) -> None:
        await asyncio.gather(*(self.post("malformed", raw=raw, allowed={"400", "422"}) for raw in JUNK))

    async def deadlines(self) -> None:
        await asyncio.gather(*(self.post("1 ms deadline", self.valid(deadline_ms=1)) for _ in range(8)))

    async def long_histories(self) -> None:
        long = [EVENT | {"timestamp": 1_600_000_000 + i} for i in range(3_000)]
        await asyncio.gather(*(self.post("3,000 events", self.valid(events=long)) for _ in range(2)))
        await self.post("10,001 events", self.valid(events=[EVENT] * 10_001), allowed={"422"})
        await self.post("9 MB", raw=b" " * (9 << 20), allowed={"413"})

    async def disconnects(self) -> None:
        async def leave() -> None:
            try:
                await asyncio.wait_for(self.post("left early", self.valid(task="slate")), self.choose.uniform(0.001, 0.03))
            except TimeoutError:
                self.account.note("left early", "left", {"left"})

        await asyncio.gather(*(leave() for _ in range(8)))

    async def ready(self) -> dict | None:
        async with self.session.get(f"{self.server.base}/ready") as answer:
            return await answer.json() if answer.status == 200 else None

    async def kill(self) -> None:
        """kill -9 of the engine process: readiness must turn red, then green again by itself."""
        if not (up := await self.ready()):
            return
        os.kill(up["pid"], signal.SIGKILL)
        self.account.kills += 1
        killed, red = time.monotonic(), False
        while time.monotonic() - killed < LONGEST_START:
            await asyncio.sleep(0.05)
            now = await self.ready()
            red = red or now is None
            if now and now["pid"] != up["pid"]:
                self.account.recoveries.append(time.monotonic() - killed)
                self.end = max(self.end, time.monotonic() + self.seconds / 3)
                break
        else:
            self.account.faults.append(f"the engine did not come back within {LONGEST_START} s")
        if not red:
            self.account.faults.append("readiness stayed green although the engine was killed")

    async def run(self, seconds: float, kills: int, report=None) -> None:
        """Steady traffic, with each kind of trouble in turn; the kills fall into the first half, memory is watched after them.

        Where an engine takes long to come back, the run is prolonged by up to a third of its time.
        """
        start = said = time.monotonic()
        self.seconds, self.end = seconds, start + seconds
        steady = [asyncio.create_task(self.steady()) for _ in range(3)]
        due = [start + seconds * (0.5 * (i + 0.5) / kills) for i in range(kills)]
        killing, kinds = [], [self.overload, self.malformed, self.deadlines, self.long_histories, self.disconnects]
        turn = 0
        while time.monotonic() < self.end or any(not task.done() for task in killing):
            if due and time.monotonic() > due[0] and all(task.done() for task in killing):
                due.pop(0)
                killing.append(asyncio.create_task(self.kill()))
            await kinds[turn % len(kinds)]()
            turn += 1
            if not due and all(task.done() for task in killing) and turn % len(kinds) == 0:
                self.weigh(await self.ready())
            if report and time.monotonic() - said > 30:
                said = time.monotonic()
                report(f"{said - start:6.0f} s  {self.account.requests} requests, {len(self.account.faults)} faults")
            # An engine that starts needs the processor that our refused requests would take.
            await asyncio.sleep(0.3 if all(task.done() for task in killing) else 3)
        await asyncio.gather(*steady, *killing)
        self.account.faults += [f"{kind.__name__} never ran" for kind in kinds[turn:]]

    def weigh(self, up: dict | None) -> None:
        self.account.memory["server"].append(resident(self.server.process.pid))
        if up:
            self.account.memory[f"engine (process {up['pid']})"].append(resident(up["pid"]))

    async def settle(self) -> None:
        """After the trouble: nothing is in flight, in the server or in vLLM, and a request is answered."""
        end = time.monotonic() + 30
        names = ("hstu_in_flight", "vllm:num_requests_running", "vllm:num_requests_waiting")
        while (left := {n: await asyncio.to_thread(self.server.metric, n) for n in names}) and any(left.values()):
            if time.monotonic() > end:
                self.account.faults.append(f"still busy: {left}")
                break
            await asyncio.sleep(0.5)
        await self.post("afterwards", self.valid(), allowed={"200"})
        if "vllm:num_requests_running" not in (await asyncio.to_thread(self.server.call, "/metrics"))[2]:
            self.account.faults.append("/metrics lacks vLLM's own")
        for name, sizes in self.account.memory.items():
            warm = sizes[len(sizes) // 4]
            if sizes[-1] - warm > max(64 << 20, 0.05 * warm):
                self.account.faults.append(f"memory of the {name} grew by {(sizes[-1] - warm) >> 20} MiB")


def soak(checkpoint, log, seconds: float, *, strategy: str = "vllm", kills: int = 1, seed: int = 0, report=None) -> Account:
    """Serve `checkpoint` and trouble it for `seconds` with visits of `log`; the account says whether it held."""
    sample = bodies(log, 100, seed=seed)

    async def every(server: Served) -> Account:
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        timeout = aiohttp.ClientTimeout(total=60)
        async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
            trouble = Trouble(server, session, sample, seed)
            await trouble.run(seconds, kills, report)
            await trouble.settle()
            return trouble.account

    environment = {"HSTU_LAB_KV_CACHE_MB": str(KV_CACHE_MB)}
    with running(checkpoint, "--max-in-flight", MOST, strategy=strategy, environment=environment) as server:
        server.wait_ready(LONGEST_START)
        account = asyncio.run(every(server))
        if server.process.poll() is not None:
            account.faults.append(f"the server ended with status {server.process.returncode}")
    if server.process.returncode:
        account.faults.append(f"after SIGTERM the server's status was {server.process.returncode}")
    return account
