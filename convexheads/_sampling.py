"""Random episodes of labeled features, and fits of heads on them."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import torch
from jaxtyping import Integer
from torch import Tensor

from convexheads import _validation
from convexheads.errors import InputError
from convexheads.heads import ClassificationHead, FittedClassifier
from convexheads.heads.base.classification import check_head

T = TypeVar("T")
# The largest number of support examples and queries of an episode up to which one thread evaluates a batch.
_MAX_EXAMPLES_FOR_ONE_THREAD = 128


def fit_episodes(
    heads: Sequence[ClassificationHead],
    features: Tensor,
    labels: Tensor,
    options: dict[str, int],
    batch_size: int,
    progress: bool,
    *,
    title: str = "",
    calibrate: str | None = None,
) -> Generator[tuple[int, FittedClassifier, Tensor, Tensor], None, None]:
    """Yield, for each batch of episodes and each head: its number, the head fitted on it, its logits, the query labels.

    There are no gradients. The arguments are those of `evaluate`, with `features` and `labels` as `check_features`
    returns them. Those that determine the episodes are in `options`, by name. The progress bar begins with `title`.
    Fits are calibrated as `ClassificationHead.fit` does.
    Close the generator if it is left early: it changes the number of threads.
    """
    sizes = {name: options[name] for name in ("ways", "shots", "queries", "episodes")}
    ways, shots, queries, episodes, batch_size = _validation.check_positive_ints(**sizes, batch_size=batch_size)
    seed = _validation.check_seed(options["seed"])
    rank, world_size = _validation.check_rank(options.get("rank", 0), options.get("world_size", 1))
    _validation.check_bool("progress", progress)
    if world_size > episodes:
        raise InputError("world_size", f"at most the number of episodes, {episodes}", world_size)
    for head in heads:
        check_head(head)
    draws = islice(sample_episodes(labels, ways, shots + queries, episodes, seed), rank, None, world_size)
    support_labels, query_labels = (
        torch.arange(ways, device=features.device).repeat_interleave(count) for count in (shots, queries)
    )
    title = title or (type(heads[0]).__name__ if len(heads) == 1 else f"{len(heads)} heads")
    count = len(range(rank, episodes, world_size))
    size = min(batch_size, count)
    with _threads(features.device, examples=ways * (shots + queries)):
        for _ in track(range(0, count, size), f"{title}, {ways}-way {shots}-shot", progress):
            batch = torch.stack(list(islice(draws, size)))
            chosen = features[batch.to(features.device)]
            support, query = chosen[:, :, :shots].flatten(1, 2), chosen[:, :, shots:].flatten(1, 2)
            for number, head in enumerate(heads):
                with torch.no_grad():
                    extra: dict[str, Any] = {} if calibrate is None else {"calibrate": calibrate}
                    fitted = head.fit(support, support_labels.expand(len(batch), -1), ways=ways, **extra)
                    logits = fitted(query)
                yield number, fitted, logits, query_labels.expand(len(batch), -1)


@contextmanager
def _threads(device: torch.device, *, examples: int) -> Iterator[None]:
    """Use one thread of PyTorch for batches of small tasks on the CPU; afterward, as many as before.

    Such a batch consists of many short operations, in which further threads save little time if the processors are
    idle. If they are busy, these threads take more than twice as much processor time, because they wait for each other.
    """
    before = torch.get_num_threads()
    if device.type != "cpu" or examples > _MAX_EXAMPLES_FOR_ONE_THREAD or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_features(features: object, labels: object) -> tuple[Tensor, Tensor]:
    """Return the features of `evaluate`, `(examples, d)`, and their labels as tensors, or raise `InputError`."""
    expected = "a tensor of floating-point values"
    features = _validation.check_tensor("features", features, expected, _validation.is_float_tensor)
    labels = check_labels(labels, features, name="features", expected="(examples, d) and (examples,)", dims=2)
    _validation.check_finite("features", features)
    return features, labels


def check_labels(labels: object, examples: Tensor, *, name: str, expected: str, dims: int | None = None) -> Tensor:
    """Return one integer label per example, or raise `InputError`. `name` is what the message calls the examples."""
    labels = _validation.check_tensor("labels", labels, "a tensor of integers", _validation.is_integer_tensor)
    if labels.ndim != 1 or labels.shape != examples.shape[:1] or dims not in (None, examples.ndim):
        got = f"shapes {tuple(examples.shape)} and {tuple(labels.shape)}"
        raise InputError(f"{name}, labels", expected, got)
    return labels


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
    """Sample the indices of the examples of each episode; classes and examples are drawn without replacement.

    Labels that do not suffice are an error of the call, not of the first episode.
    """
    members = group_by_class(labels, ways, per_class)
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        classes = torch.randperm(len(members), generator=generator)[:ways].tolist()
        orders = [torch.randperm(len(members[label]), generator=generator) for label in classes]
        return torch.stack([members[label][order[:per_class]] for label, order in zip(classes, orders, strict=True)])

    return (draw() for _ in range(episodes))


def track(batches: Sequence[T], title: str, progress: bool) -> Iterable[T]:
    """Iterate over batches with a progress bar, unless `progress` is False, tqdm is missing or no terminal shows it."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return batches
    return tqdm(batches, title, leave=False, disable=None if progress else True, unit="batch")
