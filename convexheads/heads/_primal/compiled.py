"""Newton's method with conjugate gradients on the CPU, for the cross-entropy, by kernels that Numba compiles.

Each kernel is the twin of a function of the other modules. For small tasks, PyTorch spends more time on calls than on
arithmetic. Here a task is one compiled loop, whose products of matrices are those of BLAS.
"""

from __future__ import annotations

from typing import no_type_check

import numpy as np
import torch
from torch import Tensor

from convexheads.heads._logistic_newton import MAX_BACKTRACKS, PATIENCE, TINY_GAP
from convexheads.heads._logistic_numba import balance, evaluate_loss, judge
from convexheads.heads._primal import steps
from convexheads.heads._primal.problem import DAMPING, Problem
from convexheads.solvers.best_iterate import SMALL_GAP
from convexheads.solvers.native.numba_backend import run_tasks
from convexheads.solvers.native.team import kernel

_PRODUCTS = 50
"""The typical number of products of matrices."""
_MAX_BLOCK = 2**18
"""The largest product of the dimensions for which OpenBLAS uses one thread."""


@kernel
@no_type_check
def scores_of(features, weight, result):
    """The product of features and weights. OpenBLAS would use threads for larger blocks of rows, which are slower."""
    n, d = features.shape
    rows = max(1, _MAX_BLOCK // (d * weight.shape[1]))
    for first in range(0, n, rows):
        result[first : first + rows] = np.dot(features[first : first + rows], weight)


@kernel
@no_type_check
def moments_of(features, values, result):
    """The product of the transposed features and values of the examples."""
    n, d = features.shape
    rows = max(1, _MAX_BLOCK // (d * values.shape[1]))
    result[:] = 0.0
    for first in range(0, n, rows):
        result += np.dot(features[first : first + rows].T, values[first : first + rows])


@kernel
@no_type_check
def evaluate(task, intercept, weight, point, tiny):
    """`problem.evaluate`, written to `point`; returns the objective, the relative gap and the error."""
    features, targets, sample_weight, offset, penalty = task
    p, gradient = point
    n, k = targets.shape
    d = features.shape[1]
    penalized_rows = d - 1 if intercept else d
    scores, slope = np.empty((n, k)), np.empty((n, k))
    scores_of(features, weight, scores)
    loss, lost, quadratic, squares = 0.0, 0.0, 0.0, 0.0
    for i in range(n):
        for c in range(k):
            scores[i, c] += offset[i, c]
        loss += sample_weight[i] * evaluate_loss(targets[i], scores[i], p[i], slope[i])
    weighted = np.empty((n, k))
    for i in range(n):
        for c in range(k):
            weighted[i, c] = sample_weight[i] * slope[i, c]
    moments_of(features, weighted, gradient)
    for j in range(penalized_rows):
        for c in range(k):
            quadratic += penalty * weight[j, c] * weight[j, c]
            gradient[j, c] += penalty * weight[j, c]
    balanced = gradient
    if intercept:
        change = np.empty((n, k))
        lost = balance(scores, p, slope, sample_weight, change)
        for i in range(n):
            for c in range(k):
                change[i, c] *= sample_weight[i]
        balanced = np.empty((d, k))
        moments_of(features, change, balanced)
        balanced += gradient
    for j in range(penalized_rows):
        for c in range(k):
            squares += balanced[j, c] * balanced[j, c]
    value, gap = quadratic / 2 + loss, lost + squares / (2 * penalty)
    return value, gap / max(value, tiny), 2 * gap / max(quadratic, tiny)


@kernel
@no_type_check
def precondition(inverse, remainder, result):
    """Apply the preconditioner and center the classes; returns the inner product with the remainder."""
    d, k = remainder.shape
    size = 0.0
    for j in range(d):
        mean = 0.0
        for c in range(k):
            result[j, c] = remainder[j, c] * inverse[j, c]
            mean += result[j, c] / k
        for c in range(k):
            result[j, c] -= mean
            size += remainder[j, c] * result[j, c]
    return size


@kernel
@no_type_check
def conjugate_gradients(task, squares, penalties, p, right, tolerance, limit, tiny, solution):
    """`steps.conjugate_gradients`, written to `solution`; `right` is overwritten.

    `squares` are those of the features, and `penalties` those of the rows of the weights.
    """
    features, sample_weight = task[0], task[2]
    (n, k), d = p.shape, len(penalties)
    image, inverse, moved = np.empty((n, k)), np.empty((d, k)), np.empty((d, k))
    for i in range(n):
        for c in range(k):
            image[i, c] = sample_weight[i] * p[i, c] * (1 - p[i, c])
    moments_of(squares, image, inverse)
    for j in range(d):
        for c in range(k):
            inverse[j, c] = 1 / max(penalties[j] + inverse[j, c], tiny)
    solution[:] = 0.0
    remainder, direction, preconditioned = right, np.empty((d, k)), np.empty((d, k))
    size = precondition(inverse, remainder, direction)
    aim = tolerance * tolerance * size
    for _ in range(limit):
        if not size > aim:
            break
        scores_of(features, direction, image)
        for i in range(n):
            mean = 0.0
            for c in range(k):
                mean += p[i, c] * image[i, c]
            for c in range(k):
                image[i, c] = sample_weight[i] * p[i, c] * (image[i, c] - mean)
        moments_of(features, image, moved)
        curved = 0.0
        for j in range(d):
            for c in range(k):
                moved[j, c] += penalties[j] * direction[j, c]
                curved += direction[j, c] * moved[j, c]
        step, previous = size / curved, size
        for j in range(d):
            for c in range(k):
                solution[j, c] += step * direction[j, c]
                remainder[j, c] -= step * moved[j, c]
        size = precondition(inverse, remainder, preconditioned)
        ratio = size / previous
        for j in range(d):
            for c in range(k):
                direction[j, c] = preconditioned[j, c] + ratio * direction[j, c]


@kernel
@no_type_check
def minimize_tasks(first, stop, data, members, intercept, settings, results):
    """`minimize.minimize` with `steps.by_conjugate_gradients`, for tasks `first` to `stop`, from the `results`."""
    features, targets, sample_weight, offset, penalties = data
    max_steps, max_backtracks, limits, max_inner, forcing_bounds, damping, tiny = settings
    weights, steps = results
    n, d = features.shape[2:]
    k = targets.shape[3]
    point = np.empty((n, k)), np.empty((d, k))
    rows, change, right = np.empty(d), np.empty((d, k)), np.empty((d, k))
    squares, squared_group = np.empty((n, d)), -1
    for t in range(first, stop):
        group, member = t // members, t % members
        if group != squared_group:
            squares[:] = features[group, 0] * features[group, 0]
            squared_group = group
        # What all members share has one member.
        own_targets = targets[group, member % targets.shape[1]]
        own_weight = sample_weight[group, member % sample_weight.shape[1]]
        own_offset = offset[group, member % offset.shape[1]]
        penalty = penalties[group, member]
        task = (features[group, 0], own_targets, own_weight, own_offset, penalty)
        weight = weights[group, member].copy()
        p, gradient = point
        value, gap, error = evaluate(task, intercept, weight, point, tiny)
        progress, _, is_done = judge(error, gap, (np.inf, np.inf, 0), limits)
        step = 0
        while not is_done and step < max_steps:
            step += 1
            rows[:] = penalty
            if intercept:
                rows[d - 1] = damping * min(max(gap, 0.0), 1.0) * own_weight.sum()
            for j in range(d):
                right[j] = gradient[j].mean() - gradient[j]
            forcing = min(max(min(max(gap, 0.0), 1.0) ** 0.25, forcing_bounds[0]), forcing_bounds[1])
            conjugate_gradients(task, squares, rows, p, right, forcing, max_inner, tiny, change)
            length, before = 1.0, value
            for attempt in range(max_backtracks + 1):
                if attempt == max_backtracks:
                    length = 0.0
                moved = weight + length * change
                value, gap, error = evaluate(task, intercept, moved, point, tiny)
                if not value > before + 1e-12 * abs(before):
                    break
                length /= 2
            weight = moved
            progress, is_better, is_done = judge(error, gap, progress, limits)
            is_done |= attempt == max_backtracks  # all further steps would be the same
            if is_better:
                weights[group, member] = weight
        steps[group, member] = step


def minimize(problem: Problem, start: Tensor, tolerance: float, max_steps: int) -> tuple[Tensor, Tensor]:
    """Minimize groups of tasks in float64 on the CPU, whose weights begin at `start`, `(groups, members, d, k)`.

    Returns the weights of the smallest error, and the number of steps.
    """
    parts = problem.features, problem.targets, problem.sample_weight, problem.offset, problem.penalty
    data = tuple(part.detach().contiguous().numpy() for part in parts)
    groups, members, d, k = start.shape
    weight = start.detach().clone(memory_format=torch.contiguous_format).numpy()
    results = weight, np.empty((groups, members), np.int64)
    limits, tiny = (tolerance, PATIENCE, TINY_GAP, SMALL_GAP), torch.finfo(torch.float64).tiny
    settings = max_steps, MAX_BACKTRACKS, limits, steps.MAX_INNER, steps.FORCING, DAMPING, tiny
    tasks, n = groups * members, problem.features.shape[-2]
    run_tasks(minimize_tasks, tasks, tasks * _PRODUCTS * n * d * k, data, members, problem.intercept, settings, results)
    found, taken = map(torch.from_numpy, results)
    return found, taken
