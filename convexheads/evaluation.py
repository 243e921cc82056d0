"""Evaluation of heads on many episodes of cached features."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from convexheads import _validation
from convexheads._sampling import Batch, check_features, fit_episodes, track
from convexheads._validation import ArrayLike
from convexheads.calibration import expected_calibration_error
from convexheads.errors import InputError
from convexheads.heads import ClassificationHead


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

    def __repr__(self) -> str:
        return f"Difference({self})"


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
        coverage: Fraction of the queries whose prediction set contains the right class, in [0, 1]; None without
            `calibrate`.
        set_size: Mean number of classes in the prediction sets; None without `calibrate`.
        sampling: The arguments of `evaluate` that determine the episodes, and a hash of the labels, by name.
    """

    accuracies: Float[Tensor, " episodes"]
    expected_calibration_error: float
    gaps: Float[Tensor, " episodes"] | None
    converged: Bool[Tensor, " episodes"] | None
    sampling: dict[str, int]
    coverage: float | None = None
    set_size: float | None = None

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
            raise InputError("other", "an Evaluation", _validation.describe(other))
        if different := [name for name, value in self.sampling.items() if value != other.sampling[name]]:
            raise InputError("other", "an evaluation of the same episodes", f"different {', '.join(different)}")
        differences = self.accuracies - other.accuracies
        return Difference(differences.mean().item(), _half_width(differences))

    def __repr__(self) -> str:
        return f"Evaluation({self})"

    def __str__(self) -> str:
        text = f"{100 * self.accuracy:.2f} ± {100 * self.confidence_interval:.2f}% ({self.episodes} episodes)"
        if self.coverage is None:
            return text
        sets = f"prediction sets of {self.set_size:.2f} classes contain the right one in {100 * self.coverage:.1f}%"
        return f"{text}, {sets}"


class Evaluations(dict[str, Evaluation]):
    """The evaluation of each of several heads on the same episodes, by name, as `evaluate` returns them.

    Printed, it is a table: accuracies with 95% confidence intervals, differences from the first head, paired by
    episode, with theirs, and expected calibration errors.

    Example:
        `print(evaluate({"SVM": SVMHead(), "ridge": RidgeHead()}, features, labels))`
    """

    def compare(self, reference: str | None = None) -> dict[str, Difference]:
        """Compute the accuracy of each other head minus that of a reference, paired by episode.

        Args:
            reference: The name of the reference; by default, the first head.

        Raises:
            InputError: There is no such name.
        """
        name = next(iter(self)) if reference is None else reference
        if name not in self:
            raise InputError("reference", f"one of the names {list(self)}", repr(name))
        return {other: each.compare(self[name]) for other, each in self.items() if other != name}

    def __repr__(self) -> str:
        differences = self.compare()
        rows = [("", "accuracy (95%)", f"minus {next(iter(self))} (95%)" if differences else "", "calibration error")]
        for name, each in self.items():
            accuracy = f"{100 * each.accuracy:.2f} ± {100 * each.confidence_interval:.2f}%"
            error = f"{100 * each.expected_calibration_error:.1f}%"
            rows.append((name, accuracy, str(differences.get(name, "")), error))
        left, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
        lines = [
            "  ".join([row[0].ljust(left), *(cell.rjust(width) for cell, width in zip(row[1:], others, strict=True))])
            for row in rows
        ]
        return "\n".join(lines)


def _half_width(values: Tensor) -> float:
    return 1.96 * values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan


