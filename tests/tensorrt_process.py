"""Engines in a process of another Python, joined by copies through a pipe: on the project's H200 the full TensorRT lives in
Python 3.11, PyTorch and vLLM in 3.12. A test harness; where one Python has both, the product needs no such thing.

    python tests/tensorrt_process.py serve FOLDER tensorrt|onnxruntime     # the far side; imports no PyTorch
    python tests/tensorrt_process.py record CHECKPOINT FOLDER --python P   # unified requests, their answers and times as a record

FOLDER holds the parts exported with fixed sizes: `onnx_export.export(model, FOLDER, sizes={"length": 256, "candidates": 100})`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pathlib
import subprocess
import sys
import time

import numpy as np

BATCHES = (1, 1, 8)
"""Least, usual and largest batch of the engines."""


def send(file, **arrays) -> None:
    """One message: eight bytes of length, then the arrays (or strings) as .npz."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    file.write(len(buffer.getbuffer()).to_bytes(8, "little") + buffer.getvalue())
    file.flush()


def receive(file) -> dict[str, np.ndarray]:
    """The next message. Raises EOFError where the other side has gone."""
    length = file.read(8)
    if len(length) < 8:
        raise EOFError("the process with the engines has ended")
    with np.load(io.BytesIO(file.read(int.from_bytes(length, "little")))) as stored:
        return dict(stored)


# ---- the far side


def serve(folder: pathlib.Path, backend: str) -> None:
    """Answer {"part": name, inputs...} with that part's outputs, or {"error": text}, until the pipe closes."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get between the messages
    with contextlib.ExitStack() as stack:
        label, run = {"tensorrt": _tensorrt, "onnxruntime": _onnxruntime}[backend](folder, stack)
        send(answers, engine=label)
        with contextlib.suppress(EOFError):
            while True:
                message = receive(sys.stdin.buffer)
                try:
                    send(answers, **run(str(message.pop("part")), message))
                except Exception as error:
                    send(answers, error=f"{type(error).__name__}: {error}")


def _tensorrt(folder: pathlib.Path, stack: contextlib.ExitStack):
    from hstu_lab.tensorrt_engine import Engine, EngineCache, Request

    engines = {}
    for part in ("encoder", "stack", "ranker"):
        request = Request.of(folder / f"{part}.onnx", {"batch": BATCHES}, library="tensorrt")
        engines[part] = stack.enter_context(Engine(EngineCache(folder / "engines").get(request, progress=False)))
    header = engines["encoder"].header

    def run(part, arrays):
        types = {spec.name: spec.dtype for spec in engines[part].header.inputs}
        return engines[part].infer({name: array.astype(types[name], copy=False) for name, array in arrays.items()})

    return f"{engines['encoder'].library.label}, {header.precision}, {header.target}, in a process of its own", run


def _onnxruntime(folder: pathlib.Path, stack: contextlib.ExitStack):
    import onnxruntime

    sessions = {
        part: onnxruntime.InferenceSession(folder / f"{part}.onnx", providers=["CPUExecutionProvider"])
        for part in ("encoder", "stack", "ranker")
    }

    def run(part, arrays):
        names = [output.name for output in sessions[part].get_outputs()]
        return dict(zip(names, sessions[part].run(names, arrays)))

    return f"ONNX Runtime {onnxruntime.__version__}, in a process of its own", run


# ---- the near side


def remote_models(folder: pathlib.Path, python: str = sys.executable, backend: str = "tensorrt"):
    """A `PartModels` whose engines run in `python`; a context manager that ends the process."""
    from hstu_lab.onnx_models import PartModels, check_metadata, load_metadata_config
    from hstu_lab.tensorrt_build import _read_onnx

    class Remote(PartModels):
        def __init__(self):
            files = {part: _read_onnx(folder / f"{part}.onnx") for part in ("encoder", "stack", "ranker")}
            found = {entry.key: entry.value for entry in files["encoder"].metadata_props}
            self.metadata = check_metadata(folder / "encoder.onnx", "encoder", found)
            self.config = load_metadata_config(folder / "encoder.onnx", found)
            self.checkpoint, self.precision = found["checkpoint"], found["precision"]
            sizes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in files["ranker"].graph.input}
            self.length, self.count = sizes["x_history"][1], sizes["x_candidates"][1]
            self.calls, self.seconds = 0, 0.0
            self._process = subprocess.Popen(
                [python, __file__, "serve", str(folder), backend], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).resolve().parents[1])},
            )  # fmt: skip
            self.engine = str(receive(self._process.stdout)["engine"])

        def _run(self, part, arrays):
            if part == "encoder":  # every token by itself: rows of the engine's length
                pieces = range(0, arrays["rows"].shape[1], self.length)
                parts = [self._ask(part, {k: v[:, at : at + self.length] for k, v in arrays.items()}) for at in pieces]
                return {"x": np.concatenate([piece["x"] for piece in parts], axis=1)}
            batch = len(arrays["lengths"])
            pieces = [slice(at, at + BATCHES[2]) for at in range(0, batch, BATCHES[2])]
            parts = [self._ask(part, {k: v[piece] for k, v in arrays.items()}) for piece in pieces]
            return {name: np.concatenate([piece[name] for piece in parts]) for name in parts[0]}

        def _ask(self, part, arrays):
            start = time.perf_counter()
            sizes = {"x_candidates": self.count}
            kept = arrays["x_candidates" if part == "ranker" else "rows"].shape[1] if part != "stack" else None
            padded = {k: v if v.ndim == 1 else _pad(v, sizes.get(k, self.length), k) for k, v in arrays.items()}
            send(self._process.stdin, part=part, **padded)
            answer = receive(self._process.stdout)
            if "error" in answer:
                raise RuntimeError(str(answer["error"]))
            self.calls, self.seconds = self.calls + 1, self.seconds + time.perf_counter() - start
            return {name: array[:, :kept] if part != "stack" else array for name, array in answer.items()}

        def close(self):
            self._process.stdin.close()
            self._process.wait(30)
            self._process.stdout.close()

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.close()

    return Remote()


def _pad(array: np.ndarray, length: int, name: str) -> np.ndarray:
    if array.shape[1] > length:
        raise ValueError(f"{name} has {array.shape[1]} columns, the engines take {length}")
    return np.pad(array, [(0, 0), (0, length - array.shape[1])] + [(0, 0)] * (array.ndim - 2))


def unify(recommender, models):
    """Make `models` the encoder and ranker of that recommender's strategy `unified`; tables and PyTorch stay on the host."""
    import torch

    from hstu_lab.strategies import Parts, Vllm
    from hstu_lab.vllm_engine import Engine, EngineOptions

    recommender.model.cpu()
    ops = "triton" if torch.cuda.is_available() else "reference"
    recommender._engine = Engine(recommender.checkpoint, EngineOptions(kv_cache_memory_bytes=64 << 20, ops=ops))
    parts = Parts(recommender.model, models)
    recommender._strategies["unified"] = Vllm(recommender._engine, parts, parts)


