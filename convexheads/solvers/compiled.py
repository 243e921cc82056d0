"""Active-set Newton compiled for the CPU by Numba: the same search as `active_set.search`, a task at a time.

For small tasks the search in torch is bound by the number of its calls, not by arithmetic. Here a task is one compiled
loop, tasks run in parallel, and only the rows of the free coefficients take part: a class with m of them costs one
inverse of m x m. What it finds is certified by the same code as ever.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any, no_type_check

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from convexheads.solvers.active_set import PROXIMITY, REFINEMENTS, REGULARISER, ActiveSet
from convexheads.solvers.problem import QP

# Floating-point operations, about, from which on threads pay.
_WORTH_THREADS = 2e6


def search(qp: QP, *, max_rounds: int) -> tuple[ActiveSet, Int[Tensor, " tasks"]]:
    """Solve a flat batch of problems in units (`QP.in_units`) from nothing; as `active_set.search`."""
    problem = (*_arrays(qp), PROXIMITY * qp.curvature().numpy())
    linear = problem[1]
    side, coef, rounds = np.zeros(linear.shape, np.int8), np.empty_like(linear), np.empty(len(linear), np.int64)
    factors = _factors(*linear.shape)
    settings = (REGULARISER, REFINEMENTS, max_rounds)
    _run(_loops()[0], linear.shape, problem, qp.row_sum, (side, coef, rounds), factors, settings)
    found = torch.from_numpy(side)
    kkt = CompiledKKT(problem[0], problem[4], qp.row_sum, factors)
    return ActiveSet(torch.from_numpy(coef), found > 0, found < 0, kkt), torch.from_numpy(rounds)


class CompiledKKT:
    """The factors that a search ended with; solves as `BlockKKT` does."""

    def __init__(self, gram: np.ndarray, smoothing: np.ndarray, row_sum: bool, factors: Any) -> None:
        self.gram, self.smoothing, self.row_sum, self.factors = gram, smoothing, row_sum, factors

    def solve(
        self, right: Float[Tensor, "tasks k n"], sums: Float[Tensor, "tasks n"], *, refinements: int
    ) -> tuple[Float[Tensor, "tasks k n"], Float[Tensor, "tasks n"]]:
        """Return `(x, shift)`, refined against the unregularised system."""
        given, total = np.ascontiguousarray(right.mT.numpy()), np.ascontiguousarray(sums.numpy())
        x, shift = np.zeros_like(given), np.zeros_like(total)
        system = (self.gram, self.smoothing, given, total)
        _run(_loops()[1], x.shape, system, self.row_sum, (x, shift), self.factors, refinements)
        return torch.from_numpy(x).mT, torch.from_numpy(shift)


def _run(loop: Any, shape: tuple[int, ...], *arguments: Any) -> None:
    """Run a loop over all tasks; in threads of torch's number where that is worth starting them.

    Threads of our own, for this call, and not Numba's: those of OpenMP can't be used from a forked process, such as a
    worker of a data loader.
    """
    tasks, n, k = shape
    threads = min(torch.get_num_threads(), tasks)
    if threads < 2 or tasks * k * n**3 < _WORTH_THREADS:
        return loop(0, tasks, *arguments)
    ends = [tasks * part // threads for part in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda part: loop(*part, *arguments), pairwise(ends)))


def _factors(tasks: int, n: int, k: int) -> tuple[np.ndarray, ...]:
    """For each class the inverse of its block, packed, and the rows in it; and the factor of the row sums' system."""
    return (
        np.empty((tasks, k, n * n)),
        np.empty((tasks, k, n), dtype=np.int64),
        np.empty((tasks, k), dtype=np.int64),
        np.empty((tasks, n, n)),
    )


def _arrays(qp: QP) -> tuple[np.ndarray, ...]:
    def array(value: Tensor | None, missing: float) -> np.ndarray:
        return np.full(qp.linear.shape, missing) if value is None else value.contiguous().numpy()

    return (
        qp.gram.contiguous().numpy(),
        qp.linear.contiguous().numpy(),
        array(qp.lower, -np.inf),
        array(qp.upper, np.inf),
        array(qp.smoothing, 0.0),
    )


