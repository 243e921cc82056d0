"""Another basis of the weights, in which conjugate gradients take fewer iterations."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from convexheads.heads._primal.problem import Problem
from convexheads.heads._sharing import multiply

# Up to this ratio of the largest eigenvalue of the second moments to the penalty, columns take longer to find than they
# save, unless the number of features per example is above the second value.
_WELL_CONDITIONED, _MANY_FEATURES = 30, 4
# Multiplications by the second moments, after which the estimate of the largest eigenvalue is good enough.
_POWER_ITERATIONS = 4


class Basis(NamedTuple):
    """Features are centered if there is an intercept, which makes up for it. Without an intercept, they stay.

    If there are `columns`, they are orthonormal, span the features, and make their second moments diagonal.
    """

    columns: Tensor | None  # (groups, 1, d, r); without the row of the intercept
    mean: Tensor | None  # (groups, 1, d, 1)

    @classmethod
    def of(cls, problem: Problem) -> Basis:
        """The basis that suits a problem: without columns if all penalties make the problem well conditioned."""
        features, mean = problem.features, None
        if problem.intercept:
            features = features[..., :-1]
            mean = features.mean(-2).unsqueeze(-1)
            features = features - mean.mT
        n, d = features.shape[-2:]
        if d <= _MANY_FEATURES * n:
            size = _largest_eigenvalue(features) * problem.sample_weight.amax((-2, -1))
            if (size <= _WELL_CONDITIONED * problem.penalty.amin(-1)).all():
                return cls(None, mean)
        if n >= d:
            columns = torch.linalg.eigh(features.mT @ features).eigenvectors
        else:
            columns, triangle = torch.linalg.qr(features.mT)
            columns = columns @ torch.linalg.eigh(triangle @ triangle.mT).eigenvectors
        return cls(columns, mean)

    def change(self, features: Tensor) -> Tensor:
        """The features in this basis."""
        if self.mean is None:
            return features if self.columns is None else features @ self.columns
        centered = features[..., :-1] - self.mean.mT
        outer = centered if self.columns is None else centered @ self.columns
        return torch.cat([outer, features[..., -1:]], -1)

    def leave(self, inside: Tensor) -> Tensor:
        """The weights `(..., d, k)`, given those `inside` the basis, `(..., r, k)`."""
        if self.mean is None:
            return self._leave_columns(inside)
        outer, bias = self._leave_columns(inside[..., :-1, :]), inside[..., -1:, :]
        return torch.cat([outer, bias - multiply(self.mean.mT, outer)], -2)

    def enter(self, weight: Tensor) -> Tensor:
        """The inverse of `leave`, for weights in the space of the features."""
        if self.mean is None:
            return self._enter_columns(weight)
        outer, bias = weight[..., :-1, :], weight[..., -1:, :]
        return torch.cat([self._enter_columns(outer), bias + multiply(self.mean.mT, outer)], -2)

    def solve(self, solve_inside: Callable[[Tensor], Tensor], right: Tensor, penalty: Tensor) -> Tensor:
        """The inverse of a Hessian applied to `right`, `(..., d, k)`; `solve_inside` does so in this basis.

        Outside of the space of the features, the Hessian is the penalty.
        """
        if self.mean is None:
            outer, inside = right, self._enter_columns(right)
            found = self.leave(solve_inside(inside))
        else:
            outer, sums = right[..., :-1, :] - self.mean * right[..., -1:, :], right[..., -1:, :]
            inside = self._enter_columns(outer)
            found = self.leave(solve_inside(torch.cat([inside, sums], -2)))
        if self.columns is None:
            return found
        outside = (outer - self._leave_columns(inside)) / penalty[..., None, None]
        return found + (outside if self.mean is None else torch.cat([outside, -self.mean.mT @ outside], -2))

    def _leave_columns(self, inside: Tensor) -> Tensor:
        return inside if self.columns is None else multiply(self.columns, inside)

    def _enter_columns(self, weight: Tensor) -> Tensor:
        return weight if self.columns is None else multiply(self.columns.mT, weight)

    def map(self, change: Callable[[Tensor], Tensor]) -> Basis:
        return Basis(*(None if part is None else change(part) for part in self))


def _largest_eigenvalue(features: Tensor) -> Tensor:
    """An estimate of that of the second moments of features `(groups, 1, n, d)`, for each group."""
    vector = torch.arange(features.shape[-1], dtype=features.dtype, device=features.device).cos().unsqueeze(-1)
    for _ in range(_POWER_ITERATIONS):
        vector = features.mT @ (features @ (vector / vector.norm(dim=-2, keepdim=True)))
    return vector.norm(dim=(-2, -1)).amax(-1)
