"""The feasible set of one support example.

It consists of the rows `a` of k coefficients with `lower <= a <= upper` and, if `rows_sum_to_zero`, `sum a = 0`. The
feasible set of the whole problem is the product of these sets. Its projection and its support function, on which every
certificate is based, are therefore exact and cost one sort per row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_ROW_SUM_TOLERANCE = 1e-14
NEWTON_TOLERANCE = 1e-12
"""The proximal step of the Numba kernels, used only for a first guess, stops at sums of this relative size."""


def row_sum_tolerance(k: int) -> float:
    """The largest sum of k entries, relative to the largest one, that Numba kernels accept; they project no rows."""
    return max(_ROW_SUM_TOLERANCE, _rounding_of_sums(k, torch.float64))


def _rounding_of_sums(k: int, dtype: torch.dtype) -> float:
    """By how much rounding may move a sum of k entries, relative to the largest one."""
    return 4 * k * torch.finfo(dtype).eps


class FeasibleRows(NamedTuple):
    """Bounds, which may be None or infinite, and the quadratic smoothing of rows, each `(..., k)`."""

    lower: Tensor | None
    upper: Tensor | None
    smoothing: Tensor | None
    sum_to_zero: bool

    def clip(self, value: Tensor) -> Tensor:
        """The nearest values within the bounds, whatever their sum."""
        if self.lower is not None:
            value = value.maximum(self.lower)
        return value if self.upper is None else value.minimum(self.upper)

    def project(self, value: Tensor) -> Tensor:
        """The feasible row nearest to each row of `value`, `(..., k)`."""
        clipped = self.clip(value)
        if not self.sum_to_zero:
            return clipped
        rounding = _rounding_of_sums(value.shape[-1], value.dtype)
        if (clipped.sum(-1).abs() <= rounding * clipped.abs().amax(-1)).all():  # as for exact solutions
            return clipped
        return self._replace(smoothing=None).proximal(value, torch.ones_like(value[..., :1]))[0]

    def proximal(self, target: Tensor, weight: Tensor, guess: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The feasible row that minimizes `weight |a - target|^2 / 2 + <smoothing, a^2> / 2`, for positive weights.

        The second result is the multiplier of `sum a = 0`. It is zero if rows need not sum to zero. The multiplier
        and the weight have shape `(..., 1)`. A guess of the multiplier saves time.
        """
        smoothing = self.smoothing
        rate = None if smoothing is None else weight / (weight + smoothing)
        if not self.sum_to_zero:
            multiplier = torch.zeros_like(target[..., :1])
        elif self.lower is None or self.upper is None:
            multiplier = weight * self._one_sided_multiplier(target, rate, None if guess is None else guess / weight)
        else:
            curvature = weight.expand_as(target) if smoothing is None else weight + smoothing
            multiplier = self._row_multiplier(weight * target, curvature)
        moved = target - multiplier / weight
        return self.clip(moved if rate is None else moved * rate), multiplier

    def conjugate(self, slope: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The maximum of `f(a) = <slope, a> - <smoothing, a^2> / 2` over feasible rows, and its distance from f(at).

        Both have the shape `(...)`. They are upper bounds of the true values, and infinite if the row is unbounded. The
        second one is a sum of non-negative terms, so tiny values are accurate. The third result is the multiplier of
        `sum a = 0`.
        """
        lower, upper, smoothing, sum_to_zero = self
        if not sum_to_zero:
            multiplier = torch.zeros_like(slope[..., :1])
        elif smoothing is None and lower is None:
            multiplier = slope.amin(-1, keepdim=True)
        elif smoothing is None and upper is None:
            multiplier = slope.amax(-1, keepdim=True)
        else:
            multiplier = self._row_multiplier(slope, torch.zeros_like(slope) if smoothing is None else smoothing)
        reduced = slope - multiplier
        # By weak duality, any multiplier gives an upper bound, and the entries then separate. Without smoothing, an
        # entry jumps from one bound to the other where `reduced` changes sign.
        infinite = torch.full_like(reduced, torch.inf)
        best = torch.where(reduced > 0, infinite if upper is None else upper, -infinite if lower is None else lower)
        undecided = reduced == 0
        if smoothing is None:
            maximum, distance = reduced * best, reduced * (best - at)
        else:
            smooth = smoothing > 0
            best = torch.where(smooth, self.clip(reduced / smoothing), best)
            reached = torch.where(smooth, best, 0)
            maximum = reduced * best - smoothing / 2 * reached.square()
            distance = (best - at) * (reduced - smoothing / 2 * (reached + at))
            undecided = undecided & ~smooth
        maximum, distance = (torch.where(undecided, 0, value).sum(-1) for value in (maximum, distance))
        return maximum, distance, multiplier

    def _one_sided_multiplier(self, target: Tensor, rate: Tensor | None, guess: Tensor | None) -> Tensor:
        """The s for which `clip(rate (target - s))` sums to zero, where all bounds are on one side; `(..., 1)`.

        The sum is then a convex or concave, piecewise linear function of s, so Newton's method needs no sorting and
        ends at the exact root. From any start, its first step leads to one side of the root; later steps stay there.
        """
        unbounded = target.mean(-1, keepdim=True) if rate is None else _ratio(rate * target, rate)
        guess = unbounded if guess is None else guess
        close = 4 * torch.finfo(target.dtype).eps * target.abs().amax(-1, keepdim=True)
        for _ in range(target.shape[-1] + 2):
            moved = target - guess if rate is None else rate * (target - guess)
            row = self.clip(moved)
            inside = row == moved
            step = _ratio(row, inside.to(row.dtype) if rate is None else torch.where(inside, rate, 0))
            # If all entries are at their bounds, start again from where they would sum to zero without bounds.
            balanced = row.sum(-1, keepdim=True).abs() <= close
            step = torch.where(balanced, 0, torch.where(torch.isfinite(step), step, unbounded - guess))
            guess = guess + step
            if (step.abs() <= close).all():
                break
        return guess

    def _row_multiplier(self, slope: Tensor, smoothing: Tensor) -> Tensor:
        """The multiplier s of `sum a = 0` when `<slope, a> - <smoothing, a^2> / 2` is maximized, shape `(..., 1)`.

        As s grows, each entry `a_c = clip((slope_c - s) / smoothing_c, lower_c, upper_c)` stays at its upper bound,
        then falls at the rate 1 / smoothing, then stays at its lower bound. Without smoothing, it jumps. Between two
        such breakpoints, s solves a linear equation.
        """
        k = slope.shape[-1]
        infinite = torch.full_like(slope, torch.inf)
        upper = infinite if self.upper is None else self.upper.expand_as(slope)
        lower = -infinite if self.lower is None else self.lower.expand_as(slope)
        smoothing = smoothing.expand_as(slope)
        smooth = smoothing > 0
        rate = torch.where(smooth, 1 / smoothing, 0)
        # Bounds that cannot be reached are tightened, because their sums would lose digits.
        nearest = torch.zeros_like(slope).clamp(lower, upper)
        spread = slope.amax(-1, keepdim=True) - slope.amin(-1, keepdim=True)
        far = 2 * k * (rate * spread + nearest.abs()).amax(-1, keepdim=True) + 1
        far = torch.where(smooth, far, torch.inf)
        upper, lower = upper.minimum(far), lower.maximum(-far)
        # The row sums to zero, so an entry without smoothing and bound is at most the sum of all other bounds.
        ends = torch.stack([upper, lower])
        all_others = ends.abs().nan_to_num(posinf=0).sum((0, -1)).unsqueeze(-1) + 1
        upper, lower = ends.clamp(-all_others, all_others)

        point, order = torch.cat([slope - smoothing * upper, slope - smoothing * lower], -1).sort(-1)
        free = torch.cat([rate, -rate], -1).gather(-1, order).cumsum(-1)
        change = torch.cat(
            [torch.where(smooth, rate * slope, lower) - upper, torch.where(smooth, lower - rate * slope, 0)], -1
        )
        total = change.gather(-1, order).cumsum(-1)
        total = total + upper.sum(-1, keepdim=True)
        # From breakpoint j to the next, the sum of the row is `total[j] - free[j] * s`.
        last = ((total - free * point >= 0).sum(-1, keepdim=True) - 1).clamp_min(0)
        first, following = point.gather(-1, last), point.gather(-1, (last + 1).clamp_max(2 * k - 1))
        free, total = free.gather(-1, last), total.gather(-1, last)
        # If no entry decreases between the two breakpoints, the sum is constant there. It is zero, or it is positive
        # and jumps to a negative value at the second breakpoint.
        zero = total <= 64 * torch.finfo(slope.dtype).eps * all_others
        s = torch.where(free > 0, total / free, torch.where(zero, (first + following) / 2, following))
        return s.maximum(first).minimum(following)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return numerator.sum(-1, keepdim=True) / denominator.sum(-1, keepdim=True)
