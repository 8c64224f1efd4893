"""Measure the CUTLASS and CuTe kernels on the GPU that is here and write data/measured/<device>/cutlass_*.json.

    python -m hstu_lab.cutlass_bench [linear] [attention] [choices] [layer] [ampere] [sanitizer] [tests] [--out FOLDER]

Every ratio compares two measurements of one run, taken in turn: a GPU that has warmed up is a slower GPU.
"""

from __future__ import annotations

import copy
import functools
import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hstu_lab import measure
from hstu_lab.kernel_bench import ceilings, gpu_tests, launch_ptx, parts_parser, run_parts
from hstu_lab.model import HSTULayer
from hstu_lab.ops import cutlass_ops, dispatch, reference, triton_ops
from hstu_lab.ops.cute_attention import GROUP
from hstu_lab.ops.cute_attention import attention_jagged as cute_attention
from hstu_lab.ops.cute_compile import compile_attention
from hstu_lab.ops.cute_hopper import HopperTiles
from hstu_lab.ops.cutlass import build, linear
from hstu_lab.ops.triton_compile import CompiledKernel

BF16 = torch.bfloat16
DEVICE_COMMAND = "python -m hstu_lab.cutlass_bench"


def compete(
    record: measure.Record, where: str, candidates: dict[str, Callable], flops: float, rounds: int = 4
) -> dict[str, float]:
    """Time candidates in turn, several rounds, from CUDA graphs; keeps "<candidate> | <where>", returns median seconds."""
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    calls = {}
    # Many calls of a short kernel in one graph, or what starting the graph costs is measured with it.
    inputs = [()] * (32 if flops < 2e10 else 1)
    for _, (name, fn) in itertools.product(range(rounds), candidates.items()):
        timing = measure.measure(fn, name=name, warmup=1, repeats=5, min_time=0.012, cuda_graph=True, inputs=inputs)
        samples[name] += timing.samples
        calls[name] = timing.calls
    medians = {}
    for name, values in samples.items():
        result = measure.Measurement(f"{name} | {where}", tuple(values), calls[name], "cuda graph", {"flops": flops})
        record.measurements.append(result)
        medians[name] = result.median
        print(f"{result.name:72s} {result.median * 1e6:9.1f} us  {result.flops_per_second / 1e12:6.0f} TFLOP/s", flush=True)
    return medians


