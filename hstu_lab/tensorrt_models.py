"""Encoder, stack and ranker as TensorRT engines behind the interface of `OnnxModels`: build, cache, load, run."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from hstu_lab.config import ModelConfig
from hstu_lab.measure import data_root
from hstu_lab.onnx_models import INPUTS, Array, PartModels, check_metadata, check_set, load_metadata_config, with_infinities
from hstu_lab.tensorrt_build import WORKSPACE, EngineCache, Progress, Request, onnx_metadata
from hstu_lab.tensorrt_engine import Engine, EngineError
from hstu_lab.tensorrt_plan import Profile, read_header

PART_DIMS = {"encoder": ("batch", "length"), "stack": ("batch", "length"), "ranker": ("batch", "length", "candidates")}


def default_cache() -> EngineCache:
    return EngineCache(data_root() / "cache" / "tensorrt")


def serving_profiles(config: ModelConfig, batch: int = 64, candidates: int | None = None) -> dict[str, tuple[Profile, ...]]:
    """Each part's profiles for serving: every length up to `max_seq_len`, tuned for a full history; batches of 1 to `batch`.

    The encoder sees all events of a batch end to end as one long row (batch 1).
    """
    candidates = candidates or max(config.num_candidates, config.slate_size)
    longest = config.max_seq_len
    sizes = {
        "batch": (1, min(batch, 8), batch),
        "length": (1, longest, longest),
        "candidates": (1, candidates, candidates),
    }
    rows = batch * max(longest, candidates)
    encoder = {"batch": (1, 1, 1), "length": (1, min(longest, rows), rows)}
    return {part: (encoder if part == "encoder" else {dim: sizes[dim] for dim in PART_DIMS[part]},) for part in INPUTS}


def build_engines(
    folder: str | pathlib.Path,
    profiles: Mapping[str, Sequence[Profile]],
    *,
    cache: EngineCache | None = None,
    target: str | None = None,
    workspace: int = WORKSPACE,
    refit: bool = False,
    progress: Progress = True,
) -> dict[str, pathlib.Path]:
    """The engine file of each part of an exported folder, from the cache or built now.

    Raises OnnxError where the files do not belong together, EngineError where one cannot be built.
    """
    folder, cache = pathlib.Path(folder), cache or default_cache()
    paths = {part: folder / f"{part}.onnx" for part in INPUTS}
    requests = {
        part: Request.of(path, profiles[part], target=target, workspace=workspace, refit=refit) for part, path in paths.items()
    }
    found = {part: check_metadata(path, part, onnx_metadata(path)) for part, path in paths.items()}
    check_set(folder, found, None)
    return {part: cache.get(request, progress=progress) for part, request in requests.items()}


class TensorRtModels(PartModels):
    """The three parts as engines on this machine's GPU. Raises EngineError naming the file that cannot run here."""

    def __init__(self, paths: Mapping[str, str | pathlib.Path], checkpoint: str | None = None):
        headers = {part: read_header(paths[part]) for part in INPUTS}
        found = {part: check_metadata(pathlib.Path(paths[part]), part, header.metadata) for part, header in headers.items()}
        self.metadata = check_set(pathlib.Path(paths["encoder"]).parent, found, checkpoint)
        self.checkpoint, self.precision = self.metadata["checkpoint"], self.metadata["precision"]
        self.config = load_metadata_config(pathlib.Path(paths["encoder"]), self.metadata)
        self._engines: dict[str, Engine] = {}
        try:
            for part in INPUTS:
                self._engines[part] = Engine(paths[part])
        except EngineError:
            self.close()
            raise

    @property
    def engine(self) -> str:
        """What runs, for example "TensorRT 11.4.0 fp16"."""
        engine = self._engines["stack"]
        return f"{engine.library.label}, {self.precision}, {engine.header.target}"

    def run(self, part: str, **inputs: Array) -> dict[str, Array]:
        """Every output of one part by name; CUDA tensors are read where they lie and answered on the GPU.

        Raises OnnxError or InputError naming the input that does not fit. Values inside CUDA tensors are not looked at.
        """
        if not all(getattr(value, "is_cuda", False) for value in inputs.values()):
            return super().run(part, **inputs)
        engine = self._engines[part]
        wanted = {spec.name: getattr(torch, spec.dtype) for spec in engine.header.inputs if "int" in spec.dtype}
        given = {k: v.to(wanted[k]) if k in wanted else v.contiguous() for k, v in inputs.items()}
        return with_infinities(engine.infer(given))

    def _run(self, part: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        engine = self._engines[part]
        wanted = {spec.name: spec.dtype for spec in engine.header.inputs}  # TensorRT 8.6 takes int32 where the file says int64
        return engine.infer({name: array.astype(wanted[name], copy=False) for name, array in arrays.items()})

    def close(self) -> None:
        """Free the engines' GPU memory."""
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()
