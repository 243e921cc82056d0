"""Multi-class support vector machines: what they have in common, and the paper's, that of Crammer and Singer."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from convexheads.errors import check_flag
from convexheads.heads.base import Dual, Head
from convexheads.heads.inputs import label_all
from convexheads.hyperparameters import Hyperparameter, Learnable, display, positive, value_of
from convexheads.kernels import Kernel
from convexheads.solvers import DualProblem, Solver, get_solver


class MulticlassSVM(Head):
    r"""An SVM whose dual is a `DualProblem`, as Eq. 10 of Lee et al. 2019 is. A subclass writes one method, `problem`.

    Args:
        C: weight of the slacks, positive; a float or `Learnable`. Default 0.1, that of Lee et al. 2019.
        squared_hinge: whether slacks count squared, \(C \xi^2\) in place of \(C \xi\). In the dual, their multipliers
            then have no upper bound, but the quadratic term \(\frac{1}{4C} \alpha^2\) (as LIBLINEAR's, Fan et al.
            2008). Default False.
        smoothing: quadratic smoothing of the loss, \(\frac{\delta}{2}|\alpha|^2\) in the dual, over all coefficients,
            non-negative; a float or `Learnable`. Default 0. The code published by Lee et al. 2019 has 1, unlike the
            paper.
        solver: a `Solver` or the name of one: "native" (default), "qpth", "cvxpylayers", "moreau".
        kernel: any callable `(x, y) -> gram`; default `Linear()`.
        scale: factor of all logits (gamma in Eq. 12 of Lee et al. 2019), positive; a float or `Learnable`. Default 1.

    Raises:
        InputError: an argument is unusable. Calls raise what `Head.forward` does.
        MissingDependencyError: the named solver's package is not installed.
    """

    def __init__(
        self,
        C: Hyperparameter = 0.1,
        *,
        squared_hinge: bool = False,
        smoothing: Hyperparameter = 0.0,
        solver: Solver | str = "native",
        kernel: Kernel | None = None,
        scale: Hyperparameter = 1.0,
    ) -> None:
        super().__init__(kernel=kernel, scale=scale)
        check_flag("squared_hinge", squared_hinge)
        self.C = positive("C", C)
        self.squared_hinge = squared_hinge
        self.smoothing = positive("smoothing", smoothing, or_zero=True)
        self.solver = get_solver(solver)

    @abstractmethod
    def problem(
        self, gram: Float[Tensor, "*batch n n"], targets: Float[Tensor, "*batch n k"], most: Float[Tensor, ""]
    ) -> tuple[DualProblem, Bool[Tensor, "*batch n m"]]:
        """The dual, without any smoothing; the one method that a subclass writes.

        The solver raises `InputError` where bounds are missing or crossed.

        Args:
            gram: kernel matrix of the support set, `(*batch, n, n)`.
            targets: one-hot labels, `(*batch, n, k)`; of left-out examples too, for which any will do.
            most: the bound of a slack's multiplier, a scalar `()`: C, or infinity where the hinge is squared.

        Returns:
            The problem in whatever variables, `(*batch, n, m)`, and which of them are multipliers of slacks, likewise.
        """

    def coefficients(
        self, solution: Float[Tensor, "*batch n m"], targets: Float[Tensor, "*batch n k"]
    ) -> Float[Tensor, "*batch n k"]:
        """The dual coefficients that belong to the problem's variables; the same, unless overridden.

        Args:
            solution: the variables of `problem` at the optimum, `(*batch, n, m)`.
            targets: one-hot labels, `(*batch, n, k)`.

        Returns:
            `(*batch, n, k)`.
        """
        return solution

    def dual(self, gram: Float[Tensor, "*batch n n"], targets: Float[Tensor, "*batch n k"]) -> Dual:
        targets = label_all(targets)
        C = value_of(self.C, gram)
        qp, slack = self.problem(gram, targets, torch.full_like(C, torch.inf) if self.squared_hinge else C)
        if self.squared_hinge or isinstance(self.smoothing, Learnable) or self.smoothing > 0:
            smoothing = slack / (2 * C) if self.squared_hinge else torch.zeros_like(qp.linear)
            qp = replace(qp, smoothing=smoothing + value_of(self.smoothing, gram))
        solution = self.solver.solve(qp)
        return Dual(self.coefficients(solution.coef, targets), solution=solution)

    def _settings(self) -> list[str]:
        settings = [f"C={display(self.C)}"]
        if self.squared_hinge:
            settings.append("squared_hinge=True")
        if self.smoothing != 0:
            settings.append(f"smoothing={display(self.smoothing)}")
        if repr(self.solver) != "NativeSolver()":
            settings.append(f"solver={self.solver!r}")
        return settings + super()._settings()


class SVMHead(MulticlassSVM):
    r"""Multi-class SVM of Crammer & Singer (2001), Eq. 4 of Lee et al. 2019: one slack an example.

    Primal: \(\min_w \frac12 \sum_k |w_k|^2 + C \sum_n \max_k (1 - [k = y_n] + w_k \cdot x_n - w_{y_n} \cdot x_n)\).
    Dual (Eq. 10), for the coefficients \(\alpha\) with \(w_k = \sum_n \alpha_n^k x_n\):
    \(\max_\alpha -\frac12 \sum_k |w_k|^2 + \sum_n \alpha_n^{y_n}\) subject to
    \(\alpha_n^k \le C [k = y_n]\) and \(\sum_k \alpha_n^k = 0\).

    What differs from Lee et al.: the problem is solved to the end unless the solver is told to stop early
    (`solver=QpthSolver(max_iterations=3)` is the paper's). From their published code and learn2learn: those add
    1 to the dual's diagonal (`smoothing=1`), run 15 iterations, and their scale is an unconstrained parameter.

    Takes `C` (default 0.1), `squared_hinge`, `smoothing`, `solver`, `kernel` and `scale`, as every `MulticlassSVM`
    does.

    Raises:
        InputError: an argument is unusable. Calls raise what `Head.forward` does.
        MissingDependencyError: the named solver's package is not installed.
    """

    def problem(
        self, gram: Float[Tensor, "*batch n n"], targets: Float[Tensor, "*batch n k"], most: Float[Tensor, ""]
    ) -> tuple[DualProblem, Bool[Tensor, "*batch n k"]]:
        own = targets > 0
        return DualProblem(gram, linear=targets, upper=torch.where(own, most, 0)), own
