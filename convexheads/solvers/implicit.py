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

from convexheads.solvers.kkt import BlockKKT
from convexheads.solvers.problem import QP

_REFINEMENTS = 3
_REGULARISER = 1e-9


def attach(qp: QP, coef: Float[Tensor, "tasks n k"], *, polish: bool = True) -> Float[Tensor, "tasks n k"]:
    """Give coefficients that were found without autograd their gradient with respect to every tensor of `qp`.

    Args:
        qp: a flat batch of problems in units.
        coef: feasible coefficients close to the optimum.
        polish: let the solution of the system above, for the active set that `coef` shows, take the place of `coef`
            where its certified gap is smaller. Without it the values stay those of `coef`.
    """
    plain = qp.detach()
    with torch.no_grad():
        certificate = plain.certify(coef)
        at_upper, at_lower = _active(plain, coef, certificate.bound_multipliers)
    free = ~(at_upper | at_lower)
    held = torch.zeros_like(qp.linear)
    if qp.upper is not None:
        held = torch.where(at_upper, qp.upper, held)
    if qp.lower is not None:
        held = torch.where(at_lower, qp.lower, held)

    hessian = qp.hessian()
    right, sums = qp.linear - hessian @ held, -held.sum(-1)
    value = coef
    with torch.no_grad():
        kkt = BlockKKT(hessian, free=free.mT, row_sum=qp.row_sum, regulariser=_REGULARISER)
        if polish:
            # Where several solutions are optimal, starting at `coef` stays at the one that respects the bounds.
            start = (torch.where(free, coef, 0).mT, certificate.row_multipliers)
            moved, _ = kkt.solve(right.mT, sums, refinements=_REFINEMENTS, start=start)
            exact = plain.project(moved.mT + held)
            better = plain.certify(exact).gap <= certificate.gap
            value = torch.where(better[:, None, None], exact, coef)
    moved, _ = _Solved.apply(hessian, right, sums, torch.where(free, value, 0), certificate.row_multipliers, kkt)
    solved = moved + held
    return solved + (value - solved.detach())


def _active(qp: QP, coef: Tensor, pull: Tensor) -> tuple[Tensor, Tensor]:
    """Which entries sit at their upper, and which at their lower bound: those that the multiplier holds there."""
    none = torch.zeros_like(coef, dtype=torch.bool)
    at_upper = none if qp.upper is None else qp.upper - coef < pull
    at_lower = none if qp.lower is None else coef - qp.lower < -pull
    return at_upper, at_lower


class _Solved(torch.autograd.Function):
    """`(moved, shift)`, known to solve the KKT system at the free entries, as functions of that system.

    A system that can't be factorised gives NaN gradients, never a number without meaning.
    """

    @staticmethod
    def forward(
        hessian: Float[Tensor, "tasks n n"],
        right: Float[Tensor, "tasks n k"],
        sums: Float[Tensor, "tasks n"],
        moved: Float[Tensor, "tasks n k"],
        shift: Float[Tensor, "tasks n"],
        kkt: BlockKKT,
    ) -> tuple[Tensor, Tensor]:
        return moved.clone(), shift.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[0], output[0])
        ctx.kkt = inputs[-1]

    @staticmethod
    def backward(ctx, grad_moved: Tensor, grad_shift: Tensor):
        hessian, moved = ctx.saved_tensors
        with torch.no_grad():
            adjoint, adjoint_sums = ctx.kkt.solve(grad_moved.mT, grad_shift, refinements=_REFINEMENTS)
        adjoint, adjoint_sums = _Solved.apply(hessian, grad_moved, grad_shift, adjoint.mT, adjoint_sums, ctx.kkt)
        outer = adjoint @ moved.mT
        return -(outer + outer.mT) / 2, adjoint, adjoint_sums, None, None, None
