"""What `tensorrt_bench` compares engines with: the same parts in PyTorch (eager, compiled, Triton operators), ONNX Runtime."""

from __future__ import annotations

import collections
import pathlib
import time

import numpy as np
import torch

from hstu_lab import tensorrt_bench as bench
from hstu_lab.measure import measure

LENGTH = 512
WORK = (("stack", 1), ("stack", 8), ("ranker", 1), ("ranker", 8), ("encoder", 1), ("encoder", 8))
MODES = {"eager": None, "torch.compile": "default", "torch.compile max-autotune": "max-autotune-no-cudagraphs"}


class Peers:
    """gr-3b's parts in fp16 on the GPU (norms and pointwise operators in float32 where autocast says so), and inputs."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        config, self.parts, model = bench.make_parts()
        model.cuda().half()
        self.parts["stack"].cuda().half()
        self.config = config

    def feed(self, part: str, batch: int, full: bool = True) -> dict[str, torch.Tensor]:
        given = bench.make_inputs(bench.Case(part, "fp16", LENGTH), batch, self.config, full)
        tensors = {name: torch.from_numpy(value).cuda() for name, value in given.items()}
        return {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}

    def compiled(self, part: str, mode: str | None):
        return self.parts[part] if mode is None else torch.compile(self.parts[part], mode=mode, dynamic=False)


def compile_only(folder: pathlib.Path, modes: list[str], work=WORK) -> None:
    """Fill PyTorch's compile cache, so that a later run only measures."""
    peers, results = Peers(folder), bench.Results(folder / f"compile-{'-'.join(modes).replace(' ', '-')}.log")

    def once(name: str, part: str, batch: int, mode: str) -> None:
        start = time.perf_counter()
        with torch.inference_mode(), torch.autocast("cuda", torch.float16):
            peers.compiled(part, MODES[mode])(**peers.feed(part, batch))
        torch.cuda.synchronize()
        results.add(name=name, seconds=time.perf_counter() - start)

    for mode in modes:
        for part, batch in work:
            results.guarded(f"{part} b{batch} {mode}", once, part, batch, mode)


def torch_side(folder: pathlib.Path, modes: list[str], work=WORK) -> None:
    """PyTorch's times of the 512-event cases in fp16 replayed from CUDA graphs, errors against fp32, and kernels by name."""
    peers = Peers(folder)
    results = bench.Results(folder / f"torch-{'-'.join(modes).replace(' ', '-')}.jsonl")

    def timed(name: str, run, part: str = "", batch: int = 0) -> None:
        with torch.inference_mode(), torch.autocast("cuda", torch.float16):
            about = {}
            if part:
                answer = run(**peers.feed(part, batch, full=False))
                answer = answer if isinstance(answer, tuple) else (answer,)
                case = bench.Case(part, "fp16", LENGTH)
                with np.load(case.data(folder, batch)) as stored:
                    about["errors"] = {
                        key: bench.error(a.float().cpu().numpy(), stored[f"expected {key}"])
                        for key, a in zip(bench.OUTPUTS[part], answer)
                    }
            feed = peers.feed(part, batch) if part else {}
            result = measure(lambda: run(**feed), name=name, cuda_graph=True, repeats=30, min_time=0.3)
            launched = measure(lambda: run(**feed), name=name, repeats=20, min_time=0.2, device="cuda")
        results.add(name=name, samples=list(result.samples), calls=result.calls, clock=result.clock, **about)
        results.add(name=f"{name}, launched", samples=list(launched.samples), calls=launched.calls, clock=launched.clock)
        results.guarded(f"{name} kernels", kernels, run, feed)

    def kernels(name: str, run, feed) -> None:
        with torch.inference_mode(), torch.autocast("cuda", torch.float16):
            results.add(name=name, kernels=_kernels(lambda: run(**feed)))

    for mode in modes:
        if mode == "eager":
            for batch in bench.BATCHES:
                results.guarded(f"stack b{batch} Triton ops", timed, _with_triton(peers, batch))
        for part, batch in work:
            results.guarded(f"{part} b{batch} {mode}", timed, peers.compiled(part, MODES[mode]), part, batch)


def _kernels(run) -> dict[str, float]:
    """Seconds on the GPU of each kernel of one call, by name, longest first; twenty of them."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    spent: dict[str, float] = collections.defaultdict(float)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spent[event.name[:160]] += event.device_time_total / 1e6
    return dict(sorted(spent.items(), key=lambda kv: -kv[1])[:20])


def _with_triton(peers: Peers, batch: int):
    """The stack in our Triton operators on the same histories, jagged; logits as in the exported part."""
    import copy

    from hstu_lab.ops import triton_ops

    part, feed = peers.parts["stack"], peers.feed("stack", batch)
    stack = copy.copy(part.stack)
    stack.ops = triton_ops
    offsets = torch.arange(batch + 1, device="cuda") * LENGTH
    x, times = feed["x"].flatten(0, 1), feed["times"].flatten()
    config = stack.config

    def attend(_, q, k, v, bias):
        return triton_ops.attention_jagged(
            q, k, v, offsets, divisor=config.max_seq_len, bias=bias, times=times, num_context=config.num_context, max_len=LENGTH
        )

    last = offsets[1:] - 1
    return lambda: part.logits(stack(x, attend)[last], part.item_matrix)


def onnxruntime_side(folder: pathlib.Path) -> None:
    """ONNX Runtime's times of the 512-event files on this machine's CPU, all cores; the project has no GPU build of it."""
    import onnxruntime

    from hstu_lab.config import preset

    results = bench.Results(folder / "onnxruntime.jsonl")

    def timed(name: str, case: bench.Case, batch: int) -> None:
        session = onnxruntime.InferenceSession(str(folder / case.file), providers=["CPUExecutionProvider"])
        feed = bench.make_inputs(case, batch, preset("gr-3b"), True)
        result = measure(lambda: session.run(None, feed), name=name, warmup=1, repeats=5, min_time=0.5, device="cpu")
        results.add(name=name, samples=list(result.samples), calls=result.calls, clock=result.clock)

    for part, batch in (("stack", 1), ("ranker", 1), ("encoder", 1), ("stack", 8)):
        results.guarded(f"{part} b{batch} ONNX Runtime CPU fp32", timed, bench.Case(part, "fp32", LENGTH), batch)
