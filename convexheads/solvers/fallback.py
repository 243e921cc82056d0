"""The composition of two solvers."""

from __future__ import annotations

from jaxtyping import Bool
from torch import Tensor

from convexheads.errors import InputError
from convexheads.solvers.base import Plan, Solver
from convexheads.solvers.failures import OnFailure
from convexheads.solvers.kkt import KKT
from convexheads.solvers.problem import DualProblem


class Fallback(Solver):
    """A composition of two solvers, of which the second one solves the tasks that the first one does not certify.

    Use it when a fast solver fails on some tasks. Each task has the gradient of the solver that solved it.

    Args:
        first: the solver of all tasks.
        then: the solver of the tasks that `first` does not certify to its own tolerance.
        on_failure: what happens if neither solver certifies a task: "raise" (default), "warn" or "return". The
            `on_failure` of the two solvers has no effect. The attribute `tolerance` is the larger one of theirs.

    Example:
        `SVMHead(solver=Fallback(ActiveSetSolver(), InteriorPointSolver()))`
    """

    def __init__(self, first: Solver, then: Solver, *, on_failure: OnFailure = "raise") -> None:
        for name, solver in (("first", first), ("then", then)):
            if not isinstance(solver, Solver):
                raise InputError(f"Fallback({name})", "a Solver", repr(solver))
        super().__init__(tolerance=max(first.tolerance, then.tolerance), on_failure=on_failure)
        self.first, self.then = first, then

    @property
    def is_traceable(self) -> bool:
        return self.first.is_traceable and self.then.is_traceable

    def factorize(
        self, problem: DualProblem, at_upper: Bool[Tensor, "tasks n k"], at_lower: Bool[Tensor, "tasks n k"]
    ) -> KKT:
        return self.first.factorize(problem, at_upper, at_lower)

    def plan(self, problem: DualProblem) -> Plan:
        plan = self.first.plan(problem)
        return plan._replace(solvers=(*plan.solvers, self.then))
