"""Calibration: whether probabilities match frequencies, and the scale of a head's logits with which they do."""

from __future__ import annotations

import copy
from contextlib import closing

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor
from torch.nn import functional

from convexheads._sampling import check_features, fit_episodes
from convexheads._validation import ArrayLike
from convexheads.errors import InputError
from convexheads.heads import ClassificationHead
from convexheads.heads.base.temperature import best_factor
from convexheads.hyperparameters import Learnable, as_tensor

_SCALE_BOUNDS = (1e-30, 1e30)  # well within what a `Learnable` can represent


@torch.inference_mode(False)  # so that the new scale is an ordinary parameter
def calibrate(
    head: ClassificationHead,
    features: Float[Tensor, "examples d"] | ArrayLike,
    labels: Integer[Tensor, " examples"] | ArrayLike,
    *,
    ways: int = 5,
    shots: int = 5,
    queries: int = 15,
    episodes: int = 200,
    batch_size: int = 100,
    seed: int = 0,
    progress: bool = True,
) -> ClassificationHead:
    """Return a copy of a head whose `scale` gives the best probabilities on held-out episodes (temperature scaling).

    The temperature minimizes the cross-entropy over all queries with finite logits (Guo et al. 2017, Section 4.2). With
    n queries, labels are smoothed by 1 / (n + 2), as in Platt 1999, so that there is a minimum even if no query is
    misclassified. The scale of the copy is the scale of the head divided by the temperature. It is a `Learnable` that
    does not require gradients: `state_dict` contains it, and training leaves it unchanged. Accuracies stay the same.

    Use it when probabilities matter, and not only the predicted class.

    `head` itself is not modified. If its `solve` is your own, it must not use `self.scale`. The `features` and `labels`
    should be of classes that were held out from training. The best temperature depends on `shots`. `ways`, `queries`,
    `episodes`, `batch_size`, `seed`, `progress` and the errors are those of `evaluate`.

    Example:
        `head = calibrate(RidgeHead(), features, labels, shots=5)`, then
        `head.fit(support, support_labels).probabilities(query)`
    """
    sampling = {"ways": ways, "shots": shots, "queries": queries, "episodes": episodes, "seed": seed}
    features, labels = check_features(features, labels)
    title = f"calibrating {type(head).__name__}"
    with closing(fit_episodes([head], features, labels, sampling, batch_size, progress, title=title)) as fits:
        scored = [(batch.logits.double().flatten(0, 1), batch.labels.flatten()) for batch in fits]
    logits, truth = (torch.cat(batches) for batches in zip(*scored, strict=True))
    scale = best_scale(logits, truth, as_tensor(head.scale, logits))
    device = head.scale.value.device if isinstance(head.scale, Learnable) else logits.device
    calibrated = copy.deepcopy(head)
    calibrated.scale = Learnable(scale).to(device).requires_grad_(False)
    return calibrated


def best_scale(
    logits: Float[Tensor, "examples k"], labels: Integer[Tensor, " examples"], scale: float | Tensor = 1.0
) -> float:
    """Find the scale with which the softmax of logits has the best cross-entropy, as `calibrate` does on episodes.

    Use it when you have logits of examples that were held out from the fit.

    Args:
        logits: Logits of held-out examples, `(examples, k)`, on any device. Rows with infinite values or NaN are left
            out.
        labels: Their labels, from 0 to k - 1, `(examples,)`.
        scale: The scale with which the logits were computed, positive.

    Raises:
        InputError: No example has finite logits.

    Example:
        `head.scale *= best_scale(head.fit(support, labels)(query), query_labels)`
    """
    usable = logits.isfinite().all(-1)
    if not usable.any():
        raise InputError("logits", "a row of finite values", f"none in {len(logits)} rows")
    targets = functional.one_hot(labels.long(), logits.shape[-1]).to(logits.dtype)
    return (scale * best_factor(logits, targets, usable)).clamp(*_SCALE_BOUNDS).item()


def expected_calibration_error(
    confidence: Float[Tensor, " examples"], correct: Bool[Tensor, " examples"], *, bins: int = 15
) -> float:
    """Compute the mean distance between confidence and accuracy in bins of equal width (Guo et al. 2017).

    Use it when you want to know how far probabilities are from frequencies; `evaluate` reports it.

    Args:
        confidence: The largest probability of each example, `(examples,)`.
        correct: Whether the prediction of each example is right, `(examples,)`.
        bins: Number of bins.

    Example:
        `expected_calibration_error(probabilities.amax(-1), probabilities.argmax(-1) == labels)`
    """
    indices = (confidence * bins).ceil().long().clamp(1, bins) - 1
    excess = torch.zeros(bins, dtype=confidence.dtype, device=confidence.device)
    return (excess.index_add(0, indices, confidence - correct.to(confidence.dtype)).abs().sum() / len(indices)).item()
