"""The feasible set of one support example.

It is a row `a` of k coefficients with `lower <= a <= upper` and, mostly, `sum a = 0`. The whole
problem's feasible set is the product of these rows, so its projection and its support function, on which every
certificate rests, are exact and cost one sort a row. A bound of None is absent; single entries may be infinite.
"""

from __future__ import annotations

import torch
from torch import Tensor


def project(value: Tensor, lower: Tensor | None, upper: Tensor | None, *, row_sum: bool) -> Tensor:
    """The feasible row nearest to each row of `value`, shape `(..., k)`."""
    if row_sum:
        value = value - _balancing_shift(value, lower, upper)
    return _clip(value, lower, upper)


def conjugate(
    slope: Tensor,
    lower: Tensor | None,
    upper: Tensor | None,
    *,
    at: Tensor,
    row_sum: bool,
    smoothing: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The maximum of `f(a) = <slope, a> - smoothing/2 |a|^2` over the feasible rows, and how far `f(at)` is from it.

    Args:
        slope: `(..., k)`.
        lower: bounds, `(..., k)`.
        upper: likewise.
        at: feasible rows, `(..., k)`.
        row_sum: whether the rows sum to zero.
        smoothing: positive, broadcasting with `slope`; None for none.

    Returns:
        The maximum and its distance from `f(at)`, both `(...)` and upper bounds of the true ones, infinite where the
        row is unbounded; the distance is a sum of non-negative terms, so tiny ones are exact. And the multiplier of
        `sum a = 0`, `(..., 1)` (zeros without row sums).
    """
    if not row_sum:
        shift = torch.zeros_like(slope[..., :1])
    elif smoothing is not None:
        shift = smoothing * _balancing_shift(slope / smoothing, lower, upper)
    elif lower is None:
        shift = slope.amin(-1, keepdim=True)
    elif upper is None:
        shift = slope.amax(-1, keepdim=True)
    else:
        shift = _linear_shift(slope, lower, upper)
    reduced = slope - shift
    # By weak duality any shift gives an upper bound; the entries then separate.
    if smoothing is not None:
        best = _clip(reduced / smoothing, lower, upper)
        maximum = best * (reduced - smoothing / 2 * best)
        distance = (best - at) * (reduced - smoothing / 2 * (best + at))
    else:
        infinite = torch.full_like(reduced, torch.inf)
        best = torch.where(reduced > 0, infinite if upper is None else upper, -infinite if lower is None else lower)
        maximum = torch.where(reduced == 0, 0, reduced * best)
        distance = torch.where(reduced == 0, 0, reduced * (best - at))
    return maximum.sum(-1), distance.sum(-1), shift


def _balancing_shift(value: Tensor, lower: Tensor | None, upper: Tensor | None) -> Tensor:
    """The shift s with `sum clip(value - s, lower, upper) = 0`, shape `(..., 1)`.

    The sum falls piecewise linearly in s. Walking s upwards, an entry is held at its upper bound until s passes
    `value - upper`, then free until `value - lower`. Between two breakpoints s solves a linear equation.
    """
    k = value.shape[-1]
    # Bounds far beyond what can be reached are brought near: added up as they are, they would cost digits.
    nearest = _clip(torch.zeros_like(value), lower, upper)
    far = 2 * k * (value.abs() + nearest.abs()).amax(-1, keepdim=True) + 1
    one = torch.ones_like(value)
    if upper is None:
        start = (k * one[..., :1], value.sum(-1, keepdim=True))
        events = []
    else:
        upper = upper.minimum(far)
        start = (0 * one[..., :1], upper.expand_as(value).sum(-1, keepdim=True))
        events = [(value - upper, one, value - upper)]
    if lower is not None:
        lower = lower.maximum(-far)
        events.append((value - lower, -one, lower - value))
    point, free, total = (torch.cat(parts, -1) for parts in zip(*events, strict=True))
    point, order = point.sort(-1)
    free = torch.cat([start[0], free.gather(-1, order)], -1).cumsum(-1)
    total = torch.cat([start[1], total.gather(-1, order)], -1).cumsum(-1)
    # Between breakpoints j and j + 1 the sum of the clipped row is `total[j] - free[j] * s`.
    last = ((total[..., 1:] - free[..., 1:] * point) >= 0).sum(-1, keepdim=True)
    free, total = free.gather(-1, last), total.gather(-1, last)
    idle = point.gather(-1, (last - 1).clamp_min(0))
    return torch.where(free > 0, total / free.clamp_min(1), idle)


def _linear_shift(slope: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """The multiplier of `sum a = 0` when `<slope, a>` is maximised over a box, shape `(..., 1)`.

    Entries with a large slope go to their upper bound, the others to their lower one; the multiplier is the slope
    of the entry at which the sum changes sign.
    """
    ordered, order = slope.sort(-1, descending=True)
    far = torch.finfo(slope.dtype).max / (4 * slope.shape[-1])
    high = upper.clamp(max=far).expand_as(slope).gather(-1, order).cumsum(-1)
    low = lower.clamp(min=-far).expand_as(slope).gather(-1, order).flip(-1).cumsum(-1).flip(-1)
    total = high + torch.cat([low[..., 1:], torch.zeros_like(low[..., :1])], -1)
    first = (total < 0).sum(-1, keepdim=True).clamp_max(slope.shape[-1] - 1)
    return ordered.gather(-1, first)


def _clip(value: Tensor, lower: Tensor | None, upper: Tensor | None) -> Tensor:
    if lower is not None:
        value = value.maximum(lower)
    return value if upper is None else value.minimum(upper)
