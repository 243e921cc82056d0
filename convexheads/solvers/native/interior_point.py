"""The interior-point solver, which is slower than active-set Newton, but robust. No matrix is larger than n x n."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from convexheads._validation import check_choice, check_real
from convexheads.errors import InputError
from convexheads.solvers.base import Solver, SolverResult
from convexheads.solvers.best_iterate import BestIterate
from convexheads.solvers.certificate import aim, certify
from convexheads.solvers.failures import OnFailure
from convexheads.solvers.implicit import BarrierPoint
from convexheads.solvers.kkt import BlockKKT, FactorizedKKT, LowRankKKT, with_gram_factor
from convexheads.solvers.native.active_set import of_projection, polish
from convexheads.solvers.problem import DualProblem

Gradient = Literal["exact", "relaxed", "last_iterate"]
"""The gradient that `InteriorPointSolver` returns."""
_MAX_ITERATIONS = 100
_FRACTION_TO_BOUNDARY = 0.99
# The smallest values at a warm start, from which steps can be long.
_SMALLEST_SLACK, _SMALLEST_MULTIPLIER = 1e-2, 1e-2
_REGULARIZATION = 1e-12
# The factor by which a step along the central path reduces slack times multiplier.
_CENTERING = 0.1
# Mean complementarity of the rescaled problem below which iterates are certified.
_COMPLEMENTARITY_TO_CERTIFY = 1e-4
_PATIENCE = 8
# Largest error of a point of the central path, relative to its complementarity.
_CENTRALITY_TOLERANCE = 1e-8


class InteriorPointSolver(Solver):
    """A structured primal-dual interior-point method, Mehrotra's predictor-corrector method (1992).

    Use it for degenerate problems, for early stopping, and for gradients other than the exact one. A step costs one
    Cholesky factorization per class, of an n x n matrix (r x r, if the Gram matrix has a small rank r), and one for the
    row multipliers. It runs for all tasks at once, on any device.

    Without `max_iterations`, one step of active-set Newton at the end makes the solution exact. With it, the
    coefficients are the projection of the best iterate, the one with the smallest certified gap.

    Args:
        max_iterations: as in `Solver`. Default None (until converged, at most 100).
        tolerance: as in `Solver`; the iteration ends at a thousandth of it.
        on_failure: as in `Solver`.
        gradient: "exact" (default) is the gradient for the active set of the solution or, if `max_iterations` is given,
            for the active set that the best iterate implies. "relaxed" is the gradient at the point where every slack
            times its multiplier is `complementarity` (qpax, Tracy & Manchester 2024); it has no kinks at weakly active
            bounds. "last_iterate" needs `max_iterations` and is the gradient of the KKT conditions at the best iterate
            (OptNet, Amos & Kolter 2017, and Lee et al. 2019). The last two have no second derivative.
        complementarity: slack times multiplier for "relaxed", in the units of the rescaled problem, in which
            coefficients and multipliers are around one. Default 1e-3.

    Raises:
        InputError: `gradient` and `max_iterations` are incompatible.

    Example:
        `SVMHead(solver=InteriorPointSolver(max_iterations=3, gradient="last_iterate"))`
    """

    def __init__(
        self,
        *,
        max_iterations: int | None = None,
        tolerance: float | None = None,
        on_failure: OnFailure = "raise",
        gradient: Gradient = "exact",
        complementarity: float = 1e-3,
    ) -> None:
        super().__init__(max_iterations=max_iterations, tolerance=tolerance, on_failure=on_failure)
        name = type(self).__name__
        check_choice(f"{name}(gradient)", gradient, get_args(Gradient))
        if gradient == "last_iterate" and max_iterations is None:
            raise InputError(f"{name}(max_iterations)", "a number with gradient='last_iterate'", None)
        if gradient == "relaxed" and max_iterations is not None:
            raise InputError(f"{name}(max_iterations)", "None with gradient='relaxed'", max_iterations)
        self.gradient: Gradient = gradient
        self.complementarity = check_real(f"{name}(complementarity)", complementarity, positive=True)

    @property
    def is_traceable(self) -> bool:
        return self.gradient == "exact"

    def solve_batch(self, problem: DualProblem) -> SolverResult:
        problem = with_gram_factor(problem)
        limit, tolerance = self.max_iterations or _MAX_ITERATIONS, aim(self.tolerance, problem.linear.dtype)
        point, stiffness, iterations = interior_point(problem, tolerance=tolerance, max_iterations=limit)
        linearization, certificate = polish(problem, point, move=self.max_iterations is None)
        if self.gradient == "relaxed":
            point, stiffness = central_path(problem, complementarity=self.complementarity)
        if self.gradient != "exact":
            diagonal = stiffness.sum(1) if problem.smoothing is None else stiffness.sum(1) + problem.smoothing
            linearization = BarrierPoint(_factorize(problem, diagonal.mT), point, stiffness)
        certificate = of_projection(certificate)
        return SolverResult(certificate.feasible, iterations, certificate, linearization)


class _Point(NamedTuple):
    """An iterate or a step, class-major, with a slack and a multiplier for each bound."""

    coef: Float[Tensor, "tasks k n"]
    row_multipliers: Float[Tensor, "tasks 1 n"]
    slack: Float[Tensor, "sides tasks k n"]
    multiplier: Float[Tensor, "sides tasks k n"]


def interior_point(problem: DualProblem, *, tolerance: float, max_iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mehrotra's predictor-corrector method on a flat, rescaled batch.

    Each task stops when its certificate certifies `tolerance`, or when the gap has stopped falling. A task whose system
    cannot be factorized keeps its best iterate and does not affect the others.

    Returns, for each task, the iterate whose projection has the smallest certified gap; its stiffness, as in
    `BarrierPoint`; and the number of iterations.
    """
    barrier = _Barrier(problem)
    point = barrier.start()
    best = BestIterate(point.coef.mT, barrier.by_task(torch.ones_like(point.slack)), patience=_PATIENCE)
    for iteration in range(1, max_iterations + 1):
        point, mean, _ = barrier.step(point)
        # Far from convergence, there is nothing to certify. NaN must not count as far from convergence.
        remaining = torch.where(best.done, torch.inf, mean[:, 0, 0])
        if iteration < max_iterations and remaining.amin() > _COMPLEMENTARITY_TO_CERTIFY:
            continue
        certificate = certify(problem, point.coef.mT)
        solved, stiffness = certificate.certifies(tolerance), barrier.by_task(point.multiplier / point.slack)
        best.update(iteration, certificate.gap, solved, point.coef.mT, stiffness)
        if best.done.all():
            break
    best_coef, best_stiffness = best.tensors
    return best_coef, best_stiffness, best.iterations


