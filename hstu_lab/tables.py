"""Embedding tables (TorchRec) behind a row store that can be swapped, and the parameter calculator.

A row store answers one question: which rows do these ids have? `HostRows` keeps every table in host memory in a TorchRec
`EmbeddingCollection`; a GPU hot cache answers the same question from device memory.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Protocol

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hstu_lab.config import ModelConfig
from hstu_lab.tokens import unpack

# TorchRec's jagged tensors ask torch.fx whether it is tracing, and torch.fx warns whoever asks.
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)


class RowStore(Protocol):
    """Anything that turns ids into rows."""

    def rows(self, features: KeyedJaggedTensor) -> dict[str, Tensor]:
        """Rows (number of values of that key, d_model) of every key (a table's name) of `features`."""


class HostRows(nn.Module):
    """Every table in host memory: one TorchRec `EmbeddingCollection`, one feature a table.

    `device="meta"` allocates nothing, so that the 3.2 B parameters of `gr-3b` can be counted anywhere.
    """

    def __init__(self, config: ModelConfig, device: torch.device | str = "cpu"):
        super().__init__()
        tables = [
            EmbeddingConfig(
                name=name, num_embeddings=rows, embedding_dim=config.d_model, feature_names=[name], init_fn=_init_rows
            )
            for name, rows in config.tables
        ]
        self.collection = EmbeddingCollection(tables=tables, device=torch.device(device))

    def rows(self, features: KeyedJaggedTensor) -> dict[str, Tensor]:
        return {name: jagged.values() for name, jagged in self.collection(features).items()}

    def weight(self, table: str) -> nn.Parameter:
        """The whole table (rows, d_model)."""
        return self.collection.embeddings[table].weight


def _init_rows(weight: Tensor) -> Tensor:
    return nn.init.normal_(weight, std=0.02)


def to_features(tokens: Tensor, offsets: Tensor, item_features: Tensor, config: ModelConfig) -> KeyedJaggedTensor:
    """Jagged tokens (T,), offsets (B + 1,) -> KeyedJaggedTensor with one key a table.

    Item and side-feature keys carry one id an event; `user` carries one id a user token. item_features (F, num_items) int64.
    """
    item, _, _, user = unpack(tokens, config)
    is_user = tokens >= config.user_token_base
    num_users = _count(is_user, offsets)
    item = item[~is_user]
    keys, values, lengths = ["item"], [item], [offsets.diff() - num_users]
    for (name, _), feature in zip(config.side_features, item_features):
        keys.append(name)
        values.append(feature[item])
        lengths.append(lengths[0])
    if config.num_users:
        keys.append("user")
        values.append(user[is_user])
        lengths.append(num_users)
    return KeyedJaggedTensor(keys=keys, values=torch.cat(values), lengths=torch.cat(lengths))


def _count(mask: Tensor, offsets: Tensor) -> Tensor:
    running = torch.cat([offsets.new_zeros(1), mask.long().cumsum(0)])
    return running[offsets[1:]] - running[offsets[:-1]]


class Tables(nn.Module):
    """Token ids -> one summed row a token: item + its side features for an event, the user's row for a user token.

    `store` is where the rows come from; by default `HostRows`. `item_features` (F, num_items) maps an item to its side features.
    """

    def __init__(self, config: ModelConfig, store: RowStore | None = None, device: torch.device | str = "cpu"):
        super().__init__()
        self.config = config
        self.store = HostRows(config, device) if store is None else store
        shape = (len(config.side_features), config.num_items)
        self.register_buffer("item_features", torch.zeros(shape, dtype=torch.int64, device=device))

    def forward(self, tokens: Tensor, offsets: Tensor) -> Tensor:
        """tokens (T,) int64, offsets (B + 1,) int64 -> rows (T, d_model)."""
        rows = self.store.rows(to_features(tokens, offsets, self.item_features, self.config))
        is_user = tokens >= self.config.user_token_base
        events = sum((rows[name] for name, _ in self.config.side_features), start=rows["item"])
        total = events.new_zeros(len(tokens), events.shape[-1])
        total = total.index_copy(0, (~is_user).nonzero().squeeze(1), events)
        if self.config.num_users:
            total = total.index_copy(0, is_user.nonzero().squeeze(1), rows["user"].to(total.dtype))
        return total


@dataclasses.dataclass(frozen=True)
class ParameterGroup:
    """One line of the parameter calculator: `count` parameters under `name`, from `formula`."""

    name: str
    formula: str
    count: int


def parameter_groups(config: ModelConfig) -> list[ParameterGroup]:
    """Every parameter of the model by name, computed from the config alone; the sum equals `sum(p.numel())` of the model."""
    d, heads = config.d_model, config.num_heads
    gates, projected = heads * config.d_v, heads * (2 * config.d_qk + 2 * config.d_v)
    groups = [ParameterGroup(f"tables.{name}", f"{rows:,} rows x {d}", rows * d) for name, rows in config.tables]
    groups += [
        ParameterGroup("encoder.action", f"{config.num_actions} actions x {d}", config.num_actions * d),
        ParameterGroup("encoder.gap", f"{config.num_time_buckets} time buckets x {d}", config.num_time_buckets * d),
        ParameterGroup("encoder.mlp", f"norm 2 x {d}, two {d} x {d} layers with bias", 2 * d + 2 * (d * d + d)),
    ]
    layer = 2 * d + (d * projected + projected) + 2 * gates + (gates * d + d)
    groups.append(
        ParameterGroup(
            "stack.layers", f"{config.num_layers} x (norms, UVQK {d} x {projected}, out {gates} x {d})", config.num_layers * layer
        )
    )
    if config.rab != "none":
        count = config.num_layers * heads * config.max_seq_len
        groups.append(ParameterGroup("stack.position_bias", f"{config.num_layers} x {heads} heads x {config.max_seq_len}", count))
    if config.rab == "position+time":
        count = config.num_layers * heads * config.num_time_buckets
        groups.append(
            ParameterGroup("stack.time_bias", f"{config.num_layers} x {heads} heads x {config.num_time_buckets}", count)
        )
    groups.append(ParameterGroup("stack.final_norm", f"2 x {d}", 2 * d))
    groups.append(ParameterGroup("heads", f"3 tasks x (norm-free {d} x {d} layer, {d} x 1 layer)", 3 * (d * d + d + d + 1)))
    return groups


def seed_arithmetic(d_model=1024, num_layers=12, vocabulary=50_000, d_ff=4096) -> list[ParameterGroup]:
    """What the "3.2B-parameter" description this project grew from holds: its stack, its item table and its feed-forward."""
    stack = num_layers * (2 * d_model + d_model * 4 * d_model + 4 * d_model + 2 * d_model + d_model * d_model + d_model)
    return [
        ParameterGroup("HSTU stack", f"{num_layers} layers at d_model {d_model}", stack),
        ParameterGroup("item table", f"{vocabulary:,} x {d_model}", vocabulary * d_model),
        ParameterGroup(
            "feed-forward, which HSTU does not have",
            f"{num_layers} x 2 x {d_model} x {d_ff}",
            2 * num_layers * d_model * d_ff,
        ),
    ]
