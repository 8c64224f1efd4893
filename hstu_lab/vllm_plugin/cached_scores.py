"""Candidates against histories that are in the prefix cache: one step of our own, beside vLLM's scheduler.

As tokens of a prompt (`hstu_lab.vllm_plugin.candidates`) candidates are hashed, given blocks, scheduled and sampled for, all of
it on the host and none of it needed: they only read the cache. Here the history's full blocks are looked up as vLLM would, and
one CUDA graph leads from the candidates' ids to their probabilities. Events behind the last full block, the tail, are computed
with them, in a block that is borrowed for the step. A history that is not cached is vLLM's, to be cached with all others.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import KVCacheBlock, hash_block_tokens

from hstu_lab.vllm_plugin.attention import HSTUMetadata

MOST_USERS = 8
"""Users of one step; their candidates fill a GPU."""


@dataclasses.dataclass(frozen=True)
class Held:
    """Candidates (C,) int32, table rows, after a history (tokens), and the blocks that are held for them until their step.

    `blocks` hold the history's full pages; `borrowed`, one block or none, is for its tail, the tokens behind them.
    """

    history: Sequence[int]
    items: np.ndarray
    blocks: list[KVCacheBlock]
    borrowed: list[KVCacheBlock]
    tail: Sequence[int]


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a graph is captured for: so many users, candidates of each at most, and rows for the tails of all."""

    users: int
    count: int
    tails: int

    @property
    def rows(self) -> int:
        return self.tails + self.users * self.count


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

    `table` (B, pages), `offsets` (B + 1,) and `slots` (R,) of the tails, `lens` (B,) of the histories, `tokens` (R + B x count,):
    tails end to end, then every user's candidates.
    """

    def __init__(self, shape: Shape, pages: int, **where):
        parts = (shape.users * pages, shape.users + 1, shape.users, shape.rows, shape.tails)
        padded = [-(-size // 4) * 4 for size in parts]  # Triton has other variants for odd addresses
        self.all = torch.zeros(sum(padded), dtype=torch.int32, **where)
        table, self.offsets, self.lens, self.tokens, self.slots = (
            view[:size] for size, view in zip(parts, self.all.split(padded))
        )  # fmt: skip
        self.table = table.view(shape.users, pages)


class CachedScores:
    """Scores candidates in the process of vLLM's engine `core`, between its steps; by graphs once `capture` was called.

    `most`: candidates of one request. Calls come from one thread, and no step of vLLM runs meanwhile. vLLM counts none of
    it in its metrics; `totals` does: requests, candidates, tokens that were cached and tail tokens that were computed.
    """

    def __init__(self, core, most: int):
        config, runner = core.vllm_config, core.model_executor.driver_worker.worker.model_runner
        self.model, self.device, self.most, self.most_users = runner.get_model(), runner.device, most, MOST_USERS
        self.pool, self.page = core.scheduler.kv_cache_manager.block_pool, config.cache_config.block_size
        self._hash = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
        self._pages = -(-self.model.config.max_seq_len // self.page)
        self._graphs: dict[Shape, tuple] = {}
        self.totals = collections.Counter(requests=0, candidates=0, cached_tokens=0, tail_tokens=0)

    def hold(self, history: Sequence[int], items: np.ndarray) -> Held | None:
        """Hold what a step for this request needs; None where vLLM must see to it: not all is cached, or no block is free."""
        config, whole = self.model.config, len(history) // self.page * self.page
        tail = history[whole:]
        if not 0 < len(history) <= config.max_seq_len or not all(0 <= token < config.token_limit for token in tail):
            return None
        blocks, parent = [], None
        for start in range(0, whole, self.page):
            parent = hash_block_tokens(self._hash, parent, history[start : start + self.page])
            found = self.pool.get_cached_block(parent, [0])
            if found is None:
                return None
            blocks += found
        self.pool.touch(blocks)
        if tail and not self.pool.get_num_free_blocks():
            self.pool.free_blocks(reversed(blocks))
            return None
        return Held(history, items, blocks, self.pool.get_new_blocks(1 if tail else 0), tail)

    @torch.inference_mode()
    def launch(self, requests: Sequence[Held]) -> Launched:
        """Begin the step of at most MOST_USERS requests, and give back what was held for them."""
        shape = Shape(len(requests), max(len(r.items) for r in requests), sum(len(r.tail) for r in requests))
        fitting = [
            s for s in self._graphs
            if s.users >= shape.users and s.count >= shape.count and s.tails >= shape.tails and bool(s.tails) == bool(shape.tails)
        ]  # fmt: skip
        if fitting:
            shape = min(fitting, key=lambda s: s.rows)
        host = _Numbers(shape, self._pages, pin_memory=self.device.type == "cuda")
        self._fill(host, shape, requests)
        if fitting:
            graph, numbers, chances = self._graphs[shape]
            numbers.all.copy_(host.all, non_blocking=True)
            graph.replay()
        else:
            numbers = _Numbers(shape, self._pages, device=self.device)
            numbers.all.copy_(host.all, non_blocking=True)
            chances = self._step(numbers, shape)
        self.totals.update(
            requests=len(requests), candidates=sum(len(r.items) for r in requests),
            cached_tokens=self.page * sum(len(r.blocks) for r in requests), tail_tokens=sum(len(r.tail) for r in requests),
        )  # fmt: skip
        # Whatever writes to these blocks next comes behind this step on the device.
        for request in requests:
            self.pool.free_blocks(request.borrowed)
            self.pool.free_blocks(reversed(request.blocks))
        rows = [slice(b * shape.count, b * shape.count + len(request.items)) for b, request in enumerate(requests)]
        if self.device.type != "cuda":
            return Launched(rows, chances, None)
        answer, event = torch.empty_like(chances, device="cpu", pin_memory=True), torch.cuda.Event()
        answer.copy_(chances, non_blocking=True)
        event.record()
        return Launched(rows, answer, event)

    def _fill(self, numbers: _Numbers, shape: Shape, requests: Sequence[Held]) -> None:
        """Write the requests' numbers (host)."""
        table, offsets, lens, tokens, slots = (
            part.numpy() for part in (numbers.table, numbers.offsets, numbers.lens, numbers.tokens, numbers.slots)
        )  # fmt: skip
        slots.fill(-1)
        items, end = tokens[shape.tails :].reshape(shape.users, shape.count), 0
        for b, request in enumerate(requests):
            held = [block.block_id for block in (*request.blocks, *request.borrowed)]
            table[b, : len(held)] = held
            lens[b] = len(request.history)
            items[b, : len(request.items)] = request.items
            if request.tail:
                start, end = end, end + len(request.tail)
                tokens[start:end] = request.tail
                slots[start:end] = held[-1] * self.page + np.arange(len(request.tail))
            offsets[b + 1 :] = end
        items += self.model.config.token_limit

    def _step(self, numbers: _Numbers, shape: Shape) -> Tensor:
        """Probabilities (B x count, 3) of the step's candidates."""
        model, slots, tails = self.model, self.model.slots, shape.tails
        caches = [attention.kv_cache for attention in model.attention]
        x, gaps, items = self._encode(numbers.tokens)
        table, lens = numbers.table, numbers.lens
        where = table, numbers.offsets, lens
        step = HSTUMetadata(tails, numbers.offsets, lens, table, numbers.slots.long())
        if tails:
            slots.note(gaps[:tails], items[:tails], step, caches[0])
        last = (lens - 1).clamp(min=0).long()
        block = table.gather(1, (last // self.page).unsqueeze(1)).squeeze(1).long()
        times = slots.times.view(-1)[block * self.page + last % self.page].repeat_interleave(
            shape.count, output_size=shape.users * shape.count
        )
        offsets = torch.arange(shape.users + 1, dtype=torch.int32, device=self.device) * shape.count
        after = table, offsets, lens + shape.count, lens
        if slots.fused and not tails:
            from hstu_lab.ops.triton_candidates import candidates_stack

            hidden = candidates_stack(x, model.stack, caches, *after, times, slots.times, shape.count)
            return model.heads(hidden).float().sigmoid()
        common, buckets = {"divisor": model.config.max_seq_len, "slot_times": slots.times}, []

        def attend(layer, q, k, v, bias):
            keys, values = caches[layer].tensor_split(2, dim=-1)
            own = k[tails:], v[tails:]
            if tails:
                slots.write_kv(k[:tails], v[:tails], caches[layer], step.slots)
                before = model.ops.attention_paged(
                    q[:tails], keys, values, *where, bias=bias, query_times=step.query_times, max_queries=self.page, **common
                )  # fmt: skip
            if slots.fused:
                from hstu_lab.ops.triton_candidates import attention_candidates, time_buckets

                if not buckets:  # the same for all layers
                    buckets.append(time_buckets(bias, *after, times, slots.times))
                scored = attention_candidates(
                    q[tails:], keys, values, *after, *buckets, divisor=model.config.max_seq_len, bias=bias, own=own,
                    max_queries=shape.count,
                )  # fmt: skip
            else:
                scored = model.ops.attention_paged(
                    q[tails:], keys, values, table, offsets, lens, bias=bias, query_times=times, candidates=own, **common
                )  # fmt: skip
            return torch.cat([before, scored]) if tails else scored

        return model.heads(model.stack(x, attend)[tails:]).float().sigmoid()

    def _encode(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """tokens (T,) -> the stack's input (T, d_model), gaps (T,) in seconds and items (T,)."""
        model = self.model
        if not model.slots.fused or model.encoder_tables is None:
            return model.encode(tokens)
        from hstu_lab.ops.triton_encoder import read_tokens

        (x, gaps, items), encoder, ops = read_tokens(tokens, model.encoder_tables), model.encoder, model.ops
        hidden = ops.layer_norm(x, encoder.norm.weight, encoder.norm.bias, encoder.norm.eps)
        hidden = ops.project_silu(hidden, encoder.up.weight, encoder.up.bias)
        return ops.project_residual(hidden, encoder.down.weight, encoder.down.bias, x), gaps, items

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture the steps as CUDA graphs, after a run of each that compiles what it needs."""
        pool = torch.cuda.graph_pool_handle()
        counts = sorted({-(-self.most // part) for part in (1, 2, 4, 8)})
        shapes = [
            Shape(users, count, tails) for users in (1, 2, 4, MOST_USERS) for count in counts for tails in (0, users * self.page)
        ]
        for shape in sorted(shapes, key=lambda s: -s.rows):
            host, numbers = _Numbers(shape, self._pages), _Numbers(shape, self._pages, device=self.device)
            self._fill(host, shape, [])
            numbers.all.copy_(host.all)
            self._step(numbers, shape)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                chances = self._step(numbers, shape)
            self._graphs[shape] = graph, numbers, chances
