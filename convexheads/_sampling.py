"""Random episodes of cached features, for `evaluate` and `calibrate`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from operator import index

import torch
from jaxtyping import Integer
from torch import Tensor

from convexheads._progress import progress_bar
from convexheads._validation import (
    check_bool,
    check_finite,
    check_positive_ints,
    check_rank,
    check_seed,
    describe_type,
    is_float_tensor,
    is_integer_tensor,
)
from convexheads.errors import InputError
from convexheads.heads import ClassificationHead, FittedClassifier


def sample_episodes(
    labels: Tensor, ways: int, per_class: int, episodes: int, seed: int
) -> Iterator[Integer[Tensor, "ways m"]]:
    """Sample the indices of the examples of each episode; classes and examples are drawn without replacement."""
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
class FeatureEpisodes:
    """Random episodes of cached features; the attributes are arguments of `evaluate`."""

    features: Tensor
    labels: Tensor
    ways: int
    shots: int
    queries: int
    episodes: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        names = ("ways", "shots", "queries", "episodes", "batch_size")
        check_positive_ints(**{name: getattr(self, name) for name in names})
        check_seed(self.seed)
        check_rank(self.rank, self.world_size)
        for name in (*names, "seed", "rank", "world_size"):  # as Python's integers, whatever has an `__index__`
            object.__setattr__(self, name, index(getattr(self, name)))
        if self.world_size > self.episodes:
            raise InputError("world_size", f"at most the {self.episodes} episodes", self.world_size)
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

    def fit_batches(
        self, head: ClassificationHead, title: str, progress: bool
    ) -> Iterator[tuple[FittedClassifier, Tensor, Tensor]]:
        """Yield the head fitted on each batch of episodes, its logits and the labels, without gradients."""
        if not isinstance(head, ClassificationHead):
            raise InputError("head", "a classification head", type(head).__name__)
        check_bool("progress", progress)
        device, ways, shots = self.features.device, self.ways, self.shots
        draws = sample_episodes(self.labels, ways, shots + self.queries, self.episodes, self.seed)
        draws = islice(draws, self.rank, None, self.world_size)
        fit_labels = torch.arange(ways, device=device).repeat_interleave(shots)
        truth = torch.arange(ways, device=device).repeat_interleave(self.queries)
        total = len(range(self.rank, self.episodes, self.world_size))
        with torch.no_grad(), progress_bar(total, title, progress) as bar:
            while batch := [draw for _, draw in zip(range(self.batch_size), draws, strict=False)]:
                chosen = self.features[torch.stack(batch).to(device)]
                support, query = chosen[:, :, :shots].flatten(1, 2), chosen[:, :, shots:].flatten(1, 2)
                fitted = head.fit(support, fit_labels.expand(len(batch), -1), ways=ways)
                logits = fitted(query)
                with torch.enable_grad():
                    yield fitted, logits, truth
                bar.update(len(batch))
