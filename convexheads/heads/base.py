"""The interface of every head: fit on a support set, score queries, differentiate through both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from convexheads.errors import InputError
from convexheads.heads import inputs
from convexheads.hyperparameters import Hyperparameter, OneLine, display, positive, value_of
from convexheads.kernels import Kernel, Linear
from convexheads.precision import full_precision, working_dtype
from convexheads.solvers import Solution


@dataclass(frozen=True)
class Dual:
    """What a head learns from a Gram matrix.

    The scores of a query q are `kernel(q, support) @ coef + bias + norm * kernel(q, q)`.

    Attributes:
        coef: dual coefficients, `(*batch, n, k)`.
        bias: `(*batch, k)`; None for none.
        norm: multiple of each query's own squared norm, the same for all classes (-1 makes distances of scores).
        solution: what the solver says of `coef`; None for a closed form.
    """

    coef: Float[Tensor, "*batch n k"]
    bias: Float[Tensor, "*batch k"] | None = None
    norm: float = 0.0
    solution: Solution | None = None


@dataclass(frozen=True)
class Fitted:
    """A head fitted on the support sets of a batch of tasks: call it on queries. It holds everything it needs.

    Attributes:
        dual: coefficients (and bias), in float64.
        support: the support features, in float64, `(*batch, n, d)`.
        kernel: the head's.
        scale: the head's logit scale at the time of the fit (Eq. 12's gamma).
        dtype: of the features that came, and of the logits that go.
    """

    dual: Dual
    support: Float[Tensor, "*batch n d"]
    kernel: Kernel
    scale: Float[Tensor, ""]
    dtype: torch.dtype

    @property
    def solution(self) -> Solution | None:
        """Status, certified gap and multipliers of each task; None for a closed form."""
        return self.dual.solution

    def __call__(self, query: Float[Tensor, "*batch q d"]) -> Float[Tensor, "*batch q k"]:
        """Score queries.

        Args:
            query: `(*batch, q, d)`, with the leading dimensions, feature size and device of the support.

        Returns:
            Logits `(*batch, q, k)` in the dtype of the support features that the head was fitted on.

        Raises:
            InputError: shape, dtype or device don't fit the support, or a feature is not finite.
        """
        inputs.check_query(query, self.support)
        with full_precision(query.device):
            query = query.to(self.support.dtype)
            scores = self.kernel(query, self.support) @ self.dual.coef
            if self.dual.bias is not None:
                scores = scores + self.dual.bias.unsqueeze(-2)
            if self.dual.norm:
                itself = query.unsqueeze(-2)
                scores = scores + self.dual.norm * self.kernel(itself, itself).squeeze(-1)
            return (self.scale * scores).to(self.dtype)


class Head(OneLine, ABC):
    """A few-shot classifier whose base learner is a convex problem.

    A subclass writes one method, `dual`: from a Gram matrix and one-hot targets to dual coefficients. Everything else
    (checks, tasks in batches, precision, kernels, scoring) is done here. Nothing of an episode is kept on the module.

    Args:
        kernel: any callable `(x, y) -> gram` (`convexheads.kernels`). Default `Linear()`.
        scale: factor of all logits, the paper's learnable gamma (Eq. 12); a float or `Learnable(...)`. Default 1.

    Raises:
        InputError: an argument is unusable.
    """

    needs_every_class: ClassVar[bool] = False
    """Whether a class without support examples is an error."""

    def __init__(self, *, kernel: Kernel | None = None, scale: Hyperparameter = 1.0) -> None:
        super().__init__()
        kernel = Linear() if kernel is None else kernel
        if not callable(kernel):
            raise InputError("kernel", repr(kernel), "a callable (x, y) -> gram, such as convexheads.RBF(1.0)")
        self.kernel = kernel
        self.scale = positive("scale", scale)

    @abstractmethod
    def dual(self, gram: Float[Tensor, "*batch n n"], targets: Float[Tensor, "*batch n k"]) -> Dual:
        """Solve the base learner's problem.

        Args:
            gram: kernel matrix of the support set, in float64.
            targets: one-hot labels; the row of an example that `mask` leaves out is zero, and its row and column of
                `gram` are those of an example at a right angle to all others.

        Returns:
            The dual coefficients, differentiable in both arguments and in the hyper-parameters. Those of left-out
            examples are ignored.
        """

    def forward(
        self,
        support: Float[Tensor, "*batch n d"],
        labels: Integer[Tensor, "*batch n"],
        query: Float[Tensor, "*batch q d"],
        *,
        ways: int | None = None,
        mask: Bool[Tensor, "*batch n"] | None = None,
    ) -> Float[Tensor, "*batch q k"]:
        """Fit on the support and score the query: `head.fit(support, labels, ...)(query)`.

        Args:
            support: features, `(*batch, n, d)`; the leading dimensions are tasks, any number of them.
            labels: `(*batch, n)`, any integer dtype, values 0..k-1 in any order; shots may differ between classes.
            query: features, `(*batch, q, d)`.
            ways: number of classes k. None: the largest label plus one (which on a GPU waits for the device).
            mask: `(*batch, n)`, False at examples to leave out, so that tasks of different size fit one batch.

        Returns:
            Logits, `(*batch, q, k)`, in the support's dtype. Gradients reach support, query and `Learnable`s.

        Raises:
            InputError: an argument is unusable; the message says which, what came and what was wanted. With `ways`
                given, values on a GPU are not looked at, as that would wait for the device: a label out of range then
                gives NaN logits in its task, or that task fails in the solver.
            SolverError: a task could not be solved (see the solver's `on_failure`).
        """
        return self.fit(support, labels, ways=ways, mask=mask)(query)

    def fit(
        self,
        support: Float[Tensor, "*batch n d"],
        labels: Integer[Tensor, "*batch n"],
        *,
        ways: int | None = None,
        mask: Bool[Tensor, "*batch n"] | None = None,
    ) -> Fitted:
        """Fit on the support sets of a batch of tasks; arguments and errors as in `forward`."""
        ways = inputs.check_support(support, labels, ways, mask, needs_every_class=self.needs_every_class)
        with full_precision(support.device):
            features = support.to(working_dtype(support.device))
            if mask is not None:  # whatever stands there, be it NaN
                features = features.masked_fill(~mask.unsqueeze(-1), 0)
            gram = self.kernel(features, features)
            inputs.check_gram(gram, features)
            targets = inputs.one_hot(labels, ways, mask, gram.dtype)
            if mask is not None:
                gram = inputs.leave_out(gram, mask)
            dual = self.dual(gram, targets)
            if mask is not None:
                dual = replace(dual, coef=dual.coef * mask.unsqueeze(-1))
        return Fitted(dual, features, self.kernel, value_of(self.scale, gram), support.dtype)

    def _settings(self) -> list[str]:
        """The constructor's arguments as they stand in its call; subclasses put theirs in front."""
        settings = [] if isinstance(self.kernel, Linear) and not self.kernel.normalize else [f"kernel={self.kernel!r}"]
        return settings if self.scale == 1.0 else [*settings, f"scale={display(self.scale)}"]

    def extra_repr(self) -> str:
        return ", ".join(self._settings())
