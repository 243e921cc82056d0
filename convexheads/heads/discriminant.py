"""Gaussian classifiers: linear discriminant analysis and the Mahalanobis head of Simple CNAPS, through inner products.

A covariance of d x d is never formed: the support spans all there is to know of it, and Woodbury's identity leaves
matrices of n x n, so that few examples of many features are as stable as the reverse, and any kernel will do.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from convexheads._functorch import inspect_values
from convexheads.errors import InputError
from convexheads.heads import inputs
from convexheads.heads.base import Dual, Head
from convexheads.heads.closed_form import cholesky, plus_diagonal
from convexheads.hyperparameters import Hyperparameter, display, positive, value_of
from convexheads.kernels import Kernel


class LinearDiscriminantHead(Head):
    r"""Linear discriminant analysis (Fisher 1936) with shrinkage: Gaussian classes of one shared covariance.

    With class means \(m_k\), class frequencies \(\pi_k\) and the pooled within-class covariance \(S\) (divided by n),
    \(\Sigma = (1 - s) S + s\, v I\), where v is the mean variance \(\operatorname{tr}(S) / d\) (Friedman 1989),
    and the score of class k is \(q^\top \Sigma^{-1} m_k - \frac12 m_k^\top \Sigma^{-1} m_k + \log \pi_k\). The same as
    scikit-learn's `LinearDiscriminantAnalysis(solver="lsqr", shrinkage=s)`.

    What differs from Friedman: all classes share the covariance. With one example a class there is no within-class
    variance to shrink towards: give `variance`.

    Args:
        shrinkage: s, above 0 and at most 1, which makes it the nearest class mean (up to the frequencies). Default 0.5.
        variance: v, positive, in squared units of the features; a float or `Learnable`. None, the default: the mean
            variance. With a kernel other than the linear one, d is still the number of features that come in.
        kernel: any callable `(x, y) -> gram`; default `Linear()`.
        scale: factor of all logits (gamma in Eq. 12 of Lee et al. 2019), positive; a float or `Learnable`. Default 1.

    Raises:
        InputError: an argument is unusable. Calls raise what `Head.forward` does, for a class without examples, and for
            a task without within-class variance where `variance` is not given.
    """

    needs_every_class: ClassVar[bool] = True

    def __init__(
        self,
        shrinkage: float = 0.5,
        *,
        variance: Hyperparameter | None = None,
        kernel: Kernel | None = None,
        scale: Hyperparameter = 1.0,
    ) -> None:
        super().__init__(kernel=kernel, scale=scale)
        if positive("shrinkage", shrinkage, learnable=False) > 1:
            raise InputError("shrinkage", shrinkage, "a number above 0 and at most 1")
        self.shrinkage = shrinkage
        self.variance = None if variance is None else positive("variance", variance)

    def dual(
        self, gram: Float[Tensor, "*batch n n"], targets: Float[Tensor, "*batch n k"], *, features: int = 1
    ) -> Dual:
        """As `BaseLearner.dual`, in closed form.

        Args:
            gram: kernel matrix of the support set, `(*batch, n, n)`, in float64.
            targets: one-hot labels, `(*batch, n, k)`.
            features: d, their number, of which the mean variance is the mean. Default 1; a fit passes the right one.

        Returns:
            Coefficients `(*batch, n, k)` and biases `(*batch, k)`.

        Raises:
            InputError: there is no within-class variance, and `variance` is not given.
            SolverError: `gram` is not positive semi-definite.
        """
        counts = targets.sum(-2)
        mean = targets / counts.unsqueeze(-2)
        centre = torch.diag_embed(targets.sum(-1)) - mean @ targets.mT  # x -> x - its class mean, a projection
        examples = counts.sum(-1)
        scatter = centre @ gram @ centre / examples[..., None, None]
        if self.variance is None:
            variance = scatter.diagonal(dim1=-2, dim2=-1).sum(-1) / features
            if gram.device.type == "cpu":  # on a GPU, that task gets NaN from its Cholesky factor
                inspect_values(_check_variance, variance, gram, examples)
        else:
            variance = value_of(self.variance, gram).expand(examples.shape)
        ridge = self.shrinkage * variance
        factor = cholesky(
            plus_diagonal((1 - self.shrinkage) * scatter, ridge),
            of="LinearDiscriminantHead: the Gram matrix of the centred support, shrunk,",
        )
        spread = (1 - self.shrinkage) / examples[..., None, None]
        inner = centre @ torch.cholesky_solve(centre @ gram @ mean, factor)
        coef = (mean - spread * inner) / ridge[..., None, None]
        return Dual(coef, bias=(counts / examples.unsqueeze(-1)).log() - (mean * (gram @ coef)).sum(-2) / 2)

    def _learn(
        self,
        features: Float[Tensor, "*batch n d"],
        kernel: Kernel,
        targets: Float[Tensor, "*batch n k"],
        mask: Bool[Tensor, "*batch n"] | None,
    ) -> Dual:
        gram = self._gram(features, kernel, mask)
        with inputs.failing_on_indefinite(gram):
            return self.dual(gram, targets, features=features.shape[-1])

    def _settings(self) -> list[str]:
        settings = [f"shrinkage={display(self.shrinkage)}"]
        if self.variance is not None:
            settings.append(f"variance={display(self.variance)}")
        return settings + super()._settings()


class MahalanobisHead(Head):
    r"""Gaussian classes, each with a covariance of its own: the head of Simple CNAPS (Bateni et al. 2020).

    The score of class k is \(-\frac12 (q - m_k)^\top Q_k^{-1} (q - m_k)\) with the class mean \(m_k\) and
    \(Q_k = \lambda_k S_k + (1 - \lambda_k) S + \beta I\), where \(S_k\) is the covariance of the class, \(S\) that of
    all examples of the task (each divided by its number of examples less one), \(\lambda_k = N_k / (N_k + 1)\) for
    \(N_k\) examples, and \(\beta = 1\). Of a class with one example, \(S_k\) is zero.

    What differs from the paper: here is the head alone, without the adaptation networks that make its features. From
    its published code: that leaves out the one half (`scale=2.0` does so), and where a class has one example it adds
    half the variance among that example's features to every entry of \(Q_k\).

    Args:
        regularization: beta, positive, in squared units of the features; a float or `Learnable`. Default 1, that of the
            paper.
        kernel: any callable `(x, y) -> gram`; default `Linear()`.
        scale: factor of all logits (gamma in Eq. 12 of Lee et al. 2019), positive; a float or `Learnable`. Default 1.

    Raises:
        InputError: an argument is unusable. Calls raise what `Head.forward` does, and for a class without examples.
    """

    needs_every_class: ClassVar[bool] = True

    def __init__(
        self,
        regularization: Hyperparameter = 1.0,
        *,
        kernel: Kernel | None = None,
        scale: Hyperparameter = 1.0,
    ) -> None:
        super().__init__(kernel=kernel, scale=scale)
        self.regularization = positive("regularization", regularization)

    def dual(self, gram: Float[Tensor, "*batch n n"], targets: Float[Tensor, "*batch n k"]) -> Dual:
        beta = value_of(self.regularization, gram)
        own = targets.mT  # class-major: (*batch, k, n)
        counts = own.sum(-1)
        # Q_k = beta I + (root_k X)' (root_k X), with the centred class above the centred task.
        share = counts / (counts + 1)
        of_class = (share / (counts - 1).clamp_min(1)).sqrt()[..., None, None] * _centring(own)
        everyone = own.sum(-2, keepdim=True)
        of_task = ((1 - share) / (everyone.sum(-1) - 1).clamp_min(1)).sqrt()[..., None, None] * _centring(everyone)
        root = torch.cat([of_class, of_task], -2)
        shared = gram.unsqueeze(-3)
        factor = cholesky(
            plus_diagonal(root @ shared @ root.mT, beta), of="MahalanobisHead: a covariance", each_class=True
        )
        inverse = root.mT @ torch.cholesky_solve(root, factor)  # of beta Q_k, it is I less X' inverse X
        mean = (own / counts.unsqueeze(-1)).unsqueeze(-1)
        image = shared @ mean
        solved = inverse @ image
        bias = -(mean * image - image * solved).sum((-2, -1)) / (2 * beta)
        coef = ((mean - solved) / beta).squeeze(-1).mT
        return Dual(coef, bias=bias, quadratic=inverse / (2 * beta), norm=-1 / (2 * beta))

    def _settings(self) -> list[str]:
        settings = [] if self.regularization == 1.0 else [f"regularization={display(self.regularization)}"]
        return settings + super()._settings()


def _centring(members: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n n"]:
    """The projection that takes the members' mean from each of them, and everything from the others."""
    outer = members.unsqueeze(-1) * members.unsqueeze(-2)
    return torch.diag_embed(members) - outer / members.sum(-1)[..., None, None]


def _check_variance(variance: Tensor, gram: Tensor, examples: Tensor) -> None:
    size = gram.diagonal(dim1=-2, dim2=-1).abs().sum(-1) / examples
    none = variance <= 1e-14 * size
    if none.any():
        inputs.check_definite(gram)
        raise InputError(
            "support",
            f"a within-class covariance of zero in {inputs.first(none)}, which cannot be inverted",
            "two different examples of some class, or LinearDiscriminantHead(variance=...)",
        )
