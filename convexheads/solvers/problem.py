"""The quadratic program behind every multi-class SVM, and its solution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from convexheads._functorch import inspect_values, is_transforming_or_forward
from convexheads._validation import check_bool, check_positive_int, describe_task, describe_type, is_float_tensor
from convexheads.errors import InputError, SolverError
from convexheads.solvers.feasible_rows import FeasibleRows

_R = TypeVar("_R", bound="TensorRecord")
ZERO_MULTIPLIER = 1e-9
"""Multipliers of a warm start are zero up to this size, relative to the largest linear term."""


@dataclass(frozen=True, eq=False, repr=False)
class TensorRecord:
    """A dataclass of tensors, other such records, and settings of the whole batch. Leading dimensions are tasks.

    The methods `select`, `replace_tasks` and `where` need a flat batch, with a single leading dimension.
    """

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, without fields that are None. Those of an inner record are named `record.name`."""
        found: dict[str, Tensor] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                found[name] = value
            elif isinstance(value, TensorRecord):
                found |= {f"{name}.{inner}": tensor for inner, tensor in value.tensors().items()}
        return found

    def map(self: _R, function: Callable[[str, Tensor], Tensor]) -> _R:
        """A copy with `function(name, tensor)` in place of every tensor. Names and order are as in `tensors()`."""
        values: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                value = function(name, value)
            elif isinstance(value, TensorRecord):
                value = value.map(lambda inner, tensor, name=name: function(f"{name}.{inner}", tensor))
            values[name] = value
        return type(self)(**values)

    def detach(self: _R) -> _R:
        """A copy without gradient."""
        return self.map(lambda _, value: value.detach())

    def to(self: _R, device: torch.device | str) -> _R:
        """A copy on another device; gradients flow through the copy."""
        return self.map(lambda _, value: value.to(device))

    def select(self: _R, chosen: slice | Bool[Tensor, " tasks"]) -> _R:
        """The chosen tasks of a flat batch."""
        return self.map(lambda _, value: value[chosen])

    def replace_tasks(self: _R, chosen: Bool[Tensor, " tasks"], values: _R) -> _R:
        """A copy of a flat batch in which the chosen tasks are replaced by the tasks of `values`."""
        new = values.tensors()
        return self.map(lambda name, value: value.index_put((chosen,), new[name]))

    def where(self: _R, chosen: Bool[Tensor, " tasks"], values: _R) -> _R:
        """Like `replace_tasks`, but `values` has all tasks. This works inside `torch.func.vmap` too."""
        new = values.tensors()
        return self.map(lambda name, value: torch.where(per_task(chosen, value), new[name], value))

    def __repr__(self) -> str:
        shown = (
            f"{name}={tuple(value.shape) if isinstance(value, Tensor) else repr(value)}"
            for name, value in vars(self).items()
            if value is not None
        )
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True, eq=False, repr=False)
class WarmStart(TensorRecord):
    """Where a solver begins: coefficients, and the multipliers that show which of them are at a bound.

    It has no gradient, and no effect on the solution. Values that are not finite count as zero.

    Attributes:
        coef: coefficients, `(*batch, n, k)`.
        bound_multipliers: positive at an upper bound, negative at a lower bound, `(*batch, n, k)`.
        row_multipliers: multipliers of the zero row sums, `(*batch, n)`.

    Example:
        `replace(problem, start=WarmStart.of(solution))`
    """

    coef: Float[Tensor, "*batch n k"]
    bound_multipliers: Float[Tensor, "*batch n k"]
    row_multipliers: Float[Tensor, "*batch n"]

    @classmethod
    def of(cls, solution: Solution) -> WarmStart:
        """The start at the `solution` of a similar problem, such as one with another C."""
        coef, bounds, rows = solution.coef.detach(), solution.bound_multipliers, solution.row_multipliers
        bounds = torch.zeros_like(coef) if bounds is None else bounds.detach()
        return cls(coef, bounds, torch.zeros_like(coef[..., 0]) if rows is None else rows.detach())

    def at_bounds(self, problem: DualProblem) -> WarmStart:
        """The start for a flat batch, with the bounds of `problem` where multipliers differ from zero."""
        size = problem.linear.abs().amax((-2, -1))
        multipliers = self.bound_multipliers
        multipliers = multipliers.where(multipliers.abs() > ZERO_MULTIPLIER * per_task(size, multipliers), 0)
        coef = self.coef
        for sign, bound in ((1, problem.upper), (-1, problem.lower)):
            is_active = sign * multipliers > 0
            if bound is not None:
                coef = torch.where(is_active & torch.isfinite(bound), bound, coef)
                is_active = is_active & ~torch.isfinite(bound)
            multipliers = multipliers.masked_fill(is_active, 0)
        return WarmStart(coef, multipliers, self.row_multipliers)


