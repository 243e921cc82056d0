"""Regularized losses, minimized in the weights: Newton's method, its certificate, and derivatives of any order.

With a linear kernel and the weights `W`, d x k, a head minimizes `penalty/2 |W|^2 + sum_n s_n loss_n(x_n W + o_n)`,
with the weight s and the offset o of each example. Few unknowns are solved for by a Cholesky factorization of the
Hessian, and many by conjugate gradients. No digits are lost if the penalty is small.

Tasks come in groups that share their features, such as those of a grid of penalties: the tensors here begin with the
dimensions of groups and of their members. A group is one matrix product, which is faster than a product per task.

With an intercept, the last feature is a constant one, and its weights are not in `|W|^2`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from convexheads._compiler import operator
from convexheads._functorch import compute_without_grad
from convexheads.heads._logistic_newton import PATIENCE, TINY_GAP, SoftmaxKKT, take_step
from convexheads.heads._losses import LOSSES, CrossEntropy, Loss
from convexheads.heads._sharing import apply_once, is_shared, multiply, scale_once, shared_from
from convexheads.heads.base.support_set import SupportSet
from convexheads.hyperparameters import Hyperparameter, PerTask
from convexheads.solvers.best_iterate import BestIterate
from convexheads.solvers.kkt import cholesky

# With more examples or dual coefficients, the primal is solved even if there are more features than examples.
_MAX_EXAMPLES, _MAX_COEFFICIENTS = 100, 1000
# Newton's method continues until rounding stops it, because the implicit gradient is that of the exact optimum. The
# scores of a grid are not differentiated.
_AIM, _AIM_OF_GRID, _MAX_STEPS = 1e-20, 1e-12, 100
# Up to this number of weights, d k, the Hessian is factorized.
_MAX_UNKNOWNS = 256
# Conjugate gradients in a step of Newton's method, and for a gradient, which has to be precise.
_MAX_INNER, _MAX_PRECISE, _PRECISE = 300, 2000, 1e-14
# Where conjugate gradients stall above this gap, matrices are factorized, as many at once as have so few entries.
_STALLED, _MAX_ENTRIES = 1e-8, 2**26
# The ratio of successive penalties, and the gap for all but the last one.
_EASIER, _AIM_OF_EASIER = 10, 0.1
# With fewer examples than this, and less than four times as many as features, matrices of the active ones are
# factorized, as many at once as have so few entries.
_MAX_ACTIVE, _MAX_ACTIVE_ENTRIES = 4000, 2**22
# Steps by conjugate gradients, after which a problem with active examples is solved by factorizations.
_MAX_INEXACT = 20
# The damping of the intercept, relative to the weights of the examples times the gap.
_DAMPING = 1e-8
# An iteration goes on without the finished tasks once the others are at most this fraction.
_FRACTION_TO_CONTINUE = 0.75
# Of a grid of penalties, every n-th one is solved first. The others start between the solutions of their neighbors, of
# which these many determine a polynomial.
_FIRST, _NEIGHBORS = 8, 4
_DATA = "Tensor features, Tensor targets, Tensor sample_weight, Tensor offset, Tensor penalty"
_OPTIONS = "str loss, bool intercept"
_SOLVE = f"({_DATA}, Tensor? start=None, *, {_OPTIONS}, float tolerance, int max_steps) -> "
_SOLVE += "(Tensor, Tensor, Tensor, Tensor)"
_APPLY = (
    f"(Tensor features, Tensor curvature, Tensor sample_weight, Tensor penalty, Tensor right, *, {_OPTIONS}) -> Tensor"
)


class PrimalFit(NamedTuple):
    """What `fit` returns."""

    weight: Float[Tensor, "*batch k d"]
    bias: Float[Tensor, "*batch k"] | None
    coef: Float[Tensor, "*batch n k"]
    gap: Float[Tensor, "*batch"]
    error: Float[Tensor, "*batch"]
    """An upper bound of the gap and of the squared relative error of the weights."""
    steps: Float[Tensor, "*batch"]


def is_worth_while(n: int, d: int, k: int, parameter: Hyperparameter) -> bool:
    """Whether the primal of n examples with d features and k classes is solved rather than the dual.

    It is always solved for a grid, which has a hyperparameter per point, because tasks then share their features.
    """
    return n > min(d, _MAX_EXAMPLES) or n * k > _MAX_COEFFICIENTS or is_grid(parameter)


def is_grid(parameter: Hyperparameter) -> bool:
    """Whether a hyperparameter has the values of a grid, for scores that are not differentiated."""
    return isinstance(parameter, PerTask) and not torch.is_grad_enabled()


def fit(
    support: SupportSet,
    factor: float | Tensor,
    *,
    loss: str,
    penalty: Float[Tensor, "*#batch"],
    intercept: bool,
    is_precise: bool,
) -> PrimalFit:
    """Fit the weights of a support set with the kernel `<factor x, factor y>`, with gradients if `is_precise`.

    The dimensions of the penalty broadcast with those of the support set.
    """
    targets = support.targets
    features = scale_once(support.features, factor)
    if intercept:
        features = apply_once(lambda x: torch.cat([x, torch.ones_like(x[..., :1])], -1), features)
    used, offset = support.factors, support.offset
    batch = torch.broadcast_shapes(penalty.shape, targets.shape[:-2])
    data = (part.expand(*batch, *part.shape[targets.ndim - 2 :]) for part in (features, targets, used, offset))
    problem = (*data, penalty.expand(batch).contiguous())
    start = support.start_coef((*batch, *targets.shape[-2:]))
    if start is not None:
        start = (features.mT @ start).detach()
        if intercept:  # a solution has no biases
            start = torch.cat([start[..., :-1, :], torch.zeros_like(start[..., -1:, :])], -2)
    aim = _AIM if is_precise else _AIM_OF_GRID
    run = partial(solve, loss=loss, intercept=intercept, tolerance=aim, max_steps=_MAX_STEPS)
    inputs = problem if start is None else (*problem, start)
    weight, gap, error, steps = compute_without_grad(run, *inputs)
    weight = ImplicitWeights.apply(*problem, weight, loss, intercept)
    slope = LOSSES[loss].evaluate(targets, multiply(features, weight) + offset).slope
    coef = -used.unsqueeze(-1) * slope / penalty[..., None, None]
    weight, bias = torch.where(torch.isfinite(gap)[..., None, None], weight, torch.nan), None
    if intercept:
        weight, bias = weight[..., :-1, :], weight[..., -1, :]
    return PrimalFit(factor * weight.mT, bias, coef, gap, error, steps)


@dataclass(frozen=True, eq=False, repr=False)
class _Problem:
    """The data of groups of tasks. What all members share has one member."""

    features: Float[Tensor, "groups 1 n d"]
    targets: Float[Tensor, "groups _ n k"]
    sample_weight: Float[Tensor, "groups _ n"]
    offset: Float[Tensor, "groups _ n k"]
    penalty: Float[Tensor, "groups members"]
    loss: Loss
    intercept: bool
    damping: Float[Tensor, "groups members"] | None = None
    """The number that is added to the curvature of the intercept, which is zero where all losses are flat."""

    def scores(self, weight: Tensor) -> Float[Tensor, "groups members n k"]:
        return multiply(self.features, weight) + self.offset

    def moments(self, values: Tensor) -> Float[Tensor, "groups members d k"]:
        """The sums over the examples of their features times `values`, weighted by `sample_weight`."""
        return multiply(self.features.mT, self.sample_weight.unsqueeze(-1) * values)

    def penalties(self) -> Float[Tensor, "groups members d 1"]:
        """The penalty of each row of the weights: zero for the intercept."""
        d = self.features.shape[-1]
        rows = self.penalty[..., None, None].expand(*self.penalty.shape, d, 1)
        if not self.intercept:
            return rows
        last = torch.zeros_like(rows[..., :1, :]) if self.damping is None else self.damping[..., None, None]
        return torch.cat([rows[..., :-1, :], last], -2)

    def damped(self, gap: Tensor) -> _Problem:
        """The problem with the damping of a Newton step, which is proportional to the gap."""
        if not self.intercept:
            return self
        total = self.sample_weight.sum(-1).expand(gap.shape)
        return replace(self, damping=_DAMPING * gap.clamp(0, 1) * total)

    def map(self, change: Callable[[Tensor], Tensor]) -> _Problem:
        changed = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **changed)


@dataclass(frozen=True, eq=False, repr=False)
class _Point:
    """Weights `(groups, members, d, k)`; the objective, its derivatives and the certificate there.

    The certificate is the relative duality gap, and a bound of this gap and of the squared relative error of the
    weights.
    """

    weight: Tensor
    value: Tensor
    curvature: Tensor
    gradient: Tensor
    gap: Tensor
    error: Tensor

    def is_solved(self, tolerance: float) -> Tensor:
        """Whether the error is at most `tolerance`, or the weights are zero."""
        return (self.error <= tolerance) | (self.gap <= TINY_GAP)

    def map(self, change: Callable[[Tensor], Tensor]) -> _Point:
        return _Point(*map(change, vars(self).values()))


class _Remaining:
    """Which tasks an iteration goes on with. Without members, groups are selected, and otherwise members."""

    def __init__(self, shape: Sequence[int], device: torch.device) -> None:
        self._dim = int(shape[1] > 1)
        self.places = torch.arange(shape[self._dim], device=device)

    def needed(self, active: Tensor) -> Tensor | None:
        """The indices to go on with, given which tasks are `active`; None if it is not worth while to select."""
        kept = active.any(1 - self._dim).nonzero().squeeze(-1)
        return kept if len(kept) <= _FRACTION_TO_CONTINUE * len(self.places) else None

    def choose(self, kept: Tensor) -> Callable[[Tensor], Tensor]:
        """A function that selects of a tensor what is to be `kept`."""
        count = len(self.places)

        def change(value: Tensor) -> Tensor:
            return value.index_select(self._dim, kept) if value.shape[self._dim] == count else value

        return change

    def store(self, value: Tensor, target: Tensor) -> None:
        """Write the results of the current tasks to their places."""
        target.index_copy_(self._dim, self.places, value)


def _centered(weight: Tensor, loss: Loss) -> Tensor:
    """Weights `(..., d, k)` without their mean over the classes, on which coupled losses do not depend."""
    return weight - weight.mean(-1, keepdim=True) if loss.is_coupled else weight


def _evaluate(problem: _Problem, weight: Tensor) -> _Point:
    """The point at these weights, with its certificate.

    The slopes of the losses are dual coefficients. With them, the losses and their conjugates add up without a gap, and
    what remains is `|gradient|^2 / (2 penalty)`. With an intercept, the slopes have to be balanced first.
    """
    loss, targets, penalty = problem.loss, problem.targets, problem.penalty
    scores, penalized = problem.scores(weight), problem.penalties() * weight
    found = loss.evaluate(targets, scores)
    quadratic = (penalized * weight).sum((-2, -1))
    value = quadratic / 2 + (problem.sample_weight * found.value).sum(-1)
    gradient = penalized + problem.moments(found.slope)
    if problem.intercept:
        change, lost = loss.balance(scores, found, problem.sample_weight)
        balanced = gradient + problem.moments(change)
        gap = lost + balanced[..., :-1, :].square().sum((-2, -1)) / (2 * penalty)
    else:
        gap = gradient.square().sum((-2, -1)) / (2 * penalty)
    tiny = torch.finfo(gap.dtype).tiny
    bounds = gap / value.clamp_min(tiny), 2 * gap / quadratic.clamp_min(tiny)
    return _Point(weight, value, found.curvature, gradient, *bounds)


def _factorize(problem: _Problem, curvature: Tensor) -> Callable[[Tensor], Tensor]:
    """The inverse of the Hessian, on directions whose mean over the classes is zero if the loss is coupled."""
    features, (d, k) = problem.features, (problem.features.shape[-1], curvature.shape[-1])
    used = problem.sample_weight.unsqueeze(-1)
    weighted = curvature * used
    blocks = features.mT.unsqueeze(-3) @ (weighted.mT.unsqueeze(-1) * features.unsqueeze(-3))  # (..., k, d, d)
    eye = torch.eye(d, dtype=curvature.dtype, device=curvature.device)
    blocks = blocks + problem.penalties().unsqueeze(-3) * eye
    if not problem.loss.is_coupled:
        factor = cholesky(blocks)
        return lambda right: torch.cholesky_solve(right.mT.unsqueeze(-1), factor).squeeze(-1).mT
    rows = (curvature.unsqueeze(-1) * features.unsqueeze(-2)).flatten(-2)  # (..., n, k d)
    hessian = -rows.mT @ (rows * used)
    diagonal = torch.diag_embed(blocks.movedim(-3, -1)).movedim((-4, -3, -2, -1), (-3, -1, -4, -2))  # (..., k, d, k, d)
    hessian = hessian + diagonal.reshape(hessian.shape)
    # Without this term, which is zero on such directions, rounding would matter if the penalty is tiny.
    size = torch.diagonal(hessian, dim1=-2, dim2=-1).mean(-1)
    mean = torch.full((k, k), 1 / k, dtype=eye.dtype, device=eye.device)
    factor = cholesky(hessian + size[..., None, None] * torch.kron(mean, eye))

    def solve(right: Tensor) -> Tensor:
        stacked = right.mT.flatten(-2).unsqueeze(-1)
        return torch.cholesky_solve(stacked, factor).unflatten(-2, (k, d)).squeeze(-1).mT

    return solve


def _conjugate_gradients(problem: _Problem, curvature: Tensor, right: Tensor, tolerance: Tensor, limit: int) -> Tensor:
    """The inverse of the Hessian applied to `right`, whose mean over the classes is zero if the loss is coupled.

    Each residual falls by the factor `tolerance`, `(groups, members)`, if `limit` iterations suffice.
    """
    loss, features = problem.loss, problem.features
    # Without coupling, each class is a system of its own.
    dims = (-2, -1) if loss.is_coupled else (-2,)

    def inner(left: Tensor, right: Tensor) -> Tensor:
        return (left * right).sum(dims, keepdim=True)

    used = problem.sample_weight.unsqueeze(-1)
    weighted, share = used * curvature, used.where(used == 0, 1 / used)
    penalties = problem.penalties()
    diagonal = weighted - weighted * curvature if loss.is_coupled else weighted
    diagonal = penalties + multiply(features.square().mT, diagonal)
    # Where an example is fitted perfectly, a loss has no curvature.
    inverse = 1 / diagonal.clamp_min(torch.finfo(diagonal.dtype).tiny)
    solution, remainder = torch.zeros_like(right), right.clone()
    found, remaining = torch.zeros_like(right), _Remaining(right.shape, right.device)
    direction = _centered(remainder * inverse, loss)
    size = inner(remainder, direction)
    aim = tolerance.square()[..., None, None] * size
    for _ in range(limit):
        moved = size > aim
        active = moved.flatten(2).any(-1)
        if not active.any():
            break
        if (kept := remaining.needed(active)) is not None:
            remaining.store(solution, found)
            choose = remaining.choose(kept)
            features, weighted, share, penalties, inverse = map(choose, (features, weighted, share, penalties, inverse))
            state = solution, remainder, direction, size, aim, moved
            solution, remainder, direction, size, aim, moved = map(choose, state)
            remaining.places = remaining.places[kept]
        image = multiply(features, direction).mul_(weighted)
        if loss.is_coupled:
            image.addcmul_(weighted, image.sum(-1, keepdim=True) * share, value=-1)
        image = multiply(features.mT, image).addcmul_(penalties, direction)
        step = torch.where(moved, size / inner(direction, image), 0)
        solution.addcmul_(step, direction)
        remainder.addcmul_(step, image, value=-1)
        preconditioned = _centered(remainder * inverse, loss)
        previous, size = size, torch.where(moved, inner(remainder, preconditioned), 0)
        direction = torch.addcmul(preconditioned, torch.where(moved, size / previous, 0), direction)
    remaining.store(solution, found)
    return found


def _basis(features: Tensor, intercept: bool) -> tuple[Tensor, Tensor | None]:
    """A basis `(..., d, r)` in which the second moments of the features are diagonal, and the means with intercept.

    Without an intercept, the basis is orthonormal. With one, features are centered first: the last column of the basis
    is the intercept, and the last entries of the others make up for the means, `(..., d - 1, 1)`.
    """
    mean = None
    if intercept:
        features = features[..., :-1]
        mean = features.mean(-2).unsqueeze(-1)
        features = features - mean.mT
    n, d = features.shape[-2:]
    if n >= d:
        basis = torch.linalg.eigh(features.mT @ features).eigenvectors
    else:
        basis, triangle = torch.linalg.qr(features.mT)
        basis = basis @ torch.linalg.eigh(triangle @ triangle.mT).eigenvectors
    if mean is None:
        return basis, None
    zero, one = torch.zeros_like(mean), torch.ones_like(mean[..., :1, :])
    return torch.cat([torch.cat([basis, zero], -1), torch.cat([-mean.mT @ basis, one], -1)], -2), mean


def _to_basis(weight: Tensor, basis: Tensor, mean: Tensor | None) -> Tensor:
    """The weights `(..., r, k)` that `_basis` maps to `weight`, `(..., d, k)`, in the space of the features."""
    if mean is None:
        return multiply(basis.mT, weight)
    inside = multiply(basis[..., :-1, :-1].mT, weight[..., :-1, :])
    return torch.cat([inside, weight[..., -1:, :] + multiply(mean.mT, weight[..., :-1, :])], -2)


def _factorize_in_dual(problem: _Problem, curvature: Tensor) -> Callable[[Tensor], Tensor]:
    """The inverse of the Hessian, from k + 1 factorizations of n x n matrices (the matrix inversion lemma)."""
    features, penalty = problem.features, problem.penalty[..., None, None]
    if problem.intercept:
        features = features[..., :-1]
    gram = features @ features.mT / penalty
    inner = SoftmaxKKT.factorize(gram, problem.sample_weight.unsqueeze(-1) * curvature, intercept=problem.intercept)

    def solve(right: Tensor) -> Tensor:
        outer, sums = (right[..., :-1, :], right[..., -1, :]) if problem.intercept else (right, None)
        outer = outer / penalty
        coef, bias = inner.solve(features @ outer, sums)
        change = outer - features.mT @ coef / penalty
        return change if bias is None else torch.cat([change, -bias.unsqueeze(-2)], -2)

    return solve


def _minimize(
    problem: _Problem,
    weight: Tensor,
    find_change: Callable[[_Problem, _Point], Tensor],
    tolerance: float,
    max_steps: int,
) -> tuple[Tensor, Tensor]:
    """Take damped Newton steps, which `find_change` computes from a point.

    Returns the weights of the smallest error, and the number of steps, of each task.
    """
    found = weight.clone(), torch.zeros_like(problem.penalty, dtype=torch.long)
    remaining = _Remaining(weight.shape, weight.device)
    point = _evaluate(problem, weight)
    best = BestIterate(point.weight, patience=PATIENCE)
    best.update(0, point.error, point.is_solved(tolerance), point.weight)
    for step in range(1, max_steps + 1):
        if best.done.all():
            break
        if (kept := remaining.needed(~best.done)) is not None:
            _store(remaining, best, found)
            choose = remaining.choose(kept)
            problem, point = problem.map(choose), point.map(choose)
            best.select(choose)
            remaining.places = remaining.places[kept]
        change = find_change(problem, point)

        def step_to(length: Tensor, problem=problem, start=point, change=change) -> tuple[Tensor, _Point]:
            reached = _evaluate(problem, torch.addcmul(start.weight, length[..., None, None], change))
            return reached.value, reached

        _, point = take_step(point.value, step_to)
        best.update(step, point.error, point.is_solved(tolerance), point.weight)
    _store(remaining, best, found)
    return found


def _store(remaining: _Remaining, best: BestIterate, found: tuple[Tensor, Tensor]) -> None:
    for value, target in zip((best.tensors[0], best.iterations), found, strict=True):
        remaining.store(value, target)


def _newton(problem: _Problem, point: _Point) -> Tensor:
    return -_factorize(problem.damped(point.gap), point.curvature)(point.gradient)


def _inexact_newton(problem: _Problem, point: _Point) -> Tensor:
    forcing, right = point.gap.clamp(0, 1).pow(0.25).clamp(1e-4, 0.3), -_centered(point.gradient, problem.loss)
    return _conjugate_gradients(problem.damped(point.gap), point.curvature, right, forcing, _MAX_INNER)


def _newton_in_dual(problem: _Problem, point: _Point) -> Tensor:
    return -_factorize_in_dual(problem, point.curvature)(_centered(point.gradient, problem.loss))


def _newton_of_active(problem: _Problem, point: _Point) -> Tensor:
    """The Newton step of a loss of one class, by the matrix inversion lemma for the active examples alone.

    Tasks with similar numbers of active examples are factorized together.
    """
    problem = problem.damped(point.gap)
    groups, members = problem.penalty.shape
    penalty, features = problem.penalty[..., None, None], problem.features
    used = (problem.sample_weight.unsqueeze(-1) * point.curvature).reshape(groups * members, -1)
    right, sums = -point.gradient, None
    if problem.damping is not None:
        features, right, sums = features[..., :-1], right[..., :-1, :], right[..., -1, 0].flatten()
    right = right / penalty
    gram = (features @ features.mT).squeeze(1)
    values = multiply(features, right).reshape(groups * members, -1)
    coef, bias = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    counts = (used > 0).sum(-1)
    order = counts.argsort(descending=True)
    for chosen in order.split(max(1, _MAX_ACTIVE_ENTRIES // gram.shape[-1] ** 2)):
        most = max(1, int(counts[chosen[0]]))
        index = (used[chosen] > 0).to(torch.int8).argsort(-1, descending=True)[:, :most]
        root, group = used[chosen].gather(-1, index).sqrt(), chosen // members
        matrix = gram[group[:, None, None], index.unsqueeze(-1), index.unsqueeze(-2)]
        matrix *= (root / problem.penalty.flatten()[chosen].unsqueeze(-1)).unsqueeze(-1) * root.unsqueeze(-2)
        matrix.diagonal(dim1=-2, dim2=-1).add_(1)
        sides = root * values[chosen].gather(-1, index), root
        solved = root.unsqueeze(-1) * torch.cholesky_solve(torch.stack(sides, -1), cholesky(matrix))
        part, ones = solved.unbind(-1)
        if problem.damping is not None and sums is not None:
            shift = (part.sum(-1) - sums[chosen]) / (ones.sum(-1) + problem.damping.flatten()[chosen])
            part, bias[chosen] = part - ones * shift.unsqueeze(-1), -shift
        coef[chosen] = coef[chosen].scatter(-1, index, part)
    change = right - multiply(features.mT, coef.reshape(groups, members, -1, 1)) / penalty
    return change if sums is None else torch.cat([change, bias.reshape(groups, members, 1, 1)], -2)


def _minimize_gradually(
    problem: _Problem,
    start: Tensor,
    find_change: Callable[[_Problem, _Point], Tensor],
    tolerance: float,
    max_steps: int,
) -> tuple[Tensor, Tensor]:
    """Like `_minimize`, but it begins with larger penalties if only some examples are going to be active.

    Each penalty changes the state of few examples. Otherwise, it is that of most examples, a few in each step.
    """
    steps = 0
    if problem.loss.has_active_set:
        size = (problem.sample_weight * problem.features.square().sum(-1)).sum(-1) / problem.features.shape[-1]
        penalty = size.expand_as(problem.penalty)
        while (penalty > problem.penalty).any():
            easier = replace(problem, penalty=penalty.maximum(problem.penalty))
            start, taken = _minimize(easier, start, find_change, _AIM_OF_EASIER, max_steps)
            penalty, steps = penalty / _EASIER, steps + taken
    weight, taken = _minimize(problem, start, find_change, tolerance, max_steps)
    return weight, steps + taken


def _minimize_grid(
    problem: _Problem,
    start: Tensor,
    size: int,
    find_change: Callable[[_Problem, _Point], Tensor],
    tolerance: float,
    max_steps: int,
) -> tuple[Tensor, Tensor]:
    """Solve a grid of `size` penalties, from coarse to fine; members are grids, one after the other.

    Where grids are smooth, the solutions of neighbors determine where the others start.
    """
    grids = len(problem.penalty[0]) // size
    logs = problem.penalty[0, :size].log()
    order = logs.argsort().tolist()
    found = start.clone(), torch.zeros_like(problem.penalty, dtype=torch.long)
    known: list[int] = []
    step = _FIRST
    while len(known) < size:
        new = [place for place in (*range(0, size, step), size - 1) if place not in known]
        step //= 2
        new = list(dict.fromkeys(new))
        if not new:
            continue
        members = torch.tensor([grid * size + order[place] for grid in range(grids) for place in new])
        members = members.to(start.device)
        if known:
            for place in new:
                neighbors = sorted(known, key=lambda other, place=place: abs(other - place))[:_NEIGHBORS]
                weights = _polynomial([logs[order[other]].item() for other in neighbors], logs[order[place]].item())
                for grid in range(grids):
                    values = (found[0][:, grid * size + order[other]] for other in neighbors)
                    start[:, grid * size + order[place]] = sum(
                        weight * value for weight, value in zip(weights, values, strict=True)
                    )

        def choose(value: Tensor, members: Tensor = members) -> Tensor:
            return value.index_select(1, members) if value.shape[1] > 1 else value

        minimize = _minimize if known else _minimize_gradually
        part = minimize(problem.map(choose), choose(start), find_change, tolerance, max_steps)
        for value, target in zip(part, found, strict=True):
            target.index_copy_(1, members, value)
        known += new
    return found


def _polynomial(known: Sequence[float], place: float) -> list[float]:
    """The weights of the values at the `known` places in the polynomial through them, at another place (Lagrange)."""
    weights = []
    for own in known:
        factors = ((place - other) / (own - other) for other in known if other != own)
        weights.append(math.prod(factors))
    return weights


def _minimize_all(
    problem: _Problem, start: Tensor | None, grid: int, tolerance: float, max_steps: int
) -> tuple[Tensor, Tensor]:
    """The optimal weights and the number of steps.

    A warm start is used where it is better than zero.
    """
    k = problem.targets.shape[-1]
    if not problem.loss.is_coupled and k > 1:
        each = _minimize_all(*_split_classes(problem, start, grid), grid, tolerance, max_steps)
        weight, steps = (_join_classes(part, k, grid) for part in each)
        return weight.squeeze(-2), steps.amax(-1)
    (groups, members), (n, d) = problem.penalty.shape, problem.features.shape[-2:]
    # The memory has the order in which a group is multiplied.
    zero = problem.features.new_zeros((groups, d, members, k)).transpose(1, 2)
    minimize = _minimize_gradually
    if start is not None:
        is_better = _evaluate(problem, start).value < _evaluate(problem, zero).value
        zero, minimize = start.where(is_better[..., None, None], 0), _minimize
    if d * k <= _MAX_UNKNOWNS:
        return minimize(problem, zero, _newton, tolerance, max_steps)
    basis, mean = _basis(problem.features, problem.intercept)
    rotated = replace(problem, features=problem.features @ basis)
    inside = basis.new_zeros((groups, basis.shape[-1], members, k)).transpose(1, 2)
    if start is not None:
        inside.copy_(_to_basis(zero, basis, mean))
    find_change, most = _inexact_newton, max_steps
    if problem.loss.has_active_set:  # which inexact steps find slowly
        if n < min(4 * d, _MAX_ACTIVE):
            find_change = _newton_of_active
        else:
            most = min(max_steps, _MAX_INEXACT)
    if grid > 2:
        found = _minimize_grid(rotated, inside, grid, find_change, tolerance, most)
    else:
        found = minimize(rotated, inside, find_change, tolerance, most)
    weight, steps = multiply(basis, found[0]), found[1]
    # The rotation rounds the features, which matters where weights are huge.
    stalled = (_evaluate(problem, weight).error > _STALLED).nonzero()
    if len(stalled) and (k * n * n <= _MAX_ENTRIES or not problem.loss.is_coupled):
        # Each of these tasks becomes a group of its own, as many at once as fit into memory.
        for places in stalled.split(max(1, _MAX_ENTRIES // (k * n * max(n, d)))):
            chosen = tuple(places.unbind(-1))

            def choose(value: Tensor, chosen: tuple[Tensor, ...] = chosen) -> Tensor:
                return value.expand(groups, members, *value.shape[2:])[chosen].unsqueeze(1)

            parts = choose(found[0]), choose(basis)
            better = _factorize_all(problem.map(choose), rotated.map(choose), *parts, tolerance, max_steps)
            weight[chosen] = better.squeeze(1)
    return weight, steps


def _factorize_all(
    problem: _Problem, rotated: _Problem, inside: Tensor, basis: Tensor, tolerance: float, max_steps: int
) -> Tensor:
    """The weights of problems with one member, by factorizations in every step.

    They begin at the weights `inside` of the problems in terms of the basis.
    """
    if isinstance(problem.loss, CrossEntropy):
        return _minimize(problem, basis @ inside, _newton_in_dual, tolerance, max_steps)[0]
    return basis @ _minimize_gradually(rotated, inside, _newton, tolerance, max_steps)[0]


def _split_classes(problem: _Problem, start: Tensor | None, grid: int) -> tuple[_Problem, Tensor | None]:
    """The problem and its start, with a member for each class, whose loss does not depend on the others.

    Grids stay together.
    """
    groups, members = problem.penalty.shape
    k = problem.targets.shape[-1]

    def split(value: Tensor, *, has_classes: bool) -> Tensor:
        value = value.expand(groups, members, *value.shape[2:]).unflatten(1, (-1, grid))
        if has_classes:
            value = value.movedim(-1, 2).unsqueeze(-1)
        else:
            value = value.unsqueeze(2).expand(groups, value.shape[1], k, *value.shape[2:])
        return value.flatten(1, 3)

    changed = replace(
        problem,
        targets=split(problem.targets, has_classes=True),
        offset=split(problem.offset, has_classes=True),
        sample_weight=weight if (weight := problem.sample_weight).shape[1] == 1 else split(weight, has_classes=False),
        penalty=split(problem.penalty, has_classes=False),
    )
    return changed, None if start is None else split(start, has_classes=True)


def _join_classes(value: Tensor, k: int, grid: int) -> Tensor:
    """The members of `_split_classes` as members with a last dimension of classes; weights lose their own one."""
    value = value.unflatten(1, (-1, k, grid)).movedim(2, 3)
    return value.flatten(1, 2) if value.ndim == 4 else value.flatten(1, 2).movedim(2, -1)


def _without_values(
    features: Tensor, targets: Tensor, *_: Tensor, **options: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight = features.new_empty((*features.shape[:-2], features.shape[-1], targets.shape[-1]))
    tasks = features.new_empty(features.shape[:-2])
    return weight, tasks, tasks.clone(), torch.empty_like(tasks, dtype=torch.long)


@operator("solve_primal", _SOLVE, _without_values)
def solve(
    features: Tensor,
    targets: Tensor,
    sample_weight: Tensor,
    offset: Tensor,
    penalty: Tensor,
    start: Tensor | None = None,
    *,
    loss: str,
    intercept: bool,
    tolerance: float,
    max_steps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Solve tasks `(*batch, n, d)` by damped Newton steps until each error is below `tolerance` or stops falling.

    The steps begin at zero or at the weights `start`, `(*batch, d, k)`. Returns the weights, `(*batch, d, k)`, their
    certified relative duality gap and error (as in `PrimalFit`), and the number of steps.
    """
    batch, (_, d), k = features.shape[:-2], features.shape[-2:], targets.shape[-1]
    groups = shared_from(features, len(batch))
    data = (features, targets, sample_weight, offset, penalty)
    grouped = [_group(part, groups, len(batch)) for part in data]
    problem = _Problem(*grouped, loss=LOSSES[loss], intercept=intercept)
    last = len(batch) - 1
    is_grid = groups <= last and is_shared(sample_weight, [last]) and (penalty == penalty[(0,) * last]).all()
    if start is not None:
        start = start.reshape(*problem.penalty.shape, d, k)
    weight, steps = _minimize_all(problem, start, batch[-1] if is_grid else 1, tolerance, max_steps)
    point = _evaluate(problem, weight)
    gap, error, steps = (part.reshape(batch) for part in (point.gap, point.error, steps))
    return weight.reshape(*batch, d, k), gap, error, steps


