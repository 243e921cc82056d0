"""Multinomial logistic regression: a structured Newton method, its certificate, and derivatives of any order.

In terms of `a`, n x k with rows that sum to zero, the optimum of `1/2 tr(a' K a) + sum_n s_n cross-entropy(scores_n)`,
where the scores are `K a` plus offsets, solves `a = s (targets - softmax(scores))`. The Newton system couples the
classes through `W = s (diag(p) - p p')`, one k x k matrix for each example. The structure of W reduces it to k + 1
Cholesky factorizations of n x n matrices (Rasmussen & Williams 2006, Algorithm 3.3). An intercept adds a bias to the
scores of each class, and the constraint that the columns of `a` sum to zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from convexheads._compiler import operator
from convexheads.heads._losses import CrossEntropy
from convexheads.solvers.best_iterate import SMALL_GAP, BestIterate
from convexheads.solvers.certificate import is_indefinite
from convexheads.solvers.kkt import cholesky
from convexheads.solvers.native.active_set import numba_is_installed

MAX_BACKTRACKS = 30
# Up to this number of examples, tasks are solved one by one, by compiled kernels.
_MAX_COMPILED = 100
PATIENCE = 3
# If the optimal weights are zero, their relative error is never small. Then a gap of this size is enough.
TINY_GAP = 1e-30
_LOSS = CrossEntropy()
_T = TypeVar("_T")
_DATA = "Tensor gram, Tensor targets, Tensor sample_weight, Tensor offset"
_SCHEMA = f"({_DATA}, Tensor? start=None, *, bool intercept, float tolerance, int max_steps, "
_SCHEMA += "int path_length=1) -> "
_SCHEMA += f"({', '.join(['Tensor'] * 5)})"


@dataclass(frozen=True, eq=False)
class SoftmaxKKT:
    """The operator `(I + W K)^-1 W` on n x k matrices, for each task; differentiable.

    W is the Hessian of the loss. It is written `(K + W^-1)^-1`, although W has no inverse.
    """

    blocks: Float[Tensor, "*tasks k n n"]  # `(D^-1 + K)^-1` of each class, with D the diagonal part of W
    total: Float[Tensor, "*tasks n n"]  # the Cholesky factor of their sum
    border: Float[Tensor, "*tasks k k"] | None  # with an intercept, the Cholesky factor of the system of the biases

    @classmethod
    def factorize(
        cls, gram: Float[Tensor, "*tasks n n"], curvature: Float[Tensor, "*tasks n k"], *, intercept: bool
    ) -> SoftmaxKKT:
        """Factorize the system of a Gram matrix and the probabilities p times the weights of the examples."""
        positive = curvature > 0  # masked examples have none
        root = torch.where(positive, curvature.where(positive, 1).sqrt(), 0).mT.unsqueeze(-1)  # (tasks, k, n, 1)
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        factor = cholesky(eye + root * gram.unsqueeze(-3) * root.mT)
        half = torch.linalg.solve_triangular(factor, torch.diag_embed(root.squeeze(-1)), upper=False)
        blocks = half.mT @ half
        # An example without weight has zero rows.
        ignored = (curvature.sum(-1) <= 0).to(gram.dtype)
        kkt = cls(blocks, cholesky(blocks.sum(-3) + torch.diag_embed(ignored)), None)
        if not intercept:
            return kkt
        sums = blocks.sum(-1)  # (tasks, k, n)
        border = torch.diag_embed(sums.sum(-1)) - sums @ torch.cholesky_solve(sums.mT, kkt.total)
        # The same bias for all classes has no effect. Without this term, the system would be singular.
        return replace(kkt, border=cholesky(border + border.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]))

    def solve(
        self, right: Float[Tensor, "*tasks n k"], sums: Float[Tensor, "*tasks k"] | None = None
    ) -> tuple[Float[Tensor, "*tasks n k"], Float[Tensor, "*tasks k"] | None]:
        """Apply the operator to `right - 1 b'`, where b makes the columns of the result add up to `sums`.

        Returns the result and b. Without an intercept, b is zero and returned as None.
        """
        part = self._apply(right)
        if self.border is None:
            return part, None
        excess = part.sum(-2) if sums is None else part.sum(-2) - sums
        bias = torch.cholesky_solve(excess.unsqueeze(-1), self.border).squeeze(-1)
        bias = bias - bias.mean(-1, keepdim=True)
        return part - self._apply(bias.unsqueeze(-2).expand_as(right)), bias

    def _apply(self, right: Tensor) -> Tensor:
        part = self._blockwise(right)
        row_multipliers = torch.cholesky_solve(part.sum(-1, keepdim=True), self.total)
        return part - self._blockwise(row_multipliers.expand_as(right))

    def _blockwise(self, value: Tensor) -> Tensor:
        return (self.blocks @ value.mT.unsqueeze(-1)).squeeze(-1).mT


class Task(NamedTuple):
    """The data of tasks: Gram matrices divided by the penalty, one-hot targets, weights of examples, and offsets."""

    gram: Float[Tensor, "*tasks n n"]
    targets: Float[Tensor, "*tasks n k"]
    sample_weight: Float[Tensor, "*tasks n"]
    offset: Float[Tensor, "*tasks n k"]


class Point(NamedTuple):
    """Coefficients and biases, the objective and its derivatives there, and a certificate."""

    coef: Float[Tensor, "*tasks n k"]
    bias: Float[Tensor, "*tasks k"]
    value: Float[Tensor, "*tasks"]
    p: Float[Tensor, "*tasks n k"]
    """The probabilities."""
    residual: Float[Tensor, "*tasks n k"]
    """`coef - s (targets - p)`."""
    image: Float[Tensor, "*tasks n k"]
    """The Gram matrix times the residual."""
    gap: Float[Tensor, "*tasks"]
    """The relative duality gap."""
    error: Float[Tensor, "*tasks"]
    """An upper bound of the gap and of the squared relative error of the weights."""


def evaluate(task: Task, coef: Tensor, bias: Tensor, *, intercept: bool) -> Point:
    """The objective at these coefficients and biases, with the certificate; differentiable.

    The slopes of the losses are dual coefficients. With them, the losses and their conjugates add up without a gap, and
    what remains is half of `residual' K residual`. With an intercept, the slopes have to be balanced first.

    Rounding of the scores by e changes a gap by second order only, `1/2 sum_n s_n e_n' W_n e_n` with the Hessian W of
    the loss: in the first order, losses and conjugates change by the same. It is therefore not part of the gap.
    """
    gram, targets, sample_weight, offset = task
    image, weight = gram @ coef, sample_weight.unsqueeze(-1)
    scores = image + (offset + bias.unsqueeze(-2))
    found = _LOSS.evaluate(targets, scores)
    quadratic = (coef * image).sum((-2, -1))
    value = quadratic / 2 + (sample_weight * found.value).sum(-1)
    residual = coef + weight * found.slope
    image = gram @ residual
    lost, change = 0, residual
    if intercept:
        moved, lost = _LOSS.balance(scores, found, sample_weight)
        change = residual + weight * moved
    distance = (change * (gram @ change if intercept else image)).sum((-2, -1))
    gap, tiny = lost + distance.clamp_min(0) / 2, torch.finfo(value.dtype).tiny
    indefinite = is_indefinite(gram, coef, quadratic) | is_indefinite(gram, change, distance)
    gap = torch.where(indefinite, torch.inf, gap)
    bounds = gap / value.clamp_min(tiny), 2 * gap / quadratic.clamp_min(tiny)
    return Point(coef, bias, value, found.curvature, residual, image, *bounds)


def newton_step(task: Task, point: Point, *, intercept: bool) -> tuple[Tensor, Tensor]:
    """The changes of `coef` and `bias` in an undamped step of Newton's method; differentiable."""
    kkt = SoftmaxKKT.factorize(task.gram, task.sample_weight.unsqueeze(-1) * point.p, intercept=intercept)
    change, bias = kkt.solve(point.image, (point.residual - point.coef).sum(-2))
    return change - point.residual, torch.zeros_like(point.bias) if bias is None else bias


