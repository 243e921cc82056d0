"""Kernels: callables `(x, y) -> gram` that turn a head into a non-linear one.

A kernel maps `x` of shape `(*batch, m, d)` and `y` of shape `(*batch, n, d)` to the Gram matrix `(*batch, m, n)`.
Any such callable serves, be it a function or an `nn.Module`; it has to be positive semi-definite and, for gradients,
differentiable. Heads call it in float64, with the support as `y`.

Those here add and multiply: `Linear() + 0.5 * RBF()`, `Linear() + 1.0`, `Cosine() * Polynomial(2)`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from convexheads.errors import InputError
from convexheads.hyperparameters import Hyperparameter, Learnable, OneLine, display, positive, value_of

Kernel = Callable[[Tensor, Tensor], Tensor]
"""What a head needs of a kernel."""


def for_support(kernel: Kernel, support: Float[Tensor, "*batch n d"], mask: Bool[Tensor, "*batch n"] | None) -> Kernel:
    """The kernel as it is for one support set: what a kernel takes from the data (a width) is settled here."""
    return kernel.for_support(support, mask) if isinstance(kernel, Composable) else kernel


class Composable(OneLine):
    """A kernel that adds and multiplies, with others and with positive numbers or `Learnable`s."""

    def __add__(self, other: Kernel | Hyperparameter) -> Sum:
        return Sum(self, _as_kernel(other))

    def __radd__(self, other: Kernel | Hyperparameter) -> Sum:
        return Sum(_as_kernel(other), self)

    def __mul__(self, other: Kernel | Hyperparameter) -> Product:
        return Product(self, _as_kernel(other))

    def __rmul__(self, other: Kernel | Hyperparameter) -> Product:
        return Product(_as_kernel(other), self)

    def for_support(self, support: Float[Tensor, "*batch n d"], mask: Bool[Tensor, "*batch n"] | None) -> Kernel:
        """The kernel with everything settled that it takes from a support set; by default itself.

        Args:
            support: `(*batch, n, d)`.
            mask: `(*batch, n)`, False at examples to disregard; None for none.
        """
        return self


def _as_kernel(value: Kernel | Hyperparameter) -> Kernel:
    return value if callable(value) and not isinstance(value, Learnable) else Constant(value)


class Linear(Composable):
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

    def features(self, x: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch n d"]:
        """The features whose dot product the kernel is."""
        return x / x.shape[-1] ** 0.5 if self.normalize else x

    def extra_repr(self) -> str:
        return "normalize=True" if self.normalize else ""


class Constant(Composable):
    """The same number for every pair: `Linear() + 1.0` gives every class a bias, regularised as weights are.

    Args:
        value: positive; a float or `Learnable`. Default 1.

    Raises:
        InputError: `value` is not positive and finite.
    """

    def __init__(self, value: Hyperparameter = 1.0) -> None:
        super().__init__()
        self.value = positive("Constant(value)", value)

    def forward(self, x: Float[Tensor, "*batch m d"], y: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch m n"]:
        return value_of(self.value, x).expand(*x.shape[:-1], y.shape[-2])

    def extra_repr(self) -> str:
        return display(self.value)


class Cosine(Composable):
    """The cosine similarity `<x, y> / (|x| |y|)`; a zero vector has similarity 0 to everything."""

    def forward(self, x: Float[Tensor, "*batch m d"], y: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch m n"]:
        return _unit(x) @ _unit(y).mT


class RBF(Composable):
    """The Gaussian kernel `exp(-|x - y|^2 / (2 width^2))`.

    Args:
        width: standard deviation of the Gaussian, in the units of the features; a float or `Learnable`. None, the
            default: the median distance between two support examples, task by task (the "median heuristic"), through
            which gradients flow; 1 where that is zero.

    Raises:
        InputError: `width` is not positive and finite.
    """

    def __init__(self, width: Hyperparameter | None = None) -> None:
        super().__init__()
        self.width = None if width is None else positive("RBF(width)", width)

    def forward(self, x: Float[Tensor, "*batch m d"], y: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch m n"]:
        return _gaussian(x, y, _median_distance(y, None) if self.width is None else value_of(self.width, y))

    def for_support(self, support: Float[Tensor, "*batch n d"], mask: Bool[Tensor, "*batch n"] | None) -> Kernel:
        return self if self.width is not None else partial(_gaussian, width=_median_distance(support, mask))

    def extra_repr(self) -> str:
        return "" if self.width is None else display(self.width)


class Polynomial(Composable):
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


class _Combination(Composable):
    """Kernels in, one kernel out."""

    def __init__(self, *kernels: Kernel) -> None:
        super().__init__()
        for kernel in kernels:
            if not callable(kernel):
                raise InputError(f"{type(self).__name__}(kernels)", repr(kernel), "kernels, callables (x, y) -> gram")
        self.kernels = kernels
        self.parts = nn.ModuleList(kernel for kernel in kernels if isinstance(kernel, nn.Module))

    def for_support(self, support: Float[Tensor, "*batch n d"], mask: Bool[Tensor, "*batch n"] | None) -> Kernel:
        return type(self)(*(for_support(kernel, support, mask) for kernel in self.kernels))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.kernels))})"


class Sum(_Combination):
    """The sum of kernels: features side by side. Also written `first + second`.

    Args:
        kernels: any callables `(x, y) -> gram`.
    """

    def forward(self, x: Float[Tensor, "*batch m d"], y: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch m n"]:
        return torch.stack([kernel(x, y) for kernel in self.kernels]).sum(0)


class Product(_Combination):
    """The product of kernels: all pairs of features. Also written `first * second`, or `0.5 * kernel`.

    Args:
        kernels: any callables `(x, y) -> gram`.
    """

    def forward(self, x: Float[Tensor, "*batch m d"], y: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch m n"]:
        return torch.stack([kernel(x, y) for kernel in self.kernels]).prod(0)


def _gaussian(x: Tensor, y: Tensor, width: Tensor) -> Tensor:
    # Distances don't change under a common shift; a shift to the centre keeps the cancellation below small.
    centre = y.detach().mean(-2, keepdim=True)
    width = width.reshape(*width.shape, *[1] * (x.ndim - width.ndim))
    return torch.exp(-_squared_distance((x - centre) / width, (y - centre) / width) / 2)


def _squared_distance(x: Tensor, y: Tensor) -> Tensor:
    return (x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :] - 2 * (x @ y.mT)).clamp_min(0)


def _median_distance(support: Tensor, mask: Tensor | None) -> Tensor:
    """The median over all pairs of examples, `(*batch,)`."""
    n = support.shape[-2]
    first, second = torch.triu_indices(n, n, offset=1, device=support.device)
    centred = support - support.detach().mean(-2, keepdim=True)
    distance = _squared_distance(centred, centred)[..., first, second]
    if mask is not None:
        distance = distance.where(mask[..., first] & mask[..., second], torch.nan)
    if n == 1:
        return support.new_ones(support.shape[:-2])
    median = distance.nanmedian(-1).values
    return torch.where(median > 0, median, 1).sqrt()


def _unit(x: Tensor) -> Tensor:
    squared = x.square().sum(-1, keepdim=True)
    # A zero vector's norm has no gradient: it stays zero, and gets none.
    return x * torch.where(squared > 0, squared, torch.inf).rsqrt()
