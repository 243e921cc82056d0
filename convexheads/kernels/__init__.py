"""Kernels: callables `(x, y) -> gram` that turn a head into a non-linear one.

A kernel maps `x` of shape `(*batch, m, d)` and `y` of shape `(*batch, n, d)` to the Gram matrix `(*batch, m, n)`, in
their dtype. Any such function or `nn.Module` is accepted; it has to be positive semi-definite and, for gradients,
differentiable. Heads call it in float64, with the support as `y`, and check its result.

Kernels of this module can be added and multiplied: `Linear() + 0.5 * RBF()`, `Linear() + 1.0`, `Cosine() * RBF()`.
"""

from convexheads.kernels.base import (
    Constant,
    Kernel,
    KernelLike,
    Product,
    Sum,
    check_kernel,
    compute_gram,
    condition,
    is_kernel,
)
from convexheads.kernels.linear import Linear, gram_diagonal
from convexheads.kernels.standard import RBF, Cosine, Polynomial, UnitScale

__all__ = ["RBF", "Constant", "Cosine", "Linear", "Polynomial", "Product", "Sum", "UnitScale"]
__all__ += ["Kernel", "KernelLike", "check_kernel", "compute_gram", "condition", "gram_diagonal", "is_kernel"]
