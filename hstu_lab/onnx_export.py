"""ONNX: the encoder, the stack and the ranker as three graphs whose batch and length are free, and ONNX Runtime to run them.

A graph holds what the checkpoint holds except the tables of users and side features: summed rows come in, so that a row store
of any size can feed it. Every file says in its metadata which checkpoint and config it came from, and is refused where the two
do not fit. The formulas are `hstu_lab.model`'s own, traced; one operator, the time bucket, is translated by hand.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import logging
import pathlib
import shutil
import tempfile
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from hstu_lab.config import TASKS, ConfigError, ModelConfig
from hstu_lab.measure import data_root
from hstu_lab.model import HSTU, load_checkpoint, load_config
from hstu_lab.ops import reference
from hstu_lab.tokens import unpack

SCHEMA_VERSION = 1
"""Version of the files' inputs, outputs and metadata."""

OPSET = 18
"""The oldest opset that has every operator the graphs use, so that the most engines read them."""

_VECTORS, _INTEGERS = ("float32", ("batch", "length", "d_model")), ("int64", ("batch", "length"))
_LENGTHS, _CANDIDATES = ("int64", ("batch",)), ("float32", ("batch", "candidates", "d_model"))
INPUTS = {
    "encoder": {"rows": _VECTORS, "action": _INTEGERS, "gap_bucket": _INTEGERS},
    "stack": {"x": _VECTORS, "times": _INTEGERS, "lengths": _LENGTHS},
    "ranker": {"x_history": _VECTORS, "x_candidates": _CANDIDATES, "times": _INTEGERS, "lengths": _LENGTHS},
}
"""dtype and dimensions of each part's inputs; all dimensions but d_model are dynamic."""

OUTPUTS = {"encoder": ("x",), "stack": ("logits", "hidden"), "ranker": ("probabilities",)}

Array = np.ndarray | Tensor


class OnnxError(ValueError):
    """An ONNX file or an input that cannot be used; the message names it and the remedy."""


# ---- the parts


