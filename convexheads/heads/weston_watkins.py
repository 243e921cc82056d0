"""The multi-class support vector machine of Weston and Watkins."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch

from convexheads._validation import Check, check_real
from convexheads.heads.base.support_set import KernelExpansion, SupportSet
from convexheads.heads.svm import MulticlassSVM
from convexheads.hyperparameters import Hyperparameter
from convexheads.kernels import KernelLike
from convexheads.solvers import DualProblem, Solver


class WestonWatkinsSVMHead(MulticlassSVM):
    r"""Multi-class SVM of Weston & Watkins (1999): one slack per example and wrong class.

    Use it when every wrong class should count, not only the nearest one.

    Primal, with margin m:
    \(\min_w \frac12 \sum_k |w_k|^2 + C \sum_n \sum_{k \ne y_n} \max(0, m - w_{y_n} \cdot x_n + w_k \cdot x_n)\).
    Dual: \(\max_\alpha -\frac12 \sum_k |w_k|^2 + m \sum_n \alpha_n^{y_n}\) subject to
    \(-C \le \alpha_n^k \le 0\) for \(k \ne y_n\) and \(\sum_k \alpha_n^k = 0\), where
    \(w_k = \sum_n \alpha_n^k x_n\).

    What differs from the original: that has biases. Here a kernel with a constant (`Linear() + Constant(1.0)`) adds
    them, regularized as weights are. Lee et al. 2019 name this SVM as an alternative
    (Section 3.3) without figures; their published code has it with that kernel and C = 1e-5.

    Args:
        C: weight of the slacks, positive; a float or `Learnable`. Defaults to 0.1. This argument, `squared_hinge`,
            `smoothing`, `solver`, `kernel`, `scale` and `validate` are those of `MulticlassSVM`.
        margin: m, positive. Defaults to 2, that of the original.

    Raises:
        InputError: an argument is unusable. Calls raise what `ClassificationHead.forward` does.
        MissingDependencyError: the named solver's package is not installed.

    Example:
        `logits = WestonWatkinsSVMHead(C=0.05)(support, labels, query)`
    """

    checks: ClassVar[dict[str, Check]] = MulticlassSVM.checks | {"margin": partial(check_real, positive=True)}

    def __init__(
        self,
        C: Hyperparameter = 0.1,
        *,
        margin: float = 2.0,
        squared_hinge: bool = False,
        smoothing: Hyperparameter = 0.0,
        solver: Solver | str = "native",
        kernel: KernelLike | None = None,
        scale: Hyperparameter = 1.0,
        validate: bool = True,
    ) -> None:
        super().__init__(
            C,
            squared_hinge=squared_hinge,
            smoothing=smoothing,
            solver=solver,
            kernel=kernel,
            scale=scale,
            validate=validate,
        )
        self.margin = margin

    def solve(self, support: SupportSet) -> KernelExpansion:
        targets = support.labeled_targets
        own, bound = targets > 0, self.upper_bound(targets)
        lower, upper = torch.where(own, -torch.inf, -bound), torch.where(own, torch.inf, 0.0).to(targets)
        return self.solve_dual(DualProblem(support.gram, linear=self.margin * targets, lower=lower, upper=upper), ~own)
