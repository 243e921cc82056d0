"""Heads fitted on support sets, to be called on queries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn
from torch.nn import functional

from convexheads._compiler import traced_if
from convexheads._functorch import inspect_values
from convexheads._looks import call_explained, look_once
from convexheads._validation import ArrayLike, as_integer, check_range, check_tensor, describe, is_integer_tensor
from convexheads.errors import ConvexHeadsError, InputError
from convexheads.heads._linear_algebra import per_matrix
from convexheads.heads._sharing import multiply, scale_once, shared_from
from convexheads.heads.base.copies import is_foreign, map_parts
from convexheads.heads.base.inputs import check_query, check_rows, check_used_rows
from convexheads.heads.base.support_set import KernelExpansion, SupportSet, is_readable
from convexheads.heads.base.temperature import best_factor, conformal_threshold, nonconformity
from convexheads.kernels import compute_gram, gram_diagonal
from convexheads.kernels.linear import affine_form, is_zero
from convexheads.precision import full_precision
from convexheads.solvers import Solution

_F = TypeVar("_F", bound="Fitted")
_Form = tuple[Any, Any]
"""The a and c of a kernel that is a <x, y> + c, as `affine_form` returns them."""
# The largest number of entries of queries to gather at once on a CPU, so that they fit into its cache.
_ENTRIES_IN_CACHE = 2**19
# The kernel forms the weights of a task with up to this number of multiplications. For more, PyTorch is faster.
_OPERATIONS_IN_KERNEL = 2**18


@dataclass(frozen=True, eq=False, repr=False)
class Fitted:
    """A head fitted on the support sets of a batch of tasks, to be called on queries.

    Attributes:
        expansion: coefficients, bias and other terms, in float64.
        support: the support sets, with the head's kernel as `condition_on` returned it.
        dtype: dtype of the returned scores: that of the features, but at least float32.
    """

    expansion: KernelExpansion
    support: SupportSet
    dtype: torch.dtype

    @property
    def solution(self) -> Solution | None:
        """Status, certified gap and multipliers of each task; None for `CvxpyHead` and for heads of your own."""
        return self.expansion.certificate

    @traced_if(lambda fitted, **_: not fitted.support.validate, "a head with validate=False")
    @look_once
    def __call__(self, query: Float[Tensor, "*#batch q d"] | ArrayLike) -> Float[Tensor, "..."]:
        """Score queries, or predict their values.

        Args:
            query: features, `(*batch, q, d)`, or `(q, d)` for all tasks, of any floating-point dtype, on the device of
                the support, with its leading dimensions and feature size; a tensor, a NumPy array or nested lists.

        Returns:
            Scores of all outputs, `(*batch, q, k)`, in the dtype of the support, but at least in float32. Of a
                classifier, these are logits, which are minus infinity for classes that a task lacks. Of a regressor,
                these are values in units of the targets, `(*batch, q)` if the targets had no dimension of outputs.

        Raises:
            InputError: the shape, dtype or device is not as described, or, with `validate`, a feature is not finite.
        """
        query = self._prepare(query)
        with full_precision(query.device):
            return self._finish(self._scores(query))

    @traced_if(lambda fitted, **_: not fitted.support.validate, "a head with validate=False")
    @look_once
    def score_rows(
        self, features: Float[Tensor, "examples d"] | ArrayLike, rows: Integer[Tensor, "*#batch q"] | ArrayLike
    ) -> Float[Tensor, "..."]:
        """Score rows of a table of features, as `fitted(features[rows])` does, but faster on a CPU.

        Use it for cached features, where the queries of each task are some rows of one table. Compiled code (the extra
        `numba`) reads the rows where they are, if the head's kernel is linear and no gradient is needed. Gathering and
        converting the rows can take longer than the fit.

        Args:
            features: the table, `(examples, d)`; otherwise as in a call. An array that is read-only, such as a file
                that is mapped into memory, is copied in each call; `torch.from_numpy` converts it once.
            rows: the numbers of the rows, integers from 0 to examples - 1, `(*batch, q)`, or `(q,)` for all tasks.

        Returns:
            Scores, `(*batch, q, k)`, as a call returns them.

        Raises:
            InputError: as in a call, or `rows` is not as described. On a GPU, with `validate=False`, or in a graph,
                the result for a number out of range is undefined.

        Example:
            `logits = head.fit(features[rows[:, :25]], labels).score_rows(features, rows[:, 25:])`
        """
        features, rows = check_rows(features, rows, self.support.features, validate=self.support.validate)
        if torch.compiler.is_compiling() or rows.ndim < self.support.features.ndim - 1:  # the same rows for all tasks
            return self._score_gathered(features, rows)
        with full_precision(features.device):
            scores = self._scores_by_kernel(features, rows)
            if scores is not None:
                return self._finish(scores)
        return self._score_in_parts(features, rows)

    def _scores_by_kernel(
        self, features: Float[Tensor, "examples d"], rows: Integer[Tensor, "*batch q"]
    ) -> Float[Tensor, "*batch q k"] | None:
        """The scores of rows by the compiled kernel, in working precision; None where it cannot be used."""
        if not is_readable(features) or (terms := self._terms()) is None:
            return None
        if torch.is_grad_enabled() and any(value.requires_grad for value in (features, *terms)):
            return None
        from convexheads.heads.base import _rows_numba

        batch, q = rows.shape[:-1], rows.shape[-1]
        flat = (value.double().reshape(batch.numel(), *value.shape[len(batch) :]) for value in terms)
        scores = _rows_numba.score(features.detach(), rows.reshape(batch.numel(), q), *flat)
        if not scores.sum().isfinite():  # a row is not finite, or a fit has failed; another way tells which
            return None
        return scores.reshape(*batch, q, scores.shape[-1]).to(self.expansion.coef)

    def _terms(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """The coefficients a, basis z, bias b and factor s of scores `x @ z.mT @ a + b + s |x|^2`; None for others.

        The shapes are `(*batch, m, k)`, `(*batch, m, d)`, `(*batch, k)` and `(*batch,)`. If m is 0 for the
        coefficients, the basis are the weights, `(*batch, k, d)`.
        """
        *batch, n, k = self.expansion.coef.shape
        form = self._affine
        if form is None or self.expansion.quadratic is not None or k > n:  # then, weights cost more than kernel values
            return None
        zeros, factor = self.expansion.coef.new_zeros(batch), self.expansion.self_similarity_weight
        bias, features, dims = self._biases(form), self.support.features, len(batch)
        has_weights = self.expansion.weight is not None or self.support.prior is not None
        is_large = features.shape[-1] * n * k > _OPERATIONS_IN_KERNEL
        if has_weights or shared_from(features, dims) < dims or is_large:
            coef, basis = zeros.new_empty(*batch, 0, k), self._weights(form)
        else:
            coef, basis = self._scaled_coef(form), features
        shift = (zeros + factor * form[1]).unsqueeze(-1)
        return coef, basis, shift.expand(*batch, k) if bias is None else shift + bias, zeros + factor * form[0]

    def _score_in_parts(
        self, features: Float[Tensor, "examples d"], rows: Integer[Tensor, "*batch q"]
    ) -> Float[Tensor, "..."]:
        """The scores of rows that are gathered, on a CPU for as many tasks at once as fit into its cache."""
        at_once = max(1, _ENTRIES_IN_CACHE // max(1, rows.shape[-1] * features.shape[-1]))
        is_large = rows.ndim == 2 and rows.is_cpu and len(rows) > at_once
        if not is_large or torch.is_grad_enabled() or is_foreign(self.support.kernel):
            return self._score_gathered(features, rows)
        parts = (slice(start, start + at_once) for start in range(0, len(rows), at_once))
        return torch.cat([self[part]._score_gathered(features, rows[part]) for part in parts])

    def _score_gathered(
        self, features: Float[Tensor, "examples d"], rows: Integer[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """The scores of rows by a call on a copy of them; an error of a row that is not finite names the row."""
        # On a GPU, the flag of wrong numbers may not have been read yet, and one of them would stop the whole process.
        numbers = rows if features.is_cpu else rows.clamp(0, max(0, len(features) - 1))
        query = functional.embedding(numbers, features)
        return call_explained(partial(self, query), InputError, partial(inspect_values, check_used_rows, query, rows))

    def _scores(self, query: Float[Tensor, "*#batch q d"]) -> Float[Tensor, "*batch q k"]:
        """The scores of a prepared `query`, in working precision."""
        expansion, form = self.expansion, self._cheap_form(query.shape[-2])
        if expansion.weight is not None or form is not None:
            scores, bias = multiply(query, self._weights(form).mT), self._biases(form)
            if expansion.quadratic is not None:
                scores = scores + _forms(query, expansion.quadratic)
        else:
            cross_gram, bias = self._cross_gram(query), expansion.bias
            scores = multiply(cross_gram, expansion.coef)
            if expansion.quadratic is not None:
                scores = scores + _forms(cross_gram, expansion.quadratic)
            if self.support.prior is not None:
                scores = scores + multiply(query, self.support.prior.mT)
        if bias is not None:
            scores = scores + bias.unsqueeze(-2)
        weight = expansion.self_similarity_weight
        if not isinstance(weight, float) or weight != 0:
            scores = scores + weight * gram_diagonal(self.support.kernel, query).unsqueeze(-1)
        return scores

    @property
    def _affine(self) -> _Form | None:
        """The affine form of the kernel; None if it has none."""
        return affine_form(self.support.kernel, self.support.features.shape[-1])

    def _cheap_form(self, q: int) -> _Form | None:
        """The affine form of the kernel if scores of q queries are cheaper by weights than by kernel values."""
        n, k = self.expansion.coef.shape[-2:]
        # A graph holds for any number of queries.
        is_cheap = 2 * k <= n if torch.compiler.is_compiling() else k * (n + q) < n * q
        return self._affine if is_cheap and self.expansion.quadratic is None else None

    def _weights(self, form: _Form | None) -> Float[Tensor, "*batch k d"]:
        """The weights, including the prior: those of the expansion or, for a kernel with this form, of `coef`."""
        weight, prior = self.expansion.weight, self.support.prior
        if weight is None:
            assert form is not None
            weight = multiply(self.support.features.mT, self._scaled_coef(form)).mT
        return weight if prior is None else weight + prior

    def _scaled_coef(self, form: _Form) -> Float[Tensor, "*batch n k"]:
        """What the features are multiplied by to get weights."""
        coef = self._used_coef
        return scale_once(coef, _per_task(form[0], coef))

    def _biases(self, form: _Form | None) -> Float[Tensor, "*batch k"] | None:
        """The biases of scores by `_weights`; None for zero."""
        bias, coef = self.expansion.bias, self._used_coef
        if form is None or self.expansion.weight is not None or is_zero(form[1]):
            return bias
        constant = (_per_task(form[1], coef) * coef).sum(-2)
        return constant if bias is None else constant + bias

    @property
    def _used_coef(self) -> Float[Tensor, "*batch n k"]:
        coef, mask = self.expansion.coef, self.support.mask
        return coef if mask is None else coef.masked_fill(~mask.unsqueeze(-1), 0)

    def _prepare(self, query: Float[Tensor, "*#batch q d"] | ArrayLike) -> Float[Tensor, "..."]:
        """The `query` in working precision, after all checks."""
        query = check_query(query, self.support.features, validate=self.support.validate)
        return query.to(self.support.features.dtype)

    def _finish(self, scores: Float[Tensor, "*batch q k"]) -> Float[Tensor, "..."]:
        """Scores as users receive them: by `_to_output`, and in the shape and with the classes of each task."""
        return self._to_output(scores)

    def _to_output(self, scores: Tensor) -> Tensor:
        """Scores, or their weights or bias, in the units and the dtype in which users receive them."""
        return scores.to(self.dtype, memory_format=torch.contiguous_format)

    def _cross_gram(self, query: Float[Tensor, "*batch q d"]) -> Float[Tensor, "*batch q n"]:
        """The kernel between a prepared `query` and the support; zero at masked examples."""
        features, mask = self.support.features, self.support.mask
        gram = compute_gram(self.support.kernel, query, features, validate=self.support.validate)
        return gram if mask is None else gram.masked_fill(~mask.unsqueeze(-2), 0)

    @property
    def weight(self) -> Float[Tensor, "*batch k d"]:
        """The weights `(*batch, k, d)` such that scores are `query @ weight.mT + bias`; differentiable.

        Raises:
            ConvexHeadsError: the scores are not linear in the features, or not known to be, for a kernel of your own.
        """
        return self._to_output(self._weights(self._linear_form()))

    @property
    def bias(self) -> Float[Tensor, "*batch k"]:
        """The bias `(*batch, k)` of scores that are `query @ weight.mT + bias`; see `weight`, also for errors."""
        bias = self._biases(self._linear_form())
        return self._to_output(torch.zeros_like(self.expansion.coef[..., 0, :]) if bias is None else bias)

    def to_linear(self) -> nn.Linear:
        """A new `nn.Linear` with the same scores, for a fit of one task.

        Use it to deploy a fitted head, or to fine-tune it by gradient descent.

        Raises:
            ConvexHeadsError: the scores are not linear in the features, or there is a batch of tasks (choose one:
                `fitted[0].to_linear()`).
        """
        if self.support.features.ndim != 2:
            shape = tuple(self.support.features.shape[:-2])
            raise ConvexHeadsError(
                f"to_linear: expected the fit of one task, such as fitted[0], got tasks of shape {shape}"
            )
        weight, bias = self.weight.detach(), self.bias.detach()
        linear = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
        linear.load_state_dict({"weight": weight, "bias": bias})
        return linear

    def to_module(self) -> nn.Module:
        """A new module that maps queries to the scores, without gradients to the support set, and without checks.

        Use it to export a fitted head to `torch.export` or ONNX. If the scores are linear in the features, `to_linear`
        is smaller and faster.

        Example:
            `torch.export.export(fitted.to_module(), (query,))`
        """
        # In files of exported programs, tensors must not share memory.
        fitted = self.detach()._map(
            lambda part: part.clone(memory_format=torch.contiguous_format) if isinstance(part, Tensor) else part,
        )
        return _Scores(replace(fitted, support=replace(fitted.support, validate=False))).eval()

    def _linear_form(self) -> _Form:
        """The affine form of the kernel, of scores that are linear in the features."""
        weight = self.expansion.self_similarity_weight
        if self.expansion.quadratic is not None or isinstance(weight, Tensor) or weight != 0:
            raise _not_linear("scores that are quadratic in the features")
        if (form := self._affine) is None:
            raise _not_linear("another kernel")
        return form

    def __getitem__(self: _F, tasks: Any) -> _F:
        """The fit of some of the tasks, with gradients: `fitted[3]`, `fitted[:10]` or `fitted[solved]`.

        Use it to look at one task of a batch, or to deploy it, as by `fitted[3].to_linear()`.

        Args:
            tasks: an integer, a slice, or a tensor of integers or of bool; with several leading dimensions, also a
                tuple of them, as for a tensor `(*batch,)`.

        Raises:
            InputError: `tasks` is unusable, or it is the fit of a single task.
            IndexError: an integer is too large, which ends a loop over the tasks.

        Example:
            `head.fit(support, labels)[0](query[0])`
        """
        if not (batch := self.support.features.shape[:-2]):
            raise InputError("tasks", "the fit of a batch of tasks", "the fit of one task")

        def choose(part: Any, shape: tuple[int, ...] = batch) -> Any:
            return part[tasks] if isinstance(part, Tensor) and part.shape[: len(shape)] == shape else part

        expected = f"an index of a tensor {tuple(batch)}: integers, slices, or tensors of integers or of bool"
        if any(part is None or isinstance(part, bool) for part in (tasks if isinstance(tasks, tuple) else [tasks])):
            raise InputError("tasks", expected, describe(tasks))
        try:
            return self._map(choose, partial(choose, shape=(*batch, 1, 1)))
        except (IndexError, TypeError, ValueError) as error:
            if isinstance(error, IndexError) and as_integer(tasks) is not None:
                raise
            got = f"shape {tuple(tasks.shape)}" if isinstance(tasks, Tensor) else describe(tasks)
            raise InputError("tasks", expected, got) from error

    def to(self: _F, device: torch.device | str) -> _F:
        """The same fit on another `device`."""
        return self._map(lambda part: part.to(device))

    def detach(self: _F) -> _F:
        """The same fit without gradients to the support set and the hyperparameters."""
        return self._map(lambda part: part.detach() if isinstance(part, Tensor) else part.requires_grad_(False))

    def _map(self: _F, *changes: Callable[[Any], Any]) -> _F:
        """A copy with all of its tensors changed, as by `map_parts`."""
        return map_parts(replace(self, expansion=self.expansion.certified()), *changes)

    def __repr__(self) -> str:
        *batch, n, d = self.support.features.shape
        outputs = self.expansion.coef.shape[-1]
        return f"{type(self).__name__}(tasks={tuple(batch)}, examples={n}, features={d}, outputs={outputs})"


@dataclass(frozen=True, eq=False, repr=False)
class FittedClassifier(Fitted):
    """A classification head fitted on the support sets of a batch of tasks, as `ClassificationHead.fit` returns it.

    Attributes:
        scale: the factor of the scores: the head's scale at the time of the fit, a scalar, `()`, or one per task,
            `(*batch,)`, after calibration.
        ways: the number of classes of each task, `(*batch,)`. Defaults to None (all have k).
        held_out: one minus the probability of the right label of each held-out example, `(*batch, m)`, and infinity at
            masked ones. `calibrated` sets it. Defaults to None.

    Example:
        `logits = SVMHead().fit(support, labels)(query)`
    """

    scale: Float[Tensor, "*#batch"]
    ways: Integer[Tensor, "*batch"] | None = None
    held_out: Float[Tensor, "*batch m"] | None = None

    def probabilities(self, query: Float[Tensor, "*#batch q d"] | ArrayLike) -> Float[Tensor, "..."]:
        """The softmax of the logits of `query`, `(*batch, q, k)`; see `calibrate`. The errors are those of a call.

        If an example may have any number of labels, it is the sigmoid of each logit.
        """
        logits = self(query)
        return logits.sigmoid() if self.support.is_multilabel else logits.softmax(-1)

    def calibrate(
        self, features: Float[Tensor, "*batch m d"] | ArrayLike, labels: Integer[Tensor, "..."] | ArrayLike
    ) -> FittedClassifier:
        """Calibrate the probabilities of each task on held-out examples, and prepare `prediction_sets`.

        Use it if you can spare examples; `fit(..., calibrate="loo")` needs none. The errors are those of a call.

        Args:
            features: held-out features, `(*batch, m, d)`.
            labels: their labels, `(*batch, m)`, 0..k-1.

        Returns:
            The same fit with another scale per task.

        Example:
            `probabilities = head.fit(support, labels).calibrate(held_out, held_out_labels).probabilities(query)`
        """
        logits = self(features)
        labels = check_tensor("labels", labels, "a tensor of integers 0..k-1", is_integer_tensor, like=logits).long()
        if labels.shape != logits.shape[:-1]:
            raise InputError("labels", f"one label per example, {tuple(logits.shape[:-1])}", tuple(labels.shape))
        if self.support.validate:
            inspect_values(check_range, "labels", labels, logits.shape[-1], logits.shape[-1] - 1)
        targets = (labels.unsqueeze(-1) == torch.arange(logits.shape[-1], device=labels.device)).double()
        return self.calibrated(logits.detach().double(), targets.to(logits.device), torch.ones_like(labels) > 0)

    def calibrated(
        self, logits: Float[Tensor, "*batch m k"], targets: Float[Tensor, "*batch m k"], used: Bool[Tensor, "*batch m"]
    ) -> FittedClassifier:
        """The same fit, calibrated by `logits` of held-out examples with their one-hot `targets`, where `used` is True.

        If an example may have any number of labels, each label counts as an example, and there are no prediction sets.
        """
        if self.support.is_multilabel:
            # The logit of a label is the difference between those of "yes" and "no".
            pairs = torch.stack([torch.zeros_like(logits), logits], -1).flatten(-3, -2)
            truth = torch.stack([1 - targets, targets], -1).flatten(-3, -2)
            factor = best_factor(pairs, truth, used.repeat_interleave(logits.shape[-1], -1))
            return replace(self, scale=self.scale * factor)
        factor = best_factor(logits, targets, used)
        probabilities = (factor[..., None, None] * logits).softmax(-1)
        held_out = nonconformity(probabilities, targets).nan_to_num(nan=1.0).masked_fill(~used, torch.inf)
        return replace(self, scale=self.scale * factor, held_out=held_out)

    def prediction_sets(
        self, query: Float[Tensor, "*#batch q d"] | ArrayLike, coverage: float = 0.9
    ) -> Bool[Tensor, "..."]:
        """Sets of classes that contain the right one with a given probability (conformal prediction).

        Use it where "one of these two" is a better answer than a guess. A set contains the classes whose probability is
        at least that of the labels of most held-out examples, and always the most probable one.

        If the fit was calibrated by `calibrate` on examples of the same distribution as the queries, sets contain the
        right class with at least this probability, on average over draws of these examples (split conformal
        prediction, Vovk et al. 2005; scores of Sadinle et al. 2019). After `fit(..., calibrate="loo")` (cross-conformal
        prediction), this holds approximately, and at least with the probability `2 * coverage - 1` where the scores of
        a query hardly depend on one example (Barber et al. 2021).

        Args:
            query: features, `(*batch, q, d)`.
            coverage: the probability, above 0 and below 1. With m held-out examples, sets contain all classes if it
                is above m / (m + 1).

        Returns:
            Which classes are in the set of each query, `(*batch, q, k)`.

        Raises:
            ConvexHeadsError: the fit was not calibrated, or examples may have several labels.

        Example:
            `sets = head.fit(support, labels, calibrate="loo").prediction_sets(query, coverage=0.9)`
        """
        return self.sets_of(self(query), coverage)

    def sets_of(self, logits: Float[Tensor, "*batch q k"], coverage: float = 0.9) -> Bool[Tensor, "*batch q k"]:
        """The `prediction_sets` of queries with these `logits`; the argument `coverage` and the errors are the same."""
        if self.held_out is None:
            remedy = "fit(..., calibrate='loo') or calibrate(features, labels)"
            raise ConvexHeadsError(
                f"prediction_sets: expected a calibrated fit with one label per example, by {remedy}"
            )
        threshold = conformal_threshold(self.held_out, self.held_out.isfinite(), coverage)
        probabilities = logits.double().softmax(-1)
        is_best = probabilities == probabilities.amax(-1, keepdim=True)
        return (1 - probabilities <= threshold[..., None, None]) | is_best

    @property
    def bias(self) -> Float[Tensor, "*batch k"]:
        bias = super().bias
        return bias if self.ways is None else bias.masked_fill(self._absent, -torch.inf)

    def _finish(self, scores: Float[Tensor, "*batch q k"]) -> Float[Tensor, "*batch q k"]:
        logits = self._to_output(scores)
        return logits if self.ways is None else logits.masked_fill(self._absent.unsqueeze(-2), -torch.inf)

    def _to_output(self, scores: Tensor) -> Tensor:
        scale = self.scale  # of scores and weights, `(*batch, m, n)`, or of biases, `(*batch, k)`
        if scale.ndim:
            scale = scale.reshape(*scale.shape, *[1] * (scores.ndim - scale.ndim))
        return super()._to_output(scale * scores)

    @property
    def _absent(self) -> Tensor:
        assert self.ways is not None
        return torch.arange(self.expansion.coef.shape[-1], device=self.ways.device) >= self.ways.unsqueeze(-1)


@dataclass(frozen=True, eq=False, repr=False)
class FittedRegressor(Fitted):
    """A regression head fitted on the support sets of a batch of tasks, as `RegressionHead.fit` returns it.

    Attributes:
        single_output: whether the targets, and therefore the predictions, lack an output dimension. Defaults to False.

    Example:
        `values = RidgeRegressionHead().fit(support, targets)(query)`
    """

    single_output: bool = False

    def _finish(self, scores: Float[Tensor, "*batch q k"]) -> Float[Tensor, "..."]:
        values = self._to_output(scores)
        return values.squeeze(-1) if self.single_output else values


class _Scores(nn.Module):
    """A fitted head as a module."""

    def __init__(self, fitted: Fitted) -> None:
        super().__init__()
        self.fitted = fitted

    def forward(self, query: Float[Tensor, "*batch q d"]) -> Float[Tensor, "..."]:
        return self.fitted(query)

    def _apply(self, fn, recurse=True):  # `to`, `double` and similar methods call this
        def change(part: Any) -> Any:
            return fn(part) if isinstance(part, Tensor) else part._apply(fn, recurse)

        self.fitted = map_parts(self.fitted, change)
        return super()._apply(fn, recurse)


def _forms(rows: Float[Tensor, "*batch q m"], matrices: Float[Tensor, "*batch k m m"]) -> Float[Tensor, "*batch q k"]:
    """The product of each matrix with each row from both sides."""
    rows = rows.unsqueeze(-3)
    return ((rows @ matrices) * rows).sum(-1).mT


def _per_task(value: float | Tensor, like: Tensor) -> float | Tensor:
    """A number, or a tensor of one for each task, to be multiplied by matrices `(*batch, n, k)`."""
    return per_matrix(value.to(like)) if isinstance(value, Tensor) else value


def _not_linear(got: str) -> ConvexHeadsError:
    remedy = "to_module() works for any fit"
    return ConvexHeadsError(f"weight, bias: expected scores that are linear in the features, got {got}; {remedy}")
