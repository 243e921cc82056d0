"""A primal-dual interior point in which no matrix is larger than n x n: slow but hard to defeat."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from convexheads.solvers.kkt import BlockKKT, FactorisedKKT, LowRankKKT
from convexheads.solvers.problem import QP

_TO_BOUNDARY = 0.99
_REGULARISER = 1e-12
# Of slack times multiplier, in a step of the central path.
_TOWARDS_CENTRE = 0.1
# A gap that was below `_NEAR` and has not halved for `_STALLED` iterations won't fall further.
_NEAR = 1e-4
# Mean complementarity, in units, from which on iterates are certified.
_WORTH_CERTIFYING = 1e-4
_STALLED = 8
# How far a relaxed point may be off, relative to its complementarity.
_SETTLED = 1e-8


class Relaxed(NamedTuple):
    """Coefficients whose gradient is that of a point inside the barrier; what `ActiveSet` is at the optimum.

    Attributes:
        coef: the coefficients.
        point: the point inside the barrier.
        upper: how stiffly each upper bound holds the point's coefficient: multiplier over slack.
        lower: likewise each lower bound.
        kkt: the system with that stiffness on its diagonal.
    """

    coef: Float[Tensor, "tasks n k"]
    point: Float[Tensor, "tasks n k"]
    upper: Float[Tensor, "tasks n k"]
    lower: Float[Tensor, "tasks n k"]
    kkt: FactorisedKKT


class Interior(NamedTuple):
    """Where an interior point stopped: each task's point and its stiffness as in `Relaxed`, and its iterations."""

    point: Float[Tensor, "tasks n k"]
    upper: Float[Tensor, "tasks n k"]
    lower: Float[Tensor, "tasks n k"]
    iterations: Int[Tensor, " tasks"]

    def gradient_for(self, qp: QP, coef: Float[Tensor, "tasks n k"]) -> Relaxed:
        """Coefficients with the gradient of this point."""
        stiffness = self.upper + self.lower
        diagonal = stiffness if qp.smoothing is None else stiffness + qp.smoothing
        kkt = _factorise(qp, diagonal.mT)
        return Relaxed(coef, *self[:3], kkt)


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

    def size(self) -> Float[Tensor, " tasks"]:
        """The largest of each task."""
        violation = self.violation.abs().amax((0, 2, 3))
        return self.stationarity.abs().amax((1, 2)).maximum(self.balance.abs().amax(1)).maximum(violation)


def interior_point(qp: QP, *, tolerance: float, max_iterations: int) -> Interior:
    """Mehrotra's predictor-corrector on a flat batch of problems in units (`QP.in_units`).

    Each task stops on its own certificate: when that is `within(tolerance)`, or when the gap has stopped falling. A
    task that can't be factorised keeps its best iterate and leaves the others alone.

    Returns:
        Each task's iterate with the smallest certified gap, which is that of its projection.
    """
    barrier = _Barrier(qp)
    point = barrier.start()
    best, best_weight = point.b.mT, torch.ones_like(point.slack)
    best_gap = torch.full_like(qp.linear[:, 0, 0], torch.inf)
    iterations = torch.zeros_like(best_gap, dtype=torch.long)
    idle = torch.zeros_like(iterations)
    last = best_gap  # the last one that was half the one before
    done = torch.zeros_like(best_gap, dtype=torch.bool)

    for iteration in range(1, max_iterations + 1):
        point, centre, _ = barrier.step(point)
        # Far from the end there is nothing to certify. NaN must not pass for far.
        if iteration < max_iterations and torch.where(done, torch.inf, centre[:, 0, 0]).amin() > _WORTH_CERTIFYING:
            continue
        certificate = qp.certify(point.b.mT)
        gap = certificate.gap
        better = (gap < best_gap) & ~done
        best = torch.where(better[:, None, None], point.b.mT, best)
        best_weight = torch.where(better[:, None, None], point.multiplier / point.slack, best_weight)
        halved = gap < last / 2
        last = torch.where(halved, gap, last)
        idle = torch.where(halved | (best_gap > _NEAR), 0, idle + 1)
        best_gap = torch.where(better, gap, best_gap)
        iterations = torch.where(done, iterations, iteration)
        done = done | certificate.within(tolerance) | (idle >= _STALLED) | torch.isnan(gap)
        if done.all():
            break
    return Interior(best, *barrier.by_side(best_weight), iterations)


def central_path(qp: QP, *, complementarity: float, max_iterations: int) -> Interior:
    """The point of the central path where every slack times its multiplier is `complementarity`, in units.

    Its coefficients lie strictly inside their bounds and depend smoothly on the problem; they are not those of the
    optimum, but as close to it as `complementarity` is to zero.
    """
    barrier = _Barrier(qp)
    point = barrier.start()
    iterations = torch.zeros_like(qp.linear[:, 0, 0], dtype=torch.long)
    for iteration in range(1, max_iterations + 1):
        point, _, residual = barrier.step(point, complementarity)
        off = (point.slack * point.multiplier - complementarity).abs().amax((0, 2, 3)) / complementarity
        unsettled = (off > _SETTLED) | (residual.size() > _SETTLED)
        iterations = torch.where(unsettled | (iterations == 0), iteration, iterations)
        if not unsettled.any():
            break
    return Interior(point.b.mT, *barrier.by_side(point.multiplier / point.slack), iterations)