def _group(value: Tensor, groups: int, dims: int) -> Tensor:
    """Turn the first dimensions, of which `groups` index groups of tasks, into two, of groups and of their members."""
    if groups < dims and is_shared(value, range(groups, dims)):
        value = value[(slice(None),) * groups + (slice(1),) * (dims - groups)]
    shape = value.shape
    return value.reshape(math.prod(shape[:groups]), math.prod(shape[groups:dims]), *shape[dims:])


@operator("solve_primal_hessian", _APPLY, lambda *arguments, **_: torch.empty_like(arguments[4]))
def _solve_hessian(
    features: Tensor,
    curvature: Tensor,
    sample_weight: Tensor,
    penalty: Tensor,
    right: Tensor,
    *,
    loss: str,
    intercept: bool,
) -> Tensor:
    """Apply the inverse of the Hessian to `right`, `(*batch, d, k)`; up to class means if the loss is coupled."""
    shape, d, k, dims = right.shape, features.shape[-1], curvature.shape[-1], penalty.ndim
    parts = (_group(part, dims, dims) for part in (features, curvature, sample_weight, penalty, right))
    features, curvature, sample_weight, penalty, right = parts
    nothing = torch.zeros_like(curvature)
    problem = _Problem(features, nothing, sample_weight, nothing, penalty, LOSSES[loss], intercept)
    right = _centered(right, problem.loss)
    if d * (k if problem.loss.is_coupled else 1) <= _MAX_UNKNOWNS:
        return _factorize(problem, curvature)(right).reshape(shape)
    basis, mean = _basis(problem.features, intercept)
    inside, precise = basis.mT @ right, torch.full_like(problem.penalty, _PRECISE)
    rotated = replace(problem, features=problem.features @ basis)
    found = basis @ _conjugate_gradients(rotated, curvature, inside, precise, _MAX_PRECISE)
    if basis.shape[-1] < d:  # outside of the space of the features, the Hessian is the penalty
        if mean is None:
            outside = right - basis @ inside
        else:
            outside = right[..., :-1, :] - mean * right[..., -1:, :]
            outside = outside - basis[..., :-1, :-1] @ (basis[..., :-1, :-1].mT @ outside)
            outside = torch.cat([outside, -mean.mT @ outside], -2)
        found = found + outside / problem.penalty[..., None, None]
    return found.reshape(shape)


