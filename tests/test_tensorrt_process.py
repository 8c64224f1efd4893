"""The whole line with encoder and ranker in another process: ONNX Runtime there without a GPU, the full TensorRT with one."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from hstu_lab import tensorrt_bench as bench
from hstu_lab import tensorrt_library
from hstu_lab.config import TASK_NAMES
from hstu_lab.events import Catalog, read_events
from hstu_lab.model import load_checkpoint
from hstu_lab.onnx_export import export
from hstu_lab.pipeline import SAMPLE, SHIPPED_CHECKPOINT, Recommender
from hstu_lab.settings import Settings
from tests import fused_engines
from tests.tensorrt_process import remote_models, unify

SIZES = {"length": 256, "candidates": 100}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The shipped checkpoint's parts with fixed sizes; HSTU_LAB_FIXED_ONNX names a folder that has them already."""
    if given := os.environ.get("HSTU_LAB_FIXED_ONNX"):
        return pathlib.Path(given)
    return export(load_checkpoint(SHIPPED_CHECKPOINT), tmp_path_factory.mktemp("fixed"), sizes=SIZES, progress=False)


@pytest.fixture(scope="module")
def histories():
    log = read_events(SAMPLE, Catalog.load(SHIPPED_CHECKPOINT / "catalog.json"))
    return [log.history(user) for user in range(12)]


def _check(folder, histories, backend, python):
    """unified with remote parts gives eager's lists, says what ran, and its scores come from the remote parts."""
    with Recommender(settings=Settings()) as recommender, remote_models(folder, python, backend) as models:
        unify(recommender, models)
        for task in TASK_NAMES:
            truth = recommender.recommend_batch(histories, task=task, strategy="eager")
            before = models.calls
            ours = recommender.recommend_batch(histories, task=task, strategy="unified")
            assert [a.candidates for a in ours] == [a.candidates for a in truth]
            for a, b in zip(ours, truth):
                assert [i.score for i in a.items] == pytest.approx([i.score for i in b.items], abs=1e-4)
            assert models.calls > before
            assert "in a process of its own" in ours[0].engines["encoder"]
            assert "vLLM" in ours[0].engines["stack"]
            assert "in a process of its own" in ours[0].engines["ranking"]


@pytest.mark.timeout(180)
def test_unified_with_encoder_and_ranker_in_another_process(folder, histories):
    _check(folder, histories, "onnxruntime", sys.executable)


@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_unified_with_tensorrt(folder, histories):
    _check(folder, histories, "tensorrt", _tensorrt_python())


def _tensorrt_python() -> str:
    """HSTU_LAB_TENSORRT_PYTHON names a Python that has the full TensorRT, where this one has not."""
    python = os.environ.get("HSTU_LAB_TENSORRT_PYTHON")
    if python is None and tensorrt_library._load("tensorrt") is None:
        pytest.skip("the full TensorRT is not installed; HSTU_LAB_TENSORRT_PYTHON can name a Python that has it")
    return python or sys.executable


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_engines_with_our_kernels_inside_give_the_plain_answers(tmp_path):
    """Whole layers as plugins in fp16 and int8, mixed lengths, with and without a CUDA graph; for a GPU of sm_90."""
    if tensorrt_library.gpu_target() != "sm_90":
        pytest.skip("the benchmark's kernels are compiled for compute capability 9.0")
    bench.export(tmp_path, fused_engines.CASES, fused_engines.CONFIG)
    bench.expected(tmp_path, fused_engines.CASES, fused_engines.CONFIG)
    script = pathlib.Path(fused_engines.__file__)
    environment = os.environ | {"PYTHONPATH": str(script.parents[1])}
    done = subprocess.run([_tensorrt_python(), script, tmp_path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 2 * (2 * 1 + 2 * 2)
    for case, output, error in lines:
        assert 0 < float(error) < (5e-2 if "int8" in case else 5e-3), (case, output, error)


def test_what_the_far_side_refuses_is_told(folder):
    with remote_models(folder, backend="onnxruntime") as models:
        with pytest.raises(RuntimeError, match=r"INVALID_ARGUMENT|Invalid"):
            models._ask("stack", {"x": np.zeros((1, 3, 7), np.float32), "times": np.zeros((1, 3), np.int64)} | _lengths())
        with pytest.raises(ValueError, match="the engines take 256"):
            models._ask("stack", {"x": np.zeros((1, 300, 64), np.float32), "times": np.zeros((1, 300), np.int64)} | _lengths())
        d = models.config.d_model
        fine = {"x": np.zeros((2, 9, d), np.float32), "times": np.zeros((2, 9), np.int64), "lengths": np.array([9, 1])}
        assert models.run("stack", **fine)["logits"].shape == (2, models.config.num_items)


def _lengths():
    return {"lengths": np.array([3])}


@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_engines_on_the_gpu(folder, tmp_path):
    """Buffers, streams, graphs, profiles, threads and misuse, in whichever Python has the full TensorRT."""
    script = pathlib.Path(__file__).with_name("engine_checks.py")
    environment = os.environ | {"PYTHONPATH": str(script.parents[1])}
    done = subprocess.run([_tensorrt_python(), script, folder, tmp_path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok  ") >= 9
