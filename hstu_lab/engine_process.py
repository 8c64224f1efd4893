"""The serving engine in a process of its own, and its supervisor: if the engine dies, the service does not.

Parent and child talk in JSON lines over a socket pair (no pickles): `{"id": 7, "kind": ..., ...}` and `{"cancel": 7}` one way,
`{"id": 7, "answer": ...}` or `{"id": 7, "error": ...}` the other. `EngineProcess` is the parent's side, and starts the child
again, after a growing pause, whenever it is gone; not one that has never been up and names what must be mended first. This module
imports no engine: only the child does.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import itertools
import json
import logging
import os
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING

from hstu_lab.config import is_ours

if TYPE_CHECKING:
    from collections.abc import Callable

    from hstu_lab.hot_cache import CacheStats

log = logging.getLogger(__name__)

LONGEST_LINE = 64 << 20
PING_SECONDS = 2.0


class EngineUnavailable(RuntimeError):
    """The engine process is starting, died with the request in it, or is being stopped; another try may succeed."""


class EngineBroken(RuntimeError):
    """The engine has never been up, and cannot be until what the message names is mended."""


class EngineRefused(ValueError):
    """The engine cannot answer this request; the message names the field and the remedy."""


def encode_line(message: dict) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


# ---- the parent's side


class EngineProcess:
    """Starts, watches and restarts the engine process; `ask` sends it a request and waits for the answer.

    settings: fields of `hstu_lab.settings.Settings`, as JSON. A child that does not answer pings for `hang_seconds` is killed.
    Use as an asynchronous context manager. `broken` says why no other child is started, and `on_broken` is called then: the first
    ones ended by one of the package's own errors, which does not heal by itself.
    """

    def __init__(self, settings: dict, *, start_seconds: float = 300, hang_seconds: float = 60, longest_pause: float = 10):
        self.settings = settings
        self.start_seconds, self.hang_seconds, self.longest_pause = start_seconds, hang_seconds, longest_pause
        self.ready: dict | None = None
        self.restarts, self.pid, self.last_failure = 0, None, ""
        self.broken: str | None = None
        self.on_broken: Callable[[], None] = lambda: None
        self._been_up = self._stopping = False
        self._waiting: dict[int, asyncio.Future] = {}
        self._ids = itertools.count(1)
        self._writer: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> EngineProcess:
        self._task = asyncio.create_task(self._supervise())
        return self

    async def __aexit__(self, *_) -> None:
        self._stopping = True
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    @property
    def pending(self) -> int:
        """Requests that the child has not answered yet."""
        return len(self._waiting)

    async def ask(self, kind: str, **body) -> dict:
        """The child's answer. Cancelling this call makes the child drop the work.

        Raises EngineUnavailable where there is no engine, or none any more, EngineBroken where there will be none, and
        EngineRefused with the engine's own words.
        """
        if self.broken:
            raise EngineBroken(self.broken)
        if self.ready is None:
            raise EngineUnavailable(f"the engine is starting{f' again: {self.last_failure}' if self.restarts else ''}")
        number, future = next(self._ids), asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            self._send({"id": number, "kind": kind, **body})
            return await future
        except asyncio.CancelledError:
            self._send({"cancel": number})
            raise
        finally:
            self._waiting.pop(number, None)

    def _send(self, message: dict) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(encode_line(message))

    async def _supervise(self) -> None:
        pause = 0.25
        while True:
            started = time.monotonic()
            try:
                await self._run_child()
            finally:
                self._fail_all()
            if self.broken:
                self.on_broken()
                return
            self.restarts += 1
            log.error("engine process: %s; starting another in %.2g s", self.last_failure, pause)
            await asyncio.sleep(pause)
            pause = 0.25 if time.monotonic() - started > 60 else min(2 * pause, self.longest_pause)

    def _fail_all(self) -> None:
        self.ready, self._writer, self.pid = None, None, None
        why = (
            "the service is stopping"
            if self._stopping
            else f"the engine process died with the request in it: {self.last_failure}"
        )
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(EngineUnavailable(why))

    async def _run_child(self) -> None:
        """One life of the child; returns when it is over, with `last_failure` saying how it ended."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "hstu_lab.engine_process", str(theirs.fileno()), pass_fds=(theirs.fileno(),)
            )  # fmt: skip
        reader, writer = await asyncio.open_connection(sock=ours, limit=LONGEST_LINE)
        self.pid, self._writer, self._heard = process.pid, writer, time.monotonic()
        watch = asyncio.create_task(self._watch(process, time.monotonic()))
        try:
            self._send({"settings": self.settings})
            self.last_failure = ""
            while line := await reader.readline():
                self._heard = time.monotonic()
                self._receive(json.loads(line))
        except ConnectionError:
            pass
        finally:
            watch.cancel()
            up, self.ready = self.ready is not None, None
            writer.close()
            if up or not self._stopping:  # one that is only starting has nothing to put away
                # Most have ended by themselves: a signal would first ask for the status, and asyncio would never learn it.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), 10)
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            status = await asyncio.shield(process.wait())
        died = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        self.last_failure = self.last_failure or died

    async def _watch(self, process, started: float) -> None:
        """Ping the child; kill it where it stays silent."""
        while True:
            await asyncio.sleep(PING_SECONDS)
            limit = self.hang_seconds if self.ready else self.start_seconds
            if time.monotonic() - (self._heard if self.ready else started) > limit:
                self.last_failure = f"no sign of life for {limit:.0f} s"
                process.kill()
                return
            self._send({"ping": True})

    def _receive(self, message: dict) -> None:
        if "ready" in message:
            self.ready, self._been_up = message["ready"], True
        elif "failed" in message:
            self.last_failure = message["failed"]
            if message["ours"] and not self._been_up:
                self.broken = self.last_failure
        future = self._waiting.get(message.get("id"))
        if future is None or future.done():
            return
        if "answer" in message:
            future.set_result(message["answer"])
        else:
            kind = EngineRefused if message["refused"] else EngineUnavailable
            future.set_exception(kind(message["error"]))


