"""Regularized losses, minimized in the weights: Newton's method, its certificate, and derivatives of any order.

With a linear kernel and the weights `W`, d x k, a head minimizes `penalty/2 |W|^2 + sum_n s_n loss_n(x_n W + o_n)`,
with the weight s and the offset o of each example. Few unknowns are solved for by a Cholesky factorization of the
Hessian, and many by conjugate gradients. No digits are lost if the penalty is small.

With an intercept, the last feature is a constant one, and its weights are not in `|W|^2`.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from convexheads._functorch import compute_without_grad
from convexheads.heads._losses import LOSSES
from convexheads.heads._primal.gradient import ImplicitWeights
from convexheads.heads._primal.strategy import solve
from convexheads.heads._sharing import apply_once, multiply, scale_once
from convexheads.heads.base.support_set import SupportSet
from convexheads.hyperparameters import Hyperparameter, PerTask

# With more examples or dual coefficients, the primal is solved even if there are more features than examples.
_MAX_EXAMPLES, _MAX_COEFFICIENTS = 100, 1000
# Newton's method continues until rounding stops it, because the implicit gradient is that of the exact optimum. The
# scores of a grid are not differentiated.
_AIM, _AIM_OF_GRID, _MAX_STEPS = 1e-20, 1e-12, 100


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
