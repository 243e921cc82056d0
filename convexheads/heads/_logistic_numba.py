"""Logistic regression on the CPU, by kernels that Numba compiles: the twin of `_logistic_newton.solve` for small tasks.

For small tasks, PyTorch spends more time on calls than on arithmetic. Here a task is one compiled loop.
"""

from __future__ import annotations

import math
from typing import no_type_check

import numpy as np
import torch
from torch import Tensor

from convexheads.solvers import certificate
from convexheads.solvers.native.numba_backend import run_tasks
from convexheads.solvers.native.numba_kkt import cholesky, cholesky_solve, invert
from convexheads.solvers.native.team import kernel

_STEPS = 5
"""The typical number of steps."""
_SMALL_P = 1e-290
"""Below this probability, a ratio of probabilities may overflow."""
LIMITS = certificate.INDEFINITENESS, torch.finfo(torch.float64).tiny


@kernel
@no_type_check
def evaluate_loss(targets, scores, p, slope):
    """`CrossEntropy.evaluate` of one example; returns the loss."""
    k = len(scores)
    largest, own = -np.inf, 0.0
    for c in range(k):
        largest = max(largest, scores[c])
        own += targets[c] * scores[c]
    total, wrong = 0.0, 0.0
    for c in range(k):
        p[c] = math.exp(scores[c] - largest)
        total += p[c]
        if not targets[c] > 0:
            wrong += p[c]
    # Without wrong classes, or if they are too improbable for a number, this is minus infinity, and there is no loss.
    log_wrong = math.log(wrong) + (largest - own)
    wrong /= total
    for c in range(k):
        p[c] /= total
        slope[c] = (0.0 if targets[c] > 0 else p[c]) - targets[c] * wrong
    return max(log_wrong, 0.0) + math.log1p(math.exp(-abs(log_wrong)))


@kernel
@no_type_check
def balance(scores, p, slope, sample_weight, change):
    """`CrossEntropy.balance`; returns what it adds to the gap."""
    n, k = p.shape
    fraction, share = np.empty(k), np.empty(k)
    total = 0.0
    for c in range(k):
        excess, mass = 0.0, 0.0
        for i in range(n):
            excess += sample_weight[i] * slope[i, c]
            mass += sample_weight[i] * p[i, c]
        total += max(excess, 0.0)
        fraction[c] = max(excess, 0.0) / (mass if mass != 0 else 1.0)
        share[c] = max(-excess, 0.0)
    lost = 0.0
    for i in range(n):
        received, smallest, log_total = 0.0, 1.0, 0.0
        for c in range(k):
            received += fraction[c] * p[i, c]
            smallest = min(smallest, p[i, c])
        if smallest < _SMALL_P:
            log_total = log_sum_exp(scores[i])
        for c in range(k):
            change[i, c] = received * (share[c] / (total if total != 0 else 1.0)) - fraction[c] * p[i, c]
            lost += sample_weight[i] * divergence(p[i, c], scores[i, c] - log_total, change[i, c])
    return lost


@kernel
@no_type_check
def log_sum_exp(scores):
    """The logarithm of the sum of exponentials, without overflow."""
    largest, total = scores.max(), 0.0
    for c in range(len(scores)):
        total += math.exp(scores[c] - largest)
    return largest + math.log(total)


@kernel
@no_type_check
def divergence(p, log_p, change):
    """`_losses.divergence`; the logarithm is used only for small p."""
    q = p + change
    if not q > 0:
        return -change
    if p < _SMALL_P:
        return q * math.log(q) - q * log_p - change
    return q * math.log1p(max(change / p, -1.0)) - change


