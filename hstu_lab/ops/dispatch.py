"""Which kernel is the fastest for a shape, looked up in the committed record of timings, and said aloud.

The record is `cutlass_choices`, made by `python -m hstu_lab.cutlass_bench choices`: for shapes on a grid, the seconds of every
kernel that passed the oracle's test in the same run. The nearest shape decides.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math

from hstu_lab import environment, measure
from hstu_lab.measure import format_seconds

RECORD = "cutlass_choices"
COMMAND = "python -m hstu_lab.cutlass_bench choices"
LIMIT = 1e-2
"""Largest relative error against the float32 oracle of a kernel that may be chosen."""

_log = logging.getLogger(__name__)
_said: dict[str, Choice] = {}


@dataclasses.dataclass(frozen=True)
class Choice:
    """A kernel's name and why it was taken, in words. `seconds`: what each candidate took at the nearest recorded shape."""

    op: str
    shape: tuple[tuple[str, int], ...]
    kernel: str
    reason: str
    seconds: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        shape = " ".join(f"{name}={size}" for name, size in self.shape)
        return f"{self.op} {shape}: {self.kernel} ({self.reason})"


@functools.lru_cache(maxsize=4096)
def choose(op: str, default: str, known: frozenset[str], **shape: int) -> Choice:
    """The fastest of the `known` kernels for this shape by the record, `default` where there is no record for this GPU."""
    choice = _look_up(op, default, known, tuple(sorted(shape.items())))
    if str(choice) not in _said:
        _said[str(choice)] = choice
        _log.info("%s", choice)
    return choice


def said() -> list[Choice]:
    """Every choice that this process has made, in order."""
    return list(_said.values())


def _look_up(op: str, default: str, known: frozenset[str], shape: tuple[tuple[str, int], ...]) -> Choice:
    record, problem = _record()
    rows = [row for row in record.data["rows"] if row["op"] == op] if record else []
    dims = dict(shape)
    rows = [row for row in rows if row["shape"].keys() == dims.keys() and row["shape"].get("d") == dims.get("d")]
    if not rows:
        return Choice(op, shape, default, problem or "no such shape in the record")
    nearest = min(rows, key=lambda row: distance(row["shape"], dims))
    fit = {name: s for name, s in nearest["seconds"].items() if name in known and nearest["error"][name] <= LIMIT}
    if not fit:
        return Choice(op, shape, default, "no kernel of the record is here")
    kernel = min(fit, key=fit.get)
    rivals = sorted(fit.items(), key=lambda item: item[1])
    near = "" if nearest["shape"] == dims else " at " + " ".join(f"{n}={s}" for n, s in sorted(nearest["shape"].items()))
    second = f", {rivals[1][0]} {format_seconds(rivals[1][1])}" if len(rivals) > 1 else ""
    return Choice(op, shape, kernel, f"{format_seconds(fit[kernel])}{second}{near}, {record.label}", tuple(rivals))


def distance(a: dict[str, int], b: dict[str, int]) -> float:
    """Between two shapes of the same names: Euclidean, in powers of two."""
    return math.dist([math.log2(max(a[name], 1)) for name in sorted(a)], [math.log2(max(b[name], 1)) for name in sorted(a)])


@functools.cache
def _record() -> tuple[measure.Record | None, str]:
    """(record, why there is none). One of another GPU counts only among GPUs of Hopper's generation."""
    try:
        record = measure.read_record(RECORD, command=COMMAND)
    except measure.MeasureError as error:
        return None, str(error)
    here = environment.machine()
    if record.device != here.device and not (_hopper(record.device) and _hopper(here.device)):
        return None, f"nothing was recorded on {here.device or 'this machine'}: {COMMAND}"
    return record, ""


def _hopper(device: str) -> bool:
    return any(name in device for name in ("H100", "H200", "H800", "H20", "GH200"))
