"""Compiles the CUTLASS kernels with nvcc into shared libraries with a C interface, once: the cache is keyed by content.

No GPU and no torch headers are needed. nvcc is the one that `environment.nvcc` finds; the headers are those of the wheel
`nvidia-cutlass`.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import dataclasses
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable

from hstu_lab import environment

SOURCES = pathlib.Path(__file__).parent
FLAGS = (
    "-std=c++17",
    "-O3",
    "-DNDEBUG",
    "-DCCCL_DISABLE_CTK_COMPATIBILITY_CHECK",
    "--expt-relaxed-constexpr",
    "-shared",
    "-Xcompiler",
    "-fPIC",
    "-Xptxas",
    "-v",
)
_ELEMENTS = {"bfloat16": "cutlass::bfloat16_t", "float16": "cutlass::half_t"}


class ToolchainMissing(ImportError):
    """nvcc or the CUTLASS headers are not here; the message names what to install."""


class CompileFailed(RuntimeError):
    """nvcc refused a kernel; the message holds the end of what it said."""


@dataclasses.dataclass(frozen=True)
class LinearConfig:
    """One projection kernel: GPU generation (80 or 90), block tile, and what else its source leaves open.

    capability 80: `warp` is a warp's tile (M, N), `stages` those of cp.async. capability 90: `cluster` blocks share loads,
    `pingpong` lets two warpgroups take turns (else they share a tile).
    """

    capability: int
    tile: tuple[int, int, int]
    warp: tuple[int, int] = (64, 64)
    stages: int = 4
    cluster: tuple[int, int] = (2, 1)
    pingpong: bool = True

    @property
    def defines(self) -> dict[str, int]:
        tile = dict(zip(("TILE_M", "TILE_N", "TILE_K"), self.tile))
        if self.capability < 90:
            return {**tile, "WARP_M": self.warp[0], "WARP_N": self.warp[1], "STAGES": self.stages}
        return {**tile, "CLUSTER_M": self.cluster[0], "CLUSTER_N": self.cluster[1], "PINGPONG": int(self.pingpong)}


KERNELS = {
    "cutlass sm_80 128x128": LinearConfig(80, (128, 128, 32)),
    "cutlass sm_90 128x128": LinearConfig(90, (128, 128, 64), cluster=(1, 2)),
}
"""The projection kernels that the package ships, by name."""


@dataclasses.dataclass(frozen=True)
class Built:
    """A compiled kernel: the library, registers a thread and spilled bytes by ptxas, threads and shared bytes of a block."""

    library: pathlib.Path
    registers: int
    spilled_bytes: int
    threads: int

    @functools.cached_property
    def functions(self) -> ctypes.CDLL:
        functions = ctypes.CDLL(str(self.library))
        functions.hstu_error.restype = ctypes.c_char_p
        return functions

    @property
    def shared_bytes(self) -> int:
        return self.functions.hstu_shared_bytes()


@functools.cache
def nvcc() -> tuple[pathlib.Path, tuple[str, ...]]:
    """(nvcc, flags it needs). Raises ToolchainMissing."""
    if (found := environment.nvcc()) is None:
        remedy = environment.nvcc_remedy()
        raise ToolchainMissing(f"no nvcc here: {remedy}, or install NVIDIA's CUDA toolkit and put its bin folder on PATH")
    compiler = pathlib.Path(found)
    beside = compiler.parents[1] / "lib"  # of the wheels, where nvcc does not look by itself
    return compiler, (f"-L{beside}",) if (beside / "libcudart_static.a").exists() else ()


def headers() -> pathlib.Path:
    """CUTLASS's include folder. Raises ToolchainMissing."""
    spec = importlib.util.find_spec("cutlass_library")
    for folder in spec.submodule_search_locations or () if spec else ():
        if (include := pathlib.Path(folder) / "source/include").joinpath("cutlass/cutlass.h").exists():
            return include
    raise ToolchainMissing("no CUTLASS headers here: pip install nvidia-cutlass")


