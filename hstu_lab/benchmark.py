"""Measure a recommender: one strategy under load, or every strategy on the same users with the agreement between them."""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Sequence

from tqdm.auto import tqdm

from hstu_lab.config import TASK_NAMES
from hstu_lab.events import History
from hstu_lab.measure import Measurement, Record, write_record
from hstu_lab.pipeline import Recommendation, Recommender
from hstu_lab.strategies import STAGES
from hstu_lab.telemetry import PERCENTILES, Histogram

FIGURES = pathlib.Path(__file__).parent.parent / "figures"


@dataclasses.dataclass
class StrategyResult:
    """What one strategy did for one task: latencies of single requests (seconds), stages (ms, median), batch throughput."""

    task: str
    strategy: str
    engines: dict[str, str]
    latencies: list[float]
    stages: dict[str, float]
    batch_size: int
    batch_seconds: list[float]
    answers: list[Recommendation] = dataclasses.field(repr=False)

    @property
    def percentiles(self) -> dict[str, float]:
        """p50, p95, p99 of single requests in milliseconds."""
        histogram = Histogram()
        for latency in self.latencies:
            histogram.add(latency * 1e3)
        return {f"p{p}": value for p, value in zip(PERCENTILES, histogram.percentiles())}

    @property
    def per_second(self) -> float:
        """Users a second when they come in batches of `batch_size`."""
        return self.batch_size / sorted(self.batch_seconds)[len(self.batch_seconds) // 2]


def run_strategy(
    recommender: Recommender, histories: Sequence[History], task: str, strategy: str, *, rounds: int = 3, progress: bool = True
) -> StrategyResult:
    """Serve each history alone, then all of them together `rounds` times; prefix caches are emptied before each pass.

    Engine start and one warm-up request and batch are not timed.
    """
    recommender.recommend(histories[0], task=task, strategy=strategy)
    answers = recommender.recommend_batch(histories, task=task, strategy=strategy)
    recommender.forget_prefixes()
    latencies, stages = [], {stage: [] for stage in STAGES}
    for history in tqdm(histories, desc=f"{task} {strategy}", disable=None if progress else True, leave=False):
        start = time.perf_counter()
        answer = recommender.recommend(history, task=task, strategy=strategy)
        latencies.append(time.perf_counter() - start)
        for stage in STAGES:
            stages[stage].append(answer.stages[stage])
    seconds = []
    for _ in range(rounds):
        recommender.forget_prefixes()
        start = time.perf_counter()
        recommender.recommend_batch(histories, task=task, strategy=strategy)
        seconds.append(time.perf_counter() - start)
    medians = {stage: sorted(ms)[len(ms) // 2] for stage, ms in stages.items()}
    return StrategyResult(task, strategy, answers[0].engines, latencies, medians, len(histories), seconds, answers)


def agreement(reference: Sequence[Recommendation], other: Sequence[Recommendation]) -> dict[str, float]:
    """Share of users with the same ten items in the same order, and with the same candidates as a set."""
    pairs = list(zip(reference, other, strict=True))
    same_items = sum([i.row for i in a.items] == [i.row for i in b.items] for a, b in pairs)
    same_candidates = sum(set(a.candidates) == set(b.candidates) for a, b in pairs)
    return {"items": same_items / len(pairs), "candidates": same_candidates / len(pairs)}


def comprehensive(
    recommender: Recommender,
    histories: Sequence[History],
    *,
    tasks: Sequence[str] = TASK_NAMES,
    progress: bool = True,
    data: str | pathlib.Path | None = None,
    figures: str | pathlib.Path = FIGURES,
) -> tuple[list[StrategyResult], Record, list[pathlib.Path]]:
    """Every available strategy and task on the same users; writes a record and a waterfall a task. Returns what it wrote."""
    from hstu_lab.widgets import strategy_waterfall

    results, rows = [], []
    for task in tasks:
        of_task = [
            run_strategy(recommender, histories, task, strategy, progress=progress) for strategy in recommender.available()
        ]
        for result in of_task:
            rows.append(row(result) | {"agreement with eager": agreement(of_task[0].answers, result.answers)})
        results += of_task
    measurements = []
    for r in results:
        measurements.append(Measurement(f"{r.task} {r.strategy} single", tuple(r.latencies)))
        measurements.append(Measurement(f"{r.task} {r.strategy} batch of {r.batch_size}", tuple(r.batch_seconds)))
    lengths = [len(h) for h in histories]
    note = f"{len(histories)} users, histories of {min(lengths)} to {max(lengths)} events, preset {recommender.config.preset}"
    record = Record.here("comprehensive", measurements=measurements, data={"rows": rows}, note=note)
    written = [write_record(record, data)]
    for task in tasks:
        stages = {r.strategy: r.stages for r in results if r.task == task}
        figure = strategy_waterfall(stages, f"{task}: median stage times of one request", source=record.label)
        path = pathlib.Path(figures) / f"waterfall-{task}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120, metadata={"Software": None})
        written.append(path)
    return results, record, written


def row(result: StrategyResult) -> dict:
    return {
        "task": result.task,
        "strategy": result.strategy,
        **result.percentiles,
        "users per second": result.per_second,
        "batch size": result.batch_size,
        "stages": result.stages,
        "engines": result.engines,
    }


def table(rows: Sequence[dict]) -> str:
    """One line a task and strategy; the agreement is with `eager`."""
    lines = [f"{'task':<7} {'strategy':<9} {'p50 ms':>9} {'p95 ms':>9} {'p99 ms':>9} {'users/s':>9}  same ten  same candidates"]
    for row in rows:
        agreed = row.get("agreement with eager")  # of one strategy alone there is none
        shares = f"{agreed['items']:8.1%}  {agreed['candidates']:15.1%}" if agreed else f"{'-':>8}  {'-':>15}"
        times = " ".join(f"{row[p]:9.2f}" for p in ("p50", "p95", "p99"))
        lines.append(f"{row['task']:<7} {row['strategy']:<9} {times} {row['users per second']:9.1f}  {shares}")
    return "\n".join(lines)
