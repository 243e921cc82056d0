"""Moreau, the batched differentiable solver of CVXPY's authors, on CPU and CUDA."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any, ClassVar

import torch
from torch import Tensor

from convexheads.solvers import foreign
from convexheads.solvers.base import Solved, Solver
from convexheads.solvers.problem import QP

_KEPT = 16
_ENOUGH_ITERATIONS = 200
_ACTIVE_SET = 500
_local = threading.local()  # its solvers may not be shared by threads


class MoreauSolver(Solver):
    """Moreau (Apache-2.0, by the authors of CVXPY, 2026). It needs the extra `moreau`.

    A general conic solver, batched, on the CPU and on CUDA; it keeps the Hessian sparse, one n x n block a class. It
    builds on Clarabel (Goulart & Chen 2024) and, for small problems on the CPU, on DAQP (Arnstroem, Bemporad & Axehill
    2022). Gradients are its own, by diffqcp (Healey, Nobel & Boyd 2025). Its solver is built once for each shape and
    thread. What differs from Moreau alone: a second derivative is refused; gradients are scaled, task by task; a
    problem it cannot solve is NaN for its task alone.

    Takes `max_iterations` (default None: at most 200), `tolerance` (default 1e-5) and `on_failure` (default "raise"),
    as every `Solver` does.

    Raises:
        InputError: an argument is outside its range. Solving raises what `Solver.solve` does.
        MissingDependencyError: moreau is not installed.
    """

    default_tolerance: ClassVar[float] = 1e-5
    package: ClassVar[str | None] = "moreau"

    def _coefficients(self, qp: QP) -> Solved:
        tasks, n, k = qp.linear.shape
        bounds = [(sign, bound) for sign, bound in ((1.0, qp.upper), (-1.0, qp.lower)) if bound is not None]
        finite = [torch.isfinite(bound) for _, bound in bounds]
        # An entry has a row where any task bounds it; for the others of the batch that is the idle row `0 a <= 1`.
        rows = [(on.any(0).flatten().nonzero().squeeze(-1)) for on in finite]
        smoothing = torch.zeros_like(qp.linear) if qp.smoothing is None else qp.smoothing
        coefficients = torch.cat(
            [torch.ones(tasks, n * k if qp.row_sum else 0).to(qp.linear)]
            + [
                sign * on.flatten(1)[:, row].to(qp.linear)
                for (sign, _), on, row in zip(bounds, finite, rows, strict=True)
            ],
            -1,
        )
        solver = _solver(
            tasks, n, k, qp.row_sum, tuple(tuple(row.tolist()) for row in rows), str(qp.linear.device), self._settings()
        )

        def solve(gram: Tensor, smoothing: Tensor, linear: Tensor, *limits: Tensor) -> Tensor:
            hessian = gram.unsqueeze(2).expand(tasks, n, k, n) + torch.diag_embed(smoothing.mT).permute(0, 2, 1, 3)
            right = [linear.new_zeros(tasks, n if qp.row_sum else 0)]
            for (sign, _), limit, on, row in zip(bounds, limits, finite, rows, strict=True):
                right.append(torch.where(on, sign * limit, 1).flatten(1)[:, row])
            found = solver.solve(hessian.flatten(1), coefficients, -linear.flatten(1), torch.cat(right, -1))
            return found.x.reshape(linear.shape)

        limits = [bound for _, bound in bounds]
        return Solved(foreign.call(solve, qp.gram, smoothing, qp.linear, *limits, backend="MoreauSolver"))

    def _settings(self) -> tuple[float, int | None]:
        return self.tolerance * 1e-5, self.max_iterations


def _solver(
    tasks: int, n: int, k: int, row_sum: bool, rows: tuple[tuple[int, ...], ...], device: str, settings: Any
) -> Any:
    """A solver for problems of this structure, kept for this thread."""
    kept: OrderedDict[Any, Any] = _local.__dict__.setdefault("kept", OrderedDict())
    key = (tasks, n, k, row_sum, rows, device, settings)
    if key not in kept:
        kept[key] = _build(*key)
        if len(kept) > _KEPT:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]


def _build(
    tasks: int, n: int, k: int, row_sum: bool, rows: tuple[tuple[int, ...], ...], device: str, settings: Any
) -> Any:
    import moreau
    from moreau.torch import Solver as Moreau

    entry = torch.arange(n * k).view(n, k)
    hessian_columns = entry.T.unsqueeze(0).expand(n, k, n).flatten()  # row (i, c) has the columns (j, c) for all j
    bounded = torch.tensor([row for side in rows for row in side], dtype=torch.long)
    columns = torch.cat([entry.flatten() if row_sum else entry.flatten()[:0], bounded])
    counts = torch.cat([torch.full((n if row_sum else 0,), k), torch.ones(len(bounded), dtype=torch.long)])
    tolerance, early = settings
    make: Any = Moreau
    return make(
        n=n * k,
        m=len(counts),
        P_row_offsets=torch.arange(n * k + 1) * n,
        P_col_indices=hessian_columns,
        A_row_offsets=torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]),
        A_col_indices=columns,
        cones=moreau.Cones(num_zero_cones=n if row_sum else 0, num_nonneg_cones=len(bounded)),
        settings=moreau.Settings(
            # Its own rule, said aloud ("auto" warns of it); an active set is not to be stopped early.
            solver="active_set" if early is None and device == "cpu" and n * k <= _ACTIVE_SET else "ipm",
            device=device.partition(":")[0],
            batch_size=tasks,
            enable_grad=True,
            max_iter=early or _ENOUGH_ITERATIONS,
            verbose=False,
            ipm_settings=moreau.IPMSettings(tol_gap_abs=tolerance, tol_gap_rel=tolerance, tol_feas=tolerance),
        ),
    )
