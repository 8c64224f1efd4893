"""HSTU: the event encoder, the stack, the next-item logits and the task heads.

One layer, three ways to attend (dense for training and export, jagged, paged for serving), and one answer. Tokens are those
of `hstu_lab.tokens`: a history is a list of integers that say everything the model knows of it.
Source of the layer: Zhai et al. 2024 (arXiv:2402.17152), eq. 1-3.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hstu_lab.config import TASKS, ConfigError, ModelConfig
from hstu_lab.ops import reference
from hstu_lab.tokens import level_seconds, unpack

TOKEN_COLUMNS = 5
"""Columns that prompt embeddings carry beyond d_model: the token's gap level as two digits, its item as three."""

Attend = Callable[[int, Tensor, Tensor, Tensor, reference.RelativeBias | None], Tensor]
"""attend(layer, q, k, v, bias) -> attention output; q, k (..., H, d_qk), v and output (..., H, d_v)."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message names the file and the remedy."""


class EventEncoder(nn.Module):
    """Summed table rows, action and time gap -> the stack's input, through a residual MLP."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d = config.d_model
        self.action = nn.Embedding(config.num_actions, d)
        self.gap = nn.Embedding(config.num_time_buckets, d)
        self.norm = nn.LayerNorm(d, eps=config.norm_eps)
        self.up = nn.Linear(d, d)
        self.down = nn.Linear(d, d)
        for embedding in (self.action, self.gap):
            nn.init.normal_(embedding.weight, std=0.02)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, rows: Tensor, action: Tensor, gap_bucket: Tensor) -> Tensor:
        """rows (..., d_model), action and gap_bucket (...) int64 -> (..., d_model)."""
        x = rows + self.action(action) + self.gap(gap_bucket)
        return x + self.down(F.silu(self.up(self.norm(x))))


class HSTULayer(nn.Module):
    """x + W_o(LN(A V) * U) with [U, V, Q, K] = SiLU(W_uvqk LN(x) + b)."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.index, self.eps = index, config.norm_eps
        self.heads, self.d_qk, self.d_v = config.num_heads, config.d_qk, config.d_v
        d, gates = config.d_model, config.num_heads * config.d_v
        self.norm = nn.LayerNorm(d, eps=self.eps)
        self.uvqk = nn.Linear(d, config.num_heads * (2 * config.d_qk + 2 * config.d_v))
        self.attention_norm = nn.LayerNorm(gates, eps=self.eps)
        self.out = nn.Linear(gates, d)
        self.position_bias = nn.Parameter(torch.zeros(self.heads, config.max_seq_len)) if config.rab != "none" else None
        timed = config.rab == "position+time"
        self.time_bias = nn.Parameter(torch.zeros(self.heads, config.num_time_buckets)) if timed else None
        nn.init.xavier_uniform_(self.uvqk.weight)
        nn.init.zeros_(self.uvqk.bias)
        nn.init.xavier_uniform_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    @property
    def bias(self) -> reference.RelativeBias | None:
        if self.position_bias is None:
            return None
        return reference.RelativeBias(self.position_bias, self.time_bias)

    def forward(self, x: Tensor, attend: Attend, ops=reference, dropout: float = 0.0) -> Tensor:
        """x (..., d_model) -> (..., d_model)."""
        projected = ops.project_silu(
            ops.layer_norm(x, self.norm.weight, self.norm.bias, self.eps), self.uvqk.weight, self.uvqk.bias
        )
        gates, keys = self.heads * self.d_v, self.heads * self.d_qk
        u, v, q, k = projected.split([gates, gates, keys, keys], dim=-1)
        v, q, k = (part.unflatten(-1, (self.heads, -1)) for part in (v, q, k))
        attended = attend(self.index, q, k, v, self.bias).flatten(-2)
        y = ops.norm_gate(attended, u, self.attention_norm.weight, self.attention_norm.bias, self.eps)
        if dropout:
            y = F.dropout(y, dropout, self.training)
        return ops.project_residual(y, self.out.weight, self.out.bias, x)