def central_path(problem: DualProblem, *, complementarity: float) -> tuple[Tensor, Tensor]:
    """The point of the central path at which every slack times its multiplier is `complementarity`, and its stiffness.

    Its coefficients are strictly inside their bounds and depend smoothly on the problem. They are not optimal; the
    smaller `complementarity`, the closer they are to the optimum.
    """
    barrier = _Barrier(problem)
    point = barrier.start()
    for _ in range(_MAX_ITERATIONS):
        point, _, residuals = barrier.step(point, complementarity)
        errors = (point.slack * point.multiplier - complementarity) / complementarity, *residuals
        if not any((error.abs() > _CENTRALITY_TOLERANCE).any() for error in errors):
            break
    return point.coef.mT, barrier.by_task(point.multiplier / point.slack)


class _Barrier:
    """The problem with slacks: `DualProblem.inequalities` become constraints `sign * coef + slack = limit`."""

    def __init__(self, problem: DualProblem) -> None:
        self.problem = problem
        self.linear = problem.linear.mT.contiguous()
        self.smoothing = 0.0 if problem.smoothing is None else problem.smoothing.mT
        signs, limits = zip(*problem.inequalities, strict=True)
        self.sign, self.limit = (torch.stack([part.mT for part in parts]) for parts in (signs, limits))

    def start(self) -> _Point:
        """Zero coefficients or those of a warm start, with positive slacks and multipliers."""
        if self.problem.start is None:
            slack = torch.where(self.limit > 0, self.limit, 1.0)
            zero = torch.zeros_like(self.linear)
            return _Point(zero, torch.zeros_like(self.linear[:, :1]), slack, torch.ones_like(slack))
        start = self.problem.start.at_bounds(self.problem)
        coef, multiplier = start.coef.mT.contiguous(), start.bound_multipliers.mT
        slack = (self.limit - self.sign * coef).clamp_min(_SMALLEST_SLACK)
        multiplier = (self.sign * multiplier).clamp_min(_SMALLEST_MULTIPLIER)
        return _Point(coef, start.row_multipliers.unsqueeze(1), slack, multiplier)

    def step(self, point: _Point, min_complementarity: float = 0.0) -> tuple[_Point, Tensor, tuple[Tensor, ...]]:
        """One predictor-corrector step.

        With `min_complementarity`, it is toward the point where every slack times its multiplier equals this value.

        Returns the next point; and, at `point`, the mean of slack times multiplier, `(tasks, 1, 1)`, and the residuals.
        """
        stiffness = point.multiplier / point.slack
        kkt = _factorize(self.problem, (self.sign.abs() * stiffness).sum(0) + self.smoothing)
        gradient = point.coef @ self.problem.gram + self.smoothing * point.coef - self.linear
        stationarity = gradient + (self.sign * point.multiplier).sum(0) + point.row_multipliers
        violation = self.sign * point.coef + point.slack - self.limit
        balance = point.coef.sum(1) if self.problem.rows_sum_to_zero else torch.zeros_like(point.coef[:, 0])

        def direction(target: Tensor, refinements: int) -> _Point:
            """The Newton step toward zero residuals and `slack * multiplier = target`."""
            multiplier = point.multiplier - target / point.slack - stiffness * violation
            right = (self.sign * multiplier).sum(0) - stationarity
            coef, row_multipliers = kkt.solve(right, -balance, refinements=refinements)
            slack = -violation - self.sign * coef
            change = target / point.slack - point.multiplier - stiffness * slack
            return _Point(coef, row_multipliers.unsqueeze(1), slack, change)

        mean = _mean(point.slack * point.multiplier)
        if min_complementarity:
            target = (_CENTERING * mean).clamp_min(min_complementarity).expand_as(point.slack)
        else:
            predictor = direction(torch.zeros_like(point.slack), refinements=0)
            length = _length(point, predictor)
            ahead = (point.slack + length * predictor.slack) * (point.multiplier + length * predictor.multiplier)
            target = mean * (_mean(ahead) / mean) ** 3 - predictor.slack * predictor.multiplier
        corrector = direction(target, refinements=2)
        length = _length(point, corrector)
        moved = (value + length * change for value, change in zip(point, corrector, strict=True))
        return _Point(*moved), mean, (stationarity, violation, balance)

    def by_task(self, stiffness: Float[Tensor, "sides tasks k n"]) -> Float[Tensor, "tasks sides n k"]:
        """Stiffness as in `BarrierPoint`, zero at idle rows."""
        return (self.sign.abs() * stiffness).transpose(0, 1).mT


def _factorize(problem: DualProblem, diagonal: Float[Tensor, "tasks k n"]) -> FactorizedKKT:
    form = BlockKKT if problem.gram_factor is None else LowRankKKT
    return form.factorize(problem, diagonal=diagonal, regularization=_REGULARIZATION)


def _mean(products: Tensor) -> Tensor:
    """The mean over sides, classes and examples, `(tasks, 1, 1)`."""
    return products.mean((0, 2, 3), keepdim=True).squeeze(0)


def _length(point: _Point, direction: _Point) -> Tensor:
    """The longest step of each task, at most 1, that keeps slacks and multipliers positive, `(tasks, 1, 1)`."""
    fastest = torch.maximum(
        (-direction.slack / point.slack).amax((0, 2, 3)), (-direction.multiplier / point.multiplier).amax((0, 2, 3))
    )
    return (_FRACTION_TO_BOUNDARY / fastest.clamp_min(_FRACTION_TO_BOUNDARY))[:, None, None]
