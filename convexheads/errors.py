"""The library's own errors: every message names the argument, what came and what was wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convexheads.solvers.problem import Solution


class ConvexHeadsError(Exception):
    """Base of every error that convexheads raises on purpose."""


class InputError(ConvexHeadsError, ValueError):
    """An argument is unusable."""

    def __init__(self, argument: str, got: Any, wanted: str) -> None:
        self.argument = argument
        super().__init__(f"{argument}: got {got}, wanted {wanted}")


def check_counts(**counts: object) -> None:
    """Raise `InputError` unless each is an integer of at least 1."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InputError(name, repr(count), "an integer of at least 1")


class SolverError(ConvexHeadsError, RuntimeError):
    """At least one task of a batch could not be solved to the tolerance asked for.

    Attributes:
        solution: the whole batch's solution, with its per-task status, so that the tasks that
            succeeded are not lost. None where a closed form failed.
    """

    def __init__(self, message: str, solution: Solution | None = None) -> None:
        self.solution = solution
        super().__init__(message)


class MissingDependencyError(ConvexHeadsError, ImportError):
    """An optional package is needed and not installed."""

    def __init__(self, package: str, extra: str, needed_by: str) -> None:
        super().__init__(f"{needed_by} needs the package {package!r}: pip install 'convexheads[{extra}]'")


class SolverWarning(UserWarning):
    """What `on_failure="warn"` emits where "raise" would raise `SolverError`."""
