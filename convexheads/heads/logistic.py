"""Multinomial logistic regression."""

from __future__ import annotations

from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from convexheads._functorch import compute_without_grad
from convexheads._validation import check_choice, check_positive_int, optional
from convexheads.heads import _logistic_newton, _primal
from convexheads.heads._losses import slope_of_cross_entropy
from convexheads.heads._sharing import apply_once, multiply
from convexheads.heads.base.loss import LossHead
from convexheads.heads.base.support_set import KernelExpansion, SupportSet
from convexheads.hyperparameters import Hyperparameter, PerTask, as_tensor, check_positive
from convexheads.kernels import KernelLike
from convexheads.solvers import OnFailure, Solution, Status
from convexheads.solvers.failures import handle_failures

_MAX_NEWTON_STEPS = 100
_TOLERANCE = 1e-6
# Newton's method continues until rounding stops it, because the implicit gradient is that of the exact optimum.
# In the primal, the gap is computed without cancellation.
_AIM, _AIM_OF_PRIMAL = 1e-15, 1e-20
# For the scores of a grid, which are not differentiated.
_AIM_OF_GRID = 1e-12
# With more examples, the primal is solved even if there are more features than examples.
_MAX_EXAMPLES = 100


class LogisticHead(LossHead):
    r"""Multinomial logistic regression: softmax cross-entropy with an L2 regularizer.

    Use it when you need probabilities: its loss is their cross-entropy, and it needs the least calibration.

    Primal: \(\min_w \frac{\lambda}{2} \sum_k |w_k|^2 + \sum_n \left(\log \sum_k e^{w_k \cdot x_n} - w_{y_n} \cdot
    x_n\right)\). Optimality: \(\lambda \alpha = Y - \operatorname{softmax}(K \alpha)\), where
    \(w_k = \sum_n \alpha_n^k x_n\). It is solved by Newton's method with k + 1 Cholesky factorizations of
    n x n matrices per step (Rasmussen & Williams 2006, Algorithm 3.3), and differentiated implicitly, to any order.
    With the linear kernel and more examples than features, or more than 100 examples, Newton's method solves the
    primal, by conjugate gradients if there are more than 256 weights. Lee et al. 2019 name logistic regression as an
    alternative (Section 3.3).

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
        class_weight: see `LossHead`, also for `intercept`, `kernel`, `scale`, `validate` and the errors.

    Example:
        `probabilities = LogisticHead().fit(support, labels).probabilities(query)`
    """

    checks = LossHead.checks | {
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
        class_weight: Any = None,
        intercept: bool = False,
        kernel: KernelLike | None = None,
        scale: Hyperparameter = 1.0,
        validate: bool = True,
    ) -> None:
        super().__init__(class_weight=class_weight, intercept=intercept, kernel=kernel, scale=scale, validate=validate)
        self.regularization, self.steps, self.on_failure = regularization, steps, on_failure

    def entries_per_task(self, n: int, d: int, k: int) -> int:
        weights = 12 * (n + d) * k
        return weights if n > min(d, _MAX_EXAMPLES) else weights + (k + 3) * n * n

    def solve(self, support: SupportSet) -> KernelExpansion:
        factor, (*_, n, d) = support.linear_factor, support.features.shape
        if factor is not None and self.steps is None and n > min(d, _MAX_EXAMPLES):
            return self._solve_for_weights(support, factor)
        penalty = as_tensor(self.regularization, support.targets)[..., None, None]
        gram, *others = support.gram / penalty, support.targets, support.factors, support.offset
        batch, (n, k) = gram.shape[:-2], support.targets.shape[-2:]
        task = gram, *(part.expand(*batch, *part.shape[len(batch) :]) for part in others)
        if self.steps is not None:
            flat = _logistic_newton.Task(*(part.flatten(0, len(batch) - 1) if batch else part[None] for part in task))
            coef, bias = torch.zeros_like(flat.targets), torch.zeros_like(flat.targets[:, 0])
            for _ in range(self.steps):
                coef, bias = _logistic_newton.newton_step(flat, coef, bias, intercept=self.intercept)
            found = (coef.detach(), bias.detach())
            fixed = _logistic_newton.Task(*(part.detach() for part in flat))
            taken, gap = None, _logistic_newton.certified_gap(fixed, *found, intercept=self.intercept)
            coef, bias, gap = coef.reshape(*batch, n, k), bias.reshape(*batch, k), gap.reshape(batch)
        else:
            options = {"intercept": self.intercept, "tolerance": _AIM, "max_steps": _MAX_NEWTON_STEPS}
            solve = partial(_logistic_newton.solve, **options)
            coef, bias, gap, taken = compute_without_grad(solve, *task)
            coef, bias = _logistic_newton.ImplicitSolution.apply(*task, coef, bias, self.intercept)
        solution = self._certified(coef / penalty, gap, taken)
        return KernelExpansion(solution.coef, bias=bias if self.intercept else None, solution=solution)

    def _solve_for_weights(self, support: SupportSet, factor: float | Tensor) -> KernelExpansion:
        """Solve the primal."""
        penalty, targets = as_tensor(self.regularization, support.targets), support.targets
        features = support.features if isinstance(factor, float) and factor == 1 else factor * support.features
        if self.intercept:
            features = apply_once(lambda x: torch.cat([x, torch.ones_like(x[..., :1])], -1), features)
        used, offset = support.factors, support.offset
        batch = torch.broadcast_shapes(penalty.shape, targets.shape[:-2])
        data = (part.expand(*batch, *part.shape[targets.ndim - 2 :]) for part in (features, targets, used, offset))
        problem = (*data, penalty.expand(batch))
        options = {"loss": "cross-entropy", "intercept": self.intercept}
        aim = _AIM_OF_GRID if isinstance(self.regularization, PerTask) else _AIM_OF_PRIMAL
        solve = partial(_primal.solve, **options, tolerance=aim, max_steps=_MAX_NEWTON_STEPS)
        weight, gap, taken = compute_without_grad(solve, *problem)
        weight = _primal.ImplicitWeights.apply(*problem, weight, *options.values())
        slope = slope_of_cross_entropy(targets, (multiply(features, weight) + offset).softmax(-1))
        solution = self._certified(-used.unsqueeze(-1) * slope / penalty[..., None, None], gap, taken)
        weight, bias = torch.where(torch.isfinite(gap)[..., None, None], weight, torch.nan), None
        if self.intercept:
            weight, bias = weight[..., :-1, :], weight[..., -1, :]
        return KernelExpansion(solution.coef, weight=factor * weight.mT, bias=bias, solution=solution)

    def _certified(self, coef: Tensor, gap: Tensor, iterations: Tensor | None) -> Solution:
        """The solution with its status; failures are handled."""
        otherwise = Status.FAILED if self.steps is None else Status.STOPPED
        status = torch.where(gap <= _TOLERANCE, Status.CONVERGED, otherwise)
        status = torch.where(torch.isfinite(gap), status, Status.FAILED)
        residual = torch.zeros_like(gap)
        solution = Solution(coef, None, None, status=status, gap=gap, residual=residual, iterations=iterations)
        return handle_failures("LogisticHead", solution, _TOLERANCE, self.on_failure)
