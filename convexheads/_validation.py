"""Checks of arguments: plain values, support sets, queries and Gram matrices."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any, TypeGuard

import torch
from torch import Tensor

from convexheads._functorch import inspect_values
from convexheads.errors import InputError

Check = Callable[[str, Any], Any]
"""A function that takes the name and the value of an argument and returns the value to keep, or raises `InputError`."""
# With more classes than this, labels are almost certainly raw class ids, and the one-hot matrix would exhaust memory.
_MAX_WAYS = 2**20


def describe(value: object) -> str:
    """The `value` as an error shows it: its repr, plus the type unless it is a builtin."""
    kind = type(value)
    plain = kind.__module__ == "builtins" or kind.__name__ in repr(value)
    return repr(value) if plain else f"{value!r} ({kind.__module__}.{kind.__name__})"


def as_integer(value: object) -> int | None:
    """The `value` as an integer if it has `__index__` and is not a bool; None otherwise."""
    is_bool = type(value).__name__ in ("bool", "bool_")  # also NumPy's, which warns when it is used as an integer
    if is_bool or (isinstance(value, Tensor) and (value.ndim or value.dtype == torch.bool)):
        return None
    try:
        return operator.index(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, RuntimeError):  # the latter for a tensor without values
        return None


def check_positive_int(name: str, value: object, *, alternative: str = "") -> int:
    number = as_integer(value)
    if number is None or number < 1:
        raise InputError(name, f"an integer of at least 1{alternative}", describe(value))
    return number


def check_positive_ints(**values: object) -> list[int]:
    return [check_positive_int(name, value) for name, value in values.items()]


def check_seed(seed: object) -> int:
    """Return the `seed` if it is valid for the generators of PyTorch and NumPy, or raise `InputError`."""
    number = as_integer(seed)
    if number is None or number not in range(2**63):
        raise InputError("seed", "an integer from 0 to 2**63 - 1", describe(seed))
    return number


def check_rank(rank: object, world_size: object) -> tuple[int, int]:
    """Return the rank of a process and the number of processes, or raise `InputError` if there is no such process."""
    size, number = check_positive_int("world_size", world_size), as_integer(rank)
    if number is None or number not in range(size):
        raise InputError("rank", f"an integer from 0 to world_size - 1 = {size - 1}", describe(rank))
    return number, size


def check_bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise InputError(name, "True or False", describe(value))
    return value


def check_choice(name: str, value: Any, choices: Collection[str]) -> Any:
    """Return the `value` if it is one of the `choices`, or raise `InputError`."""
    if not isinstance(value, str) or value not in choices:
        raise InputError(name, f"one of {', '.join(choices)}", repr(value))
    return value


def check_real(
    name: str, value: Any, *, positive: bool = False, allow_zero: bool = False, alternative: str = ""
) -> float:
    """Return a real number or 0-d tensor as a finite float; in the error, `alternative` names what else is accepted."""
    number = math.nan
    if isinstance(value, Tensor):
        has_value = not (value.ndim or value.is_complex() or value.requires_grad or value.is_meta)
        number = float(value.item()) if has_value and value.dtype != torch.bool else math.nan
    elif isinstance(value, numbers.Real) and not isinstance(value, bool):
        with suppress(OverflowError):
            number = float(value)
    if not math.isfinite(number) or (positive and (number < 0 or (number == 0 and not allow_zero))):
        sign = "non-negative " if allow_zero else "positive " if positive else ""
        raise InputError(name, f"a {sign}finite number{alternative}", describe(value))
    return number


def check_fraction(name: str, value: Any, *, above_zero: bool = False) -> float:
    """Return a real number in [0, 1) or, with `above_zero`, in (0, 1] as a float, or raise `InputError`."""
    with suppress(InputError):
        number = check_real(name, value)
        if (0 < number <= 1) if above_zero else (0 <= number < 1):
            return number
    interval = "above 0 and at most 1" if above_zero else "at least 0 and below 1"
    raise InputError(name, f"a number that is {interval}", describe(value))


def optional(check: Check, default: Callable[[], Any] = lambda: None) -> Check:
    """Extend a check to None, for which it returns `default()`."""
    return lambda name, value: default() if value is None else check(name, value)


def is_dense(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.layout == torch.strided


def is_float_tensor(value: object) -> TypeGuard[Tensor]:
    """Whether the `value` is a tensor of floating-point numbers, excluding float8, which torch cannot sum."""
    return is_dense(value) and value.is_floating_point() and value.dtype.itemsize > 1


def is_integer_tensor(value: object) -> TypeGuard[Tensor]:
    return is_dense(value) and not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)


def describe_type(value: object) -> str:
    """The type of a `value` that is not the expected kind of tensor, in words."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"a tensor of {value.dtype}" if is_dense(value) else f"a tensor of {value.dtype}, {value.layout}"


