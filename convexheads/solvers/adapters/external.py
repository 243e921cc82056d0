"""Helpers of adapters: the dense form of a problem, and an external differentiable solver as a node of the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from convexheads._functorch import once_differentiable
from convexheads.solvers.problem import DualProblem, per_task


class DenseProblem(NamedTuple):
    """`min 1/2 z'Qz + p'z` subject to `Gz <= h`, `Az = b`, for coefficients `z` row by row. `to_dense` creates it."""

    Q: Float[Tensor, "*batch nk nk"]
    p: Float[Tensor, "*batch nk"]
    G: Float[Tensor, "*batch inequalities nk"]
    h: Float[Tensor, "*batch inequalities"]
    A: Float[Tensor, "*batch equalities nk"]
    b: Float[Tensor, "*batch equalities"]


def to_dense(problem: DualProblem) -> DenseProblem:
    """Convert a `problem` to the dense form of general-purpose solvers, with an nk x nk matrix for every task.

    Infinite bounds are left out. A task with fewer finite bounds than another one gets idle rows `0 z <= 1` in their
    place. If rows need not sum to zero, there are no equalities.
    """
    *batch, n, k = problem.linear.shape
    eye = torch.eye(n * k, dtype=problem.gram.dtype, device=problem.gram.device)
    hessian = torch.einsum("...ij,cd->...icjd", problem.gram, eye[:k, :k]).reshape(*batch, n * k, n * k)
    if problem.smoothing is not None:
        hessian = hessian + torch.diag_embed(problem.smoothing.reshape(*batch, n * k))
    rows, limits = [], []
    for sign, limit in problem.inequalities:
        sign, limit = sign.reshape(*batch, n * k), limit.reshape(*batch, n * k)
        idle = sign == 0
        order = idle.to(torch.uint8).argsort(dim=-1, stable=True)[..., : int((~idle).sum(-1).max())]
        rows.append(sign.gather(-1, order)[..., None] * eye[order])
        limits.append(limit.gather(-1, order))
    equality = eye.view(n, k, n * k).sum(1) if problem.rows_sum_to_zero else eye[:0]
    return DenseProblem(
        Q=hessian,
        p=-problem.linear.reshape(*batch, n * k),
        G=torch.cat(rows, -2),
        h=torch.cat(limits, -1),
        A=equality.expand(*batch, *equality.shape).clone(),
        b=problem.linear.new_zeros(*batch, len(equality)),
    )


def call_backend(solve: Callable[..., Tensor], *inputs: Tensor, backend: str) -> Tensor:
    """Return `solve(*inputs)`, differentiable once, with workarounds for two common defects of backends.

    - Incoming gradients are scaled so that the largest entry of each task is one, and the results are scaled back,
      because backends compare gradients with absolute thresholds (diffcp treats a gradient below 1e-8 as zero).
    - A request for a second derivative raises `ConvexHeadsError`, because no backend computes it correctly.

    Args:
        solve: a function that the backend differentiates. The first dimension of every input and of the output is
            the tasks, which do not affect each other.
        inputs: the tensors to differentiate with respect to, each `(tasks, ...)`.
        backend: name of the backend, for the error.
    """
    return _Call.apply(solve, backend, *inputs)


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(ctx, solve: Callable[..., Tensor], backend: str, *inputs: Tensor) -> Tensor:
        ctx.backend = backend
        needs_grad = ctx.needs_input_grad[2:]
        with torch.set_grad_enabled(any(needs_grad)):
            ctx.inputs = [x.detach().requires_grad_(need) for x, need in zip(inputs, needs_grad, strict=True)]
            ctx.output = solve(*ctx.inputs)
        return ctx.output.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        if not ctx.output.requires_grad:  # the backend has solved no task
            nothing = (torch.full_like(x, torch.nan) if x.requires_grad else None for x in ctx.inputs)
            return None, None, *nothing
        magnitude = gradient.detach().abs().flatten(1).amax(1)
        magnitude = torch.where(magnitude > 0, magnitude, 1)
        differentiable = [x for x in ctx.inputs if x.requires_grad]
        with torch.enable_grad():
            scaled = gradient.detach() / per_task(magnitude, gradient)
            gradients = torch.autograd.grad(ctx.output, differentiable, scaled, retain_graph=True)
        # Connected to the incoming gradient, so that differentiating once more raises the error.
        back = (once_differentiable(g * per_task(magnitude, g), gradient, ctx.backend) for g in gradients)
        return None, None, *(next(back) if x.requires_grad else None for x in ctx.inputs)
