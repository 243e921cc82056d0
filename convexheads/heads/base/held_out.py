"""Fits without some of the examples, all solved in one batch: cross-validation and leaving one out.

The heads here are `ClassificationHead`s, whose module imports this one.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from convexheads.heads.base.fitted import FittedClassifier
from convexheads.heads.base.support_set import KernelExpansion, SupportSet
from convexheads.hyperparameters import PerTask, as_tensor
from convexheads.kernels import Product, Sum, condition
from convexheads.solvers import Solution, Solver

MAX_ENTRIES = 2**26
"""The number of entries of the largest tensors of one batch, half a gigabyte in float64."""


class Examples(NamedTuple):
    """The examples of a flat batch of tasks, in working precision and without gradient; zero where they are not used.

    The sample weights are those of the caller, without weights of classes.
    """

    features: Float[Tensor, "tasks n d"]
    targets: Float[Tensor, "tasks n k"]
    used: Bool[Tensor, "tasks n"]
    sample_weight: Float[Tensor, "tasks n"] | None
    prior: Float[Tensor, "tasks k d"] | None
    is_multilabel: bool

    @classmethod
    def of(cls, support: SupportSet, sample_weight: Tensor | None) -> Examples:
        """The examples of a support set, whose own weights may include those of classes."""
        dims = support.targets.ndim - 2
        parts = support.features, support.targets, support.used, sample_weight, support.prior
        flat: Any = (None if part is None else part.detach().reshape(-1, *part.shape[dims:]) for part in parts)
        return cls(*flat, is_multilabel=support.is_multilabel)

    def select(self, tasks: slice) -> Examples:
        """Some of the tasks."""
        parts: Any = (part[tasks] if isinstance(part, Tensor) else part for part in self)
        return Examples(*parts)


def refit(
    head: Any,
    examples: Examples,
    train: Bool[Tensor, "tasks folds n"],
    query: Float[Tensor, "tasks folds m d"],
    init: Solution | None = None,
) -> tuple[Float[Tensor, "tasks folds points m k"], KernelExpansion]:
    """Fit a lenient head on the examples of each fold that are for training, and compute the logits of its queries.

    Hyperparameters that are `PerTask` have dimensions that broadcast with `(tasks, folds, points)`. Logits of classes
    that have no example, in heads that need one, are minus infinity. Solvers begin at `init`.
    """
    train = train.unsqueeze(2)

    def expand(part: Tensor) -> Tensor:
        return part[:, None, None].expand(*train.shape[:3], *part.shape[1:])

    features = expand(examples.features)
    targets = expand(examples.targets) * train.unsqueeze(-1)
    if not head.accepts_weights:  # only heads with weights ignore the features of masked examples
        features = features.masked_fill(~train.unsqueeze(-1), 0)
    weight = None if examples.sample_weight is None else expand(examples.sample_weight)
    weight = head._weigh(targets, train, weight, is_multilabel=examples.is_multilabel)
    if weight is not None:
        weight = weight.masked_fill(~train, 1)
    prior = None if examples.prior is None else expand(examples.prior)
    kernel = condition(head.kernel, features, train)
    support = SupportSet(features, targets, train, kernel, False, weight, prior, examples.is_multilabel, init)
    expansion = head.solve(support)
    fitted = FittedClassifier(expansion, support, features.dtype, as_tensor(head.scale, features))
    logits = fitted._finish(fitted._scores(query.unsqueeze(2)))
    return logits.where(~logits.isnan(), -torch.inf), expansion


def without_left_out(expansion: KernelExpansion, train: Bool[Tensor, "tasks folds n"]) -> Solution | None:
    """Where fits without a few examples begin: at the solution on all examples of one fold, without these examples."""
    solution, (tasks, folds, n) = expansion.certificate, train.shape
    if solution is None or solution.coef.shape[-2] != n:
        return None
    solution = solution.map(lambda _, value: value.expand(tasks, folds, *value.shape[2:]))
    coef = solution.coef * train[:, :, None, :, None]
    return replace(solution, coef=coef, iterations=None)


def has_closed_form(head: Any, examples: Examples) -> bool:
    """Whether the scores without one example have a closed form: not if they change the kernel of the others."""
    if not head.has_leave_one_out:
        return False
    one = examples.select(slice(1))
    conditioned = condition(head.kernel, one.features, one.used)
    return conditioned is head.kernel or not _has_parameters_per_task(conditioned)


def closed_form(head: Any, examples: Examples) -> Float[Tensor, "tasks 1 points n k"]:
    """The logits of each example without it, by a head that has a closed form of them."""
    weight = head._weigh(examples.targets, examples.used, examples.sample_weight, is_multilabel=examples.is_multilabel)
    kernel = condition(head.kernel, examples.features, examples.used)
    parts = examples.features, examples.targets, examples.used, kernel
    support = SupportSet(*parts, False, weight, examples.prior, examples.is_multilabel)
    return as_tensor(head.scale, examples.features) * head.leave_one_out_scores(support)


def _has_parameters_per_task(part: Any) -> bool:
    if isinstance(part, Tensor):
        return part.ndim > 0
    if isinstance(part, partial):
        return any(map(_has_parameters_per_task, (*part.args, *part.keywords.values())))
    if isinstance(part, Sum | Product):
        return any(map(_has_parameters_per_task, part.kernels))
    if isinstance(part, nn.Module):
        return any(_has_parameters_per_task(value) for value in (*part.buffers(), *vars(part).values()))
    return False


def leave_one_out(head: Any, examples: Examples) -> Float[Tensor, "tasks n k"]:
    """The logits of each example by a head that is fitted on the other ones; zero where examples are not used."""
    tasks, n, k = examples.targets.shape
    d = examples.features.shape[-1]
    logits = torch.zeros_like(examples.targets)
    at_once = max(1, MAX_ENTRIES // (head.entries_per_task(n, d, k) + n * (n + d)))
    tasks_at_once = max(1, at_once // n)
    for start in range(0, tasks, tasks_at_once):
        chosen = slice(start, start + tasks_at_once)
        part = examples.select(chosen)
        local = lenient(_select(head, chosen, tasks))
        if has_closed_form(local, part):
            logits[chosen] = closed_form(local, part)[:, 0, 0]
            continue
        everything, others = part.used.unsqueeze(1), torch.arange(n, device=logits.device)
        found, expansion = refit(local, part, everything, part.features.unsqueeze(1))
        logits[chosen] = found[:, 0, 0]
        needed = (local.needed_examples(expansion)[:, 0, 0] & part.used).any(0).nonzero().squeeze(-1)
        for out in needed.split(at_once):
            train = part.used.unsqueeze(1) & (others != out.unsqueeze(-1))
            init = without_left_out(expansion, train)
            found, _ = refit(local, part, train, part.features[:, out].unsqueeze(2), init)
            logits[chosen, out] = found[:, :, 0, 0]
    return logits.masked_fill(~examples.used.unsqueeze(-1), 0)


def lenient(head: Any) -> Any:
    """A copy of a head that returns what it cannot solve, and checks nothing."""
    head = copy.deepcopy(head)
    solver = getattr(head, "solver", None)
    changes: dict[str, Any] = {"validate": False}
    if isinstance(solver, Solver):
        changes["solver"] = solver.with_on_failure("return")
    if hasattr(head, "on_failure"):
        changes["on_failure"] = "return"
    for name, value in changes.items():
        setattr(head, name, value)
    return head


def _select(head: Any, chosen: slice, tasks: int) -> Any:
    """A copy of a head for some of the tasks of a flat batch, whose hyperparameters have dimensions for folds too."""
    head = copy.deepcopy(head)
    for name, value in head.get_params(deep=False).items():
        if isinstance(value, PerTask):
            values = value.values.reshape(-1).expand(tasks) if value.values.numel() == 1 else value.values.reshape(-1)
            setattr(head, name, PerTask(values[chosen, None, None]))
    return head
