"""qpth, the solver of Lee et al. 2019, with workarounds for its known defects."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from convexheads.solvers.adapters import external
from convexheads.solvers.base import Solver
from convexheads.solvers.problem import DualProblem

# With several threads, torch's batched LU on the CPU may hang from about 150 rows (pytorch issues 141358, 142815).
_MAX_ROWS_IN_BATCH = 128
# qpth factorizes the Hessian, which is singular if n > d. Its smallest eigenvalue is raised to this, relative to its
# mean diagonal.
_SMALLEST_EIGENVALUE = 1e-6


class QpthSolver(Solver):
    """qpth (Amos & Kolter 2017), the solver of Lee et al. 2019 and of their published code.

    Use it to reproduce the paper: `QpthSolver(max_iterations=3)` stops as early as the paper does. It needs the extra
    `qpth`. qpth computes the gradients. Defects of qpth, and what this class does:

    - For a parameter that tasks share, qpth returns the mean of the gradients, not the sum: inputs are expanded first.
    - Batched LU may hang on the CPU: large problems are solved task by task.
    - One task that cannot be factorized fails the whole batch: tasks are then solved one by one, and it alone is NaN.
    - The second derivative is silently wrong: a request for it raises an error.
    - qpth prints a message if residuals are large: the status and the certified gap replace the message.
    - qpth fails without inequalities, as in tasks with one class: the linear system is solved instead.
    - qpth factorizes the Hessian: if that is singular, its smallest eigenvalue is raised to 1e-6 of its mean diagonal.

    Its matrices are nk x nk. It takes `max_iterations` (default None: at most 50), `tolerance` (default 1e-5) and
    `on_failure` (default "raise"), as every `Solver` does.

    Example:
        `SVMHead(solver=QpthSolver(max_iterations=3))`
    """

    default_tolerance: ClassVar[float] = 1e-5
    package: ClassVar[str | None] = "qpth"
    provides_gradient: ClassVar[bool] = True

    @property
    def rescales(self) -> bool:
        # When qpth stops early, the result depends on the scaling, so the original problem is solved, as in the paper.
        return self.max_iterations is None

    def solve_batch(self, problem: DualProblem) -> Float[Tensor, "tasks n k"]:
        plain = problem.detach()
        target_eigenvalue = _SMALLEST_EIGENVALUE * plain.curvature().clamp_min(_SMALLEST_EIGENVALUE)
        smallest = torch.linalg.eigvalsh(plain.gram)[:, 0]
        if plain.smoothing is not None:
            smallest = smallest + plain.smoothing.amin((-2, -1))
        shift = (target_eigenvalue - smallest).clamp_min(0)[:, None, None].expand_as(problem.linear)
        shifted = replace(problem, smoothing=shift if problem.smoothing is None else problem.smoothing + shift)
        dense = external.to_dense(shifted)
        tasks = len(problem.linear)
        if tasks > 1 and (dense.G == 0).all(-1).any():  # idle rows, for which the step length of qpth is not finite
            per_task = (problem.select(slice(task, task + 1)) for task in range(tasks))
            return torch.cat([self.solve_batch(task) for task in per_task])
        return external.call_backend(self._solve_dense, *dense, backend="QpthSolver").reshape(problem.linear.shape)

    def _solve_dense(self, *dense: Tensor) -> Tensor:
        Q, p, G, _, A, b = dense
        if not G.shape[-2]:  # qpth needs an inequality
            zero = A.new_zeros(*A.shape[:-2], A.shape[-2], A.shape[-2])
            kkt = torch.cat([torch.cat([Q, A.mT], -1), torch.cat([A, zero], -1)], -2)
            return torch.linalg.solve(kkt, torch.cat([-p, b], -1))[..., : Q.shape[-1]]
        batched = self._attempt(*dense) if Q.is_cuda or G.shape[-2] + A.shape[-2] <= _MAX_ROWS_IN_BATCH else None
        if batched is not None and torch.isfinite(batched).all():
            return batched
        unsolved = torch.full_like(dense[1][:1], torch.nan)
        per_task = (self._attempt(*(part[task : task + 1] for part in dense)) for task in range(len(Q)))
        return torch.cat([unsolved if solution is None else solution for solution in per_task])

    def _attempt(self, *dense: Tensor) -> Tensor | None:
        from qpth.qp import QPFunction

        solve = QPFunction(verbose=-1, maxIter=self.max_iterations or 50, check_Q_spd=False)
        try:
            return solve(*dense)
        except RuntimeError:  # of torch.linalg, on a singular matrix
            return None
