"""Compiled kernels in a graph: tables as the kernels' own preparation makes them, launches that say where everything lies."""

import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from hstu_lab import onnx_export, onnx_precision, tensorrt_kernels
from hstu_lab.config import preset
from hstu_lab.model import HSTU
from hstu_lab.tensorrt_parts import DOMAIN, FusedRankerPart, FusedStackPart

CONFIG = preset("tiny").replace(num_layers=2)
TABLES = """
import numpy, torch
from hstu_lab import tensorrt_kernels as kernels
from hstu_lab.ops import triton_bias
from hstu_lab.ops.reference import RelativeBias
from hstu_lab.ops.triton_tiles import Tiles
heads, length, width = 2, 96, 16
sizes = kernels.Sizes(length=length, heads=heads, d=width, batch=1, num_context=1, position=True, time=64, candidates=False)
torch.manual_seed(0)
bias = RelativeBias(torch.randn(heads, 300), torch.randn(heads, 64))
ours = kernels.bias_tables(sizes, 90, bias.position.numpy(), bias.time.numpy())
tiles = sizes.tiles(90)
tiles = Tiles(**{name: getattr(tiles, name) for name in Tiles.__dataclass_fields__})
plan = triton_bias.plan(tiles, bias, torch.device("cpu"), batch=1, heads=heads, total=length, max_len=length, num_context=1)
times, offsets = torch.arange(length) * 100, torch.tensor([0, length])
triton_bias.prepare_kernel[(plan.max_tiles * plan.parts, 1 + heads)](
    **plan.prepare_arguments(bias, times, offsets, None, width), HAS_POSITION=True, HAS_TIME=True, HAS_CANDIDATES=False,
    LADDER=tiles.ladder, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BISECT=tiles.block_n.bit_length() - 1,
    CHUNK=triton_bias.CHUNK, SCAN=1024, TABLE_BLOCK=512, WIDE=False, PARTS=plan.parts)
cells = triton_bias.CELLS.value
lut = plan.lut.numpy().ravel()[: heads * cells * 2].reshape(heads, cells, 2)
for name, theirs in (("PositionTable", plan.position_table.numpy()), ("Steps", plan.steps.numpy()), ("Lut", lut)):
    assert theirs.shape == ours[name].shape and theirs.dtype == ours[name].dtype, name
    assert numpy.array_equal(theirs, ours[name]), name
    assert len(numpy.unique(theirs)) > 60, name
print("equal")
"""


def test_the_tables_are_those_that_the_kernel_prepares():
    """Bit for bit, with the preparation run in Triton's interpreter, which needs a process of its own."""
    run = [sys.executable, "-c", TABLES]
    said = subprocess.run(run, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=100)
    assert said.stdout.strip() == "equal", said.stderr[-2000:]


@pytest.fixture(scope="module")
def graphs():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = HSTU(CONFIG).eval().requires_grad_(False)
    made = {}
    for name, part in (("stack", FusedStackPart(model)), ("ranker", FusedRankerPart(model))):
        with torch.no_grad():
            program = onnx_export.trace(name, part.eval(), CONFIG, {"length": 64, "candidates": 32})
        made[name] = onnx_precision.fold_indices(program.model_proto)
    return made


def _launches(model):
    nodes = [node for node in model.graph.node if node.op_type == "CompiledKernel"]
    return [(node, {a.name: a.s.decode() for a in node.attribute}) for node in nodes]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["stack", "ranker"])