@kernel
@no_type_check
def evaluate(task, intercept, coef, bias, point, limits):
    """`_logistic_newton.evaluate`, written to `point`; returns the objective, the relative gap and the error."""
    indefiniteness, tiny = limits
    gram, targets, sample_weight, offset = task
    p, residual, image = point
    n, k = coef.shape
    scores, slope, change = np.empty((n, k)), np.empty((n, k)), np.zeros((n, k))
    first = np.dot(gram, coef)
    loss, lost, quadratic, distance, diagonal, squares, other_squares = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for i in range(n):
        diagonal += abs(gram[i, i])
        for c in range(k):
            scores[i, c] = first[i, c] + (offset[i, c] + bias[c])
            quadratic += coef[i, c] * first[i, c]
            squares += coef[i, c] * coef[i, c]
        loss += sample_weight[i] * evaluate_loss(targets[i], scores[i], p[i], slope[i])
        for c in range(k):
            residual[i, c] = coef[i, c] + sample_weight[i] * slope[i, c]
    image[:] = np.dot(gram, residual)
    if intercept:
        lost = balance(scores, p, slope, sample_weight, change)
    for i in range(n):
        for c in range(k):
            change[i, c] = residual[i, c] + sample_weight[i] * change[i, c]
            other_squares += change[i, c] * change[i, c]
    second = np.dot(gram, change) if intercept else image
    for i in range(n):
        for c in range(k):
            distance += change[i, c] * second[i, c]
    value = quadratic / 2 + loss
    gap = lost + max(distance, 0.0) / 2
    negative = -indefiniteness * diagonal
    if quadratic < negative * squares or distance < negative * other_squares:
        gap = np.inf
    return value, gap / max(value, tiny), 2 * gap / max(quadratic, tiny)


@kernel
@no_type_check
def apply_operator(blocks, total, right, result):
    """`SoftmaxKKT._apply`."""
    k, n = right.shape
    row = np.zeros(n)
    for c in range(k):
        for i in range(n):
            result[c, i] = 0.0
            for j in range(n):
                result[c, i] += blocks[c, i, j] * right[c, j]
            row[i] += result[c, i]
    cholesky_solve(total, row, n)
    for c in range(k):
        for i in range(n):
            for j in range(n):
                result[c, i] -= blocks[c, i, j] * row[j]


@kernel
@no_type_check
def factorize(gram, sample_weight, p, blocks, total):
    """`SoftmaxKKT.factorize`, without the border."""
    n, k = p.shape
    root, column = np.empty(n), np.empty(n)
    total[:] = 0.0
    for c in range(k):
        block = blocks[c]
        for i in range(n):
            curvature = sample_weight[i] * p[i, c]
            root[i] = math.sqrt(curvature) if curvature > 0 else 0.0
            for j in range(i + 1):
                block[i, j] = root[i] * gram[i, j] * root[j]
            block[i, i] += 1.0
        invert(block.reshape(n * n), n, column, False)
        for i in range(n):
            for j in range(n):
                block[i, j] *= root[i] * root[j]
                total[i, j] += block[i, j]
    for i in range(n):
        if not sample_weight[i] > 0:
            total[i, i] += 1.0
    cholesky(total, n)


@kernel
@no_type_check
def newton_step(task, intercept, coef, point, memory, change, bias_change):
    """`_logistic_newton.newton_step`."""
    p, residual, image = point
    blocks, total, right, solved, border = memory
    n, k = coef.shape
    factorize(task[0], task[2], p, blocks, total)
    right[:] = image.T
    apply_operator(blocks, total, right, solved)
    bias_change[:] = 0.0
    if intercept:
        sums, row, mean = np.empty((k, n)), np.empty(n), 0.0
        for c in range(k):
            for i in range(n):
                bias_change[c] += solved[c, i] - residual[i, c] + coef[i, c]
                sums[c, i] = blocks[c, i].sum()
        for c in range(k):
            row[:] = sums[c]
            cholesky_solve(total, row, n)
            for other in range(k):
                border[c, other] = -np.dot(sums[other], row)
            border[c, c] += sums[c].sum()
            mean += border[c, c] / k
        border += mean
        cholesky(border, k)
        cholesky_solve(border, bias_change, k)
        bias_change -= bias_change.mean()
        for c in range(k):
            right[c] = image[:, c] - bias_change[c]
        apply_operator(blocks, total, right, solved)
    for i in range(n):
        for c in range(k):
            change[i, c] = solved[c, i] - residual[i, c]


