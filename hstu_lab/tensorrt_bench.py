"""gr-3b's stack, encoder and ranker in the full TensorRT at fixed lengths, against the same operators in PyTorch.

    python -m hstu_lab.tensorrt_bench export FOLDER     # the ONNX files; any machine with the exporter
    python -m hstu_lab.tensorrt_bench strip FOLDER TO   # the same files without weights, to carry elsewhere,
    python -m hstu_lab.tensorrt_bench fill FOLDER TO    # and with them again
    python -m hstu_lab.tensorrt_bench expected FOLDER   # outputs in PyTorch's fp32; a GPU
    python -m hstu_lab.tensorrt_bench torch FOLDER      # PyTorch's times; a GPU
    python -m hstu_lab.tensorrt_bench engines FOLDER    # engines, their errors and times; a GPU, TensorRT, no PyTorch
    python -m hstu_lab.tensorrt_bench record FOLDER     # both as one record in data/measured

Two processes, because TensorRT 8.6 and PyTorch may need two Pythons; what they share lies in FOLDER. Weights are random, made
from their names, so that both have the same ones. Results are kept case by case: a time limit costs the rest only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
import time
import traceback

import numpy as np

from hstu_lab.bench_weights import fill, make_weight, strip

CANDIDATES = 512
BATCHES = (1, 8)


@dataclasses.dataclass(frozen=True)
class Case:
    part: str
    precision: str
    length: int
    batches: tuple[int, ...] = BATCHES

    @property
    def name(self) -> str:
        return f"{self.part}-{self.precision}-{self.length}"

    def data(self, folder: pathlib.Path, batch: int) -> pathlib.Path:
        """Inputs and expected outputs, of whatever precision."""
        return folder / f"{self.part}-{self.length}-b{batch}.npz"

    @property
    def profiles(self) -> tuple[dict[str, tuple[int, int, int]], ...]:
        """One profile a batch size: each is tuned for exactly that."""
        return tuple({"batch": (b, b, b)} for b in self.batches)


CASES = (
    Case("encoder", "fp16", 512), Case("stack", "fp16", 512), Case("ranker", "fp16", 512, (1, 4)), Case("stack", "int8", 512),
    Case("stack", "fp16", 256), Case("stack", "fp16", 1024), Case("stack", "fp16", 128), Case("stack", "fp16", 64),
    Case("ranker", "int8", 512, (1, 4)), Case("encoder", "int8", 512), Case("stack", "fp32", 512),
    Case("stack", "fp16", 2048, (1,)),
)  # fmt: skip
"""The most telling first."""


def make_inputs(case: Case, batch: int, config, full: bool) -> dict[str, np.ndarray]:
    """Inputs of one case: `full` histories, or (for the errors) full ones and shorter ones mixed. Integers are int64."""
    rng = np.random.default_rng(case.length + batch)
    d, n = config.d_model, case.length
    x = rng.standard_normal((batch, n, d), dtype=np.float32)
    gaps = np.minimum(rng.pareto(0.7, (batch, n)) * 60, 86400).astype(np.int64)
    lengths = np.array([n if full or i % 2 == 0 else max(n * (i + 1) // (batch + 1), 1) for i in range(batch)])
    if case.part == "encoder":
        ids = {"action": config.num_actions, "gap_bucket": config.num_time_buckets}
        return {"rows": x * 0.1, **{name: rng.integers(0, high, (batch, n)) for name, high in ids.items()}}
    history = {"times": gaps.cumsum(axis=1), "lengths": lengths}
    if case.part == "stack":
        return {"x": x, **history}
    return {"x_history": x, "x_candidates": rng.standard_normal((batch, CANDIDATES, d), dtype=np.float32), **history}


def error(ours: np.ndarray, truth: np.ndarray) -> float:
    """Largest difference over the largest finite value; infinite where infinities or NaN differ."""
    finite = np.isfinite(truth)
    if (np.isfinite(ours) != finite).any():
        return float("inf")
    return float(np.abs(ours[finite].astype(np.float64) - truth[finite]).max() / np.abs(truth[finite]).max())


# ---- PyTorch's side


def make_parts(config=None):
    """The config, {part: module} and the model of gr-3b with the seeded weights; needs PyTorch, and no table but the items'."""
    import torch
    from torch import nn

    from hstu_lab.config import preset
    from hstu_lab.model import HSTU
    from hstu_lab.onnx_export import RankerPart, StackPart

    config = config or preset("gr-3b")

    class Items(nn.Module):
        """The item table as the model's only table."""

        def __init__(self):
            super().__init__()
            self.item = nn.Parameter(torch.from_numpy(make_weight("item", (config.num_items, config.d_model))))

        @property
        def store(self):
            return self

        def weight(self, _):
            return self.item

    model = HSTU(config, tables=Items())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "tables.item":
                parameter.copy_(torch.from_numpy(make_weight(name, tuple(parameter.shape))))
    model.eval().requires_grad_(False)
    return config, {"encoder": model.encoder, "stack": StackPart(model), "ranker": RankerPart(model)}, model


