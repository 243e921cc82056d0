"""Support vector regression."""

from __future__ import annotations

from typing import ClassVar

import torch

from convexheads._validation import Check
from convexheads.heads.base.regression import RegressionHead
from convexheads.heads.base.support_set import KernelExpansion, SupportSet
from convexheads.hyperparameters import Hyperparameter, as_tensor, check_positive
from convexheads.kernels import KernelLike
from convexheads.solvers import DualProblem, Solver, get_solver


class SupportVectorRegressionHead(RegressionHead):
    r"""Epsilon-SVR (Smola & Schoelkopf 2004): errors below epsilon are free, larger ones count linearly.

    Use it when some targets are outliers, which count less than in ridge regression.

    Primal: \(\min_w \frac12 |w|^2 + C \sum_n \max(0, |y_n - w \cdot x_n| - \varepsilon)\). Dual, for the coefficients
    \(\alpha = a - b\): \(\max_{a, b} -\frac12 |w|^2 + \langle y, a - b \rangle - \varepsilon \sum_n (a_n + b_n)\)
    subject to \(0 \le a, b \le C\).

    Difference from the paper: there is no intercept (see `RegressionHead`). The coefficients in a fitted head's
    `solution` are \(a\) followed by \(b\), `(*batch, 2n, outputs)`.

    Args:
        C: weight of the errors, positive; a float or `Learnable`. Defaults to 1.
        epsilon: the largest error that costs nothing, positive, in the units of the targets; a float or `Learnable`.
            Defaults to 0.1.
        solver: a `Solver`, or a name from `SOLVERS`. Defaults to "native".
        kernel: see `Head`, also for `validate`.

    Raises:
        InputError: an argument is unusable. Calls raise the errors of `RegressionHead.forward`.
        MissingDependencyError: the named solver's package is not installed.

    Example:
        `values = SupportVectorRegressionHead(C=10.0, kernel=RBF())(support, targets, query)`
    """

    checks: ClassVar[dict[str, Check]] = RegressionHead.checks | {
        "C": check_positive,
        "epsilon": check_positive,
        "solver": lambda _, solver: get_solver(solver),
    }

    solver: Solver

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

    def solve(self, support: SupportSet) -> KernelExpansion:
        gram, targets = support.gram, support.targets
        epsilon = as_tensor(self.epsilon, gram)
        linear = torch.cat([targets - epsilon, -targets - epsilon], -2)
        both = torch.cat([torch.cat([gram, -gram], -1), torch.cat([-gram, gram], -1)], -2)
        upper = as_tensor(self.C, gram).expand(linear.shape)
        solution = self.solver.solve(
            DualProblem(both, linear, lower=torch.zeros_like(linear), upper=upper, rows_sum_to_zero=False)
        )
        above, below = solution.coef.chunk(2, -2)
        return KernelExpansion(above - below, solution=solution)
