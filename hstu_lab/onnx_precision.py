"""fp16 and int8: the same ONNX graph with its matrix products and look-up tables in fewer bits, everything else in float32.

Precision is written into the graph (Cast, QuantizeLinear, DequantizeLinear), so that every engine computes the same thing:
strongly typed TensorRT has no other way, and ONNX Runtime needs none. Norms, SiLU and the residual stream are in float32: an
engine fuses them with the casts around them and reads and writes halves, as long as nothing stands between product and cast.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

LEVELS = 127
"""Largest int8 value; -128 is not used, so that the scale is symmetric."""
MASKED = -(2.0**15)
"""Logit, inside the files, of an id that names no item: finite in every precision, far below any cosine / temperature."""
MOST_NOISE = 0.02
"""Products whose input int8 would blur by more than this stay fp16: gated sums have few values far out that stretch the step."""
MOST_ERROR = 0.025
"""Largest error of a part's outputs, relative to the largest value of each, that its own int8 products may cause."""

_SAMPLED = 200_000


class _Editor:
    """A copy of a model whose nodes are written again, one by one; tensors keep their names."""

    def __init__(self, model: onnx.ModelProto):
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        self.graph = self.model.graph
        self.weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in self.graph.initializer}
        self.nodes: list[onnx.NodeProto] = []
        self._halves: dict[str, str] = {}

    def add(self, kind: str, inputs: Sequence[str], output: str, **attributes) -> str:
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def constant(self, name: str, value: np.ndarray) -> str:
        self.weights[name] = value
        return name

    def half(self, name: str) -> str:
        """That tensor as float16; converted once."""
        if name not in self._halves:
            if name in self.weights:
                self._halves[name] = self.constant(f"{name}_fp16", self.weights[name].astype(np.float16))
            else:
                self._halves[name] = self.add("Cast", [name], f"{name}_fp16", to=TensorProto.FLOAT16)
        return self._halves[name]

    def in_half(self, node: onnx.NodeProto, operands: Iterable[int]) -> None:
        """The node on float16 operands; its result is there as float16 and, cast back, as float32 under the old name."""
        for i in operands:
            node.input[i] = self.half(node.input[i])
        self.nodes.append(node)
        for i, output in enumerate(node.output):
            node.output[i] = self._halves[output] = f"{output}_fp16"
            self.add("Cast", [node.output[i]], output, to=TensorProto.FLOAT)

    def is_half(self, name: str) -> bool:
        """Whether that tensor exists as float16 already."""
        return name in self._halves

    def finish(self) -> onnx.ModelProto:
        wanted, kept = {value.name for value in self.graph.output}, []
        for node in reversed(self.nodes):
            if wanted.intersection(node.output):
                kept.append(node)
                wanted.update(node.input)
        self.nodes = kept[::-1]
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        used = {name for node in self.nodes for name in node.input}
        del self.graph.initializer[:]
        self.graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in self.weights.items() if name in used)
        return self.model


def convert(model: onnx.ModelProto, scales: Mapping[str, float] | None = None, halves: bool = True) -> onnx.ModelProto:
    """A copy in fp16, or, given steps of products' inputs (`calibrate`, `quiet_steps`), in int8 with explicit Q/DQ.

    int8: products with a weight take int8 on both sides (input: one symmetric scale, weight: one a column); products of two
    activations (Q K', A V) and the look-up tables are fp16. fp16: all of them are, with the bias of a linear layer, and so is
    what is split, turned and reshaped between two products. Without `halves` the rest stays float32, ready for an engine that
    may choose fp16 by itself (TensorRT 8.6).
    """
    edit = _Editor(model)
    scales = scales or {}
    into_half = _read_as_half(edit, scales) if halves else set()
    low: set[str] = set()  # what products and look-ups give: what is added to it is added before the cast
    for node in list(edit.graph.node):
        kind = node.op_type
        if kind == "MatMul" and _is_quantised(edit, node, scales):
            _quantise(edit, node, scales[node.input[0]])
        elif not halves:
            edit.nodes.append(node)
        elif kind == "MatMul":
            low.update(node.output)
            edit.in_half(node, (0, 1))
        elif kind == "Add" and low.intersection(node.input) and all(name in low or name in edit.weights for name in node.input):
            edit.in_half(node, (0, 1))
        elif kind in ("Gather", "GatherElements") and edit.weights.get(node.input[0], np.empty(0)).dtype == np.float32:
            low.update(node.output)
            edit.in_half(node, (0,))
        elif kind in _MOVES and (into_half.intersection(node.output) or all(map(edit.is_half, _moved(node)))):
            edit.in_half(node, range(len(_moved(node))))
        else:
            edit.nodes.append(node)
    return edit.finish()


