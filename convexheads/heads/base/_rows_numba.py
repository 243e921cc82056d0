"""Scores of rows of a table of features, by a kernel that Numba compiles and that reads the rows where they are.

To gather the queries of an episode, to convert them to float64 and to multiply them by the weights takes longer than to
solve the episode, because each of these steps reads and writes all of them.
"""

from __future__ import annotations

from typing import no_type_check

from jaxtyping import Float, Integer
from torch import Tensor

from convexheads.solvers.native.numba_backend import run_tasks
from convexheads.solvers.native.team import kernel


@kernel
@no_type_check
def score_tasks(start, stop, table, rows, weight, bias, factor, scores):
    """Write the scores of tasks `start` to `stop`, of two rows at once, so that weights are read half as often."""
    (k, d), queries = weight.shape[1:], rows.shape[1]
    for t in range(start, stop):
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
                    x_product += x[j] * weight[t, c, j]
                    y_product += y[j] * weight[t, c, j]
                scores[t, first, c], scores[t, second, c] = x_product, y_product


def score(
    table: Float[Tensor, "examples d"],
    rows: Integer[Tensor, "tasks q"],
    weight: Float[Tensor, "tasks k d"],
    bias: Float[Tensor, "tasks k"],
    factor: Float[Tensor, " tasks"],
) -> Float[Tensor, "tasks q k"]:
    """The scores `x @ weight.mT + bias + factor * |x|^2` of the rows x, all on the CPU, without gradient.

    The table is contiguous and in float32 or float64; the sums and the other tensors are in float64.
    """
    tasks, k, d = weight.shape
    scores = weight.new_empty(tasks, rows.shape[-1], k)
    arguments = tuple(value.contiguous() for value in (rows, weight, bias, factor))
    run_tasks(score_tasks, tasks, 2 * scores.numel() * d, table, *arguments, scores)
    return scores
