"""Interchangeable solvers of the dual quadratic program of SVMs. A head takes a solver or its name."""

from __future__ import annotations

from convexheads.errors import InputError
from convexheads.solvers.adapters.cvxpylayers import CvxpylayersSolver
from convexheads.solvers.adapters.external import to_dense
from convexheads.solvers.adapters.moreau import MoreauSolver
from convexheads.solvers.adapters.qpth import QpthSolver
from convexheads.solvers.base import Plan, Solver, SolverResult
from convexheads.solvers.failures import OnFailure
from convexheads.solvers.fallback import Fallback
from convexheads.solvers.native.active_set import ActiveSetSolver
from convexheads.solvers.native.admm import ADMMSolver
from convexheads.solvers.native.default import NativeSolver
from convexheads.solvers.native.interior_point import InteriorPointSolver
from convexheads.solvers.problem import DualProblem, Solution, Status, WarmStart

SOLVERS: dict[str, type[Solver]] = {
    "native": NativeSolver,
    "active-set": ActiveSetSolver,
    "interior-point": InteriorPointSolver,
    "admm": ADMMSolver,
    "qpth": QpthSolver,
    "cvxpylayers": CvxpylayersSolver,
    "moreau": MoreauSolver,
}
"""Solvers by name, for `get_solver`."""

__all__ = ["ADMMSolver", "ActiveSetSolver", "Fallback", "InteriorPointSolver", "NativeSolver"]
__all__ += ["CvxpylayersSolver", "MoreauSolver", "QpthSolver"]
__all__ += ["SOLVERS", "OnFailure", "Plan", "Solver", "SolverResult", "get_solver"]
__all__ += ["DualProblem", "Solution", "Status", "WarmStart", "to_dense"]


def get_solver(solver: Solver | str) -> Solver:
    """Return the `solver` itself or, for a name in `SOLVERS`, that solver with its default settings.

    Raises:
        InputError: `solver` is neither a `Solver` nor a known name.
        MissingDependencyError: the package of the named backend is not installed.
    """
    if isinstance(solver, Solver):
        return solver
    if isinstance(solver, str) and solver in SOLVERS:
        return SOLVERS[solver]()
    raise InputError("solver", f"a Solver or one of {', '.join(map(repr, SOLVERS))}", repr(solver))
