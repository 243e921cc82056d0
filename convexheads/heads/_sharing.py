"""Work that is done once for all tasks that share their data, which are expanded along some leading dimensions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from convexheads._gram import matrix_product


def is_shared(value: Tensor, dims: Sequence[int]) -> bool:
    """Whether a tensor is expanded along these dimensions, or they have a size of one."""
    return all(value.stride(dim) == 0 or value.shape[dim] == 1 for dim in dims)


def shared_from(value: Tensor, dims: int) -> int:
    """The first of `dims` leading dimensions from which on a tensor is shared; `dims` if there is none."""
    return next((dim for dim in range(dims) if is_shared(value, range(dim, dims))), dims)


def scale_once(value: Tensor, factor: float | Tensor) -> Tensor:
    """The tensor times a factor; it stays expanded if the factor is one."""
    return value if isinstance(factor, float) and factor == 1 else factor * value


def apply_once(function: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """Apply a function of matrices `(*batch, n, d)` without repeating its work where they are expanded."""
    dims = [dim for dim in range(value.ndim - 2) if value.stride(dim) == 0 and value.shape[dim] > 1]
    small = value
    for dim in dims:
        small = small.narrow(dim, 0, 1)
    result = function(small)
    return result.expand(*value.shape[:-2], *result.shape[-2:]) if dims else result


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """The product of matrices `(*batch, m, n)` and `(*batch, n, k)`, which is one for all tasks that share `left`."""
    dims = right.ndim - 2
    groups = shared_from(left, dims)
    if groups == dims or right.shape[groups:dims].numel() == 1:
        return matrix_product(left, right)
    members, k = right.shape[groups:dims], right.shape[-1]
    merged = right.flatten(groups, dims - 1)  # (*groups, members, n, k)
    stacked = merged.transpose(-3, -2).flatten(-2)
    shared = left[(slice(None),) * groups + (0,) * (dims - groups)]
    product = matrix_product(shared, stacked).unflatten(-1, (members.numel(), k)).transpose(-3, -2)
    return product.unflatten(groups, tuple(members))
