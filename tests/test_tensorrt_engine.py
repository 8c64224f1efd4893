"""TensorRT engines without a GPU: really built for the A100, cached once, refused by name when anything does not fit."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time

import numpy as np
import onnx
import pytest
import torch

from hstu_lab import tensorrt_build, tensorrt_engine, tensorrt_library
from hstu_lab.model import load_config
from hstu_lab.onnx_export import INPUTS, OnnxError
from hstu_lab.pipeline import SHIPPED_CHECKPOINT
from hstu_lab.tensorrt_build import BuildError, CacheError, EngineCache, Request, build, check_refit, structure_hash
from hstu_lab.tensorrt_engine import Engine, EngineError, InputError, LibraryMissing, NoGpu, StaleEngine
from hstu_lab.tensorrt_models import TensorRtModels, build_engines, serving_profiles
from hstu_lab.tensorrt_plan import DamagedEngine, read_engine, read_header, write_engine

TARGET = "sm_80"
SIZES = {"batch": (1, 8, 64), "length": (1, 128, 256)}


@pytest.fixture(scope="module")
def exported(small_onnx):
    return small_onnx


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return EngineCache(tmp_path_factory.mktemp("engines"))


def encoder_request(exported, of="fp32", **changes):
    options = {"target": TARGET, "library": "tensorrt_rtx"} | changes
    return Request.of(exported[of] / "encoder.onnx", options.pop("profiles", SIZES), **options)


@pytest.fixture(scope="module")
def built(exported, cache):
    """The encoder's engine file."""
    return cache.get(encoder_request(exported), progress=False)


@pytest.fixture
def header(built):
    return read_header(built)


def fitting(batch=2, length=3):
    ids = np.zeros((batch, length), np.int64)
    return {"rows": np.zeros((batch, length, 64), np.float32), "action": ids, "gap_bucket": ids}


# ---- building


@pytest.mark.parametrize("precision", tensorrt_build.PRECISIONS)
def test_all_parts_build_for_an_a100_without_a_gpu(exported, cache, precision):
    profiles = serving_profiles(load_config(SHIPPED_CHECKPOINT))
    paths = build_engines(exported[precision], profiles, cache=cache, target=TARGET, progress=False)
    assert set(paths) == set(INPUTS)
    for part, path in paths.items():
        found, plan = read_engine(path)
        assert plan.startswith(b"vtrt"), "TensorRT's own bytes"
        assert (found.target, found.precision, found.library) == (TARGET, precision, "tensorrt_rtx")
        assert found.metadata["part"] == part
        assert {spec.name: (spec.dtype, len(spec.dims)) for spec in found.inputs} == {
            name: (dtype, len(dims)) for name, (dtype, dims) in INPUTS[part].items()
        }
        assert found.layers > 20
        assert found.profiles == tuple(profiles[part])
        assert "TensorRT for RTX" in str(found)
    stack = read_header(paths["stack"])
    assert [spec.dims for spec in stack.outputs] == [("batch", 2001), ("batch", 64)]


def test_the_cache_builds_once_and_keys_on_what_matters(exported, built, cache):
    before = built.stat().st_mtime_ns
    request = encoder_request(exported)
    calls = []
    assert cache.get(request, progress=lambda *step: calls.append(step)) == built
    assert calls == []
    assert built.stat().st_mtime_ns == before
    others = [
        encoder_request(exported, profiles={**SIZES, "length": (1, 128, 255)}), encoder_request(exported, target="sm_86"),
        encoder_request(exported, workspace=1 << 20), encoder_request(exported, tf32=True), encoder_request(exported, "fp16"),
        encoder_request(exported, profiles=(SIZES, SIZES)), encoder_request(exported, refit=True),
        dataclasses.replace(request, library=_other_version(request.library)),
    ]  # fmt: skip
    keys = {each.key() for each in others}
    assert len(keys) == len(others)
    assert request.key() not in keys


def _other_version(library):
    other = object.__new__(type(library))
    other.__dict__.update(library.__dict__, version="1.0.0")
    return other


def test_progress_is_reported(exported):
    seen = []
    build(encoder_request(exported), progress=lambda phase, done, steps: seen.append((phase, done, steps)))
    assert ("Building engine", 0) in {(phase, done) for phase, done, _ in seen}
    assert all(0 <= done <= steps for _, done, steps in seen)


