"""The installed TensorRT, whichever it is: every difference between 8.6, 10, 11 and TensorRT for RTX is in this file.

| | precision | target | progress | refit from ONNX |
| --- | --- | --- | --- | --- |
| `tensorrt` 8.6 | builder flags (weakly typed network) | the GPU that builds | no | no |
| `tensorrt` 10, 11 | the types in the graph | the GPU that builds | yes | yes |
| `tensorrt_rtx` 1 | the types in the graph | any of its list, no GPU needed to build | yes | yes, built with a GPU |

Imports neither torch nor a GPU driver, so that it is there wherever the library is.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import threading
from collections.abc import Callable, Iterator

MODULES = {"tensorrt": ("tensorrt",), "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
"""Modules that may carry each library, in order."""

DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "BOOL": "bool",
}
"""TensorRT's element types by NumPy's names."""


class EngineError(RuntimeError):
    """Something that TensorRT or an engine cannot do; the message names it and the remedy."""


class LibraryMissing(EngineError):
    """No TensorRT is installed, or not the one that was asked for."""


class NoGpu(EngineError):
    """The step needs an NVIDIA GPU that this library supports."""


class Library:
    """One TensorRT. `name` is "tensorrt" or "tensorrt_rtx", `trt` its module, `version` its version."""

    def __init__(self, name: str, module: str):
        self.name, self.trt = name, importlib.import_module(module)
        self.version: str = self.trt.__version__
        self.is_rtx = name == "tensorrt_rtx"
        self._said: list[str] = []
        self._timings = b""
        self._lock = threading.RLock()
        self.logger = self._make_logger()

    @property
    def label(self) -> str:
        return f"TensorRT{' for RTX' if self.is_rtx else ''} {self.version}"

    @property
    def strongly_typed(self) -> bool:
        return hasattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED") or not hasattr(self.trt.BuilderFlag, "FP16")

    @property
    def builds_without_gpu(self) -> bool:
        return self.is_rtx

    @property
    def can_refit(self) -> bool:
        return hasattr(self.trt, "OnnxParserRefitter")

    @property
    def targets(self) -> tuple[str, ...]:
        """Compute capabilities that can be built for beside the GPU of this machine, e.g. "sm_80"."""
        if not self.is_rtx:
            return ()
        named = (n for n in dir(self.trt.ComputeCapability) if n.startswith("SM"))
        return tuple(sorted((f"sm_{n[2:]}" for n in named), key=lambda t: int(t[3:])))

    @property
    def form(self) -> int:
        """Version of what `readable` makes of a file; 0 where it leaves it alone."""
        return 0 if self.strongly_typed else 2

    # ---- building

    def readable(self, model, data: bytes) -> bytes:
        """An ONNX file's bytes `data`, read as `model`, in the form that this library's parser takes."""
        if self.strongly_typed:
            return data
        from hstu_lab.tensorrt_legacy import spelled_out

        return spelled_out(model).SerializeToString()

    def network(self, builder):
        """An empty network: strongly typed where the library knows that, else with its batch dimension spelled out."""
        flag = getattr(
            self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED" if self.strongly_typed else "EXPLICIT_BATCH", None
        )
        return builder.create_network(0 if flag is None else 1 << int(flag))

    def configure(self, config, *, precision: str, target: str, workspace: int, tf32: bool, refit: bool, effort=None) -> None:
        """Set what the build needs. `workspace`: bytes. `target`: "sm_80"; what `tensorrt` builds for is this machine's GPU."""
        flag = self.trt.BuilderFlag
        wanted = {flag.TF32: tf32, flag.REFIT: refit}
        if not self.strongly_typed:  # the types in the graph are hints there; these allow what they say
            wanted |= {flag.FP16: precision != "fp32", flag.INT8: precision == "int8"}
        for each, on in wanted.items():
            (config.set_flag if on else config.clear_flag)(each)
        if effort is not None:
            config.builder_optimization_level = effort
        config.set_memory_pool_limit(self.trt.MemoryPoolType.WORKSPACE, workspace)
        if not self.strongly_typed:
            config.set_tactic_sources(0)  # no cuBLAS or cuDNN beside it: its own kernels only
        if self.is_rtx:
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(self.trt.ComputeCapability, target.replace("sm_", "SM")), 0)

    def use_timings(self, config) -> Callable[[], None]:
        """Let the build reuse what earlier builds of this process timed; call the answer after it. RTX times nothing."""
        if self.is_rtx:
            return lambda: None
        cache = config.create_timing_cache(self._timings)
        config.set_timing_cache(cache, False)

        def keep() -> None:
            self._timings = bytes(memoryview(cache.serialize()))

        return keep

    def monitor(self, report: Callable[[str, int, int], None] | None):
        """A progress monitor that calls report(phase, steps done, steps), or None where the library has none.

        An exception in `report` cancels the build; the monitor keeps it as `error`.
        """
        if report is None or not hasattr(self.trt, "IProgressMonitor"):
            return None
        trt = self.trt

        class Monitor(trt.IProgressMonitor):
            def __init__(self):
                trt.IProgressMonitor.__init__(self)
                self.error: BaseException | None = None
                self._sizes: dict[str, int] = {}

            def phase_start(self, phase, parent, steps):
                self._sizes[phase] = steps
                self._tell(phase, 0)

            def step_complete(self, phase, step):
                self._tell(phase, step + 1)
                return self.error is None

            def phase_finish(self, phase):
                self._tell(phase, self._sizes.get(phase, 1))

            def _tell(self, phase, done):
                try:
                    if self.error is None:
                        report(phase, done, self._sizes.get(phase, 1))
                except BaseException as error:  # a KeyboardInterrupt too: it must not cross TensorRT's own frames
                    self.error = error

        return Monitor()

    # ---- what it says

    @contextlib.contextmanager
    def listening(self) -> Iterator[list[str]]:
        """The errors that TensorRT logs meanwhile, first to last; one caller at a time."""
        with self._lock:
            self._said.clear()
            yield self._said

    def _make_logger(self):
        trt, said = self.trt, self._said

        class Logger(trt.ILogger):
            def __init__(self):
                trt.ILogger.__init__(self)

            def log(self, severity, message):
                if int(severity) <= int(trt.ILogger.ERROR):
                    said.append(message)

        return Logger()


