"""A head from any convex problem that CVXPY can express."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from convexheads.errors import InputError, MissingDependencyError, SolverError, described
from convexheads.heads import inputs
from convexheads.heads.base import Dual, Head
from convexheads.hyperparameters import Hyperparameter, display, positive, value_of
from convexheads.kernels import Kernel
from convexheads.solvers.adapters import _external, cvxpylayers

if TYPE_CHECKING:
    import cvxpy

_TOLERANCE = 1e-10
_MAX_ITERATIONS = 200
# Of constraints, relative to the variables, at what counts as solved.
_VIOLATION = 1e-5


@dataclass(frozen=True)
class CvxpyTask:
    """What a problem may be made of, as CVXPY's own objects, for one task of n examples and k classes.

    `CvxpyHead` makes it.

    Attributes:
        coef: the variable, `(n, k)`: dual coefficients.
        scores: of the support examples, `gram @ coef`, `(n, k)`.
        squared_norm: of the weights, the sum over classes of `|w_k|^2`: a convex expression, a scalar.
        targets: one-hot labels, a parameter, `(n, k)`.
        parameters: the head's hyper-parameters by name, positive scalar parameters. CVXPY wants them not to multiply
            `targets`: `lambda * squared_norm + loss` will do where `squared_norm + C * loss` won't.
    """

    coef: cvxpy.Variable
    scores: cvxpy.Variable
    squared_norm: cvxpy.Expression
    targets: cvxpy.Parameter
    parameters: dict[str, cvxpy.Parameter]


class CvxpyHead(Head):
    """Bring your own base learner, as a convex problem in CVXPY. It needs the extra `cvxpylayers`.

    Hand over a function that takes a `CvxpyTask` and returns what to minimise, or a whole `cvxpy.Problem`. It is called
    once for each shape. Solved with Clarabel (Goulart & Chen 2024) to 1e-10, differentiated by cvxpylayers (Agrawal et
    al. 2019): on the CPU, task by task, first derivatives only. For trying out a base learner, before writing its dual.

    What differs from cvxpylayers alone: a task without a solution is an error, where that returns any numbers; and
    gradients are scaled, as diffcp takes those below 1e-8 for zero.

    Args:
        build: the function, of one argument. The problem has to be convex, and DPP in its parameters.
        parameters: hyper-parameters by name, positive; floats or `Learnable`, which gradients reach. Default none.
        kernel: any callable `(x, y) -> gram`; default `Linear()`.
        scale: factor of all logits (gamma in Eq. 12 of Lee et al. 2019), positive; a float or `Learnable`. Default 1.

    Raises:
        InputError: an argument is unusable. Calls raise what `Head.forward` does, for a problem that is not convex or
            not DPP, and for a kernel that is not positive semi-definite; and `SolverError` for a task whose problem is
            infeasible, unbounded, or too hard.
        MissingDependencyError: cvxpylayers is not installed.

    Example:
        `CvxpyHead(lambda task: cvxpy.norm1(task.coef) + 10 * cvxpy.sum_squares(task.targets - task.scores))`
    """

    def __init__(
        self,
        build: Callable[[CvxpyTask], Any],
        *,
        parameters: Mapping[str, Hyperparameter] | None = None,
        kernel: Kernel | None = None,
        scale: Hyperparameter = 1.0,
    ) -> None:
        super().__init__(kernel=kernel, scale=scale)
        if find_spec("cvxpylayers") is None:
            raise MissingDependencyError("cvxpylayers", extra="cvxpylayers", needed_by="CvxpyHead")
        if not callable(build):
            raise InputError("build", repr(build), "a function from a CvxpyTask to what to minimise")
        if not isinstance(parameters, Mapping | None) or not all(map(_is_name, parameters or ())):
            raise InputError("parameters", described(parameters), "hyper-parameters by name, which is an identifier")
        self.build = build
        self.parameters_by_name = {
            name: positive(f"parameters[{name!r}]", value) for name, value in (parameters or {}).items()
        }
        self.learnables = nn.ModuleDict({n: v for n, v in self.parameters_by_name.items() if isinstance(v, nn.Module)})

    def dual(self, gram: Float[Tensor, "*batch n n"], targets: Float[Tensor, "*batch n k"]) -> Dual:
        *batch, n, k = targets.shape
        layer = _layer(self.build, n, k, tuple(self.parameters_by_name))
        values = [value_of(value, gram).expand(batch).reshape(-1) for value in self.parameters_by_name.values()]

        inputs.check_definite(gram)
        broken = ~torch.isfinite(gram).all(-1, keepdim=True).all(-2, keepdim=True)  # on a GPU nobody has looked yet
        gram = gram.masked_fill(broken, 0)

        def solve(gram: Tensor, targets: Tensor, *values: Tensor) -> Tensor:
            parameters = (gram, _SquareRoot.apply(gram), targets, *values)
            found = cvxpylayers.call(layer, *parameters, tolerance=_TOLERANCE, max_iterations=_MAX_ITERATIONS)
            tasks = zip(zip(*parameters, strict=True), zip(*found, strict=True), strict=True)
            solved = [_is_solved(layer, *task) for task in tasks]
            return torch.where(torch.tensor(solved, device=gram.device)[:, None, None], found[0], torch.nan)

        flat = gram.reshape(-1, n, n), targets.reshape(-1, n, k)
        coef = _external.call_backend(solve, *flat, *values, backend="CvxpyHead") if len(flat[0]) else flat[1]
        coef = coef.masked_fill(broken.reshape(-1, 1, 1), torch.nan)
        failed = (~torch.isfinite(coef)).flatten(1).any(1).reshape(batch).nonzero().tolist()
        if failed:
            named = ", ".join(str(tuple(task)) for task in failed[:5])
            failures = f"{len(failed)} of {len(flat[0])} tasks not solved ({named})"
            raise SolverError(f"CvxpyHead: {failures}: infeasible, unbounded, or too hard")
        return Dual(coef.reshape(targets.shape))

    def _settings(self) -> list[str]:
        settings = [getattr(self.build, "__name__", repr(self.build))]
        if self.parameters_by_name:
            shown = ", ".join(f"{name!r}: {display(value)}" for name, value in self.parameters_by_name.items())
            settings.append(f"parameters={{{shown}}}")
        return settings + super()._settings()


def _is_name(value: object) -> bool:
    """Whether a `nn.ModuleDict` takes it, too: no attribute of its own."""
    return isinstance(value, str) and value.isidentifier() and not hasattr(nn.ModuleDict, value)


@lru_cache(maxsize=64)
def _layer(build: Callable[[CvxpyTask], Any], n: int, k: int, names: tuple[str, ...]) -> cvxpylayers.Layer:
    import cvxpy

    coef, scores, weights = cvxpy.Variable((n, k)), cvxpy.Variable((n, k)), cvxpy.Variable((n, k))
    gram, root, targets = cvxpy.Parameter((n, n)), cvxpy.Parameter((n, n)), cvxpy.Parameter((n, k))
    parameters = {name: cvxpy.Parameter(nonneg=True) for name in names}
    problem = build(CvxpyTask(coef, scores, cvxpy.sum_squares(weights), targets, parameters))
    if isinstance(problem, cvxpy.Expression | int | float):
        problem = cvxpy.Minimize(problem)
    if isinstance(problem, cvxpy.Minimize):
        problem = cvxpy.Problem(problem)
    if not isinstance(problem, cvxpy.Problem):
        raise InputError("build", f"a {type(problem).__name__} from it", "an expression to minimise or a cvxpy.Problem")
    # Scores and weights (in an orthonormal basis of the support's span) are variables of their own, so that their
    # products with parameters are DPP.
    tied = [scores == gram @ coef, weights == root @ coef]
    problem = cvxpy.Problem(problem.objective, [*problem.constraints, *tied])
    if not problem.is_dcp():
        raise InputError("build", "a problem that is not convex by CVXPY's rules (is_dcp)", "a convex problem")
    if not problem.is_dpp():
        wanted = (
            "one in which parameters (targets, hyper-parameters) don't multiply each other: put a hyper-parameter on "
            "`squared_norm`, for instance"
        )
        raise InputError("build", "a problem that is convex, but not DPP", wanted)
    used = {parameter.id for parameter in problem.parameters()}
    given = [gram, root, targets, *parameters.values()]
    # cvxpylayers wants every parameter used; what the problem leaves out is added with weight zero.
    unused = [parameter for parameter in given if parameter.id not in used]
    if unused:
        idle = sum(cvxpy.sum(cvxpy.multiply(0 * parameter, 1)) for parameter in unused)
        problem = cvxpy.Problem(problem.objective + cvxpy.Minimize(idle), problem.constraints)
    others = [variable for variable in problem.variables() if variable.id != coef.id]
    return cvxpylayers.layer_of(problem, given, [coef, *others])


def _is_solved(layer: cvxpylayers.Layer, parameters: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    """Whether values for the variables are feasible, and don't point to where the problem is unbounded."""
    import numpy as np

    if not all(torch.isfinite(value).all() for value in found):
        return False
    for parameter, value in zip(layer.parameters, parameters, strict=True):
        parameter.value = value.detach().cpu().numpy()
    values = [value.detach().cpu().numpy() for value in found]
    size = 1 + max(abs(value).max() for value in values)

    def at(factor: float) -> tuple[bool, float]:
        for variable, value in zip(layer.variables, values, strict=True):
            variable.project_and_assign(factor * value)
        violation = max((float(np.max(c.violation())) for c in layer.problem.constraints), default=0.0)
        return bool(violation <= _VIOLATION * size), float(layer.problem.objective.value)

    feasible, value = at(1.0)
    # A convex objective can't be lower twice as far from zero than at its minimum.
    further, beyond = at(2.0)
    return feasible and not (further and beyond < value - _VIOLATION * (1 + abs(value)))


class _SquareRoot(torch.autograd.Function):
    """The symmetric square root of a positive semi-definite matrix; where it is singular, zero is its derivative."""

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
