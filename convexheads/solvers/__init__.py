"""Interchangeable solvers of the one dual QP, by object or by name."""

from __future__ import annotations

from convexheads.errors import InputError
from convexheads.solvers.base import OnFailure, Solver
from convexheads.solvers.cvxpylayers import CvxpylayersSolver
from convexheads.solvers.moreau import MoreauSolver
from convexheads.solvers.native import NativeSolver
from convexheads.solvers.problem import QP, Solution, Status
from convexheads.solvers.qpth import QpthSolver

SOLVERS: dict[str, type[Solver]] = {
    "native": NativeSolver,
    "qpth": QpthSolver,
    "cvxpylayers": CvxpylayersSolver,
    "moreau": MoreauSolver,
}

__all__ = [
    "QP",
    "SOLVERS",
    "CvxpylayersSolver",
    "MoreauSolver",
    "NativeSolver",
    "OnFailure",
    "QpthSolver",
    "Solution",
    "Solver",
    "Status",
    "get_solver",
]


def get_solver(solver: Solver | str) -> Solver:
    """The solver itself, or the one of that name with its default settings.

    Raises:
        InputError: neither a `Solver` nor a known name.
        MissingDependencyError: the named backend's package is not installed.
    """
    if isinstance(solver, Solver):
        return solver
    if isinstance(solver, str) and solver in SOLVERS:
        return SOLVERS[solver]()
    raise InputError("solver", repr(solver), f"a Solver or one of {', '.join(map(repr, SOLVERS))}")
