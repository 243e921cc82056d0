"""Dual problems of SVMs with an intercept that is not regularized.

Such a dual has the additional constraint that the coefficients of each class sum to zero. Its multipliers are the
biases. They are found by the proximal point method (Rockafellar 1976): with a constant added to the kernel, a solver
minimizes over biases close to the current ones, and its coefficients determine the next biases. The minimum has sums of
zero, and there the constant has no effect.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from convexheads._functorch import is_transforming, once_differentiable, refuse_transforms
from convexheads.precision import full_precision
from convexheads.solvers.base import Solver
from convexheads.solvers.certificate import FEASIBILITY_TOLERANCE, certify
from convexheads.solvers.failures import handle_failures
from convexheads.solvers.problem import DualProblem, Solution, Status, WarmStart
from convexheads.solvers.rescaling import rescale

# The constant, in units of the mean diagonal of the Gram matrix, and for tiny bounds in margins per coefficient.
_CONSTANT, _MARGINS = 100.0, 10.0
# Where the sums do not fall by half, the constant grows, but not more often than this.
_GROWTH, _MAX_GROWTHS = 10.0, 4
_MAX_STEPS = 60
# The sums count as zero at this fraction of the sum of all coefficients.
_ZERO = 1e-14


def solve_with_intercept(
    solver: Solver, problem: DualProblem, code: Float[Tensor, "*batch n k"] | None = None
) -> tuple[Solution, Float[Tensor, "*batch k"]]:
    """Solve duals whose coefficients sum to zero over the examples of each class, `(*batch, n, k)`.

    With a `code`, the problem has one coefficient per example, `(*batch, n, 1)`, and these coefficients times the code
    sum to zero. Returns the solution, whose `residual` accounts for the sums, and the biases. Both have a first
    derivative.
    """
    if is_transforming():
        refuse_transforms("an SVM with an intercept")
    extended = _Extended(problem, code)
    with torch.no_grad():
        bias, constant = extended.find_bias(solver)
    attached = bias
    if torch.is_grad_enabled() and any(value.requires_grad for value in problem.tensors().values()):
        attached = extended.attach(solver, bias, constant)
    solution = solver.solve(extended.problem(attached, constant))
    return extended.certify(solver, solution, bias), attached


@dataclass(frozen=True, eq=False, repr=False)
class _Extended:
    """A dual problem, and what biases do to it."""

    dual: DualProblem
    code: Tensor | None

    def problem(self, bias: Tensor, constant: Tensor) -> DualProblem:
        """The problem for biases close to `bias`, with the `constant`, `(*batch)`, in the kernel."""
        weight = torch.ones_like(self.dual.linear[..., :1]) if self.code is None else self.code
        gram = self.dual.gram + constant[..., None, None] * (weight @ weight.mT)
        return replace(self.dual, gram=gram, linear=self.dual.linear - self.shift(bias))

    def shift(self, bias: Tensor) -> Tensor:
        """The scores of the biases, as the coefficients see them."""
        scores = bias.unsqueeze(-2)
        return scores if self.code is None else (self.code * scores).sum(-1, keepdim=True)

    def sums(self, coef: Tensor) -> Tensor:
        """The sums that have to be zero, `(*batch, k)`."""
        return (coef if self.code is None else self.code * coef).sum(-2)

    def find_bias(self, solver: Solver) -> tuple[Tensor, Tensor]:
        """The biases for which the sums are zero, and the constant with which they were found."""
        diagonal = self.dual.gram.diagonal(dim1=-2, dim2=-1).mean(-1)
        constant = _CONSTANT * diagonal.where(diagonal > 0, 1)
        like = self.dual.linear if self.code is None else self.code
        bias = torch.zeros_like(like[..., 0, :])
        solution = solver.solve(self.problem(bias, constant))
        coef = solution.coef
        total = coef.abs().sum((-2, -1))
        constant = constant + _MARGINS / total.where(total > 0, 1)
        smallest, growths = torch.full_like(total, torch.inf), torch.zeros_like(total)
        for _ in range(_MAX_STEPS):
            solution = solver.solve(replace(self.problem(bias, constant), start=WarmStart.of(solution)))
            coef = solution.coef
            excess = self.sums(coef)
            size, total = excess.abs().amax(-1), coef.abs().sum((-2, -1))
            stalled = size > smallest / 2
            # Tasks that are done keep their biases, so that they do not depend on their neighbors.
            active = (size > _ZERO * total) & ~(stalled & (growths >= _MAX_GROWTHS))
            if not active.any():
                break
            bias = torch.where((active & (size < smallest)).unsqueeze(-1), bias + constant[..., None] * excess, bias)
            smallest = torch.where(active, size.minimum(smallest), smallest)
            grows = active & stalled
            constant, growths = torch.where(grows, _GROWTH * constant, constant), growths + grows
        return bias, constant

    def attach(self, solver: Solver, bias: Tensor, constant: Tensor) -> Tensor:
        """The biases as differentiable functions of the problem, by the implicit function theorem."""
        leaf = bias.clone().requires_grad_()
        excess = self.sums(solver.solve(self.problem(leaf, constant)).coef)
        rows = [torch.autograd.grad(excess[..., c].sum(), leaf, retain_graph=True)[0] for c in range(leaf.shape[-1])]
        # The matrix is singular: the same bias for all classes has no effect, or no coefficient of a class is free.
        inverse = torch.linalg.pinv(torch.stack(rows, -2), rtol=1e-9, hermitian=True)
        return _Attach.apply(bias, (inverse @ excess.unsqueeze(-1)).squeeze(-1))

    def certify(self, solver: Solver, solution: Solution, bias: Tensor) -> Solution:
        """The solution with the certificate of the problem without a constant in the kernel, at the final biases."""
        problem = replace(self.dual, linear=self.dual.linear - self.shift(bias)).detach()
        batch, coef = problem.linear.shape[:-2], solution.coef.detach()
        with full_precision(coef.device):
            rescaled, coef_scale, _ = rescale(problem.flatten())
            certificate = certify(rescaled, coef.reshape(-1, *coef.shape[-2:]) / coef_scale[:, None, None])
        excess = self.sums(coef).abs().amax(-1) / coef.abs().amax((-2, -1)).clamp_min(torch.finfo(coef.dtype).tiny)
        residual = torch.maximum(certificate.residual.reshape(batch), excess)
        solved = certificate.converged(solver.tolerance).reshape(batch) & (excess <= FEASIBILITY_TOLERANCE)
        failed = Status.FAILED if solver.max_iterations is None else Status.STOPPED
        status = torch.where(solved, Status.CONVERGED, torch.where(solution.status > 0, solution.status, failed))
        gap = certificate.gap.reshape(batch)
        solution = replace(solution, status=status, gap=gap, residual=residual)
        return handle_failures(type(solver).__name__, solution, solver.tolerance, solver.on_failure)


class _Attach(torch.autograd.Function):
    """The `bias`, with the derivative of `bias - change`; it cannot be differentiated twice."""

    @staticmethod
    def forward(bias: Tensor, change: Tensor) -> Tensor:
        return bias.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return None, once_differentiable(-gradient.detach(), gradient, "an SVM with an intercept")