@kernel
@no_type_check
def judge(error, gap, progress, limits):
    """`BestIterate.update`; returns the progress, whether this iterate is the best one, and whether the task is done.

    The progress consists of the smallest error, the reference value and the number of iterates without progress.
    """
    tolerance, patience, zero_gap, small_gap = limits
    best, last_progress, without_progress = progress
    halved = error < last_progress / 2
    if halved:
        last_progress = error
    without_progress = 0 if halved or best > small_gap else without_progress + 1
    is_better = error < best
    if is_better:
        best = error
    is_done = error <= tolerance or gap <= zero_gap or without_progress >= patience or np.isnan(error)
    return (best, last_progress, without_progress), is_better, is_done


@kernel
@no_type_check
def solve_tasks(first, stop, data, intercept, has_start, path_length, settings, results):
    """The loop of `_logistic_newton.solve`, for tasks `first` to `stop`.

    With `has_start`, a task begins at the coefficients in the `results`. Otherwise, it begins at the solution of the
    task before, if both are in the same path. In any case, it begins at zero if the objective is smaller there.
    """
    gram, targets, sample_weight, offset = data
    max_steps, max_backtracks, limits, rounding = settings
    coefs, biases, gaps, errors, steps = results
    n, k = targets.shape[1:]
    memory = np.empty((k, n, n)), np.empty((n, n)), np.empty((k, n)), np.empty((k, n)), np.empty((k, k))
    point = np.empty((n, k)), np.empty((n, k)), np.empty((n, k))
    change, bias_change = np.empty((n, k)), np.empty(k)
    for t in range(first, stop):
        task = (gram[t], targets[t], sample_weight[t], offset[t])
        coef, bias = np.zeros((n, k)), np.zeros(k)
        value, gap, error = evaluate(task, intercept, coef, bias, point, rounding)
        if has_start or t % path_length > 0:
            start, start_bias = coefs[t if has_start else t - 1].copy(), np.zeros(k)
            if not has_start:
                start_bias[:] = biases[t - 1]
            at_zero = value
            value, gap, error = evaluate(task, intercept, start, start_bias, point, rounding)
            if value < at_zero:
                coef, bias = start, start_bias
            else:
                value, gap, error = evaluate(task, intercept, coef, bias, point, rounding)
        coefs[t] = coef
        progress = np.inf, np.inf, 0
        biases[t], gaps[t], steps[t] = bias, gap, 0
        for step in range(1, max_steps + 1):
            newton_step(task, intercept, coef, point, memory, change, bias_change)
            length, before = 1.0, value
            for attempt in range(max_backtracks + 1):
                if attempt == max_backtracks:
                    length = 0.0
                moved, moved_bias = coef + length * change, bias + length * bias_change
                value, gap, error = evaluate(task, intercept, moved, moved_bias, point, rounding)
                if not value > before + 1e-12 * abs(before):
                    break
                length /= 2
            coef, bias = moved, moved_bias
            progress, is_better, is_done = judge(error, gap, progress, limits)
            if is_better:
                coefs[t], biases[t], gaps[t] = coef, bias, gap
            steps[t] = step
            if is_done or attempt == max_backtracks:  # all further steps would be the same
                break
        errors[t] = progress[0]


def solve(
    task: tuple[Tensor, Tensor, Tensor, Tensor],
    start: Tensor | None,
    *,
    intercept: bool,
    path_length: int,
    settings: tuple[int, int, tuple[float, int, float, float]],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Solve a flat batch of tasks, a `_logistic_newton.Task` in float64 on the CPU, from zero or from `start`.

    The settings are the largest numbers of steps and of halvings of a step, and the limits of `judge`: the tolerance,
    the number of steps without progress, the gap at which weights count as zero, and the gap above which no task
    counts as stalled.
    """
    data = tuple(part.detach().contiguous().numpy() for part in task)
    tasks, n, k = data[1].shape
    given = task[1] if start is None else start
    coef = given.detach().clone(memory_format=torch.contiguous_format).numpy()
    results = coef, np.empty((tasks, k)), np.empty(tasks), np.empty(tasks), np.empty(tasks, np.int64)
    path_length = path_length if path_length * torch.get_num_threads() <= tasks else 1
    starts = start is not None, path_length
    arguments = (data, intercept, *starts, (*settings, LIMITS), results)
    run_tasks(solve_tasks, tasks, tasks * _STEPS * k * n**3, *arguments, at_once=path_length)
    found, bias, gap, error, taken = map(torch.from_numpy, results)
    return found, bias, gap, error, taken
