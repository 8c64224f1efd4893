"""Compiled kernels in a graph: tables as the kernels' own preparation makes them, launches that say where everything lies."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from hstu_lab import onnx_export, onnx_precision, tensorrt_kernels
from hstu_lab import tensorrt_bench as bench
from hstu_lab.config import preset
from hstu_lab.model import HSTU
from hstu_lab.tensorrt_parts import DOMAIN, REFERENCE, FusedRankerPart, FusedStackPart

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
            if isinstance(known.get(tensor), TensorProto):  # halves and int8 values travel as int32
                assert known[tensor].data_type == {"float": TensorProto.FLOAT, "int32": TensorProto.INT32}[kind]
    assert kernels.count("prepare_kernel") == 1, "one for all layers"
    heads = 0 if name == "stack" else 1
    assert kernels.count("attention_kernel") == CONFIG.num_layers
    assert kernels.count("norm_kernel") == 2 * CONFIG.num_layers + heads
    assert kernels.count("linear_kernel") == 2 * CONFIG.num_layers + (1 if name == "stack" else 3)
    assert kernels.count("last_kernel") == 1 - heads
    if name == "stack":
        assert len(kernels) == len(fused.graph.node), "nothing is left to TensorRT"
    assert any("arg map" in texts["launch"] for _, texts in _launches(fused)) == (capability >= 90)


def test_queries_keys_and_values_are_read_where_the_projection_wrote_them(graphs):
    fused = tensorrt_kernels.fuse(graphs["stack"], 80, batch=2)
    node, texts = next(each for each in _launches(fused) if "attention_kernel" in each[1]["launch"])
    width = CONFIG.num_heads * CONFIG.d_v
    first = [line for line in texts["launch"].splitlines() if line.startswith("arg in 0 ")][:3]
    assert [int(line.split()[3]) for line in first] == [2 * 2 * width, 2 * 3 * width, 2 * width]  # q, k, v behind u; halves
    producer = next(each for each in fused.graph.node if node.input[0] in each.output)
    assert producer.name == "silu_linear", "the projection, whole"


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


def run_interpreted(*arguments):
    """What `compiled_kernels.py` prints: its first line, and {output: (error to the graph before, error to PyTorch)}."""
    script = pathlib.Path(__file__).with_name("compiled_kernels.py")
    run = [sys.executable, script, *map(str, arguments)]
    said = subprocess.run(run, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=200)
    assert said.returncode == 0, said.stderr[-2000:]
    first, *lines = said.stdout.splitlines()
    return first, {name: (float(graph), float(torch)) for name, graph, torch in map(str.split, lines)}


@pytest.mark.parametrize(
    ("part", "precision", "capability", "length"),
    [("stack", "fp16", 80, 64), ("stack", "int8", 90, 80), ("ranker", "fp16", 90, 64), ("ranker", "int8", 80, 32)],
)
def test_launches_as_written_give_the_graphs_answers(part, precision, capability, length):
    """The kernels interpreted, with arguments, strides, offsets and grids as the texts say: 80 rows are no whole tiles."""
    first, errors = run_interpreted(part, precision, capability, length)
    assert first == {
        "stack fp16": "kernels 13 integers 0", "stack int8": "kernels 13 integers 4",
        "ranker fp16": "kernels 15 integers 0", "ranker int8": "kernels 15 integers 7",
    }[f"{part} {precision}"]  # fmt: skip
    # A value that lies near the middle of two steps may fall to the other; the ranker's norms make more of it.
    same, right = {"fp16": (2e-3, 5e-3), "int8": (2e-2, 5e-2)}[precision]
    assert errors.keys() == set(bench.OUTPUTS[part])
    for to_graph, to_torch in errors.values():
        assert to_graph < same
        assert to_torch < right


@pytest.fixture(scope="module")
def stated(graphs):
    """The stack's graph with Q/DQ, in which the first layer's gated sum stays fp16; and the steps."""
    graph = graphs["stack"]
    feed = bench.make_inputs(bench.Case("stack", "int8", 64), 3, CONFIG, True)
    seen = onnx_precision.calibrate(graph, [feed], REFERENCE)
    steps = {name: found.step for name, found in seen.items()}
    _, gated, *_, logits = onnx_precision.quantisable(graph)
    del steps[gated], steps[logits]
    return onnx_precision.convert(graph, steps, halves=False), steps


def test_products_that_calibration_left_in_fp16_stay_there(stated):
    fused = tensorrt_kernels.fuse(stated[0], 90, batch=2)
    assert {node.op_type for node in fused.graph.node} == {"CompiledKernel"}
    held = [size for t in fused.graph.initializer for size in ("_8_bits", "_16_bits") if t.name.endswith(size)]
    assert (held.count("_8_bits"), held.count("_16_bits")) == (3, 2)
    texts = [texts["launch"] for _, texts in _launches(fused) if "linear_kernel" in texts["launch"]]
    sizes = [{line.split()[-1] for line in text.splitlines() if line.startswith("arg map")} for text in texts]
    assert sizes == [{"1"}, {"2"}, {"1"}, {"1"}, {"2"}], "bytes of an element that the memory accelerator reads"


def test_int8_steps_come_from_the_graph(stated):
    """The weight's and the input's, multiplied, beside the product; the norm before it counts in the input's."""
    graph, steps = stated
    fused = tensorrt_kernels.fuse(graph, 80, batch=2)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in fused.graph.initializer}
    before = {t.name: onnx.numpy_helper.to_array(t) for t in graph.graph.initializer}
    product = next(node for node in graph.graph.node if node.op_type == "MatMul" and node.input[0] == "layer_norm_dq")
    weight = next(node for node in graph.graph.node if node.output[0] == product.input[1])
    np.testing.assert_allclose(stored[f"{product.output[0]}_steps"], before[weight.input[1]] * steps["layer_norm"], rtol=1e-6)
    words = stored[f"{product.input[1]}_8_bits"]
    assert np.array_equal(words.view(np.int8), before[weight.input[0]].T)
    norm = next(node for node in graph.graph.node if node.op_type == "LayerNormalization")
    np.testing.assert_allclose(stored["layer_norm_q_Weight"], before[norm.input[1]] / steps["layer_norm"], rtol=1e-6)


def test_what_somebody_else_reads_as_a_float_is_not_written_as_int8(stated):
    graph = onnx.ModelProto()
    graph.CopyFrom(stated[0])
    graph.graph.node.append(helper.make_node("Neg", ["layer_norm_dq"], ["seen"]))
    graph.graph.output.append(helper.make_tensor_value_info("seen", TensorProto.FLOAT, ["batch", 64, CONFIG.d_model]))
    fused = tensorrt_kernels.fuse(graph, 80, batch=2)
    kinds = [node.op_type for node in fused.graph.node]
    assert kinds.count("MatMul") == kinds.count("QuantizeLinear") == kinds.count("Neg") == 1
    made = [name for node in fused.graph.node for name in node.output]
    assert len(made) == len(set(made)), "every tensor is made once"


def test_sizes_that_the_kernels_do_not_take_are_refused_by_name():
    config = CONFIG.replace(num_heads=1, d_qk=24, d_v=24)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = HSTU(config).eval().requires_grad_(False)
        program = onnx_export.trace("stack", FusedStackPart(model).eval(), config, {"length": 64})
    with pytest.raises(tensorrt_kernels.FuseError, match=r"[qkv]_head is 24; the kernels here want multiples of 16"):
        tensorrt_kernels.fuse(onnx_precision.fold_indices(program.model_proto), 80)
