"""Requests that wait are worked on together: while one batch is in work, those that come meanwhile form the next one.

Nobody waits for company. A request that finds the worker idle starts at once and alone, so that batches are as large as the
load makes them: continuous batching for stages that have no engine to do it for them.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future


class BatcherClosed(RuntimeError):
    """The request came after `close`."""


class Batcher:
    """Hands what was submitted to `work`, at most `most` requests at a time, oldest first, in a thread of its own.

    `work` takes a list of requests and returns their answers in the same order. If it raises, the batch is halved until whose
    fault it is stands alone: that request's future gets the exception, the others their answers; so `work` must stand being
    asked again. A future that is cancelled before its batch begins is left out. `sizes` counts answered batches by their size.
    """

    def __init__(self, work: Callable[[list], Sequence], most: int, name: str = "batcher"):
        if most < 1:
            raise ValueError(f"most is {most}: give 1 or more")
        self.work, self.most = work, most
        self.sizes: collections.Counter[int] = collections.Counter()
        self._waiting: collections.deque[tuple[object, Future]] = collections.deque()
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, request) -> Future:
        """A future of the request's answer. Raises BatcherClosed after `close`."""
        future: Future = Future()
        with self._wake:
            if self._closed:
                raise BatcherClosed(f"{self._thread.name} is closed; make a new one")
            self._waiting.append((request, future))
            self._wake.notify()
        return future

    def close(self) -> None:
        """Answer what waits, then stop."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next():
            self._answer(batch)

    def _next(self) -> list[tuple[object, Future]]:
        """The next batch, as soon as anybody waits; empty once closed and nobody does."""
        with self._wake:
            batch: list[tuple[object, Future]] = []
            while not batch and (self._waiting or not self._closed):
                if not self._waiting:
                    self._wake.wait()
                while self._waiting and len(batch) < self.most:
                    request, future = self._waiting.popleft()
                    if future.set_running_or_notify_cancel():
                        batch.append((request, future))
            return batch

    def _answer(self, batch: list[tuple[object, Future]]) -> None:
        try:
            answered = list(zip(batch, self.work([request for request, _ in batch]), strict=True))
        except Exception as error:
            if len(batch) == 1:
                batch[0][1].set_exception(error)
                return
            half = len(batch) // 2
            self._answer(batch[:half])
            self._answer(batch[half:])
            return
        self.sizes[len(batch)] += 1
        for (_, future), answer in answered:
            future.set_result(answer)
