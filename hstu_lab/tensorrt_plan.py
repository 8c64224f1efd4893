"""An engine file: a header that says what the engine is, then TensorRT's own bytes, with a checksum over them.

The header is what lets names, shapes, types, versions and GPUs be checked before TensorRT sees anything, and without a GPU.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hstu_lab.tensorrt_library import EngineError, Library

FORMAT = 1
"""Version of the header."""
_MAGIC = b"HSTUENG\x01"


class InputError(EngineError):
    """An input that does not fit the engine: its name, type, shape, layout or place. Nothing has run."""


class DamagedEngine(EngineError):
    """An engine file that is cut short, changed or no engine at all."""


class StaleEngine(EngineError):
    """A whole engine file that this TensorRT or this GPU cannot run."""


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One input or output: NumPy's name of its type; a dimension is a number, or the name of a size that a call chooses."""

    name: str
    dtype: str
    dims: tuple[str | int, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} ({', '.join(map(str, self.dims))})"


Profile = Mapping[str, tuple[int, int, int]]
"""Least, usual and largest size of each named dimension; TensorRT tunes for the usual one."""


@dataclasses.dataclass(frozen=True)
class Header:
    """What an engine is. `onnx`: SHA-256 of the file it was built from; `structure`: of that file without its weights' values.

    `target` is a compute capability; `gpu` names the GPU model where the engine is for that one only. `workspace` in bytes,
    `seconds` the build's. `metadata` is the ONNX file's.
    """

    library: str
    version: str
    target: str
    gpu: str
    precision: str
    onnx: str
    structure: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Profile, ...]
    workspace: int
    tf32: bool
    refittable: bool
    layers: int
    seconds: float
    metadata: Mapping[str, str]
    plan_bytes: int = 0
    plan_sha256: str = ""

    @classmethod
    def from_json(cls, text: str) -> Header:
        fields = json.loads(text)
        if fields.pop("format") != FORMAT:
            raise ValueError(f"format is not {FORMAT}")
        for kind in ("inputs", "outputs"):
            fields[kind] = tuple(TensorSpec(t["name"], t["dtype"], tuple(t["dims"])) for t in fields[kind])
        fields["profiles"] = tuple({dim: tuple(sizes) for dim, sizes in profile.items()} for profile in fields["profiles"])
        return cls(**fields)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, sort_keys=True)

    def __str__(self) -> str:
        name = "TensorRT for RTX" if self.library == "tensorrt_rtx" else "TensorRT"
        profiles = "; ".join(
            ", ".join(f"{dim} {low}..{high} (tuned for {usual})" for dim, (low, usual, high) in profile.items())
            for profile in self.profiles
        )
        return (
            f"{self.metadata.get('part', 'engine')}, {self.precision}, {name} {self.version} for {self.target}"
            f"{f' ({self.gpu})' if self.gpu else ''}: {self.layers} layers, {self.plan_bytes / 1e6:.2f} MB, "
            f"built in {self.seconds:.1f} s; {profiles or 'fixed shapes'}"
        )

    # ---- may this run here, and with these?

    def check_runs_on(self, library: Library, target: str | None, gpu: str, path: str | pathlib.Path = "engine") -> None:
        """Raise StaleEngine unless that library and GPU are the ones it was built for."""
        again = "delete it and build again"
        if (self.library, self.version) != (library.name, library.version):
            raise StaleEngine(
                f"{path}: built by {self.library} {self.version}, here is {library.name} {library.version}; {again}"
            )
        if target is not None and target != self.target:
            raise StaleEngine(f"{path}: built for {self.target}, this GPU is {target}; {again}")
        if self.gpu and gpu and gpu != self.gpu:
            raise StaleEngine(f"{path}: tuned on {self.gpu}, this GPU is {gpu}; {again}")

    def check(self, inputs: Mapping[str, Any]) -> tuple[dict[str, int], int]:
        """Sizes of the named dimensions and the profile that fits them best (the one with the least largest sizes).

        inputs: arrays with `shape` and `dtype`. Raises InputError naming the tensor that does not fit, before anything runs.
        """
        sizes: dict[str, int] = {}
        known = {spec.name for spec in self.inputs}
        if extra := sorted(set(inputs) - known):
            raise InputError(f"{extra[0]} is no input of this engine; give {', '.join(spec.name for spec in self.inputs)}")
        for spec in self.inputs:
            if spec.name not in inputs:
                raise InputError(f"input {spec.name} is missing; give {', '.join(s.name for s in self.inputs)}")
            _check_tensor(spec, inputs[spec.name], sizes)
        return sizes, self.profile_for(sizes)

    def profile_for(self, sizes: Mapping[str, int]) -> int:
        """Index of the tightest profile that holds these sizes. Raises InputError naming the dimension that none does."""
        fitting = [
            (np.prod([high for _, _, high in profile.values()], dtype=float), i)
            for i, profile in enumerate(self.profiles)
            if all(profile[dim][0] <= size <= profile[dim][2] for dim, size in sizes.items() if dim in profile)
        ]
        if not self.profiles:
            return 0
        if not fitting:
            said = "; ".join(
                ", ".join(f"{dim} {low}..{high}" for dim, (low, _, high) in p.items() if dim in sizes) for p in self.profiles
            )
            given = ", ".join(f"{dim} {size}" for dim, size in sizes.items())
            raise InputError(f"{given}: outside every profile of this engine ({said}); pad, split, or build with a wider profile")
        return min(fitting)[1]

    def shapes(self, specs: Sequence[TensorSpec], sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Shape of each of those tensors for these sizes."""
        return {spec.name: tuple(sizes[d] if isinstance(d, str) else d for d in spec.dims) for spec in specs}


def _check_tensor(spec: TensorSpec, value: Any, sizes: dict[str, int]) -> None:
    name = spec.name
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise InputError(f"{name} is a {type(value).__name__}; give a NumPy array or a CUDA tensor of {spec.dtype}")
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype != spec.dtype:
        raise InputError(f"{name} is {dtype}; give {spec.dtype}")
    shape = tuple(value.shape)
    fits = len(shape) == len(spec.dims) and all(
        size == (sizes.setdefault(dim, size) if isinstance(dim, str) else dim) for dim, size in zip(spec.dims, shape)
    )
    if not fits:
        wanted = ", ".join(f"{d} {sizes[d]}" if d in sizes else str(d) for d in spec.dims)
        raise InputError(f"{name} has shape {shape}; give ({wanted})")
    if not _is_contiguous(value):
        raise InputError(f"{name} is not contiguous; give {name}.contiguous(), or numpy.ascontiguousarray({name})")


def _is_contiguous(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.flags.c_contiguous
    return value.is_contiguous() if hasattr(value, "is_contiguous") else True


# ---- files


def write_engine(path: str | pathlib.Path, header: Header, plan: bytes) -> Header:
    """Write the file whole or not at all; returns the header with the plan's size and checksum."""
    path = pathlib.Path(path)
    header = dataclasses.replace(header, plan_bytes=len(plan), plan_sha256=hashlib.sha256(plan).hexdigest())
    text = header.to_json().encode()
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".part", delete=False) as file:
        try:
            file.write(_MAGIC + len(text).to_bytes(8, "little") + text)
            file.write(plan)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            pathlib.Path(file.name).unlink(missing_ok=True)
            raise
    return header


