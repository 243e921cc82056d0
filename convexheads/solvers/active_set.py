"""Active-set Newton: guess which coefficients sit at a bound, solve for the others exactly, correct the guess, repeat.

This is the primal-dual active set method (Hintermueller, Ito & Kunisch 2002), a semismooth Newton method. Few-shot
problems need a handful of rounds, the end is exact to rounding, and the last factors are those of the gradient's
adjoint (`solvers/implicit.py`). It may cycle or meet a singular system: its answers are certified, and what is not good
enough has to be found otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from convexheads.solvers.kkt import KKT, BlockKKT
from convexheads.solvers.problem import QP, Certificate

REGULARISER = 1e-9
REFINEMENTS = 2
# Weight of the proximal step that makes the first guess, relative to the mean diagonal of the Hessian.
PROXIMITY = 0.3


class ActiveSet(NamedTuple):
    """Coefficients, which of them sit at a bound, and the factorised system that the others solve."""

    coef: Float[Tensor, "tasks n k"]
    at_upper: Bool[Tensor, "tasks n k"]
    at_lower: Bool[Tensor, "tasks n k"]
    kkt: KKT


def search(qp: QP, *, max_rounds: int) -> tuple[ActiveSet, Int[Tensor, " tasks"]]:
    """Solve a flat batch of problems in units (`QP.in_units`) from nothing.

    Returns:
        The last active set with its exact solution (feasible up to rounding, where the active set is right), and the
        rounds of each task.
    """
    # The first guess is what one proximal step from zero, a ridge regression without bounds, pushes over a bound.
    weight = PROXIMITY * qp.curvature()[:, None, None]
    eye = torch.eye(qp.gram.shape[-1], dtype=qp.gram.dtype, device=qp.gram.device)
    linear = qp.linear - qp.linear.mean(-1, keepdim=True) if qp.row_sum else qp.linear
    start = torch.cholesky_solve(linear, torch.linalg.cholesky_ex(qp.gram + weight * eye)[0])
    return _newton(qp, start, weight * start, torch.zeros_like(start[..., 0]), max_rounds=max_rounds)


def polish(qp: QP, coef: Float[Tensor, "tasks n k"], *, move: bool = True) -> tuple[ActiveSet, Certificate]:
    """The active set that coefficients close to the optimum of a flat batch in units show, with feasible coefficients.

    With `move`, its exact solution takes the place of `coef` where the certified gap is smaller.
    """
    certificate = qp.certify(coef)
    found, _ = _newton(qp, coef, certificate.bound_multipliers, certificate.row_multipliers, max_rounds=1)
    exact = qp.certify(found.coef)
    better = (exact.gap <= certificate.gap) & exact.shows_active_set() & move
    certificate = certificate.replaced(better, exact)
    return found._replace(coef=certificate.feasible), certificate


def _newton(
    qp: QP, point: Tensor, pull: Tensor, shift: Tensor, *, max_rounds: int
) -> tuple[ActiveSet, Int[Tensor, " tasks"]]:
    """Rounds from a point and its multipliers, those of the bounds (`pull`) and of the row sums (`shift`)."""
    diagonal = None if qp.smoothing is None else qp.smoothing.mT
    at_upper, at_lower = _held(qp, point, pull)
    rounds = torch.ones_like(point[:, 0, 0], dtype=torch.long)
    this_round = 1
    while True:
        free = ~(at_upper | at_lower)
        held = qp.held(at_upper, at_lower)
        kkt = BlockKKT(qp.gram, diagonal=diagonal, free=free.mT, row_sum=qp.row_sum, regulariser=REGULARISER)
        right, sums = (qp.linear - qp.gram @ held).mT, -held.sum(-1)
        # Where several solutions are optimal, starting at the last point stays near the one that respects the bounds.
        moved, shift = kkt.solve(right, sums, start=(torch.where(free, point, 0).mT, shift), refinements=0)
        point = moved.mT + held
        if this_round == max_rounds:
            break
        new_upper, new_lower = _held(qp, point, qp.linear - qp.gradient(point) - shift.unsqueeze(-1))
        changed = ((new_upper != at_upper) | (new_lower != at_lower)).flatten(1).any(1)
        if not changed.any():
            break
        this_round += 1
        rounds = torch.where(changed, this_round, rounds)
        at_upper, at_lower = new_upper, new_lower
    moved, _ = kkt.solve(right, sums, start=(moved, shift), refinements=REFINEMENTS)
    return ActiveSet(moved.mT + held, at_upper, at_lower, kkt), rounds


def _held(qp: QP, coef: Tensor, pull: Tensor) -> tuple[Tensor, Tensor]:
    """Which entries sit at their upper, and which at their lower bound: those that the multiplier holds there."""
    nowhere = torch.zeros_like(coef, dtype=torch.bool)
    at_upper = nowhere if qp.upper is None else qp.upper - coef < pull
    at_lower = nowhere if qp.lower is None else coef - qp.lower < -pull
    return at_upper, at_lower
