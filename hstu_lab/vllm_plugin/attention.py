"""The attention backend: vLLM owns blocks, slots and scheduling, the project's operators do the arithmetic.

There is no softmax, so nothing needs rescaling. Nothing here reads a value back from the device, so a whole step can be
captured as a CUDA graph: for batches of one token a request (decode), and for any mixture of lengths.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)


class HSTUAttentionBackend(AttentionBackend):
    """Pointwise SiLU attention over vLLM's paged cache (blocks, block_size, heads, 2 x head size)."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.float16, torch.bfloat16]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # vLLM looks names up in an enumeration; this is its place for backends from outside

    @staticmethod
    def get_impl_cls() -> type[HSTUAttentionImpl]:
        return HSTUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[HSTUMetadataBuilder]:
        return HSTUMetadataBuilder

    @staticmethod
    def get_kv_cache_shape(num_blocks, block_size, num_kv_heads, head_size, cache_dtype_str="auto") -> tuple[int, ...]:
        return num_blocks, block_size, num_kv_heads, 2 * head_size

    @staticmethod
    def use_cascade_attention(*args, **kwargs) -> bool:
        return False


@dataclasses.dataclass(frozen=True)
class Fresh:
    """The requests at the end of a batch of which nothing is cached: from the `first` on, whose tokens begin at `start`.

    Their keys and values need not be looked for in the cache: all of them are new and lie one after another.
    """

    first: int
    start: int
    longest: int


@dataclasses.dataclass
class HSTUMetadata(AttentionMetadata):
    """One step's batch: B requests, T new tokens laid end to end, padding after them.

    `query_times` (T,) and `history_lens` (B,) are filled in by `Slots.note` before the first layer, `tiles` and `parts` by the
    first layer; `candidates` (B,) counts those of each request, None where there are none.
    """

    num_tokens: int
    query_offsets: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slots: Tensor
    query_times: Tensor | None = None
    history_lens: Tensor | None = None
    tiles: object = None
    fresh: Fresh | None = None
    candidates: Tensor | None = None
    parts: tuple[HSTUMetadata, HSTUMetadata] | None = None


class HSTUMetadataBuilder(AttentionMetadataBuilder[HSTUMetadata]):
    _cudagraph_support = AttentionCGSupport.ALWAYS

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.slots = vllm_config.compilation_config.static_forward_context[layer_names[0]].impl.slots
        graphs = vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs()
        self.most_captured = vllm_config.compilation_config.max_cudagraph_capture_size if graphs else 0

    def _fresh(self, common: CommonAttentionMetadata) -> Fresh | None:
        """Only of steps that are no CUDA graph's: it is the host that tells fresh requests apart."""
        if common.num_actual_tokens <= self.most_captured or common.seq_lens_cpu_upper_bound is None:
            return None
        offsets, lens = common.query_start_loc_cpu.numpy(), common.seq_lens_cpu_upper_bound.numpy()
        counts = np.diff(offsets)
        cached = np.flatnonzero(counts != lens[: len(counts)])
        first = int(cached[-1]) + 1 if len(cached) else 0
        return Fresh(first, int(offsets[first]), int(counts[first:].max())) if first < len(counts) else None

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> HSTUMetadata:
        common, seq_lens = common_attn_metadata, common_attn_metadata.seq_lens
        longest = common.block_table_tensor.shape[1] * self.kv_cache_spec.block_size
        if common.max_seq_len > longest:  # only the made-up steps by which vLLM warms up claim so
            seq_lens = seq_lens.clamp(max=longest)
        self.slots.step = HSTUMetadata(
            num_tokens=common.num_actual_tokens,
            query_offsets=common.query_start_loc,
            seq_lens=seq_lens,
            block_table=common.block_table_tensor,
            slots=common.slot_mapping[: common.num_actual_tokens],
            fresh=self._fresh(common),
        )
        return self.slots.step


class HSTUAttentionImpl(AttentionImpl):
    """What one `Attention` layer runs; `hstu_layer`, `ops`, `divisor` and `slots` come from the model."""

    def __init__(
        self, num_heads, head_size, scale, num_kv_heads=None, alibi_slopes=None, sliding_window=None, kv_cache_dtype="auto",
        logits_soft_cap=None, attn_type=AttentionType.DECODER, kv_sharing_target_layer_name=None, *, hstu_layer, ops, divisor,
        slots,
    ):  # fmt: skip
        if attn_type != AttentionType.DECODER or num_kv_heads not in (None, num_heads):
            raise ValueError("HSTU attention is causal self-attention with as many key heads as query heads")
        self.num_heads, self.head_size, self.scale, self.num_kv_heads = num_heads, head_size, scale, num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.layer, self.ops, self.divisor, self.slots = hstu_layer, ops, divisor, slots

    def attend(self, q: Tensor, k: Tensor, v: Tensor, kv_cache: Tensor, metadata: HSTUMetadata | None) -> Tensor:
        """Write the step's keys and values, then attend: q, k, v (T, H, d) -> (T, H, d). Rows of padding are left as they are."""
        if metadata is None or not kv_cache.numel():  # vLLM measures memory before there is a cache
            return torch.zeros_like(q)
        self.slots.write_kv(k, v, kv_cache, metadata.slots)
        keys, values = kv_cache.split(self.head_size, dim=-1)
        if metadata.fresh is None:
            return self.slots.attention(q, keys, values, metadata, divisor=self.divisor, bias=self.layer.bias)
        fresh, rest = self.slots.divide(metadata)
        start = metadata.fresh.start
        parts = [self.slots.attention(q[:start], keys, values, rest, divisor=self.divisor, bias=self.layer.bias)] if start else []
        parts.append(
            self.ops.attention_jagged(
                q[start:], k[start:], v[start:], fresh.query_offsets, divisor=self.divisor, bias=self.layer.bias,
                times=fresh.query_times, num_candidates=fresh.candidates, max_len=metadata.fresh.longest,
            )
        )  # fmt: skip
        return torch.cat(parts) if start else parts[0]

    def forward(
        self, layer, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: HSTUMetadata | None,
        output: Tensor, output_scale: Tensor | None = None, output_block_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """vLLM's form of `attend`, with one copy more: query, key, value and `output` (T, H, d)."""
        return output.copy_(self.attend(query, key, value, kv_cache, attn_metadata))
