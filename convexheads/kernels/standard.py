"""The other kernels of the library."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from convexheads._gram import gaussian, median_distance, normalize, polynomial, scaled
from convexheads._validation import Check, check_positive_int, optional
from convexheads.hyperparameters import Hyperparameter, as_tensor, check_positive
from convexheads.kernels.base import Kernel, KernelLike, check_kernel, condition
from convexheads.kernels.linear import Linear, gram_diagonal


class Cosine(Kernel):
    r"""The cosine similarity \(\langle x, y \rangle / (|x| |y|)\).

    Use it when the length of a feature vector says nothing about its class. A zero vector has similarity 0 to
    everything, and a gradient of zero. Used in few-shot learning since matching networks (Vinyals et al. 2016). See
    also Rasmussen & Williams (2006), Section 4.2.4.

    Example:
        `LogisticHead(kernel=10.0 * Cosine())`
    """

    def forward(self, x: Float[Tensor, "*batch m d"], y: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch m n"]:
        return normalize(x) @ normalize(y).mT


class RBF(Kernel):
    r"""The Gaussian kernel \(\exp(-|x - y|^2 / (2 \ell^2))\) with length scale \(\ell\).

    Use it when classes cannot be separated linearly, and for Gaussian processes. See Rasmussen & Williams (2006),
    Eq. 4.9.

    Args:
        length_scale: the standard deviation of the Gaussian, positive, in the units of the features; a float or
            `Learnable`. Defaults to None: the median distance between two support examples of the task, through which
            gradients flow; 1 if that is zero, or if there is only one example. This is the "median heuristic" of
            Gretton et al. 2012, who take the median over both samples of a test. For an even number of distances, it is
            the smaller of the two middle ones.

    Example:
        `SVMHead(C=10.0, kernel=RBF(Learnable(8.0)))`
    """

    checks: ClassVar[dict[str, Check]] = {"length_scale": optional(check_positive)}

    def __init__(self, length_scale: Hyperparameter | None = None) -> None:
        super().__init__()
        self.length_scale = length_scale

    def condition_on(self, features: Float[Tensor, "*batch n d"], mask: Bool[Tensor, "*batch n"] | None) -> KernelLike:
        scale = self.length_scale
        scale = median_distance(features, mask) if scale is None else as_tensor(scale, features)
        return partial(gaussian, length_scale=scale)


class Polynomial(Kernel):
    r"""The polynomial kernel \((s \langle x, y \rangle + o)^p\) of degree p, scale s and offset o.

    Use it when products of features matter. See Rasmussen & Williams (2006), Table 4.1, where the scale is 1.

    Args:
        degree: p, a positive integer. Defaults to 2.
        offset: o, non-negative; a float or `Learnable`. Defaults to 1.
        scale: s, positive; a float or `Learnable`. Defaults to 1.

    Example:
        `RidgeHead(kernel=Polynomial(3, scale=1 / 64))`
    """

    checks: ClassVar[dict[str, Check]] = {
        "degree": check_positive_int,
        "offset": partial(check_positive, allow_zero=True),
        "scale": check_positive,
    }

    def __init__(self, degree: int = 2, *, offset: Hyperparameter = 1.0, scale: Hyperparameter = 1.0) -> None:
        super().__init__()
        self.degree, self.offset, self.scale = degree, offset, scale

    def condition_on(self, features: Float[Tensor, "*batch n d"], mask: Bool[Tensor, "*batch n"] | None) -> KernelLike:
        scale, offset = as_tensor(self.scale, features), as_tensor(self.offset, features)
        return partial(polynomial, degree=self.degree, scale=scale, offset=offset)


class UnitScale(Kernel):
    r"""A kernel in units of its mean over the support, \(k(x, y) / \frac1n \sum_n k(x_n, x_n)\).

    Use it when features come from a backbone in training: the length of its features changes, and C, lambda, smoothing
    and the scale of the logits then keep their meaning. It also makes the same settings suit different backbones.

    With the linear kernel, it divides features by the root of their mean squared length. Gradients flow through the
    mean. A kernel with a mean of zero is not changed.

    Args:
        kernel: any callable `(x, y) -> gram`. Defaults to `Linear()`.

    Example:
        `SVMHead(C=30.0, smoothing=0.3, kernel=UnitScale())`
    """

    checks: ClassVar[dict[str, Check]] = {"kernel": optional(check_kernel, default=Linear)}

    kernel: KernelLike

    def __init__(self, kernel: KernelLike | None = None) -> None:
        super().__init__()
        self.kernel = kernel  # pyright: ignore[reportAttributeAccessIssue]  # the check replaces None

    def condition_on(self, features: Float[Tensor, "*batch n d"], mask: Bool[Tensor, "*batch n"] | None) -> KernelLike:
        kernel = condition(self.kernel, features, mask)
        diagonal = gram_diagonal(kernel, features)
        used = torch.ones_like(diagonal) if mask is None else mask.to(diagonal.dtype)
        mean = (diagonal * used).sum(-1) / used.sum(-1)
        return partial(scaled, kernel=kernel, unit=torch.where(mean > 0, mean, 1))
