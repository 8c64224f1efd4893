"""Norms, projections, gather and jagged copies in Triton against the oracle, and the whole stack on them."""

import pytest
import torch
from triton_cases import DEVICE, GPU, LIMITS, error, reference, triton_ops

from hstu_lab.config import preset
from hstu_lab.model import HSTUStack

DTYPES = list(LIMITS) if GPU else [torch.float32, torch.float16]
WIDTHS = [50, 64, 1024] if GPU else [16, 50]
on_both = [pytest.param(d, marks=[pytest.mark.gpu] if GPU else []) for d in DTYPES]


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", on_both)
@pytest.mark.parametrize("width", WIDTHS)
def test_norms(width, dtype):
    x, packed = random(9, width, dtype=dtype), random(9, 3 * width, dtype=dtype, seed=1)
    gate = packed[:, width : 2 * width]  # a slice, as the model's
    weight, bias = random(width, dtype=dtype, seed=2), random(width, dtype=dtype, seed=3)
    as_float = [t.float() for t in (x, gate, weight, bias)]
    got = triton_ops.norm_gate(x, gate, weight, bias, 1e-6)
    assert error(got, reference.norm_gate(*as_float, 1e-6)) < LIMITS[dtype]
    got = triton_ops.layer_norm(x, weight, bias, 1e-6)
    assert error(got, reference.layer_norm(as_float[0], *as_float[2:], 1e-6)) < LIMITS[dtype]


@pytest.mark.parametrize("dtype", on_both)
@pytest.mark.parametrize(("rows", "depth", "columns"), [(7, 50, 37), (600, 256, 512)] if GPU else [(7, 50, 37), (33, 16, 16)])
def test_projections(rows, depth, columns, dtype):
    x, residual = random(rows, depth, dtype=dtype), random(rows, columns, dtype=dtype, seed=1)
    weight, bias = random(columns, depth, dtype=dtype, seed=2) / depth**0.5, random(columns, dtype=dtype, seed=3)
    got = triton_ops.project_silu(x, weight, bias)
    assert error(got, reference.project_silu(x.float(), weight.float(), bias.float())) < LIMITS[dtype]
    got = triton_ops.project_residual(x, weight, bias, residual)
    assert error(got, reference.project_residual(x.float(), weight.float(), bias.float(), residual.float())) < LIMITS[dtype]


@pytest.mark.parametrize("dtype", on_both)
def test_gather_sum(dtype):
    tables = [random(rows, 40, dtype=dtype, seed=rows) for rows in (5, 9, 3)]
    ids = torch.tensor([[0, 4, 2, 2, 1], [8, 0, 3, 3, 5], [2, 2, 0, 1, 1]], device=DEVICE)
    expected = reference.gather_sum([t.float() for t in tables], ids)
    assert error(triton_ops.gather_sum(tables, ids), expected) < LIMITS[dtype]
    with pytest.raises(ValueError, match="one row of ids"):
        triton_ops.gather_sum(tables, ids[:2])
    with pytest.raises(ValueError, match="make them alike"):
        triton_ops.gather_sum([tables[0], tables[1].double(), tables[2]], ids)


@pytest.mark.parametrize("length", [2, 8])
@pytest.mark.parametrize("dtype", [*on_both, torch.int64])
def test_jagged_to_dense_and_back(length, dtype):
    offsets = torch.tensor([0, 3, 3, 10, 11], device=DEVICE)
    values = (random(11, 2, 5) * 100).to(dtype)
    dense = triton_ops.jagged_to_dense(values, offsets, length, -1)
    assert torch.equal(dense, reference.jagged_to_dense(values, offsets, length, -1))
    if length >= 7:
        assert torch.equal(triton_ops.dense_to_jagged(dense, offsets), values)


def stack(dtype):
    torch.manual_seed(0)
    model = HSTUStack(preset("tiny"), reference)
    for name, parameter in model.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", on_both if GPU else [torch.float32])
def test_the_stack_gives_the_same_on_either_operators(dtype):
    lengths = torch.tensor([17, 1, 0, 9], device=DEVICE)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    x = random(int(offsets[-1]), 32, dtype=dtype)
    times = torch.arange(len(x), device=DEVICE) * 977
    model = stack(dtype)
    expected = model.float().jagged(x.float(), offsets, times)
    model = model.to(dtype)
    model.ops = triton_ops
    assert error(model.jagged(x, offsets, times), expected) < 2 * LIMITS[dtype]
