"""Evaluation of heads on many episodes of cached features, and calibration of their probabilities."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn
from torch.nn import functional

from convexheads._sampling import check_features, fit_episodes, track
from convexheads._validation import (
    ArrayLike,
    check_bool,
    check_positive_ints,
    describe,
    describe_shape,
    describe_type,
    is_dense,
)
from convexheads.errors import InputError
from convexheads.heads import ClassificationHead
from convexheads.hyperparameters import Learnable, as_tensor

_SCALE_BOUNDS = (1e-30, 1e30)  # well within what a `Learnable` can represent


class Difference(NamedTuple):
    """The mean difference between the accuracies of two evaluations, as `Evaluation.compare` returns it.

    Attributes:
        mean: Mean difference per episode, positive if the first evaluation is better.
        confidence_interval: Half-width of the 95% confidence interval of `mean`; NaN for a single episode.
    """

    mean: float
    confidence_interval: float

    def __str__(self) -> str:
        return f"{100 * self.mean:+.2f} ± {100 * self.confidence_interval:.2f}%"


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """Accuracies, calibration error and certificates over episodes, on the CPU, as `evaluate` returns them.

    Attributes:
        accuracies: Accuracy of each episode, in [0, 1], `(episodes,)`. A query with logits that are not finite
            counts as predicted to be class 0.
        expected_calibration_error: Mean distance between confidence and accuracy in 15 bins of equal width, in [0, 1],
            over all queries with finite logits (Guo et al. 2017). `calibrate` reduces it.
        gaps: Certified relative duality gap of each episode's fit, `(episodes,)`; None if its `solution` is None.
        converged: Whether each fit is certified to the solver's tolerance, `(episodes,)`; None as for `gaps`.
        sampling: The arguments of `evaluate` that determine the episodes, and a hash of the labels, by name.
    """

    accuracies: Float[Tensor, " episodes"]
    expected_calibration_error: float
    gaps: Float[Tensor, " episodes"] | None
    converged: Bool[Tensor, " episodes"] | None
    sampling: dict[str, int]

    @property
    def episodes(self) -> int:
        """Number of episodes."""
        return len(self.accuracies)

    @property
    def accuracy(self) -> float:
        """Mean accuracy, in [0, 1]."""
        return self.accuracies.mean().item()

    @property
    def confidence_interval(self) -> float:
        """Half-width of the 95% confidence interval of `accuracy`: 1.96 standard errors; NaN for a single episode."""
        return _half_width(self.accuracies)

    def compare(self, other: Evaluation) -> Difference:
        """Compare two heads or backbones on the same episodes: the accuracy of this evaluation minus that of `other`.

        Both need the same labels, and the same arguments of `evaluate` but `head`, `features` and `batch_size`. The
        confidence interval of the mean difference is usually much narrower than those of the two accuracies.

        Example:
            `print(evaluate(SVMHead(), features, labels).compare(evaluate(RidgeHead(), features, labels)))`
        """
        if not isinstance(other, Evaluation):
            raise InputError("other", "an Evaluation", describe(other))
        if different := [name for name, value in self.sampling.items() if value != other.sampling[name]]:
            raise InputError("other", "an evaluation of the same episodes", f"different {', '.join(different)}")
        differences = self.accuracies - other.accuracies
        return Difference(differences.mean().item(), _half_width(differences))

    def __repr__(self) -> str:
        return f"Evaluation({self})"

    def __str__(self) -> str:
        return f"{100 * self.accuracy:.2f} ± {100 * self.confidence_interval:.2f}% ({self.episodes} episodes)"


def _half_width(values: Tensor) -> float:
    return 1.96 * values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan


def evaluate(
    head: ClassificationHead,
    features: Float[Tensor, "examples d"] | ArrayLike,
    labels: Integer[Tensor, " examples"] | ArrayLike,
    *,
    ways: int = 5,
    shots: int = 5,
    queries: int = 15,
    episodes: int = 2000,
    batch_size: int = 50,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
) -> Evaluation:
    """Measure the accuracy of a head over random episodes of cached features.

    The episodes depend only on `labels`, the sizes and `seed`, so that `Evaluation.compare` can pair the accuracies of
    two heads or two backbones.

    Args:
        head: A classification head.
        features: One row per image, as `embed` returns them, `(examples, d)`; a tensor, a NumPy array or lists.
        labels: The class of each image, any integers, `(examples,)`; a tensor, a NumPy array or a list.
        ways: Number of classes per episode.
        shots: Number of support examples per class.
        queries: Number of query examples per class.
        episodes: Number of episodes.
        batch_size: Number of episodes that are solved at once. It affects only speed and memory.
        seed: Random seed.
        rank: Rank of this process, if several share the work; it evaluates every `world_size`-th episode.
        world_size: Number of processes.
        progress: Whether to show a progress bar, which needs tqdm.

    Raises:
        InputError: An argument is unusable: for example, a class has fewer than `shots + queries` examples.
        SolverError: An episode could not be solved and the head's solver has `on_failure="raise"`.

    Example:
        `print(evaluate(SVMHead(C=0.1), features, labels, ways=5, shots=1))`
    """
    sampling = {"ways": ways, "shots": shots, "queries": queries, "episodes": episodes, "seed": seed}
    sampling |= {"rank": rank, "world_size": world_size}
    features, labels = check_features(features, labels)
    confidences, correct, gaps, converged = [], [], [], []
    for fitted, logits, truth in fit_episodes(head, features, labels, sampling, batch_size, progress):
        confidences.append(logits.double().softmax(-1).amax(-1))
        correct.append(logits.argmax(-1).where(confidences[-1].isfinite(), 0) == truth)
        if fitted.solution is not None:
            gaps.append(fitted.solution.gap)
            converged.append(fitted.solution.converged)
    is_correct, confidence = torch.cat(correct), torch.cat(confidences)
    usable = confidence.isfinite()
    return Evaluation(
        is_correct.double().mean(-1).cpu(),
        _expected_calibration_error(confidence[usable], is_correct[usable]),
        torch.cat(gaps).cpu() if gaps else None,
        torch.cat(converged).cpu() if converged else None,
        sampling | {"labels": hash(tuple(labels.tolist()))},
    )


@torch.inference_mode(False)  # for the gradient of the cross-entropy
def calibrate(
    head: ClassificationHead,
    features: Float[Tensor, "examples d"] | ArrayLike,
    labels: Integer[Tensor, " examples"] | ArrayLike,
    *,
    ways: int = 5,
    shots: int = 5,
    queries: int = 15,
    episodes: int = 200,
    batch_size: int = 50,
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
    fits = fit_episodes(head, features, labels, sampling, batch_size, progress)
    scored = [(logits.double().flatten(0, 1), truth.flatten()) for _, logits, truth in fits]
    logits, truth = (torch.cat(batches) for batches in zip(*scored, strict=True))
    usable = logits.isfinite().all(-1)
    if not usable.any():
        raise InputError("head", "finite logits in at least one episode", "none")
    logits, truth = logits[usable], truth[usable]
    # The cross-entropy is convex in the factor. For logits divided by their spread, the best factor is around one.
    logits = logits - logits.mean(-1, keepdim=True)
    unit = logits.std(correction=0)
    unit = unit.where(unit > torch.finfo(unit.dtype).tiny, 1)  # equal logits leave the scale as it is
    factor = torch.ones((), dtype=logits.dtype, device=logits.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([factor], max_iter=100, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = functional.cross_entropy(factor * logits / unit, truth, label_smoothing=1 / (len(truth) + 2))
        value.backward()
        return value

    optimizer.step(loss)
    # If the factor is negative, the head predicts worse than chance, and every tiny scale is as good as any other.
    scale = (as_tensor(head.scale, unit) * (factor / unit)).clamp(*_SCALE_BOUNDS).item()
    device = head.scale.value.device if isinstance(head.scale, Learnable) else unit.device
    calibrated = copy.deepcopy(head)
    calibrated.scale = Learnable(scale).to(device).requires_grad_(False)
    return calibrated


def embed(backbone: nn.Module, images: Tensor, *, batch_size: int = 512, progress: bool = True) -> Tensor:
    """Compute the features of all images for `evaluate`, `(examples, d)`, in evaluation mode and without gradients.

    Args:
        backbone: The module from images to features, flattened to `(batch, d)`. The mode of each module is restored.
        images: Images of any dtype that the backbone accepts, `(examples, ...)`; the features are on their device.
        batch_size: Number of images per call to the backbone.
        progress: Whether to show a progress bar, which needs tqdm.

    Example:
        `features = embed(backbone, images)`
    """
    check_positive_ints(batch_size=batch_size)
    check_bool("progress", progress)
    if not isinstance(backbone, nn.Module):
        raise InputError("backbone", "a module", type(backbone).__name__)
    if not is_dense(images) or not images.ndim:
        raise InputError("images", "a tensor of images, (examples, ...)", describe_type(images))
    features, modes = [], {module: module.training for module in backbone.modules()}
    device = next(backbone.parameters(), images).device
    batches = images.split(min(batch_size, max(1, len(images))))
    backbone.eval()
    try:
        for batch in track(batches, f"embedding with {type(backbone).__name__}", progress):
            with torch.no_grad():
                found = backbone(batch.to(device))
            if not is_dense(found) or found.ndim < 2 or len(found) != len(batch):
                raise InputError("backbone", "features of each image, (batch, ...)", describe_shape(found))
            features.append(found.flatten(1).to(images.device))
    finally:
        for module, training in modes.items():
            module.training = training
    return torch.cat(features)


def _expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    indices = (confidence * bins).ceil().long().clamp(1, bins) - 1
    excess = torch.zeros(bins, dtype=confidence.dtype, device=confidence.device)
    return (excess.index_add(0, indices, confidence - correct.to(confidence.dtype)).abs().sum() / len(indices)).item()
