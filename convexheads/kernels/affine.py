"""Which kernels are linear in the features, up to a constant."""

from __future__ import annotations

from functools import partial
from typing import Any

from convexheads._gram import constant, scaled
from convexheads.kernels.base import KernelLike, Product, Sum
from convexheads.kernels.standard import Linear


def affine_form(kernel: KernelLike, features: int) -> tuple[Any, Any] | None:
    r"""The a and c of a kernel that is \(a \langle x, y \rangle + c\), numbers or one per task; None for others.

    The kernel is one that `SupportSet` holds, with its parameters fixed; `features` is the number of features.
    """
    if isinstance(kernel, Linear) and type(kernel) is Linear:  # a subclass may be another kernel
        return (1 / features if kernel.normalize else 1.0), 0.0
    if isinstance(kernel, partial) and kernel.func is constant:
        return 0.0, kernel.keywords["value"]
    if isinstance(kernel, partial) and kernel.func is scaled:
        unit, inner = kernel.keywords["unit"], affine_form(kernel.keywords["kernel"], features)
        return None if inner is None else tuple(part if _is_zero(part) else part / unit for part in inner)
    if not isinstance(kernel, Sum | Product):
        return None
    first, *others = (affine_form(part, features) for part in kernel.kernels)
    if first is None:
        return None
    slope, intercept = first
    for form in others:
        if form is None:
            return None
        a, c = form
        if isinstance(kernel, Sum):
            slope, intercept = slope + a, intercept + c
        elif _is_zero(slope) or _is_zero(a):
            slope = slope * c + intercept * a
            intercept = 0.0 if _is_zero(intercept) or _is_zero(c) else intercept * c
        else:
            return None
    return slope, intercept


def _is_zero(value: Any) -> bool:
    """Whether a part of a kernel is absent; the values of tensors are not looked at."""
    return isinstance(value, float) and value == 0
