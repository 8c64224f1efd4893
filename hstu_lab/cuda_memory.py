"""CUDA memory, streams and graphs through NVIDIA's own Python bindings, for processes that have no PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from hstu_lab.tensorrt_library import EngineError, LibraryMissing, NoGpu


def runtime():
    """`cuda.bindings.runtime`. Raises LibraryMissing naming the package."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise LibraryMissing(
            f"cuda-bindings is not installed ({error}); run `make setup`, or `pip install cuda-bindings`"
        ) from error
    return runtime


def call(name: str, *arguments) -> Any:
    """One function of the CUDA runtime; its value, or None. Raises NoGpu or EngineError with CUDA's own reason."""
    api = runtime()
    try:
        status, *values = getattr(api, name)(*arguments)
    except RuntimeError as error:  # no driver to load
        raise NoGpu(f"{name}: no NVIDIA driver here ({error})") from error
    if int(status) != 0:
        kind = NoGpu if status.name in ("cudaErrorNoDevice", "cudaErrorInsufficientDriver") else EngineError
        raise kind(f"{name}: {api.cudaGetErrorString(status)[1].decode()}")
    return values[0] if len(values) == 1 else None


class DeviceArray:
    """Contiguous GPU memory with a shape and a NumPy dtype, freed with the object; other libraries see it through
    `__cuda_array_interface__`."""

    def __init__(self, shape: tuple[int, ...], dtype: str):
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize
        self.address = int(call("cudaMalloc", max(self.nbytes, 1)))

    @classmethod
    def of(cls, array: np.ndarray, stream: int = 0) -> DeviceArray:
        made = cls(array.shape, array.dtype.str)
        made.write(array, stream)
        call("cudaStreamSynchronize", stream)  # the copy may still run, and streams of others would not wait for it
        return made

    def write(self, array: np.ndarray, stream: int = 0) -> None:
        """Copy a contiguous host array of the same size here, in order on `stream`."""
        kind = runtime().cudaMemcpyKind.cudaMemcpyHostToDevice
        call("cudaMemcpyAsync", self.address, array.ctypes.data, self.nbytes, kind, stream)

    def read_into(self, array: np.ndarray, stream: int = 0) -> None:
        kind = runtime().cudaMemcpyKind.cudaMemcpyDeviceToHost
        call("cudaMemcpyAsync", array.ctypes.data, self.address, self.nbytes, kind, stream)

    def numpy(self, stream: int = 0) -> np.ndarray:
        """A copy on the host, after everything on `stream`."""
        array = np.empty(self.shape, self.dtype)
        self.read_into(array, stream)
        call("cudaStreamSynchronize", stream)
        return array

    @property
    def __cuda_array_interface__(self) -> dict:
        return {"shape": self.shape, "typestr": self.dtype.str, "data": (self.address, False), "version": 3, "strides": None}

    def __del__(self):
        if getattr(self, "address", 0):
            runtime().cudaFree(self.address)


class Graph:
    """The launches of one function call on a stream, recorded once and replayed with a single launch."""

    def __init__(self, run: Callable[[], None], stream: int):
        mode = runtime().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call("cudaStreamBeginCapture", stream, mode)
        try:
            run()
        finally:
            captured = call("cudaStreamEndCapture", stream)
        self._executable = call("cudaGraphInstantiate", captured, 0)
        call("cudaGraphDestroy", captured)

    def launch(self, stream: int) -> None:
        call("cudaGraphLaunch", self._executable, stream)

    def __del__(self):
        if hasattr(self, "_executable"):
            runtime().cudaGraphExecDestroy(self._executable)


def time_on_gpu(run: Callable[[], None], stream: int, *, repeats: int = 50, calls: int = 1, warmup: int = 5) -> list[float]:
    """Seconds of one call of `run`, which enqueues on `stream`: CUDA events around `calls` of them, `repeats` times."""
    for _ in range(warmup):
        run()
    events = [[call("cudaEventCreate") for _ in range(2)] for _ in range(repeats)]
    call("cudaStreamSynchronize", stream)
    for start, end in events:
        call("cudaEventRecord", start, stream)
        for _ in range(calls):
            run()
        call("cudaEventRecord", end, stream)
    call("cudaStreamSynchronize", stream)
    seconds = [call("cudaEventElapsedTime", start, end) / 1e3 / calls for start, end in events]
    for event in (event for pair in events for event in pair):
        call("cudaEventDestroy", event)
    return seconds
