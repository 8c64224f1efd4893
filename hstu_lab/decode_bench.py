"""Measure what one serving step costs the GPU, outside of any engine: a decode step, and candidates against cached histories.

    python -m hstu_lab.decode_bench [--out FOLDER]

Times are those of CUDA-graph replays, which is how an engine runs small steps: no host is in them. Weights and caches are random.
Writes data/measured/<device>/decode.json and candidates.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib

import torch
from torch import Tensor, nn

from hstu_lab import measure, ops
from hstu_lab.candidate_bench import candidates
from hstu_lab.config import ModelConfig
from hstu_lab.measure import Record
from hstu_lab.model import EventEncoder, HSTUStack
from hstu_lab.ops import reference
from hstu_lab.tokens import level_seconds, unpack
from hstu_lab.vllm_load import serving_config

CASES = ((8, 512), (1, 512), (16, 512), (32, 512), (8, 128), (8, 1024), (8, 2000))
"""(requests, events that are cached of each) of the decode steps."""
COMMAND = "python -m hstu_lab.decode_bench"


@dataclasses.dataclass(frozen=True)
class Model:
    """The parts of the model that a decode step runs, and the item table that it reads."""

    encoder: EventEncoder
    stack: HSTUStack
    items: Tensor

    @classmethod
    @torch.no_grad()
    def random(cls, config: ModelConfig, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> Model:
        torch.manual_seed(0)
        with torch.device(device):
            encoder, stack = EventEncoder(config), HSTUStack(config, ops.get("triton"))
            for name, parameter in [*encoder.named_parameters(), *stack.named_parameters()]:
                if "bias" in name or "down" in name:
                    nn.init.normal_(parameter, std=0.02)
            items = torch.randn(config.num_items, config.d_model).to(dtype)
        return cls(*(part.to(dtype).eval() for part in (encoder, stack)), items)


class DecodeStep:
    """One new token for each of B users, `history` of whose events are cached; from tokens to final hidden states.

    Logits are not in it: vLLM computes them behind the graph.
    """

    def __init__(self, model: Model, users: int, history: int, page: int = 32):
        from hstu_lab.ops.triton_encoder import EncoderTables

        self.model, self.config, self.users, self.page = model, model.stack.config, users, page
        config, device, dtype = self.config, model.items.device, model.items.dtype
        generator = torch.Generator(device).manual_seed(0)
        per_user = -(-config.max_seq_len // page)
        shape = (config.num_layers, users * per_user, page, config.num_heads, 2 * config.d_qk)
        self.caches = (torch.randn(shape, device=device, generator=generator) * 0.3).to(dtype)
        self.table = torch.randperm(users * per_user, device=device, generator=generator).view(users, per_user).int()
        at = torch.arange(history, device=device)
        self.gaps, self.items = (torch.zeros(users * per_user, page, dtype=torch.int32, device=device) for _ in range(2))
        self.gaps.view(-1)[(self.table[:, at // page].long() * page + at % page)] = 60
        self.times = torch.zeros(users * per_user, page, dtype=torch.int64, device=device)
        self.times.view(-1)[(self.table[:, at // page].long() * page + at % page)] = (at + 1) * 60
        self.slots = self.table[:, history // page].long() * page + history % page
        self.offsets = torch.arange(users + 1, device=device, dtype=torch.int32)
        self.lens = torch.full((users,), history + 1, device=device, dtype=torch.int32)
        self.tokens = torch.randint(1, config.num_items, (users,), device=device, generator=generator)
        seconds = torch.tensor(level_seconds(config.num_time_levels), device=device)
        self.tables = EncoderTables(
            (model.items,), torch.zeros(0, config.num_items, dtype=torch.int64, device=device), None, model.encoder.action.weight,
            model.encoder.gap.weight, reference.time_bucket(seconds, config.num_time_buckets), seconds, config.num_items,
            config.num_actions, config.user_token_base, config.token_limit,
        )  # fmt: skip

    def _note(self, gaps: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        from hstu_lab.ops.triton_kv_write import note_tokens

        times, history = torch.empty_like(self.tokens), torch.empty_like(self.lens)
        note_tokens(
            gaps, items, self.slots, self.table, self.offsets, self.lens, self.gaps, self.items, self.times, times, history
        )  # fmt: skip
        return times, history

    def fused(self) -> Tensor:
        """Three launches a layer: hidden states (B, d_model)."""
        from hstu_lab.ops.triton_decode import decode_layer, plan_step
        from hstu_lab.ops.triton_encoder import encode_tokens

        stack = self.model.stack
        x, gaps, items = encode_tokens(self.tokens, self.tables, self.model.encoder)
        times, history = self._note(gaps, items)
        plan = plan_step(
            self.table, self.offsets, self.lens, history, self.users, page=self.page, bias=stack.layers[0].bias,
            query_times=times, slot_times=self.times,
        )  # fmt: skip
        for layer, cache in zip(stack.layers, self.caches):
            x = decode_layer(x, layer, cache, self.slots, self.table, plan, divisor=self.config.max_seq_len)
        return self._kept(stack.ops.layer_norm(x, stack.final_norm.weight, stack.final_norm.bias, self.config.norm_eps), gaps)

    def _kept(self, hidden: Tensor, gaps: Tensor) -> Tensor:
        """As in the engine, which keeps the hidden states of candidates: there are none, and it costs a launch."""
        from hstu_lab.ops.triton_kv_write import keep_candidates

        keep_candidates(hidden, gaps, self.slots, self.caches[-1])
        return hidden

    def _read(self) -> tuple[Tensor, Tensor, Tensor]:
        item, action, level, _ = unpack(self.tokens, self.config)
        x = self.model.encoder(self.model.items[item], action, self.tables.level_bucket[level])
        return x, self.tables.level_seconds[level].int(), item.int()

    def operators(self) -> Tensor:
        """The way of larger steps, one operator after another."""
        from hstu_lab.ops.triton_kv_write import write_kv
        from hstu_lab.ops.triton_serving import attention_step, list_tiles

        x, gaps, items = self._read()
        times, history = self._note(gaps, items)
        where, listed = (self.table, self.offsets, self.lens), []

        def attend(layer, q, k, v, bias):
            write_kv(k, v, self.caches[layer], self.slots)
            known = {"bias": bias, "query_times": times, "slot_times": self.times}
            if not listed:
                listed.append(list_tiles(*where, history, q, self.page, **known))
            keys, values = self.caches[layer].tensor_split(2, dim=-1)
            return attention_step(
                q, keys, values, *where, *listed, divisor=self.config.max_seq_len, history_lens=history, **known
            )  # fmt: skip

        return self._kept(self.model.stack(x, attend), gaps)

    def exact(self) -> Tensor:
        """The same by the oracle's operators in float32."""
        x, gaps, items = self._read()
        times, history = self._note(gaps, items)
        with x.device:
            stack = HSTUStack(self.config)
        stack.load_state_dict({name: tensor.float() for name, tensor in self.model.stack.state_dict().items()})
        stack.eval()

        def attend(layer, q, k, v, bias):
            cache = self.caches[layer].float()
            cache.flatten(0, 1)[self.slots] = torch.cat([k, v], dim=-1)
            return reference.attention_paged(
                q, *cache.tensor_split(2, dim=-1), self.table, self.offsets, self.lens, divisor=self.config.max_seq_len,
                bias=bias, query_times=times, slot_times=self.times, history_lens=history,
            )  # fmt: skip

        return stack(x.float(), attend)

    @property
    def bytes(self) -> int:
        """What must be read: the weights once, and every user's keys and values."""
        weights = sum(p.nbytes for layer in self.model.stack.layers for p in (layer.uvqk.weight, layer.out.weight))
        return weights + int(self.lens.sum()) * self.caches[0, 0, 0].nbytes * len(self.caches)


