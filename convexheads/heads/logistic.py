"""Multinomial logistic regression."""

from __future__ import annotations

from functools import partial
from typing import get_args

import torch
from torch import Tensor

from convexheads._functorch import compute_without_grad
from convexheads._validation import check_choice, check_positive_int, optional
from convexheads.heads import _logistic_newton, _logistic_primal
from convexheads.heads.base.classification import ClassificationHead
from convexheads.heads.base.support_set import KernelExpansion, SupportSet
from convexheads.hyperparameters import Hyperparameter, as_tensor, check_positive
from convexheads.kernels import KernelLike
from convexheads.solvers import OnFailure, Solution, Status
from convexheads.solvers.failures import handle_failures

_MAX_NEWTON_STEPS = 100
_TOLERANCE = 1e-6
# Newton's method continues until rounding stops it, because the implicit gradient is that of the exact optimum.
# In the primal, the gap is computed without cancellation.
_AIM, _AIM_OF_PRIMAL = 1e-15, 1e-20
# With more examples, the primal is solved even if there are more features than examples.
_MAX_EXAMPLES = 100


class LogisticHead(ClassificationHead):
    r"""Multinomial logistic regression: softmax cross-entropy with an L2 regularizer.

    Use it when you need probabilities: its loss is their cross-entropy, and it needs the least calibration.

    Primal: \(\min_w \frac{\lambda}{2} \sum_k |w_k|^2 + \sum_n \left(\log \sum_k e^{w_k \cdot x_n} - w_{y_n} \cdot
    x_n\right)\). Optimality: \(\lambda \alpha = Y - \operatorname{softmax}(K \alpha)\), where
    \(w_k = \sum_n \alpha_n^k x_n\). It is solved by Newton's method with k + 1 Cholesky factorizations of
    n x n matrices per step (Rasmussen & Williams 2006, Algorithm 3.3), and differentiated implicitly, to any order.
    With the linear kernel and more examples than features, or more than 100 examples, Newton's method solves the
    primal, by conjugate gradients if there are more than 256 weights. Lee et al. 2019 name logistic regression as an
    alternative (Section 3.3). There is no bias; a kernel with a constant, such as `Linear() + Constant(1.0)`, adds one,
    which is regularized like the weights.

    Differences from Algorithm 3.3: steps that do not decrease the objective are halved, and there is no Laplace
    approximation around the optimum.

    `steps=5` is LR-D2 (Bertinetto et al. 2019): five undamped Newton steps from zero, through which autograd
    differentiates step by step. The original has two classes and one sigmoid.

    Args:
        regularization: lambda, positive; a float or `Learnable`. Defaults to 1.
        steps: number of undamped Newton steps; the status is `STOPPED` if they do not reach a certified relative
            duality gap of 1e-6. Defaults to None (until converged).
        on_failure: what happens if a task is not solved to that gap, as for a `Solver`: "raise" (default), "warn" or
            "return".
        kernel: see `ClassificationHead`, also for `scale`, `validate` and the errors.

    Example:
        `probabilities = LogisticHead().fit(support, labels).probabilities(query)`
    """

    checks = ClassificationHead.checks | {
        "regularization": check_positive,
        "steps": optional(check_positive_int),
        "on_failure": partial(check_choice, choices=get_args(OnFailure)),
    }

    on_failure: OnFailure

    def __init__(
        self,
        regularization: Hyperparameter = 1.0,
        *,
        steps: int | None = None,
        on_failure: OnFailure = "raise",
        kernel: KernelLike | None = None,
        scale: Hyperparameter = 1.0,
        validate: bool = True,
    ) -> None:
        super().__init__(kernel=kernel, scale=scale, validate=validate)
        self.regularization, self.steps, self.on_failure = regularization, steps, on_failure

    def solve(self, support: SupportSet) -> KernelExpansion:
        factor, (*_, n, d) = support.linear_factor, support.features.shape
        if factor is not None and self.steps is None and n > min(d, _MAX_EXAMPLES):
            return self._solve_for_weights(support, factor)
        penalty = as_tensor(self.regularization, support.targets)
        *batch, n, k = support.targets.shape
        gram, targets = (support.gram / penalty).reshape(-1, n, n), support.labeled_targets.reshape(-1, n, k)
        if self.steps is not None:
            coef = torch.zeros_like(targets)
            for _ in range(self.steps):
                coef = _logistic_newton.newton_step(gram, targets, coef)
            taken, gap = None, _logistic_newton.certified_gap(gram.detach(), targets, coef.detach())
        else:
            solve = partial(_logistic_newton.solve, tolerance=_AIM, max_steps=_MAX_NEWTON_STEPS)
            coef, gap, taken = compute_without_grad(solve, gram, targets)
            coef = _logistic_newton.ImplicitSolution.apply(gram, targets, coef)
        coef, gap = (coef / penalty).reshape(*batch, n, k), gap.reshape(batch)
        solution = self._certified(coef, gap, None if taken is None else taken.reshape(batch))
        return KernelExpansion(solution.coef, solution=solution)

    def _solve_for_weights(self, support: SupportSet, factor: float | Tensor) -> KernelExpansion:
        """Solve the primal."""
        penalty, targets = as_tensor(self.regularization, support.targets), support.targets
        features = factor * support.features
        batch = targets.shape[:-2]
        used = targets.new_ones(targets.shape[:-1]) if support.mask is None else support.mask.to(targets.dtype)
        problem = features, targets, used, penalty.expand(batch)
        solve = partial(_logistic_primal.solve, tolerance=_AIM_OF_PRIMAL, max_steps=_MAX_NEWTON_STEPS)
        weight, gap, taken = compute_without_grad(solve, *problem)
        weight = _logistic_primal.ImplicitWeights.apply(*problem, weight)
        error = _logistic_newton.balance(targets, (features @ weight).softmax(-1))
        solution = self._certified(-used.unsqueeze(-1) * error / penalty, gap, taken)
        weight = torch.where(torch.isfinite(gap)[..., None, None], weight, torch.nan)
        return KernelExpansion(solution.coef, weight=factor * weight.mT, solution=solution)

    def _certified(self, coef: Tensor, gap: Tensor, iterations: Tensor | None) -> Solution:
        """The solution with its status; failures are handled."""
        otherwise = Status.FAILED if self.steps is None else Status.STOPPED
        status = torch.where(gap <= _TOLERANCE, Status.CONVERGED, otherwise)
        status = torch.where(torch.isfinite(gap), status, Status.FAILED)
        residual = torch.zeros_like(gap)
        solution = Solution(coef, None, None, status=status, gap=gap, residual=residual, iterations=iterations)
        return handle_failures("LogisticHead", solution, _TOLERANCE, self.on_failure)
