"""Random episodes of labeled features, and fits of heads on them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Integer
from torch import Tensor
from torch.nn import functional

from convexheads import _validation
from convexheads.errors import InputError
from convexheads.heads import ClassificationHead, FittedClassifier
from convexheads.heads.base.classification import check_head

S = TypeVar("S")
T = TypeVar("T")
# The largest number of support examples and queries of an episode up to which a batch is evaluated by one thread.
_MAX_EXAMPLES_FOR_ONE_THREAD = 128
# Episodes are drawn in parts: the largest number of episodes and of examples. Therefore, the first episodes do not
# depend on the number of episodes.
_EPISODES_AT_ONCE, _EXAMPLES_AT_ONCE = 1000, 100_000
# More numbers than this are drawn by permutations, because otherwise each one is compared with all others.
_MAX_COMPARED = 32


class Batch(NamedTuple):
    """A head fitted on a batch of episodes, and what it predicts for their queries.

    Attributes:
        head: The number of the head.
        fitted: The head fitted on the support sets.
        logits: The logits of the queries, `(episodes, q, ways)`.
        labels: The labels of the queries, `(episodes, q)`.
    """

    head: int
    fitted: FittedClassifier
    logits: Tensor
    labels: Tensor


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
) -> Generator[Batch, None, None]:
    """Fit each head on each batch of episodes, and predict the queries.

    There are no gradients. The arguments are those of `evaluate`, with `features` and `labels` as `check_features`
    returns them. Those that determine the episodes are in `options`, by name. The progress bar begins with `title`.
    Fits are calibrated as `ClassificationHead.fit` does.
    On the CPU, batches of small episodes are fitted in several threads, ahead of the generator. Close it if it is left
    early.
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
    parts = {"batch_size": batch_size, "rank": rank, "world_size": world_size}
    batches = sample_episodes(labels, ways, shots + queries, episodes, seed, **parts)
    support_labels, query_labels = (
        torch.arange(ways, device=features.device).repeat_interleave(count) for count in (shots, queries)
    )

    def fit(rows: Tensor) -> list[Batch]:
        rows = rows.to(features.device)
        support = functional.embedding(rows[..., :shots].flatten(1), features)
        extra: dict[str, Any] = {} if calibrate is None else {"calibrate": calibrate}
        with torch.no_grad():
            fits = [head.fit(support, support_labels.expand(len(rows), -1), ways=ways, **extra) for head in heads]
            logits = [fitted.score_rows(features, rows[..., shots:].flatten(1)) for fitted in fits]
        labels_of_queries = query_labels.expand(len(rows), -1)
        return [Batch(number, fits[number], found, labels_of_queries) for number, found in enumerate(logits)]

    title = title or (type(heads[0]).__name__ if len(heads) == 1 else f"{len(heads)} heads")
    count = math.ceil(len(range(rank, episodes, world_size)) / batch_size)
    is_small = features.is_cpu and ways * (shots + queries) <= _MAX_EXAMPLES_FOR_ONE_THREAD
    with closing(_map_in_threads(fit, batches) if is_small else (fit(rows) for rows in batches)) as results:
        for found in track(results, f"{title}, {ways}-way {shots}-shot", progress, total=count):
            yield from found


def _map_in_threads(function: Callable[[S], T], values: Iterable[S]) -> Generator[T, None, None]:
    """Map a function over values in as many threads as PyTorch has, each of which uses one thread of PyTorch.

    A batch of small tasks consists of many short operations, in which several threads of PyTorch would mostly wait for
    each other, the more so if the processors are busy.
    """
    threads = torch.get_num_threads()
    pending: deque[Future[T]] = deque()
    if threads == 1:
        yield from map(function, values)
        return
    pool = ThreadPoolExecutor(threads, "convexheads", initializer=torch.set_num_threads, initargs=(1,))
    torch.set_num_threads(1)  # the caller's operations, too: its threads would wait busily
    try:
        for value in values:
            pending.append(pool.submit(function, value))
            if len(pending) > threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def check_features(features: object, labels: object) -> tuple[Tensor, Tensor]:
    """Return the features of `evaluate`, `(examples, d)`, and their labels as tensors, or raise `InputError`."""
    expected = "a tensor of floating-point values"
    features = _validation.check_tensor("features", features, expected, _validation.is_float_tensor)
    labels = check_labels(labels, features, name="features", expected="(examples, d) and (examples,)", dims=2)
    _validation.refuse_meta("features", features)
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
    labels: Tensor,
    ways: int,
    per_class: int,
    episodes: int,
    seed: int,
    *,
    batch_size: int = 1,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Integer[Tensor, "batch ways per_class"]]:
    """Sample the indices of the examples of episodes; classes and examples are drawn without replacement.

    Of all episodes, those from number `rank` on in steps of `world_size` are returned, in batches. Labels that do not
    suffice are an error of the call, not of the first batch.
    """
    members = group_by_class(labels, ways, per_class)
    counts = torch.tensor([len(each) for each in members])
    firsts, indices = counts.cumsum(0) - counts, torch.cat(members)
    at_once = min(_EPISODES_AT_ONCE, max(1, _EXAMPLES_AT_ONCE // (ways * per_class)))

    def draw() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        waiting = indices.new_empty(0, ways, per_class)
        for start in range(0, episodes, at_once):
            many = torch.tensor(len(members)).expand(at_once)
            classes = _draw_different(many, ways, generator)
            chosen = indices[firsts[classes].unsqueeze(-1) + _draw_different(counts[classes], per_class, generator)]
            waiting = torch.cat([waiting, chosen[: episodes - start][(rank - start) % world_size :: world_size]])
            while len(waiting) >= batch_size:
                yield waiting[:batch_size]
                waiting = waiting[batch_size:]
        if len(waiting):
            yield waiting

    return draw()


def _draw_different(counts: Integer[Tensor, "*shape"], size: int, generator: torch.Generator) -> Tensor:
    """Draw `size` different numbers below each count, in random order, `(*shape, size)`."""
    if size > _MAX_COMPARED:
        rows = [torch.randperm(count, generator=generator)[:size] for count in counts.flatten().tolist()]
        return torch.stack(rows).reshape(*counts.shape, size)
    chosen: list[Tensor] = []
    ascending: list[Tensor] = []
    for number in range(size):
        # The place among the numbers that are left, and then the number itself.
        drawn = (torch.rand(counts.shape, generator=generator, dtype=torch.float64) * (counts - number)).long()
        for smaller in ascending:
            drawn = drawn + (drawn >= smaller)
        chosen.append(drawn)
        moved = drawn
        for place, smaller in enumerate(ascending):
            ascending[place], moved = torch.minimum(smaller, moved), torch.maximum(smaller, moved)
        ascending.append(moved)
    return torch.stack(chosen, -1)


def track(batches: Iterable[T], title: str, progress: bool, *, total: int | None = None) -> Iterable[T]:
    """Iterate over batches with a progress bar, unless `progress` is False, tqdm is missing or no terminal shows it."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return batches
    return tqdm(batches, title, leave=False, total=total, disable=None if progress else True, unit="batch")