class HSTUStack(nn.Module):
    """The layers and the final norm. Knows nothing of tables or tokens, so that it runs where TorchRec does not."""

    def __init__(self, config: ModelConfig, ops=reference):
        super().__init__()
        self.config, self.ops = config, ops
        self.layers = nn.ModuleList(HSTULayer(config, i) for i in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """x (..., d_model) -> hidden states (..., d_model)."""
        dropout = self.config.dropout if self.training else 0.0
        for layer in self.layers:
            x = layer(x, attend, self.ops, dropout)
        return self.ops.layer_norm(x, self.final_norm.weight, self.final_norm.bias, self.config.norm_eps)

    def _time_buckets(self, q_time: Tensor | None, k_time: Tensor | None) -> Tensor | None:
        if self.config.rab != "position+time":
            return None
        return reference.pairwise_buckets(q_time, k_time, self.config.num_time_buckets)

    def dense(self, x: Tensor, lengths: Tensor, times: Tensor | None, query_times: Tensor | None = None) -> Tensor:
        """Right-padded x (B, N, d_model), lengths (B,), times (B, N) seconds -> (B, N, d_model).

        `query_times` (B, N) replaces the query's own time in the bias: the published MovieLens variant sees the target's.
        """
        buckets = self._time_buckets(times if query_times is None else query_times, times)

        def attend(_, q, k, v, bias):
            return reference.attention_dense(
                q, k, v, lengths, divisor=self.config.max_seq_len, bias=bias, time_buckets=buckets,
                num_context=self.config.num_context,
            )  # fmt: skip

        return self(x, attend)

    def candidates(self, x: Tensor, lengths: Tensor, num_history: int, times: Tensor | None) -> Tensor:
        """Right-padded history, then C candidates: x (B, num_history + C, d_model), times (B, num_history + C) -> like x."""
        buckets = self._time_buckets(times, times)

        def attend(_, q, k, v, bias):
            return reference.attention_candidates(
                q, k, v, lengths, num_history, divisor=self.config.max_seq_len, bias=bias, time_buckets=buckets,
                num_context=self.config.num_context,
            )  # fmt: skip

        return self(x, attend)

    def jagged(
        self, x: Tensor, offsets: Tensor, times: Tensor | None, num_candidates: Tensor | None = None, max_len: int | None = None
    ) -> Tensor:
        """Jagged x (T, d_model), offsets (B + 1,), times (T,); the last num_candidates (B,) rows of each are candidates.

        `max_len` bounds the rows of a sequence; without it the number is read back from the device, once for all layers.
        """
        max_len = int(offsets.diff().max()) if max_len is None else max_len

        def attend(_, q, k, v, bias):
            return self.ops.attention_jagged(
                q, k, v, offsets, divisor=self.config.max_seq_len, bias=bias, times=times, num_candidates=num_candidates,
                num_context=self.config.num_context, max_len=max_len,
            )  # fmt: skip

        return self(x, attend)

    def paged(
        self, x: Tensor, offsets: Tensor, times: Tensor, cache: KVCache, as_candidates: bool = False,
        max_queries: int | None = None,
    ) -> Tensor:  # fmt: skip
        """New tokens x (T, d_model) of the cache's sequences, offsets (B + 1,), times (T,) -> (T, d_model).

        Ordinary tokens are written to the cache, which grows by them; with `as_candidates` nothing is written.
        `max_queries` bounds the new tokens of a sequence; without it the number is read from the device, once for all layers.
        """
        max_queries = int(offsets.diff().max()) if max_queries is None else max_queries
        slots = None if as_candidates else cache.append(offsets, times, max_queries)

        def attend(layer, q, k, v, bias):
            if slots is not None:
                cache.write(layer, slots, k, v)
            return self.ops.attention_paged(
                q, cache.keys[layer], cache.values[layer], cache.block_table, offsets, cache.seq_lens,
                divisor=self.config.max_seq_len, bias=bias, query_times=times, slot_times=cache.times,
                candidates=(k, v) if as_candidates else None, num_context=self.config.num_context, max_queries=max_queries,
            )  # fmt: skip

        return self(x, attend)


class KVCache:
    """Paged keys and values of B sequences; the block table is fixed, `hstu_lab.vllm_plugin` has one that shares blocks.

    keys and values: per layer (blocks, block_size, H, d); times (blocks, block_size) int64 seconds; block_table (B, blocks
    per sequence); seq_lens (B,) counts the cached tokens.
    """

    def __init__(self, config: ModelConfig, batch: int, block_size: int = 16, device="cpu", dtype=torch.float32):
        per_sequence = -(-config.max_seq_len // block_size)
        blocks = batch * per_sequence
        self.block_size, self.max_seq_len = block_size, config.max_seq_len
        shape = (config.num_layers, blocks, block_size, config.num_heads)
        self.keys = torch.zeros(*shape, config.d_qk, device=device, dtype=dtype)
        self.values = torch.zeros(*shape, config.d_v, device=device, dtype=dtype)
        self.times = torch.zeros(blocks, block_size, dtype=torch.int64, device=device)
        self.block_table = torch.arange(blocks, device=device).view(batch, per_sequence)
        self.seq_lens = torch.zeros(batch, dtype=torch.int64, device=device)
        self.last_times = torch.zeros(batch, dtype=torch.int64, device=device)
        self.at_most = 0

    def append(self, offsets: Tensor, times: Tensor, max_new: int | None = None) -> Tensor:
        """Make room for offsets.diff() more tokens a sequence and note their times; returns their slots (T,).

        `max_new` bounds them. The device is asked for the lengths only where a bound kept on the host, `at_most`, says that a
        sequence might outgrow max_seq_len; raises ValueError where one would. A CUDA graph that replays this moves seq_lens
        on, but not that bound: whoever replays counts for themselves.
        """
        counts = offsets.diff()
        self.at_most += len(times) if max_new is None else max_new
        if self.at_most > self.max_seq_len:
            self.at_most = int((self.seq_lens + counts).max())
            if (longest := self.at_most) > self.max_seq_len:
                self.at_most = int(self.seq_lens.max())
                raise ValueError(f"a sequence would hold {longest} tokens, max_seq_len is {self.max_seq_len}")
        row = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts, output_size=len(times))
        position = torch.arange(len(row), device=row.device) - offsets[row] + self.seq_lens[row]
        slots = self.block_table[row, position // self.block_size] * self.block_size + position % self.block_size
        self.times.view(-1)[slots] = times
        filled = counts > 0
        # In place, so that a CUDA graph of this can be replayed.
        self.last_times.copy_(torch.where(filled, times[(offsets[1:] - 1).clamp(min=0)], self.last_times))
        self.seq_lens += counts
        return slots

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        self.keys[layer].flatten(0, 1)[slots] = k
        self.values[layer].flatten(0, 1)[slots] = v


class TaskHeads(nn.Module):
    """One tower a task over a candidate's hidden state."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d = config.d_model
        self.towers = nn.ModuleDict({task: nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, 1)) for task in TASKS})

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (..., d_model) -> logits (..., 3) of engagement, retention, monetization."""
        return torch.cat([tower(hidden) for tower in self.towers.values()], dim=-1)


class HSTU(nn.Module):
    """The whole model: tables -> encoder -> stack -> next-item logits and task scores.

    `tables` maps (tokens, offsets) to summed rows; `hstu_lab.tables.Tables` by default. `ops` is a module of `hstu_lab.ops`.
    """

    def __init__(self, config: ModelConfig, tables: nn.Module | None = None, ops=reference):
        super().__init__()
        if tables is None:
            from hstu_lab.tables import Tables

            tables = Tables(config)
        self.config, self.tables = config, tables
        self.encoder = EventEncoder(config)
        self.stack = HSTUStack(config, ops)
        self.heads = TaskHeads(config)
        known = torch.ones(config.num_items, dtype=torch.bool)
        known[0] = False
        self.register_buffer("known_items", known)
        seconds = torch.tensor(level_seconds(config.num_time_levels))
        self.register_buffer("level_seconds", seconds, persistent=False)
        self.register_buffer("level_buckets", reference.time_bucket(seconds, config.num_time_buckets), persistent=False)

    # ---- tokens to vectors

    def gap_bucket(self, level: Tensor) -> Tensor:
        """Time bucket (same shape) of quantised gaps `level` (...) int64."""
        return self.level_buckets[level]

    def embed(self, tokens: Tensor, offsets: Tensor) -> Tensor:
        """tokens (T,) int64, offsets (B + 1,) -> the stack's input (T, d_model)."""
        _, action, level, _ = unpack(tokens, self.config)
        return self.encoder(self.tables(tokens, offsets), action, self.gap_bucket(level))

    def times(self, tokens: Tensor, offsets: Tensor, start: Tensor | None = None) -> Tensor:
        """Seconds (T,) int64 at which each token happened: `start` (B,) plus its sequence's gaps so far."""
        running = torch.cat([tokens.new_zeros(1), self.level_seconds[unpack(tokens, self.config)[2]].cumsum(0)])
        origin = running[offsets[:-1]] - (0 if start is None else start)
        return running[1:] - torch.repeat_interleave(origin, offsets.diff(), output_size=len(tokens))

    # ---- the three passes

    def jagged(self, tokens: Tensor, offsets: Tensor, num_candidates: Tensor | None = None, max_len: int | None = None) -> Tensor:
        """Hidden states (T, d_model) of jagged tokens (T,); the last num_candidates (B,) of each sequence are candidates.

        With `max_len`, a bound on the tokens of a sequence, nothing here waits for the device.
        """
        x, times = self.embed(tokens, offsets), self.times(tokens, offsets)
        return self.stack.jagged(x, offsets, times, num_candidates, max_len)

    def dense(self, tokens: Tensor, offsets: Tensor) -> Tensor:
        """Hidden states (B, longest, d_model) of the same tokens, right-padded; rows beyond a length are meaningless."""
        length = int(offsets.diff().max())
        x = reference.jagged_to_dense(self.embed(tokens, offsets), offsets, length)
        times = reference.jagged_to_dense(self.times(tokens, offsets), offsets, length)
        return self.stack.dense(x, offsets.diff(), times)

    def extend(self, tokens: Tensor, offsets: Tensor, cache: KVCache, max_queries: int | None = None) -> Tensor:
        """Hidden states (T, d_model) of new tokens after those in `cache`: prefill, extend and decode are all this.

        With `max_queries`, a bound on the new tokens of a sequence, the kernels wait for nothing.
        """
        times = self.times(tokens, offsets, cache.last_times)
        return self.stack.paged(self.embed(tokens, offsets), offsets, times, cache, max_queries=max_queries)

    def score_candidates(self, tokens: Tensor, offsets: Tensor, cache: KVCache, max_queries: int | None = None) -> Tensor:
        """Hidden states (T, d_model) of candidate tokens (T,) against the cached histories; the cache stays as it is."""
        times = self.times(tokens, offsets, cache.last_times)
        x = self.embed(tokens, offsets)
        return self.stack.paged(x, offsets, times, cache, as_candidates=True, max_queries=max_queries)

    def rank(self, tokens: Tensor, offsets: Tensor, candidates: Tensor) -> Tensor:
        """Task scores (B, C, 3) of candidate items (B, C) after the jagged histories (T,), in one masked pass."""
        batch, count = candidates.shape
        length = int(offsets.diff().max())
        history = reference.jagged_to_dense(self.embed(tokens, offsets), offsets, length)
        flat = candidates.flatten()
        targets = self.embed(flat, torch.arange(batch + 1, device=flat.device) * count).view(batch, count, -1)
        times = self.times(tokens, offsets)
        last = times[offsets[1:] - 1].unsqueeze(1).expand(-1, count)
        times = torch.cat([reference.jagged_to_dense(times, offsets, length), last], dim=1)
        hidden = self.stack.candidates(torch.cat([history, targets], dim=1), offsets.diff(), length, times)
        return self.task_scores(hidden[:, length:])

    # ---- what comes out

    def item_matrix(self) -> Tensor:
        """L2-normalised item table (num_items, d_model)."""
        return F.normalize(self.tables.store.weight("item"), dim=-1)

    def logits(self, hidden: Tensor, item_matrix: Tensor | None = None) -> Tensor:
        """Next-item logits (..., num_items): cosine / temperature, -inf for ids that name no item."""
        items = self.item_matrix() if item_matrix is None else item_matrix
        scores = F.normalize(hidden, dim=-1) @ items.t() / self.config.temperature
        return scores.masked_fill(~self.known_items, -torch.inf)

    def task_scores(self, hidden: Tensor) -> Tensor:
        """Probabilities (..., 3) of engagement, retention, monetization for candidate hidden states (..., d_model)."""
        return self.heads(hidden).sigmoid()


@dataclasses.dataclass(frozen=True)
class SavedConfig:
    """The config.json beside the weights, in the form that vLLM and transformers read."""

    config: ModelConfig

    def to_dict(self) -> dict:
        c = self.config
        return {
            "model_type": "hstu_lab",
            "architectures": ["HSTUForRecommendation"],
            "hidden_size": c.d_model + TOKEN_COLUMNS,
            "num_hidden_layers": c.num_layers,
            "num_attention_heads": c.num_heads,
            "num_key_value_heads": c.num_heads,
            "head_dim": c.d_qk,
            "vocab_size": c.num_items,
            "max_position_embeddings": c.max_seq_len,
            "dtype": "float32",
            "tie_word_embeddings": False,
            "hstu": json.loads(c.to_json()),
        }


def save_checkpoint(model: HSTU, folder: str | pathlib.Path) -> pathlib.Path:
    """Write `model.safetensors` (config and schema version in its metadata) and `config.json` (what vLLM reads) to `folder`."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    partial = folder / "model.safetensors.part"
    save_file(tensors, partial, metadata={"config": model.config.to_json(), "format": "pt"})
    partial.rename(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(SavedConfig(model.config).to_dict(), indent=1) + "\n")
    return folder


def load_config(folder: str | pathlib.Path) -> ModelConfig:
    """The config inside a checkpoint. Raises CheckpointError naming the file and what to do."""
    path = pathlib.Path(folder) / "model.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; train one with `python -m hstu_lab train`")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error}); restore it or train again") from error
    if "config" not in metadata:
        raise CheckpointError(f"{path}: its metadata has no 'config'; it was not written by this project")
    try:
        return ModelConfig.from_json(metadata["config"])
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def load_checkpoint(folder: str | pathlib.Path, ops=reference, device="cpu") -> HSTU:
    """The model saved in `folder`, in eval mode. Raises CheckpointError naming the file, the tensor and what to do."""
    config = load_config(folder)
    path = pathlib.Path(folder) / "model.safetensors"
    model = HSTU(config, ops=ops)
    expected = model.state_dict()
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); restore it or train again") from error
    for name, tensor in expected.items():
        if name not in tensors:
            raise CheckpointError(f"{path}: tensor {name} is missing; the file is incomplete, restore it or train again")
        if tensors[name].shape != tensor.shape:
            raise CheckpointError(
                f"{path}: tensor {name} has shape {tuple(tensors[name].shape)}, the config says {tuple(tensor.shape)}"
            )
        if tensors[name].is_floating_point() and not torch.isfinite(tensors[name]).all():
            raise CheckpointError(f"{path}: tensor {name} holds NaN or infinity; restore it or train again")
    if extra := sorted(set(tensors) - set(expected)):
        raise CheckpointError(f"{path}: unknown tensor {extra[0]}; it was written by another release")
    model.load_state_dict(tensors)
    return model.to(device).eval()