@dataclass(frozen=True, eq=False, repr=False)
class DualProblem(TensorRecord):
    """The data of `min 1/2 tr(a'Ka) + <smoothing, a^2>/2 - <linear, a>` subject to `lower <= a <= upper` and `a 1 = 0`.

    It is the dual of every SVM here. With `lower=None` and `upper=C * y` it is Eq. 10 of Lee et al. 2019.
    `Solver.solve` validates it.

    Attributes:
        gram: K, symmetric positive semi-definite, `(*batch, n, n)`.
        linear: linear term, `(*batch, n, k)`.
        lower: lower bounds, `(*batch, n, k)`, with `-inf` for entries without one. Default None (no lower bounds).
        upper: upper bounds, `(*batch, n, k)`, with `inf` for entries without one. Default None (no upper bounds). A
            problem needs at least one of the two; if `rows_sum_to_zero` is False and there is no smoothing, it needs
            both, or no gap can be certified. In general, no gap can be certified either if one entry of a row has no
            upper bound, another one has no lower bound, and neither has smoothing.
        smoothing: quadratic smoothing of the loss per entry, non-negative, `(*batch, n, k)`. Default None (no
            smoothing).
        rows_sum_to_zero: whether every row of coefficients sums to zero. Default True.
        gram_factor: a matrix with `gram_factor @ gram_factor.mT == gram`, `(*batch, n, r)`. If r is much smaller than
            n, the interior-point solver and ADMM are faster with it. Default None (the native solvers look for one in
            large problems).
        start: where the native solvers begin. Default None (each solver has a start of its own).
        path_length: this many tasks in a row are similar, such as those of a grid of C. The compiled solver begins each
            of them, except for the first one, at the solution of the one before. Default 1 (no similar tasks).

    Example:
        `DualProblem(support @ support.mT, linear=targets, upper=C * targets)`
    """

    gram: Float[Tensor, "*batch n n"]
    linear: Float[Tensor, "*batch n k"]
    lower: Float[Tensor, "*batch n k"] | None = None
    upper: Float[Tensor, "*batch n k"] | None = None
    smoothing: Float[Tensor, "*batch n k"] | None = None
    rows_sum_to_zero: bool = True
    gram_factor: Float[Tensor, "*batch n r"] | None = None
    start: WarmStart | None = None
    path_length: int = 1

    def flatten(self) -> DualProblem:
        """A copy with all leading dimensions merged into one: `(tasks, n, k)`."""
        batch = self.linear.ndim - 2
        return self if batch == 1 else self.map(lambda _, value: value.reshape(-1, *value.shape[batch:]))

    def broadcast(self) -> DualProblem:
        """A copy in which all tensors have the same leading dimensions, those of some being expanded."""
        shapes = {value.shape[:-2] for value in self.tensors().values()}
        if len(shapes) == 1:
            return self
        batch = torch.broadcast_shapes(*shapes)
        return self.map(lambda _, value: value.expand(*batch, *value.shape[-2:]))

    def curvature(self) -> Float[Tensor, "*batch"]:
        """The mean diagonal of the Hessian, `(*batch,)`."""
        mean = self.gram.diagonal(dim1=-2, dim2=-1).mean(-1)
        return mean if self.smoothing is None else mean + self.smoothing.mean((-2, -1))

    def gradient(self, coef: Float[Tensor, "*batch n k"]) -> Float[Tensor, "*batch n k"]:
        """The gradient of the quadratic part, which is the Hessian times `coef`, `(*batch, n, k)`."""
        image = self.gram @ coef
        return image if self.smoothing is None else image + self.smoothing * coef

    def active_bounds(
        self, at_upper: Bool[Tensor, "*batch n k"], at_lower: Bool[Tensor, "*batch n k"]
    ) -> Float[Tensor, "*batch n k"]:
        """The bounds of the entries that are `at_upper` or `at_lower`, and zero at the free entries."""
        values = torch.zeros_like(self.linear)
        if self.upper is not None:
            values = torch.where(at_upper, self.upper, values)
        return values if self.lower is None else torch.where(at_lower, self.lower, values)

    @property
    def inequalities(self) -> list[tuple[Float[Tensor, "*batch n k"], Float[Tensor, "*batch n k"]]]:
        """The bounds that the problem has, the upper ones first, as pairs for `sign * coef <= limit`.

        The sign is 1 at upper bounds and -1 at lower bounds. An infinite bound is the idle row `0 * coef <= 1`.
        """
        constraints = []
        for sign, bound in ((1.0, self.upper), (-1.0, self.lower)):
            if bound is not None:
                present = torch.isfinite(bound)
                constraints.append((sign * present.to(bound.dtype), torch.where(present, sign * bound, 1.0)))
        return constraints

    def project(self, coef: Float[Tensor, "*batch n k"]) -> Float[Tensor, "*batch n k"]:
        """The feasible coefficients nearest to `coef`, row by row."""
        return self.rows.project(coef)

    @property
    def needs_derivative(self) -> bool:
        """Whether a derivative with respect to the problem may be asked for, in any mode of differentiation."""
        if is_transforming_or_forward():
            return True
        return torch.is_grad_enabled() and any(value.requires_grad for value in self.tensors().values())

    @property
    def rows(self) -> FeasibleRows:
        """The feasible set of each support example."""
        return FeasibleRows(self.lower, self.upper, self.smoothing, self.rows_sum_to_zero)


