"""Episodes: splitting tasks into support and query, and evaluating heads over many of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn
from torch.nn import functional

from convexheads._validation import (
    check_bool,
    check_finite,
    check_positive_ints,
    check_seed,
    describe_type,
    is_dense,
    is_float_tensor,
    is_integer_tensor,
)
from convexheads.errors import InputError
from convexheads.heads import ClassificationHead, FittedClassifier
from convexheads.hyperparameters import as_tensor


class Episode(NamedTuple):
    """A task's examples to fit on and to score; any leading dimensions. `split_task` makes it.

    Attributes:
        support: images or features to fit on, `(*batch, n, ...)`.
        support_labels: theirs, `(*batch, n)`.
        query: images or features to score, `(*batch, q, ...)`.
        query_labels: theirs, `(*batch, q)`.
    """

    support: Tensor
    support_labels: Tensor
    query: Tensor
    query_labels: Tensor


@dataclass(frozen=True)
class Evaluation:
    """Accuracies over episodes, and how far the head's probabilities can be trusted. `evaluate` makes it.

    Attributes:
        accuracies: of each episode, in 0..1, `(episodes,)`.
        calibration_error: expected calibration error of the probabilities over all queries of all episodes, in 0..1:
            the mean distance between confidence and accuracy in 15 bins of confidence of equal width (Guo et al. 2017).
            `calibrate` makes it small.
        gaps: certified relative duality gap of each episode's fit, `(episodes,)`; None for a closed form.
        converged: which episodes' fits are certified to the solver's tolerance, `(episodes,)`; None for a closed form.
    """

    accuracies: Float[Tensor, " episodes"]
    calibration_error: float
    gaps: Float[Tensor, " episodes"] | None
    converged: Bool[Tensor, " episodes"] | None

    @property
    def episodes(self) -> int:
        """Number of episodes."""
        return len(self.accuracies)

    @property
    def mean(self) -> float:
        """Mean accuracy, in 0..1."""
        return self.accuracies.mean().item()

    @property
    def interval(self) -> float:
        """Half width of the 95 % confidence interval of the mean: 1.96 standard errors; NaN for one episode."""
        return 1.96 * self.accuracies.std().item() / math.sqrt(self.episodes) if self.episodes > 1 else math.nan

    def __str__(self) -> str:
        return f"{100 * self.mean:.2f} ± {100 * self.interval:.2f} % ({self.episodes} episodes)"


def split_task(data: Tensor, labels: Integer[Tensor, "*batch n"], *, shots: int) -> Episode:
    """Split a task, as learn2learn's tasksets give it, into support and query.

    The first `shots` examples of each class, in the order they stand in, are the support; the others are the query.

    Args:
        data: images or features, `(*batch, n, ...)`.
        labels: integers in any order, `(*batch, n)`.
        shots: support examples per class, at least 1.

    Returns:
        Support and query with their labels, leading dimensions kept. Labels are not renumbered.

    Raises:
        InputError: `shots` is not positive, data or labels are no tensors, there is no task, the shapes don't go
            together, a class has no example left for the query, or the tasks of the batch differ in their number of
            classes.

    Example:
        `episode = split_task(*taskset.sample(), shots=5)`
    """
    check_positive_ints(shots=shots)
    if not is_dense(data):
        raise InputError("data", "a tensor of images or features", describe_type(data))
    if not is_integer_tensor(labels):
        raise InputError("labels", "a tensor of integers", describe_type(labels))
    if data.shape[: labels.ndim] != labels.shape or labels.ndim < 1:
        raise InputError(
            "data", f"the leading dimensions of labels, {tuple(labels.shape)}", f"shape {tuple(data.shape)}"
        )
    batch, n = labels.shape[:-1], labels.shape[-1]
    rows, flat = labels.reshape(batch.numel(), n), data.reshape(batch.numel(), *data.shape[labels.ndim - 1 :])
    if not len(rows):
        raise InputError("labels", "one task at least", f"shape {tuple(labels.shape)}")
    same = rows.long().unsqueeze(-1) == rows.long().unsqueeze(-2)
    short = same.sum(-1) <= min(shots, n)
    if short.any():
        task, example = short.nonzero()[0].tolist()
        count, label = int(same[task, example].sum()), int(rows[task, example])
        raise InputError("labels", f"more than shots={shots}", f"{count} examples of class {label} in task {task}")
    in_support = same.tril(-1).sum(-1) < min(shots, n)
    sizes = in_support.sum(-1)
    if (sizes != sizes[0]).any():
        raise InputError(
            "labels", "the same number in every task of a batch", "tasks with different numbers of classes"
        )
    order = (~in_support).to(torch.uint8).argsort(dim=-1, stable=True)
    task = torch.arange(len(rows), device=order.device).unsqueeze(-1)

    def part(chosen: Tensor) -> tuple[Tensor, Tensor]:
        values, classes = flat[task, chosen], rows[task, chosen]
        return values.reshape(*batch, *values.shape[1:]), classes.reshape(*batch, -1)

    size = int(sizes[0])
    return Episode(*part(order[:, :size]), *part(order[:, size:]))


def evaluate(
    head: ClassificationHead,
    features: Float[Tensor, "examples d"],
    labels: Integer[Tensor, " examples"],
    *,
    ways: int = 5,
    shots: int = 5,
    queries: int = 15,
    episodes: int = 2000,
    batch_size: int = 50,
    seed: int = 0,
    part: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> Evaluation:
    """Accuracy of a head over random episodes of cached features.

    The episodes depend on `labels`, the sizes and `seed` only: two heads, or two backbones, evaluated with the same
    seed see the same ones, so their accuracies can be compared in pairs.

    Args:
        head: any classification head.
        features: one row per image, such as `embed` returns, `(examples, d)`.
        labels: the class of each, any integers, `(examples,)`.
        ways: classes per episode. Default 5.
        shots: support examples per class. Default 5.
        queries: query examples per class. Default 15.
        episodes: how many. Default 2,000.
        batch_size: episodes solved at once; changes the speed only. Default 50.
        seed: of the draw. Default 0.
        part: `(rank, processes)`: every `processes`-th of the episodes, from the one of that rank on, where several
            processes share the work. Default: all of them.
        progress: show a bar (where tqdm is installed). Default True.

    Returns:
        Accuracies, calibration error and certificates, on the CPU.

    Raises:
        InputError: no classification head, or unusable features, labels or sizes: too few classes, say, or a class with
            fewer than `shots + queries` examples.
        SolverError: an episode could not be solved and the head's solver has `on_failure="raise"`.
    """
    accuracies, confidences, correct, gaps, converged = [], [], [], [], []
    episodes_of = _Episodes(features, labels, ways, shots, queries, episodes, batch_size, seed, part)
    for fitted, logits, truth in episodes_of.fits(head, f"{ways}-way {shots}-shot", progress):
        confidence, guess = logits.double().softmax(-1).max(-1)
        correct.append(guess == truth)
        accuracies.append(correct[-1].double().mean(-1))
        confidences.append(confidence)
        if fitted.solution is not None:
            gaps.append(fitted.solution.gap)
            converged.append(fitted.solution.converged)
    return Evaluation(
        torch.cat(accuracies).cpu(),
        _calibration_error(torch.cat(confidences).flatten(), torch.cat(correct).flatten()),
        torch.cat(gaps).cpu() if gaps else None,
        torch.cat(converged).cpu() if converged else None,
    )


def calibrate(
    head: ClassificationHead,
    features: Float[Tensor, "examples d"],
    labels: Integer[Tensor, " examples"],
    *,
    ways: int = 5,
    shots: int = 5,
    queries: int = 15,
    episodes: int = 200,
    batch_size: int = 50,
    seed: int = 0,
    progress: bool = True,
) -> ClassificationHead:
    """A copy of a head whose `scale` gives the best probabilities on held-out episodes (temperature scaling).

    The temperature, one positive number, minimises the cross-entropy over all queries of all episodes (Guo et al.
    2017, Section 4.2); the copy's scale is the head's divided by it, a number, even where the head's is `Learnable`.
    Accuracies don't change.

    Args:
        head: any classification head whose scores grow with `scale`. It is left as it is.
        features: one row per image of classes held out from training, such as `embed` returns, `(examples, d)`.
        labels: the class of each, any integers, `(examples,)`.
        ways: classes per episode. Default 5.
        shots: support examples per class; the best temperature depends on it. Default 5.
        queries: query examples per class. Default 15.
        episodes: how many. Default 200.
        batch_size: episodes solved at once; changes the speed only. Default 50.
        seed: of the draw. Default 0.
        progress: show a bar (where tqdm is installed). Default True.

    Returns:
        The copy.

    Raises:
        InputError: no classification head, or unusable features, labels or sizes: too few classes, say, or a class with
            fewer than `shots + queries` examples.
        SolverError: an episode could not be solved and the head's solver has `on_failure="raise"`.
    """
    episodes_of = _Episodes(features, labels, ways, shots, queries, episodes, batch_size, seed)
    scored = [(logits, truth) for _, logits, truth in episodes_of.fits(head, "calibrating", progress)]
    logits = torch.cat([scores.double().flatten(0, -2) for scores, _ in scored])
    truth = torch.cat([truth.expand(scores.shape[:-1]).flatten() for scores, truth in scored])
    # The cross-entropy is convex in the factor; relative to the spread of the logits, that is a number around one.
    logits = logits - logits.mean(-1, keepdim=True)
    unit = logits.std().clamp_min(torch.finfo(logits.dtype).tiny)
    factor = torch.ones((), dtype=logits.dtype, device=logits.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([factor], max_iter=100, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = functional.cross_entropy(factor * logits / unit, truth)
        value.backward()
        return value

    optimizer.step(loss)
    calibrated = copy.deepcopy(head)
    scale = as_tensor(head.scale, unit).item() * (factor / unit).item()
    del calibrated.scale
    calibrated.scale = scale
    return calibrated


def embed(backbone: nn.Module, images: Tensor, *, batch_size: int = 512, progress: bool = True) -> Tensor:
    """Features of all images, for `evaluate`: in evaluation mode, without gradient, the backbone's mode restored.

    Args:
        backbone: maps a batch of images to features; what it returns is flattened to `(batch, d)`.
        images: `(examples, ...)`, of any dtype that the backbone takes.
        batch_size: images at once. Default 512.
        progress: show a bar (where tqdm is installed). Default True.

    Returns:
        `(examples, d)`, on the images' device.

    Raises:
        InputError: no module, no tensor of images, an unusable size, or a result that is no row for each image.
    """
    check_positive_ints(batch_size=batch_size)
    check_bool("progress", progress)
    if not isinstance(backbone, nn.Module):
        raise InputError("backbone", "a module", type(backbone).__name__)
    if not is_dense(images) or not images.ndim:
        raise InputError("images", "a tensor of images, (examples, ...)", describe_type(images))
    training = backbone.training
    parameter = next(backbone.parameters(), images)
    backbone.eval()
    features = []
    try:
        with torch.no_grad(), _bar(len(images), "embedding", progress) as bar:
            for batch in images.split(min(batch_size, max(1, len(images)))):
                found = backbone(batch.to(parameter.device))
                if not is_dense(found) or found.ndim < 2 or len(found) != len(batch):
                    got = (
                        f"a result of shape {tuple(found.shape)}" if isinstance(found, Tensor) else describe_type(found)
                    )
                    raise InputError("backbone", "features of each image, (batch, ...)", got)
                features.append(found.flatten(1).to(images.device))
                bar.update(len(batch))
    finally:
        backbone.train(training)
    return torch.cat(features)


def _draw(labels: Tensor, ways: int, per_class: int, episodes: int, seed: int) -> Iterator[Integer[Tensor, "ways m"]]:
    """Indices of the examples of each episode: classes and examples without replacement."""
    labels = labels.cpu().long()
    classes, counts = labels.unique(return_counts=True)
    if len(classes) < ways:
        raise InputError("labels", f"at least ways={ways}", f"{len(classes)} classes")
    if (counts < per_class).any():
        worst = int(counts.argmin())
        raise InputError(
            "labels",
            f"at least shots + queries = {per_class}",
            f"{counts[worst].item()} examples of class {classes[worst].item()}",
        )
    members = [(labels == label).nonzero().squeeze(-1) for label in classes]
    generator = torch.Generator().manual_seed(seed)

    def choose(count: int, among: int) -> Tensor:
        return torch.randperm(among, generator=generator)[:count]

    return (
        torch.stack([members[c][choose(per_class, len(members[c]))] for c in choose(ways, len(classes)).tolist()])
        for _ in range(episodes)
    )


@dataclass(frozen=True)
class _Episodes:
    """Random episodes of cached features."""

    features: Tensor
    labels: Tensor
    ways: int
    shots: int
    queries: int
    episodes: int
    batch_size: int
    seed: int
    part: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        names = ("ways", "shots", "queries", "episodes", "batch_size")
        check_positive_ints(**{name: getattr(self, name) for name in names})
        check_seed(self.seed)
        pair = isinstance(self.part, tuple) and [type(number) for number in self.part] == [int, int]
        if not pair or not 0 <= self.part[0] < min(self.part[1], self.episodes):
            raise InputError("part", f"(rank, processes) with rank < processes <= {self.episodes}", repr(self.part))
        for name, value, right, expected in (
            ("features", self.features, is_float_tensor, "floating-point"),
            ("labels", self.labels, is_integer_tensor, "integer"),
        ):
            if not right(value):
                raise InputError(name, f"a tensor of {expected} values", describe_type(value))
        if self.features.ndim != 2 or self.labels.shape != self.features.shape[:1]:
            got = f"shapes {tuple(self.features.shape)} and {tuple(self.labels.shape)}"
            raise InputError("features, labels", "(examples, d) and (examples,)", got)
        check_finite("features", self.features)

    def fits(
        self, head: ClassificationHead, title: str, progress: bool
    ) -> Iterator[tuple[FittedClassifier, Tensor, Tensor]]:
        """The head fitted on each batch of episodes, its logits and their labels, without gradient."""
        if not isinstance(head, ClassificationHead):
            raise InputError("head", "a classification head", type(head).__name__)
        check_bool("progress", progress)
        device, ways, shots = self.features.device, self.ways, self.shots
        rank, processes = self.part
        draws = _draw(self.labels, ways, shots + self.queries, self.episodes, self.seed)
        draws = islice(draws, rank, None, processes)
        fit_labels = torch.arange(ways, device=device).repeat_interleave(shots)
        truth = torch.arange(ways, device=device).repeat_interleave(self.queries)
        with torch.no_grad(), _bar(len(range(rank, self.episodes, processes)), title, progress) as bar:
            while batch := [draw for _, draw in zip(range(self.batch_size), draws, strict=False)]:
                chosen = self.features[torch.stack(batch).to(device)]
                support, query = chosen[:, :, :shots].flatten(1, 2), chosen[:, :, shots:].flatten(1, 2)
                fitted = head.fit(support, fit_labels.expand(len(batch), -1), ways=ways)
                logits = fitted(query)
                with torch.enable_grad():
                    yield fitted, logits, truth
                bar.update(len(batch))


def _calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    excess = torch.zeros(bins, dtype=confidence.dtype, device=confidence.device)
    return (excess.index_add(0, index, confidence - correct.to(confidence.dtype)).abs().sum() / len(index)).item()


class _Silent:
    """Stands where a progress bar is not wanted or tqdm is not installed."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self, _: int) -> None: ...


def _bar(total: int, title: str, progress: bool):
    if progress:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            pass
        else:
            return tqdm(total=total, desc=title, leave=False)
    return _Silent()
