"""What a serving step writes to a paged cache: keys and values of one layer, and once a step what each slot knows besides.

Every kernel reads lengths, offsets and slots from the device only, so that a CUDA graph captured once serves every later step.
The oracle of each is in `hstu_lab.vllm_plugin.slots`, in plain PyTorch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hstu_lab.ops.triton_runtime import add, interpreted


@triton.jit
def write_kv_kernel(
    Keys, Values, Cache, Slots, k_row, k_head, v_row, v_head, c_page, c_slot, c_head, PAGE: tl.constexpr, HEADS: tl.constexpr,
    D: tl.constexpr, HEADS_PAD: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """One token a program: all heads of its key and value to its slot; the value behind the key."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(Slots + token).to(tl.int64)
    if slot >= 0:
        head, column = tl.arange(0, HEADS_PAD)[:, None], tl.arange(0, D_PAD)[None, :]
        inside = (head < HEADS) & (column < D)
        target = Cache + slot // PAGE * c_page + slot % PAGE * c_slot + head * c_head + column
        key = tl.load(Keys + token * k_row + head * k_head + column, mask=inside)
        tl.store(target, key.to(Cache.dtype.element_ty), mask=inside)
        value = tl.load(Values + token * v_row + head * v_head + column, mask=inside)
        tl.store(target + D, value.to(Cache.dtype.element_ty), mask=inside)


