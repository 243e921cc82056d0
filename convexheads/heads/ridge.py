"""Ridge regression on one-hot targets, as a classifier, and on real values."""

from __future__ import annotations

import torch

from convexheads.heads._linear_algebra import shifted_cholesky
from convexheads.heads.base.classification import ClassificationHead
from convexheads.heads.base.regression import RegressionHead
from convexheads.heads.base.support_set import KernelExpansion, SupportSet
from convexheads.hyperparameters import Hyperparameter, as_tensor, check_positive
from convexheads.kernels import KernelLike


def _solve_ridge(support: SupportSet, regularization: Hyperparameter, head: str) -> KernelExpansion:
    """The dual coefficients `(gram + regularization * I)^-1 targets`; `head` is named in the error."""
    penalty, targets, factor = as_tensor(regularization, support.targets), support.targets, support.linear_factor
    name, validate = f"{head}: the Gram matrix plus the regularization on its diagonal", support.validate
    *_, n, d = support.features.shape
    if factor is None or n <= d:
        cholesky = shifted_cholesky(support.gram, penalty, name=name, validate=validate)
        return KernelExpansion(torch.cholesky_solve(targets, cholesky))
    # The d x d system of the primal is smaller.
    features = factor * support.features
    cholesky = shifted_cholesky(features.mT @ features, penalty, name=name, validate=validate)
    weight = torch.cholesky_solve(features.mT @ targets, cholesky)
    # The difference loses digits if the penalty is small. The scores do not: they are computed from the weight.
    coef = (targets - features @ weight) / penalty
    return KernelExpansion(coef, weight=factor * weight.mT)


class RidgeHead(ClassificationHead):
    r"""Ridge regression on one-hot targets, Eq. 11 of Lee et al. 2019; R2D2 of Bertinetto et al. 2019.

    Use it as a first choice: it has one hyperparameter, and a closed form that is among the fastest.

    Primal: \(\min_W \frac12 |XW - Y|^2 + \frac{\lambda}{2} |W|^2\). Dual: \(\alpha = (K + \lambda I)^{-1} Y\), one
    n x n Cholesky factorization for all classes. With fewer features than examples and the linear kernel, it is d x d.

    This is Eq. 11 without its misprinted constants. The ridge code published by Lee et al. returns twice these
    coefficients, which its learnable scale absorbs. `convexheads.models.r2d2()` has the settings of R2D2.

    Args:
        regularization: lambda, positive; a float or `Learnable`. Defaults to 50, as in Lee et al. 2019.
        kernel: see `ClassificationHead`, also for `scale`, `validate` and the errors.

    Example:
        `logits = RidgeHead(10.0)(support, labels, query)`
    """

    checks = ClassificationHead.checks | {"regularization": check_positive}

    def __init__(
        self,
        regularization: Hyperparameter = 50.0,
        *,
        kernel: KernelLike | None = None,
        scale: Hyperparameter = 1.0,
        validate: bool = True,
    ) -> None:
        super().__init__(kernel=kernel, scale=scale, validate=validate)
        self.regularization = regularization

    def solve(self, support: SupportSet) -> KernelExpansion:
        return _solve_ridge(support, self.regularization, "RidgeHead")


class RidgeRegressionHead(RegressionHead):
    r"""Kernel ridge regression (Saunders, Gammerman & Vovk 1998).

    Use it to predict values where neither uncertainty nor outliers matter.

    Primal: \(\min_w \frac12 |Xw - y|^2 + \frac{\lambda}{2} |w|^2\). Dual: \(\alpha = (K + \lambda I)^{-1} y\), solved
    in the same way as in `RidgeHead`. Like the original, it has no intercept.

    Args:
        regularization: lambda, positive; a float or `Learnable`. Defaults to 1.
        kernel: see `RegressionHead`, also for `validate` and the errors.

    Example:
        `values = RidgeRegressionHead(0.1)(support, targets, query)`
    """

    checks = RegressionHead.checks | {"regularization": check_positive}

    def __init__(
        self, regularization: Hyperparameter = 1.0, *, kernel: KernelLike | None = None, validate: bool = True
    ) -> None:
        super().__init__(kernel=kernel, validate=validate)
        self.regularization = regularization

    def solve(self, support: SupportSet) -> KernelExpansion:
        return _solve_ridge(support, self.regularization, "RidgeRegressionHead")
