"""The default solver: plain torch, structured, certified."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from convexheads.solvers import implicit
from convexheads.solvers.base import Solver
from convexheads.solvers.interior_point import interior_point
from convexheads.solvers.problem import QP

_ENOUGH_ITERATIONS = 100
# The interior point goes further than the tolerance, until the active set shows.
_AIM = 1e-3


class NativeSolver(Solver):
    """Structured interior point, then an exact solve on the active set that it found.

    Nothing larger than n x n is ever formed: k + 1 Choleskys an iteration, all tasks at once, on any device. The
    gradient is exact at the solution (`solvers/implicit.py`), to any order, and batches are as good as loops: a task
    that is hard or degenerate changes nothing for its neighbours.

    With `max_iterations` the coefficients are the stopped iterate's, made feasible, and the gradient is that of the
    problem with the active set which that iterate shows. See `Solver` for the arguments.
    """

    default_tolerance: ClassVar[float] = 1e-6

    def _coefficients(self, qp: QP) -> tuple[Float[Tensor, "tasks n k"], Int[Tensor, " tasks"]]:
        with torch.no_grad():
            coef, iterations = interior_point(
                qp.detach(), tolerance=_AIM * self.tolerance, max_iterations=self.max_iterations or _ENOUGH_ITERATIONS
            )
        return implicit.attach(qp, coef, polish=self.max_iterations is None), iterations
