"""What every solver does the same way: flatten, precision, units, certificate, status, complaint."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from importlib.util import find_spec
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from convexheads._functorch import inspect_values
from convexheads._validation import check_bool, check_real, describe_type, is_float_tensor, is_positive_int
from convexheads.errors import InputError, MissingDependencyError, SolverError, SolverWarning
from convexheads.precision import full_precision, working_dtype
from convexheads.solvers.active_set import ActiveSet
from convexheads.solvers.interior_point import Relaxed
from convexheads.solvers.problem import QP, Certificate, Solution, Status

OnFailure = Literal["raise", "warn", "return"]
"""What to do about a task that is not solved: "raise" `SolverError`, emit `SolverWarning`, or just "return" it."""


class Solved(NamedTuple):
    """A flat batch of problems, solved: what `Solver._coefficients` returns.

    Attributes:
        coef: `(tasks, n, k)`, with gradient; NaN in the tasks that could not be solved.
        iterations: of each task, `(tasks,)`; None (default) where the backend doesn't tell.
        certificate: of `coef`, where the solver has it; None (default) otherwise.
        found: what the gradient of `coef` is made of, where that doesn't come with it; None (default) otherwise.
    """

    coef: Float[Tensor, "tasks n k"]
    iterations: Int[Tensor, " tasks"] | None = None
    certificate: Certificate | None = None
    found: ActiveSet | Relaxed | None = None


class Solver(ABC):
    """Solves a batch of `QP`s. Holds hyper-parameters only, so one solver serves any number of heads and threads.

    A subclass writes `_coefficients` and sets `default_tolerance`, and `package` where it needs one. Whatever it
    returns is judged by its duality gap (Boyd & Vandenberghe 2004, Section 5.5.1).

    Args:
        max_iterations: stop after so many iterations and return what is there, with status `STOPPED`. Early stopping is
            a choice (Lee et al. 2019 stop after three), never a failure. None, the default: until converged.
        tolerance: relative duality gap at which a task counts as converged; None, the default, for what the backend
            reaches (`default_tolerance`). Below what rounding leaves it has no effect: 9e-13, or 5e-4 in float32
            (on devices without float64).
        on_failure: what happens when a task is not certified to the tolerance: "raise", the default, a `SolverError`
            that carries the solution, "warn" (`SolverWarning`), or "return" it with its status.

    Raises:
        InputError: an argument is outside its range.
        MissingDependencyError: the backend's package is not installed.
    """

    default_tolerance: ClassVar[float]
    """The relative duality gap that the backend reaches."""
    package: ClassVar[str | None] = None
    """The optional package that the backend needs, which is also the name of the extra that installs it."""

    def __init__(
        self,
        *,
        max_iterations: int | None = None,
        tolerance: float | None = None,
        on_failure: OnFailure = "raise",
    ) -> None:
        name = type(self).__name__
        if self.package is not None and find_spec(self.package) is None:
            raise MissingDependencyError(self.package, extra=self.package, needed_by=name)
        if max_iterations is not None and not is_positive_int(max_iterations):
            raise InputError(f"{name}(max_iterations)", "an integer of at least 1, or None", repr(max_iterations))
        check_on_failure(name, on_failure)
        self.max_iterations = max_iterations
        self.tolerance = (
            self.default_tolerance if tolerance is None else check_real(f"{name}(tolerance)", tolerance, positive=True)
        )
        self.on_failure: OnFailure = on_failure

    def __repr__(self) -> str:
        shown = [] if self.max_iterations is None else [f"max_iterations={self.max_iterations}"]
        if self.tolerance != self.default_tolerance:
            shown.append(f"tolerance={self.tolerance:g}")
        if self.on_failure != "raise":
            shown.append(f"on_failure={self.on_failure!r}")
        return f"{type(self).__name__}({', '.join(shown)})"

    @abstractmethod
    def _coefficients(self, qp: QP) -> Solved:
        """Solve a flat batch of problems in units and in working precision; the one method that a subclass writes.

        Must not print, nor let one task change another; nor raise for a task that it can't solve.

        Args:
            qp: coefficients `(tasks, n, k)`, one task at least, numbers around one (`QP.in_units`), all finite but for
                bounds.

        Returns:
            The coefficients with their gradient, NaN in the tasks that could not be solved; and whatever else is known.
        """

    def solve(self, qp: QP) -> Solution:
        """Solve a batch of problems, any number of leading dimensions.

        Args:
            qp: the problems, with coefficients `(*batch, n, k)`, of any floating-point dtype; solved in float64.

        Returns:
            The solution, in float64. Gradients reach every tensor of `qp`.

        Raises:
            InputError: no QP of floating-point tensors on one device, shapes don't go together, there are no bounds, or
                a lower one is above an upper one (looked at on the CPU only).
            SolverError: a task failed and `on_failure="raise"`; with "warn", it is a `SolverWarning`.
            ConvexHeadsError: in the backward pass, where a second derivative is asked for that the backend doesn't
                have.
        """
        _check_kinds(qp)
        _check_shapes(qp)
        batch, device = qp.linear.shape[:-2], qp.linear.device
        _check_bounds(qp)
        with full_precision(device):
            dtype = working_dtype(device)
            flat = qp.flatten()
            if any(value.dtype != dtype for value in flat.tensors().values()):
                flat = flat.map(lambda _, value: value.to(dtype))
            solution = self._solution(flat)
            if len(batch) != 1:
                solution = solution.map(lambda _, value: value.reshape((*batch, *value.shape[1:])))
        complain(type(self).__name__, solution, self.tolerance, self.on_failure)
        return solution

    def _solution(self, qp: QP) -> Solution:
        """Solve a flat batch of problems in working precision, with gradient."""
        return self._answer(qp)[0]

    def _answer(self, qp: QP) -> tuple[Solution, Float[Tensor, " tasks"], ActiveSet | Relaxed | None]:
        """As `_solution`; with the Hessian's scale in the units of the solve, and what the gradient is made of."""
        mended, broken = _without_broken_tasks(qp)
        units, unit, size = mended.in_units()
        # A batch without tasks has its answer already.
        coef, iterations, certificate, found = self._solved(mended, units, unit) if len(unit) else Solved(units.linear)
        if certificate is None:
            certificate = units.detach().certify(coef.detach())
        certificate = units.detach().allow_for_rounding(certificate)
        solution = Solution(
            coef=torch.where(broken, torch.nan, unit)[:, None, None] * coef,
            bound_multipliers=certificate.bound_multipliers * size[:, None, None],
            row_multipliers=certificate.row_multipliers * size[:, None],
            status=torch.where(broken, Status.FAILED, self._status(certificate)),
            gap=torch.where(broken, torch.nan, certificate.gap),
            residual=certificate.residual,
            iterations=iterations,
        )
        if isinstance(found, Relaxed):
            found = found._replace(point=unit[:, None, None] * found.point)
        return solution, unit / size, found

    def _solved(self, qp: QP, units: QP, unit: Float[Tensor, " tasks"]) -> Solved:
        """Solve a flat batch that comes as it is and in units, of which `unit` is the coefficients'; in units."""
        return self._coefficients(units)

    def _status(self, certificate: Certificate) -> Int[Tensor, " tasks"]:
        tolerance = max(self.tolerance, 4096 * torch.finfo(certificate.gap.dtype).eps)
        # The gap is of second order in the error of the coefficients, the residual of first.
        converged = (certificate.gap <= tolerance) & (certificate.residual <= tolerance**0.5)
        finite = torch.isfinite(certificate.gap)
        otherwise = Status.FAILED if self.max_iterations is None else Status.STOPPED
        status = torch.where(converged, Status.CONVERGED, otherwise)
        return torch.where(finite, status, Status.FAILED)


