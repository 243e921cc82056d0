"""The native solver's fast path compiled for the CPU by Numba, from a problem to a proven solution, task by task.

For small tasks torch is bound by the number of its calls, not by arithmetic. Here a task is one compiled loop: units, a
few steps of splitting, the active-set search, and the certificate. Tasks run in parallel, and only the rows of the free
coefficients take part: a class with m of them costs one inverse of m x m. What isn't proven is left to the rest of the
native solver.
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
from jaxtyping import Bool, Float, Int
from torch import Tensor

from convexheads.solvers import loops
from convexheads.solvers.active_set import REFINEMENTS, REGULARISER, ActiveSet
from convexheads.solvers.kkt import KKT, BlockKKT
from convexheads.solvers.problem import BLURRED, QP, Solution, Status
from convexheads.solvers.splitting import PROXIMITY, RELAXATION

# Splitting goes on for so many steps at most; the search begins where so many have changed nothing of what is held.
_STEPS = 40
_PATIENCE = 2
# Floating-point operations, about, from which on threads pay: those of torch's pool spin for a while after each of its
# own operations, and are in the way.
_WORTH_THREADS = 1e7


def solve(qp: QP, *, aim: float, max_rounds: int) -> tuple[Solution, Float[Tensor, " tasks"], ActiveSet]:
    """Solve a flat batch of problems in any units.

    Returns:
        The solution; the scale of the active set's Hessian in that of `qp`; and the active set, with coefficients as in
            the solution. Where the status is not `CONVERGED` (nothing was proved to the precision `aim`), all of it is
            worthless.
    """
    problem = _arrays(qp)
    tasks, n, k = shape = problem[1].shape
    coef, pull, shift = np.empty(shape), np.empty(shape), np.empty((tasks, n))
    side, gaps, rounds = np.empty(shape, np.int8), np.empty((tasks, 3)), np.empty(tasks, np.int64)
    scale, proven = np.empty(tasks), np.empty(tasks, np.bool_)
    results = (coef, pull, shift, side, gaps, rounds, scale, proven)
    system = np.empty((tasks, n, n)), np.empty(shape)
    factors = _space(*shape)
    settings = (aim, PROXIMITY, _STEPS, _PATIENCE, RELAXATION, REGULARISER, REFINEMENTS, max_rounds)
    _run(loops.solve_all, tasks, tasks * k * n**3, problem, qp.row_sum, settings, results, system, factors)
    gap, violation, rounding = torch.from_numpy(gaps).unbind(-1)
    sure = torch.from_numpy(proven)
    doubtful = sure & (rounding > BLURRED / 100)
    if doubtful.any():
        units, unit, _ = qp.tasks(doubtful).in_units()
        certificate = units.certify(torch.from_numpy(coef)[doubtful] / unit[:, None, None])
        sure[doubtful] = units.allow_for_rounding(certificate).gap <= BLURRED
    solution = Solution(
        coef=torch.from_numpy(coef),
        bound_multipliers=torch.from_numpy(pull),
        row_multipliers=torch.from_numpy(shift),
        status=torch.from_numpy(np.where(proven, Status.CONVERGED.value, Status.FAILED.value)),
        gap=gap,
        residual=violation,
        iterations=torch.from_numpy(rounds),
    )
    kkt = CompiledKKT(*map(torch.from_numpy, (*system, *factors)), row_sum=qp.row_sum)
    found = ActiveSet(solution.coef, torch.from_numpy(side > 0), torch.from_numpy(side < 0), kkt)
    return solution, torch.from_numpy(scale), found


@dataclass(frozen=True)
class CompiledKKT(KKT):
    """The factors for one active set.

    Attributes:
        gram: shared by the classes.
        smoothing: added to each class's diagonal.
        blocks: the inverses of the classes' blocks, row by row, each where all n rows would have space.
        index: the rows that each block consists of.
        count: how many.
        schur: the Cholesky factor of the row sums' system.
        row_sum: whether there are row sums.
    """

    gram: Float[Tensor, "tasks n n"]
    smoothing: Float[Tensor, "tasks n k"]
    blocks: Float[Tensor, "tasks k space"]
    index: Int[Tensor, "tasks k n"]
    count: Int[Tensor, "tasks k"]
    schur: Float[Tensor, "tasks n n"]
    row_sum: bool

    @classmethod
    def like(cls, kkt: BlockKKT, free: Bool[Tensor, "tasks n k"]) -> CompiledKKT:
        """The same system with the same free entries, factorised again."""
        side, factors = (~free).to(torch.int8).contiguous().numpy(), _space(*free.shape)
        smoothing = torch.zeros(free.shape, dtype=torch.float64) if kkt.diagonal is None else kkt.diagonal.mT
        gram, smoothing, row_sum = kkt.gram.contiguous(), smoothing.contiguous(), kkt.schur is not None
        tasks, n, k = free.shape
        _run(
            loops.factorise_all,
            tasks,
            tasks * k * n**3,
            gram.numpy(),
            smoothing.numpy(),
            row_sum,
            side,
            REGULARISER,
            factors,
        )
        return cls(gram, smoothing, *map(torch.from_numpy, factors), row_sum=row_sum)

    def solve(
        self, right: Float[Tensor, "tasks k n"], sums: Float[Tensor, "tasks n"], *, refinements: int
    ) -> tuple[Float[Tensor, "tasks k n"], Float[Tensor, "tasks n"]]:
        given, total = np.ascontiguousarray(right.mT.numpy()), np.ascontiguousarray(sums.numpy())
        x, shift = np.zeros_like(given), np.zeros_like(total)
        factors = tuple(value.numpy() for value in (self.blocks, self.index, self.count, self.schur))
        system = self.gram.contiguous().numpy(), self.smoothing.contiguous().numpy()
        work = 10 * x.size * x.shape[1]
        _run(loops.adjoint_all, len(x), work, system, given, total, self.row_sum, refinements, x, shift, factors)
        return torch.from_numpy(x).mT, torch.from_numpy(shift)


def _run(loop: Any, tasks: int, operations: int, *arguments: Any) -> None:
    """Run a loop over all tasks; in threads of torch's number where so many floating-point operations are worth it.

    Threads of our own and not Numba's: those of OpenMP can't be used from a forked process, such as a worker of a data
    loader. Each takes the next task when it is done with one.
    """
    threads = min(torch.get_num_threads(), tasks)
    if threads < 2 or operations < _WORTH_THREADS:
        return loop(0, tasks, *arguments)
    remaining = count()

    def work() -> None:
        while (task := next(remaining)) < tasks:
            loop(task, task + 1, *arguments)

    others = [_pool(threads - 1, os.getpid()).submit(work) for _ in range(threads - 1)]
    work()
    for other in others:
        other.result()


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Of this process: threads don't survive a fork."""
    return ThreadPoolExecutor(threads, thread_name_prefix="convexheads")


def _space(tasks: int, n: int, k: int) -> tuple[np.ndarray, ...]:
    """Where factors go; of the blocks' space, only what is written to is ever taken from the system."""
    return (
        np.empty((tasks, k, n * n)),
        np.empty((tasks, k, n), np.int64),
        np.empty((tasks, k), np.int64),
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
