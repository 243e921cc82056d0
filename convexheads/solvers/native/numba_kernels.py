"""Kernels that Numba compiles. They solve few-shot problems, from the data to the certificate.

Each function is the twin of a PyTorch function, and `tests/unit/test_numba.py` compares the pairs. Tolerances are
arguments, because they are defined next to the PyTorch functions. The module `team` says how the threads of a GPU
divide the work.
"""

from __future__ import annotations

import math
from typing import no_type_check

import numpy as np

from convexheads.solvers.native.numba_kkt import compute_residual, factorize, invert, solve_factorized
from convexheads.solvers.native.team import (
    kernel,
    max_of_team,
    multiply,
    sum_of_team,
    thread,
    threads,
    wait_for_team,
)


@kernel
@no_type_check
def proximal(row, target, lower, upper, weight, smoothing, newton_tolerance, multiplier):
    """`FeasibleRows.proximal` of one row with a zero sum, by Newton's method; exact if bounds are on one side.

    It begins at a guess of the `multiplier`, and returns it.
    """
    k = len(row)
    is_restarted = False
    for _ in range(2 * k + 2):
        total, rate, size = 0.0, 0.0, 0.0
        for c in range(k):
            slope = 1 / (weight + smoothing[c])
            value = (weight * target[c] - multiplier) * slope
            row[c] = min(max(value, lower[c]), upper[c])
            total += row[c]
            size += abs(row[c])
            if row[c] == value:
                rate += slope
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
    return multiplier


@kernel
@no_type_check
def write_right(linear, coef, dual, rows_sum_to_zero, penalty, right):
    """Write one row of the right-hand side of the next ADMM step."""
    k, average = len(right), 0.0
    for c in range(k):
        right[c] = linear[c] + penalty * (coef[c] - dual[c])
        average += right[c]
    if rows_sum_to_zero:
        average /= k
        for c in range(k):
            right[c] -= average


@kernel
@no_type_check
def admm(task, rows_sum_to_zero, penalty, settings, coef, side, work, memory):
    """`admm_steps.admm` for a first guess.

    It ends when a checksum of the active set has not changed for `patience` steps.
    """
    steps, patience, over_relaxation, newton_tolerance = settings
    gram, linear, lower, upper, smoothing = task
    flat, inverse, right, moved, dual, target, column = work  # the first two are the same memory
    n, k = linear.shape
    for i in range(thread(), n, threads()):
        for j in range(n):
            inverse[i, j] = gram[i, j]
        inverse[i, i] += penalty
        for c in range(k):
            coef[i, c], dual[i, c] = 0.0, 0.0
    wait_for_team()
    invert(flat, n, column, True)
    for i in range(thread(), n, threads()):
        column[i] = 0.0  # from here on, this memory has the multipliers of the rows
        write_right(linear[i], coef[i], dual[i], rows_sum_to_zero, penalty, right[i])
    wait_for_team()
    unchanged_steps, last = 0, 0.0
    for step in range(steps):
        multiply(inverse, right, moved)
        checksum = 0.0  # of the active set
        for i in range(thread(), n, threads()):
            for c in range(k):
                if step > 0:
                    moved[i, c] = over_relaxation * moved[i, c] + (1 - over_relaxation) * coef[i, c]
                target[i, c] = moved[i, c] + dual[i, c]
            if rows_sum_to_zero:
                column[i] = proximal(
                    coef[i], target[i], lower[i], upper[i], penalty, smoothing[i], newton_tolerance, column[i]
                )
            else:
                for c in range(k):
                    value = penalty * target[i, c] / (penalty + smoothing[i, c])
                    coef[i, c] = min(max(value, lower[i, c]), upper[i, c])
            for c in range(k):
                dual[i, c] = target[i, c] - coef[i, c]
                active = (1.0 if coef[i, c] == upper[i, c] else 0.0) - (1.0 if coef[i, c] == lower[i, c] else 0.0)
                checksum += active * (i * k + c + 1)
            write_right(linear[i], coef[i], dual[i], rows_sum_to_zero, penalty, right[i])  # of the next step
        checksum = sum_of_team(checksum, memory)
        unchanged_steps = unchanged_steps + 1 if checksum == last else 0
        if unchanged_steps == patience:
            break
        last = checksum
    for i in range(thread(), n, threads()):
        for c in range(k):
            side[i, c] = 1 if coef[i, c] == upper[i, c] else (-1 if coef[i, c] == lower[i, c] else 0)
    wait_for_team()