def export(folder: pathlib.Path, cases=CASES, config=None) -> None:
    """The ONNX file of every case; int8 is calibrated with one full history of another seed. A minute or two a length."""
    import onnx
    import torch

    from hstu_lab import onnx_export, onnx_precision

    config, parts, _ = make_parts(config)
    for part, length in dict.fromkeys((case.part, case.length) for case in cases):
        start, sizes = time.perf_counter(), {"length": length, "candidates": CANDIDATES}
        with torch.no_grad():
            program = onnx_export.trace(part, parts[part], config, sizes)
        plain = onnx_precision.fold_indices(program.model_proto)
        for case in (case for case in cases if (case.part, case.length) == (part, length)):
            scales = None
            if case.precision == "int8":
                seen = onnx_precision.calibrate(plain, [make_inputs(case, 3, config, True)])
                scales = onnx_precision.quiet_steps(seen)
                if part == "stack":
                    scales.pop(onnx_precision.quantisable(plain)[-1], None)
            made = plain if case.precision == "fp32" else onnx_precision.convert(plain, scales)
            onnx.helper.set_model_props(made, {"part": part, "precision": case.precision, "length": str(length)})
            (folder / f"{case.name}.onnx").write_bytes(made.SerializeToString())
        print(f"{part} {length}: {time.perf_counter() - start:.0f} s", flush=True)


def all_weights(config=None) -> dict[str, np.ndarray]:
    """Every float tensor that an export may hold, by part and name."""
    _, parts, _ = make_parts(config)
    states = {part: module.state_dict() for part, module in parts.items()}
    return {f"{part}/{k}": v.numpy() for part, state in states.items() for k, v in state.items() if v.is_floating_point()}


