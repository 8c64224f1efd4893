"""Compile the kernels ahead of time, for a GPU that need not be here: PTX, machine code, registers, shared memory, spills.

`compile_kernel("attention", 80)` is what an A100 would run. Works beside the interpreter in one process: the kernels' modules
are loaded a second time, compiled instead of interpreted.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import pathlib
import re
import subprocess
import sys
import tempfile
import types

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hstu_lab.ops.reference import RelativeBias

_MODULES = (
    "triton_runtime", "triton_tiles", "triton_bias", "triton_attention", "triton_memory", "triton_linear", "triton_paged",
)  # fmt: skip
"""In the order of their imports."""


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """One kernel for one GPU generation. Counts are per thread (registers, spilled bytes) and per program (shared bytes)."""

    name: str
    capability: int
    num_warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    ttgir: str
    ptx: str
    sass: str
    entry: str
    parameters: tuple[tuple[str, str], ...]

    def instructions(self, mnemonic: str) -> int:
        """How often a machine instruction occurs, by the start of its name: "HMMA", "HGMMA", "MUFU.TANH"."""
        return len(re.findall(rf"\s{re.escape(mnemonic)}", self.sass))

    def loop(self, mnemonic: str) -> list[str]:
        """Machine instructions of the innermost loop that holds `mnemonic` most often."""
        lines = self.sass.splitlines()
        labels = {m.group(1): at for at, line in enumerate(lines) if (m := re.match(r"\s*(\.L_x_\d+):", line))}
        jumps = [(labels[m.group(1)], at) for at, line in enumerate(lines) if (m := re.search(r"BRA.*`\((\.L_x_\d+)\)", line))]
        loops = [(start, end) for start, end in jumps if start < end]
        inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
        bodies = [[line for line in lines[start : end + 1] if re.match(r"\s*/\*[0-9a-f]{4,}\*/", line)] for start, end in inner]
        return max(bodies, key=lambda body: sum(f" {mnemonic}" in line for line in body))


_LANES = {"MUFU": ("special functions", 4), "F2FP": ("conversions", 16), "I2FP": ("conversions", 16)} | dict.fromkeys(
    ("FADD", "FMUL", "FFMA"), ("float32", 32)
)


def clocks_by_unit(instructions: list[str]) -> dict[str, float]:
    """Clocks that each unit of a Hopper SM is busy with these instructions (lines of `CompiledKernel.loop`) of one warp group.

    An SM has four schedulers, and each of the group's four warps is on one of its own. A scheduler issues an instruction a clock,
    of any kind; its units take the 32 threads of a warp 32 (float32), 16 (conversions) or 4 (special functions) at a time, and
    the tensor cores of the SM do 4,096 FLOP of a product of half precision. Source: CUDA C++ Programming Guide, throughput of
    native arithmetic instructions, compute capability 9.0; NVIDIA H100 white paper. Waiting is not counted.
    """
    clocks = dict.fromkeys(("tensor cores", "special functions", "float32", "conversions", "issue"), 0.0)
    for line in instructions:
        word = re.search(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)(?:\.(\d+)x(\d+)x(\d+))?", line)
        clocks["issue"] += 1
        if word.group(1) == "HGMMA":
            clocks["tensor cores"] += 2 * math.prod(map(int, word.groups()[1:])) / 4096
        elif word.group(1) in _LANES:
            unit, lanes = _LANES[word.group(1)]
            clocks[unit] += 32 / lanes
    return clocks


@functools.cache
def compiled_modules() -> dict[str, types.ModuleType]:
    """The kernels' modules with compiled (not interpreted) kernels, by short name."""
    prefix = "hstu_lab.ops."
    ours = [prefix + name for name in _MODULES]
    held = {name: sys.modules.pop(name) for name in ours if name in sys.modules}
    package = importlib.import_module("hstu_lab.ops")
    attributes = {name: getattr(package, name) for name in _MODULES if hasattr(package, name)}
    interpret = triton.knobs.runtime.interpret
    try:
        triton.knobs.runtime.interpret = False
        return {name: importlib.import_module(prefix + name) for name in _MODULES}
    finally:
        triton.knobs.runtime.interpret = interpret
        for name in ours:
            sys.modules.pop(name, None)
        sys.modules.update(held)
        for name in _MODULES:
            if name in attributes:
                setattr(package, name, attributes[name])


