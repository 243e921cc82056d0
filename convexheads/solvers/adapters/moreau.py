"""Moreau, a batched differentiable solver by the authors of CVXPY, for the CPU and CUDA."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from convexheads.solvers.adapters import external
from convexheads.solvers.base import Solver
from convexheads.solvers.problem import DualProblem

_CACHE_SIZE = 16
_MAX_ITERATIONS = 200
_MAX_SIZE_FOR_ACTIVE_SET = 500


class MoreauSolver(Solver):
    """Moreau (Apache-2.0, by the authors of CVXPY, 2026). It needs the extra `moreau`.

    Use it to compare with a strong general-purpose solver. It is batched, on the CPU and on CUDA, and keeps the Hessian
    sparse, with one n x n block per class. It builds on Clarabel (Goulart & Chen 2024) and, for small problems on the
    CPU, on DAQP (Arnstroem, Bemporad & Axehill 2022). It computes gradients with diffqcp (Healey, Nobel & Boyd 2025).
    Its solver is built once per shape and thread. Differences from Moreau alone: a request for a second derivative
    raises an error, gradients are scaled per task, and a task that Moreau cannot solve is NaN and affects no other.

    It takes `max_iterations` (default None: at most 200), `tolerance` (default 1e-5) and `on_failure` (default
    "raise"), as every `Solver` does.

    Example:
        `SVMHead(solver=MoreauSolver())`
    """

    default_tolerance: ClassVar[float] = 1e-5
    package: ClassVar[str | None] = "moreau"
    provides_gradient: ClassVar[bool] = True

    def solve_batch(self, problem: DualProblem) -> Float[Tensor, "tasks n k"]:
        tasks, n, k = problem.linear.shape
        signs, limits = zip(*problem.inequalities, strict=True)
        # A bound becomes a constraint if it is finite in any task; where it is infinite, the constraint is idle.
        rows = [sign.any(0).flatten().nonzero().squeeze(-1) for sign in signs]
        smoothing = torch.zeros_like(problem.linear) if problem.smoothing is None else problem.smoothing
        num_sums = n if problem.rows_sum_to_zero else 0
        sums = torch.ones(tasks, num_sums * k).to(problem.linear)
        coefficients = torch.cat([sums, *(sign.flatten(1)[:, row] for sign, row in zip(signs, rows, strict=True))], -1)
        structure = tuple(tuple(row.tolist()) for row in rows), str(problem.linear.device)
        solver = _cache.build(tasks, n, k, num_sums, *structure, self.tolerance * 1e-5, self.max_iterations)

        def solve(gram: Tensor, smoothing: Tensor, linear: Tensor, *limits: Tensor) -> Tensor:
            hessian = gram.unsqueeze(2).expand(tasks, n, k, n) + torch.diag_embed(smoothing.mT).permute(0, 2, 1, 3)
            right = [limit.flatten(1)[:, row] for limit, row in zip(limits, rows, strict=True)]
            right = [linear.new_zeros(tasks, num_sums), *right]
            found = solver.solve(hessian.flatten(1), coefficients, -linear.flatten(1), torch.cat(right, -1))
            return found.x.reshape(linear.shape)

        return external.call_backend(solve, problem.gram, smoothing, problem.linear, *limits, backend="MoreauSolver")


def _build(
    tasks: int,
    n: int,
    k: int,
    num_sums: int,
    rows: tuple[tuple[int, ...], ...],
    device: str,
    tolerance: float,
    max_iterations: int | None,
) -> Any:
    """A solver for problems of this structure."""
    import moreau
    from moreau.torch import Solver as Moreau

    entry = torch.arange(n * k).view(n, k)
    hessian_columns = entry.T.unsqueeze(0).expand(n, k, n).flatten()  # row (i, c) has the columns (j, c) for all j
    bounded = torch.tensor([row for side in rows for row in side], dtype=torch.long)
    columns = torch.cat([entry[:num_sums].flatten(), bounded])
    counts = torch.cat([torch.full((num_sums,), k), torch.ones(len(bounded), dtype=torch.long)])
    make: Any = Moreau
    return make(
        n=n * k,
        m=len(counts),
        P_row_offsets=torch.arange(n * k + 1) * n,
        P_col_indices=hessian_columns,
        A_row_offsets=torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]),
        A_col_indices=columns,
        cones=moreau.Cones(num_zero_cones=num_sums, num_nonneg_cones=len(bounded)),
        settings=moreau.Settings(
            # The rule is that of "auto", which would emit a warning. The active-set solver cannot be stopped early.
            solver="active_set"
            if max_iterations is None and device == "cpu" and n * k <= _MAX_SIZE_FOR_ACTIVE_SET
            else "ipm",
            device=device.partition(":")[0],
            batch_size=tasks,
            enable_grad=True,
            max_iter=max_iterations or _MAX_ITERATIONS,
            verbose=False,
            ipm_settings=moreau.IPMSettings(tol_gap_abs=tolerance, tol_gap_rel=tolerance, tol_feas=tolerance),
        ),
    )


class _Cache(threading.local):
    """The last results of `_build` in this thread, because threads must not share a solver of Moreau."""

    def __init__(self) -> None:
        self.build = lru_cache(_CACHE_SIZE)(_build)


_cache = _Cache()
