"""Gaussian classifiers: linear discriminant analysis and the Mahalanobis head of Simple CNAPS.

With a linear kernel and more examples than features, they form the d x d covariances. Otherwise, these lie in the span
of the support set, and Woodbury's identity leaves only matrices of the size of the support set: that works with any
kernel, and is stable with more features than examples.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from convexheads._functorch import inspect_values
from convexheads._looks import call_explained, refuse
from convexheads._validation import check_definite, check_fraction, describe_first_task, optional
from convexheads.errors import InputError
from convexheads.heads._closed_form import (
    Errors,
    check_on_failure,
    errors_of_gaussians,
    errors_of_system,
    factorize,
    with_solution,
)
from convexheads.heads._linear_algebra import cholesky_or_nan, per_matrix
from convexheads.heads._sharing import scale_once
from convexheads.heads.base.classification import ClassificationHead
from convexheads.heads.base.support_set import KernelExpansion, SupportSet
from convexheads.hyperparameters import Hyperparameter, as_tensor, check_positive
from convexheads.kernels import KernelLike
from convexheads.solvers.failures import OnFailure

_LARGEST_ERROR = 1e-9
"""The squared relative error of the weights up to which linear discriminants count as solved."""

_SAFETY = 4
"""The factor by which rounding errors may be larger than expected."""


class LinearDiscriminantHead(ClassificationHead):
    r"""Linear discriminant analysis (Fisher 1936) with shrinkage: Gaussian classes with one shared covariance.

    Use it with several shots and many features, where a shared covariance improves on the nearest class mean.

    With class means \(m_k\), class frequencies \(\pi_k\) and the pooled within-class covariance \(S\) (divided by n),
    \(\Sigma = (1 - s) S + s\, v I\), where v is the mean variance \(\operatorname{tr}(S) / d\) (Friedman 1989),
    and the score of class k is \(q^\top \Sigma^{-1} m_k - \frac12 m_k^\top \Sigma^{-1} m_k + \log \pi_k\). This is
    scikit-learn's `LinearDiscriminantAnalysis(solver="lsqr", shrinkage=s)`.

    Difference from Friedman: all classes share the covariance. With one example per class there is no within-class
    variance to shrink toward: pass `variance`.

    Args:
        shrinkage: s, above 0, at most 1, where 1 gives the nearest class mean (up to the frequencies). Defaults to 0.5.
        variance: v, positive, in squared units of the features; a float or `Learnable`. Defaults to None, the
            mean variance; for any kernel, d is the number of input features.
        on_failure: as in `RidgeHead`, with \(s\, v\) for lambda.
        kernel: see `ClassificationHead`, also for `scale`, `validate` and the errors.

    Raises:
        InputError: calls raise it also for a class without examples and, if `variance` is not given, for a task
            without within-class variance.

    Example:
        `logits = LinearDiscriminantHead(0.2)(support, labels, query)`
    """

    checks = ClassificationHead.checks | {
        "shrinkage": partial(check_fraction, above_zero=True),
        "variance": optional(check_positive),
        "on_failure": check_on_failure,
    }
    on_failure: OnFailure
    requires_all_classes = True

    def __init__(
        self,
        shrinkage: float = 0.5,
        *,
        variance: Hyperparameter | None = None,
        on_failure: OnFailure = "raise",
        kernel: KernelLike | None = None,
        scale: Hyperparameter = 1.0,
        validate: bool = True,
    ) -> None:
        super().__init__(kernel=kernel, scale=scale, validate=validate)
        self.shrinkage, self.variance, self.on_failure = shrinkage, variance, on_failure

    def solve(self, support: SupportSet) -> KernelExpansion:
        factor, (*_, n, d) = support.linear_factor, support.features.shape
        return self._solve_dual(support) if factor is None or n <= d else self._solve_primal(support, factor)

    def _solve_dual(self, support: SupportSet) -> KernelExpansion:
        """By the n x n system of coefficients."""
        gram, targets, (mean, priors, examples) = support.gram, support.targets, _means(support)
        center = torch.diag_embed(targets.sum(-1)) - mean @ targets.mT  # x -> x - its class mean, a projection
        scatter = center @ gram @ center / per_matrix(examples)
        ridge = self._ridge(support, scatter, gram.diagonal(dim1=-2, dim2=-1))
        factor = cholesky_or_nan((1 - self.shrinkage) * scatter, ridge, validate=support.validate)
        spread = (1 - self.shrinkage) / per_matrix(examples)
        inner = center @ torch.cholesky_solve(center @ gram @ mean, factor)
        coef = (mean - spread * inner) / per_matrix(ridge)
        bias = priors.log() - (mean * (gram @ coef)).sum(-2) / 2
        arguments = gram, spread * center, ridge, mean, coef
        expansion = KernelExpansion(coef, bias=bias)
        return with_solution(self, expansion, support, errors_of_gaussians, *arguments, largest_error=_LARGEST_ERROR)

    def _solve_primal(self, support: SupportSet, factor: float | Tensor) -> KernelExpansion:
        """By the d x d covariance, which is smaller, and loses no digits."""
        features, (mean, priors, examples) = scale_once(support.features, factor), _means(support)
        means = mean.mT @ features
        rows = features - support.targets @ means
        scatter = rows.mT @ rows / per_matrix(examples)
        ridge = self._ridge(support, scatter, features.square().sum(-1))
        system = factorize((1 - self.shrinkage) * scatter, ridge, validate=support.validate)
        weight = system.solve(means.mT)
        spread = (1 - self.shrinkage) / per_matrix(examples)
        coef = (mean - spread * (rows @ weight)) / per_matrix(ridge)
        bias = priors.log() - (means * weight.mT).sum(-1) / 2
        arguments = spread.sqrt() * rows, ridge, means.mT, weight, system
        expansion = KernelExpansion(coef, weight=factor * weight.mT, bias=bias)
        return with_solution(
            self,
            expansion,
            support,
            errors_of_system,
            *arguments,
            doubt=system.may_lose_digits,
            largest_error=_LARGEST_ERROR,
        )

    def _ridge(self, support: SupportSet, scatter: Tensor, squared: Tensor) -> Tensor:
        """The shrinkage times the variance, from the within-class scatter and the squared lengths of the examples."""
        batch = support.features.shape[:-2]
        if self.variance is not None:
            return self.shrinkage * as_tensor(self.variance, scatter).expand(batch)
        variance = scatter.diagonal(dim1=-2, dim2=-1).sum(-1) / support.features.shape[-1]
        if support.validate:
            check = partial(inspect_values, _check_variance, variance, squared.abs().mean(-1))
            call_explained(check, InputError, lambda: inspect_values(check_definite, support.gram))
        return self.shrinkage * variance


class MahalanobisHead(ClassificationHead):
    r"""Gaussian classes, each with a covariance of its own: the head of Simple CNAPS (Bateni et al. 2020).

    Use it with several shots and classes of different spread.

    The score of class k is \(-\frac12 (q - m_k)^\top Q_k^{-1} (q - m_k)\) with the class mean \(m_k\) and
    \(Q_k = \lambda_k S_k + (1 - \lambda_k) S + \beta I\), where \(S_k\) is the covariance of the class, \(S\) that of
    all examples of the task (each divided by its number of examples minus one), \(\lambda_k = N_k / (N_k + 1)\) for
    \(N_k\) examples, and \(\beta = 1\). For a class with one example, \(S_k\) is zero.

    Difference from the paper: this is the head alone, without the adaptation networks that make its features. The
    published code leaves out the factor of one half (as `scale=2.0` does here). For a class with one example, it
    also adds half the variance among that example's features to every entry of \(Q_k\).

    Args:
        regularization: beta, positive, in squared units of the features; a float or `Learnable`. Defaults to 1, as in
            the paper.
        on_failure: what happens if rounding has probably moved squared distances of a task by more than 1e-6 of the
            largest squared length of a class mean, as with a beta below about 1e-5 of the squared length of the
            features where they do not determine the covariances: "raise" (default), "warn" or "return", as for a
            `Solver`.
        kernel: see `ClassificationHead`, also for `scale`, `validate` and the errors.

    Raises:
        InputError: calls raise it also for a class without examples.

    Example:
        `logits = MahalanobisHead()(support, labels, query)`
    """

    checks = ClassificationHead.checks | {"regularization": check_positive, "on_failure": check_on_failure}
    requires_all_classes = True
    on_failure: OnFailure

    def __init__(
        self,
        regularization: Hyperparameter = 1.0,
        *,
        on_failure: OnFailure = "raise",
        kernel: KernelLike | None = None,
        scale: Hyperparameter = 1.0,
        validate: bool = True,
    ) -> None:
        super().__init__(kernel=kernel, scale=scale, validate=validate)
        self.regularization, self.on_failure = regularization, on_failure

    def solve(self, support: SupportSet) -> KernelExpansion:
        factor, (*_, n, d) = support.linear_factor, support.features.shape
        return self._solve_dual(support) if factor is None or n <= d else self._solve_primal(support, factor)

    def _solve_dual(self, support: SupportSet) -> KernelExpansion:
        """By a 2n x 2n system for each class."""
        beta = as_tensor(self.regularization, support.targets)
        root, mean = _root_of_covariances(support.targets), _means(support)[0].mT.unsqueeze(-1)
        shared = support.gram.unsqueeze(-3)
        factor = cholesky_or_nan(root @ shared @ root.mT, beta, validate=support.validate)
        inverse = root.mT @ torch.cholesky_solve(root, factor)  # beta * Q_k^-1 = I - X' @ inverse @ X
        image = shared @ mean
        solved = inverse @ image
        bias = -(mean * image - image * solved).sum((-2, -1)) / (2 * beta)
        coef = ((mean - solved) / beta).squeeze(-1).mT
        expansion = KernelExpansion(
            coef, bias=bias, quadratic=inverse / (2 * beta), self_similarity_weight=-1 / (2 * beta)
        )
        return with_solution(self, expansion, support, _errors_of_distances, support.gram, inverse, -2 * beta * bias)

    def _solve_primal(self, support: SupportSet, factor: float | Tensor) -> KernelExpansion:
        """By the d x d covariances, which are smaller, and lose no digits."""
        beta = as_tensor(self.regularization, support.targets)
        features = scale_once(support.features, factor)
        root, mean = _root_of_covariances(support.targets), _means(support)[0]
        rows = root @ features.unsqueeze(-3)
        covariance = rows.mT @ rows
        inverse = torch.cholesky_inverse(cholesky_or_nan(covariance, beta, validate=support.validate))  # of Q_k
        means = mean.mT @ features
        weight = inverse @ means.unsqueeze(-1)
        coef = (mean.mT.unsqueeze(-1) - root.mT @ (rows @ weight)) / beta
        weight = weight.squeeze(-1)
        squared = factor.unsqueeze(-3).square() if isinstance(factor, Tensor) else factor**2
        expansion = KernelExpansion(
            coef.squeeze(-1).mT,
            weight=factor * weight,
            bias=-(means * weight).sum(-1) / 2,
            quadratic=-squared * inverse / 2,
        )
        return with_solution(self, expansion, support, _errors_of_covariance, covariance, inverse, beta)


def _means(support: SupportSet) -> tuple[Tensor, Tensor, Tensor]:
    """The coefficients of the class means, `(*batch, n, k)`, the frequencies of the classes, and the example counts."""
    counts = support.targets.sum(-2)
    examples = counts.sum(-1)
    return support.targets / counts.unsqueeze(-2), counts / examples.unsqueeze(-1), examples


def _root_of_covariances(targets: Tensor) -> Tensor:
    """Matrices R_k with `Q_k = beta I + (R_k X)' (R_k X)`: the centered class stacked on the centered task."""
    class_membership = targets.mT  # (*batch, k, n)
    counts = class_membership.sum(-1)
    share = counts / (counts + 1)
    class_root = (share / (counts - 1).clamp_min(1)).sqrt()[..., None, None] * _center(class_membership)
    all_members = class_membership.sum(-2, keepdim=True)
    task_weight = ((1 - share) / (all_members.sum(-1) - 1).clamp_min(1)).sqrt()[..., None, None]
    return torch.cat([class_root, task_weight * _center(all_members)], -2)


def _errors_of_covariance(covariance: Tensor, inverse: Tensor, beta: Tensor) -> Errors:
    """The errors per task: machine precision times an upper bound of its largest condition number.

    The `inverse` is that of the matrices per class, `covariance + beta I`.
    """
    shifted = covariance + beta * torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    condition = (torch.linalg.matrix_norm(shifted) * torch.linalg.matrix_norm(inverse)).amax(-1)
    error = condition * torch.finfo(inverse.dtype).eps
    return error, torch.zeros_like(error)


def _errors_of_distances(gram: Tensor, inverse: Tensor, means: Tensor) -> Errors:
    """How far rounding is likely to move squared distances, relative to the largest squared length of the `means`.

    With the kernel values s of a query, its squared length is `|q|^2 - s @ inverse @ s` for each class, up to a factor.
    Rounding moves each product by eps times the lengths of the query and of two examples, and such errors are
    independent: their sum grows with the root of the number of terms.
    """
    length = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()[..., None, :, None]
    parts = (length * inverse * length.mT).flatten(-2)
    weight = torch.minimum(parts.abs().sum(-1), _SAFETY * torch.linalg.vector_norm(parts, dim=-1))
    moved = torch.finfo(gram.dtype).eps * length.square().amax((-3, -2, -1)) * (1 + weight.amax(-1))
    error = moved / means.amax(-1).clamp_min(torch.finfo(gram.dtype).tiny)
    return error, torch.zeros_like(error)


def _center(members: Tensor) -> Tensor:
    """The projection that subtracts the members' mean from each of them, and maps all others to zero."""
    outer = members.unsqueeze(-1) * members.unsqueeze(-2)
    return torch.diag_embed(members) - outer / members.sum(-1)[..., None, None]


def _check_variance(variance: Tensor, size: Tensor) -> None:
    none = variance <= 1e-14 * size
    expected = "two different examples of some class, or LinearDiscriminantHead(variance=...)"
    got = "a within-class covariance of zero in"
    refuse(none, lambda: InputError("support", expected, f"{got} {describe_first_task(none)}"))
