"""The loops of `compiled.py`, in the Python that Numba compiles. Imported only where Numba is installed.

They stand at module level because only there Numba finds the machine code again that it has kept on disk: of a closure
over other compiled functions, each process would compile its own.
"""

from __future__ import annotations

import math
from typing import no_type_check

import numba
import numpy as np

# Sums may be reordered, so that they vectorise; NaN and infinity keep their meaning.
jit = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})


@jit
@no_type_check
def cholesky(matrix, n):
    """In place, lower; a failure leaves NaN."""
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


@jit
@no_type_check
def cholesky_solve(factor, right, n):
    """In place."""
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
@no_type_check
def invert(matrix, m):
    """Symmetric positive definite, in place, by sweeps of its lower half; a failure leaves NaN."""
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
@no_type_check
def factorise(gram, smoothing, row_sum, side, factors, regulariser):
    """`BlockKKT.factorise`: the inverse of each class's free rows, and the Cholesky factor of the row sums' system."""
    blocks, index, count, schur = factors
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
            for b in range(a + 1):
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
@no_type_check
def multiply(block, m, local, result):
    """A class's inverse times a vector."""
    for a in range(m):
        value = 0.0
        row = block[a * m : (a + 1) * m]
        for b in range(m):
            value += row[b] * local[b]
        result[a] = value


@jit
@no_type_check
def eliminate(row_sum, right, sums, x, shift, factors):
    """Solve the factorised system; adds to `x` and `shift`."""
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
    if row_sum:
        cholesky_solve(schur, total, n)
        for i in range(n):
            shift[i] += total[i]
        for c in range(k):
            m = count[c]
            for a in range(m):
                local[a] = total[index[c, a]]
            multiply(blocks[c], m, local, result)
            for a in range(m):
                x[index[c, a], c] -= result[a]


@jit
@no_type_check
def residual(gram, smoothing, right, sums, x, shift, rest, left):
    """What is left of the equations, of the free and the held entries alike."""
    n, k = x.shape
    image = np.dot(gram, x)
    for i in range(n):
        total = 0.0
        for c in range(k):
            rest[i, c] = right[i, c] - image[i, c] - smoothing[i, c] * x[i, c] - shift[i]
            total += x[i, c]
        left[i] = sums[i] - total


@jit
@no_type_check
def project(row, target, lower, upper, weight, smoothing):
    """The minimiser of a row's proximal step, into `row`."""
    k = len(row)
    shift = 0.0
    for _ in range(2 * k):  # Newton's method for the multiplier of the sum; exact where bounds are on one side
        total, rate, size = 0.0, 0.0, 0.0
        for c in range(k):
            value = (weight * target[c] - shift) / (weight + smoothing[c])
            row[c] = min(max(value, lower[c]), upper[c])
            total += row[c]
            size += abs(row[c])
            if row[c] == value:
                rate += 1 / (weight + smoothing[c])
        if rate == 0.0 or abs(total) <= 1e-12 * size:
            break
        shift += total / rate


@jit
@no_type_check
def split(task, row_sum, weight, steps, patience, relaxation, coef, side):
    """`splitting.py`, for a first guess."""
    gram, linear, lower, upper, smoothing = task
    n, k = linear.shape
    inverse = gram.copy()
    for i in range(n):
        inverse[i, i] += weight
    invert(inverse.reshape(n * n), n)
    right, dual, target = np.empty((n, k)), np.zeros((n, k)), np.empty(k)
    coef[:] = 0.0
    settled, last = 0, 0.0
    for step in range(steps):
        mark = 0.0  # of which entries are held: what changes with them
        for i in range(n):
            average = 0.0
            for c in range(k):
                right[i, c] = linear[i, c] + weight * (coef[i, c] - dual[i, c])
                average += right[i, c]
            if row_sum:
                for c in range(k):
                    right[i, c] -= average / k
        moved = np.dot(inverse, right)
        for i in range(n):
            for c in range(k):
                if step > 0:
                    moved[i, c] = relaxation * moved[i, c] + (1 - relaxation) * coef[i, c]
                target[c] = moved[i, c] + dual[i, c]
            if row_sum:
                project(coef[i], target, lower[i], upper[i], weight, smoothing[i])
            else:
                for c in range(k):
                    value = weight * target[c] / (weight + smoothing[i, c])
                    coef[i, c] = min(max(value, lower[i, c]), upper[i, c])
            for c in range(k):
                dual[i, c] = target[c] - coef[i, c]
                held = (1.0 if coef[i, c] == upper[i, c] else 0.0) - (1.0 if coef[i, c] == lower[i, c] else 0.0)
                mark += held * (i * k + c + 1)
        settled = settled + 1 if mark == last else 0
        if settled == patience:
            break
        last = mark
    for i in range(n):
        for c in range(k):
            side[i, c] = 1 if coef[i, c] == upper[i, c] else (-1 if coef[i, c] == lower[i, c] else 0)