def check_on_failure(name: str, on_failure: object) -> None:
    """Raise `InputError` unless it is one of the three things to do about a failure."""
    if not isinstance(on_failure, str) or on_failure not in get_args(OnFailure):
        raise InputError(f"{name}(on_failure)", f"one of {get_args(OnFailure)}", repr(on_failure))


def complain(name: str, solution: Solution, tolerance: float, on_failure: OnFailure) -> None:
    """Raise or warn, as asked for, if a task of the solution failed."""
    if on_failure == "return":
        return
    failures = inspect_values(_failures, solution.status, solution.gap, solution.residual)
    if not failures:
        return
    message = (
        f"{name}: {len(failures)} of {solution.status.numel()} tasks not solved to the tolerance "
        f"{tolerance:g} ({'; '.join(failures[:5])}{'; ...' if len(failures) > 5 else ''}). "
    )
    if on_failure == "raise":
        advice = "on_failure='warn' or 'return' carries on with it."
        raise SolverError(f"{message}The whole batch's solution is in `SolverError.solution`; {advice}", solution)
    warnings.warn(message + "The status of each is in the fit's `solution`.", SolverWarning, stacklevel=3)


def _failures(status: Tensor, gap: Tensor, residual: Tensor) -> list[str]:
    failed = [tuple(task) for task in (status == Status.FAILED).nonzero().tolist()]

    def told(task: tuple[int, ...]) -> str:
        where = f"task {task}" if task else "the task"
        return f"{where}: relative gap {gap[task].item():.1e}, residual {residual[task].item():.1e}"

    return [told(task) for task in failed]


