"""A checkpoint's stack and ranker in kernels of ours: ONNX files and engines, one for each length that histories are padded to.

The files of an fp16 or int8 export say what is computed, int8's steps included; layers are traced anew, with a fixed length.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np
import onnx
import torch

from hstu_lab import onnx_export, onnx_precision, tensorrt_kernels
from hstu_lab.config import ModelConfig
from hstu_lab.model import HSTU
from hstu_lab.tensorrt_build import EngineCache, Progress, Request
from hstu_lab.tensorrt_library import EngineError
from hstu_lab.tensorrt_parts import FUSED

SHORTEST = 64


def bucket_lengths(config: ModelConfig) -> tuple[int, ...]:
    """Powers of two from `SHORTEST` on, and the longest history."""
    longest = config.max_seq_len
    return (*(2**i for i in range(SHORTEST.bit_length() - 1, longest.bit_length()) if 2**i < longest), longest)


@torch.no_grad()
def export_buckets(
    model: HSTU,
    source: pathlib.Path,
    folder: pathlib.Path,
    lengths: Sequence[int],
    candidates: int,
    capability: int,
    batch: int = 8,
) -> list[pathlib.Path]:
    """`stack-LENGTH.onnx` and `ranker-LENGTH.onnx` for every length, from the files of an export in `source` and its model.

    The ranker's takes `candidates` beside the history; kernels are compiled for `capability` (80, 90) and tiled for `batch`
    histories, and the batch stays free. Raises EngineError for an fp32 export, FuseError for sizes that the kernels do not take.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for part, kind in FUSED.items():
        stated = onnx_export.load_onnx(source / f"{part}.onnx")
        metadata = {entry.key: entry.value for entry in stated.metadata_props}
        if metadata["precision"] == "fp32":
            raise EngineError(f"{source}: is fp32, kernels of ours compute in fp16 and int8; export it as one of them")
        traced = kind(model).eval()
        for length in lengths:
            program = onnx_export.trace(part, traced, model.config, {"length": length, "candidates": candidates})
            graph = onnx_precision.fold_indices(program.model_proto)
            fused = tensorrt_kernels.fuse(onnx_precision.convert(graph, steps_of(stated, graph), halves=False), capability, batch)
            onnx.helper.set_model_props(fused, metadata | {"kernels": f"sm_{capability}", "length": str(length)})
            path = folder / f"{part}-{length}.onnx"
            onnx_export.save(fused, path)
            written.append(path)
    return written


def build_buckets(
    paths: Sequence[pathlib.Path], batch: int, cache: EngineCache, workspace: int, progress: Progress = True
) -> list[pathlib.Path]:
    """The engine of each of `export_buckets`'s files, for 1 to `batch` histories. Raises EngineError where one cannot be."""
    if batch > tensorrt_kernels.MOST_ROWS:
        raise EngineError(f"batch size {batch}: kernels of ours take {tensorrt_kernels.MOST_ROWS} histories at most")
    profile = {"batch": (1, min(batch, 8), batch)}
    return [cache.get(Request.of(path, profile, workspace=workspace), progress=progress) for path in paths]


def steps_of(stated: onnx.ModelProto, graph: onnx.ModelProto) -> dict[str, float]:
    """int8 steps of products' inputs in `graph` (float32), by name: those of the products with the same weights in `stated`."""
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in stated.graph.initializer}
    made = {name: node for node in stated.graph.node for name in node.output}
    known = {}
    for node in (node for node in stated.graph.node if node.op_type == "MatMul"):
        x, weight = (made.get(name) for name in node.input)
        if x is not None and weight is not None and x.op_type == weight.op_type == "DequantizeLinear":
            values, steps = (held[name] for name in weight.input[:2])
            known[values.tobytes(), steps.tobytes()] = float(held[x.input[1]])
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    found = {}
    for node in (node for node in graph.graph.node if node.op_type == "MatMul"):
        weight = weights.get(node.input[1], np.empty(0))
        if weight.ndim == 2:
            key = tuple(array.tobytes() for array in onnx_precision.quantise_columns(weight))
            found |= {node.input[0]: known[key]} if key in known else {}
    return found
