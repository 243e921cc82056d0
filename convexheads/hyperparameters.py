"""Hyper-parameters: floats, or positive parameters that learn along with the backbone."""

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
    """A positive hyper-parameter that receives gradients.

    Stored as its logarithm, so that no optimiser step can make it negative. The paper's code keeps the scale of
    Eq. 12 as an unconstrained parameter instead.

    Args:
        initial: starting value, positive and finite.

    Raises:
        InputError: `initial` is not a positive finite number.

    Example:
        `SVMHead(C=Learnable(0.1), scale=Learnable(1.0))`
    """

    def __init__(self, initial: float) -> None:
        super().__init__()
        self.log_value = nn.Parameter(torch.tensor(math.log(positive("Learnable(initial)", initial))))

    @property
    def value(self) -> Tensor:
        """The current value, a scalar tensor with gradient."""
        return self.log_value.exp()

    def extra_repr(self) -> str:
        return repr(float(f"{self.value.item():.6g}"))


Hyperparameter = float | Learnable
_T = TypeVar("_T", float, Learnable, Hyperparameter)


def positive(name: str, value: _T, *, or_zero: bool = False) -> _T:
    """Return `value` if it is a positive finite number (or zero, where allowed) or a `Learnable`.

    Raises:
        InputError: it is neither.
    """
    if isinstance(value, Learnable):
        return value
    wanted = f"a {'non-negative' if or_zero else 'positive'} finite number or Learnable(...)"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(name, repr(value), wanted)
    if not math.isfinite(value) or value < 0 or (value == 0 and not or_zero):
        raise InputError(name, value, wanted)
    return value


def value_of(hyperparameter: Hyperparameter, like: Tensor) -> Tensor:
    """The hyper-parameter as a scalar tensor of the dtype and device of `like`."""
    if isinstance(hyperparameter, Learnable):
        return hyperparameter.value.to(like)
    return torch.as_tensor(hyperparameter, dtype=like.dtype, device=like.device)


def display(hyperparameter: Hyperparameter) -> str:
    """The hyper-parameter as it stands in a constructor call."""
    return repr(hyperparameter) if isinstance(hyperparameter, Learnable) else repr(float(hyperparameter))