# ---- the child's side

_OWN_REQUESTS: contextvars.ContextVar[set[str]] = contextvars.ContextVar("own vLLM requests")


class _Numbers:
    """vLLM request numbers that note themselves in the task that takes them, so that it can abort what it began."""

    def __init__(self):
        self._numbers = itertools.count()

    def __next__(self) -> int:
        number = next(self._numbers)
        if (own := _OWN_REQUESTS.get(None)) is not None:
            own.add(f"request-{number}")
        return number


def _count_steps() -> None:
    """Let vLLM keep its own Prometheus metrics, which `hstu_lab.vllm_engine` leaves off for a notebook's sake."""
    import dataclasses

    from vllm.v1.engine.llm_engine import LLMEngine

    make = LLMEngine.from_engine_args.__func__
    LLMEngine.from_engine_args = classmethod(
        lambda cls, arguments, **rest: make(cls, dataclasses.replace(arguments, disable_log_stats=False), **rest)
    )


class Worker:
    """What runs in the child: one Recommender with one strategy, and a task a request."""

    def __init__(self, settings: dict):
        from hstu_lab.settings import Settings, configure_logging
        from hstu_lab.strategies import Vllm, missing
        from hstu_lab.vllm_engine import ENVIRONMENT

        self.settings = Settings(**settings)
        configure_logging(self.settings.log_level, self.settings.log_file)
        if self.settings.strategy == "auto":
            strategy = next(name for name in ("vllm", "onnx", "eager") if missing(name) is None)
            self.settings = self.settings.model_copy(update={"strategy": strategy})
        if self.settings.strategy in ("vllm", "unified") and missing(self.settings.strategy) is None:
            os.environ.update({k: v for k, v in ENVIRONMENT.items() if k not in os.environ})
            _count_steps()
        from hstu_lab.pipeline import Recommender

        self.recommender = Recommender(settings=self.settings)
        self.runner = self.recommender.runner(self.settings.strategy)
        self.vllm = self.runner.engine if isinstance(self.runner, Vllm) else None
        if self.vllm is not None:
            self.vllm._ids = _Numbers()

    async def warm_up(self) -> dict:
        """Answer once in each task; returns what /ready tells."""
        config = self.recommender.config
        item = next(id for id in self.recommender.catalog.ids if id is not None)
        for task in ("topk", "slate"):
            await self.recommend({"user": "", "task": task, "items": [item], "actions": [1], "timestamps": [0]})
        return {
            "strategy": self.settings.strategy, "engines": self.runner.engines, "preset": config.preset, "pid": os.getpid(),
            "max_history": config.max_history, "slate_size": config.slate_size, "token_limit": config.token_limit,
            "max_prompt": config.max_seq_len, "checkpoint": self.recommender.checkpoint.name,
        }  # fmt: skip

    async def recommend(self, body: dict) -> dict:
        import numpy as np

        from hstu_lab.events import History

        rows = self.recommender.catalog.rows
        columns = [np.array(c, np.int64) for c in ([rows.get(i, -1) for i in body["items"]], body["actions"], body["timestamps"])]
        history = History(body["user"], *columns)
        answer = await self.recommender.recommend_async(history, task=body["task"])
        return {
            "items": [{**vars(item)} for item in answer.items], "strategy": answer.strategy, "stages_ms": answer.stages,
            "repairs": answer.repairs,
        }  # fmt: skip

    async def complete(self, body: dict) -> dict:
        """Generate body["count"] items after packed tokens: what an OpenAI-style completion is here."""
        from hstu_lab.strategies import Batch

        config, tokens = self.recommender.config, body["tokens"]
        if bad := [t for t in tokens if t >= config.token_limit]:
            raise EngineRefused(f"prompt: token {bad[0]} is beyond this model's last, {config.token_limit - 1}")
        if len(tokens) + body["count"] - 1 > config.max_seq_len:
            raise EngineRefused(f"prompt: {len(tokens)} tokens and {body['count']} items, {config.max_seq_len} fit: shorten it")
        seen = sorted({token % config.num_items for token in tokens if token < config.user_token_base})
        items, cached = await self.recommender.complete(Batch([tokens], [seen]), body["count"], self.settings.strategy)
        return {"items": items, "cached_tokens": cached}

    async def metrics(self, body: dict) -> dict:
        """Stage histograms of the recommender, and everything that vLLM registered with prometheus_client, as text."""
        from prometheus_client import generate_latest

        lines = ["# TYPE hstu_stage_milliseconds summary"]
        for strategy, entry in self.recommender.telemetry.summary()["strategies"].items():
            for stage, seen in (("total", entry["total"]), *entry["stages"].items()):
                labels = f'strategy="{strategy}",stage="{stage}"'
                for name, quantile in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
                    lines.append(f'hstu_stage_milliseconds{{{labels},quantile="{quantile}"}} {seen[name]:.6g}')
                lines.append(f"hstu_stage_milliseconds_sum{{{labels}}} {seen['count'] * seen['mean']:.6g}")
                lines.append(f"hstu_stage_milliseconds_count{{{labels}}} {seen['count']}")
        lines += _batch_lines(self.recommender.batch_sizes())
        lines += _cache_lines(self.recommender.hot_cache())
        lines += _score_lines(self.recommender.cached_score_totals())
        own = [line for line in generate_latest().decode().splitlines() if "vllm:" in line]
        return {"text": "\n".join([*lines, *own]) + "\n"}


