"""gr-3b's stack, encoder and ranker in the full TensorRT at fixed lengths, against the same operators in PyTorch.

    python -m hstu_lab.tensorrt_bench export FOLDER     # the ONNX files; any machine with the exporter
    python -m hstu_lab.tensorrt_bench strip FOLDER TO   # the same files without weights, to carry elsewhere,
    python -m hstu_lab.tensorrt_bench fill FOLDER TO    # and with them again
    python -m hstu_lab.tensorrt_bench expected FOLDER   # outputs in PyTorch's fp32; a GPU
    python -m hstu_lab.tensorrt_bench torch FOLDER      # PyTorch's times; a GPU
    python -m hstu_lab.tensorrt_bench engines FOLDER    # engines, their errors and times; a GPU, TensorRT, no PyTorch
    python -m hstu_lab.tensorrt_bench kernels FOLDER    # kernels of one run, from Nsight Compute's tables in FOLDER
    python -m hstu_lab.tensorrt_bench record FOLDER     # all as one record in data/measured

Two processes, because TensorRT 8.6 and PyTorch may need two Pythons; what they share lies in FOLDER. Weights are random, made
from their names, so that both have the same ones. Results are kept case by case: a time limit costs the rest only.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import pathlib
import re
import sys
import time
import traceback

import numpy as np

from hstu_lab.bench_weights import fill, make_weight, strip
from hstu_lab.onnx_precision import MASKED

CANDIDATES = 512
OUTPUTS = {"encoder": ("x",), "stack": ("logits", "hidden"), "ranker": ("probabilities",)}
BATCHES = (1, 8)
WORKSPACE = 16 << 30
KERNELS_FOR = 90
"""Compute capability of the GPU that the fused cases are for."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One engine. `loose`: the graph is float32 beside its Q/DQ, and TensorRT 8.6 may choose fp16 where that is quicker.
    `fused`: the layers are kernels of ours inside the engine, compiled for `KERNELS_FOR`."""

    part: str
    precision: str
    length: int
    batches: tuple[int, ...] = BATCHES
    loose: bool = False
    fused: bool = False

    @property
    def name(self) -> str:
        return f"{self.part}-{self.precision}{'-loose' * self.loose}{'-fused' * self.fused}-{self.length}"

    @property
    def file(self) -> str:
        """Name of its ONNX file: the loose fp16 engine and the fp32 one are made from the same."""
        same = self.loose and self.precision == "fp16"
        return f"{(dataclasses.replace(self, precision='fp32', loose=False) if same else self).name}.onnx"

    def file_for(self, batch: int) -> str:
        """The same for one batch: kernels of ours are cut into tiles for a number of histories."""
        return f"{self.name}-b{batch}.onnx" if self.fused else self.file

    def data(self, folder: pathlib.Path, batch: int) -> pathlib.Path:
        """Inputs and expected outputs, of whatever precision."""
        return folder / f"{self.part}-{self.length}-b{batch}.npz"


RANKED = (1, 2, 4, 8)
BUCKETS = (64, 128, 256, 512, 1024, 2048)
"""Lengths that histories are padded to."""
CASES = (
    *(Case("stack", precision, 512, fused=True) for precision in ("fp16", "int8")),
    Case("ranker", "fp16", 512, fused=True),
    *(Case("stack", precision, n, fused=True) for precision in ("fp16", "int8") for n in BUCKETS if n != 512),
    Case("encoder", "fp16", 512, loose=True), Case("encoder", "fp16", 512),
    Case("stack", "fp16", 512, loose=True), Case("stack", "fp16", 512),
    Case("ranker", "fp16", 512, RANKED), Case("ranker", "fp16", 512, RANKED, loose=True),
    Case("stack", "int8", 512), Case("stack", "int8", 512, loose=True),
    Case("ranker", "int8", 512, RANKED), Case("ranker", "int8", 512, RANKED, loose=True), Case("encoder", "int8", 512),
    *(Case("stack", "fp16", n, loose=loose) for n in BUCKETS if n != 512 for loose in (False, True)),
    Case("stack", "fp32", 512), Case("ranker", "fp32", 512, (1,)), Case("encoder", "fp32", 512),
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
    """Largest difference over the largest value, both of what is not masked; infinite where there is a NaN."""
    known = truth > MASKED / 2
    largest = np.abs(ours[known].astype(np.float64) - truth[known]).max() / np.abs(truth[known]).max()
    return float(np.nan_to_num(largest, nan=np.inf))


def masked(ours: np.ndarray, truth: np.ndarray) -> str:
    """How many of the masked values of `truth` are masked in `ours` too: "8 of 8"."""
    wanted = truth <= MASKED / 2
    return f"{int((ours[wanted] <= MASKED / 2).sum())} of {int(wanted.sum())}"


# ---- PyTorch's side


def make_parts(config=None):
    """The config, {part: module} and the model of gr-3b with the seeded weights; needs PyTorch, and no table but the items'."""
    import torch
    from torch import nn

    from hstu_lab.config import preset
    from hstu_lab.model import HSTU
    from hstu_lab.onnx_parts import RankerPart, StackPart

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

    from hstu_lab import onnx_export, onnx_precision, tensorrt_kernels
    from hstu_lab.tensorrt_parts import FUSED, REFERENCE

    config, parts, model = make_parts(config)
    for part, length, fused in dict.fromkeys((case.part, case.length, case.fused) for case in cases):
        start, sizes = time.perf_counter(), {"length": length, "candidates": CANDIDATES}
        with torch.no_grad():
            program = onnx_export.trace(part, FUSED[part](model).eval() if fused else parts[part], config, sizes)
        plain = onnx_precision.fold_indices(program.model_proto)
        scales = None
        for case in (case for case in cases if (case.part, case.length, case.fused) == (part, length, fused)):
            if case.precision == "int8" and scales is None:
                seen = onnx_precision.calibrate(plain, [make_inputs(case, 3, config, True)], REFERENCE if fused else ())
                scales = onnx_precision.quiet_steps(seen)
                if part == "stack":
                    scales.pop(onnx_precision.quantisable(plain)[-1], None)
            halves = case.precision != "fp32" and not (case.loose or fused)
            made = onnx_precision.convert(plain, scales if case.precision == "int8" else None, halves)
            onnx.helper.set_model_props(made, {"part": part, "length": str(length)})
            for file, batch in {case.file_for(batch): batch for batch in case.batches}.items():
                whole = tensorrt_kernels.fuse(made, KERNELS_FOR, batch) if fused else made
                (folder / file).write_bytes(whole.SerializeToString())
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
    for module in (model, *parts.values()):
        module.to(device)
    batches: dict[Case, set[int]] = {}
    for case in cases:
        batches.setdefault(Case(case.part, "fp32", case.length), set()).update(case.batches)
    for case, sizes in batches.items():
        for batch in sorted(sizes):
            with torch.inference_mode():
                feed = {name: torch.from_numpy(v).to(device) for name, v in make_inputs(case, batch, config, False).items()}
                answer = parts[case.part](**feed)
            answer = answer if isinstance(answer, tuple) else (answer,)
            found = zip(OUTPUTS[case.part], (each.cpu().numpy() for each in answer))
            np.savez(case.data(folder, batch), **{f"expected {name}": value for name, value in found})
    print("expected outputs written", flush=True)


