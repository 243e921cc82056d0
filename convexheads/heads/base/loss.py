"""The base class of classification heads that minimize a loss plus a regularizer."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from convexheads._validation import Check, check_bool, check_real
from convexheads.errors import InputError
from convexheads.heads.base.classification import ClassificationHead
from convexheads.hyperparameters import Hyperparameter
from convexheads.kernels import KernelLike

ClassWeight = str | tuple[float, ...] | None
"""The type of `class_weight`: None, "balanced", or a weight per class."""


def _check_class_weight(name: str, value: Any) -> ClassWeight:
    """Return the weights of classes as a tuple of numbers, or raise `InputError`."""
    if value is None or (isinstance(value, str) and value == "balanced"):
        return value
    expected = "None, 'balanced', or one positive number per class"
    if isinstance(value, dict):
        if set(value) != set(range(len(value))):
            raise InputError(name, f"{expected}; a dictionary needs the keys 0..k-1", repr(value))
        value = [value[label] for label in range(len(value))]
    if isinstance(value, str) or not hasattr(value, "__len__"):
        raise InputError(name, expected, repr(value))
    return tuple(check_real(name, weight, positive=True) for weight in value)


class LossHead(ClassificationHead):
    r"""Base class of heads that minimize a loss of each support example, plus an L2 regularizer of the weights.

    Use it for a head of your own whose examples or classes can have weights: its `solve` multiplies the loss of each
    example by `SupportSet.factors`, and adds `SupportSet.offset` to the scores of the support examples.

    Args:
        class_weight: factors of the losses by class, as in scikit-learn: "balanced" for \(n / (k\, n_c)\), with the
            number of examples n, of classes k that have examples, and of examples \(n_c\) of the class; or one positive
            number per class, as a sequence or a dictionary with the keys 0..k-1. They multiply `sample_weight`, which
            "balanced" counts too. Defaults to None (all one).
        intercept: whether each class has a bias, which is not regularized. Defaults to False.
        kernel: see `ClassificationHead`, also for `scale`, `validate` and the errors.

    Raises:
        InputError: calls raise it also if the number of weights is not that of the classes.
    """

    checks: ClassVar[dict[str, Check]] = ClassificationHead.checks | {
        "class_weight": _check_class_weight,
        "intercept": check_bool,
    }
    accepts_weights = True

    def __init__(
        self,
        *,
        class_weight: Any = None,
        intercept: bool = False,
        kernel: KernelLike | None = None,
        scale: Hyperparameter = 1.0,
        validate: bool = True,
    ) -> None:
        super().__init__(kernel=kernel, scale=scale, validate=validate)
        self.class_weight, self.intercept = class_weight, intercept

    def _weigh(
        self,
        targets: Float[Tensor, "*batch n k"],
        mask: Bool[Tensor, "*batch n"] | None,
        sample_weight: Float[Tensor, "*batch n"] | None,
        *,
        is_multilabel: bool,
    ) -> Float[Tensor, "*batch n"] | None:
        if self.class_weight is None:
            return sample_weight
        if is_multilabel:
            raise InputError("class_weight", "None where an example may have any number of labels", "a value")
        weight = torch.ones_like(targets[..., 0]) if sample_weight is None else sample_weight.to(targets.dtype)
        if mask is not None:
            weight = weight * mask
        if self.class_weight == "balanced":
            totals = (targets * weight.unsqueeze(-1)).sum(-2)
            present = totals > 0
            factors = totals.sum(-1, keepdim=True) / (present.sum(-1, keepdim=True) * totals.where(present, 1))
        else:
            if len(self.class_weight) != (k := targets.shape[-1]):
                raise InputError("class_weight", f"a number for each of the {k} classes", len(self.class_weight))
            factors = torch.stack([targets.new_full((), each) for each in self.class_weight])  # without a copy
        return weight * (targets * factors.unsqueeze(-2)).sum(-1)
