"""Gaussian classifiers: linear discriminant analysis and the Mahalanobis head of Simple CNAPS, through inner products.

A d x d covariance is never formed: it lies in the span of the support set, and Woodbury's identity leaves only n x n
matrices. The heads are therefore stable with more features than examples, and any kernel can be used.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from convexheads._functorch import inspect_values
from convexheads._validation import check_definite, check_fraction, describe_first_task, optional
from convexheads.errors import InputError
from convexheads.heads._linear_algebra import shifted_cholesky
from convexheads.heads.base.classification import ClassificationHead
from convexheads.heads.base.support_set import KernelExpansion, SupportSet
from convexheads.hyperparameters import Hyperparameter, as_tensor, check_positive
from convexheads.kernels import KernelLike


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
    }
    requires_all_classes = True

    def __init__(
        self,
        shrinkage: float = 0.5,
        *,
        variance: Hyperparameter | None = None,
        kernel: KernelLike | None = None,
        scale: Hyperparameter = 1.0,
        validate: bool = True,
    ) -> None:
        super().__init__(kernel=kernel, scale=scale, validate=validate)
        self.shrinkage, self.variance = shrinkage, variance

    def solve(self, support: SupportSet) -> KernelExpansion:
        gram, targets = support.gram, support.targets
        counts = targets.sum(-2)
        mean = targets / counts.unsqueeze(-2)
        center = torch.diag_embed(targets.sum(-1)) - mean @ targets.mT  # x -> x - its class mean, a projection
        examples = counts.sum(-1)
        scatter = center @ gram @ center / examples[..., None, None]
        if self.variance is None:
            variance = scatter.diagonal(dim1=-2, dim2=-1).sum(-1) / support.features.shape[-1]
            if support.validate:
                inspect_values(_check_variance, variance, gram, examples)
        else:
            variance = as_tensor(self.variance, gram).expand(examples.shape)
        ridge = self.shrinkage * variance
        name = "LinearDiscriminantHead: the shrunk Gram matrix of the centered support"
        factor = shifted_cholesky((1 - self.shrinkage) * scatter, ridge, name=name, validate=support.validate)
        spread = (1 - self.shrinkage) / examples[..., None, None]
        inner = center @ torch.cholesky_solve(center @ gram @ mean, factor)
        coef = (mean - spread * inner) / ridge[..., None, None]
        bias = (counts / examples.unsqueeze(-1)).log() - (mean * (gram @ coef)).sum(-2) / 2
        return KernelExpansion(coef, bias=bias)


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
        kernel: see `ClassificationHead`, also for `scale`, `validate` and the errors.

    Raises:
        InputError: calls raise it also for a class without examples.

    Example:
        `logits = MahalanobisHead()(support, labels, query)`
    """

    checks = ClassificationHead.checks | {"regularization": check_positive}
    requires_all_classes = True

    def __init__(
        self,
        regularization: Hyperparameter = 1.0,
        *,
        kernel: KernelLike | None = None,
        scale: Hyperparameter = 1.0,
        validate: bool = True,
    ) -> None:
        super().__init__(kernel=kernel, scale=scale, validate=validate)
        self.regularization = regularization

    def solve(self, support: SupportSet) -> KernelExpansion:
        beta = as_tensor(self.regularization, support.targets)
        class_membership = support.targets.mT  # (*batch, k, n)
        counts = class_membership.sum(-1)
        # Q_k = beta I + (root_k X)' (root_k X), with the centered class stacked on the centered task.
        share = counts / (counts + 1)
        class_root = (share / (counts - 1).clamp_min(1)).sqrt()[..., None, None] * _center(class_membership)
        all_members = class_membership.sum(-2, keepdim=True)
        task_weight = ((1 - share) / (all_members.sum(-1) - 1).clamp_min(1)).sqrt()[..., None, None]
        root = torch.cat([class_root, task_weight * _center(all_members)], -2)
        shared = support.gram.unsqueeze(-3)
        covariance, name = root @ shared @ root.mT, "MahalanobisHead: a covariance"
        factor = shifted_cholesky(covariance, beta, name=name, validate=support.validate, per_class=True)
        inverse = root.mT @ torch.cholesky_solve(root, factor)  # beta * Q_k^-1 = I - X' @ inverse @ X
        mean = (class_membership / counts.unsqueeze(-1)).unsqueeze(-1)
        image = shared @ mean
        solved = inverse @ image
        bias = -(mean * image - image * solved).sum((-2, -1)) / (2 * beta)
        coef = ((mean - solved) / beta).squeeze(-1).mT
        return KernelExpansion(coef, bias=bias, quadratic=inverse / (2 * beta), self_similarity_weight=-1 / (2 * beta))


def _center(members: Tensor) -> Tensor:
    """The projection that subtracts the members' mean from each of them, and maps all others to zero."""
    outer = members.unsqueeze(-1) * members.unsqueeze(-2)
    return torch.diag_embed(members) - outer / members.sum(-1)[..., None, None]


def _check_variance(variance: Tensor, gram: Tensor, examples: Tensor) -> None:
    size = gram.diagonal(dim1=-2, dim2=-1).abs().sum(-1) / examples
    none = variance <= 1e-14 * size
    if none.any():
        inspect_values(check_definite, gram)
        expected = "two different examples of some class, or LinearDiscriminantHead(variance=...)"
        raise InputError("support", expected, f"a within-class covariance of zero in {describe_first_task(none)}")
