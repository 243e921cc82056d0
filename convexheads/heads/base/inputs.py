"""Checks of what a fit and a call of a head receive, and its conversion to tensors."""

from __future__ import annotations

from functools import partial
from typing import NoReturn

import torch
from torch import Tensor

from convexheads._functorch import inspect_values
from convexheads._looks import check, refuse
from convexheads._validation import (
    check_bool,
    check_finite,
    check_finite_values,
    check_positive_int,
    check_range,
    check_tensor,
    describe_first_task,
    describe_shape,
    describe_task,
    describe_type,
    is_bool_tensor,
    is_dense,
    is_float_tensor,
    is_integer_tensor,
    refuse_meta,
)
from convexheads.errors import InputError
from convexheads.solvers.problem import Solution

# With more classes than this, labels are almost certainly raw class ids, and the one-hot matrix would exhaust memory.
_MAX_WAYS = 2**20
_RENUMBER = "number the classes of each task from 0, as labels.unique(return_inverse=True)[1] does"


def _check_features(name: str, value: object, like: Tensor | None = None) -> Tensor:
    value = check_tensor(name, value, "a tensor of floating-point features", is_float_tensor, like=like)
    if value.ndim < 2:
        raise InputError(name, "at least two dimensions, (*batch, examples, features)", describe_shape(value))
    return value


def _check_match(name: str, value: Tensor, support: Tensor, shape: tuple[int, ...], expected: str) -> None:
    """Raise `InputError` unless the `value` has this `shape`, which `expected` describes, and the support's device."""
    if value.shape != shape:
        raise InputError(name, f"{expected}, {tuple(shape)}", describe_shape(value))
    _check_device(name, value, support)


def _check_device(name: str, value: Tensor, support: Tensor) -> None:
    if value.device != support.device:
        raise InputError(name, f"the support's device, {support.device}", f"device {value.device}")


def _check_per_example(name: str, value: Tensor, support: Tensor, expected: str) -> Tensor:
    """Return the labels or the mask of all tasks: those of one task, `(n,)`, are expanded."""
    examples = support.shape[:-1]
    if value.shape == examples[-1:]:
        value = value.expand(examples)
    _check_match(name, value, support, examples, expected)
    return value


