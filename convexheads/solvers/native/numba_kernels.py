"""Kernels that Numba compiles. They solve few-shot problems, from the data to the certificate.

Each function is the twin of a PyTorch function, and `tests/unit/test_numba.py` compares the pairs. Tolerances are
arguments, because they are defined next to the PyTorch functions.
"""

from __future__ import annotations

import math
from typing import no_type_check

import numpy as np

from convexheads.solvers.native.numba_kkt import compute_residual, factorize, invert, kernel, solve_factorized


@kernel
@no_type_check
def proximal(row, target, lower, upper, weight, smoothing, newton_tolerance):
    """`FeasibleRows.proximal` of one row with a zero sum, by Newton's method; exact if bounds are on one side."""
    k = len(row)
    multiplier, is_restarted = 0.0, False
    for _ in range(2 * k + 2):
        total, rate, size = 0.0, 0.0, 0.0
        for c in range(k):
            value = (weight * target[c] - multiplier) / (weight + smoothing[c])
            row[c] = min(max(value, lower[c]), upper[c])
            total += row[c]
            size += abs(row[c])
            if row[c] == value:
                rate += 1 / (weight + smoothing[c])
        if abs(total) <= newton_tolerance * size:
            break
        if rate > 0.0:
            multiplier += total / rate
        elif is_restarted:
            break
        else:  # all entries are at their bounds: start again from where they would sum to zero without bounds
            is_restarted, total, rate = True, 0.0, 0.0
            for c in range(k):
                total += weight * target[c] / (weight + smoothing[c])
                rate += 1 / (weight + smoothing[c])
            multiplier = total / rate


@kernel
@no_type_check
def admm(task, rows_sum_to_zero, penalty, settings, coef, side):
    """`admm_steps.admm` for a first guess.

    It ends when a checksum of the active set has not changed for `patience` steps.
    """
    steps, patience, over_relaxation, newton_tolerance = settings
    gram, linear, lower, upper, smoothing = task
    n, k = linear.shape
    inverse = gram.copy()
    for i in range(n):
        inverse[i, i] += penalty
    invert(inverse.reshape(n * n), n)
    right, dual, target = np.empty((n, k)), np.zeros((n, k)), np.empty(k)
    coef[:] = 0.0
    unchanged_steps, last = 0, 0.0
    for step in range(steps):
        checksum = 0.0  # of the active set
        for i in range(n):
            average = 0.0
            for c in range(k):
                right[i, c] = linear[i, c] + penalty * (coef[i, c] - dual[i, c])
                average += right[i, c]
            if rows_sum_to_zero:
                for c in range(k):
                    right[i, c] -= average / k
        moved = np.dot(inverse, right)
        for i in range(n):
            for c in range(k):
                if step > 0:
                    moved[i, c] = over_relaxation * moved[i, c] + (1 - over_relaxation) * coef[i, c]
                target[c] = moved[i, c] + dual[i, c]
            if rows_sum_to_zero:
                proximal(coef[i], target, lower[i], upper[i], penalty, smoothing[i], newton_tolerance)
            else:
                for c in range(k):
                    value = penalty * target[c] / (penalty + smoothing[i, c])
                    coef[i, c] = min(max(value, lower[i, c]), upper[i, c])
            for c in range(k):
                dual[i, c] = target[c] - coef[i, c]
                active = (1.0 if coef[i, c] == upper[i, c] else 0.0) - (1.0 if coef[i, c] == lower[i, c] else 0.0)
                checksum += active * (i * k + c + 1)
        unchanged_steps = unchanged_steps + 1 if checksum == last else 0
        if unchanged_steps == patience:
            break
        last = checksum
    for i in range(n):
        for c in range(k):
            side[i, c] = 1 if coef[i, c] == upper[i, c] else (-1 if coef[i, c] == lower[i, c] else 0)