_HALF, _FLOAT, _LONG, _INT = "*bf16", "*fp32", "*i64", "*i32"
_TYPES = {
    **dict.fromkeys(("Q", "K", "V", "Out", "X", "Gate", "Weight", "Bias", "Residual", "KeyCache", "ValueCache"), _HALF),
    **dict.fromkeys(("OwnKeys", "OwnValues", "Jagged", "Dense", *(f"T{i}" for i in range(8))), _HALF),
    **dict.fromkeys(("Position", "TimeBias", "PositionTable", "Steps", "Parts"), _FLOAT),
    **dict.fromkeys(("Offsets", "NumCandidates", "Times", "Cells", "Ids", "BlockTable", "QueryOffsets", "SeqLens"), _LONG),
    **dict.fromkeys(("QueryTimes", "SlotTimes"), _LONG),
    **dict.fromkeys(("Relative", "FastTiles", "Ordered", "Lowest", "Bounds", "Lut", "Thresholds"), _INT),
    **dict.fromkeys(("half_scale", "out_scale", "scale", "eps", "fill"), "fp32"),
}
_ALIGNED = ("x_row", "gate_row", "width", "columns", "depth", "residual_row", "size")


def _attention(d: int, position: bool, time: bool, tma: bool, tiles, parts: int) -> dict:
    absent = () if time else ("Relative", "FastTiles", "Ordered", "Lowest", "Bounds", "Steps", "Lut")
    absent += () if position else ("PositionTable",)
    return {
        **dict.fromkeys(("NumCandidates", *absent, *(() if tma else ("KTiles", "VTiles")))),
        "D": d, "DV": d, "D_PAD": d, "DV_PAD": d, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_S": tiles.block_s,
        "GROUP": tiles.group, "NUM_CONTEXT": 1, "HAS_CANDIDATES": False, "HAS_POSITION": position, "HAS_TIME": time,
        "EXACT": False,
        "TMA": tma, "PRECISION": "tf32", "PLAIN": False, "LADDER": tiles.ladder, "AFTER": tiles.after, "WIDE": False,
        "PARTS": parts,
    }  # fmt: skip


def _extend(d: int, length: int, page: int) -> tuple[object, dict, int, None, dict, int]:
    """`_specification` of the kernel for chunks of `length` queries on Hopper."""
    from hstu_lab.ops import triton_extend

    tiles = triton_extend.default_tiles(d, length)
    arguments = {
        "D": d, "PAGE": page, "BLOCK_N": tiles.block_n, "STAGES": tiles.stages, "SCALED": d == 64, "OVERLAP": tiles.overlap,
        "GROUPS": tiles.groups, "REGISTERS": tiles.registers,
    }  # fmt: skip
    block = f"tensordesc<bf16[{min(page, tiles.block_n // 2)}, {triton_extend.WIDTH.value}],{triton_extend.SHARED.value!r}>"
    descriptors = dict.fromkeys(("KeyTiles", "ValueTiles"), block)
    return triton_extend.extend_kernel, arguments, 4, None, descriptors, tiles.maxnreg


def _specification(name: str, capability: int, d: int, length: int, page: int) -> tuple[object, dict, int, int, dict, int | None]:
    """(kernel, compile-time arguments, warps, stages, tensor descriptors, register cap) of the variant that is shown."""
    modules = compiled_modules()
    tuned, bias_module, attention, memory, linear, paged = (modules[m] for m in _MODULES[1:])
    tma = capability >= 90
    if name in ("attention", "attention_position", "attention_bias"):
        position, time = name != "attention", name == "attention_bias"
        bias = RelativeBias(*(torch.zeros(1, 1) if there else None for there in (position, time)))
        tiles = tuned.default_tiles(torch.bfloat16, d, length, 128, bias, capability)
        descriptors = dict.fromkeys(("KTiles", "VTiles"), f"tensordesc<bf16[{tiles.block_n}, {d}]>") if tma else {}
        arguments = _attention(d, position, time, tma, tiles, bias_module.parts_of(triton.cdiv(length, tiles.block_n)))
        return attention.attention_kernel, arguments, tiles.num_warps, tiles.num_stages, descriptors, tiles.maxnreg
    if name == "prepare":
        table = torch.zeros(1, 1)
        tiles = tuned.default_tiles(torch.bfloat16, d, length, 128, RelativeBias(table, table), capability)
        parts = bias_module.parts_of(triton.cdiv(length, tiles.block_n))
        arguments = {
            "HAS_POSITION": True, "HAS_TIME": True, "HAS_CANDIDATES": False, "LADDER": tiles.ladder, "BLOCK_M": tiles.block_m,
            "BLOCK_N": tiles.block_n, "BISECT": tiles.block_n.bit_length() - 1, "CHUNK": bias_module.CHUNK.value,
            "SCAN": 1024 if parts == 1 else 256,
            "TABLE_BLOCK": 512, "WIDE": False, "PARTS": parts,
            "NumCandidates": None,
        }  # fmt: skip
        return bias_module.prepare_kernel, arguments, 4 if parts == 1 else 1, 3, {}, None
    if name == "extend" and capability >= 90:
        return _extend(d, length, page)
    if name in ("decode", "extend"):
        tiles = paged.default_tiles(torch.bfloat16, d, page, 1 if name == "decode" else 512, capability)
        block_m, block_n = tiles.block_m, tiles.block_n
        arguments = {
            **dict.fromkeys(("OwnKeys", "OwnValues", "Position", "TimeBias", "Cells", "QueryTimes", "SlotTimes")),
            **dict.fromkeys(("KeyTiles", "ValueTiles", "HistoryLens", "TileList")),
            "D": d, "DV": d, "D_PAD": d, "DV_PAD": d, "PAGE": page, "BLOCK_M": block_m, "BLOCK_N": block_n, "NUM_CONTEXT": 1,
            "HAS_CANDIDATES": False, "HAS_HISTORY": False, "HAS_LIST": False, "HAS_POSITION": False, "HAS_TIME": False,
            "EXACT": False, "TMA": False, "BIAS_ROWS": block_m, "PLAIN": False, "PRECISION": "tf32",
        }  # fmt: skip
        return paged.paged_kernel, arguments, tiles.num_warps, tiles.num_stages, {}, tiles.maxnreg
    if name == "sum_splits":
        return paged.sum_splits_kernel, {"BLOCK": 1024}, 4, 3, {}, None
    if name == "norm_gate":
        return memory.norm_kernel, {"WIDTH_PAD": 1024, "ROWS": 2, "HAS_GATE": True}, 4, 3, {}, None
    if name == "gather_sum":
        return memory.gather_sum_kernel, {"TABLES": 3, "ROWS": 2, "WIDTH": 1024}, 4, 3, {}, None
    if name == "jagged_to_dense":
        return memory.jagged_dense_kernel, {"TO_DENSE": True, "ROWS": 2, "WIDTH": 1024}, 4, 3, {}, None
    if name in ("project_silu", "project_int8"):
        kind, deep = ("bf16", 64) if name == "project_silu" else ("i8", 128)
        descriptors = dict.fromkeys(("XTiles", "WeightTiles"), f"tensordesc<{kind}[128, {deep}]>") if tma else {}
        if kind == "i8":
            descriptors |= {"X": "*i8", "Weight": "*i8", "Steps": "*fp32"}
        arguments = {
            **dict.fromkeys(("Residual", *(["Steps"] * (kind != "i8")), *(() if tma else ("XTiles", "WeightTiles")))),
            "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": deep, "GROUP": 8, "SILU": True, "EXACT": False, "TMA": tma,
            "PRECISION": "tf32",
        }  # fmt: skip
        return linear.linear_kernel, arguments, 8, 4 if tma else 3, descriptors, None
    raise ValueError(f"kernel {name!r} is unknown: use one of {', '.join(KERNELS)}")


