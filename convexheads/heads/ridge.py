"""Ridge regression on one-hot targets, as a classifier, and on real values."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from convexheads.heads._closed_form import (
    ClosedForm,
    check_on_failure,
    errors_of_dual,
    errors_of_weights,
    factorize,
    with_solution,
)
from convexheads.heads._linear_algebra import per_matrix
from convexheads.heads._sharing import apply_once, multiply, scale_once
from convexheads.heads.base.loss import LossHead
from convexheads.heads.base.regression import RegressionHead
from convexheads.heads.base.support_set import KernelExpansion, SupportSet
from convexheads.hyperparameters import Hyperparameter, as_tensor, check_positive
from convexheads.kernels import KernelLike
from convexheads.solvers.failures import OnFailure


def _solve_ridge(
    head: RidgeHead | RidgeRegressionHead, support: SupportSet, *, intercept: bool = False
) -> KernelExpansion:
    """The dual coefficients `(gram + regularization * S^-1)^-1 targets` with the weights S of the examples."""
    penalty, factor = as_tensor(head.regularization, support.targets), support.linear_factor
    targets = 2 * support.targets - 1 if support.is_multilabel else support.targets
    if support.prior is not None:
        targets = targets - support.offset
    if support.mask is not None:  # the prior has scores for masked examples too
        targets = targets.masked_fill(~support.mask.unsqueeze(-1), 0)
    *_, n, d = support.features.shape
    # Masked examples are orthogonal to the others in the Gram matrix.
    is_masked = support.mask is not None and not (factor is None or n <= d)
    root = _roots(support) if intercept or support.sample_weight is not None or is_masked else None
    if factor is None or n <= d:
        return _solve_dual(head, support, penalty, targets, root, intercept=intercept)
    return _solve_primal(head, support, factor, penalty, targets, root, intercept=intercept)


def _solve_dual(
    head: ClosedForm, support: SupportSet, penalty: Tensor, targets: Tensor, root: Tensor | None, *, intercept: bool
) -> KernelExpansion:
    """By the n x n system of the dual."""
    gram = support.gram
    if root is not None:
        gram, targets = root * gram * root.mT, root * targets
    system = factorize(gram, penalty, validate=support.validate)
    coef, bias = system.solve(targets), None
    if root is not None and intercept:  # the coefficients of each class have to sum to zero
        direction = system.solve(root)
        bias = (root.mT @ coef) / (root.mT @ direction)
        coef, targets, bias = coef - direction @ bias, targets - root @ bias, bias.squeeze(-2)
    expansion = KernelExpansion(coef if root is None else root * coef, bias=bias)
    doubt = None if intercept else system.may_lose_digits
    return with_solution(head, expansion, support, errors_of_dual, gram, penalty, targets, coef, doubt=doubt)


def _solve_primal(
    head: ClosedForm,
    support: SupportSet,
    factor: float | Tensor,
    penalty: Tensor,
    targets: Tensor,
    root: Tensor | None,
    *,
    intercept: bool,
) -> KernelExpansion:
    """By the d x d system of the primal, which is smaller."""
    features = scale_once(support.features, factor)
    center = mean = None
    rows, values = features, targets
    if root is not None:
        if intercept:
            share = root.square() / root.square().sum(-2, keepdim=True)
            center, mean = share.mT @ features, share.mT @ targets
            rows, values = rows - center, values - mean
        rows, values = root * rows, root * values
    matrix = apply_once(lambda x: multiply(x.mT, x), rows)
    system = factorize(matrix, penalty, validate=support.validate)
    weight = system.solve(multiply(rows.mT, values))
    bias = None if center is None or mean is None else mean - center @ weight
    # The difference loses digits if the penalty is small. The scores do not: they are computed from the weight.
    error = values - multiply(rows, weight)  # times the root
    coef = (error if root is None else root * error) / per_matrix(penalty)
    expansion = KernelExpansion(
        coef, weight=scale_once(weight.mT, factor), bias=None if bias is None else bias.squeeze(-2)
    )
    arguments = rows, penalty, error, weight, system
    return with_solution(head, expansion, support, errors_of_weights, *arguments, doubt=system.may_lose_digits)


def _leave_one_out(
    support: SupportSet, penalty: Float[Tensor, "*grid"], *, intercept: bool
) -> Float[Tensor, "tasks 1 points n k"]:
    """The scores of each example without it: `y - alpha / diagonal` of the inverse of the (bordered) system.

    In terms of `hat`, the matrix that maps targets to scores, that is `(score - hat_nn y) / (1 - hat_nn)`.
    """
    targets = 2 * support.targets - 1 if support.is_multilabel else support.targets
    targets = targets - support.offset
    root = _roots(support)
    total = root.square().sum(-2, keepdim=True)
    share = root.square() / total
    factor, (*_, n, d) = support.linear_factor, support.features.shape
    # Columns of `basis` are orthogonal to the roots with an intercept, because of centered rows.
    if factor is None or n <= d:
        gram = support.gram
        if intercept:
            column = gram @ share
            gram = gram - column - column.mT + share.mT @ column
        values, basis = torch.linalg.eigh(root * gram * root.mT)
    else:
        rows = factor * support.features
        rows = root * (rows - share.mT @ rows if intercept else rows)
        squared, vectors = torch.linalg.eigh(rows.mT @ rows)
        values = squared.clamp_min(0)
        basis = (rows @ vectors) / values.sqrt().clamp_min(torch.finfo(values.dtype).tiny).unsqueeze(-2)
        basis = torch.where(values.unsqueeze(-2) > 1e-13 * values.amax(-1)[..., None, None], basis, 0)
    center = share.mT @ targets if intercept else torch.zeros_like(targets[..., :1, :])
    rotated = basis.mT @ (root * (targets - center))
    shrinkage = values.clamp_min(0)
    shrinkage = (shrinkage[:, None, None] / (shrinkage[:, None, None] + penalty.unsqueeze(-1))).unsqueeze(-1)
    part, root = basis[:, None, None], root[:, None, None]
    fitted = multiply(part, shrinkage * rotated[:, None, None])  # (tasks, 1, points, n, k), times the roots
    hat = multiply(part.square(), shrinkage)
    if intercept:
        fitted, hat = fitted + root * center[:, None, None], hat + (root.square() / total[:, None, None])
    own = root * targets[:, None, None]
    scores = (fitted - hat * own) / ((1 - hat) * root.where(root > 0, 1))
    return scores + support.offset[:, None, None]


def _roots(support: SupportSet) -> Float[Tensor, "*batch n 1"]:
    """The square roots of the factors of the examples."""
    weight, mask = support.sample_weight, support.mask
    root = torch.ones_like(support.targets[..., 0]) if weight is None else weight.sqrt()
    return (root if mask is None else root * mask).unsqueeze(-1)


class RidgeHead(LossHead):
    r"""Ridge regression on one-hot targets, Eq. 11 of Lee et al. 2019; R2D2 of Bertinetto et al. 2019.

    Use it as a first choice: it has one hyperparameter, and a closed form that is among the fastest.

    Primal: \(\min_W \frac12 |XW - Y|^2 + \frac{\lambda}{2} |W|^2\). Dual: \(\alpha = (K + \lambda I)^{-1} Y\), one
    n x n Cholesky factorization for all classes. With fewer features than examples and the linear kernel, it is d x d.

    With several labels per example, targets are 1 and -1 instead of 1 and 0, as in scikit-learn's `RidgeClassifier`.

    This is Eq. 11 without its misprinted constants. The ridge code published by Lee et al. returns twice these
    coefficients, which its learnable scale absorbs. `convexheads.models.r2d2()` has the settings of R2D2.

    Args:
        regularization: lambda, positive; a float or `Learnable`. Defaults to 50, as in Lee et al. 2019.
        on_failure: what happens if rounding may have moved the result of a task by more than a relative duality gap of
            1e-6, as with a lambda below about 1e-9 of the squared length of the features, if they do not determine the
            weights: "raise" (default), "warn" or "return", as for a `Solver`. With `validate=False`, only the status
            shows it.
        class_weight: see `LossHead`, also for `intercept`, `kernel`, `scale`, `validate` and the errors.

    Example:
        `logits = RidgeHead(10.0)(support, labels, query)`
    """

    checks = LossHead.checks | {"regularization": check_positive, "on_failure": check_on_failure}
    accepts_multilabel = True
    on_failure: OnFailure

    def __init__(
        self,
        regularization: Hyperparameter = 50.0,
        *,
        on_failure: OnFailure = "raise",
        class_weight: Any = None,
        intercept: bool = False,
        kernel: KernelLike | None = None,
        scale: Hyperparameter = 1.0,
        validate: bool = True,
    ) -> None:
        super().__init__(class_weight=class_weight, intercept=intercept, kernel=kernel, scale=scale, validate=validate)
        self.regularization, self.on_failure = regularization, on_failure

    def entries_per_task(self, n: int, d: int, k: int) -> int:
        return 4 * (n + d) * k

    def solve(self, support: SupportSet) -> KernelExpansion:
        return _solve_ridge(self, support, intercept=self.intercept)

    @property
    def has_leave_one_out(self) -> bool:
        return self.class_weight != "balanced"  # these weights depend on the number of examples

    def leave_one_out_scores(self, support: SupportSet) -> Float[Tensor, "tasks 1 points n k"]:
        return _leave_one_out(support, as_tensor(self.regularization, support.features), intercept=self.intercept)


class RidgeRegressionHead(RegressionHead):
    r"""Kernel ridge regression (Saunders, Gammerman & Vovk 1998).

    Use it to predict values where neither uncertainty nor outliers matter.

    Primal: \(\min_w \frac12 |Xw - y|^2 + \frac{\lambda}{2} |w|^2\). Dual: \(\alpha = (K + \lambda I)^{-1} y\), solved
    in the same way as in `RidgeHead`. Like the original, it has no intercept.

    Args:
        regularization: lambda, positive; a float or `Learnable`. Defaults to 1.
        on_failure: as in `RidgeHead`.
        kernel: see `RegressionHead`, also for `validate` and the errors.

    Example:
        `values = RidgeRegressionHead(0.1)(support, targets, query)`
    """

    checks = RegressionHead.checks | {"regularization": check_positive, "on_failure": check_on_failure}
    on_failure: OnFailure

    def __init__(
        self,
        regularization: Hyperparameter = 1.0,
        *,
        on_failure: OnFailure = "raise",
        kernel: KernelLike | None = None,
        validate: bool = True,
    ) -> None:
        super().__init__(kernel=kernel, validate=validate)
        self.regularization, self.on_failure = regularization, on_failure

    def solve(self, support: SupportSet) -> KernelExpansion:
        return _solve_ridge(self, support)
