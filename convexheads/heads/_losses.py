"""The losses of heads that are solved in their weights, as functions of the scores.

The Hessian of each loss with respect to the scores of an example is `diag(h)`, or `diag(h) - h h'` if the loss couples
the classes. It is kept as h, which is called the curvature.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


class LossValues(NamedTuple):
    """The losses of examples, and their derivatives with respect to the scores."""

    value: Float[Tensor, "*tasks n"]
    slope: Float[Tensor, "*tasks n k"]
    """The gradient, without cancellation where an example is fitted well."""
    curvature: Float[Tensor, "*tasks n k"]
    """The h of the Hessian."""


class Loss(ABC):
    """A convex loss of scores `(tasks, n, k)` for targets of the same shape; all methods are differentiable."""

    is_coupled: ClassVar[bool]
    """Whether the loss couples the classes, and depends only on the differences between their scores."""
    has_active_set: ClassVar[bool] = False
    """Whether only some examples, the active ones, have a curvature, and it is the same for all of them."""

    @abstractmethod
    def evaluate(self, targets: Tensor, scores: Tensor) -> LossValues:
        """The losses and their derivatives."""

    def apply_hessian(self, curvature: Tensor, scores: Tensor) -> Float[Tensor, "*tasks n k"]:
        """The Hessian times `scores`."""
        image = curvature * scores
        return image - curvature * image.sum(-1, keepdim=True) if self.is_coupled else image

    @abstractmethod
    def balance(
        self, scores: Tensor, found: LossValues, sample_weight: Tensor
    ) -> tuple[Float[Tensor, "*tasks n k"], Float[Tensor, "*tasks"]]:
        """Change the slopes so that their weighted sum over the examples is zero, as a dual with an intercept requires.

        Returns the change, and how much it adds to the duality gap.
        """


class CrossEntropy(Loss):
    """The cross-entropy of a softmax. The curvature is the vector of probabilities."""

    is_coupled = True

    def evaluate(self, targets: Tensor, scores: Tensor) -> LossValues:
        # Where examples are fitted almost perfectly, losses are tiny. The probabilities of the wrong classes, from
        # which all of this is computed, keep full precision.
        p = scores.softmax(-1)
        wrong = p.masked_fill(targets > 0, 0)
        slope = wrong - targets * wrong.sum(-1, keepdim=True)
        margins = scores - (targets * scores).sum(-1, keepdim=True)
        log_wrong = margins.masked_fill(targets > 0, -torch.inf).logsumexp(-1)
        return LossValues(-functional.logsigmoid(-log_wrong), slope, p)

    def balance(self, scores: Tensor, found: LossValues, sample_weight: Tensor) -> tuple[Tensor, Tensor]:
        # Classes with too much probability lose the same fraction of it in each example, and the others receive it.
        p, weight = found.curvature, sample_weight.unsqueeze(-1)
        excess = (weight * found.slope).sum(-2, keepdim=True)
        too_much = excess.clamp_min(0)
        fraction = _divide(too_much, (weight * p).sum(-2, keepdim=True))
        received = (fraction * p).sum(-1, keepdim=True) * _divide(-excess.clamp_max(0), too_much.sum(-1, keepdim=True))
        change = received - fraction * p
        return change, (weight * divergence(p, scores.log_softmax(-1), change)).sum((-2, -1))


class OneVsRestLoss(Loss):
    """A loss of each class against all others, which depends on the score of that class alone."""

    is_coupled = False

    @staticmethod
    def signs(targets: Tensor) -> Tensor:
        """1 for the examples of each class, and -1 for the others."""
        return 2 * targets - 1


class SigmoidLoss(OneVsRestLoss):
    """The cross-entropy of a sigmoid for each class."""

    def evaluate(self, targets: Tensor, scores: Tensor) -> LossValues:
        signs = self.signs(targets)
        wrong, right = (-signs * scores).sigmoid(), (signs * scores).sigmoid()
        return LossValues(-functional.logsigmoid(signs * scores).sum(-1), -signs * wrong, wrong * right)

    def balance(self, scores: Tensor, found: LossValues, sample_weight: Tensor) -> tuple[Tensor, Tensor]:
        p, other, weight = scores.sigmoid(), (-scores).sigmoid(), sample_weight.unsqueeze(-1)
        excess = (weight * found.slope).sum(-2, keepdim=True)
        lost = _divide(excess.clamp_min(0), (weight * p).sum(-2, keepdim=True)) * p
        received = _divide(-excess.clamp_max(0), (weight * other).sum(-2, keepdim=True)) * other
        change = received - lost
        logs = functional.logsigmoid(scores), functional.logsigmoid(-scores)
        lost_terms = divergence(p, logs[0], change) + divergence(other, logs[1], -change)
        return change, (weight * lost_terms).sum((-2, -1))


class SquaredHingeLoss(OneVsRestLoss):
    """The squared hinge `max(0, 1 - sign * score)^2` of each class. Its second derivative has a jump at zero slack."""

    has_active_set = True

    def evaluate(self, targets: Tensor, scores: Tensor) -> LossValues:
        signs = self.signs(targets)
        slack = (1 - signs * scores).clamp_min(0)
        return LossValues(slack.square().sum(-1), -2 * signs * slack, 2 * (slack > 0).to(scores.dtype))

    def balance(self, scores: Tensor, found: LossValues, sample_weight: Tensor) -> tuple[Tensor, Tensor]:
        # On the side with the larger sum, all multipliers lose the same fraction.
        slope, weight = found.slope, sample_weight.unsqueeze(-1)
        excess = (weight * slope).sum(-2, keepdim=True)
        side = slope * (slope * excess > 0)
        change = -_divide(excess, (weight * side).sum(-2, keepdim=True)) * side
        return change, (weight * change.square() / 4).sum((-2, -1))


LOSSES: dict[str, Loss] = {
    "cross-entropy": CrossEntropy(),
    "sigmoid": SigmoidLoss(),
    "squared hinge": SquaredHingeLoss(),
}
"""The losses by the names that operators receive."""


def _divide(part: Tensor, whole: Tensor) -> Tensor:
    """The quotient; where the whole is zero, the part is a rounding error."""
    return part / whole.where(whole != 0, 1)


def divergence(p: Tensor, log_p: Tensor, change: Tensor) -> Tensor:
    """The quantity `q log(q / p) - q + p` for `q = p + change`, entry by entry, without cancellation.

    The logarithm is an argument, because p may be too small for a number.
    """
    q, is_tiny = p + change, p < 1e-290
    ratio = (change / p.masked_fill(is_tiny, 1)).clamp_min(-1)
    value = torch.where(is_tiny, torch.special.xlogy(q, q) - q * log_p, q * torch.log1p(ratio)) - change
    return value.where(q > 0, -change)