def test_an_interrupt_cancels_the_build_and_leaves_nothing(exported, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    cache = EngineCache(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        cache.get(encoder_request(exported), progress=interrupt)
    assert not list(tmp_path.glob("*.engine"))
    assert cache.get(encoder_request(exported), progress=False).is_file()


def test_several_profiles_and_the_tightest_is_taken(exported, tmp_path):
    profiles = ({"batch": (1, 1, 1), "length": (1, 256, 256)}, {"batch": (1, 32, 64), "length": (1, 64, 256)})
    header = read_header(EngineCache(tmp_path).get(encoder_request(exported, profiles=profiles), progress=False))
    assert header.check(fitting(1, 200))[1] == 0
    assert header.check(fitting(2, 200))[1] == 1
    with pytest.raises(InputError, match=r"batch 65.*outside every profile.*batch 1\.\.1, length.*batch 1\.\.64"):
        header.check(fitting(65, 1))


# ---- misuse: inputs


class Listy:
    shape, dtype = (2, 3, 64), "float32"


MISUSED = {
    "an unknown tensor": ({"row": np.zeros(1)}, "row is no input of this engine; give rows, action, gap_bucket"),
    "a missing tensor": ({"action": None}, "input action is missing"),
    "float64": ({"rows": np.zeros((2, 3, 64))}, "rows is float64; give float32"),
    "int32 for int64": ({"action": np.zeros((2, 3), np.int32)}, "action is int32; give int64"),
    "another width": ({"rows": np.zeros((2, 3, 65), np.float32)}, r"rows has shape \(2, 3, 65\); give \(batch 2, length 3, 64\)"),
    "a missing dimension": ({"rows": np.zeros((3, 64), np.float32)}, r"rows has shape \(3, 64\)"),
    "two lengths": ({"action": np.zeros((2, 4), np.int64)}, r"action has shape \(2, 4\); give \(batch 2, length 3\)"),
    "a list": ({"rows": [[1.0]]}, "rows is a list; give a NumPy array or a CUDA tensor of float32"),
    "a slice with gaps": (
        {"rows": np.zeros((2, 3, 128), np.float32)[:, :, ::2]}, "rows is not contiguous; give rows.contiguous",
    ),
    "a transposed tensor": ({"rows": torch.zeros(2, 64, 3).transpose(1, 2)}, "rows is not contiguous"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISUSED)
def test_inputs_that_do_not_fit_are_refused_by_name_before_anything_runs(header, case):
    change, message = MISUSED[case]
    given = {name: value for name, value in {**fitting(), **change}.items() if value is not None}
    with pytest.raises(InputError, match=message):
        header.check(given)
    assert header.check(fitting()) == ({"batch": 2, "length": 3}, 0), "the next call works"


@pytest.mark.parametrize(("batch", "length"), [(65, 3), (2, 257), (0, 3), (2, 0)])
def test_shapes_outside_the_profile_are_refused(header, batch, length):
    with pytest.raises(InputError, match=r"outside every profile of this engine \(batch 1..64, length 1..256\)"):
        header.check(fitting(batch, length))


def test_arrays_of_another_place_are_refused():
    with pytest.raises(InputError, match=r"x is a PyTorch tensor on the cpu; give x\.numpy\(\)"):
        tensorrt_engine._on_host({"x": torch.zeros(2)})
    with pytest.raises(InputError, match="x is a Listy"):
        tensorrt_engine._on_host({"x": Listy()})
    assert tensorrt_engine._on_host({"x": np.zeros(2)})


# ---- misuse: requests and files


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "int4"}, "precision 'int4' is unknown: use one of fp32, fp16, int8"),
        ({"precision": "fp16"}, "was exported as fp32, not fp16"),
        ({"target": "sm_90"}, "target 'sm_90': TensorRT for RTX .* builds for sm_75, sm_80"),
        ({"workspace": 0}, "workspace is 0 bytes"),
        ({"profiles": {**SIZES, "batch": (4, 2, 8)}}, r"profile: batch is \(4, 2, 8\); give 1 <= least <= usual <= largest"),
        ({"library": "openvino"}, "library 'openvino' is unknown"),
    ],
)
def test_requests_that_cannot_be_are_refused(exported, changes, message):
    with pytest.raises(EngineError, match=message):
        encoder_request(exported, **changes)


