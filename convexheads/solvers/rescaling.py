"""Rescaling, which gives an equivalent problem in which coefficients and multipliers are around one."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from convexheads.solvers.problem import DualProblem, per_task


def rescale(problem: DualProblem) -> tuple[DualProblem, Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Rescale a `problem` with finite data, so that no tolerance depends on the scale of the features or on C.

    A dual SVM depends only on C*K. Coefficients are measured in units of `min(C, 1/h)`, where h is the mean diagonal
    of the Hessian, which is K plus the smoothing. If C is at least 1/h, the mean diagonal of the rescaled Hessian is
    one, and the largest rescaled bound is C*h. For a smaller C, the bound is one, and the mean diagonal is C*h.

    Returns:
        The rescaled problem, and the factors by which its coefficients and its multipliers have to be multiplied.
    """
    with torch.no_grad():
        multiplier_scale = problem.linear.abs().amax((-2, -1))
        multiplier_scale = torch.where(multiplier_scale > 0, multiplier_scale, 1)
        curvature = problem.curvature()
        coef_scale = torch.where(curvature > 0, multiplier_scale / curvature, torch.inf)
        largest = largest_bounds(problem).amax(-1)
        coef_scale = coef_scale.minimum(torch.where(largest > 0, largest, torch.inf))
        coef_scale = torch.where(torch.isfinite(coef_scale), coef_scale, 1)
        hessian_scale = coef_scale / multiplier_scale
        factor = {
            "gram": hessian_scale,
            "gram_factor": hessian_scale.sqrt(),
            "smoothing": hessian_scale,
            "linear": 1 / multiplier_scale,
            "lower": 1 / coef_scale,
            "upper": 1 / coef_scale,
            "start.coef": 1 / coef_scale,
            "start.bound_multipliers": 1 / multiplier_scale,
            "start.row_multipliers": 1 / multiplier_scale,
        }
    rescaled = problem.map(lambda name, value: value * factor[name][(...,) + (None,) * (value.ndim - coef_scale.ndim)])
    return rescaled, coef_scale, multiplier_scale


def largest_bounds(problem: DualProblem) -> Float[Tensor, "*batch n"]:
    """The largest finite bound of each row."""
    bounds = [bound.abs().nan_to_num(posinf=0) for bound in (problem.upper, problem.lower) if bound is not None]
    return torch.stack([bound.amax(-1) for bound in bounds]).amax(0)


def replace_non_finite_tasks(problem: DualProblem) -> tuple[DualProblem, Bool[Tensor, " tasks"]]:
    """Replace every task that has non-finite data by a trivial problem, and also return a mask of those tasks."""
    tensors = {name: value for name, value in problem.tensors().items() if not name.startswith("start.")}
    # Fast path: finite sums imply finite entries.
    if torch.isfinite(torch.stack([value.sum() for value in tensors.values()]).sum()):
        return problem, torch.zeros_like(problem.linear[:, 0, 0], dtype=torch.bool)
    bounds = ("lower", "upper")  # which may be infinite
    bad = [torch.isnan(value) if name in bounds else ~torch.isfinite(value) for name, value in tensors.items()]
    non_finite = torch.stack([entries.flatten(1).any(1) for entries in bad]).any(0)
    eye = torch.eye(problem.gram.shape[-1]).to(problem.gram)
    placeholder = {"gram": eye, "gram_factor": 0.0, "linear": 0.0, "lower": -1.0, "upper": 1.0, "smoothing": 1.0}
    finite = problem.map(lambda name, value: torch.where(per_task(non_finite, value), placeholder.get(name, 0), value))
    return finite, non_finite
