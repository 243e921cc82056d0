"""The interior-point solver: slower than the active set, but robust."""

from __future__ import annotations

from typing import Literal, get_args

from convexheads._validation import check_choice, check_positive_ints, check_real
from convexheads.errors import InputError
from convexheads.solvers.base import OnFailure, Solver, SolverResult
from convexheads.solvers.kkt import MIN_EXAMPLES_FOR_LOW_RANK, with_gram_factor
from convexheads.solvers.native.active_set import INNER_TOLERANCE_RATIO, of_projection, polish
from convexheads.solvers.native.barrier import central_path, interior_point
from convexheads.solvers.problem import DualProblem

Gradient = Literal["exact", "relaxed", "last_iterate"]
"""The gradient that `InteriorPointSolver` returns."""
_MAX_ITERATIONS = 100
_COMPLEMENTARITY = 1e-3


class InteriorPointSolver(Solver):
    """A structured primal-dual interior point, by Mehrotra's predictor-corrector method (1992).

    Use it for degenerate problems, for early stopping, and for gradients other than the exact one. A step costs two
    Cholesky factorizations of n x n per class (r x r, if the Gram matrix has a small rank r), for all tasks at once, on
    any device.

    Without `max_iterations`, one step of active-set Newton at the end makes the solution exact. With it, the
    coefficients are the projection of the last iterate.

    Args:
        max_iterations: stop after this number of iterations. Default None (until converged, at most 100).
        tolerance: certified relative duality gap at which a task counts as converged. Default 1e-6; it goes on to a
            thousandth of that.
        on_failure: what happens if a task is not certified: "raise" (default), "warn" or "return".
        gradient: "exact" (default) is the gradient of the solution with its active set (of the active set that the
            last iterate implies, if `max_iterations` is given). "relaxed" is the gradient of the point at which every
            slack times its multiplier is `complementarity` (qpax, Tracy & Manchester 2024); it has no kinks at weakly
            active bounds. "last_iterate" needs `max_iterations` and is the gradient of the KKT conditions at the last
            iterate (OptNet, Amos & Kolter 2017, and Lee et al. 2019). The last two have no second derivative.
        complementarity: slack times multiplier for "relaxed", in the units of the rescaled problem, in which
            coefficients and multipliers are around one. Default 1e-3.
        min_examples_for_low_rank: number of examples from which on the Gram matrix is factorized if its rank r is at
            most n / 4. Default 256.

    Raises:
        InputError: an argument is outside its range, or `gradient` and `max_iterations` are incompatible. Solving
            raises what `Solver.solve` does.

    Example:
        `SVMHead(solver=InteriorPointSolver(max_iterations=3, gradient="last_iterate"))`
    """

    def __init__(
        self,
        *,
        max_iterations: int | None = None,
        tolerance: float | None = None,
        on_failure: OnFailure = "raise",
        gradient: Gradient = "exact",
        complementarity: float = _COMPLEMENTARITY,
        min_examples_for_low_rank: int = MIN_EXAMPLES_FOR_LOW_RANK,
    ) -> None:
        super().__init__(max_iterations=max_iterations, tolerance=tolerance, on_failure=on_failure)
        name = type(self).__name__
        check_choice(f"{name}(gradient)", gradient, get_args(Gradient))
        if (gradient == "last_iterate") is (max_iterations is None) and gradient != "exact":
            expected = "a number" if gradient == "last_iterate" else "None"
            raise InputError(f"{name}(max_iterations)", f"{expected} with gradient={gradient!r}", max_iterations)
        check_positive_ints(min_examples_for_low_rank=min_examples_for_low_rank)
        self.gradient: Gradient = gradient
        self.complementarity = check_real(f"{name}(complementarity)", complementarity, positive=True)
        self.min_examples_for_low_rank = min_examples_for_low_rank

    def solve_batch(self, problem: DualProblem) -> SolverResult:
        problem = with_gram_factor(problem, min_examples=self.min_examples_for_low_rank)
        limit, tolerance = self.max_iterations or _MAX_ITERATIONS, INNER_TOLERANCE_RATIO * self.tolerance
        iterate = interior_point(problem, tolerance=tolerance, max_iterations=limit)
        linearization, certificate = polish(problem, iterate.point, move=self.max_iterations is None)
        if self.gradient == "last_iterate":
            linearization = iterate.linearize(problem)
        elif self.gradient == "relaxed":
            relaxed = central_path(problem, complementarity=self.complementarity, max_iterations=_MAX_ITERATIONS)
            linearization = relaxed.linearize(problem)
        certificate = of_projection(certificate)
        return SolverResult(certificate.feasible, iterate.iterations, certificate, linearization)