# ---- TensorRT's side


def engines(
    folder: pathlib.Path,
    cases=CASES,
    seconds: float = 1e9,
    name: str = "tensorrt",
    built: bool = False,
    effort: int | None = None,
) -> None:
    """Build, check and time every case's engines, until `seconds` have passed; results go to NAME.jsonl.

    `built`: only those that are in the cache already, so that several processes may build and one alone measures.
    """
    from hstu_lab.tensorrt_library import find_library, gpu_name

    started, results = time.perf_counter(), Results(folder / f"{name}.jsonl")
    library = find_library("tensorrt")
    results.add(name="library", version=library.version, gpu=gpu_name())
    for case in cases:
        for batch in case.batches:
            title = f"{case.name} b{batch}{'' if effort is None else f' effort {effort}'}"
            if time.perf_counter() - started > seconds:
                results.add(name=title, error="no time left")
                continue
            if not built or _is_built(folder, case, batch):
                results.guarded(title, _check_and_time, case, batch, effort, built, folder, results)


def build(folder: pathlib.Path, cases=CASES, effort: int | None = None) -> None:
    """Only build the cases' engines."""
    for case in cases:
        for batch in case.batches:
            started = time.perf_counter()
            _cache(folder).get(_request(folder, case, batch, effort), progress=False)
            print(f"{case.name} b{batch}: built in {time.perf_counter() - started:.0f} s", flush=True)