class _Barrier:
    """The problem with slacks: all constraints as `sign * b + slack = limit`.

    A missing bound is the idle row `0 * b + slack = 1`.
    """

    def __init__(self, qp: QP) -> None:
        self.qp = qp
        self.gram, self.linear, self.row_sum = qp.gram, qp.linear.mT.contiguous(), qp.row_sum
        self.smoothing = 0.0 if qp.smoothing is None else qp.smoothing.mT
        self.sides = [(sign, bound.mT) for sign, bound in ((1.0, qp.upper), (-1.0, qp.lower)) if bound is not None]
        present = torch.stack([torch.isfinite(bound) for _, bound in self.sides])
        self.sign = torch.stack([torch.full_like(self.linear, sign) for sign, _ in self.sides]) * present
        self.limit = torch.where(present, torch.stack([sign * bound for sign, bound in self.sides]), 1.0)

    def start(self) -> _Point:
        """Zero, with slacks and multipliers inside."""
        slack = torch.where(self.limit > 0, self.limit, 1.0)
        return _Point(
            torch.zeros_like(self.linear), torch.zeros_like(self.linear[:, :1]), slack, torch.ones_like(slack)
        )

    def step(self, point: _Point, least: float = 0.0) -> tuple[_Point, Tensor, _Residual]:
        """One predictor-corrector step; or, with `least`, one that ends where slack times multiplier is that.

        Returns:
            The next point; the mean of slack times multiplier before the step, `(tasks, 1, 1)`; and the residual then.
        """
        weight = point.multiplier / point.slack
        diagonal = (self.sign.abs() * weight).sum(0) + self.smoothing
        kkt = _factorise(self.qp, diagonal)
        residual = _Residual(
            stationarity=point.b @ self.gram
            + self.smoothing * point.b
            - self.linear
            + (self.sign * point.multiplier).sum(0)
            + point.shift,
            violation=self.sign * point.b + point.slack - self.limit,
            balance=point.b.sum(1) if self.row_sum else torch.zeros_like(point.b[:, 0]),
        )
        centre = _mean(point.slack * point.multiplier)
        if least:
            target = (_TOWARDS_CENTRE * centre).clamp_min(least).expand_as(point.slack)
        else:
            nothing = torch.zeros_like(point.slack)
            predictor = self._direction(kkt, point, weight, residual, nothing, refinements=0)
            length = _length(point, predictor)
            ahead = (point.slack + length * predictor.slack) * (point.multiplier + length * predictor.multiplier)
            target = centre * (_mean(ahead) / centre) ** 3 - predictor.slack * predictor.multiplier
        corrector = self._direction(kkt, point, weight, residual, target, refinements=2)
        length = _length(point, corrector)
        moved = (value + length * change for value, change in zip(point, corrector, strict=True))
        return _Point(*moved), centre, residual

    def by_side(self, value: Float[Tensor, "sides tasks k n"]) -> tuple[Tensor, Tensor]:
        """What belongs to the upper and to the lower bounds, zero where there are none."""
        value = value * self.sign.abs()
        of = {sign: own.mT for (sign, _), own in zip(self.sides, value, strict=True)}
        nothing = torch.zeros_like(value[0].mT)
        return of.get(1.0, nothing), of.get(-1.0, nothing)

    def _direction(
        self,
        kkt: FactorisedKKT,
        point: _Point,
        weight: Tensor,
        residual: _Residual,
        target: Tensor,
        *,
        refinements: int,
    ) -> _Point:
        """The Newton step towards zero residuals and `slack * multiplier = target`; `weight` is multiplier / slack."""
        pull = point.multiplier - target / point.slack - weight * residual.violation
        right = (self.sign * pull).sum(0) - residual.stationarity
        b, shift = kkt.solve(right, -residual.balance, refinements=refinements)
        slack = -residual.violation - self.sign * b
        return _Point(b, shift.unsqueeze(1), slack, target / point.slack - point.multiplier - weight * slack)


def _factorise(qp: QP, diagonal: Float[Tensor, "tasks k n"]) -> FactorisedKKT:
    settings: dict[str, Any] = {"diagonal": diagonal, "row_sum": qp.row_sum, "regulariser": _REGULARISER}
    if qp.root is None:
        return BlockKKT.factorise(qp.gram, **settings)
    return LowRankKKT.factorise(qp.gram, qp.root, **settings)


def _mean(products: Tensor) -> Tensor:
    """The mean over sides, classes and examples, `(tasks, 1, 1)`."""
    return products.mean((0, 2, 3), keepdim=True).squeeze(0)


def _length(point: _Point, direction: _Point) -> Tensor:
    """The longest step of each task, at most 1, that keeps slacks and multipliers positive, `(tasks, 1, 1)`."""
    fastest = torch.maximum(
        (-direction.slack / point.slack).amax((0, 2, 3)), (-direction.multiplier / point.multiplier).amax((0, 2, 3))
    )
    return (_TO_BOUNDARY / fastest.clamp_min(_TO_BOUNDARY))[:, None, None]
