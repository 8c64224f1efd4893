"""vLLM's sampler for what recommenders ask: the best items with their log-probabilities, no temperature, no penalties.

vLLM's own also ranks the sampled token among the whole vocabulary and prepares for much that no request here can ask for, in
every step. What this one does not know it leaves to vLLM's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from hstu_lab.vllm_plugin.candidates import TaskScores
from hstu_lab.vllm_plugin.slates import SlateLoop, SlateRows


def is_plain(wanted: SamplingMetadata) -> bool:
    """Whether the requests of a batch want the best items, and nothing that only vLLM's own sampler knows."""
    return (
        wanted.all_greedy and wanted.no_penalties and not wanted.bad_words_token_ids and wanted.max_num_logprobs != -1
        and wanted.allowed_token_ids_mask is None and not wanted.logprob_token_ids
    )  # fmt: skip


class RecommendationSampler(Sampler):
    """Greedy, with the log-probabilities of the best items; rows that want a slate get what `loop` generates for them, rows of
    candidates the logits of these.

    `last` (B, 1) are the items of the step before; `given` is the outcome of a step that `SteadySteps` made and nobody has seen.
    """

    def __init__(self, loop: SlateLoop):
        super().__init__("processed_logprobs")
        self.loop = loop
        self.given: SamplerOutput | None = None
        self.last: Tensor | None = None

    def forward(
        self, logits: Tensor, sampling_metadata: SamplingMetadata, predict_bonus_token: bool = False, logprobs_mode_override=None
    ) -> SamplerOutput:
        """logits (B, V) -> one item a request, and the best items' ids and log-probabilities (B, 1 + most wanted)."""
        if self.given is not None:
            given, self.given = self.given, None
            return given
        wanted, count = sampling_metadata, sampling_metadata.max_num_logprobs
        processors = wanted.logitsprocs.non_argmax_invariant
        asked = [p for p in processors if isinstance(p, SlateRows | TaskScores) and p.requests]
        if not is_plain(wanted):
            if asked:
                raise ValueError(
                    "slates and candidates share no step with requests that are not greedy: give those another engine"
                )
            output = super().forward(logits, sampling_metadata, predict_bonus_token, logprobs_mode_override)
            self.last = output.sampled_token_ids
            return output
        if asked and sum(len(p.requests) for p in asked) == len(logits):  # nobody wants these logits
            shape, device = (len(logits), 1 + count), logits.device
            found = torch.zeros(shape, dtype=torch.int32, device=device)
            scores = torch.full(shape, -torch.inf, device=device)
        else:
            for processor in processors:
                logits = processor.apply(logits)
            found, scores = self._best(logits.float(), count)
        for processor in asked:
            if isinstance(processor, TaskScores):
                processor.write(scores)
            else:
                rows, *rest = processor.wanted(logits.shape[1])
                found[rows, : self.loop.count], scores[rows, : self.loop.count] = self._items(rows, *rest)
        self.last = sampled = found[:, :1]
        if count is None:
            return SamplerOutput(sampled_token_ids=sampled, logprobs_tensors=None)
        ranks = torch.zeros(len(found), dtype=torch.int32, device=found.device)
        return SamplerOutput(sampled_token_ids=sampled, logprobs_tensors=LogprobsTensors(found, scores, ranks))

    @staticmethod
    def _best(logits: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
        found = logits.argmax(-1, keepdim=True)
        if count is None:
            return found.int(), found
        scores = logits.log_softmax(-1)
        best = scores.gather(1, found)
        if count:
            more, items = scores.topk(min(count, scores.shape[1]), dim=-1)
            found, best = torch.cat([found, items], 1), torch.cat([best, more], 1)
            if (missing := 1 + count - found.shape[1]) > 0:  # a slate's row is longer than such a catalog
                found, best = F.pad(found, (0, missing)), F.pad(best, (0, missing), value=-torch.inf)
        return found.int(), best

    def _items(self, *slates: Tensor) -> tuple[Tensor, Tensor]:
        items, scores = self.loop(*slates)
        return items.int(), scores
