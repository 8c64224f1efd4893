"""ONNX: the encoder, the stack and the ranker as three graphs whose batch and length are free, in fp32, fp16 or int8.

A graph holds what the checkpoint holds except the tables of users and side features: summed rows come in, so that a row store
of any size can feed it. Every file says in its metadata which checkpoint and config it came from, and is refused where the two
do not fit. The formulas are those of `hstu_lab.onnx_parts`, traced.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import logging
import pathlib
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from hstu_lab import onnx_precision
from hstu_lab.config import PRECISIONS, ModelConfig
from hstu_lab.measure import data_root
from hstu_lab.model import HSTU, load_checkpoint, load_config
from hstu_lab.onnx_models import INPUTS, OUTPUTS, SCHEMA_VERSION, OnnxError, OnnxModels, load_session
from hstu_lab.onnx_parts import RankerPart, StackPart
from hstu_lab.onnx_precision import MASKED
from hstu_lab.ops import reference
from hstu_lab.tokens import encode_history, unpack

__all__ = ["INPUTS", "OUTPUTS", "SCHEMA_VERSION", "OnnxError", "OnnxModels", "export", "export_cached", "load_session"]

OPSET = 18
"""The oldest opset that has every operator the graphs use, so that the most engines read them."""

CALIBRATION_USERS, CALIBRATION_CANDIDATES = 64, 100
"""Histories, and candidates of each, that the int8 steps are taken from."""


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
    names = ("onnx_export.py", "onnx_models.py", "onnx_parts.py", "onnx_precision.py", "model.py", "ops/reference.py")
    sources = b"".join((package / name).read_bytes() for name in names)
    return f"{hashlib.sha256(sources).hexdigest()[:8]}-torch{torch.__version__}"


@torch.no_grad()
def export(
    model: HSTU,
    folder: str | pathlib.Path,
    *,
    precision: str = "fp32",
    histories: Sequence[Sequence[int]] | None = None,
    sizes: Mapping[str, int] | None = None,
    progress: bool = True,
) -> pathlib.Path:
    """Write `encoder.onnx`, `stack.onnx` and `ranker.onnx` to `folder` and return it; about 10 s. Weights lie inside the files.

    histories: token lists that int8 is calibrated with. sizes: {"length": 512, "candidates": 100} fixes dimensions that are
    free otherwise and avoids the operators that TensorRT 8.6 cannot parse; batch stays free.
    Raises OnnxError where onnx or onnxscript is missing, the folder cannot be written, and for int8 without histories.
    """
    folder = pathlib.Path(folder)
    _check_precision(precision, histories)
    if 1 / model.config.temperature > -MASKED / 2:
        raise OnnxError(
            f"temperature is {model.config.temperature}: logits could reach {MASKED:.0f}, which marks no item; raise it"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OnnxError(f"{folder}: cannot be written to ({error.strerror}); give a new folder or another one") from error
    metadata = {
        "schema_version": str(SCHEMA_VERSION),
        "config": model.config.to_json(),
        "checkpoint": content_hash(model),
        "exporter": exporter_version(),
        "precision": "fp32",
    }
    was_training = model.training
    model.eval()
    try:
        parts = {"encoder": model.encoder, "stack": StackPart(model), "ranker": RankerPart(model)}
        for name in (bar := tqdm(parts, desc="ONNX export", unit="part", disable=None if progress else True)):
            bar.set_postfix_str(name)
            program = trace(name, parts[name].eval(), model.config, sizes or {})
            program.model.metadata_props.update({"part": name, **metadata})
            proto = program.model_proto
            save(onnx_precision.fold_indices(proto) if sizes else proto, folder / f"{name}.onnx")
        if precision != "fp32":
            convert_folder(model, folder, folder, precision, histories)
    finally:
        model.train(was_training)
    return folder


@torch.no_grad()
def convert_folder(
    model: HSTU,
    source: str | pathlib.Path,
    target: str | pathlib.Path,
    precision: str,
    histories: Sequence[Sequence[int]] | None = None,
) -> pathlib.Path:
    """The fp32 parts in `source` as `precision` in `target`; `histories` (token lists) calibrate int8. About a second.

    The next-item logits are a cosine over the whole item table: they stay fp16 in an int8 export, which would reorder the list.
    """
    import onnx

    source, target = pathlib.Path(source), pathlib.Path(target)
    _check_precision(precision, histories)
    protos = {part: load_onnx(source / f"{part}.onnx") for part in INPUTS}
    batches = calibration_batches(model, OnnxModels(source, threads=1), histories) if precision == "int8" else {}
    target.mkdir(parents=True, exist_ok=True)
    for part, proto in protos.items():
        scales = None
        if precision == "int8":
            ranges = onnx_precision.calibrate(proto, batches[part])
            scales = onnx_precision.quiet_steps(ranges)
            if part == "stack":
                scales.pop(onnx_precision.quantisable(proto)[-1], None)
            scales = onnx_precision.settle(proto, ranges, scales, _short_and_long(part, batches[part]))
        converted = onnx_precision.convert(proto, scales)
        said = {"precision": precision} | ({"calibration": f"{len(histories)} histories {_digest(histories)}"} if scales else {})
        kept = {entry.key: entry.value for entry in proto.metadata_props}
        del converted.metadata_props[:]
        onnx.helper.set_model_props(converted, kept | said)
        save(converted, target / f"{part}.onnx")
    return target


def load_onnx(path: str | pathlib.Path):
    """One file as an `onnx.ModelProto`. Raises OnnxError where it is missing or damaged."""
    import onnx

    try:
        return onnx.load(str(path))
    except Exception as error:  # protobuf's own, of which there are two implementations
        raise OnnxError(f"{path}: not a readable ONNX model ({error}); export the checkpoint again") from error


def save(proto, path: pathlib.Path) -> None:
    """Write an `onnx.ModelProto` to `path`, which appears whole or not at all."""
    partial = path.with_suffix(".onnx.part")
    partial.write_bytes(proto.SerializeToString())
    partial.rename(path)


def _check_precision(precision: str, histories: Sequence[Sequence[int]] | None) -> None:
    if precision not in PRECISIONS:
        raise OnnxError(f"precision {precision!r} is unknown: use one of {', '.join(PRECISIONS)}")
    if precision == "int8" and not histories:
        raise OnnxError(
            "precision int8 needs histories to calibrate with: give token lists, or --events FILE on the command line"
        )


def trace(name: str, part: nn.Module, config: ModelConfig, fixed: Mapping[str, int] | None = None) -> torch.onnx.ONNXProgram:
    """One part as an ONNX program with `fixed` sizes, the others free. Raises OnnxError where the exporter fixed one more."""
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise OnnxError(f"cannot export: {error}; run `make setup`, or `pip install onnx onnxscript`") from error
    # Sizes of the example: all different and above 1, because tracing takes a size of 1 for a constant.
    fixed = {"d_model": config.d_model, **(fixed or {})}
    sizes = {"batch": 2, "length": 5, "candidates": 3, **fixed}
    device = next(part.parameters()).device
    examples, dynamic = {}, {}
    for key, (dtype, dims) in INPUTS[name].items():
        examples[key] = torch.ones([sizes[d] for d in dims], dtype=getattr(torch, dtype), device=device)
        dynamic[key] = {i: torch.export.Dim(d) for i, d in enumerate(dims) if d not in fixed}
    with quiet():
        program = torch.onnx.export(
            part, kwargs=examples, input_names=list(examples), output_names=list(OUTPUTS[name]), dynamic_shapes=dynamic,
            opset_version=OPSET, dynamo=True, verbose=False,
            custom_translation_table=PLAIN_TRANSLATIONS if "length" in fixed else TRANSLATIONS,
        )  # fmt: skip
    for value in program.model.graph.inputs:
        lost = [dim for dim, size in zip(INPUTS[name][value.name][1], value.shape) if dim not in fixed and isinstance(size, int)]
        if lost:  # PyTorch does so without a word where the model turns a size into a Python number
            raise OnnxError(f"{name}: the exporter of PyTorch {torch.__version__} fixed the {lost[0]} of {value.name}")
    for node in program.model.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # paths of the machine that exported
    return program


def _index_select(table, dim, index):
    """aten::index_select of columns of a bias table (H, R): in ONNX Runtime, GatherElements takes a tenth of Gather's time."""
    from onnxscript import opset18 as op

    if dim != 1 or len(table.shape) != 2:
        raise NotImplementedError("only columns of a matrix")
    heads = op.Constant(value_ints=[table.shape[0], 1])
    return op.GatherElements(table, op.Expand(op.Unsqueeze(index, op.Constant(value_ints=[0])), heads), axis=1)