@pytest.mark.parametrize(
    ("profiles", "message"),
    [
        ((), "batch, length are free; give a profile"),
        ({"batch": (1, 1, 1)}, "no sizes for length"),
        ({**SIZES, "candidates": (1, 1, 1)}, "candidates is no free dimension of .*encoder.onnx; those are batch, length"),
    ],
)
def test_profiles_must_size_what_is_free(exported, profiles, message):
    with pytest.raises(EngineError, match=message):
        build(encoder_request(exported, profiles=profiles), progress=False)


def test_a_workspace_that_is_too_small_is_said_so(exported, tmp_path):
    request = Request.of(exported["fp32"] / "stack.onnx", SIZES, target=TARGET, workspace=1, library="tensorrt_rtx")
    with pytest.raises(BuildError, match="workspace of 1 bytes is too small"):
        EngineCache(tmp_path).get(request, progress=False)
    assert not list(tmp_path.glob("*.engine"))
    assert EngineCache(tmp_path).get(dataclasses.replace(request, workspace=1 << 30), progress=False).is_file()


@pytest.mark.parametrize("damage", ["half", "nothing", "garbage", "absent"])
def test_a_damaged_onnx_file_is_refused(exported, tmp_path, damage):
    path = pathlib.Path(shutil.copy(exported["fp32"] / "stack.onnx", tmp_path / "stack.onnx"))
    data = path.read_bytes()
    path.write_bytes({"half": data[: len(data) // 2], "garbage": b"\x80\x04garbage" * 50}.get(damage, b""))
    if damage == "absent":
        path.unlink()
    with pytest.raises(EngineError, match=r"stack\.onnx: (not a readable ONNX model|no such file)") as raised:
        EngineCache(tmp_path / "engines").get(Request.of(path, SIZES, target=TARGET), progress=False)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "engines").exists()


def test_an_operator_that_tensorrt_does_not_know_is_named(tmp_path):
    node = onnx.helper.make_node("Frobnicate", ["x"], ["y"])
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["batch"]) for n in "xy")
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y])), tmp_path / "odd.onnx")
    with pytest.raises(BuildError, match=r"cannot parse it: .*Frobnicate|cannot parse it: .*[Pp]lugin"):
        build(Request.of(tmp_path / "odd.onnx", {"batch": (1, 2, 4)}, target=TARGET), progress=False)


def test_parts_of_two_checkpoints_do_not_become_engines(exported, cache, tmp_path):
    folder = shutil.copytree(exported["fp32"], tmp_path / "mixed")
    shutil.copy(exported["fp16"] / "ranker.onnx", folder)
    with pytest.raises(OnnxError, match=r"ranker\.onnx: its precision is not that of encoder\.onnx"):
        build_engines(folder, serving_profiles(load_config(SHIPPED_CHECKPOINT)), cache=cache, target=TARGET, progress=False)


@pytest.mark.parametrize("damage", ["short", "long", "changed", "header", "empty", "foreign"])
def test_a_damaged_engine_is_refused_and_built_again(exported, built, tmp_path, damage):
    cache = EngineCache(tmp_path)
    path = pathlib.Path(shutil.copy(built, tmp_path / built.name))
    data = bytearray(path.read_bytes())
    if damage == "changed":
        data[-100] ^= 1
    elif damage == "header":
        data[40] ^= 0xFF
    path.write_bytes({"short": data[:-7], "long": data + b"x", "empty": b"", "foreign": b"vtrt" * 99}.get(damage, bytes(data)))
    with pytest.raises(DamagedEngine, match=built.name):
        Engine(path)
    assert cache.get(encoder_request(exported), progress=False) == path
    read_engine(path)


def test_an_engine_of_another_version_or_gpu_is_refused(header, built, tmp_path):
    library = tensorrt_library.find_library("tensorrt_rtx")
    header.check_runs_on(library, TARGET, "")
    with pytest.raises(StaleEngine, match="built for sm_80, this GPU is sm_86; delete it and build again"):
        header.check_runs_on(library, "sm_86", "")
    with pytest.raises(StaleEngine, match="tuned on NVIDIA H200, this GPU is NVIDIA A100"):
        dataclasses.replace(header, gpu="NVIDIA H200").check_runs_on(library, TARGET, "NVIDIA A100")
    old = tmp_path / "old.engine"
    write_engine(old, dataclasses.replace(header, version="1.0.0"), read_engine(built)[1])
    with pytest.raises(StaleEngine, match=r"old\.engine: built by tensorrt_rtx 1\.0\.0, here is tensorrt_rtx"):
        Engine(old)