class ImplicitWeights(torch.autograd.Function):
    """The optimal `weight`, `(*batch, d, k)`, as a function of the data of `solve`, with the same batch."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        features: Tensor,
        targets: Tensor,
        sample_weight: Tensor,
        offset: Tensor,
        penalty: Tensor,
        weight: Tensor,
        loss: str,
        intercept: bool,
    ) -> Tensor:
        return weight.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:5], output)
        ctx.options = inputs[6:]

    @staticmethod
    def backward(ctx, gradient: Tensor):
        features, targets, sample_weight, offset, penalty, weight = ctx.saved_tensors
        name, intercept = ctx.options
        loss, scores = LOSSES[name], features @ weight + offset
        _, slope, curvature = loss.evaluate(targets, scores)
        v = _ImplicitSystemSolve.apply(features, curvature, sample_weight, penalty, gradient, name, intercept)
        along = features @ v
        used = sample_weight.unsqueeze(-1)
        curved = used * loss.apply_hessian(curvature, along)
        to_features = -(used * slope) @ v.mT - curved @ weight.mT
        # The derivative of the slope with respect to the targets is minus one for the cross-entropy. Those of the
        # other losses are one-hot labels in any case.
        to_targets = used * along if loss.is_coupled else None
        kept = v[..., :-1, :] if intercept else v
        to_penalty = -(kept * weight[..., : kept.shape[-2], :]).sum((-2, -1))
        return to_features, to_targets, -(slope * along).sum(-1), -curved, to_penalty, None, None, None


class _ImplicitSystemSolve(torch.autograd.Function):
    """The Hessian's inverse applied to `right`, up to class means; differentiable any number of times."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        features: Tensor,
        curvature: Tensor,
        sample_weight: Tensor,
        penalty: Tensor,
        right: Tensor,
        loss: str,
        intercept: bool,
    ) -> Tensor:
        def call(*tensors: Tensor) -> tuple[Tensor]:
            return (_solve_hessian(*tensors, loss=loss, intercept=intercept),)

        return compute_without_grad(call, features, curvature, sample_weight, penalty, right)[0]

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:4], output)
        ctx.options = inputs[5:]

    @staticmethod
    def backward(ctx, gradient: Tensor):
        features, h, sample_weight, penalty, v = ctx.saved_tensors
        name, intercept = ctx.options
        loss = LOSSES[name]
        q = _ImplicitSystemSolve.apply(features, h, sample_weight, penalty, gradient, name, intercept)
        a, b = features @ v, features @ q
        used = sample_weight.unsqueeze(-1)
        to_features = -used * loss.apply_hessian(h, a) @ q.mT - used * loss.apply_hessian(h, b) @ v.mT
        to_h, along = a * b, (h * a * b).sum(-1)
        if loss.is_coupled:
            mean_a, mean_b = (h * a).sum(-1, keepdim=True), (h * b).sum(-1, keepdim=True)
            to_h, along = to_h - a * mean_b - b * mean_a, along - (mean_a * mean_b).squeeze(-1)
        kept = v.shape[-2] - int(intercept)
        to_penalty = -(q[..., :kept, :] * v[..., :kept, :]).sum((-2, -1))
        return to_features, -used * to_h, -along, to_penalty, q, None, None
