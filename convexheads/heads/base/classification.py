"""The base class of heads that classify."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from convexheads._compiler import traced_if
from convexheads._looks import look_once
from convexheads._validation import ArrayLike, check_choice
from convexheads.errors import ConvexHeadsError, InputError, SolverError
from convexheads.heads.base.fitted import FittedClassifier
from convexheads.heads.base.head import Head
from convexheads.heads.base.held_out import Examples, leave_one_out
from convexheads.heads.base.inputs import (
    check_classification,
    check_init,
    check_multilabel,
    check_prior,
    check_sample_weight,
    is_multilabel,
)
from convexheads.heads.base.support_set import KernelExpansion, SupportSet, merge_groups
from convexheads.hyperparameters import Hyperparameter, as_tensor, check_positive
from convexheads.kernels import KernelLike
from convexheads.precision import full_precision, output_dtype, working_dtype
from convexheads.solvers.problem import Solution

_traced = traced_if(
    lambda head, ways=None, **_: head.is_traceable and isinstance(ways, int),
    "validate=False, a solver that can be traced, and ways= as a number",
)


class Checked(NamedTuple):
    """The arguments of a fit, after all checks."""

    examples: SupportSet
    ways: Integer[Tensor, "*batch"] | None
    sample_weight: Float[Tensor, "*batch n"] | None  # that of the caller, without weights of classes
    dtype: torch.dtype  # of the results


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
    @look_once
    def forward(
        self,
        support: Float[Tensor, "*batch n d"] | ArrayLike,
        labels: Integer[Tensor, "*#batch n"] | Bool[Tensor, "*batch n k"] | ArrayLike,
        query: Float[Tensor, "*#batch q d"] | ArrayLike,
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
            query: features, `(*batch, q, d)`, or `(q, d)` for all tasks.
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
            Logits, `(*batch, q, k)`, in the support's dtype, but at least in float32. Gradients reach support, query
            and `Learnable`s.

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
    @look_once
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
        calibrate: str | None = None,
        init: Solution | None = None,
    ) -> FittedClassifier:
        """Fit on the support sets of a batch of tasks.

        The arguments `support`, `labels`, `ways`, `mask`, `allow_missing_classes`, `sample_weight` and `prior`, and the
        errors, are those of `forward`.

        If `calibrate` is "loo", the logits of each task are multiplied by the factor for which the probabilities of its
        own examples are best, each predicted without it (temperature scaling without a validation set). It needs at
        least two examples of most classes, and the fit then has `prediction_sets`. The default is None.

        If `init` is the `solution` of a previous fit, such as one with another C, or of the same episode in an earlier
        step of training, native solvers and logistic regression begin there, which saves time if it is close. It does
        not change the solution, unless the solver stops early. Other heads and solvers ignore it. The default is None.

        Returns:
            The fitted head, to be called on queries `(*batch, q, d)`. Its `solution` has the certificate.
        """
        found = self._check(
            support,
            labels,
            ways=ways,
            mask=mask,
            allow_missing_classes=allow_missing_classes,
            sample_weight=sample_weight,
            prior=prior,
        )
        examples = found.examples if init is None else replace(found.examples, init=check_init(init))
        with full_precision(examples.features.device):
            if found.ways is None or not found.ways.numel():
                expansion = self._solve_checked(examples)
            else:
                expansion = self._solve_grouped_by_ways(examples, found.ways)
            scale = as_tensor(self.scale, examples.features)
            scale = scale.expand(examples.features.shape[:-2]) if scale.ndim else scale
            fitted = FittedClassifier(expansion, examples, found.dtype, scale, found.ways)
        if calibrate is None:
            return fitted
        if check_choice("calibrate", calibrate, ("loo",)) and found.ways is not None:
            raise InputError("calibrate", "None where the number of classes differs between tasks", repr(calibrate))
        return fitted.calibrated(self._leave_one_out(found), examples.targets, examples.used)

    def _check(
        self,
        support: Any,
        labels: Any,
        *,
        ways: Any = None,
        mask: Any = None,
        allow_missing_classes: Any = False,
        sample_weight: Any = None,
        prior: Any = None,
    ) -> Checked:
        """Check the arguments of `fit`."""
        ways_per_task = None
        multilabel = self.accepts_multilabel and is_multilabel(labels)
        if multilabel:
            support, is_own, mask = check_multilabel(support, labels, ways, mask, validate=self.validate)
        else:
            support, is_own, ways_per_task, mask = check_classification(
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
        prior = check_prior(prior, support, is_own.shape[-1], refused_by=name, validate=self.validate)
        with full_precision(support.device):
            dtype = working_dtype(support.device)
            sample_weight = None if sample_weight is None else sample_weight.to(dtype)
            targets = is_own.to(dtype)
            if not (self.validate or multilabel):
                targets = targets / is_own.any(-1, keepdim=True)  # NaN for a label out of range
            weight = self._weigh(targets, mask, sample_weight, is_multilabel=multilabel)
            examples = self._support_set(support, targets, mask, weight, prior)
            if multilabel:
                examples = replace(examples, is_multilabel=True)
        return Checked(examples, ways_per_task, sample_weight, output_dtype(support.dtype))

    def leave_one_out(
        self,
        support: Float[Tensor, "*batch n d"] | ArrayLike,
        labels: Integer[Tensor, "*#batch n"] | Bool[Tensor, "*batch n k"] | ArrayLike,
        **options: Any,
    ) -> Float[Tensor, "*batch n k"]:
        """Predict each support example by the head fitted on all others of its task.

        Use it for an honest estimate of accuracy or calibration where there are too few examples to hold some out.
        Ridge regression and prototypes have a closed form; other heads are fitted without each example, in batches.
        Examples that are not support vectors of an SVM need no fit.

        Args:
            support: features, `(*batch, n, d)`.
            labels: see `forward`.
            options: further arguments of `fit`, which are `ways`, `mask`, `sample_weight` and `prior`.

        Returns:
            Logits, `(*batch, n, k)`, as `forward` returns them, without gradients; zero at masked examples, and minus
            infinity for a class whose only example is left out, in heads that need one.

        Example:
            `accuracy = (head.leave_one_out(support, labels).argmax(-1) == labels).float().mean()`
        """
        found = self._check(support, labels, **options)
        if found.ways is not None:
            raise InputError("ways", "a number or None", "a number per task")
        return self._leave_one_out(found).to(found.dtype)

    @torch.no_grad()
    def _leave_one_out(self, found: Checked) -> Float[Tensor, "*batch n k"]:
        """The logits of each example without it."""
        support = found.examples
        with full_precision(support.features.device):
            logits = leave_one_out(self, Examples.of(support, found.sample_weight))
        return logits.reshape(support.targets.shape)

    def entries_per_task(self, n: int, d: int, k: int) -> int:
        """The number of entries of the tensors of one task while it is solved, which `tune` needs to bound its memory.

        Args:
            n: number of examples.
            d: number of features.
            k: number of classes.
        """
        return n * (n + d) * k

    @property
    def has_leave_one_out(self) -> bool:
        """Whether the head has a closed form of the scores without one example."""
        return False

    def leave_one_out_scores(self, support: SupportSet) -> Float[Tensor, "tasks 1 points n k"]:
        """The scores of each example of a `support` set without it, in heads with `has_leave_one_out`, unscaled."""
        raise NotImplementedError(f"{type(self).__name__} has no closed form for leaving one example out")

    def needed_examples(self, expansion: KernelExpansion) -> Bool[Tensor, "*batch n"]:
        """Which examples change a solution, given as its `expansion`, if they are left out; by default, all."""
        return torch.ones_like(expansion.coef[..., 0], dtype=torch.bool)

    def _weigh(
        self, targets: Tensor, mask: Tensor | None, sample_weight: Tensor | None, *, is_multilabel: bool
    ) -> Tensor | None:
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
            group = replace(group, init=_init_of_group(support.init, rows, k))
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
        if (solution := expansion.certificate) is None:  # another group has none
            raise cause
        raise SolverError(f"{type(self).__name__}: {solution.describe_failures()}", solution) from cause


def _init_of_group(init: Solution | None, rows: Bool[Tensor, "*batch"], k: int) -> Solution | None:
    """The part of `init` for some of the tasks, which have k classes."""
    if init is None:
        return None
    per_class = "coef", "bound_multipliers"
    return init.map(lambda name, value: value[rows][..., :k] if name in per_class else value[rows])


def check_head(head: object) -> ClassificationHead:
    """Return the `head`, or raise `InputError`."""
    if not isinstance(head, ClassificationHead):
        raise InputError("head", "a classification head of convexheads, such as SVMHead(C=0.1)", repr(head))
    return head
