"""Gaussian process regression with its predictive variance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from convexheads.heads import inputs
from convexheads.heads.base import Dual
from convexheads.heads.closed_form import cholesky, plus_diagonal
from convexheads.heads.regression import FittedRegression, RegressionHead
from convexheads.hyperparameters import Hyperparameter, display, positive, value_of
from convexheads.kernels import RBF, Kernel
from convexheads.precision import full_precision


@dataclass(frozen=True)
class _Posterior(Dual):
    """The dual together with what variance and likelihood need."""

    factor: Float[Tensor, "*batch n n"] | None = None
    targets: Float[Tensor, "*batch n k"] | None = None


@dataclass(frozen=True)
class FittedGaussianProcess(FittedRegression):
    """A Gaussian process fitted on the support sets of a batch of tasks: call it on queries for the mean.

    `GaussianProcessHead.fit` makes it; its attributes are those of `FittedRegression`.
    """

    def variance(self, query: Float[Tensor, "*batch q d"]) -> Float[Tensor, "*batch q"]:
        """Posterior variance of the noise-free function, the same for all outputs.

        Eq. 2.26 of Rasmussen & Williams (2006). Add the head's `noise` for that of an observation.

        Args:
            query: features, `(*batch, q, d)`.

        Returns:
            `(*batch, q)`, in squared units of the targets.

        Raises:
            InputError: as in a call.
        """
        inputs.check_query(query, self.support)
        assert isinstance(self.dual, _Posterior)
        assert self.dual.factor is not None
        with full_precision(query.device):
            query = query.to(self.support.dtype)
            explained = torch.linalg.solve_triangular(self.dual.factor, self.similarity(query).mT, upper=False)
            variance = self.own_similarity(query) - explained.square().sum(-2)
            return variance.clamp_min(0).to(self.dtype)

    def log_marginal_likelihood(self) -> Float[Tensor, "*batch"]:
        """Of the support's targets, summed over outputs (Rasmussen & Williams 2006, Eq. 2.30), in nats.

        It is what deep kernel transfer maximises.

        Returns:
            `(*batch,)`, differentiable like the predictions.
        """
        assert isinstance(self.dual, _Posterior)
        assert self.dual.factor is not None
        assert self.dual.targets is not None
        outputs = self.dual.targets.shape[-1]
        each = self.dual.factor.diagonal(dim1=-2, dim2=-1).log() + math.log(2 * math.pi) / 2
        if self.mask is not None:  # a left-out example is a factor of its own
            each = each * self.mask
        fit = (self.dual.targets * self.dual.coef).sum((-2, -1)) / 2
        return (-fit - outputs * each.sum(-1)).to(self.dtype)


class GaussianProcessHead(RegressionHead):
    r"""Gaussian process regression: the base learner of deep kernel transfer (DKT, Patacchiola et al. 2020).

    The posterior mean is \(k(q, S) (K + \sigma^2 I)^{-1} y\), the variance \(k(q, q) - k(q, S) (K + \sigma^2 I)^{-1}
    k(S, q)\) (Rasmussen & Williams 2006, Eq. 2.25 and 2.26). The prior mean is zero: centre the targets, or give the
    kernel a constant.

    Its fit has `variance(query)` and `log_marginal_likelihood()` besides. What differs from DKT: that maximises the
    marginal likelihood of all examples of a task, which is
    `head.fit(examples, targets).log_marginal_likelihood()`; its kernels are gpytorch's.

    Args:
        noise: sigma squared, the variance of an observation, positive, in squared units of the targets; a float or
            `Learnable`. Default 0.1.
        kernel: any callable `(x, y) -> gram`, the prior covariance; default `RBF()`.

    Raises:
        InputError: an argument is unusable. Calls raise what `RegressionHead.forward` does.
    """

    fitted: ClassVar[type[FittedRegression]] = FittedGaussianProcess

    def __init__(self, noise: Hyperparameter = 0.1, *, kernel: Kernel | None = None) -> None:
        super().__init__(kernel=RBF() if kernel is None else kernel)
        self.noise = positive("noise", noise)

    def dual(self, gram: Float[Tensor, "*batch n n"], targets: Float[Tensor, "*batch n k"]) -> Dual:
        of = f"GaussianProcessHead: the Gram matrix plus {display(self.noise)} on its diagonal"
        factor = cholesky(plus_diagonal(gram, value_of(self.noise, gram)), of=of)
        return _Posterior(torch.cholesky_solve(targets, factor), factor=factor, targets=targets)

    def _settings(self) -> list[str]:
        return [f"noise={display(self.noise)}", *super()._settings()]
