"""Episodes: split tasks into support and query sets, and sample tasks from cached features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from operator import index
from typing import NamedTuple

import torch
from jaxtyping import Integer
from torch import Tensor

from convexheads._progress import progress_bar
from convexheads.errors import InputError, check_counts, check_flag, check_seed
from convexheads.heads.base import Fitted, Head
from convexheads.heads.inputs import check_finite
from convexheads.loader import check_rank
from convexheads.precision import is_dense, is_of_floats, is_of_integers, kind


class Episode(NamedTuple):
    """The support and query sets of a task, with any leading dimensions. `split_task` returns it.

    Attributes:
        support: Images or features to fit on, `(*batch, n, ...)`.
        support_labels: Labels of the support set, `(*batch, n)`.
        query: Images or features to score, `(*batch, q, ...)`.
        query_labels: Labels of the query set, `(*batch, q)`.
    """

    support: Tensor
    support_labels: Tensor
    query: Tensor
    query_labels: Tensor


def split_task(data: Tensor, labels: Integer[Tensor, "*batch n"], *, shots: int) -> Episode:
    """Split a task, as learn2learn's tasksets return it, into support and query.

    The first `shots` examples of each class are the support and the others the query; both keep the order.

    Args:
        data: Images or features, `(*batch, n, ...)`.
        labels: Integers in any order, `(*batch, n)`.
        shots: Number of support examples per class, at least 1.

    Returns:
        Support and query with their labels and the same leading dimensions. Labels are not renumbered.

    Raises:
        InputError: An argument is unusable: for example, a class has no example left for the query, or the tasks of a
            batch differ in their number of classes.

    Example:
        `episode = split_task(*taskset.sample(), shots=5)`
    """
    check_counts(shots=shots)
    if not is_dense(data):
        raise InputError("data", kind(data), "a tensor of images or features")
    if not is_of_integers(labels):
        raise InputError("labels", kind(labels), "a tensor of integers")
    if data.shape[: labels.ndim] != labels.shape or labels.ndim < 1:
        raise InputError(
            "data", f"shape {tuple(data.shape)}", f"the leading dimensions of labels, {tuple(labels.shape)}"
        )
    batch, n = labels.shape[:-1], labels.shape[-1]
    rows, flat = labels.reshape(batch.numel(), n), data.reshape(batch.numel(), *data.shape[labels.ndim - 1 :])
    if not len(rows):
        raise InputError("labels", f"shape {tuple(labels.shape)}", "at least one task")
    same = rows.long().unsqueeze(-1) == rows.long().unsqueeze(-2)
    short = same.sum(-1) <= min(shots, n)
    if short.any():
        task, example = short.nonzero()[0].tolist()
        count, label = int(same[task, example].sum()), int(rows[task, example])
        raise InputError("labels", f"{count} examples of class {label} in task {task}", f"more than shots={shots}")
    in_support = same.tril(-1).sum(-1) < min(shots, n)
    sizes = in_support.sum(-1)
    if (sizes != sizes[0]).any():
        raise InputError(
            "labels", "tasks with different numbers of classes", "the same number in every task of a batch"
        )
    order = (~in_support).to(torch.uint8).argsort(dim=-1, stable=True)
    task = torch.arange(len(rows), device=order.device).unsqueeze(-1)

    def part(chosen: Tensor) -> tuple[Tensor, Tensor]:
        values, classes = flat[task, chosen], rows[task, chosen]
        return values.reshape(*batch, *values.shape[1:]), classes.reshape(*batch, -1)

    size = int(sizes[0])
    return Episode(*part(order[:, :size]), *part(order[:, size:]))


def _sample_episodes(
    labels: Tensor, ways: int, per_class: int, episodes: int, seed: int
) -> Iterator[Integer[Tensor, "ways m"]]:
    """Sample the indices of the examples of each episode; classes and examples are drawn without replacement."""
    labels = labels.cpu().long()
    classes, counts = labels.unique(return_counts=True)
    if len(classes) < ways:
        raise InputError("labels", f"{len(classes)} classes", f"at least ways={ways}")
    if (counts < per_class).any():
        worst = int(counts.argmin())
        raise InputError(
            "labels",
            f"{counts[worst].item()} examples of class {classes[worst].item()}",
            f"at least shots + queries = {per_class}",
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
    """Random episodes of cached features, for `evaluate` and `calibrate`; its attributes are their arguments."""

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
        check_counts(**{name: getattr(self, name) for name in names})
        check_seed(self.seed)
        check_rank(self.rank, self.world_size)
        for name in (*names, "seed", "rank", "world_size"):  # as Python's integers, whatever has an `__index__`
            object.__setattr__(self, name, index(getattr(self, name)))
        if self.world_size > self.episodes:
            raise InputError("world_size", self.world_size, f"at most the {self.episodes} episodes")
        for name, value, right, wanted in (
            ("features", self.features, is_of_floats, "floating-point"),
            ("labels", self.labels, is_of_integers, "integer"),
        ):
            if not right(value):
                raise InputError(name, kind(value), f"a tensor of {wanted} values")
        if self.features.ndim != 2 or self.labels.shape != self.features.shape[:1]:
            got = f"shapes {tuple(self.features.shape)} and {tuple(self.labels.shape)}"
            raise InputError("features, labels", got, "(examples, d) and (examples,)")
        check_finite("features", self.features)

    def fit_batches(self, head: Head, title: str, progress: bool) -> Iterator[tuple[Fitted, Tensor, Tensor]]:
        """Yield the head fitted on each batch of episodes, its logits and the labels, without gradients."""
        if not isinstance(head, Head):
            raise InputError("head", type(head).__name__, "a classification head")
        check_flag("progress", progress)
        device, ways, shots = self.features.device, self.ways, self.shots
        draws = _sample_episodes(self.labels, ways, shots + self.queries, self.episodes, self.seed)
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
