"""The CUTLASS projections: toolchain, build cache, machine code; on a GPU, the oracle's answers."""

import concurrent.futures
import importlib.util
import random
import shutil

import pytest
import torch

from hstu_lab.ops import reference
from hstu_lab.ops.cute_compile import compile_linear, occupancy
from hstu_lab.ops.cutlass import build, linear
from hstu_lab.ops.cutlass.build import KERNELS

SM80, SM90 = "cutlass sm_80 128x128", "cutlass sm_90 128x128"


def error(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


@pytest.fixture
def no_nvcc(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    build.nvcc.cache_clear()
    yield
    build.nvcc.cache_clear()


def test_no_compiler_names_the_remedy(no_nvcc, tmp_path):
    with pytest.raises(build.ToolchainMissing, match=r"--no-deps nvidia-cuda-nvcc=.* or install NVIDIA's CUDA toolkit"):
        build.build(KERNELS[SM80], folder=tmp_path)
    with pytest.raises(build.ToolchainMissing, match="pip install nvidia-cutlass"):
        build.headers()
    assert not list(tmp_path.iterdir())


def test_no_host_compiler_names_the_remedy(monkeypatch, tmp_path):
    found = shutil.which
    monkeypatch.delenv("NVCC_CCBIN", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name, *args, **kwargs: None if name == "g++" else found(name, *args, **kwargs))
    with pytest.raises(build.ToolchainMissing, match=r"apt-get install g\+\+"):
        build.build(KERNELS[SM80], folder=tmp_path)
    assert not list(tmp_path.glob("*.so"))


def test_a_compiler_on_the_path_serves(monkeypatch, tmp_path):
    found = tmp_path / "nvcc"
    found.write_text("#!/bin/sh\n")
    found.chmod(0o755)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    build.nvcc.cache_clear()
    assert build.nvcc()[0] == found
    build.nvcc.cache_clear()


def test_the_cache_is_keyed_by_content(monkeypatch, tmp_path):
    keys = {build.key(config, dtype, residual) for config in KERNELS.values() for dtype in ("bfloat16", "float16")
            for residual in (False, True)}  # fmt: skip
    assert len(keys) == 4 * len(KERNELS)
    before = build.key(KERNELS[SM80], "bfloat16", False)
    for name in ("linear.h", "linear_sm80.cu", "linear_sm90.cu"):
        shutil.copy(build.SOURCES / name, tmp_path)
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    assert build.key(KERNELS[SM80], "bfloat16", False) == before
    with (tmp_path / "linear.h").open("a") as file:
        file.write("// changed\n")
    assert build.key(KERNELS[SM80], "bfloat16", False) != before


@pytest.fixture
def small_source(tmp_path, monkeypatch):
    """write(text) makes that the source of the sm_80 kernel: nvcc is real, CUTLASS's ten seconds are saved."""
    monkeypatch.setattr(build, "SOURCES", tmp_path / "source")
    build.SOURCES.mkdir()
    (build.SOURCES / "linear.h").touch()
    return (build.SOURCES / "linear_sm80.cu").write_text


def test_two_at_once_compile_once(small_source, tmp_path, capfd):
    small_source("""
        __global__ void kernel() {}
        extern "C" char const* hstu_error(int) { return "none"; }
        extern "C" int hstu_shared_bytes() { return TILE_M; }
    """)
    folder = tmp_path / "cache"
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: build.build(KERNELS[SM80], folder=folder), range(2))
    assert first == second
    assert capfd.readouterr().err.count("kept in") == 1
    assert sorted(path.suffix for path in folder.iterdir()) == [".lock", ".ptxas", ".so"]
    again = build.build(KERNELS[SM80], folder=folder)
    assert (again.shared_bytes, again.spilled_bytes, again.threads) == (128, 0, 128)
    assert capfd.readouterr().err == ""


def test_what_nvcc_refuses_leaves_nothing_behind(small_source, tmp_path):
    small_source("#error not today\n")
    with pytest.raises(build.CompileFailed, match=r"(?s)SiLU projection, 128x128x32, bfloat16: nvcc answered .*not today"):
        build.build(KERNELS[SM80], folder=tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    with pytest.raises(ValueError, match="dtype is 'float32': the CUTLASS kernels take bfloat16 and float16"):
        build.build(KERNELS[SM80], "float32", folder=tmp_path)


@pytest.mark.parametrize("residual", [False, True])
def test_ampere_kernels_copy_asynchronously_and_spill_nothing(residual):
    kernel = compile_linear(SM80, residual)
    assert kernel.spilled_bytes == kernel.instructions("LDL") == kernel.instructions("STL") == 0
    assert min(kernel.instructions(name) for name in ("HMMA.16816.F32.BF16", "LDGSTS.E.BYPASS.LTC128B.128", "LDSM.16.M88.4")) > 0
    assert (kernel.instructions("MUFU.TANH") > 0) != residual
    assert occupancy(kernel).blocks >= 1


@pytest.mark.parametrize("residual", [False, True])
def test_hopper_kernels_use_its_own_instructions_and_spill_nothing(residual):
    kernel = compile_linear(SM90, residual)
    assert kernel.spilled_bytes == kernel.instructions("LDL") == kernel.instructions("STL") == 0
    assert min(kernel.instructions(name) for name in ("HGMMA.64x128x16.F32.BF16", "UTMALDG.3D", "UTMASTG.3D")) > 0
    assert kernel.instructions("HMMA.16816.F32.BF16") == 0
    assert (kernel.instructions("MUFU.TANH") > 0) != residual


@pytest.mark.parametrize(
    ("x", "weight", "reason"),
    [
        (torch.zeros(2, 16), torch.zeros(8, 16), "x is on cpu: a CUDA device is needed"),
        (torch.zeros(2, 16, device="meta"), torch.zeros(8, 16), "x is on meta: a CUDA device is needed"),
    ],
)
def test_what_is_not_for_them_is_named(x, weight, reason):
    assert linear.unsupported(x, weight) == reason
    with pytest.raises(ValueError, match=reason):
        linear.project_silu(x, weight, torch.zeros(8))


def test_tests_can_see_the_wheels_or_the_system():
    assert build.nvcc()[0].exists()
    assert importlib.util.find_spec("cutlass_library")


# ---- on a GPU


def operands(rows, columns, depth, dtype, seed):
    g = torch.Generator("cuda").manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, device="cuda", generator=g)  # noqa: E731
    x = draw(rows, depth + 8).to(dtype)[:, :depth]  # a slice: rows are further apart than they are long
    return x, (draw(columns, depth) / depth**0.5).to(dtype), draw(columns).to(dtype), draw(rows, columns).to(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", KERNELS)
def test_projections_equal_the_oracle(name, dtype):
    config = KERNELS[name]
    if config.capability == 90 and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("a Hopper kernel")
    draw = random.Random(name)
    for seed, rows in enumerate([1, 2, 127, 128, 129, draw.randint(3, 5000)]):
        columns, depth = 8 * draw.randint(1, 200), 8 * draw.randint(1, 200)
        x, weight, bias, residual = operands(rows, columns, depth, dtype, seed)
        junk = torch.full((rows, columns), torch.nan, device="cuda", dtype=dtype)
        del junk  # its memory is likely the output's: a row that is not written shows
        wide = [t.float() for t in (x, weight, bias)]
        limit = 1e-2 if dtype == torch.bfloat16 else 2e-3
        assert error(linear.project_silu(x, weight, bias, config), reference.project_silu(*wide)) < limit
        got = linear.project_residual(x, weight, bias, residual, config)
        assert error(got, reference.project_residual(*wide, residual.float())) < limit


@pytest.mark.gpu
def test_no_rows_and_more_dimensions():
    x, weight, bias, _ = operands(6, 64, 32, torch.bfloat16, 0)
    assert linear.project_silu(x[:0], weight, bias).shape == (0, 64)
    assert torch.equal(
        linear.project_silu(x.unflatten(0, (2, 3)), weight, bias).flatten(0, 1), linear.project_silu(x, weight, bias)
    )


@pytest.mark.gpu
def test_mixed_and_odd_operands_are_refused():
    x, weight, bias, _ = operands(6, 64, 32, torch.bfloat16, 0)
    with pytest.raises(ValueError, match="operands must all be bfloat16 or all float16"):
        linear.project_silu(x, weight.half(), bias)
    with pytest.raises(ValueError, match="weight is 63 x 32: both must be multiples of 8"):
        linear.project_silu(x, weight[:63], bias[:63])
