"""Puts compiled Triton kernels in the place of our nodes in a graph: what a TensorRT engine then runs as plugins.

`fuse` compiles for one GPU generation, which need not be here. Every kernel becomes a node `CompiledKernel` that holds its
machine code and how to launch it, as text; `hstu_lab.tensorrt_plugin` makes TensorRT 8 understand it. What the attention kernel
wants of the bias tables is made here, once; what it wants of a request's times is one launch a request, for all layers.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import onnx
import torch
import triton
from onnx import helper
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hstu_lab.onnx_precision import _Editor as Editor
from hstu_lab.ops.reference import RelativeBias
from hstu_lab.ops.triton_compile import compiled_modules
from hstu_lab.tensorrt_parts import DOMAIN

MOST_ROWS = 1024
"""Sequences of a batch that the constant offsets reach."""

PROCESSORS = 132
"""Streaming multiprocessors of the GPU that tiles of projections are chosen for: an H100's and an H200's."""

_POINTERS = {
    **dict.fromkeys(("Q", "K", "V", "Out", "X", "Gate", "Residual"), "*fp16"),
    **dict.fromkeys(("Weight", "Bias", "Position", "TimeBias", "PositionTable", "Steps"), "*fp32"),
    **dict.fromkeys(("NumCandidates", "Times", "Relative", "FastTiles", "Ordered", "Lowest", "Bounds"), "*i32"),
    **dict.fromkeys(("Lut", "Thresholds"), "*i32"),
    **dict.fromkeys(("Offsets", "Cells"), "*i64"),  # constants: TensorRT 8 sees pairs of int32
}
_FLOATS = ("half_scale", "out_scale", "scale", "eps")
_ALIGNED = (
    "columns",
    "depth",
    "residual_row",
    "x_row",
    "gate_row",
    "q_row",
    "q_head",
    "k_row",
    "k_head",
    "v_row",
    "v_head",
    "width",
)


class FuseError(ValueError):
    """A graph that is not as `hstu_lab.tensorrt_parts` traces it, or sizes that the kernels do not take."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Machine code of one kernel: its name, run-time arguments in order, threads and shared bytes of a block; of the arguments
    that are read by the tensor memory accelerator, the box (rows, columns) and how it is swizzled."""

    name: str
    arguments: tuple[str, ...]
    threads: int
    shared: int
    cubin: bytes
    maps: dict[str, tuple[int, int, int]]


def compile_kernel(kernel, constants: dict, options: dict, capability: int, boxes=None, weights: str = "*fp32") -> Kernel:
    """`kernel` for `capability` (80, 90) with these compile-time arguments; a second or two. boxes: (rows, columns) of what the
    tensor memory accelerator reads at once, by argument."""
    boxes = boxes or {}
    described = {name: f"tensordesc<fp16[{rows}, {columns}]>" for name, (rows, columns) in boxes.items()}
    kinds = {
        **_POINTERS,
        **dict.fromkeys(("Weight", "Bias"), weights),
        **described,
        **dict.fromkeys(_FLOATS, "fp32"),
        **dict.fromkeys(constants, "constexpr"),
    }
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    aligned = [name for name, kind in signature.items() if kind.startswith("*") or (name in _ALIGNED and kind == "i32")]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"enable_fp_fusion": True} | {name: value for name, value in options.items() if value is not None}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    if made.metadata.global_scratch_size:
        raise FuseError(f"{kernel.__name__} wants scratch memory, which a plugin has none of: use other tiles")
    arguments = tuple(name for name, kind in signature.items() if kind != "constexpr")
    said = zip((name for name in arguments if name in boxes), made.metadata.tensordesc_meta or ())
    maps = {name: (*meta["block_size"], meta["swizzle"]) for name, meta in said}
    facts = made.metadata
    return Kernel(facts.name, arguments, 32 * facts.num_warps, facts.shared, made.asm["cubin"], maps)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the kernels are compiled for: rows of a sequence, heads and their width, a usual batch, biases, candidates."""

    length: int
    heads: int
    d: int
    batch: int
    num_context: int
    position: bool
    time: int
    candidates: bool

    @property
    def bias(self) -> RelativeBias | None:
        """Tables of no values: which biases there are, and how many buckets."""
        return RelativeBias(torch.zeros(1, 1), torch.zeros(1, self.time) if self.time else None) if self.position else None

    def tiles(self, capability: int):
        tuned = compiled_modules()["triton_tiles"].default_tiles
        return tuned(torch.float16, self.d, self.length, self.batch * self.heads, self.bias, capability)

    def plan(self, capability: int):
        """The kernels' own plan of sizes; its tables are empty and of one sequence."""
        return compiled_modules()["triton_bias"].plan(
            self.tiles(capability), self.bias, torch.device("cpu"), batch=1, heads=self.heads, total=self.length,
            max_len=self.length, num_context=self.num_context,
        )  # fmt: skip


