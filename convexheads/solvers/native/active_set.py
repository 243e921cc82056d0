"""Active-set Newton: guess which coefficients are at a bound, solve for the others, correct the guess, repeat."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from convexheads._validation import check_choice, check_positive_int
from convexheads.errors import MissingDependencyError
from convexheads.solvers.base import LinearizedSolution, Plan, Solver, SolverResult
from convexheads.solvers.certificate import Certificate, aim, certify
from convexheads.solvers.failures import OnFailure
from convexheads.solvers.implicit import ActiveSet, active_entries, factorize_free
from convexheads.solvers.kkt import KKT
from convexheads.solvers.native.admm_steps import admm, ridge_step
from convexheads.solvers.problem import DualProblem, WarmStart

Backend = Literal["auto", "torch", "numba", "cuda"]
"""The implementation: PyTorch, kernels that Numba compiles for the CPU or also for GPUs, or a choice between them."""
MAX_ROUNDS = 12
REFINEMENTS = 2
# If a search from a warm start needs more rounds than this, another one from scratch is faster.
WARM_ROUNDS = 2
# Problems with at least this number of coefficients start from ADMM, and smaller ones from a ridge regression.
_MIN_SIZE_FOR_ADMM = 500
_ADMM_STEPS = 10
# On a GPU, one team of threads solves a whole task. Tasks with more examples are solved by PyTorch, with all threads.
_MAX_EXAMPLES_OF_TEAM = 128
# Larger problems on a GPU are not copied to the CPU. With up to 5 ways, copying and solving on the CPU is several times
# as fast as solving on the GPU; with more ways, it is slower.
_MAX_ENTRIES_TO_COPY = 2**23


class ActiveSetSolver(Solver):
    """Active-set Newton, the primal-dual active set method of Hintermueller, Ito & Kunisch (2002).

    Use it for few-shot problems that are not degenerate; it needs a few rounds and is exact to rounding. It may cycle,
    or find a singular system. If it cannot prove that the active set of a task is right, the coefficients are NaN
    (except with the backend "cuda"): combine it with another solver (`Fallback`), as `NativeSolver` does. The gradient
    is exact, to any order.

    Args:
        tolerance: as in `Solver`; an active set is accepted if its gap is at most a thousandth of it.
        on_failure: as in `Solver`.
        backend: "torch" solves all tasks at once on their device. "numba" solves them one by one with kernels compiled
            for the CPU, to which problems on a GPU are copied; it needs the extra `numba`. "cuda" runs the same kernels
            on the GPU on which the problems are, in one launch and without waiting for it, for tasks of up to 128
            examples; it needs the extra `cuda`. There, a task whose active set is not proven keeps its last iterate,
            with the status `FAILED`. "auto" (default) is "numba" if that is installed and faster, and "torch"
            otherwise.
        max_rounds: number of rounds after which the search gives up. Default 12.

    Raises:
        MissingDependencyError: `backend` is "numba" or "cuda", and Numba or numba-cuda is not installed.

    Example:
        `SVMHead(solver=ActiveSetSolver(on_failure="return"))`
    """

    def __init__(
        self,
        *,
        tolerance: float | None = None,
        on_failure: OnFailure = "raise",
        backend: Backend = "auto",
        max_rounds: int = MAX_ROUNDS,
    ) -> None:
        super().__init__(tolerance=tolerance, on_failure=on_failure)
        name = type(self).__name__
        check_choice(f"{name}(backend)", backend, get_args(Backend))
        if backend in ("numba", "cuda") and not numba_is_installed():
            raise MissingDependencyError("numba", extra=backend, needed_by=f"{name}(backend={backend!r})")
        if backend == "cuda" and find_spec("numba_cuda") is None:
            raise MissingDependencyError("numba-cuda", extra="cuda", needed_by=f"{name}(backend='cuda')")
        self.backend: Backend = backend
        self.max_rounds = check_positive_int(f"{type(self).__name__}(max_rounds)", max_rounds)

    def solve_batch(self, problem: DualProblem) -> SolverResult:
        if problem.start is None:
            return self._search(problem, _first_guess(problem), self.max_rounds)
        found = self._search(problem, problem.start.at_bounds(problem), min(WARM_ROUNDS, self.max_rounds))
        certificate, rounds = found.certificate, found.iterations
        assert certificate is not None
        assert rounds is not None
        unsolved = certificate.gap.isnan()
        if not unsolved.any():
            return found
        # The solved tasks begin at their solutions.
        solved = WarmStart(found.coef, certificate.bound_multipliers, certificate.row_multipliers)
        start = _first_guess(replace(problem, start=None)).where(~unsolved, solved)
        again = self._search(problem, start, self.max_rounds)
        assert again.iterations is not None
        return again._replace(iterations=rounds + torch.where(unsolved, again.iterations, 0))

    def _search(self, problem: DualProblem, start: WarmStart, max_rounds: int) -> SolverResult:
        """The result of a search, with NaN in tasks whose active set is not proven."""
        coef, active_set, rounds = search(problem, start, max_rounds=max_rounds)
        certificate = certify(problem, coef)
        unsolved = ~is_proven(certificate, aim(self.tolerance, coef.dtype))
        certificate = of_projection(certificate, gap=certificate.gap.masked_fill(unsolved, torch.nan))
        coef = certificate.feasible.masked_fill(unsolved[:, None, None], torch.nan)
        return SolverResult(coef, rounds, certificate, active_set)

    def plan(self, problem: DualProblem) -> Plan:
        if problem.linear.is_cpu:
            return super().plan(problem)
        tasks, n, k = problem.linear.shape
        is_faster = problem.linear.is_cuda and tasks * k * n * n <= _MAX_ENTRIES_TO_COPY and numba_is_installed()
        copies = is_faster if self.backend == "auto" else self.backend == "numba"
        return super().plan(problem.to("cpu") if copies else problem)

    def runs_on_gpu(self, problem: DualProblem) -> bool:
        """Whether kernels compiled for a GPU solve the `problem`."""
        linear = problem.linear
        fits = linear.dtype == torch.float64 and linear.numel() > 0 and linear.shape[-2] <= _MAX_EXAMPLES_OF_TEAM
        return self.backend == "cuda" and fits and _is_on_gpu(linear)

    def factorize(
        self, problem: DualProblem, at_upper: Bool[Tensor, "tasks n k"], at_lower: Bool[Tensor, "tasks n k"]
    ) -> KKT:
        if self._uses_kernels(problem):
            from convexheads.solvers.native import numba_backend

            return numba_backend.factorize(problem, at_upper, at_lower)
        return super().factorize(problem, at_upper, at_lower)

    def _uses_kernels(self, problem: DualProblem) -> bool:
        """Whether compiled kernels solve a flat `problem`."""
        linear = problem.linear
        fits = linear.is_cpu and linear.dtype == torch.float64 and len(linear) > 0 and numba_is_installed()
        return (self.backend != "torch" and fits) or self.runs_on_gpu(problem)

    def _solve_numerically(self, problem: DualProblem) -> LinearizedSolution:
        """The Numba kernels do all in one call; only the first guess differs (tests/unit/test_numba.py)."""
        if not self._uses_kernels(problem):
            return super()._solve_numerically(problem)
        from convexheads.solvers.native import numba_backend

        limits = {"max_rounds": self.max_rounds, "warm_rounds": min(WARM_ROUNDS, self.max_rounds)}
        return numba_backend.solve(problem, self.tolerance, **limits, refinements=REFINEMENTS)


def _is_on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _first_guess(problem: DualProblem) -> WarmStart:
    """Where a search begins without a warm start."""
    _, n, k = problem.linear.shape
    return ridge_step(problem) if n * k < _MIN_SIZE_FOR_ADMM else next(admm(problem, (_ADMM_STEPS,)))


def search(problem: DualProblem, start: WarmStart, *, max_rounds: int) -> tuple[Tensor, ActiveSet, Tensor]:
    """Search for the active set of a flat, rescaled batch. The first guess is the one that `start` implies.

    Returns the exact solution for the last active set (feasible up to rounding, if the active set is right), the active
    set, and the number of rounds.
    """
    coef, bound_multipliers, row_multipliers = start.coef, start.bound_multipliers, start.row_multipliers
    at_upper, at_lower = active_entries(problem, coef, bound_multipliers)
    rounds = torch.ones_like(coef[:, 0, 0], dtype=torch.long)
    this_round = 1
    while True:
        free = ~(at_upper | at_lower)
        fixed = problem.active_bounds(at_upper, at_lower)
        kkt = factorize_free(problem, at_upper, at_lower)
        right, sums = (problem.linear - problem.gram @ fixed).mT, -fixed.sum(-1)
        # If several solutions are optimal, starting from the last iterate leads to one close to it.
        moved, row_multipliers = kkt.refine(right, sums, torch.where(free, coef, 0).mT, row_multipliers, steps=1)
        coef = moved.mT + fixed
        if this_round == max_rounds:
            break
        bound_multipliers = problem.linear - problem.gradient(coef) - row_multipliers.unsqueeze(-1)
        new_upper, new_lower = active_entries(problem, coef, bound_multipliers)
        changed = ((new_upper != at_upper) | (new_lower != at_lower)).flatten(1).any(1)
        if not changed.any():
            break
        this_round += 1
        rounds = torch.where(changed, this_round, rounds)
        at_upper, at_lower = new_upper, new_lower
    moved, _ = kkt.refine(right, sums, moved, row_multipliers, steps=1 + REFINEMENTS)
    return moved.mT + fixed, ActiveSet(kkt, at_upper, at_lower), rounds


def polish(
    problem: DualProblem, coef: Float[Tensor, "tasks n k"], *, move: bool = True
) -> tuple[ActiveSet, Certificate]:
    """The active set that near-optimal coefficients of a flat, rescaled batch imply, and a certificate.

    The certificate belongs to the projection of `coef` or, with `move`, to the exact solution for the active set, if
    the gap of that solution is not larger.
    """
    certificate = certify(problem, coef)
    start = WarmStart(coef, certificate.bound_multipliers, certificate.row_multipliers)
    exact, active_set, _ = search(problem, start, max_rounds=1)
    other = certify(problem, exact)
    better = (other.gap <= certificate.gap) & other.is_feasible() & move
    return active_set, certificate.replace_tasks(better, other.select(better))


def is_proven(certificate: Certificate, tolerance: float) -> Tensor:
    """The tasks whose active set is right: the coefficients themselves, not only their projection, are optimal."""
    return certificate.certifies(tolerance) & certificate.is_feasible()


def of_projection(certificate: Certificate, **changes: Tensor) -> Certificate:
    """The certificate of the projection itself, for a solver that returns it."""
    return replace(certificate, residual=certificate.violation, **changes)


@cache
def numba_is_installed() -> bool:
    """Whether Numba is installed, and SciPy, whose BLAS Numba uses."""
    return None not in map(find_spec, ("numba", "scipy"))