def _gather_columns(table, dim, index):
    """aten::index_select as the plain operator: TensorRT runs Gather on the small table without spelling every index out."""
    from onnxscript import opset18 as op

    return op.Gather(table, index, axis=dim)


def _slices(x, sizes, dim=0):
    """aten::split_with_sizes as one Slice with constant ends for each piece."""
    from onnxscript import opset18 as op

    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    constants = ([op.Constant(value_ints=[v]) for v in pair] for pair in zip([0, *ends], ends))
    axis = op.Constant(value_ints=[dim])
    return tuple(op.Slice(x, start, end, axis) for start, end in constants)


TRANSLATIONS = {torch.ops.aten.index_select.default: _index_select}
"""Operators of PyTorch that this module, not PyTorch, writes as ONNX."""

PLAIN_TRANSLATIONS = {
    torch.ops.aten.index_select.default: _gather_columns,
    torch.ops.aten.split_with_sizes.default: _slices,
}
"""The same for graphs of a fixed length, which TensorRT 8.6 must be able to parse."""


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
    checkpoint: str | pathlib.Path,
    cache_root: str | pathlib.Path | None = None,
    *,
    precision: str = "fp32",
    histories: Sequence[Sequence[int]] | None = None,
    progress: bool = True,
) -> pathlib.Path:
    """Folder with the exported parts of a checkpoint folder, made at the first call for that content and exporter.

    It lies in `cache_root` (default: `cache/onnx` in the data folder) and appears whole or not at all; of two processes that
    build it at once, the quicker one's stays. fp16 and int8 are made from the fp32 entry; int8 is calibrated with `histories`
    (token lists; default: `sample_histories`). Raises CheckpointError where there is no checkpoint.
    """
    root = data_root() / "cache" / "onnx" if cache_root is None else pathlib.Path(cache_root)
    if precision == "int8" and histories is None:
        histories = sample_histories(checkpoint)
    _check_precision(precision, histories)
    suffix = {"fp32": "", "fp16": "-fp16"}.get(precision) or (f"-int8-{_digest(histories)}" if precision == "int8" else "")
    target = root / f"{content_hash(checkpoint)[:16]}-{exporter_version()}{suffix}"
    if not _is_complete(target):
        root.mkdir(parents=True, exist_ok=True)
        model = load_checkpoint(checkpoint)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=root) as scratch:
            built = pathlib.Path(scratch) / "parts"
            if precision == "fp32":
                export(model, built, progress=progress)
            else:
                source = export_cached(checkpoint, root, progress=progress)
                convert_folder(model, source, built, precision, histories)
            _publish(built, target)
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


