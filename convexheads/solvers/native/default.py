"""The default solver, a composition of the others that depends on the size of the problem and its device."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor

from convexheads._functorch import is_transforming
from convexheads._validation import check_positive_int, check_real
from convexheads.solvers.base import Plan
from convexheads.solvers.failures import OnFailure
from convexheads.solvers.fallback import Fallback
from convexheads.solvers.implicit import factorize_free
from convexheads.solvers.kkt import KKT, with_gram_factor
from convexheads.solvers.native.active_set import ActiveSetSolver, Backend
from convexheads.solvers.native.admm import ADMMSolver
from convexheads.solvers.native.interior_point import InteriorPointSolver
from convexheads.solvers.problem import DualProblem

_MAX_BLOCK_ENTRIES = 2**28
# With at least this number of examples and a small rank, ADMM is faster on the CPU than active-set Newton, which
# inverts a large matrix for each class in each round.
_MIN_EXAMPLES_FOR_ADMM = 1000


class NativeSolver(Fallback):
    """The default solver: active-set Newton, and an interior-point method for the tasks that it does not solve.

    Use it unless there is a reason not to. It needs nothing but PyTorch, is the fastest and most precise solver here,
    and its gradient is exact (the implicit function theorem on the KKT conditions, Eq. 8 of Lee et al. 2019), to any
    order. A batch gives the same scores as solving tasks one by one, up to rounding.

    It is `Fallback(ActiveSetSolver(), InteriorPointSolver())`. If one n x n matrix per class would not fit into memory,
    it is `ADMMSolver()`. For a Gram matrix of small rank, such as that of many more examples than features, it is
    `Fallback(ADMMSolver(tolerance=1e-9), InteriorPointSolver())` in the same case and, on the CPU, from 1,000 examples.

    Args:
        tolerance: as in `Solver`; the solvers aim at a thousandth of it.
        on_failure: as in `Solver`.
        backend: as in `ActiveSetSolver`: "auto" (default), "torch", "numba" or "cuda". With Numba installed (the extra
            `numba`), "auto" uses compiled kernels on the CPU, which are many times faster for few-shot problems, and
            copies small problems on a GPU to the CPU. The first call takes about 15 seconds to compile the kernels,
            which are kept on disk. With "cuda" and `on_failure="return"`, problems on a GPU are solved by active-set
            Newton alone, so that nothing waits for the GPU.
        max_block_entries: largest number of entries that the n x n matrices of all classes may have together. Larger
            batches are divided; if a single task already has more, ADMM solves it. Default 2**28, which is 2 GB.

    Raises:
        MissingDependencyError: `backend` is "numba" or "cuda", and Numba or numba-cuda is not installed.

    Example:
        `SVMHead(solver=NativeSolver(on_failure="warn"))`
    """

    def __init__(
        self,
        *,
        tolerance: float | None = None,
        on_failure: OnFailure = "raise",
        backend: Backend = "auto",
        max_block_entries: int = _MAX_BLOCK_ENTRIES,
    ) -> None:
        if tolerance is not None:
            check_real("NativeSolver(tolerance)", tolerance, positive=True)
        self.first: ActiveSetSolver
        first = ActiveSetSolver(tolerance=tolerance, backend=backend)
        super().__init__(first, InteriorPointSolver(tolerance=tolerance), on_failure=on_failure)
        self.backend: Backend = backend
        self.max_block_entries = check_positive_int("NativeSolver(max_block_entries)", max_block_entries)
        self._admm = ADMMSolver(tolerance=tolerance)
        # If there is a gradient, an interior-point method follows, also for tasks of which ADMM finds the optimum, but
        # not the active set.
        self._strict_admm = ADMMSolver(tolerance=1e-3 * self.tolerance)

    def factorize(
        self, problem: DualProblem, at_upper: Bool[Tensor, "tasks n k"], at_lower: Bool[Tensor, "tasks n k"]
    ) -> KKT:
        if problem.linear.shape[-2] >= _MIN_EXAMPLES_FOR_ADMM:  # the rank may be small
            return factorize_free(problem, at_upper, at_lower)
        return super().factorize(problem, at_upper, at_lower)

    def plan(self, problem: DualProblem) -> Plan:
        plan = super().plan(problem)
        problem, (_, n, k) = plan.problem, problem.linear.shape
        tasks_at_once = self.max_block_entries // (k * n * n)
        if self.on_failure == "return" and self.first.runs_on_gpu(problem):
            # Whether another solver is needed would be a host read.
            return plan._replace(solvers=(self.first,), max_tasks=max(1, tasks_at_once))
        prefers_admm = not tasks_at_once or (n >= _MIN_EXAMPLES_FOR_ADMM and problem.linear.is_cpu)
        if prefers_admm and not is_transforming():  # inside `torch.func.vmap`, values cannot decide between solvers
            with torch.no_grad():
                factor = with_gram_factor(problem.detach()).gram_factor
            if factor is not None and k * n * factor.shape[-1] <= self.max_block_entries:
                problem = replace(problem, gram_factor=factor)
                attaches = problem.needs_derivative
                admm = self._strict_admm if attaches else self._admm
                return Plan(problem, (admm, self.then), tasks_at_once or None)
        return plan._replace(max_tasks=tasks_at_once) if tasks_at_once else Plan(problem, (self._admm,))
