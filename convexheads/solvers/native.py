"""The default solver: plain torch, structured, certified."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from convexheads.solvers import active_set, implicit
from convexheads.solvers.base import Solver
from convexheads.solvers.interior_point import interior_point
from convexheads.solvers.problem import QP

_ENOUGH_ROUNDS = 12
_ENOUGH_ITERATIONS = 100
# Both go further than the tolerance: until the active set is right, on which the gradient depends.
_AIM = 1e-3


class NativeSolver(Solver):
    """Active-set Newton, and a structured interior point for the tasks that it doesn't solve.

    Nothing larger than n x n is ever formed: k + 1 Choleskys a round, all tasks at once, on any device. The gradient is
    exact at the solution (`solvers/implicit.py`), to any order, and batches are as good as loops: a task that is hard
    or degenerate changes nothing for its neighbours.

    With `max_iterations` the interior point is stopped there: the coefficients are its iterate's, made feasible, and
    the gradient is that of the problem with the active set which the iterate shows. See `Solver` for the arguments.
    """

    default_tolerance: ClassVar[float] = 1e-6

    def _coefficients(self, qp: QP) -> tuple[Float[Tensor, "tasks n k"], Int[Tensor, " tasks"]]:
        with torch.no_grad():
            found, iterations = self._solve(qp.detach())
        return implicit.attach(qp, found), iterations

    def _solve(self, qp: QP) -> tuple[active_set.ActiveSet, Int[Tensor, " tasks"]]:
        aim = _AIM * self.tolerance
        if self.max_iterations is not None:
            coef, iterations = interior_point(qp, tolerance=aim, max_iterations=self.max_iterations)
            return active_set.polish(qp, coef, move=False), iterations
        found, certificate, iterations = active_set.search(qp, max_rounds=_ENOUGH_ROUNDS)
        hard = ~certificate.within(aim)
        if hard.any():
            coef, more = interior_point(qp.tasks(hard), tolerance=aim, max_iterations=_ENOUGH_ITERATIONS)
            found = active_set.polish(qp, found.coef.index_put((hard,), coef))
            iterations = iterations.index_put((hard,), more)
        return found, iterations
