"""Multi-class support vector machines: their base class, and the SVM of Crammer and Singer."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from convexheads._validation import Check, check_bool
from convexheads.heads.base.classification import ClassificationHead
from convexheads.heads.base.support_set import KernelExpansion, SupportSet
from convexheads.hyperparameters import Hyperparameter, Learnable, as_tensor, check_positive
from convexheads.kernels import KernelLike
from convexheads.solvers import DualProblem, Solver, get_solver


class MulticlassSVM(ClassificationHead):
    r"""Base class of SVMs whose dual is a `DualProblem`, as Eq. 10 of Lee et al. 2019 is.

    Use it to write an SVM of your own: in `solve`, build the dual with `upper_bound`, and pass it to `solve_dual`.

    Args:
        C: weight of the slacks, positive; a float or `Learnable`. Defaults to 0.1, that of Lee et al. 2019.
        squared_hinge: whether slacks count squared, \(C \xi^2\) in place of \(C \xi\). In the dual, their multipliers
            then have no upper bound, but the quadratic term \(\frac{1}{4C} \alpha^2\) (like LIBLINEAR's, Fan et al.
            2008). Defaults to False.
        smoothing: quadratic smoothing of the loss, \(\frac{\delta}{2}|\alpha|^2\) in the dual, over all coefficients,
            non-negative; a float or `Learnable`. Defaults to 0. The code published by Lee et al. 2019 has 1, unlike the
            paper.
        solver: a `Solver` or the name of one: "native" (default), "qpth", "cvxpylayers", "moreau".
        kernel: any callable `(x, y) -> gram`. Defaults to `Linear()`.
        scale: factor of all logits (gamma in Eq. 12 of Lee et al. 2019), positive; a float or `Learnable`. Defaults to
            1.
        validate: whether to check the values of all input, see `Head`. Defaults to True.

    Raises:
        InputError: an argument is unusable. Calls raise what `ClassificationHead.forward` does.
        MissingDependencyError: the named solver's package is not installed.
    """

    checks: ClassVar[dict[str, Check]] = ClassificationHead.checks | {
        "C": check_positive,
        "squared_hinge": check_bool,
        "smoothing": partial(check_positive, allow_zero=True),
        "solver": lambda _, solver: get_solver(solver),
    }

    solver: Solver

    def __init__(
        self,
        C: Hyperparameter = 0.1,
        *,
        squared_hinge: bool = False,
        smoothing: Hyperparameter = 0.0,
        solver: Solver | str = "native",
        kernel: KernelLike | None = None,
        scale: Hyperparameter = 1.0,
        validate: bool = True,
    ) -> None:
        super().__init__(kernel=kernel, scale=scale, validate=validate)
        self.C, self.squared_hinge, self.smoothing, self.solver = C, squared_hinge, smoothing, get_solver(solver)

    def upper_bound(self, like: Tensor) -> Float[Tensor, ""]:
        """The upper bound of the multipliers of slacks, a scalar `()`: C, or infinity where the hinge is squared.

        Args:
            like: a tensor that supplies the dtype and the device.
        """
        return as_tensor(math.inf if self.squared_hinge else self.C, like)

    def solve_dual(self, problem: DualProblem, slacks: Bool[Tensor, "*batch n m"]) -> KernelExpansion:
        """Solve a dual, with the head's smoothing added.

        Args:
            problem: the dual without any smoothing, in variables `(*batch, n, m)`.
            slacks: which variables are multipliers of slacks, `(*batch, n, m)`.

        Returns:
            The variables as coefficients, and the solution.

        Raises:
            SolverError: a task could not be solved (see the solver's `on_failure`).
        """
        if self.squared_hinge or isinstance(self.smoothing, Learnable) or self.smoothing > 0:
            like = problem.linear
            hinge = slacks / (2 * as_tensor(self.C, like)) if self.squared_hinge else torch.zeros_like(like)
            problem = replace(problem, smoothing=hinge + as_tensor(self.smoothing, like))
        solution = self.solver.solve(problem)
        return KernelExpansion(solution.coef, solution=solution)


class SVMHead(MulticlassSVM):
    r"""Multi-class SVM of Crammer & Singer (2001), Eq. 4 of Lee et al. 2019: one slack per example.

    Use it for the head of MetaOptNet, and wherever a margin helps: with few shots and good features.

    Primal: \(\min_w \frac12 \sum_k |w_k|^2 + C \sum_n \max_k (1 - [k = y_n] + w_k \cdot x_n - w_{y_n} \cdot x_n)\).
    Dual (Eq. 10), for the coefficients \(\alpha\) with \(w_k = \sum_n \alpha_n^k x_n\):
    \(\max_\alpha -\frac12 \sum_k |w_k|^2 + \sum_n \alpha_n^{y_n}\) subject to
    \(\alpha_n^k \le C [k = y_n]\) and \(\sum_k \alpha_n^k = 0\).

    What differs from Lee et al.: the problem is solved to optimality unless the solver is told to stop early
    (`solver=QpthSolver(max_iterations=3)` is the paper's). From their published code and learn2learn: those add
    1 to the dual's diagonal (`smoothing=1`), run 15 iterations, and their scale is an unconstrained parameter.

    Its arguments `C` (default 0.1), `squared_hinge`, `smoothing`, `solver`, `kernel`, `scale` and `validate` are those
    of `MulticlassSVM`.

    Raises:
        InputError: an argument is unusable. Calls raise what `ClassificationHead.forward` does.
        MissingDependencyError: the named solver's package is not installed.

    Example:
        `logits = SVMHead(C=0.1)(support, labels, query)`
    """

    def solve(self, support: SupportSet) -> KernelExpansion:
        targets = support.labeled_targets
        own = targets > 0
        upper = torch.where(own, self.upper_bound(targets), 0)
        return self.solve_dual(DualProblem(support.gram, linear=targets, upper=upper), own)