@kernel
@no_type_check
def search(task, rows_sum_to_zero, settings, coef, row_multipliers, side, factors, work, memory):
    """`active_set.search`, for one task."""
    regularization, refinements, max_rounds = settings
    gram, linear, lower, upper, smoothing = task
    bound_values, right, residual, x, sums, row_sum_residual, solve_work = work
    n, k = linear.shape
    rounds = 0
    while True:
        rounds += 1
        for i in range(thread(), n, threads()):
            total = 0.0
            for c in range(k):
                s = side[i, c]
                bound_values[i, c] = upper[i, c] if s > 0 else (lower[i, c] if s < 0 else 0.0)
                x[i, c] = coef[i, c] if s == 0 else 0.0
                total += bound_values[i, c]
            sums[i] = -total
        wait_for_team()
        factorize(gram, smoothing, rows_sum_to_zero, side, factors, regularization, solve_work[0])
        multiply(gram, bound_values, right)
        for i in range(thread(), n, threads()):
            for c in range(k):
                right[i, c] = linear[i, c] - right[i, c]
        wait_for_team()
        compute_residual(gram, smoothing, right, sums, x, row_multipliers, residual, row_sum_residual)
        solve_factorized(rows_sum_to_zero, residual, row_sum_residual, x, row_multipliers, factors, solve_work)
        compute_residual(gram, smoothing, right, sums, x, row_multipliers, residual, row_sum_residual)
        changed = 0.0
        for i in range(thread(), n, threads()):
            for c in range(k):
                bound_multiplier = residual[i, c] - smoothing[i, c] * bound_values[i, c]
                coef[i, c] = x[i, c] + bound_values[i, c]
                s = 0
                if upper[i, c] - coef[i, c] < bound_multiplier or lower[i, c] == upper[i, c]:
                    s = 1
                elif coef[i, c] - lower[i, c] < -bound_multiplier:
                    s = -1
                if s != side[i, c]:
                    changed = 1.0
                    if rounds < max_rounds:
                        side[i, c] = s
        if max_of_team(changed, memory) == 0.0 or rounds == max_rounds:
            break
    for refinement in range(refinements):
        if refinement > 0:
            compute_residual(gram, smoothing, right, sums, x, row_multipliers, residual, row_sum_residual)
        solve_factorized(rows_sum_to_zero, residual, row_sum_residual, x, row_multipliers, factors, solve_work)
    for i in range(thread(), n, threads()):
        for c in range(k):
            coef[i, c] = x[i, c] + bound_values[i, c]
    wait_for_team()
    return rounds


@kernel
@no_type_check
def certify(task, rows_sum_to_zero, coef, row_multipliers, bound_multipliers, limits, scores, memory):
    """`certificate.certify`, for coefficients that need no projection except for clipping.

    Returns the relative gap; twice the gap relative to the squared norm of the weights, which bounds the squared
    relative error of the weights; the largest change by clipping; the largest row sum after clipping; and an upper
    bound of the effect of rounding, relative to the objective.
    """
    indefiniteness, eps, tiny = limits
    gram, linear, lower, upper, smoothing = task
    n, k = linear.shape
    largest, moved, violation = 1.0, 0.0, 0.0
    for i in range(thread(), n, threads()):
        total = 0.0
        for c in range(k):
            value = min(max(coef[i, c], lower[i, c]), upper[i, c])
            moved = max(moved, abs(coef[i, c] - value))
            largest = max(largest, abs(value))
            coef[i, c] = value
            total += value
        if rows_sum_to_zero:
            violation = max(violation, abs(total))
    wait_for_team()
    multiply(gram, coef, scores)
    gap, primal, quadratic, squares, diagonal, reach, cost = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for i in range(thread(), n, threads()):
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
            bound = max(bound, abs(at))
            for value in (abs(lower[i, c]), abs(upper[i, c])):
                if value < np.inf:
                    bound = max(bound, value)
        gap += max(distance, 0.0)
        cost += length * bound
    gap, primal = sum_of_team(gap, memory), sum_of_team(primal, memory)
    quadratic, squares = sum_of_team(quadratic, memory), sum_of_team(squares, memory)
    diagonal, reach, cost = sum_of_team(diagonal, memory), sum_of_team(reach, memory), sum_of_team(cost, memory)
    largest, moved = max_of_team(largest, memory), max_of_team(moved, memory)
    violation = max_of_team(violation, memory)
    if quadratic < -indefiniteness * diagonal * squares:
        gap = np.inf
    quadratic = max(quadratic, 0.0)
    primal += quadratic / 2
    size = max(abs(primal), eps)
    return gap / size, 2 * gap / max(quadratic, tiny), moved / largest, violation / largest, eps * reach * cost / size