@torch.inference_mode()
def decode(record: Record) -> None:
    """Decode steps of the `gr-3b` stack in bfloat16, fused and operator by operator, and their errors."""
    model = Model.random(serving_config())
    for users, history in CASES:
        step = DecodeStep(model, users, history)
        name = f"B={users} N={history}"
        found = {}
        if users <= 16:
            exact = step.exact()
            for way in ("fused", "operators"):
                found[f"error of {way}"] = ((getattr(step, way)().float() - exact).norm() / exact.norm()).item()
        for way in ("fused", "operators"):
            seen = measure.measure(
                getattr(step, way), name=f"decode {way} {name}", repeats=30, cuda_graph=True, work={"bytes": step.bytes}
            )
            record.measurements.append(seen)
            print(seen, f"{seen.bytes_per_second / 1e12:.2f} TB/s", flush=True)
        record.data[name] = found | {"bytes": step.bytes}
        print(found, flush=True)
    record.measurements.append(measure.peak_copy_bandwidth())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=None, help="folder for the records (default: data/measured)")
    arguments = parser.parse_args()
    measure.require_gpu()
    for name, part in (("decode", decode), ("candidates", candidates)):
        record = Record.here(name, command=COMMAND)
        part(record)
        print(measure.write_record(record, arguments.out))


if __name__ == "__main__":
    main()
