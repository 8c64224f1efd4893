"""What a slot of the paged cache knows besides keys and values: its token's gap, time and item.

One record serves all layers. Being indexed by slot it shares the blocks' fate (prefix reuse, preemption, eviction), and
everything is worked out on the device: a step waits for nothing and can be replayed as a CUDA graph.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

CANDIDATE = -1
"""The gap of a candidate: it takes the time of the history's last event, and no later token sees it."""


class Slots:
    """gaps, items int32 and times int64, each (blocks, block_size), made anew where the cache has another shape.

    `step` is the metadata of the step that runs, for what happens after the layers; `task_logits` (the model's) scores what
    lies in given slots; `with_candidates` says by name who has requests with candidates in the batch. `ops` is a module of
    `hstu_lab.ops`.
    """

    def __init__(self, ops):
        self.ops, self.fused = ops, ops.name == "triton"
        self.step = None
        self.task_logits: Callable[[Tensor], Tensor] | None = None
        self.gaps: Tensor | None = None
        self.ends: Tensor | None = None
        self.with_candidates: dict[str, bool] = {}

    def _fit(self, cache: Tensor) -> None:
        shape = cache.shape[:2]
        if self.gaps is None or self.gaps.shape != shape:
            self.gaps, self.items = (torch.zeros(shape, dtype=torch.int32, device=cache.device) for _ in range(2))
            self.times = torch.zeros(shape, dtype=torch.int64, device=cache.device)

    def note(self, gaps: Tensor, items: Tensor, metadata, cache: Tensor) -> None:
        """Note the step's tokens; sets `metadata.query_times` (T,) and `metadata.history_lens` (B,).

        gaps (T,): seconds since the token before, or CANDIDATE; items (T,): -1 or 0 where the token is no item. A token's time
        is the sum of its sequence's gaps, added up from the slots and not from a slot's time: vLLM lets a request begin with
        blocks that another one fills in this very step.
        """
        self._fit(cache)
        where = metadata.block_table, metadata.query_offsets, metadata.seq_lens
        gaps, items = gaps.int(), items.int()
        if self.fused:
            from hstu_lab.ops.triton_kv_write import note_tokens

            metadata.query_times = torch.empty(len(gaps), dtype=torch.int64, device=gaps.device)
            metadata.history_lens = torch.empty_like(metadata.seq_lens)
            slots = self.gaps, self.items, self.times
            note_tokens(gaps, items, metadata.slots, *where, *slots, metadata.query_times, metadata.history_lens)
        else:
            written = metadata.slots >= 0
            slots = metadata.slots[written]
            self.gaps.view(-1)[slots], self.items.view(-1)[slots] = gaps[written], items[written]
            times, metadata.history_lens = self._add_up(*where)
            metadata.query_times = times.new_zeros(len(gaps))
            metadata.query_times[written] = self.times.view(-1)[slots]

    def _add_up(self, block_table: Tensor, query_offsets: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor]:
        slots = self.of_sequences(block_table)
        position = torch.arange(slots.shape[1], device=slots.device)
        inside = position < seq_lens.unsqueeze(-1)
        gaps = self.gaps.view(-1)[slots].masked_fill(~inside, CANDIDATE)
        times = gaps.clamp(min=0).long().cumsum(1)
        new = inside & (position >= (seq_lens - query_offsets.diff()).unsqueeze(-1))
        self.times.view(-1)[slots[new]] = times[new]
        return times, (gaps >= 0).sum(1).to(seq_lens.dtype)

    def of_sequences(self, block_table: Tensor) -> Tensor:
        """Slot of every position: block_table (B, blocks) -> (B, blocks x block_size) int64."""
        size = self.gaps.shape[1]
        within = torch.arange(size, device=block_table.device)
        return (block_table.long().unsqueeze(-1) * size + within).flatten(1)

    def attention(self, q: Tensor, keys: Tensor, values: Tensor, metadata, *, divisor: float, bias) -> Tensor:
        """Attention of the step's queries (T, H, d), their keys and values written already -> (T, H, d)."""
        where = metadata.block_table, metadata.query_offsets, metadata.seq_lens
        known = {"bias": bias, "query_times": metadata.query_times, "slot_times": self.times}
        common = {**known, "divisor": divisor, "history_lens": metadata.history_lens}
        if not self.fused:
            return self.ops.attention_paged(q, keys, values, *where, **common)
        from hstu_lab.ops.triton_serving import attention_step, list_tiles

        if metadata.tiles is None:  # the first layer lists them for all
            metadata.tiles = list_tiles(*where, metadata.history_lens, q, keys.shape[1], **known)
        return attention_step(q, keys, values, *where, metadata.tiles, **common)

    def divide(self, metadata):
        """The metadata of a step's fresh requests, and of the others; made by the first layer for all."""
        if metadata.parts is None:
            first, start = metadata.fresh.first, metadata.fresh.start
            lens, offsets = metadata.history_lens, metadata.query_offsets
            candidates = metadata.seq_lens[first:] - lens[first:] if any(self.with_candidates.values()) else None
            times = metadata.query_times
            make = functools.partial(dataclasses.replace, metadata, fresh=None)
            # Copies: Triton compiles another variant, in the midst of serving, for a tensor that begins at an odd address.
            metadata.parts = (
                make(
                    query_offsets=offsets[first:] - start, query_times=times[start:].clone(),
                    candidates=candidates,
                ),
                make(
                    query_offsets=offsets[: first + 1], seq_lens=metadata.seq_lens[:first], history_lens=lens[:first],
                    block_table=metadata.block_table[:first], query_times=times[:start],
                ),
            )  # fmt: skip
        return metadata.parts

    def mask_items(self, logits: Tensor, lens: Tensor, block_table: Tensor) -> None:
        """logits (B, V), in place: -inf at the items of the first `lens` (B,) tokens of each sequence."""
        if self.fused:
            from hstu_lab.ops.triton_kv_write import mask_items

            mask_items(logits, block_table, lens, self.items)
            return
        slots, width = self.of_sequences(block_table), logits.shape[1]
        items = self.items.view(-1)[slots].long()
        known = (torch.arange(slots.shape[1], device=slots.device) < lens.unsqueeze(-1)) & (items >= 0) & (items < width)
        hit = torch.zeros(len(logits), width + 1, dtype=torch.bool, device=logits.device)
        hit.scatter_(1, items.masked_fill(~known, width), True)
        logits.masked_fill_(hit[:, :width], -torch.inf)

    def write_kv(self, k: Tensor, v: Tensor, cache: Tensor, slots: Tensor) -> None:
        """Keys and values (T, H, d) to cache (blocks, block_size, H, 2 d); negative slots are padding."""
        if self.fused:
            from hstu_lab.ops.triton_kv_write import write_kv

            write_kv(k, v, cache, slots)
            return
        written = slots >= 0
        rows = torch.cat([k[: len(slots)], v[: len(slots)]], dim=-1)
        cache.flatten(0, 1)[slots[written]] = rows[written].to(cache.dtype)

    def keep_candidates(self, hidden: Tensor, gaps: Tensor, metadata, cache: Tensor) -> None:
        """Final hidden states (T, d) of candidates to the last layer's cache, where their keys and values have served.

        So they outlive the step: vLLM may cut one request's candidates into several.
        """
        if self.fused:
            from hstu_lab.ops.triton_kv_write import keep_candidates

            keep_candidates(hidden, gaps, metadata.slots, cache)
            return
        kept = (metadata.slots >= 0) & (gaps[: len(metadata.slots)] < 0)
        cache.view(-1, cache[0, 0].numel())[metadata.slots[kept], : hidden.shape[1]] = hidden[: len(kept)][kept].to(cache.dtype)

    @staticmethod
    def kept(slots: Tensor, cache: Tensor, width: int) -> Tensor:
        """What `keep_candidates` left in those slots (S,): (S, width)."""
        return cache.view(-1, cache[0, 0].numel())[slots, :width]

    def keep_ends(self, hidden: Tensor, gaps: Tensor, metadata) -> None:
        """Final hidden states (T, d) to `ends` (blocks, d): of each block, that of the last history token which the step wrote.

        A slate begins from it, and whoever finds the block in the prefix cache finds it too.
        """
        blocks, page = self.gaps.shape
        if self.ends is None or self.ends.shape[0] != blocks:
            self.ends = hidden.new_zeros(blocks, hidden.shape[1])
        slots = metadata.slots
        if self.fused:
            from hstu_lab.ops.triton_ends import keep_ends

            keep_ends(hidden, gaps, slots, self.ends, page)
            return
        kept = (slots >= 0) & (gaps[: len(slots)] >= 0)
        later = (slots[1:] == slots[:-1] + 1) & (slots[1:] % page != 0) & kept[1:]
        kept[:-1] &= ~later
        self.ends[slots[kept] // page] = hidden[: len(slots)][kept]
