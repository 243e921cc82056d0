"""The formulas of the kernels, as functions of tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def matrix_product(left: Tensor, right: Tensor) -> Tensor:
    """The product `left @ right` of matrices.

    On a CPU, a product with few columns takes up to twice as long as one with few rows, so that is computed instead.
    The result is then not contiguous. Nor would be the gradient of `left`, which would slow down the rest of the
    backward pass, so products with such a gradient are computed as they are.
    """
    is_transposed = left.stride(-2) == 1 < left.stride(-1)
    has_gradient = left.requires_grad and torch.is_grad_enabled()
    # A graph holds for any number of queries, so it contains no condition of their number.
    may_swap = is_transposed or not (has_gradient or torch.compiler.is_compiling())
    if left.is_cpu and may_swap and right.shape[-1] < left.shape[-2]:
        return _product(right.mT, left.mT).mT
    return _product(left, right)


def _product(left: Tensor, right: Tensor) -> Tensor:
    if left.ndim == right.ndim == 3 and left.shape[0] == right.shape[0]:
        return torch.bmm(left, right)  # small matrices take half the time
    return left @ right


def constant(x: Tensor, y: Tensor, value: Tensor) -> Tensor:
    return value.expand(*x.shape[:-1], y.shape[-2])


def scaled(x: Tensor, y: Tensor, kernel: Callable[[Tensor, Tensor], Tensor], unit: Tensor) -> Tensor:
    return kernel(x, y) / unit[..., None, None]


def polynomial(x: Tensor, y: Tensor, degree: int, scale: Tensor, offset: Tensor) -> Tensor:
    return (scale * (x @ y.mT) + offset) ** degree


def gaussian(x: Tensor, y: Tensor, length_scale: Tensor) -> Tensor:
    # Centering does not change the distances, and their computation then loses fewer digits.
    center = y.detach().mean(-2, keepdim=True)
    scale = length_scale[..., None, None]
    return torch.exp(-_squared_distance((x - center) / scale, (y - center) / scale) / 2)


def _squared_distance(x: Tensor, y: Tensor) -> Tensor:
    return (x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :] - 2 * (x @ y.mT)).clamp_min(0)


def median_distance(features: Tensor, mask: Tensor | None) -> Tensor:
    """The median distance over all pairs of examples, `(*batch,)`; 1 if it is zero."""
    n = features.shape[-2]
    if n < 2:
        return features.new_ones(features.shape[:-2])
    first, second = torch.triu_indices(n, n, offset=1, device=features.device)
    centered = features - features.detach().mean(-2, keepdim=True)
    largest = centered.detach().abs().amax((-2, -1))  # so that no square is too large or too small for a number
    unit = largest.where(largest > 0, 1)
    centered = centered / unit[..., None, None]
    distance = _squared_distance(centered, centered)[..., first, second]
    if mask is not None:
        distance = distance.where(mask[..., first] & mask[..., second], torch.nan)
    median = distance.nanmedian(-1).values
    return torch.where(median > 0, unit, 1) * torch.where(median > 0, median, 1).sqrt()


def normalize(x: Tensor) -> Tensor:
    largest = x.detach().abs().amax(-1, keepdim=True)  # so that no square is too large or too small for a number
    x = x / largest.where(largest > 0, 1)
    squared = x.square().sum(-1, keepdim=True)
    # The norm of a zero vector has no gradient: the vector stays zero, and its gradient is zero.
    return x * torch.where(squared > 0, squared, torch.inf).rsqrt()
