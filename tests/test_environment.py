"""The doctor finds what is there, names the remedy for what is not, and imports nothing heavy to know it."""

import importlib.metadata
import json
import os
import pathlib
import stat
import subprocess
import sys

import pytest
import torch

from hstu_lab import environment, strategies
from hstu_lab.settings import STRATEGIES

ROOT = pathlib.Path(__file__).resolve().parents[1]


def in_process(code: str, *flags: str, **variables: str) -> str:
    """What a fresh Python prints for `code`; stderr goes into the assertion."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run([sys.executable, *flags, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def executable(path: pathlib.Path, text: str) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_doctor_sees_what_is_installed():
    found = environment.doctor()
    assert (found["torch"].state, found["torch"].version) == ("ready", torch.__version__)
    for name in ("torchrec", "onnxruntime"):
        assert (found[name].state, found[name].version) == ("ready", importlib.metadata.version(name))
        assert found[name].remedy == ""
    with pytest.raises(KeyError, match=r"no engine 'torhc'; known: torch, "):
        found["torhc"]


def test_doctor_and_recommender_agree_on_strategies():
    found = {strategy.name: strategy.available for strategy in environment.doctor().strategies}
    assert found == {name: strategies.missing(name) is None for name in STRATEGIES if name != "auto"}
    assert found["eager"]


def test_doctor_is_quick_and_imports_no_engine():
    code = """
        import os, sys
        from hstu_lab.environment import banner, doctor
        doctor(), banner()
        heavy = {"torch", "torchrec", "triton", "onnx", "onnxruntime", "vllm", "cutlass", "jupyterlab", "transformers"}
        print(sorted(heavy & set(sys.modules)), sum(os.times()[:4]))
    """
    heavy, seconds = in_process("\n".join(line[8:] for line in code.splitlines())).rsplit(maxsplit=1)
    assert heavy == "[]"
    assert float(seconds) < 2  # of processor time: this must hold on a busy machine too


def test_without_packages_every_engine_is_missing_and_has_a_command():
    code = "import json; from hstu_lab.environment import doctor; d = doctor(); print(json.dumps([d.as_dict(), str(d)]))"
    found, text = json.loads(in_process(code, "-S"))
    engines = {e["name"]: e for e in found["engines"] if e["name"] not in ("nvcc", "chromium")}
    assert len(engines) == len(environment.PROBES)
    for engine in engines.values():
        assert (engine["state"], engine["version"]) == ("missing", "")
        assert engine["remedy"].split()[0].endswith(("make", "python", pathlib.Path(sys.executable).name))
        assert engine["remedy"] in text
    assert not any(s["available"] for s in found["strategies"])
    assert "torch missing" in next(s["reason"] for s in found["strategies"] if s["name"] == "eager")


def test_deep_look_finds_a_broken_import(tmp_path, monkeypatch):
    package = tmp_path / "onnxruntime"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('libgomp is not where it was')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    probe = next(p for p in environment.PROBES if p.name == "onnxruntime")
    engine = environment._look(probe, deep=True)
    assert (engine.state, engine.problem) == ("broken", "ImportError: libgomp is not where it was")
    assert engine.remedy
    assert environment._look(probe, deep=False).state == "ready"


def test_two_builds_of_fbgemm_are_reported(tmp_path, monkeypatch):
    for name in ("fbgemm_gpu", "fbgemm_gpu_cpu"):
        folder = tmp_path / f"{name}-1.8.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.8.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    engine = environment._look(next(p for p in environment.PROBES if p.name == "torchrec"), deep=False)
    assert engine.state == "broken"
    assert "overwritten" in engine.problem


def test_banner_is_short_and_starts_with_versions():
    banner = environment.banner()
    assert 3 <= len(banner.lines) <= 4
    assert f"torch {torch.__version__}" in banner.lines[0]
    assert "strategies here: eager" in banner.lines[-1]
    assert str(banner) == repr(banner) == str(environment.banner())
    assert environment.Banner(("a < b",))._repr_html_() == "<pre>a &lt; b</pre>"


def test_versions_are_those_installed():
    versions = environment.versions()
    assert versions["numpy"] == importlib.metadata.version("numpy")
    assert json.loads(json.dumps(versions)) == versions


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("AMD EPYC 7R13 Processor", "amd-epyc-7r13"),
        ("AMD EPYC 9B14 96-Core Processor", "amd-epyc-9b14"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", "intel-xeon"),
        ("12th Gen Intel(R) Core(TM) i7-1260P", "12th-gen-intel-core-i7-1260p"),
        ("NVIDIA H200", "nvidia-h200"),
        ("NVIDIA A100-SXM4-80GB", "nvidia-a100-sxm4-80gb"),
        ("", "unknown"),
    ],
)
def test_slugs(name, slug):
    assert environment.slugify(name) == slug


def test_gpu_is_read_from_nvidia_smi(tmp_path, monkeypatch):
    executable(tmp_path / "nvidia-smi", "#!/bin/sh\nprintf 'NVIDIA H200, 143771, 580.95.05\\n%.0s' 1 2\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    machine = environment.machine.__wrapped__()
    assert (machine.gpu, machine.gpu_count, machine.driver) == ("NVIDIA H200", 2, "580.95.05")
    assert (machine.device, machine.slug) == ("NVIDIA H200", "nvidia-h200")
    assert machine.gpu_memory_bytes == 143771 << 20


def test_without_a_gpu_the_processor_is_the_device(tmp_path, monkeypatch):
    executable(tmp_path / "nvidia-smi", "#!/bin/sh\necho 'No devices were found'; exit 6\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    machine = environment.machine.__wrapped__()
    assert (machine.gpu, machine.gpu_count, machine.device) == ("", 0, machine.cpu)
    assert 1 <= machine.cores <= os.cpu_count()
    assert 0 < machine.memory_bytes <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_chromium_of_the_system_comes_before_playwrights(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("PLAYWRIGHT_BROWSERS_PATH", str(tmp_path / "browsers"))
    assert environment.chromium() is None
    downloaded = executable(tmp_path / "browsers" / "chromium-1200" / "chrome-linux64" / "chrome", "")
    assert environment.chromium() == str(downloaded)
    system = executable(tmp_path / "bin" / "chromium", "")
    assert environment.chromium() == str(system)


def test_nvcc_that_pip_installed_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    compiler = executable(tmp_path / "cuda" / "bin" / "nvcc", "#!/bin/sh\necho Cuda compilation tools, release 13.0, V13.0.88\n")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert environment.nvcc() == str(compiler)
    assert environment.doctor()["nvcc"].version == "13.0.88"
