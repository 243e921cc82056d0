"""The solver interface: rescaling, certification and the implicit gradient, shared by all solvers."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, ClassVar, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from convexheads._functorch import compute_without_grad, inspect_values, is_transforming, refuse_transforms
from convexheads._looks import assume_not
from convexheads._validation import check_choice, check_positive_int, check_real, describe_shape, optional
from convexheads.errors import ConvexHeadsError, InputError, MissingDependencyError
from convexheads.hyperparameters import Settings
from convexheads.precision import full_precision, working_dtype
from convexheads.solvers import compiled
from convexheads.solvers.certificate import Certificate, account_for_rounding, certify
from convexheads.solvers.failures import OnFailure, handle_failures
from convexheads.solvers.implicit import ActiveSet, Linearization, implied_active_set
from convexheads.solvers.problem import DualProblem, Solution, Status, TensorRecord, check_problem
from convexheads.solvers.rescaling import replace_non_finite_tasks, rescale


class SolverResult(NamedTuple):
    """A result of `Solver.solve_batch` that has more than coefficients.

    Attributes:
        coef: the coefficients, `(tasks, n, k)`.
        iterations: number of iterations of each task, `(tasks,)`. Default None (unknown).
        certificate: that of the coefficients, for the rescaled problem. Default None: the base class computes it.
        linearization: the system of the rescaled problem for the gradient. Default None: the base class finds it.
    """

    coef: Float[Tensor, "tasks n k"]
    iterations: Int[Tensor, " tasks"] | None = None
    certificate: Certificate | None = None
    linearization: Linearization | None = None


@dataclass(frozen=True, eq=False, repr=False)
class LinearizedSolution(TensorRecord):
    """The solution of a flat batch in its original units, and the system that gives its gradient.

    `hessian_scale` is the Hessian of the rescaled problem divided by that of the original problem. There is no
    linearization for an empty batch, or if the coefficients have a gradient already.
    """

    solution: Solution
    hessian_scale: Float[Tensor, " tasks"]
    linearization: Linearization | None


class Plan(NamedTuple):
    """How a flat batch is solved. `Solver.plan` makes it.

    Attributes:
        problem: the problem, which may have been moved to another device.
        solvers: the first solver solves all tasks. Each of the others solves the tasks that have not converged, without
            their `start`.
        max_tasks: largest number of tasks that are solved at once. Default None (no limit).
    """

    problem: DualProblem
    solvers: tuple[Solver, ...]
    max_tasks: int | None = None


class Solver(compiled.GraphSolver, Settings):
    """Base class of solvers. A solver holds settings only, so any number of heads and threads can share it.

    A subclass implements one method, `solve_batch`, which returns coefficients. The base class first rescales the
    problem, then certifies the coefficients and makes them differentiable by the implicit function theorem.

    Args:
        max_iterations: stop after this number of iterations and return the current iterate, with status `STOPPED`.
            Early stopping is not a failure (Lee et al. 2019 stop after three iterations). Default None (until
            converged).
        tolerance: relative duality gap at which a task counts as converged. Default None (`default_tolerance`). The
            smallest effective tolerance is 9e-13 (5e-4 in float32, on devices without float64), because of rounding.
        on_failure: what happens if a task is not certified to the tolerance: "raise" (default) a `SolverError` that
            carries the solution, "warn" (`SolverWarning`), or "return" it with its status.

    Raises:
        InputError: an argument, of this class or of the subclass, is outside its range.
        MissingDependencyError: the backend's package is not installed.
    """

    default_tolerance: ClassVar[float] = 1e-6
    """The default relative duality gap at which a task counts as converged."""
    package: ClassVar[str | None] = None
    """The optional package that the backend needs, which is also the name of the extra that installs it."""
    provides_gradient: ClassVar[bool] = False
    """Whether the coefficients that `solve_batch` returns have a gradient. If not, it runs without autograd."""

    @property
    def rescales(self) -> bool:
        """Whether `solve_batch` gets a rescaled problem: True, unless a subclass overrides this."""
        return True

    @property
    def is_traceable(self) -> bool:
        """Whether the solver can be part of a compiled graph: not if it has its own gradient, or a relaxed one."""
        return not self.provides_gradient

    def __init__(
        self, *, max_iterations: int | None = None, tolerance: float | None = None, on_failure: OnFailure = "raise"
    ) -> None:
        name = type(self).__name__
        if self.package is not None and find_spec(self.package) is None:
            raise MissingDependencyError(self.package, extra=self.package, needed_by=name)
        check_choice(f"{name}(on_failure)", on_failure, get_args(OnFailure))
        self.max_iterations = optional(check_positive_int)(f"{name}(max_iterations)", max_iterations)
        self.tolerance = (
            self.default_tolerance if tolerance is None else check_real(f"{name}(tolerance)", tolerance, positive=True)
        )
        self.on_failure: OnFailure = on_failure

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self):  # a change would reach every head that shares the solver
            raise AttributeError(f"{type(self).__name__}.{name}: expected a new solver, because solvers do not change")
        super().__setattr__(name, value)

    def with_on_failure(self, on_failure: OnFailure) -> Solver:
        """The same solver with another policy for tasks that it does not certify, `on_failure`."""
        check_choice(f"{type(self).__name__}(on_failure)", on_failure, get_args(OnFailure))
        changed = copy.copy(self)
        vars(changed)["on_failure"] = on_failure
        return changed

    def runs_on_gpu(self, problem: DualProblem) -> bool:
        """Whether the solver solves a flat `problem` on a GPU without ever waiting for it. Default False."""
        return False

    def solve_batch(self, problem: DualProblem) -> Float[Tensor, "tasks n k"] | SolverResult:
        """Solve a flat, rescaled batch of problems. This is the one method that a subclass has to implement.

        It runs without autograd, unless the class sets `provides_gradient`. It must not print, must not change the
        problem, must not let a task affect another one, and must not raise an error for a task that it cannot solve.

        Args:
            problem: at least one task, with coefficients `(tasks, n, k)` and numbers around one (`rescale`), all finite
                except for bounds.

        Returns:
            The coefficients, `(tasks, n, k)`, with NaN in tasks that could not be solved.
        """
        expected = "a method solve_batch or, in a composition of solvers, a method plan"
        raise NotImplementedError(f"{type(self).__name__}: expected {expected}")

    def solve(self, problem: DualProblem) -> Solution:
        """Solve a batch of problems with any number of leading dimensions.

        Args:
            problem: the problems, with coefficients `(*batch, n, k)`, of any floating-point dtype. They are solved in
                float64.

        Returns:
            The solution, in float64. Gradients reach every tensor of `problem` but its `gram_factor`.

        Raises:
            InputError: the problem is not a `DualProblem` of floating-point tensors of matching shapes on one device,
                it has no bounds, or a lower bound is above an upper bound (checked on the CPU only).
            SolverError: a task failed and `on_failure="raise"`; with "warn", a `SolverWarning` is emitted.
            ConvexHeadsError: with `provides_gradient`, the result of `solve_batch` has no gradient, or a transform of
                `torch.func` is active; in the backward pass, for a second derivative that the backend lacks.
        """
        check_problem(problem)
        batch, device = problem.linear.shape[:-2], problem.linear.device
        with full_precision(device):
            dtype = working_dtype(device)
            flat = problem.flatten()
            if flat.start is not None:
                flat = replace(flat, start=flat.start.map(lambda _, value: value.detach().nan_to_num(0, 0, 0)))
            if any(value.dtype != dtype for value in flat.tensors().values()):
                flat = flat.map(lambda _, value: value.to(dtype))
            solution = compiled.solve(self, flat) if torch.compiler.is_compiling() else self._solve_flat(flat)
            if len(batch) != 1:
                solution = solution.map(lambda _, value: value.reshape((*batch, *value.shape[1:])))
        return handle_failures(type(self).__name__, solution, self.tolerance, self.on_failure)

    def solve_unattached(self, problem: DualProblem) -> compiled.UnattachedSolution:
        """Solve `problem`, a flat batch in working precision, for a compiled graph, which attaches the gradient."""
        solution = self._solve_flat(problem, attach=False)
        assert isinstance(solution, compiled.UnattachedSolution)
        return solution

    def plan(self, problem: DualProblem) -> Plan:
        """Decide how `problem`, a flat batch, is solved: here by this solver alone. Compositions override this."""
        return Plan(problem, (self,))

    def _solve_flat(self, whole: DualProblem, *, attach: bool = True) -> Solution:
        """Solve a flat batch in working precision as `plan` decides, with gradient or what it is computed from."""
        problem, (first, *others), max_tasks = self.plan(whole)
        if max_tasks is not None and max_tasks < len(problem.linear):
            starts = range(0, len(problem.linear), max_tasks)
            parts = [
                self._solve_flat(problem.select(slice(start, start + max_tasks)), attach=attach) for start in starts
            ]
            if any(part.iterations is None for part in parts):
                parts = [replace(part, iterations=None) for part in parts]
            tensors = [part.tensors() for part in parts]
            return parts[0].map(lambda name, _: torch.cat([part[name] for part in tensors])).to(whole.linear.device)
        solution = self._solve_by(first, problem, attach)
        selects = not is_transforming()  # inside `torch.func.vmap`, tasks cannot be selected by their values
        for solver in others:
            unsolved = ~solution.converged
            if selects and first.runs_on_gpu(problem) and assume_not(unsolved.any()):
                break
            if not (unsolved.any() if selects else inspect_values(lambda unsolved: bool(unsolved.any()), unsolved)):
                break
            rest = replace(problem.select(unsolved) if selects else problem, start=None, path_length=1)
            other = self._solve_by(solver, rest, attach)
            if solution.iterations is None or other.iterations is None:
                solution, other = replace(solution, iterations=None), replace(other, iterations=None)
            solution = solution.replace_tasks(unsolved, other) if selects else solution.where(unsolved, other)
        return solution if problem is whole else solution.to(whole.linear.device)

    def _solve_by(self, solver: Solver, problem: DualProblem, attach: bool) -> Solution:
        # Only a composition, or a solver that moves the problem, has to follow its own plan.
        is_planned = solver is self or solver.plan(problem) == Plan(problem, (solver,))
        return (solver._solve_alone if is_planned else solver._solve_flat)(problem, attach=attach)

    def _solve_alone(self, problem: DualProblem, *, attach: bool) -> Solution:
        """Like `_solve_flat`, by this solver alone."""
        if self.provides_gradient:
            refuse_transforms(type(self).__name__)
            return self._solve_numerically(problem).solution
        if is_transforming():
            solved = self._solve_under_transforms(problem)
        else:
            with torch.no_grad():
                solved = self._solve_numerically(problem)
        solution, linearization = solved.solution, solved.linearization
        if attach and not problem.needs_derivative:
            return solution
        if not attach:
            assert linearization is None or isinstance(linearization, ActiveSet)
            nowhere = torch.zeros_like(solution.coef, dtype=torch.bool)
            active = (nowhere, nowhere) if linearization is None else (linearization.at_upper, linearization.at_lower)
            values: Any = (*vars(solution).values(), *active, solved.hessian_scale)
            return compiled.UnattachedSolution(*values)
        if linearization is None:
            return replace(solution, coef=problem.linear.clone())
        return replace(solution, coef=linearization.attach(problem, solution.coef, solved.hessian_scale))

    def _solve_under_transforms(self, problem: DualProblem) -> LinearizedSolution:
        """Like `_solve_numerically`, inside the transforms of `torch.func`, where a tensor has hidden dimensions."""
        structure: list[LinearizedSolution] = []

        def solve(*values: Tensor) -> tuple[Tensor, ...]:
            remaining = iter(values)
            whole = problem.map(lambda *_: next(remaining))
            solved = self._solve_numerically(whole.flatten())
            structure.append(solved)
            batch = whole.linear.shape[:-2]
            return tuple(value.reshape((*batch, *value.shape[1:])) for value in solved.tensors().values())

        values = iter(compute_without_grad(solve, *problem.tensors().values()))
        return structure[-1].map(lambda *_: next(values))

    def _solve_numerically(self, problem: DualProblem) -> LinearizedSolution:
        """Rescale, solve and certify a flat batch."""
        finite, non_finite = replace_non_finite_tasks(problem)
        rescaled, coef_scale, multiplier_scale = rescale(finite)
        if self.rescales:
            result = self._result(rescaled)
        else:
            result = self._result(finite)
            result = result._replace(coef=result.coef / coef_scale[:, None, None])
        certificate, linearization = result.certificate, result.linearization
        if certificate is None:
            rescaled, _, _ = rescale(finite)  # `solve_batch` may have changed the other one in place
            certificate = certify(rescaled.detach(), result.coef.detach())
        certificate = account_for_rounding(rescaled.detach(), certificate)
        if linearization is None and not self.provides_gradient and len(coef_scale):
            linearization = implied_active_set(rescaled, certificate)
        unsolved = Status.FAILED if self.max_iterations is None else Status.STOPPED
        status = torch.where(certificate.converged(self.tolerance), Status.CONVERGED, unsolved)
        gap = certificate.gap + certificate.rounding
        failed = non_finite | ~torch.isfinite(gap)
        solution = Solution(
            coef=torch.where(non_finite, torch.nan, coef_scale)[:, None, None] * result.coef,
            bound_multipliers=certificate.bound_multipliers * multiplier_scale[:, None, None],
            row_multipliers=certificate.row_multipliers * multiplier_scale[:, None],
            status=torch.where(failed, Status.FAILED, status),
            gap=torch.where(non_finite, torch.nan, gap),
            residual=certificate.residual,
            iterations=result.iterations,
        )
        linearization = None if linearization is None else linearization.unscaled(coef_scale)
        return LinearizedSolution(solution, coef_scale / multiplier_scale, linearization)

    def _result(self, problem: DualProblem) -> SolverResult:
        """The checked result of `solve_batch`."""
        if not len(problem.linear):  # an empty batch needs no solve
            return SolverResult(problem.linear)
        result = self.solve_batch(problem)
        coef, name = result.coef if isinstance(result, SolverResult) else result, f"{type(self).__name__}.solve_batch"
        if not isinstance(coef, Tensor) or coef.shape != problem.linear.shape:
            expected = f"a tensor of coefficients of shape {tuple(problem.linear.shape)}"
            raise InputError(name, expected, describe_shape(coef))
        if self.provides_gradient and problem.needs_derivative and not coef.requires_grad:
            raise ConvexHeadsError(f"{name}: expected coefficients with gradient, got none, but provides_gradient=True")
        return result if isinstance(result, SolverResult) else SolverResult(coef)
