"""Support vector machines: the base class of the multi-class ones, one class per formulation, and regression."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from convexheads._validation import Check, check_bool
from convexheads.heads import _primal
from convexheads.heads.base.loss import LossHead
from convexheads.heads.base.regression import RegressionHead
from convexheads.heads.base.support_set import KernelExpansion, SupportSet
from convexheads.hyperparameters import Hyperparameter, as_tensor, check_positive
from convexheads.kernels import KernelLike
from convexheads.solvers import DualProblem, NativeSolver, Solver, Status, WarmStart, get_solver
from convexheads.solvers.failures import certified, handle_failures
from convexheads.solvers.intercept import solve_with_intercept


def _with_start(problem: DualProblem, support: SupportSet) -> DualProblem:
    """The dual of a support set, to be solved from its `init`."""
    init = support.checked_init(problem.linear.shape)
    return problem if init is None else replace(problem, start=WarmStart.of(init))


_SVM_CHECKS: dict[str, Check] = {"C": check_positive, "solver": lambda _, solver: get_solver(solver)}


class MulticlassSVM(LossHead):
    r"""Base class of SVMs whose dual is a `DualProblem`, such as Eq. 10 of Lee et al. 2019.

    Use it to write an SVM of your own: in `solve`, build the dual with `upper_bound`, and pass it to `solve_dual`.

    Args:
        C: weight of the slacks, positive; a float or `Learnable`. Defaults to 0.1, as in Lee et al. 2019.
        squared_hinge: whether slacks are squared, \(C \xi^2\) in place of \(C \xi\). In the dual, their multipliers
            then have a quadratic term \(\frac{1}{4C} \alpha^2\) instead of an upper bound (as in LIBLINEAR, Fan et al.
            2008). Defaults to False.
        smoothing: quadratic smoothing of the loss, \(\frac{\delta}{2}|\alpha|^2\) in the dual, over all coefficients,
            non-negative; a float or `Learnable`. Defaults to 0. The code published by Lee et al. 2019 uses 1, unlike
            the paper.
        solver: a `Solver`, or a name from `SOLVERS`. Defaults to "native".
        class_weight: see `LossHead`, also for `intercept`, `kernel`, `scale`, `validate` and the errors.

    Raises:
        MissingDependencyError: the named solver's package is not installed.
    """

    checks = (
        LossHead.checks
        | _SVM_CHECKS
        | {"squared_hinge": check_bool, "smoothing": partial(check_positive, allow_zero=True)}
    )

    def __init__(
        self,
        C: Hyperparameter = 0.1,
        *,
        squared_hinge: bool = False,
        smoothing: Hyperparameter = 0.0,
        solver: Solver | str = "native",
        class_weight: Any = None,
        intercept: bool = False,
        kernel: KernelLike | None = None,
        scale: Hyperparameter = 1.0,
        validate: bool = True,
    ) -> None:
        super().__init__(class_weight=class_weight, intercept=intercept, kernel=kernel, scale=scale, validate=validate)
        self.C, self.squared_hinge, self.smoothing, self.solver = C, squared_hinge, smoothing, get_solver(solver)

    @property
    def is_traceable(self) -> bool:
        return not self.validate and self.solver.is_traceable  # compilers get `super().is_traceable` wrong

    def entries_per_task(self, n: int, d: int, k: int) -> int:
        return 2 * n * n + 12 * (n + d) * k

    def needed_examples(self, expansion: KernelExpansion) -> Bool[Tensor, "*batch n"]:
        if self.class_weight == "balanced":  # these weights depend on the number of examples
            return super().needed_examples(expansion)
        size = expansion.coef.abs().amax(-1)
        return size > 1e-9 * size.amax(-1, keepdim=True)

    def upper_bound(self, support: SupportSet) -> Float[Tensor, "*batch n 1"]:
        """The upper bound of the multipliers of each example's slacks in a `support` set, `(*batch, n, 1)`.

        It is C times the weight of the example, or infinity for the squared hinge; zero for masked examples.
        """
        if not self.squared_hinge:
            return (as_tensor(self.C, support.targets)[..., None] * support.factors).unsqueeze(-1)
        bound = torch.full_like(support.targets[..., :1], torch.inf)
        return bound if support.mask is None else bound.masked_fill(~support.mask.unsqueeze(-1), 0)

    def solve_dual(
        self,
        problem: DualProblem,
        slacks: Bool[Tensor, "*batch n m"],
        support: SupportSet,
        *,
        code: Float[Tensor, "*batch n k"] | None = None,
    ) -> KernelExpansion:
        """Solve a dual, with the head's smoothing and the scores of the prior added.

        Args:
            problem: the dual without any smoothing, in variables `(*batch, n, m)`.
            slacks: which variables are multipliers of slacks, `(*batch, n, m)`.
            support: the support set of the dual.
            code: for a dual with one variable per example, m = 1: the factors by which it counts for each class,
                `(*batch, n, k)`. Defaults to None: variables are coefficients, m = k.

        Returns:
            The coefficients, the biases with `intercept`, and the solution.

        Raises:
            SolverError: a task could not be solved (see the solver's `on_failure`).
        """
        if self.squared_hinge or not isinstance(self.smoothing, float) or self.smoothing > 0:
            like = problem.linear
            hinge = torch.zeros_like(like)
            if self.squared_hinge:
                bound = as_tensor(self.C, like)[..., None] * support.factors
                hinge = slacks / (2 * bound.where(bound > 0, 1).unsqueeze(-1))
            problem = replace(problem, smoothing=hinge + as_tensor(self.smoothing, like)[..., None, None])
        problem, bias = _with_start(problem.broadcast(), support), None
        if _primal.is_grid(self.C) and problem.linear.ndim > 2:
            problem = replace(problem, path_length=problem.linear.shape[-3])
        if self.intercept:
            solution, bias = solve_with_intercept(self.solver, problem, code)
        else:
            solution = self.solver.solve(problem)
        return KernelExpansion(solution.coef if code is None else code * solution.coef, bias=bias, solution=solution)


class SVMHead(MulticlassSVM):
    r"""Multi-class SVM of Crammer & Singer (2001), Eq. 4 of Lee et al. 2019: one slack per example.

    Use it for the head of MetaOptNet, and wherever a margin helps: with few shots and good features.

    Primal: \(\min_w \frac12 \sum_k |w_k|^2 + C \sum_n \max_k (1 - [k = y_n] + w_k \cdot x_n - w_{y_n} \cdot x_n)\).
    Dual (Eq. 10), for the coefficients \(\alpha\) with \(w_k = \sum_n \alpha_n^k x_n\):
    \(\max_\alpha -\frac12 \sum_k |w_k|^2 + \sum_n \alpha_n^{y_n}\) subject to
    \(\alpha_n^k \le C [k = y_n]\) and \(\sum_k \alpha_n^k = 0\).

    Difference from Lee et al.: the problem is solved to optimality, whereas the paper stops the solver after three
    iterations (`solver=QpthSolver(max_iterations=3)`). Their published code, like learn2learn, runs 15 iterations, adds
    1 to the dual's diagonal (`smoothing=1`), and does not constrain the scale.

    See `MulticlassSVM` for its arguments: `C`, `squared_hinge`, `smoothing`, `solver`, `class_weight`,
    `intercept`, `kernel`, `scale`, `validate`.

    Example:
        `logits = SVMHead(C=0.1)(support, labels, query)`
    """

    def solve(self, support: SupportSet) -> KernelExpansion:
        targets = support.labeled_targets
        own = targets > 0
        upper = torch.where(own, self.upper_bound(support), 0)
        return self.solve_dual(DualProblem(support.gram, linear=targets - support.offset, upper=upper), own, support)


class WestonWatkinsSVMHead(MulticlassSVM):
    r"""Multi-class SVM of Weston & Watkins (1999): one slack per example and wrong class.

    Use it when every wrong class should count, not only the nearest one.

    Primal:
    \(\min_w \frac12 \sum_k |w_k|^2 + C \sum_n \sum_{k \ne y_n} \max(0, 2 - w_{y_n} \cdot x_n + w_k \cdot x_n)\).
    Dual: \(\max_\alpha -\frac12 \sum_k |w_k|^2 + 2 \sum_n \alpha_n^{y_n}\) subject to
    \(-C \le \alpha_n^k \le 0\) for \(k \ne y_n\) and \(\sum_k \alpha_n^k = 0\), where
    \(w_k = \sum_n \alpha_n^k x_n\).

    Difference from the original: there is no bias without `intercept=True`. Lee et al. 2019 name this SVM as an
    alternative (Section 3.3) but report no results for it; their published code has it with the kernel
    `Linear() + Constant(1.0)` and C = 1e-5.

    See `MulticlassSVM` for its arguments: `C`, `squared_hinge`, `smoothing`, `solver`, `class_weight`,
    `intercept`, `kernel`, `scale`, `validate`.

    Example:
        `logits = WestonWatkinsSVMHead(C=0.05)(support, labels, query)`
    """

    def solve(self, support: SupportSet) -> KernelExpansion:
        targets = support.labeled_targets
        own, bound = targets > 0, self.upper_bound(support)
        lower, upper = torch.where(own, -torch.inf, -bound), torch.where(own, torch.inf, 0.0).to(targets)
        dual = DualProblem(support.gram, linear=2 * targets - support.offset, lower=lower, upper=upper)
        return self.solve_dual(dual, ~own, support)


class OneVsRestSVMHead(MulticlassSVM):
    r"""A binary SVM for each class against all others (Rifkin & Klautau 2004), solved together.

    Use it when classes may overlap, or when each class should have a score of its own.

    Primal, with \(t_n^k = 1\) where \(k = y_n\) and \(-1\) elsewhere:
    \(\min_w \frac12 \sum_k |w_k|^2 + C \sum_n \sum_k \max(0, 1 - t_n^k\, w_k \cdot x_n)\).
    Dual: \(\max_\alpha -\frac12 \sum_k |w_k|^2 + \sum_{n,k} t_n^k \alpha_n^k\) subject to
    \(0 \le t_n^k \alpha_n^k \le C\), where \(w_k = \sum_n \alpha_n^k x_n\).

    Difference from the original: there is no bias without `intercept=True`. With the squared hinge, the linear kernel,
    the native solver and more examples than features, or more than 100 examples, the primal is solved by Newton's
    method, as in LIBLINEAR (Fan et al. 2008), so that there may be tens of thousands of examples.

    See `MulticlassSVM` for its arguments: `C`, `squared_hinge`, `smoothing`, `solver`, `class_weight`,
    `intercept`, `kernel`, `scale`, `validate`.

    Example:
        `logits = OneVsRestSVMHead(C=0.5)(support, labels, query)`
    """

    accepts_multilabel = True

    def entries_per_task(self, n: int, d: int, k: int) -> int:
        return 12 * (n + d) * k if self._has_primal(n, d) else super().entries_per_task(n, d, k)

    def _has_primal(self, n: int, d: int) -> bool:
        """Whether a linear kernel is solved in its weights."""
        is_smooth = self.squared_hinge and isinstance(self.smoothing, float) and self.smoothing == 0
        is_native = isinstance(self.solver, NativeSolver) and self.solver.max_iterations is None
        return is_smooth and is_native and _primal.is_worth_while(n, d, 1, self.C)

    def solve(self, support: SupportSet) -> KernelExpansion:
        factor, (*_, n, d) = support.linear_factor, support.features.shape
        if factor is not None and self._has_primal(n, d):
            return self._solve_for_weights(support, factor)
        targets = support.labeled_targets if not support.is_multilabel else support.targets
        own, bound = targets > 0, self.upper_bound(support)
        lower, upper = torch.where(own, 0, -bound), torch.where(own, bound, 0)
        linear = 2 * targets - 1 - support.offset
        dual = DualProblem(support.gram, linear, lower=lower, upper=upper, rows_sum_to_zero=False)
        return self.solve_dual(dual, torch.ones_like(own), support)

    def _solve_for_weights(self, support: SupportSet, factor: float | Tensor) -> KernelExpansion:
        """Solve the primal, which has a gradient with the squared hinge."""
        penalty = 1 / as_tensor(self.C, support.targets)
        is_precise = not _primal.is_grid(self.C)
        found = _primal.fit(
            support, factor, loss="squared hinge", penalty=penalty, intercept=self.intercept, is_precise=is_precise
        )
        solution = certified(found.coef, found.gap, found.error, self.solver.tolerance, Status.FAILED, found.steps)
        solution = handle_failures(type(self).__name__, solution, self.solver.tolerance, self.solver.on_failure)
        return KernelExpansion(solution.coef, weight=found.weight, bias=found.bias, solution=solution)


class SimplifiedSVMHead(MulticlassSVM):
    r"""Simplified multi-class SVM of He et al. (2012): the margin to the mean score of the other classes.

    Use it where there are many classes: its dual has one variable per example, instead of one per example and class.

    Primal, for k classes:
    \(\min_w \frac12 \sum_k |w_k|^2 + C \sum_n \max(0, 1 - w_{y_n} \cdot x_n + \frac{1}{k-1} \sum_{j \ne y_n} w_j \cdot
    x_n)\).
    Dual, with the simplex code \(v_n\) (1 at the label, \(-\frac{1}{k-1}\) elsewhere):
    \(\max_a -\frac12 \sum_{n,m} a_n a_m\, v_n \cdot v_m\, x_n \cdot x_m + \sum_n a_n\) subject to \(0 \le a_n \le C\),
    where \(w_k = \sum_n a_n v_n^k x_n\).

    The code published by Lee et al. 2019 has this head with C = 0.01, and scores a class by its own examples alone,
    without the \(-\frac{1}{k-1}\). Neither that code nor this head has a bias.

    See `MulticlassSVM` for its arguments: `C`, `squared_hinge`, `smoothing`, `solver`, `class_weight`,
    `intercept`, `kernel`, `scale`, `validate`.
    The coefficients in a fitted head's `solution` are \(a\), `(*batch, n, 1)`.

    Example:
        `logits = SimplifiedSVMHead(C=0.01)(support, labels, query)`
    """

    def solve(self, support: SupportSet) -> KernelExpansion:
        targets = support.labeled_targets
        code = targets - (1 - targets) / max(targets.shape[-1] - 1, 1)
        one = torch.ones_like(targets[..., :1])
        linear = one - (code * support.offset).sum(-1, keepdim=True)
        gram = support.gram * (code @ code.mT)
        dual = DualProblem(gram, linear, lower=0 * one, upper=self.upper_bound(support), rows_sum_to_zero=False)
        return self.solve_dual(dual, one > 0, support, code=code)


class SupportVectorRegressionHead(RegressionHead):
    r"""Epsilon-SVR (Smola & Schoelkopf 2004): errors below epsilon are free, larger ones count linearly.

    Use it when some targets are outliers, which count less than in ridge regression.

    Primal: \(\min_w \frac12 |w|^2 + C \sum_n \max(0, |y_n - w \cdot x_n| - \varepsilon)\). Dual, for the coefficients
    \(\alpha = a - b\): \(\max_{a, b} -\frac12 |w|^2 + \langle y, a - b \rangle - \varepsilon \sum_n (a_n + b_n)\)
    subject to \(0 \le a, b \le C\).

    There is no intercept (see `RegressionHead`). The `solution` of a fit stacks \(a\) on top of \(b\).

    Args:
        C: weight of the errors, positive; a float or `Learnable`. Defaults to 1.
        epsilon: half-width of the free tube, positive, in units of targets; a float or `Learnable`. Defaults to 0.1.
        solver: see `MulticlassSVM`, also for the error. Defaults to "native".
        kernel: see `RegressionHead`, also for `validate` and the errors.

    Example:
        `values = SupportVectorRegressionHead(C=10.0, kernel=RBF())(support, targets, query)`
    """

    checks = RegressionHead.checks | _SVM_CHECKS | {"epsilon": check_positive}

    def __init__(
        self,
        C: Hyperparameter = 1.0,
        *,
        epsilon: Hyperparameter = 0.1,
        solver: Solver | str = "native",
        kernel: KernelLike | None = None,
        validate: bool = True,
    ) -> None:
        super().__init__(kernel=kernel, validate=validate)
        self.C, self.epsilon, self.solver = C, epsilon, get_solver(solver)

    @property
    def is_traceable(self) -> bool:
        return not self.validate and self.solver.is_traceable  # compilers get `super().is_traceable` wrong

    def solve(self, support: SupportSet) -> KernelExpansion:
        gram, targets = support.gram, support.targets
        epsilon = as_tensor(self.epsilon, gram)
        linear = torch.cat([targets - epsilon, -targets - epsilon], -2)
        both = torch.cat([torch.cat([gram, -gram], -1), torch.cat([-gram, gram], -1)], -2)
        upper = as_tensor(self.C, gram).expand(linear.shape)
        dual = DualProblem(both, linear, lower=torch.zeros_like(linear), upper=upper, rows_sum_to_zero=False)
        solution = self.solver.solve(_with_start(dual, support))
        above, below = solution.coef.chunk(2, -2)
        return KernelExpansion(above - below, solution=solution)