def check_classification(
    support: object,
    labels: object,
    ways: object,
    mask: object,
    *,
    needed_by: str | None,
    allow_missing_classes: object,
    validate: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Check the arguments of a fit, where `needed_by` is the name of a head that needs examples of every class.

    Return support, one-hot labels as bool, ways if they are given per task, and mask, all as tensors for all tasks.
    Without `validate`, a label out of range has no class.
    """
    support, mask = _check_examples(support, mask)
    labels = check_tensor("labels", labels, "a tensor of integers 0..ways-1", is_integer_tensor, like=support)
    # Labels (n,) are those of n feature maps (n, c, h, w), also where h is n, but those of each of n tasks (n, n, d).
    may_be_shared = labels.shape == support.shape[-2:-1]
    if labels.shape == support.shape[: labels.ndim] and support.ndim > labels.ndim + 1 + may_be_shared:
        expected = f"flat features, {(*labels.shape, 'd')}".replace("'", "")
        raise InputError("support", expected, describe_shape(support))
    labels = _check_per_example("labels", labels, support, "one label per support example")
    per_task, max_ways, highest = _check_ways(ways, support, labels, mask)
    allow = check_bool("allow_missing_classes", allow_missing_classes) and needed_by is None
    is_tensor = isinstance(ways, Tensor) or per_task is not None
    needed = "none" if allow else "shown" if is_tensor and needed_by is None else "all"
    labels, is_checked = labels.long(), validate and labels.numel() > 0  # torch cannot compare its unsigned types
    if is_checked:
        inspect_values(_check_values, mask, support)
        lacks_examples = needed == "all" and max_ways > labels.shape[-1]
        if per_task is not None or lacks_examples:  # then one-hot labels could exhaust memory
            limit = max_ways if per_task is None else per_task
            inspect_values(_check_labels, labels, limit, max_ways, mask, needed, needed_by, highest)
    classes = torch.arange(max_ways, device=labels.device)
    is_own = labels.unsqueeze(-1) == classes
    if per_task is not None and not validate:
        is_own &= (classes < per_task.unsqueeze(-1)).unsqueeze(-2)
    if is_checked and per_task is None:
        inspect_values(_check_one_hot, labels, is_own, mask, needed, needed_by, highest)
    return support, is_own, per_task, mask


def _check_ways(ways: object, support: Tensor, labels: Tensor, mask: Tensor | None) -> tuple[Tensor | None, int, str]:
    """Return the ways if they are given per task, the largest of them, and the highest label as errors name it."""
    per_task, highest = None, "ways-1"
    is_wrong_tensor = isinstance(ways, Tensor) and not is_integer_tensor(ways)
    if getattr(ways, "ndim", isinstance(ways, list | tuple)) or is_wrong_tensor:
        per_task = check_tensor("ways", ways, "integers, one per task", is_integer_tensor, like=support).long()
        _check_match("ways", per_task, support, labels.shape[:-1], "integers, one per task")
        max_ways, origin = inspect_values(_largest_number, labels, per_task, mask), ""
    elif ways is None:
        max_ways = inspect_values(_largest_number, labels, None, mask)
        origin = "; without ways=, this is the largest label plus one, so number the classes from 0"
    else:
        max_ways, origin = check_positive_int("ways", ways, alternative=", a tensor of them, or None"), ""
        highest = str(max_ways - 1)
    if max_ways > _MAX_WAYS:
        raise InputError("ways", f"at most {_MAX_WAYS}", f"{max_ways}{origin}")
    return per_task, max_ways, highest


def is_multilabel(labels: object) -> bool:
    """Whether labels are a matrix of bool, in which an example may have any number of labels."""
    while isinstance(labels, list | tuple) and labels:
        labels = labels[0]
    return isinstance(labels, bool) or str(getattr(labels, "dtype", "")) in ("torch.bool", "bool")


def check_multilabel(
    support: object, labels: object, ways: object, mask: object, *, validate: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check the arguments of a fit with labels `(*batch, n, k)` of bool; return support, labels and mask."""
    support, mask = _check_examples(support, mask)
    labels = check_tensor("labels", labels, "a tensor of bool, (*batch, n, k)", is_bool_tensor, like=support)
    k = max(1, labels.shape[-1] if labels.ndim else 0)
    if labels.shape == (support.shape[-2], k):
        labels = labels.expand(*support.shape[:-1], k)
    if labels.shape != (*support.shape[:-1], k):
        expected = f"integers, or a matrix of bool with one column per class, {(*support.shape[:-1], 'k')}"
        raise InputError("labels", expected.replace("'", ""), f"a tensor of torch.bool, {describe_shape(labels)}")
    _check_match("labels", labels, support, labels.shape, "one row per support example")
    if ways is not None and check_positive_int("ways", ways, alternative=", or None") != k:
        raise InputError("ways", f"the {k} columns of the labels, or None", ways)
    if validate:
        inspect_values(_check_values, mask, support)
    return support, labels, mask


def _largest_number(labels: Tensor, ways: Tensor | None, mask: Tensor | None) -> int:
    """The largest number of classes of a task, at least one."""
    if ways is not None:
        return int(ways.max().item()) if ways.numel() else 1
    labels = labels.long() if mask is None else labels.long().masked_fill(~mask, 0)
    return max(1, int(labels.max().item()) + 1) if labels.numel() else 1


def _check_one_hot(
    labels: Tensor, is_own: Tensor, mask: Tensor | None, needed: str, needed_by: str | None, highest: str
) -> None:
    """Like `_check_labels`, for tasks with the same number of classes, by a single flag."""
    has_class, is_used = is_own.any(-1), is_own
    if mask is not None:
        has_class, is_used = has_class | ~mask, is_used & mask.unsqueeze(-1)
    fine = has_class.all() if needed == "none" else has_class.all() & is_used.any(-2).all()
    k = is_own.shape[-1]
    check(~fine, partial(_check_labels, labels, k, k, mask, needed, needed_by, highest))


def _check_labels(
    labels: Tensor,
    ways: int | Tensor,
    max_ways: int,
    mask: Tensor | None,
    needed: str,
    needed_by: str | None,
    highest: str,
) -> None:
    """Raise `InputError` for a wrong number of classes or label, or if a class lacks examples.

    The classes that need examples are "all", those "shown" or "none".
    """
    if mask is not None:
        labels = labels.masked_fill(~mask, 0)
    if isinstance(ways, Tensor) and (ways < 1).any():
        raise InputError("ways", "at least 1", f"{ways[ways < 1][0].item()} in {describe_first_task(ways < 1)}")
    limit = ways.unsqueeze(-1) if isinstance(ways, Tensor) else ways
    check_range("labels", labels, limit, highest, f"; {_RENUMBER}")
    if needed != "none":
        missing = _find_missing(labels, limit, max_ways, mask, needed)
        if missing.any():
            _raise_missing(labels, missing, mask, needed_by)


def _find_missing(labels: Tensor, limit: int | Tensor, max_ways: int, mask: Tensor | None, needed: str) -> Tensor:
    """Which classes lack the examples that they need, `(*batch, classes)`."""
    # Of n + 1 classes, one lacks examples: no more of them are compared with the labels.
    classes = torch.arange(min(max_ways, labels.shape[-1] + 1), device=labels.device)
    found = labels.unsqueeze(-1) == classes
    missing = ~(found if mask is None else found & mask.unsqueeze(-1)).any(-2)
    if needed == "shown":
        missing &= classes <= labels.amax(-1, keepdim=True)
    elif isinstance(limit, Tensor):
        missing &= classes < limit
    return missing


def _raise_missing(labels: Tensor, missing: Tensor, mask: Tensor | None, needed_by: str | None) -> NoReturn:
    """Raise `InputError` for the first of the `missing` classes, `(*batch, classes)`, with the remedy."""
    *task, absent = missing.nonzero()[0].tolist()
    has_gap = absent < labels[tuple(task)].max()
    remedy = _RENUMBER if has_gap else "pass the number of classes of each task as the tensor ways"
    expected = f"at least one example {'' if mask is None else 'that is not masked '}of every class"
    if needed_by is None:
        remedy += ", or allow_missing_classes=True"
    else:
        expected += f", which {needed_by} needs"
    raise InputError("labels", expected, f"no example of class {absent} in {describe_task(task)}; {remedy}")


def _check_accepted(name: str, refused_by: str | None) -> None:
    if refused_by is not None:
        raise InputError(name, f"None for {refused_by}, which minimizes no weighted loss", "a value")


def check_sample_weight(
    value: object, support: Tensor, mask: Tensor | None, *, refused_by: str | None, validate: bool
) -> Tensor | None:
    """Return the weights of the examples of all tasks; `refused_by` is the name of a head that cannot use them."""
    if value is None:
        return None
    _check_accepted("sample_weight", refused_by)
    value = check_tensor("sample_weight", value, "a tensor of numbers, one per support example", is_dense, like=support)
    value = _check_per_example("sample_weight", value, support, "one number per support example")
    if validate:
        inspect_values(_check_sample_weight, value, mask)
    return value


def _check_sample_weight(value: Tensor, mask: Tensor | None) -> None:
    if mask is not None:
        value = value.masked_fill(~mask, 1)
    wrong, empty = ~((value >= 0) & value.isfinite()), ~(value > 0).any(-1)

    def error() -> InputError:
        got = f"{value[wrong][0].item():g} in {describe_first_task(wrong.any(-1))}"
        return InputError("sample_weight", "finite numbers, at least 0", got)

    refuse(wrong, error)
    expected = "a positive weight in every task"
    refuse(empty, lambda: InputError("sample_weight", expected, f"none in {describe_first_task(empty)}"))


def check_prior(value: object, support: Tensor, ways: int, *, refused_by: str | None, validate: bool) -> Tensor | None:
    """Return the prior weights of all tasks, `(*batch, ways, d)`."""
    if value is None:
        return None
    _check_accepted("prior", refused_by)
    value = _check_features("prior", value, like=support)
    *batch, _, d = support.shape
    if value.shape == (ways, d):
        value = value.expand(*batch, ways, d)
    _check_match("prior", value, support, (*batch, ways, d), "one row of weights per class")
    if validate:
        check_finite("prior", value)
    return value


def check_init(value: object) -> Solution | None:
    """Return the solution at which a solver begins, without gradient."""
    if value is None:
        return None
    if not isinstance(value, Solution):
        raise InputError("init", "the solution of a previous fit or None", describe_type(value))
    return value.detach()


def check_regression(
    support: object, targets: object, mask: object, *, validate: bool
) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """Check the arguments of a fit; return them as tensors, and whether the targets lack an output dimension."""
    support, mask = _check_examples(support, mask)
    targets = check_tensor("targets", targets, "a tensor of floating-point values", is_float_tensor, like=support)
    examples = support.shape[:-1]
    single = targets.shape == examples
    shape = (*examples, max(1, targets.shape[-1])) if targets.ndim == support.ndim else examples
    _check_match("targets", targets, support, shape, "one value, or one row of values, per support example")
    if validate:
        inspect_values(_check_values, mask, support, targets.unsqueeze(-1) if single else targets)
    return support, targets, mask, single


def _check_examples(support: object, mask: object) -> tuple[Tensor, Tensor | None]:
    support = _check_features("support", support)
    refuse_meta("support", support)
    *_, n, d = support.shape
    if not n or not d:
        raise InputError("support", "at least one example and one feature, (*batch, n, d)", describe_shape(support))
    if mask is None:
        return support, None
    expected = "a tensor of bool, False at examples to ignore"
    mask = check_tensor("mask", mask, expected, is_bool_tensor, like=support)
    return support, _check_per_example("mask", mask, support, "one entry per support example")


def _check_values(mask: Tensor | None, support: Tensor, targets: Tensor | None = None) -> None:
    if mask is not None:
        empty, expected = ~mask.any(-1), "at least one example in every task"
        refuse(empty, lambda: InputError("mask", expected, f"none in {describe_first_task(empty)}"))
    for name, value in (("support", support), ("targets", targets)):
        if value is not None:
            check_finite_values(name, value if mask is None else value.masked_fill(~mask.unsqueeze(-1), 0))


def check_rows(features: object, rows: object, support: Tensor, *, validate: bool) -> tuple[Tensor, Tensor]:
    """Return a table of features and the numbers of its rows as tensors, or raise `InputError`.

    The rows are `(*batch, q)`, or `(q,)` for all tasks. Numbers out of range are an error on the CPU, where they would
    read foreign memory, and, with `validate`, on a GPU. Graphs do not look at them.
    """
    features = check_tensor("features", features, "a table of floating-point features", is_float_tensor, like=support)
    *batch, _, d = support.shape
    if features.ndim != 2 or features.shape[1] != d:
        expected = f"a table with the support's feature size, (examples, {d})"
        raise InputError("features", expected, describe_shape(features))
    rows = check_tensor("rows", rows, "a tensor of integers", is_integer_tensor, like=support).long()
    if rows.ndim != 1 and (list(rows.shape[:-1]) != batch or not rows.ndim):
        expected = f"the numbers of the queries of each task, {(*batch, 'q')}, or of all tasks, (q,)".replace("'", "")
        raise InputError("rows", expected, describe_shape(rows))
    for name, value in (("features", features), ("rows", rows)):
        _check_device(name, value, support)
    if not len(features) and rows.numel():
        raise InputError("features", "at least one row", describe_shape(features))
    if (validate or rows.is_cpu) and not torch.compiler.is_compiling():
        inspect_values(check_range, "rows", rows, len(features), len(features) - 1)
    return features, rows


def check_used_rows(used: Tensor, rows: Tensor) -> None:
    """Raise `InputError`, naming the row of the table, if one of the `used` rows with these numbers is not finite."""
    bad = ~torch.isfinite(used).all(-1)
    if bad.any():
        got = f"non-finite values in row {rows[bad][0].item()}"
        raise InputError("features", "finite values in the rows that are used", got)


def check_query(query: object, support: Tensor, *, validate: bool) -> Tensor:
    """Return the `query` as a tensor, or raise `InputError`."""
    query = _check_features("query", query, like=support)
    *batch, _, d = support.shape
    if query.ndim == 2 < support.ndim:  # the same queries for all tasks
        query = query.expand(*batch, *query.shape)
    what = "feature size" if query.shape[:-2] == support.shape[:-2] else "task dimensions"
    _check_match("query", query, support, (*batch, query.shape[-2], d), f"the {what} of the support")
    if validate:
        check_finite("query", query)
    return query