@functools.cache
def _nvcc_version() -> str:
    return subprocess.run([nvcc()[0], "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[-1]


def command(config: LinearConfig, dtype: str, residual: bool, output: str) -> list[str]:
    """How nvcc is called for one kernel. Raises ToolchainMissing, ValueError for an element type that is not there."""
    if dtype not in _ELEMENTS:
        raise ValueError(f"dtype is {dtype!r}: the CUTLASS kernels take {' and '.join(_ELEMENTS)}")
    compiler, flags = nvcc()
    if config.capability < 90:
        target = "arch=compute_80,code=[compute_80,sm_80]"
    else:
        target = "arch=compute_90a,code=sm_90a"
    defines = {"ELEMENT": _ELEMENTS[dtype], "RESIDUAL": int(residual), **config.defines}
    return [
        str(compiler), *FLAGS, *flags, f"-gencode={target}", f"-I{headers()}", *(f"-D{k}={v}" for k, v in defines.items()),
        str(SOURCES / f"linear_sm{config.capability}.cu"), "-o", output,
    ]  # fmt: skip


def key(config: LinearConfig, dtype: str, residual: bool) -> str:
    """Name of the library in the cache: a hash of sources, flags and versions, none of paths."""
    flags = [part for part in command(config, dtype, residual, "")[1:] if part.startswith("-") and part[:2] not in ("-I", "-L")]
    texts = [(SOURCES / name).read_text() for name in ("linear.h", f"linear_sm{config.capability}.cu")]
    versions = [_nvcc_version(), _headers_version()]
    return hashlib.sha256("\0".join([*flags, *texts, *versions]).encode()).hexdigest()[:20]


def _headers_version() -> str:
    text = (headers() / "cutlass/version.h").read_text()
    return " ".join(re.findall(r"#define CUTLASS_(?:MAJOR|MINOR|PATCH) (\d+)", text))


def build(config: LinearConfig, dtype: str = "bfloat16", residual: bool = False, *, folder: pathlib.Path | None = None) -> Built:
    """The kernel, from the cache or compiled now (10 s for capability 80, 30 to 75 s for 90), with a line that counts.

    Two processes that want the same kernel compile it once. Raises ToolchainMissing or CompileFailed.
    """
    folder = folder or environment.kernel_folder()
    library = folder / f"{key(config, dtype, residual)}.so"
    report = library.with_suffix(".ptxas")
    if not (library.exists() and report.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        with open(library.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (library.exists() and report.exists()):
                _compile(config, dtype, residual, library, report)
    return _read(config, library, report)


def build_all(
    names: Iterable[str] = KERNELS, dtype: str = "bfloat16", workers: int | None = None
) -> dict[tuple[str, bool], Built]:
    """Every named kernel of KERNELS with both epilogues, as many at once as there are cores; {(name, residual): kernel}."""
    wanted = [(name, residual) for name in names for residual in (False, True)]
    with concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        built = pool.map(lambda one: build(KERNELS[one[0]], dtype, one[1]), wanted)
        return dict(zip(wanted, built))


def _compile(config: LinearConfig, dtype: str, residual: bool, library: pathlib.Path, report: pathlib.Path) -> None:
    if not (shutil.which("g++") or os.environ.get("NVCC_CCBIN")):
        raise ToolchainMissing("nvcc needs a C++ compiler beside it: sudo apt-get install g++, or name one in NVCC_CCBIN")
    shape = "x".join(map(str, config.tile))
    name = f"nvcc sm_{config.capability}: {'residual' if residual else 'SiLU'} projection, {shape}, {dtype}"
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        output, messages = pathlib.Path(scratch) / "kernel.so", pathlib.Path(scratch) / "messages"
        with open(messages, "w") as file:
            process = subprocess.Popen(command(config, dtype, residual, str(output)), stdout=file, stderr=file)
            try:
                seconds = _wait(process, name)
            except BaseException:
                process.kill()
                process.wait()
                raise
        said = messages.read_text()
        if process.returncode:
            raise CompileFailed(f"{name}: nvcc answered {process.returncode}: {said[-2000:]}")
        report.write_text(said)
        os.replace(output, library)
    clear = "\r\033[K" if sys.stderr.isatty() else ""
    print(f"{clear}{name}: {seconds:.0f} s, kept in {library}", file=sys.stderr)


_running: dict[str, float] = {}


def _wait(process: subprocess.Popen, name: str) -> float:
    """Seconds until the compiler is done; on a terminal one line counts for all that run."""
    _running[name] = start = time.monotonic()
    try:
        while process.poll() is None:
            time.sleep(0.2)
            if sys.stderr.isatty():
                line = f"{len(_running)} of nvcc at work, the first for {time.monotonic() - min(_running.values()):.0f} s: {name}"
                print(f"\r\033[K{line[:100]}", end="\r", file=sys.stderr, flush=True)
    finally:
        del _running[name]
    return time.monotonic() - start


def _read(config: LinearConfig, library: pathlib.Path, report: pathlib.Path) -> Built:
    said = report.read_text()
    registers = max(map(int, re.findall(r"Used (\d+) registers", said)))
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill stores", said)))
    threads = 384 if config.capability >= 90 else 32 * config.tile[0] * config.tile[1] // (config.warp[0] * config.warp[1])
    return Built(library, registers, spilled, threads)
