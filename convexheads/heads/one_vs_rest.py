"""One binary support vector machine per class."""

from __future__ import annotations

import torch

from convexheads.heads.base.support_set import KernelExpansion, SupportSet
from convexheads.heads.svm import MulticlassSVM
from convexheads.solvers import DualProblem


class OneVsRestSVMHead(MulticlassSVM):
    r"""A binary SVM for each class against all others (Rifkin & Klautau 2004), solved together.

    Use it when classes may overlap, or when each class should have a score of its own.

    Primal, with \(t_n^k = 1\) where \(k = y_n\) and \(-1\) elsewhere:
    \(\min_w \frac12 \sum_k |w_k|^2 + C \sum_n \sum_k \max(0, 1 - t_n^k\, w_k \cdot x_n)\).
    Dual: \(\max_\alpha -\frac12 \sum_k |w_k|^2 + \sum_{n,k} t_n^k \alpha_n^k\) subject to
    \(0 \le t_n^k \alpha_n^k \le C\), where \(w_k = \sum_n \alpha_n^k x_n\).

    What differs: there is no bias; a kernel with a constant (`Linear() + Constant(1.0)`) adds one, which is
    regularized as weights are.

    Its arguments `C` (default 0.1), `squared_hinge`, `smoothing`, `solver`, `kernel`, `scale` and `validate` are those
    of `MulticlassSVM`.

    Raises:
        InputError: an argument is unusable. Calls raise what `ClassificationHead.forward` does.
        MissingDependencyError: the named solver's package is not installed.

    Example:
        `logits = OneVsRestSVMHead(C=0.5)(support, labels, query)`
    """

    def solve(self, support: SupportSet) -> KernelExpansion:
        targets = support.labeled_targets
        own, bound = targets > 0, self.upper_bound(targets)
        lower, upper = torch.where(own, 0, -bound), torch.where(own, bound, 0)
        dual = DualProblem(support.gram, linear=2 * targets - 1, lower=lower, upper=upper, rows_sum_to_zero=False)
        return self.solve_dual(dual, torch.ones_like(own))
