"""Checks of arguments: plain values, tensors and what is accepted in their place, and Gram matrices."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from convexheads._functorch import inspect_values
from convexheads._looks import check, refuse
from convexheads.errors import InputError

Check = Callable[[str, Any], Any]
"""A function that takes the name and the value of an argument and returns the value to keep, or raises `InputError`."""


@runtime_checkable
class _Array(Protocol):
    def __array__(self, *args: Any, **kwargs: Any) -> Any: ...


ArrayLike = _Array | Sequence[Any]
"""What is accepted in place of a tensor: a NumPy array, any object that NumPy can convert, or (nested) lists."""


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


_INTEGERS = {getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)}


def is_dense(value: object) -> TypeGuard[Tensor]:
    """Whether the `value` is a tensor whose entries can be read one by one."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not _special_kind(value)


def _special_kind(value: Tensor) -> str:
    """What makes a strided tensor unusable, in one word; empty for the others."""
    if value.is_nested:
        return "nested"
    if value.is_quantized:
        return "quantized"
    return "masked" if type(value).__module__.startswith("torch.masked") else ""


def refuse_meta(name: str, value: Tensor) -> None:
    """Raise `InputError` for a tensor of the meta device, which has no values."""
    if value.device.type == "meta":
        raise InputError(name, "a tensor with values", f"{describe_type(value)} on the device meta")


def is_float_tensor(value: object) -> TypeGuard[Tensor]:
    """Whether the `value` is a tensor of floating-point numbers, excluding float8, which torch cannot sum."""
    return is_dense(value) and value.is_floating_point() and value.dtype.itemsize > 1


def is_integer_tensor(value: object) -> TypeGuard[Tensor]:
    return is_dense(value) and value.dtype in _INTEGERS


def is_bool_tensor(value: object) -> TypeGuard[Tensor]:
    return is_dense(value) and value.dtype == torch.bool


def describe_type(value: object) -> str:
    """The type of a `value` that is not the expected kind of tensor, in words."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    kind = _special_kind(value) or ("" if value.layout == torch.strided else str(value.layout))
    return f"a tensor of {value.dtype}{kind and ', '}{kind}"


def describe_shape(value: object) -> str:
    """The shape of a tensor, or the type of another value, in words."""
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def check_tensor(
    name: str,
    value: object,
    expected: str,
    is_kind: Callable[[object], TypeGuard[Tensor]] = is_dense,
    *,
    like: Tensor | None = None,
) -> Tensor:
    """Return the `value` as a tensor of the right kind, which `expected` describes, or raise `InputError`.

    This is the only place that converts arrays and lists: without a copy if possible, in the dtype of the array, and to
    the device of `like`, because they have none themselves.
    """
    if isinstance(value, Tensor):
        tensor = value
    else:
        try:
            tensor = _convert(value)
        except (ImportError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(name, expected, f"{describe_type(value)} ({error})") from error
        if tensor is not None and like is not None:
            tensor = tensor.to(like.device)
    if not is_kind(tensor):
        is_usable = tensor is None or is_dense(tensor)
        converted = "" if tensor is None or tensor is value else f" of {tensor.dtype}"
        raise InputError(name, expected if is_usable else "a dense tensor", f"{describe_type(value)}{converted}")
    return tensor


def _convert(value: object) -> Tensor | None:
    """An array or a list as a tensor; None for anything else."""
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        first = value[0] if value else None
        if isinstance(first, Tensor):
            return torch.stack(tuple(value))  # keeps gradients
        if not isinstance(first, _Array):
            return torch.tensor(value)
    elif not isinstance(value, _Array):
        return None
    import numpy as np

    array = np.asarray(value)
    is_usable = array.flags["W"] and all(stride >= 0 for stride in array.strides)
    return torch.from_numpy(array if is_usable else array.copy())


def describe_task(index: Sequence[int]) -> str:
    """The task with this index, which is empty if there is no batch, in words."""
    return f"task {tuple(index)}" if index else "the task"


def describe_first_task(tasks: Tensor) -> str:
    """The first task for which this boolean tensor is True, in words."""
    return describe_task(tasks.nonzero()[0].tolist())


def check_finite(name: str, value: Tensor) -> None:
    """Raise `InputError`, naming the row, if a value is not finite."""
    inspect_values(check_finite_values, name, value)


def check_finite_values(name: str, value: Tensor) -> None:
    check(value.sum(), partial(_refuse_non_finite, name, value))  # a finite sum has finite terms


def _refuse_non_finite(name: str, value: Tensor) -> None:
    bad = ~torch.isfinite(value).all(-1)
    if bad.any():
        got = f"non-finite values in row {bad.nonzero()[0, -1].item()} of {describe_first_task(bad.any(-1))}"
        raise InputError(name, "finite values", got)


def check_range(name: str, labels: Tensor, limit: int | Tensor, highest: int | str, remedy: str = "") -> None:
    """Raise `InputError` unless the labels are non-negative and below `limit`; the message names the `highest`."""
    wrong = (labels < 0) | (labels >= limit)

    def error() -> InputError:
        got = f"{labels[wrong][0].item()} in {describe_first_task(wrong.any(-1))}{remedy}"
        return InputError(name, f"values 0..{highest}", got)

    refuse(wrong, error)


def check_definite(gram: Tensor) -> None:
    """Raise `InputError` if a Gram matrix has an eigenvalue that is too negative to be a rounding error."""
    finite = torch.isfinite(gram).all(-1).all(-1)[..., None, None]  # eigvalsh fails for non-finite matrices
    values = torch.linalg.eigvalsh(gram.where(finite, 0))
    smallest, size = values[..., 0], values.abs().amax(-1)
    rounding = max(1e-9, 1e3 * torch.finfo(gram.dtype).eps)
    if (negative := smallest < -rounding * size).any():
        got = f"a Gram matrix with the eigenvalue {smallest[negative][0].item():.3g} in {describe_first_task(negative)}"
        raise InputError("kernel", "a positive semi-definite kernel", got)


def check_similarity(gram: Tensor, *, allow_distances: bool) -> None:
    """Raise `InputError` if a Gram matrix is not symmetric, or if it is one of distances that are not allowed."""
    _check_symmetric(gram)
    if allow_distances:
        return
    squared, largest = gram.diagonal(dim1=-2, dim2=-1), gram.abs().amax(-1)
    # In a positive semi-definite matrix, the other values of such a row are zero. Rounding may hide that in tiny rows.
    wrong = (squared < 1e-9 * largest) & (largest >= 1e-3 * largest.amax(-1, keepdim=True))

    def error() -> InputError:
        got = f"k(x, x) = {squared[wrong][0].item() + 0:.3g} in {describe_first_task(wrong.any(-1))}"
        return InputError("kernel", "a positive semi-definite kernel, which is a similarity and not a distance", got)

    refuse(wrong, error)


def _check_symmetric(gram: Tensor) -> None:
    difference, size = (gram - gram.mT).abs().amax((-2, -1)), gram.abs().amax((-2, -1))
    wrong = difference > 1e-6 * size

    def error() -> InputError:
        got = f"values that differ by {difference[wrong][0].item():.3g} in {describe_first_task(wrong)}"
        return InputError("kernel", "a symmetric kernel, k(x, y) = k(y, x)", got)

    refuse(wrong, error)