_MOVES = ("Concat", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
"""Operators that move values and change none."""


def _moved(node: onnx.NodeProto) -> Sequence[str]:
    """The inputs that are moved; the others say where to."""
    return node.input if node.op_type == "Concat" else node.input[:1]


def _read_as_half(edit: _Editor, scales: Mapping[str, float]) -> set[str]:
    """Tensors that are only moved on their way from where they are made to a product in float16, and all their siblings."""
    wanted: set[str] = set()
    for node in reversed(edit.graph.node):
        if node.op_type == "MatMul" and not _is_quantised(edit, node, scales):
            wanted.update(node.input)
        elif node.op_type in _MOVES and wanted.intersection(node.output):
            wanted.update(_moved(node))
    for node in edit.graph.node:
        if node.op_type in _MOVES and wanted.intersection(_moved(node)):
            wanted.update(node.output)
    return wanted


def _is_quantised(edit: _Editor, node: onnx.NodeProto, scales: Mapping[str, float]) -> bool:
    return node.input[0] in scales and node.input[1] in edit.weights and edit.weights[node.input[1]].ndim == 2


def _quantise(edit: _Editor, node: onnx.NodeProto, scale: float) -> None:
    x, weight = node.input
    zero = edit.constant("zero_int8", np.int8(0))
    quantised = f"{x}_int8"
    if quantised not in edit.weights:
        step = edit.constant(quantised, np.float32(scale))  # the scale is kept under the name of what it makes
        edit.add("QuantizeLinear", [x, step, zero], f"{x}_q")
        edit.add("DequantizeLinear", [f"{x}_q", step, zero], f"{x}_dq")
    values, steps = quantise_columns(edit.weights[weight])
    names = [edit.constant(f"{weight}_{what}", array) for what, array in (("int8", values), ("steps", steps))]
    names.append(edit.constant(f"{weight}_zeros", np.zeros(len(steps), np.int8)))
    edit.add("DequantizeLinear", names, f"{weight}_dq", axis=1)
    edit.add("MatMul", [f"{x}_dq", f"{weight}_dq"], node.output[0])


def quantise_columns(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(K, N) float32 -> int8 values (K, N) and one step a column (N,), so that values * steps is nearest to the weight."""
    steps = (np.maximum(np.abs(weight).max(axis=0), 1e-12) / LEVELS).astype(np.float32)
    return np.clip(np.rint(weight / steps), -LEVELS, LEVELS).astype(np.int8), steps


def fold_indices(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which masks and indices made of constants alone are constants: fixed shapes leave many of them."""
    from onnx.reference import ReferenceEvaluator

    edit = _Editor(model)
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    same: dict[tuple, str] = {}
    renamed: dict[str, str] = {}
    for node in edit.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
        known = [edit.weights.get(name) for name in node.input if name]
        whole = all(value is not None and value.dtype != np.float32 for value in known)
        if node.op_type in ("Range", "Constant") or not whole or not known:
            edit.nodes.append(node)
            continue
        feeds = dict(zip((name for name in node.input if name), known))
        for name, value in zip(node.output, ReferenceEvaluator(node, opsets=opsets).run(None, feeds)):
            value = np.asarray(value)
            renamed[name] = same.setdefault((value.dtype.str, value.shape, value.tobytes()), name)
            edit.constant(renamed[name], value)
    _look_up_directly(edit)
    return edit.finish()


def _look_up_directly(edit: _Editor) -> None:
    """Columns of a table by a whole tensor of indices, where those were flattened first and the answer shaped afterwards."""
    made, readers = {name: node for node in edit.nodes for name in node.output}, {}
    for node in edit.nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    gone = set()
    for node in edit.nodes:
        if node.op_type == "Gather" and (flat := made.get(node.input[1])) is not None and flat.op_type == "Reshape":
            after = readers.get(node.output[0], [])
            if edit.weights[flat.input[1]].tolist() == [-1] and len(after) == 1 and after[0].op_type == "Reshape":
                gone.add(after[0].output[0])
                node.input[1], node.output[0] = flat.input[0], after[0].output[0]
    edit.nodes = [node for node in edit.nodes if node.op_type != "Reshape" or node.output[0] not in gone]


# ---- calibration


def quantisable(model: onnx.ModelProto) -> list[str]:
    """Inputs of the products that int8 is for, in the graph's order."""
    weights = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) == 2}
    return list(dict.fromkeys(n.input[0] for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in weights))


