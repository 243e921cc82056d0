"""Solvers in graphs of `torch.compile` and `torch.export`.

The number of rounds of a solver depends on values, so a compiler cannot trace them. It sees two operators instead: one
solves the problem, and in the backward pass the other one factorizes and solves the system of the gradient. All else,
including the formulas of the gradient, is traced.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from convexheads._compiler import custom_operator, is_exporting
from convexheads.errors import ConvexHeadsError
from convexheads.solvers.implicit import ActiveSet, factorize_free
from convexheads.solvers.kkt import KKT
from convexheads.solvers.problem import DualProblem, Solution, WarmStart, check_problem


@dataclass(frozen=True, eq=False, repr=False)
class UnattachedSolution(Solution):
    """The solution of a flat batch in original units, without gradient, and what its gradient is computed from.

    `hessian_scale` is the Hessian of the rescaled problem divided by that of the original problem.
    """

    at_upper: Bool[Tensor, "tasks n k"]
    at_lower: Bool[Tensor, "tasks n k"]
    hessian_scale: Float[Tensor, " tasks"]


class GraphSolver:
    """The part of a solver that graphs need. They refer to it by a number, because operators take no other objects."""

    _count: ClassVar = count()
    _by_number: ClassVar[WeakValueDictionary[int, GraphSolver]] = WeakValueDictionary()

    def __new__(cls, *_: Any, **__: Any):
        solver = super().__new__(cls)
        number = vars(solver)["_number"] = next(cls._count)
        cls._by_number[number] = solver
        return solver

    def __getstate__(self) -> dict[str, Any]:  # a copy has its own number
        return {name: value for name, value in vars(self).items() if name != "_number"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def solve_unattached(self, problem: DualProblem) -> UnattachedSolution:
        """Solve a flat batch in working precision. The graph attaches the gradient."""
        raise NotImplementedError

    def factorize(
        self, problem: DualProblem, at_upper: Bool[Tensor, "tasks n k"], at_lower: Bool[Tensor, "tasks n k"]
    ) -> KKT:
        """Factorize the system of the free entries of a rescaled `problem`, for the backward pass of a compiled graph.

        The other entries are at their bounds: `at_upper` or `at_lower`.
        """
        return factorize_free(problem, at_upper, at_lower)


def solve(solver: GraphSolver, problem: DualProblem) -> Solution:
    """Solve a flat batch in working precision, in a graph. The number of iterations is unknown."""
    if is_exporting():  # the number of the solver means nothing in another process
        advice = "export its fit, through `to_linear()` or `to_module()`"
        raise ConvexHeadsError(f"torch.export: expected a head with a closed form, got {solver!r}; {advice}")
    data = problem.detach()
    start = (None,) * 3 if data.start is None else vars(data.start).values()
    tensors = data.gram, data.linear, data.lower, data.upper, data.smoothing, data.gram_factor, *start
    number = vars(solver)["_number"]
    coef, *values, at_upper, at_lower, hessian_scale = _solve_dual(number, data.rows_sum_to_zero, *tensors)
    if not (torch.is_grad_enabled() and any(value.requires_grad for value in problem.tensors().values())):
        return Solution(coef, *values, iterations=None)
    scale = hessian_scale[:, None, None]
    smoothing = None if data.smoothing is None else scale * data.smoothing
    kkt = _DeferredKKT(scale * data.gram, smoothing, at_upper, at_lower, data.rows_sum_to_zero, number)
    coef = ActiveSet(kkt, at_upper, at_lower).attach(problem, coef, hessian_scale)
    return Solution(coef, *values, iterations=None)


_DUAL = "(int solver, bool rows_sum_to_zero, Tensor gram, Tensor linear, Tensor? lower, Tensor? upper, "
_DUAL += "Tensor? smoothing, Tensor? gram_factor, Tensor? coef, Tensor? bound_multipliers, Tensor? row_multipliers) "
_DUAL += f"-> ({', '.join(['Tensor'] * 9)})"


@custom_operator("solve_dual", _DUAL)
def _solve_dual(solver, rows_sum_to_zero, gram, linear, lower, upper, smoothing, gram_factor, *start):
    begin = None if start[0] is None else WarmStart(*start)
    problem = DualProblem(gram, linear, lower, upper, smoothing, rows_sum_to_zero, gram_factor, begin)
    check_problem(problem)
    with torch.no_grad():
        found = GraphSolver._by_number[solver].solve_unattached(problem)
    values: Any = (found.coef, found.bound_multipliers, found.row_multipliers, found.status, found.gap, found.residual)
    values = (*values, found.at_upper, found.at_lower, found.hessian_scale)
    return tuple(value.clone(memory_format=torch.contiguous_format) for value in values)  # results share no memory


@_solve_dual.register_fake
def _(solver, rows_sum_to_zero, gram, linear, *_):
    one = linear.new_empty(linear.shape[:1])
    values = torch.empty_like(linear), torch.empty_like(linear), torch.empty_like(linear[..., 0])
    masks = (torch.empty_like(linear, dtype=torch.bool) for _ in range(2))
    return *values, torch.empty_like(one, dtype=torch.long), torch.empty_like(one), torch.empty_like(one), *masks, one


@dataclass(frozen=True, eq=False, repr=False)
class _DeferredKKT(KKT):
    """The rescaled system of a problem's free entries, which is factorized when it is solved."""

    gram: Float[Tensor, "tasks n n"]
    smoothing: Float[Tensor, "tasks n k"] | None
    at_upper: Bool[Tensor, "tasks n k"]
    at_lower: Bool[Tensor, "tasks n k"]
    rows_sum_to_zero: bool
    solver: int

    def solve(self, right: Tensor, sums: Tensor, *, refinements: int) -> tuple[Tensor, Tensor]:
        system = self.gram, self.smoothing, self.at_upper, self.at_lower
        return _solve_kkt(self.solver, self.rows_sum_to_zero, refinements, *system, right, sums)


_KKT = "(int solver, bool rows_sum_to_zero, int refinements, Tensor gram, Tensor? smoothing, "
_KKT += "Tensor at_upper, Tensor at_lower, Tensor right, Tensor sums) -> (Tensor, Tensor)"


@custom_operator("solve_kkt", _KKT)
def _solve_kkt(solver, rows_sum_to_zero, refinements, gram, smoothing, at_upper, at_lower, right, sums):
    problem = DualProblem(gram, right.mT, smoothing=smoothing, rows_sum_to_zero=rows_sum_to_zero)
    alive = GraphSolver._by_number.get(solver)  # the backward pass may come when nobody holds the head anymore
    kkt = (factorize_free if alive is None else alive.factorize)(problem, at_upper, at_lower)
    x, row_multipliers = kkt.solve(right, sums, refinements=refinements)
    return x.contiguous(), row_multipliers.contiguous()


@_solve_kkt.register_fake
def _(solver, rows_sum_to_zero, refinements, gram, smoothing, at_upper, at_lower, right, sums):
    return torch.empty_like(right, memory_format=torch.contiguous_format), torch.empty_like(sums)