def record(checkpoint: pathlib.Path, folder: pathlib.Path, python: str, users: int) -> None:
    """`users` histories of the sample log through `unified` with TensorRT, both tasks, against PyTorch; each stage's time."""
    from hstu_lab.events import Catalog, read_events
    from hstu_lab.measure import Measurement, Record, data_root, write_record
    from hstu_lab.pipeline import Recommender
    from hstu_lab.settings import Settings

    log = read_events(data_root() / "sample" / "events.jsonl.gz", Catalog.load(checkpoint / "catalog.json"))
    histories = [log.history(user) for user in range(users)]
    measurements, data = [], {}
    with (
        Recommender(checkpoint, settings=Settings()) as recommender,
        remote_models(folder, python) as models,
    ):
        unify(recommender, models)
        for task in ("topk", "slate"):
            truth = recommender.recommend_batch(histories, task=task, strategy="eager")
            for history in histories[:3]:
                recommender.recommend(history, task=task, strategy="unified")
            answers = [recommender.recommend(history, task=task, strategy="unified") for history in histories]
            same = [a.candidates == b.candidates for a, b in zip(answers, truth)]
            tens = [[i.row for i in a.items] == [i.row for i in b.items] for a, b in zip(answers, truth)]
            gaps = [abs(x.score - y.score) for a, b in zip(answers, truth) for x in a.items for y in b.items if x.row == y.row]
            if task == "topk":
                data["swaps"] = _swaps(recommender, histories, answers, truth)
            data[task] = {
                "requests": len(histories), "same candidates": sum(same), "same ten": sum(tens), "largest score gap": max(gaps),
                "engines": answers[0].engines,
            }  # fmt: skip
            for stage in answers[0].stages:
                samples = [a.stages[stage] / 1e3 for a in answers]
                measurements.append(Measurement(f"{task} {stage}", tuple(samples), clock="wall"))
            measurements.append(Measurement(f"{task} total", tuple(a.total_ms / 1e3 for a in answers), clock="wall"))
        data["remote calls"] = {"count": models.calls, "mean seconds": models.seconds / models.calls}
        made = Record.here(
            "tensorrt_unified", measurements=measurements, data=data,
            note="strategy unified, one request at a time: encoder and ranker in TensorRT in a process of its own, joined by "
            "copies "
            "through a pipe; stack in vLLM; compared with strategy eager on the host",
        )  # fmt: skip
        made.versions["tensorrt"] = models.engine.split(",")[0].removeprefix("TensorRT ")
        print(write_record(made))
        print("swaps", data["swaps"])
        for task in ("topk", "slate"):
            print(task, data[task])
        for each in measurements:
            print(each)


def _swaps(recommender, histories, answers, truth) -> list[float]:
    """Where two lists differ: how far PyTorch's fp32 logits of the two items lie apart, relative to the largest."""
    import torch

    from hstu_lab.ops.reference import jagged_to_dense

    model, found = recommender.model, []
    for history, ours, right in zip(histories, answers, truth):
        if ours.candidates == right.candidates:
            continue
        batch, _ = recommender.prepare([history])
        with torch.inference_mode():
            tokens, offsets = batch.tokens, batch.offsets
            longest = len(tokens)
            x, times = (
                jagged_to_dense(v, offsets, longest) for v in (model.embed(tokens, offsets), model.times(tokens, offsets))
            )
            logits = model.logits(model.stack.dense(x, batch.lengths, times)[:, -1])[0]
        scale = logits[logits.isfinite()].abs().max()
        found += [float(abs(logits[a] - logits[b]) / scale) for a, b in zip(ours.candidates, right.candidates) if a != b]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    far = steps.add_parser("serve")
    far.add_argument("folder", type=pathlib.Path)
    far.add_argument("backend", choices=("tensorrt", "onnxruntime"))
    near = steps.add_parser("record")
    near.add_argument("checkpoint", type=pathlib.Path)
    near.add_argument("folder", type=pathlib.Path)
    near.add_argument("--python", default=sys.executable)
    near.add_argument("--users", type=int, default=30)
    options = parser.parse_args()
    if options.step == "serve":
        serve(options.folder, options.backend)
    else:
        record(options.checkpoint, options.folder, options.python, options.users)


if __name__ == "__main__":
    main()
