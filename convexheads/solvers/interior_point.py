"""A primal-dual interior point in which no matrix is larger than n x n: slow but hard to defeat."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from convexheads.solvers.kkt import BlockKKT
from convexheads.solvers.problem import QP

_TO_BOUNDARY = 0.99
_REGULARISER = 1e-12
# A gap that was below `_NEAR` and has not halved for `_STALLED` iterations won't fall further.
_NEAR = 1e-4
# Mean complementarity, in units, from which on iterates are certified.
_WORTH_CERTIFYING = 1e-4
_STALLED = 5


class _Point(NamedTuple):
    """An iterate, or a step from one to the next; class-major, with a slack and a multiplier for each bound."""

    b: Float[Tensor, "tasks k n"]
    shift: Float[Tensor, "tasks 1 n"]
    slack: Float[Tensor, "sides tasks k n"]
    multiplier: Float[Tensor, "sides tasks k n"]


class _Residual(NamedTuple):
    """What is left of the optimality conditions."""

    stationarity: Float[Tensor, "tasks k n"]
    violation: Float[Tensor, "sides tasks k n"]
    balance: Float[Tensor, "tasks n"]


def interior_point(
    qp: QP, *, tolerance: float, max_iterations: int
) -> tuple[Float[Tensor, "tasks n k"], Int[Tensor, " tasks"]]:
    """Mehrotra's predictor-corrector on a flat batch of problems in units (`QP.in_units`).

    Each task stops on its own certificate: when that is `within(tolerance)`, or when the gap has stopped falling. A
    task that can't be factorised keeps its best iterate and leaves the others alone.

    Returns:
        The best certified coefficients of each task, feasible, and its number of iterations.
    """
    gram, linear = qp.gram, qp.linear.mT.contiguous()
    smoothing = 0.0 if qp.smoothing is None else qp.smoothing.mT
    # All constraints as `sign * b + slack = limit`; a missing bound is the idle row `0 * b + slack = 1`.
    bounds = [(sign, bound.mT) for sign, bound in ((1.0, qp.upper), (-1.0, qp.lower)) if bound is not None]
    present = torch.stack([torch.isfinite(bound) for _, bound in bounds])
    sign = torch.stack([torch.full_like(linear, side) for side, _ in bounds]) * present
    limit = torch.where(present, torch.stack([side * bound for side, bound in bounds]), 1.0)

    slack = torch.where(limit > 0, limit, 1.0)
    point = _Point(torch.zeros_like(linear), torch.zeros_like(linear[:, :1]), slack, torch.ones_like(slack))
    best = qp.project(torch.zeros_like(qp.linear))
    best_gap = torch.full_like(linear[:, 0, 0], torch.inf)
    iterations = torch.zeros_like(best_gap, dtype=torch.long)
    idle = torch.zeros_like(iterations)
    done = torch.zeros_like(best_gap, dtype=torch.bool)

    for iteration in range(1, max_iterations + 1):
        weight = point.multiplier / point.slack
        barrier = (sign.abs() * weight).sum(0) + smoothing
        kkt = BlockKKT(gram, diagonal=barrier, row_sum=qp.row_sum, regulariser=_REGULARISER)
        residual = _Residual(
            stationarity=point.b @ gram + smoothing * point.b - linear + (sign * point.multiplier).sum(0) + point.shift,
            violation=sign * point.b + point.slack - limit,
            balance=point.b.sum(1),
        )
        centre = _mean(point.slack * point.multiplier)

        predictor = _direction(kkt, point, weight, residual, sign, torch.zeros_like(slack), refinements=0)
        step = _step(point, predictor)
        ahead = (point.slack + step * predictor.slack) * (point.multiplier + step * predictor.multiplier)
        target = centre * (_mean(ahead) / centre) ** 3 - predictor.slack * predictor.multiplier
        corrector = _direction(kkt, point, weight, residual, sign, target, refinements=2)
        step = _step(point, corrector)
        point = _Point(*(value + step * change for value, change in zip(point, corrector, strict=True)))

        # Far from the end there is nothing to certify. NaN must not pass for far.
        if iteration < max_iterations and torch.where(done, torch.inf, centre[:, 0, 0]).amin() > _WORTH_CERTIFYING:
            continue
        certificate = qp.certify(point.b.mT)
        gap = certificate.gap
        better = (gap < best_gap) & ~done
        best = torch.where(better[:, None, None], certificate.feasible, best)
        idle = torch.where((gap < best_gap / 2) | (best_gap > _NEAR), 0, idle + 1)
        best_gap = torch.where(better, gap, best_gap)
        iterations = torch.where(done, iterations, iteration)
        done = done | certificate.within(tolerance) | (idle >= _STALLED) | torch.isnan(gap)
        if done.all():
            break
    return best, iterations


def _direction(
    kkt: BlockKKT, point: _Point, weight: Tensor, residual: _Residual, sign: Tensor, target: Tensor, *, refinements: int
) -> _Point:
    """The Newton step towards zero residuals and `slack * multiplier = target`; `weight` is multiplier / slack."""
    pull = point.multiplier - target / point.slack - weight * residual.violation
    b, shift = kkt.solve((sign * pull).sum(0) - residual.stationarity, -residual.balance, refinements=refinements)
    slack = -residual.violation - sign * b
    return _Point(b, shift.unsqueeze(1), slack, target / point.slack - point.multiplier - weight * slack)


def _mean(products: Tensor) -> Tensor:
    """The mean over sides, classes and examples, `(tasks, 1, 1)`."""
    return products.mean((0, 2, 3), keepdim=True).squeeze(0)


def _step(point: _Point, direction: _Point) -> Tensor:
    """The longest step of each task, at most 1, that keeps slacks and multipliers positive, `(tasks, 1, 1)`."""
    fastest = torch.maximum(
        (-direction.slack / point.slack).amax((0, 2, 3)), (-direction.multiplier / point.multiplier).amax((0, 2, 3))
    )
    return (_TO_BOUNDARY / fastest.clamp_min(_TO_BOUNDARY))[:, None, None]
