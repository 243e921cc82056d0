"""Multinomial logistic regression."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from convexheads._functorch import compute_without_grad
from convexheads._validation import check_choice, check_positive_int, optional
from convexheads.heads import _logistic_newton, _primal
from convexheads.heads.base.loss import LossHead
from convexheads.heads.base.support_set import KernelExpansion, SupportSet
from convexheads.hyperparameters import Hyperparameter, as_tensor, check_positive
from convexheads.kernels import KernelLike
from convexheads.solvers import OnFailure, Solution, Status
from convexheads.solvers.failures import certified, handle_failures

_MAX_NEWTON_STEPS = 100
_TOLERANCE = 1e-6
# Newton's method continues until rounding stops it, because the implicit gradient is that of the exact optimum.
_AIM = 1e-20


class LogisticHead(LossHead):
    r"""Multinomial logistic regression: softmax cross-entropy with an L2 regularizer.

    Use it when you need probabilities: its loss is their cross-entropy, and it needs the least calibration.

    Primal: \(\min_w \frac{\lambda}{2} \sum_k |w_k|^2 + \sum_n \left(\log \sum_k e^{w_k \cdot x_n} - w_{y_n} \cdot
    x_n\right)\). Optimality: \(\lambda \alpha = Y - \operatorname{softmax}(K \alpha)\), where
    \(w_k = \sum_n \alpha_n^k x_n\). It is solved by Newton's method with k + 1 Cholesky factorizations of
    n x n matrices per step (Rasmussen & Williams 2006, Algorithm 3.3), and differentiated implicitly, to any order.
    With the linear kernel and more examples than features, more than 100 examples, or more than 1,000 coefficients,
    Newton's method solves the primal, by conjugate gradients if there are more than 256 weights. Lee et al. 2019 name
    logistic regression as an alternative (Section 3.3).

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

    accepts_multilabel = True
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
        return weights if _primal.is_worth_while(n, d, k, self.regularization) else weights + (k + 3) * n * n

    def solve(self, support: SupportSet) -> KernelExpansion:
        factor, (*_, n, d), k = support.linear_factor, support.features.shape, support.targets.shape[-1]
        if factor is not None and self.steps is None and _primal.is_worth_while(n, d, k, self.regularization):
            return self._solve_for_weights(support, factor)
        penalty = as_tensor(self.regularization, support.targets)[..., None, None]
        start = support.start_coef(support.targets.shape)
        if not support.is_multilabel:
            parts = support.gram / penalty, support.targets, support.factors, support.offset
            return self._solve_dual(*parts, start, penalty)
        # Each class is a task of its own, with one score for "no" and one for "yes", of which one would suffice.
        targets, offset = (part.mT.unsqueeze(-1) for part in (support.targets, support.offset))
        pairs = torch.cat([1 - targets, targets], -1), torch.cat([torch.zeros_like(offset), offset], -1)
        gram, used = (support.gram / (2 * penalty)).unsqueeze(-3), support.factors.unsqueeze(-2)
        if start is not None:
            start = start.mT.unsqueeze(-1) * start.new_tensor([-0.5, 0.5])
        found = self._solve_dual(gram, pairs[0], used, pairs[1], start, (2 * penalty).unsqueeze(-3))
        coef = (found.coef[..., 1] - found.coef[..., 0]).mT
        bias = None if found.bias is None else found.bias[..., 1] - found.bias[..., 0]
        each = found.certificate
        assert each is not None
        # The gaps are relative to the objectives of the classes, so that the largest one bounds that of the whole.
        solution = replace(
            each,
            coef=coef,
            status=each.status.amax(-1),
            gap=each.gap.amax(-1),
            residual=each.residual.amax(-1),
            iterations=None if each.iterations is None else each.iterations.amax(-1),
        )
        return KernelExpansion(coef, bias=bias, solution=solution)

    def _solve_dual(
        self, gram: Tensor, targets: Tensor, used: Tensor, offset: Tensor, start: Tensor | None, penalty: Tensor
    ) -> KernelExpansion:
        """Solve the dual; the Gram matrix is divided by the penalty, and its dimensions broadcast with the others."""
        (n, k), dims = targets.shape[-2:], targets.ndim - 2
        intercept = self.intercept and k > 1  # the bias of a single class has no effect
        batch = torch.broadcast_shapes(gram.shape[:-2], targets.shape[:-2])
        task = [part.expand(*batch, *part.shape[dims:]) for part in (targets, used, offset)]
        task = [gram.expand(*batch, n, n), *task]
        if self.steps is not None:
            flat = _logistic_newton.Task(*(part.flatten(0, len(batch) - 1) if batch else part[None] for part in task))
            evaluate = partial(_logistic_newton.evaluate, intercept=intercept)
            coef, bias = torch.zeros_like(flat.targets), torch.zeros_like(flat.targets[:, 0])
            for _ in range(self.steps):
                change = _logistic_newton.newton_step(flat, evaluate(flat, coef, bias), intercept=intercept)
                coef, bias = coef + change[0], bias + change[1]
            fixed = _logistic_newton.Task(*(part.detach() for part in flat))
            taken, last = None, evaluate(fixed, coef.detach(), bias.detach())
            gap, error = last.gap.reshape(batch), last.error.reshape(batch)
            coef, bias = coef.reshape(*batch, n, k), bias.reshape(*batch, k)
        else:
            path_length = batch[-1] if batch and _primal.is_grid(self.regularization) else 1
            options = {"intercept": intercept, "tolerance": _AIM, "max_steps": _MAX_NEWTON_STEPS}
            options["path_length"] = path_length
            solve = partial(_logistic_newton.solve, **options)
            inputs = task if start is None else [*task, (start * penalty.detach()).expand(*batch, n, k)]
            coef, bias, gap, error, taken = compute_without_grad(solve, *inputs)
            coef, bias = _logistic_newton.ImplicitSolution.apply(*task, coef, bias, intercept)
        solution = self._certified(coef / penalty, gap, error, taken)
        return KernelExpansion(solution.coef, bias=bias if self.intercept else None, solution=solution)

    def _solve_for_weights(self, support: SupportSet, factor: float | Tensor) -> KernelExpansion:
        """Solve the primal."""
        found = _primal.fit(
            support,
            factor,
            loss="sigmoid" if support.is_multilabel else "cross-entropy",
            penalty=as_tensor(self.regularization, support.targets),
            intercept=self.intercept,
            is_precise=not _primal.is_grid(self.regularization),
        )
        solution = self._certified(found.coef, found.gap, found.error, found.steps)
        return KernelExpansion(solution.coef, weight=found.weight, bias=found.bias, solution=solution)

    def _certified(self, coef: Tensor, gap: Tensor, error: Tensor, iterations: Tensor | None) -> Solution:
        """The solution with its status; failures are handled."""
        otherwise = Status.FAILED if self.steps is None else Status.STOPPED
        solution = certified(coef, gap, error, _TOLERANCE, otherwise, iterations)
        return handle_failures("LogisticHead", solution, _TOLERANCE, self.on_failure)