def _batch_lines(sizes: dict[tuple[str, str, str], dict[int, int]]) -> list[str]:
    """Prometheus histograms of batch sizes (`Recommender.batch_sizes`), with buckets of powers of two."""
    lines = ["# TYPE hstu_batch_requests histogram"] if sizes else []
    for (stage, strategy, task), counts in sizes.items():
        labels, total = f'stage="{stage}",strategy="{strategy}",task="{task}"', sum(counts.values())
        for bound in (1 << power for power in range(max(counts, default=1).bit_length() + 1)):
            below = sum(count for size, count in counts.items() if size <= bound)
            lines.append(f'hstu_batch_requests_bucket{{{labels},le="{bound}"}} {below}')
        lines.append(f'hstu_batch_requests_bucket{{{labels},le="+Inf"}} {total}')
        lines.append(f"hstu_batch_requests_sum{{{labels}}} {sum(size * count for size, count in counts.items())}")
        lines.append(f"hstu_batch_requests_count{{{labels}}} {total}")
    return lines


def _cache_lines(caches: dict[str, CacheStats]) -> list[str]:
    """Prometheus counters of the hot caches (`Recommender.hot_cache`), labelled by table."""
    lines = []
    for name, kind in (("lookups", "counter"), ("misses", "counter"), ("bytes_moved", "counter"), ("resident", "gauge")):
        metric = f"hstu_hot_cache_{name}" + "_total" * (kind == "counter")
        lines += [f"# TYPE {metric} {kind}"] if caches else []
        lines += [f'{metric}{{table="{table}"}} {getattr(stats, name)}' for table, stats in caches.items()]
    return lines