def read_header(path: str | pathlib.Path) -> Header:
    """The header alone. Raises DamagedEngine where the file is none of ours or shorter than its header says."""
    return _read(pathlib.Path(path), with_plan=False)[0]


def read_engine(path: str | pathlib.Path) -> tuple[Header, bytes]:
    """Header and plan, the checksum compared. Raises DamagedEngine naming what is wrong with the file."""
    return _read(pathlib.Path(path), with_plan=True)


def _read(path: pathlib.Path, with_plan: bool) -> tuple[Header, bytes]:
    again = "delete it and build again"
    try:
        with open(path, "rb") as file:
            start = file.read(len(_MAGIC) + 8)
            if not start.startswith(_MAGIC[:-1]) or len(start) < len(_MAGIC) + 8:
                raise DamagedEngine(f"{path}: not an engine file of this project; {again}")
            length = int.from_bytes(start[len(_MAGIC) :], "little")
            text = file.read(min(length, os.fstat(file.fileno()).st_size))
            try:
                header = Header.from_json(text.decode())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DamagedEngine(f"{path}: its header cannot be read ({error}); {again}") from error
            found = os.fstat(file.fileno()).st_size - len(start) - length
            if found != header.plan_bytes:
                raise DamagedEngine(
                    f"{path}: holds {found:,} bytes of engine where its header says {header.plan_bytes:,}; {again}"
                )
            plan = file.read() if with_plan else b""
    except FileNotFoundError as error:
        raise EngineError(f"{path}: no such file; build it with `python -m hstu_lab export --to tensorrt`") from error
    except OSError as error:
        raise EngineError(f"{path}: cannot be read ({error.strerror})") from error
    if with_plan and hashlib.sha256(plan).hexdigest() != header.plan_sha256:
        raise DamagedEngine(f"{path}: its bytes have changed since it was written; {again}")
    return header, plan
