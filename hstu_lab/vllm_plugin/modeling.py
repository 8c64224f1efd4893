"""The model class that vLLM loads: the project's own encoder, stack and item table, attending through vLLM's paged cache.

A prompt comes in one of two forms, with the same result: packed event tokens (unpacked and looked up here), or prompt
embeddings computed outside. Embeddings carry the token's quantised gap and its item in extra columns, because the time bias
and the mask of seen items need them; as digits, since bfloat16 holds integers exactly only up to 256.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention

from hstu_lab import ops
from hstu_lab.config import ModelConfig
from hstu_lab.model import TOKEN_COLUMNS, EventEncoder, HSTUStack, TaskHeads
from hstu_lab.ops import reference
from hstu_lab.tokens import level_seconds, unpack
from hstu_lab.vllm_plugin.attention import HSTUAttentionBackend
from hstu_lab.vllm_plugin.candidates import MARKS, strip
from hstu_lab.vllm_plugin.parallel import ParallelOps, own_heads, own_part
from hstu_lab.vllm_plugin.slots import CANDIDATE, Slots

_BASE = 256


class HSTUPretrainedConfig(PretrainedConfig):
    """The config.json of a checkpoint; `hstu` holds the project's own config, which decides."""

    model_type = "hstu_lab"

    def __init__(self, hstu: dict | None = None, **kwargs):
        self.hstu = hstu or {}
        if hstu:  # a checkpoint written by a release with fewer columns serves as well
            kwargs["hidden_size"] = hstu["d_model"] + TOKEN_COLUMNS
            kwargs["max_position_embeddings"] = hstu["max_seq_len"] + MARKS  # candidates all stand at one position
        super().__init__(**kwargs)

    @property
    def model_config(self) -> ModelConfig:
        return ModelConfig.from_json(json.dumps(self.hstu))


class DeviceTables(nn.Module):
    """Every table on the model's device, for presets that fit there. Parameter names are those of the checkpoint."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embeddings = nn.ModuleDict({name: nn.Embedding(rows, config.d_model) for name, rows in config.tables})
        self.register_buffer("item_features", torch.zeros(len(config.side_features), config.num_items, dtype=torch.int64))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (T,) int64 -> summed rows (T, d_model)."""
        item, _, _, user = unpack(tokens, self.config)
        rows = self.embeddings["item"](item)
        for (name, _), feature in zip(self.config.side_features, self.item_features):
            rows = rows + self.embeddings[name](feature[item])
        if not self.config.num_users:
            return rows
        is_user = (tokens >= self.config.user_token_base).unsqueeze(-1)
        return torch.where(is_user, self.embeddings["user"](user.clamp(min=0)), rows)


