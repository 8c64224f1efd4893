"""What an export kept and what it lost: errors of every output against PyTorch, the best items, and the graph itself."""

from __future__ import annotations

import collections
import dataclasses
import math
import pathlib

import torch
from torch import Tensor

from hstu_lab.config import TASKS
from hstu_lab.model import HSTU
from hstu_lab.onnx_export import history_inputs
from hstu_lab.onnx_models import PartModels

TOLERANCE = {"fp32": 1e-5, "fp16": 5e-3, "int8": 5e-2}
"""Largest relative error of any output that an export of that precision may have."""


@dataclasses.dataclass(frozen=True)
class Parity:
    """How far one output is from PyTorch's: largest absolute error, and that over the largest absolute value of the output.

    Errors are taken where both sides are finite; the three tasks' probabilities are one output. Of the `masked` values that
    PyTorch has infinite (ids that name no item), `agreed` are the same here; `stray` are infinite or NaN here only.
    """

    output: str
    max_abs: float
    max_rel: float
    shape: tuple[int, ...]
    masked: int = 0
    agreed: int = 0
    stray: int = 0

    def within(self, tolerance: float) -> bool:
        """Whether the relative error is below `tolerance`, every masked value is masked, and no other is infinite or NaN."""
        return self.max_rel < tolerance and self.agreed == self.masked and self.stray == 0

    def __str__(self) -> str:
        text = f"{self.output:20} {self.shape!s:12} max abs error {self.max_abs:.1e}  relative {self.max_rel:.1e}"
        text += f"  {self.agreed} of {self.masked} masked agree" if self.masked else ""
        return text + (f"  {self.stray} infinite or NaN here only" if self.stray else "")


@torch.no_grad()
def parity(model: HSTU, models: PartModels, tokens: Tensor, offsets: Tensor, candidates: Tensor) -> list[Parity]:
    """Errors of all outputs against the jagged pass of `model`, each part fed by the one before, as in serving.

    tokens (T,), offsets (B + 1,): histories; candidates (B, C): item ids.
    """
    batch, count = candidates.shape
    inputs = history_inputs(model, tokens, offsets)
    lengths, inside = inputs["lengths"], torch.arange(inputs["rows"].shape[1]) < inputs["lengths"].unsqueeze(1)
    x = models.encode(inputs["rows"], inputs["action"], inputs["gap_bucket"])
    stack = models.run("stack", x=x, times=inputs["times"], lengths=lengths)
    bare = history_inputs(model, candidates.flatten(), torch.arange(batch + 1) * count)
    x_candidates = models.encode(bare["rows"], bare["action"], bare["gap_bucket"])
    probabilities = models.rank(x, x_candidates, inputs["times"], lengths)

    hidden = model.jagged(tokens, offsets)[offsets[1:] - 1]
    parts = [part for b in range(batch) for part in (tokens[offsets[b] : offsets[b + 1]], candidates[b])]
    ends = offsets + torch.arange(batch + 1) * count
    ranked = model.jagged(torch.cat(parts), ends, torch.full((batch,), count))
    ranked = torch.stack([ranked[end - count : end] for end in ends[1:]])
    pairs = {
        "encoder x": (x[inside], model.embed(tokens, offsets)),
        "stack hidden": (stack["hidden"], hidden),
        "stack logits": (stack["logits"], model.logits(hidden)),
    }
    scores = model.task_scores(ranked)
    rows = [_compare(name, ours, truth, truth) for name, (ours, truth) in pairs.items()]
    return rows + [_compare(f"ranker {task}", probabilities[..., i], scores[..., i], scores) for i, task in enumerate(TASKS)]


def _compare(name: str, ours: Tensor, truth: Tensor, output: Tensor) -> Parity:
    """`output` is what the errors are relative to. Infinite errors mean that no value could be compared."""
    finite = truth.isfinite()
    both = finite & ours.isfinite()
    error = (ours[both].double() - truth[both].double()).abs().amax().item() if both.any() else math.inf
    scale = output[output.isfinite()].abs().max().item()
    counts = {"masked": ~finite, "agreed": ~finite & (ours == truth), "stray": finite & ~both}
    return Parity(name, error, error / scale, tuple(ours.shape), **{what: int(at.sum()) for what, at in counts.items()})


