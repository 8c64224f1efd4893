"""Predict before you measure: FLOPs and bytes of every operator from its shapes, and the time that a device's ceilings allow.

The model (Williams, Waterman and Patterson 2009, "Roofline"): an operator takes as long as its largest term,
matrix FLOPs / peak, bytes / bandwidth, tanh evaluations / special-function rate, or instructions / issue rate, plus one launch.
The matrix term grows where its tiles fill the last wave of SMs badly. Biases, norm weights and look-up tables (kilobytes) are
left out. On a device with measured `products` a matrix product takes the time of a square one of as many FLOPs, and with
measured `chains` attention has one more term: the steps of a program wait for each other, however idle the GPU.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from hstu_lab.config import TASKS, ModelConfig
from hstu_lab.hardware import Device
from hstu_lab.measure import Record

DTYPE_BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "int8": 1}
TILE = 128
"""Side of the output tile that one SM works on at a time, for wave quantisation."""
STEP = 64
"""Queries of one attention program, and keys of one of its steps."""
INSTRUCTIONS = {"none": 6.5, "position": 7.5, "position+time": 12.0}
"""Instructions a query-key pair in the main loop of the attention kernel by kind of bias, with one boundary a tile, counted
in its machine code for sm_90 (`triton_compile`, checked by a test). Masked tiles and those near the diagonal take more."""


@dataclasses.dataclass(frozen=True)
class Operator:
    """Work of one operator: matrix `flops`, `bytes` to and from memory, `special` function evaluations; `count` launches of it.

    `tiles`: output tiles of one launch (0: no matrix product). `product`: nothing but one matrix product (and what its epilogue
    does). `instructions`: of one thread, beside the matrix unit's. `bias`, `programs`, `steps`, `longest`: of attention, its kind
    of bias, its programs, the steps of all of them and of the one with most.
    """

    name: str
    flops: float
    bytes: float
    special: float = 0.0
    tiles: int = 0
    count: int = 1
    product: bool = False
    instructions: float = 0.0
    bias: str = ""
    programs: int = 0
    steps: int = 0
    longest: int = 0

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flops / self.bytes


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Seconds of all launches of an operator on a device. `terms` and `launch`: seconds of one launch."""

    operator: Operator
    device: Device
    terms: dict[str, float]
    launch: float

    @property
    def bound(self) -> str:
        """The largest term, or "launch" where launching takes longer than the work."""
        return max({**self.terms, "launch": self.launch}.items(), key=lambda term: term[1])[0]

    @property
    def seconds(self) -> float:
        return (max(self.terms.values()) + self.launch) * self.operator.count

    @property
    def flops_per_second(self) -> float:
        return self.operator.flops * self.operator.count / self.seconds


def predict(operator: Operator, device: Device, dtype: str = "bf16", *, launch: float | None = None) -> Prediction:
    """Time of `operator` on `device` by the roofline. Raises ValueError where the device has no figure for dtype."""
    launch = device.launch if launch is None else launch
    matrix = operator.flops / device.peak(dtype) * wave_quantisation(operator.tiles, device.sms)
    if operator.product and device.products and dtype in ("bf16", "fp16"):
        matrix = max(device.product_seconds(operator.flops) - launch, 0.0)
    terms = {
        "matrix": matrix,
        "memory": operator.bytes / device.bandwidth,
        "special functions": operator.special / device.special,
    }
    if device.lanes:
        terms["instructions"] = operator.instructions / device.lanes
    if operator.bias in device.chains:
        start, step = device.chains[operator.bias]
        shared = (operator.programs * start + operator.steps * step) / (device.sms * device.resident)
        terms["waiting"] = max(start + operator.longest * step, shared) - launch
    return Prediction(operator, device, terms, launch)


def wave_quantisation(tiles: int, sms: int) -> float:
    """How much longer whole waves of tiles take than the same work spread evenly: 1 for tiles = k x sms, 2 for half a wave."""
    return math.ceil(tiles / sms) * sms / tiles if tiles else 1.0


