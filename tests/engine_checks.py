"""`Engine` on a GPU, checked by a Python that may lack PyTorch and pytest: `python tests/engine_checks.py FOLDER SCRATCH`.

FOLDER holds the parts with fixed sizes (see tensorrt_process.py). Prints one line a check and ends with status 1 if any failed.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import threading
import traceback

import numpy as np

from hstu_lab.cuda_memory import DeviceArray, call, time_on_gpu
from hstu_lab.tensorrt_build import BuildError
from hstu_lab.tensorrt_engine import Engine, EngineCache, EngineError, InputError, Request, StaleEngine
from hstu_lab.tensorrt_library import gpu_target
from hstu_lab.tensorrt_plan import DamagedEngine, read_engine, write_engine

PROFILES = ({"batch": (1, 1, 1)}, {"batch": (2, 4, 8)})


class Checks:
    def __init__(self, folder: pathlib.Path, scratch: pathlib.Path):
        self.folder, self.scratch = folder, scratch
        self.cache = EngineCache(scratch / "engines")
        self.path = self.cache.get(Request.of(folder / "ranker.onnx", PROFILES), progress=False)
        self.engine = Engine(self.path)

    def inputs(self, batch: int, seed: int = 0) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        made = {}
        for spec in self.engine.header.inputs:
            shape = tuple(batch if isinstance(d, str) else d for d in spec.dims)
            if spec.name == "lengths":
                made[spec.name] = rng.integers(1, self.engine.header.inputs[0].dims[1], shape).astype(spec.dtype)
            elif spec.name == "times":
                made[spec.name] = rng.integers(0, 5000, shape).cumsum(axis=1).astype(spec.dtype)
            else:
                made[spec.name] = rng.standard_normal(shape, np.float32).astype(spec.dtype)
        return made

    def check_answers_are_those_of_the_file(self):
        import onnx
        from onnx.reference import ReferenceEvaluator

        given = self.inputs(2, 5)
        wide = {k: v.astype(np.int64) if "int" in str(v.dtype) else v for k, v in given.items()}
        truth = ReferenceEvaluator(onnx.load(str(self.folder / "ranker.onnx"))).run(["probabilities"], wide)[0]
        ours = self.engine.infer(given)["probabilities"]
        worst = np.abs(ours - truth).max()
        assert worst < 1e-4, worst
        return f"largest difference {worst:.1e}"

    def check_gpu_memory_is_read_where_it_lies(self):
        given = self.inputs(3)
        truth = self.engine.infer(given)["probabilities"]
        there = {name: DeviceArray.of(value) for name, value in given.items()}
        before = {name: array.address for name, array in there.items()}
        answer = self.engine.infer(there)["probabilities"]
        assert isinstance(answer, DeviceArray)
        assert (answer.numpy(self.engine.stream) == truth).all()
        assert before == {name: array.address for name, array in there.items()}
        for name, array in there.items():
            assert (array.numpy() == given[name]).all(), f"{name} was written to"

    def check_a_stream_of_the_caller_and_buffers_made_before(self):
        given = self.inputs(4, 1)
        truth = self.engine.infer(given)["probabilities"]
        stream = int(call("cudaStreamCreateWithFlags", 1))
        there = {name: DeviceArray.of(value, stream) for name, value in given.items()}
        mine = DeviceArray.of(np.zeros_like(truth))
        answer = self.engine.infer(there, outputs={"probabilities": mine}, stream=stream)["probabilities"]
        assert answer is mine
        assert (mine.numpy(stream) == truth).all()
        call("cudaStreamDestroy", stream)

    def check_graphs_replay_with_new_values_in_the_same_buffers(self):
        first, second = self.inputs(8, 2), self.inputs(8, 3)
        there = {name: DeviceArray.of(value) for name, value in first.items()}
        mine = DeviceArray.of(np.zeros_like(self.engine.infer(first)["probabilities"]))
        replay = self.engine.capture(there, {"probabilities": mine})
        for given in (first, second):
            for name, value in given.items():
                there[name].write(value, self.engine.stream)
            replay()
            assert (mine.numpy(self.engine.stream) == self.engine.infer(given)["probabilities"]).all()
            assert (self.engine.infer(given, graph=True)["probabilities"] == mine.numpy(self.engine.stream)).all()
        plain = time_on_gpu(lambda: self.engine.infer(there, outputs={"probabilities": mine}), self.engine.stream, repeats=20)
        graph = time_on_gpu(replay, self.engine.stream, repeats=20)
        return f"batch 8: {np.median(plain) * 1e3:.3f} ms launched, {np.median(graph) * 1e3:.3f} ms replayed"

    def check_profiles_take_turns(self):
        one, many = self.inputs(1), self.inputs(8)
        assert self.engine.header.check(one)[1] == 0
        assert self.engine.header.check(many)[1] == 1
        for _ in range(3):
            alone = self.engine.infer(one)["probabilities"]
            row = self.engine.infer({k: np.repeat(v, 2, axis=0) for k, v in one.items()})["probabilities"]
            assert np.abs(alone - row[:1]).max() < 1e-5
            self.engine.infer(many)

    def check_threads_take_turns(self):
        work = [self.inputs(1 + i % 8, 10 + i) for i in range(16)]
        truth = [self.engine.infer(given)["probabilities"] for given in work]
        answers: list = [None] * len(work)

        def run(i):
            answers[i] = self.engine.infer(work[i], graph=i % 2 == 0)["probabilities"]

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(work))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for ours, right in zip(answers, truth):
            assert (ours == right).all()

    def check_what_does_not_fit_is_refused_and_the_next_call_works(self):
        fine = self.inputs(2)
        wide = {name: np.repeat(value, 5, axis=0) for name, value in fine.items()}
        bad = {
            "outside every profile": wide,
            "is missing": {k: v for k, v in fine.items() if k != "times"},
            "is no input": fine | {"more": fine["times"]},
            "give float32": fine | {"x_history": fine["x_history"].astype(np.float64)},
            "not contiguous": fine | {"x_history": np.repeat(fine["x_history"], 2, axis=2)[:, :, ::2]},
            "different places": fine | {"x_history": DeviceArray.of(fine["x_history"])},
        }
        for text, inputs in bad.items():
            self._refused(InputError, text, self.engine.infer, inputs)
        self._refused(InputError, "is no output", self.engine.infer, fine, outputs={"q": fine["times"]})
        self.engine.infer(fine)

    def check_files_that_do_not_belong_here_are_refused(self):
        header, plan = read_engine(self.path)
        other = self.scratch / "other.engine"
        for change in ({"version": "0.1"}, {"target": "sm_10"}, {"gpu": "another GPU"}):
            write_engine(other, dataclasses.replace(header, **change), plan)
            self._refused(StaleEngine, "build again", Engine, other)
        other.write_bytes(self.path.read_bytes()[:-100])
        self._refused(DamagedEngine, "build again", Engine, other)
        data = (self.folder / "encoder.onnx").read_bytes()
        torn = self.scratch / "torn.onnx"
        torn.write_bytes(data[: len(data) // 2])
        self._refused(BuildError, "not a readable ONNX", Request.of, torn, {"batch": (1, 1, 1)})
        return f"on {gpu_target()}"

    def check_a_refit_that_cannot_be_says_so(self):
        self._refused(EngineError, "refit", self.engine.refit, self.folder / "ranker.onnx")
        if not self.engine.library.can_refit:
            self._refused(EngineError, "cannot refit", Request.of, self.folder / "ranker.onnx", PROFILES, refit=True)

    def check_the_inspector_speaks(self):
        return f"{len(self.engine.layers())} characters of JSON, {self.engine.device_bytes / 1e6:.1f} MB of activations"

    def check_zz_a_whole_file_around_half_an_engine(self):
        header, plan = read_engine(self.path)
        write_engine(self.scratch / "half.engine", header, plan[: len(plan) // 2])
        self._refused(EngineError, "cannot load it", Engine, self.scratch / "half.engine")

    @staticmethod
    def _refused(kind, text, function, *arguments, **named):
        try:
            function(*arguments, **named)
        except kind as error:
            if text in str(error):
                return
            raise AssertionError(f"{text!r} is not in {error}") from error
        raise AssertionError(f"nothing was refused ({text})")


def main(folder: pathlib.Path, scratch: pathlib.Path) -> int:
    checks, failed = Checks(folder, scratch), 0
    print(f"{checks.engine.header}")
    for name in [name for name in dir(checks) if name.startswith("check_")]:
        try:
            said = getattr(checks, name)()
            print(f"ok      {name[6:].replace('_', ' ')}{f': {said}' if said else ''}", flush=True)
        except Exception:
            failed += 1
            print(f"FAILED  {name[6:].replace('_', ' ')}", flush=True)
            traceback.print_exc(file=sys.stdout)
    checks.engine.close()
    print(f"{failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])))
