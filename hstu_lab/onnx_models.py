"""The three ONNX parts as a set of files that belong together, and ONNX Runtime to run them.

What goes in and comes out is declared here; `onnx_export` makes the files, `tensorrt_models` runs the same parts as engines.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from hstu_lab.config import PRECISIONS, ConfigError, ModelConfig
from hstu_lab.onnx_precision import MASKED

SCHEMA_VERSION = 3
"""Version of the files' inputs, outputs and metadata."""

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


def with_infinities(outputs: dict[str, Array]) -> dict[str, Array]:
    """A part's outputs with minus infinity, which PyTorch gives, where the file says `MASKED`; written in place."""
    if "logits" in outputs:
        outputs["logits"][outputs["logits"] < MASKED / 2] = -np.inf
    return outputs


class OnnxError(ValueError):
    """An ONNX file or an input that cannot be used; the message names it and the remedy."""


class PartModels:
    """Encoder, stack and ranker behind names and shapes that are checked; `_run` is what an engine adds.

    Inputs are NumPy arrays or torch CPU tensors; the answer is of the kind of the first one. What lies in the padding does not
    matter as long as it is finite.
    """

    config: ModelConfig

    def encode(self, rows: Array, action: Array, gap_bucket: Array) -> Array:
        """Summed table rows (B, N, d_model), action and gap_bucket (B, N) int64 -> the stack's input x (B, N, d_model)."""
        return self.run("encoder", rows=rows, action=action, gap_bucket=gap_bucket)["x"]

    def stack(self, x: Array, times: Array, lengths: Array) -> Array:
        """x (B, N, d_model), times (B, N) seconds and lengths (B,) int64 -> next-item logits (B, num_items).

        Ids that name no item have minus infinity, as in PyTorch.
        """
        return self.run("stack", x=x, times=times, lengths=lengths)["logits"]

    def rank(self, x_history: Array, x_candidates: Array, times: Array, lengths: Array) -> Array:
        """Histories (B, N, d_model) with times (B, N) and lengths (B,), candidates (B, C, d_model) -> probabilities (B, C, 3).

        The last dimension is engagement, retention, monetization. A history may be empty (length 0).
        """
        inputs = {"x_history": x_history, "x_candidates": x_candidates, "times": times, "lengths": lengths}
        return self.run("ranker", **inputs)["probabilities"]

    def run(self, part: str, **inputs: Array) -> dict[str, Array]:
        """Every output of one part by name. Raises OnnxError naming the input that does not fit."""
        outputs = with_infinities(self._run(part, self._checked(part, inputs)))
        if isinstance(next(iter(inputs.values())), Tensor):
            return {name: torch.from_numpy(array) for name, array in outputs.items()}
        return outputs

    def _run(self, part: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def close(self) -> None:
        """Free what the engine holds."""

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


class OnnxModels(PartModels):
    """The three parts of one folder in ONNX Runtime, on the CPU.

    `threads` are ONNX Runtime's own (default: one a core). `checkpoint` is the `content_hash` that the files must come from.
    Raises OnnxError naming the file where one is missing, damaged, or fits neither the others nor the checkpoint.
    """

    def __init__(self, folder: str | pathlib.Path, threads: int | None = None, checkpoint: str | None = None):
        self.folder = pathlib.Path(folder)
        self._sessions, metadata = {}, {}
        for part in INPUTS:
            path = self.folder / f"{part}.onnx"
            self._sessions[part] = load_session(path, threads)
            metadata[part] = check_metadata(path, part, self._sessions[part].get_modelmeta().custom_metadata_map)
        self.metadata = check_set(self.folder, metadata, checkpoint)
        self.checkpoint, self.precision = self.metadata["checkpoint"], self.metadata["precision"]
        self.config = load_metadata_config(self.folder / "encoder.onnx", self.metadata)

    @property
    def engine(self) -> str:
        """What runs, for example "ONNX Runtime 1.32.0 CPU", with the precision where it is not fp32."""
        import onnxruntime

        provider = self._sessions["stack"].get_providers()[0].removesuffix("ExecutionProvider")
        low = f", {self.precision}" if self.precision != "fp32" else ""
        return f"ONNX Runtime {onnxruntime.__version__} {provider}{low}"

    def _run(self, part: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(OUTPUTS[part], self._sessions[part].run(list(OUTPUTS[part]), arrays)))


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


# ---- what a file says of itself


def check_metadata(path: pathlib.Path, part: str, found: Mapping[str, str]) -> Mapping[str, str]:
    """The file's metadata, which must be those of that part. Raises OnnxError naming what is missing or different."""
    expected = {"schema_version": str(SCHEMA_VERSION), "part": part}
    for key in (*expected, "config", "checkpoint", "precision"):
        if key not in found:
            raise OnnxError(f"{path}: its metadata has no {key!r}; it was not exported by this project")
        if found[key] != expected.get(key, found[key]):
            raise OnnxError(f"{path}: its {key} is {found[key]}, not {expected[key]}; export the checkpoint again")
    if found["precision"] not in PRECISIONS:
        raise OnnxError(f"{path}: its precision is {found['precision']}, not one of {', '.join(PRECISIONS)}; export again")
    return found


def check_set(folder: pathlib.Path, metadata: Mapping[str, Mapping[str, str]], checkpoint: str | None) -> Mapping[str, str]:
    """What the parts' metadata have in common. Raises OnnxError naming the file that does not belong to the others."""
    first = metadata["encoder"]
    for part, found in metadata.items():
        for key in ("checkpoint", "config", "precision"):
            if found[key] != first[key]:
                raise OnnxError(
                    f"{folder / part}.onnx: its {key} is not that of encoder.onnx beside it; export the checkpoint again"
                )
    if checkpoint not in (None, first["checkpoint"]):
        raise OnnxError(
            f"{folder}: exported from checkpoint {first['checkpoint'][:16]}, not from {checkpoint[:16]}; export that one"
        )
    return first


def load_metadata_config(path: pathlib.Path, metadata: Mapping[str, str]) -> ModelConfig:
    """The model's config. Raises OnnxError where it cannot be read."""
    try:
        return ModelConfig.from_json(metadata["config"])
    except ConfigError as error:
        raise OnnxError(f"{path}: {error}") from error
