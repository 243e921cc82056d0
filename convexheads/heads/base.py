"""The interface of every head: fit on a support set, score queries, differentiate through both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor
from torch.nn import functional

from convexheads._functorch import inspect_values
from convexheads.errors import InputError
from convexheads.heads import inputs
from convexheads.hyperparameters import Hyperparameter, OneLine, display, positive, value_of
from convexheads.kernels import Kernel, Linear, for_support, is_kernel
from convexheads.precision import full_precision, working_dtype
from convexheads.solvers import Solution


@dataclass(frozen=True)
class Dual:
    """What a head learns from a Gram matrix.

    With `s = kernel(q, support)`, the score of a query q for class c is
    `s @ coef_c + bias_c + s @ quadratic_c @ s + norm * kernel(q, q)`.

    Attributes:
        coef: dual coefficients, `(*batch, n, k)`.
        bias: `(*batch, k)`; None (default) for none.
        quadratic: symmetric, `(*batch, k, n, n)`; None (default) for a score that is linear in the kernel.
        norm: multiple of each query's own squared norm, the same for all classes (-1 makes distances of scores); a
            number or a scalar tensor, `()`. Default 0.
        solution: what the solver says of `coef`; None (default) for a closed form.
    """

    coef: Float[Tensor, "*batch n k"]
    bias: Float[Tensor, "*batch k"] | None = None
    quadratic: Float[Tensor, "*batch k n n"] | None = None
    norm: float | Float[Tensor, ""] = 0.0
    solution: Solution | None = None


@dataclass(frozen=True)
class Fitted:
    """A head fitted on the support sets of a batch of tasks: call it on queries. It holds everything it needs.

    `Head.fit` makes it.

    Attributes:
        dual: coefficients (and bias), in float64.
        support: the support features, in float64, `(*batch, n, d)`.
        mask: `(*batch, n)`, False at examples that were left out; None for none.
        kernel: the head's, with everything settled that it takes from the support, and what it learns as it was then.
        scale: the head's logit scale at the time of the fit (gamma in Eq. 12 of Lee et al. 2019), a scalar, `()`.
        dtype: of the features that came, and of the logits that go.
        ways: the number of classes of each task, `(*batch,)`, where they differ; None (default) where all have k.
    """

    dual: Dual
    support: Float[Tensor, "*batch n d"]
    mask: Bool[Tensor, "*batch n"] | None
    kernel: Kernel
    scale: Float[Tensor, ""]
    dtype: torch.dtype
    ways: Integer[Tensor, "*batch"] | None = None

    @property
    def solution(self) -> Solution | None:
        """Status, certified gap and multipliers of each task; None for a closed form."""
        return self.dual.solution

    def __call__(self, query: Float[Tensor, "*batch q d"]) -> Float[Tensor, "*batch q k"]:
        """Score queries.

        Args:
            query: features, `(*batch, q, d)`, with the leading dimensions, feature size and device of the support; of
                any floating-point dtype.

        Returns:
            Logits `(*batch, q, k)` in the dtype of the support features that the head was fitted on; minus infinity for
                classes that a task doesn't have.

        Raises:
            InputError: shape, dtype or device don't fit the support, or (looked at on the CPU only) a feature is not
                finite.
        """
        inputs.check_query(query, self.support)
        with full_precision(query.device):
            query = query.to(self.support.dtype)
            similarity = self.similarity(query)
            scores = similarity @ self.dual.coef
            if self.dual.bias is not None:
                scores = scores + self.dual.bias.unsqueeze(-2)
            if self.dual.quadratic is not None:
                image = similarity.unsqueeze(-3) @ self.dual.quadratic
                scores = scores + (image * similarity.unsqueeze(-3)).sum(-1).mT
            if not isinstance(self.dual.norm, float) or self.dual.norm != 0:
                scores = scores + self.dual.norm * self.own_similarity(query).unsqueeze(-1)
            logits = (self.scale * scores).to(self.dtype)
        if self.ways is None:
            return logits
        classes = torch.arange(logits.shape[-1], device=logits.device)
        return logits.masked_fill(classes >= self.ways[..., None, None], -torch.inf)

    def probabilities(self, query: Float[Tensor, "*batch q d"]) -> Float[Tensor, "*batch q k"]:
        """The softmax of the logits of a classifier; as good as its scale (see `calibrate`).

        Args:
            query: features, `(*batch, q, d)`.

        Returns:
            Probabilities `(*batch, q, k)`, which sum to one over the classes.

        Raises:
            InputError: as in a call.
        """
        return self(query).softmax(-1)

    def similarity(self, query: Float[Tensor, "*batch q d"]) -> Float[Tensor, "*batch q n"]:
        """The kernel between queries and the support, zero at examples that were left out.

        Args:
            query: features, `(*batch, q, d)`, in working precision (float64).

        Returns:
            `(*batch, q, n)`.
        """
        similarity = self.kernel(query, self.support)
        inputs.check_gram(similarity, query, self.support)
        return similarity if self.mask is None else similarity.masked_fill(~self.mask.unsqueeze(-2), 0)

    def own_similarity(self, query: Float[Tensor, "*batch q d"]) -> Float[Tensor, "*batch q"]:
        """The kernel between each query and itself.

        Args:
            query: features, `(*batch, q, d)`, in working precision (float64).

        Returns:
            `(*batch, q)`.
        """
        itself = query.unsqueeze(-2)
        return self.kernel(itself, itself)[..., 0, 0]


class BaseLearner(OneLine, ABC):
    """What classification and regression heads have in common: a convex problem over the Gram matrix of the support.

    A subclass writes one method, `dual`: from a Gram matrix and targets to dual coefficients. Everything else (checks,
    tasks in batches, precision, kernels, scoring) is done here. Nothing of an episode is kept on the module.

    Args:
        kernel: any callable `(x, y) -> gram` (`convexheads.kernels`). Default `Linear()`.
        scale: factor of all scores, such as gamma in Eq. 12 of Lee et al. 2019; a float or `Learnable(...)`. Default 1.

    Raises:
        InputError: an argument is unusable.
    """

    def __init__(self, *, kernel: Kernel | None = None, scale: Hyperparameter = 1.0) -> None:
        super().__init__()
        kernel = Linear() if kernel is None else kernel
        if not is_kernel(kernel):
            raise InputError("kernel", repr(kernel), "a callable (x, y) -> gram, such as convexheads.RBF(1.0)")
        self.kernel = kernel
        self.scale = positive("scale", scale)

    @abstractmethod
    def dual(self, gram: Float[Tensor, "*batch n n"], targets: Float[Tensor, "*batch n k"]) -> Dual:
        """Solve the base learner's problem; the one method that a subclass writes.

        Args:
            gram: kernel matrix of the support set, `(*batch, n, n)`, in float64.
            targets: one-hot labels, or the values to regress on, `(*batch, n, k)`; the row of an example that `mask`
                leaves out is zero, and its row and column of `gram` are those of an example at a right angle to all
                others.

        Returns:
            The dual coefficients, `(*batch, n, k)`, differentiable in both arguments and in the hyper-parameters. Those
                of left-out examples are ignored.

        Raises:
            SolverError: a task could not be solved. `fit` turns that into an `InputError` where `gram` turns out not to
                be positive semi-definite.
        """

    def _learn(
        self,
        features: Float[Tensor, "*batch n d"],
        kernel: Kernel,
        targets: Float[Tensor, "*batch n k"],
        mask: Bool[Tensor, "*batch n"] | None,
    ) -> Dual:
        """`dual`, from the features; for base learners that look at more than the Gram matrix."""
        gram = self._gram(features, kernel, mask)
        with inputs.failing_on_indefinite(gram):
            dual = self.dual(gram, targets)
        if not isinstance(dual, Dual):
            raise InputError(f"{type(self).__name__}.dual", f"a result of {type(dual).__name__}", "a Dual")
        if dual.coef.shape != targets.shape or dual.coef.dtype != gram.dtype:
            got = f"coef of shape {tuple(dual.coef.shape)} in {dual.coef.dtype}"
            raise InputError(f"{type(self).__name__}.dual", got, f"{tuple(targets.shape)} in {gram.dtype}")
        return dual

    def _gram(
        self, features: Float[Tensor, "*batch n d"], kernel: Kernel, mask: Bool[Tensor, "*batch n"] | None
    ) -> Float[Tensor, "*batch n n"]:
        gram = kernel(features, features)
        inputs.check_gram(gram, features, features)
        return gram if mask is None else inputs.leave_out(gram, mask)

    def _settings(self) -> list[str]:
        """The constructor's arguments as they stand in its call; subclasses put theirs in front."""
        settings = [] if isinstance(self.kernel, Linear) and not self.kernel.normalize else [f"kernel={self.kernel!r}"]
        return settings if self.scale == 1.0 else [*settings, f"scale={display(self.scale)}"]

    def extra_repr(self) -> str:
        return ", ".join(self._settings())