@overload
def evaluate(
    head: ClassificationHead,
    features: Tensor | ArrayLike,
    labels: Tensor | ArrayLike,
    *,
    ways: int = ...,
    shots: int = ...,
    queries: int = ...,
    episodes: int = ...,
    batch_size: int = ...,
    seed: int = ...,
    rank: int = ...,
    world_size: int = ...,
    calibrate: str | None = ...,
    coverage: float = ...,
    progress: bool = ...,
) -> Evaluation: ...
@overload
def evaluate(
    head: Mapping[str, ClassificationHead] | Sequence[ClassificationHead],
    features: Tensor | ArrayLike,
    labels: Tensor | ArrayLike,
    *,
    ways: int = ...,
    shots: int = ...,
    queries: int = ...,
    episodes: int = ...,
    batch_size: int = ...,
    seed: int = ...,
    rank: int = ...,
    world_size: int = ...,
    calibrate: str | None = ...,
    coverage: float = ...,
    progress: bool = ...,
) -> Evaluations: ...
def evaluate(
    head: ClassificationHead | Mapping[str, ClassificationHead] | Sequence[ClassificationHead],
    features: Float[Tensor, "examples d"] | ArrayLike,
    labels: Integer[Tensor, " examples"] | ArrayLike,
    *,
    ways: int = 5,
    shots: int = 5,
    queries: int = 15,
    episodes: int = 2000,
    batch_size: int = 100,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    calibrate: str | None = None,
    coverage: float = 0.9,
    progress: bool = True,
) -> Evaluation | Evaluations:
    """Measure the accuracy of one or several heads over random episodes of cached features.

    The episodes depend only on `labels`, the sizes and `seed`, so that accuracies can be paired: those of several heads
    by `Evaluations.compare`, and those of two backbones by `Evaluation.compare`.

    On the CPU, batches of episodes with at most 128 examples are solved in as many threads as PyTorch has, so a head of
    your own must not keep a state.

    Args:
        head: A classification head, or several: a dictionary from names to heads, or a list, in which the name of a
            head is its `repr`.
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
        calibrate: "loo" to calibrate the probabilities of each episode on its own support set, without a validation
            set, and to report prediction sets (see `ClassificationHead.fit`). Defaults to None.
        coverage: With `calibrate`, the probability with which prediction sets should contain the right class.
        progress: Whether to show a progress bar, which needs tqdm.

    Returns:
        An `Evaluation` for one head; for several, `Evaluations`, a dictionary from names to an `Evaluation` each.

    Raises:
        InputError: An argument is unusable: for example, a class has fewer than `shots + queries` examples.
        SolverError: An episode could not be solved and the head's solver has `on_failure="raise"`.

    Example:
        `print(evaluate(SVMHead(C=0.1), features, labels, ways=5, shots=1))`
    """
    sampling = {"ways": ways, "shots": shots, "queries": queries, "episodes": episodes, "seed": seed}
    sampling |= {"rank": rank, "world_size": world_size}
    features, labels = check_features(features, labels)
    heads = _by_name(head)
    predictions = [_Predictions(coverage if calibrate else None, [], [], [], [], []) for _ in heads]
    fits = fit_episodes(list(heads.values()), features, labels, sampling, batch_size, progress, calibrate=calibrate)
    with closing(fits):
        for batch in fits:
            predictions[batch.head].add(batch)
    sampling["labels"] = hash(tuple(labels.tolist()))
    evaluations = Evaluations(zip(heads, (each.evaluation(sampling) for each in predictions), strict=True))
    return evaluations if isinstance(head, Mapping | Sequence) else next(iter(evaluations.values()))


def _by_name(head: Any) -> dict[str, Any]:
    """The heads by name, in the order of the argument of `evaluate`; each head is checked later."""
    if isinstance(head, Mapping):
        heads = dict(head)
    elif isinstance(head, Sequence) and not isinstance(head, str):
        heads = {repr(each): each for each in head}
    else:
        return {"": head}
    if not heads or len(heads) < len(head):
        raise InputError("head", "one or more different heads, or a dictionary from names to heads", repr(head))
    return heads


class _Predictions(NamedTuple):
    """What is kept of the fits of one head, batch by batch."""

    coverage: float | None
    sets: list[Tensor]
    confidences: list[Tensor]
    correct: list[Tensor]
    gaps: list[Tensor]
    converged: list[Tensor]

    def add(self, batch: Batch) -> None:
        fitted, logits, truth = batch.fitted, batch.logits.double(), batch.labels
        largest = logits.amax(-1, keepdim=True)
        # The largest probability. PyTorch's softmax over a few classes takes several times as long.
        confidence = (logits - largest).exp().sum(-1).reciprocal()
        self.confidences.append(confidence)
        self.correct.append(logits.argmax(-1).where(confidence.isfinite(), 0) == truth)
        if self.coverage is not None:
            sets = fitted.sets_of(logits, self.coverage)
            covered = sets.gather(-1, truth.unsqueeze(-1)).squeeze(-1)
            self.sets.append(torch.stack([covered.double(), sets.sum(-1).double()]).flatten(1))
        if fitted.solution is not None:
            self.gaps.append(fitted.solution.gap)
            self.converged.append(fitted.solution.converged)

    def evaluation(self, sampling: dict[str, int]) -> Evaluation:
        is_correct, confidence = torch.cat(self.correct), torch.cat(self.confidences)
        usable = confidence.isfinite()
        return Evaluation(
            is_correct.double().mean(-1).cpu(),
            expected_calibration_error(confidence[usable], is_correct[usable]),
            torch.cat(self.gaps).cpu() if self.gaps else None,
            torch.cat(self.converged).cpu() if self.converged else None,
            sampling,
            *(torch.cat(self.sets, 1).mean(1).tolist() if self.sets else (None, None)),
        )


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
    _validation.check_positive_ints(batch_size=batch_size)
    _validation.check_bool("progress", progress)
    if not isinstance(backbone, nn.Module):
        raise InputError("backbone", "a module", type(backbone).__name__)
    if not _validation.is_dense(images) or not images.ndim:
        raise InputError("images", "a tensor of images, (examples, ...)", _validation.describe_type(images))
    features, modes = [], {module: module.training for module in backbone.modules()}
    device = next(backbone.parameters(), images).device
    batches = images.split(min(batch_size, max(1, len(images))))
    backbone.eval()
    try:
        for batch in track(batches, f"embedding with {type(backbone).__name__}", progress):
            with torch.no_grad():
                found = backbone(batch.to(device))
            if not _validation.is_dense(found) or found.ndim < 2 or len(found) != len(batch):
                raise InputError("backbone", "features of each image, (batch, ...)", _validation.describe_shape(found))
            features.append(found.flatten(1).to(images.device))
    finally:
        for module, training in modes.items():
            module.training = training
    return torch.cat(features)
