"""The tasks that are tuned, and which of their examples are held out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from convexheads import _validation
from convexheads.errors import InputError
from convexheads.heads import ClassificationHead
from convexheads.heads.base.held_out import Examples


class Task(NamedTuple):
    """The checked arguments of `tune`: `arguments` and `options` of the final fit, and flat tensors."""

    arguments: tuple[Any, Any]
    options: dict[str, Any]
    batch: torch.Size
    examples: Examples
    labels: Integer[Tensor, "tasks n"]


class Split(NamedTuple):
    """Which examples are for training, and which others are held out, padded where folds differ in size."""

    train: Bool[Tensor, "tasks folds n"]
    features: Float[Tensor, "tasks folds m d"] | None  # None: those of the support set at `index`
    index: Integer[Tensor, "tasks folds m"] | None
    labels: Integer[Tensor, "tasks folds m"]
    used: Bool[Tensor, "tasks folds m"]
    folds: Integer[Tensor, "tasks n"] | None
    leaves_one_out: bool = False


def prepare(head: ClassificationHead, support: Any, labels: Any, ways: Any, **options: Any) -> Task:
    """Check the arguments of `tune`."""
    if not isinstance(ways, int | None):
        raise InputError("ways", "an integer or None; tune tasks with other numbers of classes apart", repr(ways))
    found = head._check(support, labels, ways=ways, **options)
    targets = found.examples.targets
    if found.examples.is_multilabel:
        raise InputError("labels", "one label per example, because tune does not support several", "a matrix of bool")
    examples = Examples.of(found.examples, found.sample_weight)
    options["ways"] = targets.shape[-1]
    return Task((support, labels), options, targets.shape[:-2], examples, examples.targets.argmax(-1))


def split_examples(cv: object, task: Task, seed: int, *, is_closed: bool) -> Split:
    """Hold out examples as `cv` says; heads whose form is closed leave one out without further fits."""
    tasks, n = task.labels.shape
    device = task.labels.device
    if isinstance(cv, tuple | list) and len(cv) == 2:
        return _validation_set(cv, task)
    used, ways = task.examples.used, task.examples.targets.shape[-1]
    if cv == "loo":
        count = n
        folds = torch.where(used, torch.arange(n, device=device), -1)
        if is_closed:
            return Split(used[:, None], None, None, task.labels[:, None], used[:, None], folds)
    else:
        expected = "a number of folds from 2 on, 'loo', or a pair of validation features and labels"
        if isinstance(cv, bool) or not isinstance(cv, int) or cv < 2:
            raise InputError("cv", expected, _validation.describe(cv))
        count = cv
        counts = task.examples.targets.sum(1).long()
        if (counts < count).any():
            row, label = (counts < count).nonzero()[0].tolist()
            got = f"{counts[row, label].item()} of class {label}; pass fewer folds, cv='loo' or a validation set"
            raise InputError("cv", f"at least {count} examples of every class for {count} folds", got)
        # The examples of a class, in random order, go to one fold after the other; the next class continues there.
        generator = torch.Generator().manual_seed(seed)
        keys = task.labels.where(used, ways).cpu() + torch.rand(tasks, n, generator=generator).double()
        folds = torch.empty_like(task.labels)
        folds.scatter_(1, keys.argsort(dim=1).to(device), (torch.arange(n, device=device) % count).expand(tasks, n))
        folds = folds.where(used, -1)
    left_out = folds.unsqueeze(1) == torch.arange(count, device=device).unsqueeze(-1)  # (tasks, folds, n)
    size = int(left_out.sum(-1).amax())
    index = left_out.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :size]
    labels = task.labels.unsqueeze(1).expand(-1, count, -1).gather(-1, index)
    used_in_folds = left_out.gather(-1, index)
    return Split(used.unsqueeze(1) & ~left_out, None, index, labels, used_in_folds, folds, leaves_one_out=cv == "loo")


def _validation_set(pair: Sequence[Any], task: Task) -> Split:
    """Hold out a validation set of features and labels."""
    examples = task.examples
    tasks, d, ways = len(task.labels), examples.features.shape[-1], examples.targets.shape[-1]
    query = _validation.check_tensor("cv", pair[0], "features of a validation set", _validation.is_float_tensor)
    labels = _validation.check_tensor("cv", pair[1], "labels of a validation set", _validation.is_integer_tensor)
    query, labels = query.detach().to(examples.features), labels.to(task.labels)
    q = query.shape[-2] if query.ndim > 1 else 0
    for shape, expand in (((*task.batch, q, d), False), ((q, d), True)):
        if query.shape == shape and labels.shape == shape[:-1] and q:
            query, labels = query.reshape(-1, q, d), labels.reshape(-1, q)
            query, labels = (part.expand(tasks, *part.shape[1:]) if expand else part for part in (query, labels))
            _validation.check_finite("cv", query)
            _validation.check_range("cv", labels, ways, ways - 1)
            used = torch.ones_like(labels, dtype=torch.bool)
            return Split(examples.used[:, None], query.unsqueeze(1), None, labels[:, None], used[:, None], None)
    got = f"shapes {tuple(query.shape)} and {tuple(labels.shape)}"
    raise InputError("cv", f"features {(*task.batch, 'q', d)} and labels {(*task.batch, 'q')}".replace("'", ""), got)
