"""Exercise checks: `check("name", answer)` prints ✓, or ✗ with what to look at.

A check is a function of the learner's answer, registered under the exercise's name, that calls `expect` for each thing that
must hold. What goes wrong inside the answer is told in one line, never as a traceback.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

_CHECKS: dict[str, Callable[[Any], None]] = {}


class CheckFailed(AssertionError):
    """An answer that does not pass; the message says what to look at."""


def register(name: str) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Decorator: the check of the exercise of that name. Raises ValueError where the name is taken."""

    def add(function: Callable[[Any], None]) -> Callable[[Any], None]:
        if name in _CHECKS:
            raise ValueError(f"check {name!r} is registered twice")
        _CHECKS[name] = function
        return function

    return add


def names() -> list[str]:
    """Every registered check."""
    return sorted(_CHECKS)


def expect(condition: bool, hint: str) -> None:
    """Fail the running check with that hint unless the condition holds."""
    if not condition:
        raise CheckFailed(hint)


def expect_close(got: Any, wanted: float, hint: str, *, tolerance: float = 1e-6) -> None:
    """Fail the running check unless `got` is a number within a relative `tolerance` of `wanted`."""
    try:
        close = abs(float(got) - wanted) <= tolerance * max(abs(wanted), 1e-12)
    except (TypeError, ValueError):
        raise CheckFailed(f"got {got!r} where a number was expected: {hint}") from None
    expect(close, f"got {float(got):.6g}, expected {wanted:.6g}: {hint}")


def check(name: str, answer: Any, strict: bool = False) -> bool:
    """Check the answer (usually a function) to the exercise `name`; print the verdict and return it.

    With `strict` a wrong answer raises CheckFailed. Raises KeyError for a name that no check has.
    """
    if name not in _CHECKS:
        raise KeyError(f"no check {name!r}; there are: {', '.join(names())}")
    try:
        _CHECKS[name](answer)
    except CheckFailed as failure:
        problem = str(failure)
    except NotImplementedError as error:
        problem = str(error) or "not written yet: replace `raise NotImplementedError` by your answer"
    except Exception as error:
        problem = f"your answer raised {type(error).__name__}: {error}{_where(error, answer)}"
    else:
        print(f"✓ {name}")
        return True
    print(f"✗ {name}: {problem}")
    if strict:
        raise CheckFailed(f"{name}: {problem}")
    return False


def _where(error: Exception, answer: Any) -> str:
    """The line of the answer that raised, counted from its `def`."""
    code = getattr(answer, "__code__", None)
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if code and frame.f_code is code]
    return f" (line {lines[-1] - code.co_firstlineno + 1} of {code.co_name})" if lines else ""


# 00_start_here


@register("one-stage-faster")
def _one_stage_faster(answer):
    stages = {"tokens": 0.5, "encoder": 1.5, "stack": 6.0, "ranking": 2.0}
    expect_close(answer(stages, "stack", 1), 10.0, "a speed-up of 1 changes nothing: the total is the sum of all stages")
    expect_close(answer(stages, "stack", 4), 5.5, "only that stage shrinks, the others stay as they are")
    expect_close(answer(stages, "encoder", 1e12), 8.5, "a stage that takes no time leaves the rest of the total")
    expect(stages["stack"] == 6.0, "the stages you were given were changed: compute a new total instead")


# 11_unified_pipeline


@register("may-swap")
def _may_swap(answer):
    scores = {3: 9.0, 8: 8.9995, 5: 7.0, 2: 6.0}
    expect(answer([3, 8, 5], [3, 8, 5], scores, 1e-3) is True, "equal lists agree")
    expect(answer([3, 8, 5], [8, 3, 5], scores, 1e-3) is True, "3 and 8 are 0.0005 apart, below twice the error 0.001")
    expect(answer([3, 8, 5], [8, 3, 5], scores, 1e-4) is False, "0.0005 is above twice the error 0.0001: a real difference")
    expect(answer([3, 8, 5], [3, 5, 8], scores, 1e-3) is False, "8 and 5 are far apart: no rounding error swaps them")
    expect(answer([3, 8, 5], [3, 8, 2], scores, 1e-3) is False, "2 took the place of 5, whose score is far above")
    expect(answer([3, 8, 5], [3, 8], scores, 1e-3) is False, "a shorter list does not agree")
    expect(
        answer([3, 8, 5], [3, 3, 5], scores, 1e-3) is False, "3 appears twice and 8 is gone: a list has distinct items"
    )


@register("largest-batch")
def _largest_batch(answer):
    expect(answer(10.0, 2.0, 1.0) == 8, "2 ms once and 1 ms a user: 8 users take exactly 10 ms")
    expect(answer(10.0, 2.0, 1.5) == 5, "5 users take 9.5 ms, 6 take 11 ms: round down")
    expect(answer(10.0, 12.0, 1.0) == 0, "the fixed cost alone breaks the limit: no batch fits")
