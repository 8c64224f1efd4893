"""Measure the Triton kernels on the GPU that is here and write what was seen to data/measured/<device>/triton_*.json.

    python -m hstu_lab.kernel_bench [--out FOLDER] [--name NAME] [--resume] [PART ...]

Parts: tests, serving, ampere, attention, steps, paged, memory, calibration, special, stack; all of them by default. Records are
called NAME_*: with a name of its own, a run under other versions stands beside the one under NAME's default, "triton".

Every ratio compares two measurements of one run. Needs PyTorch, Triton and an NVIDIA GPU, nothing else of the project's stack.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import functools
import hashlib
import os
import pathlib
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hstu_lab import hardware, measure, roofline
from hstu_lab.config import preset
from hstu_lab.model import HSTUStack
from hstu_lab.ops import reference, triton_bias, triton_compile, triton_memory, triton_ops, triton_tiles

BF16 = torch.bfloat16
LONG_ENOUGH = {"repeats": 20, "min_time": 0.06}


def timed(fn, name: str, *, flops: float = 0, moved: float = 0, graph: bool = True, inputs=None) -> measure.Measurement:
    """Measure and print one line. Launches are left out where they would dominate (`graph`)."""
    work = {**({"flops": flops} if flops else {}), **({"bytes": moved} if moved else {})}
    return shown(measure.measure(fn, name=name, cuda_graph=graph, work=work, inputs=inputs, **LONG_ENOUGH))


def timed_in_turns(fns: Mapping[str, Callable], flops: float) -> list[measure.Measurement]:
    """`timed` for functions of the same work that are to be compared, by name."""
    work = {name: {"flops": flops} for name in fns}
    return [shown(result) for result in measure.measure_in_turns(fns, cuda_graph=True, work=work, **LONG_ENOUGH)]


def shown(result: measure.Measurement) -> measure.Measurement:
    """`result`, after a line about it."""
    rates = [f"{result.flops_per_second / 1e12:.0f} TFLOP/s"] if "flops" in result.work else []
    rates += [f"{result.bytes_per_second / 1e12:.2f} TB/s"] if "bytes" in result.work else []
    print(f"{result.name:44s} {result.median * 1e6:9.1f} us  {'  '.join(rates)}", flush=True)
    return result


def session_times(total: int, generator: torch.Generator) -> Tensor:
    """Unix seconds (T,): sessions of about 20 events a minute apart, a day between them."""
    gaps = torch.empty(total, device="cuda").exponential_(1 / 60, generator=generator)
    pauses = torch.empty(total, device="cuda").exponential_(1 / 86400, generator=generator)
    new_session = torch.rand(total, device="cuda", generator=generator) < 0.05
    return torch.where(new_session, pauses, gaps).long().cumsum(0) + 1_700_000_000


def random_bias(heads: int, positions: int, kind: str, generator: torch.Generator, dtype=torch.float32):
    if kind == "none":
        return None
    position, time = (torch.randn(heads, n, device="cuda", generator=generator).to(dtype) / 2 for n in (positions, 64))
    return reference.RelativeBias(position, time if kind == "position+time" else None)


def attention(record: measure.Record) -> None:
    """Jagged attention against PyTorch's flash attention (a softmax, no bias), same lengths, same run.

    In turns, so that both have the clock that the two together leave the GPU; for 4,096 events also each alone, at the clock that
    it leaves itself: of two kernels, the one that draws more power has the lower one.
    """
    batch, heads = 32, 4
    g = torch.Generator("cuda").manual_seed(0)
    ratios = record.data.setdefault("ratios", {})
    for d in (64, 128):
        for length, jagged in [(n, False) for n in (512, 1024, 2048, 4096, 8192)] + [(1024, True), (4096, True)]:
            lengths = torch.full((batch,), length)
            if jagged:
                lengths = torch.randint(1, length + 1, (batch,), generator=torch.Generator().manual_seed(1))
            offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).cuda()
            total = int(lengths.sum())
            flops = 2 * heads * d * float((lengths.double() ** 2).sum())  # half of 4 N^2 d: the causal triangle
            name = f"d={d} N={'random to ' if jagged else ''}{length}"
            q, k, v = (torch.randn(total, heads, d, device="cuda", generator=g).to(BF16) for _ in range(3))
            if jagged:
                cumulative = offsets.int()
                flash = functools.partial(
                    torch.ops.aten._flash_attention_forward, q, k, v, cumulative, cumulative, length, length, 0.0, True, False
                )
            else:
                dense = [x.view(batch, length, heads, d).transpose(1, 2).contiguous() for x in (q, k, v)]

                def flash(dense=dense):
                    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                        F.scaled_dot_product_attention(*dense, is_causal=True)

            fns = {f"flash {name}": flash}
            if length == 4096 and not jagged:

                def cudnn(dense=dense):
                    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                        F.scaled_dot_product_attention(*dense, is_causal=True)

                fns[f"cudnn {name}"] = cudnn
            times = session_times(total, g)
            kinds = ("none", "position", "position+time") if length == 4096 else ("none", "position+time")
            for kind in kinds:
                fns[f"hstu {name} bias={kind}"] = functools.partial(
                    triton_ops.attention_jagged, q, k, v, offsets, divisor=length, bias=random_bias(heads, length, kind, g),
                    times=times, max_len=length,
                )  # fmt: skip
            seen = timed_in_turns(fns, flops)
            record.measurements += seen
            for kind, result in zip(kinds, seen[-len(kinds) :]):
                ratios[f"{name} bias={kind}"] = {
                    "speed over flash": seen[0].median / result.median,
                    "time over no bias": result.median / seen[-len(kinds)].median,
                }
            if length == 4096 and not jagged:
                alone = [
                    shown(measure.measure(fns[of], name=f"{of}, alone", cuda_graph=True, min_time=0.5, work={"flops": flops}))
                    for of in (f"flash {name}", f"hstu {name} bias=none")
                ]
                record.measurements += alone
                ratios[f"{name} bias=none"]["speed over flash, each alone"] = alone[0].median / alone[1].median
    for name, ratio in ratios.items():
        print(f"{name:40s} {ratio['speed over flash']:.2f}x flash, {ratio['time over no bias']:.2f}x no bias")


def steps(record: measure.Record) -> None:
    """The attention kernel in steps, from plain PyTorch to the tuned one: B=32 H=4 N=4096 d=64, causal.

    The kernels in turns: one after another, a step that wins less than the clock loses would seem to be no step. PyTorch, whose
    call is as long as all of theirs and draws less power, would change the clock for them and is timed before.
    """
    batch, heads, length, d = 32, 4, 4096, 64
    g = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(batch * length, heads, d, device="cuda", generator=g).to(BF16) for _ in range(3))
    offsets = torch.arange(batch + 1, device="cuda") * length
    times = session_times(batch * length, g)
    flops = 4 * batch * heads * length**2 * d / 2
    dense = [x.view(batch, length, heads, d) for x in (q, k, v)]
    lengths = torch.full((batch,), length, device="cuda")

    def naive():
        for one in range(0, batch, 4):  # all at once would hold 60 GB of scores
            reference.attention_dense(*(x[one : one + 4] for x in dense), lengths[one : one + 4], divisor=length)

    record.measurements.append(timed(naive, "step 1 PyTorch, scores in memory", flops=flops, graph=False))
    plain = triton_tiles.Tiles(64, 64, 64, num_stages=1, group=batch * heads, exact=True, tma=False)
    change = functools.partial(dataclasses.replace, plain)
    fns = {
        name: functools.partial(
            triton_ops.attention_jagged, q, k, v, offsets, divisor=length, max_len=length, tiles=tiles, **options
        )
        for name, tiles, options in (
            ("step 2 tiled, every tile", plain, {"num_context": length}),  # a context that long sees itself whole
            ("step 3 masked tiles skipped", plain, {}),
            ("step 4 SiLU by tanh", change(exact=False), {}),
            ("step 5 three stages", change(exact=False, num_stages=3), {}),
            ("step 6 tensor memory accelerator", change(exact=False, num_stages=3, tma=True), {}),
            ("step 7 tuned tiles", None, {}),
            ("step 8 position bias", None, {"bias": random_bias(heads, length, "position", g)}),
            ("step 9 position and time bias", None, {"bias": random_bias(heads, length, "position+time", g), "times": times}),
        )
    }
    record.measurements += timed_in_turns(fns, flops)


def paged(record: measure.Record) -> None:
    """Decode against the copy bandwidth, extend against the larger of its two times (bytes, flops).

    A GPU that has warmed up is a slower GPU: a chunk and a matrix product are timed in turns, and then each alone for long enough
    that the clock has settled where it leaves it.
    """
    g = torch.Generator("cuda").manual_seed(0)
    results, shares = record.measurements, record.data.setdefault("share of roofline", {})
    alone = record.data.setdefault("share of roofline, each alone", {})
    copy, _ = ceilings(record)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=BF16) for _ in range(2))
    product = functools.partial(torch.mm, a, b)

    def cache(batch, length, heads, d, page):
        blocks = batch * length // page
        keys, values = (torch.randn(blocks, page, heads, d, device="cuda", generator=g, dtype=BF16) for _ in range(2))
        table = torch.randperm(blocks, device="cuda", generator=g).view(batch, -1)
        return keys, values, table, torch.full((batch,), length, device="cuda")

    cases = [(b, n, 1, 16, 64, 16) for b, n in ((1, 1024), (8, 1024), (64, 1024), (64, 2048), (128, 1024), (256, 1024))]
    cases += [(64, 1024, 1, 8, 128, 16), (64, 4096, 1, 4, 128, 16), (64, 1024, 1, 16, 64, 64)]
    cases += [(32, 4096, c, 4, d, page) for page in (64, 16) for d in (64, 128) for c in (32, 64, 128, 256, 512)]
    for batch, length, queries, heads, d, page in cases:
        keys, values, table, seq_lens = cache(batch, length, heads, d, page)
        q = torch.randn(batch * queries, heads, d, device="cuda", generator=g, dtype=BF16)
        offsets = torch.arange(batch + 1, device="cuda") * queries
        run = functools.partial(
            triton_ops.attention_paged, q, keys, values, table, offsets, seq_lens, divisor=length, max_queries=queries
        )
        moved = 2 * 2 * batch * heads * d * (length + queries)
        flops = 4 * batch * heads * d * queries * (length - queries / 2)
        name = f"{'decode' if queries == 1 else f'extend {queries}'} B={batch} N={length} H={heads} d={d} page={page}"
        if queries == 1:
            results.append(timed(run, name, flops=flops, moved=moved))
            shares[name] = moved / copy / results[-1].median
            print(f"{'':44s} {100 * shares[name]:.0f} % of copy")
            continue
        fns = {f"matrix product 8192 beside {name}": product, name: run}
        work = dict(zip(fns, ({"flops": 2 * 8192**3}, {"flops": flops, "bytes": moved})))
        turns = measure.measure_in_turns(fns, cuda_graph=True, work=work, **LONG_ENOUGH)
        apart = [
            measure.measure(fn, name=f"{of}, alone", cuda_graph=True, min_time=0.25, work=work[of]) for of, fn in fns.items()
        ]
        for held, (ceiling, chunk) in ((shares, turns), (alone, apart)):
            results += [shown(ceiling), shown(chunk)]
            held[name] = max(moved / copy, flops / ceiling.flops_per_second) / chunk.median
        bound = "bytes" if moved / copy > flops / turns[0].flops_per_second else "flops"
        print(f"{'':44s} {100 * shares[name]:.0f} % of roofline ({bound}) in turns, {100 * alone[name]:.0f} % each alone")
    for kind in ("position", "position+time"):
        batch, length, heads, d = 64, 1024, 16, 64
        keys, values, table, seq_lens = cache(batch, length, heads, d, 16)
        slot_times = session_times(batch * length, g).view(-1, 16)
        q = torch.randn(batch, heads, d, device="cuda", generator=g, dtype=BF16)
        run = functools.partial(
            triton_ops.attention_paged, q, keys, values, table, torch.arange(batch + 1, device="cuda"), seq_lens, divisor=length,
            max_queries=1, bias=random_bias(heads, length, kind, g), query_times=slot_times.max().expand(batch).contiguous(),
            slot_times=slot_times,
        )  # fmt: skip
        results.append(
            timed(run, f"decode B={batch} N={length} H={heads} d={d} bias={kind}", moved=4 * batch * heads * d * length)
        )


def ceilings(record: measure.Record) -> tuple[float, float]:
    """(bytes a second of a device copy, flops a second of an 8192^3 bf16 product), measured and kept in the record."""
    copy = measure.peak_copy_bandwidth("cuda")
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=BF16) for _ in range(2))
    product = timed(lambda: a @ b, "matrix product 8192", flops=2 * 8192**3, graph=False)
    print(f"{'copy':44s} {copy.bytes_per_second / 1e12:.2f} TB/s")
    record.measurements += [copy, product]
    return copy.bytes_per_second, product.flops_per_second


def calibration(record: measure.Record) -> None:
    """What `roofline.calibrated` wants to know: a launch, square products of many sizes, attention programs that run alone."""
    ceilings(record)
    add = record.measurements.append
    small = torch.zeros(32, device="cuda")
    add(timed(lambda: small.add_(1), "smallest kernel"))
    for n in (256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192):
        pairs = range(max(1, min(12, 2**26 // n**2)))  # together larger than L2
        inputs = [tuple(torch.randn(n, n, device="cuda", dtype=BF16) for _ in range(2)) for _ in pairs]
        add(timed(torch.mm, f"square product {n}", flops=2 * n**3, inputs=inputs))
    g = torch.Generator("cuda").manual_seed(0)
    for kind in roofline.INSTRUCTIONS:
        for steps in (1, 8):
            length = steps * roofline.STEP
            q, k, v = (torch.randn(length, 1, 64, device="cuda", generator=g).to(BF16) for _ in range(3))
            bias, times = random_bias(1, length, kind, g), session_times(length, g)
            tiles = triton_tiles.default_tiles(BF16, 64, 512, 128, bias)  # those of a batch of 8
            offsets = torch.tensor([0, length], device="cuda")
            run = functools.partial(
                triton_ops.attention_jagged, q, k, v, offsets, divisor=length, bias=bias, times=times, max_len=length, tiles=tiles
            )
            add(timed(run, f"one program alone, {steps} steps, bias={kind}"))
    kernel = triton_compile.compile_kernel("attention", 90, length=512)
    shared = torch.cuda.get_device_properties(0).shared_memory_per_multiprocessor
    registers = 32 * kernel.num_warps * (-(-kernel.registers // 8) * 8)
    record.data["programs an SM"] = min(65536 // registers, shared // (kernel.shared_bytes + 1024))


@triton.jit
def special_kernel(Out, rounds, OPERATION: tl.constexpr):
    """`rounds` special functions, one after another, on each of 1,024 numbers a program."""
    at = tl.arange(0, 1024)
    x = at.to(tl.float32) / 1024
    for _ in range(rounds):
        x = tl.inline_asm_elementwise(OPERATION, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    tl.store(Out + at, x)


def special(record: measure.Record) -> None:
    """How many special functions an SM does: tanh against an exponential."""
    out, rounds = torch.empty(1024, device="cuda"), 512
    programs = 16 * torch.cuda.get_device_properties(0).multi_processor_count
    for operation in ("tanh.approx.f32", "ex2.approx.ftz.f32"):
        run = functools.partial(special_kernel[(programs,)], out, rounds, f"{operation} $0, $1;", num_warps=4)
        work = {"special functions": programs * 1024 * rounds}
        result = measure.measure(run, name=operation, repeats=20, min_time=0.06, cuda_graph=True, work=work)
        record.measurements.append(result)
        print(f"{operation:44s} {result.median * 1e6:9.1f} us  {work['special functions'] / result.median / 1e12:.2f} T a second")


def memory(record: measure.Record) -> None:
    """Norms, gather and jagged copies against the copy bandwidth; every tensor far larger than L2."""
    copy, _ = ceilings(record)
    shares = record.data.setdefault("share of copy bandwidth", {})

    def add(fn, name, moved):
        record.measurements.append(timed(fn, name, moved=moved))
        shares[name] = record.measurements[-1].bytes_per_second / copy
        print(f"{'':44s} {100 * shares[name]:.0f} % of copy")

    for width in (256, 1024, 4096):
        rows = 2**28 // width
        x, gate = (torch.randn(rows, width, device="cuda", dtype=BF16) for _ in range(2))
        weight, bias = (torch.randn(width, device="cuda", dtype=BF16) for _ in range(2))
        norm_gate = functools.partial(triton_ops.norm_gate, x, gate, weight, bias, 1e-6)
        layer_norm = functools.partial(triton_ops.layer_norm, x, weight, bias, 1e-6)
        add(norm_gate, f"norm_gate {rows} x {width}", 3 * x.nbytes)
        add(layer_norm, f"layer_norm {rows} x {width}", 2 * x.nbytes)
    for width in (64, 256, 1024):
        rows, count = 2**28 // width, 2**27 // width
        tables = [torch.randn(rows, width, device="cuda", dtype=BF16) for _ in range(3)]
        ids = torch.randint(0, rows, (3, count), device="cuda")
        moved = 4 * 2 * count * width + ids.nbytes
        add(functools.partial(triton_ops.gather_sum, tables, ids), f"gather_sum 3 tables of {rows} x {width}", moved)
    lengths = torch.randint(1, 1025, (256,), generator=torch.Generator().manual_seed(0))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).cuda()
    total = int(lengths.sum())
    x = torch.randn(total, 1024, device="cuda", dtype=BF16)
    dense = triton_ops.jagged_to_dense(x, offsets, 1024)
    add(lambda: triton_ops.jagged_to_dense(x, offsets, 1024), "jagged_to_dense 256 x 1024 x 1024", x.nbytes + dense.nbytes)
    add(lambda: triton_memory.dense_to_jagged(dense, offsets, total), "dense_to_jagged 256 x 1024 x 1024", 2 * x.nbytes)


class GraphedStack:
    """The stack of a preset over sequences of one length, captured in a CUDA graph. `x` (B * N, d_model) is its input."""

    def __init__(self, config, batch: int, length: int, ops=triton_ops):
        torch.manual_seed(0)
        self.model = HSTUStack(config, ops).eval().requires_grad_(False).to("cuda", BF16)
        for layer in self.model.layers:
            for parameter in (layer.position_bias, layer.time_bias):
                if parameter is not None:
                    torch.nn.init.normal_(parameter, std=0.5)
        self.offsets = torch.arange(batch + 1, device="cuda") * length
        self.times = session_times(batch * length, torch.Generator("cuda").manual_seed(0))
        self.x = torch.randn(batch * length, config.d_model, device="cuda", dtype=BF16)
        self.divisor, self.length = config.max_seq_len, length

    def __call__(self) -> Tensor:
        def attend(_, q, k, v, bias):
            return triton_ops.attention_jagged(
                q, k, v, self.offsets, divisor=self.divisor, bias=bias, times=self.times, num_context=1, max_len=self.length
            )

        return self.model(self.x, attend)


def stack(record: measure.Record) -> None:
    """The 12-layer gr-3b stack, history 512, bf16, replayed from a CUDA graph; with and without the bias."""
    copy, matmul = ceilings(record)
    for rab in ("position+time", "none"):
        config = preset("gr-3b").replace(rab=rab)
        for batch in (1, 8):
            run = GraphedStack(config, batch, 512)
            tokens, d = batch * 512, config.d_model
            attended = 4 * batch * config.num_heads * config.d_qk * 512**2 / 2
            flops = config.num_layers * (2 * tokens * d * 5 * d + attended)
            weights = config.num_layers * 5 * d * d * 2
            name = f"stack gr-3b B={batch} N=512 bias={rab}"
            result = timed(run, name, flops=flops)
            record.measurements.append(result)
            expected = run.model.float()(run.x.float(), oracle_attend(run))
            error = ((run.model.to(BF16)(run.x, oracle_attend(run)).float() - expected).norm() / expected.norm()).item()
            ours = ((run_once(run).float() - expected).norm() / expected.norm()).item()
            record.data[name] = {
                "floor seconds": max(flops / matmul, weights / copy), "GFLOP": flops / 1e9, "error to float32": ours,
                "error of bf16 reference operators": error,
            }  # fmt: skip
            print(f"{'':44s} {record.data[name]}")


def run_once(run: GraphedStack) -> Tensor:
    run.model.ops = triton_ops
    return run()


def oracle_attend(run: GraphedStack):
    run.model.ops = reference

    def attend(_, q, k, v, bias):
        return reference.attention_jagged(q, k, v, run.offsets, divisor=run.divisor, bias=bias, times=run.times, num_context=1)

    return attend


def ampere(record: measure.Record) -> None:
    """The sm_80 code path, proven here: its PTX is compiled by the driver for this GPU and compared with the oracle."""
    errors = record.data.setdefault("sm_80 PTX, relative error", {})
    g = torch.Generator("cuda").manual_seed(0)
    heads, d, lengths = 4, 64, [700, 1, 0, 129, 512]
    offsets = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    total, longest, batch = sum(lengths), max(lengths), len(lengths)
    q, k, v = (torch.randn(total, heads, d, device="cuda", generator=g).to(BF16) for _ in range(3))
    times = session_times(total, g)

    def check(name, got, expected):
        errors[name] = ((got.double() - expected.double()).norm() / expected.double().norm()).item()
        print(f"sm_80 {name:38s} error {errors[name]:.1e}")

    for bias in (None, random_bias(heads, longest, "position+time", g)):
        name = "attention" if bias is None else "attention_bias"
        tiles = triton_tiles.default_tiles(BF16, d, longest, batch * heads, bias, 80)
        sizes = {"batch": batch, "heads": heads, "total": total, "max_len": longest, "num_context": 1}
        plan = triton_bias.plan(tiles, bias, q.device, **sizes)
        out = torch.full_like(v, torch.nan)
        if bias is not None:
            kernel = triton_compile.compile_kernel("prepare", 80, d, longest)
            grid = plan.max_tiles * plan.parts, batch + heads
            launch_ptx(kernel, grid, plan.prepare_arguments(bias, times, offsets, None, d))
        strides = {f"{n}_{part}": s for n, x in (("q", q), ("k", k), ("v", v)) for part, s in zip(("row", "head"), x.stride())}
        launch_ptx(triton_compile.compile_kernel(name, 80, d, longest), (batch * heads * plan.max_tiles,), {
            "Q": q, "K": k, "V": v, "Out": out, "Offsets": offsets, **strides, **plan.attention_arguments(),
            "pairs": batch * heads, "heads": heads, "half_scale": 0.5 * d**-0.5, "out_scale": 1 / longest,
        })  # fmt: skip
        arguments = {"divisor": longest, "bias": bias, "times": times}
        check(name, out, reference.attention_jagged(q.float(), k.float(), v.float(), offsets, **arguments))

    x, gate = (torch.randn(999, 1024, device="cuda", generator=g).to(BF16) for _ in range(2))
    weight, bias = (torch.randn(1024, device="cuda", generator=g).to(BF16) for _ in range(2))
    out = torch.full_like(x, torch.nan)
    launch_ptx(triton_compile.compile_kernel("norm_gate", 80), (500,), {
        "X": x, "Gate": gate, "Weight": weight, "Bias": bias, "Out": out, "x_row": 1024, "gate_row": 1024, "rows": 999,
        "width": 1024, "eps": 1e-6,
    })  # fmt: skip
    check("norm_gate", out, reference.norm_gate(*(t.float() for t in (x, gate, weight, bias)), 1e-6))
    wide = torch.randn(512, 1024, device="cuda", generator=g).to(BF16) / 32
    out = torch.full((999, 512), torch.nan, device="cuda", dtype=BF16)
    launch_ptx(triton_compile.compile_kernel("project_silu", 80), (8 * 4,), {
        "X": x, "Weight": wide, "Bias": bias, "Out": out, "x_row": 1024, "residual_row": 0, "rows": 999, "columns": 512,
        "depth": 1024,
    })  # fmt: skip
    check("project_silu", out, reference.project_silu(x.float(), wide.float(), bias[:512].float()))


def launch_ptx(kernel: triton_compile.CompiledKernel, grid: tuple[int, ...], values: dict) -> None:
    """Load the kernel's PTX through the driver, which compiles it for this GPU, and launch it once.

    values: one for each of kernel.parameters; tensors for pointers. Raises RuntimeError naming the driver's call that failed.
    """
    driver = ctypes.CDLL("libcuda.so.1")

    def call(name, *arguments):
        if code := getattr(driver, name)(*arguments):
            raise RuntimeError(f"{kernel.name}: {name} answered {code}")

    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    call("cuModuleLoadData", ctypes.byref(module), kernel.ptx.encode())
    call("cuModuleGetFunction", ctypes.byref(function), module, kernel.entry.encode())
    call("cuFuncSetAttribute", function, 8, kernel.shared_bytes)  # 8: most dynamic shared memory
    kinds = {"fp32": ctypes.c_float, "i32": ctypes.c_int32}
    held = []
    for name, kind in kernel.parameters:
        value = values[name]
        held.append(ctypes.c_void_p(value.data_ptr()) if kind.startswith("*") else kinds[kind](value))
    scratch = kernel.ptx.split(".entry", 1)[1].split("{", 1)[0].count(".param") - len(held)
    held += [ctypes.c_void_p() for _ in range(scratch)]
    pointers = (ctypes.c_void_p * len(held))(*(ctypes.cast(ctypes.pointer(h), ctypes.c_void_p) for h in held))
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    x, y, z = (*grid, 1, 1)[:3]
    call("cuLaunchKernel", function, x, y, z, 32 * kernel.num_warps, 1, 1, kernel.shared_bytes, stream, pointers, None)
    torch.cuda.synchronize()
    call("cuModuleUnload", module)


def gpu_tests(record: measure.Record, files: list[str], workers: int) -> None:
    """Run the tests marked `gpu` in `files` and keep in the record what passed and failed."""
    report = pathlib.Path("gpu-tests.xml").absolute()
    command = [sys.executable, *f"-m pytest -q -m gpu -p no:cacheprovider --noconftest --junitxml={report}".split()]
    command += ["-n", str(min(workers, os.cpu_count() or 1))]  # compiling is most of the work
    subprocess.run([*command, *files], check=False)
    outcome: dict[str, list[str]] = {kind: list(record.data.get("tests", {}).get(kind, [])) for kind in ("passed", "failed")}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        if case.find("skipped") is None:
            bad = case.find("failure") is not None or case.find("error") is not None
            outcome["failed" if bad else "passed"].append(f"{case.get('classname')}::{case.get('name')}")
    report.unlink()
    record.data["tests"] = outcome
    print(f"GPU tests: {len(outcome['passed'])} passed, {len(outcome['failed'])} failed {outcome['failed']}")


def tests(record: measure.Record) -> None:
    """The GPU tests of the kernels that this module times, and of the clock."""
    gpu_tests(record, [f"tests/test_{name}.py" for name in TESTED], workers=16)


def serving(record: measure.Record) -> None:
    """The GPU tests of the other Triton kernels: decode, serving, cache, encoder (which wants vLLM)."""
    files = sorted(pathlib.Path("tests").glob("test_triton_*.py"))
    gpu_tests(record, [str(path) for path in files if path.stem.removeprefix("test_") not in TESTED], workers=16)


TESTED = ("triton_attention", "triton_paged", "triton_memory", "triton_ops", "triton_compile", "measure")
PARTS = {
    "tests": ("correctness", tests),
    "serving": ("correctness", serving),
    "ampere": ("correctness", ampere),
    "attention": ("attention", attention),
    "steps": ("steps", steps),
    "paged": ("paged", paged),
    "memory": ("memory", memory),
    "calibration": ("calibration", calibration),
    "special": ("calibration", special),
    "stack": ("stack", stack),
}


def read_records(name: str = "triton", device: str = "nvidia-h200") -> dict[str, measure.Record]:
    """The records of a run of all parts, by what follows `name` in theirs. Raises MeasureError where one is missing."""
    written = dict.fromkeys(record for record, _ in PARTS.values())  # several parts write one
    return {record: measure.read_record(f"{name}_{record}", device) for record in written}


def paged_target(case: str) -> float | None:
    """The share of its roofline that a case of `paged` is held to; None for decode of few users, which do not fill a GPU."""
    if case.startswith("extend"):
        return 0.6
    return 0.75 if int(case.split("B=")[1].split()[0]) >= 64 else None


def ledger(records: Mapping[str, measure.Record]) -> list[measure.Goal]:
    """What the kernels were to reach, and what the records say. Ratios to flash are of causal bf16, 32 users, 4 heads."""
    ratios, paged = records["attention"].data["ratios"], records["paged"].data
    plain = {d: ratios[f"d={d} N=4096 bias=none"] for d in (64, 128)}
    goals = [
        measure.Goal(f"d={d}, N=4096: speed over flash", plain[d]["speed over flash"], target)
        for d, target in ((64, 1.35), (128, 1.6))
    ]
    goals.append(measure.Goal("d=128, N=4096, each alone", plain[128]["speed over flash, each alone"], 1.6))
    slowest = min(ratio["speed over flash"] for case, ratio in ratios.items() if case.endswith("none"))
    goals.append(measure.Goal("slowest case without bias: speed over flash", slowest, 1.0))
    for d in plain:
        times = ratios[f"d={d} N=4096 bias=position+time"]["time over no bias"]
        goals.append(measure.Goal(f"d={d}: fused bias, time over none", times, 1.5, at_least=False))
    for what, target, shares in (
        ("decode, batch >= 64: share", 0.75, paged["share of roofline"]),
        ("extend, slowest: share", 0.6, paged["share of roofline"]),
        ("extend, slowest, each alone", 0.6, paged["share of roofline, each alone"]),
    ):
        goals.append(measure.Goal(what, min(share for case, share in shares.items() if paged_target(case) == target), target))
    moved = min(records["memory"].data["share of copy bandwidth"].values())
    goals.append(measure.Goal("norms, gather, copies, slowest: share of copy", moved, 0.8))
    stack = stack_against_roofline(records)
    for users, milliseconds in ((1, 0.8), (8, 2)):
        _, recorded = stack[f"batch {users}, bias position+time"]
        goals.append(measure.Goal(f"stack, batch {users}, biased: ms", 1e3 * recorded, milliseconds, at_least=False))
    worst = max(recorded / predicted for predicted, recorded in stack.values())
    return [*goals, measure.Goal("stack: recorded over modelled, worst", worst, 1.3, at_least=False)]


def stack_against_roofline(records: Mapping[str, measure.Record]) -> dict[str, tuple[float, float]]:
    """Seconds of the `gr-3b` stack as the roofline predicts them from the run's own calibration, and as recorded, by case."""
    gpu = roofline.calibrated(hardware.DEVICES["H200-SXM-141GB"], records["calibration"])
    rows = {}
    for users in (1, 8):
        for kind in ("none", "position+time"):
            operators = roofline.stack(preset("gr-3b").replace(rab=kind), users, 512)
            predicted = roofline.total([roofline.predict(operator, gpu) for operator in operators])
            rows[f"batch {users}, bias {kind}"] = predicted, records["stack"][f"stack gr-3b B={users} N=512 bias={kind}"].median
    return rows