def error(got: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error."""
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def projections() -> dict[str, build.LinearConfig]:
    """The CUTLASS projection kernels of this GPU's generation."""
    major = torch.cuda.get_device_capability()[0]
    return {name: config for name, config in build.KERNELS.items() if config.capability == 10 * major}


def linear_operands(rows: int, columns: int, depth: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (rows, depth), weight (columns, depth), bias (columns,), residual (rows, columns): random, bf16."""
    x, weight = torch.randn(rows, depth, device="cuda"), torch.randn(columns, depth, device="cuda") / depth**0.5
    bias, residual = torch.randn(columns, device="cuda"), torch.randn(rows, columns, device="cuda")
    return tuple(t.to(BF16) for t in (x, weight, bias, residual))


def silu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.linear(x, weight, bias))


def linear_part(record: measure.Record) -> None:
    """UVQK projection + bias + SiLU, and output projection + residual, against cuBLAS, torch.compile and Triton."""
    build.build_all(projections())
    default = torch.compile(silu_linear, dynamic=False)
    autotuned = torch.compile(silu_linear, dynamic=False, mode="max-autotune-no-cudagraphs")
    ratios = record.data.setdefault("ratios", {})
    for rows, columns, depth in ((16384, 4096, 1024), (16384, 1024, 1024), (8192, 8192, 2048)):
        x, weight, bias, residual = linear_operands(rows, columns, depth)
        where = f"M={rows} N={columns} K={depth}"
        run = {
            "cuBLAS product alone": lambda x=x, w=weight: x @ w.T,
            "torch.compile": functools.partial(default, x, weight, bias),
            "triton SiLU": functools.partial(triton_ops.project_silu, x, weight, bias),
            "triton residual": functools.partial(triton_ops.project_residual, x, weight, bias, residual),
        }
        if columns == 4096:
            run["torch.compile max-autotune"] = functools.partial(autotuned, x, weight, bias)
        expected = reference.project_silu(x.float(), weight.float(), bias.float())
        summed = reference.project_residual(x.float(), weight.float(), bias.float(), residual.float())
        errors = record.data.setdefault("errors", {})
        for name, config in projections().items():
            run[f"{name} SiLU"] = functools.partial(linear.project_silu, x, weight, bias, config)
            run[f"{name} residual"] = functools.partial(linear.project_residual, x, weight, bias, residual, config)
            errors[f"{name} SiLU | {where}"] = error(run[f"{name} SiLU"](), expected)
            errors[f"{name} residual | {where}"] = error(run[f"{name} residual"](), summed)
        seconds = compete(record, where, run, 2.0 * rows * columns * depth, rounds=6)
        best = min(value for name, value in seconds.items() if name.startswith("cutlass") and name.endswith("SiLU"))
        rivals = ("cuBLAS product alone", "torch.compile", "torch.compile max-autotune", "triton SiLU")
        ratios[where] = {f"speed over {rival}": seconds[rival] / best for rival in rivals if rival in seconds}
        print(f"{where}: {ratios[where]}")


def attention_inputs(lengths: Tensor, heads: int, d: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, k, v, offsets) of sequences of these lengths: slices of one projection, as the layer makes them."""
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).cuda()
    packed = torch.randn(int(lengths.sum()), 3 * heads * d, device="cuda").to(BF16)
    return *(part.unflatten(-1, (heads, d)) for part in packed.split(heads * d, dim=-1)), offsets


def attention_part(record: measure.Record) -> None:
    """Causal attention without bias against PyTorch's cuDNN and flash attention (a softmax) and Triton, same lengths."""
    batch, heads = 32, 4
    ratios = record.data.setdefault("ratios", {})
    for d in (64, 128):
        kernels = cutlass_ops.HOPPER_ATTENTION
        cases = [(n, False) for n in (512, 1024, 2048, 4096, 8192)] + [(1024, True), (4096, True)]
        for length, jagged in cases:
            lengths = torch.full((batch,), length)
            if jagged:
                lengths = torch.randint(1, length + 1, (batch,), generator=torch.Generator().manual_seed(1))
            q, k, v, offsets = attention_inputs(lengths, heads, d)
            flops = 2 * heads * d * float((lengths.double() ** 2).sum())  # half of 4 N^2 d: the causal triangle
            where = f"d={d} N={'random to ' if jagged else ''}{length}"
            run = {"triton": functools.partial(triton_ops.attention_jagged, q, k, v, offsets, divisor=length, max_len=length)}
            if not jagged:
                dense = [x.unflatten(0, (batch, length)).transpose(1, 2).contiguous() for x in (q, k, v)]
                run |= {"cuDNN": functools.partial(sdpa, SDPBackend.CUDNN_ATTENTION, dense)}
                run |= {"flash": functools.partial(sdpa, SDPBackend.FLASH_ATTENTION, dense)}
            for name, tiles in kernels.items():
                run[name] = functools.partial(cute_attention, q, k, v, offsets, divisor=length, max_len=length, tiles=tiles)
            seconds = compete(record, where, run, flops, rounds=3)
            best = min((name for name in seconds if name.startswith("cute")), key=seconds.get)
            ratios[where] = {"kernel": best} | {
                f"speed over {name}": value / seconds[best] for name, value in seconds.items() if not name.startswith("cute")
            }
            print(f"{where}: {ratios[where]}")


def sdpa(backend: SDPBackend, dense: list[Tensor]) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*dense, is_causal=True)


