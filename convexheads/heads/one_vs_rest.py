"""One binary support vector machine a class."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from convexheads.heads.svm import MulticlassSVM
from convexheads.solvers import DualProblem


class OneVsRestHead(MulticlassSVM):
    r"""A binary SVM for each class against all others (Rifkin & Klautau 2004), solved together.

    Primal, with \(t_n^k = 1\) where \(k = y_n\) and \(-1\) elsewhere:
    \(\min_w \frac12 \sum_k |w_k|^2 + C \sum_n \sum_k \max(0, 1 - t_n^k\, w_k \cdot x_n)\).
    Dual: \(\max_\alpha -\frac12 \sum_k |w_k|^2 + \sum_{n,k} t_n^k \alpha_n^k\) subject to
    \(0 \le t_n^k \alpha_n^k \le C\), where \(w_k = \sum_n \alpha_n^k x_n\).

    What differs: there is no bias; a kernel with a constant (`Linear() + Constant(1.0)`) adds one, regularised as
    weights are.

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
        lower, upper = torch.where(own, 0, -most), torch.where(own, most, 0)
        return DualProblem(
            gram, linear=2 * targets - 1, lower=lower, upper=upper, rows_sum_to_zero=False
        ), torch.ones_like(own)
