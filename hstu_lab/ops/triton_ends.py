"""The hidden state at which each block of the paged cache ends: what a slate begins from, whoever computed the block.

The oracle is in `hstu_lab.vllm_plugin.slots`, in plain PyTorch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["count"])
def keep_ends_kernel(Hidden, Gaps, Slots, Ends, count, hidden_row, PAGE: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr):
    """One token a program: its hidden state to its block's row, unless the step has a later token of history there."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(Slots + token).to(tl.int64)
    more = token + 1 < count
    after = tl.load(Slots + token + 1, mask=more, other=-1).to(tl.int64)
    later = (after == slot + 1) & (after % PAGE != 0) & (tl.load(Gaps + token + 1, mask=more, other=-1) >= 0)
    if (slot >= 0) & (tl.load(Gaps + token) >= 0) & (later == 0):
        column = tl.arange(0, PAD)
        row = tl.load(Hidden + token * hidden_row + column, mask=column < WIDTH)
        tl.store(Ends + slot // PAGE * WIDTH + column, row.to(Ends.dtype.element_ty), mask=column < WIDTH)


def keep_ends(hidden: Tensor, gaps: Tensor, slots: Tensor, ends: Tensor, page: int) -> None:
    """ends (blocks, d), in place: the hidden state (T, d) of the last token of history that the step wrote to each block.

    gaps (T,): negative for candidates; slots (T,): negative for padding; page: slots a block.
    """
    if len(slots):
        width = hidden.shape[1]
        keep_ends_kernel[(len(slots),)](
            hidden, gaps, slots, ends, len(slots), hidden.stride(0), PAGE=page, WIDTH=width, PAD=triton.next_power_of_2(width)
        )