class StackPart(nn.Module):
    """Right-padded histories -> next-item logits and hidden state of each one's last event."""

    def __init__(self, model: HSTU):
        super().__init__()
        self.stack = _with_reference_ops(model.stack)
        self.register_buffer("item_matrix", model.item_matrix().detach())
        self.logits = model.logits

    def forward(self, x: Tensor, times: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, N, d_model), times (B, N) seconds, lengths (B,) -> logits (B, num_items), hidden (B, d_model)."""
        hidden = self.stack.dense(x, lengths, times)
        last = hidden[torch.arange(x.shape[0], device=x.device), lengths - 1]
        return self.logits(last, self.item_matrix), last


class RankerPart(nn.Module):
    """Right-padded histories and C candidates each, in one masked pass -> task probabilities of the candidates."""

    def __init__(self, model: HSTU):
        super().__init__()
        self.stack, self.heads = _with_reference_ops(model.stack), model.heads

    def forward(self, x_history: Tensor, x_candidates: Tensor, times: Tensor, lengths: Tensor) -> Tensor:
        """x_history (B, N, d_model), x_candidates (B, C, d_model), times (B, N), lengths (B,) -> (B, C, 3)."""
        num_history = x_history.shape[1]
        now = times.gather(1, (lengths - 1).clamp(min=0).unsqueeze(1))
        times = torch.cat([times, now.expand(-1, x_candidates.shape[1])], dim=1)
        hidden = self.stack.candidates(torch.cat([x_history, x_candidates], dim=1), lengths, num_history, times)
        return self.heads(hidden[:, num_history:]).sigmoid()


def _with_reference_ops(stack: nn.Module) -> nn.Module:
    # Fused kernels cannot be traced. The copy is shallow: it shares every parameter.
    stack = copy.copy(stack)
    stack.ops = reference
    return stack


# ---- export


def content_hash(source: HSTU | str | pathlib.Path) -> str:
    """SHA-256 (hex) of what an export of a model, or of a checkpoint folder, holds: its config and the exported tensors.

    Raises CheckpointError where the folder holds no checkpoint.
    """
    if isinstance(source, HSTU):
        config, tensors = source.config, source.state_dict()
    else:
        config = load_config(source)
        with safe_open(pathlib.Path(source) / "model.safetensors", framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in filter(_is_exported, file.keys())}
    digest = hashlib.sha256(config.to_json().encode())
    for name in sorted(filter(_is_exported, tensors)):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy())
    return digest.hexdigest()


def _is_exported(name: str) -> bool:
    return name.split(".")[0] in ("encoder", "stack", "heads", "known_items") or name.endswith("embeddings.item.weight")


@functools.cache
def exporter_version() -> str:
    """Changes whenever the graphs may: with the sources that they are traced from, and with PyTorch."""
    package = pathlib.Path(__file__).parent
    sources = b"".join((package / name).read_bytes() for name in ("onnx_export.py", "model.py", "ops/reference.py"))
    return f"{hashlib.sha256(sources).hexdigest()[:8]}-torch{torch.__version__}"


@torch.no_grad()
def export(model: HSTU, folder: str | pathlib.Path, *, progress: bool = True) -> pathlib.Path:
    """Write `encoder.onnx`, `stack.onnx` and `ranker.onnx` (float32) to `folder` and return it; about 10 s.

    Weights lie inside the files. Raises OnnxError where onnx or onnxscript is missing.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {
        "schema_version": str(SCHEMA_VERSION),
        "config": model.config.to_json(),
        "checkpoint": content_hash(model),
        "exporter": exporter_version(),
    }
    was_training = model.training
    model.eval()
    try:
        parts = {"encoder": model.encoder, "stack": StackPart(model), "ranker": RankerPart(model)}
        for name in (bar := tqdm(parts, desc="ONNX export", unit="part", disable=None if progress else True)):
            bar.set_postfix_str(name)
            program = _trace(name, parts[name].eval(), model.config)
            program.model.metadata_props.update({"part": name, **metadata})
            partial = folder / f"{name}.onnx.part"
            program.save(partial, external_data=False)
            partial.rename(folder / f"{name}.onnx")
    finally:
        model.train(was_training)
    return folder


def _trace(name: str, part: nn.Module, config: ModelConfig) -> torch.onnx.ONNXProgram:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise OnnxError(f"cannot export: {error}; run `make setup`, or `pip install onnx onnxscript`") from error
    # Sizes of the example: all different and above 1, because tracing takes a size of 1 for a constant.
    sizes = {"batch": 2, "length": 5, "candidates": 3, "d_model": config.d_model}
    device = next(part.parameters()).device
    examples, dynamic = {}, {}
    for key, (dtype, dims) in INPUTS[name].items():
        examples[key] = torch.ones([sizes[d] for d in dims], dtype=getattr(torch, dtype), device=device)
        dynamic[key] = {i: torch.export.Dim(d) for i, d in enumerate(dims) if d != "d_model"}
    with quiet():
        program = torch.onnx.export(
            part, kwargs=examples, input_names=list(examples), output_names=list(OUTPUTS[name]), dynamic_shapes=dynamic,
            opset_version=OPSET, dynamo=True, verbose=False, custom_translation_table=TRANSLATIONS,
        )  # fmt: skip
    for value in program.model.graph.inputs:
        fixed = [dim for dim, size in zip(INPUTS[name][value.name][1], value.shape) if dim != "d_model" and isinstance(size, int)]
        if fixed:  # PyTorch does so without a word where the model turns a size into a Python number
            raise OnnxError(f"{name}: the exporter of PyTorch {torch.__version__} fixed the {fixed[0]} of {value.name}")
    for node in program.model.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # paths of the machine that exported
    return program