def _score_lines(totals: dict[str, int]) -> list[str]:
    """Prometheus counters of what was scored beside vLLM's scheduler (`Recommender.cached_score_totals`)."""
    metrics = {f"hstu_cached_score_{name}_total": total for name, total in totals.items()}
    return [line for name, total in metrics.items() for line in (f"# TYPE {name} counter", f"{name} {total}")]


async def serve_child(fd: int) -> None:
    """Answer the parent until it closes the socket; what ends this process before that is told."""
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=fd), limit=LONGEST_LINE)
    try:
        await _answer_lines(reader, writer)
    except Exception as error:
        with contextlib.suppress(ConnectionError):
            writer.write(encode_line({"failed": f"{type(error).__name__}: {error}", "ours": is_ours(error)}))
            await writer.drain()
        raise


async def _answer_lines(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    worker, tasks = None, {}

    async def answer(message: dict) -> None:
        own: set[str] = set()
        _OWN_REQUESTS.set(own)
        try:
            reply = {"answer": await getattr(worker, message["kind"])(message)}
        except asyncio.CancelledError:
            if worker.vllm is not None:
                worker.vllm.abort(own)
            raise
        except Exception as error:
            known = type(error).__name__ in ("RequestError", "EngineRefused")
            reply = {"error": str(error) if known else f"{type(error).__name__}: {error}", "refused": known}
        finally:
            tasks.pop(message["id"], None)
        writer.write(encode_line({"id": message["id"], **reply}))

    while line := await reader.readline():
        message = json.loads(line)
        if "settings" in message:
            worker = await asyncio.to_thread(Worker, message["settings"])
            writer.write(encode_line({"ready": await worker.warm_up()}))
        elif "ping" in message:
            if worker and worker.vllm is not None and worker.vllm._failure:
                raise EngineUnavailable(f"vLLM stopped: {worker.vllm._failure}")
            writer.write(encode_line({"pong": True}))
        elif "cancel" in message:
            if task := tasks.get(message["cancel"]):
                task.cancel()
        else:
            tasks[message["id"]] = asyncio.create_task(answer(message))
    if worker is not None:
        worker.recommender.close()


def main(fd: int) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches parent and child; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # vLLM may finish a request in the very step in which it is cancelled: its future then refuses the result, which is logged.
    logging.getLogger("concurrent.futures").setLevel(logging.CRITICAL)
    os.set_inheritable(fd, False)
    try:
        asyncio.run(serve_child(fd))
    except Exception as error:
        if not is_ours(error):  # else the parent has been told, and logs it with its remedy
            log.exception("engine process")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
