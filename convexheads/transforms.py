"""Run control flow that depends on values under the transforms of `torch.func`.

Inside `torch.func.vmap` a tensor stands for a batch of tensors, and no loop can end on its values. But all functions
here accept any number of leading dimensions, so they are called once, with the mapped dimension in front.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from convexheads.errors import ConvexHeadsError

_T = TypeVar("_T")
# torch itself asks this before it uses the slow rules for transforms; without it, they are always used.
is_transforming: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
"""Whether the caller runs under a transform of `torch.func`."""


def compute(function: Callable[..., tuple[Tensor, ...]], *arguments: Any) -> tuple[Tensor, ...]:
    """Call `function(*arguments)` without gradient, on tensors whose values can be read.

    Args:
        function: takes the tensors with any number of leading dimensions and returns tensors with the same ones.
        arguments: tensors with leading dimensions in common; all other values are passed on unchanged.
    """
    if is_transforming():
        return _Computed.apply(function, *arguments)
    with torch.no_grad():
        return function(*arguments)


def look_at(function: Callable[..., _T], *arguments: Any) -> _T:
    """Call a function that reads values, and raises or returns something else than tensors, like `compute` does."""
    seen: list[_T] = []

    def call(*values: Any) -> tuple[Tensor, ...]:
        seen.append(function(*values))
        return ()

    compute(call, *arguments)
    return seen[0]


def in_front(size: int, dimension: int | None, value: Any) -> Any:
    """Move the mapped dimension of a tensor to the front, as rules for `vmap` expect; repeat a tensor without one."""
    if not isinstance(value, Tensor):
        return value
    return value.expand(size, *value.shape) if dimension is None else value.movedim(dimension, 0)


def differentiated_once(value: Tensor, gradient: Tensor, by: str) -> Tensor:
    """A first derivative that raises an error when it is differentiated.

    Args:
        value: the derivative, outside the graph.
        gradient: the incoming gradient, which connects the graph of a second derivative.
        by: name of the solver, for the error.
    """
    return _Refuse.apply(value, gradient, by)


class _Refuse(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, gradient: Tensor, by: str) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.by = inputs[2]

    @staticmethod
    def backward(ctx, _):
        raise ConvexHeadsError(f"second derivative: {ctx.by} does not have one; use NativeSolver()")


class _Computed(torch.autograd.Function):
    @staticmethod
    def forward(function: Callable[..., tuple[Tensor, ...]], *arguments: Any) -> tuple[Tensor, ...]:
        return function(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info, in_dims, function, *arguments):
        pairs = zip(in_dims[1:], arguments, strict=True)
        outputs = _Computed.apply(function, *(in_front(info.batch_size, *pair) for pair in pairs))
        return outputs, (0,) * len(outputs)