def describe_shape(value: object) -> str:
    """The shape of a tensor, or the type of another value, in words."""
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def check_tensor(name: str, value: object, expected: str, is_kind: Callable[[object], bool] = is_dense) -> None:
    """Raise `InputError` unless the `value` is a tensor of the right kind, which `expected` describes."""
    if not is_kind(value):
        raise InputError(name, expected, describe_type(value))


def describe_task(index: Sequence[int]) -> str:
    """The task with this index, which is empty if there is no batch, in words."""
    return f"task {tuple(index)}" if index else "the task"


def describe_first_task(tasks: Tensor) -> str:
    """The first task for which this boolean tensor is True, in words."""
    return describe_task(tasks.nonzero()[0].tolist())


def check_finite(name: str, value: Tensor) -> None:
    """Raise `InputError`, naming the row, if a value is not finite."""
    inspect_values(_check_finite, name, value)


def _check_finite(name: str, value: Tensor) -> None:
    if torch.isfinite(value.sum()):  # fast path: one reduction
        return
    bad = ~torch.isfinite(value).all(-1)
    if bad.any():
        got = f"non-finite values in row {bad.nonzero()[0, -1].item()} of {describe_first_task(bad.any(-1))}"
        raise InputError(name, "finite values", got)


def _check_features(name: str, value: Any) -> None:
    check_tensor(name, value, "a tensor of floating-point features", is_float_tensor)
    if value.ndim < 2:
        raise InputError(name, "at least two dimensions, (*batch, examples, features)", describe_shape(value))


def _check_match(name: str, value: Tensor, support: Tensor, shape: tuple[int, ...], expected: str) -> None:
    """Raise `InputError` unless the `value` has this `shape`, which `expected` describes, and the support's device."""
    if value.shape != shape:
        raise InputError(name, f"{expected}, {tuple(shape)}", describe_shape(value))
    if value.device != support.device:
        raise InputError(name, f"the support's device, {support.device}", f"device {value.device}")


def check_classification(
    support: Any, labels: Any, ways: Any, mask: Any, *, requires_all_classes: bool, validate: bool
) -> int:
    """Check the arguments of a fit; return the number of classes, or the largest number if tasks differ."""
    _check_examples(support, mask)
    check_tensor("labels", labels, "a tensor of integers 0..ways-1", is_integer_tensor)
    if labels.shape == support.shape[: labels.ndim] and support.ndim > labels.ndim + 1:
        expected = f"flat features, {(*labels.shape, 'd')}".replace("'", "")
        raise InputError("support", expected, describe_shape(support))
    _check_match("labels", labels, support, support.shape[:-1], "one label per support example")
    if isinstance(ways, Tensor) and (ways.ndim or not is_integer_tensor(ways)):
        check_tensor("ways", ways, "integers, one per task", is_integer_tensor)
        _check_match("ways", ways, support, labels.shape[:-1], "integers, one per task")
    elif ways is not None:
        ways = check_positive_int("ways", ways, alternative=", a tensor of them, or None")
    return inspect_values(_check_labels, support, labels, ways, mask, requires_all_classes, validate)


