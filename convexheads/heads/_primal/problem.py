"""The problem in the weights, a point of it with its certificate, and which tasks an iteration goes on with.

Tasks come in groups that share their features, such as those of a grid of penalties: the tensors here begin with the
dimensions of groups and of their members. A group is one matrix product, which is faster than a product per task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from convexheads.heads._logistic_newton import TINY_GAP
from convexheads.heads._losses import Loss
from convexheads.heads._sharing import is_shared, multiply

# The damping of the intercept, relative to the weights of the examples times the gap.
DAMPING = 1e-8
# An iteration goes on without the finished tasks once the others are at most this fraction.
_FRACTION_TO_CONTINUE = 0.75


@dataclass(frozen=True, eq=False, repr=False)
class Problem:
    """The data of groups of tasks. What all members share has one member."""

    features: Float[Tensor, "groups 1 n d"]
    targets: Float[Tensor, "groups _ n k"]
    sample_weight: Float[Tensor, "groups _ n"]
    offset: Float[Tensor, "groups _ n k"]
    penalty: Float[Tensor, "groups members"]
    loss: Loss
    intercept: bool
    damping: Float[Tensor, "groups members"] | None = None
    """The number that is added to the curvature of the intercept, which is zero where all losses are flat."""

    def scores(self, weight: Tensor) -> Float[Tensor, "groups members n k"]:
        return multiply(self.features, weight) + self.offset

    def moments(self, values: Tensor) -> Float[Tensor, "groups members d k"]:
        """The sums over the examples of their features times `values`, weighted by `sample_weight`."""
        return multiply(self.features.mT, self.sample_weight.unsqueeze(-1) * values)

    def penalties(self) -> Float[Tensor, "groups members d 1"]:
        """The penalty of each row of the weights: zero for the intercept."""
        d = self.features.shape[-1]
        rows = self.penalty[..., None, None].expand(*self.penalty.shape, d, 1)
        if not self.intercept:
            return rows
        last = torch.zeros_like(rows[..., :1, :]) if self.damping is None else self.damping[..., None, None]
        return torch.cat([rows[..., :-1, :], last], -2)

    def damped(self, gap: Tensor) -> Problem:
        """The problem with the damping of a Newton step, which is proportional to the gap."""
        if not self.intercept:
            return self
        total = self.sample_weight.sum(-1).expand(gap.shape)
        return replace(self, damping=DAMPING * gap.clamp(0, 1) * total)

    def map(self, change: Callable[[Tensor], Tensor]) -> Problem:
        changed = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **changed)


@dataclass(frozen=True, eq=False, repr=False)
class Point:
    """Weights `(groups, members, d, k)`; the objective, its derivatives and the certificate there.

    The certificate is the relative duality gap, and a bound of this gap and of the squared relative error of the
    weights.
    """

    weight: Tensor
    value: Tensor
    curvature: Tensor
    gradient: Tensor
    gap: Tensor
    error: Tensor

    def is_solved(self, tolerance: float) -> Tensor:
        """Whether the error is at most `tolerance`, or the weights are zero."""
        return (self.error <= tolerance) | (self.gap <= TINY_GAP)

    def map(self, change: Callable[[Tensor], Tensor]) -> Point:
        return Point(*map(change, vars(self).values()))


def evaluate(problem: Problem, weight: Tensor) -> Point:
    """The point at these weights, with its certificate.

    The slopes of the losses are dual coefficients. With them, the losses and their conjugates add up without a gap, and
    what remains is `|gradient|^2 / (2 penalty)`. With an intercept, the slopes have to be balanced first.
    """
    loss, targets, penalty = problem.loss, problem.targets, problem.penalty
    scores, penalized = problem.scores(weight), problem.penalties() * weight
    found = loss.evaluate(targets, scores)
    quadratic = (penalized * weight).sum((-2, -1))
    value = quadratic / 2 + (problem.sample_weight * found.value).sum(-1)
    gradient = penalized + problem.moments(found.slope)
    if problem.intercept:
        change, lost = loss.balance(scores, found, problem.sample_weight)
        balanced = gradient + problem.moments(change)
        gap = lost + balanced[..., :-1, :].square().sum((-2, -1)) / (2 * penalty)
    else:
        gap = gradient.square().sum((-2, -1)) / (2 * penalty)
    tiny = torch.finfo(gap.dtype).tiny
    bounds = gap / value.clamp_min(tiny), 2 * gap / quadratic.clamp_min(tiny)
    return Point(weight, value, found.curvature, gradient, *bounds)


def centered(weight: Tensor, loss: Loss) -> Tensor:
    """Weights `(..., d, k)` without their mean over the classes, on which coupled losses do not depend."""
    return weight - weight.mean(-1, keepdim=True) if loss.is_coupled else weight


def group_members(value: Tensor, groups: int, dims: int) -> Tensor:
    """Turn the first dimensions, of which `groups` index groups of tasks, into two, of groups and of their members."""
    if groups < dims and is_shared(value, range(groups, dims)):
        value = value[(slice(None),) * groups + (slice(1),) * (dims - groups)]
    shape = value.shape
    return value.reshape(math.prod(shape[:groups]), math.prod(shape[groups:dims]), *shape[dims:])


class Remaining:
    """Which tasks an iteration goes on with. Without members, groups are selected, and otherwise members."""

    def __init__(self, shape: Sequence[int], device: torch.device) -> None:
        self._dim = int(shape[1] > 1)
        self.places = torch.arange(shape[self._dim], device=device)

    def needed(self, active: Tensor) -> Tensor | None:
        """The indices to go on with, given which tasks are `active`; None if it is not worth while to select."""
        kept = active.any(1 - self._dim).nonzero().squeeze(-1)
        return kept if len(kept) <= _FRACTION_TO_CONTINUE * len(self.places) else None

    def choose(self, kept: Tensor) -> Callable[[Tensor], Tensor]:
        """A function that selects of a tensor what is to be `kept`."""
        count = len(self.places)

        def change(value: Tensor) -> Tensor:
            return value.index_select(self._dim, kept) if value.shape[self._dim] == count else value

        return change

    def store(self, value: Tensor, target: Tensor) -> None:
        """Write the results of the current tasks to their places."""
        target.index_copy_(self._dim, self.places, value)
