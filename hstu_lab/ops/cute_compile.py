"""What the CUTLASS and CuTe kernels become, for a GPU that need not be here: PTX, machine code, registers, shared memory."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
import subprocess
import tempfile

import torch
import triton

from hstu_lab.ops.cute_ampere import AmpereAttention, AmpereTiles
from hstu_lab.ops.cute_attention import DTYPES, compiled, default_tiles
from hstu_lab.ops.cute_hopper import HopperAttention, HopperTiles
from hstu_lab.ops.cutlass import build


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel's machine code. Registers a thread, spilled bytes a thread, shared bytes and threads a block.

    `registers` is what the kernel is launched with; a Hopper consumer warpgroup raises its own later (`setmaxnreg`).
    """

    name: str
    capability: int
    threads: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    sass: str
    ptx: str = ""
    entry: str = ""

    def instructions(self, mnemonic: str) -> int:
        """How often a machine instruction occurs, by the start of its name: "HMMA", "HGMMA", "MUFU.TANH"."""
        return len(re.findall(rf"\s{re.escape(mnemonic)}\b", self.sass))

    def listing(self, *mnemonics: str, most: int = 12) -> str:
        """The first `most` machine instructions that begin with one of these, without addresses."""
        found = re.findall(rf"\s((?:@!?U?P\d\s+)?(?:{'|'.join(map(re.escape, mnemonics))})[^;]*);", self.sass)
        return "\n".join(" ".join(line.split()) for line in found[:most])


@dataclasses.dataclass(frozen=True)
class Occupancy:
    """Blocks that fit on one multiprocessor at once, warps they make, and what runs out first."""

    blocks: int
    warps: int
    limit: str


def occupancy(
    kernel: Kernel, shared_per_sm: int = 164 * 1024, registers_per_sm: int = 2**16, warps_per_sm: int = 64
) -> Occupancy:
    """Occupancy by the rules of compute capability 8.0 (CUDA C++ Programming Guide, technical specifications).

    Registers go out in units of 256 a warp, and a block costs 1 KiB of shared memory on top of its own.
    """
    warps = kernel.threads // 32
    of_a_warp = -(-kernel.registers * 32 // 256) * 256
    limits = {
        "registers": registers_per_sm // (of_a_warp * warps), "shared memory": shared_per_sm // (kernel.shared_bytes + 1024),
        "warps": warps_per_sm // warps, "blocks": 32,
    }  # fmt: skip
    limit = min(limits, key=limits.get)
    return Occupancy(limits[limit], limits[limit] * warps, limit)


@functools.cache
def compile_attention(
    capability: int = 80, width: int = 64, dtype: torch.dtype = torch.bfloat16, tiles: HopperTiles | AmpereTiles | None = None
) -> Kernel:
    """The CuTe attention kernel for compute capability 8.0 (80) or 9.0 (90)."""
    tiles = tiles or default_tiles(width, capability)
    kernel = (HopperAttention if capability >= 90 else AmpereAttention)(width, DTYPES[dtype], tiles)
    with tempfile.TemporaryDirectory() as folder:
        done = compiled(width, dtype, tiles, f"--keep-ptx --keep-cubin --dump-dir={folder}")
        registers, spilled, sass = _inspect(done.__cubin__)
    entry = re.search(r"\.entry\s+(\w+)", done.__ptx__)[1]
    name = f"cute attention d={width}, {tiles.queries} x {tiles.keys}"
    return Kernel(name, capability, kernel.threads, registers, spilled, kernel.shared_bytes(), sass, done.__ptx__, entry)


@functools.cache
def compile_linear(name: str, residual: bool = False, dtype: str = "bfloat16") -> Kernel:
    """One of `build.KERNELS`, from the build cache or compiled now."""
    config = build.KERNELS[name]
    built = build.build(config, dtype, residual)
    sass = subprocess.run([_tool("cuobjdump"), "-sass", built.library], capture_output=True, text=True, check=True).stdout
    shown = f"{name} {'residual' if residual else 'SiLU'}"
    return Kernel(shown, config.capability, built.threads, built.registers, built.spilled_bytes, built.shared_bytes, sass)


def _tool(name: str) -> pathlib.Path:
    """NVIDIA's binary tools as Triton's wheel carries them."""
    return pathlib.Path(triton.__file__).parent / "backends/nvidia/bin" / name


def _inspect(cubin: bytes) -> tuple[int, int, str]:
    """(registers, bytes of stack and local memory, disassembly)."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        run = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
        report = run([_tool("cuobjdump"), "-res-usage", path])
        sass = run([_tool("nvdisasm"), path]).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report.stdout + report.stderr)
    registers, stack, local = map(int, found.groups())
    return registers, stack + local, sass
