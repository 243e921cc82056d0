"""The KKT system of one task, compiled by Numba: the twin of `convexheads/solvers/kkt.py`.

The module `team` says how the threads of a GPU divide the work. It also says when to delete `__pycache__`.
"""

from __future__ import annotations

import math
from typing import no_type_check

import numpy as np

from convexheads.solvers.native.team import (
    kernel,
    lane,
    lanes,
    multiply,
    thread,
    threads,
    wait_for_team,
    wait_for_warp,
    warp,
    warps,
)


@kernel
@no_type_check
def cholesky(matrix, n):
    """The lower Cholesky factor, in place; NaN if there is none."""
    for j in range(n):
        row = matrix[j]
        for i in range(j + thread(), n, threads()):
            other, product = matrix[i], 0.0
            for p in range(j):
                product += other[p] * row[p]
            other[j] -= product
        wait_for_team()
        pivot = matrix[j, j]
        inverse = 1 / math.sqrt(pivot) if pivot > 0 else np.nan
        for i in range(j + 1 + thread(), n, threads()):
            matrix[i, j] *= inverse
        wait_for_team()
    for j in range(thread(), n, threads()):  # until here, the diagonal holds pivots
        pivot = matrix[j, j]
        matrix[j, j] = math.sqrt(pivot) if pivot > 0 else np.nan
    wait_for_team()


@kernel
@no_type_check
def cholesky_solve(factor, right, n):
    """Solve with a Cholesky factor, in place, by the first warp."""
    if warp() == 0:
        for i in range(n):
            value = right[i] / factor[i, i]
            wait_for_warp()
            if lane() == 0:
                right[i] = value
            for j in range(i + 1 + lane(), n, lanes()):
                right[j] -= factor[j, i] * value
            wait_for_warp()
        for i in range(n - 1, -1, -1):
            value = right[i] / factor[i, i]
            wait_for_warp()
            if lane() == 0:
                right[i] = value
            for j in range(lane(), i, lanes()):
                right[j] -= factor[i, j] * value
            wait_for_warp()
    wait_for_team()


@kernel
@no_type_check
def invert(matrix, m, column, by_team):
    """The inverse of a positive definite matrix, in place, by sweeps of its lower half; NaN if there is none.

    The whole team does it, or the warp that calls it. `column` is memory for m numbers.
    """
    first, step, this_thread, all_threads = 0, 1, lane(), lanes()
    if by_team:
        first, step, this_thread, all_threads = warp(), warps(), thread(), threads()
    for p in range(m):
        for j in range(this_thread, m, all_threads):
            column[j] = matrix[p * m + j] if j < p else matrix[j * m + p]
        wait(by_team)
        pivot = column[p]
        inverse = 1 / pivot if pivot > 0 else np.nan
        for i in range(first, m, step):
            factor = column[i] * inverse
            if i == p:
                for j in range(lane(), p, lanes()):
                    matrix[p * m + j] = column[j] * inverse
                if lane() == 0:
                    matrix[p * m + p] = -inverse
            else:
                for j in range(lane(), i + 1, lanes()):
                    matrix[i * m + j] -= factor * column[j]
                if i > p and lane() == p % lanes():  # the thread that wrote this entry in the loop
                    matrix[i * m + p] = factor
        wait(by_team)
    for i in range(first, m, step):
        for j in range(lane(), i + 1, lanes()):
            value = -matrix[i * m + j]
            matrix[i * m + j] = value
            matrix[j * m + i] = value
    wait(by_team)


@kernel
@no_type_check
def wait(for_team):
    """Wait for the team or for the warp."""
    if for_team:
        wait_for_team()
    else:
        wait_for_warp()


@kernel
@no_type_check
def factorize(gram, smoothing, rows_sum_to_zero, side, factors, regularization, local):
    """`BlockKKT.factorize`: the inverse of the block of each class, and the Cholesky factor for the row multipliers.

    `local` is memory for n numbers per warp.
    """
    blocks, index, count, schur = factors
    n, k = side.shape
    mean_diagonal = 0.0
    for i in range(n):
        mean_diagonal += gram[i, i] / n
    if mean_diagonal > 0:
        regularization *= mean_diagonal
    for c in range(warp(), k, warps()):
        block, m = blocks[c], 0
        for i in range(n):
            if side[i, c] == 0:
                if lane() == 0:
                    index[c, m] = i
                m += 1
        if lane() == 0:
            count[c] = m
        wait_for_warp()
        for a in range(m):
            i = index[c, a]
            for b in range(lane(), a + 1, lanes()):
                block[a * m + b] = gram[i, index[c, b]]
                if a == b:
                    block[a * m + a] += smoothing[i, c] + regularization
        wait_for_warp()
        invert(block, m, local[warp()], False)
    if rows_sum_to_zero:
        for i in range(warp(), n, warps()):
            for j in range(lane(), i + 1, lanes()):
                schur[i, j] = 0.0
    wait_for_team()
    if rows_sum_to_zero:
        for c in range(k):
            m = count[c]
            for a in range(warp(), m, warps()):
                i = index[c, a]
                for b in range(lane(), a + 1, lanes()):
                    schur[i, index[c, b]] += blocks[c, a * m + b]
            wait_for_team()
        for i in range(thread(), n, threads()):
            if schur[i, i] == 0:  # a row without a free entry has no equation left
                schur[i, i] = 1.0
        wait_for_team()
        cholesky(schur, n)


