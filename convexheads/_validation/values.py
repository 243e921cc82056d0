"""Checks of plain values: numbers, flags and seeds."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import torch
from torch import Tensor

from convexheads.errors import InputError

Check = Callable[[str, Any], Any]
"""From the name of an argument and its value to the value to keep; raises `InputError`."""
_T = TypeVar("_T")


def describe(value: object) -> str:
    """The `value` as an error shows it: its repr, plus the type unless it is a builtin."""
    kind = type(value)
    plain = kind.__module__ == "builtins" or kind.__name__ in repr(value)
    return repr(value) if plain else f"{value!r} ({kind.__module__}.{kind.__name__})"


def as_integer(value: object) -> int | None:
    """The integer that the `value` stands for, anything with `__index__` but a bool; None for all else."""
    is_bool = type(value).__name__ in ("bool", "bool_")  # also NumPy's, which warns when it is used as an integer
    if is_bool or (isinstance(value, Tensor) and (value.ndim or value.dtype == torch.bool)):
        return None
    try:
        return operator.index(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, RuntimeError):  # the latter of a tensor without values
        return None


def as_real(value: object) -> float | None:
    """The finite real number in `value`, which may be a tensor without dimensions; None for all else."""
    if isinstance(value, Tensor):
        if value.ndim or value.is_complex() or value.dtype == torch.bool or value.requires_grad or value.is_meta:
            return None
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def is_positive_int(value: object) -> bool:
    """Whether the `value` is an integer of at least 1."""
    return (as_integer(value) or 0) >= 1


def check_positive_int(name: str, value: object) -> int:
    """Return the `value` as an integer of at least 1, or raise `InputError`."""
    number = as_integer(value)
    if number is None or number < 1:
        raise InputError(name, "an integer of at least 1", describe(value))
    return number


def check_positive_ints(**values: object) -> None:
    """Raise `InputError` unless each is an integer of at least 1; by the names that the error is to show."""
    for name, value in values.items():
        check_positive_int(name, value)


def check_seed(seed: object) -> None:
    """Raise `InputError` unless this is a seed of PyTorch's and NumPy's generators."""
    number = as_integer(seed)
    if number is None or not 0 <= number < 2**63:
        raise InputError("seed", "an integer from 0 to 2**63 - 1", describe(seed))


def check_rank(rank: object, world_size: object) -> None:
    """Raise `InputError` unless there is a process of this rank among `world_size` processes."""
    size = check_positive_int("world_size", world_size)
    if as_integer(rank) not in range(size):
        raise InputError("rank", f"an integer from 0 to world_size - 1 = {size - 1}", describe(rank))


def check_bool(name: str, value: object) -> bool:
    """Return the `value` if it is True or False, or raise `InputError`."""
    if not isinstance(value, bool):
        raise InputError(name, "True or False", describe(value))
    return value


def check_choice(name: str, value: Any, choices: Collection[str]) -> Any:
    """Return the `value` if it is one of the `choices`, or raise `InputError`."""
    if not isinstance(value, str) or value not in choices:
        raise InputError(name, f"one of {', '.join(choices)}", repr(value))
    return value


def check_real(
    name: str, value: object, *, positive: bool = False, allow_zero: bool = False, alternative: str = ""
) -> float:
    """Return the `value` as a finite float, or raise `InputError`.

    Args:
        name: of the argument, for the error.
        value: anything.
        positive: whether it has to be positive. Defaults to False.
        allow_zero: whether a positive one may be zero. Defaults to False.
        alternative: what else the argument accepts, for the error. Defaults to nothing.
    """
    number = as_real(value)
    if number is None or (positive and (number < 0 or (number == 0 and not allow_zero))):
        sign = "non-negative " if allow_zero else "positive " if positive else ""
        raise InputError(name, f"a {sign}finite number{alternative}", describe(value))
    return number


def optional(check: Callable[[str, Any], _T]) -> Callable[[str, Any], _T | None]:
    """The check, for a value that may also be None."""
    return lambda name, value: None if value is None else check(name, value)
