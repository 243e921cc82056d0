"""The active-set solver on the CPU, by kernels that Numba compiles. They solve and certify problems task by task.

For small tasks, PyTorch spends more time on calls than on arithmetic. Here a task is one compiled loop: rescaling, a
few steps of ADMM, the search for the active set, and the certificate. Tasks run in parallel. A class with m free
coefficients costs the inverse of one m x m matrix.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from convexheads.solvers import certificate, feasible_rows
from convexheads.solvers.base import LinearizedSolution
from convexheads.solvers.implicit import REGULARIZATION, ActiveSet
from convexheads.solvers.kkt import KKT
from convexheads.solvers.native import admm_steps, numba_kernels, numba_kkt
from convexheads.solvers.problem import ZERO_MULTIPLIER, DualProblem, Solution, Status
from convexheads.solvers.rescaling import rescale

_MAX_STEPS = 40
"""The largest number of steps of ADMM."""
_PATIENCE = 2
"""The search begins after this number of steps of ADMM without a change of the active set."""
# The approximate number of floating-point operations above which threads save time. After each PyTorch operation, the
# threads of PyTorch's own pool busy-wait for a while, and compete for the processors.
_MIN_FLOPS_FOR_THREADS = 1e7
_ADMM_SETTINGS = (_MAX_STEPS, _PATIENCE, admm_steps.OVER_RELAXATION, feasible_rows.NEWTON_TOLERANCE)
_FLOAT64 = torch.finfo(torch.float64)
_LIMITS = (certificate.INDEFINITENESS, _FLOAT64.eps, _FLOAT64.tiny)
_TOLERANCES = (certificate.ZERO_GAP, certificate.FEASIBILITY_TOLERANCE, feasible_rows.ROW_SUM_TOLERANCE, _LIMITS)


def solve(
    problem: DualProblem, tolerance: float, *, max_rounds: int, warm_rounds: int, refinements: int
) -> LinearizedSolution:
    """Solve a flat batch of problems in float64 on the CPU, in their original units.

    Tasks that are not certified to the tolerance have the status `FAILED`, and their coefficients are NaN.
    """
    data = _arrays(problem)
    tasks, n, k = shape = data[1].shape
    if problem.start is None:
        coef, bound_multipliers, row_multipliers = np.empty(shape), np.empty(shape), np.empty((tasks, n))
    else:
        begin = problem.start.map(lambda _, value: value.clone(memory_format=torch.contiguous_format))
        coef, bound_multipliers, row_multipliers = (value.numpy() for value in vars(begin).values())
    side, gaps, rounds = np.empty(shape, np.int8), np.empty((tasks, 3)), np.empty(tasks, np.int64)
    scales, proven = np.empty(tasks), np.empty(tasks, np.bool_)
    results = (coef, bound_multipliers, row_multipliers, side, gaps, rounds, scales, proven)
    system = np.empty((tasks, n, n)), np.empty(shape)
    factors = _allocate_factors(tasks, n, k)
    search_settings = REGULARIZATION, refinements, max_rounds, warm_rounds
    settings = admm_steps.PENALTY, _ADMM_SETTINGS, search_settings, ZERO_MULTIPLIER
    tolerances = (certificate.aim(tolerance, torch.float64), *_TOLERANCES)
    path_length = problem.path_length if problem.path_length * torch.get_num_threads() <= tasks else 1
    starts = problem.rows_sum_to_zero, problem.start is not None, path_length
    arguments = (data, *starts, settings, tolerances, results, system, factors)
    run_tasks(numba_kernels.solve_tasks, tasks, tasks * k * n**3, *arguments, at_once=path_length)
    coef = torch.from_numpy(coef)
    _account_for_rounding(problem, coef, gaps, proven, tolerance)
    if not proven.all():
        coef[torch.from_numpy(~proven)] = torch.nan
        gaps[~proven, 0] = np.nan
    gap, violation, _ = torch.from_numpy(gaps).unbind(-1)
    solution = Solution(
        coef=coef,
        bound_multipliers=torch.from_numpy(bound_multipliers),
        row_multipliers=torch.from_numpy(row_multipliers),
        status=torch.from_numpy(np.where(proven, Status.CONVERGED.value, Status.FAILED.value)),
        gap=gap,
        residual=violation,
        iterations=torch.from_numpy(rounds),
    )
    kkt = NumbaKKT(*map(torch.from_numpy, (*system, *factors)), rows_sum_to_zero=problem.rows_sum_to_zero)
    linearization = ActiveSet(kkt, torch.from_numpy(side > 0), torch.from_numpy(side < 0))
    return LinearizedSolution(solution, torch.from_numpy(scales), linearization)


def _account_for_rounding(
    problem: DualProblem, coef: Tensor, gaps: np.ndarray, proven: np.ndarray, tolerance: float
) -> None:
    """Replace gaps that rounding affects, and mark the tasks as not proven if these gaps exceed the tolerance."""
    doubtful = proven & (gaps[:, 2] > certificate.ROUNDING_MARGIN * certificate.ROUNDING_THRESHOLD)
    if doubtful.any():
        chosen = torch.from_numpy(doubtful)
        rescaled, coef_scale, _ = rescale(problem.select(chosen))
        found = certificate.certify(rescaled, coef[chosen] / coef_scale[:, None, None])
        found = certificate.account_for_rounding(rescaled, found)
        proven[doubtful], gaps[doubtful, 0] = found.converged(tolerance).numpy(), found.gap.numpy()


@dataclass(frozen=True, eq=False, repr=False)
class NumbaKKT(KKT):
    """The twin of `BlockKKT`. Each block has space for all n rows, but uses only the first `count` of its `index`."""

    gram: Float[Tensor, "tasks n n"]
    smoothing: Float[Tensor, "tasks n k"]
    blocks: Float[Tensor, "tasks k space"]
    index: Int[Tensor, "tasks k n"]
    count: Int[Tensor, "tasks k"]
    schur: Float[Tensor, "tasks n n"]
    rows_sum_to_zero: bool

    def solve(self, right: Tensor, sums: Tensor, *, refinements: int) -> tuple[Tensor, Tensor]:
        given, total = np.ascontiguousarray(right.mT.numpy()), np.ascontiguousarray(sums.numpy())
        x, row_multipliers = np.zeros_like(given), np.zeros_like(total)
        factors = tuple(value.numpy() for value in (self.blocks, self.index, self.count, self.schur))
        system = self.gram.contiguous().numpy(), self.smoothing.contiguous().numpy()
        arguments = (system, given, total, self.rows_sum_to_zero, refinements, x, row_multipliers, factors)
        run_tasks(numba_kkt.solve_systems, len(x), 10 * x.size * x.shape[1], *arguments)
        return torch.from_numpy(x).mT, torch.from_numpy(row_multipliers)


def run_tasks(loop: Any, tasks: int, operations: int, *arguments: Any, at_once: int = 1) -> None:
    """Run a kernel over all tasks, in as many threads as PyTorch has, if the work exceeds `_MIN_FLOPS_FOR_THREADS`.

    The threads are not those of Numba, because OpenMP threads cannot be used from a forked process, such as the worker
    of a data loader. Each thread takes the next task when it has finished one, or the next `at_once` tasks.
    """
    threads = min(torch.get_num_threads(), tasks)
    if threads < 2 or operations < _MIN_FLOPS_FOR_THREADS:
        return loop(0, tasks, *arguments)
    remaining = count()

    def work() -> None:
        while (first := next(remaining) * at_once) < tasks:
            loop(first, min(first + at_once, tasks), *arguments)

    others = [_pool().submit(work) for _ in range(threads - 1)]
    work()
    for other in others:
        other.result()


@cache
def _pool() -> ThreadPoolExecutor:
    """The threads of this process. They start when there is work for them."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="convexheads")


if hasattr(os, "register_at_fork"):  # threads do not survive a fork
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _allocate_factors(tasks: int, n: int, k: int) -> tuple[np.ndarray, ...]:
    """Memory for the factors. The operating system provides each page when it is first written to."""
    blocks, schur = np.empty((tasks, k, n * n)), np.empty((tasks, n, n))
    return blocks, np.empty((tasks, k, n), np.int64), np.empty((tasks, k), np.int64), schur


def _arrays(problem: DualProblem) -> tuple[np.ndarray, ...]:
    def array(value: Tensor | None, missing: float = 0.0) -> np.ndarray:
        return np.full(problem.linear.shape, missing) if value is None else value.contiguous().numpy()

    lower, upper = array(problem.lower, -np.inf), array(problem.upper, np.inf)
    return array(problem.gram), array(problem.linear), lower, upper, array(problem.smoothing)
