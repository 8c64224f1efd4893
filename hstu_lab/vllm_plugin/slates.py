"""A slate in one step of the engine: the device generates all items one after another, and the host hears of them once.

Continuous batching lets requests of different lengths share steps, at the price of the host's work between any two items.
All slates have the same length, so there is nothing to gain from it. The prompt is the history, a mark and tokens that only
reserve the slots of the items; when vLLM has computed the history, the loop below begins from its last hidden state and writes
each item's keys and values to the next of those slots. The mark is another one for every request (see
`hstu_lab.vllm_plugin.candidates`), so that the prefix cache finds the history's blocks again and never those of a slate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.forward_context import create_forward_context, override_forward_context
from vllm.v1.sample.logits_processor import BatchUpdate

from hstu_lab.config import ModelConfig
from hstu_lab.vllm_plugin import candidates
from hstu_lab.vllm_plugin.attention import HSTUMetadata
from hstu_lab.vllm_plugin.seen_items import RequestRows, slots_of, to_device

PAIRS = 4096
"""Most (row, item) pairs of seen items that a captured loop masks; more of them are masked outside of graphs."""


def prompt(history: Sequence[int], number: int, config: ModelConfig) -> list[int]:
    """Tokens of a request for a slate after the tokens of `history`; `number` tells requests apart."""
    return candidates.prompt(history, [0] * (config.slate_size - 2), number, config)


class SlateRows(RequestRows):
    """Which requests of the batch want a slate: those with `SamplingParams.extra_args["slate"]`, the length of their history."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams):
        """Raises ValueError where `slate` is not a whole number from 1 up."""
        length = (sampling_params.extra_args or {}).get("slate")
        if length is not None and not (isinstance(length, int) and length > 0):
            raise ValueError("extra_args['slate'] must be a whole number from 1 up")

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        super().update_state(batch_update)
        slots_of(self.layers).with_candidates["slates"] = bool(self.requests)

    @staticmethod
    def _add(params: SamplingParams, prompt: list[int] | None, generated: list[int]) -> tuple[int, int, list[int]] | None:
        extra = params.extra_args or {}
        return (extra["slate"], len(prompt), extra.get("seen") or []) if "slate" in extra else None

    def apply(self, logits: Tensor) -> Tensor:
        """The sampler calls the loop instead."""
        return logits

    def wanted(self, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """rows (S,), lengths of their histories and prompts (S,), and (2, P): which of the S must not be given which item."""
        if not self.requests:
            return None
        if self._changed:
            entries = [(row, history, length) for row, (history, length, _) in self.requests.items()]
            pairs = [(i, item) for i, (*_, seen) in enumerate(self.requests.values()) for item in seen if item < width]
            self._rows = to_device(entries, self.device).t()
            self._pairs = to_device(pairs, self.device).t() if pairs else torch.zeros(2, 0, dtype=torch.int64, device=self.device)
            self._changed = False
        return *self._rows.unbind(), self._pairs


class SlateLoop:
    """Generates `count` items for each of S requests on the device, greedily; captured as CUDA graphs for some S by `capture`."""

    def __init__(self, model, vllm_config, count: int):
        self.model, self.vllm_config, self.count = model, vllm_config, count
        self.nothing = torch.full((), -torch.inf, device=next(model.parameters()).device)
        self.graphs: dict[int, tuple] = {}

    def __call__(self, rows: Tensor, history: Tensor, prompt: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Items (S, count) int64 and their log-probabilities; anything for requests whose prompt is not computed yet."""
        step = self.model.slots.step
        ready = step.seq_lens[rows] == prompt
        # The others write to vLLM's block 0, which nobody reads.
        lens = torch.where(ready, history, 0).int()
        table = torch.where(ready.unsqueeze(1), step.block_table[rows], 0)
        size = min((size for size in self.graphs if size >= len(rows)), default=None)
        if size is None or pairs.shape[1] > PAIRS:
            return self._generate(table, lens, pairs)
        graph, inputs, outputs = self.graphs[size]
        for place, value in zip(inputs, (table, lens, pairs.t())):
            place[: len(value)] = value
            place[len(value) :] = 0
        graph.replay()
        return tuple(output[: len(rows)] for output in outputs)

    def _generate(self, table: Tensor, lens: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
        model, slots, batch = self.model, self.model.slots, len(lens)
        page, device = slots.gaps.shape[1], lens.device
        offsets = torch.arange(batch + 1, dtype=torch.int32, device=device)

        def block(position: Tensor) -> Tensor:
            return table.gather(1, (position // page).long().unsqueeze(1)).squeeze(1).long()

        hidden, items, scores = slots.ends[block((lens - 1).clamp(min=0))], [], []
        for i in range(self.count):
            logits, position = model.compute_logits(hidden), lens + i
            slots.mask_items(logits, position, table)
            logits.index_put_((pairs[0], pairs[1]), self.nothing)
            item = logits.argmax(-1)
            scores.append(logits.gather(1, item.unsqueeze(1)).squeeze(1) - logits.logsumexp(-1))
            items.append(item)
            if len(items) == self.count:
                break
            metadata = HSTUMetadata(
                num_tokens=batch, query_offsets=offsets, seq_lens=position + 1, block_table=table,
                slots=block(position) * page + position % page,
            )  # fmt: skip
            # The item takes the request's time and has no action: its token is the item itself.
            with override_forward_context(create_forward_context(metadata, self.vllm_config)):
                hidden = model(item.int(), position.long())
        return torch.stack(items, 1), torch.stack(scores, 1)

    def capture(self, sizes: Sequence[int]) -> None:
        """Capture the loop as a CUDA graph for batches of those sizes, after a run that compiles what it needs."""
        blocks = self.model.slots.step.block_table.shape[1]  # of the last step by which vLLM warmed up
        pool, device = torch.cuda.graph_pool_handle(), self.model.slots.gaps.device
        for size in sorted(sizes, reverse=True):
            # Item 0 is no item, so that pairs of zeros mask nothing.
            inputs = (
                torch.zeros(size, blocks, dtype=torch.int32, device=device),
                torch.zeros(size, dtype=torch.int32, device=device),
                torch.zeros(PAIRS, 2, dtype=torch.int64, device=device),
            )
            self._generate(inputs[0], inputs[1], inputs[2].t())
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                outputs = self._generate(inputs[0], inputs[1], inputs[2].t())
            self.graphs[size] = graph, inputs, outputs