def steps_part(record: measure.Record) -> None:
    """What was tried for the Hopper kernel: B=32 H=4 N=4096, causal, in variants."""
    batch, heads, length = 32, 4, 4096
    for d in (64, 128):
        q, k, v, offsets = attention_inputs(torch.full((batch,), length), heads, d)
        flops = 2.0 * batch * heads * length**2 * d
        shapes = [(64, 2, 4, 1), (64, 3, 4 if d == 64 else 3, 1), (128, 2, 2, 1)]
        variants = [HopperTiles(*s[:3], order, s[3]) for s, order in itertools.product(shapes, ("behind", "ahead"))]
        variants += [HopperTiles(64, 2, 4, "ahead", 2)] + ([HopperTiles(64, 3, 4, "ahead", 2)] if d == 64 else [])
        variants = [t for t in variants if d == 64 or (t.groups, t.order) != (3, "ahead")]  # not enough registers
        run = {
            f"{t.keys} keys x{t.groups} {t.order} unroll {t.unroll}": functools.partial(
                cute_attention, q, k, v, offsets, divisor=length, max_len=length, tiles=t
            )
            for t in variants
        }
        compete(record, f"d={d}", run, flops, rounds=3)
        t = HopperTiles()
        grouped = {
            f"group {g}": functools.partial(cute_attention, q, k, v, offsets, divisor=length, max_len=length, tiles=t, group=g)
            for g in (4, 8, GROUP, 32, 128)
        }
        compete(record, f"d={d}", grouped, flops, rounds=3)