def expected(folder: pathlib.Path, cases=CASES, config=None) -> None:
    """The outputs of every case in PyTorch's fp32, without TF32."""
    import torch

    config, parts, model = make_parts(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = False
    model.to(device)
    parts["stack"].to(device)
    names = {"encoder": ("x",), "stack": ("logits", "hidden"), "ranker": ("probabilities",)}
    for case in {(c.part, c.length): c for c in cases}.values():
        for batch in case.batches:
            with torch.inference_mode():
                feed = {name: torch.from_numpy(v).to(device) for name, v in make_inputs(case, batch, config, False).items()}
                answer = parts[case.part](**feed)
            answer = answer if isinstance(answer, tuple) else (answer,)
            found = zip(names[case.part], (each.cpu().numpy() for each in answer))
            np.savez(case.data(folder, batch), **{f"expected {name}": value for name, value in found})
    print("expected outputs written", flush=True)


def torch_side(folder: pathlib.Path, autotune: bool = False) -> None:
    """PyTorch's times of the 512-event cases in fp16 (norms and pointwise in float32, as exported), replayed from CUDA graphs."""
    import torch

    from hstu_lab.measure import measure
    from hstu_lab.ops import reference

    config, parts, model = make_parts()
    model.cuda().half()
    parts["stack"].cuda().half()
    results = Results(folder / ("torch-autotune.jsonl" if autotune else "torch.jsonl"))
    edges = torch.tensor(reference.time_thresholds(config.num_time_buckets)).cuda()
    # Made inside, as the model does, they would be copied from the host, which a graph cannot hold.
    reference.time_bucket = lambda seconds, _: torch.bucketize(seconds, edges, right=True)

    def timed(name: str, run) -> None:
        with torch.inference_mode(), torch.autocast("cuda", torch.float16):
            result = measure(run, name=name, cuda_graph=True, repeats=30, min_time=0.3)
        results.add(name=name, samples=list(result.samples), calls=result.calls, clock=result.clock)

    work = [("stack", 1), ("stack", 8), ("ranker", 1), ("ranker", 4), ("encoder", 1), ("encoder", 8)]
    feeds = {}
    for part, batch in work:
        given = make_inputs(Case(part, "fp16", 512), batch, config, True)
        tensors = {name: torch.from_numpy(value).cuda() for name, value in given.items()}
        feeds[part, batch] = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
    modes = (
        {"torch.compile max-autotune": "max-autotune-no-cudagraphs"} if autotune else {"eager": None, "torch.compile": "default"}
    )
    if not autotune:
        for batch in BATCHES:
            results.guarded(f"stack b{batch} Triton ops", timed, _with_triton(parts["stack"], feeds["stack", batch], batch))
    for mode, argument in modes.items():
        for part, batch in work:
            run = parts[part] if argument is None else torch.compile(parts[part], mode=argument, dynamic=False)
            results.guarded(f"{part} b{batch} {mode}", timed, lambda run=run, feed=feeds[part, batch]: run(**feed))


def _with_triton(part, feed, batch: int):
    """The stack in our Triton operators on the same histories, jagged; logits as in the exported part."""
    import copy

    import torch

    from hstu_lab.ops import triton_ops

    stack = copy.copy(part.stack)
    stack.ops = triton_ops
    offsets = torch.arange(batch + 1, device="cuda") * 512
    x, times = feed["x"].flatten(0, 1), feed["times"].flatten()
    config = stack.config

    def attend(_, q, k, v, bias):
        return triton_ops.attention_jagged(
            q, k, v, offsets, divisor=config.max_seq_len, bias=bias, times=times, num_context=config.num_context, max_len=512
        )

    last = offsets[1:] - 1
    return lambda: part.logits(stack(x, attend)[last], part.item_matrix)


# ---- TensorRT's side


def engines(folder: pathlib.Path, cases=CASES, seconds: float = 1e9) -> None:
    """Build, check and time every case's engine, until `seconds` have passed."""
    from hstu_lab.tensorrt_build import EngineCache, Request
    from hstu_lab.tensorrt_library import find_library, gpu_name

    started, results = time.perf_counter(), Results(folder / "tensorrt.jsonl")
    library = find_library("tensorrt")
    results.add(name="library", version=library.version, gpu=gpu_name())
    for case in cases:
        if time.perf_counter() - started > seconds:
            results.add(name=case.name, error="no time left")
            continue

        def run(name: str, case: Case) -> None:
            request = Request.of(
                folder / f"{case.name}.onnx", case.profiles, precision=case.precision, workspace=4 << 30, library="tensorrt"
            )
            path = EngineCache(folder / "engines").get(request, progress=False)
            _check_and_time(path, case, folder, results)

        results.guarded(case.name, run, case)


def _check_and_time(path: pathlib.Path, case: Case, folder: pathlib.Path, results: Results) -> None:
    from hstu_lab.config import preset
    from hstu_lab.cuda_memory import DeviceArray, time_on_gpu
    from hstu_lab.tensorrt_engine import Engine

    config = preset("gr-3b")
    with Engine(path) as engine:
        types = {spec.name: spec.dtype for spec in engine.header.inputs}
        outputs = {spec.name for spec in engine.header.outputs}
        about = {"layers": engine.header.layers, "plan MB": engine.header.plan_bytes / 1e6, "build s": engine.header.seconds}
        for batch in case.batches:
            given = {k: v.astype(types[k]) for k, v in make_inputs(case, batch, config, False).items()}
            answer = engine.infer(given)
            with np.load(case.data(folder, batch)) as stored:
                errors = {name: error(answer[name], stored[f"expected {name}"]) for name in outputs}
                overlap = _overlap(answer, stored)
            full = {k: v.astype(types[k]) for k, v in make_inputs(case, batch, config, True).items()}
            on_gpu = {name: DeviceArray.of(value) for name, value in full.items()}
            made = {name: DeviceArray.of(np.zeros_like(answer[name])) for name in outputs}
            replay = engine.capture(on_gpu, made)
            samples = time_on_gpu(replay, engine.stream, repeats=100, calls=5)
            start = time.perf_counter()
            for _ in range(20):
                engine.infer(full, graph=True)
            host = (time.perf_counter() - start) / 20
            results.add(
                name=f"{case.name} b{batch}", samples=samples, calls=5, clock="cuda graph", errors=errors, overlap=overlap,
                seconds_with_host_copies=host, memory_mb=engine.device_bytes / 1e6, **about,
            )  # fmt: skip


def _overlap(answer, stored) -> float | None:
    """Mean share of the ten best items that agree."""
    if "logits" not in answer:
        return None
    best = [np.argsort(-logits, axis=1, kind="stable")[:, :10] for logits in (answer["logits"], stored["expected logits"])]
    return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(*best)]))