class Head(BaseLearner):
    """A few-shot classifier whose base learner is a convex problem, the setting of Lee et al. 2019 (Section 3).

    A subclass writes one method, `dual`: from a Gram matrix and one-hot targets to dual coefficients. Everything else
    (checks, tasks in batches, precision, kernels, scoring) is done here. Nothing of an episode is kept on the module.

    Args:
        kernel: any callable `(x, y) -> gram` (`convexheads.kernels`). Default `Linear()`.
        scale: factor of all logits (gamma in Eq. 12 of Lee et al. 2019), positive; a float or `Learnable(...)`. Default
            1.

    Raises:
        InputError: an argument is unusable.
    """

    needs_every_class: ClassVar[bool] = False
    """Whether a class without support examples is an error."""

    def forward(
        self,
        support: Float[Tensor, "*batch n d"],
        labels: Integer[Tensor, "*batch n"],
        query: Float[Tensor, "*batch q d"],
        *,
        ways: int | Integer[Tensor, "*batch"] | None = None,
        mask: Bool[Tensor, "*batch n"] | None = None,
    ) -> Float[Tensor, "*batch q k"]:
        """Fit on the support and score the query: `head.fit(support, labels, ...)(query)`.

        Args:
            support: features, `(*batch, n, d)`; the leading dimensions are tasks, any number of them.
            labels: `(*batch, n)`, any integer dtype, values 0..k-1 in any order (renumber others first:
                `labels.unique(return_inverse=True)[1]`); shots may differ between classes.
            query: features, `(*batch, q, d)`.
            ways: number of classes k. None, the default: the largest label plus one (which on a GPU waits for the
                device). A tensor of integers, `(*batch,)`: the classes of each task; k is then the largest of them, and
                the logits of classes that a task doesn't have are minus infinity. The tasks of each size are solved
                together.
            mask: `(*batch, n)`, False at examples to leave out, so that tasks of different size fit one batch; None,
                the default, for none.

        Returns:
            Logits, `(*batch, q, k)`, in the support's dtype. Gradients reach support, query and `Learnable`s.

        Raises:
            InputError: an argument is unusable; the message says which, what came and what was wanted. Likewise a
                kernel that returns no Gram matrix, or one that is not positive semi-definite and makes the base learner
                fail. With `ways` given, values on a GPU are not looked at, as that would wait for the device: a label
                out of range then gives NaN logits in its task, or that task fails in the solver; and a closed form that
                has no solution gives NaN in the place of a `SolverError`.
            SolverError: a task could not be solved (see the solver's `on_failure`; with "warn", `SolverWarning`
                instead).
            ConvexHeadsError: in the backward pass, where a second derivative is asked for that the solver doesn't have.
        """
        return self.fit(support, labels, ways=ways, mask=mask)(query)

    def fit(
        self,
        support: Float[Tensor, "*batch n d"],
        labels: Integer[Tensor, "*batch n"],
        *,
        ways: int | Integer[Tensor, "*batch"] | None = None,
        mask: Bool[Tensor, "*batch n"] | None = None,
    ) -> Fitted:
        """Fit on the support sets of a batch of tasks.

        Args:
            support: features, `(*batch, n, d)`, as in `forward`, and so are the others.
            labels: `(*batch, n)`, integers from 0 to k - 1.
            ways: number of classes k, or that of each task, `(*batch,)`. None, the default: the largest label plus one.
            mask: `(*batch, n)`, False at examples to leave out; None, the default, for none.

        Returns:
            The fit, to be called on queries `(*batch, q, d)`; it holds all it needs, and its `solution` the
                certificate.

        Raises:
            InputError: as in `forward`.
            SolverError: as in `forward`.
        """
        sizes = ways if isinstance(ways, Tensor) else None
        ways = inspect_values(
            partial(inputs.check_support, needs_every_class=self.needs_every_class), support, labels, ways, mask
        )
        with full_precision(support.device):
            features = support.to(working_dtype(support.device))
            if mask is not None:  # whatever stands there, be it NaN
                features = features.masked_fill(~mask.unsqueeze(-1), 0)
            targets = inputs.one_hot(labels.long(), ways, mask, features.dtype)
            kernel = for_support(self.kernel, features, mask)
            sizes = None if sizes is None else sizes.long()
            if sizes is None or not sizes.numel():
                dual = self._learn(features, kernel, targets, mask)
            else:
                dual = self._learn_each_size(features, targets, mask, sizes)
            return Fitted(dual, features, mask, kernel, value_of(self.scale, features), support.dtype, sizes)

    def _learn_each_size(
        self,
        features: Float[Tensor, "*batch n d"],
        targets: Float[Tensor, "*batch n k"],
        mask: Bool[Tensor, "*batch n"] | None,
        sizes: Integer[Tensor, "*batch"],
    ) -> Dual:
        """Learn the tasks with the same number of classes together; absent classes get coefficients of zero."""
        duals, order = [], []
        for size in sizes.unique().tolist():
            rows = sizes == size
            of_these = None if mask is None else mask[rows]
            kernel = for_support(self.kernel, features[rows], of_these)
            duals.append(self._learn(features[rows], kernel, targets[rows][..., :size], of_these))
            order.append(rows.flatten().nonzero().squeeze(-1))
        return join(duals, torch.cat(order).argsort(), sizes.shape)


