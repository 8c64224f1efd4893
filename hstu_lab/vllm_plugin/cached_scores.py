"""Candidates against histories that are in the prefix cache: one step of our own, beside vLLM's scheduler.

As tokens of a prompt (`hstu_lab.vllm_plugin.candidates`) candidates are hashed, given blocks, scheduled and sampled for, all of
it on the host and none of it needed: they only read the cache. Here the history's full blocks are looked up as vLLM would, and
one CUDA graph leads from the candidates' ids to their probabilities. Events behind the last full block are computed with them, in
blocks that are borrowed for the step. A history that is not cached is vLLM's, to be scheduled and cached with all others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from vllm.forward_context import create_forward_context, override_forward_context
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import KVCacheBlock, hash_block_tokens

from hstu_lab.vllm_plugin.attention import HSTUMetadata

MOST_USERS = 8
"""Users of one step; their candidates fill a GPU."""


@dataclasses.dataclass(frozen=True)
class Held:
    """Candidates (C,) int32, table rows, after a history (tokens), and the blocks that are held for them until their step.

    `blocks` hold the history's full pages; `borrowed` are for what lies behind these, where the step writes at all.
    """

    history: Sequence[int]
    items: np.ndarray
    blocks: list[KVCacheBlock]
    borrowed: list[KVCacheBlock]
    tail: int

    @property
    def rows(self) -> int:
        return self.tail + len(self.items)


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a graph is captured for: `users`, `count` candidates of each at most, and whether the step writes to the cache."""

    users: int
    count: int
    writes: bool


@dataclasses.dataclass(frozen=True)
class Launched:
    """A step on its way: the rows of `chances` (T, 3) that are each request's answer, once `event` has happened."""

    rows: list[slice]
    chances: Tensor
    event: torch.cuda.Event | None

    def answers(self) -> list[Tensor]:
        """Probabilities (C, 3) of engagement, retention and monetization for each request; waits for the device."""
        if self.event is not None:
            self.event.synchronize()
        return [self.chances[rows].clone() for rows in self.rows]