def _bucketize(seconds, boundaries, out_int32=False, right=False):
    """aten::bucketize as a binary search: one look-up and one comparison for each bit of the bucket.

    PyTorch's own translation is exact too, but of three times as many operators, and took twice the time in the stack.
    """
    from onnxscript import opset18 as op

    if out_int32 or not right:
        raise NotImplementedError("only int64 buckets that include their threshold")
    (count,) = boundaries.shape
    step = 1 << (count.bit_length() - 1)
    never = op.Constant(value_ints=[torch.iinfo(torch.int64).max] * (2 * step - 1 - count))
    edges = op.Concat(boundaries, never, axis=0)
    flat = op.Reshape(seconds, op.Constant(value_ints=[-1]))
    bucket = op.Expand(op.Constant(value_ints=[0]), op.Shape(flat))
    while step:
        edge = op.GatherElements(edges, op.Add(bucket, op.Constant(value_int=step - 1)))
        reached = op.Cast(op.GreaterOrEqual(flat, edge), to=7)
        bucket = op.Add(bucket, op.Mul(reached, op.Constant(value_int=step)))
        step //= 2
    return op.Reshape(bucket, op.Shape(seconds))


def _index_select(table, dim, index):
    """aten::index_select of columns of a bias table (H, R): in ONNX Runtime, GatherElements takes a tenth of Gather's time."""
    from onnxscript import opset18 as op

    if dim != 1 or len(table.shape) != 2:
        raise NotImplementedError("only columns of a matrix")
    heads = op.Constant(value_ints=[table.shape[0], 1])
    return op.GatherElements(table, op.Expand(op.Unsqueeze(index, op.Constant(value_ints=[0])), heads), axis=1)