def gemm(name: str, m: int, k: int, n: int, dtype: str = "bf16", *, extra_bytes: float = 0, special: float = 0) -> Operator:
    """The product of (m, k) and (k, n): both read once, the result written once, one tile of `TILE` x `TILE` a thread block."""
    size = DTYPE_BYTES[dtype]
    tiles = math.ceil(m / TILE) * math.ceil(n / TILE)
    return Operator(name, 2.0 * m * k * n, (m * k + k * n + m * n) * size + extra_bytes, special, tiles, product=True)


def causal_pairs(queries: int, keys: int) -> float:
    """Query-key pairs when the queries are the last of `keys` positions and each sees itself and everything before."""
    return queries * (keys - queries) + queries * (queries + 1) / 2


def attention(config: ModelConfig, batch: int, queries: int, keys: int, dtype: str = "bf16") -> Operator:
    """HSTU attention of the last `queries` of `keys` positions of each of `batch` sequences; one tanh a pair, no softmax.

    Bytes: each query's Q and output and each key's K and V once.
    """
    heads, size = config.num_heads, DTYPE_BYTES[dtype]
    pairs = batch * heads * causal_pairs(queries, keys)
    moved = batch * heads * (queries + keys) * (config.d_qk + config.d_v) * size
    tiles = batch * heads * math.ceil(queries / TILE)
    ends = [keys - queries + min(first + STEP, queries) for first in range(0, queries, STEP)]
    steps = [math.ceil(end / STEP) for end in ends]
    return Operator(
        "attention", 2 * pairs * (config.d_qk + config.d_v), moved, pairs, tiles, instructions=INSTRUCTIONS[config.rab] * pairs,
        bias=config.rab if queries == keys else "", programs=batch * heads * len(steps), steps=batch * heads * sum(steps),
        longest=max(steps),
    )  # fmt: skip


def layer(config: ModelConfig, batch: int, queries: int, keys: int, dtype: str = "bf16") -> list[Operator]:
    """The five operators of one HSTU layer, with `queries` new tokens a sequence out of `keys`; `count` is one each."""
    size, d, tokens = DTYPE_BYTES[dtype], config.d_model, batch * queries
    gates, keys_width = config.num_heads * config.d_v, config.num_heads * config.d_qk
    projected = 2 * gates + 2 * keys_width
    return [
        Operator("norm", 0.0, 2 * tokens * d * size),
        gemm("UVQK + SiLU", tokens, d, projected, dtype, special=tokens * projected),
        attention(config, batch, queries, keys, dtype),
        Operator("norm x gate", 0.0, 3 * tokens * gates * size),
        gemm("output + residual", tokens, gates, d, dtype, extra_bytes=tokens * d * size),
    ]


def stack(config: ModelConfig, batch: int, queries: int, keys: int | None = None, dtype: str = "bf16") -> list[Operator]:
    """Every operator of the stack: `queries` new tokens a sequence after keys - queries cached ones (default: none cached)."""
    keys = queries if keys is None else keys
    ops = [dataclasses.replace(op, count=config.num_layers) for op in layer(config, batch, queries, keys, dtype)]
    return [*ops, Operator("final norm", 0.0, 2 * batch * queries * config.d_model * DTYPE_BYTES[dtype])]


def candidate_attention(config: ModelConfig, batch: int, candidates: int, length: int, dtype: str = "bf16") -> Operator:
    """M-FALCON: each candidate sees the `length` cached positions and itself, never another candidate."""
    heads, size = config.num_heads, DTYPE_BYTES[dtype]
    pairs = batch * heads * candidates * (length + 1)
    moved = batch * heads * (length + 2 * candidates) * (config.d_qk + config.d_v) * size
    tiles = batch * heads * math.ceil(candidates / TILE)
    return Operator("attention", 2 * pairs * (config.d_qk + config.d_v), moved, pairs, tiles)


