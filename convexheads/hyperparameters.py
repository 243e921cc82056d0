"""Hyperparameters (floats, or parameters that are learned along with the backbone) and modules that have them."""

from __future__ import annotations

import copy
import inspect
import math
from contextlib import suppress
from functools import cache
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from convexheads._validation import Check, check_real, check_tensor, is_float_tensor
from convexheads.errors import InputError

_C = TypeVar("_C", bound="Configurable")
_SMALLEST, _LARGEST = 1e-37, 1e38  # for positive values in float32, slightly inside its range


class Learnable(nn.Module):
    """A hyperparameter that receives gradients.

    Use it when a number such as C, a kernel's length scale or a logit scale should be trained along with the backbone.
    It is stored as its logarithm, so that no optimizer step can make it negative. The code published by Lee et al.
    2019, in contrast, lets the scale of their Eq. 12 become negative. The parameter stays in float32 or float64 when
    the model is cast to a smaller dtype. Weight decay would pull the logarithm to zero, and the value to one: see
    `parameter_groups`.

    Args:
        value: initial value, from 1e-37 to 1e38.

    Raises:
        InputError: `value` is outside this range.

    Example:
        `SVMHead(C=Learnable(0.1), scale=Learnable(1.0))`
    """

    def __init__(self, value: float) -> None:
        super().__init__()
        number = check_real("Learnable(value)", value, positive=True)
        if not _SMALLEST <= number <= _LARGEST:
            raise InputError("Learnable(value)", f"a number from {_SMALLEST} to {_LARGEST}", number)
        self.raw_value = nn.Parameter(torch.tensor(math.log(number)))

    @property
    def value(self) -> Tensor:
        """The current value, a scalar tensor `()` with gradient, on the device of the module."""
        return self.raw_value.exp()

    def _apply(self, fn, recurse=True):  # `half()`, `to(dtype)` and similar methods call this
        def keep_precision(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype.itemsize >= 4 else tensor.to(result.device)

        return super()._apply(keep_precision, recurse)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if (value := state_dict.pop(prefix + "log_value", None)) is not None:  # the name in the packaged weights
            state_dict[prefix + "raw_value"] = value
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __repr__(self) -> str:
        return f"Learnable({float(f'{self.value.item():.6g}')!r})"


class PerTask:
    """A hyperparameter with one value for each task of a batch.

    Use it to solve tasks with different values of C or lambda in one batch, as `tune` does, in SVMs, ridge and logistic
    regression. The tasks of a call then need the same number of classes.

    Args:
        values: positive numbers, `(*batch,)` as the leading dimensions of the support.

    Raises:
        InputError: `values` is not a tensor of floating-point numbers.

    Example:
        `SVMHead(C=PerTask(torch.tensor([0.1, 1.0])))(support, labels, query)`
    """

    def __init__(self, values: Tensor) -> None:
        self.values = check_tensor("PerTask(values)", values, "a tensor of positive numbers", is_float_tensor)

    def __repr__(self) -> str:
        return f"PerTask({tuple(self.values.shape)})"


Hyperparameter = float | Learnable | PerTask
"""A constant, a learned parameter, or a value per task."""


def check_positive(name: str, value: Any, *, allow_zero: bool = False) -> Hyperparameter:
    """Return the `value` of the argument `name` if it is positive (zero with `allow_zero`), or raise `InputError`."""
    if isinstance(value, Learnable | PerTask):
        return value
    return check_real(name, value, positive=True, allow_zero=allow_zero, alternative=" or Learnable(...)")


def as_tensor(hyperparameter: Hyperparameter, like: Tensor) -> Tensor:
    """The `hyperparameter` with the dtype and device of `like`: a 0-d tensor, or `(*#batch,)` if it is `PerTask`.

    Gradients reach a `Learnable`.
    """
    if isinstance(hyperparameter, Learnable):
        return hyperparameter.value.to(like)
    if isinstance(hyperparameter, PerTask):
        return hyperparameter.values.to(like)
    return torch.full((), hyperparameter, dtype=like.dtype, device=like.device)  # created on the device, without a copy


def parameter_groups(module: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters of a module for an optimizer, with weight decay for all but `Learnable`s.

    Use it when you train `Learnable`s with weight decay, which would pull each of them toward one.

    Args:
        module: any module, such as an `nn.ModuleList` of a backbone and a head.
        weight_decay: weight decay of the other parameters, at least 0.

    Returns:
        Two groups of parameters, in the format that optimizers accept.

    Raises:
        InputError: `weight_decay` is negative.

    Example:
        `torch.optim.SGD(parameter_groups(model, weight_decay=5e-4), lr=0.1)`
    """
    decay = check_real("weight_decay", weight_decay, positive=True, allow_zero=True)
    scalars = {part.raw_value: None for part in module.modules() if isinstance(part, Learnable)}
    others = [parameter for parameter in module.parameters() if parameter not in scalars]
    return [{"params": others, "weight_decay": decay}, {"params": list(scalars), "weight_decay": 0.0}]


class Settings:
    """An object whose settings are the arguments of its constructor, kept in attributes of the same names.

    `repr` gives the constructor call, with all arguments that may be positional and those that are not their default.
    The class attribute `default_NAME`, if it exists, is the default of an argument.
    """

    checks: ClassVar[dict[str, Check]] = {}
    """For each setting, the function `(name, value) -> value` that checks it and returns the value to keep."""

    @classmethod
    @cache
    def _arguments(cls) -> dict[str, inspect.Parameter]:
        """The named arguments of the constructor, and those of base classes that it passes on through `**`."""
        found: dict[str, inspect.Parameter] = {}
        for base in cls.__mro__:
            if "__init__" not in vars(base):
                continue
            arguments = list(inspect.signature(base.__init__).parameters.values())[1:]
            named = {a.name: a for a in arguments if a.kind in (a.POSITIONAL_OR_KEYWORD, a.KEYWORD_ONLY)}
            found |= {name: argument for name, argument in named.items() if name not in found}
            if not any(argument.kind is argument.VAR_KEYWORD for argument in arguments):
                break
        return found

    def __repr__(self) -> str:
        shown = []
        for name, argument in self._arguments().items():
            if not hasattr(self, name):  # a subclass may not keep all arguments
                continue
            value, default = getattr(self, name), getattr(self, f"default_{name}", argument.default)
            if default is not argument.empty and name in self.checks:
                with suppress(InputError):  # a check may replace a default that is only a placeholder
                    default = self.checks[name](name, default)
            is_default = type(value) is type(default) and repr(value) == repr(default)
            if not (is_default and (argument.kind is argument.KEYWORD_ONLY or value is None)):
                shown.append(f"{name}={value.__name__ if inspect.isfunction(value) else repr(value)}")
        return f"{type(self).__name__}({', '.join(shown)})"


class Configurable(Settings, nn.Module):
    """A module with settings, which are checked whenever they are assigned.

    The methods `get_params` and `set_params` read and write settings as scikit-learn does.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.checks:
            value = self.checks[name](name, value)
            if not isinstance(value, nn.Module):
                self._modules.pop(name, None)  # a number replaces a `Learnable`
        super().__setattr__(name, value)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The settings by name, as in scikit-learn; with `deep`, also nested ones ("kernel__length_scale")."""
        params = {name: getattr(self, name) for name in self._arguments()}
        if deep:
            for name, value in list(params.items()):
                if isinstance(value, Configurable):
                    params |= {f"{name}__{inner}": setting for inner, setting in value.get_params().items()}
        return params

    def set_params(self: _C, **params: Any) -> _C:
        """Change the settings named in `params`, as in scikit-learn, and return the module.

        Raises:
            InputError: there is no such setting, or its value is unusable.
        """
        for name, value in sorted(params.items(), key=lambda item: "__" in item[0]):  # a kernel before its settings
            outer, _, inner = name.partition("__")
            if outer not in self._arguments():
                names = ", ".join(self._arguments()) or "none"
                raise InputError("set_params", f"settings of {type(self).__name__} ({names})", repr(name))
            if not inner:
                setattr(self, name, value)
            elif isinstance(part := getattr(self, outer), Configurable):
                part.set_params(**{inner: value})
            else:
                raise InputError(name, f"a {outer} that has settings", f"{outer}={part!r}")
        return self

    def __sklearn_clone__(self: _C) -> _C:
        return copy.deepcopy(self)
