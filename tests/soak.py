"""`make soak`: trouble for the service in the first half of the time, then all strategies in a loop in this process.

The service is killed (kill -9 of its engine), overloaded ten times, sent malformed bodies, histories beyond the limit and
deadlines that expire, and left by its clients; every request must end in an answer or a named error (`soak_service.py`).
The loop serves the sample's users by all strategies and both tasks in turn. Ends with status 1 if anything is lost, if an
answer ever differs from the first one for the same user, or if memory grew after the warm-up by more than 5 % and 64 MiB.
Only this machine, only for --minutes.
"""

import argparse
import os
import pathlib
import random
import sys
import time

import soak_service

from hstu_lab import events
from hstu_lab.pipeline import SAMPLE, SHIPPED_CHECKPOINT, TASK_NAMES, Recommender
from hstu_lab.telemetry import Histogram


def main() -> int:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--checkpoint", help="default: the shipped one")
    parser.add_argument("--strategy", action="append", help="may be repeated; default: all that can run here")
    parser.add_argument("--only", choices=("service", "strategies"), help="spend all of the time on one half")
    options = parser.parse_args()
    share, status = (1 if options.only else 2), 0
    if options.only != "strategies":
        status = trouble(options, options.minutes * 60 / share)
    if options.only == "service":
        return status
    with Recommender(options.checkpoint) as recommender:
        catalog = events.Catalog.load(recommender.checkpoint / "catalog.json")
        log = events.read_events(SAMPLE, catalog)
        histories = [log.history(i) for i in range(min(options.users, len(log)))]
        strategies = options.strategy or recommender.available()
        return soak(recommender, histories, strategies, options.minutes * 60 / share) or status


def trouble(options: argparse.Namespace, seconds: float) -> int:
    """Exit status of the service's half; its account is printed."""
    checkpoint = pathlib.Path(options.checkpoint or SHIPPED_CHECKPOINT)
    log = events.read_events(SAMPLE, events.Catalog.load(checkpoint / "catalog.json"))
    account = soak_service.soak(
        checkpoint, log, seconds, kills=max(int(seconds // 100), 1), report=lambda text: print(text, flush=True)
    )
    print(f"service: {account.requests} requests, {len(account.faults)} faults\n{account}", flush=True)
    for fault in account.faults[:20]:
        print(fault, file=sys.stderr)
    return 1 if account.faults else 0


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
