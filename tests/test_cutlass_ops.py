"""The backend `cutlass` and its dispatcher: the record decides, and says so."""

import pytest
import torch
from triton_cases import DEVICE, GPU, reference, triton_ops  # first: it decides whether Triton's kernels are interpreted

from hstu_lab import environment, measure, ops
from hstu_lab.config import preset
from hstu_lab.model import HSTUStack
from hstu_lab.ops import cutlass_ops, dispatch

KNOWN = frozenset({"triton", "quick", "wrong"})


@pytest.fixture
def record(tmp_path, monkeypatch):
    """write(rows, device=...) puts a record where the dispatcher looks for it."""

    def write(rows, device=None):
        found = measure.Record.here(dispatch.RECORD, data={"rows": rows}, command=dispatch.COMMAND)
        found.device = device or found.device
        measure.write_record(found, tmp_path / "measured")
        dispatch.choose.cache_clear()
        dispatch._record.cache_clear()

    monkeypatch.setenv("HSTU_LAB_DATA", str(tmp_path))
    yield write
    dispatch.choose.cache_clear()
    dispatch._record.cache_clear()


def row(rows, seconds, error=1e-3, op="project_silu"):
    shape = {"rows": rows, "columns": 64, "depth": 64}
    return {"op": op, "shape": shape, "seconds": seconds, "error": {n: error if n == "wrong" else 1e-3 for n in seconds}}


def choose(rows, op="project_silu", known=KNOWN):
    return dispatch.choose(op, "triton", known, rows=rows, columns=64, depth=64)


def test_the_nearest_shape_decides(record):
    record([row(16, {"triton": 1e-6, "quick": 2e-6}), row(4096, {"triton": 9e-5, "quick": 6e-5})])
    assert choose(1).kernel == choose(100).kernel == "triton"
    assert choose(4096).kernel == choose(1500).kernel == "quick"
    assert "60 us, triton 90 us, recorded on" in choose(4096).reason
    assert "at columns=64 depth=64 rows=4096" in choose(1500).reason
    assert any("project_silu columns=64 depth=64 rows=1500: quick" in str(choice) for choice in dispatch.said())


def test_wrong_and_unknown_kernels_are_never_taken(record):
    record([row(16, {"triton": 3e-6, "wrong": 1e-6, "of the future": 1e-7}, error=0.5)])
    assert choose(16).kernel == "triton"
    record([row(16, {"triton": 3e-6, "wrong": 1e-6})])
    assert choose(16).kernel == "wrong"


def test_another_gpu_decides_nothing_here(record):
    record([row(16, {"triton": 3e-6, "quick": 1e-6})], device="NVIDIA A100-SXM4-80GB")
    choice = choose(16)
    assert choice.kernel == "triton"
    assert "nothing was recorded on" in choice.reason
    assert dispatch.COMMAND in choice.reason


def test_no_record_and_no_such_operator(record, tmp_path):
    dispatch._record.cache_clear()
    assert "no such record" in choose(16).reason
    record([row(16, {"quick": 1e-6})])
    assert choose(16, op="attention").reason == "no such shape in the record"


def test_distance_counts_powers_of_two():
    assert dispatch.distance({"a": 4, "b": 1}, {"a": 1, "b": 8}) == pytest.approx(13**0.5)


def test_the_committed_record_names_kernels_that_exist():
    found = measure.read_record(dispatch.RECORD, device="NVIDIA H200")
    known = cutlass_ops._ATTENTION | set(cutlass_ops.build.KERNELS)
    fastest = set()
    for one in found.data["rows"]:
        assert set(one["seconds"]) <= known
        assert max(one["error"].values()) < dispatch.LIMIT
        fastest.add(min(one["seconds"], key=one["seconds"].get))
    assert len(fastest) > 2, "a dispatcher that always takes the same kernel is not needed"


def test_same_interface_as_the_other_backends():
    assert ops.get("cutlass") is cutlass_ops
    assert set(cutlass_ops.__all__) == set(triton_ops.__all__)
    assert cutlass_ops.name == "cutlass"


@pytest.mark.skipif(GPU, reason="the interpreter")
def test_without_a_gpu_everything_is_tritons():
    assert environment.machine().gpu == ""
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=g) for shape in ((5, 16), (24, 16), (24,)))
    assert torch.allclose(cutlass_ops.project_silu(x, weight, bias), reference.project_silu(x, weight, bias), atol=1e-5)
    y = torch.randn(5, 24, generator=g)
    got = cutlass_ops.project_residual(y, weight.T.contiguous(), bias[:16], x)
    assert torch.allclose(got, reference.project_residual(y, weight.T.contiguous(), bias[:16], x), atol=1e-5)
    q = torch.randn(20, 2, 16, generator=g)
    offsets = torch.tensor([0, 3, 20])
    got = cutlass_ops.attention_jagged(q, q, q, offsets, divisor=20)
    assert torch.allclose(got, reference.attention_jagged(q, q, q, offsets, divisor=20), atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("rab", ["none", "position+time"])
def test_the_stack_answers_as_the_reference(rab):
    config = preset("small").replace(rab=rab, num_layers=2, d_model=256, num_heads=4, d_qk=64, d_v=64, max_seq_len=256)
    torch.manual_seed(0)
    stack = HSTUStack(config, cutlass_ops).eval().requires_grad_(False).to(DEVICE)
    lengths = torch.tensor([256, 0, 1, 100])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(DEVICE)
    x = torch.randn(357, 256, device=DEVICE)
    times = torch.arange(357, device=DEVICE) * 60
    stack.ops = reference
    expected = stack.jagged(x, offsets, times)
    stack.ops = cutlass_ops
    got = stack.to(torch.bfloat16).jagged(x.bfloat16(), offsets, times)
    assert ((got.double() - expected.double()).norm() / expected.double().norm()).item() < 2e-2
    assert {choice.op for choice in dispatch.said()} >= {"project_silu", "project_residual"}
