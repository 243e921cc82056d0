"""The one place where a native solution gets its gradient.

At the optimum some coefficients sit at a bound and the others solve a linear system,

    K a + smoothing * a + shift = linear   at the free entries,     a 1 = 0,

so the solution is differentiated by differentiating that system with the active set held fixed (the implicit function
theorem on the KKT conditions, Eq. 8 of the paper). The system is symmetric: its adjoint has the same factors, and the
backward pass is one more solve. That solve is again differentiable, so derivatives of any order are right.

Where a bound is weakly active (coefficient at the bound and multiplier zero) the solution has no derivative, only
directional ones; the active set found decides which of them is returned.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from convexheads.solvers.active_set import ActiveSet
from convexheads.solvers.kkt import KKT
from convexheads.solvers.problem import QP

_REFINEMENTS = 3


def attach(qp: QP, found: ActiveSet) -> Float[Tensor, "tasks n k"]:
    """The coefficients of an active set, which was found without autograd, as functions of every tensor of `qp`."""
    held = qp.held(found.at_upper, found.at_lower)
    free = ~(found.at_upper | found.at_lower)
    moved, shift = torch.where(free, found.coef, 0), torch.zeros_like(held[..., 0])
    right, sums = qp.linear - qp.gram @ held, -held.sum(-1)
    solved = _Solved.apply(qp.gram, qp.smoothing, right, sums, moved, shift, found.kkt)[0] + held
    return solved + (found.coef - solved.detach())


class _Solved(torch.autograd.Function):
    """`(moved, shift)`, known to solve the KKT system at the free entries, as functions of that system.

    No derivative depends on the value of `shift`. A system that can't be factorised gives NaN gradients, never a number
    without meaning.
    """

    @staticmethod
    def forward(
        gram: Float[Tensor, "tasks n n"],
        smoothing: Float[Tensor, "tasks n k"] | None,
        right: Float[Tensor, "tasks n k"],
        sums: Float[Tensor, "tasks n"],
        moved: Float[Tensor, "tasks n k"],
        shift: Float[Tensor, "tasks n"],
        kkt: KKT,
    ) -> tuple[Tensor, Tensor]:
        return moved.clone(), shift.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:2], output[0])
        ctx.kkt = inputs[-1]

    @staticmethod
    def backward(ctx, grad_moved: Tensor, grad_shift: Tensor):
        gram, smoothing, moved = ctx.saved_tensors
        with torch.no_grad():
            adjoint, adjoint_sums = ctx.kkt.solve(grad_moved.mT, grad_shift, refinements=_REFINEMENTS)
        adjoint, adjoint_sums = _Solved.apply(
            gram, smoothing, grad_moved, grad_shift, adjoint.mT, adjoint_sums, ctx.kkt
        )
        outer = adjoint @ moved.mT
        grad_smoothing = None if smoothing is None else -adjoint * moved
        return -(outer + outer.mT) / 2, grad_smoothing, adjoint, adjoint_sums, None, None, None
