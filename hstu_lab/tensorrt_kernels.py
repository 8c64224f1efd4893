"""Puts compiled Triton kernels in the place of a graph's layers: what a TensorRT engine then runs as plugins.

`fuse` compiles for one GPU generation, which need not be here. Every kernel becomes a node `CompiledKernel` that holds its
machine code and how to launch it, as text; `hstu_lab.tensorrt_plugin` makes TensorRT 8 understand it. What the attention kernel
wants of the bias tables is made here, once; what it wants of a request's times is one launch a request, for all layers.

Norms and products are recognised as the exporter and `onnx_precision.convert` write them. Where QuantizeLinear and
DequantizeLinear stand before a product, the norm before it writes int8 with the graph's step and the product is one of integers.
Halves and int8 values travel as int32 constants and tensors, several in one: TensorRT 8 would convert the first, and wants scales
of its own for the second.
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
    **dict.fromkeys(("Q", "K", "V", "Gate", "Scaled"), "fp16"),
    **dict.fromkeys(("Bias", "Position", "TimeBias", "PositionTable", "Steps", "Hidden"), "fp32"),
    **dict.fromkeys(("NumCandidates", "Times", "Relative", "FastTiles", "Ordered", "Lowest", "Bounds"), "i32"),
    **dict.fromkeys(("Lut", "Thresholds", "Lengths"), "i32"),
    **dict.fromkeys(("Offsets", "Cells"), "i64"),  # constants: TensorRT 8 sees pairs of int32
}
"""What pointers point to, where it is not said at each compilation."""
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
"""Numbers that kernels are told to be multiples of 16."""


class FuseError(ValueError):
    """A graph that is not as `hstu_lab.tensorrt_parts` traces it, or sizes that the kernels do not take."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Machine code of one kernel: its name, run-time arguments in order, threads and shared bytes of a block; of the arguments
    that are read by the tensor memory accelerator, the box (rows, columns), how it is swizzled, and bytes of an element."""

    name: str
    arguments: tuple[str, ...]
    threads: int
    shared: int
    cubin: bytes
    maps: dict[str, tuple[int, int, int, int]]
    ragged: tuple[str, ...]


def compile_kernel(
    kernel, constants: dict, options: dict, capability: int, pointers: dict[str, str], boxes=None, ragged: tuple[str, ...] = ()
) -> Kernel:
    """`kernel` for `capability` (80, 90) with these compile-time arguments; a second or two. boxes: (rows, columns) of what the
    tensor memory accelerator reads at once, by argument. ragged: those of `_ALIGNED` that are no multiples of 16."""
    pointers, boxes = _POINTERS | pointers, boxes or {}
    described = {
        name: f"tensordesc<{pointers[name.removesuffix('Tiles')]}[{rows}, {columns}]>" for name, (rows, columns) in boxes.items()
    }
    kinds = {
        **{name: f"*{kind}" for name, kind in pointers.items()},
        **described,
        **dict.fromkeys(_FLOATS, "fp32"),
        **dict.fromkeys(constants, "constexpr"),
    }
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    even = [name for name, kind in signature.items() if kind == "i32" and name in _ALIGNED and name not in ragged]
    aligned = even + [name for name, kind in signature.items() if kind.startswith("*")]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"enable_fp_fusion": True} | {name: value for name, value in options.items() if value is not None}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    if made.metadata.global_scratch_size:
        raise FuseError(f"{kernel.__name__} wants scratch memory, which a plugin has none of: use other tiles")
    arguments = tuple(name for name, kind in signature.items() if kind != "constexpr")
    said = zip((name for name in arguments if name in boxes), made.metadata.tensordesc_meta or ())
    maps = {name: (*meta["block_size"], meta["swizzle"], meta["elem_size"]) for name, meta in said}
    facts = made.metadata
    return Kernel(facts.name, arguments, 32 * facts.num_warps, facts.shared, made.asm["cubin"], maps, ragged)


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
    kernel = compiled_modules()["triton_attention"].attention_kernel
    return compile_kernel(kernel, constants, options, capability, {"Out": "fp16"}, boxes)


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
    return compile_kernel(module.prepare_kernel, constants, {"num_warps": 4 if plan.parts == 1 else 1}, capability, {})


@functools.cache
def norm_kernel(width: int, rows: int, gated: bool, kinds: tuple[str, str], capability: int) -> Kernel:
    """LayerNorm, times a gate or not, over `width` columns, `rows` rows a block; kinds of what is read and written."""
    padded = triton.next_power_of_2(width)
    constants = {"WIDTH_PAD": padded, "ROWS": rows, "HAS_GATE": gated} | ({} if gated else {"Gate": None})
    pointers = dict(zip(("X", "Out"), kinds)) | {"Weight": "fp32"}
    options = {"num_warps": min(16, max(4, padded // 512))}
    return compile_kernel(compiled_modules()["triton_memory"].norm_kernel, constants, options, capability, pointers)


@functools.cache
def last_kernel(width: int, kind: str, capability: int) -> Kernel:
    """The last event's norms."""
    padded = triton.next_power_of_2(width)
    pointers = {"X": kind, "Weight": "fp32"}
    kernel, options = compiled_modules()["triton_memory"].last_kernel, {"num_warps": min(8, max(1, padded // 256))}
    return compile_kernel(kernel, {"WIDTH_PAD": padded}, options, capability, pointers)


@functools.cache
def linear_kernel(tiles, int8: bool, silu: bool, residual: str, out: str, ragged: bool, capability: int) -> Kernel:
    """A projection of `hstu_lab.ops.triton_linear`. residual: the kind of what is added, or ""; out: of the result."""
    tma = capability >= 90
    boxes = {"XTiles": (tiles.block_m, tiles.block_k), "WeightTiles": (tiles.block_n, tiles.block_k)} if tma else {}
    absent = ([] if tma else ["XTiles", "WeightTiles"]) + ([] if residual else ["Residual"]) + ([] if int8 else ["Steps"])
    constants = {
        **dict.fromkeys(absent), "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k,
        "GROUP": tiles.group, "SILU": silu, "EXACT": False, "TMA": tma, "PRECISION": "tf32",
    }  # fmt: skip
    pointers = dict.fromkeys(("X", "Weight"), "i8" if int8 else "fp16") | {"Residual": residual, "Out": out}
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    uneven = ("columns", "residual_row") if ragged else ()
    kernel = compiled_modules()["triton_linear"].linear_kernel
    return compile_kernel(kernel, constants, options, capability, pointers, boxes, uneven)


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

_TENSORS = {"fp16": "half", "fp32": "float", "i8": "int32", "i32": "int32"}
"""As what TensorRT 8 sees tensors between kernels, by what they hold."""


@dataclasses.dataclass(frozen=True)
class Product:
    """A product with a weight, and all that follows it, as the graph has it. values (K, N) of the weight, float32, or int8
    with `steps` (N,), which hold those of x as well; `after`: tensors on the way from `name` to `out`."""

    x: str
    name: str
    weight: str
    values: np.ndarray
    steps: np.ndarray | None
    bias: str
    silu: bool
    residual: str
    out: str
    after: tuple[str, ...]


def fuse(model: onnx.ModelProto, capability: int = 90, batch: int = 8) -> onnx.ModelProto:
    """A copy in which the nodes of `hstu_lab.tensorrt_parts`, and the norms and products around them, are kernels compiled for
    `capability`, tiled for `batch` sequences. They compute in float16 and int8 whatever the graph says elsewhere.

    Raises FuseError for a graph that `hstu_lab.tensorrt_parts` did not trace, and for sizes that the kernels do not take.
    """
    edit = _Fuser(model, capability, batch)
    for node in list(edit.graph.node):
        if node.output[0] in edit.products:
            edit.linear(edit.products[node.output[0]])
        elif node.output[0] in edit.replaced or node.output[0] in edit.integers:
            continue
        elif node.op_type == "HstuAttention":
            edit.attention(node)
        elif node.op_type in _NORMS:
            edit.norm(node)
        elif node.op_type == "LastEvent":
            edit.last(node)
        elif node.domain == DOMAIN:
            raise FuseError(f"{node.op_type}: no kernel for this node")
        else:
            edit.nodes.append(node)
    made = edit.finish()
    del made.graph.value_info[:]
    kept = [entry for entry in made.opset_import if entry.domain != DOMAIN]
    del made.opset_import[:]
    made.opset_import.extend(kept)
    helper.set_model_props(made, {**{entry.key: entry.value for entry in made.metadata_props}, "kernels": f"sm_{capability}"})
    return made


_NORMS = ("LayerNormalization", "NormGate")


class _Fuser(Editor):
    def __init__(self, model: onnx.ModelProto, capability: int, batch: int):
        super().__init__(model)
        self.capability, self.batch = capability, batch
        self.made = {name: node for node in self.graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.shapes = {
            value.name: [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]
            for value in (*self.graph.value_info, *self.graph.input, *self.graph.output)
        }
        self.outputs = {value.name for value in self.graph.output}
        self.prepared: dict[tuple, dict[str, str]] = {}
        self.ours: dict[str, str] = {}
        self.integers: dict[str, float] = {}
        """Steps of the int8 tensors that kernels of ours write."""
        self.products: dict[str, Product] = {}
        self.find_products()
        self.replaced = {name for product in self.products.values() for name in product.after}

    def find_products(self) -> None:
        groups: dict[str, list[Product | None]] = {}
        for node in self.graph.node:
            if node.op_type == "MatMul":
                quantised = self.quantised(node.input[0])
                groups.setdefault(quantised[0] if quantised else node.output[0], []).append(self.product(node, quantised))
        for name, found in groups.items():
            if all(found):
                if found[0].steps is not None:
                    quantised, base, step = self.quantised(name)
                    readers = [reader for node in self.readers[quantised] for reader in self.readers[node.output[0]]]
                    if len(self.readers[base]) > 1 or len(readers) > len(found):
                        continue  # somebody else reads it, as a float: the engine's own
                    self.integers[name] = step
                self.products |= {product.out: product for product in found}

    def quantised(self, name: str) -> tuple[str, str, float] | None:
        """Where `name` is made by QuantizeLinear, or DequantizeLinear of that: (int8 tensor, what it is made of, its step)."""
        node = self.made.get(name)
        if node is not None and node.op_type == "DequantizeLinear":
            node = self.made.get(node.input[0])
        if node is None or node.op_type != "QuantizeLinear" or self.weights[node.input[2]].any():
            return None
        return node.output[0], node.input[0], float(self.weights[node.input[1]])

    def product(self, node: onnx.NodeProto, quantised: tuple[str, str, float] | None) -> Product | None:
        """The product that a node begins, where it reads a norm of ours and ends in SiLU, a sum, or an output of the graph."""
        x, weight = node.input
        steps, values, base = None, self.weights.get(weight), x
        if quantised:
            stored = self.made.get(weight)
            if stored is None or stored.op_type != "DequantizeLinear" or stored.input[0] not in self.weights:
                return None
            x, base, step = quantised
            values, steps = self.weights[stored.input[0]], step * self.weights[stored.input[1]]
        norm = self.made.get(base)
        if values is None or values.ndim != 2 or norm is None or norm.op_type not in (*_NORMS, "LastEvent"):
            return None
        after = [node.output[0]]

        def only(kind: str) -> onnx.NodeProto | None:
            found = self.readers.get(after[-1], [])
            return found[0] if len(found) == 1 and found[0].op_type == kind and after[-1] not in self.outputs else None

        def other(add: onnx.NodeProto) -> str:
            return add.input[1] if add.input[0] == after[-1] else add.input[0]

        add = only("Add")
        if add is None or getattr(self.weights.get(bias := other(add)), "ndim", 0) != 1:
            return None
        after.append(add.output[0])
        readers, residual, silu = self.readers.get(after[-1], []), "", False
        if add := only("Add"):
            residual = other(add)
            after.append(add.output[0])
        elif silu := sorted(reader.op_type for reader in readers) == ["Mul", "Sigmoid"]:
            sigmoid, gate = sorted(readers, key=lambda reader: reader.op_type != "Sigmoid")
            if sorted(gate.input) != sorted([after[-1], sigmoid.output[0]]):
                return None
            after += [sigmoid.output[0], gate.output[0]]
        elif readers:
            return None
        *before, out = after
        return Product(x, node.output[0], weight, values, steps, bias, silu, residual, out, tuple(before))

    def launch(self, kernel: Kernel, grid, arguments: dict[str, object], outputs: dict[str, tuple], name: str) -> None:
        """A node that runs `kernel`. arguments: (tensor, type, offset in bytes), with (rows, columns, stride) behind it for what
        is read by the tensor memory accelerator, or a number's text, or nothing; outputs: argument -> (tensor, kind, dims)."""
        tensors: dict[str, str] = {}
        lines = []
        for argument in kernel.arguments:
            value = arguments.get(argument)
            if argument in _ALIGNED and argument not in kernel.ragged and value is not None and value % 16:
                raise FuseError(f"{name}: {argument} is {value}; the kernels here want multiples of 16")
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
        for tensor, kind, dims in outputs.values():
            packed = (*dims[:-1], dims[-1] // 4) if kind == "i8" else dims
            head.append(f"out {_TENSORS[kind]} {' '.join(map(str, packed))}")
            self.ours[tensor] = kind
        attributes = {"launch": "\n".join(head + lines), "cubin": kernel.cubin.hex()}
        names = [tensor for tensor, _, _ in outputs.values()]
        self.nodes.append(helper.make_node("CompiledKernel", list(tensors), names, name=name, **attributes))

    def given(self, name: str, kind: str, offset: int = 0) -> tuple[str, str, int]:
        """An argument of `launch` that a kernel reads as `kind`."""
        return name, _TENSORS[kind], offset

    def words(self, name: str, values: np.ndarray) -> str:
        """A constant of halves or int8 values (N, K) as one of int32."""
        bits = 8 * values.itemsize
        return self.constant(f"{name}_{bits}_bits", np.ascontiguousarray(values).view(np.int32))

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
            given[letter] = self.given(tensor, "fp16", 2 * first)
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
        outputs = {"Out": (node.output[0], "fp16", ("0:1", length, heads, d))}
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
            outputs = {name: (f"prepared_{number}_{name}", "i32", shape) for name, shape in dims.items()}
            self.launch(kernel, (plan.max_tiles * plan.parts, "0:1", 1), given, outputs, f"prepare_{number}")
            self.prepared[key] = {name: tensor for name, (tensor, _, _) in outputs.items()}
        return self.prepared[key]

    def norm(self, node: onnx.NodeProto) -> None:
        """LayerNorm with or without a gate; written as int8 where nobody but a quantised product reads it."""
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        gated = node.op_type == "NormGate"
        x, weight, bias = (node.input[i] for i in ((0, 2, 3) if gated else (0, 1, 2)))
        while gated and (before := self.made.get(x)) is not None and before.op_type == "Reshape":
            x = before.input[0]  # heads beside each other are in memory what they are as one row
        if not gated and attributes.get("axis", -1) not in (-1, len(self.shapes[node.output[0]]) - 1):
            raise FuseError(f"{node.name}: a norm over more than the last axis")
        length, width = self.shapes[node.output[0]][1:]
        padded = triton.next_power_of_2(width)
        rows = max(1, 2048 // padded)
        kind, out, made = self.ours.get(x, "fp32"), node.output[0], "fp16"
        weights = {"Weight": self.weights[weight], "Bias": self.weights[bias]}
        reader = self.readers[out][0]
        if reader.output[0] in self.integers:
            out, made = reader.output[0], "i8"
            weights = {key: value / self.integers[out] for key, value in weights.items()}
        given: dict[str, object] = {
            "X": self.given(x, kind), "x_row": width, "rows": f"0:{length}", "width": width,
            "eps": repr(attributes["eps" if gated else "epsilon"]),
        }  # fmt: skip
        given |= {key: (self.constant(f"{out}_{key}", value.astype(np.float32)), "float", 0) for key, value in weights.items()}
        if gated:
            tensor, gate_width, first = self.source(node.input[1])
            given |= {"Gate": self.given(tensor, "fp16", 2 * first), "gate_row": gate_width}
        kernel = norm_kernel(width, rows, gated, (kind, made), self.capability)
        outputs = {"Out": (out, made, ("0:1", length, width))}
        self.launch(kernel, (f"0:{length}/{rows}", 1, 1), given, outputs, f"{node.output[0]}_norm")

    def last(self, node: onnx.NodeProto) -> None:
        x, lengths, weight, bias = node.input
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        length, width = self.shapes[x][1:]
        kind = self.ours.get(x, "fp32")
        given = {
            "X": self.given(x, kind), "Lengths": (lengths, "int32", 0), "Weight": (weight, "float", 0),
            "Bias": (bias, "float", 0), "length": length, "width": width, "eps": repr(attributes["eps"]),
            "scale": repr(attributes["scale"]),
        }  # fmt: skip
        outputs = {name: (tensor, _POINTERS[name], ("0:1", width)) for name, tensor in zip(("Hidden", "Scaled"), node.output)}
        self.launch(last_kernel(width, kind, self.capability), ("0:1", 1, 1), given, outputs, f"{node.name}_last")

    def linear(self, product: Product) -> None:
        """A product with its bias, and SiLU or the residual sum."""
        (depth, columns), int8 = product.values.shape, product.steps is not None
        per = self.shapes[product.name][1] if len(self.shapes[product.name]) == 3 else 1
        tiles = compiled_modules()["triton_linear"].tiles_for(per * self.batch, columns, 1 if int8 else 2, PROCESSORS)
        held, ragged = "i8" if int8 else "fp16", bool(columns % 16)
        residual = self.ours.get(product.residual, "fp32") if product.residual else ""
        out = "fp32" if product.out in self.outputs else "fp16"
        weight = self.words(product.weight, product.values.T if int8 else product.values.T.astype(np.float16))
        given: dict[str, object] = {
            "X": self.given(product.x, held), "Weight": (weight, "int32", 0), "Bias": (product.bias, "float", 0),
            "x_row": depth, "rows": f"0:{per}", "columns": columns, "depth": depth, "residual_row": columns,
        }  # fmt: skip
        given["XTiles"] = (*given["X"], f"0:{per}", depth, depth)
        given["WeightTiles"] = (*given["Weight"], columns, depth, depth)
        if int8:
            given["Steps"] = (self.constant(f"{product.name}_steps", product.steps), "float", 0)
        if residual:
            given["Residual"] = self.given(product.residual, residual)
        grid = f"0:{per}/{tiles.block_m}*{triton.cdiv(columns, tiles.block_n)}"
        dims = ("0:1", per, columns) if len(self.shapes[product.name]) == 3 else ("0:1", columns)
        kernel = linear_kernel(tiles, int8, product.silu, residual, out, ragged, self.capability)
        self.launch(kernel, (grid, 1, 1), given, {"Out": (product.out, out, dims)}, f"{product.out}_linear")