@functools.cache
def attention_kernel(sizes: Sizes, capability: int) -> Kernel:
    """The fused attention of `hstu_lab.ops.triton_attention` in float16."""
    tiles, plan = sizes.tiles(capability), sizes.plan(capability)
    d_pad = max(16, triton.next_power_of_2(sizes.d))
    tma = tiles.tma and capability >= 90 and d_pad == sizes.d
    boxes = dict.fromkeys(("KTiles", "VTiles"), (tiles.block_n, sizes.d)) if tma else {}
    absent = [] if tma else ["KTiles", "VTiles"]
    absent += [] if sizes.time else ["Relative", "FastTiles", "Ordered", "Lowest", "Bounds", "Steps", "Lut"]
    absent += ([] if sizes.position else ["PositionTable"]) + ([] if sizes.candidates else ["NumCandidates"])
    constants = {
        **dict.fromkeys(absent), "D": sizes.d, "DV": sizes.d, "D_PAD": d_pad, "DV_PAD": d_pad,
        "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n,
        "BLOCK_S": tiles.block_s, "GROUP": tiles.group, "NUM_CONTEXT": sizes.num_context, "HAS_CANDIDATES": sizes.candidates,
        "HAS_POSITION": sizes.position, "HAS_TIME": bool(sizes.time), "EXACT": tiles.exact, "TMA": tma, "PRECISION": "tf32",
        "PLAIN": False, "LADDER": tiles.ladder, "AFTER": tiles.after, "WIDE": False, "PARTS": plan.parts,
    }  # fmt: skip
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages, "maxnreg": tiles.maxnreg}
    return compile_kernel(compiled_modules()["triton_attention"].attention_kernel, constants, options, capability, boxes)


@functools.cache
def prepare_kernel(sizes: Sizes, capability: int) -> Kernel:
    """What attention wants to know of a request's times, for all heads and layers; its programs for tables are not launched."""
    tiles, plan, module = sizes.tiles(capability), sizes.plan(capability), compiled_modules()["triton_bias"]
    constants = {
        **({} if sizes.candidates else {"NumCandidates": None}), "HAS_POSITION": False, "HAS_TIME": True,
        "HAS_CANDIDATES": sizes.candidates,
        "LADDER": tiles.ladder, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n,
        "BISECT": tiles.block_n.bit_length() - 1, "CHUNK": module.CHUNK.value, "SCAN": 1024 if plan.parts == 1 else 512,
        "TABLE_BLOCK": 512, "WIDE": False, "PARTS": plan.parts,
    }  # fmt: skip
    return compile_kernel(module.prepare_kernel, constants, {"num_warps": 4 if plan.parts == 1 else 1}, capability)


