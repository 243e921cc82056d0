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
    """Write the scores of tasks `start` to `stop`."""
    k, d = weight.shape[1:]
    for t in range(start, stop):
        for q in range(rows.shape[1]):
            x, squared_length = table[rows[t, q]], 0.0
            if factor[t] != 0:
                for j in range(d):
                    squared_length += float(x[j]) * float(x[j])
            for c in range(k):
                product = 0.0
                for j in range(d):
                    product += x[j] * weight[t, c, j]
                scores[t, q, c] = product + bias[t, c] + factor[t] * squared_length


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
