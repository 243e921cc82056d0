"""The multi-class support vector machine of Crammer and Singer, the paper's base learner."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from convexheads.heads.base import Dual, Head
from convexheads.hyperparameters import Hyperparameter, Learnable, display, positive, value_of
from convexheads.kernels import Kernel
from convexheads.solvers import QP, Solver, get_solver


class SVMHead(Head):
    r"""Multi-class SVM (Crammer & Singer 2001), Eq. 4 of Lee et al. 2019.

    Primal: \(\min_w \frac12 \sum_k |w_k|^2 + C \sum_n \max_k (1 - [k = y_n] + w_k \cdot x_n - w_{y_n} \cdot x_n)\).
    Dual (Eq. 10), for the coefficients \(\alpha\) with \(w_k = \sum_n \alpha_n^k x_n\):
    \(\max_\alpha -\frac12 \sum_k |w_k|^2 + \sum_n \alpha_n^{y_n}\) subject to
    \(\alpha_n^k \le C [k = y_n]\) and \(\sum_k \alpha_n^k = 0\).

    What differs from the paper: the problem is solved to the end unless the solver is told to stop early
    (`solver=QpthSolver(max_iterations=3)` is the paper's). From the authors' published code: that adds 1 to the dual's
    diagonal (`smoothing=1`), runs 15 iterations, and its scale is an unconstrained parameter.

    Args:
        C: weight of the slacks, positive; a float or `Learnable`. Default 0.1, the paper's.
        smoothing: quadratic smoothing of the loss, \(\frac{\delta}{2}|\alpha|^2\) in the dual: 0 is the paper's Eq. 10,
            1 the authors' published code and learn2learn's. A float or `Learnable`. Default 0.
        solver: a `Solver` or the name of one: "native" (default), "qpth", "cvxpylayers".
        kernel: any callable `(x, y) -> gram`; default `Linear()`.
        scale: factor of all logits (Eq. 12's gamma), a float or `Learnable`; default 1.

    Raises:
        InputError: an argument is unusable.
        MissingDependencyError: the named solver's package is not installed.
    """

    def __init__(
        self,
        C: Hyperparameter = 0.1,
        *,
        smoothing: Hyperparameter = 0.0,
        solver: Solver | str = "native",
        kernel: Kernel | None = None,
        scale: Hyperparameter = 1.0,
    ) -> None:
        super().__init__(kernel=kernel, scale=scale)
        self.C = positive("C", C)
        self.smoothing = positive("smoothing", smoothing, or_zero=True)
        self.solver = get_solver(solver)

    def dual(self, gram: Float[Tensor, "*batch n n"], targets: Float[Tensor, "*batch n k"]) -> Dual:
        # A left-out example has no label; at a right angle to all others, any will do.
        labelled = targets.sum(-1, keepdim=True)
        targets = torch.cat([targets[..., :1] + 1 - labelled, targets[..., 1:]], -1)
        smoothed = isinstance(self.smoothing, Learnable) or self.smoothing > 0
        smoothing = value_of(self.smoothing, gram).expand(targets.shape) if smoothed else None
        solution = self.solver.solve(
            QP(gram, linear=targets, upper=value_of(self.C, gram) * targets, smoothing=smoothing)
        )
        return Dual(solution.coef, solution=solution)

    def _settings(self) -> list[str]:
        settings = [f"C={display(self.C)}"]
        if self.smoothing != 0:
            settings.append(f"smoothing={display(self.smoothing)}")
        if repr(self.solver) != "NativeSolver()":
            settings.append(f"solver={self.solver!r}")
        return settings + super()._settings()
