"""int8 projections, norms that write int8, the last event: against ONNX's own Q/DQ in ONNX Runtime and against the oracle."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from triton_cases import DEVICE, GPU, error, reference

from hstu_lab.onnx_precision import quantise_columns
from hstu_lab.ops import triton_compile
from hstu_lab.ops.triton_linear import project_int8
from hstu_lab.ops.triton_memory import last_kernel, norm_kernel

pytestmark = [pytest.mark.gpu] if GPU else []
ROWS, DEPTH, COLUMNS, STEP = 37, 48, 50, 0.031


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def on_device(array, dtype=None):
    return torch.from_numpy(array).to(DEVICE, dtype)


def quantised_product(silu: bool) -> onnx.ModelProto:
    """x -> QuantizeLinear -> DequantizeLinear -> MatMul -> Add -> SiLU or residual, as `onnx_precision.convert` writes it."""
    values, steps = quantise_columns(draw(DEPTH, COLUMNS, seed=1))
    held = {
        "step": np.float32(STEP), "zero": np.int8(0), "values": values, "steps": steps, "zeros": np.zeros(COLUMNS, np.int8),
        "bias": draw(COLUMNS, seed=2).astype(np.float16).astype(np.float32),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["x_q"]),
        helper.make_node("DequantizeLinear", ["x_q", "step", "zero"], ["x_dq"]),
        helper.make_node("DequantizeLinear", ["values", "steps", "zeros"], ["w_dq"], axis=1),
        helper.make_node("MatMul", ["x_dq", "w_dq"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["sum"]),
        *(
            [helper.make_node("Sigmoid", ["sum"], ["gate"]), helper.make_node("Mul", ["sum", "gate"], ["out"])]
            if silu
            else [helper.make_node("Add", ["sum", "residual"], ["out"])]
        ),
    ]
    inputs = {"x": DEPTH} if silu else {"x": DEPTH, "residual": COLUMNS}
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info(name, TensorProto.FLOAT, [ROWS, n]) for name, n in inputs.items()],
        [
            helper.make_tensor_value_info("out", TensorProto.FLOAT, [ROWS, COLUMNS]),
            helper.make_tensor_value_info("x_q", TensorProto.INT8, [ROWS, DEPTH]),
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in held.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.mark.parametrize("silu", [True, False], ids=["silu", "residual"])
def test_int8_projections_are_those_of_the_graph_with_q_and_dq(silu):
    model, x = quantised_product(silu), 2 * draw(ROWS, DEPTH)
    residual = draw(ROWS, COLUMNS, seed=3).astype(np.float16)
    feed = {"x": x} if silu else {"x": x, "residual": residual.astype(np.float32)}
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    truth, x_q = session.run(["out", "x_q"], feed)
    assert np.abs(x_q).max() > 120, "the range is used"
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weight = on_device(np.ascontiguousarray(held["values"].T))
    steps, bias = on_device(STEP * held["steps"]), on_device(held["bias"], torch.float16)
    rest = None if silu else on_device(residual)
    got = project_int8(on_device(x_q), weight, steps, bias, rest)
    assert got.dtype == torch.float16
    assert error(got.cpu(), torch.from_numpy(truth)) < 1e-3
    wrong = project_int8(on_device(x_q), weight, steps.roll(1), bias, rest)
    assert error(wrong.cpu(), torch.from_numpy(truth)) > 1e-2


def test_int8_projections_want_int8():
    x = on_device(np.zeros((2, 16), np.int8))
    with pytest.raises(TypeError, match=r"x is torch.float32, .*: give int8, int8, float32"):
        project_int8(x.float(), x, torch.zeros(2, device=DEVICE), torch.zeros(2, device=DEVICE))


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_norms_write_int8_as_quantize_linear_would(gated):
    """To the nearest, halves to even, and saturated: the last 8 columns are far outside on both sides, others lie on halves."""
    x, gate, weight, bias = (on_device(draw(*shape, seed=i)) for i, shape in enumerate([(9, 40), (9, 40), (40,), (40,)]))
    weight[:8] = 0
    bias[:8] = torch.arange(8, device=DEVICE) - 3.5
    weight[32:] = 0
    bias[32:] = torch.tensor([200.0, -200, 127.5, -128.5, 128, -129, 1e9, -1e9], device=DEVICE)
    gate[:, :8] = gate[:, 32:] = 1
    weight[8:32] *= 30
    out = torch.zeros(9, 40, dtype=torch.int8, device=DEVICE)
    norm_kernel[(9,)](x, gate if gated else None, weight, bias, out, 40, 40, 9, 40, 1e-6, WIDTH_PAD=64, ROWS=1, HAS_GATE=gated)
    floats = reference.norm_gate(x, gate, weight, bias, 1e-6) if gated else reference.layer_norm(x, weight, bias, 1e-6)
    wanted = floats.round().clamp(-128, 127).to(torch.int8)
    assert wanted.unique().numel() > 40
    unsure = (floats - floats.floor() - 0.5).abs() < 1e-3
    unsure[:, :8] = False
    assert torch.equal(out[~unsure], wanted[~unsure])


def test_the_last_event_is_normed_twice():
    x, lengths = on_device(draw(3, 7, 50), torch.float16), torch.tensor([7, 1, 4], dtype=torch.int32, device=DEVICE)
    weight, bias = on_device(draw(50, seed=1)), on_device(draw(50, seed=2))
    hidden = torch.zeros(3, 50, device=DEVICE)
    scaled = torch.zeros(3, 50, dtype=torch.float16, device=DEVICE)
    last_kernel[(3,)](x, lengths, weight, bias, hidden, scaled, 7, 50, 1e-6, 20.0, WIDTH_PAD=64)
    last = torch.stack([x[i, n - 1] for i, n in enumerate(lengths.tolist())])
    truth = reference.layer_norm(last.float(), weight, bias, 1e-6)
    assert error(hidden, truth) < 1e-5
    assert error(scaled, 20 * torch.nn.functional.normalize(truth, dim=-1)) < 1e-3


@pytest.mark.parametrize(("capability", "instruction"), [(80, "IMMA"), (90, "IGMMA")])
def test_int8_runs_on_tensor_cores_without_spills(capability, instruction):
    found = triton_compile.compile_kernel("project_int8", capability)
    assert found.instructions(instruction) > 0
    assert found.spilled_bytes == 0
    assert found.registers < 256
    assert ("wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8" in found.ptx) == (capability == 90)
