"""What happens after a task was not solved: an error, a warning, or only a status."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

from torch import Tensor

from convexheads._functorch import inspect_values
from convexheads._validation import describe_task
from convexheads.errors import SolverError, SolverWarning
from convexheads.solvers.problem import Solution, Status

OnFailure = Literal["raise", "warn", "return"]
"""The policy for a task that is not solved: "raise" `SolverError`, emit `SolverWarning`, or "return" it."""
_INTERNAL = ("convexheads", "torch", "jaxtyping")
_postponed: ContextVar[list[tuple[str, float, OnFailure]] | None] = ContextVar("_postponed", default=None)


@contextmanager
def postpone_failures() -> Iterator[list[tuple[str, float, OnFailure]]]:
    """In this context, `handle_failures` only adds its settings to the list, for a batch that is solved in parts."""
    token = _postponed.set(settings := [])
    try:
        yield settings
    finally:
        _postponed.reset(token)


def handle_failures(name: str, solution: Solution, tolerance: float, on_failure: OnFailure) -> None:
    """Raise or warn, depending on `on_failure`, if a task of the solution failed."""
    if (settings := _postponed.get()) is not None:
        settings.append((name, tolerance, on_failure))
        return
    if on_failure == "return":
        return
    failures = inspect_values(_failures, solution.status, solution.gap, solution.residual)
    if not failures:
        return
    message = (
        f"{name}: {len(failures)} of {solution.status.numel()} tasks not solved to the tolerance "
        f"{tolerance:g} ({'; '.join(failures[:5])}{'; ...' if len(failures) > 5 else ''}). "
    )
    if on_failure == "raise":
        advice = "Pass on_failure='warn' or 'return' to continue."
        raise SolverError(f"{message}`SolverError.solution` holds the solution of the whole batch. {advice}", solution)
    message += "The `solution` of the fit holds the status of each task."
    # The warning points to the code that called the library, directly or through torch.
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _INTERNAL:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, SolverWarning, stacklevel=level)


def _failures(status: Tensor, gap: Tensor, residual: Tensor) -> list[str]:
    failures = []
    for task in map(tuple, (status == Status.FAILED).nonzero().tolist()):
        sizes = f"relative gap {gap[task].item():.1e}, residual {residual[task].item():.1e}"
        failures.append(f"{describe_task(task)}: {sizes}")
    return failures