@jit
@no_type_check
def search(task, row_sum, regulariser, refinements, max_rounds, coef, shift, side, factors):
    """`active_set.search`, of one task."""
    gram, linear, lower, upper, smoothing = task
    n, k = linear.shape
    held, right, rest, x = np.empty((n, k)), np.empty((n, k)), np.empty((n, k)), np.empty((n, k))
    sums, left = np.empty(n), np.empty(n)
    rounds = 0
    while True:
        rounds += 1
        for i in range(n):
            total = 0.0
            for c in range(k):
                s = side[i, c]
                held[i, c] = upper[i, c] if s > 0 else (lower[i, c] if s < 0 else 0.0)
                x[i, c] = coef[i, c] if s == 0 else 0.0
                total += held[i, c]
            sums[i] = -total
        factorise(gram, smoothing, row_sum, side, factors, regulariser)
        image = np.dot(gram, held)
        for i in range(n):
            for c in range(k):
                right[i, c] = linear[i, c] - image[i, c]
        residual(gram, smoothing, right, sums, x, shift, rest, left)
        eliminate(row_sum, rest, left, x, shift, factors)
        residual(gram, smoothing, right, sums, x, shift, rest, left)
        changed = False
        for i in range(n):
            for c in range(k):
                pull = rest[i, c] - smoothing[i, c] * held[i, c]
                coef[i, c] = x[i, c] + held[i, c]
                s = 0
                if upper[i, c] - coef[i, c] < pull:
                    s = 1
                elif coef[i, c] - lower[i, c] < -pull:
                    s = -1
                if s != side[i, c]:
                    changed = True
                    if rounds < max_rounds:
                        side[i, c] = s
        if rounds == max_rounds or not changed:
            break
    for refinement in range(refinements):
        if refinement > 0:
            residual(gram, smoothing, right, sums, x, shift, rest, left)
        eliminate(row_sum, rest, left, x, shift, factors)
    for i in range(n):
        for c in range(k):
            coef[i, c] = x[i, c] + held[i, c]
    return rounds


@jit
@no_type_check
def prove(task, row_sum, coef, shift, pull):
    """`QP.certify`, for coefficients next to which no projection is needed."""
    gram, linear, lower, upper, smoothing = task
    n, k = linear.shape
    largest, moved, violation = 1.0, 0.0, 0.0
    for i in range(n):
        total = 0.0
        for c in range(k):
            value = min(max(coef[i, c], lower[i, c]), upper[i, c])
            moved = max(moved, abs(coef[i, c] - value))
            largest = max(largest, abs(value))
            coef[i, c] = value
            total += value
        if row_sum:
            violation = max(violation, abs(total))
    scores = np.dot(gram, coef)
    gap, primal, quadratic, squares, diagonal, reach, cost = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for i in range(n):
        diagonal += abs(gram[i, i])
        length, bound = math.sqrt(abs(gram[i, i])), 0.0
        least, most = -np.inf, np.inf
        for c in range(k):
            slope = linear[i, c] - scores[i, c]
            if smoothing[i, c] == 0:
                if upper[i, c] == np.inf:
                    least = max(least, slope)
                if lower[i, c] == -np.inf:
                    most = min(most, slope)
        # Any shift proves an upper bound; without a bound on an entry, it has to be on the right side of its slope.
        if row_sum:
            shift[i] = min(max(shift[i], least), most)
        distance = 0.0
        for c in range(k):
            at, d = coef[i, c], smoothing[i, c]
            reduced = linear[i, c] - scores[i, c] - shift[i]
            if d > 0:
                best = min(max(reduced / d, lower[i, c]), upper[i, c])
                distance += (best - at) * (reduced - d / 2 * (best + at))
                primal += reduced * best - d / 2 * best * best
            elif reduced != 0:
                best = upper[i, c] if reduced > 0 else lower[i, c]
                distance += reduced * (best - at)
                primal += reduced * best
            pull[i, c] = reduced - d * at
            quadratic += at * scores[i, c]
            squares += at * at
            reach += length * abs(at)
            for value in (abs(lower[i, c]), abs(upper[i, c])):
                if value < np.inf:
                    bound = max(bound, value)
        gap += max(distance, 0.0)
        cost += length * bound
    if quadratic < -1e-9 * diagonal * squares:  # no Gram matrix
        gap = np.inf
    quadratic = max(quadratic, 0.0)
    primal += quadratic / 2
    relative = gap / max(abs(primal), 2e-16)
    # the gap, its bound of the weights' squared relative error, how far the coefficients came, and what is left; and
    # more than what rounding can cost, relative to the objective
    rounding = 2.3e-16 * reach * cost / primal if primal > 0 else 0.0
    return relative, 2 * gap / max(quadratic, 1e-300), moved / largest, violation / largest, rounding


