"""Certificates of heads with a closed form: how far rounding may have moved a solution from the optimum.

A closed form is as exact as the linear system behind it allows. With a regularizer that is tiny compared with the
features, the system is nearly singular, and digits are lost. Each head here minimizes a strongly convex quadratic
function, so the residual of its system bounds the distance of its weights from the optimum, as a gap does for SVMs. The
residual includes what rounding of the Gram matrix may hide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeVar, get_args, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from convexheads._validation import Check, check_choice
from convexheads.heads._linear_algebra import per_matrix, shifted_cholesky
from convexheads.heads._sharing import multiply
from convexheads.heads.base.support_set import KernelExpansion, SupportSet
from convexheads.solvers.certificate import rounding_of_scores, size_of_rounding
from convexheads.solvers.failures import OnFailure, certified, handle_failures
from convexheads.solvers.problem import Status

_K = TypeVar("_K", bound=KernelExpansion)
TOLERANCE = 1e-6
"""The relative gap up to which a closed form counts as solved, as for iterative solvers."""
_REMEDY = "The residual bounds the relative error of the weights. A larger regularizer leaves more digits. "
check_on_failure: Check = partial(check_choice, choices=get_args(OnFailure))


@runtime_checkable
class ClosedForm(Protocol):
    """A head with a closed form."""

    on_failure: OnFailure


@dataclass(frozen=True, eq=False, repr=False)
class ShiftedSystem:
    """Matrices plus a shift on their diagonals, factorized.

    Attributes:
        solve: the product of the inverse and a right-hand side, `(*batch, m, k)`.
        inverse_norm: computes an upper bound of the largest eigenvalue of the inverse, `(*batch,)`, without gradient.
    """

    solve: Callable[[Tensor], Tensor]
    inverse_norm: Callable[[], Tensor]

    @classmethod
    def of(cls, matrix: Float[Tensor, "*batch m m"], shift: Float[Tensor, "*grid"]) -> ShiftedSystem:
        """Factorize the matrices plus each shift; a grid of shifts needs one factorization. Without a factor: NaN."""
        batch = matrix.shape[:-2]
        if not shift.ndim or torch.broadcast_shapes(shift.shape, batch).numel() == batch.numel():
            factor = shifted_cholesky(matrix, shift.expand(batch), name="", validate=False)
            return cls(lambda right: torch.cholesky_solve(right, factor), lambda: _inverse_norm(factor, shift))
        values, vectors = torch.linalg.eigh(matrix)
        shifted = values.clamp_min(0) + shift.unsqueeze(-1)
        factors = (1 / shifted).unsqueeze(-1)
        return cls(
            lambda right: multiply(vectors, factors * (vectors.mT @ right)), lambda: 1 / shifted.detach()[..., 0]
        )


def _inverse_norm(factor: Tensor, shift: Tensor) -> Tensor:
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor.detach(), eye, upper=False)
    return torch.minimum(inverse.square().sum((-2, -1)), shift.detach().reciprocal())


@torch.no_grad()
def errors_of_dual(
    gram: Float[Tensor, "*tasks n n"],
    penalty: Float[Tensor, "*grid"],
    targets: Tensor,
    coef: Float[Tensor, "*batch n k"],
) -> tuple[Tensor, Tensor]:
    """The errors of dual coefficients of ridge regression, which solve `(gram + penalty I) coef = targets`.

    With the residual r, the duality gap is `|r|^2 / 2`, and the squared error of the weights at most `|r|^2 / penalty`.
    By rounding, the residual may be off by `size_of_rounding`.

    Returns:
        The relative gap and a bound of the squared relative error of the weights, `(*batch,)` both.
    """
    tiny = torch.finfo(gram.dtype).tiny
    image = multiply(gram.expand(*coef.shape[:-2], *gram.shape[-2:]), coef)
    error = targets - image  # of the scores
    residual = torch.addcmul(error, per_matrix(penalty), coef, value=-1)
    squared = (_norm(residual) + size_of_rounding(gram, coef)).square()
    quadratic = penalty * (coef * image).sum((-2, -1)).clamp_min(0)
    objective = _norm(error).square() + quadratic  # times two
    return squared / objective.clamp_min(tiny), squared / quadratic.clamp_min(tiny)


@torch.no_grad()
def errors_of_weights(
    features: Float[Tensor, "*tasks n d"],
    penalty: Float[Tensor, "*grid"],
    error: Float[Tensor, "*batch n k"],
    weight: Float[Tensor, "*batch d k"],
    inverse_norm: Tensor,
) -> tuple[Tensor, Tensor]:
    """The errors of weights of ridge regression, whose scores differ from the targets by `error`.

    The matrix `features' features + penalty I` has an inverse, whose largest eigenvalue is at most `inverse_norm`.

    With the gradient g of the objective, its error is at most `inverse_norm |g|^2 / 2`, and that of the weights
    `inverse_norm |g|`.

    Returns:
        As `errors_of_dual`.
    """
    gradient = multiply(features.mT, error) - per_matrix(penalty) * weight
    objective = _norm(error).square() + penalty * _norm(weight).square()  # times two
    return _bounds(gradient, objective, features, error, weight, inverse_norm)


@torch.no_grad()
def errors_of_system(
    rows: Float[Tensor, "*batch n d"],
    shift: Float[Tensor, "*batch"],
    right: Float[Tensor, "*batch d k"],
    weight: Float[Tensor, "*batch d k"],
    inverse_norm: Tensor,
) -> tuple[Tensor, Tensor]:
    """The errors of weights w that solve `(rows' rows + shift I) w = right`, with `inverse_norm` for the inverse.

    They minimize `|rows w|^2 / 2 + shift |w|^2 / 2 - w' right`, and their errors are bounded as in `errors_of_weights`.
    """
    image = rows @ weight
    residual = right - rows.mT @ image - per_matrix(shift) * weight
    return _bounds(residual, (right * weight).sum((-2, -1)), rows, image, weight, inverse_norm)


def _bounds(
    gradient: Tensor, objective: Tensor, rows: Tensor, factors: Tensor, weight: Tensor, inverse_norm: Tensor
) -> tuple[Tensor, Tensor]:
    """The errors of weights, from the gradient and twice the absolute objective.

    The gradient contains the sum of the `rows` times their `factors`, which depend on the products of rows and weights.
    A product may be off by eps times both lengths, and its part of the gradient by that times the length of the row.
    """
    eps, tiny = torch.finfo(rows.dtype).eps, torch.finfo(rows.dtype).tiny
    length, size = _norm(rows, -1), _norm(weight)
    rounding = eps * (length * torch.addcmul(_norm(factors, -1), length, size.unsqueeze(-1))).sum(-1)
    slope = _norm(gradient) + rounding
    gap = inverse_norm * slope.square() / objective.clamp_min(tiny)
    return gap, (inverse_norm * slope / size.clamp_min(tiny)).square()


@torch.no_grad()
def errors_of_gaussians(
    gram: Float[Tensor, "*batch n n"],
    scatter: Callable[[Tensor], Tensor],
    shift: Float[Tensor, "*batch"],
    mean: Float[Tensor, "*batch n k"],
    coef: Float[Tensor, "*batch n k"],
) -> tuple[Tensor, Tensor]:
    """The errors of coefficients of weights w that solve `(scatter + shift I) w = mean` in the kernel's feature space.

    The weights minimize `w' (scatter + shift I) w / 2 - w' mean`. With the residual r, the error of this objective is
    at most `|r|^2 / (2 shift)`, and that of the weights `|r| / shift`.

    Args:
        gram: the Gram matrix.
        scatter: from scores of the support examples to the coefficients of the product of the scatter matrix and the
            weights that have these scores; a contraction, times at most one.
        shift: the smallest eigenvalue of the matrix.
        mean: the coefficients of the right-hand sides.
        coef: the coefficients of the weights.

    Returns:
        As `errors_of_dual`.
    """
    tiny, image = torch.finfo(gram.dtype).tiny, gram @ coef
    residual = scatter(image) + per_matrix(shift) * coef - mean
    rounding = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sum(-1).sqrt() * _norm(
        scatter(rounding_of_scores(gram, coef))
    )
    length = (residual * (gram @ residual)).sum((-2, -1)).clamp_min(0).sqrt() + rounding
    objective, squared = (mean * image).sum((-2, -1)), (coef * image).sum((-2, -1))
    gap = length.square() / (shift * objective).clamp_min(tiny)
    return gap, (length / shift).square() / squared.clamp_min(tiny)


def _norm(value: Tensor, dim: int | tuple[int, int] = (-2, -1)) -> Tensor:
    return torch.linalg.vector_norm(value, dim=dim)


def with_solution(
    head: ClosedForm,
    expansion: _K,
    errors: tuple[Tensor, Tensor],
    support: SupportSet,
    *,
    largest_error: float | None = None,
) -> _K:
    """The expansion with a solution, after tasks that failed are handled; with `validate=False`, no status is read.

    Args:
        head: the head, which is named in errors.
        expansion: the expansion.
        errors: the relative gap of each task, and a bound of the squared relative error of its weights.
        support: the support set.
        largest_error: see `certified`.
    """
    gap, error = errors
    if gap.shape != expansion.coef.shape[:-2]:
        gap, error = (value.expand(expansion.coef.shape[:-2]) for value in errors)
    solution = certified(expansion.coef, gap, error, TOLERANCE, Status.FAILED, None, largest_error=largest_error)
    if support.validate:
        solution = handle_failures(type(head).__name__, solution, TOLERANCE, head.on_failure, remedy=_REMEDY)
    return replace(expansion, solution=solution)
