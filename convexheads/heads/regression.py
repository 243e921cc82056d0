"""The interface of every regression head: fit on a support set, predict for queries, differentiate through both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from convexheads._functorch import inspect_values
from convexheads.errors import ConvexHeadsError
from convexheads.heads import inputs
from convexheads.heads.base import BaseLearner, Fitted
from convexheads.hyperparameters import value_of
from convexheads.kernels import for_support
from convexheads.precision import full_precision, working_dtype


@dataclass(frozen=True)
class FittedRegression(Fitted):
    """A regression head fitted on the support sets of a batch of tasks: call it on queries.

    `RegressionHead.fit` makes it.

    Attributes:
        flat: whether targets came without a last dimension of outputs, and predictions go without it. Default False.
    """

    flat: bool = False

    def __call__(self, query: Float[Tensor, "*batch q d"]) -> Float[Tensor, "..."]:
        """Predict.

        Args:
            query: features, `(*batch, q, d)`, with the leading dimensions, feature size and device of the support.

        Returns:
            `(*batch, q)` or `(*batch, q, outputs)`, as the targets were, in the units of the targets and in the
                support's dtype.

        Raises:
            InputError: as in `Fitted`.
        """
        values = super().__call__(query)
        return values.squeeze(-1) if self.flat else values

    def probabilities(self, query: Float[Tensor, "*batch q d"]) -> Float[Tensor, "*batch q k"]:
        """Regression heads have no class probabilities.

        Args:
            query: ignored.

        Raises:
            ConvexHeadsError: always.
        """
        raise ConvexHeadsError("probabilities: got a regression head, wanted a classifier")


class RegressionHead(BaseLearner):
    """A few-shot regressor whose base learner is a convex problem.

    A subclass writes one method, `dual`: from a Gram matrix and targets to dual coefficients (by the representer
    theorem, Schoelkopf, Herbrich & Smola 2001). There is no intercept: centre the targets, or give the kernel a
    constant (`RBF() + Constant(1.0)`).

    Args:
        kernel: any callable `(x, y) -> gram`; default `Linear()`.
        scale: factor of all predictions, positive; a float or `Learnable`. Default 1.

    Raises:
        InputError: an argument is unusable.
    """

    fitted: ClassVar[type[FittedRegression]] = FittedRegression
    """What `fit` returns."""

    def forward(
        self,
        support: Float[Tensor, "*batch n d"],
        targets: Float[Tensor, "..."],
        query: Float[Tensor, "*batch q d"],
        *,
        mask: Bool[Tensor, "*batch n"] | None = None,
    ) -> Float[Tensor, "..."]:
        """Fit on the support and predict for the query: `head.fit(support, targets, ...)(query)`.

        Args:
            support: features, `(*batch, n, d)`; the leading dimensions are tasks, any number of them.
            targets: values to regress on, `(*batch, n)` or `(*batch, n, outputs)`, of any floating-point dtype.
            query: features, `(*batch, q, d)`.
            mask: `(*batch, n)`, False at examples to leave out, so that tasks of different size fit one batch; None,
                the default, for none.

        Returns:
            Predictions, `(*batch, q)` or `(*batch, q, outputs)`, in the units of the targets and in the support's
                dtype. Gradients reach support, targets, query and `Learnable`s.

        Raises:
            InputError: an argument is unusable; the message says which, what came and what was wanted. Likewise a
                kernel that returns no Gram matrix, or one that is not positive semi-definite and makes the base learner
                fail. Values on a GPU are not looked at.
            SolverError: a task could not be solved.
            ConvexHeadsError: in the backward pass, where a second derivative is asked for that the solver doesn't have.
        """
        return self.fit(support, targets, mask=mask)(query)

    def fit(
        self,
        support: Float[Tensor, "*batch n d"],
        targets: Float[Tensor, "..."],
        *,
        mask: Bool[Tensor, "*batch n"] | None = None,
    ) -> FittedRegression:
        """Fit on the support sets of a batch of tasks.

        Args:
            support: features, `(*batch, n, d)`, as in `forward`, and so are the others.
            targets: values to regress on, `(*batch, n)` or `(*batch, n, outputs)`.
            mask: `(*batch, n)`, False at examples to leave out; None, the default, for none.

        Returns:
            The fit, to be called on queries `(*batch, q, d)`.

        Raises:
            InputError: as in `forward`.
            SolverError: as in `forward`.
        """
        flat = inspect_values(inputs.check_targets, targets, support, mask)
        with full_precision(support.device):
            features = support.to(working_dtype(support.device))
            values = (targets.unsqueeze(-1) if flat else targets).to(features.dtype)
            if mask is not None:  # whatever stands there, be it NaN
                features = features.masked_fill(~mask.unsqueeze(-1), 0)
                values = values.masked_fill(~mask.unsqueeze(-1), 0)
            kernel = for_support(self.kernel, features, mask)
            dual = self._learn(features, kernel, values, mask)
        return self.fitted(dual, features, mask, kernel, value_of(self.scale, features), support.dtype, flat=flat)
