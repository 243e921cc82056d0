"""Code that looks at values (to stop, to branch, to complain) where `torch.func` hides them.

Inside `torch.func.vmap` a tensor stands for a batch of them, and no loop can end on its values. Everything here works
on any number of leading dimensions anyway: so such code is called once, with the mapped dimension as one more in front.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from convexheads.errors import ConvexHeadsError

_T = TypeVar("_T")
# What torch itself asks before it takes the slow way through its rules; without it, that way is always taken.
is_transforming: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
"""Whether a transform of `torch.func` is at work here."""


def compute(function: Callable[..., tuple[Tensor, ...]], *arguments: Any) -> tuple[Tensor, ...]:
    """`function(*arguments)`, without gradient, on tensors whose values can be looked at.

    Args:
        function: takes the tensors with any number of leading dimensions and returns tensors with the same ones.
        arguments: tensors with leading dimensions in common; anything else passes as it is.
    """
    if is_transforming():
        return _Computed.apply(function, *arguments)
    with torch.no_grad():
        return function(*arguments)


def look_at(function: Callable[..., _T], *arguments: Any) -> _T:
    """As `compute`, for a function that returns anything else, or raises."""
    seen: list[_T] = []

    def call(*values: Any) -> tuple[Tensor, ...]:
        seen.append(function(*values))
        return ()

    compute(call, *arguments)
    return seen[0]


def in_front(size: int, dimension: int | None, value: Any) -> Any:
    """A tensor with its mapped dimension first, where a rule for `vmap` finds it; repeated if it has none."""
    if not isinstance(value, Tensor):
        return value
    return value.expand(size, *value.shape) if dimension is None else value.movedim(dimension, 0)


def differentiated_once(value: Tensor, gradient: Tensor, by: str) -> Tensor:
    """A first derivative, with an error for whoever asks for the next.

    Args:
        value: the derivative, outside the graph.
        gradient: that came in; what asks for another derivative gets at it through this.
        by: what differentiated, for the error.
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
        raise ConvexHeadsError(
            f"second derivative: got a request for one through {ctx.by}, wanted a solver that has it (NativeSolver)"
        )


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