@kernel
@no_type_check
def factorize_tasks_of_team(start, stop, system, side, rows_sum_to_zero, factors, regularization, local):
    """`factorize` for tasks `start` to `stop`."""
    gram, smoothing = system
    blocks, index, count, schur = factors
    for t in range(start, stop):
        task_factors = (blocks[t], index[t], count[t], schur[t])
        factorize(gram[t], smoothing[t], rows_sum_to_zero, side[t], task_factors, regularization, local)


@kernel
@no_type_check
def factorize_tasks(start, stop, system, side, rows_sum_to_zero, factors, regularization):
    """`factorize_tasks_of_team` on the CPU, with memory of its own."""
    local = np.empty((1, side.shape[1]))
    factorize_tasks_of_team(start, stop, system, side, rows_sum_to_zero, factors, regularization, local)


@kernel
@no_type_check
def row_times(block, m, a, local):
    """The product of row `a` of the inverse of a block and a vector."""
    value, row = 0.0, block[a * m : (a + 1) * m]
    for b in range(m):
        value += row[b] * local[b]
    return value


@kernel
@no_type_check
def solve_factorized(rows_sum_to_zero, right, sums, x, row_multipliers, factors, work):
    """Solve the factorized system, and add the solution to `x` and `row_multipliers`."""
    blocks, index, count, schur = factors
    local, change, total = work
    n, k = x.shape
    for c in range(warp(), k, warps()):
        m, mine = count[c], local[warp()]
        for i in range(lane(), n, lanes()):
            change[i, c] = 0.0
        for a in range(lane(), m, lanes()):
            mine[a] = right[index[c, a], c]
        wait_for_warp()
        for a in range(lane(), m, lanes()):
            change[index[c, a], c] = row_times(blocks[c], m, a, mine)
        wait_for_warp()
    wait_for_team()
    for i in range(thread(), n, threads()):
        value = -sums[i]
        for c in range(k):
            x[i, c] += change[i, c]
            value += change[i, c]
        total[i] = value
    wait_for_team()
    if rows_sum_to_zero:
        cholesky_solve(schur, total, n)
        for i in range(thread(), n, threads()):
            row_multipliers[i] += total[i]
        for c in range(warp(), k, warps()):
            m, mine = count[c], local[warp()]
            for a in range(lane(), m, lanes()):
                mine[a] = total[index[c, a]]
            wait_for_warp()
            for a in range(lane(), m, lanes()):
                x[index[c, a], c] -= row_times(blocks[c], m, a, mine)
            wait_for_warp()
        wait_for_team()


@kernel
@no_type_check
def compute_residual(gram, smoothing, right, sums, x, row_multipliers, residual, row_sum_residual):
    """The residual of the equations of free and fixed entries, and the residual of the row sums."""
    n, k = x.shape
    multiply(gram, x, residual)
    for i in range(thread(), n, threads()):
        total = 0.0
        for c in range(k):
            residual[i, c] = right[i, c] - residual[i, c] - smoothing[i, c] * x[i, c] - row_multipliers[i]
            total += x[i, c]
        row_sum_residual[i] = sums[i] - total
    wait_for_team()


@kernel
@no_type_check
def solve_systems_of_team(start, stop, system, equations, options, unknowns, factors, work):
    """Solve the factorized systems of tasks `start` to `stop`, with refinement."""
    gram, smoothing = system
    right, sums = equations
    rows_sum_to_zero, refinements = options
    x, row_multipliers = unknowns
    blocks, index, count, schur = factors
    residual, row_sum_residual, solve_work = work
    for t in range(start, stop):
        task_factors = (blocks[t], index[t], count[t], schur[t])
        solve_factorized(rows_sum_to_zero, right[t], sums[t], x[t], row_multipliers[t], task_factors, solve_work)
        for _ in range(refinements):
            compute_residual(
                gram[t], smoothing[t], right[t], sums[t], x[t], row_multipliers[t], residual, row_sum_residual
            )
            solve_factorized(
                rows_sum_to_zero, residual, row_sum_residual, x[t], row_multipliers[t], task_factors, solve_work
            )


@kernel
@no_type_check
def solve_systems(start, stop, system, equations, options, unknowns, factors):
    """`solve_systems_of_team` on the CPU, with memory of its own."""
    n, k = equations[0].shape[1:]
    work = np.empty((n, k)), np.empty(n), (np.empty((1, n)), np.empty((n, k)), np.empty(n))
    solve_systems_of_team(start, stop, system, equations, options, unknowns, factors, work)
