"""Certificates of heads with a closed form: how far rounding may have moved a solution from the optimum.

A closed form is as exact as the linear system behind it allows. With a regularizer that is tiny compared with the
features, the system is nearly singular, and digits are lost. Each head here minimizes a strongly convex quadratic
function, so the residual of its system bounds the distance of its weights from the optimum, as a gap does for SVMs. The
residual includes what rounding of the Gram matrix may hide.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar, get_args, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from convexheads._functorch import is_transforming_or_forward
from convexheads._looks import check
from convexheads._validation import Check, check_choice
from convexheads.heads._linear_algebra import cholesky_or_nan, per_matrix
from convexheads.heads._sharing import multiply
from convexheads.heads.base.support_set import KernelExpansion, SupportSet
from convexheads.precision import full_precision
from convexheads.solvers.certificate import ZERO_GAP, rounding_of_scores, size_of_rounding
from convexheads.solvers.failures import OnFailure, certified, handle_failures
from convexheads.solvers.problem import Solution, Status

_K = TypeVar("_K", bound=KernelExpansion)
TOLERANCE = 1e-6
"""The relative gap up to which a closed form counts as solved, as for iterative solvers."""
_REMEDY = "The residual bounds the relative error of the weights. A larger regularizer leaves more digits. "
check_on_failure: Check = partial(check_choice, choices=get_args(OnFailure))
Errors = tuple[Tensor, Tensor]
"""The relative gap of each task, and an upper bound of the squared relative error of its weights, `(*batch,)` both."""
# The largest number of entries of the tensors that a fit keeps for a certificate.
_MAX_ENTRIES_TO_KEEP = 2**20


@runtime_checkable
class ClosedForm(Protocol):
    """A head with a closed form."""

    on_failure: OnFailure


@dataclass(frozen=True, eq=False, repr=False)
class CholeskySystem:
    """Matrices plus a shift on their diagonals, as Cholesky factors.

    Attributes:
        factor: the lower factors, `(*batch, m, m)`; NaN where there is none.
        shift: the shifts, `()` or `(*batch,)`.
    """

    factor: Float[Tensor, "*batch m m"]
    shift: Float[Tensor, "*#batch"]

    @classmethod
    def of(
        cls, matrix: Float[Tensor, "*batch m m"], shift: Float[Tensor, "*#batch"], *, validate: bool
    ) -> CholeskySystem:
        """Factorize the matrices plus a shift per matrix, as `cholesky_or_nan` does."""
        each = shift.expand(matrix.shape[:-2]) if shift.ndim else shift
        return cls(cholesky_or_nan(matrix, each, validate=validate), each)

    def solve(self, right: Float[Tensor, "*batch m k"]) -> Float[Tensor, "*batch m k"]:
        """The product of the inverse and a right-hand side."""
        return torch.cholesky_solve(right, self.factor)

    def inverse_norm(self) -> Float[Tensor, "*batch"]:
        """An upper bound of the largest eigenvalue of the inverse."""
        eye = torch.eye(self.factor.shape[-1], dtype=self.factor.dtype, device=self.factor.device)
        inverse = torch.linalg.solve_triangular(self.factor, eye, upper=False)
        return torch.minimum(inverse.square().sum((-2, -1)), self.shift.reciprocal())

    @torch.no_grad()
    def may_lose_digits(self) -> Tensor:
        """A flag `()`; where it is False, the relative gap of each task is below `ZERO_GAP`, in spite of rounding.

        A solution x satisfies a system whose matrix A differs by at most `(3m + 1) eps tr(A)` (Higham 2002, Theorem
        10.4), and computing A and the residual adds less than `(m + 5) eps tr(A)`. The residual is then at most
        `4 (m + 2) eps tr(A) |x|`, and the relative gap at most the square of `4 (m + 2) eps tr(A) / shift`.
        """
        limit = ZERO_GAP**0.5 / (4 * (self.factor.shape[-1] + 2) * torch.finfo(self.factor.dtype).eps)
        return ~(_norm(self.factor) <= (limit * self.shift).sqrt()).all()  # the square of the norm is the trace


@dataclass(frozen=True, eq=False, repr=False)
class SpectralSystem:
    """Matrices plus a grid of shifts on their diagonals, as eigenvalues and eigenvectors.

    Attributes:
        vectors: the eigenvectors, `(*batch, m, m)`.
        values: the eigenvalues plus the shifts, ascending, `(*grid, m)`.
    """

    vectors: Float[Tensor, "*batch m m"]
    values: Float[Tensor, "*grid m"]

    def solve(self, right: Float[Tensor, "*batch m k"]) -> Float[Tensor, "*grid m k"]:
        """The product of the inverse and a right-hand side."""
        return multiply(self.vectors, (self.vectors.mT @ right) / self.values.unsqueeze(-1))

    def inverse_norm(self) -> Float[Tensor, "*grid"]:
        """The largest eigenvalue of the inverse."""
        return 1 / self.values[..., 0]

    may_lose_digits = None  # nothing is proved before the errors are measured


ShiftedSystem = CholeskySystem | SpectralSystem


def factorize(matrix: Float[Tensor, "*batch m m"], shift: Float[Tensor, "*grid"], *, validate: bool) -> ShiftedSystem:
    """Factorize the matrices plus each shift; a grid of shifts needs one factorization. Without a factor: NaN."""
    batch = matrix.shape[:-2]
    if not shift.ndim or torch.broadcast_shapes(shift.shape, batch).numel() == batch.numel():
        return CholeskySystem.of(matrix, shift, validate=validate)
    values, vectors = torch.linalg.eigh(matrix)
    return SpectralSystem(vectors, values.clamp_min(0) + shift.unsqueeze(-1))


def errors_of_dual(
    gram: Float[Tensor, "*tasks n n"],
    penalty: Float[Tensor, "*grid"],
    targets: Tensor,
    coef: Float[Tensor, "*batch n k"],
) -> Errors:
    """The errors of dual coefficients of ridge regression, which solve `(gram + penalty I) coef = targets`.

    With the residual r, the duality gap is `|r|^2 / 2`, and the squared error of the weights at most `|r|^2 / penalty`.
    By rounding, the residual may be off by `size_of_rounding`.
    """
    tiny = torch.finfo(gram.dtype).tiny
    targets, coef = _in_units(targets, coef)
    image = multiply(gram.expand(*coef.shape[:-2], *gram.shape[-2:]), coef)
    error = targets - image  # of the scores
    residual = torch.addcmul(error, per_matrix(penalty), coef, value=-1)
    squared = (_norm(residual) + size_of_rounding(gram, coef)).square()
    quadratic = penalty * (coef * image).sum((-2, -1)).clamp_min(0)
    objective = _norm(error).square() + quadratic  # times two
    return squared / objective.clamp_min(tiny), squared / quadratic.clamp_min(tiny)


def errors_of_weights(
    features: Float[Tensor, "*tasks n d"],
    penalty: Float[Tensor, "*grid"],
    error: Float[Tensor, "*batch n k"],
    weight: Float[Tensor, "*batch d k"],
    system: ShiftedSystem,
) -> Errors:
    """The errors of weights of ridge regression, whose scores differ from the targets by `error`.

    The `system` is the matrix `features' features + penalty I`. Let b be the largest eigenvalue of its inverse. With
    the gradient g of the objective, the error of the latter is at most `b |g|^2 / 2`, and that of the weights `b |g|`.
    """
    error, weight = _in_units(error, weight)
    gradient = multiply(features.mT, error) - per_matrix(penalty) * weight
    objective = _norm(error).square() + penalty * _norm(weight).square()  # times two
    return _bounds(gradient, objective, features, error, weight, system)


def errors_of_system(
    rows: Float[Tensor, "*batch n d"],
    shift: Float[Tensor, "*batch"],
    right: Float[Tensor, "*batch d k"],
    weight: Float[Tensor, "*batch d k"],
    system: ShiftedSystem,
) -> Errors:
    """The errors of weights w that solve the `system` `(rows' rows + shift I) w = right`.

    They minimize `|rows w|^2 / 2 + shift |w|^2 / 2 - w' right`, and their errors are bounded as in `errors_of_weights`.
    """
    image = rows @ weight
    residual = right - rows.mT @ image - per_matrix(shift) * weight
    return _bounds(residual, (right * weight).sum((-2, -1)), rows, image, weight, system)


def _bounds(
    gradient: Tensor, objective: Tensor, rows: Tensor, factors: Tensor, weight: Tensor, system: ShiftedSystem
) -> Errors:
    """The errors of weights, from the gradient and twice the absolute objective.

    The gradient contains the sum of the `rows` times their `factors`, which depend on the products of rows and weights.
    A product may be off by eps times both lengths, and its part of the gradient by that times the length of the row.
    """
    eps, tiny = torch.finfo(rows.dtype).eps, torch.finfo(rows.dtype).tiny
    length, size = _norm(rows, -1), _norm(weight)
    rounding = eps * (length * torch.addcmul(_norm(factors, -1), length, size.unsqueeze(-1))).sum(-1)
    slope = _norm(gradient) + rounding
    inverse_norm = system.inverse_norm()
    gap = inverse_norm * slope.square() / objective.clamp_min(tiny)
    return gap, (inverse_norm * slope / size.clamp_min(tiny)).square()


def errors_of_gaussians(
    gram: Float[Tensor, "*batch n n"],
    scatter: Float[Tensor, "*batch n n"],
    shift: Float[Tensor, "*batch"],
    mean: Float[Tensor, "*batch n k"],
    coef: Float[Tensor, "*batch n k"],
) -> Errors:
    """The errors of coefficients of weights w that solve `(scatter + shift I) w = mean` in the kernel's feature space.

    The weights minimize `w' (scatter + shift I) w / 2 - w' mean`. With the residual r, the error of this objective is
    at most `|r|^2 / (2 shift)`, and that of the weights `|r| / shift`.

    Args:
        gram: the Gram matrix.
        scatter: maps scores of the support examples to the coefficients of the product of the scatter matrix and the
            weights that have these scores; no eigenvalue is above one.
        shift: the smallest eigenvalue of the matrix.
        mean: the coefficients of the right-hand sides.
        coef: the coefficients of the weights.
    """
    tiny, image = torch.finfo(gram.dtype).tiny, gram @ coef
    residual = scatter @ image + per_matrix(shift) * coef - mean
    rounding = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sum(-1).sqrt() * _norm(
        scatter @ rounding_of_scores(gram, coef)
    )
    length = (residual * (gram @ residual)).sum((-2, -1)).clamp_min(0).sqrt() + rounding
    objective, squared = (mean * image).sum((-2, -1)), (coef * image).sum((-2, -1))
    gap = length.square() / (shift * objective).clamp_min(tiny)
    return gap, (length / shift).square() / squared.clamp_min(tiny)


def _in_units(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors in units in which they are at most one, so that squares are not too large for a number."""
    unit = torch.maximum(*(value.abs().amax((-2, -1), keepdim=True) for value in (first, second)))
    unit = unit.where(unit > 0, 1)
    return first / unit, second / unit


