"""The implicit gradient of the dual problem.

At the optimum some coefficients are at a bound, and the free ones solve a linear system,

    K a + smoothing * a + row_multipliers = linear   at the free entries,     a 1 = 0,

so the solution is differentiated by differentiating that system with the active set fixed (the implicit function
theorem on the KKT conditions, Eq. 8 of Lee et al. 2019). The system is symmetric, so its adjoint has the same factors,
and the backward pass is one more solve. That solve is again differentiable, so derivatives of any order are correct.

If a bound is weakly active (a coefficient at the bound with a multiplier of zero), the solution has no derivative, only
directional derivatives. The active set decides which of them is returned.

A relaxed gradient is the gradient at a point inside the barrier of an interior-point method. Such a point satisfies the
KKT conditions, except that every slack times its multiplier is positive. The stiffness of the barrier, multiplier over
slack, replaces the active bounds. OptNet (Amos & Kolter 2017) uses the iterate at which it stops, and qpax (Tracy &
Manchester 2024) the point at which every slack times its multiplier has a given value.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from convexheads._functorch import is_transforming, move_vmap_dim_to_front, once_differentiable
from convexheads.solvers.certificate import Certificate
from convexheads.solvers.kkt import KKT, BlockKKT
from convexheads.solvers.problem import DualProblem, TensorRecord

REGULARIZATION = 1e-9
"""The regularization of active-set systems, relative to the mean diagonal of the Gram matrix."""
_REFINEMENTS = 3


@dataclass(frozen=True, eq=False, repr=False)
class Linearization(TensorRecord, ABC):
    """The factorized system of the rescaled problem, from which the gradient of the coefficients is computed."""

    kkt: KKT

    @abstractmethod
    def attach(
        self, problem: DualProblem, coef: Float[Tensor, "tasks n k"], hessian_scale: Float[Tensor, " tasks"]
    ) -> Float[Tensor, "tasks n k"]:
        """Make coefficients that were found without autograd differentiable functions of the tensors of `problem`.

        The problem is a flat batch in original units. `hessian_scale` is the rescaled Hessian divided by the original.
        """

    def _apply(self, function: type[_ImplicitSolve], *system: Tensor | None) -> Tensor:
        """Apply an autograd function to the `system`. The factors of the KKT system have to be arguments of it too."""
        factors = self.kkt.tensors()

        def rebuild(*tensors: Tensor) -> KKT:
            values: dict[str, Any] = vars(self.kkt) | dict(zip(factors, tensors, strict=True))
            return type(self.kkt)(**values)

        return function.apply(rebuild, *system, *factors.values())[0]

    def unscaled(self, coef_scale: Float[Tensor, " tasks"]) -> Linearization:
        """The linearization with coefficients in the original units."""
        return self


@dataclass(frozen=True, eq=False, repr=False)
class ActiveSet(Linearization):
    """The exact gradient. Entries at their bounds stay there, and the free entries solve a linear system."""

    at_upper: Bool[Tensor, "tasks n k"]
    at_lower: Bool[Tensor, "tasks n k"]

    def attach(self, problem: DualProblem, coef: Tensor, hessian_scale: Tensor) -> Tensor:
        fixed = problem.active_bounds(self.at_upper, self.at_lower)
        system = problem.gram, problem.smoothing, problem.linear, fixed, None, coef, hessian_scale
        return self._apply(_ImplicitSolve, *system)


@dataclass(frozen=True, eq=False, repr=False)
class BarrierPoint(Linearization):
    """A relaxed gradient, at a point inside the barrier. It has no second derivative.

    `stiffness` is the multiplier divided by the slack, for each of `DualProblem.inequalities`. It is on the diagonal of
    the system.
    """

    point: Float[Tensor, "tasks n k"]
    stiffness: Float[Tensor, "tasks sides n k"]

    def attach(self, problem: DualProblem, coef: Tensor, hessian_scale: Tensor) -> Tensor:
        # The gradient of the barrier changes by the stiffness times the change of `coefficient - bound`.
        linear = problem.linear
        for (sign, limit), stiffness in zip(problem.inequalities, self.stiffness.unbind(1), strict=True):
            linear = linear + stiffness / hessian_scale[:, None, None] * torch.where(stiffness > 0, sign * limit, 0)
        system = problem.gram, problem.smoothing, linear, self.point, None, coef, hessian_scale
        return self._apply(_RelaxedImplicitSolve, *system)

    def unscaled(self, coef_scale: Float[Tensor, " tasks"]) -> BarrierPoint:
        return replace(self, point=coef_scale[:, None, None] * self.point)


def implied_active_set(problem: DualProblem, certificate: Certificate) -> ActiveSet:
    """The active set that certified coefficients of a rescaled problem imply."""
    at_upper, at_lower = active_entries(problem, certificate.feasible, certificate.bound_multipliers)
    return ActiveSet(factorize_free(problem, at_upper, at_lower), at_upper, at_lower)


def active_entries(problem: DualProblem, coef: Tensor, bound_multipliers: Tensor) -> tuple[Tensor, Tensor]:
    """The entries whose multiplier exceeds their distance to the upper bound, and those for the lower bound.

    An entry whose bounds are equal is in the first mask.
    """
    lower, upper, nowhere = problem.lower, problem.upper, torch.zeros_like(coef, dtype=torch.bool)
    at_upper = nowhere if upper is None else upper - coef < bound_multipliers
    at_lower = nowhere if lower is None else coef - lower < -bound_multipliers
    if lower is not None and upper is not None:
        is_fixed = lower == upper
        at_upper, at_lower = at_upper | is_fixed, at_lower & ~is_fixed
    return at_upper, at_lower


def factorize_free(problem: DualProblem, at_upper: Tensor, at_lower: Tensor) -> BlockKKT:
    """The factorized system of the free entries of a rescaled problem."""
    diagonal = None if problem.smoothing is None else problem.smoothing.mT
    free = ~(at_upper | at_lower).mT
    return BlockKKT.factorize(problem, diagonal=diagonal, free=free, regularization=REGULARIZATION)


class _ImplicitSolve(torch.autograd.Function):
    """The solution `(x, row_multipliers)` of a KKT system, as a function of its data.

    The system is

        gram x + smoothing * x + row_multipliers = linear  at the free entries,   x = fixed  at the others,
        sum_c x_c = sums

    If x is known already, it is passed as `known`, and zeros are returned as row multipliers. None for another argument
    means zero. If a system cannot be factorized, its gradient is NaN, or zero if the incoming gradient is zero.
    """

    @staticmethod
    def forward(
        kkt: Callable[..., KKT],
        gram: Float[Tensor, "tasks n n"],
        smoothing: Float[Tensor, "tasks n k"] | None,
        linear: Float[Tensor, "tasks n k"],
        fixed: Float[Tensor, "tasks n k"] | None,
        sums: Float[Tensor, "tasks n"] | None,
        known: Float[Tensor, "tasks n k"] | None,
        scale: Float[Tensor, " tasks"],
        *factors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        sums = torch.zeros_like(linear[..., 0]) if sums is None else sums
        if known is not None:
            return known.clone(), torch.zeros_like(sums)
        scale = scale.unsqueeze(-1)
        x, row_multipliers = kkt(*factors).solve(scale.unsqueeze(-1) * linear.mT, sums, refinements=_REFINEMENTS)
        return x.mT.contiguous(), row_multipliers / scale

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.kkt, gram, smoothing, _, _, _, _, scale, *factors = inputs
        ctx.save_for_backward(gram, smoothing, output[0], scale, *factors)

    @staticmethod
    def backward(ctx, grad_x: Tensor, grad_multipliers: Tensor):
        gram, smoothing, x, scale, *factors = ctx.saved_tensors
        solve = _ImplicitSolve.apply if torch.is_grad_enabled() or is_transforming() else _ImplicitSolve.forward
        u, row_multipliers = solve(ctx.kkt, gram, smoothing, grad_x, None, grad_multipliers, None, scale, *factors)
        ignored = _non_finite_without_gradient(u, x, grad_x, grad_multipliers)
        u, x = u.masked_fill(ignored, 0), x.masked_fill(ignored, 0)
        row_multipliers = row_multipliers.masked_fill(ignored.squeeze(-1), 0)
        outer = u @ x.mT
        grad_smoothing = None if smoothing is None else -u * x
        grad_fixed = None
        if ctx.needs_input_grad[4]:  # a change of a bound acts through its multiplier; at free entries it has no effect
            grad_fixed = (grad_x - gram @ u - row_multipliers.unsqueeze(-1)).masked_fill(ignored, 0)
        grad_sums = row_multipliers if ctx.needs_input_grad[5] else None
        return None, -(outer + outer.mT) / 2, grad_smoothing, u, grad_fixed, grad_sums, *(None,) * (2 + len(factors))

    @classmethod
    def vmap(cls, info, in_dims, kkt, *tensors):
        """The mapped dimension becomes more tasks."""
        size, pairs = info.batch_size, list(zip(in_dims[1:], tensors, strict=True))
        if all(dim is None for dim in in_dims[8:]):  # one factorized system, several right-hand sides
            each = [cls.apply(kkt, *(t if dim is None else t.select(dim, i) for dim, t in pairs)) for i in range(size)]
            return tuple(torch.stack(values) for values in zip(*each, strict=True)), (0, 0)
        mapped = [move_vmap_dim_to_front(size, *pair) for pair in pairs]
        tasks = mapped[0].shape[1]
        flat = (None if tensor is None else tensor.reshape(-1, *tensor.shape[2:]) for tensor in mapped)
        return tuple(value.reshape(size, tasks, *value.shape[1:]) for value in cls.apply(kkt, *flat)), (0, 0)


class _RelaxedImplicitSolve(_ImplicitSolve):
    """Returns `known`, with the gradient at a point inside a barrier.

    The point is passed as `fixed`, and the stiffness of the barrier is part of `factors`. The stiffness depends on the
    solution, so there is only a first derivative.
    """

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _ImplicitSolve.setup_context(ctx, inputs, (inputs[4],))

    @staticmethod
    def backward(ctx, grad_x: Tensor, grad_multipliers: Tensor):
        found = _ImplicitSolve.backward(ctx, grad_x.detach(), grad_multipliers.detach())
        by = "an InteriorPointSolver whose gradient is not exact"
        return (*(None if value is None else once_differentiable(value.detach(), grad_x, by) for value in found),)


def _non_finite_without_gradient(u: Tensor, x: Tensor, grad_x: Tensor, grad_multipliers: Tensor) -> Tensor:
    """The non-finite tasks whose incoming gradient is zero, `(tasks, 1, 1)`.

    A failed task that is not part of the loss would otherwise add NaN (zero times NaN) to the gradients of shared
    parameters. Finite tasks stay as they are, even if their gradient is zero, so that second derivatives are correct.
    """
    total = (u + x).sum((-2, -1))
    has_gradient = grad_x.flatten(-2).any(-1) | grad_multipliers.any(-1)
    return ((total - total != 0) & ~has_gradient)[:, None, None]  # infinity or NaN minus itself is NaN


# torch inspects this signature in every call, which takes longer than solving a small task. `inspect.signature` returns
# this attribute if it exists; otherwise it would derive the same signature each time.
_forward: Any = _ImplicitSolve.forward
_forward.__signature__ = inspect.signature(_forward)
