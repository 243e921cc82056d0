"""The base class of heads that classify."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from jaxtyping import Bool, Float, Integer
from torch import Tensor

from convexheads._compiler import traced_if
from convexheads._validation import ArrayLike
from convexheads.errors import ConvexHeadsError, InputError, SolverError
from convexheads.heads.base.fitted import FittedClassifier
from convexheads.heads.base.head import Head
from convexheads.heads.base.inputs import (
    check_classification,
    check_multilabel,
    check_prior,
    check_sample_weight,
    is_multilabel,
)
from convexheads.heads.base.support_set import KernelExpansion, SupportSet, merge_groups, one_hot
from convexheads.hyperparameters import Hyperparameter, as_tensor, check_positive
from convexheads.kernels import KernelLike
from convexheads.precision import full_precision, working_dtype
from convexheads.solvers.failures import describe_failures

_traced = traced_if(
    lambda head, ways=None, **_: head.is_traceable and isinstance(ways, int),
    "validate=False, a solver that can be traced, and ways= as a number",
)


class ClassificationHead(Head):
    """Base class of few-shot classifiers that solve a convex problem, the setting of Lee et al. 2019 (Section 3).

    A subclass implements one method, `solve`, which takes a `SupportSet` with one-hot targets and returns a
    `KernelExpansion`.

    Args:
        scale: positive factor of all scores (gamma in Eq. 12 of Lee et al. 2019), a float or `Learnable`. Default: 1.
        kernel: see `Head`, also for `validate` and for the errors.
    """

    checks = Head.checks | {"scale": check_positive}
    requires_all_classes: ClassVar[bool] = False
    """Whether a class without support examples is an error even with `allow_missing_classes=True`."""
    accepts_weights: ClassVar[bool] = False
    """Whether `solve` uses `SupportSet.sample_weight` and `SupportSet.offset`."""
    accepts_multilabel: ClassVar[bool] = False
    """Whether `solve` supports `SupportSet.is_multilabel`."""

    def __init__(self, *, kernel: KernelLike | None = None, scale: Hyperparameter = 1.0, validate: bool = True) -> None:
        super().__init__(kernel=kernel, validate=validate)
        self.scale = scale

    @_traced
    def forward(
        self,
        support: Float[Tensor, "*batch n d"] | ArrayLike,
        labels: Integer[Tensor, "*#batch n"] | Bool[Tensor, "*batch n k"] | ArrayLike,
        query: Float[Tensor, "*batch q d"] | ArrayLike,
        *,
        ways: int | Integer[Tensor, "*#batch"] | ArrayLike | None = None,
        mask: Bool[Tensor, "*#batch n"] | ArrayLike | None = None,
        allow_missing_classes: bool = False,
        sample_weight: Float[Tensor, "*#batch n"] | ArrayLike | None = None,
        prior: Float[Tensor, "*#batch k d"] | ArrayLike | None = None,
    ) -> Float[Tensor, "*batch q k"]:
        """Fit on the support and score the query: `head.fit(support, labels, ...)(query)`.

        NumPy arrays and nested lists are accepted in place of tensors, and keep the dtype of the array; the result is
        a tensor.

        Args:
            support: features, `(*batch, n, d)`; the leading dimensions are tasks, any number of them.
            labels: `(*batch, n)`, or `(n,)` if all tasks have the same; any integer dtype, values 0..k-1 in any order
                (renumber others first: `labels.unique(return_inverse=True)[1]`); shots may differ between classes.
                Where an example may have any number of labels, `(*batch, n, k)` of bool, in heads with
                `accepts_multilabel`: each class is then a problem of its own, against all others.
            query: features, `(*batch, q, d)`.
            ways: number of classes k. Defaults to None, the largest label plus one (reading it waits for a GPU). A
                tensor or list of integers, `(*batch,)`, is the number of classes of each task; k is then the largest of
                them, and the logits of classes that a task does not have are minus infinity. Tasks with the same number
                of classes are solved together.
            mask: `(*batch, n)`, or `(n,)` for all tasks; False at examples to ignore, so that tasks of different sizes
                fit into one batch. Defaults to None (no mask).
            allow_missing_classes: whether a class may lack examples that are not masked. Defaults to False: each of the
                k classes needs one or, if `ways` is a tensor or a list, each class up to the largest label of its task.
                Heads with `requires_all_classes` need examples of every class in any case.
            sample_weight: `(*batch, n)`, or `(n,)` for all tasks: factor of the loss of each example, non-negative. An
                example with weight zero counts as masked, and its weight has no gradient. Defaults to None (all one).
                Only heads that derive from `LossHead` accept it.
            prior: weights W0 `(*batch, k, d)`, or `(k, d)` for all tasks, such as the text embeddings of the classes: a
                score is `q @ W0.mT` plus what the head learns, and its regularizer is `|W - W0|^2` in place of `|W|^2`.
                Defaults to None (zero). Only heads that derive from `LossHead` accept it.

        Returns:
            Logits, `(*batch, q, k)`, in the support's dtype. Gradients reach support, query and `Learnable`s.

        Raises:
            InputError: an argument is unusable, or a class has no examples. This includes a kernel that returns no Gram
                matrix, or one that is not positive semi-definite and makes the problem fail. With `validate=False`,
                wrong values are not an error: a label out of range gives NaN logits in its task, or that task fails in
                the solver. A closed form that has no solution, as for class means without examples, gives NaN.
            SolverError: a task could not be solved, and the solver's `on_failure` is "raise".
            ConvexHeadsError: in the backward pass, for a second derivative that the solver does not support.
        """
        fitted = self.fit(
            support,
            labels,
            ways=ways,
            mask=mask,
            allow_missing_classes=allow_missing_classes,
            sample_weight=sample_weight,
            prior=prior,
        )
        return fitted(query)

    @_traced
    def fit(
        self,
        support: Float[Tensor, "*batch n d"] | ArrayLike,
        labels: Integer[Tensor, "*#batch n"] | Bool[Tensor, "*batch n k"] | ArrayLike,
        *,
        ways: int | Integer[Tensor, "*#batch"] | ArrayLike | None = None,
        mask: Bool[Tensor, "*#batch n"] | ArrayLike | None = None,
        allow_missing_classes: bool = False,
        sample_weight: Float[Tensor, "*#batch n"] | ArrayLike | None = None,
        prior: Float[Tensor, "*#batch k d"] | ArrayLike | None = None,
    ) -> FittedClassifier:
        """Fit on the support sets of a batch of tasks.

        The arguments `support`, `labels`, `ways`, `mask`, `allow_missing_classes`, `sample_weight` and `prior`, and the
        errors, are those of `forward`.

        Returns:
            The fitted head, to be called on queries `(*batch, q, d)`. Its `solution` has the certificate.
        """
        multilabel = single = None
        if self.accepts_multilabel and is_multilabel(labels):
            support, multilabel, mask = check_multilabel(support, labels, ways, mask, validate=self.validate)
            if getattr(self, "class_weight", None) is not None:
                raise InputError("class_weight", "None where an example may have any number of labels", "a value")
            ways_per_task, max_ways = None, multilabel.shape[-1]
        else:
            support, single, ways_per_task, mask, max_ways = check_classification(
                support,
                labels,
                ways,
                mask,
                needed_by=type(self).__name__ if self.requires_all_classes else None,
                allow_missing_classes=allow_missing_classes,
                validate=self.validate,
            )
        name = None if self.accepts_weights else type(self).__name__
        sample_weight = check_sample_weight(sample_weight, support, mask, refused_by=name, validate=self.validate)
        prior = check_prior(prior, support, max_ways, refused_by=name, validate=self.validate)
        with full_precision(support.device):
            dtype = working_dtype(support.device)
            sample_weight = None if sample_weight is None else sample_weight.to(dtype)
            if multilabel is not None:
                targets = multilabel.to(dtype)
            else:
                assert single is not None
                targets = one_hot(single, max_ways, ways_per_task, dtype, validated=self.validate)
            examples = self._support_set(support, targets, mask, self._weigh(targets, mask, sample_weight), prior)
            examples = replace(examples, is_multilabel=multilabel is not None)
            if ways_per_task is None or not ways_per_task.numel():
                expansion = self._solve_checked(examples)
            else:
                expansion = self._solve_grouped_by_ways(examples, ways_per_task)
            scale = as_tensor(self.scale, examples.features)
            return FittedClassifier(expansion, examples, support.dtype, scale, ways_per_task)

    def _weigh(self, targets: Tensor, mask: Tensor | None, sample_weight: Tensor | None) -> Tensor | None:
        """The factor of the loss of each example, `(*batch, n)`; None for one."""
        return sample_weight

    def _solve_grouped_by_ways(self, support: SupportSet, ways: Integer[Tensor, "*batch"]) -> KernelExpansion:
        """Solve the tasks with the same number of classes together; absent classes get coefficients of zero."""
        groups, cause = [], None
        for k in ways.unique().tolist():
            rows = ways == k
            masks = support.mask, support.sample_weight
            mask, sample_weight = (None if part is None else part[rows] for part in masks)
            prior = None if support.prior is None else support.prior[rows][..., :k, :]
            targets = support.targets[rows][..., :k]
            group = self._support_set(support.features[rows], targets, mask, sample_weight, prior)
            try:
                groups.append(self._solve_checked(group))
            except ConvexHeadsError as error:
                tasks = [*map(tuple, rows.nonzero().tolist())]
                error.add_note(f"Tasks are counted among those with {k} classes, which are {tasks} in the batch.")
                if not isinstance(error, SolverError) or error.solution is None:
                    raise
                groups.append(KernelExpansion(error.solution.coef, solution=error.solution))
                cause = error
        expansion = merge_groups(groups, ways)
        if cause is None:
            return expansion
        if expansion.solution is None:  # another group has none
            raise cause
        message = f"{type(self).__name__}: {describe_failures(expansion.solution)}"
        raise SolverError(message, expansion.solution) from cause


def check_head(head: object) -> ClassificationHead:
    """Return the `head`, or raise `InputError`."""
    if not isinstance(head, ClassificationHead):
        raise InputError("head", "a classification head of convexheads, such as SVMHead(C=0.1)", repr(head))
    return head