def test_an_engine_of_the_full_library_names_it_where_it_is_missing(header, built, tmp_path):
    if tensorrt_library._load("tensorrt"):
        pytest.skip("the full TensorRT is installed here")
    write_engine(tmp_path / "full.engine", dataclasses.replace(header, library="tensorrt"), read_engine(built)[1])
    with pytest.raises(LibraryMissing, match="tensorrt is not installed; pip install tensorrt"):
        Engine(tmp_path / "full.engine")


def test_without_a_gpu_it_is_said_before_anything_is_loaded(built):
    if tensorrt_library.gpu_target() is not None:
        pytest.skip("there is a GPU here")
    with pytest.raises(NoGpu, match="running an engine needs an NVIDIA GPU, none is visible"):
        Engine(built)
    assert "needs an NVIDIA GPU" in tensorrt_library.why_not_here()


def test_only_weights_may_differ_in_a_refit(exported, header, tmp_path):
    first = exported["fp32"] / "encoder.onnx"
    proto = onnx.load(first)
    weight = next(t for t in proto.graph.initializer if len(t.dims) == 2)
    weight.raw_data = (onnx.numpy_helper.to_array(weight) * 2).tobytes()
    onnx.save(proto, tmp_path / "other.onnx")
    assert structure_hash(tmp_path / "other.onnx") == structure_hash(first) == header.structure
    check_refit(dataclasses.replace(header, refittable=True), tmp_path / "other.onnx")
    with pytest.raises(EngineError, match="not built with refit=True"):
        check_refit(header, first)
    with pytest.raises(EngineError, match="its graph is not the one of this engine"):
        check_refit(dataclasses.replace(header, refittable=True), exported["fp16"] / "encoder.onnx")


# ---- the cache among processes


def test_a_cache_that_cannot_be_written_says_so_and_still_reads(exported, built):
    with tempfile.TemporaryDirectory() as folder, _nobody_may_write(folder):
        exported = {"fp32": pathlib.Path(shutil.copytree(exported["fp32"], f"{folder}/onnx"))}
        shutil.copy(built, folder)
        os.chmod(folder, 0o555)
        with _as_nobody():
            assert EngineCache(folder).get(encoder_request(exported), progress=False).name == built.name
            with pytest.raises(CacheError, match=f"{folder}: engines cannot be written there .*make it writable"):
                EngineCache(folder).get(encoder_request(exported, workspace=1 << 25), progress=False)
        assert sorted(os.listdir(folder)) == [built.name, "onnx"]


@contextlib.contextmanager
def _nobody_may_write(folder):
    yield
    os.chmod(folder, 0o755)


@contextlib.contextmanager
def _as_nobody():
    """Root may write anywhere: do without its rights for a while."""
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if was_root:
            os.seteuid(0)


def _start(exported, root, report):
    """A process that asks the cache for the encoder's engine; `report` is the body of its progress function."""
    script = textwrap.dedent(f"""
        import time
        from hstu_lab.tensorrt_build import EngineCache, Request
        steps = []
        def report(phase, done, total):
            steps.append(phase)
            {report}
        request = Request.of({str(exported["fp32"] / "encoder.onnx")!r}, {SIZES!r}, target="{TARGET}", library="tensorrt_rtx")
        print(EngineCache({str(root)!r}).get(request, progress=report), len(steps))
    """)
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)


def test_two_processes_that_want_one_engine_build_it_once(exported, tmp_path):
    waits = "if len(steps) == 1: print('building', flush=True); time.sleep(3)"  # long enough for the other to come
    processes = [_start(exported, tmp_path, waits) for _ in range(2)]
    said = [process.communicate(timeout=90)[0].splitlines() for process in processes]
    assert len({lines[-1].split()[0] for lines in said}) == 1
    assert sorted(int(lines[-1].split()[1]) > 0 for lines in said) == [False, True], "one built, the other waited for it"
    read_engine(said[0][-1].split()[0])
    assert not list(tmp_path.glob(".*.part"))