TRANSLATIONS = {torch.ops.aten.bucketize.Tensor: _bucketize, torch.ops.aten.index_select.default: _index_select}
"""Operators of PyTorch that this module, not PyTorch, writes as ONNX."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back the exporter's warnings: of torchvision, which is not used here, and of its own deprecations."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)


def export_cached(
    checkpoint: str | pathlib.Path, cache_root: str | pathlib.Path | None = None, *, progress: bool = True
) -> pathlib.Path:
    """Folder with the exported parts of a checkpoint folder, made at the first call for that content and exporter.

    It lies in `cache_root` (default: `cache/onnx` in the data folder) and appears whole or not at all; of two processes that
    build it at once, the quicker one's stays. Raises CheckpointError where there is no checkpoint.
    """
    root = data_root() / "cache" / "onnx" if cache_root is None else pathlib.Path(cache_root)
    target = root / f"{content_hash(checkpoint)[:16]}-{exporter_version()}"
    if not _is_complete(target):
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=root) as scratch:
            _publish(export(load_checkpoint(checkpoint), pathlib.Path(scratch) / "parts", progress=progress), target)
    return target


def _is_complete(folder: pathlib.Path) -> bool:
    return all((folder / f"{part}.onnx").is_file() for part in INPUTS)


def _publish(built: pathlib.Path, target: pathlib.Path) -> None:
    try:
        built.rename(target)
    except OSError:  # there is a folder already: somebody was quicker, or somebody deleted a file in it
        if not _is_complete(target):
            shutil.rmtree(target)
            built.rename(target)


# ---- running


class OnnxModels:
    """The three parts of one folder in ONNX Runtime, on the CPU.

    `threads` are ONNX Runtime's own (default: one a core). `checkpoint` is the `content_hash` that the files must come from.
    Raises OnnxError naming the file where one is missing, damaged, or fits neither the others nor the checkpoint.

    Inputs are NumPy arrays or torch CPU tensors; the answer is of the kind of the first one. What lies in the padding does not
    matter as long as it is finite.
    """

    def __init__(self, folder: str | pathlib.Path, threads: int | None = None, checkpoint: str | None = None):
        self.folder = pathlib.Path(folder)
        self._sessions, metadata = {}, {}
        for part in INPUTS:
            path = self.folder / f"{part}.onnx"
            self._sessions[part] = load_session(path, threads)
            metadata[part] = _check_metadata(path, part, self._sessions[part])
        for part, found in metadata.items():
            for key in ("checkpoint", "config"):
                if found[key] != metadata["encoder"][key]:
                    raise OnnxError(
                        f"{self.folder / part}.onnx: its {key} is not that of encoder.onnx beside it; export the checkpoint again"
                    )
        self.checkpoint = metadata["encoder"]["checkpoint"]
        if checkpoint not in (None, self.checkpoint):
            raise OnnxError(
                f"{self.folder}: exported from checkpoint {self.checkpoint[:16]}, not from {checkpoint[:16]}; export that one"
            )
        try:
            self.config = ModelConfig.from_json(metadata["encoder"]["config"])
        except ConfigError as error:
            raise OnnxError(f"{self.folder / 'encoder.onnx'}: {error}") from error

    @property
    def engine(self) -> str:
        """What runs, for example "ONNX Runtime 1.32.0 CPU"."""
        import onnxruntime

        provider = self._sessions["stack"].get_providers()[0].removesuffix("ExecutionProvider")
        return f"ONNX Runtime {onnxruntime.__version__} {provider}"

    def encode(self, rows: Array, action: Array, gap_bucket: Array) -> Array:
        """Summed table rows (B, N, d_model), action and gap_bucket (B, N) int64 -> the stack's input x (B, N, d_model)."""
        return self.run("encoder", rows=rows, action=action, gap_bucket=gap_bucket)["x"]

    def stack(self, x: Array, times: Array, lengths: Array) -> Array:
        """x (B, N, d_model), times (B, N) seconds and lengths (B,) int64 -> next-item logits (B, num_items)."""
        return self.run("stack", x=x, times=times, lengths=lengths)["logits"]

    def rank(self, x_history: Array, x_candidates: Array, times: Array, lengths: Array) -> Array:
        """Histories (B, N, d_model) with times (B, N) and lengths (B,), candidates (B, C, d_model) -> probabilities (B, C, 3).

        The last dimension is engagement, retention, monetization. A history may be empty (length 0).
        """
        inputs = {"x_history": x_history, "x_candidates": x_candidates, "times": times, "lengths": lengths}
        return self.run("ranker", **inputs)["probabilities"]

    def run(self, part: str, **inputs: Array) -> dict[str, Array]:
        """Every output of one part by name. Raises OnnxError naming the input that does not fit."""
        arrays = self._checked(part, inputs)
        outputs = dict(zip(OUTPUTS[part], self._sessions[part].run(list(OUTPUTS[part]), arrays)))
        if isinstance(next(iter(inputs.values())), Tensor):
            return {name: torch.from_numpy(array) for name, array in outputs.items()}
        return outputs

    def _checked(self, part: str, inputs: dict[str, Array]) -> dict[str, np.ndarray]:
        if part not in INPUTS:
            raise OnnxError(f"part {part!r} is unknown: use one of {', '.join(INPUTS)}")
        if set(inputs) != set(INPUTS[part]):
            raise OnnxError(f"{part}: inputs are {', '.join(inputs) or 'none'}; give {', '.join(INPUTS[part])}")
        sizes = {"d_model": self.config.d_model}
        arrays = {}
        for name, (dtype, dims) in INPUTS[part].items():
            value = inputs[name]
            array = arrays[name] = np.ascontiguousarray(value.detach().cpu().numpy() if isinstance(value, Tensor) else value)
            if array.dtype != dtype:
                raise OnnxError(f"{part}: {name} is {array.dtype}; give {dtype}")
            fits = array.ndim == len(dims) and all(sizes.setdefault(d, n) == n > 0 for d, n in zip(dims, array.shape))
            if not fits:
                wanted = ", ".join(f"{d} {sizes[d]}" if d in sizes else d for d in dims)
                raise OnnxError(f"{part}: {name} has shape {array.shape}; give ({wanted}), none of them 0")
        if part != "encoder" and sizes["length"] > self.config.max_seq_len:  # the encoder takes every token by itself
            raise OnnxError(f"{part}: length is {sizes['length']}, the model's max_seq_len is {self.config.max_seq_len}")
        limits = {
            "action": (0, self.config.num_actions - 1),
            "gap_bucket": (0, self.config.num_time_buckets - 1),
            "lengths": (1 if part == "stack" else 0, sizes["length"]),
        }
        for name in limits.keys() & arrays.keys():
            low, high = limits[name]
            if arrays[name].min() < low or arrays[name].max() > high:
                raise OnnxError(
                    f"{part}: {name} lies in {arrays[name].min()}..{arrays[name].max()}; give values in {low}..{high}"
                )
        return arrays


