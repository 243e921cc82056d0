"""What happens after a task was not solved: an error, a warning, or only a status."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from convexheads._compiler import custom_operator
from convexheads._functorch import inspect_values
from convexheads._looks import check
from convexheads.errors import SolverError, SolverWarning
from convexheads.solvers.certificate import ZERO_GAP, reachable
from convexheads.solvers.problem import Solution, Status, describe_failures

OnFailure = Literal["raise", "warn", "return"]
"""The policy for a task that is not solved: "raise" `SolverError`, emit `SolverWarning`, or "return" it."""
_INTERNAL = ("convexheads", "torch", "jaxtyping")


def handle_failures(
    name: str, solution: Solution, tolerance: float, on_failure: OnFailure, *, remedy: str = ""
) -> Solution:
    """Return the solution or, if one of its tasks failed, raise or warn, depending on `on_failure`.

    The message begins with the `name` of the head or solver, and may contain a sentence with a `remedy`.
    """
    if on_failure != "return":
        if torch.compiler.is_compiling():
            return _handle_failures_later(name, solution, tolerance, on_failure)
        report = partial(_report, name, solution, tolerance, on_failure, remedy)
        inspect_values(partial(_check_status, report), solution.status, solution.gap, solution.residual)
    return solution


def _check_status(report: Callable[[str], None], status: Tensor, gap: Tensor, residual: Tensor) -> None:
    check((status == Status.FAILED).any(), lambda: report(describe_failures(status, gap, residual)))


def certified(
    coef: Tensor,
    gap: Tensor,
    error: Tensor,
    tolerance: float,
    otherwise: Status,
    iterations: Tensor | None,
    *,
    largest_error: float | None = None,
) -> Solution:
    """The solution of a head that computes its own gap, with the status `otherwise` where it is not solved.

    A task is solved if the gap is at most the tolerance, and the squared relative error of the weights, of which
    `error` is an upper bound, at most `largest_error`, by default the square root of the tolerance. For weights of
    zero, a tiny gap is enough. A tolerance below the effect of rounding is raised to that, as in
    `Certificate.converged`.
    """
    tolerance = reachable(tolerance, gap.dtype)
    limit = tolerance**0.5 if largest_error is None else reachable(largest_error, gap.dtype)
    error = error.masked_fill(gap <= ZERO_GAP, 0)
    status = torch.where((gap <= tolerance) & (error <= limit), Status.CONVERGED.value, otherwise.value)
    if otherwise is not Status.FAILED:
        status = torch.where(torch.isfinite(gap), status, Status.FAILED)
    return Solution(coef, None, None, status=status, gap=gap, residual=error.sqrt(), iterations=iterations)


def _report(name: str, solution: Solution, tolerance: float, on_failure: OnFailure, remedy: str, failures: str) -> None:
    message = f"{name}: {failures}, to the tolerance {tolerance:g}. {remedy}"
    if on_failure == "raise":
        advice = "Pass on_failure='warn' or 'return' to continue."
        raise SolverError(f"{message}`SolverError.solution` holds the solution of the whole batch. {advice}", solution)
    message += "The `solution` of the fit holds the status of each task."
    # The warning points to the code that called the library, directly or through torch.
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _INTERNAL:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, SolverWarning, stacklevel=level)


def _handle_failures_later(name: str, solution: Solution, tolerance: float, on_failure: OnFailure) -> Solution:
    """Call `handle_failures` when a compiled graph runs. A graph keeps the operator because it returns `coef`."""
    status, gap, residual = (value.detach() for value in (solution.status, solution.gap, solution.residual))
    return replace(solution, coef=_pass_on(name, tolerance, on_failure, solution.coef, status, gap, residual))


_SCHEMA = (
    "(str name, float tolerance, str on_failure, Tensor coef, Tensor status, Tensor gap, Tensor residual) -> Tensor"
)


@custom_operator("handle_failures", _SCHEMA)
def _pass_on(name, tolerance, on_failure, coef, status, gap, residual):
    solution = Solution(coef, None, None, status=status, gap=gap, residual=residual, iterations=None)
    return handle_failures(name, solution, tolerance, on_failure).coef.clone()


_pass_on.register_fake(lambda name, tolerance, on_failure, coef, *_: torch.empty_like(coef))
_pass_on.register_autograd(lambda ctx, gradient: (None, None, None, gradient, None, None, None))