@kernel
@no_type_check
def rescale(task, inner, memory):
    """`rescaling.rescale`, written to `inner`; returns the two scales and the curvature of the rescaled problem."""
    gram, linear, lower, upper, smoothing = task
    n, k = linear.shape
    multiplier_scale, bound, curvature = 0.0, 0.0, 0.0
    for i in range(thread(), n, threads()):
        curvature += gram[i, i] / n
        for c in range(k):
            multiplier_scale = max(multiplier_scale, abs(linear[i, c]))
            curvature += smoothing[i, c] / (n * k)
            for value in (abs(lower[i, c]), abs(upper[i, c])):
                if value < np.inf:
                    bound = max(bound, value)
    multiplier_scale, bound = max_of_team(multiplier_scale, memory), max_of_team(bound, memory)
    curvature = sum_of_team(curvature, memory)
    if not multiplier_scale > 0:
        multiplier_scale = 1.0
    coef_scale = multiplier_scale / curvature if curvature > 0 else np.inf
    if bound > 0:
        coef_scale = min(coef_scale, bound)
    if not coef_scale < np.inf:
        coef_scale = 1.0
    hessian_scale = coef_scale / multiplier_scale
    for i in range(thread(), n, threads()):
        for j in range(n):
            inner[0][i, j] = hessian_scale * gram[i, j]
        for c in range(k):
            inner[1][i, c] = linear[i, c] / multiplier_scale
            inner[2][i, c] = lower[i, c] / coef_scale
            inner[3][i, c] = upper[i, c] / coef_scale
            inner[4][i, c] = hessian_scale * smoothing[i, c]
    wait_for_team()
    return coef_scale, multiplier_scale, hessian_scale * curvature


@kernel
@no_type_check
def begin_at(coef, bound_multipliers, row_multipliers, task, scales, zero_multiplier, side, memory):
    """Rescale a warm start in place, and write the active set that `WarmStart.at_bounds` implies to `side`."""
    _, linear, lower, upper, _ = task
    coef_scale, multiplier_scale = scales
    n, k = linear.shape
    largest = 0.0
    for i in range(thread(), n, threads()):
        row_multipliers[i] /= multiplier_scale
        for c in range(k):
            largest = max(largest, abs(linear[i, c]))
    largest = max_of_team(largest, memory)
    for i in range(thread(), n, threads()):
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
    wait_for_team()


