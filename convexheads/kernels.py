"""Kernels: callables `(x, y) -> gram` that turn a head into a non-linear one.

A kernel maps `x` of shape `(*batch, m, d)` and `y` of shape `(*batch, n, d)` to the Gram matrix `(*batch, m, n)`, in
their dtype. Any such callable serves, be it a function or an `nn.Module`; it has to be positive semi-definite and, for
gradients, differentiable. Heads call it in float64, with the support as `y`. Kernels don't check what they are given:
a head looks at the features beforehand, and at the Gram matrix of its support afterwards.

Those here add and multiply: `Linear() + 0.5 * RBF()`, `Linear() + 1.0`, `Cosine() * Polynomial(2)`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeGuard

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from convexheads.errors import InputError, check_counts, check_flag
from convexheads.hyperparameters import Hyperparameter, Learnable, OneLine, display, positive, value_of

Kernel = Callable[[Tensor, Tensor], Tensor]
"""What a head needs of a kernel: from `(*batch, m, d)` and `(*batch, n, d)` to the Gram matrix `(*batch, m, n)`."""


def for_support(kernel: Kernel, support: Float[Tensor, "*batch n d"], mask: Bool[Tensor, "*batch n"] | None) -> Kernel:
    """The kernel as it is for one support set: what it takes from the data (a width), or learns, is settled here.

    Args:
        kernel: any; one without a method of this name is returned as it is.
        support: features, `(*batch, n, d)`.
        mask: `(*batch, n)`, False at examples to disregard; None for none.
    """
    return kernel.for_support(support, mask) if isinstance(kernel, Composable) else kernel


class Composable(OneLine):
    """A kernel that adds and multiplies, with other kernels and with positive numbers or `Learnable`s.

    Sums and products of kernels are kernels again, and so is a positive constant (Rasmussen & Williams 2006, Section
    4.2.4 and Table 4.1). A subclass writes `forward(x, y)`.

    Raises:
        InputError: by `+` and `*`, for what is neither a kernel nor a positive finite number or `Learnable`.
    """

    def __add__(self, other: Kernel | Hyperparameter) -> Sum:
        return Sum(self, _as_kernel(other))

    def __radd__(self, other: Kernel | Hyperparameter) -> Sum:
        return Sum(_as_kernel(other), self)

    def __mul__(self, other: Kernel | Hyperparameter) -> Product:
        return Product(self, _as_kernel(other))

    def __rmul__(self, other: Kernel | Hyperparameter) -> Product:
        return Product(_as_kernel(other), self)

    def for_support(self, support: Float[Tensor, "*batch n d"], mask: Bool[Tensor, "*batch n"] | None) -> Kernel:
        """The kernel with everything settled that it takes from a support set, or learns; by default itself.

        Args:
            support: features, `(*batch, n, d)`.
            mask: `(*batch, n)`, False at examples to disregard; None for none.

        Returns:
            A kernel for queries `(*batch, q, d)` against this support.
        """
        return self


def _as_kernel(value: Kernel | Hyperparameter) -> Kernel:
    return value if is_kernel(value) else Constant(value)  # pyright: ignore[reportArgumentType]


def is_kernel(value: object) -> TypeGuard[Kernel]:
    """Whether the `value` can be called, and is neither a class nor a `Learnable`."""
    return callable(value) and not isinstance(value, type | Learnable)


class Linear(Composable):
    r"""The dot product \(\langle x, y \rangle\), or its mean over features, \(\langle x, y \rangle / d\).

    See Rasmussen & Williams (2006), Table 4.1.

    Args:
        normalize: divide by the feature dimension d. Default False. With `PrototypeHead` this is the "squared Euclidean
            distance normalized with respect to the feature dimension" of Lee et al. 2019 (Section 4.1).

    Raises:
        InputError: `normalize` is neither True nor False.
    """

    def __init__(self, *, normalize: bool = False) -> None:
        super().__init__()
        check_flag("Linear(normalize)", normalize)
        self.normalize = normalize

    def forward(self, x: Float[Tensor, "*batch m d"], y: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch m n"]:
        """The Gram matrix `(*batch, m, n)` of `x`, `(*batch, m, d)`, and `y`, `(*batch, n, d)`."""
        gram = x @ y.mT
        return gram / x.shape[-1] if self.normalize else gram

    def features(self, x: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch n d"]:
        """The features `(*batch, n, d)` whose dot product this is, from `x`, `(*batch, n, d)`."""
        return x / x.shape[-1] ** 0.5 if self.normalize else x

    def extra_repr(self) -> str:
        return "normalize=True" if self.normalize else ""


class Constant(Composable):
    r"""The same number for every pair, \(k(x, y) = c\). `Linear() + 1.0` gives every class a bias.

    A bias by a kernel is regularised as weights are. See Rasmussen & Williams (2006),
    Table 4.1.

    Args:
        value: c, positive; a float or `Learnable`. Default 1.

    Raises:
        InputError: `value` is not positive and finite.
    """

    def __init__(self, value: Hyperparameter = 1.0) -> None:
        super().__init__()
        self.value = positive("Constant(value)", value)

    def forward(self, x: Float[Tensor, "*batch m d"], y: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch m n"]:
        """The Gram matrix `(*batch, m, n)` of `x`, `(*batch, m, d)`, and `y`, `(*batch, n, d)`."""
        return self.for_support(y, None)(x, y)

    def for_support(self, support: Float[Tensor, "*batch n d"], mask: Bool[Tensor, "*batch n"] | None) -> Kernel:
        return partial(_constant, value=value_of(self.value, support))

    def extra_repr(self) -> str:
        return display(self.value)


class Cosine(Composable):
    r"""The cosine similarity \(\langle x, y \rangle / (|x| |y|)\); a zero vector has similarity 0 to everything.

    Used in few-shot learning since matching networks (Vinyals et al. 2016). See also Rasmussen & Williams (2006),
    Section 4.2.4. A zero vector gets a gradient of zero.
    """

    def forward(self, x: Float[Tensor, "*batch m d"], y: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch m n"]:
        """The Gram matrix `(*batch, m, n)` of `x`, `(*batch, m, d)`, and `y`, `(*batch, n, d)`."""
        return _unit(x) @ _unit(y).mT


class RBF(Composable):
    r"""The Gaussian kernel \(\exp(-|x - y|^2 / (2 w^2))\) of width w (Rasmussen & Williams 2006, Eq. 4.9).

    Args:
        width: w, the standard deviation of the Gaussian, positive, in the units of the features; a float or
            `Learnable`. None, the default: the median distance between two support examples, task by task, through
            which gradients flow; 1 where that is zero, or where there is one example only. This is the "median
            heuristic" of Gretton et al. 2012, who take the median over both samples of a test. Of an even number of
            distances, it is the smaller one in the middle.

    Raises:
        InputError: `width` is not positive and finite.
    """

    def __init__(self, width: Hyperparameter | None = None) -> None:
        super().__init__()
        self.width = None if width is None else positive("RBF(width)", width)

    def forward(self, x: Float[Tensor, "*batch m d"], y: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch m n"]:
        """The Gram matrix `(*batch, m, n)` of `x`, `(*batch, m, d)`, and `y`, `(*batch, n, d)`.

        Without a width, `y` is the support that the median is of; a head has settled it before, by `for_support`.
        """
        return self.for_support(y, None)(x, y)

    def for_support(self, support: Float[Tensor, "*batch n d"], mask: Bool[Tensor, "*batch n"] | None) -> Kernel:
        width = _median_distance(support, mask) if self.width is None else value_of(self.width, support)
        return partial(_gaussian, width=width)

    def extra_repr(self) -> str:
        return "" if self.width is None else display(self.width)


class Polynomial(Composable):
    r"""The polynomial kernel \((s \langle x, y \rangle + o)^p\) of degree p, scale s and offset o.

    See Rasmussen & Williams (2006), Table 4.1, where the scale is 1.

    Args:
        degree: p, a positive integer. Default 2.
        offset: o, non-negative; a float or `Learnable`. Default 1.
        scale: s, positive; a float or `Learnable`. Default 1.

    Raises:
        InputError: an argument is outside its range.
    """

    def __init__(self, degree: int = 2, *, offset: Hyperparameter = 1.0, scale: Hyperparameter = 1.0) -> None:
        super().__init__()
        check_counts(**{"Polynomial(degree)": degree})
        self.degree = degree
        self.offset = positive("Polynomial(offset)", offset, or_zero=True)
        self.scale = positive("Polynomial(scale)", scale)

    def forward(self, x: Float[Tensor, "*batch m d"], y: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch m n"]:
        """The Gram matrix `(*batch, m, n)` of `x`, `(*batch, m, d)`, and `y`, `(*batch, n, d)`."""
        return self.for_support(y, None)(x, y)

    def for_support(self, support: Float[Tensor, "*batch n d"], mask: Bool[Tensor, "*batch n"] | None) -> Kernel:
        scale, offset = value_of(self.scale, support), value_of(self.offset, support)
        return partial(_polynomial, degree=self.degree, scale=scale, offset=offset)

    def extra_repr(self) -> str:
        return f"{self.degree}, offset={display(self.offset)}, scale={display(self.scale)}"


class _Combination(Composable):
    """Kernels in, one kernel out."""

    def __init__(self, *kernels: Kernel) -> None:
        super().__init__()
        if not kernels:
            raise InputError(f"{type(self).__name__}(kernels)", "none", "at least one kernel")
        for kernel in kernels:
            if not is_kernel(kernel):
                raise InputError(f"{type(self).__name__}(kernels)", repr(kernel), "kernels, callables (x, y) -> gram")
        self.kernels = kernels
        self.parts = nn.ModuleList(kernel for kernel in kernels if isinstance(kernel, nn.Module))

    def for_support(self, support: Float[Tensor, "*batch n d"], mask: Bool[Tensor, "*batch n"] | None) -> Kernel:
        return type(self)(*(for_support(kernel, support, mask) for kernel in self.kernels))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.kernels))})"


class Sum(_Combination):
    r"""The sum of kernels, \(k_1 + k_2 + \dots\): features side by side. Also written `first + second`.

    See Rasmussen & Williams (2006), Section 4.2.4.

    Args:
        kernels: one or more callables `(x, y) -> gram`.

    Raises:
        InputError: there are none, or one of them is not callable.
    """

    def forward(self, x: Float[Tensor, "*batch m d"], y: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch m n"]:
        """The Gram matrix `(*batch, m, n)` of `x`, `(*batch, m, d)`, and `y`, `(*batch, n, d)`."""
        return torch.stack([kernel(x, y) for kernel in self.kernels]).sum(0)


class Product(_Combination):
    r"""The product of kernels, \(k_1 k_2 \cdots\): all pairs of features. Also `first * second`, or `0.5 * kernel`.

    See Rasmussen & Williams (2006), Section 4.2.4.

    Args:
        kernels: one or more callables `(x, y) -> gram`.

    Raises:
        InputError: there are none, or one of them is not callable.
    """

    def forward(self, x: Float[Tensor, "*batch m d"], y: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch m n"]:
        """The Gram matrix `(*batch, m, n)` of `x`, `(*batch, m, d)`, and `y`, `(*batch, n, d)`."""
        return torch.stack([kernel(x, y) for kernel in self.kernels]).prod(0)


def _constant(x: Tensor, y: Tensor, value: Tensor) -> Tensor:
    return value.expand(*x.shape[:-1], y.shape[-2])


def _polynomial(x: Tensor, y: Tensor, degree: int, scale: Tensor, offset: Tensor) -> Tensor:
    return (scale * (x @ y.mT) + offset) ** degree


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
