"""Gram matrices of many small support sets, by a kernel that Numba compiles.

It computes each pair of examples once, and a product of matrices twice. For so small matrices, BLAS gains nothing from
their symmetry.
"""

from __future__ import annotations

from typing import no_type_check

from jaxtyping import Float
from torch import Tensor

from convexheads.solvers.native.numba_backend import run_tasks
from convexheads.solvers.native.team import kernel


@kernel
@no_type_check
def products(a, b, x, y):
    """The products of the rows a and b with the rows x and y, all at once, so that each row is read less often."""
    ax, ay, bx, by = 0.0, 0.0, 0.0, 0.0
    for j in range(len(a)):
        ax += a[j] * x[j]
        ay += a[j] * y[j]
        bx += b[j] * x[j]
        by += b[j] * y[j]
    return ax, ay, bx, by


@kernel
@no_type_check
def gram_tasks(start, stop, features, gram):
    """Write the Gram matrices of tasks `start` to `stop`."""
    n = features.shape[1]
    for t in range(start, stop):
        rows, matrix = features[t], gram[t]
        for i in range(0, n, 2):
            i2 = min(i + 1, n - 1)
            for j in range(0, i + 1, 2):
                j2 = min(j + 1, n - 1)
                found = products(rows[i], rows[i2], rows[j], rows[j2])
                matrix[i, j], matrix[i, j2], matrix[i2, j], matrix[i2, j2] = found
        for i in range(n):
            for j in range(i):
                matrix[j, i] = matrix[i, j]


def gram_of(features: Float[Tensor, "*batch n d"]) -> Float[Tensor, "*batch n n"]:
    """The products `features @ features.mT`, of contiguous features in float64 on the CPU, without gradient."""
    *batch, n, d = features.shape
    gram = features.new_empty(*batch, n, n)
    flat = features.detach().view(-1, n, d)
    run_tasks(gram_tasks, len(flat), n * flat.numel(), flat, gram.view(-1, n, n))
    return gram
