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
from convexheads.solvers.splitting import Start

REGULARISER = 1e-9
REFINEMENTS = 2


class ActiveSet(NamedTuple):
    """Coefficients, which of them sit at a bound, and the factorised system that the others solve."""

    coef: Float[Tensor, "tasks n k"]
    at_upper: Bool[Tensor, "tasks n k"]
    at_lower: Bool[Tensor, "tasks n k"]
    kkt: KKT

    def with_tasks(self, chosen: Bool[Tensor, " tasks"], by: ActiveSet) -> ActiveSet:
        """Those of a flat batch, with others in the place of the chosen tasks."""
        coef, at_upper, at_lower = (old.index_put((chosen,), new) for old, new in zip(self[:3], by[:3], strict=True))
        return ActiveSet(coef, at_upper, at_lower, self.kkt.with_tasks(chosen, by.kkt))


def search(qp: QP, start: Start, *, max_rounds: int) -> tuple[ActiveSet, Int[Tensor, " tasks"]]:
    """Solve a flat batch of problems in units (`QP.in_units`).

    Args:
        qp: the problems.
        start: whose bounds and multipliers make the first guess.
        max_rounds: after so many, the search ends with whatever it has.

    Returns:
        The last active set with its exact solution (feasible up to rounding, where the active set is right), and the
            rounds of each task.
    """
    point, pull, shift = start
    diagonal = None if qp.smoothing is None else qp.smoothing.mT
    at_upper, at_lower = _held(qp, point, pull)
    rounds = torch.ones_like(point[:, 0, 0], dtype=torch.long)
    this_round = 1
    while True:
        free = ~(at_upper | at_lower)
        held = qp.held(at_upper, at_lower)
        kkt = BlockKKT.factorise(qp.gram, diagonal=diagonal, free=free.mT, row_sum=qp.row_sum, regulariser=REGULARISER)
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


def polish(qp: QP, coef: Float[Tensor, "tasks n k"], *, move: bool = True) -> tuple[ActiveSet, Certificate]:
    """The active set that coefficients close to the optimum of a flat batch in units show, with feasible coefficients.

    With `move`, its exact solution takes the place of `coef` where the certified gap is smaller.
    """
    certificate = qp.certify(coef)
    start = Start(coef, certificate.bound_multipliers, certificate.row_multipliers)
    found, _ = search(qp, start, max_rounds=1)
    exact = qp.certify(found.coef)
    better = (exact.gap <= certificate.gap) & exact.shows_active_set() & move
    certificate = certificate.with_tasks(better, exact.tasks(better))
    return found._replace(coef=certificate.feasible), certificate


def _held(qp: QP, coef: Tensor, pull: Tensor) -> tuple[Tensor, Tensor]:
    """Which entries sit at their upper, and which at their lower bound: those that the multiplier holds there."""
    nowhere = torch.zeros_like(coef, dtype=torch.bool)
    at_upper = nowhere if qp.upper is None else qp.upper - coef < pull
    at_lower = nowhere if qp.lower is None else coef - qp.lower < -pull
    return at_upper, at_lower
