"""Regularized losses, minimized in the weights: Newton's method, its certificate, and derivatives of any order.

With a linear kernel and the weights `W`, d x k, a head minimizes `penalty/2 |W|^2 + sum_n s_n loss_n(x_n W + o_n)`,
with the weight s and the offset o of each example. Few unknowns are solved for by a Cholesky factorization of the
Hessian, and many by conjugate gradients. No digits are lost if the penalty is small.

With an intercept, the last feature is a constant one, and its weights are not in `|W|^2`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from convexheads._functorch import compute_without_grad
from convexheads.heads._logistic_newton import MAX_BACKTRACKS, PATIENCE, SoftmaxKKT
from convexheads.heads._losses import LOSSES, CrossEntropy, Loss
from convexheads.solvers.best_iterate import BestIterate
from convexheads.solvers.kkt import cholesky
from convexheads.solvers.problem import per_task

# Up to this number of weights, d k, the Hessian is factorized.
_MAX_UNKNOWNS = 256
# Conjugate gradients in a step of Newton's method, and for a gradient, which has to be precise.
_MAX_INNER, _MAX_PRECISE, _PRECISE = 300, 2000, 1e-14
# Where conjugate gradients stall above this gap, n x n matrices are factorized if all of them have so few entries.
_STALLED, _MAX_ENTRIES = 1e-8, 2**26
# Conjugate gradients continue with the unfinished tasks alone once they are at most this fraction.
_FRACTION_TO_CONTINUE = 0.6
_DATA = "Tensor features, Tensor targets, Tensor sample_weight, Tensor offset, Tensor penalty"
_OPTIONS = "str loss, bool intercept"
_SOLVE = f"({_DATA}, *, {_OPTIONS}, float tolerance, int max_steps) -> (Tensor, Tensor, Tensor)"
_APPLY = (
    f"(Tensor features, Tensor curvature, Tensor sample_weight, Tensor penalty, Tensor right, *, {_OPTIONS}) -> Tensor"
)


@dataclass(frozen=True, eq=False, repr=False)
class _Problem:
    """The data of tasks `(tasks, ...)`. Data that all tasks share have a first dimension of one."""

    features: Float[Tensor, "#tasks n d"]
    targets: Float[Tensor, "#tasks n k"]
    sample_weight: Float[Tensor, "#tasks n"]
    offset: Float[Tensor, "#tasks n k"]
    penalty: Float[Tensor, " tasks"]
    loss: Loss
    intercept: bool

    def scores(self, weight: Tensor) -> Float[Tensor, "tasks n k"]:
        return multiply(self.features, weight) + self.offset

    def moments(self, values: Tensor) -> Float[Tensor, "tasks d k"]:
        """The sums over the examples of their features times `values`, `(tasks, n, k)`, weighted by `sample_weight`."""
        return multiply(self.features.mT, self.sample_weight.unsqueeze(-1) * values)

    def penalties(self) -> Float[Tensor, "tasks d 1"]:
        """The penalty of each row of the weights: zero for the intercept."""
        return penalty_per_row(self.penalty, self.features.shape[-1], self.intercept)

    def select(self, tasks: Tensor) -> _Problem:
        """The problem of some tasks, chosen by a boolean mask or by their indices."""
        count = len(self.penalty)
        chosen = {
            name: value if len(value) == 1 < count else value[tasks]
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **chosen)


@dataclass(frozen=True, eq=False, repr=False)
class _Point:
    """Weights `(tasks, d, k)`, and the objective, the curvature of the loss, the gradient and the gap there."""

    weight: Tensor
    value: Tensor
    curvature: Tensor
    gradient: Tensor
    gap: Tensor


def multiply(left: Float[Tensor, "#tasks m n"], right: Float[Tensor, "tasks n k"]) -> Float[Tensor, "tasks m k"]:
    """The matrix product of each task; where all tasks share `left`, as one product."""
    tasks, n, k = right.shape
    if len(left) == 1 < tasks:
        stacked = right.transpose(0, 1).reshape(n, tasks * k)
        return (left[0] @ stacked).view(-1, tasks, k).transpose(0, 1)
    return left @ right


def penalty_per_row(penalty: Float[Tensor, "*batch"], d: int, intercept: bool) -> Float[Tensor, "*batch d 1"]:
    """The penalty of each row of weights `(*batch, d, k)`: zero for the last one if it is an intercept."""
    rows = penalty[..., None, None].expand(*penalty.shape, d, 1)
    if not intercept:
        return rows
    return torch.cat([rows[..., :-1, :], torch.zeros_like(rows[..., :1, :])], -2)


def _centered(weight: Tensor, loss: Loss) -> Tensor:
    """Weights `(*batch, d, k)` without their mean over the classes, on which coupled losses do not depend."""
    return weight - weight.mean(-1, keepdim=True) if loss.is_coupled else weight


def _evaluate(problem: _Problem, weight: Tensor) -> _Point:
    """The point at these weights, with its certificate.

    The slopes of the losses are dual coefficients. With them, the losses and their conjugates add up without a gap, and
    what remains is `|gradient|^2 / (2 penalty)`. With an intercept, the slopes have to be balanced first.
    """
    loss, targets, penalty = problem.loss, problem.targets, problem.penalty
    scores, penalized = problem.scores(weight), problem.penalties() * weight
    value = (penalized * weight).sum((-2, -1)) / 2 + (problem.sample_weight * loss.value(targets, scores)).sum(-1)
    gradient = penalized + problem.moments(loss.slope(targets, scores))
    if problem.intercept:
        change, lost = loss.balance(targets, scores, problem.sample_weight)
        balanced = gradient + problem.moments(change)
        gap = lost + balanced[:, :-1].square().sum((-2, -1)) / (2 * penalty)
    else:
        gap = gradient.square().sum((-2, -1)) / (2 * penalty)
    gap = gap / value.clamp_min(torch.finfo(gap.dtype).tiny)
    return _Point(weight, value, loss.curvature(targets, scores), gradient, gap)


def _factorize(problem: _Problem, curvature: Tensor) -> Callable[[Tensor], Tensor]:
    """The inverse of the Hessian, on directions whose mean over the classes is zero if the loss is coupled."""
    features, (d, k) = problem.features, (problem.features.shape[-1], curvature.shape[-1])
    used = problem.sample_weight.unsqueeze(-1)
    weighted = curvature * used
    blocks = features.mT.unsqueeze(-3) @ (weighted.mT.unsqueeze(-1) * features.unsqueeze(-3))  # (tasks, k, d, d)
    eye = torch.eye(d, dtype=curvature.dtype, device=curvature.device)
    penalties = problem.penalties().unsqueeze(-3) * eye
    if not problem.loss.is_coupled:
        factor = cholesky(blocks + penalties)
        return lambda right: torch.cholesky_solve(right.mT.unsqueeze(-1), factor).squeeze(-1).mT
    rows = (curvature.unsqueeze(-1) * features.unsqueeze(-2)).flatten(-2)  # (tasks, n, k d)
    hessian = -rows.mT @ (rows * used)
    blocks = blocks + penalties
    hessian = hessian + torch.diag_embed(blocks.permute(0, 2, 3, 1)).permute(0, 3, 1, 4, 2).reshape(hessian.shape)
    # Without this term, which is zero on such directions, rounding would matter if the penalty is tiny.
    size = torch.diagonal(hessian, dim1=-2, dim2=-1).mean(-1)
    mean = torch.full((k, k), 1 / k, dtype=eye.dtype, device=eye.device)
    factor = cholesky(hessian + per_task(size, hessian) * torch.kron(mean, eye))

    def solve(right: Tensor) -> Tensor:
        stacked = right.mT.reshape(-1, k * d, 1)
        return torch.cholesky_solve(stacked, factor).reshape(-1, k, d).mT

    return solve


def _conjugate_gradients(problem: _Problem, curvature: Tensor, right: Tensor, tolerance: Tensor, limit: int) -> Tensor:
    """The inverse of the Hessian applied to `right`, whose mean over the classes is zero if the loss is coupled.

    Each residual falls by the factor `tolerance`, `(tasks,)`, if `limit` iterations suffice.
    """
    loss = problem.loss

    def prepare(problem: _Problem, curvature: Tensor) -> tuple[Tensor, Tensor]:
        penalties = problem.penalties()
        diagonal = curvature - curvature.square() if loss.is_coupled else curvature
        diagonal = multiply(problem.features.square().mT, problem.sample_weight.unsqueeze(-1) * diagonal)
        # Where an example is fitted perfectly, a loss has no curvature.
        return penalties, (penalties + diagonal).clamp_min(torch.finfo(diagonal.dtype).tiny)

    # Without coupling, each class is a system of its own.
    dims = (-2, -1) if loss.is_coupled else (-2,)

    def inner(left: Tensor, right: Tensor) -> Tensor:
        return (left * right).sum(dims, keepdim=True)

    penalties, diagonal = prepare(problem, curvature)
    solution, remainder = torch.zeros_like(right), right
    found, places = torch.zeros_like(right), torch.arange(len(right), device=right.device)
    direction = preconditioned = _centered(remainder / diagonal, loss)
    size = inner(remainder, preconditioned)
    aim = per_task(tolerance.square(), size) * size
    for _ in range(limit):
        active = (size > aim).flatten(1).any(-1)
        count = int(active.sum())
        if not count:
            break
        if count <= _FRACTION_TO_CONTINUE * len(active):
            found[places[~active]] = solution[~active]
            problem, places = problem.select(active), places[active]
            parts = curvature, solution, remainder, direction, size, aim
            curvature, solution, remainder, direction, size, aim = (part[active] for part in parts)
            penalties, diagonal = penalties[active], diagonal[active]
        moved = size > aim
        image = problem.moments(loss.apply_hessian(curvature, multiply(problem.features, direction)))
        image = image + penalties * direction
        step = torch.where(moved, size / inner(direction, image), 0)
        solution, remainder = solution + step * direction, remainder - step * image
        preconditioned = _centered(remainder / diagonal, loss)
        previous, size = size, torch.where(moved, inner(remainder, preconditioned), 0)
        direction = preconditioned + torch.where(moved, size / previous, 0) * direction
    found[places] = solution
    return found


def _basis(features: Tensor, intercept: bool) -> tuple[Tensor, Tensor | None]:
    """A basis `(tasks, d, r)` in which the second moments of the features are diagonal, and the means with intercept.

    Without an intercept, the basis is orthonormal. With one, features are centered first: the last column of the basis
    is the intercept, and the last entries of the others make up for the means, `(tasks, d - 1, 1)`.
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
    zero, one = torch.zeros_like(mean), torch.ones_like(mean[:, :1])
    return torch.cat([torch.cat([basis, zero], -1), torch.cat([-mean.mT @ basis, one], -1)], -2), mean