def _check_kinds(qp: object) -> None:
    if not isinstance(qp, QP):
        raise InputError("qp", "a QP", type(qp).__name__)
    check_bool("QP(row_sum)", qp.row_sum)
    for name, value in vars(qp).items():
        optional = name not in ("gram", "linear")
        if name != "row_sum" and not (is_float_tensor(value) or (value is None and optional)):
            raise InputError(f"QP({name})", "a tensor of floating-point values", describe_type(value))


def _check_shapes(qp: QP) -> None:
    if qp.linear.ndim < 2 or not all(qp.linear.shape[-2:]):
        raise InputError("QP(linear)", "(*batch, n, k), n and k at least 1", f"shape {tuple(qp.linear.shape)}")
    *batch, n, _ = qp.linear.shape
    square = {"gram": (*batch, n, n)} | ({} if qp.root is None else {"root": (*batch, n, *qp.root.shape[-1:])})
    for name, value in qp.tensors().items():
        expected = square.get(name, tuple(qp.linear.shape))
        if value.shape != expected:
            raise InputError(f"QP({name})", f"{expected}, to go with the linear term", f"shape {tuple(value.shape)}")
        if value.device != qp.linear.device:
            raise InputError(f"QP({name})", f"that of the linear term, {qp.linear.device}", f"device {value.device}")


def _check_bounds(qp: QP) -> None:
    if qp.lower is None and qp.upper is None:
        raise InputError("QP(lower, upper)", "at least one of them", "None for both")
    if qp.lower is not None and qp.upper is not None and qp.linear.device.type == "cpu":
        inspect_values(_check_order, qp.lower, qp.upper)


def _check_order(lower: Tensor, upper: Tensor) -> None:
    crossed = lower > upper
    if crossed.any():
        where = tuple(crossed.nonzero()[0].tolist())
        got = f"{lower[where].item():g} above {upper[where].item():g} at {where}"
        raise InputError("QP(lower, upper)", "lower <= upper everywhere", got)


def _without_broken_tasks(qp: QP) -> tuple[QP, Bool[Tensor, " tasks"]]:
    """A trivial problem in the place of every task with non-finite data, and which tasks those are."""
    tensors = qp.tensors()
    none = torch.zeros_like(qp.linear[:, 0, 0], dtype=torch.bool)
    # A look at the sums clears almost all that comes.
    if torch.isfinite(torch.stack([v.sum() for v in tensors.values()]).sum()):
        return qp, none
    bad = [torch.isnan(v) if name in ("lower", "upper") else ~torch.isfinite(v) for name, v in tensors.items()]
    broken = torch.stack([b.flatten(1).any(1) for b in bad]).any(0)
    eye = torch.eye(qp.gram.shape[-1]).to(qp.gram)
    harmless = {"gram": eye, "root": 0.0, "linear": 0.0, "lower": -1.0, "upper": 1.0, "smoothing": 1.0}

    def mend(name: str, value: Tensor) -> Tensor:
        return torch.where(broken.view(-1, *[1] * (value.ndim - 1)), harmless[name], value)

    return qp.map(mend), broken