def join(parts: Sequence[Dual], order: Integer[Tensor, " tasks"], batch: torch.Size) -> Dual:
    """One batch from duals of tasks with different numbers of classes: padded with zeros, in the given order."""

    def together(values: Sequence[Tensor | None], classes: int | None) -> Tensor | None:
        """`classes`: which dimension, counted from the last, is that of the classes; None for none."""
        values = [value for value in values if value is not None]
        if not values:
            return None
        if classes is not None:
            most = max(value.shape[-classes] for value in values)
            values = [
                functional.pad(value, (0, 0) * (classes - 1) + (0, most - value.shape[-classes])) for value in values
            ]
        joined = torch.cat(values)[order]
        return joined.reshape((*batch, *joined.shape[1:]))

    solutions = [part.solution for part in parts if part.solution is not None]
    solution = None
    if solutions:
        by_class = ("coef", "bound_multipliers")
        names = [field.name for field in fields(Solution)]
        joined = {
            name: together([getattr(s, name) for s in solutions], 1 if name in by_class else None) for name in names
        }
        solution = Solution(**joined)  # pyright: ignore[reportArgumentType]
    return replace(
        parts[0],
        coef=together([part.coef for part in parts], 1),
        bias=together([part.bias for part in parts], 1),
        quadratic=together([part.quadratic for part in parts], 3),
        solution=solution,
    )