def _norm(value: Tensor, dim: int | tuple[int, int] = (-2, -1)) -> Tensor:
    return torch.linalg.vector_norm(value, dim=dim)


@dataclass(frozen=True, eq=False, repr=False)
class Unmeasured:
    """The solution of a closed form, to be called by whoever looks at its certificate.

    Measuring the errors takes as long as solving a small problem, so that is not done before.

    Attributes:
        coef: the coefficients, `(*batch, n, k)`.
        errors: a function that computes the `Errors`, and its `arguments`.
        largest_error: see `certified`.
    """

    coef: Float[Tensor, "*batch n k"]
    errors: Callable[..., Errors]
    arguments: tuple[Any, ...]
    largest_error: float | None

    def __call__(self) -> Solution:
        known = vars(self)
        if "_solution" not in known:
            known["_solution"] = self._measure()
        return known["_solution"]

    def __reduce__(self) -> tuple[Any, ...]:  # a file contains the certificate instead of the Gram matrix
        return copy.copy, (self(),)

    def _measure(self) -> Solution:
        batch = self.coef.shape[:-2]
        with torch.no_grad(), full_precision(self.coef.device):
            gap, error = (each.expand(batch) for each in self.errors(*self.arguments))
        return certified(self.coef, gap, error, TOLERANCE, Status.FAILED, None, largest_error=self.largest_error)


