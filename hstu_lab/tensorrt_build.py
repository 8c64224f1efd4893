"""From ONNX to engine: one build, and a cache that two builders, a kill and a torn write cannot spoil."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from hstu_lab.config import PRECISIONS
from hstu_lab.tensorrt_library import DTYPES, EngineError, Library, LibraryMissing, NoGpu, find_library, gpu_name, gpu_target
from hstu_lab.tensorrt_plan import FORMAT, DamagedEngine, Header, Profile, TensorSpec, read_engine, read_header, write_engine

WORKSPACE = 1 << 30
"""Bytes of GPU memory that one engine may use while it runs, unless the caller says otherwise."""

Progress = bool | Callable[[str, int, int], None]
"""True draws a bar where stderr is a terminal; a function is called with (phase, steps done, steps)."""


class BuildError(EngineError):
    """TensorRT could not build the engine; the message has what it said."""


class CacheError(EngineError):
    """The folder for engines cannot be used; the message names it."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One engine that is wanted: everything that decides its bytes, checked when it is made.

    `profiles`: sizes of the ONNX file's free dimensions by name, one profile or several. `precision`: None takes the file's own
    metadata, else fp32. `target`: None is this machine's GPU, or sm_80 where there is none. `workspace` in bytes. `tf32` allows
    fp32 products in TensorFloat-32 (10 bits of fraction). Raises EngineError naming the field that cannot be.
    """

    onnx: pathlib.Path
    profiles: tuple[Profile, ...]
    precision: str
    target: str
    workspace: int
    tf32: bool
    refit: bool
    library: Library
    effort: int | None = None

    @classmethod
    def of(
        cls,
        onnx: str | pathlib.Path,
        profiles: Profile | Sequence[Profile] = (),
        *,
        precision: str | None = None,
        target: str | None = None,
        workspace: int = WORKSPACE,
        tf32: bool = False,
        refit: bool = False,
        library: str | None = None,
        effort: int | None = None,
    ) -> Request:
        onnx = pathlib.Path(onnx)
        profiles = (profiles,) if isinstance(profiles, Mapping) else tuple(profiles)
        if not onnx.is_file():
            raise EngineError(f"{onnx}: no such file; export the checkpoint with `python -m hstu_lab export`")
        for profile in profiles:
            for dim, sizes in profile.items():
                if len(sizes) != 3 or not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
                    raise EngineError(f"profile: {dim} is {tuple(sizes)}; give 1 <= least <= usual <= largest")
        if workspace < 1:
            raise EngineError(f"workspace is {workspace} bytes; give 1 or more, {WORKSPACE >> 20} MiB is usual")
        if effort is not None and not 0 <= effort <= 5:
            raise EngineError(f"effort is {effort}; give 0 to 5, or None for TensorRT's default")
        inside = onnx_metadata(onnx).get("precision")
        if precision is not None and precision not in PRECISIONS:
            raise EngineError(f"precision {precision!r} is unknown: use one of {', '.join(PRECISIONS)}")
        if inside and precision not in (None, inside):
            raise EngineError(f"{onnx}: was exported as {inside}, not {precision}; export it again in that precision")
        found, target = choose_target(library, target)
        if refit and not found.can_refit:
            raise EngineError(f"refit: {found.label} cannot refit from ONNX; build again when the weights change")
        return cls(onnx, profiles, precision or inside or "fp32", target, workspace, tf32, refit, found, effort)

    @property
    def gpu(self) -> str:
        """The GPU model that the engine is for; "" where any of its compute capability will do."""
        return "" if self.library.is_rtx else gpu_name()

    def key(self) -> str:
        """Hash of what decides the engine's bytes (hex)."""
        parts = {
            "format": FORMAT,
            "onnx": file_hash(self.onnx),
            "profiles": [{dim: list(sizes) for dim, sizes in profile.items()} for profile in self.profiles],
            "precision": self.precision,
            "library": [self.library.name, self.library.version, self.library.form],
            "target": [self.target, self.gpu],
            "workspace": self.workspace,
            "flags": [self.tf32, self.refit, self.effort],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def choose_target(library: str | None = None, target: str | None = None) -> tuple[Library, str]:
    """The library and the GPU that a build would be for. Raises NoGpu or EngineError where they do not go together."""
    found, here = find_library(library, target), gpu_target()
    target = target or here or "sm_80"
    if target != here and not found.builds_without_gpu:
        raise NoGpu(f"{found.label} builds for the GPU it runs on ({here or 'none is visible'}), not for {target}")
    if found.targets and target not in found.targets:
        raise EngineError(f"target {target!r}: {found.label} builds for {', '.join(found.targets)}")
    return found, target


def file_hash(path: str | pathlib.Path) -> str:
    """SHA-256 (hex) of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def onnx_metadata(path: str | pathlib.Path) -> dict[str, str]:
    """An ONNX file's own key-value pairs. Raises BuildError where it is cut short or no ONNX."""
    return {entry.key: entry.value for entry in _read_onnx(path).metadata_props}


def structure_hash(path: str | pathlib.Path) -> str:
    """SHA-256 (hex) of an ONNX file's graph without its weights' values: what a refit may not change."""
    model = _read_onnx(path)
    for tensor in model.graph.initializer:
        if len(tensor.dims) > 1 or max(tensor.dims, default=0) > 8:  # scalars and shapes are part of the structure
            for field in ("raw_data", "float_data", "int32_data", "int64_data"):
                tensor.ClearField(field)
    del model.metadata_props[:]
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def _read_onnx(path: str | pathlib.Path):
    try:
        import onnx
    except ImportError as error:
        raise LibraryMissing(f"onnx is not installed ({error}); run `make setup`, or `pip install onnx`") from error
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own, of which there are two implementations
        raise BuildError(f"{path}: not a readable ONNX model ({error}); export it again") from error
    if not model.graph.node:
        raise BuildError(f"{path}: not a readable ONNX model (it holds no operators); export it again")
    return model


# ---- one build


def build(request: Request, *, progress: Progress = True) -> tuple[Header, bytes]:
    """The engine's header and bytes. TensorRT for RTX takes about a second, the full one, which times kernels, up to minutes.

    Raises BuildError with what TensorRT said.
    """
    library, started = request.library, time.perf_counter()
    data, model = request.onnx.read_bytes(), _read_onnx(request.onnx)
    graph, metadata = model.graph, onnx_metadata(request.onnx)
    take_kernels(request.onnx, metadata, library, request.target)
    with library.listening() as said:
        trt = library.trt
        builder = trt.Builder(library.logger)
        network = library.network(builder)
        parser = trt.OnnxParser(network, library.logger)
        if not parser.parse(library.readable(model, data)):
            reason = parser.get_error(0).desc() if parser.num_errors else (said or ["no reason given"])[0]
            raise BuildError(f"{request.onnx}: {library.label} cannot parse it: {_line(reason)}")
        inputs = _named(graph.input, [_spec(network.get_input(i)) for i in range(network.num_inputs)])
        config = builder.create_builder_config()
        # Where all that is int8 is inside kernels of ours, nothing is left that the library could choose int8 for.
        only_inside = request.precision == "int8" and all(node.op_type != "QuantizeLinear" for node in graph.node)
        library.configure(
            config, precision="fp16" if only_inside else request.precision, target=request.target,
            workspace=request.workspace, tf32=request.tf32, refit=request.refit, effort=request.effort,
        )  # fmt: skip
        for profile in _complete(request, inputs):
            _add_profile(builder, config, inputs, profile, said)
        with _progress_bar(request, progress) as report:
            monitor = library.monitor(report)
            if monitor is not None:
                config.progress_monitor = monitor
            keep_timings = library.use_timings(config)
            plan = builder.build_serialized_network(network, config)
            keep_timings()
        if monitor is not None and monitor.error is not None:
            raise monitor.error
        if plan is None:
            raise BuildError(f"{request.onnx}: {library.label} could not build: {_reason(said, request)}")
        outputs = _named(graph.output, [_spec(network.get_output(i)) for i in range(network.num_outputs)])
        header = Header(
            library=library.name, version=library.version, target=request.target, gpu=request.gpu, precision=request.precision,
            onnx=hashlib.sha256(data).hexdigest(), structure=structure_hash(request.onnx), inputs=inputs,
            outputs=outputs, profiles=request.profiles, workspace=request.workspace,
            tf32=request.tf32, refittable=request.refit, layers=network.num_layers,
            seconds=round(time.perf_counter() - started, 2), metadata=metadata,
        )  # fmt: skip
        return header, bytes(memoryview(plan))


def take_kernels(path: pathlib.Path, metadata: Mapping[str, str], library: Library, target: str) -> None:
    """Make `library` know the compiled kernels that a file says it holds. Raises BuildError where they are for another GPU."""
    if kernels := metadata.get("kernels"):
        if kernels != target:
            raise BuildError(f"{path}: holds kernels compiled for {kernels}, the engine is for {target}; export it for {target}")
        from hstu_lab.tensorrt_plugin import register

        register(library)


def _spec(tensor) -> TensorSpec:
    shape = tuple(tensor.shape)
    dims = tuple(f"{tensor.name}[{i}]" if size < 0 else size for i, size in enumerate(shape))
    return TensorSpec(tensor.name, DTYPES[tensor.dtype.name], dims)


def _named(declared: Iterable, tensors: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The specs with the ONNX file's names for free dimensions: TensorRT forgets those of outputs, an old one all of them."""
    dims = {value.name: value.type.tensor_type.shape.dim for value in declared}
    return tuple(
        dataclasses.replace(
            spec,
            dims=tuple((d.dim_param or size) if isinstance(size, str) else size for d, size in zip(dims[spec.name], spec.dims)),
        )
        for spec in tensors
    )


def _complete(request: Request, inputs: Sequence[TensorSpec]) -> tuple[Profile, ...]:
    """The profiles, which must size exactly the dimensions that are free."""
    free = {dim for spec in inputs for dim in spec.dims if isinstance(dim, str)}
    if free and not request.profiles:
        raise EngineError(f"{request.onnx}: {', '.join(sorted(free))} are free; give a profile with their sizes")
    for profile in request.profiles:
        if missing := sorted(free - set(profile)):
            raise EngineError(f"profile: no sizes for {missing[0]}; give (least, usual, largest)")
        if unknown := sorted(set(profile) - free):
            raise EngineError(
                f"profile: {unknown[0]} is no free dimension of {request.onnx}; those are {', '.join(sorted(free))}"
            )
    return request.profiles


def _add_profile(builder, config, inputs: Sequence[TensorSpec], profile: Profile, said: list[str]) -> None:
    made = builder.create_optimization_profile()
    for spec in inputs:
        shapes = ([profile[d][i] if isinstance(d, str) else d for d in spec.dims] for i in range(3))
        made.set_shape(spec.name, *shapes)
    if profile and config.add_optimization_profile(made) < 0:
        raise BuildError(f"TensorRT refuses the profile {dict(profile)}: {_line((said or ['no reason given'])[0])}")


def _reason(said: Sequence[str], request: Request) -> str:
    text = _line(said[0]) if said else "it gave no reason"
    if any("workspace" in message for message in said):
        return f"the workspace of {request.workspace:,} bytes is too small, give more ({text})"
    if request.refit and gpu_target() is None:
        return f"a refittable engine of this graph needs a GPU to build; leave refit out ({text})"
    return text


def _line(text: str) -> str:
    return " ".join(text.split())[:300]


@contextlib.contextmanager
def _progress_bar(request: Request, progress: Progress) -> Iterator[Callable[[str, int, int], None] | None]:
    if callable(progress) or not progress:
        yield progress or None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield None
        return
    with tqdm(desc=f"TensorRT {request.onnx.stem} {request.precision}", unit="step", disable=None, leave=False) as bar:

        def report(phase: str, done: int, total: int) -> None:
            bar.set_postfix_str(phase, refresh=False)
            bar.total, bar.n = total, done
            bar.refresh()

        yield report


# ---- the cache


class EngineCache:
    """Engines in one folder, each under the hash of all that decides it; built once, whoever asks first.

    A file appears whole or not at all. Builders of one key queue on a lock that the kernel drops when its holder dies; what a
    killed builder left is removed by the next. A damaged file is built again.
    """

    def __init__(self, root: str | pathlib.Path):
        self.root = pathlib.Path(root)

    def path(self, request: Request) -> pathlib.Path:
        return self.root / f"{request.onnx.stem}-{request.precision}-{request.target}-{request.key()[:16]}.engine"

    def get(self, request: Request, *, progress: Progress = True) -> pathlib.Path:
        """The engine's file, built now where it is not there. Raises BuildError, or CacheError naming the folder."""
        path = self.path(request)
        if self._is_whole(path):
            return path
        with self._locked(path):
            if not self._is_whole(path):  # nobody was quicker
                for left in self.root.glob(f".{path.name}.*.part"):
                    left.unlink(missing_ok=True)
                header, plan = build(request, progress=progress)
                try:
                    write_engine(path, header, plan)
                except OSError as error:
                    raise CacheError(
                        f"{self.root}: cannot write the engine ({error.strerror}); free space or name another"
                    ) from error
        return path

    def list(self) -> list[tuple[pathlib.Path, Header]]:
        """Every readable engine, sorted by name."""
        return [(path, read_header(path)) for path in sorted(self.root.glob("*.engine")) if self._is_whole(path)]

    @staticmethod
    def _is_whole(path: pathlib.Path) -> bool:
        try:
            read_engine(path)
        except DamagedEngine:
            return False
        except EngineError:
            if path.exists():
                raise
            return False
        return True

    @contextlib.contextmanager
    def _locked(self, path: pathlib.Path) -> Iterator[None]:
        lock = path.with_name(f".{path.name}.lock")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CacheError(
                f"{self.root}: engines cannot be written there ({error.strerror}); make it writable, or set HSTU_LAB_DATA"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def check_refit(header: Header, onnx: str | pathlib.Path) -> None:
    """Raise EngineError unless the engine was built to be refitted and only the weights of the ONNX file differ."""
    if not header.refittable:
        raise EngineError("the engine was not built with refit=True; build it again")
    if structure_hash(onnx) != header.structure:
        raise EngineError(f"{onnx}: its graph is not the one of this engine, only weights may differ; build a new engine")
