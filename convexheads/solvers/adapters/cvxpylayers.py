"""cvxpylayers, which canonicalizes a problem with CVXPY, solves it with Clarabel and differentiates it with diffcp."""

from __future__ import annotations

from functools import lru_cache
from threading import Lock
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from convexheads.solvers.adapters import external
from convexheads.solvers.base import Solver
from convexheads.solvers.problem import DualProblem

compile_lock = Lock()  # CVXPY's counter of variables is not safe in threads


class CvxpylayersSolver(Solver):
    """cvxpylayers (Agrawal et al. 2019) with Clarabel (Goulart & Chen 2024). It needs the extra `cvxpylayers`.

    Use it to check other solvers: it is slow, works on the CPU only, and shares no code with them. Gradients are
    computed with diffcp (Agrawal et al. 2019, "Differentiating through a cone program"). Limitations of cvxpylayers
    alone, and what this class does about them:

    - `quad_form` with a parameter breaks CVXPY's rules for parameters (DPP): the square root of the Hessian is used
      as the parameter instead.
    - Compiling takes seconds: it is done once per shape.
    - SCS, the default, is accurate to 1e-2 in the gradient: Clarabel is used instead, at 1e-7 times `tolerance`.
    - diffcp treats gradients below 1e-8 as zero: they are scaled.
    - One task that cannot be solved fails the whole batch: tasks are then solved one by one, and only that task is NaN.
    - A request for a second derivative raises an error.

    It takes `max_iterations` (default None: at most 200), `tolerance` (default 1e-3) and `on_failure` (default
    "raise"), as every `Solver` does.

    Example:
        `SVMHead(solver=CvxpylayersSolver())`
    """

    default_tolerance: ClassVar[float] = 1e-3
    package: ClassVar[str | None] = "cvxpylayers"
    provides_gradient: ClassVar[bool] = True

    def solve_batch(self, problem: DualProblem) -> Float[Tensor, "tasks n k"]:
        smoothing = torch.zeros_like(problem.linear) if problem.smoothing is None else problem.smoothing
        signs, limits = zip(*problem.inequalities, strict=True)
        _, n, k = problem.linear.shape
        with compile_lock:
            layer = _layer(n, k, len(signs), problem.rows_sum_to_zero)
        accuracy, max_iterations = self.tolerance * 1e-7, self.max_iterations or 200

        def solve(gram: Tensor, smoothing: Tensor, linear: Tensor, *limits: Tensor) -> Tensor:
            found: list[Tensor] = []
            linear = _QuadraticTerm.apply(linear, gram, smoothing, found)
            parameters = _square_root(gram.detach()), smoothing.detach().sqrt(), linear, *signs, *limits
            (coef,) = call(layer, *parameters, tolerance=accuracy, max_iterations=max_iterations)
            found.append(coef.detach())  # with its graph, it would be a reference cycle
            return coef

        inputs = problem.gram, smoothing, problem.linear, *limits
        return external.call_backend(solve, *inputs, backend="CvxpylayersSolver")


class Layer(NamedTuple):
    """A compiled CVXPY problem. `solve` is a `CvxpyLayer`, which maps parameters to variables by Clarabel."""

    solve: Any
    problem: Any
    parameters: list[Any]
    variables: list[Any]
    lock: Lock  # for code that assigns values to the variables


def call(layer: Layer, *parameters: Tensor, tolerance: float, max_iterations: int) -> list[Tensor]:
    """The variables of a `CvxpyLayer` for a batch of parameters, NaN in tasks that raised an error.

    diffcp ignores the status of Clarabel: a problem without a solution may give arbitrary numbers.
    """
    from diffcp import SolverError

    arguments: dict[str, Any] = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), tolerance)
    arguments["max_iter"] = max_iterations
    if torch.is_grad_enabled() and any(x.requires_grad for x in parameters):
        arguments |= {"mode": "lsmr", "n_jobs_backward": 1}
    try:
        solutions = layer.solve(*(x.cpu() for x in parameters), solver_args=arguments)
    except (RuntimeError, ValueError, ArithmeticError, SolverError):
        if len(parameters[0]) == 1:
            return [parameters[0].new_full((1, *variable.shape), torch.nan) for variable in layer.variables]
        tasks = (tuple(x[task : task + 1] for x in parameters) for task in range(len(parameters[0])))
        per_task = [call(layer, *task, tolerance=tolerance, max_iterations=max_iterations) for task in tasks]
        return [torch.cat(parts) for parts in zip(*per_task, strict=True)]
    return [solution.to(parameters[0].device) for solution in solutions]


def layer_of(problem: Any, parameters: list[Any], variables: list[Any]) -> Layer:
    """Compile a problem for cvxpylayers."""
    from cvxpylayers.torch.cvxpylayer import CvxpyLayer

    arguments: dict[str, Any] = {"solve_method": "CLARABEL", "verbose": False, "n_jobs_forward": 1}
    with torch.sparse.check_sparse_tensor_invariants(enable=False):  # an explicit setting avoids a warning
        solve = CvxpyLayer(problem, parameters, variables, solver="DIFFCP", solver_args=arguments)
    return Layer(solve, problem, parameters, variables, Lock())


@lru_cache(maxsize=64)
def _layer(n: int, k: int, num_bounds: int, rows_sum_to_zero: bool) -> Layer:
    import cvxpy

    coef = cvxpy.Variable((n, k))
    root, sqrt_smoothing, linear = cvxpy.Parameter((n, n)), cvxpy.Parameter((n, k)), cvxpy.Parameter((n, k))
    signs, limits = ([cvxpy.Parameter((n, k)) for _ in range(num_bounds)] for _ in range(2))
    constraints: list[Any] = [cvxpy.multiply(sign, coef) <= limit for sign, limit in zip(signs, limits, strict=True)]
    if rows_sum_to_zero:
        constraints.append(cvxpy.sum(coef, axis=1) == 0)
    quadratic = cvxpy.sum_squares(root @ coef) + cvxpy.sum_squares(cvxpy.multiply(sqrt_smoothing, coef))
    objective = quadratic / 2 - cvxpy.sum(cvxpy.multiply(linear, coef))
    problem = cvxpy.Problem(cvxpy.Minimize(objective), constraints)
    return layer_of(problem, [root, sqrt_smoothing, linear, *signs, *limits], [coef])


def _square_root(matrix: Tensor) -> Tensor:
    """R with R'R = matrix, which may be singular."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt().unsqueeze(-2)).mT


class _QuadraticTerm(torch.autograd.Function):
    """Computes the gradient `-u coef'` of the Gram matrix from the gradient `u` of the linear term.

    The backward pass then does not differentiate the square root, whose derivative is ill-conditioned.
    """

    @staticmethod
    def forward(ctx, linear: Tensor, gram: Tensor, smoothing: Tensor, found: list[Tensor]) -> Tensor:
        ctx.found = found
        return linear.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (coef,) = ctx.found
        outer = gradient @ coef.mT
        return gradient, -(outer + outer.mT) / 2, -gradient * coef, None
