"""Every kernel compiles for an A100 and an H100 on a machine without a GPU, with the instructions it was written for."""

import re

import pytest
from triton_cases import GPU, triton_ops, triton_tiles

from hstu_lab import roofline
from hstu_lab.ops import triton_compile
from hstu_lab.ops.triton_extend import FIRST_BARRIER

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


def loop_of(name):
    """(instructions of the main loop for sm_90, scores of a thread in it)."""
    body = triton_compile.compile_kernel(name, 90).loop("MUFU.TANH")
    return body, sum("MUFU.TANH" in line for line in body)


def test_bias_is_loaded_in_pairs_and_rows_eight_apart_share_them():
    """A thread's rows g and g + 8 want the same pairs: 9 loads serve 32 scores, where one a pair would be 16."""
    body, scores = loop_of("attention_position")
    assert sum("LDG.E.64" in line for line in body) == scores // 4 + 1
    assert not any("LDG.E " in line for line in body)


def test_a_bucket_boundary_is_a_saturating_subtraction():
    tiles = triton_tiles.Tiles(64, 64, 32)
    body, scores = loop_of("attention_bias")
    assert sum("FADD.SAT" in line for line in body) == tiles.ladder * scores
    assert not any("FSEL" in line for line in body)


@pytest.mark.parametrize(
    ("name", "bias"), list(zip(("attention", "attention_position", "attention_bias"), roofline.INSTRUCTIONS))
)
def test_the_roofline_counts_instructions_as_they_are(name, bias):
    body, scores = loop_of(name)
    unlikely = 2 * (triton_tiles.Tiles(64, 64, 32).ladder - 1) if bias == "position+time" else 0
    assert len(body) / scores - unlikely == pytest.approx(roofline.INSTRUCTIONS[bias], rel=0.15)


def test_units_are_busy_for_as_long_as_their_instructions_take():
    lines = [
        "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;",
        "@!P0 MUFU.TANH R4, R5 ;",
        "FFMA R4, R4, R5, R4 ;",
        "UMOV UR4, URZ ;",
    ]
    lines += ["F2FP.BF16.F32.PACK_AB R4, R5, R6 ;", "FADD.SAT R1, R2, -8 ;"]
    clocks = triton_compile.clocks_by_unit([f"        /*{16 * at:04x}*/    {line}" for at, line in enumerate(lines)])
    assert clocks == {"tensor cores": 64, "special functions": 8, "float32": 2, "conversions": 2, "issue": 6}


def test_products_and_tanh_of_a_tile_take_the_same_time_at_head_width_64():
    """64 x 64 scores: two products of 64 x 64 x 64 at 4,096 FLOP a clock, and 4,096 tanh at 16."""
    body, scores = loop_of("attention")
    clocks = triton_compile.clocks_by_unit(body)
    assert scores == 32
    assert clocks["tensor cores"] == clocks["special functions"] == 256
    assert clocks["issue"] == len(body)


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("name", ["attention", "attention_position", "attention_bias", "extend"])
def test_matrix_instructions_follow_each_other(name, d):
    """Where ptxas cannot keep a product in flight it waits after each instruction, one WARPGROUP.ARRIVE before every HGMMA."""
    kernel = triton_compile.compile_kernel(name, 90, d)
    assert kernel.instructions("WARPGROUP.ARRIVE") < kernel.instructions("HGMMA") / 2


@pytest.mark.parametrize(
    ("d", "length", "page", "programs", "groups"),
    [(64, 128, 16, 3, 1), (64, 512, 16, 1, 4), (64, 512, 64, 1, 4), (128, 512, 16, 2, 1)],
)
def test_chunks_on_hopper_are_copied_beside_the_loop(d, length, page, programs, groups):
    """The warps that compute load nothing, and those of a group meet once a tile; nothing is spilled there."""
    kernel, products = triton_compile.compile_kernel("extend", 90, d, length, page), d // 8
    assert kernel.instructions("HGMMA") == 2 * groups * products  # a loop for whole tiles, one for the diagonal
    assert kernel.instructions("WARPGROUP.ARRIVE") < kernel.instructions("HGMMA") / 2
    body = kernel.loop("MUFU.TANH")
    assert sum("HGMMA" in line for line in body) == products
    assert not any(load in line for line in body for load in ("LDG", "LDL", "STL"))
    assert sum("BAR.SYNC" in line for line in body) == 1
    assert sum("BAR.ARV" in line for line in body) == 2
    assert kernel.instructions("UTMALDG") >= 2 * max(2, 64 // page) * d // 64  # keys and values, by pages of half a tile
    compilers = {int(n) for n in re.findall(r"\bbar(?:rier)?\.(?:sync|arrive)\s+(\d+)", kernel.ptx)}
    assert compilers
    assert max(compilers) < FIRST_BARRIER.value, "Triton's own barriers and ours must differ"
    assert len(re.findall(r"\bbarrier\.sync\s+%", kernel.ptx)) == 4
    assert not re.search(r"\bbar\.sync\s+%", kernel.ptx), "two warps wait at a buffer, each at an instruction of its own"
    assert kernel.spilled_bytes == 0 or groups > 1
    assert programs * 32 * (4 * groups + 4) * kernel.registers <= 65536
    assert programs * (kernel.shared_bytes + 1024) <= 228 * 1024


@pytest.mark.parametrize(("d", "length"), [(64, 4096), (128, 4096), (128, 1024)])
def test_tiles_that_are_looked_up_pair_by_pair_are_pipelined(d, length):
    """With both biases no barrier stands between them and the copies that run ahead (in bytes, not by the accelerator)."""
    kernel = triton_compile.compile_kernel("attention_bias", 90, d, length)
    assert "LDGSTS" in kernel.sass
    assert kernel.instructions("WARPGROUP.ARRIVE") < kernel.instructions("HGMMA") / 2


def test_interpreter_survives_compilation():
    triton_compile.compile_kernel("sum_splits", 80)
    from hstu_lab.ops import triton_runtime

    assert triton_runtime.interpreted()
    assert triton_ops.interpreted()