class Status(IntEnum):
    """How the solve of one task ended."""

    CONVERGED = 0
    """Certified: the gap is at most the tolerance, and the residual is at most the square root of the tolerance."""
    STOPPED = 1
    """Stopped at the `max_iterations` that the user chose. Early stopping is not a failure."""
    FAILED = 2
    """Not certified: the gap or the residual is too large, or NaN."""


@dataclass(frozen=True, eq=False, repr=False)
class Solution(TensorRecord):
    """The solution of a batch of tasks, with a certificate per task. `Solver.solve` returns it.

    Attributes:
        coef: dual coefficients with gradient, `(*batch, n, k)`.
        bound_multipliers: multipliers of the bounds, positive at an upper bound, negative at a lower bound, zero at
            free entries, `(*batch, n, k)`; None for a problem without bounds.
        row_multipliers: multipliers of the zero row sums, `(*batch, n)`; None if there are no such constraints.
        status: the `Status` of each task, `(*batch,)`.
        gap: certified relative duality gap of each task, computed from `coef` alone, `(*batch,)`; for SVMs, it includes
            the effect of rounding.
        residual: largest distance of `coef` from the feasible set, divided by the largest coefficient or by one unit of
            the rescaled problem, whichever is larger, `(*batch,)`. For heads without constraints (closed forms,
            logistic regression), an upper bound of the relative error of the weights.
        iterations: number of iterations of each task, `(*batch,)`; None if the backend does not report it.
    """

    coef: Float[Tensor, "*batch n k"]
    bound_multipliers: Float[Tensor, "*batch n k"] | None
    row_multipliers: Float[Tensor, "*batch n"] | None
    status: Int[Tensor, "*batch"]
    gap: Float[Tensor, "*batch"]
    residual: Float[Tensor, "*batch"]
    iterations: Int[Tensor, "*batch"] | None

    @property
    def converged(self) -> Tensor:
        """Which tasks are certified to the tolerance, `(*batch,)` of bool."""
        return self.status == Status.CONVERGED

    def check(self) -> None:
        """Raise an error if a task failed, as `on_failure="raise"` does at once.

        Use it after a call with `on_failure="return"`, for instance once per epoch: on a GPU, reading the status waits
        until all work is done.

        Raises:
            SolverError: at least one task failed. The error carries this solution.
        """
        if failures := self.describe_failures():
            raise SolverError(f"Solution: {failures}", self)

    def describe_failures(self) -> str:
        """The tasks that failed, with their gaps and residuals, in words; empty if there are none."""
        return inspect_values(describe_failures, self.status, self.gap, self.residual)

    def __repr__(self) -> str:
        shape, tasks = tuple(self.coef.shape), self.status.numel()
        if self.status.is_meta or not tasks:
            return f"Solution(coef={shape})"
        converged, gap = inspect_values(
            lambda status, gap: (int((status == 0).sum()), gap.max().item()), self.status, self.gap
        )
        return f"Solution(coef={shape}, {converged} of {tasks} tasks converged, largest gap {gap:.1e})"