class Results:
    """One JSON line a result, on disk at once."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        path.write_text("")

    def add(self, **fields) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(fields) + "\n")
        told = {k: v for k, v in fields.items() if k != "samples"}
        if "samples" in fields:
            told["median ms"] = round(float(np.median(fields["samples"])) * 1e3, 4)
        print(json.dumps(told), flush=True)

    def guarded(self, name: str, run, *arguments) -> None:
        """Call run(name, *arguments); an exception becomes a result, so that the others still run."""
        try:
            run(name, *arguments)
        except Exception as error:
            traceback.print_exc(file=sys.stdout)
            self.add(name=name, error=f"{type(error).__name__}: {error}"[:500])


def record(folder: pathlib.Path) -> None:
    """Both sides as one record of this machine."""
    from hstu_lab.measure import Measurement, Record, write_record

    lines = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    measurements, data = [], {}
    for line in lines:
        name = line.pop("name")
        if "samples" in line:
            measurements.append(Measurement(name, tuple(line.pop("samples")), line.pop("calls"), line.pop("clock")))
        if line:
            data[name] = line
    note = "gr-3b with random weights; median of replays of a CUDA graph on one fixed set of buffers; errors against PyTorch fp32"
    made = Record.here("tensorrt_engines", measurements=measurements, data=data, note=note)
    made.versions["tensorrt"] = data["library"]["version"]
    print(write_record(made))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("export", "strip", "fill", "expected", "torch", "engines", "record"))
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("to", type=pathlib.Path, nargs="?", help="steps strip and fill: where to write")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further engine after so long")
    parser.add_argument("--max-autotune", action="store_true", help="step torch: time only torch.compile's slow mode")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.step in ("strip", "fill"):
        {"strip": strip, "fill": fill}[options.step](options.folder, options.to, all_weights())
    elif options.step == "engines":
        engines(options.folder, seconds=options.seconds)
    elif options.step == "torch":
        torch_side(options.folder, autotune=options.max_autotune)
    else:
        {"export": export, "expected": expected, "record": record}[options.step](options.folder)


if __name__ == "__main__":
    main()
