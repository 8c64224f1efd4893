"""One class for a built engine, over TensorRT 8.6, 10, 11 and TensorRT for RTX: load, check, run.

    request = Request.of("stack.onnx", {"batch": (1, 8, 64), "length": (1, 128, 256)})
    with Engine(EngineCache("engines").get(request)) as engine:
        logits = engine.infer({"x": x, "times": times, "lengths": lengths})["logits"]

Imports no PyTorch; CUDA tensors of any library are taken where they lie.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hstu_lab.cuda_memory import DeviceArray, Graph, call
from hstu_lab.tensorrt_build import BuildError, EngineCache, Request, check_refit, file_hash, onnx_metadata, take_kernels
from hstu_lab.tensorrt_library import EngineError, LibraryMissing, NoGpu, find_library, gpu_name, gpu_target
from hstu_lab.tensorrt_plan import InputError, StaleEngine, read_engine, write_engine

__all__ = [
    "BuildError",
    "Engine",
    "EngineCache",
    "EngineError",
    "InputError",
    "LibraryMissing",
    "NoGpu",
    "Request",
    "StaleEngine",
]

_MOST_GRAPHS = 16


class Engine:
    """An engine file, loaded on this machine's GPU; a context manager.

    One profile has one execution context, made when it is first needed. Calls from several threads take turns.
    Raises DamagedEngine or StaleEngine naming the file, NoGpu where there is none.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path)
        self.header, plan = read_engine(self.path)
        target = gpu_target()
        self.library = find_library(self.header.library)
        self.header.check_runs_on(self.library, target, gpu_name(), self.path)
        if target is None:
            raise NoGpu(
                f"{self.path}: running an engine needs an NVIDIA GPU, none is visible; use ONNX Runtime for the same file"
            )
        take_kernels(self.path, self.header.metadata, self.library, target)
        with self.library.listening() as said:
            self._runtime = self.library.trt.Runtime(self.library.logger)
            self._engine = self._runtime.deserialize_cuda_engine(plan)
            if self._engine is None:
                raise StaleEngine(f"{self.path}: {self.library.label} cannot load it on this GPU: {' '.join(said)[:300]}")
        self._stream = int(call("cudaStreamCreateWithFlags", 1))  # 1: does not wait for the default stream
        self._contexts: dict[int, Any] = {}
        self._staging: dict[str, DeviceArray] = {}
        self._graphs: collections.OrderedDict[tuple, Graph] = collections.OrderedDict()
        self._lock = threading.RLock()

    # ---- running

    def infer(
        self,
        inputs: Mapping[str, Any],
        *,
        outputs: Mapping[str, Any] | None = None,
        stream: Any = None,
        graph: bool = False,
    ) -> dict[str, Any]:
        """Every output by name, of the inputs' kind.

        NumPy arrays are copied to the GPU and back, and the call waits for the answer. CUDA tensors (PyTorch, CuPy,
        `DeviceArray`) are read where they lie: the work is enqueued on `stream` (default: PyTorch's current one for its tensors,
        else the engine's own) and the call returns at once. `outputs`: tensors to write to, else new ones are made. `graph`:
        record the launches for these shapes and addresses once and replay them; for buffers that stay the same.

        Raises InputError naming the tensor before anything runs.
        """
        sizes, profile = self.header.check(inputs)
        on_host = _on_host(inputs)
        shapes = self.header.shapes(self.header.outputs, sizes)
        if outputs is not None:
            self._check_outputs(outputs, shapes, on_host)
        with self._lock:
            if on_host:
                return self._infer_host(inputs, outputs, shapes, profile, graph)
            stream = _stream_of(inputs, stream, self._stream)
            outputs = dict(outputs or {})
            like = next(iter(inputs.values()))
            for spec in self.header.outputs:
                if spec.name not in outputs:
                    outputs[spec.name] = _empty_like(like, shapes[spec.name], spec.dtype)
            self._enqueue({**inputs, **outputs}, profile, stream, graph)
            return outputs

    def _infer_host(self, inputs, outputs, shapes, profile: int, graph: bool) -> dict[str, np.ndarray]:
        for spec in self.header.inputs:
            self._buffer(spec.name, inputs[spec.name].shape, spec.dtype).write(inputs[spec.name], self._stream)
        for spec in self.header.outputs:
            self._buffer(spec.name, shapes[spec.name], spec.dtype)
        self._enqueue(self._staging, profile, self._stream, graph)
        answers = dict(outputs or {})
        for spec in self.header.outputs:
            answer = answers.setdefault(spec.name, np.empty(shapes[spec.name], spec.dtype))
            self._staging[spec.name].read_into(answer, self._stream)
        call("cudaStreamSynchronize", self._stream)
        return answers

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        buffer = self._staging.get(name)
        if buffer is None or buffer.shape != tuple(shape):
            buffer = self._staging[name] = DeviceArray(tuple(shape), dtype)
        return buffer

    def _enqueue(self, tensors: Mapping[str, Any], profile: int, stream: int, graph: bool) -> None:
        context = self._context(profile, stream)
        for spec in self.header.inputs:
            is_free = any(isinstance(dim, str) for dim in spec.dims)
            if is_free and not context.set_input_shape(spec.name, tuple(tensors[spec.name].shape)):
                raise EngineError(
                    f"{self.path}: {self.library.label} refuses shape {tuple(tensors[spec.name].shape)} of {spec.name}"
                )
        names = [spec.name for spec in (*self.header.inputs, *self.header.outputs)]
        addresses = {name: _address(tensors[name]) for name in names}
        for name, address in addresses.items():
            context.set_tensor_address(name, address)

        def run() -> None:
            if not context.execute_async_v3(stream):
                raise EngineError(f"{self.path}: {self.library.label} could not run it")

        if not graph:
            run()
            return
        shapes = tuple(tuple(tensors[spec.name].shape) for spec in self.header.inputs)
        key = (profile, stream, shapes, tuple(addresses.values()))
        if key not in self._graphs:
            run()  # shapes seen for the first time allocate and may compile, which a capture cannot hold
            call("cudaStreamSynchronize", stream)
            self._graphs[key] = Graph(run, stream)
            while len(self._graphs) > _MOST_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        self._graphs[key].launch(stream)

    def capture(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Callable[[], None]:
        """A function that replays the launches for these GPU buffers on `stream`, checked once, here.

        Raises InputError as `infer` does. The buffers must stay.
        """
        with self._lock:
            self.infer(inputs, outputs=outputs, stream=self.stream, graph=True)
            graph = next(reversed(self._graphs.values()))
        kept = dict(inputs), dict(outputs)
        return lambda kept=kept: graph.launch(self.stream)

    @property
    def stream(self) -> int:
        """The engine's own CUDA stream."""
        return self._stream

    def _context(self, profile: int, stream: int):
        if profile not in self._contexts:
            context = self._engine.create_execution_context()
            if context is None:
                raise EngineError(f"{self.path}: no GPU memory for another execution context; close engines or free memory")
            if profile:
                context.set_optimization_profile_async(profile, stream)
                call("cudaStreamSynchronize", stream)
            self._contexts[profile] = context
        return self._contexts[profile]

    def _check_outputs(self, outputs: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], on_host: bool) -> None:
        dtypes = {spec.name: spec.dtype for spec in self.header.outputs}
        for name, value in outputs.items():
            if name not in shapes:
                raise InputError(f"{name} is no output of this engine; those are {', '.join(shapes)}")
            dtype = str(value.dtype).removeprefix("torch.")
            if tuple(value.shape) != shapes[name] or dtype != dtypes[name]:
                raise InputError(f"output {name} is {dtype} {tuple(value.shape)}; give {dtypes[name]} {shapes[name]}")
            if isinstance(value, np.ndarray) != on_host:
                raise InputError(f"output {name} lies elsewhere than the inputs; give all on the host or all on the GPU")

    # ---- what else it can do

    def buffers(self, **sizes: int) -> dict[str, DeviceArray]:
        """Zeroed GPU memory for every input and output at these sizes, to be reused from call to call.

        Raises InputError where no profile holds them.
        """
        self.header.profile_for(sizes)
        specs = (*self.header.inputs, *self.header.outputs)
        dtypes = {spec.name: spec.dtype for spec in specs}
        return {name: DeviceArray.of(np.zeros(shape, dtypes[name])) for name, shape in self.header.shapes(specs, sizes).items()}

    def refit(self, onnx: str | pathlib.Path, path: str | pathlib.Path | None = None) -> None:
        """Take the weights of another ONNX file with the same graph; `path` saves the result.

        Raises EngineError where the engine was not built for it or more than weights differ.
        """
        check_refit(self.header, onnx)
        if not self.library.can_refit:
            raise EngineError(f"{self.library.label} cannot refit from ONNX; build again")
        trt = self.library.trt
        with self._lock, self.library.listening() as said:
            refitter = trt.Refitter(self._engine, self.library.logger)
            parser = trt.OnnxParserRefitter(refitter, self.library.logger)
            if not parser.refit_from_file(os.fspath(onnx)) or not refitter.refit_cuda_engine():
                raise EngineError(f"{onnx}: {self.library.label} cannot refit with it: {' '.join(said)[:300]}")
            self._graphs.clear()
            self.header = dataclasses.replace(self.header, onnx=file_hash(onnx), metadata=onnx_metadata(onnx))
            if path is not None:
                self.header = write_engine(path, self.header, bytes(memoryview(self._engine.serialize())))

    def layers(self) -> str:
        """TensorRT's own account of the engine's layers, as JSON."""
        inspector = self._engine.create_engine_inspector()
        return inspector.get_engine_information(self.library.trt.LayerInformationFormat.JSON)

    @property
    def device_bytes(self) -> int:
        """GPU memory of one execution context's intermediate tensors."""
        new = hasattr(self._engine, "device_memory_size_v2")
        return self._engine.device_memory_size_v2 if new else self._engine.device_memory_size

    def close(self) -> None:
        """Free the engine's GPU memory."""
        with self._lock:
            self._graphs.clear()
            self._contexts.clear()
            self._staging.clear()
            if self._engine is not None:
                self._engine = self._runtime = None
                call("cudaStreamDestroy", self._stream)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_) -> None:
        self.close()