@kernel
@no_type_check
def search(task, rows_sum_to_zero, settings, coef, row_multipliers, side, factors):
    """`active_set.search`, for one task."""
    regularization, refinements, max_rounds = settings
    gram, linear, lower, upper, smoothing = task
    n, k = linear.shape
    bound_values, right, residual, x = np.empty((n, k)), np.empty((n, k)), np.empty((n, k)), np.empty((n, k))
    sums, row_sum_residual = np.empty(n), np.empty(n)
    rounds = 0
    while True:
        rounds += 1
        for i in range(n):
            total = 0.0
            for c in range(k):
                s = side[i, c]
                bound_values[i, c] = upper[i, c] if s > 0 else (lower[i, c] if s < 0 else 0.0)
                x[i, c] = coef[i, c] if s == 0 else 0.0
                total += bound_values[i, c]
            sums[i] = -total
        factorize(gram, smoothing, rows_sum_to_zero, side, factors, regularization)
        image = np.dot(gram, bound_values)
        for i in range(n):
            for c in range(k):
                right[i, c] = linear[i, c] - image[i, c]
        compute_residual(gram, smoothing, right, sums, x, row_multipliers, residual, row_sum_residual)
        solve_factorized(rows_sum_to_zero, residual, row_sum_residual, x, row_multipliers, factors)
        compute_residual(gram, smoothing, right, sums, x, row_multipliers, residual, row_sum_residual)
        changed = False
        for i in range(n):
            for c in range(k):
                bound_multiplier = residual[i, c] - smoothing[i, c] * bound_values[i, c]
                coef[i, c] = x[i, c] + bound_values[i, c]
                s = 0
                if upper[i, c] - coef[i, c] < bound_multiplier or lower[i, c] == upper[i, c]:
                    s = 1
                elif coef[i, c] - lower[i, c] < -bound_multiplier:
                    s = -1
                if s != side[i, c]:
                    changed = True
                    if rounds < max_rounds:
                        side[i, c] = s
        if rounds == max_rounds or not changed:
            break
    for refinement in range(refinements):
        if refinement > 0:
            compute_residual(gram, smoothing, right, sums, x, row_multipliers, residual, row_sum_residual)
        solve_factorized(rows_sum_to_zero, residual, row_sum_residual, x, row_multipliers, factors)
    for i in range(n):
        for c in range(k):
            coef[i, c] = x[i, c] + bound_values[i, c]
    return rounds


@kernel
@no_type_check
def certify(task, rows_sum_to_zero, coef, row_multipliers, bound_multipliers, limits):
    """`certificate.certify`, for coefficients that need no projection except for clipping.

    Returns the relative gap; twice the gap relative to the squared norm of the weights, which bounds the squared
    relative error of the weights; the largest change by clipping; the largest row sum after clipping; and an upper
    bound of the effect of rounding, relative to the objective.
    """
    indefiniteness, eps, tiny = limits
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
        if rows_sum_to_zero:
            violation = max(violation, abs(total))
    scores = np.dot(gram, coef)
    gap, primal, quadratic, squares, diagonal, reach, cost = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for i in range(n):
        diagonal += abs(gram[i, i])
        length, bound = math.sqrt(abs(gram[i, i])), 0.0
        min_multiplier, max_multiplier = -np.inf, np.inf
        for c in range(k):
            slope = linear[i, c] - scores[i, c]
            if smoothing[i, c] == 0:
                if upper[i, c] == np.inf:
                    min_multiplier = max(min_multiplier, slope)
                if lower[i, c] == -np.inf:
                    max_multiplier = min(max_multiplier, slope)
        # A row multiplier proves a finite duality gap only if it is at least the slopes of all entries without an upper
        # bound, and at most those of all entries without a lower bound.
        if rows_sum_to_zero:
            row_multipliers[i] = min(max(row_multipliers[i], min_multiplier), max_multiplier)
        distance = 0.0
        for c in range(k):
            at, d = coef[i, c], smoothing[i, c]
            reduced = linear[i, c] - scores[i, c] - row_multipliers[i]
            if d > 0:
                best = min(max(reduced / d, lower[i, c]), upper[i, c])
                distance += (best - at) * (reduced - d / 2 * (best + at))
                primal += reduced * best - d / 2 * best * best
            elif reduced != 0:
                best = upper[i, c] if reduced > 0 else lower[i, c]
                distance += reduced * (best - at)
                primal += reduced * best
            bound_multipliers[i, c] = reduced - d * at
            quadratic += at * scores[i, c]
            squares += at * at
            reach += length * abs(at)
            for value in (abs(lower[i, c]), abs(upper[i, c])):
                if value < np.inf:
                    bound = max(bound, value)
        gap += max(distance, 0.0)
        cost += length * bound
    if quadratic < -indefiniteness * diagonal * squares:
        gap = np.inf
    quadratic = max(quadratic, 0.0)
    primal += quadratic / 2
    rounding = eps * reach * cost / primal if primal > 0 else 0.0
    relative = gap / max(abs(primal), eps)
    return relative, 2 * gap / max(quadratic, tiny), moved / largest, violation / largest, rounding


@kernel
@no_type_check
def rescale(task, inner):
    """`rescaling.rescale`, written to `inner`; returns the two scales and the curvature of the rescaled problem."""
    gram, linear, lower, upper, smoothing = task
    n, k = linear.shape
    multiplier_scale, bound, curvature = 0.0, 0.0, 0.0
    for i in range(n):
        curvature += gram[i, i] / n
        for c in range(k):
            multiplier_scale = max(multiplier_scale, abs(linear[i, c]))
            curvature += smoothing[i, c] / (n * k)
            for value in (abs(lower[i, c]), abs(upper[i, c])):
                if value < np.inf:
                    bound = max(bound, value)
    if not multiplier_scale > 0:
        multiplier_scale = 1.0
    coef_scale = multiplier_scale / curvature if curvature > 0 else np.inf
    if bound > 0:
        coef_scale = min(coef_scale, bound)
    if not coef_scale < np.inf:
        coef_scale = 1.0
    hessian_scale = coef_scale / multiplier_scale
    for i in range(n):
        for j in range(n):
            inner[0][i, j] = hessian_scale * gram[i, j]
        for c in range(k):
            inner[1][i, c] = linear[i, c] / multiplier_scale
            inner[2][i, c] = lower[i, c] / coef_scale
            inner[3][i, c] = upper[i, c] / coef_scale
            inner[4][i, c] = hessian_scale * smoothing[i, c]
    return coef_scale, multiplier_scale, hessian_scale * curvature


