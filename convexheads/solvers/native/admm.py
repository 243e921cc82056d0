"""The solver for problems with very many classes."""

from __future__ import annotations

from itertools import accumulate

import torch

from convexheads._validation import check_positive_int
from convexheads.solvers.base import Solver, SolverResult
from convexheads.solvers.certificate import aim, certify
from convexheads.solvers.failures import OnFailure
from convexheads.solvers.kkt import with_gram_factor
from convexheads.solvers.native.active_set import is_proven, of_projection, polish, search
from convexheads.solvers.native.admm_steps import admm
from convexheads.solvers.problem import DualProblem

_MAX_ITERATIONS = 600
# The first search for the active set starts when all gaps are below this value, the next one at a tenth, and so on.
_FIRST_SEARCH_GAP = 1e-3


class ADMMSolver(Solver):
    """ADMM (Boyd et al. 2011), with a few rounds of active-set Newton at the end, which make the solution exact.

    Use it for problems with very many classes: a class needs no n x n matrix, only an m x m matrix for its m free rows.
    The gradient is exact, to any order, if the active set is right.

    Args:
        max_iterations: as in `Solver`. Default None (until converged, at most 600). Only steps of ADMM count.
        tolerance: as in `Solver`; the iteration ends at a thousandth of it.
        on_failure: as in `Solver`.
        steps: number of ADMM steps between two certificates. Default 10.
        max_rounds: number of rounds of active-set Newton after each block of steps. Default 3.

    Example:
        `SVMHead(solver=ADMMSolver())`
    """

    def __init__(
        self,
        *,
        max_iterations: int | None = None,
        tolerance: float | None = None,
        on_failure: OnFailure = "raise",
        steps: int = 10,
        max_rounds: int = 3,
    ) -> None:
        super().__init__(max_iterations=max_iterations, tolerance=tolerance, on_failure=on_failure)
        name = type(self).__name__
        self.steps = check_positive_int(f"{name}(steps)", steps)
        self.max_rounds = check_positive_int(f"{name}(max_rounds)", max_rounds)

    def solve_batch(self, problem: DualProblem) -> SolverResult:
        problem = with_gram_factor(problem)
        tolerance, limit = aim(self.tolerance, problem.linear.dtype), self.max_iterations or _MAX_ITERATIONS
        blocks = [self.steps] * (limit // self.steps) + [limit % self.steps] * (limit % self.steps > 0)
        solution = torch.zeros_like(problem.linear)
        search_gap = torch.full_like(solution[:, 0, 0], _FIRST_SEARCH_GAP)
        iterations = torch.full_like(search_gap, limit, dtype=torch.long)
        solved = torch.zeros_like(search_gap, dtype=torch.bool)
        iterates = zip(accumulate(blocks), admm(problem, blocks), strict=True)
        while True:
            taken, iterate = next(iterates)
            is_due = ~solved & ((certify(problem, iterate.coef).gap <= search_gap) | (taken == limit))
            if not is_due.any():
                continue
            coef, active_set, _ = search(problem, iterate, max_rounds=self.max_rounds)
            certificate = certify(problem, coef)
            found = is_due & is_proven(certificate, tolerance)
            solution = torch.where(found[:, None, None], coef, solution)
            iterations, solved = torch.where(found, taken, iterations), solved | found
            search_gap = torch.where(is_due, search_gap / 10, search_gap)
            if solved.all() or taken == limit:
                break
        if not found.all():  # the active set and the certificate of the last search are not those of all tasks
            active_set, certificate = polish(problem, torch.where(solved[:, None, None], solution, iterate.coef))
        certificate = of_projection(certificate)
        return SolverResult(certificate.feasible, iterations, certificate, active_set)