# ---- what int8 is calibrated with


def sample_histories(checkpoint: str | pathlib.Path, events: str | pathlib.Path | None = None) -> list[list[int]]:
    """Token lists of the first `CALIBRATION_USERS` users of an event log (default: the sample log) in a checkpoint's catalog.

    Raises EventsError where the log holds none of the catalog's items.
    """
    from hstu_lab.events import Catalog, read_events

    config, path = load_config(checkpoint), events or data_root() / "sample" / "events.jsonl.gz"
    log = read_events(path, Catalog.load(pathlib.Path(checkpoint) / "catalog.json"))
    rows = (log.history(user) for user in range(min(len(log), CALIBRATION_USERS)))
    encoded = (encode_history(row.items, row.actions, row.timestamps, 0, config) for row in rows)
    return [tokens for tokens in encoded if tokens]


@torch.no_grad()
def calibration_batches(model: HSTU, models: OnnxModels, histories: Sequence[Sequence[int]]) -> dict[str, list[dict]]:
    """Inputs (NumPy) of each part, a history at a time and so without padding; the candidates are the stack's best."""
    batches: dict[str, list[dict]] = {part: [] for part in INPUTS}

    def encode(tokens: Tensor) -> dict[str, np.ndarray]:
        inputs = {k: v.numpy() for k, v in history_inputs(model, tokens, torch.tensor([0, len(tokens)])).items()}
        batches["encoder"].append({name: inputs[name] for name in INPUTS["encoder"]})
        return {**inputs, "x": models.encode(**batches["encoder"][-1])}

    for history in histories:
        known = encode(torch.tensor(history))
        batches["stack"].append({name: known[name] for name in INPUTS["stack"]})
        logits = models.stack(**batches["stack"][-1])[0]
        count = min(CALIBRATION_CANDIDATES, int(np.isfinite(logits).sum()))
        best = encode(torch.from_numpy(np.argsort(-logits, kind="stable")[:count]))
        ranked = {"x_history": known["x"], "x_candidates": best["x"], "times": known["times"], "lengths": known["lengths"]}
        batches["ranker"].append(ranked)
    return batches


def _short_and_long(part: str, batches: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """Some of a part's calibration batches whole, and others cut to their first few events."""
    cut = []
    for batch, most in zip(batches, itertools.cycle((None, 1, None, 2, None, 4, None, 9))):
        dims = {name: INPUTS[part][name][1] for name in batch}
        short = {name: values[:, :most] if "length" in dims[name] else values for name, values in batch.items()}
        if "lengths" in short:
            short["lengths"] = np.full_like(short["lengths"], short["times"].shape[1])
        cut.append(short)
    return cut[:32]


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


def _digest(histories: Sequence[Sequence[int]]) -> str:
    text = "\n".join(" ".join(map(str, history)) for history in histories)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
