"""What `tensorrt_bench` compares engines with: the same parts in PyTorch (eager, compiled, Triton operators), ONNX Runtime."""

from __future__ import annotations

import collections
import copy
import itertools
import pathlib
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from hstu_lab import tensorrt_bench as bench
from hstu_lab.measure import measure

WORK = (
    *((part, 512, batch) for part in ("stack", "ranker", "encoder") for batch in bench.BATCHES),
    *(("stack", length, batch) for length in bench.BUCKETS if length != 512 for batch in bench.BATCHES),
)
"""(part, length, batch)."""
MODES = {"eager": None, "torch.compile": "default", "torch.compile max-autotune": "max-autotune-no-cudagraphs"}
TRITON = "Triton ops"


class Peers:
    """gr-3b's parts in fp16 on the GPU (norms and pointwise operators in float32 where autocast says so), and inputs."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        config, self.parts, model = bench.make_parts()
        for module in (model, *self.parts.values()):
            module.cuda().half()
        self.config = config

    def feed(self, part: str, length: int, batch: int, full: bool = True) -> dict[str, torch.Tensor]:
        given = bench.make_inputs(bench.Case(part, "fp16", length), batch, self.config, full)
        tensors = {name: torch.from_numpy(value).cuda() for name, value in given.items()}
        return {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}

    def runner(self, part: str, mode: str) -> Callable[[dict[str, torch.Tensor]], Callable[[], tuple | torch.Tensor]]:
        """A function of the inputs that gives what is to be timed."""
        if mode == TRITON:
            return {"stack": self._triton_stack, "ranker": self._triton_ranker}[part]
        module = self.parts[part]
        if MODES[mode] is not None:
            torch.compiler.reset()  # one module's code is compiled for eight shapes at most
            module = torch.compile(module, mode=MODES[mode], dynamic=False)
        return lambda feed: lambda: module(**feed)

    def _triton_stack(self, feed: dict[str, torch.Tensor]):
        part, lengths = self.parts["stack"], feed["lengths"].tolist()
        stack, offsets = _with_triton(part.stack), _offsets(lengths)
        x, times = (torch.cat([row[:n] for row, n in zip(feed[name], lengths)]) for name in ("x", "times"))
        longest = max(lengths)

        def run():
            hidden = stack.jagged(x, offsets, times, max_len=longest)[offsets[1:] - 1]
            logits = F.normalize(hidden, dim=-1) @ part.item_matrix.t() / self.config.temperature + part.shift
            return logits, hidden

        return run

    def _triton_ranker(self, feed: dict[str, torch.Tensor]):
        part, lengths, count = self.parts["ranker"], feed["lengths"].tolist(), bench.CANDIDATES
        stack, offsets = _with_triton(part.stack), _offsets([n + count for n in lengths])
        rows = zip(feed["x_history"], feed["x_candidates"], feed["times"], lengths)
        pieces = [(torch.cat([h[:n], c]), torch.cat([t[:n], t[n - 1].expand(count)])) for h, c, t, n in rows]
        x, times = (torch.cat(each) for each in zip(*pieces))
        number, longest = torch.full((len(lengths),), count, device=x.device), max(lengths) + count
        ranked = offsets[1:].unsqueeze(1) - count + torch.arange(count, device=x.device)
        return lambda: part.heads(stack.jagged(x, offsets, times, number, longest)[ranked]).sigmoid()


def compile_only(folder: pathlib.Path, modes: list[str], work=WORK) -> None:
    """Fill PyTorch's and Triton's compile caches, so that a later run only measures."""
    peers, results = Peers(folder), bench.Results(folder / f"compile-{'-'.join(modes).replace(' ', '-')}.log")

    def once(name: str, part: str, length: int, batch: int, mode: str) -> None:
        start = time.perf_counter()
        with torch.inference_mode(), torch.autocast("cuda", torch.float16):
            peers.runner(part, mode)(peers.feed(part, length, batch))()
        torch.cuda.synchronize()
        results.add(name=name, seconds=time.perf_counter() - start)

    for mode, *task in _tasks(modes, work):
        results.guarded(_name(*task, mode), once, *task, mode)


def torch_side(folder: pathlib.Path, modes: list[str], work=WORK) -> None:
    """PyTorch's times in fp16 replayed from CUDA graphs, errors against fp32, and kernels by name."""
    peers = Peers(folder)
    results = bench.Results(folder / f"torch-{'-'.join(modes).replace(' ', '-')}.jsonl")

    def timed(name: str, part: str, length: int, batch: int, mode: str) -> None:
        runner = peers.runner(part, mode)
        with torch.inference_mode(), torch.autocast("cuda", torch.float16):
            answer = runner(peers.feed(part, length, batch, full=False))()
            answer = answer if isinstance(answer, tuple) else (answer,)
            with np.load(bench.Case(part, "fp16", length).data(folder, batch)) as stored:
                errors = {
                    key: bench.error(a.float().cpu().numpy(), stored[f"expected {key}"])
                    for key, a in zip(bench.OUTPUTS[part], answer)
                }
            run = runner(peers.feed(part, length, batch))
            result = measure(run, name=name, cuda_graph=True, repeats=30, min_time=0.3)
            launched = measure(run, name=name, repeats=20, min_time=0.2, device="cuda")
        results.add(name=name, samples=list(result.samples), calls=result.calls, clock=result.clock, errors=errors)
        results.add(name=f"{name}, launched", samples=list(launched.samples), calls=launched.calls, clock=launched.clock)
        results.guarded(f"{name} kernels", kernels, run)

    def kernels(name: str, run) -> None:
        with torch.inference_mode(), torch.autocast("cuda", torch.float16):
            results.add(name=name, kernels=_kernels(run))

    for mode, *task in _tasks(modes, work):
        results.guarded(_name(*task, mode), timed, *task, mode)


def _tasks(modes: list[str], work) -> list[tuple[str, str, int, int]]:
    """(mode, part, length, batch) of all that can run: the encoder has no operators of ours."""
    return [(mode, *task) for mode in modes for task in work if not (mode == TRITON and task[0] == "encoder")]


def _name(part: str, length: int, batch: int, mode: str) -> str:
    return f"{part}{'' if length == 512 else f'-{length}'} b{batch} {mode}"


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


def _with_triton(stack):
    """A shallow copy of a stack that runs our Triton operators."""
    from hstu_lab.ops import triton_ops

    stack = copy.copy(stack)
    stack.ops = triton_ops
    return stack


def _offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], device="cuda")


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
        results.guarded(f"{part} b{batch} ONNX Runtime CPU fp32", timed, bench.Case(part, "fp32", 512), batch)
