"""The base class of all heads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from convexheads._validation import Check, check_bool, check_definite
from convexheads.errors import InputError, SolverError
from convexheads.heads.base.support_set import KernelExpansion, SupportSet
from convexheads.hyperparameters import Configurable, Hyperparameter, check_positive
from convexheads.kernels import Kernel, KernelLike, Linear, check_kernel, condition


class Head(Configurable, ABC):
    """Base class of all heads: modules that solve a convex problem over the support set of a task.

    A subclass of `ClassificationHead` or `RegressionHead` implements one method, `solve`. The base classes provide
    checks, batches of tasks, precision, masks, kernels and scoring. The module keeps no state from an episode.

    Args:
        kernel: any callable `(x, y) -> gram` (see `convexheads.kernels`). Defaults to `Linear()`.
        scale: factor of all scores, positive (gamma in Eq. 12 of Lee et al. 2019); a float or `Learnable`. Defaults to
            1.
        validate: whether to check all input for wrong values, on any device: labels out of range, features and Gram
            matrices that are not finite, matrices that cannot be factorized. False skips every check that reads values,
            so that heads with a closed form never wait for a GPU; tasks with wrong values then give NaN, or fail in the
            solver. Types and shapes are always checked. Defaults to True.

    Raises:
        InputError: an argument is unusable.
    """

    checks: ClassVar[dict[str, Check]] = {"kernel": check_kernel, "scale": check_positive, "validate": check_bool}
    default_kernel: ClassVar[type[Kernel]] = Linear
    """The kernel if none is given."""

    kernel: KernelLike
    scale: Hyperparameter
    validate: bool

    def __init__(self, *, kernel: KernelLike | None = None, scale: Hyperparameter = 1.0, validate: bool = True) -> None:
        super().__init__()
        self.kernel = self.default_kernel() if kernel is None else kernel
        self.scale, self.validate = scale, validate

    @abstractmethod
    def solve(self, support: SupportSet) -> KernelExpansion:
        """Solve the head's convex problem; the one method that a subclass implements.

        Args:
            support: features, Gram matrix and targets of a batch of tasks.

        Returns:
            Coefficients `(*batch, n, k)` and other terms of the scores, differentiable in the support set and in the
                hyperparameters.

        Raises:
            SolverError: a task could not be solved. `fit` raises an `InputError` instead if the Gram matrix is not
                positive semi-definite.
        """

    def _support_set(
        self,
        features: Float[Tensor, "*batch n d"],
        targets: Float[Tensor, "*batch n k"],
        mask: Bool[Tensor, "*batch n"] | None,
    ) -> SupportSet:
        return SupportSet(features, targets, mask, condition(self.kernel, features, mask), self.validate)

    def _solve_checked(self, support: SupportSet) -> KernelExpansion:
        """Solve, check the result, and check the Gram matrix after a failure."""
        try:
            expansion = self.solve(support)
        except SolverError:
            if self.validate:
                check_definite(support.gram)
            raise
        support.release_gram()
        name = f"{type(self).__name__}.solve"
        if not isinstance(expansion, KernelExpansion):
            raise InputError(name, "a KernelExpansion", f"a result of type {type(expansion).__name__}")
        coef, targets = expansion.coef, support.targets
        if coef.shape != targets.shape or coef.dtype != targets.dtype:
            got = f"coef of shape {tuple(coef.shape)} in {coef.dtype}"
            raise InputError(name, f"{tuple(targets.shape)} in {targets.dtype}", got)
        return expansion

    def _default(self, name: str, default: Any) -> Any:
        return self.default_kernel() if name == "kernel" and default is None else super()._default(name, default)
