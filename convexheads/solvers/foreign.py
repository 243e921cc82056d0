"""Somebody else's differentiable solver as one node of the graph, with what they get wrong in common put right."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from convexheads._functorch import once_differentiable


def call(solve: Callable[..., Tensor], *inputs: Tensor, backend: str) -> Tensor:
    """`solve(*inputs)`, differentiable once.

    - Incoming gradients are scaled to one, task by task, and the outgoing ones back: backends compare them with
      absolute thresholds (diffcp takes a gradient below 1e-8 for zero).
    - Asking for a second derivative raises `ConvexHeadsError`: no backend gives a right one, and some give a wrong one.

    Args:
        solve: differentiable by the backend's own means; every input and the output have the tasks as first dimension,
            and tasks don't mix.
        inputs: the tensors to differentiate by, each `(tasks, ...)`.
        backend: its name in the error.

    Returns:
        What `solve` returns, `(tasks, ...)`.
    """
    return _Call.apply(solve, backend, *inputs)


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(ctx, solve: Callable[..., Tensor], backend: str, *inputs: Tensor) -> Tensor:
        ctx.backend = backend
        wanted = ctx.needs_input_grad[2:]
        with torch.set_grad_enabled(any(wanted)):
            ctx.inputs = [x.detach().requires_grad_(need) for x, need in zip(inputs, wanted, strict=True)]
            ctx.output = solve(*ctx.inputs)
        return ctx.output.detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        size = gradient.detach().abs().amax(tuple(range(1, gradient.ndim)))
        size = torch.where(size > 0, size, 1)
        wanted = [x for x in ctx.inputs if x.requires_grad]
        with torch.enable_grad():
            scaled = gradient.detach() / size.view(-1, *[1] * (gradient.ndim - 1))
            found = iter(torch.autograd.grad(ctx.output, wanted, scaled, retain_graph=True))
        found = [next(found) if x.requires_grad else None for x in ctx.inputs]
        back = [None if g is None else g * size.view(-1, *[1] * (g.ndim - 1)) for g in found]
        # Tied to the incoming gradient, so that differentiating once more arrives at the refusal.
        return None, None, *(None if g is None else once_differentiable(g, gradient, ctx.backend) for g in back)