def _cache(folder: pathlib.Path):
    from hstu_lab.tensorrt_build import EngineCache

    return EngineCache(folder / "engines")


def _fixed(folder: pathlib.Path, case: Case, batch: int) -> pathlib.Path:
    return folder / f"{case.file_for(batch).removesuffix('.onnx')}-b{batch}.onnx"


def _request(folder: pathlib.Path, case: Case, batch: int, effort: int | None = None):
    """An engine for exactly that batch: TensorRT 8.6 fuses more, and builds faster, where no size is free."""
    import onnx

    from hstu_lab.tensorrt_build import Request

    path = _fixed(folder, case, batch)
    if not path.exists():
        model = onnx.load(str(folder / case.file_for(batch)))
        for value in (*model.graph.input, *model.graph.output):
            dim = value.type.tensor_type.shape.dim[0]
            if dim.dim_param:
                dim.dim_value = batch
        del model.graph.value_info[:]
        _fold_look_ups(model.graph)
        partial = path.with_suffix(f".{os.getpid()}.part")
        partial.write_bytes(model.SerializeToString())
        partial.rename(path)
    return Request.of(path, precision=case.precision, workspace=WORKSPACE, library="tensorrt", effort=effort)


def _fold_look_ups(graph, most: int = 64 << 20) -> None:
    """Look up constant tables at constant indices (the position bias) here, where the result is at most `most` bytes."""
    from onnx import numpy_helper

    known = {tensor.name: tensor for tensor in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "Gather" and all(name in known for name in node.input)]:
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
        table, index = (numpy_helper.to_array(known[name]) for name in node.input)
        if table.nbytes // table.shape[axis] * index.size <= most:
            graph.initializer.append(numpy_helper.from_array(np.take(table, index, axis=axis), node.output[0]))
            graph.node.remove(node)
    used = {name for node in graph.node for name in node.input}
    for name in known.keys() - used:
        graph.initializer.remove(known[name])


def once(folder: pathlib.Path, cases=CASES, effort: int | None = None) -> None:
    """Run every case's engines once, for a profiler to watch."""
    from hstu_lab.config import preset
    from hstu_lab.tensorrt_engine import Engine

    for case in cases:
        for batch in case.batches:
            with Engine(_cache(folder).get(_request(folder, case, batch, effort), progress=False)) as engine:
                types = {spec.name: spec.dtype for spec in engine.header.inputs}
                engine.infer({k: v.astype(types[k]) for k, v in make_inputs(case, batch, preset("gr-3b"), True).items()})


def kernels(folder: pathlib.Path) -> None:
    """Seconds of each kernel of one run, by name, longest first, from what Nsight Compute said of step `once`, which is
    `ncu --csv --metrics gpu__time_duration.sum python -m hstu_lab.tensorrt_bench once ... > "FOLDER/ncu-CASE b8 effort 2.csv"`.
    """
    results = Results(folder / "ncu.jsonl")
    for path in sorted(folder.glob("ncu-*.csv")):
        spent: dict[str, float] = {}
        for row in csv.DictReader(line for line in path.read_text().splitlines() if line.startswith('"')):
            seconds = float(row["Metric Value"].replace(",", "")) * {"ns": 1e-9, "us": 1e-6}[row["Metric Unit"]]
            spent[row["Kernel Name"][:160]] = spent.get(row["Kernel Name"][:160], 0.0) + seconds
        if spent:
            longest = dict(sorted(spent.items(), key=lambda kv: -kv[1])[:20])
            results.add(name=f"{path.stem.removeprefix('ncu-')} kernels", kernels=longest, all_kernels=sum(spent.values()))


def _is_built(folder: pathlib.Path, case: Case, batch: int) -> bool:
    """Whether there is an engine of that case at some effort."""
    stem = _fixed(folder, case, batch).stem
    return any((folder / "engines").glob(f"{stem}-{case.precision}-*.engine"))


