"""The certificate: how far coefficients can be from the optimum, proved from the problem alone.

Its tolerances are constants of this module and of `feasible_rows`. The Numba kernels receive them from there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from convexheads.solvers.problem import DualProblem, TensorRecord
from convexheads.solvers.rescaling import largest_bounds

INDEFINITENESS = 1e-9
"""Negative curvature beyond this, relative to the diagonal of the Gram matrix, is not the effect of rounding."""
ZERO_GAP = 1e-16
"""If the optimal weights are zero, their relative error is never small. Then a gap of this size is enough."""
FEASIBILITY_TOLERANCE = 1e-6
"""Largest residual of coefficients that count as feasible."""
ROUNDING_THRESHOLD = 1e-6
"""The relative gap at which rounding begins to matter."""
ROUNDING_MARGIN = 1e-2
"""A rough bound of the effect of rounding is enough if it is at most this fraction of the threshold."""
# The factors by which `certify` scales the weights. With slightly larger weights, rounding errors in the slacks, which
# C amplifies, matter less.
_PRIMAL_SCALINGS = (0.0, *(1 + 10.0**exponent for exponent in range(-14, 0, 2)))
# Skip the search over scalings if the unscaled weights already prove this relative gap.
_GAP_GOOD_ENOUGH = 1e-12
# The largest number of entries of the chunks in which scalings are tried.
_MAX_ENTRIES_PER_CHUNK = 2**23
# Gaps below this multiple of machine precision cannot be reached in general.
_ROUNDING_FLOOR = 4096
# Solvers aim at this fraction of their tolerance, but at least at this multiple of machine precision.
_AIM_RATIO = 1e-3
_AIM_FLOOR = 256


@dataclass(frozen=True, eq=False, repr=False)
class Certificate(TensorRecord):
    """Bounds on the error of coefficients, whichever solver computed them. `certify` creates it.

    Attributes:
        feasible: projection of the coefficients onto the feasible set.
        gap: relative duality gap of the projection, for the Gram matrix as it is.
        rounding: by how much rounding of the Gram matrix and of the scores may increase the gap; see
            `account_for_rounding`.
        primal_error_bound: upper bound of the relative error of the primal weights.
        residual: distance of the coefficients from the feasible set, relative to the largest coefficient (at least 1).
        violation: the residual of the projection; zero unless a row has no feasible point at all.
        bound_multipliers: positive at an upper bound, negative at a lower bound, zero at free entries.
        row_multipliers: multipliers of the zero row sums.
    """

    feasible: Float[Tensor, "*batch n k"]
    gap: Float[Tensor, "*batch"]
    rounding: Float[Tensor, "*batch"]
    primal_error_bound: Float[Tensor, "*batch"]
    residual: Float[Tensor, "*batch"]
    violation: Float[Tensor, "*batch"]
    bound_multipliers: Float[Tensor, "*batch n k"]
    row_multipliers: Float[Tensor, "*batch n"]

    def converged(self, tolerance: float) -> Bool[Tensor, "*batch"]:
        """Which tasks are solved: the gap is at most `tolerance`, and the residual at most its square root.

        The gap is of second order in the error of the coefficients, and the residual of first order. A tolerance below
        9e-13 in float64 is raised to that value. With rounding, the gap may be 1e-6.
        """
        tolerance, with_rounding = (reachable(each, self.gap.dtype) for each in (tolerance, ROUNDING_THRESHOLD))
        is_optimal = (self.gap <= tolerance) & (self.gap + self.rounding <= max(tolerance, with_rounding))
        return is_optimal & (self.residual <= tolerance**0.5)

    def certifies(self, tolerance: float) -> Bool[Tensor, "*batch"]:
        """Whether the gap and the squared relative error of the weights are both proved to be at most `tolerance`.

        With a small C the loss dominates the objective, and a small gap does not imply a small error of the weights.
        """
        return (self.gap <= tolerance) & ((self.primal_error_bound.square() <= tolerance) | (self.gap <= ZERO_GAP))

    def is_feasible(self) -> Bool[Tensor, "*batch"]:
        """Whether the coefficients were feasible. If not, an optimal projection does not imply a correct active set."""
        return self.residual <= FEASIBILITY_TOLERANCE


def reachable(tolerance: float, dtype: torch.dtype) -> float:
    """The smallest tolerance of at least `tolerance` that rounding allows in general."""
    return max(tolerance, _ROUNDING_FLOOR * torch.finfo(dtype).eps)


def aim(tolerance: float, dtype: torch.dtype) -> float:
    """The smaller gap at which a native solver ends, because the gradient is right only for the right active set."""
    return max(_AIM_RATIO * tolerance, _AIM_FLOOR * torch.finfo(dtype).eps)


def is_indefinite(gram: Tensor, coef: Tensor, quadratic: Tensor) -> Bool[Tensor, "*batch"]:
    """Whether `quadratic`, the product `coef' K coef`, is negative beyond rounding.

    Weak duality rests on a positive semi-definite Gram matrix K, and such a product disproves that.
    """
    squares = gram.diagonal(dim1=-2, dim2=-1).abs().sum(-1) * coef.square().sum((-2, -1))
    return quadratic < -INDEFINITENESS * squares


def certify(problem: DualProblem, coef: Float[Tensor, "*batch n k"]) -> Certificate:
    """Bound the distance of coefficients from the optimum by weak duality (Boyd & Vandenberghe 2004, Section 5.5.1).

    For feasible coefficients `a`, the dual objective `D(a)` is a lower bound of the optimum. For any weights w, the
    primal objective `P(w)` is an upper bound. The weights w = Phi'a are scaled by several factors, to use the best one.

    Args:
        problem: a rescaled problem (`rescale`).
        coef: coefficients, `(*batch, n, k)`. NaN gives a gap of NaN.

    Returns:
        The certificate. Its gap is `(P - D) / P`, and `primal_error_bound` bounds `|w - w*| / |w|`.
    """
    feasible = problem.project(coef)
    scores = problem.gram @ feasible
    quadratic = (feasible * scores).sum((-2, -1))
    indefinite = is_indefinite(problem.gram, feasible, quadratic)
    quadratic = quadratic.clamp_min(0)

    gap, primal, row_multipliers = _smallest_gap(problem, feasible, scores, quadratic)
    gap = torch.where(indefinite, torch.inf, gap)
    largest = feasible.abs().amax((-2, -1)).clamp_min(1)
    distance = (coef - feasible).abs().amax((-2, -1))
    violation = feasible.sum(-1).abs().amax(-1) if problem.rows_sum_to_zero else torch.zeros_like(distance)
    bound_multipliers = problem.linear - scores - row_multipliers
    if problem.smoothing is not None:
        bound_multipliers = bound_multipliers - problem.smoothing * feasible
    return Certificate(
        feasible=feasible,
        gap=gap / primal.abs().clamp_min(torch.finfo(coef.dtype).eps),
        rounding=torch.zeros_like(gap),
        primal_error_bound=(2 * gap / quadratic.clamp_min(torch.finfo(coef.dtype).tiny)).sqrt(),
        residual=torch.maximum(distance, violation) / largest,
        violation=violation / largest,
        bound_multipliers=bound_multipliers,
        row_multipliers=row_multipliers.squeeze(-1),
    )


def account_for_rounding(problem: DualProblem, certificate: Certificate) -> Certificate:
    """The certificate with the effect of rounding on the gap.

    `certify` treats the Gram matrix as exact, but its entries are rounded inner products, and a score is a sum of
    them. Where `eps` is machine precision, the score of example i for class k may be off by `eps sqrt(K_ii) sum_j
    sqrt(K_jj) |a_jk|`, to first order. Slacks that are too small by this amount change the primal objective by C times
    as much. The sum of these changes is a rough bound. Where it is above 1e-8, the gap is computed again, with scores
    that are moved in the direction in which the loss grows. The effect then exceeds 1e-6 only if C times the squared
    length of the features is about 1e8 or more, and only if no weights separate the support set.

    Args:
        problem: a rescaled problem (`rescale`).
        certificate: the result of `certify`.

    Returns:
        The certificate with `rounding`.
    """
    feasible = certificate.feasible
    eps = torch.finfo(feasible.dtype).eps
    score_error = rounding_of_scores(problem.gram, feasible)
    scores = problem.gram @ feasible
    quadratic = (feasible * scores).sum((-2, -1)).clamp_min(0)
    dual = (problem.linear * feasible).sum((-2, -1)) - quadratic / 2
    slope = torch.maximum(largest_bounds(problem), feasible.abs().amax(-1))  # of the loss of each example
    rough = (slope * score_error.sum(-1)).sum(-1) / dual.clamp_min(eps)
    is_too_rough = rough > ROUNDING_MARGIN * reachable(ROUNDING_THRESHOLD, feasible.dtype)
    if not is_too_rough.any():
        return replace(certificate, rounding=rough)
    gap, primal, _ = _smallest_gap(problem, feasible, scores, quadratic, score_error)
    sharp = (gap / primal.abs().clamp_min(eps) - certificate.gap).clamp_min(0)
    return replace(certificate, rounding=torch.where(is_too_rough, sharp, rough))


def rounding_of_scores(gram: Float[Tensor, "*batch n n"], coef: Float[Tensor, "*batch n k"]) -> Tensor:
    """By how much rounding of the features and of the Gram matrix may change the scores `gram @ coef`, to first order.

    See `account_for_rounding`.
    """
    length, reach = _factors_of_rounding(gram, coef)
    return torch.finfo(gram.dtype).eps * length.unsqueeze(-1) * reach


def size_of_rounding(gram: Float[Tensor, "*batch n n"], coef: Float[Tensor, "*batch n k"]) -> Float[Tensor, "*batch"]:
    """The norm of `rounding_of_scores`: that of a matrix of products is the product of the norms."""
    length, reach = _factors_of_rounding(gram, coef)
    return (
        torch.finfo(gram.dtype).eps
        * torch.linalg.vector_norm(length, dim=-1)
        * torch.linalg.vector_norm(reach, dim=(-2, -1))
    )


def _factors_of_rounding(gram: Tensor, coef: Tensor) -> tuple[Tensor, Tensor]:
    """The lengths of the examples, `(*batch, n)`, and their sums times the coefficients, `(*batch, 1, k)`."""
    length = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    return length, length.unsqueeze(-2) @ coef.abs()


def _smallest_gap(
    problem: DualProblem, feasible: Tensor, scores: Tensor, quadratic: Tensor, score_error: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The smallest `P - D` over all scalings of the weights, its `P`, and the row multipliers without scaling."""
    one = torch.ones_like(scores[..., :1, :1])
    gap, primal, row_multipliers = _gap(problem, feasible, scores, quadratic, one, score_error)
    if not (gap <= _GAP_GOOD_ENOUGH * primal).all():
        scalings = torch.tensor(_PRIMAL_SCALINGS, dtype=gap.dtype, device=gap.device).view(-1, *[1] * scores.ndim)
        for chunk in scalings.split(max(1, _MAX_ENTRIES_PER_CHUNK // max(1, scores.numel()))):
            gaps, primals, _ = _gap(problem, feasible, scores, quadratic, chunk, score_error)
            smallest, best = gaps.min(0)
            better = smallest < gap
            gap = torch.where(better, smallest, gap)
            primal = torch.where(better, primals.gather(0, best.unsqueeze(0)).squeeze(0), primal)
    return gap, primal, row_multipliers


def _gap(
    problem: DualProblem,
    feasible: Tensor,
    scores: Tensor,
    quadratic: Tensor,
    scaling: Tensor,
    score_error: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`P - D` and `P` for the weights times `scaling`, and the row multipliers.

    With `score_error`, each score is moved by that much in the direction in which the loss grows.
    """
    slope = problem.linear - scaling * scores
    moved = 0.0
    if score_error is not None:
        score_error = score_error * _ascent_sign(problem, slope, feasible)
        slope, moved = slope + score_error, (score_error * feasible).sum((-2, -1))
    losses, distances, row_multipliers = problem.rows.conjugate(slope, feasible)
    scaling = scaling[..., 0, 0]
    # `P - D` is computed as a sum of non-negative terms: in a difference of objectives, rounding hides small gaps.
    gap = distances.clamp_min(0).sum(-1) + (scaling - 1).square() / 2 * quadratic + moved
    return gap, losses.sum(-1) + scaling.square() / 2 * quadratic, row_multipliers


def _ascent_sign(problem: DualProblem, slope: Tensor, feasible: Tensor) -> Tensor:
    """For each slope entry, the sign of a change that cannot decrease the maximum over the feasible rows."""
    _, _, row_multipliers = problem.rows.conjugate(slope, feasible)
    sign = torch.where(slope >= row_multipliers, 1.0, -1.0).to(slope.dtype)
    if problem.upper is not None:
        sign = torch.where(problem.upper > 0, sign, -1.0)
    return sign if problem.lower is None else torch.where(problem.lower < 0, sign, 1.0)