def source() -> str:
    """A digest of the kernels' sources: records that name the same one are of the same code."""
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(reference.__file__).parent.rglob("*.*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def run_parts(parts: dict[str, tuple[str, Callable]], command: str, out: pathlib.Path | None, resume: bool = False) -> None:
    """Run {part: (name of its record, function of the record)} in that order; a record is written after each of its parts.

    A record names the parts that it holds and the `source` that they ran. With `resume`, this device's records of the same source
    are continued, and parts that they hold are left out: a run that was cut short loses only the part it was in.
    """
    code, records = source(), {}
    for part, (name, run) in parts.items():
        if name not in records:
            records[name] = measure.Record.here(name, command=command, data={"source": code, "parts": []})
            if resume:
                records[name] = _begun(records[name], out) or records[name]
        record = records[name]
        if part in record.data["parts"]:
            print(f"--- {part}: in {record.path} already", flush=True)
            continue
        print(f"--- {part}", flush=True)
        with torch.no_grad():
            run(record)
        torch.cuda.empty_cache()
        record.data["parts"].append(part)
        measure.write_record(record, out)


def _begun(fresh: measure.Record, out: pathlib.Path | None) -> measure.Record | None:
    """The record that an earlier run of the same source left on this device, if any."""
    found = measure.earlier(fresh, out)
    return found if found and found.data.get("source") == fresh.data["source"] else None


def parts_parser(about: str, parts: Iterable[str]) -> argparse.ArgumentParser:
    """The command line of a program of parts: `parts`, all where none is named, and `out`. `about` is its module's docstring."""
    known = list(parts)

    def part(name: str) -> str:
        if name not in known:
            raise argparse.ArgumentTypeError(f"there is no part {name!r}: use some of {', '.join(known)}")
        return name

    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("parts", nargs="*", type=part, default=known, metavar="part", help=f"{', '.join(known)} (default: all)")
    parser.add_argument("--out", type=pathlib.Path, help="folder for the records (default: data/measured)")
    return parser


def main() -> None:
    parser = parts_parser(__doc__, PARTS)
    parser.add_argument(
        "--resume", action="store_true", help="leave out parts that the records there hold already, of the same code"
    )
    parser.add_argument("--name", default="triton", help="what the records' names begin with (default: %(default)s)")
    arguments = parser.parse_args()
    measure.check_name(arguments.name)
    measure.require_gpu()
    parts = {part: (f"{arguments.name}_{PARTS[part][0]}", PARTS[part][1]) for part in arguments.parts}
    command = "python -m hstu_lab.kernel_bench" + ("" if arguments.name == "triton" else f" --name {arguments.name}")
    run_parts(parts, command, arguments.out, arguments.resume)


if __name__ == "__main__":
    main()
