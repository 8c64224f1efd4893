"""`make soak`: serves the sample's users in a loop, all strategies and both tasks in turn, and watches memory and answers.

Ends with status 1 if an answer ever differs from the first one for the same user, or if memory grew after the warm-up
(the first quarter of the time) by more than 5 % and 64 MiB. Only this process, only this machine, only for --minutes.
"""

import argparse
import os
import pathlib
import random
import sys
import time

from hstu_lab import events
from hstu_lab.pipeline import SAMPLE, TASK_NAMES, Recommender
from hstu_lab.telemetry import Histogram


def main() -> int:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--checkpoint", help="default: the shipped one")
    parser.add_argument("--strategy", action="append", help="may be repeated; default: all that can run here")
    options = parser.parse_args()
    with Recommender(options.checkpoint) as recommender:
        catalog = events.Catalog.load(recommender.checkpoint / "catalog.json")
        log = events.read_events(SAMPLE, catalog)
        histories = [log.history(i) for i in range(min(options.users, len(log)))]
        return soak(recommender, histories, options.strategy or recommender.available(), options.minutes * 60)


def soak(recommender: Recommender, histories: list, strategies: list[str], seconds: float) -> int:
    """Exit status. One line every 30 s: requests so far, latency of a batch, memory."""
    for strategy in strategies:
        recommender.recommend_batch(histories[:1], strategy=strategy)  # starts its engines, outside what is timed
    choose = random.Random(0)
    first: dict[tuple, list[int]] = {}
    requests = changed = 0
    warm, latency = None, Histogram()
    start = said = time.monotonic()
    while (now := time.monotonic()) - start < seconds:
        strategy, task = choose.choice(strategies), choose.choice(TASK_NAMES)
        batch = choose.sample(histories, choose.randint(1, min(8, len(histories))))
        began = time.perf_counter()
        answers = recommender.recommend_batch(batch, task=task, strategy=strategy)
        latency.add((time.perf_counter() - began) * 1e3)
        requests += len(answers)
        for answer in answers:
            items = [item.row for item in answer.items]
            if first.setdefault((strategy, task, answer.user), items) != items:
                changed += 1
                print(f"user {answer.user}, {strategy}, {task}: the answer changed", file=sys.stderr)
        if warm is None and now - start > seconds / 4:
            warm = memory()
        if now - said > 30:
            said = now
            report(now - start, requests, latency)
    report(seconds, requests, latency)
    grown = memory() - (warm or memory())
    leaking = grown > 64 << 20 and grown > 0.05 * warm
    print(f"{changed} answers changed; memory grew {grown / 2**20:+.0f} MiB after the warm-up{': a leak' if leaking else ''}")
    return 1 if changed or leaking or not requests else 0


def report(seconds: float, requests: int, latency: Histogram) -> None:
    p50, p99 = latency.percentile(50), latency.percentile(99)
    print(
        f"{seconds:6.0f} s  {requests:7d} requests  batch p50 {p50:.1f} ms, p99 {p99:.1f} ms  {memory() / 2**20:.0f} MiB",
        flush=True,
    )


def memory() -> int:
    """Resident bytes of this process."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    sys.exit(main())