# ---- arrays of whatever library


def _on_host(inputs: Mapping[str, Any]) -> bool:
    kinds = {name: _kind(name, value) for name, value in inputs.items()}
    if len(set(kinds.values())) > 1:
        raise InputError(f"inputs lie in different places ({', '.join(f'{n}: {k}' for n, k in kinds.items())}); give all in one")
    return next(iter(kinds.values())) == "host"


def _kind(name: str, value: Any) -> str:
    if isinstance(value, np.ndarray):
        return "host"
    if getattr(value, "is_cuda", None) is False:
        raise InputError(f"{name} is a PyTorch tensor on the {value.device}; give {name}.numpy() or {name}.cuda()")
    if not hasattr(value, "data_ptr") and not hasattr(value, "__cuda_array_interface__"):
        raise InputError(f"{name} is a {type(value).__name__}; give a NumPy array or a CUDA tensor")
    return "GPU"


def _address(value: Any) -> int:
    if isinstance(value, DeviceArray):
        return value.address
    return value.data_ptr() if hasattr(value, "data_ptr") else value.__cuda_array_interface__["data"][0]


def _stream_of(inputs: Mapping[str, Any], stream: Any, own: int) -> int:
    if stream is not None:
        return int(getattr(stream, "cuda_stream", getattr(stream, "ptr", stream)))
    if all(hasattr(value, "data_ptr") for value in inputs.values()):
        import torch

        return torch.cuda.current_stream().cuda_stream
    return own


def _empty_like(value: Any, shape: tuple[int, ...], dtype: str) -> Any:
    if hasattr(value, "data_ptr"):
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), device=value.device)
    return DeviceArray(shape, dtype)