def encode(config: ModelConfig, tokens: int, dtype: str = "bf16") -> list[Operator]:
    """Table rows of `tokens` events and the residual MLP that turns them into the stack's input."""
    size, d = DTYPE_BYTES[dtype], config.d_model
    tables = 1 + len(config.side_features)
    return [
        Operator("rows: gather + sum", 0.0, tokens * d * (tables + 1) * size),
        Operator("encoder: norm", 0.0, 2 * tokens * d * size),
        gemm("encoder: up + SiLU", tokens, d, d, dtype, special=tokens * d),
        gemm("encoder: down + residual", tokens, d, d, dtype, extra_bytes=tokens * d * size),
    ]


def whole(config: ModelConfig, batch: int, length: int, candidates: int = 100, dtype: str = "bf16") -> list[Operator]:
    """One topk request of `length` tokens a user: rows, encoder, stack, logits of the last position, ranking of candidates.

    The ranking reads the keys and values that the stack left in the cache; its operators are named "ranking: ...".
    """
    d, ranked = config.d_model, batch * candidates
    attended = candidate_attention(config, batch, candidates, length, dtype)
    ranking = [
        *encode(config, ranked, dtype),
        *(
            dataclasses.replace(attended if op.name == "attention" else op, count=op.count)
            for op in stack(config, batch, candidates, length + candidates, dtype)
        ),
        gemm("task heads", ranked, d, len(TASKS) * d, dtype, special=len(TASKS) * ranked * d),
    ]
    return [
        *encode(config, batch * length, dtype),
        *stack(config, batch, length, dtype=dtype),
        gemm("next-item logits", batch, d, config.num_items, dtype),
        Operator("top-k", 0.0, batch * config.num_items * DTYPE_BYTES[dtype]),
        *(dataclasses.replace(op, name=f"ranking: {op.name}") for op in ranking),
    ]


def total(predictions: Sequence[Prediction]) -> float:
    """Seconds of operators that run one after another."""
    return sum(p.seconds for p in predictions)


def calibrated(device: Device, record: Record, dtype: str = "bf16") -> Device:
    """`device` as the record `triton_calibration` found it: copy, products, launches, and attention programs that run alone."""
    products = [(m.work["flops"], m.median) for m in record.measurements if m.name.startswith("square product")]
    chains = {}
    for bias in INSTRUCTIONS:
        one, eight = (record[f"one program alone, {n} steps, bias={bias}"].median for n in (1, 8))
        step = (eight - one) / 7
        chains[bias] = one - step, step
    return device.with_ceilings(
        dtype=dtype, flops=record["matrix product 8192"].flops_per_second, bandwidth=record["copy"].bytes_per_second,
        launch=record["smallest kernel"].median, products=products, chains=chains, resident=record.data["programs an SM"],
        source=record.label,
    )  # fmt: skip


def flops(operators: Sequence[Operator]) -> float:
    """Matrix FLOPs of all launches."""
    return sum(op.flops * op.count for op in operators)


def trace(fn: Callable) -> list[Operator]:
    """What `fn()` makes PyTorch run: one Operator for each ATen call that does work (views do none), nothing fused.

    Bytes: every tensor that goes in and comes out, once. FLOPs: those of PyTorch's own counter. The difference to this module's
    formulas is what fusing saves.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import flop_registry

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            inputs, outputs = ([x for x in tree_leaves(part) if isinstance(x, torch.Tensor)] for part in ((args, kwargs), out))
            held = {x.untyped_storage().data_ptr() for x in inputs}
            in_place = any(a.alias_info and a.alias_info.is_write for a in func._schema.arguments)
            view = not in_place and any(x.untyped_storage().data_ptr() in held for x in outputs)
            packet = func._overloadpacket
            if outputs and not view and "empty" not in str(packet):
                count = flop_registry[packet](*args, **(kwargs or {}), out_val=out) if packet in flop_registry else 0
                moved = sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in inputs + outputs)
                operators.append(Operator(str(packet).removeprefix("aten."), count, moved))
            return out

    operators: list[Operator] = []
    with torch.no_grad(), Recorder():
        fn()
    return operators
