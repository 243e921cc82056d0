"""Run data-dependent control flow under the transforms of `torch.func`.

Inside `torch.func.vmap`, code cannot branch on the values of a tensor, because the tensor stands for a batch. The
functions that are passed to the rules here accept any number of leading dimensions, so the rules call them once, with
the mapped dimension as an additional first dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from convexheads.errors import ConvexHeadsError

_T = TypeVar("_T")
# torch uses this function to decide whether it needs the slower `torch.func` rules; without it, we always use them.
is_transforming: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
"""Whether a transform of `torch.func` is active."""
_count_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)


def is_transforming_or_forward() -> bool:
    """Whether a transform of `torch.func` is active, or derivatives in forward mode may be asked for."""
    return is_transforming() or getattr(torch.autograd.forward_ad, "_current_level", 0) >= 0


def is_recorded() -> bool:
    """Whether operations of PyTorch are recorded or replaced as they run, so that other code must not take their place.

    That is in graphs, in `torch.jit.trace`, in transforms and derivatives in forward mode, and in dispatch modes such
    as `FakeTensorMode`.
    """
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    return is_traced or is_transforming_or_forward() or _count_modes() > 0


def refuse_transforms(name: str) -> None:
    """Raise `ConvexHeadsError` inside a transform of `torch.func`, which the head or solver `name` does not support."""
    if is_transforming():
        raise ConvexHeadsError(f"torch.func: expected a head and a solver that support its transforms, got {name}")


def compute_without_grad(function: Callable[..., tuple[Tensor, ...]], *arguments: Any) -> tuple[Tensor, ...]:
    """Call a function without gradient, on tensors whose values can be inspected.

    The tensors among the arguments and results have the same leading dimensions, any number of them.
    """
    if is_transforming():
        return _WithoutGrad.apply(function, *arguments)
    return _call_without_grad(function, *arguments)


def _call_without_grad(function: Callable[..., _T], *arguments: Any) -> _T:
    if not torch.is_grad_enabled():  # then the context would only take time
        return function(*arguments)
    with torch.no_grad():
        return function(*arguments)


def inspect_values(function: Callable[..., _T], *arguments: Any) -> _T:
    """Like `compute_without_grad`, but the function may return anything and may raise an error."""
    if not is_transforming():
        return _call_without_grad(function, *arguments)
    seen: list[_T] = []

    def call(*values: Any) -> tuple[Tensor, ...]:
        seen.append(function(*values))
        return ()

    compute_without_grad(call, *arguments)
    return seen[0]


def move_vmap_dim_to_front(size: int, dimension: int | None, value: Any) -> Any:
    """Move the mapped dimension of a tensor to the front; a tensor that is not mapped is expanded by `size`."""
    if not isinstance(value, Tensor):
        return value
    return value.expand(size, *value.shape) if dimension is None else value.movedim(dimension, 0)


class _OnceDifferentiable(torch.autograd.Function):
    """The derivative `value`, computed outside the graph; differentiating it raises an error.

    The incoming `gradient` only connects the result to the autograd graph, so that a second derivative reaches
    `backward`; `by` names the solver in the error.
    """

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
            f"second derivative: expected a solver that supports it, such as NativeSolver(), got {ctx.by}"
        )


once_differentiable = _OnceDifferentiable.apply


class _WithoutGrad(torch.autograd.Function):
    @staticmethod
    def forward(function: Callable[..., tuple[Tensor, ...]], *arguments: Any) -> tuple[Tensor, ...]:
        return function(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info, in_dims, function, *arguments):
        pairs = zip(in_dims[1:], arguments, strict=True)
        outputs = _WithoutGrad.apply(function, *(move_vmap_dim_to_front(info.batch_size, *pair) for pair in pairs))
        return outputs, (0,) * len(outputs)