def write_kv(k: Tensor, v: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Keys and values (T, H, d) to `slots` (at most T,) of cache (blocks, block_size, H, 2 d); negative slots are padding."""
    count, heads, d = len(slots), k.shape[1], k.shape[2]
    if not count:
        return
    write_kv_kernel[(count,)](
        k, v, cache, slots, *k.stride()[:2], *v.stride()[:2], *cache.stride()[:3], PAGE=cache.shape[1], HEADS=heads, D=d,
        HEADS_PAD=triton.next_power_of_2(heads), D_PAD=triton.next_power_of_2(d),
    )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def note_kernel(Gaps, Items, Slots, SlotGaps, SlotItems, count, BLOCK: tl.constexpr):
    """Gap and item of every token of the step to its slot."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(Slots + at, mask=at < count, other=-1).to(tl.int64)
    tl.store(SlotGaps + slot, tl.load(Gaps + at, mask=at < count, other=0), mask=slot >= 0)
    tl.store(SlotItems + slot, tl.load(Items + at, mask=at < count, other=0), mask=slot >= 0)


@triton.jit(do_not_specialize=["table_row"])
def add_up_kernel(
    BlockTable, QueryOffsets, SeqLens, SlotGaps, SlotTimes, QueryTimes, HistoryLens, table_row, PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One sequence a program: its gaps so far add up to the times of its new tokens; its non-negative gaps are its history."""
    b = tl.program_id(0).to(tl.int64)
    start = tl.load(QueryOffsets + b).to(tl.int64)
    count = (tl.load(QueryOffsets + b + 1) - start).to(tl.int32)
    seq_len = tl.load(SeqLens + b).to(tl.int32)
    table = BlockTable + b * table_row
    near = tl.arange(0, BLOCK)
    now = tl.full((1,), 0, tl.int64)
    history = tl.full((1,), 0, tl.int32)
    for first in range(0, seq_len - count, BLOCK):
        position = first + near
        cached = position < seq_len - count
        slot = tl.load(table + position // PAGE, mask=cached, other=0).to(tl.int64) * PAGE + position % PAGE
        gap = tl.load(SlotGaps + slot, mask=cached, other=-1)
        history += tl.reduce((gap >= 0).to(tl.int32), 0, add)
        now += tl.reduce(tl.where(gap > 0, gap, 0).to(tl.int64), 0, add)
    for first in range(0, count, BLOCK):
        position = seq_len - count + first + near
        new = first + near < count
        slot = tl.load(table + position // PAGE, mask=new, other=0).to(tl.int64) * PAGE + position % PAGE
        gap = tl.load(SlotGaps + slot, mask=new, other=-1)
        history += tl.reduce((gap >= 0).to(tl.int32), 0, add)
        seconds = tl.where(gap > 0, gap, 0).to(tl.int64)
        times = now + tl.associative_scan(seconds, 0, add)
        tl.store(SlotTimes + slot, times, mask=new)
        tl.store(QueryTimes + start + first + near, times, mask=new)
        now += tl.reduce(seconds, 0, add)
    tl.store(HistoryLens + b + tl.arange(0, 1), history)


def note_tokens(
    gaps: Tensor, items: Tensor, slots: Tensor, block_table: Tensor, query_offsets: Tensor, seq_lens: Tensor,
    slot_gaps: Tensor, slot_items: Tensor, slot_times: Tensor, query_times: Tensor, history_lens: Tensor,
) -> None:  # fmt: skip
    """Note a step's tokens in their slots and write `slot_times`, `query_times` (T,) and `history_lens` (B,).

    gaps (T,) int32 seconds since the token before, -1 for a candidate; items (T,) int32; slots (T,), negative for padding;
    slot_gaps, slot_items int32 and slot_times int64, each (blocks, block_size). Shapes of the rest as in `attention_paged`.
    """
    block = 64 if interpreted() else 256
    note_kernel[(triton.cdiv(len(slots), block),)](gaps, items, slots, slot_gaps, slot_items, len(slots), BLOCK=block)
    add_up_kernel[(len(seq_lens),)](
        block_table, query_offsets, seq_lens, slot_gaps, slot_times, query_times, history_lens, block_table.stride(0),
        PAGE=slot_gaps.shape[1], BLOCK=block,
    )  # fmt: skip


@triton.jit(do_not_specialize=["table_row", "width"])
def mask_items_kernel(
    Logits, BlockTable, SeqLens, SlotItems, table_row, logits_row, width, PAGE: tl.constexpr, BLOCK: tl.constexpr
):
    """-inf to the logits of every item in the sequence, so that it is not recommended again."""
    b = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = position < tl.load(SeqLens + b).to(tl.int32)
    page = tl.load(BlockTable + b * table_row + position // PAGE, mask=known, other=0).to(tl.int64)
    item = tl.load(SlotItems + page * PAGE + position % PAGE, mask=known, other=-1)
    nothing = tl.full((BLOCK,), float("-inf"), Logits.dtype.element_ty)
    tl.store(Logits + b * logits_row + item, nothing, mask=(item >= 0) & (item < width))


def mask_items(logits: Tensor, block_table: Tensor, seq_lens: Tensor, slot_items: Tensor) -> None:
    """logits (B, V), in place: -inf at the items of the cached tokens of each sequence; item -1 is no item."""
    block = 64 if interpreted() else 256
    longest = block_table.shape[1] * slot_items.shape[1]
    mask_items_kernel[(len(logits), triton.cdiv(longest, block))](
        logits, block_table, seq_lens, slot_items, block_table.stride(0), logits.stride(0), logits.shape[1],
        PAGE=slot_items.shape[1], BLOCK=block,
    )  # fmt: skip


@triton.jit
def keep_kernel(
    Hidden, Gaps, Slots, Cache, hidden_row, c_page, c_slot, PAGE: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr
):
    """One token a program: a candidate's hidden state to the front of its slot."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(Slots + token).to(tl.int64)
    if (slot >= 0) & (tl.load(Gaps + token) < 0):
        column = tl.arange(0, PAD)
        row = tl.load(Hidden + token * hidden_row + column, mask=column < WIDTH)
        target = Cache + slot // PAGE * c_page + slot % PAGE * c_slot
        tl.store(target + column, row.to(Cache.dtype.element_ty), mask=column < WIDTH)


def keep_candidates(hidden: Tensor, gaps: Tensor, slots: Tensor, cache: Tensor) -> None:
    """Rows of hidden (T, d) whose gap is negative to the front of their slots in cache (blocks, block_size, H, 2 x head width).

    The heads of one slot must lie one after another. slots (T,): negative for padding.
    """
    if len(slots):
        width = hidden.shape[1]
        keep_kernel[(len(slots),)](
            hidden, gaps, slots, cache, hidden.stride(0), *cache.stride()[:2], PAGE=cache.shape[1], WIDTH=width,
            PAD=triton.next_power_of_2(width),
        )  # fmt: skip