def _check_labels(
    support: Tensor, labels: Tensor, ways: int | Tensor | None, mask: Tensor | None, all_classes: bool, validate: bool
) -> int:
    labels = labels.long()  # torch cannot compare its unsigned types
    if mask is not None:
        labels = labels.masked_fill(~mask, 0)
    if isinstance(ways, Tensor):
        ways = ways.long()
        max_ways = int(ways.max().item()) if ways.numel() else 1
    else:
        max_ways = ways or (max(1, int(labels.max().item()) + 1) if labels.numel() else 1)
    if max_ways > _MAX_WAYS:
        origin = "" if ways else "; without ways=, this is the largest label plus one, so number the classes from 0"
        raise InputError("ways", f"at most {_MAX_WAYS}", f"{max_ways}{origin}")
    if not validate:
        return max_ways
    _check_values(mask, support)
    if isinstance(ways, Tensor) and (ways < 1).any():
        raise InputError("ways", "at least 1", f"{ways[ways < 1][0].item()} in {describe_first_task(ways < 1)}")
    limit = ways.unsqueeze(-1) if isinstance(ways, Tensor) else max_ways
    check_range("labels", labels, limit, ways - 1 if isinstance(ways, int) else "ways-1")
    if all_classes:
        classes = torch.arange(max_ways, device=labels.device)
        present = labels.unsqueeze(-1) == classes
        present = (present if mask is None else present & mask.unsqueeze(-1)).any(-2)
        if (missing := ~present & (classes < limit)).any():
            got = f"no example of class {missing.nonzero()[0, -1].item()} in {describe_first_task(missing.any(-1))}"
            raise InputError("labels", "at least one example of every class", got)
    return max_ways


def check_range(name: str, labels: Tensor, limit: int | Tensor, highest: int | str) -> None:
    """Raise `InputError` unless the labels are non-negative and below `limit`; the message names the `highest`."""
    if (wrong := (labels < 0) | (labels >= limit)).any():
        got = f"{labels[wrong][0].item()} in {describe_first_task(wrong.any(-1))}"
        raise InputError(name, f"values 0..{highest}", got)


def check_regression(support: Any, targets: Any, mask: Any, *, validate: bool) -> bool:
    """Check the arguments of a fit; return whether the targets lack an output dimension."""
    _check_examples(support, mask)
    check_tensor("targets", targets, "a tensor of floating-point values", is_float_tensor)
    examples = support.shape[:-1]
    single = targets.shape == examples
    shape = (*examples, max(1, targets.shape[-1])) if targets.ndim == support.ndim else examples
    _check_match("targets", targets, support, shape, "one value, or one row of values, per support example")
    if validate:
        inspect_values(_check_values, mask, support, targets.unsqueeze(-1) if single else targets)
    return single


def _check_examples(support: Any, mask: Any) -> None:
    _check_features("support", support)
    *batch, n, d = support.shape
    if not n or not d:
        raise InputError("support", "at least one example and one feature, (*batch, n, d)", describe_shape(support))
    if mask is not None:
        if not is_dense(mask) or mask.dtype != torch.bool:
            raise InputError("mask", "a tensor of bool, False at examples to ignore", describe_type(mask))
        _check_match("mask", mask, support, (*batch, n), "one entry per support example")


def _check_values(mask: Tensor | None, support: Tensor, targets: Tensor | None = None) -> None:
    if mask is not None and (empty := ~mask.any(-1)).any():
        raise InputError("mask", "at least one example in every task", f"none in {describe_first_task(empty)}")
    for name, value in (("support", support), ("targets", targets)):
        if value is not None:
            _check_finite(name, value if mask is None else value.masked_fill(~mask.unsqueeze(-1), 0))


def check_query(query: Any, support: Tensor, *, validate: bool) -> None:
    _check_features("query", query)
    *batch, _, d = support.shape
    what = "feature size" if query.shape[:-2] == support.shape[:-2] else "task dimensions"
    _check_match("query", query, support, (*batch, query.shape[-2], d), f"the {what} of the support")
    if validate:
        check_finite("query", query)


def check_definite(gram: Tensor) -> None:
    """Raise `InputError` if a Gram matrix has an eigenvalue that is too negative to be a rounding error."""
    finite = torch.isfinite(gram).all(-1).all(-1)[..., None, None]  # eigvalsh fails for non-finite matrices
    values = torch.linalg.eigvalsh(gram.where(finite, 0))
    smallest, size = values[..., 0], values.abs().amax(-1)
    if (negative := smallest < -1e-9 * size).any():
        got = f"a Gram matrix with the eigenvalue {smallest[negative][0].item():.3g} in {describe_first_task(negative)}"
        raise InputError("kernel", "a positive semi-definite kernel", got)
