"""Multinomial logistic regression."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from convexheads.errors import InputError, is_count
from convexheads.heads import _logistic_newton
from convexheads.heads.base import Dual, Head
from convexheads.heads.inputs import label_all
from convexheads.hyperparameters import Hyperparameter, display, positive, value_of
from convexheads.kernels import Kernel
from convexheads.solvers import OnFailure, Solution, Status
from convexheads.solvers.base import check_on_failure, handle_failures
from convexheads.transforms import compute

_ENOUGH_STEPS = 100
_TOLERANCE = 1e-6
# Newton goes on until rounding stops it: the gradient is that of the optimum.
_AIM = 1e-15


class LogisticHead(Head):
    r"""Multinomial logistic regression: the softmax's cross-entropy with an L2 regulariser.

    Primal: \(\min_w \frac{\lambda}{2} \sum_k |w_k|^2 + \sum_n \left(\log \sum_k e^{w_k \cdot x_n} - w_{y_n} \cdot
    x_n\right)\). Optimality: \(\lambda \alpha = Y - \operatorname{softmax}(K \alpha)\), where
    \(w_k = \sum_n \alpha_n^k x_n\). Solved by Newton's method with k Choleskys of n x n and one more a step
    (Rasmussen & Williams 2006, Algorithm 3.3), differentiated implicitly, to any order. Lee et al. 2019 name it as an
    alternative base learner (Section 3.3). There is no bias; a kernel with a constant (`Linear() + Constant(1.0)`) adds
    one, regularised as weights are.

    What differs from Algorithm 3.3: steps that don't descend are halved, and there is no Laplace approximation around
    the optimum.

    `steps=5` is LR-D2's way (Bertinetto et al. 2019): so many undamped Newton steps from zero, through which autograd
    differentiates step by step. What differs from that paper: it treats two classes, by one sigmoid.

    Args:
        regularization: lambda, positive; a float or `Learnable`. Default 1.
        steps: None, the default: to the end. A number: exactly so many Newton steps, with status `STOPPED` where they
            don't reach the certified relative duality gap of 1e-6.
        on_failure: what happens when a task is not solved to that gap, as for a `Solver`: "raise" (default), "warn" or
            "return".
        kernel: any callable `(x, y) -> gram`; default `Linear()`.
        scale: factor of all logits (gamma in Eq. 12 of Lee et al. 2019), positive; a float or `Learnable`. Default 1.

    Raises:
        InputError: an argument is unusable. Calls raise what `Head.forward` does.
    """

    def __init__(
        self,
        regularization: Hyperparameter = 1.0,
        *,
        steps: int | None = None,
        on_failure: OnFailure = "raise",
        kernel: Kernel | None = None,
        scale: Hyperparameter = 1.0,
    ) -> None:
        super().__init__(kernel=kernel, scale=scale)
        self.regularization = positive("regularization", regularization)
        if steps is not None and not is_count(steps):
            raise InputError("steps", repr(steps), "an integer of at least 1, or None")
        check_on_failure("LogisticHead", on_failure)
        self.steps = steps
        self.on_failure: OnFailure = on_failure

    def dual(self, gram: Float[Tensor, "*batch n n"], targets: Float[Tensor, "*batch n k"]) -> Dual:
        weight = value_of(self.regularization, gram)
        batch, (n, k) = targets.shape[:-2], targets.shape[-2:]
        gram, targets = (gram / weight).reshape(-1, n, n), label_all(targets).reshape(-1, n, k)
        if self.steps is not None:
            coef = torch.zeros_like(targets)
            for _ in range(self.steps):
                coef = _logistic_newton.newton_step(gram, targets, coef)
            taken, gap = None, _logistic_newton.certified_gap(gram.detach(), targets, coef.detach())
        else:
            solve = partial(_logistic_newton.solve, tolerance=_AIM, max_steps=_ENOUGH_STEPS)
            coef, gap, taken = compute(solve, gram, targets)
            coef = _logistic_newton.attach(gram, targets, coef)
        otherwise = Status.FAILED if self.steps is None else Status.STOPPED
        status = torch.where(gap <= _TOLERANCE, Status.CONVERGED, otherwise)
        status = torch.where(torch.isfinite(gap), status, Status.FAILED)
        coef = (coef / weight).reshape(*batch, n, k)
        solution = Solution(
            coef=coef,
            bound_multipliers=None,
            row_multipliers=None,
            status=status.reshape(batch),
            gap=gap.reshape(batch),
            residual=torch.zeros_like(gap).reshape(batch),
            iterations=None if taken is None else taken.reshape(batch),
        )
        handle_failures("LogisticHead", solution, _TOLERANCE, self.on_failure)
        return Dual(coef, solution=solution)

    def _settings(self) -> list[str]:
        settings = [f"regularization={display(self.regularization)}"]
        if self.steps is not None:
            settings.append(f"steps={self.steps}")
        if self.on_failure != "raise":
            settings.append(f"on_failure={self.on_failure!r}")
        return settings + super()._settings()
