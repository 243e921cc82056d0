"""Splitting (ADMM): steps so cheap that they find what sits at a bound for a round or two of active-set Newton.

A step alternates between the Hessian and the feasible rows. The first is ONE n x n system for all classes and all
steps, the second is done row by row, so that memory grows as n*k + n*n however many classes there are. (Glowinski &
Marroco 1975, Gabay & Mercier 1976; over-relaxed as in Eckstein & Bertsekas 1992.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from convexheads.solvers import rows
from convexheads.solvers.kkt import cholesky
from convexheads.solvers.problem import QP

RELAXATION = 1.8
# Weight of the proximal term, relative to the mean diagonal of the Hessian.
PROXIMITY = 0.7


class Start(NamedTuple):
    """Coefficients, and the multipliers that show which of them are to sit at a bound."""

    coef: Float[Tensor, "tasks n k"]
    bound_multipliers: Float[Tensor, "tasks n k"]
    row_multipliers: Float[Tensor, "tasks n"]


def proximal_step(qp: QP) -> Start:
    """From zero, one step that heeds no bounds, a ridge regression: what it pushes over a bound is to sit there."""
    weight = PROXIMITY * qp.curvature()[:, None, None]
    coef = torch.cholesky_solve(_centred(qp.linear, qp.row_sum), cholesky(_plus(qp.gram, weight)))
    return Start(coef, weight * coef, torch.zeros_like(coef[..., 0]))


def splitting(qp: QP, *, steps: int) -> Iterator[Start]:
    """Feasible coefficients of a flat batch of problems in units, and multipliers, after each so many steps."""
    weight = PROXIMITY * qp.curvature()[:, None, None]
    solve = _resolvent(qp, weight)
    coef, dual, relaxation, shift = torch.zeros_like(qp.linear), torch.zeros_like(qp.linear), 1.0, None
    while True:
        for _ in range(steps):
            moved = solve(_centred(qp.linear + weight * (coef - dual), qp.row_sum))
            target = torch.lerp(coef, moved, relaxation) + dual
            coef, shift = rows.proximal(
                target, qp.lower, qp.upper, weight=weight, smoothing=qp.smoothing, row_sum=qp.row_sum, guess=shift
            )
            dual, relaxation = target - coef, RELAXATION
        assert shift is not None
        pull = weight * dual - shift
        yield Start(coef, pull if qp.smoothing is None else pull - qp.smoothing * coef, shift.squeeze(-1))


def _resolvent(qp: QP, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """The inverse of the Gram matrix plus `weight` on its diagonal, to be applied many times."""
    if qp.root is None:
        inverse = torch.cholesky_inverse(cholesky(_plus(qp.gram, weight)))
        return lambda value: inverse @ value
    root = qp.root
    half = torch.linalg.solve_triangular(cholesky(_plus(root.mT @ root, weight)), root.mT, upper=False)
    return lambda value: (value - half.mT @ (half @ value)) / weight


def _plus(gram: Tensor, weight: Tensor) -> Tensor:
    return gram + weight * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def _centred(value: Tensor, row_sum: bool) -> Tensor:
    return value - value.mean(-1, keepdim=True) if row_sum else value
