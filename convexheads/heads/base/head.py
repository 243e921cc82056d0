"""The base class of all heads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from convexheads._functorch import inspect_values
from convexheads._looks import call_explained
from convexheads._validation import Check, check_bool, check_definite, describe_shape, optional
from convexheads.errors import InputError, SolverError
from convexheads.heads._sharing import apply_once
from convexheads.heads.base.support_set import KernelExpansion, SupportSet
from convexheads.hyperparameters import Configurable
from convexheads.kernels import KernelLike, Linear, check_kernel, condition
from convexheads.precision import working_dtype


def _copy(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype, copy=True)


class Head(Configurable, ABC):
    """Base class of all heads: modules that solve a convex problem over the support set of a task.

    A subclass of `ClassificationHead` or `RegressionHead` implements one method, `solve`. The base classes provide
    checks, batches of tasks, precision, masks, kernels and scoring. The module keeps no state from an episode.

    Args:
        kernel: any callable `(x, y) -> gram` (see `convexheads.kernels`). Defaults to `Linear()`.
        validate: whether to check all input for wrong values, on any device: labels out of range, features and Gram
            matrices that are not finite, matrices that cannot be factorized. False skips every check that reads values,
            so that, with `ways` given as an integer, heads with a closed form never wait for a GPU; tasks with wrong
            values then give NaN, or fail in the solver. Types and shapes are always checked. Defaults to True.

    Raises:
        InputError: an argument is unusable. Calls raise the errors that `forward` describes.
    """

    checks: ClassVar[dict[str, Check]] = {"kernel": optional(check_kernel, default=Linear), "validate": check_bool}

    kernel: KernelLike

    @property
    def is_traceable(self) -> bool:
        """Whether `torch.compile` and `torch.export` can trace the head: not if it reads values of tensors."""
        return not self.validate

    def __init__(self, *, kernel: KernelLike | None = None, validate: bool = True) -> None:
        super().__init__()
        self.kernel = kernel  # pyright: ignore[reportAttributeAccessIssue]  # the check replaces None
        self.validate = validate

    @abstractmethod
    def solve(self, support: SupportSet) -> KernelExpansion:
        """Solve the head's convex problem; the one method that a subclass implements.

        Args:
            support: features, Gram matrix and targets of a batch of tasks.

        Returns:
            Coefficients `(*batch, n, k)` and other terms of the scores, differentiable in support and hyperparameters.

        Raises:
            SolverError: a task could not be solved. `fit` raises an `InputError` instead if the Gram matrix is not
                positive semi-definite.
        """

    def _support_set(
        self,
        features: Tensor,
        targets: Tensor,
        mask: Tensor | None,
        sample_weight: Tensor | None = None,
        prior: Tensor | None = None,
    ) -> SupportSet:
        """The support set in working precision. Masked examples, which may contain NaN, are replaced with zeros.

        Examples with a weight of zero are masked. The result shares no memory with the arguments, which the caller may
        change later.
        """
        features = apply_once(partial(_copy, dtype=working_dtype(features.device)), features)
        targets = targets.to(features.dtype)
        if sample_weight is not None:
            sample_weight = sample_weight.to(features.dtype)
            mask = sample_weight > 0 if mask is None else mask & (sample_weight > 0)
            sample_weight = sample_weight.masked_fill(~mask, 1)
        elif mask is not None:
            mask = mask.clone()
        if mask is not None:
            features, targets = (value.masked_fill(~mask.unsqueeze(-1), 0) for value in (features, targets))
        kernel = condition(self.kernel, features, mask)
        prior = None if prior is None else _copy(prior, features.dtype)
        return SupportSet(features, targets, mask, kernel, self.validate, sample_weight, prior)

    def _solve_checked(self, support: SupportSet) -> KernelExpansion:
        """Solve, and check the result."""
        explain = partial(self._check_gram_after_failure, support)
        expansion = call_explained(partial(self.solve, support), SolverError, explain)
        vars(support).pop("_gram", None)  # free the memory; the next use computes it again
        name = f"{type(self).__name__}.solve"
        if not isinstance(expansion, KernelExpansion):
            raise InputError(name, "a KernelExpansion", f"a result of type {type(expansion).__name__}")
        *batch, n, k = support.targets.shape
        d, dtype = support.features.shape[-1], support.targets.dtype
        shapes = {"coef": (n, k), "weight": (k, d), "bias": (k,)}
        shapes["quadratic"] = (k, n, n) if expansion.weight is None else (k, d, d)
        for part, shape in shapes.items():
            value, shape = getattr(expansion, part), (*batch, *shape)
            is_missing = value is None and part != "coef"
            if not (is_missing or (isinstance(value, Tensor) and value.shape == shape and value.dtype == dtype)):
                kind = f" in {value.dtype}" if isinstance(value, Tensor) else ""
                raise InputError(name, f"{shape} in {dtype}", f"{part} of {describe_shape(value)}{kind}")
        weight = expansion.self_similarity_weight
        if isinstance(weight, Tensor) and weight.ndim:
            raise InputError(name, "a self_similarity_weight without dimensions", describe_shape(weight))
        return expansion

    def _check_gram_after_failure(self, support: SupportSet) -> None:
        if self.validate:
            inspect_values(check_definite, support.gram)