def _factorize_in_dual(problem: _Problem, curvature: Tensor) -> Callable[[Tensor], Tensor]:
    """The inverse of the Hessian, from k + 1 factorizations of n x n matrices (the matrix inversion lemma)."""
    features, penalty = problem.features, problem.penalty
    if problem.intercept:
        features = features[..., :-1]
    used = problem.sample_weight.unsqueeze(-1)
    gram = features @ features.mT / per_task(penalty, features)
    inner = SoftmaxKKT.factorize(gram, used * curvature, intercept=problem.intercept)

    def solve(right: Tensor) -> Tensor:
        outer, sums = (right[:, :-1], right[:, -1]) if problem.intercept else (right, None)
        outer = outer / per_task(penalty, outer)
        coef, bias = inner.solve(features @ outer, sums)
        change = outer - features.mT @ coef / per_task(penalty, outer)
        return change if bias is None else torch.cat([change, -bias.unsqueeze(-2)], -2)

    return solve


def _minimize(
    problem: _Problem,
    weight: Tensor,
    find_change: Callable[[_Problem, _Point], Tensor],
    tolerance: float,
    max_steps: int,
) -> BestIterate:
    """Take damped Newton steps, which `find_change` computes from a point."""
    point = _evaluate(problem, weight)
    best = BestIterate(point.weight, patience=PATIENCE)
    best.update(0, point.gap, point.gap <= tolerance, point.weight)
    for step in range(1, max_steps + 1):
        if best.done.all():
            break
        change = find_change(problem, point)
        length, next_point = torch.ones_like(point.value), point
        for _ in range(MAX_BACKTRACKS):
            next_point = _evaluate(problem, point.weight + per_task(length, change) * change)
            worse = next_point.value > point.value + 1e-12 * point.value.abs()
            if not worse.any():
                break
            length = torch.where(worse, length / 2, length)
        point = next_point
        best.update(step, point.gap, point.gap <= tolerance, point.weight)
    return best


