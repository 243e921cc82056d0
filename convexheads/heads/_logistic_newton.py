"""Multinomial logistic regression: a structured Newton method, its certificate, and derivatives of any order.

In terms of `a`, n x k with rows that sum to zero, the optimum of `1/2 tr(a' K a) + sum_n cross-entropy(K a)` solves
`a = targets - softmax(K a)`. The Newton system couples the classes through `W = diag(p) - p p'`, one k x k matrix for
each example. The structure of W reduces it to k + 1 Cholesky factorizations of n x n matrices (Rasmussen & Williams
2006, Algorithm 3.3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from convexheads.solvers.best_iterate import BestIterate
from convexheads.solvers.kkt import cholesky

MAX_BACKTRACKS = 30
PATIENCE = 3
_SCHEMA = "(Tensor gram, Tensor targets, *, float tolerance, int max_steps) -> (Tensor, Tensor, Tensor)"


@dataclass(frozen=True, eq=False)
class SoftmaxKKT:
    """The operator `(I + W K)^-1 W` on n x k matrices, for each task; differentiable.

    W is the Hessian of the loss. It is written `(K + W^-1)^-1`, although W has no inverse.
    """

    blocks: Float[Tensor, "tasks k n n"]  # `(D^-1 + K)^-1` of each class, with D = diag(p)
    total: Float[Tensor, "tasks n n"]  # the Cholesky factor of their sum

    @classmethod
    def factorize(cls, gram: Float[Tensor, "tasks n n"], probabilities: Float[Tensor, "tasks n k"]) -> SoftmaxKKT:
        """Factorize the system of a Gram matrix and the probabilities p."""
        root = probabilities.mT.sqrt().unsqueeze(-1)  # (tasks, k, n, 1)
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        factor = cholesky(eye + root * gram.unsqueeze(1) * root.mT)
        half = torch.linalg.solve_triangular(factor, torch.diag_embed(root.squeeze(-1)), upper=False)
        blocks = half.mT @ half
        return cls(blocks, cholesky(blocks.sum(1)))

    def solve(self, right: Float[Tensor, "tasks n k"]) -> Float[Tensor, "tasks n k"]:
        """Apply the operator."""
        part = self._blockwise(right)
        row_multipliers = torch.cholesky_solve(part.sum(-1, keepdim=True), self.total)
        return part - self._blockwise(row_multipliers.expand_as(right))

    def _blockwise(self, value: Tensor) -> Tensor:
        return (self.blocks @ value.mT.unsqueeze(-1)).squeeze(-1).mT


def newton_step(gram: Tensor, targets: Tensor, coef: Tensor) -> Tensor:
    """One undamped Newton step from `coef`, `(tasks, n, k)`; differentiable."""
    margins, loss = margins_and_losses(targets, gram @ coef)
    p = (margins - loss.unsqueeze(-1)).exp()
    # `W scores + targets - p`, computed from the entries of the wrong classes, because its rows sum to zero.
    right = balance(targets, p * (margins - (p * margins).sum(-1, keepdim=True) - 1))
    return right - SoftmaxKKT.factorize(gram, p).solve(gram @ right)


@torch.library.custom_op("convexheads::solve_logistic", mutates_args=(), schema=_SCHEMA)
def solve(gram: Tensor, targets: Tensor, *, tolerance: float, max_steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Solve tasks `(*batch, n, k)` by damped Newton steps until each gap is below `tolerance` or stops falling.

    It is an operator, because compilers cannot trace a loop whose length depends on values.

    Returns coefficients that are feasible for the dual, their certified relative duality gap, and the number of steps.
    """
    batch, (n, k) = targets.shape[:-2], targets.shape[-2:]
    gram, targets = gram.reshape(-1, n, n), targets.reshape(-1, n, k)
    coef = torch.zeros_like(targets)
    value = _objective(gram, targets, coef)
    best = BestIterate(_feasible(targets, coef), patience=PATIENCE)
    for step in range(1, max_steps + 1):
        change = newton_step(gram, targets, coef) - coef
        length, next_value = torch.ones_like(value), value
        for _ in range(MAX_BACKTRACKS):
            next_value = _objective(gram, targets, coef + length[:, None, None] * change)
            worse = next_value > value + 1e-12 * value.abs()
            if not worse.any():
                break
            length = torch.where(worse, length / 2, length)
        coef, value = coef + length[:, None, None] * change, next_value
        candidate = _feasible(targets, coef)
        gap = _gap(gram, targets, candidate)
        best.update(step, gap, gap <= tolerance, candidate)
        if best.done.all():
            break
    return best.tensors[0].reshape(*batch, n, k), best.gap.reshape(batch), best.iterations.reshape(batch)


