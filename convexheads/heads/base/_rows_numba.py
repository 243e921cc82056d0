"""Scores of rows of a table of features, by a kernel that Numba compiles and that reads the rows where they are.

To gather the queries of an episode, to convert them to float64 and to multiply them by the weights takes longer than to
solve the episode, because each of these steps reads and writes all of them.
"""

from __future__ import annotations

from typing import no_type_check

import numpy as np
from jaxtyping import Float, Integer
from torch import Tensor

from convexheads.solvers.native.numba_backend import run_tasks
from convexheads.solvers.native.team import kernel


@kernel
@no_type_check
def combine(coef, basis, weight):
    """Write `coef.T @ basis`, two rows of the basis at once, so that weights are read and written half as often."""
    (m, k), d = coef.shape, basis.shape[1]
    weight[:] = 0.0
    for first in range(0, m, 2):
        second = min(first + 1, m - 1)
        x, y = basis[first], basis[second]
        for c in range(k):
            a, b = coef[first, c], coef[second, c] if second > first else 0.0
            for j in range(d):
                weight[c, j] += a * x[j] + b * y[j]


@kernel
@no_type_check
def score_tasks(start, stop, table, rows, coef, basis, bias, factor, scores):
    """Write the scores of tasks `start` to `stop`, of two rows at once, so that weights are read half as often."""
    k, d, queries = coef.shape[2], table.shape[1], rows.shape[1]
    combined = np.empty((k, d))
    for t in range(start, stop):
        weight = basis[t]
        if coef.shape[1] > 0:
            combine(coef[t], basis[t], combined)
            weight = combined
        for first in range(0, queries, 2):
            second = min(first + 1, queries - 1)
            x, y = table[rows[t, first]], table[rows[t, second]]
            x_shift, y_shift = 0.0, 0.0
            if factor[t] != 0:
                for j in range(d):
                    x_shift += factor[t] * x[j] * x[j]
                    y_shift += factor[t] * y[j] * y[j]
            for c in range(k):
                x_product, y_product = bias[t, c] + x_shift, bias[t, c] + y_shift
                for j in range(d):
                    x_product += x[j] * weight[c, j]
                    y_product += y[j] * weight[c, j]
                scores[t, first, c], scores[t, second, c] = x_product, y_product


def score(
    table: Float[Tensor, "examples d"],
    rows: Integer[Tensor, "tasks q"],
    coef: Float[Tensor, "tasks m k"],
    basis: Float[Tensor, "tasks rows d"],
    bias: Float[Tensor, "tasks k"],
    factor: Float[Tensor, " tasks"],
) -> Float[Tensor, "tasks q k"]:
    """The scores `x @ basis.mT @ coef + bias + factor * |x|^2` of the rows x, all on the CPU, without gradient.

    Without coefficients (m is 0), the basis are the weights, with k rows; else, it has m rows.

    The table is contiguous and in float32 or float64; the sums and the other tensors are in float64.
    """
    tasks, m, k = coef.shape
    scores = coef.new_empty(tasks, rows.shape[-1], k)
    arguments = tuple(value.detach().contiguous() for value in (rows, coef, basis, bias, factor))
    operations = 2 * (scores.numel() + tasks * m * k) * table.shape[-1]
    run_tasks(score_tasks, tasks, operations, table, *arguments, scores)
    return scores
