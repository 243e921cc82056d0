"""A primal-dual interior point in which no matrix is larger than n x n: slow but hard to defeat."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from convexheads.solvers.kkt import BlockKKT
from convexheads.solvers.problem import QP

_TO_BOUNDARY = 0.99
_REGULARISER = 1e-12
# A gap that was below `_NEAR` and has not halved for `_STALLED` iterations won't fall further.
_NEAR = 1e-4
# Where the optimal weights are zero, no relative error of theirs is ever small: then this gap is enough.
_NOTHING = 1e-16
_STALLED = 5


def interior_point(
    qp: QP, *, tolerance: float, max_iterations: int
) -> tuple[Float[Tensor, "tasks n k"], Int[Tensor, " tasks"]]:
    """Mehrotra's predictor-corrector on a flat batch of problems in units (`QP.in_units`).

    Each task stops on its own certificate: when the relative duality gap and the squared relative error of the weights
    are below `tolerance` (with a small C, the loss makes up most of the objective, and the gap alone says little of the
    weights), or when the gap has stopped falling. A task that can't be factorised keeps its best iterate and leaves the
    others alone.

    Returns:
        The best certified coefficients of each task, feasible, and its number of iterations.
    """
    hessian = qp.hessian()
    linear = qp.linear.mT.contiguous()
    # All constraints as `sign * b + slack = limit`; a missing bound is the idle row `0 * b + slack = 1`.
    bounds = [(sign, bound.mT) for sign, bound in ((1.0, qp.upper), (-1.0, qp.lower)) if bound is not None]
    present = torch.stack([torch.isfinite(bound) for _, bound in bounds])
    sign = torch.stack([torch.full_like(linear, side) for side, _ in bounds]) * present
    limit = torch.where(present, torch.stack([side * bound for side, bound in bounds]), 1.0)

    b = torch.zeros_like(linear)
    shift = torch.zeros_like(linear[:, 0])
    slack = torch.where(limit > 0, limit, 1.0)
    multiplier = torch.ones_like(limit)

    best = qp.project(torch.zeros_like(qp.linear))
    best_gap = torch.full_like(linear[:, 0, 0], torch.inf)
    iterations = torch.zeros_like(best_gap, dtype=torch.long)
    idle = torch.zeros_like(iterations)
    done = torch.zeros_like(best_gap, dtype=torch.bool)

    for iteration in range(1, max_iterations + 1):
        weight = multiplier / slack
        kkt = BlockKKT(hessian, diagonal=(sign.abs() * weight).sum(0), row_sum=qp.row_sum, regulariser=_REGULARISER)
        stationarity = b @ hessian - linear + (sign * multiplier).sum(0) + shift.unsqueeze(1)
        violation = sign * b + slack - limit
        balance = b.sum(1)
        mean_gap = _mean(slack * multiplier)

        def direction(target: Tensor | float, refinements: int):
            """The Newton step towards `slack * multiplier = target`."""
            pull = multiplier - target / slack - weight * violation  # noqa: B023 used within the iteration only
            db, dshift = kkt.solve((sign * pull).sum(0) - stationarity, -balance, refinements=refinements)  # noqa: B023
            dslack = -violation - sign * db  # noqa: B023
            return db, dshift, dslack, target / slack - multiplier - weight * dslack  # noqa: B023

        _, _, dslack, dmultiplier = direction(0.0, refinements=0)
        step = _step(slack, dslack, multiplier, dmultiplier)
        ahead = _mean((slack + step * dslack) * (multiplier + step * dmultiplier))
        target = mean_gap * (ahead / mean_gap) ** 3 - dslack * dmultiplier

        db, dshift, dslack, dmultiplier = direction(target, refinements=2)
        step = _step(slack, dslack, multiplier, dmultiplier)
        b = b + step * db
        shift = shift + step[:, 0] * dshift
        slack = slack + step * dslack
        multiplier = multiplier + step * dmultiplier

        candidate = qp.project(b.mT)
        certificate = qp.certify(candidate)
        gap = certificate.gap
        better = (gap < best_gap) & ~done
        best = torch.where(better[:, None, None], candidate, best)
        idle = torch.where((gap < best_gap / 2) | (best_gap > _NEAR), 0, idle + 1)
        best_gap = torch.where(better, gap, best_gap)
        iterations = torch.where(done, iterations, iteration)
        near = (gap <= tolerance) & ((certificate.weight_error.square() <= tolerance) | (gap <= _NOTHING))
        done = done | near | (idle >= _STALLED) | ~torch.isfinite(gap)
        if done.all():
            break
    return best, iterations


def _mean(products: Tensor) -> Tensor:
    """The mean over sides, classes and examples, `(tasks, 1, 1)`."""
    return products.mean((0, 2, 3), keepdim=True).squeeze(0)


def _step(slack: Tensor, dslack: Tensor, multiplier: Tensor, dmultiplier: Tensor) -> Tensor:
    """The longest step of each task, at most 1, that keeps slacks and multipliers positive, `(tasks, 1, 1)`."""
    fastest = torch.maximum((-dslack / slack).amax((0, 2, 3)), (-dmultiplier / multiplier).amax((0, 2, 3)))
    return (_TO_BOUNDARY / fastest.clamp_min(_TO_BOUNDARY))[:, None, None]