@jit
@no_type_check
def units(task, inner):
    """`QP.in_units`."""
    gram, linear, lower, upper, smoothing = task
    n, k = linear.shape
    size, bound, curvature = 0.0, 0.0, 0.0
    for i in range(n):
        curvature += gram[i, i] / n
        for c in range(k):
            size = max(size, abs(linear[i, c]))
            curvature += smoothing[i, c] / (n * k)
            for value in (abs(lower[i, c]), abs(upper[i, c])):
                if value < np.inf:
                    bound = max(bound, value)
    if not size > 0:
        size = 1.0
    unit = size / curvature if curvature > 0 else np.inf
    if bound > 0:
        unit = min(unit, bound)
    if not unit < np.inf:
        unit = 1.0
    scale = unit / size
    for i in range(n):
        for j in range(n):
            inner[0][i, j] = scale * gram[i, j]
        for c in range(k):
            inner[1][i, c] = linear[i, c] / size
            inner[2][i, c] = lower[i, c] / unit
            inner[3][i, c] = upper[i, c] / unit
            inner[4][i, c] = scale * smoothing[i, c]
    return unit, size, scale * curvature


@jit
@no_type_check
def solve_all(start, stop, problem, row_sum, settings, results, system, factors):
    """Tasks `start` to `stop`, from problems to proven solutions."""
    gram, linear, lower, upper, smoothing = problem
    aim, proximity, steps, patience, relaxation, regulariser, refinements, max_rounds = settings
    coef, pull, shift, side, gaps, rounds, scales, proven = results
    scaled_gram, scaled_smoothing = system
    blocks, index, count, schur = factors
    n, k = linear.shape[1:]
    inner_linear, inner_lower, inner_upper = np.empty((n, k)), np.empty((n, k)), np.empty((n, k))
    for t in range(start, stop):
        inner = (scaled_gram[t], inner_linear, inner_lower, inner_upper, scaled_smoothing[t])
        unit, size, curvature = units((gram[t], linear[t], lower[t], upper[t], smoothing[t]), inner)
        split(inner, row_sum, proximity * curvature, steps, patience, relaxation, coef[t], side[t])
        shift[t] = 0.0
        space = (blocks[t], index[t], count[t], schur[t])
        rounds[t] = search(inner, row_sum, regulariser, refinements, max_rounds, coef[t], shift[t], side[t], space)
        gap, error, moved, violation, rounding = prove(inner, row_sum, coef[t], shift[t], pull[t])
        proven[t] = gap <= aim and (error <= aim or gap <= 1e-16) and moved <= 1e-6 and violation <= 1e-14
        gaps[t, 0], gaps[t, 1], gaps[t, 2], scales[t] = gap, violation, rounding, unit / size
        for i in range(n):
            shift[t, i] *= size
            for c in range(k):
                coef[t, i, c] *= unit
                pull[t, i, c] *= size


@jit
@no_type_check
def factorise_all(start, stop, gram, smoothing, row_sum, side, regulariser, factors):
    """The factors of tasks `start` to `stop` for given active sets."""
    blocks, index, count, schur = factors
    for t in range(start, stop):
        space = (blocks[t], index[t], count[t], schur[t])
        factorise(gram[t], smoothing[t], row_sum, side[t], space, regulariser)


@jit
@no_type_check
def adjoint_all(start, stop, system, right, sums, row_sum, refinements, x, shift, factors):
    """Solve the factorised systems of tasks `start` to `stop`."""
    gram, smoothing = system
    blocks, index, count, schur = factors
    rest, left = np.empty_like(right[0]), np.empty_like(sums[0])
    for t in range(start, stop):
        space = (blocks[t], index[t], count[t], schur[t])
        eliminate(row_sum, right[t], sums[t], x[t], shift[t], space)
        for _ in range(refinements):
            residual(gram[t], smoothing[t], right[t], sums[t], x[t], shift[t], rest, left)
            eliminate(row_sum, rest, left, x[t], shift[t], space)
