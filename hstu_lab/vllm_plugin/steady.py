"""Decode steps in which nothing is new but one item a request: a single CUDA graph leads from the last items to the next.

vLLM prepares every step as if it were the first of its kind: some twenty small copies and kernels for lengths, positions, slots
and metadata, then the model's graph, then logits, mask and choice launched one by one. Between two steps of the same requests
only lengths and items differ, and those are on the device already. So such a step is one replay, and the host does what remains:
scheduling, bookkeeping and reading the answer, all of it vLLM's own. Everything else, and the first step after any change of
the batch, takes vLLM's way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from vllm.forward_context import create_forward_context, override_forward_context
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import LogitBiasLogitsProcessor, LogitsProcessor, MinTokensLogitsProcessor
from vllm.v1.worker.gpu_model_runner import ExecuteModelState

from hstu_lab.vllm_plugin.attention import HSTUMetadata
from hstu_lab.vllm_plugin.candidates import TaskScores
from hstu_lab.vllm_plugin.sampling import is_plain
from hstu_lab.vllm_plugin.seen_items import SeenItems
from hstu_lab.vllm_plugin.slates import PAIRS, SlateRows

_KEPT_IN = {
    LogitBiasLogitsProcessor: "biases", MinTokensLogitsProcessor: "min_toks", TaskScores: "requests", SlateRows: "requests"
}  # fmt: skip
"""Where logits processors, other than that of seen items, keep what the requests of the batch ask of them."""


class SteadySteps:
    """Stands before vLLM's model runner of one GPU (or the CPU) and takes the steps that it can; for some batches by graphs.

    The graphs read and advance the runner's own lengths, `runner.seq_lens`, and read its block table: the runner computes the
    lengths anew in each step of its own, and its sampler learns from `given` what was chosen.
    """

    def __init__(self, runner, vllm_config):
        self.runner, self.model, self.vllm_config = runner, runner.get_model(), vllm_config
        most, device = runner.max_num_reqs, runner.device
        self.items = torch.zeros(most, dtype=torch.int32, device=device)
        self.pairs = torch.zeros(PAIRS, 2, dtype=torch.int64, device=device)
        self.offsets = torch.arange(most + 1, dtype=torch.int32, device=device)
        self.ranks = torch.zeros(most, dtype=torch.int32, device=device)
        self.nothing = torch.full((), -torch.inf, device=device)
        self.graphs: dict[int, tuple] = {}
        self._metadata, self._fits, self._follows = None, False, False

    def take(self, scheduler_output) -> bool:
        """Make the step, for vLLM's sampler to report, if it is such a step; what the scheduler wants is left alone otherwise."""
        runner, cached = self.runner, scheduler_output.scheduled_cached_reqs
        batch, count = runner.input_batch, len(cached.req_ids)
        follows, self._follows = self._follows, False
        same = (
            0 < count == batch.num_reqs == scheduler_output.total_num_scheduled_tokens
            and not (scheduler_output.scheduled_new_reqs or cached.resumed_req_ids)
            and all(request in batch.req_id_to_index for request in cached.req_ids)
        )
        # vLLM makes other metadata for another batch. Who is discarded has not got an item yet: the prompt goes on.
        if same and batch.sampling_metadata is not self._metadata:
            self._metadata, self._fits = batch.sampling_metadata, self._takes(batch.sampling_metadata, count)
        if not (same and self._fits) or runner.discard_request_mask.np[:count].any():
            return False
        size = min((size for size in self.graphs if size >= count), default=None)
        if self.graphs and size is None:
            return False
        with runner.synchronize_input_prep():
            runner._update_states(scheduler_output)
            if any(blocks is not None for blocks in cached.new_block_ids):
                batch.block_table.commit_block_table(count)
        if not follows:
            self.items[:count] = runner.sampler.last[:count, 0]
        chosen = self.run(size or count)[:, :count]
        items, scores = chosen[0].unsqueeze(1), chosen[1].view(torch.float32).unsqueeze(1)
        logprobs = None if self._metadata.max_num_logprobs is None else LogprobsTensors(items, scores, self.ranks[:count])
        runner.sampler.given = SamplerOutput(sampled_token_ids=items, logprobs_tensors=logprobs)
        runner.execute_model_state = ExecuteModelState(
            scheduler_output, logits=None, spec_decode_metadata=None, spec_decode_common_attn_metadata=None,
            hidden_states=self.items, sample_hidden_states=self.items, aux_hidden_states=None, ec_connector_output=None,
            cudagraph_stats=None, slot_mappings=None,
        )  # fmt: skip
        self._follows = True
        return True

    def _takes(self, metadata, count: int) -> bool:
        """Whether all requests of the batch want the best unseen item and no more; notes the items that none may be given."""
        seen, others = None, True
        for processor in metadata.logitsprocs.non_argmax_invariant:
            if isinstance(processor, SeenItems):
                seen = processor
            else:
                others = others and not self._asks(processor)
        fits = others and seen is not None and len(seen.requests) == count and is_plain(metadata)
        if not fits or metadata.max_num_logprobs not in (None, 0) or (pairs := seen.pairs()) is None or len(pairs) > PAIRS:
            return False
        self.pairs[: len(pairs)] = pairs
        self.pairs[len(pairs) :] = 0  # item 0 is no item: nothing is masked
        return True

    @staticmethod
    def _asks(processor: LogitsProcessor) -> bool:
        place = _KEPT_IN.get(type(processor))
        return place is None or bool(getattr(processor, place))

    def run(self, size: int) -> Tensor:
        """The next step of `size` requests: (2, size) int32, the items and the bits of their log-probabilities (float32)."""
        if size not in self.graphs:
            return self._next(size)
        graph, chosen = self.graphs[size]
        graph.replay()
        return chosen.clone()  # it is copied to the host while the next step runs

    def _next(self, size: int) -> Tensor:
        model, slots, lens = self.model, self.model.slots, self.runner.seq_lens[:size]
        table, page = self.runner.input_batch.block_table[0].get_device_tensor(size), slots.gaps.shape[1]
        live, position = lens > 0, lens.long()
        block = table.gather(1, (position // page).unsqueeze(1)).squeeze(1).long()
        lens += live
        metadata = HSTUMetadata(
            num_tokens=size, query_offsets=self.offsets[: size + 1], seq_lens=lens, block_table=table,
            slots=torch.where(live, block * page + position % page, -1),
        )  # fmt: skip
        with override_forward_context(create_forward_context(metadata, self.vllm_config)):
            hidden = model(self.items[:size], position)
        logits = model.compute_logits(hidden)
        slots.mask_items(logits, lens, table)
        logits.index_put_((self.pairs[:, 0], self.pairs[:, 1]), self.nothing)
        item = logits.argmax(-1)
        score = logits.gather(1, item.unsqueeze(1)).squeeze(1) - logits.logsumexp(-1)
        self.items[:size] = item
        return torch.stack([item.int(), score.view(torch.int32)])

    def capture(self, sizes: Sequence[int]) -> None:
        """Capture a step as a CUDA graph for batches of those sizes, after a run that compiles what it needs."""
        self.runner.seq_lens.zero_()  # nobody is there: nothing is written
        pool = torch.cuda.graph_pool_handle()
        for size in sorted(sizes, reverse=True):
            self._next(size)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                chosen = self._next(size)
            self.graphs[size] = graph, chosen