@torch.no_grad()
def best_overlap(model: HSTU, models: PartModels, tokens: Tensor, offsets: Tensor, k: int = 10) -> Tensor:
    """Share of PyTorch's k best next items that are among the k best of `models`, for each history: (B,) in 0..1."""
    inputs = history_inputs(model, tokens, offsets)
    x = models.encode(inputs["rows"], inputs["action"], inputs["gap_bucket"])
    ours = models.stack(x, inputs["times"], inputs["lengths"]).topk(k).indices
    truth = model.logits(model.jagged(tokens, offsets)[offsets[1:] - 1]).topk(k).indices
    return (ours.unsqueeze(2) == truth.unsqueeze(1)).any(dim=2).float().mean(dim=1)


# ---- the graphs


@dataclasses.dataclass(frozen=True)
class Difference:
    """One thing in which two graphs differ; `lost` where the second one can do less than the first."""

    what: str
    before: str
    after: str
    lost: bool = False


def diff(before: str | pathlib.Path, after: str | pathlib.Path) -> list[Difference]:
    """What changed from one ONNX file to another: free dimensions, inputs and outputs, metadata, weights' types, operators.

    Lost are inputs and outputs that are gone, dimensions that have become numbers, metadata and weights' digits.
    """
    import onnx

    first, second = (onnx.load(path) for path in (before, after))
    rows = []
    for kind in ("input", "output"):
        ours, theirs = ({v.name: _signature(v) for v in getattr(m.graph, kind)} for m in (first, second))
        for name in dict.fromkeys([*ours, *theirs]):
            one, two = ours.get(name), theirs.get(name)
            if one != two:
                gone = two is None or (one is not None and any(isinstance(a, str) > isinstance(b, str) for a, b in zip(one, two)))
                rows.append(Difference(f"{kind} {name}", _text(one), _text(two), gone))
    props = [{p.key: p.value for p in m.metadata_props} for m in (first, second)]
    for key in dict.fromkeys([*props[0], *props[1]]):
        one, two = (p.get(key, "none") for p in props)
        if one != two:
            rows.append(Difference(f"metadata {key}", _short(one), _short(two), two == "none"))
    sizes = [_weight_bytes(m) for m in (first, second)]
    for dtype in dict.fromkeys([*sizes[0], *sizes[1]]):
        one, two = (s.get(dtype, 0) for s in sizes)
        if one != two:
            rows.append(Difference(f"weights {dtype}", f"{one:,} bytes", f"{two:,} bytes", dtype == "FLOAT" and two < one))
    counts = [collections.Counter(node.op_type for node in m.graph.node) for m in (first, second)]
    for kind in sorted(counts[0] | counts[1]):
        if counts[0][kind] != counts[1][kind]:
            rows.append(Difference(f"operator {kind}", str(counts[0][kind]), str(counts[1][kind])))
    return rows


def diff_table(rows: list[Difference]) -> str:
    """The differences as text, what was lost marked with `-`."""
    width = max([len(row.what) for row in rows], default=0)
    wide = max([len(row.before) for row in rows], default=0)
    return "\n".join(f"{'-' if r.lost else ' '} {r.what:<{width}}  {r.before:>{wide}} -> {r.after}" for r in rows)


def _signature(value) -> tuple:
    import onnx

    tensor = value.type.tensor_type
    dims = tuple(d.dim_param or d.dim_value for d in tensor.shape.dim)
    return (*dims, f"{onnx.TensorProto.DataType.Name(tensor.elem_type).lower()}")


def _text(signature: tuple | None) -> str:
    return "none" if signature is None else f"{signature[-1]} ({', '.join(map(str, signature[:-1]))})"


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."


def _weight_bytes(model) -> dict[str, int]:
    import onnx

    sizes: dict[str, int] = collections.Counter()
    for tensor in model.graph.initializer:
        sizes[onnx.TensorProto.DataType.Name(tensor.data_type)] += onnx.numpy_helper.to_array(tensor).nbytes
    return dict(sizes)
