"""A checkpoint's layers as kernels of ours: a file a length, with the int8 export's own steps."""

import onnx
import pytest

from hstu_lab import onnx_export, onnx_precision, tensorrt_buckets
from hstu_lab.config import preset
from hstu_lab.model import load_checkpoint
from hstu_lab.tensorrt_build import EngineCache
from hstu_lab.tensorrt_library import EngineError


@pytest.fixture(scope="module")
def exports(tiny_checkpoint, tmp_path_factory):
    """The model, and the folders of its fp32 and int8 exports."""
    model, folder = load_checkpoint(tiny_checkpoint), tmp_path_factory.mktemp("exports")
    histories = onnx_export.sample_histories(tiny_checkpoint)
    onnx_export.export(model, folder / "fp32", progress=False)
    onnx_export.convert_folder(model, folder / "fp32", folder / "int8", "int8", histories)
    return model, folder / "fp32", folder / "int8"


def test_a_file_for_each_length_that_computes_with_the_exports_steps(exports, tmp_path):
    model, _, source = exports
    lengths = tensorrt_buckets.bucket_lengths(model.config)
    paths = tensorrt_buckets.export_buckets(model, source, tmp_path / "out", lengths, candidates=32, capability=80)
    assert [path.name for path in paths] == [f"{part}-{n}.onnx" for part in ("stack", "ranker") for n in lengths]
    stated = onnx.load(source / "stack.onnx")
    before = {entry.key: entry.value for entry in stated.metadata_props}
    fused = onnx.load(paths[0])
    found = {entry.key: entry.value for entry in fused.metadata_props}
    assert found == before | {"kernels": "sm_80", "length": str(lengths[0])}
    integers = [tensor for tensor in fused.graph.initializer if tensor.name.endswith("_8_bits")]
    quantised = [node for node in stated.graph.node if node.op_type == "DequantizeLinear" and len(node.attribute)]
    assert 0 < len(integers) == len(quantised), "as many int8 products as the export decided for"
    assert {node.op_type for node in fused.graph.node} == {"CompiledKernel"}


def test_steps_are_found_by_weights_whatever_the_names(exports):
    _, plain, source = exports
    stated, graph = onnx.load(source / "stack.onnx"), onnx.load(plain / "stack.onnx")
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in stated.graph.initializer}
    truth = {node.input[0]: float(held[node.input[1]]) for node in stated.graph.node if node.op_type == "QuantizeLinear"}
    assert truth
    assert tensorrt_buckets.steps_of(stated, graph) == truth
    for tensor in graph.graph.initializer:
        if tensor.name in {node.input[1] for node in graph.graph.node if node.op_type == "MatMul"}:
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 1.5, tensor.name))
    assert tensorrt_buckets.steps_of(stated, graph) == {}
    assert tensorrt_buckets.steps_of(onnx_precision.convert(graph), graph) == {}, "nothing is quantised in fp16"


def test_fp32_is_refused(exports, tmp_path):
    model, plain, _ = exports
    with pytest.raises(EngineError, match="is fp32, kernels of ours compute in fp16 and int8; export it as one of them"):
        tensorrt_buckets.export_buckets(model, plain, tmp_path / "out", [64], candidates=32, capability=80)


def test_more_histories_than_the_constant_offsets_reach_are_refused(tmp_path):
    with pytest.raises(EngineError, match="batch size 1025: kernels of ours take 1024 histories at most"):
        tensorrt_buckets.build_buckets([], 1025, EngineCache(tmp_path), 1 << 20)
    assert tensorrt_buckets.build_buckets([], 1024, EngineCache(tmp_path), 1 << 20) == []


def test_buckets_are_powers_of_two_up_to_the_longest_history():
    assert tensorrt_buckets.bucket_lengths(preset("gr-3b")) == (64, 128, 256, 512, 1024, 2048)
    assert tensorrt_buckets.bucket_lengths(preset("tiny").replace(max_seq_len=200)) == (64, 128, 200)
    assert tensorrt_buckets.bucket_lengths(preset("tiny").replace(max_seq_len=40)) == (40,)
