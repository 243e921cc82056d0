"""The default solver: plain torch, structured, certified."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import ClassVar, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from convexheads.errors import InputError
from convexheads.solvers import active_set, implicit
from convexheads.solvers.base import OnFailure, Solved, Solver
from convexheads.solvers.interior_point import interior_point
from convexheads.solvers.problem import QP, Certificate

_ENOUGH_ROUNDS = 12
_ENOUGH_ITERATIONS = 100
# Both go further than the tolerance: until the active set is right, on which the gradient depends.
_AIM = 1e-3
# Above this, the blocks of all classes side by side would take too much memory.
_LARGEST_COMPILED = 2**28


@cache
def numba_is_installed() -> bool:
    """Whether Numba is there, and scipy, whose BLAS it uses; looked for once."""
    return None not in map(find_spec, ("numba", "scipy"))


def can_be_compiled(qp: QP) -> bool:
    """Whether Numba is installed, and the problem one for `solvers/compiled.py`."""
    tasks, n, k = qp.linear.shape
    suited = qp.linear.device.type == "cpu" and qp.linear.dtype == torch.float64
    return suited and tasks * k * n * n <= _LARGEST_COMPILED and numba_is_installed()


class NativeSolver(Solver):
    """Active-set Newton, and a structured interior point for the tasks that it doesn't solve.

    Nothing larger than n x n is ever formed: k + 1 Choleskys a round, all tasks at once, on any device. The gradient is
    exact at the solution (`solvers/implicit.py`), to any order, and batches are as good as loops: a task that is hard
    or degenerate changes nothing for its neighbours.

    With `max_iterations` the interior point is stopped there: the coefficients are its iterate's, made feasible, and
    the gradient is that of the problem with the active set which the iterate shows.

    With Numba installed (`pip install 'convexheads[numba]'`), the active-set search runs compiled on the CPU, many
    times faster. The first call compiles, for some ten seconds; the result is kept on disk.

    Args:
        max_iterations: as for every `Solver`.
        tolerance: likewise.
        on_failure: likewise.
        compiled: whether the search runs compiled. None, the default: where that is possible. False: never.
    """

    default_tolerance: ClassVar[float] = 1e-6

    def __init__(
        self,
        *,
        max_iterations: int | None = None,
        tolerance: float | None = None,
        on_failure: OnFailure = "raise",
        compiled: Literal[False] | None = None,
    ) -> None:
        super().__init__(max_iterations=max_iterations, tolerance=tolerance, on_failure=on_failure)
        if compiled not in (False, None):
            raise InputError("NativeSolver(compiled)", repr(compiled), "False, or None for where that is possible")
        self.compiled = compiled

    def __repr__(self) -> str:
        text = super().__repr__()
        return text if self.compiled is None else text[:-1] + (", " if text[-2] != "(" else "") + "compiled=False)"

    def _coefficients(self, qp: QP) -> Solved:
        with torch.no_grad():
            found, certificate, iterations = self._solve(qp.detach())
        # What is returned is the projection that the certificate is about.
        certificate = certificate._replace(residual=certificate.violation)
        return Solved(implicit.attach(qp, found), iterations, certificate)

    def _solve(self, qp: QP) -> tuple[active_set.ActiveSet, Certificate, Int[Tensor, " tasks"]]:
        aim = _AIM * self.tolerance
        if self.max_iterations is not None:
            coef, iterations = interior_point(qp, tolerance=aim, max_iterations=self.max_iterations)
            return *active_set.polish(qp, coef, move=False), iterations
        if self.compiled is None and can_be_compiled(qp):
            from convexheads.solvers import compiled

            found, iterations = compiled.search(qp, max_rounds=_ENOUGH_ROUNDS)
        else:
            found, iterations = active_set.search(qp, max_rounds=_ENOUGH_ROUNDS)
        certificate = qp.certify(found.coef)
        hard = ~(certificate.within(aim) & certificate.shows_active_set())
        if hard.any():
            coef, more = interior_point(qp.tasks(hard), tolerance=aim, max_iterations=_ENOUGH_ITERATIONS)
            found, certificate = active_set.polish(qp, certificate.feasible.index_put((hard,), coef))
            iterations = iterations.index_put((hard,), more)
        return found._replace(coef=certificate.feasible), certificate, iterations
