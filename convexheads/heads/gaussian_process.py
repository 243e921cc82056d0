"""Gaussian process regression with its predictive variance."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from convexheads._validation import ArrayLike, optional
from convexheads.heads._closed_form import CholeskySystem, check_on_failure, errors_of_dual, with_solution
from convexheads.heads.base.fitted import FittedRegressor
from convexheads.heads.base.regression import RegressionHead
from convexheads.heads.base.support_set import KernelExpansion, SupportSet
from convexheads.hyperparameters import Hyperparameter, as_tensor, check_positive
from convexheads.kernels import RBF, KernelLike, check_kernel, gram_diagonal
from convexheads.precision import full_precision
from convexheads.solvers.failures import OnFailure


@dataclass(frozen=True, eq=False, repr=False)
class _Posterior(KernelExpansion):
    """The expansion with the Cholesky factor, for the variance and the likelihood."""

    factor: Float[Tensor, "*batch n n"] = field(kw_only=True)


@dataclass(frozen=True, eq=False, repr=False)
class FittedGaussianProcess(FittedRegressor):
    """A Gaussian process fitted on the support sets of a batch of tasks, as `GaussianProcessHead.fit` returns it.

    A call on queries returns the mean. Its attributes are those of `FittedRegressor`; `expansion` includes the Cholesky
    factor of the Gram matrix plus noise.
    """

    expansion: _Posterior

    def variance(self, query: Float[Tensor, "*#batch q d"] | ArrayLike) -> Float[Tensor, "..."]:
        """Posterior variance of the noise-free function, the same for all outputs.

        Eq. 2.26 of Rasmussen & Williams (2006). For the variance of an observation, add the head's `noise_variance`.
        The errors are those of a call.

        Args:
            query: features, `(*batch, q, d)`.

        Returns:
            `(*batch, q)`, in squared units of the targets.
        """
        query = self._prepare(query)
        with full_precision(query.device):
            explained = torch.linalg.solve_triangular(self.expansion.factor, self._cross_gram(query).mT, upper=False)
            variance = gram_diagonal(self.support.kernel, query) - explained.square().sum(-2)
            return variance.clamp_min(0).to(self.dtype)

    def leave_one_out(
        self,
    ) -> tuple[Float[Tensor, "*batch n"] | Float[Tensor, "*batch n k"], Float[Tensor, "*batch n"]]:
        """Mean and variance of the observation of each support example, predicted from the others.

        Eq. 5.12 of Rasmussen & Williams (2006). Parameters of the kernel that depend on the support set stay the same.

        Returns:
            The means, shaped like the targets, and the variances, `(*batch, n)`, in squared units of the targets;
            differentiable like the predictions.
        """
        precision = torch.cholesky_inverse(self.expansion.factor).diagonal(dim1=-2, dim2=-1)
        mean = self.support.targets - self.expansion.coef / precision.unsqueeze(-1)
        mean = mean.squeeze(-1) if self.single_output else mean
        return mean.to(self.dtype), (1 / precision).to(self.dtype)

    def log_marginal_likelihood(self) -> Float[Tensor, "*batch"]:
        """Log marginal likelihood of the support's targets, summed over outputs, in nats.

        Eq. 2.30 of Rasmussen & Williams (2006). Deep kernel transfer maximizes it.

        Returns:
            `(*batch,)`, differentiable like the predictions.
        """
        targets, mask = self.support.targets, self.support.mask
        log_factors = self.expansion.factor.diagonal(dim1=-2, dim2=-1).log() + math.log(2 * math.pi) / 2
        if mask is not None:  # masked examples contribute a separate factor; exclude it
            log_factors = log_factors * mask
        fit = (targets * self.expansion.coef).sum((-2, -1)) / 2
        return (-fit - targets.shape[-1] * log_factors.sum(-1)).to(self.dtype)


class GaussianProcessHead(RegressionHead):
    r"""Gaussian process regression, the head of deep kernel transfer (DKT, Patacchiola et al. 2020).

    Use it when predictions should come with their uncertainty.

    The posterior mean is \(k(q, S) (K + \sigma^2 I)^{-1} y\), the variance \(k(q, q) - k(q, S) (K + \sigma^2 I)^{-1}
    k(S, q)\) (Rasmussen & Williams 2006, Eq. 2.25 and 2.26). The prior mean is zero: center the targets or add a kernel
    `Constant`.

    The fitted head also has `variance(query)` and `log_marginal_likelihood()`. Differences from DKT: DKT
    maximizes the marginal likelihood of all examples of a task, which is
    `head.fit(examples, targets).log_marginal_likelihood()`, and it uses the kernels of gpytorch.

    Args:
        noise_variance: sigma squared, the variance of an observation, positive, in squared units of the targets; a
            float or `Learnable`. Defaults to 0.1.
        on_failure: as in `RidgeHead`, with the noise variance for lambda. The certificate is that of the mean.
        kernel: the prior covariance. Defaults to `RBF()`. See `RegressionHead`, also for `validate` and the errors.

    Example:
        `variance = GaussianProcessHead().fit(support, targets).variance(query)`
    """

    checks = RegressionHead.checks | {
        "noise_variance": check_positive,
        "on_failure": check_on_failure,
        "kernel": optional(check_kernel, default=RBF),
    }
    on_failure: OnFailure
    _fitted_class = FittedGaussianProcess

    def __init__(
        self,
        noise_variance: Hyperparameter = 0.1,
        *,
        on_failure: OnFailure = "raise",
        kernel: KernelLike | None = None,
        validate: bool = True,
    ) -> None:
        super().__init__(kernel=kernel, validate=validate)
        self.noise_variance, self.on_failure = noise_variance, on_failure

    def solve(self, support: SupportSet) -> _Posterior:
        noise = as_tensor(self.noise_variance, support.targets)
        system = CholeskySystem.of(support.gram, noise, validate=support.validate)
        posterior = _Posterior(system.solve(support.targets), factor=system.factor)
        arguments = support.gram, noise, support.targets, posterior.coef
        return with_solution(self, posterior, support, errors_of_dual, *arguments, doubt=system.may_lose_digits)
