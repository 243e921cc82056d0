"""The multi-class support vector machine of Weston and Watkins."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from convexheads.heads.svm import MulticlassSVM
from convexheads.hyperparameters import Hyperparameter, display, positive
from convexheads.kernels import Kernel
from convexheads.solvers import DualProblem, Solver


class WestonWatkinsHead(MulticlassSVM):
    r"""Multi-class SVM of Weston & Watkins (1999): one slack for each example and wrong class.

    Primal, with margin m:
    \(\min_w \frac12 \sum_k |w_k|^2 + C \sum_n \sum_{k \ne y_n} \max(0, m - w_{y_n} \cdot x_n + w_k \cdot x_n)\).
    Dual: \(\max_\alpha -\frac12 \sum_k |w_k|^2 + m \sum_n \alpha_n^{y_n}\) subject to
    \(-C \le \alpha_n^k \le 0\) for \(k \ne y_n\) and \(\sum_k \alpha_n^k = 0\), where
    \(w_k = \sum_n \alpha_n^k x_n\).

    What differs from the original: it has biases, which can be had here by a kernel with a constant
    (`Linear() + Constant(1.0)`), then regularised as weights are. Lee et al. 2019 name this SVM as an alternative
    (Section 3.3) without figures; their published code has it with that kernel and C = 1e-5.

    Args:
        C: as for every `MulticlassSVM` (default 0.1), and so are `squared_hinge`, `smoothing`, `solver`, `kernel` and
            `scale`.
        margin: m, positive. Default 2, that of the original.

    Raises:
        InputError: an argument is unusable. Calls raise what `Head.forward` does.
        MissingDependencyError: the named solver's package is not installed.
    """

    def __init__(
        self,
        C: Hyperparameter = 0.1,
        *,
        margin: float = 2.0,
        squared_hinge: bool = False,
        smoothing: Hyperparameter = 0.0,
        solver: Solver | str = "native",
        kernel: Kernel | None = None,
        scale: Hyperparameter = 1.0,
    ) -> None:
        super().__init__(C, squared_hinge=squared_hinge, smoothing=smoothing, solver=solver, kernel=kernel, scale=scale)
        self.margin = positive("margin", margin, learnable=False)

    def problem(
        self, gram: Float[Tensor, "*batch n n"], targets: Float[Tensor, "*batch n k"], most: Float[Tensor, ""]
    ) -> tuple[DualProblem, Bool[Tensor, "*batch n k"]]:
        own = targets > 0
        lower, upper = torch.where(own, -torch.inf, -most), torch.where(own, torch.inf, 0.0).to(gram)
        return DualProblem(gram, linear=self.margin * targets, lower=lower, upper=upper), ~own

    def _settings(self) -> list[str]:
        C, *settings = super()._settings()
        return [C, *([] if self.margin == 2 else [f"margin={display(self.margin)}"]), *settings]
