"""Temperature scaling and conformal prediction, from the logits of held-out examples of each task."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from convexheads._validation import check_real
from convexheads.errors import InputError

# Factors of logits, in units of their standard deviation, and the number of times that this interval is halved.
_FACTORS, _HALVINGS = (1e-15, 1e15), 60


def best_factor(
    logits: Float[Tensor, "*batch n k"], targets: Float[Tensor, "*batch n k"], used: Bool[Tensor, "*batch n"]
) -> Float[Tensor, "*batch"]:
    """The factor of the logits of each task with the best cross-entropy, over examples with finite logits.

    Targets are one-hot labels. With n examples they are smoothed by 1 / (n + 2) (Platt 1999), so that there is a
    minimum even if all predictions are right. The derivative of the cross-entropy increases with the factor, so that an
    interval around its zero is halved. Tasks without any spread of logits keep them.
    """
    used = used & logits.isfinite().all(-1)
    logits = logits.masked_fill(~used.unsqueeze(-1), 0)
    logits = logits - logits.mean(-1, keepdim=True)
    count, k = used.sum(-1), logits.shape[-1]
    unit = (logits.square().sum((-2, -1)) / (count * k).clamp_min(1)).sqrt()
    is_flat = unit <= torch.finfo(unit.dtype).tiny
    unit = unit.masked_fill(is_flat, 1)
    logits = logits / unit[..., None, None]
    smoothing = (1 / (count + 2).to(logits.dtype))[..., None, None]
    aim = (((1 - smoothing) * targets + smoothing / k) * logits).sum(-1)
    low, high = (torch.full_like(unit, math.log(bound)) for bound in _FACTORS)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        slope = ((middle.exp()[..., None, None] * logits).softmax(-1) * logits).sum(-1) - aim
        is_low = (slope * used).sum(-1) < 0
        low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
    return torch.where(is_flat, 1, high.exp() / unit)


def nonconformity(probabilities: Float[Tensor, "*batch n k"], targets: Float[Tensor, "*batch n k"]) -> Tensor:
    """One minus the probability of the label, `(*batch, n)`, the score of Sadinle et al. 2019."""
    return 1 - (probabilities * targets).sum(-1)


def conformal_threshold(
    scores: Float[Tensor, "*batch n"], used: Bool[Tensor, "*batch n"], coverage: float
) -> Float[Tensor, "*batch"]:
    """The score that at least the fraction `coverage` of further examples do not exceed (Vovk et al. 2005).

    It is the score of rank `ceil((n + 1) coverage)` of n examples, or infinity if n is too small.
    """
    coverage = check_real("coverage", coverage, positive=True)
    if coverage >= 1:
        raise InputError("coverage", "a number between 0 and 1", coverage)
    count = used.sum(-1)
    rank = ((count + 1) * coverage).ceil().long()
    ordered = scores.masked_fill(~used, torch.inf).sort(-1).values
    ordered = torch.cat([ordered, torch.full_like(ordered[..., :1], torch.inf)], -1)
    return ordered.gather(-1, (rank - 1).clamp(0, ordered.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