def describe_failures(status: Tensor, gap: Tensor, residual: Tensor) -> str:
    """The text of `Solution.describe_failures`."""
    failures = []
    for task in map(tuple, (status == Status.FAILED).nonzero().tolist()):
        sizes = f"relative gap {gap[task].item():.1e}, residual {residual[task].item():.1e}"
        failures.append(f"{describe_task(task)}: {sizes}")
    shown = "; ".join(failures[:5]) + ("; ..." if len(failures) > 5 else "")
    return f"{len(failures)} of {status.numel()} tasks not solved ({shown})" if failures else ""


def per_task(values: Tensor, like: Tensor) -> Tensor:
    """One value per task, with as many dimensions as `like`, whose first dimension is tasks."""
    return values.view(-1, *[1] * (like.ndim - 1))


def check_problem(problem: object) -> None:
    """Raise `InputError` unless all tensors match in shape and device, and bounds are present and in order."""
    if not isinstance(problem, DualProblem):
        raise InputError("problem", "a DualProblem", type(problem).__name__)
    check_bool("DualProblem(rows_sum_to_zero)", problem.rows_sum_to_zero)
    check_positive_int("DualProblem(path_length)", problem.path_length)
    for name, value in vars(problem).items():
        is_missing = value is None and name not in ("gram", "linear")
        is_no_tensor = name in ("rows_sum_to_zero", "path_length") or isinstance(value, WarmStart)
        if not (is_missing or is_no_tensor or is_float_tensor(value)):
            raise InputError(f"DualProblem({name})", "a tensor of floating-point values", describe_type(value))
    linear, factor = problem.linear, problem.gram_factor
    if linear.ndim < 2 or not all(linear.shape[-2:]):
        raise InputError("DualProblem(linear)", "(*batch, n, k), n and k at least 1", f"shape {tuple(linear.shape)}")
    *batch, n, _ = linear.shape
    expected = {"gram": (*batch, n, n)} | ({} if factor is None else {"gram_factor": (*batch, n, *factor.shape[-1:])})
    expected["start.row_multipliers"] = (*batch, n)
    if factor is not None and not factor.shape[-1:].numel():
        raise InputError("DualProblem(gram_factor)", "(*batch, n, r), r at least 1", f"shape {tuple(factor.shape)}")
    for name, value in problem.tensors().items():
        name, shape = f"DualProblem({name})", expected.get(name, tuple(linear.shape))
        if value.shape != shape:
            raise InputError(name, f"{shape}, to match the linear term", f"shape {tuple(value.shape)}")
        if value.device != linear.device:
            raise InputError(name, f"the device of the linear term, {linear.device}", f"device {value.device}")
    if problem.lower is None and problem.upper is None:
        raise InputError("DualProblem(lower, upper)", "at least one of them", "None for both")
    reads_values = linear.device.type == "cpu" and not torch.compiler.is_compiling()
    if problem.lower is not None and problem.upper is not None and reads_values:
        inspect_values(_check_order, problem.lower, problem.upper)


def _check_order(lower: Tensor, upper: Tensor) -> None:
    crossed = lower > upper
    if crossed.any():
        where = tuple(crossed.nonzero()[0].tolist())
        got = f"{lower[where].item():g} above {upper[where].item():g} at {where}"
        raise InputError("DualProblem(lower, upper)", "lower <= upper everywhere", got)
