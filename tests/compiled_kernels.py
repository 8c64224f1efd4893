"""Runs a graph of compiled kernels on the CPU, as the plugin would on a GPU: launch texts are followed, kernels interpreted.

`python compiled_kernels.py PART PRECISION CAPABILITY LENGTH`, with TRITON_INTERPRET=1, traces PART of a tiny model, puts the
kernels into the graph, runs it, and prints a line an output: its name, and its largest relative error against PyTorch. What is
not shown this way is the machine code: kernels are never compiled here.
"""

import re
import sys

import numpy as np
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from triton.tools.tensor_descriptor import TensorDescriptor

from hstu_lab import onnx_export, onnx_precision, tensorrt_kernels
from hstu_lab import tensorrt_bench as bench
from hstu_lab.config import preset
from hstu_lab.ops import triton_attention, triton_bias, triton_linear, triton_memory
from hstu_lab.ops.triton_runtime import interpreted
from hstu_lab.tensorrt_parts import FUSED, REFERENCE, GatherElements

BATCH = 3
MODULES = (triton_attention, triton_bias, triton_linear, triton_memory)
DTYPES = {"fp16": torch.float16, "fp32": torch.float32, "i8": torch.int8, "i32": torch.int32, "i64": torch.int64}
TENSORS = {"half": np.float16, "float": np.float32, "int32": np.int32}
INTERPRETED = {"EXACT": True, "PLAIN": True, "PRECISION": "ieee"}
"""Compile-time arguments that keep instructions of a GPU out."""
KNOWN: dict[str, tuple] = {}


def remember(kernel, constants, options, capability, pointers, boxes=None, ragged=()):
    """In the place of `tensorrt_kernels.compile_kernel`: the "machine code" is a number that says what would be compiled."""
    boxes, code = boxes or {}, len(KNOWN).to_bytes(4, "little")
    KNOWN[code.hex()] = kernel.__name__, dict(constants), tensorrt_kernels._POINTERS | pointers, boxes
    arguments = tuple(name for name in kernel.arg_names if name not in constants)
    maps = {name: (*boxes[name], 3, 1 if "i8" in pointers.values() else 2) for name in arguments if name in boxes}
    return tensorrt_kernels.Kernel(kernel.__name__, arguments, 128, 0, code, maps, ragged)


class CompiledKernel(OpRun):
    op_domain = ""

    def _run(self, *inputs, launch=None, cubin=None):
        name, constants, pointers, boxes = KNOWN[cubin]
        kernel = next(found for module in MODULES if (found := getattr(module, name, None)))
        lines = [line.split() for line in launch.splitlines()]
        words = {line[0]: line[1:] for line in lines if line[0] in ("kernel", "grid", "in")}
        rows = len(inputs[0])
        tensors = [np.array(given, dtype=TENSORS[kind]) for given, kind in zip(inputs, words["in"])]
        outputs = [np.full([_number(n, rows) for n in line[2:]], 77, TENSORS[line[1]]) for line in lines if line[0] == "out"]
        texts = [line[1:] for line in lines if line[0] == "arg"]
        arguments = dict(constants)
        for argument in kernel.arg_names:
            if argument in constants:
                continue
            kind, *rest = texts.pop(0)
            if kind in ("in", "out", "map"):
                array = (outputs if kind == "out" else tensors)[int(rest[0])]
                pointed = DTYPES[pointers[argument.removesuffix("Tiles") if kind == "map" else argument]]
                view = torch.from_numpy(array.reshape(-1)).view(torch.uint8)[int(rest[1]) if kind != "out" else 0 :].view(pointed)
                if kind == "map":
                    shape = [_number(n, rows) for n in rest[2:5]]
                    assert [int(texts.pop(0)[1].split(":")[-1]) for _ in range(4)][1:] == [*shape[1:], 1]
                    tile = torch.as_strided(view, shape[:2], (shape[2], 1))
                    view = TensorDescriptor(tile, shape[:2], [shape[2], 1], list(boxes[argument]))
                arguments[argument] = view
            elif kind == "null":
                arguments[argument] = None
            else:
                arguments[argument] = float(rest[0]) if kind == "f32" else _number(rest[0], rows)
        assert texts == [["null"]] * 2, "scratch memories"
        arguments |= {name: value for name, value in INTERPRETED.items() if name in arguments}
        kernel[tuple(_number(n, rows) for n in words["grid"])](**arguments)
        return tuple(made.astype(np.float32) if made.dtype == np.float16 else made for made in outputs)


def _number(word: str, rows: int) -> int:
    """A, A:B or A:B/C*D, as the plugin reads it."""
    fixed, each, share, times = map(int, re.fullmatch(r"(\d+)(?::(\d+)(?:/(\d+)(?:\*(\d+))?)?)?", word).groups(1))
    return fixed + times * -(-each * rows // share) if ":" in word else fixed


def main(name: str, precision: str, capability: int, length: int) -> None:
    assert interpreted(), "set TRITON_INTERPRET=1"
    tensorrt_kernels.compile_kernel = remember
    config = preset("tiny").replace(num_layers=2, max_seq_len=max(64, length))
    _, parts, model = bench.make_parts(config)
    case = bench.Case(name, precision, length, fused=True)
    bench.CANDIDATES = 32
    with torch.no_grad():
        program = onnx_export.trace(name, FUSED[name](model).eval(), config, {"length": length, "candidates": bench.CANDIDATES})
    graph, scales = onnx_precision.fold_indices(program.model_proto), None
    if precision == "int8":
        seen = onnx_precision.calibrate(graph, [bench.make_inputs(case, BATCH, config, True)], REFERENCE)
        scales = onnx_precision.quiet_steps(seen, 0.1)
        if name == "stack":
            scales.pop(onnx_precision.quantisable(graph)[-1])
    graph.opset_import[0].version = 19  # the reference evaluator has no QuantizeLinear of 18
    stated = onnx_precision.convert(graph, scales, halves=False)
    fused = tensorrt_kernels.fuse(stated, capability, BATCH)
    feed = bench.make_inputs(case, BATCH, config, False)
    names = [value.name for value in fused.graph.output]
    ours = ReferenceEvaluator(fused, new_ops=[CompiledKernel, GatherElements]).run(names, feed)
    plain = ReferenceEvaluator(stated, new_ops=REFERENCE).run(names, feed)
    truth = parts[name](**{key: torch.from_numpy(value) for key, value in feed.items()})
    truth = truth if isinstance(truth, tuple) else (truth,)
    kinds = [node.op_type for node in fused.graph.node]
    print("kernels", kinds.count("CompiledKernel"), "integers", sum("_8_bits" in t.name for t in fused.graph.initializer))
    for output, mine, same, right in zip(names, ours, plain, truth):
        print(output, bench.error(mine, same), bench.error(mine, right.numpy()))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
