"""The kernel that keeps each block's last hidden state against its oracle in plain PyTorch, over random serving steps."""

import random

import pytest
import torch
from test_triton_kv_write import step
from triton_cases import DEVICE

from hstu_lab.ops import reference, triton_ops
from hstu_lab.vllm_plugin.slots import Slots


@pytest.mark.parametrize(("page", "width"), [(4, 24), (16, 32)])
def test_ends_of_blocks_step_after_step(page, width):
    draw, done = random.Random(page), [0, 0, 0, 0]
    ours, oracle = Slots(triton_ops), Slots(reference)
    cache = torch.empty(1 + 4 * 12, page, 2, 8, device=DEVICE)
    generator = torch.Generator().manual_seed(page)
    for slots in (ours, oracle):
        slots._fit(cache)
    for _ in range(8):
        metadata, gaps, _ = step(draw, page, 12, done, padding=draw.choice([0, 3]))
        hidden = torch.randn(len(gaps), 3 * width, generator=generator).to(DEVICE)[:, :width]  # rows apart
        for slots in (ours, oracle):
            slots.keep_ends(hidden, gaps, metadata)
        torch.testing.assert_close(ours.ends, oracle.ends, rtol=0, atol=0)
    assert oracle.ends.any(1).sum() > 10


def test_the_last_of_a_block_is_kept():
    """Said out loud: of a block's tokens the last of the history; a candidate behind it and padding do not count."""
    for ops in (triton_ops, reference):
        slots = Slots(ops)
        slots._fit(torch.empty(4, 4, 2, 8, device=DEVICE))
        metadata = type("Step", (), {"slots": torch.tensor([4, 5, 6, 7, 12, 13, -1], device=DEVICE)})
        gaps = torch.tensor([0, 9, 9, 9, 9, -1, 0], device=DEVICE)
        hidden = torch.arange(7.0, device=DEVICE).unsqueeze(1).repeat(1, 8)
        slots.keep_ends(hidden, gaps, metadata)
        assert slots.ends[:, 0].tolist() == [0, 3, 0, 4]
