"""The attention backend: vLLM owns blocks, slots and scheduling, the project's operators do the arithmetic.

There is no softmax, so nothing needs rescaling; the only state besides keys and values is the time of every slot, which
the relative time bias needs and which shares the blocks' fate (prefix reuse, preemption) by being indexed by slot.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)


class HSTUAttentionBackend(AttentionBackend):
    """Pointwise SiLU attention over vLLM's paged cache (blocks, block_size, heads, 2 x head size)."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.float16, torch.bfloat16]
    forward_includes_kv_cache_update = False

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


@dataclasses.dataclass
class HSTUMetadata(AttentionMetadata):
    """One step's batch: B requests, T new tokens laid end to end, padding after them."""

    num_tokens: int
    query_offsets: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slots: Tensor
    query_times: Tensor | None = None


class HSTUMetadataBuilder(AttentionMetadataBuilder[HSTUMetadata]):
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> HSTUMetadata:
        common = common_attn_metadata
        return HSTUMetadata(
            num_tokens=common.num_actual_tokens,
            query_offsets=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slots=common.slot_mapping[: common.num_actual_tokens],
        )


class SlotTimes:
    """Seconds of every cache slot, kept by all layers together; a token's time is the slot's before it plus its own gap."""

    def __init__(self):
        self.seconds: Tensor | None = None

    def append(self, gaps: Tensor, metadata: HSTUMetadata, kv_cache: Tensor) -> Tensor:
        """Note the times of the step's tokens and return them (T,). gaps (T,) int64 seconds since the token before."""
        num_blocks, block_size = kv_cache.shape[:2]
        if self.seconds is None or self.seconds.shape != (num_blocks, block_size):
            self.seconds = torch.zeros(num_blocks, block_size, dtype=torch.int64, device=gaps.device)
        offsets, seq_lens = metadata.query_offsets.long(), metadata.seq_lens.long()
        counts = offsets.diff()
        before = (seq_lens - counts - 1).clamp(min=0)
        block = metadata.block_table.gather(1, (before // block_size).unsqueeze(1)).squeeze(1).long()
        running = torch.cat([gaps.new_zeros(1), gaps.cumsum(0)])

        def last_seconds() -> Tensor:
            return torch.where(seq_lens > counts, self.seconds[block, before % block_size], 0)

        start = last_seconds()
        while True:
            origin = torch.repeat_interleave(start - running[offsets[:-1]], counts, output_size=len(gaps))
            times = running[1:] + origin
            self.seconds.view(-1)[metadata.slots] = times
            # vLLM shares a prefix with requests of the very step that computes it: their start was noted only now.
            previous, start = start, last_seconds()
            if start.equal(previous):
                return times


class HSTUAttentionImpl(AttentionImpl):
    """What one `Attention` layer runs; `hstu_layer`, `ops`, `divisor` and `slot_times` come from the model."""

    def __init__(
        self, num_heads, head_size, scale, num_kv_heads=None, alibi_slopes=None, sliding_window=None, kv_cache_dtype="auto",
        logits_soft_cap=None, attn_type=AttentionType.DECODER, kv_sharing_target_layer_name=None, *, hstu_layer, ops, divisor,
        slot_times,
    ):  # fmt: skip
        if attn_type != AttentionType.DECODER or num_kv_heads not in (None, num_heads):
            raise ValueError("HSTU attention is causal self-attention with as many key heads as query heads")
        self.num_heads, self.head_size, self.scale, self.num_kv_heads = num_heads, head_size, scale, num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.layer, self.ops, self.divisor, self.slot_times = hstu_layer, ops, divisor, slot_times

    def do_kv_cache_update(self, layer, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        """Write keys and values (T, H, d) to their slots; padding slots are negative."""
        if kv_cache.numel() == 0:
            return
        written = slot_mapping >= 0
        rows = torch.cat([key[: len(slot_mapping)], value[: len(slot_mapping)]], dim=-1)
        kv_cache.flatten(0, 1)[slot_mapping[written]] = rows[written].to(kv_cache.dtype)

    def forward(
        self, layer, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: HSTUMetadata | None,
        output: Tensor, output_scale: Tensor | None = None, output_block_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """query (T, H, d) over `kv_cache`; written to and returned as `output` (T, H, d)."""
        output.zero_()
        if attn_metadata is None:
            return output
        count = attn_metadata.num_tokens
        keys, values = kv_cache.split(self.head_size, dim=-1)
        output[:count] = self.ops.attention_paged(
            query[:count], keys, values, attn_metadata.block_table, attn_metadata.query_offsets, attn_metadata.seq_lens,
            divisor=self.divisor, bias=self.layer.bias, query_times=attn_metadata.query_times, slot_times=self.slot_times.seconds,
        )  # fmt: skip
        return output
