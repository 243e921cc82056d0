"""Multinomial logistic regression in its weights: Newton's method, its certificate, and derivatives of any order.

With a linear kernel, more examples than features, and the weights `W`, d x k, the optimum of
`penalty/2 |W|^2 + sum_n cross-entropy(x_n W)` solves `penalty W = X' (Y - P)` with `P = softmax(X W)`. With fewer
unknowns than in the dual, no digits are lost if the penalty is small. Few unknowns are solved for by a Cholesky
factorization of the Hessian, and many by conjugate gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from convexheads._functorch import compute_without_grad
from convexheads.heads._logistic_newton import MAX_BACKTRACKS, PATIENCE, SoftmaxKKT, balance, margins_and_losses
from convexheads.solvers.best_iterate import BestIterate
from convexheads.solvers.kkt import cholesky
from convexheads.solvers.problem import per_task

# Up to this number of weights, d k, the Hessian is factorized.
_MAX_UNKNOWNS = 256
# Conjugate gradients in a step of Newton's method, and for a gradient, which has to be precise.
_MAX_INNER, _MAX_PRECISE, _PRECISE = 300, 2000, 1e-14
# Where conjugate gradients stall above this gap, n x n matrices are factorized if all of them have so few entries.
_STALLED, _MAX_ENTRIES = 1e-8, 2**26
_SOLVE = (
    "(Tensor features, Tensor targets, Tensor sample_weight, Tensor penalty, *, float tolerance, int max_steps)"
    " -> (Tensor, Tensor, Tensor)"
)
_APPLY = "(Tensor features, Tensor p, Tensor sample_weight, Tensor penalty, Tensor right) -> Tensor"


class _Point(NamedTuple):
    """Weights `(tasks, d, k)`, and the objective, the probabilities and the gradient there."""

    weight: Tensor
    value: Tensor
    p: Tensor
    gradient: Tensor


def _evaluate(features: Tensor, targets: Tensor, sample_weight: Tensor, penalty: Tensor, weight: Tensor) -> _Point:
    scaled = per_task(penalty, weight) * weight
    margins, loss = margins_and_losses(targets, features @ weight)
    value = (scaled * weight).sum((-2, -1)) / 2 + (sample_weight * loss).sum(-1)
    p = (margins - loss.unsqueeze(-1)).exp()
    gradient = scaled + features.mT @ (sample_weight.unsqueeze(-1) * balance(targets, p))
    return _Point(weight, value, p, gradient)


def _centered(weight: Tensor) -> Tensor:
    """Weights `(*batch, d, k)` with a mean of zero over the classes, which determines no probability."""
    return weight - weight.mean(-1, keepdim=True)


def _curve(p: Tensor, sample_weight: Tensor, scores: Tensor) -> Tensor:
    """The Hessian of the loss with respect to the scores, applied to `scores`, `(tasks, n, k)`."""
    weighted = p * scores
    return sample_weight.unsqueeze(-1) * (weighted - p * weighted.sum(-1, keepdim=True))


def _relative_gap(point: _Point, penalty: Tensor) -> Tensor:
    """The relative duality gap of weights W and of the dual coefficients `targets - p`.

    The losses and their conjugates add up without a gap, because p is the softmax of the scores. What remains is
    `|W - X' (targets - p) / penalty|^2 penalty / 2`.
    """
    gap = point.gradient.square().sum((-2, -1)) / (2 * penalty)
    return gap / point.value.clamp_min(torch.finfo(gap.dtype).tiny)


def _factorize(features: Tensor, p: Tensor, sample_weight: Tensor, penalty: Tensor) -> Callable[[Tensor], Tensor]:
    """The inverse of the Hessian, on directions whose mean over the classes is zero, as all gradients have."""
    (*_, d), k = features.shape, p.shape[-1]
    weighted = p * sample_weight.unsqueeze(-1)
    rows = (p.unsqueeze(-1) * features.unsqueeze(-2)).flatten(-2)  # (tasks, n, k d)
    hessian = -rows.mT @ (rows * sample_weight.unsqueeze(-1))
    blocks = features.mT.unsqueeze(-3) @ (weighted.mT.unsqueeze(-1) * features.unsqueeze(-3))  # (tasks, k, d, d)
    hessian = hessian + torch.diag_embed(blocks.permute(0, 2, 3, 1)).permute(0, 3, 1, 4, 2).reshape(hessian.shape)
    # Without this term, which is zero on such directions, rounding would matter if the penalty is tiny.
    size = torch.diagonal(hessian, dim1=-2, dim2=-1).mean(-1)
    eye = torch.eye(d, dtype=p.dtype, device=p.device)
    mean = torch.full((k, k), 1 / k, dtype=p.dtype, device=p.device)
    hessian = hessian + per_task(size, hessian) * torch.kron(mean, eye)
    factor = cholesky(hessian + per_task(penalty, hessian) * torch.eye(d * k, dtype=p.dtype, device=p.device))

    def solve(right: Tensor) -> Tensor:
        stacked = right.mT.reshape(-1, k * d, 1)
        return torch.cholesky_solve(stacked, factor).reshape(-1, k, d).mT

    return solve


def _conjugate_gradients(
    features: Tensor, p: Tensor, sample_weight: Tensor, penalty: Tensor, right: Tensor, tolerance: Tensor, limit: int
) -> Tensor:
    """The inverse of the Hessian applied to `right`, whose mean over the classes is zero.

    Each residual falls by the factor `tolerance`, `(tasks,)`, if `limit` iterations suffice.
    """
    scale = per_task(penalty, right)
    curvature = sample_weight.unsqueeze(-1) * (p * (1 - p))
    diagonal = scale + features.square().mT @ curvature

    def inner(left: Tensor, right: Tensor) -> Tensor:
        return (left * right).sum((-2, -1), keepdim=True)

    solution, remainder = torch.zeros_like(right), right
    direction = preconditioned = _centered(remainder / diagonal)
    size = inner(remainder, preconditioned)
    aim = per_task(tolerance.square(), size) * size
    for _ in range(limit):
        active = size > aim
        if not active.any():
            break
        image = scale * direction + features.mT @ _curve(p, sample_weight, features @ direction)
        step = torch.where(active, size / inner(direction, image), 0)
        solution, remainder = solution + step * direction, remainder - step * image
        preconditioned = _centered(remainder / diagonal)
        previous, size = size, torch.where(active, inner(remainder, preconditioned), 0)
        direction = preconditioned + torch.where(active, size / previous, 0) * direction
    return solution


def _rotation(features: Tensor) -> Tensor:
    """An orthonormal basis `(tasks, d, r)` of the space of the features, in which their second moments are diagonal."""
    n, d = features.shape[-2:]
    if n >= d:
        return torch.linalg.eigh(features.mT @ features).eigenvectors
    basis, triangle = torch.linalg.qr(features.mT)
    return basis @ torch.linalg.eigh(triangle @ triangle.mT).eigenvectors


def _factorize_in_dual(
    features: Tensor, p: Tensor, sample_weight: Tensor, penalty: Tensor
) -> Callable[[Tensor], Tensor]:
    """The inverse of the Hessian, from k + 1 factorizations of n x n matrices (the matrix inversion lemma)."""
    scaled = sample_weight.sqrt().unsqueeze(-1) * features
    inner = SoftmaxKKT.factorize(scaled @ scaled.mT / per_task(penalty, scaled), p)

    def solve(right: Tensor) -> Tensor:
        right = right / per_task(penalty, right)
        return right - scaled.mT @ inner.solve(scaled @ right) / per_task(penalty, right)

    return solve


def _minimize(
    problem: tuple[Tensor, Tensor, Tensor, Tensor],
    weight: Tensor,
    find_change: Callable[[_Point, Tensor], Tensor],
    tolerance: float,
    max_steps: int,
) -> BestIterate:
    """Take damped Newton steps, which `find_change` computes from a point and its gap."""
    penalty = problem[-1]
    point = _evaluate(*problem, weight)
    best = BestIterate(point.weight, patience=PATIENCE)
    best.update(0, gap := _relative_gap(point, penalty), gap <= tolerance, point.weight)
    for step in range(1, max_steps + 1):
        if best.done.all():
            break
        change = find_change(point, gap)
        length, next_point = torch.ones_like(point.value), point
        for _ in range(MAX_BACKTRACKS):
            next_point = _evaluate(*problem, point.weight + per_task(length, change) * change)
            worse = next_point.value > point.value + 1e-12 * point.value.abs()
            if not worse.any():
                break
            length = torch.where(worse, length / 2, length)
        point = next_point
        best.update(step, gap := _relative_gap(point, penalty), gap <= tolerance, point.weight)
    return best


@torch.library.custom_op("convexheads::solve_logistic_primal", mutates_args=(), schema=_SOLVE)
def solve(
    features: Tensor, targets: Tensor, sample_weight: Tensor, penalty: Tensor, *, tolerance: float, max_steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve tasks `(*batch, n, d)` by damped Newton steps until each gap is below `tolerance` or stops falling.

    It is an operator, because compilers cannot trace a loop whose length depends on values.

    Returns the weights, `(*batch, d, k)`, their certified relative duality gap, and the number of steps.
    """
    batch, (n, d), k = features.shape[:-2], features.shape[-2:], targets.shape[-1]
    features, targets = features.reshape(-1, n, d), targets.reshape(-1, n, k)
    sample_weight, penalty = sample_weight.reshape(-1, n), penalty.reshape(-1)
    problem = features, targets, sample_weight, penalty

    def factorized(point: _Point, _: Tensor) -> Tensor:
        return -_factorize(features, point.p, sample_weight, penalty)(point.gradient)

    if d * k <= _MAX_UNKNOWNS:
        best = _minimize(problem, features.new_zeros((len(features), d, k)), factorized, tolerance, max_steps)
        return best.tensors[0].reshape(*batch, d, k), best.gap.reshape(batch), best.iterations.reshape(batch)

    basis = _rotation(features)
    rotated = features @ basis

    def by_conjugate_gradients(point: _Point, gap: Tensor) -> Tensor:
        forcing, right = gap.clamp(0, 1).pow(0.25).clamp(1e-4, 0.3), -_centered(point.gradient)
        return _conjugate_gradients(rotated, point.p, sample_weight, penalty, right, forcing, _MAX_INNER)

    start = features.new_zeros((len(features), rotated.shape[-1], k))
    best = _minimize((rotated, *problem[1:]), start, by_conjugate_gradients, tolerance, max_steps)
    weight = basis @ best.tensors[0]
    # The rotation rounds the features, which matters where weights are huge.
    gap = _relative_gap(_evaluate(*problem, weight), penalty)
    stalled = gap > _STALLED
    if k * n * n <= _MAX_ENTRIES and stalled.any():
        x, y, used, own_penalty = (part[stalled] for part in problem)

        def factorized_in_dual(point: _Point, _: Tensor) -> Tensor:
            return -_factorize_in_dual(x, point.p, used, own_penalty)(_centered(point.gradient))

        again = _minimize((x, y, used, own_penalty), weight[stalled], factorized_in_dual, tolerance, max_steps)
        weight[stalled], gap[stalled] = again.tensors[0], again.gap
    return weight.reshape(*batch, d, k), gap.reshape(batch), best.iterations.reshape(batch)