@solve.register_fake
def _(gram: Tensor, targets: Tensor, *, tolerance: float, max_steps: int) -> tuple[Tensor, Tensor, Tensor]:
    tasks = targets.new_empty(targets.shape[:-2])
    return torch.empty_like(targets), tasks, torch.empty_like(tasks, dtype=torch.long)


def certified_gap(gram: Tensor, targets: Tensor, coef: Tensor) -> Tensor:
    """The relative duality gap of feasible coefficients close to `coef`."""
    return _gap(gram, targets, _feasible(targets, coef))


# Where examples are fitted almost perfectly, losses are tiny. The functions below therefore work with the probabilities
# of the wrong classes, which keep full precision.


def margins_and_losses(targets: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The difference between each class's score and that of the right class, and the loss of each row."""
    margins = scores - (targets * scores).sum(-1, keepdim=True)
    log_wrong = margins.masked_fill(targets > 0, -torch.inf).logsumexp(-1)
    return margins, torch.logaddexp(torch.zeros_like(log_wrong), log_wrong)


def balance(targets: Tensor, values: Tensor) -> Tensor:
    """The values of the wrong classes, and for the right class minus their sum, as in `p - targets`."""
    wrong = values.masked_fill(targets > 0, 0)
    return wrong - targets * wrong.sum(-1, keepdim=True)


def _objective(gram: Tensor, targets: Tensor, coef: Tensor) -> Tensor:
    scores = gram @ coef
    return (coef * scores).sum((-2, -1)) / 2 + margins_and_losses(targets, scores)[1].sum(-1)


def _feasible(targets: Tensor, coef: Tensor) -> Tensor:
    """Coefficients close to `coef`, for which each row of `targets - coef` is a distribution."""
    wrong = (-coef).clamp_min(0).masked_fill(targets > 0, 0)
    wrong = wrong / wrong.sum(-1, keepdim=True).clamp_min(1)
    return targets * wrong.sum(-1, keepdim=True) - wrong


def _gap(gram: Tensor, targets: Tensor, coef: Tensor) -> Tensor:
    """The relative gap of feasible coefficients: the divergence of `targets - coef` from the softmax of the scores."""
    scores = gram @ coef
    margins, loss = margins_and_losses(targets, scores)
    p = (-coef).masked_fill(targets > 0, 0)
    logs = margins - loss.unsqueeze(-1)
    wrong_divergence = torch.special.xlogy(p, p) - p * logs - p + logs.exp().masked_fill(targets > 0, 0)
    s, t = p.sum(-1).clamp_max(1), -torch.expm1(-loss)  # rounding may make a sum of 1 larger
    right_divergence = torch.special.xlog1py(1 - s, -s) + (1 - s) * loss + s - t
    value = (coef * scores).sum((-2, -1)) / 2 + loss.sum(-1)
    gap = (wrong_divergence.sum(-1) + right_divergence).clamp_min(0).sum(-1)
    return gap / value.clamp_min(torch.finfo(value.dtype).tiny)


class ImplicitSolution(torch.autograd.Function):
    """The solution `coef` of `coef = targets - softmax(gram @ coef)`, as a function of `gram` and `targets`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gram: Tensor, targets: Tensor, coef: Tensor) -> Tensor:
        return coef.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        gram, coef = ctx.saved_tensors
        p = (gram @ coef).softmax(-1)
        kkt = SoftmaxKKT.factorize(gram.detach(), p.detach())
        v = _ImplicitSystemSolve.apply(gram, p, gradient, kkt.blocks, kkt.total)
        outer = v @ coef.mT
        return -(outer + outer.mT) / 2, gradient - gram @ v, None


class _ImplicitSystemSolve(torch.autograd.Function):
    """`(gram + W^-1)^-1 right`, computed with the factors of a `SoftmaxKKT`; differentiable any number of times."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gram: Tensor, p: Tensor, right: Tensor, blocks: Tensor, total: Tensor) -> Tensor:
        return SoftmaxKKT(blocks, total).solve(right)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        gram, p, right, blocks, total, solved = ctx.saved_tensors
        adjoint = _ImplicitSystemSolve.apply(gram, p, gradient, blocks, total)
        # W maps z to `solved`, and q to `adjoint`. A constant that is added to a row of z or q has no effect.
        z, q = right - gram @ solved, gradient - gram @ adjoint
        outer = adjoint @ solved.mT
        inner = (p * z).sum(-1, keepdim=True), (p * q).sum(-1, keepdim=True)
        return -(outer + outer.mT) / 2, q * z - q * inner[0] - z * inner[1], adjoint, None, None
