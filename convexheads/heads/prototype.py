"""Nearest class mean: prototypical networks."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from convexheads.heads.base import Dual, Head


class PrototypeHead(Head):
    r"""Minus the squared distance to the class means (Snell et al. 2017), in the kernel's feature space.

    With the class mean \(m_c\), the convex problem \(\min_m \sum_{n: y_n = c} |x_n - m|^2\) in closed form:
    \(-|q - m_c|^2 = 2 q \cdot m_c - |m_c|^2 - |q|^2\), which needs inner products only.

    What differs from Lee et al. 2019: they divide the distance by the feature dimension (Section 4.1), which is
    `PrototypeHead(kernel=Linear(normalize=True))`.

    Takes `kernel` (default `Linear()`) and `scale` (default 1), as every `Head` does.

    Raises:
        InputError: an argument is unusable. Calls raise what `Head.forward` does, and for a class without examples.
    """

    needs_every_class: ClassVar[bool] = True

    def dual(self, gram: Float[Tensor, "*batch n n"], targets: Float[Tensor, "*batch n k"]) -> Dual:
        mean = targets / targets.sum(-2, keepdim=True)
        return Dual(2 * mean, bias=-(mean * (gram @ mean)).sum(-2), norm=-1.0)
