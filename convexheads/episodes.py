"""Episodes: split tasks into support and query sets."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Integer
from torch import Tensor

from convexheads._validation import (
    ArrayLike,
    check_bool,
    check_positive_ints,
    check_tensor,
    describe_first_task,
    is_integer_tensor,
    refuse_meta,
)
from convexheads.errors import InputError


class Episode(NamedTuple):
    """The support and query sets of a task, with any leading dimensions, as `split_task` returns them.

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


def split_task(
    data: Tensor | ArrayLike, labels: Integer[Tensor, "*batch n"] | ArrayLike, *, shots: int, relabel: bool = False
) -> Episode:
    """Split a task, as learn2learn's tasksets return it, into support and query sets.

    The first `shots` examples of each class form the support set; the others, at least one per class, form the query
    set. Both keep the order. All tasks of a batch need the same number of classes.

    Args:
        data: Images or features, `(*batch, n, ...)`; a tensor, a NumPy array or nested lists.
        labels: Integers in any order, `(*batch, n)`; a tensor, a NumPy array or nested lists.
        shots: Number of support examples per class, at least 1.
        relabel: Whether the classes of each task are numbered from 0 to k - 1, in the order of their labels, in support
            and query alike; the new labels are int64. Heads need such labels. Defaults to False: labels are kept.

    Raises:
        InputError: An argument is unusable: for example, a class has only `shots` examples.

    Example:
        `episode = split_task(*taskset.sample(), shots=5)`, or with `relabel=True` if the labels are class ids of a data
        set
    """
    check_positive_ints(shots=shots)
    check_bool("relabel", relabel)
    data = check_tensor("data", data, "a tensor of images or features")
    refuse_meta("data", data)
    labels = check_tensor("labels", labels, "a tensor of integers", is_integer_tensor, like=data)
    if data.shape[: labels.ndim] != labels.shape or labels.ndim < 1:
        expected = f"the leading dimensions of labels, {tuple(labels.shape)}"
        raise InputError("data", expected, f"shape {tuple(data.shape)}")
    batch, n = labels.shape[:-1], labels.shape[-1]
    rows, flat = labels.reshape(batch.numel(), n), data.reshape(batch.numel(), *data.shape[labels.ndim - 1 :])
    if not len(rows):
        raise InputError("labels", "at least one task", f"shape {tuple(labels.shape)}")
    same = rows.long().unsqueeze(-1) == rows.long().unsqueeze(-2)
    short = same.sum(-1) <= min(shots, n)
    if short.any():
        task, example = short.nonzero()[0].tolist()
        count, label = int(same[task, example].sum()), int(rows[task, example])
        where = describe_first_task(short.any(-1).reshape(batch))
        raise InputError("labels", f"more than shots={shots}", f"{count} of class {label} in {where}")
    in_support = same.tril(-1).sum(-1) < min(shots, n)
    sizes = in_support.sum(-1)
    if (sizes != sizes[0]).any():
        got = "tasks with different numbers of classes"
        raise InputError("labels", "the same number of classes in every task", got)
    if relabel:  # to the number of classes whose label is smaller, each counted at its first example
        is_first = ~same.tril(-1).any(-1)
        is_smaller = rows.long().unsqueeze(-2) < rows.long().unsqueeze(-1)
        rows = (is_smaller & is_first.unsqueeze(-2)).sum(-1)
    order = (~in_support).to(torch.uint8).argsort(dim=-1, stable=True)
    task = torch.arange(len(rows), device=order.device).unsqueeze(-1)

    def part(chosen: Tensor) -> tuple[Tensor, Tensor]:
        values, classes = flat[task, chosen], rows[task, chosen]
        return values.reshape(*batch, *values.shape[1:]), classes.reshape(*batch, -1)

    size = int(sizes[0])
    return Episode(*part(order[:, :size]), *part(order[:, size:]))
