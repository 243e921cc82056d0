"""Kernels: callables `(x, y) -> gram` that turn a head into a non-linear one.

A kernel maps `x` of shape `(*batch, m, d)` and `y` of shape `(*batch, n, d)` to the Gram matrix `(*batch, m, n)`.
Any such callable serves, be it a function or an `nn.Module`; it has to be positive semi-definite and, for gradients,
differentiable. Heads call it in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from convexheads.errors import InputError
from convexheads.hyperparameters import Hyperparameter, OneLine, display, positive, value_of

Kernel = Callable[[Tensor, Tensor], Tensor]
"""What a head needs of a kernel."""


class Linear(OneLine):
    """The dot product `<x, y>`.

    Args:
        normalize: divide by the feature dimension. With `PrototypeHead` this is the paper's "squared Euclidean distance
            normalized with respect to the feature dimension" (Section 4.1).
    """

    def __init__(self, *, normalize: bool = False) -> None:
        super().__init__()
        self.normalize = normalize

    def forward(self, x: Float[Tensor, "*batch m d"], y: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch m n"]:
        gram = x @ y.mT
        return gram / x.shape[-1] if self.normalize else gram

    def extra_repr(self) -> str:
        return "normalize=True" if self.normalize else ""


class Cosine(OneLine):
    """The cosine similarity `<x, y> / (|x| |y|)`; a zero vector has similarity 0 to everything."""

    def forward(self, x: Float[Tensor, "*batch m d"], y: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch m n"]:
        return _unit(x) @ _unit(y).mT


class RBF(OneLine):
    """The Gaussian kernel `exp(-|x - y|^2 / (2 width^2))`.

    Args:
        width: standard deviation of the Gaussian, in the units of the features; a float or `Learnable`.

    Raises:
        InputError: `width` is not positive and finite.
    """

    def __init__(self, width: Hyperparameter = 1.0) -> None:
        super().__init__()
        self.width = positive("RBF(width)", width)

    def forward(self, x: Float[Tensor, "*batch m d"], y: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch m n"]:
        # Distances don't change under a common shift; a shift to the centre keeps the cancellation below small.
        centre = y.detach().mean(-2, keepdim=True)
        x, y = (x - centre) / value_of(self.width, x), (y - centre) / value_of(self.width, y)
        distance = x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :] - 2 * (x @ y.mT)
        return torch.exp(-distance.clamp_min(0) / 2)

    def extra_repr(self) -> str:
        return display(self.width)


class Polynomial(OneLine):
    """The polynomial kernel `(scale <x, y> + offset)^degree`.

    Args:
        degree: a positive integer.
        offset: non-negative; a float or `Learnable`.
        scale: positive; a float or `Learnable`.

    Raises:
        InputError: an argument is outside its range.
    """

    def __init__(self, degree: int = 2, *, offset: Hyperparameter = 1.0, scale: Hyperparameter = 1.0) -> None:
        super().__init__()
        if isinstance(degree, bool) or not isinstance(degree, int) or degree < 1:
            raise InputError("Polynomial(degree)", repr(degree), "an integer of at least 1")
        self.degree = degree
        self.offset = positive("Polynomial(offset)", offset, or_zero=True)
        self.scale = positive("Polynomial(scale)", scale)

    def forward(self, x: Float[Tensor, "*batch m d"], y: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch m n"]:
        return (value_of(self.scale, x) * (x @ y.mT) + value_of(self.offset, x)) ** self.degree

    def extra_repr(self) -> str:
        return f"{self.degree}, offset={display(self.offset)}, scale={display(self.scale)}"


def _unit(x: Tensor) -> Tensor:
    squared = x.square().sum(-1, keepdim=True)
    # A zero vector's norm has no gradient: it stays zero, and gets none.
    return x * torch.where(squared > 0, squared, torch.inf).rsqrt()
