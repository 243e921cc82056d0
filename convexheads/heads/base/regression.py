"""The base class of heads that predict values."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from convexheads._compiler import traced_if
from convexheads._looks import look_once
from convexheads._validation import ArrayLike
from convexheads.heads.base.fitted import FittedRegressor
from convexheads.heads.base.head import Head
from convexheads.heads.base.inputs import check_init, check_regression
from convexheads.precision import full_precision, output_dtype
from convexheads.solvers.problem import Solution

_traced = traced_if(lambda head, **_: head.is_traceable, "validate=False and a solver that can be traced")


class RegressionHead(Head):
    """Base class of few-shot regressors that solve a convex problem.

    A subclass implements one method, `solve`, which takes a `SupportSet` and returns a `KernelExpansion` (see the
    representer theorem, Schoelkopf, Herbrich & Smola 2001). There is no intercept: center the targets, or give the
    kernel a constant (`RBF() + Constant(1.0)`). Its arguments `kernel` and `validate`, and its errors, are those of
    `Head`.
    """

    _fitted_class: ClassVar[type[FittedRegressor]] = FittedRegressor

    @_traced
    @look_once
    def forward(
        self,
        support: Float[Tensor, "*batch n d"] | ArrayLike,
        targets: Float[Tensor, "..."] | ArrayLike,
        query: Float[Tensor, "*#batch q d"] | ArrayLike,
        *,
        mask: Bool[Tensor, "*#batch n"] | ArrayLike | None = None,
    ) -> Float[Tensor, "..."]:
        """Fit on the support and predict for the query: `head.fit(support, targets, ...)(query)`.

        The errors are those of `ClassificationHead.forward`, and arrays and lists are accepted as described there.

        Args:
            support: features, `(*batch, n, d)`; the leading dimensions are tasks, any number of them.
            targets: values to regress on, `(*batch, n)` or `(*batch, n, outputs)`, of any floating-point dtype.
            query: features, `(*batch, q, d)`.
            mask: `(*batch, n)`, or `(n,)` for all tasks; False at examples to ignore, so that tasks of different sizes
                fit into one batch. Defaults to None (no mask).

        Returns:
            Predictions, `(*batch, q)` or `(*batch, q, outputs)`, in the units of the targets and in the support's
                dtype, but at least in float32. Gradients reach support, targets, query and `Learnable`s.
        """
        return self.fit(support, targets, mask=mask)(query)

    @_traced
    @look_once
    def fit(
        self,
        support: Float[Tensor, "*batch n d"] | ArrayLike,
        targets: Float[Tensor, "..."] | ArrayLike,
        *,
        mask: Bool[Tensor, "*#batch n"] | ArrayLike | None = None,
        init: Solution | None = None,
    ) -> FittedRegressor:
        """Fit on the support sets of a batch of tasks.

        The arguments `support`, `targets` and `mask`, and the errors, are those of `forward`; for `init`, see
        `ClassificationHead.fit`.

        Returns:
            The fitted head, to be called on queries `(*batch, q, d)`.
        """
        support, targets, mask, single = check_regression(support, targets, mask, validate=self.validate)
        with full_precision(support.device):
            examples = self._support_set(support, targets.unsqueeze(-1) if single else targets, mask)
            if init is not None:
                examples = replace(examples, init=check_init(init))
            expansion = self._solve_checked(examples)
        return self._fitted_class(expansion, examples, output_dtype(support.dtype), single)