def test_every_node_of_ours_becomes_a_kernel_for_that_gpu(graphs, name, capability):
    fused = tensorrt_kernels.fuse(graphs[name], capability, batch=2)
    assert not [node for node in fused.graph.node if node.domain]
    assert {entry.key: entry.value for entry in fused.metadata_props}["kernels"] == f"sm_{capability}"
    known = {tensor.name: tensor for tensor in fused.graph.initializer} | {value.name: value for value in fused.graph.input}
    made = {output for node in fused.graph.node for output in node.output}
    kernels = []
    for node, texts in _launches(fused):
        assert set(node.input) <= known.keys() | made
        lines = texts["launch"].splitlines()
        words = {line.split()[0]: line.split()[1:] for line in lines if not line.startswith(("arg", "out"))}
        kernels.append(words["kernel"][0])
        assert len(words["in"]) == len(node.input)
        assert sum(line.startswith("out ") for line in lines) == len(node.output)
        used = {int(line.split()[2]) for line in lines if line.startswith(("arg in", "arg map"))}
        assert used == set(range(len(node.input))), "every tensor is somebody's argument"
        code = bytes.fromhex(texts["cubin"])
        assert code[:4] == b"\x7fELF"
        assert capability in code[48:50], "ELF's flags hold the GPU that the code is for, in one byte or the other"
        for tensor, kind in zip(node.input, words["in"]):
            if isinstance(known.get(tensor), TensorProto):
                assert known[tensor].data_type == {"float": TensorProto.FLOAT, "int32": TensorProto.INT32}[kind]
    assert kernels.count("prepare_kernel") == 1, "one for all layers"
    assert kernels.count("attention_kernel") == kernels.count("norm_kernel") == CONFIG.num_layers
    assert any("arg map" in texts["launch"] for _, texts in _launches(fused)) == (capability >= 90)


def test_casts_stand_before_kernels_but_not_between_them(graphs):
    fused = tensorrt_kernels.fuse(graphs["stack"], 90, batch=2, halves=True)
    made = {output: node.op_type for node in fused.graph.node for output in node.output}
    for node, texts in _launches(fused):
        kinds = texts["launch"].split("\nin ")[1].split("\n")[0].split()
        assert {made[name] for name, kind in zip(node.input, kinds) if kind == "half"} <= {"Cast", "CompiledKernel"}


def test_queries_keys_and_values_are_read_where_the_projection_wrote_them(graphs):
    fused = tensorrt_kernels.fuse(graphs["stack"], 80, batch=2)
    node, texts = next(each for each in _launches(fused) if "attention_kernel" in each[1]["launch"])
    width = CONFIG.num_heads * CONFIG.d_v
    first = [line for line in texts["launch"].splitlines() if line.startswith("arg in 0 ")][:3]
    assert [int(line.split()[3]) for line in first] == [2 * 2 * width, 2 * 3 * width, 2 * width]  # q, k, v behind u; halves
    producer = next(each for each in fused.graph.node if node.input[0] in each.output)
    assert producer.op_type == "Mul", "SiLU of the projection, whole"


def test_other_graphs_are_refused():
    tensor = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 2, 8])
    times = helper.make_tensor_value_info("t", TensorProto.INT64, [1, 4])
    node = helper.make_node(
        "HstuAttention", ["x", "x", "x", "t"], ["y"], domain=DOMAIN, divisor=8, num_context=1, name="attention"
    )
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 2, 8])
    graph = helper.make_graph([node], "g", [tensor, times], [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)])
    with pytest.raises(tensorrt_kernels.FuseError, match="x: not a slice of a layer's projection"):
        tensorrt_kernels.fuse(model)
    other = onnx.ModelProto()
    other.CopyFrom(model)
    other.graph.node[0].op_type = "Softmax"
    with pytest.raises(tensorrt_kernels.FuseError, match="Softmax: no kernel for this node"):
        tensorrt_kernels.fuse(other)


def test_offsets_are_what_the_kernel_reads(graphs):
    fused = tensorrt_kernels.fuse(graphs["stack"], 80, batch=2)
    stored = next(onnx.numpy_helper.to_array(t) for t in fused.graph.initializer if t.name == "offsets_64")
    assert np.array_equal(stored.view(np.int64), np.arange(tensorrt_kernels.MOST_ROWS + 1) * 64)