@dataclasses.dataclass(frozen=True)
class Range:
    """How one tensor fits int8: the best step, and the noise that rounding and clipping add (rms, relative to the tensor's)."""

    step: float
    noise: float


def watch(model: onnx.ModelProto, batches: Iterable[Mapping[str, np.ndarray]], own: Sequence[type] = ()) -> dict[str, np.ndarray]:
    """Magnitudes (n,) of all that passes through each of `quantisable`'s tensors when the fp32 model runs on `batches`.

    Give batches without padding: it would count as well. `own`: the operators of ours in it, which only ONNX's reference
    evaluator runs. Raises ValueError where there are no batches.
    """

    names = quantisable(model)
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    watched.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    session = _session(watched, own)
    seen: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for batch in batches:
        for name, values in zip(names, session.run(names, dict(batch))):
            seen[name].append(np.abs(values).ravel())
    if names and not seen[names[0]]:
        raise ValueError("no histories to calibrate with: give at least one")
    return {name: np.concatenate(values) for name, values in seen.items()}


def _session(model: onnx.ModelProto, own: Sequence[type] = ()):
    if own:
        from onnx.reference import ReferenceEvaluator

        return ReferenceEvaluator(model, new_ops=list(own))
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def calibrate(model: onnx.ModelProto, batches: Iterable[Mapping[str, np.ndarray]], own: Sequence[type] = ()) -> dict[str, Range]:
    """The int8 range of each of `quantisable`'s tensors, from batches and operators as `watch` wants them."""
    return {name: best_range(values) for name, values in watch(model, batches, own).items()}


def quiet_steps(ranges: Mapping[str, Range], most: float = MOST_NOISE) -> dict[str, float]:
    """Steps of the tensors that int8 blurs by no more than `most`; the others' products stay fp16."""
    return {name: found.step for name, found in ranges.items() if found.noise <= most}


def settle(
    model: onnx.ModelProto, ranges: Mapping[str, Range], steps: Mapping[str, float], batches: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, float]:
    """Those of `steps` that keep the part's outputs on `batches` within `MOST_ERROR` of the fp32 model's.

    While they do not, the noisiest product goes back to fp16. What a little noise does at the end depends on what lies between:
    a norm over a short history's small sums makes much of it.
    """
    kept, run = dict(steps), _session(model)
    truth = [run.run(None, dict(batch)) for batch in batches]
    while kept:
        run = _session(convert(model, kept))
        pairs = ((run.run(None, dict(batch)), outputs) for batch, outputs in zip(batches, truth))
        worst = [
            np.array([(np.abs(a - b)[b > MASKED / 2].max(), np.abs(b)[b > MASKED / 2].max()) for a, b in zip(*p)]) for p in pairs
        ]
        off, largest = np.max(worst, axis=0).T
        if (off <= MOST_ERROR * largest).all():
            break
        del kept[max(kept, key=lambda name: ranges[name].noise)]
    return kept


def best_range(magnitudes: np.ndarray) -> Range:
    """The symmetric int8 step with the least mean squared error for values of these magnitudes (n,).

    The error of a step s is s²/12 inside the range and the overshoot beyond 127 s; the largest magnitude, and each of 60
    shorter ranges down to a tenth of it, are tried. A sample is looked at and the largest always, so that it weighs more than
    its share, and the range errs on the wide side.
    """
    largest = float(magnitudes.max(initial=0.0))
    if largest == 0:
        return Range(1.0 / LEVELS, 0.0)
    stride = max(len(magnitudes) // _SAMPLED, 1)
    sample = np.append(magnitudes[::stride], largest).astype(np.float64)
    ends = largest * np.linspace(0.1, 1.0, 61)
    errors = [np.square(np.maximum(sample - end, 0)).sum() + (sample <= end).sum() * (end / LEVELS) ** 2 / 12 for end in ends]
    best = int(np.argmin(errors))
    return Range(float(ends[best] / LEVELS), float(np.sqrt(errors[best] / np.square(sample).sum())))
