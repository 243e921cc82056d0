"""The steps of Newton's method from a point, found in several ways, and the systems that they solve."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from convexheads.heads._logistic_newton import SoftmaxKKT
from convexheads.heads._primal.problem import Point, Problem, Remaining, centered
from convexheads.heads._sharing import multiply
from convexheads.solvers.kkt import cholesky

# Conjugate gradients in a step: the largest number of iterations, and the bounds of the tolerance.
MAX_INNER, FORCING = 300, (1e-4, 0.3)
# With fewer examples than this, and less than four times as many as features, matrices of the active ones are
# factorized, as many at once as have so few entries.
MAX_ACTIVE, _MAX_ACTIVE_ENTRIES = 4000, 2**22


def by_cholesky(problem: Problem, point: Point) -> Tensor:
    return -factorize(problem.damped(point.gap), point.curvature)(point.gradient)


def by_conjugate_gradients(problem: Problem, point: Point) -> Tensor:
    """The step to a precision that grows toward the optimum."""
    forcing, right = point.gap.clamp(0, 1).pow(0.25).clamp(*FORCING), -centered(point.gradient, problem.loss)
    return conjugate_gradients(problem.damped(point.gap), point.curvature, right, forcing, MAX_INNER)


def by_cholesky_in_dual(problem: Problem, point: Point) -> Tensor:
    return -factorize_in_dual(problem, point.curvature)(centered(point.gradient, problem.loss))


def by_active_examples(problem: Problem, point: Point) -> Tensor:
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


def factorize(problem: Problem, curvature: Tensor) -> Callable[[Tensor], Tensor]:
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


def factorize_in_dual(problem: Problem, curvature: Tensor) -> Callable[[Tensor], Tensor]:
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


def conjugate_gradients(problem: Problem, curvature: Tensor, right: Tensor, tolerance: Tensor, limit: int) -> Tensor:
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
    found, remaining = torch.zeros_like(right), Remaining(right.shape, right.device)
    direction = centered(remainder * inverse, loss)
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
        preconditioned = centered(remainder * inverse, loss)
        previous, size = size, torch.where(moved, inner(remainder, preconditioned), 0)
        direction = torch.addcmul(preconditioned, torch.where(moved, size / previous, 0), direction)
    remaining.store(solution, found)
    return found
