"""The active-set solver on the CPU, by kernels that Numba compiles. They solve and certify problems task by task.

For small tasks, PyTorch spends more time on calls than on arithmetic. Here a task is one compiled loop: rescaling, a
few steps of ADMM, the search for the active set, and the certificate. Tasks run in parallel. A class with m free
coefficients costs the inverse of one m x m matrix.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import count
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
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


def solve(
    problem: DualProblem, tolerance: float, *, max_rounds: int, warm_rounds: int, refinements: int
) -> LinearizedSolution:
    """Solve a flat batch of problems in float64, in their original units.

    Tasks that are not certified to the tolerance have the status `FAILED`. On the CPU, their coefficients are NaN.
    """
    data, is_on_cpu = _tensors(problem), _is_on_cpu(problem.linear)
    tasks, n, k = shape = data[1].shape
    empty: Callable[..., Any] = np.empty if is_on_cpu else partial(_empty_tensor, data[1].device)
    unknowns = empty(shape), empty(shape), empty((tasks, n))
    if problem.start is not None:
        begin = problem.start.map(lambda _, value: value.clone(memory_format=torch.contiguous_format))
        unknowns = tuple(vars(begin).values())
        unknowns = _as_arrays(unknowns) if is_on_cpu else unknowns
    outcome = empty((tasks, 3)), empty(tasks, "int64"), empty(tasks), empty(tasks, "bool")
    results: tuple[Any, ...] = (*unknowns, empty(shape, "int8"), *outcome)
    system: tuple[Any, ...] = empty((tasks, n, n)), empty(shape)
    factors = allocate_factors(tasks, n, k, empty)
    search_settings = REGULARIZATION, refinements, max_rounds, warm_rounds
    settings = admm_steps.PENALTY, _ADMM_SETTINGS, search_settings, ZERO_MULTIPLIER
    feasible = certificate.FEASIBILITY_TOLERANCE, feasible_rows.row_sum_tolerance(k)
    tolerances = certificate.aim(tolerance, torch.float64), certificate.ZERO_GAP, *feasible, _LIMITS
    fills_threads = is_on_cpu and problem.path_length * torch.get_num_threads() <= tasks
    path_length = problem.path_length if fills_threads else 1
    options = problem.rows_sum_to_zero, problem.start is not None, path_length, settings, tolerances
    if is_on_cpu:
        arguments = data, options, results, system, factors
        run_tasks(numba_kernels.solve_tasks, tasks, tasks * k * n**3, *arguments, at_once=path_length)
        _finish_on_cpu(problem, results, tolerance)
        results, system, factors = (tuple(map(torch.from_numpy, group)) for group in (results, system, factors))
    else:
        from convexheads.solvers.native import cuda_team

        cuda_team.solve_tasks(data, options, results, system, factors)
    coef, bound_multipliers, row_multipliers, side, gaps, rounds, scales, proven = results
    gap, violation, rounding = gaps.unbind(-1)
    if not is_on_cpu:  # where rounding matters, the gap is unknown, because computing it means to read values
        proven = proven & (rounding <= certificate.ROUNDING_MARGIN * certificate.ROUNDING_THRESHOLD)
    gap = gap + rounding
    solution = Solution(
        coef=coef,
        bound_multipliers=bound_multipliers,
        row_multipliers=row_multipliers,
        status=torch.where(proven, Status.CONVERGED.value, Status.FAILED.value),
        gap=gap,
        residual=violation,
        iterations=rounds,
    )
    kkt = NumbaKKT(*system, *factors, rows_sum_to_zero=problem.rows_sum_to_zero)
    return LinearizedSolution(solution, scales, ActiveSet(kkt, side > 0, side < 0))


def _finish_on_cpu(problem: DualProblem, results: tuple[np.ndarray, ...], tolerance: float) -> None:
    """Replace gaps that rounding affects, and the numbers of tasks that are then not proven by NaN."""
    coef, _, _, _, gaps, _, _, proven = results
    doubtful = proven & (gaps[:, 2] > certificate.ROUNDING_MARGIN * certificate.ROUNDING_THRESHOLD)
    if doubtful.any():
        chosen = torch.from_numpy(doubtful)
        rescaled, coef_scale, _ = rescale(problem.select(chosen))
        found = certificate.certify(rescaled, torch.from_numpy(coef[doubtful]) / coef_scale[:, None, None])
        found = certificate.account_for_rounding(rescaled, found)
        proven[doubtful] = found.converged(tolerance).numpy()
        gaps[doubtful, 0], gaps[doubtful, 2] = found.gap.numpy(), found.rounding.numpy()
    if not proven.all():
        coef[~proven], gaps[~proven, 0] = np.nan, np.nan


def factorize(
    problem: DualProblem, at_upper: Bool[Tensor, "tasks n k"], at_lower: Bool[Tensor, "tasks n k"]
) -> NumbaKKT:
    """`implicit.factorize_free` for a rescaled problem in float64."""
    tasks, n, k = problem.linear.shape
    gram, smoothing = problem.gram.contiguous(), problem.smoothing
    smoothing = gram.new_zeros(tasks, n, k) if smoothing is None else smoothing.contiguous()
    side = at_upper.to(torch.int8) - at_lower.to(torch.int8)
    if _is_on_cpu(gram):
        factors = allocate_factors(tasks, n, k)
        arguments = (gram, smoothing), side, problem.rows_sum_to_zero, factors, REGULARIZATION
        run_tasks(numba_kkt.factorize_tasks, tasks, tasks * k * n**3, *arguments)
        factors = tuple(map(torch.from_numpy, factors))
    else:
        from convexheads.solvers.native import cuda_team

        factors = allocate_factors(tasks, n, k, partial(_empty_tensor, gram.device))
        cuda_team.factorize_tasks((gram, smoothing), side, problem.rows_sum_to_zero, factors, REGULARIZATION)
    return NumbaKKT(gram, smoothing, *factors, rows_sum_to_zero=problem.rows_sum_to_zero)


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
        right, sums = right.mT.contiguous(), sums.contiguous()
        x, row_multipliers = torch.zeros_like(right), torch.zeros_like(sums)
        system = self.gram.contiguous(), self.smoothing.contiguous()
        factors = self.blocks, self.index, self.count, self.schur
        options, unknowns = (self.rows_sum_to_zero, refinements), (x, row_multipliers)
        arguments = system, (right, sums), options, unknowns, factors
        if _is_on_cpu(x):
            run_tasks(numba_kkt.solve_systems, len(x), 10 * x.numel() * x.shape[1], *arguments)
        else:
            from convexheads.solvers.native import cuda_team

            cuda_team.solve_systems(*arguments)
        return x.mT, row_multipliers


def run_tasks(loop: Any, tasks: int, operations: int, *arguments: Any, at_once: int = 1) -> None:
    """Run a kernel for the CPU over all tasks, in as many threads as PyTorch has if the work is large enough.

    The threads are not those of Numba, because OpenMP threads cannot be used from a forked process, such as the worker
    of a data loader. Each thread takes the next task when it has finished one, or the next `at_once` tasks.
    """
    arguments = tuple(map(_as_arrays, arguments))
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


def allocate_factors(tasks: int, n: int, k: int, empty: Callable[..., Any] = np.empty) -> tuple[Any, ...]:
    """Memory for the factors. The operating system provides each page when it is first written to."""
    integers = empty((tasks, k, n), "int64"), empty((tasks, k), "int64")
    return empty((tasks, k, n * n)), *integers, empty((tasks, n, n))


def _is_on_cpu(tensor: Tensor) -> bool:
    return tensor.is_cpu


def _empty_tensor(device: torch.device, shape: Any, dtype: str = "float64") -> Tensor:
    return torch.empty(shape, dtype=getattr(torch, dtype), device=device)


def _tensors(problem: DualProblem) -> tuple[Tensor, ...]:
    """The data of a problem, with values for what it lacks."""

    def tensor(value: Tensor | None, missing: float = 0.0) -> Tensor:
        return problem.linear.new_full(problem.linear.shape, missing) if value is None else value.contiguous()

    lower, upper = tensor(problem.lower, -torch.inf), tensor(problem.upper, torch.inf)
    return tensor(problem.gram), tensor(problem.linear), lower, upper, tensor(problem.smoothing)


def _as_arrays(argument: Any) -> Any:
    if isinstance(argument, tuple):
        return tuple(map(_as_arrays, argument))
    return argument.numpy() if isinstance(argument, Tensor) else argument
