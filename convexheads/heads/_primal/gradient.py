"""Derivatives of any order of optimal weights, by the implicit function theorem."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from convexheads._compiler import operator
from convexheads._functorch import compute_without_grad
from convexheads.heads._losses import LOSSES
from convexheads.heads._primal import strategy
from convexheads.heads._primal.basis import Basis
from convexheads.heads._primal.problem import Problem, centered, group_members
from convexheads.heads._primal.steps import conjugate_gradients, factorize

# Conjugate gradients have to be precise.
_MAX_ITERATIONS, _PRECISE = 2000, 1e-14
_SCHEMA = "(Tensor features, Tensor curvature, Tensor sample_weight, Tensor penalty, Tensor right, *, "
_SCHEMA += "str loss, bool intercept) -> Tensor"


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


@operator("solve_primal_hessian", _SCHEMA, lambda *arguments, **_: torch.empty_like(arguments[4]))
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
    parts = (group_members(part, dims, dims) for part in (features, curvature, sample_weight, penalty, right))
    features, curvature, sample_weight, penalty, right = parts
    nothing = torch.zeros_like(curvature)
    problem = Problem(features, nothing, sample_weight, nothing, penalty, LOSSES[loss], intercept)
    right = centered(right, problem.loss)
    if d * (k if problem.loss.is_coupled else 1) <= strategy.MAX_UNKNOWNS:
        return factorize(problem, curvature)(right).reshape(shape)
    basis, precise = Basis.of(problem), torch.full_like(problem.penalty, _PRECISE)
    rotated = replace(problem, features=basis.change(problem.features))

    def apply_inverse(inside: Tensor) -> Tensor:
        return conjugate_gradients(rotated, curvature, inside, precise, _MAX_ITERATIONS)

    return basis.solve(apply_inverse, right, problem.penalty).reshape(shape)
