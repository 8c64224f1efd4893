"""Never recommend what the user has seen: a vLLM V1 logits processor that masks given and generated items.

The items of the prompt and those generated lie in the cache's slots, so the mask is one kernel over the block tables and no
work for the host. Only items that were seen but are not in the prompt travel with the request.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates


def to_device(rows: list, device: torch.device) -> Tensor:
    """Whole numbers, or truths, to the device, without waiting for what it is doing."""
    rows = torch.from_numpy(np.array(rows))
    return (rows.pin_memory() if device.type == "cuda" else rows).to(device, non_blocking=True)


def slots_of(layers: dict):
    """The model's `Slots`, by way of any of vLLM's attention layers."""
    return next(iter(layers.values())).impl.slots


class RequestRows(LogitsProcessor):
    """Keeps what `_add` makes of each request of the batch, by its row; `_changed` says that the batch is another one."""

    def __init__(self, vllm_config, device: torch.device, is_pin_memory: bool):
        self.layers = vllm_config.compilation_config.static_forward_context
        self.device = device
        self.requests: dict = {}
        self._changed = True

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self.requests, batch_update, self._add)
        self._changed = self._changed or bool(batch_update)

    @staticmethod
    def _add(params: SamplingParams, prompt: list[int] | None, generated: list[int]):
        """What to keep of a request; None of one that this processor leaves alone."""
        raise NotImplementedError


class SeenItems(RequestRows):
    """Masks, for requests with `SamplingParams.extra_args["seen"]`, those item ids and every item of the sequence so far."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams):
        """Raises ValueError where `seen` is not a list of non-negative integers."""
        seen = (sampling_params.extra_args or {}).get("seen")
        if seen is not None and not (isinstance(seen, list) and all(isinstance(i, int) and i >= 0 for i in seen)):
            raise ValueError("extra_args['seen'] must be a list of item ids (non-negative integers)")

    @staticmethod
    def _add(params: SamplingParams, prompt: list[int] | None, generated: list[int]) -> list[int] | None:
        return (params.extra_args or {}).get("seen")

    def pairs(self) -> Tensor | None:
        """(row, item) (P, 2) of what is masked besides the sequences' own items; None if this batch was never masked."""
        if self._changed:
            return None
        return torch.zeros(0, 2, dtype=torch.int64) if self._pairs is None else torch.stack(self._pairs, 1)

    def apply(self, logits: Tensor) -> Tensor:
        """logits (B, V), masked in place. Ids beyond the item table are ignored."""
        if not self.requests:
            return logits
        slots = slots_of(self.layers)
        count, width = logits.shape
        if self._changed:
            pairs = [(row, item) for row, items in self.requests.items() for item in items if item < width]
            self._pairs = to_device(pairs, self.device).t().unbind() if pairs else None
            wanted = None if len(self.requests) == count else [row in self.requests for row in range(count)]
            self._wanted = None if wanted is None else to_device(wanted, self.device)
            self._changed = False
        lens = slots.step.seq_lens[:count]
        if self._wanted is not None:
            lens = torch.where(self._wanted, lens, 0)
        slots.mask_items(logits, lens, slots.step.block_table)
        if self._pairs is not None:
            logits[self._pairs] = -torch.inf
        return logits
