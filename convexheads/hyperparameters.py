"""Hyper-parameters: floats, or parameters that learn along with the backbone."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

from convexheads.errors import InputError


class OneLine(nn.Module):
    """A module that prints as the call that made it, parts included."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


class Learnable(OneLine):
    """A hyper-parameter that receives gradients.

    A positive one is stored as its logarithm, so that no optimiser step can make it negative. The paper's code keeps
    the scale of Eq. 12 as an unconstrained parameter instead.

    Args:
        initial: starting value, finite, and positive unless `signed`.
        signed: whether it may take any sign, as a bias may. Default False.

    Raises:
        InputError: `initial` is not such a number.

    Example:
        `SVMHead(C=Learnable(0.1), scale=Learnable(1.0))`
    """

    def __init__(self, initial: float, *, signed: bool = False) -> None:
        super().__init__()
        self.signed = signed
        if signed:
            self.signed_value = nn.Parameter(torch.tensor(float(finite("Learnable(initial)", initial))))
        else:
            self.log_value = nn.Parameter(
                torch.tensor(math.log(positive("Learnable(initial)", initial, learnable=False)))
            )

    @property
    def value(self) -> Tensor:
        """The current value, a scalar tensor with gradient."""
        return self.signed_value if self.signed else self.log_value.exp()

    def extra_repr(self) -> str:
        return repr(float(f"{self.value.item():.6g}")) + (", signed=True" if self.signed else "")


Hyperparameter = float | Learnable
_T = TypeVar("_T", float, Learnable, Hyperparameter)


def positive(name: str, value: _T, *, or_zero: bool = False, learnable: bool = True) -> _T:
    """Return `value` if it is a positive finite number (or zero, or a positive `Learnable`, where allowed).

    Raises:
        InputError: it is not.
    """
    wanted = f"a {'non-negative' if or_zero else 'positive'} finite number{' or Learnable(...)' if learnable else ''}"
    if isinstance(value, Learnable):
        if value.signed or not learnable:
            raise InputError(name, repr(value), wanted + (", not signed" if learnable else ""))
        return value
    if not _is_number(value):
        raise InputError(name, repr(value), wanted)
    if value < 0 or (value == 0 and not or_zero):
        raise InputError(name, value, wanted)
    return value


def finite(name: str, value: _T) -> _T:
    """Return `value` if it is a finite number or a `Learnable`, of any sign.

    Raises:
        InputError: it is neither.
    """
    if not isinstance(value, Learnable) and not _is_number(value):
        raise InputError(name, repr(value), "a finite number or Learnable(..., signed=True)")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def value_of(hyperparameter: Hyperparameter, like: Tensor) -> Tensor:
    """The hyper-parameter as a scalar tensor of the dtype and device of `like`."""
    if isinstance(hyperparameter, Learnable):
        return hyperparameter.value.to(like)
    return torch.as_tensor(hyperparameter, dtype=like.dtype, device=like.device)


def display(hyperparameter: Hyperparameter) -> str:
    """The hyper-parameter as it stands in a constructor call."""
    return repr(hyperparameter) if isinstance(hyperparameter, Learnable) else repr(float(hyperparameter))
