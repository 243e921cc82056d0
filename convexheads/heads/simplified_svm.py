"""The simplified multi-class support vector machine, with one dual variable per example."""

from __future__ import annotations

from dataclasses import replace

import torch

from convexheads.heads.base.support_set import KernelExpansion, SupportSet
from convexheads.heads.svm import MulticlassSVM
from convexheads.solvers import DualProblem


class SimplifiedSVMHead(MulticlassSVM):
    r"""Simplified multi-class SVM of He et al. (2012): one slack per example, against the mean of the others.

    Use it where there are many classes: its dual has k times fewer variables than those of the other SVMs.

    Primal, for k classes:
    \(\min_w \frac12 \sum_k |w_k|^2 + C \sum_n \max(0, 1 - w_{y_n} \cdot x_n + \frac{1}{k-1} \sum_{j \ne y_n} w_j \cdot
    x_n)\).
    Dual, with the simplex code \(v_n\) (1 at the label, \(-\frac{1}{k-1}\) elsewhere):
    \(\max_a -\frac12 \sum_{n,m} a_n a_m\, v_n \cdot v_m\, x_n \cdot x_m + \sum_n a_n\) subject to \(0 \le a_n \le C\),
    where \(w_k = \sum_n a_n v_n^k x_n\).

    What differs: the code published by Lee et al. 2019 has this head with C = 0.01, and scores a class by its own
    examples alone, that is without the \(-\frac{1}{k-1}\). Neither has a bias; the kernel
    `Linear() + Constant(1.0)` adds one.

    Its arguments `C` (default 0.1), `squared_hinge`, `smoothing`, `solver`, `kernel`, `scale` and `validate` are those
    of `MulticlassSVM`. The `solution` of a fitted head is that for \(a\), `(*batch, n, 1)`.

    Raises:
        InputError: an argument is unusable. Calls raise what `ClassificationHead.forward` does.
        MissingDependencyError: the named solver's package is not installed.

    Example:
        `logits = SimplifiedSVMHead(C=0.01)(support, labels, query)`
    """

    def solve(self, support: SupportSet) -> KernelExpansion:
        targets = support.labeled_targets
        code = targets - (1 - targets) / max(targets.shape[-1] - 1, 1)
        one = torch.ones_like(targets[..., :1])
        upper = self.upper_bound(targets).expand_as(one)
        dual = DualProblem(
            support.gram * (code @ code.mT), linear=one, lower=0 * one, upper=upper, rows_sum_to_zero=False
        )
        expansion = self.solve_dual(dual, one > 0)
        return replace(expansion, coef=expansion.coef * code)