def choices_part(record: measure.Record) -> None:
    """What the dispatcher reads: every kernel on a grid of shapes, with its error against the oracle."""
    rows = record.data.setdefault("rows", [])
    build.build_all(projections())
    for d, length, pairs in itertools.product((64, 128), (128, 512, 1024, 2048, 4096), (16, 128, 512)):
        if length * pairs > 2**20:
            continue
        heads = 4
        q, k, v, offsets = attention_inputs(torch.full((pairs // heads,), length), heads, d)
        shared = {"divisor": length, "max_len": length}
        run = {dispatch_name: functools.partial(cute_attention, q, k, v, offsets, **shared, tiles=tiles)
               for dispatch_name, tiles in cutlass_ops.HOPPER_ATTENTION.items()}  # fmt: skip
        run[cutlass_ops.TRITON] = functools.partial(triton_ops.attention_jagged, q, k, v, offsets, **shared)
        few = slice(0, length)
        expected = reference.attention_jagged(q[few].float(), k[few].float(), v[few].float(), offsets[:2], divisor=length)
        errors = {name: error(fn()[few], expected) for name, fn in run.items()}
        where = f"attention d={d} N={length} pairs={pairs}"
        seconds = compete(record, where, run, 2.0 * pairs * length**2 * d, rounds=2)
        rows.append(
            {"op": "attention", "shape": {"d": d, "max_len": length, "pairs": pairs}, "seconds": seconds, "error": errors}
        )
    for op, (columns, depth), count in itertools.product(
        ("project_silu", "project_residual"), ((1024, 256), (4096, 1024), (1024, 1024)), (1, 16, 128, 512, 2048, 4096, 16384)
    ):
        if op == "project_silu" and columns == depth:
            continue
        if op == "project_residual" and columns != depth:
            columns = depth
        x, weight, bias, residual = linear_operands(count, columns, depth)
        extra = (residual,) if op == "project_residual" else ()
        run = {cutlass_ops.TRITON: functools.partial(getattr(triton_ops, op), x, weight, bias, *extra)}
        for name, config in projections().items():
            run[name] = functools.partial(getattr(linear, op), x, weight, bias, *extra, config)
        expected = getattr(reference, op)(*(t.float() for t in (x, weight, bias, *extra)))
        errors = {name: error(fn(), expected) for name, fn in run.items()}
        shape = {"rows": count, "columns": columns, "depth": depth}
        if any(row["op"] == op and row["shape"] == shape for row in rows):
            continue
        seconds = compete(record, f"{op} M={count} N={columns} K={depth}", run, 2.0 * count * columns * depth, rounds=2)
        rows.append({"op": op, "shape": shape, "seconds": seconds, "error": errors})


class LayerRun:
    """One layer of `gr-3b` (16 heads of 64) over `batch` full sequences of 2048, bf16, with one choice of operators.

    `rab` none: every kernel here can compute it. Called without arguments; `x` (T, 1024) is the input.
    """

    def __init__(self, batch: int = 8, length: int = 2048):
        from hstu_lab.config import preset

        torch.manual_seed(0)
        self.config = preset("gr-3b").replace(rab="none", max_seq_len=length)
        self.layer = HSTULayer(self.config, 0).eval().requires_grad_(False).to("cuda", BF16)
        self.x = torch.randn(batch * length, self.config.d_model, device="cuda", dtype=BF16)
        self.offsets = torch.arange(batch + 1, device="cuda") * length
        self.batch, self.length = batch, length

    def dense(self, _, q, k, v, bias):
        """Attention as plain PyTorch writes it: scores of all pairs in memory, in the input's precision."""
        q, k, v = (t.unflatten(0, (self.batch, self.length)).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(-1, -2) * self.config.d_qk**-0.5
        allowed = torch.ones(self.length, self.length, dtype=torch.bool, device="cuda").tril()
        weights = F.silu(scores).masked_fill(~allowed, 0.0) / self.length
        return (weights @ v).transpose(1, 2).flatten(0, 1)

    def run(self, ops, attend: Callable | None = None, x: Tensor | None = None) -> Tensor:
        def jagged(_, q, k, v, bias):
            return ops.attention_jagged(q, k, v, self.offsets, divisor=self.length, max_len=self.length)

        return self.layer(self.x if x is None else x, attend or jagged, ops)

    def exact(self) -> Tensor:
        """The same layer in float32, one sequence at a time."""
        layer = copy.deepcopy(self.layer).float()
        one = torch.tensor([0, self.length], device="cuda")

        def attend(_, q, k, v, bias):
            return reference.attention_jagged(q, k, v, one, divisor=self.length)

        return torch.cat([layer(x.float(), attend) for x in self.x.split(self.length)])

    @property
    def work(self) -> dict[str, float]:
        """FLOPs of each kernel of the layer, and its least bytes."""
        t, d, b = len(self.x), self.config.d_model, 2
        return {
            "norm": (0, 2 * t * d * b), "uvqk": (8 * t * d * d, (5 * t * d + 4 * d * d) * b),
            "attention": (2 * t * self.length * d, 4 * t * d * b), "norm_gate": (0, 3 * t * d * b),
            "output": (2 * t * d * d, (3 * t * d + d * d) * b),
        }  # fmt: skip


class Mixed:
    """Triton's operators with some of them replaced: one step of the waterfall."""

    def __init__(self, **replaced: Callable):
        self.__dict__.update(vars(triton_ops), **replaced)


def layer_part(record: measure.Record) -> None:
    """One whole layer, from eager PyTorch to the final kernels, each step replacing one kernel more; and its roofline."""
    copy, product = ceilings(record)
    run = LayerRun()
    work = run.work
    flops = sum(f for f, _ in work.values())
    expected = run.exact()
    compiled = torch.compile(lambda x: run.run(reference, run.dense, x))
    candidates = {
        "eager": lambda: run.run(reference, run.dense),
        "torch.compile": lambda: compiled(run.x),
        "triton": lambda: run.run(triton_ops),
        "+ CUTLASS UVQK": lambda: run.run(Mixed(project_silu=cutlass_ops.project_silu)),
        "+ CuTe attention": lambda: run.run(
            Mixed(project_silu=cutlass_ops.project_silu, attention_jagged=cutlass_ops.attention_jagged)
        ),
        "+ CUTLASS output": lambda: run.run(cutlass_ops),
    }
    errors = {name: error(fn(), expected) for name, fn in candidates.items()}
    seconds = compete(record, "layer", candidates, flops)
    projected = triton_ops.project_silu(triton_ops.layer_norm(run.x, run.layer.norm.weight, run.layer.norm.bias, 1e-6),
                                        run.layer.uvqk.weight, run.layer.uvqk.bias)  # fmt: skip
    u, v, q, k = projected.split(run.config.d_model, dim=-1)
    v, q, k = (part.unflatten(-1, (run.config.num_heads, -1)) for part in (v, q, k))
    alone = {}
    for ops in (triton_ops, cutlass_ops):
        kernels = {
            "norm": lambda o=ops: o.layer_norm(run.x, run.layer.norm.weight, run.layer.norm.bias, 1e-6),
            "uvqk": lambda o=ops: o.project_silu(run.x, run.layer.uvqk.weight, run.layer.uvqk.bias),
            "attention": lambda o=ops: o.attention_jagged(q, k, v, run.offsets, divisor=run.length, max_len=run.length),
            "norm_gate": lambda o=ops: o.norm_gate(
                run.x, u, run.layer.attention_norm.weight, run.layer.attention_norm.bias, 1e-6
            ),
            "output": lambda o=ops: o.project_residual(run.x, run.layer.out.weight, run.layer.out.bias, run.x),
        }
        alone[ops.name] = compete(record, f"{ops.name} alone", kernels, 0, rounds=2)
    floors = {name: max(f / product, moved / copy) for name, (f, moved) in work.items()}
    record.data |= {
        "tokens": len(run.x), "GFLOP": flops / 1e9, "seconds": seconds, "errors": errors, "kernels": alone, "floors": floors,
        "share of roofline": {name: sum(floors.values()) / s for name, s in seconds.items()},
        "choices": [str(choice) for choice in dispatch.said()],
    }  # fmt: skip
    print({name: f"{100 * share:.0f} %" for name, share in record.data["share of roofline"].items()})


def ampere_part(record: measure.Record) -> None:
    """The sm_80 code, proven here: its PTX is compiled by the driver for this GPU and compared with the oracle."""
    errors = record.data.setdefault("sm_80 PTX, relative error", {})
    lengths = torch.tensor([700, 1, 0, 129, 512, 64, 65, 63])
    for d in (64, 128):
        heads, longest = 4, int(lengths.max())
        q, k, v, offsets = attention_inputs(lengths, heads, d)
        out = torch.full((len(q), heads, d), torch.nan, device="cuda", dtype=BF16)
        kernel = compile_attention(80, d)
        tiles = 128 if d == 64 else 64
        max_tiles, pairs = -(-longest // tiles), len(lengths) * heads
        values = [q, k, v, out, offsets, pairs, heads, max_tiles, *(s for t in (q, k, v) for s in t.stride()[:2])]
        values += [0.5 * d**-0.5, 1 / longest, GROUP]
        kinds = ["*"] * 5 + ["i32"] * 9 + ["fp32"] * 2 + ["i32"]
        names = [f"p{i}" for i in range(len(values))]
        # This GPU's driver may be older than the DSL's PTX version; the instructions are those of sm_80.
        ptx = re.sub(r"^\.version .*$", ".version 8.0", kernel.ptx, flags=re.MULTILINE)
        launch_ptx(
            CompiledKernel(kernel.name, 80, kernel.threads // 32, 0, 0, kernel.shared_bytes, "", ptx, "", kernel.entry,
                           tuple(zip(names, kinds))),
            (pairs * max_tiles,), dict(zip(names, values)),
        )  # fmt: skip
        expected = reference.attention_jagged(q.float(), k.float(), v.float(), offsets, divisor=longest)
        errors[f"cute attention d={d}"] = error(out, expected)
    config = build.KERNELS["cutlass sm_80 128x128"]
    for rows in (1, 999):
        x, weight, bias, residual = linear_operands(rows, 512, 1024)
        wide = [t.float() for t in (x, weight, bias)]
        got = linear.project_silu(x, weight, bias, config)
        errors[f"project_silu {rows} rows"] = error(got, reference.project_silu(*wide))
        got = linear.project_residual(x, weight, bias, residual, config)
        errors[f"project_residual {rows} rows"] = error(got, reference.project_residual(*wide, residual.float()))
    for name, value in errors.items():
        print(f"sm_80 {name:38s} error {value:.1e}")


def sanitizer_part(record: measure.Record) -> None:
    """compute-sanitizer's memcheck and racecheck over one small case of each kernel."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    results = record.data.setdefault("compute-sanitizer", {})
    # Calls of the driver that fail (a library asking for what this driver lacks) are no accesses to memory.
    memcheck = ("--tool", "memcheck", "--report-api-errors", "no")
    for check, kernel in itertools.product((memcheck, ("--tool", "racecheck")), ("attention", "linear")):
        command = [tool, *check, sys.executable, "-m", "hstu_lab.cutlass_bench", "--case", kernel]
        name = f"{' '.join(check[1:])} {kernel}"
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=100)
            summary = [line for line in done.stdout.splitlines() if "SUMMARY" in line]
            results[name] = summary[-1].strip("= ") if summary else (done.stdout + done.stderr)[-500:]
            if "0 errors" not in results[name] or done.returncode:
                print(done.stdout[:4000], done.stderr[-1000:])
        except subprocess.TimeoutExpired:
            results[name] = "not finished after 100 s"
        print(f"{name}: {results[name]}", flush=True)


def small_case(kernel: str) -> None:
    """One small launch of each kernel of that kind, for a checker to watch; fails where the result is wrong."""
    torch.manual_seed(0)
    if kernel == "attention":
        for d, tiles in ((64, HopperTiles(64, 2, 4, "ahead", 2)), (128, HopperTiles())):
            q, k, v, offsets = attention_inputs(torch.tensor([200, 0, 65]), 2, d)
            got = cute_attention(q, k, v, offsets, divisor=200, max_len=200, tiles=tiles)
            assert error(got, reference.attention_jagged(q.float(), k.float(), v.float(), offsets, divisor=200)) < 1e-2
    else:
        x, weight, bias, residual = linear_operands(200, 256, 128)
        wide = [t.float() for t in (x, weight, bias)]
        for config in projections().values():
            assert error(linear.project_silu(x, weight, bias, config), reference.project_silu(*wide)) < 1e-2
            got = linear.project_residual(x, weight, bias, residual, config)
            assert error(got, reference.project_residual(*wide, residual.float())) < 1e-2


def tests_part(record: measure.Record) -> None:
    """The GPU tests of these kernels."""
    gpu_tests(record, [f"tests/{name}.py" for name in ("test_cutlass", "test_cute", "test_cutlass_ops")], workers=6)


PARTS = {
    "tests": ("cutlass_correctness", tests_part),
    "ampere": ("cutlass_correctness", ampere_part),
    "sanitizer": ("cutlass_correctness", sanitizer_part),
    "linear": ("cutlass_linear", linear_part),
    "attention": ("cutlass_attention", attention_part),
    "steps": ("cutlass_steps", steps_part),
    "choices": (dispatch.RECORD, choices_part),
    "layer": ("cutlass_layer", layer_part),
}


def main() -> None:
    parser = parts_parser(__doc__, PARTS)
    parser.add_argument("--case", choices=("attention", "linear"), help="run one small case of these kernels, nothing else")
    arguments = parser.parse_args()
    measure.require_gpu()
    if arguments.case:
        return small_case(arguments.case)
    run_parts({part: PARTS[part] for part in arguments.parts}, DEVICE_COMMAND, arguments.out)


if __name__ == "__main__":
    main()
