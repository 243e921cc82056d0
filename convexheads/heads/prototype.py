"""Nearest class mean: prototypical networks."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from convexheads.heads._closed_form import Errors, with_solution
from convexheads.heads._sharing import multiply, scale_once
from convexheads.heads.base.classification import ClassificationHead
from convexheads.heads.base.support_set import KernelExpansion, SupportSet
from convexheads.kernels import gram_diagonal
from convexheads.solvers.failures import OnFailure


class PrototypeHead(ClassificationHead):
    r"""Minus the squared distance to the class means (Snell et al. 2017), in the kernel's feature space.

    Use it as a baseline: it has nothing to tune, and is the fastest head.

    The class mean \(m_c\) solves the convex problem \(\min_m \sum_{n: y_n = c} |x_n - m|^2\) in closed form. The score
    \(-|q - m_c|^2 = 2 q \cdot m_c - |m_c|^2 - |q|^2\) needs only inner products.

    Difference from Lee et al. 2019: they divide the distance by the feature dimension (Section 4.1), as
    `PrototypeHead(kernel=Linear(normalize=True))` does.

    Its arguments `kernel`, `scale` and `validate`, and its errors, are those of `ClassificationHead`. A class without
    examples is an `InputError`.

    Example:
        `logits = PrototypeHead(kernel=Linear(normalize=True))(support, labels, query)`
    """

    requires_all_classes = True
    on_failure: OnFailure = "raise"

    def solve(self, support: SupportSet) -> KernelExpansion:
        mean, factor, weight = support.targets / support.targets.sum(-2, keepdim=True), support.linear_factor, None
        if factor is None:
            gram = replace(support, needs_similarity=False).gram  # minus the squared distance has the same prototypes
            bias = -(mean * multiply(gram, mean)).sum(-2)
        else:
            prototypes = scale_once(multiply(mean.mT, support.features), factor)
            bias, weight = -prototypes.square().sum(-1), 2 * scale_once(prototypes, factor)
        expansion = KernelExpansion(2 * mean, weight=weight, bias=bias, self_similarity_weight=-1.0)
        total = bias.detach().sum(-1)
        return with_solution(self, expansion, support, _errors_of_means, total, doubt=total.sum)

    @property
    def has_leave_one_out(self) -> bool:
        return True

    def leave_one_out_scores(self, support: SupportSet) -> Float[Tensor, "tasks 1 points n k"]:
        # Without an example, the mean of its class moves away from it by the factor N / (N - 1).
        counts = support.targets.sum(-2, keepdim=True)
        mean = support.targets / counts
        squared = gram_diagonal(support.kernel, support.features).unsqueeze(-1)
        similarity = support.gram @ mean
        scores = 2 * similarity - (mean * similarity).sum(-2, keepdim=True) - squared
        moved = torch.where(counts > 1, (counts / (counts - 1)).square() * scores, -torch.inf)
        return torch.where(support.targets > 0, moved, scores)[:, None, None]


def _errors_of_means(total: Float[Tensor, "*batch"]) -> Errors:
    """A mean is exact up to rounding, unless it is not finite."""
    return 0 * total, 0 * total
