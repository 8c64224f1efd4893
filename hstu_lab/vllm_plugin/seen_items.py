"""Never recommend what the user has seen: a vLLM V1 logits processor that masks given and generated items."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates


class SeenItems(LogitsProcessor):
    """Masks `SamplingParams.extra_args["seen"]` (item ids) and every item that the request has generated."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams):
        """Raises ValueError where `seen` is not a list of non-negative integers."""
        seen = (sampling_params.extra_args or {}).get("seen")
        if seen is not None and not (isinstance(seen, list) and all(isinstance(i, int) and i >= 0 for i in seen)):
            raise ValueError("extra_args['seen'] must be a list of item ids (non-negative integers)")

    def __init__(self, vllm_config, device: torch.device, is_pin_memory: bool):
        self.device = device
        self.requests: dict[int, tuple[Tensor, list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self.requests, batch_update, self._add)

    def _add(self, params: SamplingParams, prompt: list[int] | None, generated: list[int]) -> tuple[Tensor, list[int]] | None:
        seen = (params.extra_args or {}).get("seen")
        if seen is None:
            return None
        return torch.tensor(seen, dtype=torch.int64, device=self.device), generated

    def apply(self, logits: Tensor) -> Tensor:
        """logits (B, num_items), masked in place. Ids beyond the item table are ignored."""
        for row, (seen, generated) in self.requests.items():
            for ids in (seen, torch.tensor(generated, dtype=torch.int64, device=self.device)):
                logits[row, ids[(ids >= 0) & (ids < logits.shape[-1])]] = -torch.inf
        return logits
