"""The steps of ADMM, which are cheap enough to find the active set of large problems.

A step has two halves: it solves one n x n system, the same one for all classes and steps, and then handles the feasible
set row by row. Memory therefore grows as n*k + n*n. (Glowinski & Marroco 1975, Gabay & Mercier 1976;
over-relaxed as in Eckstein & Bertsekas 1992; see Boyd et al. 2011.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from convexheads.solvers.kkt import cholesky
from convexheads.solvers.problem import DualProblem, WarmStart

OVER_RELAXATION = 1.8
PENALTY = 0.7
"""The penalty parameter rho, relative to the mean diagonal of the Hessian."""


def ridge_step(problem: DualProblem) -> WarmStart:
    """One unconstrained (ridge) step from zero; entries beyond a bound form the initial active set."""
    penalty = _penalty(problem)
    right = _project_row_sums(problem.linear, problem.rows_sum_to_zero)
    coef = torch.cholesky_solve(right, cholesky(_plus_diagonal(problem.gram, penalty)))
    return WarmStart(coef, penalty * coef, torch.zeros_like(coef[..., 0]))


def admm(problem: DualProblem, blocks: Iterable[int]) -> Iterator[WarmStart]:
    """After each block of steps, yield feasible coefficients of a flat, rescaled batch, and multipliers."""
    penalty = _penalty(problem)
    solve = _regularized_inverse(problem, penalty)
    if problem.start is None:
        coef, dual, relaxation = torch.zeros_like(problem.linear), torch.zeros_like(problem.linear), 1.0
        row_multipliers = None
    else:
        start, relaxation = problem.start.at_bounds(problem), OVER_RELAXATION
        coef, row_multipliers = start.coef, start.row_multipliers.unsqueeze(-1)
        dual = start.bound_multipliers + row_multipliers
        if problem.smoothing is not None:
            dual = dual + problem.smoothing * coef
        dual = dual / penalty
    for steps in blocks:
        for _ in range(steps):
            moved = solve(_project_row_sums(problem.linear + penalty * (coef - dual), problem.rows_sum_to_zero))
            target = torch.lerp(coef, moved, relaxation) + dual
            coef, row_multipliers = problem.rows.proximal(target, penalty, guess=row_multipliers)
            dual, relaxation = target - coef, OVER_RELAXATION
        assert row_multipliers is not None
        bound_multipliers = penalty * dual - row_multipliers
        if problem.smoothing is not None:
            bound_multipliers = bound_multipliers - problem.smoothing * coef
        yield WarmStart(coef, bound_multipliers, row_multipliers.squeeze(-1))


def _penalty(problem: DualProblem) -> Float[Tensor, "tasks 1 1"]:
    curvature = problem.curvature()[:, None, None]
    return PENALTY * torch.where(curvature > 0, curvature, 1)  # a linear problem accepts any penalty


def _regularized_inverse(problem: DualProblem, penalty: Tensor) -> Callable[[Tensor], Tensor]:
    """The inverse of the Gram matrix plus `penalty` on its diagonal, to be applied many times."""
    if problem.gram_factor is None:
        inverse = torch.cholesky_inverse(cholesky(_plus_diagonal(problem.gram, penalty)))
        return lambda value: inverse @ value
    factor = problem.gram_factor
    small = cholesky(_plus_diagonal(factor.mT @ factor, penalty))
    half = torch.linalg.solve_triangular(small, factor.mT, upper=False)
    return lambda value: (value - half.mT @ (half @ value)) / penalty


def _plus_diagonal(gram: Tensor, value: Tensor) -> Tensor:
    return gram + value * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def _project_row_sums(value: Tensor, rows_sum_to_zero: bool) -> Tensor:
    return value - value.mean(-1, keepdim=True) if rows_sum_to_zero else value