@cache
@no_type_check  # Numba has types of its own
def _loops() -> tuple[Any, Any]:
    """Compile; kept on disk between processes."""
    import numba

    # Sums may be reordered, so that they vectorise; NaN keeps its meaning.
    jit = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})

    @jit
    def cholesky(matrix, n):  # in place, lower; a failure leaves NaN
        column = np.empty(n)
        for p in range(n):
            pivot = matrix[p, p]
            root = np.sqrt(pivot) if pivot > 0 else np.nan
            matrix[p, p] = root
            for i in range(p + 1, n):
                matrix[i, p] /= root
                column[i] = matrix[i, p]
            for i in range(p + 1, n):
                factor = column[i]
                for j in range(p + 1, i + 1):
                    matrix[i, j] -= factor * column[j]

    @jit
    def cholesky_solve(factor, right, n):  # in place
        for i in range(n):
            value = right[i]
            for j in range(i):
                value -= factor[i, j] * right[j]
            right[i] = value / factor[i, i]
        for i in range(n - 1, -1, -1):
            value = right[i] / factor[i, i]
            right[i] = value
            for j in range(i):
                right[j] -= factor[i, j] * value

    @jit
    def invert(matrix, m):  # symmetric positive definite, in place, by sweeps of its lower half; a failure leaves NaN
        column = np.empty(m)
        for p in range(m):
            for j in range(p):
                column[j] = matrix[p * m + j]
            for j in range(p, m):
                column[j] = matrix[j * m + p]
            pivot = column[p]
            inverse = 1 / pivot if pivot > 0 else np.nan
            for i in range(m):
                factor = column[i] * inverse
                for j in range(i + 1):
                    matrix[i * m + j] -= factor * column[j]
            for j in range(p):
                matrix[p * m + j] = column[j] * inverse
            for j in range(p, m):
                matrix[j * m + p] = column[j] * inverse
            matrix[p * m + p] = -inverse
        for i in range(m):
            for j in range(i + 1):
                value = -matrix[i * m + j]
                matrix[i * m + j] = value
                matrix[j * m + i] = value

    @jit
    def factorise(gram, smoothing, row_sum, side, blocks, index, count, schur, regulariser):
        n, k = side.shape
        schur[:] = 0.0
        for c in range(k):
            m = 0
            for i in range(n):
                if side[i, c] == 0:
                    index[c, m] = i
                    m += 1
            count[c] = m
            block = blocks[c]
            for a in range(m):
                i = index[c, a]
                for b in range(m):
                    block[a * m + b] = gram[i, index[c, b]]
                block[a * m + a] += smoothing[i, c] + regulariser
            invert(block, m)
            if row_sum:
                for a in range(m):
                    i = index[c, a]
                    for b in range(a + 1):
                        schur[i, index[c, b]] += block[a * m + b]
        if row_sum:
            for i in range(n):
                if schur[i, i] == 0:  # a row without a free entry has no equation left
                    schur[i, i] = 1.0
            cholesky(schur, n)

    @jit
    def eliminate(row_sum, right, sums, x, shift, blocks, index, count, schur):  # adds to x and shift
        n, k = x.shape
        step = np.zeros((n, k))
        total = -sums
        for c in range(k):
            m, block = count[c], blocks[c]
            for a in range(m):
                value = 0.0
                for b in range(m):
                    value += block[a * m + b] * right[index[c, b], c]
                step[index[c, a], c] = value
                total[index[c, a]] += value
        if row_sum:
            cholesky_solve(schur, total, n)
            shift += total
            for c in range(k):
                m, block = count[c], blocks[c]
                for a in range(m):
                    value = 0.0
                    for b in range(m):
                        value += block[a * m + b] * total[index[c, b]]
                    step[index[c, a], c] -= value
        x += step

    @jit
    def residual(gram, smoothing, right, sums, x, shift, rest):  # of the free and the held entries alike
        n, k = x.shape
        rest[:] = right - np.dot(gram, x) - smoothing * x
        for i in range(n):
            for c in range(k):
                rest[i, c] -= shift[i]
        return sums - x.sum(1)

    @jit
    def one_task(task, row_sum, side, coef, space, settings):
        gram, linear, lower, upper, smoothing, weight = task
        blocks, index, count, schur = space
        regulariser, refinements, max_rounds = settings
        n, k = linear.shape
        ridge = gram.copy()
        for i in range(n):
            ridge[i, i] += weight
        cholesky(ridge, n)
        column = np.empty(n)
        average = np.zeros(n)
        if row_sum:
            for i in range(n):
                average[i] = linear[i].mean()
        for c in range(k):
            for i in range(n):
                column[i] = linear[i, c] - average[i]
            cholesky_solve(ridge, column, n)
            for i in range(n):
                pull = weight * column[i]
                side[i, c] = 1 if upper[i, c] - column[i] < pull else (-1 if column[i] - lower[i, c] < -pull else 0)
                coef[i, c] = column[i]
        shift = np.zeros(n)
        held, right, rest, x = np.empty((n, k)), np.empty((n, k)), np.empty((n, k)), np.empty((n, k))
        rounds = 0
        while True:
            rounds += 1
            for i in range(n):
                for c in range(k):
                    s = side[i, c]
                    held[i, c] = upper[i, c] if s > 0 else (lower[i, c] if s < 0 else 0.0)
                    x[i, c] = coef[i, c] if s == 0 else 0.0
            factorise(gram, smoothing, row_sum, side, blocks, index, count, schur, regulariser)
            right[:] = linear - np.dot(gram, held)
            sums = -held.sum(1)
            left = residual(gram, smoothing, right, sums, x, shift, rest)
            eliminate(row_sum, rest, left, x, shift, blocks, index, count, schur)
            coef[:] = x + held
            if rounds == max_rounds:
                break
            residual(gram, smoothing, right, sums, x, shift, rest)
            changed = False
            for i in range(n):
                for c in range(k):
                    pull = rest[i, c] - smoothing[i, c] * held[i, c]
                    s = 0
                    if upper[i, c] - coef[i, c] < pull:
                        s = 1
                    elif coef[i, c] - lower[i, c] < -pull:
                        s = -1
                    if s != side[i, c]:
                        changed = True
                        side[i, c] = s
            if not changed:
                break
        for _ in range(refinements):
            left = residual(gram, smoothing, right, sums, x, shift, rest)
            eliminate(row_sum, rest, left, x, shift, blocks, index, count, schur)
        coef[:] = x + held
        return rounds

    @jit
    def search_all(start, stop, problem, row_sum, results, factors, settings):
        gram, linear, lower, upper, smoothing, weight = problem
        side, coef, rounds = results
        blocks, index, count, schur = factors
        for t in range(start, stop):
            task = (gram[t], linear[t], lower[t], upper[t], smoothing[t], weight[t])
            space = (blocks[t], index[t], count[t], schur[t])
            rounds[t] = one_task(task, row_sum, side[t], coef[t], space, settings)

    @jit
    def solve_all(start, stop, system, row_sum, results, factors, refinements):
        gram, smoothing, right, sums = system
        x, shift = results
        blocks, index, count, schur = factors
        for t in range(start, stop):
            eliminate(row_sum, right[t], sums[t], x[t], shift[t], blocks[t], index[t], count[t], schur[t])
            rest = np.empty_like(right[t])
            for _ in range(refinements):
                left = residual(gram[t], smoothing[t], right[t], sums[t], x[t], shift[t], rest)
                eliminate(row_sum, rest, left, x[t], shift[t], blocks[t], index[t], count[t], schur[t])

    return search_all, solve_all
