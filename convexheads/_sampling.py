"""Random episodes of labeled features, and fits of a head on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import torch
from jaxtyping import Integer
from torch import Tensor

from convexheads import _validation
from convexheads.errors import InputError
from convexheads.heads import ClassificationHead, FittedClassifier
from convexheads.heads.base.classification import check_head

T = TypeVar("T")


def fit_episodes(
    head: ClassificationHead, features: Tensor, labels: Tensor, options: dict[str, int], batch_size: int, progress: bool
) -> Iterator[tuple[FittedClassifier, Tensor, Tensor]]:
    """Yield the head fitted on each batch of episodes, its logits and the query labels, without gradients.

    The arguments are those of `evaluate`. Those that determine the episodes are in `options`, by name.
    """
    sizes = {name: options[name] for name in ("ways", "shots", "queries", "episodes")}
    ways, shots, queries, episodes, batch_size = _validation.check_positive_ints(**sizes, batch_size=batch_size)
    seed = _validation.check_seed(options["seed"])
    rank, world_size = _validation.check_rank(options.get("rank", 0), options.get("world_size", 1))
    _validation.check_bool("progress", progress)
    if world_size > episodes:
        raise InputError("world_size", f"at most the number of episodes, {episodes}", world_size)
    check_head(head)
    _validation.check_tensor("features", features, "a tensor of floating-point values", _validation.is_float_tensor)
    check_labels(labels, features, name="features", expected="(examples, d) and (examples,)", dims=2)
    _validation.check_finite("features", features)
    draws = list(islice(sample_episodes(labels, ways, shots + queries, episodes, seed), rank, None, world_size))
    support_labels, query_labels = (
        torch.arange(ways, device=features.device).repeat_interleave(count) for count in (shots, queries)
    )
    title = f"{type(head).__name__}, {ways}-way {shots}-shot"
    for batch in track(torch.stack(draws).split(min(batch_size, len(draws))), title, progress):
        chosen = features[batch.to(features.device)]
        support, query = chosen[:, :, :shots].flatten(1, 2), chosen[:, :, shots:].flatten(1, 2)
        with torch.no_grad():
            fitted = head.fit(support, support_labels.expand(len(batch), -1), ways=ways)
            logits = fitted(query)
        yield fitted, logits, query_labels.expand(len(batch), -1)


def check_labels(labels: Tensor, examples: Tensor, *, name: str, expected: str, dims: int | None = None) -> None:
    """Raise `InputError` unless each example has an integer label. `name` is what the message calls the examples."""
    _validation.check_tensor("labels", labels, "a tensor of integers", _validation.is_integer_tensor)
    if labels.ndim != 1 or labels.shape != examples.shape[:1] or dims not in (None, examples.ndim):
        got = f"shapes {tuple(examples.shape)} and {tuple(labels.shape)}"
        raise InputError(f"{name}, labels", expected, got)


def group_by_class(labels: Tensor, ways: int, per_class: int) -> list[Integer[Tensor, " members"]]:
    """Return the indices of the examples of each class, sorted by label; raise `InputError` if they are too few."""
    labels = labels.cpu().long()
    classes, counts = (found.tolist() for found in labels.unique(return_counts=True))
    if len(classes) < ways:
        raise InputError("labels", f"at least ways={ways}", f"{len(classes)} classes")
    if (count := min(counts)) < per_class:
        got = f"{count} of class {classes[counts.index(count)]}"
        raise InputError("labels", f"at least shots + queries = {per_class} examples of every class", got)
    return [(labels == label).nonzero().squeeze(-1) for label in classes]


def sample_episodes(
    labels: Tensor, ways: int, per_class: int, episodes: int, seed: int
) -> Iterator[Integer[Tensor, "ways per_class"]]:
    """Sample the indices of the examples of each episode; classes and examples are drawn without replacement."""
    members = group_by_class(labels, ways, per_class)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(episodes):
        classes = torch.randperm(len(members), generator=generator)[:ways].tolist()
        orders = [torch.randperm(len(members[label]), generator=generator) for label in classes]
        yield torch.stack([members[label][order[:per_class]] for label, order in zip(classes, orders, strict=True)])


def track(batches: Sequence[T], title: str, progress: bool) -> Iterable[T]:
    """Iterate over batches with a progress bar; there is none if `progress` is False or tqdm is missing."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return batches
    return tqdm(batches, title, leave=False, disable=not progress, unit="batch")
