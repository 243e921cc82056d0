"""The one quadratic program behind every multi-class SVM, and what a solver says of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from convexheads.solvers import rows
from convexheads.solvers.batch import Batch

# Stretching w away from the solution takes rounding errors out of the slacks, which C would multiply.
_STRETCHES = (0.0, *(1 + 10.0**exponent for exponent in range(-14, 0, 2)))
# Weights as they are will do where that proves a relative gap so small.
_SHARP = 1e-12
# Beyond this relative gap, what rounding may have done counts.
BLURRED = 1e-6
# Of large problems, not all stretched weights are looked at together.
_AT_ONCE = 2**23


class DenseQP(NamedTuple):
    """`min 1/2 z'Qz + p'z` subject to `Gz <= h`, `Az = b`, with `z` the coefficients row by row.

    `QP.dense` makes it.

    Attributes:
        Q: `(*batch, nk, nk)`.
        p: `(*batch, nk)`.
        G: `(*batch, inequalities, nk)`.
        h: `(*batch, inequalities)`.
        A: `(*batch, equalities, nk)`.
        b: `(*batch, equalities)`.
    """

    Q: Float[Tensor, "*batch nk nk"]
    p: Float[Tensor, "*batch nk"]
    G: Float[Tensor, "*batch inequalities nk"]
    h: Float[Tensor, "*batch inequalities"]
    A: Float[Tensor, "*batch equalities nk"]
    b: Float[Tensor, "*batch equalities"]


# Where the optimal weights are zero, no relative error of theirs is ever small: then this gap is enough.
_NOTHING = 1e-16
_AS_GOOD_AS_FEASIBLE = 1e-6


@dataclass(frozen=True)
class Certificate(Batch):
    """What can be proved about coefficients from the problem alone, whoever computed them.

    `QP.certify` makes it.

    Attributes:
        feasible: the coefficients' projection on the feasible set, `(*batch, n, k)`.
        gap: its relative duality gap, `(*batch,)`.
        weight_error: a bound of the relative error of the weights, `(*batch,)`.
        residual: how far the coefficients were from the feasible set, relative to the largest, `(*batch,)`.
        violation: how far the projection is, `(*batch,)`: zero unless a row has no feasible point at all.
        bound_multipliers: positive at an upper bound, negative at a lower one, zero elsewhere, `(*batch, n, k)`.
        row_multipliers: of the zero row sums, `(*batch, n)`.
    """

    feasible: Float[Tensor, "*batch n k"]
    gap: Float[Tensor, "*batch"]
    weight_error: Float[Tensor, "*batch"]
    residual: Float[Tensor, "*batch"]
    violation: Float[Tensor, "*batch"]
    bound_multipliers: Float[Tensor, "*batch n k"]
    row_multipliers: Float[Tensor, "*batch n"]

    def shows_active_set(self) -> Bool[Tensor, "*batch"]:
        """Where the coefficients were feasible as they came: the projection of others may be optimal by chance.

        Returns:
            `(*batch,)` of bool.
        """
        return self.residual <= _AS_GOOD_AS_FEASIBLE

    def within(self, tolerance: float) -> Bool[Tensor, "*batch"]:
        """Where both the gap and the squared relative error of the weights are proved to be at most `tolerance`.

        With a small C the loss makes up most of the objective, and the gap alone says little of the weights.

        Args:
            tolerance: relative, without units.

        Returns:
            `(*batch,)` of bool.
        """
        return (self.gap <= tolerance) & ((self.weight_error.square() <= tolerance) | (self.gap <= _NOTHING))


@dataclass(frozen=True)
class QP(Batch):
    """`min 1/2 tr(a'Ka) + <smoothing, a^2>/2 - <linear, a>` subject to `lower <= a <= upper` and `a 1 = 0`.

    The dual of every SVM here; with `lower` None and `upper = C y`, Eq. 10 of Lee et al. 2019. Its methods take and
    give coefficients `(*batch, n, k)`. `Solver.solve` checks the bounds.

    Attributes:
        gram: K, symmetric positive semi-definite, `(*batch, n, n)`.
        linear: `(*batch, n, k)`.
        lower: `(*batch, n, k)`, entries may be `-inf`; None (default) where nothing is bounded below.
        upper: likewise from above, `(*batch, n, k)`. At least one of the two is needed; without `row_sum` and without
            smoothing both, or no gap can be certified.
        smoothing: quadratic smoothing of the loss, entry by entry, non-negative, `(*batch, n, k)`; None (default) for
            none.
        row_sum: whether every row of coefficients sums to zero. Default True.
        root: `root @ root.mT` is `gram`, `(*batch, n, r)`; for problems with r much smaller than n, which solve faster
            with it. The native solver looks for one by itself; None (default) for none.
    """

    gram: Float[Tensor, "*batch n n"]
    linear: Float[Tensor, "*batch n k"]
    lower: Float[Tensor, "*batch n k"] | None = None
    upper: Float[Tensor, "*batch n k"] | None = None
    smoothing: Float[Tensor, "*batch n k"] | None = None
    row_sum: bool = True
    root: Float[Tensor, "*batch n r"] | None = None

    def flatten(self) -> QP:
        """All leading dimensions as one: `(tasks, n, k)`."""
        batch = self.linear.ndim - 2
        return self if batch == 1 else self.map(lambda _, value: value.reshape(-1, *value.shape[batch:]))

    def in_units(self) -> tuple[QP, Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
        """The equivalent problem with numbers around one, and the units of its coefficients and of its multipliers.

        A dual SVM depends on C*K alone. In units of `min(C, 1/h)`, h the mean diagonal of K, features scaled by 1e-4
        or 1e4 and any C look alike to a solver.

        Returns:
            The problem; by what its coefficients have to be multiplied, `(*batch,)`; and by what its multipliers,
                `(*batch,)`.
        """
        with torch.no_grad():
            size = self.linear.abs().amax((-2, -1))
            size = torch.where(size > 0, size, 1)
            curvature = self.curvature()
            unit = torch.where(curvature > 0, size / curvature, torch.inf)
            largest = self._largest_bounds().amax(-1)
            unit = unit.minimum(torch.where(largest > 0, largest, torch.inf))
            unit = torch.where(torch.isfinite(unit), unit, 1)
            factor = {
                "gram": unit / size,
                "root": (unit / size).sqrt(),
                "smoothing": unit / size,
                "linear": 1 / size,
                "lower": 1 / unit,
                "upper": 1 / unit,
            }
        scaled = self.map(lambda name, value: value * factor[name][(...,) + (None,) * (value.ndim - unit.ndim)])
        return scaled, unit, size

    def curvature(self) -> Float[Tensor, "*batch"]:
        """The mean diagonal of the Hessian, `(*batch,)`."""
        mean = self.gram.diagonal(dim1=-2, dim2=-1).mean(-1)
        return mean if self.smoothing is None else mean + self.smoothing.mean((-2, -1))

    def gradient(self, coef: Float[Tensor, "*batch n k"]) -> Float[Tensor, "*batch n k"]:
        """Of the quadratic part: Hessian times coefficients.

        Args:
            coef: `(*batch, n, k)`.

        Returns:
            `(*batch, n, k)`.
        """
        image = self.gram @ coef
        return image if self.smoothing is None else image + self.smoothing * coef

    def held(
        self, at_upper: Bool[Tensor, "*batch n k"], at_lower: Bool[Tensor, "*batch n k"]
    ) -> Float[Tensor, "*batch n k"]:
        """The bounds at the entries that sit at one, zero elsewhere.

        Args:
            at_upper: which sit at their upper bound, `(*batch, n, k)`.
            at_lower: which sit at their lower bound, `(*batch, n, k)`.

        Returns:
            `(*batch, n, k)`.
        """
        held = torch.zeros_like(self.linear)
        if self.upper is not None:
            held = torch.where(at_upper, self.upper, held)
        return held if self.lower is None else torch.where(at_lower, self.lower, held)

    def project(self, coef: Float[Tensor, "*batch n k"]) -> Float[Tensor, "*batch n k"]:
        """The nearest feasible coefficients, row by row.

        Args:
            coef: `(*batch, n, k)`.

        Returns:
            `(*batch, n, k)`.
        """
        return rows.project(coef, self.lower, self.upper, row_sum=self.row_sum)

    def certify(self, coef: Float[Tensor, "*batch n k"]) -> Certificate:
        """Bound the distance of `coef` from the optimum by weak duality, for a problem in units (`in_units`).

        For feasible coefficients `a` the value `D(a)` is a lower bound, and for any w = Phi'a, stretched by any factor,
        the primal objective `P(w)` is an upper bound of the same optimum. Their relative difference needs no trust in
        the solver. Infeasible coefficients are judged by their projection, and `residual` says how far that is.

        Args:
            coef: `(*batch, n, k)`. NaN gives a gap of NaN.

        Returns:
            `feasible`, the projection; `gap = (P - D) / P`; `weight_error`, a bound of `|w - w*| / |w|`; `residual`,
                the largest distance to the feasible set relative to the largest coefficient (at least one unit);
                `violation`, the same of the projection, zero unless a row has no feasible point at all; and the
                multipliers: those of the bounds positive at an upper and negative at a lower one, zero at free entries.
        """
        feasible = self.project(coef)
        scores = self.gram @ feasible
        quadratic = (feasible * scores).sum((-2, -1))
        # Weak duality rests on a positive semi-definite Gram matrix; negative curvature beyond rounding disproves that.
        squares = self.gram.diagonal(dim1=-2, dim2=-1).abs().sum(-1) * feasible.square().sum((-2, -1))
        indefinite = quadratic < -1e-9 * squares
        quadratic = quadratic.clamp_min(0)

        gap, primal, shift = self._smallest_distance(feasible, scores, quadratic)
        gap = torch.where(indefinite, torch.inf, gap)
        size = feasible.abs().amax((-2, -1)).clamp_min(1)
        distance = (coef - feasible).abs().amax((-2, -1))
        violation = feasible.sum(-1).abs().amax(-1) if self.row_sum else torch.zeros_like(distance)
        pull = self.linear - scores - shift
        if self.smoothing is not None:
            pull = pull - self.smoothing * feasible
        return Certificate(
            feasible=feasible,
            gap=gap / primal.abs().clamp_min(torch.finfo(coef.dtype).eps),
            weight_error=(2 * gap / quadratic.clamp_min(torch.finfo(coef.dtype).tiny)).sqrt(),
            residual=torch.maximum(distance, violation) / size,
            violation=violation / size,
            bound_multipliers=pull,
            row_multipliers=shift.squeeze(-1),
        )

    def allow_for_rounding(self, certificate: Certificate) -> Certificate:
        """The certificate with the gap that is left if rounding moved each score as far as it may, where that counts.

        `certify` takes the Gram matrix for exact, but its entries are rounded inner products, and a score is a sum of
        them: with `eps` the machine's precision, that of example i and class k may be off by
        `eps sqrt(K_ii) sum_j sqrt(K_jj) |a_jk|`, to first order. Slacks that are too small by so much cost the primal
        objective C times that. It counts, beyond a relative gap of 1e-6 (5e-4 in float32), from C times the squared
        length of the features of about 1e9 on, and only where no weights separate the support set.

        Args:
            certificate: what `certify` says of coefficients, for a problem in units.

        Returns:
            The same, with a larger `gap` in such tasks.
        """
        feasible = certificate.feasible
        eps = torch.finfo(feasible.dtype).eps
        counts = max(BLURRED, 4096 * eps)
        length = self.gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
        blur = eps * length.unsqueeze(-1) * (length.unsqueeze(-2) @ feasible.abs())
        scores = self.gram @ feasible
        quadratic = (feasible * scores).sum((-2, -1)).clamp_min(0)
        dual = (self.linear * feasible).sum((-2, -1)) - quadratic / 2
        if not ((self._largest_bounds() * blur.sum(-1)).sum(-1) > counts / 100 * dual).any():
            return certificate
        gap, primal, _ = self._smallest_distance(feasible, scores, quadratic, blur)
        gap = gap / primal.abs().clamp_min(eps)
        gap = torch.where(gap > counts, gap, 0)
        return replace(certificate, gap=torch.maximum(certificate.gap, gap))

    def _smallest_distance(
        self, feasible: Tensor, scores: Tensor, quadratic: Tensor, blur: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The least `P - D` of all stretched weights and its `P`; and the multipliers of the row sums."""
        gap, primal, shift = self._distance(feasible, scores, quadratic, torch.ones_like(scores[..., :1, :1]), blur)
        if not (gap <= _SHARP * primal).all():
            stretches = torch.tensor(_STRETCHES, dtype=gap.dtype, device=gap.device).view(-1, *[1] * scores.ndim)
            for some in stretches.split(max(1, _AT_ONCE // max(1, scores.numel()))):
                others, primals, _ = self._distance(feasible, scores, quadratic, some, blur)
                smallest, best = others.min(0)
                better = smallest < gap
                gap = torch.where(better, smallest, gap)
                primal = torch.where(better, primals.gather(0, best.unsqueeze(0)).squeeze(0), primal)
        return gap, primal, shift

    def _distance(
        self, feasible: Tensor, scores: Tensor, quadratic: Tensor, stretch: Tensor, blur: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`P - D` and `P` for the weights times `stretch`, and the multipliers of the row sums.

        With `blur`, each score is moved so far in the direction in which the loss grows.
        """
        slope = self.linear - stretch * scores
        moved = 0.0
        if blur is not None:
            blur = blur * self._uphill(slope, feasible)
            slope, moved = slope + blur, (blur * feasible).sum((-2, -1))
        losses, distances, shift = rows.conjugate(
            slope,
            self.lower,
            self.upper,
            at=feasible,
            row_sum=self.row_sum,
            smoothing=self.smoothing,
        )
        stretch = stretch[..., 0, 0]
        # `P - D` itself, summed from non-negative terms: a difference of objectives would drown small gaps in rounding.
        gap = distances.clamp_min(0).sum(-1) + (stretch - 1).square() / 2 * quadratic + moved
        return gap, losses.sum(-1) + stretch.square() / 2 * quadratic, shift

    def _largest_bounds(self) -> Tensor:
        """The largest finite bound of each row, `(*batch, n)`: what a score's error is multiplied by, at most."""
        bounds = [bound.abs().nan_to_num(posinf=0) for bound in (self.lower, self.upper) if bound is not None]
        return torch.stack([bound.amax(-1) for bound in bounds]).amax(0)

    def _uphill(self, slope: Tensor, feasible: Tensor) -> Tensor:
        """The sign of each entry's change by which the maximum over the feasible rows can only grow."""
        _, _, shift = rows.conjugate(
            slope, self.lower, self.upper, at=feasible, row_sum=self.row_sum, smoothing=self.smoothing
        )
        sign = torch.where(slope >= shift, 1.0, -1.0).to(slope.dtype)
        if self.upper is not None:
            sign = torch.where(self.upper > 0, sign, -1.0)
        return sign if self.lower is None else torch.where(self.lower < 0, sign, 1.0)

    def dense(self) -> DenseQP:
        """The general form that other solvers eat, every tensor fully expanded over the batch.

        Here the matrices are nk x nk. Infinite bounds are left out; a task that has more of them than another of the
        batch gets idle rows `0 z <= 1` in their place.

        Returns:
            `Q`, `(*batch, nk, nk)`, and the rest; no equalities where there are no row sums.
        """
        *batch, n, k = self.linear.shape
        eye = torch.eye(n * k, dtype=self.gram.dtype, device=self.gram.device)
        hessian = torch.einsum("...ij,cd->...icjd", self.gram, eye[:k, :k]).reshape(*batch, n * k, n * k)
        if self.smoothing is not None:
            hessian = hessian + torch.diag_embed(self.smoothing.reshape(*batch, n * k))
        sides, limits = [], []
        for sign, bound in ((1, self.upper), (-1, self.lower)):
            if bound is not None:
                bound = sign * bound.reshape(*batch, n * k)
                present = torch.isfinite(bound)
                order = (~present).to(torch.uint8).argsort(dim=-1, stable=True)[..., : int(present.sum(-1).max())]
                present = present.gather(-1, order)
                sides.append(sign * present[..., None] * eye[order])
                limits.append(torch.where(present, bound.gather(-1, order), 1))
        equality = eye.view(n, k, n * k).sum(1) if self.row_sum else eye[:0]
        return DenseQP(
            Q=hessian,
            p=-self.linear.reshape(*batch, n * k),
            G=torch.cat(sides, -2),
            h=torch.cat(limits, -1),
            A=equality.expand(*batch, *equality.shape).clone(),
            b=self.linear.new_zeros(*batch, len(equality)),
        )


class Status(IntEnum):
    """How the solve of one task ended."""

    CONVERGED = 0
    """Certified: the gap is at most the tolerance, and the residual at most its square root."""
    STOPPED = 1
    """Stopped at the `max_iterations` that the user chose: early stopping is a choice, not a failure."""
    FAILED = 2
    """Neither: don't trust these coefficients beyond what `gap` says."""


@dataclass(frozen=True)
class Solution(Batch):
    """A solver's answer for a batch of tasks, as `Solver.solve` returns it.

    Attributes:
        coef: dual coefficients, differentiable, `(*batch, n, k)`.
        bound_multipliers: of the bounds, positive at an upper one, negative at a lower one, `(*batch, n, k)`; None for
            a problem without bounds.
        row_multipliers: of the zero row sums, `(*batch, n)`; None for a problem without them.
        status: `Status` of each task, `(*batch,)`.
        gap: certified relative duality gap of each task, computed from `coef` whoever solved it, `(*batch,)`.
        residual: largest distance of `coef` to the feasible set, relative to its largest entry, or to one unit,
            `(*batch,)`.
        iterations: of each task, `(*batch,)`; None where the backend doesn't say.
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
