"""The model class that vLLM loads: the project's own encoder, stack and item table, attending through vLLM's paged cache.

A prompt comes in one of two forms, with the same result: packed event tokens (unpacked and looked up here), or prompt
embeddings computed outside. Embeddings carry the token's quantised gap in two extra columns, because the time bias needs
it; two, since bfloat16 holds integers exactly only up to 256.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention

from hstu_lab import ops
from hstu_lab.config import ModelConfig
from hstu_lab.model import LEVEL_COLUMNS, EventEncoder, HSTUStack
from hstu_lab.ops import reference
from hstu_lab.tokens import level_seconds, unpack
from hstu_lab.vllm_plugin.attention import HSTUAttentionBackend, SlotTimes

_LEVEL_BASE = 256


class HSTUPretrainedConfig(PretrainedConfig):
    """The config.json of a checkpoint; `hstu` holds the project's own config, which decides."""

    model_type = "hstu_lab"

    def __init__(self, hstu: dict | None = None, **kwargs):
        self.hstu = hstu or {}
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


def attach_levels(x: Tensor, level: Tensor) -> Tensor:
    """Encoder output (T, d_model) and gap levels (T,) -> what vLLM takes as prompt embeddings (T, d_model + 2)."""
    digits = torch.stack([level // _LEVEL_BASE, level % _LEVEL_BASE], dim=-1)
    return torch.cat([x, digits.to(x.dtype)], dim=-1)


def detach_levels(embeds: Tensor) -> tuple[Tensor, Tensor]:
    """What `attach_levels` joined: embeddings (T, d_model + 2) -> (T, d_model) and levels (T,) int64."""
    x, digits = embeds.tensor_split([-LEVEL_COLUMNS], dim=-1)
    # Integers before they are added up: bfloat16 holds 1 x 256 and 255, not their sum.
    high, low = digits.round().long().unbind(-1)
    return x, high * _LEVEL_BASE + low


class HSTUForRecommendation(nn.Module):
    """HSTU behind vLLM's interface for text-generation models: a token generated is the next item."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config.model_config
        if config.d_qk != config.d_v:
            raise ValueError(f"d_qk is {config.d_qk} and d_v {config.d_v}: vLLM's cache wants them equal")
        self.config = config
        self.ops = ops.get(vllm_config.additional_config.get("ops", "reference"))
        self.tables = DeviceTables(config)
        self.encoder = EventEncoder(config)
        self.stack = HSTUStack(config, self.ops)
        self.slot_times = SlotTimes()
        self.attention = nn.ModuleList(
            Attention(
                config.num_heads, config.d_qk, config.d_qk**-0.5, cache_config=vllm_config.cache_config,
                prefix=f"{prefix}.layers.{i}.attention".lstrip("."), attn_backend=HSTUAttentionBackend,
                hstu_layer=layer, ops=self.ops, divisor=config.max_seq_len, slot_times=self.slot_times,
            )
            for i, layer in enumerate(self.stack.layers)
        )  # fmt: skip
        seconds = torch.tensor(level_seconds(config.num_time_levels))
        self.register_buffer("level_seconds", seconds, persistent=False)
        self.register_buffer("level_bucket", reference.time_bucket(seconds, config.num_time_buckets), persistent=False)
        self.register_buffer("known_items", torch.zeros(config.num_items, dtype=torch.bool))
        self.register_buffer("item_matrix", torch.zeros(config.num_items, config.d_model), persistent=False)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Packed tokens (T,) -> (T, d_model + 2), the form of prompt embeddings."""
        tokens = input_ids.long()
        _, action, level, _ = unpack(tokens, self.config)
        return attach_levels(self.encoder(self.tables(tokens), action, self.level_bucket[level]), level)

    def forward(
        self, input_ids: Tensor | None, positions: Tensor, intermediate_tensors=None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """Hidden states (T, d_model) of the step's tokens, given as ids (T,) or embeddings (T, d_model + 2)."""
        embeds = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        x, level = detach_levels(embeds)
        if self.config.rab == "position+time":
            self._note_times(level)

        def attend(layer, q, k, v, bias):
            # The layer's own bias reaches the backend through hstu_layer: vLLM's call carries only q, k and v.
            out = self.attention[layer](*(part.flatten(-2).contiguous() for part in (q, k, v)))
            return out.unflatten(-1, (self.config.num_heads, -1))

        return self.stack(x.contiguous(), attend)

    def _note_times(self, level: Tensor) -> None:
        metadata = get_forward_context().attn_metadata
        if isinstance(metadata, dict):
            metadata = metadata.get(self.attention[0].layer_name)
        if metadata is None:
            return
        gaps = self.level_seconds[level[: metadata.num_tokens].clamp(0, self.config.num_time_levels - 1)]
        times = self.slot_times.append(gaps, metadata, self.attention[0].kv_cache)
        metadata.query_times = times
        for attention in self.attention[1:]:
            other = get_forward_context().attn_metadata[attention.layer_name]
            other.query_times = times

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Next-item logits (T, num_items): cosine / temperature, -inf for ids that name no item."""
        scores = F.normalize(hidden_states, dim=-1) @ self.item_matrix.t() / self.config.temperature
        return scores.masked_fill(~self.known_items, -torch.inf)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copy a checkpoint's tensors; the task heads stay outside the engine. Raises ValueError on a name it does not know."""
        own = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        loaded = set()
        for name, tensor in weights:
            if name.startswith("heads."):
                continue
            target = name.replace("tables.store.collection.", "tables.")
            if target not in own:
                raise ValueError(f"checkpoint tensor {name} is unknown to the model: it was written by another release")
            own[target].data.copy_(tensor)
            loaded.add(target)
        self.item_matrix.copy_(F.normalize(self.tables.embeddings["item"].weight.float(), dim=-1))
        return loaded