def with_solution(
    head: ClosedForm,
    expansion: _K,
    support: SupportSet,
    errors: Callable[..., Errors],
    *arguments: Any,
    doubt: Callable[[], Tensor] | None = None,
    largest_error: float | None = None,
) -> _K:
    """The expansion with a solution, after tasks that failed are handled; with `validate=False`, no status is read.

    Args:
        head: the head, which is named in errors.
        expansion: the expansion.
        support: the support set.
        errors: a function that computes the `Errors` from the `arguments`.
        arguments: tensors and systems.
        doubt: computes a flag as for `check`; if it is not set, no task has failed. Defaults to None (unknown).
        largest_error: see `certified`.
    """
    unmeasured = Unmeasured(expansion.coef, errors, arguments, largest_error)

    def handle() -> Solution:
        return handle_failures(type(head).__name__, unmeasured(), TOLERANCE, head.on_failure, remedy=_REMEDY)

    is_read = support.validate and head.on_failure != "return"
    if (is_read and doubt is None) or _is_traced() or _entries(arguments) > _MAX_ENTRIES_TO_KEEP:
        return replace(expansion, solution=handle() if support.validate else unmeasured())
    if is_read and doubt is not None:
        check(doubt(), handle)
    return replace(expansion, solution=unmeasured)


def _is_traced() -> bool:
    """Whether tensors stand for others, in a graph or in a transform of `torch.func`."""
    return torch.compiler.is_compiling() or is_transforming_or_forward()


def _entries(arguments: tuple[Any, ...]) -> int:
    return sum(part.numel() for part in arguments if isinstance(part, Tensor))
