"""The one way to time something here, and to write and read what was measured, so that every number can name its origin."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from hstu_lab import environment
from hstu_lab.environment import slugify

SCHEMA_VERSION = 1
LABEL_PACKAGES = ("torch", "triton", "onnxruntime", "tensorrt", "tensorrt_rtx", "vllm")
_MOST_SAMPLES = 1000
_SHORTEST_SAMPLE = 1e-4
_SHORTEST_REPLAY = 5e-4  # starting a graph costs microseconds, which must not count
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


class MeasureError(ValueError):
    """A measurement or a record that cannot be made or read; the message names the path and the remedy."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Raw samples of one timed function: seconds of one call each (the mean of `calls` calls where one is too short to time).

    `clock` says what was read: "wall" (host clock), "cuda events" or "cuda graph" (events around a replay). `work` holds the
    flops and bytes of one call where they are known.
    """

    name: str
    samples: tuple[float, ...]
    calls: int = 1
    clock: str = "wall"
    work: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "samples", tuple(self.samples))
        if not self.samples:
            raise MeasureError(f"measurement {self.name!r} has no samples")

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def min(self) -> float:
        return min(self.samples)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.samples)

    @property
    def p5(self) -> float:
        return self.percentile(5)

    @property
    def p95(self) -> float:
        return self.percentile(95)

    def percentile(self, p: float) -> float:
        """Linear interpolation between the two nearest samples, p in 0..100."""
        ordered, at = sorted(self.samples), p / 100 * (len(self.samples) - 1)
        low, high = math.floor(at), math.ceil(at)
        return ordered[low] + (ordered[high] - ordered[low]) * (at - low)

    @property
    def flops_per_second(self) -> float:
        """work["flops"] over the median; NaN where the work is not known."""
        return self.work.get("flops", math.nan) / self.median

    @property
    def bytes_per_second(self) -> float:
        """work["bytes"] over the median; NaN where the work is not known."""
        return self.work.get("bytes", math.nan) / self.median

    def __str__(self) -> str:
        return (
            f"{self.name}: {format_seconds(self.median)} (p5 {format_seconds(self.p5)}, p95 {format_seconds(self.p95)}, "
            f"{len(self.samples)} samples of {self.calls} call{'s' if self.calls > 1 else ''}, {self.clock})"
        )


def format_seconds(seconds: float) -> str:
    """Three significant digits in s, ms, us or ns."""
    if seconds >= 999.5:
        return f"{seconds:.0f} s"
    for unit, scale in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 0.9995:  # what rounds to 1,000 is 1 of the next unit
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


@dataclasses.dataclass(frozen=True)
class Goal:
    """A value, and the target that it is held to from below (`at_least`) or from above. As text: one row of a ledger."""

    what: str
    value: float
    target: float
    at_least: bool = True

    @property
    def met(self) -> bool:
        return self.value >= self.target if self.at_least else self.value <= self.target

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        return f"{'met   ' if self.met else 'MISSED'} {self.what:46s} {self.value:6.2f}   target {sign} {self.target}"


def measure(
    fn: Callable,
    *,
    name: str,
    warmup: int = 3,
    repeats: int = 30,
    min_time: float = 0.2,
    inputs: Sequence[tuple] | None = None,
    cuda_graph: bool = False,
    work: Mapping[str, float] | None = None,
    device: str | None = None,
) -> Measurement:
    """Time `fn`: at least `repeats` samples and about `min_time` seconds, after `warmup` calls that do not count.

    inputs: argument tuples handed to `fn` in turn; give enough of them that together they exceed the cache you do not want
    to measure (a GPU's L2 keeps one set of small arguments for ever). device: "cuda" reads events on the current stream,
    "cpu" the host clock (waiting for the GPU on both sides, if this process uses one); by default "cuda" where this process
    uses a GPU. cuda_graph: capture the calls once and time replays, which leaves out what launching costs the host. work:
    {"flops": ..., "bytes": ...} of one call. Raises MeasureError where a graph is asked for without a GPU.
    """
    prepared = _prepare(fn, name, warmup, min_time, inputs, cuda_graph, work, device)
    return _sampled([prepared], repeats, min_time)[0]


def measure_in_turns(
    fns: Mapping[str, Callable],
    *,
    warmup: int = 3,
    repeats: int = 30,
    min_time: float = 0.2,
    cuda_graph: bool = False,
    work: Mapping[str, Mapping[str, float]] | None = None,
    device: str | None = None,
) -> list[Measurement]:
    """Time functions that are to be compared, by name: one sample of each, then the next of each.

    A GPU that grows warm lowers its clock. One after the other, the last would be timed on a slower GPU than the first; in turns,
    whatever slows one slows all. `work` is by name too, the other arguments as in `measure`: `min_time` seconds for each.
    """
    prepared = [
        _prepare(fn, name, warmup, min_time, None, cuda_graph, (work or {}).get(name), device) for name, fn in fns.items()
    ]
    return _sampled(prepared, repeats, min_time)


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """A function warmed up: `run` makes `calls` calls, in about `seconds`."""

    name: str
    run: Callable[[], None]
    calls: int
    seconds: float
    clock: str
    work: Mapping[str, float]


def _prepare(
    fn: Callable, name: str, warmup: int, min_time: float, inputs: Sequence[tuple] | None, cuda_graph: bool,
    work: Mapping[str, float] | None, device: str | None,
) -> _Prepared:  # fmt: skip
    on_gpu = device == "cuda" if device else cuda_graph or torch.cuda.is_initialized()
    if (on_gpu or cuda_graph) and not torch.cuda.is_available():
        raise MeasureError(f"{name}: cuda timing was asked for and no GPU is here: use device='cpu' without cuda_graph")
    if cuda_graph and not on_gpu:
        raise MeasureError(f"{name}: a CUDA graph is timed on the GPU: leave device out")
    arguments = [tuple(a) for a in inputs] if inputs is not None else [()]
    if not arguments:
        raise MeasureError(f"{name}: give at least one tuple of inputs")
    wait = _wait(on_gpu)
    for i in range(max(warmup, 1)):
        fn(*arguments[i % len(arguments)])
    wait()
    start = time.perf_counter_ns()
    fn(*arguments[0])
    wait()
    estimate = max((time.perf_counter_ns() - start) / 1e9, 1e-9)

    if cuda_graph:
        # Launching from Python takes longer than many a kernel: only a replay tells how many calls make a sample.
        once = _captured(fn, arguments, len(arguments))
        estimate = max(min(_sample_events([once], 3)[0]) / len(arguments), 1e-9)
    shortest = _SHORTEST_REPLAY if cuda_graph else _SHORTEST_SAMPLE
    calls = max(1, math.ceil(max(shortest, min_time / _MOST_SAMPLES) / estimate))
    if cuda_graph:
        calls = -(-calls // len(arguments)) * len(arguments)
        run = _captured(fn, arguments, calls)
    else:
        run = _rotating(fn, arguments, calls)
    clock = "cuda graph" if cuda_graph else "cuda events" if on_gpu else "wall"
    return _Prepared(name, run, calls, estimate * calls, clock, dict(work or {}))


def _sampled(prepared: list[_Prepared], repeats: int, min_time: float) -> list[Measurement]:
    if repeats < 1:
        raise MeasureError(f"{prepared[0].name}: give at least one repeat")
    count = max(repeats, math.ceil(min_time / min(p.seconds for p in prepared)))
    runs = [p.run for p in prepared]
    if prepared[0].clock == "wall":
        samples = _sample_wall(runs, count, _wait(False))
    else:
        samples = _sample_events(runs, count)
    return [
        Measurement(p.name, tuple(s / p.calls for s in seconds), p.calls, p.clock, p.work)
        for p, seconds in zip(prepared, samples)
    ]


def _wait(on_gpu: bool) -> Callable[[], None]:
    return torch.cuda.synchronize if torch.cuda.is_initialized() or on_gpu else lambda: None


def _rotating(fn: Callable, arguments: list[tuple], calls: int) -> Callable[[], None]:
    turn = 0

    def run():
        nonlocal turn
        for _ in range(calls):
            fn(*arguments[turn])
            turn = (turn + 1) % len(arguments)

    return run


def _captured(fn: Callable, arguments: list[tuple], calls: int) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _rotating(fn, arguments, calls)()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def _sample_wall(runs: list[Callable[[], None]], count: int, wait: Callable[[], None]) -> list[list[float]]:
    """Seconds of each of `runs`, `count` times in turn."""
    samples = [[] for _ in runs]
    for _ in range(count):
        for run, seconds in zip(runs, samples):
            wait()
            start = time.perf_counter_ns()
            run()
            wait()
            seconds.append((time.perf_counter_ns() - start) / 1e9)
    return samples


def _sample_events(runs: list[Callable[[], None]], count: int) -> list[list[float]]:
    """The same by events on the current stream."""
    pairs = [[[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)] for _ in runs]
    torch.cuda.synchronize()
    for turn in zip(*pairs):
        for run, (start, end) in zip(runs, turn):
            start.record()
            run()
            end.record()
    torch.cuda.synchronize()
    return [[start.elapsed_time(end) / 1e3 for start, end in of_one] for of_one in pairs]


def require_gpu() -> None:
    """Raise SystemExit, for a program that measures a GPU, unless PyTorch sees one."""
    if not torch.cuda.is_available():
        recorded = ", ".join(sorted(path.name for path in _measured(None).glob("nvidia-*"))) or "no GPU"
        raise SystemExit(
            f"error: this measures a GPU, and PyTorch {torch.__version__} sees none; run it where there is one "
            f"(recorded so far: {recorded}, in {_shown(_measured(None))})"
        )


def peak_copy_bandwidth(device: str | None = None, *, size: int | None = None) -> Measurement:
    """The ruler for memory-bound work: a plain copy inside the device's memory; see `.bytes_per_second` (read plus written).

    device: "cuda" or "cpu" (default: the GPU where there is one); size: bytes copied (default 1 GiB, 128 MiB on the CPU).
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    size = size or (2**30 if device == "cuda" else 2**27)
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return measure(lambda: target.copy_(source), name="copy", repeats=10, work={"bytes": 2 * source.nbytes}, device=device)


@dataclasses.dataclass
class Record:
    """Measurements with all that is needed to judge and repeat them. Written as JSON by `write_record`.

    `data` holds derived results (any JSON); `threads` is PyTorch's thread count on the host; `path` is set by reads and writes.
    """

    name: str
    device: str
    driver: str
    versions: dict[str, str]
    command: str
    date: str
    threads: int
    note: str = ""
    measurements: list[Measurement] = dataclasses.field(default_factory=list)
    data: dict = dataclasses.field(default_factory=dict)
    path: Path | None = dataclasses.field(default=None, compare=False)

    @classmethod
    def here(
        cls, name: str, *, measurements: Sequence[Measurement] = (), data: dict | None = None, note: str = "", command: str = ""
    ) -> Record:
        """A record of this machine, now. `command` is how to make it again (default: the command that runs).

        Raises MeasureError in a notebook, which has no command, unless it is given.
        """
        machine = environment.machine()
        return cls(
            name=name,
            device=machine.device,
            driver=machine.driver,
            versions=dict(environment.versions()),
            command=command or _this_command(name),
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            threads=torch.get_num_threads(),
            note=note,
            measurements=list(measurements),
            data=dict(data or {}),
        )

    def __getitem__(self, name: str) -> Measurement:
        """The measurement of that name. Raises MeasureError naming those there are."""
        for measurement in self.measurements:
            if measurement.name == name:
                return measurement
        names = ", ".join(m.name for m in self.measurements) or "none"
        raise MeasureError(f"{self.path or self.name}: no measurement {name!r}; there are: {names}")

    @property
    def label(self) -> str:
        """Where the numbers come from, to print beside them."""
        parts = [self.device, self.date[:10], *(f"{p} {self.versions[p]}" for p in LABEL_PACKAGES if p in self.versions)]
        where = f" ({_shown(self.path)})" if self.path else ""
        return f"recorded on {', '.join(parts)}{where}"


def data_root() -> Path:
    """The folder of the project's data: HSTU_LAB_DATA, else `data/` of the checkout, else `data/` of the working directory."""
    if given := os.environ.get("HSTU_LAB_DATA"):
        return Path(given)
    checkout = Path(__file__).resolve().parents[1]
    return checkout / "data" if (checkout / "pyproject.toml").exists() else Path("data")


def check_name(name: str) -> None:
    """Raises MeasureError unless a record may have that name; asked before a run whose record would be refused after it."""
    if not _NAME.fullmatch(name):
        raise MeasureError(f"record name {name!r}: use lower-case letters, digits, '.', '_' and '-'")


def write_record(record: Record, root: Path | str | None = None) -> Path:
    """Write `root`/<device slug>/<name>.json (default: `measured/` in the data folder) in one step, replacing what was there.

    Keys are sorted and samples rounded to four significant digits. Raises MeasureError on values that JSON cannot hold.
    """
    check_name(record.name)
    path = _measured(root) / slugify(record.device) / f"{record.name}.json"
    fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(record) if f.name not in ("measurements", "path")}
    measurements = [{**dataclasses.asdict(m), "samples": [float(f"{s:.4g}") for s in m.samples]} for m in record.measurements]
    try:
        text = json.dumps(
            {"schema_version": SCHEMA_VERSION, **fields, "measurements": measurements},
            sort_keys=True, allow_nan=False, ensure_ascii=False, indent=1,
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise MeasureError(f"{path}: {error}: a record holds finite numbers, text, lists and dictionaries") from error
    # One line a list of numbers: a record is read by people too.
    text = re.sub(r"\[\s*(-?\d[^\[\]{}\"]*?)\s*\]", lambda m: "[" + " ".join(m.group(1).split()) + "]", text)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
        file.write(text + "\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    record.path = path
    return path


def list_records(root: Path | str | None = None) -> list[Path]:
    """Every record file, sorted by device and name."""
    return sorted(_measured(root).glob("*/*.json"))


def read_record(name: str, device: str | None = None, root: Path | str | None = None, *, command: str = "") -> Record:
    """The record of that name: of `device` (name or slug), else of this machine, else the newest of any device.

    `command` is named as the remedy where the record is missing. Raises MeasureError for a missing or unreadable record.
    """
    folder = _measured(root)
    others = sorted(folder.glob(f"*/{name}.json"))
    if device is None:
        own = folder / environment.device_slug() / f"{name}.json"
        if not own.exists() and others:
            return max((_load(path, command) for path in others), key=lambda record: record.date)
        path = own
    else:
        path = folder / slugify(device) / f"{name}.json"
    if not path.exists():
        remedy = command or next((f"{_load(other).command}" for other in others), "")
        hint = f"make it with: {remedy}" if remedy else "list_records() shows those there are"
        raise MeasureError(f"{path}: no such record: {hint}")
    return _load(path, command)


def earlier(record: Record, root: Path | str | None = None) -> Record | None:
    """What an earlier run left there under the name and device of `record`; None where nothing readable is."""
    try:
        return read_record(record.name, record.device, root)
    except MeasureError:
        return None


def _load(path: Path, command: str = "") -> Record:
    remedy = f"make it again with: {command}" if command else "restore the file or measure again"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        version = fields.pop("schema_version")
        if version == SCHEMA_VERSION:
            measurements = [Measurement(**m) for m in fields.pop("measurements")]
            return Record(**fields, measurements=measurements, path=path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MeasureError(f"{path}: not a readable record ({error}): {remedy}") from error
    raise MeasureError(f"{path}: schema_version is {version}, this release reads {SCHEMA_VERSION}: {remedy}")


def _measured(root: Path | str | None) -> Path:
    return Path(root) if root is not None else data_root() / "measured"


def _shown(path: Path) -> Path:
    """The path as seen from the checkout, where it is inside."""
    path, checkout = path.resolve(), Path(__file__).resolve().parents[1]
    return path.relative_to(checkout) if path.is_relative_to(checkout) else path


def _this_command(name: str) -> str:
    argv = list(sys.orig_argv)
    if any("ipykernel" in a for a in argv):
        raise MeasureError(f"record {name!r}: a notebook has no command line: say command='...' that makes the record again")
    checkout = f"{Path(__file__).resolve().parents[1]}{os.sep}"
    return shlex.join(["python", *(a.removeprefix(checkout) for a in argv[1:])])