@kernel
@no_type_check
def solve_tasks_of_team(start, stop, problem, options, results, system, factors, work):
    """Rescale, solve and certify tasks `start` to `stop`.

    With `has_start`, each begins at the coefficients and multipliers in the `results`. Otherwise, it begins at the
    solution of the task before, if both are in the same path. If such a search fails, another one begins from scratch.
    """
    gram, linear, lower, upper, smoothing = problem
    rows_sum_to_zero, has_start, path_length, settings, tolerances = options
    penalty_ratio, admm_settings, search_settings, zero_multiplier = settings
    tolerance, zero_gap, feasibility, row_sum_tolerance, limits = tolerances
    coef, bound_multipliers, row_multipliers, side, gaps, rounds, scales, proven = results
    scaled_gram, scaled_smoothing = system
    blocks, index, count, schur = factors
    inner_linear, inner_lower, inner_upper, admm_work, search_work, memory = work
    n, k = linear.shape[1:]
    regularization, refinements, max_rounds, warm_rounds = search_settings
    for t in range(start, stop):
        inner = (scaled_gram[t], inner_linear, inner_lower, inner_upper, scaled_smoothing[t])
        task = (gram[t], linear[t], lower[t], upper[t], smoothing[t])
        coef_scale, multiplier_scale, curvature = rescale(task, inner, memory)
        searches, is_proven, done = 1, False, 0
        if has_start:
            searches = 2
        elif t % path_length > 0 and proven[t - 1]:
            searches = 2
            for i in range(thread(), n, threads()):
                row_multipliers[t, i] = row_multipliers[t - 1, i]
                for c in range(k):
                    coef[t, i, c] = coef[t - 1, i, c]
                    bound_multipliers[t, i, c] = bound_multipliers[t - 1, i, c]
            wait_for_team()
        task_factors = (blocks[t], index[t], count[t], schur[t])
        gap, violation, rounding = np.inf, np.inf, 0.0
        while searches > 0 and not is_proven:
            searches -= 1
            if searches > 0:
                task_scales, limit = (coef_scale, multiplier_scale), warm_rounds
                begin_at(
                    coef[t],
                    bound_multipliers[t],
                    row_multipliers[t],
                    inner,
                    task_scales,
                    zero_multiplier,
                    side[t],
                    memory,
                )
            else:
                limit = max_rounds
                penalty = penalty_ratio * (curvature if curvature > 0 else 1.0)
                admm(inner, rows_sum_to_zero, penalty, admm_settings, coef[t], side[t], admm_work, memory)
                for i in range(thread(), n, threads()):
                    row_multipliers[t, i] = 0.0
                wait_for_team()
            settings = regularization, refinements, limit
            done += search(
                inner,
                rows_sum_to_zero,
                settings,
                coef[t],
                row_multipliers[t],
                side[t],
                task_factors,
                search_work,
                memory,
            )
            gap, squared_error, moved, violation, rounding = certify(
                inner,
                rows_sum_to_zero,
                coef[t],
                row_multipliers[t],
                bound_multipliers[t],
                limits,
                search_work[0],
                memory,
            )
            is_proven = (
                gap <= tolerance
                and (squared_error <= tolerance or gap <= zero_gap)
                and moved <= feasibility
                and violation <= row_sum_tolerance
            )
        if thread() == 0:
            gaps[t, 0], gaps[t, 1], gaps[t, 2], scales[t] = gap, violation, rounding, coef_scale / multiplier_scale
            rounds[t], proven[t] = done, is_proven
        for i in range(thread(), n, threads()):
            row_multipliers[t, i] *= multiplier_scale
            for c in range(k):
                coef[t, i, c] *= coef_scale
                bound_multipliers[t, i, c] *= multiplier_scale
        wait_for_team()


@kernel
@no_type_check
def divide_memory(matrices, vectors, local, flat, inverse, memory):
    """What `solve_tasks_of_team` takes as `work`. `flat` and `inverse` are the same memory, for n x n numbers."""
    admm_work = flat, inverse, matrices[3], matrices[4], matrices[5], matrices[6], vectors[0]
    solve_work = local, matrices[7], vectors[1]
    search_work = matrices[3], matrices[4], matrices[5], matrices[6], vectors[2], vectors[3], solve_work
    return matrices[0], matrices[1], matrices[2], admm_work, search_work, memory


MATRICES, VECTORS = 8, 4
"""How many n x k matrices and vectors of n numbers `divide_memory` takes."""


@kernel
@no_type_check
def solve_tasks(start, stop, problem, options, results, system, factors):
    """`solve_tasks_of_team` on the CPU, with memory of its own."""
    n, k = problem[1].shape[1:]
    matrices, vectors, inverse = np.empty((MATRICES, n, k)), np.empty((VECTORS, n)), np.empty((n, n))
    local, memory = np.empty((1, n)), np.empty(1)
    work = divide_memory(matrices, vectors, local, inverse.reshape(n * n), inverse, memory)
    solve_tasks_of_team(start, stop, problem, options, results, system, factors, work)
