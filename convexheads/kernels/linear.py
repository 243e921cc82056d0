"""The linear kernel, and the shortcuts of kernels that are linear in the features, up to a constant."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from convexheads._gram import constant, matrix_product, scaled
from convexheads._validation import Check, check_bool
from convexheads.kernels.base import Kernel, KernelLike, Product, Sum


class Linear(Kernel):
    r"""The dot product \(\langle x, y \rangle\), or its mean over features, \(\langle x, y \rangle / d\).

    Use it when features come from a backbone that is trained through the head, or when speed matters. See
    Rasmussen & Williams (2006), Table 4.1.

    Args:
        normalize: whether to divide by the feature dimension d. With `PrototypeHead` this is the "squared Euclidean
            distance normalized with respect to the feature dimension" of Lee et al. 2019 (Section 4.1). Defaults to
            False.

    Example:
        `PrototypeHead(kernel=Linear(normalize=True))`
    """

    checks: ClassVar[dict[str, Check]] = {"normalize": check_bool}

    def __init__(self, *, normalize: bool = False) -> None:
        super().__init__()
        self.normalize = normalize

    def forward(self, x: Float[Tensor, "*batch m d"], y: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch m n"]:
        gram = matrix_product(x, y.mT)
        return gram / x.shape[-1] if self.normalize else gram


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
        return None if inner is None else tuple(part if is_zero(part) else part / unit for part in inner)
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
        elif is_zero(slope) or is_zero(a):
            slope = slope * c + intercept * a
            intercept = 0.0 if is_zero(intercept) or is_zero(c) else intercept * c
        else:
            return None
    return slope, intercept


def is_zero(value: Any) -> bool:
    """Whether a part of a kernel is absent; the values of tensors are not looked at."""
    return isinstance(value, float) and value == 0


def gram_diagonal(kernel: KernelLike, features: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch n"]:
    """The values `(*batch, n)` of a `kernel` between each row of `features` `(*batch, n, d)` and itself."""
    form = affine_form(kernel, features.shape[-1])
    if form is None:
        itself = features.movedim(-2, 0).unsqueeze(-2)  # (n, *batch, 1, d), so that parameters per task broadcast
        return kernel(itself, itself)[..., 0, 0].movedim(0, -1)
    slope, intercept = (part.unsqueeze(-1) if isinstance(part, Tensor) else part for part in form)
    return slope * _squared_length(features) + intercept


def _squared_length(features: Tensor) -> Tensor:
    if torch.is_grad_enabled() and features.requires_grad:  # the gradient of a length is not defined at zero
        return torch.linalg.vecdot(features, features)
    return torch.linalg.vector_norm(features, dim=-1).square()  # in one pass, without memory for the squares
