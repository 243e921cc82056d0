"""What happens after a task was not solved: an error, a warning, or only a status."""

from __future__ import annotations

import sys
import warnings
from typing import Literal

from torch import Tensor

from convexheads._functorch import inspect_values
from convexheads._validation import describe_task
from convexheads.errors import SolverError, SolverWarning
from convexheads.solvers.problem import Solution, Status

OnFailure = Literal["raise", "warn", "return"]
"""The policy for a task that is not solved: "raise" `SolverError`, emit `SolverWarning`, or "return" it."""
_INTERNAL = ("convexheads", "torch", "jaxtyping")


def handle_failures(name: str, solution: Solution, tolerance: float, on_failure: OnFailure) -> None:
    """Raise or warn, depending on `on_failure`, if a task of the solution failed."""
    failures = "" if on_failure == "return" else describe_failures(solution)
    if not failures:
        return
    message = f"{name}: {failures}, to the tolerance {tolerance:g}. "
    if on_failure == "raise":
        advice = "Pass on_failure='warn' or 'return' to continue."
        raise SolverError(f"{message}`SolverError.solution` holds the solution of the whole batch. {advice}", solution)
    message += "The `solution` of the fit holds the status of each task."
    # The warning points to the code that called the library, directly or through torch.
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _INTERNAL:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, SolverWarning, stacklevel=level)


def describe_failures(solution: Solution) -> str:
    """The tasks of the solution that failed, with their gaps and residuals, in words; empty if there are none."""
    return inspect_values(_describe_failures, solution.status, solution.gap, solution.residual)


def _describe_failures(status: Tensor, gap: Tensor, residual: Tensor) -> str:
    failures = []
    for task in map(tuple, (status == Status.FAILED).nonzero().tolist()):
        sizes = f"relative gap {gap[task].item():.1e}, residual {residual[task].item():.1e}"
        failures.append(f"{describe_task(task)}: {sizes}")
    shown = "; ".join(failures[:5]) + ("; ..." if len(failures) > 5 else "")
    return f"{len(failures)} of {status.numel()} tasks not solved ({shown})" if failures else ""