class _Numbers:
    """All numbers of a step in one int32 tensor, which one copy brings to the device, and views of its parts.

    `table` (B, pages), `offsets` (B + 1,), `lens` and `history` (B,), `tokens` and `slots` (T,).
    """

    def __init__(self, users: int, pages: int, rows: int, **where):
        parts = {"table": users * pages, "offsets": users + 1, "lens": users, "history": users, "tokens": rows, "slots": rows}
        padded = [-(-size // 4) * 4 for size in parts.values()]  # Triton has other variants for odd addresses
        self.all = torch.zeros(sum(padded), dtype=torch.int32, **where)
        views = (view[:size] for size, view in zip(parts.values(), self.all.split(padded)))
        table, self.offsets, self.lens, self.history, self.tokens, self.slots = views
        self.table = table.view(users, pages)


class CachedScores:
    """Scores candidates in the process of vLLM's engine `core`, between its steps; by graphs once `capture` was called.

    `most`: candidates of one request. Calls come from one thread, and no step of vLLM runs meanwhile.
    """

    def __init__(self, core, most: int):
        config, runner = core.vllm_config, core.model_executor.driver_worker.worker.model_runner
        self.model, self.vllm_config, self.device, self.most = runner.get_model(), config, runner.device, most
        self.pool = core.scheduler.kv_cache_manager.block_pool
        self.page, self.most_users = config.cache_config.block_size, MOST_USERS
        self._hash = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
        self._pages = -(-(self.model.config.max_seq_len + most) // self.page)
        self._graphs: dict[Shape, tuple] = {}

    def writes(self, history: Sequence[int]) -> bool:
        """Whether a step writes to the cache for such a history; those that do share none with those that do not."""
        return not self.model.slots.fused or len(history) % self.page > 0

    def hold(self, history: Sequence[int], items: np.ndarray) -> Held | None:
        """Hold what a step for this request needs; None where vLLM must see to it: not all is cached, or no block is free."""
        config, tail = self.model.config, len(history) % self.page
        new = history[len(history) - tail :] if tail else ()
        if not 0 < len(history) <= config.max_seq_len or not all(0 <= token < config.token_limit for token in new):
            return None
        blocks, parent = [], None
        for start in range(0, len(history) - tail, self.page):
            parent = hash_block_tokens(self._hash, parent, history[start : start + self.page])
            found = self.pool.get_cached_block(parent, [0])
            if found is None:
                return None
            blocks += found
        self.pool.touch(blocks)
        need = -(-(tail + len(items)) // self.page) if self.writes(history) else 0
        if need > self.pool.get_num_free_blocks():
            self.pool.free_blocks(reversed(blocks))
            return None
        return Held(history, items, blocks, self.pool.get_new_blocks(need), tail)

    @torch.inference_mode()
    def launch(self, requests: Sequence[Held]) -> Launched:
        """Begin the step of at most MOST_USERS requests that share one, and give back what was held for them."""
        shape = Shape(len(requests), max(len(r.items) for r in requests), self.writes(requests[0].history))
        fitting = [s for s in self._graphs if s.writes == shape.writes and s.users >= shape.users and s.count >= shape.count]
        if fitting:
            shape = min(fitting, key=self._rows)
        host = _Numbers(
            shape.users, self._pages, self._rows(shape) if fitting or not shape.writes else sum(r.rows for r in requests),
            pin_memory=self.device.type == "cuda",
        )  # fmt: skip
        rows = self._fill(host, shape, requests)
        if fitting:
            graph, numbers, chances = self._graphs[shape]
            numbers.all.copy_(host.all, non_blocking=True)
            graph.replay()
        else:
            numbers = _Numbers(shape.users, self._pages, len(host.tokens), device=self.device)
            numbers.all.copy_(host.all, non_blocking=True)
            chances = self._step(numbers, shape)
        # Whatever writes to these blocks next comes behind this step on the device.
        for request in requests:
            self.pool.free_blocks(request.borrowed)
            self.pool.free_blocks(reversed(request.blocks))
        if self.device.type != "cuda":
            return Launched(rows, chances, None)
        answer, event = torch.empty_like(chances, device="cpu", pin_memory=True), torch.cuda.Event()
        answer.copy_(chances, non_blocking=True)
        event.record()
        return Launched(rows, answer, event)

    def _rows(self, shape: Shape) -> int:
        return shape.users * (shape.count + shape.writes * self.page)

    def _fill(self, numbers: _Numbers, shape: Shape, requests: Sequence[Held]) -> list[slice]:
        """Write the requests' numbers (host); the rows of each one's candidates."""
        table, offsets, lens, history, tokens, slots = (
            part.numpy() for part in
            (numbers.table, numbers.offsets, numbers.lens, numbers.history, numbers.tokens, numbers.slots)
        )  # fmt: skip
        limit, start, rows = self.model.config.token_limit, 0, []
        slots.fill(-1)
        for b, request in enumerate(requests):
            held = [block.block_id for block in (*request.blocks, *request.borrowed)]
            table[b, : len(held)] = held
            first, end = start + request.tail, start + request.rows
            tokens[start:first] = request.history[len(request.history) - request.tail :]
            tokens[first:end] = request.items
            tokens[first:end] += limit
            history[b] = len(request.history)
            if shape.writes:
                own = np.array(held[len(request.blocks) :], dtype=np.int32)[:, None] * self.page + np.arange(self.page)
                slots[start:end] = own.ravel()[: request.rows]
                offsets[b + 1 :] = end
                lens[b] = len(request.history) + len(request.items)
            rows.append(slice(first, end))
            start = end if shape.writes else start + shape.count
        if not shape.writes:  # every user has as many rows
            offsets[:] = np.arange(shape.users + 1) * shape.count
            lens[:] = history + shape.count
        return rows

    def _step(self, numbers: _Numbers, shape: Shape) -> Tensor:
        """Probabilities (T, 3) of the step's rows."""
        if shape.writes:
            metadata = HSTUMetadata(
                num_tokens=len(numbers.tokens), query_offsets=numbers.offsets, seq_lens=numbers.lens, block_table=numbers.table,
                slots=numbers.slots.long(),
            )  # fmt: skip
            with override_forward_context(create_forward_context(metadata, self.vllm_config)):
                hidden = self.model(numbers.tokens, None)
        else:
            hidden = self.model.against_cache(
                numbers.tokens, numbers.table, numbers.offsets, numbers.lens, numbers.history, shape.count
            )
        return self.model.heads(hidden).float().sigmoid()

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture the steps as CUDA graphs, after a run of each that compiles what it needs."""
        pool = torch.cuda.graph_pool_handle()
        counts = sorted({-(-self.most // part) for part in (1, 2, 4, 8)})
        shapes = [Shape(users, count, writes) for users in (1, 2, 4, MOST_USERS) for count in counts for writes in (False, True)]
        for shape in sorted(shapes, key=self._rows, reverse=True):
            host = _Numbers(shape.users, self._pages, self._rows(shape))
            self._fill(host, shape, [])
            numbers = _Numbers(shape.users, self._pages, self._rows(shape), device=self.device)
            numbers.all.copy_(host.all)
            self._step(numbers, shape)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                chances = self._step(numbers, shape)
            self._graphs[shape] = graph, numbers, chances
