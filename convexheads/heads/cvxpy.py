"""A head from any convex problem that CVXPY can express."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor, nn

from convexheads._functorch import inspect_values, refuse_transforms
from convexheads._validation import check_definite, describe, describe_task, optional
from convexheads.errors import InputError, MissingDependencyError, SolverError
from convexheads.heads.base.classification import ClassificationHead
from convexheads.heads.base.support_set import KernelExpansion, SupportSet
from convexheads.hyperparameters import Hyperparameter, as_tensor, check_positive
from convexheads.kernels import KernelLike
from convexheads.solvers.adapters import cvxpylayers, external

if TYPE_CHECKING:
    import cvxpy

_TOLERANCE = 1e-10
_MAX_ITERATIONS = 200
# The violation of constraints, relative to the variables, up to which a task counts as solved.
_VIOLATION = 1e-5


@dataclass(frozen=True, eq=False)
class CvxpyTask:
    """The CVXPY objects from which a `CvxpyHead` builds the problem of one task with n examples and k classes.

    Attributes:
        coef: the variable, `(n, k)`: dual coefficients.
        scores: scores of the support examples, `gram @ coef`, `(n, k)`.
        squared_norm: the sum over classes of `|w_k|^2`, a convex expression, a scalar.
        targets: one-hot labels, a parameter, `(n, k)`.
        parameters: the head's hyperparameters by name, as non-negative scalar parameters. CVXPY does not allow them to
            multiply `targets`: write `lambda * squared_norm + loss`, not `squared_norm + C * loss`.
    """

    coef: cvxpy.Variable
    scores: cvxpy.Variable
    squared_norm: cvxpy.Expression
    targets: cvxpy.Parameter
    parameters: dict[str, cvxpy.Parameter]


def _check_build(name: str, value: Any) -> Any:
    with suppress(TypeError):
        hash(ref(value))  # the key of compiled problems
        if callable(value):
            return value
    raise InputError(name, "a hashable function that returns an expression to minimize for a CvxpyTask", repr(value))


class _Hyperparameters(nn.Module):
    """Hyperparameters by name. `Learnable`s among them are parameters of the head."""

    def __init__(self, by_name: Mapping[str, Hyperparameter]) -> None:
        super().__init__()
        self.by_name = dict(by_name)
        for name, value in self.by_name.items():
            if isinstance(value, nn.Module):
                self.add_module(name, value)

    def __repr__(self) -> str:
        return repr(self.by_name)


def _check_hyperparameters(name: str, value: Any) -> _Hyperparameters:
    if isinstance(value, _Hyperparameters):
        return value
    reserved = dir(_Hyperparameters({}))  # these cannot be names of submodules
    keys = value if isinstance(value, Mapping) else [None]
    if not all(isinstance(key, str) and key.isidentifier() and key not in reserved for key in keys):
        raise InputError(name, "a mapping from identifiers to hyperparameters", describe(value))
    return _Hyperparameters({key: check_positive(f"{name}[{key!r}]", number) for key, number in value.items()})


class CvxpyHead(ClassificationHead):
    """A head from a convex problem that you write in CVXPY. It needs the extra `cvxpylayers`.

    Use it to try out a convex problem before writing its dual. Problems are solved with Clarabel (Goulart & Chen 2024)
    to 1e-10 and differentiated once by cvxpylayers (Agrawal et al. 2019), on the CPU and task by task.

    Differences from cvxpylayers alone: a task without a solution is an error, where cvxpylayers returns arbitrary
    numbers; and gradients are scaled, because cvxpylayers treats those below 1e-8 as zero.

    Args:
        build: a function from a `CvxpyTask` to an expression to minimize, or to a whole `cvxpy.Problem`. The problem
            has to be convex, and to follow CVXPY's rules for parameters (disciplined parametrized programming, DPP). It
            is compiled once per shape, which takes seconds, and the last 64 compiled problems are kept: pass the same
            function every time, not a new lambda in every step.
        hyperparameters: positive hyperparameters by name, floats or `Learnable`s, which receive gradients. They are
            the `parameters` of the `CvxpyTask`. Defaults to None.
        kernel: see `ClassificationHead`, also for `scale`, `validate` and the errors.

    Raises:
        InputError: calls raise it also for a problem that is not convex or not DPP.
        SolverError: calls raise it for a task whose problem is infeasible, unbounded, or not solved within the
            iteration limit.
        MissingDependencyError: cvxpylayers is not installed.

    Example:
        `CvxpyHead(lambda task: cvxpy.norm1(task.coef) + 10 * cvxpy.sum_squares(task.targets - task.scores))`
    """

    checks = ClassificationHead.checks | {"build": _check_build, "hyperparameters": optional(_check_hyperparameters)}

    hyperparameters: Any

    def __init__(
        self,
        build: Callable[[CvxpyTask], Any],
        *,
        hyperparameters: Mapping[str, Hyperparameter] | None = None,
        kernel: KernelLike | None = None,
        scale: Hyperparameter = 1.0,
        validate: bool = True,
    ) -> None:
        super().__init__(kernel=kernel, scale=scale, validate=validate)
        if find_spec("cvxpylayers") is None:
            raise MissingDependencyError("cvxpylayers", extra="cvxpylayers", needed_by="CvxpyHead")
        self.build, self.hyperparameters = build, hyperparameters

    @property
    def is_traceable(self) -> bool:
        return False

    def solve(self, support: SupportSet) -> KernelExpansion:
        refuse_transforms("CvxpyHead")
        gram, targets = support.gram, support.targets
        *batch, n, k = targets.shape
        hyperparameters = {} if self.hyperparameters is None else self.hyperparameters.by_name
        with cvxpylayers.compile_lock:
            layer = _compile(ref(self.build), n, k, tuple(hyperparameters))
        values = [as_tensor(value, gram).expand(batch).reshape(-1) for value in hyperparameters.values()]

        if support.validate:
            inspect_values(check_definite, gram)
        non_finite = ~torch.isfinite(gram).all(-1, keepdim=True).all(-2, keepdim=True)
        gram = gram.masked_fill(non_finite, 0)

        def solve_flat(gram: Tensor, targets: Tensor, *values: Tensor) -> Tensor:
            parameters = (gram, _SquareRoot.apply(gram), targets, *values)
            found = cvxpylayers.call(layer, *parameters, tolerance=_TOLERANCE, max_iterations=_MAX_ITERATIONS)
            tasks = zip(zip(*parameters, strict=True), zip(*found, strict=True), strict=True)
            with layer.lock:  # the check assigns to the variables of the layer, which other threads may share
                solved = [_is_solved(layer, *task) for task in tasks]
            return torch.where(torch.tensor(solved, device=gram.device)[:, None, None], found[0], torch.nan)

        flat = gram.reshape(-1, n, n), targets.reshape(-1, n, k)
        coef = external.call_backend(solve_flat, *flat, *values, backend="CvxpyHead") if len(flat[0]) else flat[1]
        coef = coef.masked_fill(non_finite.reshape(-1, 1, 1), torch.nan)
        unsolved = (~torch.isfinite(coef)).flatten(1).any(1).reshape(batch)
        if failed := unsolved.nonzero().tolist():
            named = "; ".join(map(describe_task, failed[:5]))
            reason = "infeasible, unbounded, or not solved within the iteration limit"
            raise SolverError(f"CvxpyHead: {len(failed)} of {len(flat[0])} tasks not solved ({named}): {reason}")
        return KernelExpansion(coef.reshape(targets.shape))


@lru_cache(maxsize=64)
def _compile(function: ref[Callable[[CvxpyTask], Any]], n: int, k: int, names: tuple[str, ...]) -> cvxpylayers.Layer:
    """Compile the problem of a function for one shape. The reference is weak, so that the cache keeps no function."""
    import cvxpy

    build = function()
    assert build is not None  # the head holds it
    coef, scores, weights = cvxpy.Variable((n, k)), cvxpy.Variable((n, k)), cvxpy.Variable((n, k))
    gram, root, targets = cvxpy.Parameter((n, n)), cvxpy.Parameter((n, n)), cvxpy.Parameter((n, k))
    parameters = {name: cvxpy.Parameter(nonneg=True) for name in names}
    problem = build(CvxpyTask(coef, scores, cvxpy.sum_squares(weights), targets, parameters))
    if isinstance(problem, cvxpy.Expression | int | float):
        problem = cvxpy.Minimize(problem)
    if isinstance(problem, cvxpy.Minimize):
        problem = cvxpy.Problem(problem)
    if not isinstance(problem, cvxpy.Problem):
        raise InputError("build", "an expression to minimize or a cvxpy.Problem", f"a {type(problem).__name__} from it")
    # cvxpylayers requires that every parameter is used; a term of zero uses those that the problem omits.
    used = {parameter.id for parameter in problem.parameters()}
    zeros = [cvxpy.sum(cvxpy.multiply(0 * p, 1)) for p in (targets, *parameters.values()) if p.id not in used]
    objective = -problem.objective if isinstance(problem.objective, cvxpy.Maximize) else problem.objective
    objective = objective + cvxpy.Minimize(sum(zeros)) if zeros else objective
    # Scores and weights (in an orthonormal basis of the support's span) are separate variables, so that their
    # products with parameters are DPP.
    problem = cvxpy.Problem(objective, [*problem.constraints, scores == gram @ coef, weights == root @ coef])
    if not problem.is_dcp():
        raise InputError("build", "a convex problem", "a problem that is not convex by CVXPY's rules (is_dcp)")
    if not problem.is_dpp():
        got = "a problem that is convex but not DPP: parameters may multiply `squared_norm`, but not each other"
        raise InputError("build", "a DPP problem", got)
    others = [variable for variable in problem.variables() if variable.id != coef.id]
    return cvxpylayers.layer_of(problem, [gram, root, targets, *parameters.values()], [coef, *others])


def _is_solved(layer: cvxpylayers.Layer, parameters: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    """Whether values for the variables are feasible, and not a direction of unbounded descent."""
    import numpy as np

    if not all(torch.isfinite(value).all() for value in found):
        return False
    for parameter, value in zip(layer.parameters, parameters, strict=True):
        parameter.value = value.detach().cpu().numpy()
    values = [value.detach().cpu().numpy() for value in found]
    magnitude = 1 + max(abs(value).max() for value in values)
    if magnitude * np.finfo(np.float64).eps > _VIOLATION:  # unbounded, and rounding hides it
        return False

    def evaluate_at(factor: float) -> tuple[bool, float]:
        for variable, value in zip(layer.variables, values, strict=True):
            variable.project_and_assign(factor * value)
        violation = max((float(np.max(c.violation())) for c in layer.problem.constraints), default=0.0)
        return bool(violation <= _VIOLATION * magnitude), float(layer.problem.objective.value)

    feasible, value = evaluate_at(1.0)
    # A convex objective cannot be lower at twice the minimizer than at the minimizer.
    doubled_is_feasible, doubled_value = evaluate_at(2.0)
    return feasible and not (doubled_is_feasible and doubled_value < value - _VIOLATION * (1 + abs(value)))


class _SquareRoot(torch.autograd.Function):
    """The symmetric square root of a positive semi-definite matrix; the derivative in its null space is set to zero."""

    @staticmethod
    def forward(ctx, matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        roots = values.clamp_min(0).sqrt()
        ctx.save_for_backward(roots, vectors)
        return (vectors * roots.unsqueeze(-2)) @ vectors.mT

    @staticmethod
    def backward(ctx, gradient: Tensor):
        roots, vectors = ctx.saved_tensors
        sums = roots.unsqueeze(-1) + roots.unsqueeze(-2)
        singular = sums <= 1e-8 * sums.amax((-2, -1), keepdim=True)
        inner = vectors.mT @ ((gradient + gradient.mT) / 2) @ vectors
        return vectors @ torch.where(singular, 0, inner / sums) @ vectors.mT