def _newton(problem: _Problem, point: _Point) -> Tensor:
    return -_factorize(problem, point.curvature)(point.gradient)


def _inexact_newton(problem: _Problem, point: _Point) -> Tensor:
    forcing, right = point.gap.clamp(0, 1).pow(0.25).clamp(1e-4, 0.3), -_centered(point.gradient, problem.loss)
    return _conjugate_gradients(problem, point.curvature, right, forcing, _MAX_INNER)


def _newton_in_dual(problem: _Problem, point: _Point) -> Tensor:
    return -_factorize_in_dual(problem, point.curvature)(_centered(point.gradient, problem.loss))


def minimize(problem: _Problem, tolerance: float, max_steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """The optimal weights of tasks, `(tasks, d, k)`, their certified relative duality gaps, and the number of steps."""
    tasks, (n, d), k = len(problem.penalty), problem.features.shape[-2:], problem.targets.shape[-1]
    if d * (k if problem.loss.is_coupled else 1) <= _MAX_UNKNOWNS:
        best = _minimize(problem, problem.features.new_zeros((tasks, d, k)), _newton, tolerance, max_steps)
        return best.tensors[0], best.gap, best.iterations
    basis, _ = _basis(problem.features, problem.intercept)
    rotated = replace(problem, features=problem.features @ basis)
    start = basis.new_zeros((tasks, basis.shape[-1], k))
    best = _minimize(rotated, start, _inexact_newton, tolerance, max_steps)
    weight = multiply(basis, best.tensors[0])
    # The rotation rounds the features, which matters where weights are huge.
    gap = _evaluate(problem, weight).gap
    stalled = gap > _STALLED
    if isinstance(problem.loss, CrossEntropy) and k * n * n <= _MAX_ENTRIES and stalled.any():
        again = _minimize(problem.select(stalled), weight[stalled], _newton_in_dual, tolerance, max_steps)
        weight[stalled], gap[stalled] = again.tensors[0], again.gap
    return weight, gap, best.iterations


@torch.library.custom_op("convexheads::solve_primal", mutates_args=(), schema=_SOLVE)
def solve(
    features: Tensor,
    targets: Tensor,
    sample_weight: Tensor,
    offset: Tensor,
    penalty: Tensor,
    *,
    loss: str,
    intercept: bool,
    tolerance: float,
    max_steps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Solve tasks `(*batch, n, d)` by damped Newton steps until each gap is below `tolerance` or stops falling.

    It is an operator, because compilers cannot trace a loop whose length depends on values.

    Returns the weights, `(*batch, d, k)`, their certified relative duality gap, and the number of steps.
    """
    batch, (n, d), k = features.shape[:-2], features.shape[-2:], targets.shape[-1]
    problem = _Problem(
        features.reshape(-1, n, d),
        targets.reshape(-1, n, k),
        sample_weight.reshape(-1, n),
        offset.reshape(-1, n, k),
        penalty.reshape(-1),
        LOSSES[loss],
        intercept,
    )
    weight, gap, steps = minimize(problem, tolerance, max_steps)
    return weight.reshape(*batch, d, k), gap.reshape(batch), steps.reshape(batch)


@solve.register_fake
def _(features: Tensor, targets: Tensor, *_: Tensor, **options: object) -> tuple[Tensor, Tensor, Tensor]:
    weight = features.new_empty((*features.shape[:-2], features.shape[-1], targets.shape[-1]))
    tasks = features.new_empty(features.shape[:-2])
    return weight, tasks, torch.empty_like(tasks, dtype=torch.long)


@torch.library.custom_op("convexheads::solve_primal_hessian", mutates_args=(), schema=_APPLY)
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
    shape, (n, d), k = right.shape, features.shape[-2:], curvature.shape[-1]
    curvature, right = curvature.reshape(-1, n, k), right.reshape(-1, d, k)
    nothing = torch.zeros_like(curvature)
    problem = _Problem(
        features.reshape(-1, n, d),
        nothing,
        sample_weight.reshape(-1, n),
        nothing,
        penalty.reshape(-1),
        LOSSES[loss],
        intercept,
    )
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
            outside = right[:, :-1] - mean * right[:, -1:]
            outside = outside - basis[:, :-1, :-1] @ (basis[:, :-1, :-1].mT @ outside)
            outside = torch.cat([outside, -mean.mT @ outside], -2)
        found = found + outside / per_task(problem.penalty, outside)
    return found.reshape(shape)


@_solve_hessian.register_fake
def _(
    features: Tensor, curvature: Tensor, sample_weight: Tensor, penalty: Tensor, right: Tensor, **_: object
) -> Tensor:
    return torch.empty_like(right)


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
        curvature, slope = loss.curvature(targets, scores), loss.slope(targets, scores)
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
