"""Support vector regression."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from convexheads.heads.base import Dual
from convexheads.heads.regression import RegressionHead
from convexheads.hyperparameters import Hyperparameter, display, positive, value_of
from convexheads.kernels import Kernel
from convexheads.solvers import DualProblem, Solver, get_solver


class SupportVectorRegressionHead(RegressionHead):
    r"""Epsilon-SVR (Smola & Schoelkopf 2004): errors below epsilon are free, larger ones count linearly.

    Primal: \(\min_w \frac12 |w|^2 + C \sum_n \max(0, |y_n - w \cdot x_n| - \varepsilon)\). Dual, for the coefficients
    \(\alpha = a - b\): \(\max_{a, b} -\frac12 |w|^2 + \langle y, a - b \rangle - \varepsilon \sum_n (a_n + b_n)\)
    subject to \(0 \le a, b \le C\).

    What differs: there is no intercept; a kernel with a constant (`RBF() + Constant(1.0)`) adds one, regularised as
    weights are. The `solution` of a fit is about \(a\) above \(b\), `(*batch, 2n, outputs)`.

    Args:
        C: weight of the errors, positive; a float or `Learnable`. Default 1.
        epsilon: half width of the free tube, positive, in the units of the targets; a float or `Learnable`.
            Default 0.1.
        solver: a `Solver` or the name of one: "native" (default), "qpth", "cvxpylayers", "moreau".
        kernel: any callable `(x, y) -> gram`; default `Linear()`.

    Raises:
        InputError: an argument is unusable. Calls raise what `RegressionHead.forward` does.
        MissingDependencyError: the named solver's package is not installed.
    """

    def __init__(
        self,
        C: Hyperparameter = 1.0,
        *,
        epsilon: Hyperparameter = 0.1,
        solver: Solver | str = "native",
        kernel: Kernel | None = None,
    ) -> None:
        super().__init__(kernel=kernel)
        self.C = positive("C", C)
        self.epsilon = positive("epsilon", epsilon)
        self.solver = get_solver(solver)

    def dual(self, gram: Float[Tensor, "*batch n n"], targets: Float[Tensor, "*batch n k"]) -> Dual:
        epsilon = value_of(self.epsilon, gram)
        linear = torch.cat([targets - epsilon, -targets - epsilon], -2)
        both = torch.cat([torch.cat([gram, -gram], -1), torch.cat([-gram, gram], -1)], -2)
        most = value_of(self.C, gram).expand(linear.shape)
        solution = self.solver.solve(
            DualProblem(both, linear, lower=torch.zeros_like(linear), upper=most, rows_sum_to_zero=False)
        )
        above, below = solution.coef.chunk(2, -2)
        return Dual(above - below, solution=solution)

    def _settings(self) -> list[str]:
        settings = [f"C={display(self.C)}", f"epsilon={display(self.epsilon)}"]
        if repr(self.solver) != "NativeSolver()":
            settings.append(f"solver={self.solver!r}")
        return settings + super()._settings()
