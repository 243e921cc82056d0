"""Multinomial logistic regression."""

from __future__ import annotations

from functools import partial
from typing import get_args

import torch

from convexheads._functorch import compute_without_grad
from convexheads._validation import check_choice, check_positive_int, optional
from convexheads.heads import _logistic_newton
from convexheads.heads.base.classification import ClassificationHead
from convexheads.heads.base.support_set import KernelExpansion, SupportSet
from convexheads.hyperparameters import Hyperparameter, as_tensor, check_positive
from convexheads.kernels import KernelLike
from convexheads.solvers import OnFailure, Solution, Status
from convexheads.solvers.failures import handle_failures

_MAX_NEWTON_STEPS = 100
_TOLERANCE = 1e-6
# Newton's method continues until rounding stops it, because the implicit gradient is that of the exact optimum.
_AIM = 1e-15


class LogisticHead(ClassificationHead):
    r"""Multinomial logistic regression: softmax cross-entropy with an L2 regularizer.

    Use it when you need probabilities: its loss is their cross-entropy, and it needs the least calibration.

    Primal: \(\min_w \frac{\lambda}{2} \sum_k |w_k|^2 + \sum_n \left(\log \sum_k e^{w_k \cdot x_n} - w_{y_n} \cdot
    x_n\right)\). Optimality: \(\lambda \alpha = Y - \operatorname{softmax}(K \alpha)\), where
    \(w_k = \sum_n \alpha_n^k x_n\). It is solved by Newton's method with k + 1 Cholesky factorizations of
    n x n matrices per step (Rasmussen & Williams 2006, Algorithm 3.3), and differentiated implicitly, to any order. Lee
    et al. 2019 name it as an alternative (Section 3.3). There is no bias; a kernel with a constant, such as
    `Linear() + Constant(1.0)`, adds one, which is regularized like the weights.

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
        otherwise = Status.FAILED if self.steps is None else Status.STOPPED
        status = torch.where(gap <= _TOLERANCE, Status.CONVERGED, otherwise)
        status = torch.where(torch.isfinite(gap), status, Status.FAILED)
        coef, residual = coef / penalty, torch.zeros_like(gap)
        solution = Solution(coef, None, None, status=status, gap=gap, residual=residual, iterations=taken)
        solution = solution.map(lambda _, value: value.reshape((*batch, *value.shape[1:])))
        solution = handle_failures("LogisticHead", solution, _TOLERANCE, self.on_failure)
        return KernelExpansion(solution.coef, solution=solution)