@functools.cache
def _load(name: str) -> Library | None:
    for module in MODULES[name]:
        if importlib.util.find_spec(module) is not None:
            try:
                return Library(name, module)
            except (ImportError, OSError):
                continue
    return None


def find_library(name: str | None = None, target: str | None = None) -> Library:
    """The TensorRT to use: by name, else the full one where a GPU is (its kernels are timed there), else TensorRT for RTX.

    A `target` that is not this machine's GPU wants TensorRT for RTX. Raises LibraryMissing naming what to install.
    """
    if name is not None and name not in MODULES:
        raise LibraryMissing(f"library {name!r} is unknown: use one of {', '.join(MODULES)}")
    wanted = [name] if name else list(MODULES)
    here = gpu_target()
    if name is None and (here is None or target not in (None, here)):
        wanted.reverse()
    for each in wanted:
        if library := _load(each):
            return library
    remedy = {"tensorrt": "pip install tensorrt (NVIDIA GPU)", "tensorrt_rtx": "make setup, or pip install tensorrt-rtx"}
    raise LibraryMissing(f"{' or '.join(wanted)} is not installed; {'; '.join(remedy[each] for each in wanted)}")


@functools.cache
def gpu_target() -> str | None:
    """Compute capability of GPU 0 as "sm_90", None where there is no usable NVIDIA GPU."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        return None
    values = []
    for attribute in ("cudaDevAttrComputeCapabilityMajor", "cudaDevAttrComputeCapabilityMinor"):
        try:
            status, value = runtime.cudaDeviceGetAttribute(getattr(runtime.cudaDeviceAttr, attribute), 0)
        except RuntimeError:  # the bindings find no driver to load
            return None
        if int(status) != 0:
            return None
        values.append(value)
    return f"sm_{values[0]}{values[1]}"


def gpu_name() -> str:
    """Name of GPU 0, "" where there is none: an engine of the full TensorRT is for this model of GPU."""
    if gpu_target() is None:
        return ""
    from cuda.bindings import runtime

    status, properties = runtime.cudaGetDeviceProperties(0)
    return properties.name.decode().rstrip("\0") if int(status) == 0 else ""


def why_not_here() -> str | None:
    """What keeps engines from running on this machine, with the remedy; None where nothing does."""
    target = gpu_target()
    if target is None:
        return (
            "needs an NVIDIA GPU to run its engines and none is visible "
            "(`python -m hstu_lab export --to tensorrt` builds them without one)"
        )
    try:
        library = find_library(target=target)
    except LibraryMissing as error:
        return f"needs TensorRT: {error}"
    if library.is_rtx and target not in library.targets:
        runs_on = ", ".join(library.targets)
        return f"needs the full TensorRT on this GPU ({target}), pip install tensorrt: {library.label} runs on {runs_on} only"
    return None