@kernel
@no_type_check
def begin_at(coef, bound_multipliers, row_multipliers, task, scales, zero_multiplier, side):
    """Rescale a warm start in place, and write the active set that `WarmStart.at_bounds` implies to `side`."""
    _, linear, lower, upper, _ = task
    coef_scale, multiplier_scale = scales
    n, k = linear.shape
    largest = 0.0
    for i in range(n):
        row_multipliers[i] /= multiplier_scale
        for c in range(k):
            largest = max(largest, abs(linear[i, c]))
    for i in range(n):
        for c in range(k):
            coef[i, c] /= coef_scale
            multiplier = bound_multipliers[i, c] / multiplier_scale
            if abs(multiplier) <= zero_multiplier * largest:
                multiplier = 0.0
            s = 1 if coef[i, c] > upper[i, c] else (-1 if coef[i, c] < lower[i, c] else 0)
            if multiplier > 0 and upper[i, c] < np.inf:
                s = 1
            elif multiplier < 0 and lower[i, c] > -np.inf:
                s = -1
            side[i, c] = 1 if lower[i, c] == upper[i, c] else s


@kernel
@no_type_check
def solve_tasks(
    start, stop, problem, rows_sum_to_zero, has_start, path_length, settings, tolerances, results, system, factors
):
    """Rescale, solve and certify tasks `start` to `stop`.

    With `has_start`, each begins at the coefficients and multipliers in the `results`. Otherwise, it begins at the
    solution of the task before, if both are in the same path. If such a search fails, another one begins from scratch.
    """
    gram, linear, lower, upper, smoothing = problem
    penalty_ratio, admm_settings, search_settings, zero_multiplier = settings
    tolerance, zero_gap, feasibility, row_sum_tolerance, limits = tolerances
    coef, bound_multipliers, row_multipliers, side, gaps, rounds, scales, proven = results
    scaled_gram, scaled_smoothing = system
    blocks, index, count, schur = factors
    n, k = linear.shape[1:]
    inner_linear, inner_lower, inner_upper = np.empty((n, k)), np.empty((n, k)), np.empty((n, k))
    regularization, refinements, max_rounds, warm_rounds = search_settings
    for t in range(start, stop):
        inner = (scaled_gram[t], inner_linear, inner_lower, inner_upper, scaled_smoothing[t])
        coef_scale, multiplier_scale, curvature = rescale((gram[t], linear[t], lower[t], upper[t], smoothing[t]), inner)
        is_warm = has_start
        if not has_start and t % path_length > 0 and proven[t - 1]:
            is_warm = True
            coef[t], bound_multipliers[t], row_multipliers[t] = (
                coef[t - 1],
                bound_multipliers[t - 1],
                row_multipliers[t - 1],
            )
        proven[t], rounds[t], searches = False, 0, 2 if is_warm else 1
        task_factors = (blocks[t], index[t], count[t], schur[t])
        while searches > 0 and not proven[t]:
            searches -= 1
            if searches > 0:
                task_scales, limit = (coef_scale, multiplier_scale), warm_rounds
                begin_at(
                    coef[t], bound_multipliers[t], row_multipliers[t], inner, task_scales, zero_multiplier, side[t]
                )
            else:
                limit = max_rounds
                penalty = penalty_ratio * (curvature if curvature > 0 else 1.0)
                admm(inner, rows_sum_to_zero, penalty, admm_settings, coef[t], side[t])
                row_multipliers[t] = 0.0
            settings = regularization, refinements, limit
            rounds[t] += search(inner, rows_sum_to_zero, settings, coef[t], row_multipliers[t], side[t], task_factors)
            gap, squared_error, moved, violation, rounding = certify(
                inner, rows_sum_to_zero, coef[t], row_multipliers[t], bound_multipliers[t], limits
            )
            proven[t] = (
                gap <= tolerance
                and (squared_error <= tolerance or gap <= zero_gap)
                and moved <= feasibility
                and violation <= row_sum_tolerance
            )
        gaps[t, 0], gaps[t, 1], gaps[t, 2], scales[t] = gap, violation, rounding, coef_scale / multiplier_scale
        for i in range(n):
            row_multipliers[t, i] *= multiplier_scale
            for c in range(k):
                coef[t, i, c] *= coef_scale
                bound_multipliers[t, i, c] *= multiplier_scale
