"""Hyper-parameters: floats, or parameters that learn along with the backbone."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

from convexheads.errors import InputError, check_flag, described

_LARGEST = torch.finfo(torch.float64).max
_LEAST, _MOST = 1e-37, 1e38  # in float32, a little less than its range


class OneLine(nn.Module):
    """A module that prints as the call that made it, parts included; `extra_repr` gives the arguments."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


class Learnable(OneLine):
    """A hyper-parameter that receives gradients.

    A positive one is stored as its logarithm, so that no optimiser step can make it negative. What differs: the code
    published by Lee et al. 2019 keeps the scale of their Eq. 12 as an unconstrained parameter.

    Args:
        initial: starting value, a number that float32 holds (at most 1e38), and from 1e-37 on unless `signed`.
        signed: whether it may take any sign, as a bias may. Default False.

    Raises:
        InputError: `initial` is not such a number.

    Example:
        `SVMHead(C=Learnable(0.1), scale=Learnable(1.0))`
    """

    def __init__(self, initial: float, *, signed: bool = False) -> None:
        super().__init__()
        check_flag("Learnable(signed)", signed)
        self.signed = signed
        (finite if signed else positive)("Learnable(initial)", initial, learnable=False)
        if abs(initial) > _MOST or (initial < _LEAST and not signed):
            raise InputError("Learnable(initial)", initial, f"one that float32 holds, from {_LEAST} to {_MOST}")
        if signed:
            self.signed_value = nn.Parameter(torch.tensor(float(initial)))
        else:
            self.log_value = nn.Parameter(torch.tensor(math.log(initial)))

    @property
    def value(self) -> Tensor:
        """The current value, a scalar tensor `()` with gradient, on the device of the module."""
        return self.signed_value if self.signed else self.log_value.exp()

    def extra_repr(self) -> str:
        return repr(float(f"{self.value.item():.6g}")) + (", signed=True" if self.signed else "")


Hyperparameter = float | Learnable
"""A constant, or a parameter that learns."""
_T = TypeVar("_T", float, Learnable, Hyperparameter)


def positive(name: str, value: _T, *, or_zero: bool = False, learnable: bool = True) -> _T:
    """Return `value` if it is a positive finite number (or zero, or a positive `Learnable`, where allowed).

    Args:
        name: of the argument, for the error.
        value: a number or a `Learnable`.
        or_zero: whether zero will do. Default False.
        learnable: whether a `Learnable` will do. Default True.

    Raises:
        InputError: it is not.
    """
    wanted = f"a {'non-negative' if or_zero else 'positive'} finite number{' or Learnable(...)' if learnable else ''}"
    if isinstance(value, Learnable):
        if value.signed or not learnable:
            raise InputError(name, repr(value), wanted + (", not signed" if learnable else ""))
        return value
    if not _is_number(value):
        raise InputError(name, described(value), wanted)
    if value < 0 or (value == 0 and not or_zero):
        raise InputError(name, value, wanted)
    return value


def finite(name: str, value: _T, *, learnable: bool = True) -> _T:
    """Return `value` if it is a finite number or, if `learnable`, a `Learnable`, of any sign.

    Args:
        name: of the argument, for the error.
        value: a number or a `Learnable`.
        learnable: whether a `Learnable` will do. Default True.

    Raises:
        InputError: it is neither.
    """
    if not (learnable and isinstance(value, Learnable)) and not _is_number(value):
        wanted = "a finite number" + (" or Learnable(..., signed=True)" if learnable else "")
        raise InputError(name, described(value), wanted)
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(abs(value) <= _LARGEST)


def value_of(hyperparameter: Hyperparameter, like: Tensor) -> Tensor:
    """The hyper-parameter as a scalar tensor of the dtype and device of `like`, through which gradients reach it.

    Args:
        hyperparameter: a number or a `Learnable`.
        like: a tensor that supplies the dtype and the device.

    Returns:
        A tensor without dimensions, `()`.
    """
    if isinstance(hyperparameter, Learnable):
        return hyperparameter.value.to(like)
    return torch.full((), hyperparameter, dtype=like.dtype, device=like.device)  # which nothing waits for


def display(hyperparameter: Hyperparameter) -> str:
    """The `hyperparameter`, a number or a `Learnable`, as it stands in a constructor call."""
    return repr(hyperparameter) if isinstance(hyperparameter, Learnable) else repr(float(hyperparameter))