@solve.register_fake
def _(
    features: Tensor, targets: Tensor, sample_weight: Tensor, penalty: Tensor, *, tolerance: float, max_steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    weight = features.new_empty((*features.shape[:-2], features.shape[-1], targets.shape[-1]))
    tasks = features.new_empty(features.shape[:-2])
    return weight, tasks, torch.empty_like(tasks, dtype=torch.long)


@torch.library.custom_op("convexheads::solve_logistic_hessian", mutates_args=(), schema=_APPLY)
def _solve_hessian(features: Tensor, p: Tensor, sample_weight: Tensor, penalty: Tensor, right: Tensor) -> Tensor:
    """Apply the inverse of the Hessian at the probabilities p to `right`, `(*batch, d, k)`, up to class means."""
    shape, (n, d), k = right.shape, features.shape[-2:], p.shape[-1]
    features, p, sample_weight = features.reshape(-1, n, d), p.reshape(-1, n, k), sample_weight.reshape(-1, n)
    penalty, right = penalty.reshape(-1), right.reshape(-1, d, k)
    right = _centered(right)
    if d * k <= _MAX_UNKNOWNS:
        return _factorize(features, p, sample_weight, penalty)(right).reshape(shape)
    basis = _rotation(features)
    inside = basis.mT @ right
    precise = torch.full_like(penalty, _PRECISE)
    found = basis @ _conjugate_gradients(features @ basis, p, sample_weight, penalty, inside, precise, _MAX_PRECISE)
    if n < d:  # outside of the space of the features, the Hessian is the penalty
        found = found + (right - basis @ inside) / per_task(penalty, right)
    return found.reshape(shape)


@_solve_hessian.register_fake
def _(features: Tensor, p: Tensor, sample_weight: Tensor, penalty: Tensor, right: Tensor) -> Tensor:
    return torch.empty_like(right)


class ImplicitWeights(torch.autograd.Function):
    """The solution `weight` of `penalty weight = features' (targets - softmax(features @ weight))`.

    It is a function of the features, the targets, the weights of the examples and the penalty, which all have the
    leading dimensions of the tasks.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(features: Tensor, targets: Tensor, sample_weight: Tensor, penalty: Tensor, weight: Tensor) -> Tensor:
        return weight.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:4], output)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        features, targets, sample_weight, penalty, weight = ctx.saved_tensors
        p = (features @ weight).softmax(-1)
        v = _ImplicitSystemSolve.apply(features, p, sample_weight, penalty, gradient)
        scores = features @ v
        error = balance(targets, p)
        per_example = sample_weight.unsqueeze(-1)
        to_features = -(per_example * error) @ v.mT - _curve(p, sample_weight, scores) @ weight.mT
        to_weights, to_penalty = -(error * scores).sum(-1), -(v * weight).sum((-2, -1))
        return to_features, per_example * scores, to_weights, to_penalty, None


class _ImplicitSystemSolve(torch.autograd.Function):
    """The Hessian's inverse applied to `right`, up to class means; differentiable any number of times."""

    generate_vmap_rule = True

    @staticmethod
    def forward(features: Tensor, p: Tensor, sample_weight: Tensor, penalty: Tensor, right: Tensor) -> Tensor:
        def call(*tensors: Tensor) -> tuple[Tensor]:
            return (_solve_hessian(*tensors),)

        return compute_without_grad(call, features, p, sample_weight, penalty, right)[0]

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:4], output)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        features, p, sample_weight, penalty, v = ctx.saved_tensors
        q = _ImplicitSystemSolve.apply(features, p, sample_weight, penalty, gradient)
        a, b = features @ v, features @ q
        mean_a, mean_b = (p * a).sum(-1, keepdim=True), (p * b).sum(-1, keepdim=True)
        to_features = -_curve(p, sample_weight, a) @ q.mT - _curve(p, sample_weight, b) @ v.mT
        to_p = -sample_weight.unsqueeze(-1) * (a * b - a * mean_b - b * mean_a)
        to_weights = -((p * a * b).sum(-1) - (mean_a * mean_b).squeeze(-1))
        return to_features, to_p, to_weights, -(q * v).sum((-2, -1)), q