@functools.cache
def norm_gate_kernel(width: int, rows: int, capability: int) -> Kernel:
    """LayerNorm times gate over `width` columns, `rows` rows a block."""
    padded = triton.next_power_of_2(width)
    constants = {"WIDTH_PAD": padded, "ROWS": rows, "HAS_GATE": True}
    options = {"num_warps": min(16, max(4, padded // 512))}
    return compile_kernel(compiled_modules()["triton_memory"].norm_kernel, constants, options, capability)


def linear_tiles(rows: int, columns: int):
    """Those of `triton_linear` for a GPU of `PROCESSORS`."""
    LinearTiles = compiled_modules()["triton_linear"].LinearTiles
    for tiles in (LinearTiles(128, 128, 64, 8, 3), LinearTiles(64, 128, 64, 4, 4)):
        if triton.cdiv(rows, tiles.block_m) * triton.cdiv(columns, tiles.block_n) >= 1.5 * PROCESSORS:
            return tiles
    return LinearTiles(64, 32, 128, 4, 4) if rows > 32 else LinearTiles(16, 64, 128, 4, 5)


@functools.cache
def linear_kernel(tiles, silu: bool, capability: int) -> Kernel:
    """A projection of `hstu_lab.ops.triton_linear`, with SiLU or the residual sum."""
    tma = capability >= 90
    boxes = {"XTiles": (tiles.block_m, tiles.block_k), "WeightTiles": (tiles.block_n, tiles.block_k)} if tma else {}
    absent = ([] if tma else ["XTiles", "WeightTiles"]) + (["Residual"] if silu else [])
    constants = {
        **dict.fromkeys(absent), "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k,
        "GROUP": tiles.group, "SILU": silu, "EXACT": False, "TMA": tma, "PRECISION": "tf32",
    }  # fmt: skip
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    return compile_kernel(compiled_modules()["triton_linear"].linear_kernel, constants, options, capability, boxes, "*fp16")


# ---- tables that depend on weights only


def bias_tables(sizes: Sizes, capability: int, position: np.ndarray, time: np.ndarray | None) -> dict[str, np.ndarray]:
    """PositionTable, Steps and Lut of `hstu_lab.ops.triton_bias.prepare_kernel` from tables (H, P) and (H, T)."""
    plan = sizes.plan(capability)
    scale = np.float32(0.5 if plan.after else sizes.d**0.5)
    at = np.arange(plan.table_len)
    rows = (np.clip(plan.origin - (at - shift), 0, position.shape[1] - 1) for shift in (0, 1))
    found = {"PositionTable": np.stack([scale * position[:, row] for row in rows], axis=1).astype(np.float32)}
    if time is None:
        return found
    module, last = compiled_modules()["triton_bias"], time.shape[1] - 1
    cells = module.bucket_tables(time.shape[1], torch.device("cpu"))[1].numpy()
    half = (0.5 * time).astype(np.float32)
    bucket, threshold = (cells >> 32).astype(np.int64), (cells & 0xFFFFFFFF).astype(np.uint32)
    pair = np.stack([half[:, bucket], half[:, np.minimum(bucket + 1, last)]], axis=-1)
    words = np.clip(pair, -65504, 65504).astype(np.float16).view(np.uint32)[..., 0]
    found["Steps"] = half[:, np.minimum(np.arange(256), last)]
    found["Lut"] = np.stack([np.broadcast_to(threshold, words.shape), words], axis=-1).view(np.int32)
    return found


# ---- the graph


def fuse(model: onnx.ModelProto, capability: int = 90, batch: int = 8, halves: bool = False) -> onnx.ModelProto:
    """A copy in which the nodes of `hstu_lab.tensorrt_parts` are kernels compiled for `capability`, tiled for `batch` sequences.

    `halves` puts a cast to float16 before each; without, the engine must choose float16 there by itself (TensorRT 8). Raises
    FuseError for a graph that `hstu_lab.tensorrt_parts` did not trace.
    """
    edit = _Fuser(model, capability, batch, halves)
    for node in list(edit.graph.node):
        if node.domain != DOMAIN:
            edit.nodes.append(node)
        elif node.op_type == "HstuAttention":
            edit.attention(node)
        elif node.op_type == "NormGate":
            edit.norm_gate(node)
        elif node.op_type in ("ProjectSilu", "ProjectResidual"):
            edit.linear(node)
        else:
            raise FuseError(f"{node.op_type}: no kernel for this node")
    made = edit.finish()
    del made.graph.value_info[:]
    kept = [entry for entry in made.opset_import if entry.domain != DOMAIN]
    del made.opset_import[:]
    made.opset_import.extend(kept)
    helper.set_model_props(made, {**{entry.key: entry.value for entry in made.metadata_props}, "kernels": f"sm_{capability}"})
    return made


class _Fuser(Editor):
    def __init__(self, model: onnx.ModelProto, capability: int, batch: int, halves: bool):
        super().__init__(model)
        self.capability, self.batch, self.halves = capability, batch, halves
        self.made = {name: node for node in self.graph.node for name in node.output}
        self.shapes = {
            value.name: [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]
            for value in (*self.graph.value_info, *self.graph.input, *self.graph.output)
        }
        self.prepared: dict[tuple, dict[str, str]] = {}
        self.ours: set[str] = set()

    def launch(self, kernel: Kernel, grid, arguments: dict[str, object], outputs: dict[str, tuple], name: str) -> None:
        """A node that runs `kernel`. arguments: (tensor, type, offset in bytes), with (rows, columns, stride) behind it for what
        is read by the tensor memory accelerator, or a number's text, or nothing; outputs: argument -> (tensor, type, dims)."""
        tensors: dict[str, str] = {}
        lines = []
        for argument in kernel.arguments:
            value = arguments.get(argument)
            if argument in outputs:
                lines.append(f"arg out {list(outputs).index(argument)}")
            elif isinstance(value, tuple):
                tensor, kind, offset, *shape = value
                tensors.setdefault(tensor, kind)
                where = f"{list(tensors).index(tensor)} {offset}"
                if argument in kernel.maps:
                    rows, columns, stride = shape
                    lines.append(f"arg map {where} {rows} {columns} {stride} {' '.join(map(str, kernel.maps[argument]))}")
                    lines += [f"arg i32 {number}" for number in (rows, columns, stride, 1)]
                else:
                    lines.append(f"arg in {where}")
            elif value is None:
                lines.append("arg null")
            else:
                lines.append(f"arg {'f32' if argument in _FLOATS else 'i32'} {value}")
        lines += ["arg null"] * 2  # Triton's scratch memories, of which nothing is used
        head = [f"kernel {kernel.name}", f"threads {kernel.threads}", f"shared {kernel.shared}"]
        head += [f"grid {' '.join(map(str, grid))}", f"in {' '.join(tensors.values())}"]
        head += [f"out {kind} {' '.join(map(str, dims))}" for _, kind, dims in outputs.values()]
        attributes = {"launch": "\n".join(head + lines), "cubin": kernel.cubin.hex()}
        names = [tensor for tensor, _, _ in outputs.values()]
        self.ours.update(names)
        self.nodes.append(helper.make_node("CompiledKernel", list(tensors), names, name=name, **attributes))

    def as_half(self, name: str) -> str:
        return self.half(name) if self.halves and name not in self.ours else name

    def source(self, name: str) -> tuple[str, int, int]:
        """(tensor, its width, first column) of which `name` (B, N, ...) is a slice of the last axis, reshaped or not."""
        node = self.made.get(name)
        while node is not None and node.op_type == "Reshape":
            name = node.input[0]
            node = self.made.get(name)
        if node is None or node.op_type != "Slice":
            raise FuseError(f"{name}: not a slice of a layer's projection")
        width = self.shapes[node.input[0]][-1]
        return node.input[0], width, int(self.weights[node.input[1]][0])

    def attention(self, node: onnx.NodeProto) -> None:
        q, k, v, times, candidates, position, time = [*node.input, *[""] * (7 - len(node.input))]
        heads, d = self.shapes[q][2:]
        if self.shapes[v][2:] != [heads, d]:
            raise FuseError(f"{node.name}: values are {self.shapes[v][2:]}, keys {[heads, d]}; the kernel here wants them alike")
        wanted = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        length = self.shapes[q][1]
        position_table, time_table = (self.weights[name] if name else None for name in (position, time))
        sizes = Sizes(
            length=length, heads=heads, d=d, batch=self.batch, num_context=wanted["num_context"], position=bool(position),
            time=time_table.shape[1] if time else 0, candidates=bool(candidates),
        )  # fmt: skip
        kernel, plan = attention_kernel(sizes, self.capability), sizes.plan(self.capability)
        offsets = self.constant(f"offsets_{length}", (np.arange(MOST_ROWS + 1) * length).view(np.int32))
        given: dict[str, object] = {"Offsets": (offsets, "int32", 0)}
        for letter, name in zip("QKV", (q, k, v)):
            tensor, width, first = self.source(name)
            given[letter] = (self.as_half(tensor), "half", 2 * first)
            given[f"{letter}Tiles"] = (*given[letter], f"0:{length}", heads * d, width)
            given |= {f"{letter.lower()}_row": width, f"{letter.lower()}_head": d}
        if candidates:
            given["NumCandidates"] = (candidates, "int32", 0)
        if position:
            for name, values in bias_tables(sizes, self.capability, position_table, time_table).items():
                kept = self.constant(f"{node.output[0]}_{name}", values)
                given[name] = (kept, "float" if values.dtype == np.float32 else "int32", 0)
        if time:
            prepared = self.prepare(sizes, plan, offsets, times, candidates)
            given |= {name: (tensor, "int32", 0) for name, tensor in prepared.items()}
        given |= {
            "pairs": f"0:{heads}", "heads": heads, "max_tiles": plan.max_tiles, "max_tiles_k": plan.max_tiles_k,
            "origin": plan.origin, "table_len": plan.table_len, "half_scale": repr(0.5 * d**-0.5),
            "out_scale": repr(1 / wanted["divisor"]),
        }  # fmt: skip
        outputs = {"Out": (node.output[0], "half", ("0:1", length, heads, d))}
        self.launch(kernel, (f"0:{heads * plan.max_tiles}", 1, 1), given, outputs, f"{node.name}_attention")

    def prepare(self, sizes: Sizes, plan, offsets: str, times: str, candidates: str) -> dict[str, str]:
        """The tensors that attention wants of the times, by its arguments' names; launched once."""
        key = (sizes, times, candidates)
        if key not in self.prepared:
            kernel, tiles = prepare_kernel(sizes, self.capability), sizes.tiles(self.capability)
            number = len(self.prepared)
            thresholds, cells = compiled_modules()["triton_bias"].bucket_tables(sizes.time, torch.device("cpu"))
            given = {
                "Times": (times, "int32", 0), "Offsets": (offsets, "int32", 0),
                "Thresholds": (self.constant(f"thresholds_{sizes.time}", thresholds.numpy()), "int32", 0),
                "Cells": (self.constant(f"cells_{sizes.time}", cells.numpy().view(np.int32)), "int32", 0),
                "batch": "0:1", "position_head": 0, "time_head": 0, "positions": 0, "buckets": sizes.time,
                "origin": plan.origin, "table_len": plan.table_len, "max_tiles": plan.max_tiles,
                "max_tiles_k": plan.max_tiles_k, "scale": 0.0,
            }  # fmt: skip
            if candidates:
                given["NumCandidates"] = (candidates, "int32", 0)
            tiled = ("0:1", plan.max_tiles, plan.max_tiles_k)
            dims = {
                "Relative": ("0:1", sizes.length), "FastTiles": ("0:1", plan.max_tiles, plan.parts), "Ordered": ("0:1",),
                "Lowest": tiled, "Bounds": (*tiled, tiles.block_m),
            }  # fmt: skip
            outputs = {name: (f"prepared_{number}_{name}", "int32", shape) for name, shape in dims.items()}
            self.launch(kernel, (plan.max_tiles * plan.parts, "0:1", 1), given, outputs, f"prepare_{number}")
            self.prepared[key] = {name: tensor for name, (tensor, _, _) in outputs.items()}
        return self.prepared[key]

    def linear(self, node: onnx.NodeProto) -> None:
        x, weight, bias, *residual = node.input
        columns, depth = self.weights[weight].shape
        length = self.shapes[x][1]
        tiles = linear_tiles(length * self.batch, columns)
        kernel = linear_kernel(tiles, not residual, self.capability)
        given: dict[str, object] = {
            "X": (self.as_half(x), "half", 0), "Weight": (self.half(weight), "half", 0), "Bias": (self.half(bias), "half", 0),
            "x_row": depth, "rows": f"0:{length}", "columns": columns, "depth": depth, "residual_row": columns,
        }  # fmt: skip
        given["XTiles"] = (*given["X"], f"0:{length}", depth, depth)
        given["WeightTiles"] = (*given["Weight"], columns, depth, depth)
        if residual:
            given["Residual"] = (self.as_half(residual[0]), "half", 0)
        per_column = triton.cdiv(columns, tiles.block_n)
        if length % tiles.block_m:
            raise FuseError(f"{length} rows a sequence are no multiple of {tiles.block_m}: the grid would not be whole")
        outputs = {"Out": (node.output[0], "half", ("0:1", length, columns))}
        self.launch(kernel, (f"0:{length // tiles.block_m * per_column}", 1, 1), given, outputs, f"{node.name}_linear")

    def norm_gate(self, node: onnx.NodeProto) -> None:
        attended, gate, weight, bias = node.input
        while (before := self.made.get(attended)) is not None and before.op_type == "Reshape":
            attended = before.input[0]  # heads beside each other are in memory what they are as one row
        tensor, gate_width, first = self.source(gate)
        _, length, width = self.shapes[gate]
        rows = max(1, 2048 // triton.next_power_of_2(width))
        eps = next(attribute.f for attribute in node.attribute if attribute.name == "eps")
        given = {
            "X": (self.as_half(attended), "half", 0), "Gate": (self.as_half(tensor), "half", 2 * first),
            "Weight": (weight, "float", 0), "Bias": (bias, "float", 0), "x_row": width, "gate_row": gate_width,
            "rows": f"0:{length}", "width": width, "eps": repr(eps),
        }  # fmt: skip
        kernel = norm_gate_kernel(width, rows, self.capability)
        outputs = {"Out": (node.output[0], "half", ("0:1", length, width))}
        self.launch(kernel, (f"0:{-(-length // rows)}", 1, 1), given, outputs, f"{node.name}_norm_gate")