def test_a_kill_in_the_middle_of_a_build_leaves_nothing_and_blocks_nobody(exported, tmp_path):
    process = _start(exported, tmp_path, "print('building', flush=True); time.sleep(60)")
    assert process.stdout.readline() == "building\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(tmp_path.glob("*.engine"))
    request = encoder_request(exported)
    left = tmp_path / f".{EngineCache(tmp_path).path(request).name}.dead.part"
    left.write_bytes(b"torn")  # what a kill during the write itself would leave
    start = time.perf_counter()
    read_engine(EngineCache(tmp_path).get(request, progress=False))
    assert time.perf_counter() - start < 30, "the dead builder's lock must not hold the next one up"
    assert not left.exists()


def test_a_full_disk_leaves_no_broken_file(exported, built, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hstu_lab.tensorrt_plan.os.fsync", full)
    with pytest.raises(CacheError, match=r"cannot write the engine \(No space left on device\)"):
        EngineCache(tmp_path).get(encoder_request(exported), progress=False)
    monkeypatch.undo()
    assert [name for name in os.listdir(tmp_path) if not name.endswith(".lock")] == []
    assert EngineCache(tmp_path).get(encoder_request(exported), progress=False).is_file()


# ---- the modules


def test_engines_need_neither_pytorch_nor_the_rest_of_the_project():
    script = textwrap.dedent("""
        import sys
        sys.modules["torch"] = None
        from hstu_lab import cuda_memory, tensorrt_build, tensorrt_engine, tensorrt_library, tensorrt_plan
        print(tensorrt_library.find_library("tensorrt_rtx").label, sorted(m for m in sys.modules if m.startswith("hstu_lab.")))
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("TensorRT for RTX 1.")


def test_the_header_survives_json(header):
    again = type(header).from_json(header.to_json())
    assert again == header
    assert json.loads(header.to_json())["profiles"][0]["batch"] == [1, 8, 64]


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("precision", tensorrt_build.PRECISIONS)
def test_engines_give_pytorchs_answers_on_the_gpu(exported, cache, precision):
    from hstu_lab.model import load_checkpoint
    from hstu_lab.onnx_report import TOLERANCE, parity

    if why := tensorrt_library.why_not_here():
        pytest.skip(why)
    model = load_checkpoint(SHIPPED_CHECKPOINT)
    paths = build_engines(exported[precision], serving_profiles(model.config), cache=cache, progress=False)
    models = TensorRtModels(paths)
    tokens = torch.randint(1, model.config.num_items, (40,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rows = parity(model, models, tokens, torch.tensor([0, 1, 9, 40]), torch.ones(3, 5, dtype=torch.int64))
    for row in rows:
        assert row.max_rel < TOLERANCE[precision] * (3 if precision == "fp32" else 1), row


@pytest.mark.gpu
def test_numpy_cuda_tensors_buffers_and_graphs_agree(exported, cache):
    if why := tensorrt_library.why_not_here():
        pytest.skip(why)
    request = Request.of(exported["fp16"] / "encoder.onnx", SIZES)
    rng = np.random.default_rng(0)
    inputs = fitting() | {"rows": rng.normal(size=(2, 3, 64)).astype(np.float32)}
    with Engine(cache.get(request, progress=False)) as engine:
        inputs = {s.name: inputs[s.name].astype(s.dtype) for s in engine.header.inputs}
        truth = engine.infer(inputs)["x"]
        assert (engine.infer(inputs, graph=True)["x"] == truth).all()
        assert (engine.infer(inputs, graph=True)["x"] == truth).all()
        on_gpu = {name: torch.from_numpy(value).cuda() for name, value in inputs.items()}
        mine = torch.empty(truth.shape, device="cuda")
        answer = engine.infer(on_gpu, outputs={"x": mine}, stream=torch.cuda.current_stream(), graph=True)
        assert answer["x"] is mine
        assert (mine.cpu().numpy() == truth).all()
        with pytest.raises(InputError, match="outside every profile"):
            engine.infer(
                fitting(65, 3) if engine.header.inputs[1].dtype == "int64" else inputs | {"rows": np.zeros((65, 3, 64), "f4")}
            )
        assert (engine.infer(inputs)["x"] == truth).all()
