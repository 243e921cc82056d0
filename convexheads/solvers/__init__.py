"""Interchangeable solvers of the one dual QP, by object or by name."""

from __future__ import annotations

from convexheads.errors import InputError
from convexheads.solvers.base import OnFailure, Solved, Solver
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
"""Solvers by name, for `get_solver`."""

__all__ = [
    "QP",
    "SOLVERS",
    "CvxpylayersSolver",
    "MoreauSolver",
    "NativeSolver",
    "OnFailure",
    "QpthSolver",
    "Solution",
    "Solved",
    "Solver",
    "Status",
    "get_solver",
]


def get_solver(solver: Solver | str) -> Solver:
    """The solver itself, or the one of that name with its default settings.

    Args:
        solver: a `Solver`, or one of the names in `SOLVERS`: "native", "qpth", "cvxpylayers", "moreau".

    Returns:
        A solver.

    Raises:
        InputError: neither a `Solver` nor a known name.
        MissingDependencyError: the named backend's package is not installed.
    """
    if isinstance(solver, Solver):
        return solver
    if isinstance(solver, str) and solver in SOLVERS:
        return SOLVERS[solver]()
    raise InputError("solver", f"a Solver or one of {', '.join(map(repr, SOLVERS))}", repr(solver))
