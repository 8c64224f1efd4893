"""Operators behind one interface: `get("reference")` is the oracle, the faster ones are tested against it."""

from __future__ import annotations

import importlib
import types

BACKENDS = {
    "reference": "hstu_lab.ops.reference",
    "triton": "hstu_lab.ops.triton_ops",
    "cutlass": "hstu_lab.ops.cutlass_ops",
}


def get(name: str) -> types.ModuleType:
    """The module of operators of that name. Raises ValueError naming the known ones, ImportError naming what to install."""
    if name not in BACKENDS:
        raise ValueError(f"ops is {name!r}: use one of {', '.join(BACKENDS)}")
    return importlib.import_module(BACKENDS[name])
