"""Ridge regression: on one-hot targets, a classifier, and on values."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from convexheads.heads.base import BaseLearner, Dual, Head
from convexheads.heads.closed_form import ridge, ridge_primal
from convexheads.heads.regression import RegressionHead
from convexheads.hyperparameters import Hyperparameter, display, finite, positive, value_of
from convexheads.kernels import Kernel, Linear


class _Ridge(BaseLearner):
    """Whatever the targets."""

    regularization: Hyperparameter

    def dual(self, gram: Float[Tensor, "*batch n n"], targets: Float[Tensor, "*batch n k"]) -> Dual:
        return self._dual(ridge(gram, targets, value_of(self.regularization, gram), of=self._system()))

    def _learn(
        self,
        features: Float[Tensor, "*batch n d"],
        kernel: Kernel,
        targets: Float[Tensor, "*batch n k"],
        mask: Bool[Tensor, "*batch n"] | None,
    ) -> Dual:
        *_, n, d = features.shape
        if not isinstance(kernel, Linear) or n <= d:
            return super()._learn(features, kernel, targets, mask)
        weight = value_of(self.regularization, features)
        return self._dual(ridge_primal(kernel.features(features), targets, weight, of=self._system()))

    def _dual(self, coef: Float[Tensor, "*batch n k"]) -> Dual:
        return Dual(coef)

    def _system(self) -> str:
        return f"{type(self).__name__}: the Gram matrix plus {display(self.regularization)} on its diagonal"

    def _settings(self) -> list[str]:
        return [f"regularization={display(self.regularization)}", *super()._settings()]


class RidgeHead(_Ridge, Head):
    r"""Ridge regression on one-hot targets, Eq. 11 of Lee et al. 2019; R2D2 of Bertinetto et al. 2019.

    Primal: \(\min_W \frac12 |XW - Y|^2 + \frac{\lambda}{2} |W|^2\). Dual: \(\alpha = (K + \lambda I)^{-1} Y\), one
    Cholesky of n x n for all classes. With fewer features than examples, and the linear kernel, one of d x d.

    What differs: this is Eq. 11 up to the constants printed there. The ridge code published by Lee et al. returns twice
    these coefficients, which their learnable scale absorbs; their R2D2 code returns these. R2D2 learns lambda, a scale
    and a bias (the same for all classes, so it matters for losses other than the softmax's cross-entropy only):
    `convexheads.presets.r2d2()`.

    Args:
        regularization: lambda, positive; a float or `Learnable`. Default 50, that of Lee et al. 2019.
        bias: added to all logits, after `scale`; a float or `Learnable(..., signed=True)`. Default 0.
        kernel: any callable `(x, y) -> gram`; default `Linear()`.
        scale: factor of all logits (gamma in Eq. 12 of Lee et al. 2019), positive; a float or `Learnable`. Default 1.

    Raises:
        InputError: an argument is unusable. Calls raise what `Head.forward` does.
    """

    def __init__(
        self,
        regularization: Hyperparameter = 50.0,
        *,
        bias: Hyperparameter = 0.0,
        kernel: Kernel | None = None,
        scale: Hyperparameter = 1.0,
    ) -> None:
        super().__init__(kernel=kernel, scale=scale)
        self.regularization = positive("regularization", regularization)
        self.bias = finite("bias", bias)

    def _dual(self, coef: Float[Tensor, "*batch n k"]) -> Dual:
        if self.bias == 0:
            return Dual(coef)
        bias = value_of(self.bias, coef) / value_of(self.scale, coef)  # which multiplies it
        return Dual(coef, bias=bias.expand(*coef.shape[:-2], coef.shape[-1]))

    def _settings(self) -> list[str]:
        regularization, *settings = super()._settings()
        return [regularization, *([] if self.bias == 0 else [f"bias={display(self.bias)}"]), *settings]


class RidgeRegressionHead(_Ridge, RegressionHead):
    r"""Kernel ridge regression (Saunders, Gammerman & Vovk 1998).

    Primal: \(\min_w \frac12 |Xw - y|^2 + \frac{\lambda}{2} |w|^2\). Dual: \(\alpha = (K + \lambda I)^{-1} y\); with
    fewer features than examples and the linear kernel, the d x d system of the primal. There is no intercept, as there.

    Args:
        regularization: lambda, positive; a float or `Learnable`. Default 1.
        kernel: any callable `(x, y) -> gram`; default `Linear()`.

    Raises:
        InputError: an argument is unusable. Calls raise what `RegressionHead.forward` does.
    """

    def __init__(self, regularization: Hyperparameter = 1.0, *, kernel: Kernel | None = None) -> None:
        super().__init__(kernel=kernel)
        self.regularization = positive("regularization", regularization)
