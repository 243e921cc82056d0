"""Random episodes of labeled data, and the progress bars of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import torch
from jaxtyping import Integer
from torch import Tensor

from convexheads import _validation
from convexheads.errors import InputError
from convexheads.heads import ClassificationHead, FittedClassifier

_T = TypeVar("_T")


def fit_episodes(
    head: ClassificationHead,
    features: Tensor,
    labels: Tensor,
    title: str,
    *,
    ways: int,
    shots: int,
    queries: int,
    episodes: int,
    batch_size: int,
    seed: int,
    progress: bool,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[FittedClassifier, Tensor, Tensor]]:
    """Yield the head fitted on each batch of episodes, its logits and the query labels, without gradients.

    The arguments are those of `evaluate`, plus the `title` of the progress bar.
    """
    ways, shots, queries, episodes, batch_size = _validation.check_positive_ints(
        ways=ways, shots=shots, queries=queries, episodes=episodes, batch_size=batch_size
    )
    seed, (rank, world_size) = _validation.check_seed(seed), _validation.check_rank(rank, world_size)
    _validation.check_bool("progress", progress)
    if world_size > episodes:
        raise InputError("world_size", f"at most the number of episodes, {episodes}", world_size)
    if not isinstance(head, ClassificationHead):
        raise InputError("head", "a classification head", type(head).__name__)
    _validation.check_tensor("features", features, "a tensor of floating-point values", _validation.is_float_tensor)
    _validation.check_tensor("labels", labels, "a tensor of integers", _validation.is_integer_tensor)
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        got = f"shapes {tuple(features.shape)} and {tuple(labels.shape)}"
        raise InputError("features, labels", "(examples, d) and (examples,)", got)
    _validation.check_finite("features", features)
    draws = islice(sample_episodes(labels, ways, shots + queries, episodes, seed), rank, None, world_size)
    support_labels, query_labels = (
        torch.arange(ways, device=features.device).repeat_interleave(count) for count in (shots, queries)
    )
    batches = iter(lambda: list(islice(draws, batch_size)), [])
    total = math.ceil(len(range(rank, episodes, world_size)) / batch_size)
    for batch in track(batches, title, progress, total=total):
        chosen = features[torch.stack(batch).to(features.device)]
        support, query = chosen[:, :, :shots].flatten(1, 2), chosen[:, :, shots:].flatten(1, 2)
        with torch.no_grad():
            fitted = head.fit(support, support_labels.expand(len(batch), -1), ways=ways)
            logits = fitted(query)
        yield fitted, logits, query_labels.expand(len(batch), -1)


def group_by_class(labels: Tensor, ways: int, per_class: int, names: Sequence[str] | None = None) -> list[Tensor]:
    """The indices of the examples of each class, in the order of the sorted labels, on the CPU.

    Raises `InputError` if there are not enough for an episode, with the class's label, or its name in `names`.
    """
    labels = labels.cpu().long()
    classes, counts = (found.tolist() for found in labels.unique(return_counts=True))
    if len(classes) < ways:
        raise InputError("labels", f"at least ways={ways}", f"{len(classes)} classes")
    if (count := min(counts)) < per_class:
        label = (names or classes)[counts.index(count)]
        raise InputError("labels", f"at least shots + queries = {per_class}", f"{count} examples of class {label!r}")
    return [(labels == label).nonzero().squeeze(-1) for label in classes]


def sample_episodes(
    labels: Tensor, ways: int, per_class: int, episodes: int, seed: int
) -> Iterator[Integer[Tensor, "ways m"]]:
    """Sample the indices of the examples of each episode; classes and examples are drawn without replacement."""
    members = group_by_class(labels, ways, per_class)
    generator = torch.Generator().manual_seed(seed)

    def choose(count: int, among: int) -> Tensor:
        return torch.randperm(among, generator=generator)[:count]

    return (
        torch.stack([members[c][choose(per_class, len(members[c]))] for c in choose(ways, len(members)).tolist()])
        for _ in range(episodes)
    )


def track(batches: Iterable[_T], title: str, progress: bool, *, total: int | None = None) -> Iterable[_T]:
    """Iterate over batches with a progress bar; there is none if `progress` is False or tqdm is missing."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return batches
    return tqdm(batches, title, total, leave=False, disable=not progress, unit="batch")
