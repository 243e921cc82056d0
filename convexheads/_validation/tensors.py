"""Checks of tensors: support sets, queries and Gram matrices.

Types and shapes are always checked. Checks that read values take `validate`; where it is False, they read nothing, and
so never wait for a GPU.
"""

from __future__ import annotations

from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor

from convexheads._functorch import inspect_values
from convexheads._validation.values import as_integer, describe
from convexheads.errors import InputError

# With more classes than this, labels are almost certainly raw class ids, and the one-hot matrix would exhaust memory.
_MAX_WAYS = 2**20


def is_dense(value: object) -> TypeGuard[Tensor]:
    """Whether the `value` is a tensor, and not a sparse one."""
    return isinstance(value, Tensor) and value.layout == torch.strided


def is_float_tensor(value: object) -> TypeGuard[Tensor]:
    """Whether the `value` is a tensor of floating-point numbers, excluding float8, which torch cannot sum."""
    return is_dense(value) and value.is_floating_point() and value.dtype.itemsize > 1


def is_integer_tensor(value: object) -> TypeGuard[Tensor]:
    """Whether the `value` is a tensor of integers of any width."""
    return is_dense(value) and not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)


def describe_type(value: object) -> str:
    """The type of a `value` that should have been another kind of tensor, in words."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"a tensor of {value.dtype}" if is_dense(value) else f"a tensor of {value.dtype}, {value.layout}"


def describe_first_task(tasks: Tensor) -> str:
    """The first of the tasks of which this is true, in words."""
    return f"task {tuple(tasks.nonzero()[0].tolist())}" if tasks.ndim else "the task"


def check_finite(name: str, value: Tensor) -> None:
    """Raise `InputError`, which names the row, where a value is not finite."""
    inspect_values(_check_finite, name, value)


def _check_finite(name: str, value: Tensor) -> None:
    if torch.isfinite(value.sum()):  # fast path: one reduction
        return
    bad = ~torch.isfinite(value).all(-1)
    if bad.any():
        *task, row = bad.nonzero()[0].tolist()
        where = f" of task {tuple(task)}" if task else ""
        raise InputError(name, "finite values", f"non-finite values in row {row}{where}")


def _check_features(name: str, value: object) -> None:
    if not is_float_tensor(value):
        raise InputError(name, "a tensor of floating-point features", describe_type(value))
    if value.ndim < 2:
        raise InputError(name, "at least two dimensions, (*batch, examples, features)", _shape(value))


def _check_device(name: str, value: Tensor, support: Tensor) -> None:
    if value.device != support.device:
        raise InputError(name, f"the support's device, {support.device}", f"device {value.device}")


def _shape(value: Tensor) -> str:
    return f"shape {tuple(value.shape)}"


# Support sets and queries


def check_classification(
    support: Any, labels: Any, ways: Any, mask: Any, *, requires_all_classes: bool, validate: bool
) -> int:
    """Return the number of classes (the largest, where `ways` has that of each task), or raise `InputError`.

    Args:
        support: features, `(*batch, n, d)`.
        labels: integers, `(*batch, n)`.
        ways: number of classes, that of each task, `(*batch,)`, or None for the largest label plus one.
        mask: `(*batch, n)`, or None.
        requires_all_classes: whether a class without examples is an error.
        validate: whether to check values.
    """
    _check_examples(support, mask)
    if not is_integer_tensor(labels):
        raise InputError("labels", "a tensor of integers 0..ways-1", describe_type(labels))
    if labels.shape == support.shape[: labels.ndim] and support.ndim > labels.ndim + 1:
        raise InputError("support", f"flat features, {(*labels.shape, 'd')}".replace("'", ""), _shape(support))
    if labels.shape != support.shape[:-1]:
        raise InputError("labels", f"one label per support example, {tuple(support.shape[:-1])}", _shape(labels))
    _check_device("labels", labels, support)
    if isinstance(ways, Tensor) and (ways.ndim or not is_integer_tensor(ways)):
        if ways.shape != labels.shape[:-1] or not is_integer_tensor(ways):
            got = f"a tensor of {ways.dtype}, shape {tuple(ways.shape)}"
            raise InputError("ways", f"integers, one per task, {tuple(labels.shape[:-1])}", got)
        _check_device("ways", ways, support)
    elif ways is not None:
        number = as_integer(ways)
        if number is None or number < 1:
            raise InputError("ways", "an integer of at least 1, a tensor of them, or None", describe(ways))
        _check_max_ways(number)
        if not validate:
            return number
        ways = number
    check = partial(_check_labels, requires_all_classes=requires_all_classes, validate=validate)
    return inspect_values(check, support, labels, ways, mask)


def _check_labels(
    support: Tensor,
    labels: Tensor,
    ways: int | Tensor | None,
    mask: Tensor | None,
    *,
    requires_all_classes: bool,
    validate: bool,
) -> int:
    labels = labels.long()  # torch cannot compare its unsigned types
    if mask is not None:
        labels = labels.masked_fill(~mask, 0)
    highest = ways - 1 if isinstance(ways, int) else "ways-1"
    if isinstance(ways, Tensor):
        ways = ways.long()
        max_ways = int(ways.max().item()) if ways.numel() else 1
    elif ways is None:
        ways = max_ways = max(1, int(labels.max().item()) + 1) if labels.numel() else 1
    else:
        max_ways = ways
    if not validate:
        return max_ways
    _check_values(support, mask)
    if isinstance(ways, Tensor) and (ways < 1).any():
        raise InputError("ways", "at least 1", f"{ways[ways < 1][0].item()} in {describe_first_task(ways < 1)}")
    limit = ways.unsqueeze(-1) if isinstance(ways, Tensor) else ways
    wrong = (labels < 0) | (labels >= limit)
    if wrong.any():
        got = f"{labels[wrong][0].item()} in {describe_first_task(wrong.any(-1))}"
        raise InputError("labels", f"values 0..{highest}", got)
    _check_max_ways(max_ways)
    if requires_all_classes:
        classes = torch.arange(max_ways, device=labels.device)
        present = labels.unsqueeze(-1) == classes
        present = (present if mask is None else present & mask.unsqueeze(-1)).any(-2)
        missing = ~present & (classes < limit)
        if missing.any():
            *task, label = missing.nonzero()[0].tolist()
            where = f" in task {tuple(task)}" if task else ""
            raise InputError("labels", "at least one example of every class", f"no example of class {label}{where}")
    return max_ways


def _check_max_ways(ways: int) -> None:
    if ways > _MAX_WAYS:
        expected = f"at most {_MAX_WAYS}; without ways=, it is the largest label plus one: number the classes from 0"
        raise InputError("ways", expected, ways)


def check_regression(support: Any, targets: Any, mask: Any, *, validate: bool) -> bool:
    """Return whether targets lack a dimension of outputs, or raise `InputError`.

    Args:
        support: features, `(*batch, n, d)`.
        targets: values, `(*batch, n)` or `(*batch, n, outputs)`.
        mask: `(*batch, n)`, or None.
        validate: whether to check values.
    """
    _check_examples(support, mask)
    if not is_float_tensor(targets):
        raise InputError("targets", "a tensor of floating-point values", describe_type(targets))
    single = targets.shape == support.shape[:-1]
    if not single and (
        targets.ndim != support.ndim or targets.shape[:-1] != support.shape[:-1] or not targets.shape[-1]
    ):
        expected = f"one value, or one row of values, per support example, {tuple(support.shape[:-1])} or with outputs"
        raise InputError("targets", expected, _shape(targets))
    _check_device("targets", targets, support)
    if validate:
        inspect_values(_check_targets, support, targets if not single else targets.unsqueeze(-1), mask)
    return single


def _check_targets(support: Tensor, targets: Tensor, mask: Tensor | None) -> None:
    _check_values(support, mask)
    _check_finite("targets", targets if mask is None else targets.masked_fill(~mask.unsqueeze(-1), 0))


def _check_examples(support: Any, mask: Any) -> None:
    _check_features("support", support)
    *batch, n, d = support.shape
    if n == 0 or d == 0:
        raise InputError("support", "at least one example and one feature, (*batch, n, d)", _shape(support))
    if mask is not None:
        if not is_dense(mask) or mask.dtype != torch.bool:
            raise InputError("mask", "a tensor of bool, False at examples to leave out", describe_type(mask))
        if mask.shape != (*batch, n):
            raise InputError("mask", f"one entry per support example, {(*batch, n)}", _shape(mask))
        _check_device("mask", mask, support)


def _check_values(support: Tensor, mask: Tensor | None) -> None:
    if mask is not None:
        empty = ~mask.any(-1)
        if empty.any():
            got = f"no example left in {describe_first_task(empty)}"
            raise InputError("mask", "at least one example in every task", got)
        support = support.masked_fill(~mask.unsqueeze(-1), 0)
    _check_finite("support", support)


def check_query(query: Any, support: Tensor, *, validate: bool) -> None:
    """Raise `InputError` unless `query` goes with the support features of the fit."""
    _check_features("query", query)
    expected = (*support.shape[:-2], query.shape[-2], support.shape[-1])
    if query.shape != expected:
        what = "feature size" if query.shape[:-1] == expected[:-1] else "task dimensions"
        raise InputError(
            "query", f"the {what} of the support, {(*expected[:-2], 'q', expected[-1])}".replace("'", ""), _shape(query)
        )
    _check_device("query", query, support)
    if validate:
        check_finite("query", query)


# Kernels


def check_gram(gram: Any, features: Tensor, others: Tensor, *, validate: bool) -> None:
    """Raise `InputError` unless a kernel returned a Gram matrix of the two, of finite values."""
    expected = (*features.shape[:-1], others.shape[-2])
    if not isinstance(gram, Tensor) or gram.shape != expected:
        got = _shape(gram) if isinstance(gram, Tensor) else type(gram).__name__
        raise InputError("kernel", f"a Gram matrix of shape {expected}", f"a result of {got}")
    if gram.dtype != features.dtype:
        raise InputError("kernel", f"the dtype of its arguments, {features.dtype}", f"a result of {gram.dtype}")
    if validate:
        check_finite("kernel", gram)


def check_definite(gram: Tensor) -> None:
    """Raise `InputError` where a Gram matrix has an eigenvalue that is negative beyond rounding."""
    inspect_values(_check_definite, gram)


def _check_definite(gram: Tensor) -> None:
    finite = torch.isfinite(gram).all(-1).all(-1)[..., None, None]  # torch raises an error of its own elsewhere
    values = torch.linalg.eigvalsh(gram.where(finite, 0))
    smallest, size = values[..., 0], values.abs().amax(-1)
    negative = smallest < -1e-9 * size
    if negative.any():
        got = f"a Gram matrix with the eigenvalue {smallest[negative][0].item():.3g} in {describe_first_task(negative)}"
        raise InputError("kernel", "a positive semi-definite kernel", got)
