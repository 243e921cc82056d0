"""The one precision policy: convex problems are solved in float64, whatever the features' dtype; and which may come."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TypeGuard

import torch
from torch import Tensor


def working_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that lacks it (Apple's mps)."""
    return torch.float32 if device.type == "mps" else torch.float64


def full_precision(device: torch.device) -> AbstractContextManager:
    """A context in which autocast leaves the operations on `device` alone."""
    return torch.autocast(device.type, enabled=False)


def is_dense(value: object) -> TypeGuard[Tensor]:
    """Whether the `value`, anything, is a tensor, and not a sparse one."""
    return isinstance(value, Tensor) and value.layout == torch.strided


def is_of_floats(value: object) -> TypeGuard[Tensor]:
    """Whether the `value`, anything, is a tensor of floating-point numbers; torch can't add those of one byte."""
    return is_dense(value) and value.is_floating_point() and value.dtype.itemsize > 1


def is_of_integers(value: object) -> TypeGuard[Tensor]:
    """Whether the `value`, anything, is a tensor of integers of any width."""
    return is_dense(value) and not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)


def kind(value: object) -> str:
    """What the `value` is, anything that should have been another kind of tensor, in words."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"a tensor of {value.dtype}" if is_dense(value) else f"a tensor of {value.dtype}, {value.layout}"
