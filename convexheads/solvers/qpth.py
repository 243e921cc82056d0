"""The paper's solver, OptNet's qpth, with its known faults kept away from the caller."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from convexheads.solvers import foreign
from convexheads.solvers.base import Solved, Solver
from convexheads.solvers.problem import QP

# torch's batched LU on CPU may hang from about 150 rows on with several threads (pytorch issues 141358, 142815).
_SAFE_ROWS = 128
# qpth factorises the Hessian, which is singular where n > d: its smallest eigenvalue is lifted to this, relative to its
# mean diagonal.
_SMALLEST_EIGENVALUE = 1e-6


class QpthSolver(Solver):
    """qpth (Amos & Kolter 2017), the solver of Lee et al. 2019 and of their published code.

    It needs the extra `qpth`. `QpthSolver(max_iterations=3)` is the paper's early stopping. Gradients are
    qpth's own. What differs from qpth alone:

    - a parameter shared by the batch would get the mean of its gradients: everything is expanded first;
    - batched LU may hang on CPU: large problems are solved task by task;
    - a task that can't be factorised would spoil the batch: it is then solved task by task, and that one is NaN;
    - its double backward is silently wrong: refused with an error;
    - it prints when residuals are large: status and certified gap instead;
    - it factorises the Hessian: where that is singular, its smallest eigenvalue is lifted to 1e-6 of its mean diagonal.

    Its matrices are nk x nk. Takes `max_iterations` (default None: at most 50), `tolerance` (default 1e-5) and
    `on_failure` (default "raise"), as every `Solver` does.

    Raises:
        InputError: an argument is outside its range. Solving raises what `Solver.solve` does.
        MissingDependencyError: qpth is not installed.
    """

    default_tolerance: ClassVar[float] = 1e-5
    package: ClassVar[str | None] = "qpth"

    def _solved(self, qp: QP, units: QP, unit: Float[Tensor, " tasks"]) -> Solved:
        if self.max_iterations is None:
            return super()._solved(qp, units, unit)
        # Where qpth is to stop early, its iterates count: those of the problem as it was posed, as in the paper.
        solved = self._coefficients(qp)
        return solved._replace(coef=solved.coef / unit[:, None, None])

    def _coefficients(self, qp: QP) -> Solved:
        plain = qp.detach()
        wanted = _SMALLEST_EIGENVALUE * plain.curvature().clamp_min(_SMALLEST_EIGENVALUE)
        smallest = torch.linalg.eigvalsh(plain.gram)[:, 0]
        if plain.smoothing is not None:
            smallest = smallest + plain.smoothing.amin((-2, -1))
        lift = (wanted - smallest).clamp_min(0)[:, None, None].expand_as(qp.linear)
        lifted = replace(qp, smoothing=lift if qp.smoothing is None else qp.smoothing + lift)
        dense = lifted.dense()
        if len(qp.linear) > 1 and (dense.G == 0).all(-1).any():  # idle rows, on which qpth's step length is not finite
            alone = (qp.tasks(slice(task, task + 1)) for task in range(len(qp.linear)))
            return Solved(torch.cat([self._coefficients(task).coef for task in alone]))
        solution = foreign.call(self._solve, *dense, backend="QpthSolver")
        return Solved(solution.reshape(qp.linear.shape))

    def _solve(self, *dense: Tensor) -> Tensor:
        Q, _, G, _, A, _ = dense
        whole = self._attempt(*dense) if Q.is_cuda or G.shape[-2] + A.shape[-2] <= _SAFE_ROWS else None
        if whole is not None and torch.isfinite(whole).all():
            return whole
        nothing = torch.full_like(dense[1][:1], torch.nan)
        alone = (self._attempt(*(part[task : task + 1] for part in dense)) for task in range(len(Q)))
        return torch.cat([nothing if solution is None else solution for solution in alone])

    def _attempt(self, *dense: Tensor) -> Tensor | None:
        from qpth.qp import QPFunction

        solve = QPFunction(verbose=-1, maxIter=self.max_iterations or 50, check_Q_spd=False)
        try:
            return solve(*dense)
        except RuntimeError:  # of torch.linalg, on a singular matrix
            return None
