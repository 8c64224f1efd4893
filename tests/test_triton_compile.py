"""Every kernel compiles for an A100 and an H100 on a machine without a GPU, with the instructions it was written for."""

import pytest
from triton_cases import GPU, triton_ops

from hstu_lab.ops import triton_compile

pytestmark = pytest.mark.skipif(GPU, reason="ahead-of-time compilation is for machines without a GPU")


@pytest.mark.parametrize("name", triton_compile.KERNELS)
def test_sm_80_without_spills(name):
    kernel = triton_compile.compile_kernel(name, 80)
    assert ".target sm_80" in kernel.ptx
    assert kernel.spilled_bytes == 0
    assert 0 < kernel.registers <= 255
    assert kernel.shared_bytes <= 163 * 1024


@pytest.mark.parametrize("name", ["attention", "attention_bias", "extend", "project_silu"])
def test_matrix_kernels_use_the_matrix_unit_and_one_tanh(name):
    ampere, hopper = (triton_compile.compile_kernel(name, capability) for capability in (80, 90))
    assert ampere.instructions("HMMA") > 0
    assert ampere.instructions("MUFU.TANH") > 0
    assert ampere.instructions("MUFU.EX2") == 0
    assert hopper.instructions("HGMMA") > 0
    assert hopper.shared_bytes <= 227 * 1024


def test_bias_is_loaded_in_pairs_and_never_staged():
    """Eight bytes a load for two columns' position bias: half the loads that one column at a time would take."""
    kernel = triton_compile.compile_kernel("attention_bias", 90)
    assert kernel.ptx.count("ld.global.nc.v2.f32") > 0
    assert "ld.global.nc.f32 " not in kernel.ptx


def test_interpreter_survives_compilation():
    triton_compile.compile_kernel("sum_splits", 80)
    from hstu_lab.ops import triton_runtime

    assert triton_runtime.interpreted()
    assert triton_ops.interpreted()