KERNELS = (
    "attention", "attention_position", "attention_bias", "prepare", "decode", "extend", "sum_splits", "norm_gate", "gather_sum",
    "jagged_to_dense", "project_silu", "project_int8",
)  # fmt: skip
"""Names that `compile_kernel` takes."""


@functools.cache
def compile_kernel(name: str, capability: int = 80, d: int = 64, length: int = 4096, page: int = 16) -> CompiledKernel:
    """One of KERNELS in bfloat16 for compute capability 8.0 (80) or 9.0 (90), head width `d`, with its default tiles for
    128 heads of `length` events (of a cache in blocks of `page` slots).

    Raises ValueError for an unknown name.
    """
    kernel, arguments, warps, stages, descriptors, cap = _specification(name, capability, d, length, page)
    signature = {}
    for argument in kernel.arg_names:
        if argument in arguments:
            signature[argument] = "constexpr"
        else:
            signature[argument] = descriptors.get(argument) or _TYPES.get(argument, "i32")
    aligned = [
        a for a, t in signature.items()
        if t.startswith("*") or a in _ALIGNED or (t == "i32" and a.endswith(("_row", "_head", "_page", "_slot")))
    ]  # fmt: skip
    attributes = {(kernel.arg_names.index(a),): [["tt.divisibility", 16]] for a in aligned}
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True, "maxnreg": cap}
    options = {option: value for option, value in options.items() if value is not None}
    source = (_gluon_source() if kernel.is_gluon() else ASTSource)(kernel, signature, arguments, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage, sass = _inspect(compiled.asm["cubin"])
    return CompiledKernel(
        name, capability, warps, usage["REG"], usage["STACK"] + usage["LOCAL"], compiled.metadata.shared,
        compiled.asm["ttgir"], compiled.asm["ptx"], sass, compiled.metadata.name,
        tuple((a, t) for a, t in signature.items() if t != "constexpr"),
    )  # fmt: skip


def _gluon_source() -> type[ASTSource]:
    from triton.experimental.gluon._runtime import GluonASTSource  # beside ASTSource in no public module

    return GluonASTSource


def _inspect(cubin: bytes) -> tuple[dict[str, int], str]:
    """Resource usage and disassembly, by the NVIDIA tools in Triton's wheel."""
    tools = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        run = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
        report = run([tools / "cuobjdump", "-res-usage", path])
        sass = run([tools / "nvdisasm", path]).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report.stdout + report.stderr)
    return dict(zip(("REG", "STACK", "LOCAL"), map(int, found.groups()))), sass
