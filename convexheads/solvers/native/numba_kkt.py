"""The KKT system of one task, compiled by Numba: the twin of `convexheads/solvers/kkt.py`.

Numba keeps the machine code of `numba_kernels.py` on disk, and does not notice that it is out of date when only this
file has changed. If you change this file, delete `__pycache__`.
"""

from __future__ import annotations

from typing import no_type_check

import numba
import numpy as np

# Sums may be reordered, so that they can be vectorized; NaN and infinity keep their meaning.
kernel = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})


@kernel
@no_type_check
def cholesky(matrix, n):
    """The lower Cholesky factor, in place; NaN if there is none."""
    inverse = np.empty(n)  # of the diagonal
    for i in range(n):
        row = matrix[i]
        for j in range(i):
            other, product = matrix[j], 0.0
            for p in range(j):
                product += row[p] * other[p]
            row[j] = (row[j] - product) * inverse[j]
        product = 0.0
        for p in range(i):
            product += row[p] * row[p]
        pivot = row[i] - product
        row[i] = np.sqrt(pivot) if pivot > 0 else np.nan
        inverse[i] = 1 / row[i]


@kernel
@no_type_check
def cholesky_solve(factor, right, n):
    """Solve with a Cholesky factor, in place."""
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


@kernel
@no_type_check
def invert(matrix, m):
    """The inverse of a positive definite matrix, in place, by sweeps of its lower half; NaN if there is none."""
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


@kernel
@no_type_check
def factorize(gram, smoothing, rows_sum_to_zero, side, factors, regularization):
    """`BlockKKT.factorize`: the inverse of the block of each class, and the Cholesky factor for the row multipliers."""
    blocks, index, count, schur = factors
    n, k = side.shape
    mean_diagonal = 0.0
    for i in range(n):
        mean_diagonal += gram[i, i] / n
    if mean_diagonal > 0:
        regularization *= mean_diagonal
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
            for b in range(a + 1):
                block[a * m + b] = gram[i, index[c, b]]
            block[a * m + a] += smoothing[i, c] + regularization
        invert(block, m)
        if rows_sum_to_zero:
            for a in range(m):
                i = index[c, a]
                for b in range(a + 1):
                    schur[i, index[c, b]] += block[a * m + b]
    if rows_sum_to_zero:
        for i in range(n):
            if schur[i, i] == 0:  # a row without a free entry has no equation left
                schur[i, i] = 1.0
        cholesky(schur, n)


@kernel
@no_type_check
def multiply(block, m, local, result):
    """Multiply the inverse of a block by a vector."""
    for a in range(m):
        value = 0.0
        row = block[a * m : (a + 1) * m]
        for b in range(m):
            value += row[b] * local[b]
        result[a] = value


@kernel
@no_type_check
def solve_factorized(rows_sum_to_zero, right, sums, x, row_multipliers, factors):
    """Solve the factorized system, and add the solution to `x` and `row_multipliers`."""
    blocks, index, count, schur = factors
    n, k = x.shape
    local, result = np.empty(n), np.empty(n)
    total = -sums
    for c in range(k):
        m = count[c]
        for a in range(m):
            local[a] = right[index[c, a], c]
        multiply(blocks[c], m, local, result)
        for a in range(m):
            i = index[c, a]
            x[i, c] += result[a]
            total[i] += result[a]
    if rows_sum_to_zero:
        cholesky_solve(schur, total, n)
        for i in range(n):
            row_multipliers[i] += total[i]
        for c in range(k):
            m = count[c]
            for a in range(m):
                local[a] = total[index[c, a]]
            multiply(blocks[c], m, local, result)
            for a in range(m):
                x[index[c, a], c] -= result[a]


@kernel
@no_type_check
def compute_residual(gram, smoothing, right, sums, x, row_multipliers, residual, row_sum_residual):
    """The residual of the equations of free and fixed entries, and the residual of the row sums."""
    n, k = x.shape
    image = np.dot(gram, x)
    for i in range(n):
        total = 0.0
        for c in range(k):
            residual[i, c] = right[i, c] - image[i, c] - smoothing[i, c] * x[i, c] - row_multipliers[i]
            total += x[i, c]
        row_sum_residual[i] = sums[i] - total


@kernel
@no_type_check
def solve_systems(start, stop, system, right, sums, rows_sum_to_zero, refinements, x, row_multipliers, factors):
    """Solve the factorized systems of tasks `start` to `stop`, with refinement."""
    gram, smoothing = system
    blocks, index, count, schur = factors
    residual, row_sum_residual = np.empty_like(right[0]), np.empty_like(sums[0])
    for t in range(start, stop):
        task_factors = (blocks[t], index[t], count[t], schur[t])
        solve_factorized(rows_sum_to_zero, right[t], sums[t], x[t], row_multipliers[t], task_factors)
        for _ in range(refinements):
            compute_residual(
                gram[t], smoothing[t], right[t], sums[t], x[t], row_multipliers[t], residual, row_sum_residual
            )
            solve_factorized(rows_sum_to_zero, residual, row_sum_residual, x[t], row_multipliers[t], task_factors)