def load_session(path: str | pathlib.Path, threads: int | None = None):
    """An `onnxruntime.InferenceSession` of one file on the CPU. Raises OnnxError where it is missing or no ONNX model."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise OnnxError(f"{path}: no such file; export the checkpoint with `python -m hstu_lab export`")
    try:
        import onnxruntime
    except ImportError as error:
        raise OnnxError(f"onnxruntime is not installed ({error}); run `make setup`, or `pip install onnxruntime`") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        reason = str(error).splitlines()[0]
        raise OnnxError(f"{path}: not a readable ONNX model ({reason}); delete {path.parent} and export again") from error


def _check_metadata(path: pathlib.Path, part: str, session) -> dict[str, str]:
    found = session.get_modelmeta().custom_metadata_map
    expected = {"schema_version": str(SCHEMA_VERSION), "part": part}
    for key in (*expected, "config", "checkpoint"):
        if key not in found:
            raise OnnxError(f"{path}: its metadata has no {key!r}; it was not exported by this project")
        if found[key] != expected.get(key, found[key]):
            raise OnnxError(f"{path}: its {key} is {found[key]}, not {expected[key]}; export the checkpoint again")
    return found


# ---- parity


def history_inputs(model: HSTU, tokens: Tensor, offsets: Tensor) -> dict[str, Tensor]:
    """Jagged tokens (T,), offsets (B + 1,) -> the parts' inputs, right-padded: rows, action, gap_bucket, times, lengths.

    Candidates go the same way, as bare item ids; their times and lengths are not needed.
    """
    _, action, level, _ = unpack(tokens, model.config)
    jagged = {
        "rows": model.tables(tokens, offsets),
        "action": action,
        "gap_bucket": model.gap_bucket(level),
        "times": model.times(tokens, offsets),
    }
    lengths = offsets.diff()
    dense = {name: reference.jagged_to_dense(values, offsets, int(lengths.max())) for name, values in jagged.items()}
    return {**dense, "lengths": lengths}


@dataclasses.dataclass(frozen=True)
class Parity:
    """How far one output is from PyTorch's: largest absolute error, and that over the largest absolute value of the output.

    The three tasks' probabilities are one output.
    """

    output: str
    max_abs: float
    max_rel: float
    shape: tuple[int, ...]


@torch.no_grad()
def parity(model: HSTU, models: OnnxModels, tokens: Tensor, offsets: Tensor, candidates: Tensor) -> list[Parity]:
    """Errors of all outputs against the jagged pass of `model`, each part fed by the one before, as in serving.

    tokens (T,), offsets (B + 1,): histories; candidates (B, C): item ids. A value that is infinite on one side only, or NaN,
    makes the errors infinite.
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
    same = ours == truth  # equal infinities too
    error = torch.where(same, 0.0, (ours.double() - truth.double()).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
    scale = output[output.isfinite()].abs().max().item()
    return Parity(name, error.max().item(), error.max().item() / scale, tuple(ours.shape))