def _without_values(
    gram: Tensor, targets: Tensor, *_: Tensor, **options: object
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tasks = targets.new_empty(targets.shape[:-2])
    bias = targets.new_empty((*targets.shape[:-2], targets.shape[-1]))
    return torch.empty_like(targets), bias, tasks, tasks.clone(), torch.empty_like(tasks, dtype=torch.long)


@operator("solve_logistic", _SCHEMA, _without_values)
def solve(
    gram: Tensor,
    targets: Tensor,
    sample_weight: Tensor,
    offset: Tensor,
    start: Tensor | None = None,
    *,
    intercept: bool,
    tolerance: float,
    max_steps: int,
    path_length: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Solve tasks `(*batch, n, k)` by damped Newton steps until each error is below `tolerance` or stops falling.

    The steps begin at zero, or at the coefficients `start` if the objective is smaller there. Compiled kernels begin at
    the solution of the task before if it is in the same path, as many tasks in a row as `path_length` says.

    Returns the coefficients, the biases, their certified relative duality gap and error (as in `Point`), and the number
    of steps.
    """
    batch, (n, k) = targets.shape[:-2], targets.shape[-2:]
    task = Task(
        gram.reshape(-1, n, n), targets.reshape(-1, n, k), sample_weight.reshape(-1, n), offset.reshape(-1, n, k)
    )
    start = None if start is None else start.reshape(-1, n, k)
    if _fits_numba(task.targets):
        from convexheads.heads import _logistic_numba

        settings = max_steps, MAX_BACKTRACKS, (tolerance, PATIENCE, TINY_GAP, SMALL_GAP)
        options = {"intercept": intercept, "settings": settings, "path_length": path_length}
        coef, bias, *found = _logistic_numba.solve(task, start, **options)
    else:
        start = torch.zeros_like(task.targets) if start is None else _better_start(task, start)
        coef, bias, *found = _iterate(task, start, intercept=intercept, tolerance=tolerance, max_steps=max_steps)
    gap, error, steps = (part.reshape(batch) for part in found)
    return coef.reshape(*batch, n, k), bias.reshape(*batch, k), gap, error, steps


def _better_start(task: Task, start: Tensor) -> Tensor:
    """The coefficients `start`, or zero in tasks in which the objective is smaller at zero."""
    bias = torch.zeros_like(start[:, 0])
    values = (evaluate(task, coef, bias, intercept=False).value for coef in (start, torch.zeros_like(start)))
    return start.where((next(values) < next(values))[:, None, None], 0)


def _iterate(
    task: Task, coef: Tensor, *, intercept: bool, tolerance: float, max_steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The results of `solve`, for a flat batch of tasks at once, whose steps begin at `coef`."""
    bias = torch.zeros_like(task.targets[:, 0])
    point = evaluate(task, coef, bias, intercept=intercept)
    best = BestIterate(coef, bias.unsqueeze(-1), point.gap, patience=PATIENCE)
    for step in range(1, max_steps + 1):
        if best.done.all():
            break
        change, bias_change = newton_step(task, point, intercept=intercept)

        def step_to(length: Tensor, start=point, change=change, bias_change=bias_change) -> tuple[Tensor, Point]:
            length = length[:, None]
            changed = start.coef + length.unsqueeze(-1) * change, start.bias + length * bias_change
            reached = evaluate(task, *changed, intercept=intercept)
            return reached.value, reached

        point, is_stuck = take_step(point.value, step_to)
        is_solved = (point.error <= tolerance) | (point.gap <= TINY_GAP)
        best.update(step, point.error, is_solved | is_stuck, point.coef, point.bias.unsqueeze(-1), point.gap)
    coef, bias, gap = best.tensors
    return coef, bias.squeeze(-1), gap, best.gap, best.iterations


def _fits_numba(targets: Tensor) -> bool:
    """Whether kernels that Numba compiles are faster."""
    tasks, n, _ = targets.shape
    is_double = targets.dtype == torch.float64 and targets.is_cpu
    return tasks > 0 and n <= _MAX_COMPILED and is_double and numba_is_installed()


def take_step(value: Tensor, step_to: Callable[[Tensor], tuple[Tensor, _T]]) -> tuple[_T, Tensor]:
    """Halve the length of the step of each task until its objective, so far `value`, is not worse.

    `step_to` returns the objectives and the point for lengths of the steps. A step that never gets better is not taken.

    Returns the point, and which tasks have not moved, so that all further steps would be the same.
    """
    length, worse = torch.ones_like(value), torch.zeros_like(value, dtype=torch.bool)
    for _ in range(MAX_BACKTRACKS):
        length = torch.where(worse, length / 2, length)
        next_value, point = step_to(length)
        worse = next_value > value + 1e-12 * value.abs()
        if not worse.any():
            return point, worse
    return step_to(torch.where(worse, 0, length))[1], worse


class ImplicitSolution(torch.autograd.Function):
    """The `coef` and `bias` for which `coef = s (targets - softmax(scores))`, as a function of the data of `solve`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        gram: Tensor,
        targets: Tensor,
        sample_weight: Tensor,
        offset: Tensor,
        coef: Tensor,
        bias: Tensor,
        intercept: bool,
    ) -> tuple[Tensor, Tensor]:
        return coef.clone(), bias.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:4], *output)
        ctx.intercept = inputs[6]

    @staticmethod
    def backward(ctx, gradient: Tensor, bias_gradient: Tensor):
        gram, targets, sample_weight, offset, coef, bias = ctx.saved_tensors
        _, slope, p = _LOSS.evaluate(targets, gram @ coef + bias.unsqueeze(-2) + offset)
        weight = sample_weight.unsqueeze(-1)
        kkt = SoftmaxKKT.factorize(gram.detach(), (weight * p).detach(), intercept=ctx.intercept)
        right = gradient, bias_gradient if ctx.intercept else None
        v, row = _ImplicitSystemSolve.apply(gram, p, sample_weight, *right, kkt.blocks, kkt.total, kkt.border)
        outer = v @ coef.mT
        u = gradient - gram @ v
        if ctx.intercept:
            u = u - row.unsqueeze(-2)
        to_weight = -(u * slope).sum(-1)
        return -(outer + outer.mT) / 2, weight * u, to_weight, -v, None, None, None


class _ImplicitSystemSolve(torch.autograd.Function):
    """The result of `SoftmaxKKT.solve`, computed with its factors; differentiable any number of times."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        gram: Tensor,
        p: Tensor,
        sample_weight: Tensor,
        right: Tensor,
        sums: Tensor | None,
        blocks: Tensor,
        total: Tensor,
        border: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        solved, bias = SoftmaxKKT(blocks, total, border).solve(right, sums)
        return solved, torch.zeros_like(solved[..., 0, :]) if bias is None else bias

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        gram, p, sample_weight, right, _, blocks, total, border = inputs
        ctx.save_for_backward(gram, p, sample_weight, right, blocks, total, border, *output)

    @staticmethod
    def backward(ctx, gradient: Tensor, bias_gradient: Tensor):
        gram, p, sample_weight, right, blocks, total, border, solved, bias = ctx.saved_tensors
        sums = None if border is None else bias_gradient
        adjoint, row = _ImplicitSystemSolve.apply(gram, p, sample_weight, gradient, sums, blocks, total, border)
        # W maps z to `solved`, and q to `adjoint`. A constant that is added to a row of z or q has no effect.
        z, q = right - gram @ solved, gradient - gram @ adjoint
        if border is not None:
            z, q = z - bias.unsqueeze(-2), q - row.unsqueeze(-2)
        outer = adjoint @ solved.mT
        inner = (p * z).sum(-1, keepdim=True), (p * q).sum(-1, keepdim=True)
        to_p = sample_weight.unsqueeze(-1) * (q * z - q * inner[0] - z * inner[1])
        to_weight = (p * q * z).sum(-1) - (inner[0] * inner[1]).squeeze(-1)
        to_sums = None if border is None else row
        return -(outer + outer.mT) / 2, to_p, to_weight, adjoint, to_sums, None, None, None
