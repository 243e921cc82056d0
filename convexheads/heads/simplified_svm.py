"""The simplified multi-class support vector machine, with one dual variable an example."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from convexheads.heads.svm import MulticlassSVM
from convexheads.solvers import DualProblem


class SimplifiedSVMHead(MulticlassSVM):
    r"""Simplified multi-class SVM of He et al. (2012): one slack an example, against the mean of the other classes.

    Primal, for k classes:
    \(\min_w \frac12 \sum_k |w_k|^2 + C \sum_n \max(0, 1 - w_{y_n} \cdot x_n + \frac{1}{k-1} \sum_{j \ne y_n} w_j \cdot
    x_n)\).
    Dual, with the simplex code \(v_n\) (1 at the label, \(-\frac{1}{k-1}\) elsewhere):
    \(\max_a -\frac12 \sum_{n,m} a_n a_m\, v_n \cdot v_m\, x_n \cdot x_m + \sum_n a_n\) subject to \(0 \le a_n \le C\),
    where \(w_k = \sum_n a_n v_n^k x_n\): k times fewer variables than the other SVMs have.

    What differs: the code published by Lee et al. 2019 has this head with C = 0.01, and scores a class by its own
    examples alone, that is without the \(-\frac{1}{k-1}\). There is no bias, here or there; `Linear() + Constant(1.0)`
    adds one.

    Takes `C` (default 0.1), `squared_hinge`, `smoothing`, `solver`, `kernel` and `scale`, as every `MulticlassSVM`
    does. The `solution` of a fit is about \(a\), `(*batch, n, 1)`.

    Raises:
        InputError: an argument is unusable. Calls raise what `Head.forward` does.
        MissingDependencyError: the named solver's package is not installed.
    """

    def problem(
        self, gram: Float[Tensor, "*batch n n"], targets: Float[Tensor, "*batch n k"], most: Float[Tensor, ""]
    ) -> tuple[DualProblem, Bool[Tensor, "*batch n 1"]]:
        code = _simplex(targets)
        one = torch.ones_like(targets[..., :1])
        problem = DualProblem(
            gram * (code @ code.mT), linear=one, lower=0 * one, upper=most.expand_as(one), rows_sum_to_zero=False
        )
        return problem, one > 0

    def coefficients(
        self, solution: Float[Tensor, "*batch n 1"], targets: Float[Tensor, "*batch n k"]
    ) -> Float[Tensor, "*batch n k"]:
        return solution * _simplex(targets)


def _simplex(targets: Tensor) -> Tensor:
    return targets - (1 - targets) / max(targets.shape[-1] - 1, 1)
