"""Copies of fitted heads with all of their tensors changed, including those of their kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from convexheads import _gram
from convexheads.kernels import Product, Sum


def map_parts(value: Any, change: Callable[[Any], Any], change_foreign: Callable[[Any], Any] | None = None) -> Any:
    """A copy of a fitted head, or of one of its parts, with `change` applied to tensors and to copies of modules.

    With `change_foreign`, that is applied instead in modules and to the arguments of functions that are not the
    library's, and modules keep their parameters, so that gradients reach these.
    """
    foreign = change if change_foreign is None else change_foreign
    again = partial(map_parts, change=change, change_foreign=change_foreign)
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, partial):
        if value.func.__module__ != _gram.__name__:
            again = partial(map_parts, change=foreign, change_foreign=change_foreign)
        return partial(value.func, *map(again, value.args), **{k: again(v) for k, v in value.keywords.items()})
    if isinstance(value, Sum | Product):
        return type(value)(*map(again, value.kernels))
    if isinstance(value, nn.Module):
        # `deepcopy` fails for tensors that autograd computed, such as parameters per task in an attribute or a buffer.
        attributes = (each for part in value.modules() for each in vars(part).values() if isinstance(each, Tensor))
        tensors = {id(tensor): tensor for tensor in (*attributes, *value.buffers())}
        changed = {key: foreign(tensor) for key, tensor in tensors.items()}
        parameters = {id(parameter): parameter for parameter in value.parameters()}
        if change_foreign is not None:
            if all(changed[key] is tensor for key, tensor in tensors.items()):
                return value
            changed |= parameters
        elif not changed and not parameters:
            return value
        return foreign(copy.deepcopy(value, changed))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{item.name: again(getattr(value, item.name)) for item in fields(value)})
    return value


def is_foreign(kernel: Any) -> bool:
    """Whether a kernel, as `SupportSet` holds it, is not the library's, or contains one that is not."""
    if isinstance(kernel, Sum | Product):
        return any(map(is_foreign, kernel.kernels))
    if isinstance(kernel, partial):
        parts = filter(callable, kernel.keywords.values())
        return kernel.func.__module__ != _gram.__name__ or any(map(is_foreign, parts))
    return type(kernel).__module__.partition(".")[0] != __name__.partition(".")[0]
