"""From a user's history to ten recommendations: one line of stages, walked by whichever engines a strategy names.

    history -> tokens -> encoder -> stack -> candidates -> ranking -> ten items with three scores each

`topk` takes the best next items of one pass, `slate` generates items one after another; both are then ranked by the
weighted sum of the task scores (`ModelConfig.task_weights`), ties by lower item. For one task every strategy gives one list.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import functools
import json
import logging
import pathlib
import statistics
import threading
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hstu_lab import ops as operators
from hstu_lab.batching import Batcher
from hstu_lab.config import ACTIONS, TASK_NAMES, TASKS, ConfigError, ModelConfig
from hstu_lab.event_log import printable
from hstu_lab.events import MOVIELENS, Catalog, History
from hstu_lab.hot_cache import CachedRows, CacheStats
from hstu_lab.measure import data_root
from hstu_lab.model import CheckpointError, load_checkpoint
from hstu_lab.settings import STRATEGIES, Settings
from hstu_lab.strategies import STAGES, Batch, Eager, Parts, StrategyUnavailable, Vllm, missing
from hstu_lab.telemetry import StageTimer, Telemetry
from hstu_lab.tokens import encode_history

log = logging.getLogger(__name__)

CHECKPOINTS = data_root() / "checkpoints"
SHIPPED_CHECKPOINT = CHECKPOINTS / "small"
SAMPLE = data_root() / "sample" / "events.jsonl.gz"


class RequestError(ValueError):
    """A request that cannot be answered; the message names the field and the remedy."""


@dataclasses.dataclass(frozen=True)
class RankedItem:
    """One recommended item. `score` is the weighted sum of the three probabilities after it."""

    item_id: str
    row: int
    title: str
    score: float
    engagement: float
    retention: float
    monetization: float


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """One answer. `candidates` are item rows before ranking; `stages` are the milliseconds of the batches it was part of.

    Of a request that shared them with others in flight there is one stage more, "waiting": until each batch began. `batch_size`
    counts the requests that were ranked together.
    """

    user: str
    items: list[RankedItem]
    candidates: list[int]
    task: str
    strategy: str
    engines: dict[str, str]
    stages: dict[str, float]
    repairs: dict[str, int]
    batch_size: int = 1
    reason: str = ""

    @property
    def total_ms(self) -> float:
        return sum(self.stages.values())

    def to_dict(self) -> dict:
        return dataclasses.asdict(self) | {"total_ms": self.total_ms}

    def __str__(self) -> str:
        """The ten items and the stages as two tables."""
        titles = [printable(item.title) for item in self.items]
        width = max([*map(len, titles), 5])
        lines = [f"{len(self.items)} items for user {printable(self.user)}   task {self.task}   strategy {self.strategy}"]
        lines.append(f"{'':>3} {'item':>8}  {'title':<{width}}  {'score':>7}  " + "  ".join(f"{t:>12}" for t in TASKS))
        for rank, (item, title) in enumerate(zip(self.items, titles), 1):
            scores = "  ".join(f"{getattr(item, task):12.4f}" for task in TASKS)
            lines.append(f"{rank:>3} {printable(item.item_id):>8}  {title:<{width}}  {item.score:7.4f}  {scores}")
        if not self.items:
            lines.append("the user has met every item of the catalog: nothing is left to recommend")
        lines.append("")
        lines.append(f"{'stage':<10} {'measured here':>14}  engine")
        for stage, ms in self.stages.items():
            lines.append(f"{stage:<10} {ms:11.2f} ms  {self.engines.get(stage, '')}")
        lines.append(f"{'total':<10} {self.total_ms:11.2f} ms  batch of {self.batch_size}")
        if self.reason:
            lines.append(f"strategy chosen by auto: {self.reason}")
        if self.repairs:
            lines.append("repairs: " + ", ".join(f"{name} {count}" for name, count in self.repairs.items()))
        return "\n".join(lines)


def find_checkpoint(events: str | pathlib.Path) -> pathlib.Path:
    """The newest own checkpoint (data/checkpoints/local) trained on the items of that event file, else the shipped one.

    Raises CheckpointError naming the training command for MovieLens, whose items the shipped one cannot know.
    """
    path = pathlib.Path(events)
    is_movielens = path.is_dir() or path.suffix == ".zip"
    world = MOVIELENS if is_movielens else path.name.split(".")[0]
    weights = sorted((CHECKPOINTS / "local").glob("*/model.safetensors"), key=lambda p: -p.stat().st_mtime)
    for folder in (p.parent for p in weights):
        with contextlib.suppress(ValueError, OSError):
            if Catalog.load(folder / "catalog.json").name == world:
                return folder
    if is_movielens:
        raise CheckpointError(
            f"{CHECKPOINTS / 'local'}: no checkpoint there was trained on {world}; "
            f"run `python -m hstu_lab train --events {path} --preset ml-1m --minutes 5` first, or name one with --checkpoint"
        )
    return SHIPPED_CHECKPOINT


# ---- the one class that walks the line


class Recommender:
    """Ten recommendations from a history, by any strategy.

    `checkpoint` is a folder written by training (None: the shipped one). Engines start when first used and stay until
    `close`; the object is a context manager. Raises CheckpointError where the folder cannot be loaded.
    """

    def __init__(
        self,
        checkpoint: str | pathlib.Path | None = None,
        *,
        strategy: str | None = None,
        task: str | None = None,
        settings: Settings | None = None,
    ):
        self.settings = settings or Settings()
        self.strategy, self.task = strategy or self.settings.strategy, task or self.settings.task
        self._check_names(self.task, self.strategy)
        self.checkpoint = pathlib.Path(checkpoint or self.settings.checkpoint or SHIPPED_CHECKPOINT)
        if self.settings.threads:
            torch.set_num_threads(self.settings.threads)
        self._loaded = self._stamp()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        cached = self.settings.hot_cache_rows
        self.model = load_checkpoint(self.checkpoint, operators.get(self.settings.ops), "cpu" if cached else device)
        if cached:
            self._cache_rows(device)
        self.catalog = Catalog.load(self.checkpoint / "catalog.json")
        if len(self.catalog.ids) != self.config.num_items:
            raise CheckpointError(
                f"{self.checkpoint / 'catalog.json'}: {len(self.catalog.ids)} item rows, the model has {self.config.num_items}; "
                "restore the file or train again"
            )
        self.users = _load_users(self.checkpoint / "users.json", self.config)
        self.telemetry = Telemetry()
        self._costs: dict[tuple[str, bool, str], collections.deque[float]] = {}
        self._strategies: dict[str, Eager | Parts | Vllm] = {}
        self._batchers: dict[tuple[str, str, str], Batcher] = {}
        self._joining = threading.Lock()
        self._engine = None
        self._starting = threading.RLock()

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def _cache_rows(self, device: str) -> None:
        """Leave tables of side features and users in host memory, behind hot caches; the rest of the model goes to `device`."""
        tables, rows = self.model.tables, self.settings.hot_cache_rows
        weights = {name: tables.store.weight(name) for name, _ in self.config.tables}
        del tables.store  # a module's place, which takes nothing but modules
        capacity = {name: rows for name in weights if name != "item"}
        tables.store = CachedRows(weights, capacity, device, policy=self.settings.hot_cache_policy)
        self.model.to(device)

    def hot_cache(self) -> dict[str, CacheStats]:
        """Counters of the hot caches by table; empty where `settings.hot_cache_rows` is 0 or holds every table whole."""
        store = self.model.tables.store
        return store.stats() if isinstance(store, CachedRows) else {}

    # ---- answers

    def recommend(self, history: History, *, task: str | None = None, strategy: str | None = None) -> Recommendation:
        """Ten items for one history. Raises RequestError on a bad one, StrategyUnavailable where an engine is missing."""
        return self.recommend_batch([history], task=task, strategy=strategy)[0]

    def recommend_batch(
        self, histories: Sequence[History], *, task: str | None = None, strategy: str | None = None
    ) -> list[Recommendation]:
        """One answer a history, in order, `settings.batch_size` of them at a time."""
        task, strategy, reason = self._resolve(task, strategy, len(histories))
        runner, answers = self.runner(strategy), []
        for start in range(0, len(histories), self.settings.batch_size):
            part = histories[start : start + self.settings.batch_size]
            timer = StageTimer()
            with timer("tokens"):
                batch, repairs = self.prepare(part)
            candidates = runner.candidates(batch, task, self._count(task), timer)
            scores = self._rank(runner, batch, candidates, timer)
            answers += self._answers(part, repairs, candidates, scores, task, strategy, reason, runner, timer, len(part))
        return answers

    async def recommend_async(self, history: History, *, task: str | None = None, strategy: str | None = None) -> Recommendation:
        """Like `recommend`, without blocking the event loop; requests in flight share batches, in vLLM and beside it."""
        task, strategy, reason = self._resolve(task, strategy, 1)
        runner = self._strategies.get(strategy) or await asyncio.to_thread(self.runner, strategy)
        timer = StageTimer()
        with timer("tokens"):
            batch, repairs = self.prepare([history])
        size = 1
        if not isinstance(runner, Vllm):
            (items, scores), size = await self._together("answer", strategy, task, batch, timer)
        else:
            items = (await self.generate(batch, task, self._count(task), timer, strategy)).items
            if runner.encoder is not None:
                scores, size = await self._together("ranking", strategy, task, (batch, items), timer)
            else:
                with timer("ranking"):
                    scores = await asyncio.wrap_future(runner.engine.submit_score(batch.histories[0], items))
        return self._answers([history], repairs, [items], scores[None], task, strategy, reason, runner, timer, size)[0]

    async def generate(self, batch: Batch, task: str, count: int, timer: StageTimer, strategy: str):
        """vLLM's answer (`hstu_lab.vllm_engine.Generated`) to a batch of one request, encoded together with others in flight."""
        runner = self._strategies[strategy]
        if runner.encoder is not None:
            batch.encoded, _ = await self._together("encoder", strategy, task, batch, timer)
        [future] = runner.submit(batch, task, count, timer)
        with timer("stack"):
            return await asyncio.wrap_future(future)

    async def complete(self, batch: Batch, count: int, strategy: str) -> tuple[list[int], int]:
        """`count` items, one after another, for a batch of one request, and how many of its tokens were cached."""
        timer, runner = StageTimer(), self.runner(strategy)
        if isinstance(runner, Vllm):
            generated = await self.generate(batch, "slate", count, timer, strategy)
            return generated.items, generated.cached_tokens
        items, _ = await self._together("completion", strategy, "slate", (batch, count), timer)
        return items, 0

    # ---- what requests in flight share

    async def _together(self, stage: str, strategy: str, task: str, request, timer: StageTimer) -> tuple:
        """(`request`'s part of what is made of all that wait for that stage, how many they were); `timer` is told the times."""
        start, name = time.perf_counter(), (stage, strategy, task)
        with self._joining:
            if (batcher := self._batchers.get(name)) is None:
                work = {
                    "answer": self._answer_all, "completion": self._complete_all, "encoder": self._encode_all,
                    "ranking": self._rank_all,
                }[stage]  # fmt: skip
                run = functools.partial(work, self._strategies[strategy], task)
                batcher = self._batchers[name] = Batcher(run, self.settings.batch_size, " ".join(name))
        part, stages, size = await asyncio.wrap_future(batcher.submit(request))
        waited = (time.perf_counter() - start) * 1e3 - sum(stages.values())
        for name, ms in (stages | {"waiting": max(waited, 0.0)}).items():
            timer.stages[name] = timer.stages.get(name, 0.0) + ms
        return part, size

    def _answer_all(self, runner: Eager | Parts, task: str, batches: list[Batch]) -> list[tuple]:
        batch, timer = Batch.join(batches), StageTimer()
        candidates = runner.candidates(batch, task, self._count(task), timer)
        scores = self._rank(runner, batch, candidates, timer)
        return [(part, timer.stages, len(batch)) for part in zip(candidates, scores)]

    def _complete_all(self, runner: Eager | Parts, task: str, requests: list[tuple[Batch, int]]) -> list[tuple]:
        done: dict[int, tuple] = {}
        for count in {count for _, count in requests}:
            places, timer = [i for i, (_, wanted) in enumerate(requests) if wanted == count], StageTimer()
            items = runner.candidates(Batch.join([requests[i][0] for i in places]), task, count, timer)
            done |= {place: (part, timer.stages, len(places)) for place, part in zip(places, items, strict=True)}
        return [done[place] for place in range(len(requests))]

    def _encode_all(self, runner: Vllm, _: str, batches: list[Batch]) -> list[tuple]:
        batch, timer = Batch.join(batches), StageTimer()
        encoded = runner.encode(batch, timer)
        return [(part, timer.stages, len(batch)) for part in encoded.split(batch.lengths.tolist())]

    def _rank_all(self, runner: Vllm, _: str, requests: list[tuple[Batch, list[int]]]) -> list[tuple]:
        batches, candidates = zip(*requests)
        batch, timer = Batch.join(batches), StageTimer()
        return [(part, timer.stages, len(batch)) for part in self._rank(runner, batch, candidates, timer)]

    # ---- stages

    def prepare(self, histories: Sequence[History]) -> tuple[Batch, list[dict[str, int]]]:
        """Check and tokenise. Raises RequestError naming the user and the field."""
        tokens, seen, repairs = [], [], []
        for history in histories:
            encoded, items, repaired = self._encode(history)
            tokens.append(encoded)
            seen.append(items)
            repairs.append(repaired)
        return Batch(tokens, seen), repairs

    def _encode(self, history: History) -> tuple[list[int], list[int], dict[str, int]]:
        config, repairs = self.config, {}
        items, actions = np.asarray(history.items), np.asarray(history.actions)
        times = np.asarray(history.timestamps)
        where = f"user {history.user!r}"
        if not len(items) == len(actions) == len(times):
            raise RequestError(f"{where}: {len(items)} items, {len(actions)} actions, {len(times)} timestamps; give one each")
        if len(times) and not (np.isfinite(times).all() and times.min() >= 0):
            raise RequestError(f"{where}: timestamps must be finite and not negative (Unix seconds)")
        if (bad := (actions < 0) | (actions >= len(ACTIONS))).any():
            raise RequestError(f"{where}: action {int(actions[bad][0])} is unknown; use 0 to {len(ACTIONS) - 1}")
        if len(times) and (np.diff(times) < 0).any():
            order = np.argsort(times, kind="stable")
            items, actions, times = items[order], actions[order], times[order]
            repairs["unsorted events sorted"] = 1
        known = self._known
        inside = (items >= 0) & (items < config.num_items)
        fine = inside & known[np.where(inside, items, 0)]
        if not fine.all():
            repairs["unknown items dropped"] = int((~fine).sum())
            items, actions, times = items[fine], actions[fine], times[fine]
        row = self.users.get(history.user, 0)
        if config.num_users and not row:
            repairs["unknown user"] = 1
        tokens = encode_history(items.tolist(), actions.tolist(), times.tolist(), row, config, config.slide)
        if left_out := len(items) - (len(tokens) - config.num_context):
            repairs["oldest events left out"] = left_out
        if not tokens:
            raise RequestError(
                f"{where}: the history is empty and preset {config.preset} has no user token to start from; "
                "give at least one event of a known item"
            )
        if not len(items):
            repairs["empty history"] = 1
        return tokens, sorted(set(items.tolist())), repairs

    @functools.cached_property
    def _known(self) -> np.ndarray:
        return self.model.known_items.cpu().numpy()

    def _count(self, task: str) -> int:
        return max(self.config.num_candidates, self.settings.num_items) if task == "topk" else self.config.slate_size

    @staticmethod
    def _rank(runner: Eager | Parts | Vllm, batch: Batch, candidates: Sequence[list[int]], timer: StageTimer) -> Tensor:
        padded = torch.zeros(len(batch), max(1, *map(len, candidates)), dtype=torch.int64)
        for row, items in zip(padded, candidates):
            row[: len(items)] = torch.tensor(items, dtype=torch.int64)
        return runner.rank(batch, padded, timer)

    def _answers(
        self, histories, repairs, candidates, scores, task, strategy, reason, runner, timer, size
    ) -> list[Recommendation]:
        weights = np.asarray(self.config.task_weights)
        stages = dict.fromkeys(STAGES, 0.0) | timer.stages
        engines = {"tokens": "Python"} | runner.engines
        answers = []
        for history, repaired, items, probabilities in zip(histories, repairs, candidates, scores.numpy()):
            totals = probabilities[: len(items)].astype(np.float64) @ weights
            order = sorted(range(len(items)), key=lambda i: (-totals[i], items[i]))[: self.settings.num_items]
            ranked = [self._ranked(items[i], float(totals[i]), probabilities[i].tolist()) for i in order]
            answers.append(
                Recommendation(str(history.user), ranked, items, task, strategy, engines, stages, repaired, size, reason)
            )
        total = sum(stages.values())
        self.telemetry.observe(strategy, stages, total, requests=len(histories))
        for repaired in repairs:
            for name, count in repaired.items():
                self.telemetry.count(name, count)
        costs = self._costs.setdefault((task, size > 1, strategy), collections.deque(maxlen=50))
        costs.append((total - stages.get("waiting", 0.0)) / size)
        return answers

    def _ranked(self, row: int, total: float, probabilities: list[float]) -> RankedItem:
        item_id = str(self.catalog.ids[row])
        return RankedItem(item_id, row, self.catalog.titles[row] or item_id, total, *probabilities)

    # ---- engines

    def available(self) -> list[str]:
        """Strategies that can run here."""
        return [strategy for strategy in STRATEGIES if missing(strategy) is None]

    def runner(self, strategy: str) -> Eager | Parts | Vllm:
        """The engines of that strategy, started on first use."""
        with self._starting:
            if strategy not in self._strategies:
                if why := missing(strategy):
                    raise StrategyUnavailable(f"strategy {strategy} {why}")
                log.info("starting strategy %s", strategy)
                self._strategies[strategy] = self._start(strategy)
            return self._strategies[strategy]

    def _stamp(self) -> tuple[int, int] | None:
        """Changes when the checkpoint is written anew."""
        path = self.checkpoint / "model.safetensors"
        return (path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else None

    def _start(self, strategy: str) -> Eager | Parts | Vllm:
        if self._stamp() != self._loaded:  # the engine would serve other weights than those that rank
            raise CheckpointError(f"{self.checkpoint}: has changed since it was loaded; make a new Recommender")
        if strategy == "eager":
            return Eager(self.model)
        if strategy in ("onnx", "tensorrt"):
            return self._parts(strategy)
        if strategy == "vllm":
            return Vllm(self._vllm(), self.runner("eager"))
        instead = missing("tensorrt")
        parts = self.runner("onnx" if instead else "tensorrt")
        runner = Vllm(self._vllm(), parts, parts)
        if instead:
            for stage in ("encoder", "ranking"):
                runner.engines[stage] += ", for TensorRT (no GPU)" if "GPU" in instead else ", for TensorRT (missing)"
        return runner

    def _parts(self, strategy: str) -> Parts:
        from hstu_lab.onnx_export import OnnxModels, export_cached, sample_histories

        precision, settings = self.settings.precision, self.settings
        histories = sample_histories(self.checkpoint, settings.events) if precision == "int8" else None
        folder = export_cached(self.checkpoint, precision=precision, histories=histories)
        if strategy == "onnx":
            return Parts(self.model, OnnxModels(folder, threads=settings.threads))
        from hstu_lab.tensorrt_models import TensorRtModels, build_engines, serving_profiles

        profiles = serving_profiles(self.config, settings.batch_size, max(self._count("topk"), self._count("slate")))
        engines = build_engines(folder, profiles, workspace=settings.workspace_mb << 20)
        return Parts(self.model, TensorRtModels(engines), "cuda")

    def _vllm(self):
        if self._engine is None:
            from hstu_lab.vllm_engine import Engine, EngineOptions

            settings, least = self.settings, self.config.max_seq_len + 2  # a history, the mark behind it, a candidate
            if not settings.enable_chunked_prefill and settings.max_num_batched_tokens < least:
                raise ConfigError(
                    f"setting max_num_batched_tokens is {settings.max_num_batched_tokens}: without enable_chunked_prefill a step "
                    f"takes a whole request of preset {self.config.preset}, give at least {least}"
                )
            options = EngineOptions(
                kv_cache_memory_bytes=settings.kv_cache_mb << 20,
                block_size=settings.block_size,
                max_num_seqs=settings.max_num_seqs,
                max_num_batched_tokens=settings.max_num_batched_tokens,
                enable_prefix_caching=settings.enable_prefix_caching,
                enable_chunked_prefill=settings.enable_chunked_prefill,
                ops=settings.ops,
            )
            self._engine = Engine(self.checkpoint, options)
        return self._engine

    def _resolve(self, task: str | None, strategy: str | None, batch_size: int) -> tuple[str, str, str]:
        task, strategy = task or self.task, strategy or self.strategy
        self._check_names(task, strategy)
        if strategy != "auto":
            return task, strategy, ""
        return task, *self.choose(task, batch_size)

    def choose(self, task: str, batch_size: int) -> tuple[str, str]:
        """The strategy that `auto` takes for that work, and why.

        What this Recommender has measured decides, once two strategies have answered three such calls each (single requests
        and batches count apart); before that a rule does.
        """
        available = self.available()
        costs = {name: self._costs.get((task, batch_size > 1, name), ()) for name in available}
        measured = {name: statistics.median(ms) for name, ms in costs.items() if len(ms) >= 3}
        if len(measured) > 1:
            best = min(measured, key=measured.get)
            figures = ", ".join(f"{name} {ms:.2f} ms" for name, ms in sorted(measured.items(), key=lambda kv: kv[1]))
            return best, f"lowest median time a request measured here ({figures})"
        if torch.cuda.is_available() and "unified" in available:
            return "unified", "a GPU is visible"
        if task == "slate" or batch_size > 1:
            order, why = ("unified", "vllm", "onnx", "eager"), "a slate or a batch gains from a cached prefix and shared batches"
        else:
            order, why = ("onnx", "eager"), "one pass for one user, nothing to share"
        return next(name for name in order if name in available), why

    @staticmethod
    def _check_names(task: str, strategy: str) -> None:
        if task not in TASK_NAMES:
            raise RequestError(f"task {task!r} is unknown; use one of {', '.join(TASK_NAMES)}")
        if strategy not in (*STRATEGIES, "auto"):
            raise RequestError(f"strategy {strategy!r} is unknown; use auto or one of {', '.join(STRATEGIES)}")

    def batch_sizes(self) -> dict[tuple[str, str, str], dict[int, int]]:
        """(stage, strategy, task) -> {size: how many batches of requests in flight had it}; vLLM's own batches are not here.

        Stage "answer" is everything behind the tokens.
        """
        return {name: dict(batcher.sizes) for name, batcher in list(self._batchers.items())}

    def cached_score_totals(self) -> dict[str, int]:
        """`hstu_lab.vllm_engine.Engine.cached_score_totals` of vLLM's engine; empty where none was started."""
        return {} if self._engine is None else self._engine.cached_score_totals()

    def forget_prefixes(self) -> None:
        """Empty vLLM's prefix cache, where the engine runs, so that the next requests pay for their whole histories."""
        if self._engine is not None:
            self._engine.reset_prefix_cache()

    def close(self) -> None:
        """Answer what waits in this class, then stop every engine."""
        for batcher in self._batchers.values():
            batcher.close()
        self._batchers.clear()
        for runner in self._strategies.values():
            if isinstance(runner, Parts):
                runner.close()
        self._strategies.clear()
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def __enter__(self) -> Recommender:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _load_users(path: pathlib.Path, config: ModelConfig) -> dict[str, int]:
    if not config.num_users:
        return {}
    try:
        users = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; restore it or train again") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}); restore it or train again") from error
    if not isinstance(users, list) or len(users) >= config.num_users or len(set(map(str, users))) < len(users):
        raise CheckpointError(f"{path}: must list at most {config.num_users - 1} different user ids; restore it or train again")
    return {str(user): row for row, user in enumerate(users, 1)}