def _check_and_time(
    name: str, case: Case, batch: int, effort: int | None, built: bool, folder: pathlib.Path, results: Results
) -> None:
    from hstu_lab.config import preset
    from hstu_lab.cuda_memory import DeviceArray, time_on_gpu
    from hstu_lab.tensorrt_engine import Engine

    config, request = preset("gr-3b"), _request(folder, case, batch, effort)
    if built and not _cache(folder).path(request).is_file():
        return
    with Engine(_cache(folder).get(request, progress=False)) as engine:
        types = {spec.name: spec.dtype for spec in engine.header.inputs}
        given = {k: v.astype(types[k]) for k, v in make_inputs(case, batch, config, False).items()}
        answer = engine.infer(given)
        with np.load(case.data(folder, batch)) as stored:
            errors = {output: error(answer[output], stored[f"expected {output}"]) for output in answer}
            overlap = _overlap(answer, stored)
            alike = {output: masked(answer[output], stored[f"expected {output}"]) for output in ("logits",) if output in answer}
        full = {k: v.astype(types[k]) for k, v in make_inputs(case, batch, config, True).items()}
        on_gpu = {name: DeviceArray.of(value) for name, value in full.items()}
        made = {output: DeviceArray.of(np.zeros_like(value)) for output, value in answer.items()}
        replay = engine.capture(on_gpu, made)
        samples = time_on_gpu(replay, engine.stream, repeats=100, calls=5)
        start = time.perf_counter()
        for _ in range(20):
            engine.infer(full, graph=True)
        results.add(
            name=name, samples=samples, calls=5, clock="cuda graph", errors=errors, masked=alike, overlap=overlap,
            seconds_with_host_copies=(time.perf_counter() - start) / 20, memory_mb=engine.device_bytes / 1e6,
            layers=engine.header.layers, plan_mb=engine.header.plan_bytes / 1e6, build_seconds=engine.header.seconds,
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
            # An error is infinite where there is a NaN, which JSON cannot say.
            data[name] = json.loads(json.dumps(line), parse_constant=str)
    note = "gr-3b with random weights; median of replays of a CUDA graph on one fixed set of buffers; errors against PyTorch fp32"
    made = Record.here("tensorrt_engines", measurements=measurements, data=data, note=note)
    made.versions["tensorrt"] = data["library"]["version"]
    print(write_record(made))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = ("export", "strip", "fill", "expected", "compile", "torch", "onnxruntime", "build", "engines", "once", "kernels")
    parser.add_argument("step", choices=(*steps, "record"))
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("to", type=pathlib.Path, nargs="?", help="steps strip and fill: where to write")
    parser.add_argument("--only", default="", help="cases (steps compile and torch: PART-LENGTH) whose names match this")
    parser.add_argument("--batch", type=int, nargs="+", help="and of these batch sizes only")
    parser.add_argument("--effort", type=int, help="TensorRT's optimisation level, 0 to 5")
    parser.add_argument("--built", action="store_true", help="step engines: only those that have been built already")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further engine after so long")
    parser.add_argument("--name", default="tensorrt", help="step engines: results go to NAME.jsonl")
    parser.add_argument("--modes", nargs="+", default=["Triton ops", "eager", "torch.compile"], help="steps compile and torch")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    cases = [
        dataclasses.replace(case, batches=tuple(b for b in case.batches if not options.batch or b in options.batch))
        for case in CASES
        if re.search(options.only, case.name)
    ]
    if options.step in ("strip", "fill"):
        {"strip": strip, "fill": fill}[options.step](options.folder, options.to, all_weights())
    elif options.step == "export":
        export(options.folder, cases)
    elif options.step == "engines":
        engines(options.folder, cases, options.seconds, options.name, options.built, options.effort)
    elif options.step == "kernels":
        kernels(options.folder)
    elif options.step in ("build", "once"):
        {"build": build, "once": once}[options.step](options.folder, cases, options.effort)
    elif options.step in ("compile", "torch", "onnxruntime"):
        from hstu_lab import tensorrt_peers as peers

        if options.step == "onnxruntime":
            peers.onnxruntime_side(options.folder)
        else:
            work = [
                (part, length, batch)
                for part, length, batch in peers.WORK
                if re.search(options.only, f"{part}-{length}") and batch in (options.batch or (batch,))
            ]
            {"compile": peers.compile_only, "torch": peers.torch_side}[options.step](options.folder, options.modes, work)
    elif options.step == "expected":
        expected(options.folder, cases)
    else:
        record(options.folder)


if __name__ == "__main__":
    main()