def attach_token(x: Tensor, level: Tensor, item: Tensor) -> Tensor:
    """Encoder output (T, d_model), gap levels (T,) and items (T,) -> what vLLM takes as prompt embeddings (T, d_model + 5)."""
    level = level + 1  # a candidate's is -1
    digits = (level // _BASE, level % _BASE, item // _BASE**2, item // _BASE % _BASE, item % _BASE)
    return torch.cat([x, torch.stack(digits, dim=-1).to(x.dtype)], dim=-1)


def detach_token(embeds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `attach_token` joined: embeddings (T, d_model + 5) -> (T, d_model), levels (T,) and items (T,) int64."""
    x, digits = embeds.tensor_split([-TOKEN_COLUMNS], dim=-1)
    # Integers before they are added up: bfloat16 holds 1 x 256 and 255, not their sum.
    level1, level0, item2, item1, item0 = digits.round().long().unbind(-1)
    return x, level1 * _BASE + level0 - 1, (item2 * _BASE + item1) * _BASE + item0


class HSTUForRecommendation(nn.Module):
    """HSTU behind vLLM's interface for text-generation models: a token generated is the next item."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config.model_config
        if config.d_qk != config.d_v:
            raise ValueError(f"d_qk is {config.d_qk} and d_v {config.d_v}: vLLM's cache wants them equal")
        self.config = config
        self.ops = ops.get(vllm_config.additional_config.get("ops", "reference"))
        self.gpus, self.gpu = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        if self.gpus > 1:
            self.ops = ParallelOps(self.ops, tensor_model_parallel_all_gather, tensor_model_parallel_all_reduce)
        own = own_heads(config, self.gpus)
        self.tables = DeviceTables(config)
        self.encoder = EventEncoder(config)
        self.stack = HSTUStack(own, self.ops)
        self.heads = TaskHeads(config)
        self.slots = Slots(self.ops)
        self.slots.task_logits = self.task_logits
        self.attention = nn.ModuleList(
            Attention(
                own.num_heads, own.d_qk, own.d_qk**-0.5, cache_config=vllm_config.cache_config,
                prefix=f"{prefix}.layers.{i}.attention".lstrip("."), attn_backend=HSTUAttentionBackend,
                hstu_layer=layer, ops=self.ops, divisor=config.max_seq_len, slots=self.slots,
            )
            for i, layer in enumerate(self.stack.layers)
        )  # fmt: skip
        seconds = torch.tensor(level_seconds(config.num_time_levels))
        self.register_buffer("level_seconds", seconds, persistent=False)
        self.register_buffer("level_bucket", reference.time_bucket(seconds, config.num_time_buckets), persistent=False)
        self.register_buffer("known_items", torch.zeros(config.num_items, dtype=torch.bool))
        self.register_buffer("item_matrix", torch.zeros(config.num_items, config.d_model), persistent=False)

    def _read(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Packed tokens (T,) -> the stack's input (T, d_model), gap levels (T,), CANDIDATE for candidates, and items (T,)."""
        tokens, is_candidate = strip(input_ids.long(), self.config)
        item, action, level, _ = unpack(tokens, self.config)
        x = self.encoder(self.tables(tokens), action, self.level_bucket[level])
        return x, level.masked_fill(is_candidate, CANDIDATE), item

    def encode(self, input_ids: Tensor | None, inputs_embeds: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (T,), or embeddings (T, d_model + 5), -> the stack's input (T, d_model), gaps (T,) in seconds and items (T,)."""
        x, level, item = self._read(input_ids) if inputs_embeds is None else detach_token(inputs_embeds)
        return x, self.level_seconds[level.clamp(0, self.config.num_time_levels - 1)].masked_fill(level < 0, CANDIDATE), item

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Packed tokens (T,) -> (T, d_model + 5), the form of prompt embeddings."""
        return attach_token(*self._read(input_ids))

    def forward(
        self, input_ids: Tensor | None, positions: Tensor, intermediate_tensors=None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """Hidden states (T, d_model) of the step's tokens, given as ids (T,) or embeddings (T, d_model + 5)."""
        metadata = get_forward_context().attn_metadata
        if isinstance(metadata, dict):
            metadata = metadata[self.attention[0].layer_name]
        small = self._is_small(input_ids if inputs_embeds is None else inputs_embeds, metadata)
        if small and inputs_embeds is None and self.encoder_tables is not None:
            from hstu_lab.ops.triton_encoder import encode_tokens

            x, gaps, item = encode_tokens(input_ids, self.encoder_tables, self.encoder)
        else:
            x, gaps, item = self.encode(input_ids, inputs_embeds)
        if metadata is not None:
            count = metadata.num_tokens
            self.slots.note(gaps[:count], item[:count], metadata, self.attention[0].kv_cache)

        def attend(layer, q, k, v, bias):
            # The layer's own bias is the backend's, through hstu_layer.
            attention = self.attention[layer]
            return attention.impl.attend(q, k, v, attention.kv_cache, metadata)

        hidden = self._small_step(x, metadata) if small else self.stack(x.contiguous(), attend)
        if metadata is not None:
            self.slots.keep_candidates(hidden, gaps, metadata, self.attention[-1].kv_cache)
            self.slots.keep_ends(hidden, gaps, metadata)
        return hidden

    def _is_small(self, tokens: Tensor, metadata) -> bool:
        """Whether the step is one for `_small_step`: tokens (T, ...)."""
        if metadata is None or self.gpus > 1 or not self.slots.fused or not self.attention[0].kv_cache.numel():
            return False  # several GPUs join the moments of the norm between the kernels
        from hstu_lab.ops.triton_decode import takes

        return takes(len(tokens), self.config.d_model, self.attention[0].kv_cache, self.encoder.up.weight.dtype)

    @functools.cached_property
    def encoder_tables(self):
        """What `triton_encoder` reads, None where it does not take so many tables."""
        from hstu_lab.ops.triton_encoder import MAX_FEATURES, EncoderTables

        config, tables = self.config, self.tables.embeddings
        if len(config.side_features) > MAX_FEATURES:
            return None
        return EncoderTables(
            tuple(tables[name].weight for name in ("item", *(name for name, _ in config.side_features))),
            self.tables.item_features, tables["user"].weight if config.num_users else None, self.encoder.action.weight,
            self.encoder.gap.weight, self.level_bucket, self.level_seconds, config.num_items, config.num_actions,
            config.user_token_base, config.token_limit,
        )  # fmt: skip

    def _small_step(self, x: Tensor, metadata) -> Tensor:
        """The stack for a few tokens, three launches a layer: x (T, d_model) -> hidden states (T, d_model)."""
        from hstu_lab.ops.triton_decode import decode_layer, plan_step

        x, where = x.contiguous(), metadata.block_table
        plan = plan_step(
            where, metadata.query_offsets, metadata.seq_lens, metadata.history_lens, len(x), page=self.slots.times.shape[1],
            bias=self.stack.layers[0].bias, query_times=metadata.query_times, slot_times=self.slots.times,
        )  # fmt: skip
        for layer, attention in zip(self.stack.layers, self.attention):
            x = decode_layer(x, layer, attention.kv_cache, metadata.slots, where, plan, divisor=self.config.max_seq_len)
        return self.ops.layer_norm(x, self.stack.final_norm.weight, self.stack.final_norm.bias, self.config.norm_eps)

    def task_logits(self, slots: Tensor) -> Tensor:
        """Logits (S, 3) of the tasks for the candidates in those slots (S,)."""
        return self.heads(self.slots.kept(slots, self.attention[-1].kv_cache, self.config.d_model)).float()

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Next-item logits (T, num_items): cosine / temperature, -inf for ids that name no item."""
        hidden = F.normalize(hidden_states, dim=-1)
        if hidden.is_cuda and hidden.dtype != torch.float32:
            # Logits in half precision would tie: they lie between -20 and 20, and bfloat16 has eight bits.
            scores = torch.mm(hidden, self.item_matrix.t(), out_dtype=torch.float32) / self.config.temperature
        else:
            scores = hidden @ self.item_matrix.t() / self.config.temperature
        return scores.masked_fill(~self.known_items, -torch.inf)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copy a checkpoint's tensors. Raises ValueError on a name that the model does not know."""
        parameters = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        loaded = set()
        for name, tensor in weights:
            target = name.replace("tables.store.collection.", "tables.")
            if target not in parameters:
                raise ValueError(f"checkpoint tensor {name} is unknown to the model: it was written by another release")
            parameters[target].data.copy_(own_part(target, tensor, self.config, self.gpu, self.gpus))
            loaded.add(target)
        self.item_matrix.copy_(F.normalize(self.tables.embeddings["item"].weight.float(), dim=-1))
        return loaded
