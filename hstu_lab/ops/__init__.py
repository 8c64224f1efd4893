"""Operators behind one interface: `get("reference")` is the oracle, the faster ones are tested against it."""

from __future__ import annotations

import importlib
import types

BACKENDS = {
    "reference": "hstu_lab.ops.reference",
    "triton": "hstu_lab.ops.triton_ops",
    "cutlass": "hstu_lab.ops.cutlass_ops",
}


class OpsUnavailable(ImportError):
    """Operators that cannot run here; the message names what they need."""


def get(name: str) -> types.ModuleType:
    """The module of operators of that name. Raises ValueError naming the known ones, OpsUnavailable naming what is missing."""
    if name not in BACKENDS:
        raise ValueError(f"ops is {name!r}: use one of {', '.join(BACKENDS)}")
    try:
        module = importlib.import_module(BACKENDS[name])
        getattr(module, "require", lambda: None)()
    except ImportError as error:
        if (error.name or "").startswith("hstu_lab"):  # a defect of ours, not of the machine
            raise
        raise OpsUnavailable(f"ops {name!r} cannot run here: {error}; `reference` runs everywhere") from error
    return module
