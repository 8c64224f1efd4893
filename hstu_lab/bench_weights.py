"""Benchmark weights that are made from their names, and ONNX files that travel without them.

A machine with a GPU often has no exporter, and one with an exporter no GPU; gr-3b's files together are over 2 GB. `strip` takes
out of them what `fill` can make again on the other side.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from hstu_lab.onnx_precision import quantise_columns

_SMALLEST = 2048
"""Bytes of the smallest tensor that is taken out."""

WAYS = {
    "same": lambda a: a,
    "turned": lambda a: a.T,
    "half": lambda a: a.astype(np.float16),
    "half turned": lambda a: a.T.astype(np.float16),
    "int8": lambda a: quantise_columns(np.ascontiguousarray(a.T))[0],
    "half words": lambda a: a.astype(np.float16).view(np.int32),
    "int8 words": lambda a: np.ascontiguousarray(quantise_columns(np.ascontiguousarray(a.T))[0].T).view(np.int32),
    "steps": lambda a: quantise_columns(np.ascontiguousarray(a.T))[1],
}
"""What an export may have done to a weight."""


def make_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 weights that depend on the parameter's name and shape only."""
    values = np.random.default_rng(zlib.crc32(name.encode())).random(shape, dtype=np.float32) * 2 - 1
    if name.endswith("norm.weight"):
        return 1 + 0.2 * values
    if "position_bias" in name or "time_bias" in name:
        return 0.5 * values
    if len(shape) == 1:
        return 0.1 * values
    if name == "item" or name.endswith(("action.weight", "gap.weight")):
        return 0.05 * values
    return values * np.float32((6 / sum(shape)) ** 0.5)


def strip(source: pathlib.Path, target: pathlib.Path, weights: Mapping[str, np.ndarray]) -> None:
    """Copy every ONNX file of `source` without the tensors that are one of `weights` in one of `WAYS`; a .json says which."""
    import onnx

    known = {_digest(way(array)): (name, kind) for name, array in weights.items() for kind, way in _ways(array)}
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*.onnx")):
        model, taken = onnx.load(str(path)), {}
        for tensor in model.graph.initializer:
            found = known.get(_digest(onnx.numpy_helper.to_array(tensor))) if len(tensor.raw_data) >= _SMALLEST else None
            if found:
                taken[tensor.name] = found
                tensor.ClearField("raw_data")
        (target / path.name).write_bytes(model.SerializeToString())
        (target / path.name).with_suffix(".json").write_text(json.dumps(taken))


def fill(source: pathlib.Path, target: pathlib.Path, weights: Mapping[str, np.ndarray]) -> None:
    """Undo `strip`. Raises ValueError where a weight has another shape than the one taken out."""
    import onnx

    target.mkdir(parents=True, exist_ok=True)

    def one(path: pathlib.Path) -> None:
        model, taken = onnx.load(str(path)), json.loads(path.with_suffix(".json").read_text())
        for tensor in model.graph.initializer:
            if tensor.name in taken:
                name, kind = taken[tensor.name]
                array = np.ascontiguousarray(WAYS[kind](weights[name]))
                if array.shape != tuple(tensor.dims):
                    raise ValueError(f"{path}: {name} has shape {array.shape}, {tensor.name} {tuple(tensor.dims)}; strip again")
                tensor.raw_data = array.tobytes()
        partial = target / f"{path.name}.part"
        partial.write_bytes(model.SerializeToString())
        partial.rename(target / path.name)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(one, sorted(source.glob("*.onnx"))))


def _ways(array: np.ndarray):
    fitting = [kind for kind in WAYS if not kind.endswith("words") or array.shape[-1] % 4 == 0]
    return ((kind, WAYS[kind]) for kind in fitting if array.ndim == 2 or kind in ("same", "half"))


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes()).hexdigest()
