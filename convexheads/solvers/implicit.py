"""The one place where a native solution gets its gradient.

At the optimum some coefficients sit at a bound and the others solve a linear system,

    K a + smoothing * a + shift = linear   at the free entries,     a 1 = 0,

so the solution is differentiated by differentiating that system with the active set held fixed (the implicit function
theorem on the KKT conditions, Eq. 8 of the paper). The system is symmetric: its adjoint has the same factors, and the
backward pass is one more solve. That solve is again differentiable, so derivatives of any order are right.

Where a bound is weakly active (coefficient at the bound and multiplier zero) the solution has no derivative, only
directional ones; the active set found decides which of them is returned.

The gradients that are not exact, but can be asked for, belong to an interior point's barrier in the place of the
bounds: the KKT conditions with every complementary pair at a positive product, where no coefficient sits at a bound and
each is held by the barrier's stiffness, multiplier over slack (OptNet, Amos & Kolter 2017, at the iterate where it
stops; qpax, Tracy & Manchester 2024, at a product of one's choice).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from convexheads._functorch import is_transforming, move_vmap_dim_to_front, once_differentiable
from convexheads.solvers.active_set import ActiveSet
from convexheads.solvers.interior_point import Relaxed
from convexheads.solvers.kkt import KKT
from convexheads.solvers.problem import QP

_REFINEMENTS = 3


def attach(qp: QP, found: ActiveSet | Relaxed, scale: Float[Tensor, " tasks"]) -> Float[Tensor, "tasks n k"]:
    """Coefficients, which were found without autograd, as functions of every tensor of `qp`.

    Args:
        qp: a flat batch of problems.
        found: the coefficients, and where their gradient comes from.
        scale: how many times the Hessian of `qp` that of `found.kkt` is.
    """
    factors = found.kkt.tensors()

    def kkt(*tensors: Tensor) -> KKT:
        values = dict(zip(factors, tensors, strict=True))
        return found.kkt.map(lambda name, _: values[name])

    if isinstance(found, ActiveSet):
        held, linear = qp.held(found.at_upper, found.at_lower), qp.linear
        return _System.apply(kkt, qp.gram, qp.smoothing, linear, held, None, found.coef, scale, *factors.values())[0]
    # A barrier of stiffness w, which is a constant here, pulls with `w (bound - coefficient)`.
    linear = qp.linear
    for stiffness, bound in ((found.upper, qp.upper), (found.lower, qp.lower)):
        if bound is not None:
            linear = linear + stiffness / scale[:, None, None] * torch.where(stiffness > 0, bound, 0)
    system = kkt, qp.gram, qp.smoothing, linear, found.point, None, found.coef, scale
    return _Barrier.apply(*system, *factors.values())[0]


class _System(torch.autograd.Function):
    """`(x, shift)` that solve a KKT system, as functions of it.

    The system is

        gram x + smoothing * x + shift = linear  at the free entries,   x = held  at the others,   sum_c x_c = sums

    `known` is x where that is known already; the value of its shift is then not told, and nothing depends on it. What
    is None counts as zero. A system that can't be factorised gives NaN gradients, never a number without meaning; but
    zero where the gradient that comes in is zero.
    """

    @staticmethod
    def forward(
        kkt: Callable[..., KKT],
        gram: Float[Tensor, "tasks n n"],
        smoothing: Float[Tensor, "tasks n k"] | None,
        linear: Float[Tensor, "tasks n k"],
        held: Float[Tensor, "tasks n k"] | None,
        sums: Float[Tensor, "tasks n"] | None,
        known: Float[Tensor, "tasks n k"] | None,
        scale: Float[Tensor, " tasks"],
        *factors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        sums = torch.zeros_like(linear[..., 0]) if sums is None else sums
        if known is not None:
            return known.clone(), torch.zeros_like(sums)
        scale = scale.unsqueeze(-1)
        x, shift = kkt(*factors).solve(scale.unsqueeze(-1) * linear.mT, sums, refinements=_REFINEMENTS)
        return x.mT.contiguous(), shift / scale

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.kkt, gram, smoothing, _, _, _, _, scale, *factors = inputs
        ctx.save_for_backward(gram, smoothing, output[0], scale, *factors)

    @staticmethod
    def backward(ctx, grad_x: Tensor, grad_shift: Tensor):
        gram, smoothing, x, scale, *factors = ctx.saved_tensors
        solve = _System.apply if torch.is_grad_enabled() or is_transforming() else _System.forward
        u, shift = solve(ctx.kkt, gram, smoothing, grad_x, None, grad_shift, None, scale, *factors)
        lost = _lost(u, x, grad_x, grad_shift)
        u, x, shift = u.masked_fill(lost, 0), x.masked_fill(lost, 0), shift.masked_fill(lost.squeeze(-1), 0)
        outer = u @ x.mT
        grad_smoothing = None if smoothing is None else -u * x
        grad_held = None
        if ctx.needs_input_grad[4]:  # the reaction at a bound; at free entries it is never asked for
            grad_held = (grad_x - gram @ u - shift.unsqueeze(-1)).masked_fill(lost, 0)
        nothing = (None,) * (2 + len(factors))
        return (
            None,
            -(outer + outer.mT) / 2,
            grad_smoothing,
            u,
            grad_held,
            shift if ctx.needs_input_grad[5] else None,
            *nothing,
        )

    @staticmethod
    def vmap(info, in_dims, kkt, *tensors):
        return _mapped(_System, info.batch_size, in_dims[1:], kkt, tensors)


class _Barrier(_System):
    """`known`, with the gradient of the point `held` inside a barrier, whose stiffness is part of `factors`.

    That stiffness depends on the solution, so one derivative is all there is.
    """

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.kkt, gram, smoothing, _, point, _, _, scale, *factors = inputs
        ctx.save_for_backward(gram, smoothing, point, scale, *factors)

    @staticmethod
    def backward(ctx, grad_x: Tensor, grad_shift: Tensor):
        gram, smoothing, x, scale, *factors = (None if value is None else value.detach() for value in ctx.saved_tensors)
        given = grad_x.detach(), None, grad_shift.detach(), None
        u, _ = _System.apply(ctx.kkt, gram, smoothing, *given, scale, *factors)
        assert x is not None
        lost = _lost(u, x, grad_x, grad_shift)
        u, x = u.masked_fill(lost, 0), x.masked_fill(lost, 0)
        outer = u @ x.mT
        found = -(outer + outer.mT) / 2, None if smoothing is None else -u * x, u
        by = "a NativeSolver whose gradient is not exact"
        found = (None if value is None else once_differentiable(value, grad_x, by) for value in found)
        return None, *found, *(None,) * (4 + len(factors))

    @staticmethod
    def vmap(info, in_dims, kkt, *tensors):
        return _mapped(_Barrier, info.batch_size, in_dims[1:], kkt, tensors)


def _lost(u: Tensor, x: Tensor, grad_x: Tensor, grad_shift: Tensor) -> Tensor:
    """The tasks that have no number to show, where nobody asked for one: `(tasks, 1, 1)`.

    A failed task that the loss leaves out would otherwise bring NaN (zero times NaN) to what all tasks share. Others
    stay as they are, also with a gradient of zero, so that derivatives of this derivative are right.
    """
    size = (u + x).sum((-2, -1))
    asked = grad_x.flatten(-2).any(-1) | grad_shift.any(-1)
    return ((size - size != 0) & ~asked)[:, None, None]  # of what is not finite, the difference is NaN


def _mapped(function: type[_System], size: int, in_dims: Any, kkt: Callable[..., KKT], tensors: Any) -> Any:
    """The rule for `torch.func.vmap`: the mapped dimension becomes more tasks."""
    pairs = list(zip(in_dims, tensors, strict=True))
    if all(dimension is None for dimension in in_dims[7:]):  # one factorised system, several right-hand sides
        each = [function.apply(kkt, *(t if dim is None else t.select(dim, i) for dim, t in pairs)) for i in range(size)]
        return tuple(torch.stack(values) for values in zip(*each, strict=True)), (0, 0)
    mapped = [move_vmap_dim_to_front(size, *pair) for pair in pairs]
    tasks = mapped[0].shape[1]
    flat = (None if tensor is None else tensor.reshape(-1, *tensor.shape[2:]) for tensor in mapped)
    return tuple(value.reshape(size, tasks, *value.shape[1:]) for value in function.apply(kkt, *flat)), (0, 0)


# torch asks for this signature at every call; worked out anew, it would cost more than what a small task has to do.
_System.forward.__signature__ = inspect.signature(_System.forward)  # pyright: ignore[reportFunctionMemberAccess]
