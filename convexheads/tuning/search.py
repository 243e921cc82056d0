"""The search for the best point of each task, and a head that does it before each fit."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from convexheads import _validation
from convexheads._sampling import track
from convexheads._validation import ArrayLike, Check
from convexheads.errors import InputError, SolverWarning
from convexheads.heads import ClassificationHead, FittedClassifier, KernelExpansion, SupportSet
from convexheads.heads.base.classification import check_head
from convexheads.heads.base.held_out import has_closed_form
from convexheads.hyperparameters import PerTask
from convexheads.precision import full_precision
from convexheads.tuning._folds import Task, prepare, split_examples
from convexheads.tuning._grid import Group, check_grid, group_points
from convexheads.tuning._scores import Scores, divide, score_part
from convexheads.tuning.result import Scoring, Tuned

Folds = int | Literal["loo"] | tuple[Any, Any]
"""The type of `cv`: a number of folds, "loo", or features and labels of a validation set."""


def tune(
    head: ClassificationHead,
    grid: Mapping[str, Any],
    support: Float[Tensor, "*batch n d"] | ArrayLike,
    labels: Integer[Tensor, "*#batch n"] | ArrayLike,
    *,
    cv: Folds = 5,
    scoring: Scoring = "accuracy",
    ways: int | None = None,
    mask: Bool[Tensor, "*#batch n"] | ArrayLike | None = None,
    sample_weight: Float[Tensor, "*#batch n"] | ArrayLike | None = None,
    prior: Float[Tensor, "*#batch k d"] | ArrayLike | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Tuned:
    """Choose hyperparameters of a head for each task, and fit it with them.

    Use it when a head should be tuned on its own support set, as a linear probe is on frozen features: instead of a
    loop over tasks, values and folds, everything is solved at once, on the device of the features, without gradients.

    Positive numbers such as C are one batch for SVMs, ridge and logistic regression, in which each value begins at the
    solutions of its neighbors. Fits without one example begin at the fit on all examples. Other settings and heads are
    solved value by value. Memory is bounded, because large batches are solved in parts. The final fit has gradients as
    usual.

    Args:
        head: a classification head.
        grid: the values of each setting, by name, as in `head.get_params()`: `{"C": [0.1, 1.0], "kernel": [...]}` or
            `{"kernel__length_scale": [0.5, 1.0]}`. All combinations are tried. Each task chooses positive numbers of
            the head itself, such as C; other settings are chosen once for all tasks, by the mean score.
        support: features, `(*batch, n, d)`; the leading dimensions are tasks, any number of them.
        labels: `(*batch, n)`, or `(n,)` if all tasks have the same; integers 0..k-1.
        cv: number of stratified folds, "loo" to leave out one example after the other, or a validation set: a pair of
            features `(*batch, q, d)` and labels `(*batch, q)`, or `(q, d)` and `(q,)` for all tasks. Defaults to 5.
        scoring: the score that decides: "accuracy" (default) or "log_loss". Of equal scores, the first one wins.
        ways: number of classes k. Defaults to None, the largest label plus one.
        mask: `(*batch, n)`, or `(n,)` for all tasks; False at examples to ignore. Defaults to None (no mask).
        sample_weight: see `ClassificationHead.forward`; held-out examples count the same. Defaults to None (all one).
        prior: see `ClassificationHead.forward`. Defaults to None.
        seed: random seed of the folds.
        progress: whether to show a progress bar, which needs tqdm.

    Returns:
        The scores of all points, the choice of each task, and the fitted head.

    Raises:
        InputError: an argument is unusable: for example, a class has fewer examples than there are folds.
        SolverError: the final fit failed, and the head's `on_failure` is "raise". Failures on the grid give a
            `SolverWarning`.

    Example:
        `tune(LogisticHead(), {"regularization": 10.0 ** torch.linspace(-5, 6, 45)}, support, labels).fitted(query)`
    """
    check_head(head)
    _validation.check_bool("progress", progress)
    _validation.check_choice("scoring", scoring, choices=get_args(Scoring))
    values = check_grid(head, grid)
    points = [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]
    task = prepare(head, support, labels, ways, mask=mask, sample_weight=sample_weight, prior=prior)
    groups = group_points(head, points)
    variants = (copy.deepcopy(head).set_params(**group.settings) for group in groups)
    is_closed = all(has_closed_form(variant, task.examples) for variant in variants)
    split = split_examples(cv, task, _validation.check_seed(seed), is_closed=is_closed)
    parts = [part for group in groups for part in divide(head, task, split, group)]
    scores = Scores.empty(len(task.labels), split.train.shape[1], len(points), task.examples.features.device)
    for part in track(parts, f"tuning {type(head).__name__}, {len(points)} points", progress):
        with torch.no_grad(), full_precision(task.examples.features.device):
            scores.put(part, *score_part(head, task, split, part))
    accuracy, log_loss = scores.accuracy.mean(1), scores.log_loss.mean(1)
    gap, converged = scores.gap.amax(1), scores.converged.all(1)
    best = _choose(accuracy if scoring == "accuracy" else -log_loss, converged, groups)
    if not converged.all():
        message = f"tune: {int((~converged).sum())} of {converged.numel()} points are not certified"
        warnings.warn(message, SolverWarning, stacklevel=2)
    is_iterative = bool(torch.isfinite(gap).any())
    batch = task.batch
    return Tuned(
        points,
        accuracy.reshape(*batch, -1),
        log_loss.reshape(*batch, -1),
        gap.reshape(*batch, -1) if is_iterative else None,
        converged.reshape(*batch, -1) if is_iterative else None,
        best.reshape(batch),
        _fit(head, task, points, best, groups),
        None if split.folds is None else split.folds.reshape(*batch, -1),
        scoring,
    )


class TunedHead(ClassificationHead):
    """A head that is tuned on the support set of each task before it is fitted.

    Use it wherever a head is expected, such as in `evaluate`, to tune in each episode.

    A fit has gradients for the chosen values. The choice itself has none.

    Args:
        head: the classification head to tune.
        grid: see `tune`, also for `cv` and `scoring`.

    Raises:
        InputError: an argument is unusable; calls raise the errors of `tune`.

    Example:
        `evaluate(TunedHead(RidgeHead(), {"regularization": [0.1, 1.0, 10.0]}), features, labels, shots=5)`
    """

    checks: ClassVar[dict[str, Check]] = {"head": lambda _, head: check_head(head)}

    def __init__(
        self,
        head: ClassificationHead,
        grid: Mapping[str, Any],
        *,
        cv: int | Literal["loo"] = 5,
        scoring: Scoring = "accuracy",
    ) -> None:
        super().__init__()
        self.head, self.grid, self.cv, self.scoring = head, dict(grid), cv, scoring
        check_grid(head, grid)

    def fit(self, support: Any, labels: Any, **options: Any) -> FittedClassifier:
        """Tune and fit on a batch of tasks; `support`, `labels`, the `options` and the errors are those of `tune`."""
        for name, default in (("allow_missing_classes", False), ("calibrate", None)):
            if (value := options.pop(name, default)) != default:
                raise InputError(name, f"{default} for TunedHead", repr(value))
        settings = {"cv": self.cv, "scoring": self.scoring, "progress": False}
        return tune(self.head, self.grid, support, labels, **settings, **options).fitted

    def solve(self, support: SupportSet) -> KernelExpansion:
        return self.head.solve(support)


def _choose(score: Tensor, converged: Tensor, groups: list[Group]) -> Integer[Tensor, " tasks"]:
    """The best certified point of each task, in the family of points that is best for all tasks together."""
    score = score.nan_to_num(nan=-torch.inf, neginf=-torch.finfo(score.dtype).max)
    score = score.where(converged | ~converged.any(-1, keepdim=True), -torch.inf)
    families: dict[int, list[int]] = {}
    for group in groups:
        families.setdefault(group.family, []).extend(group.indices)
    totals = {family: score[:, indices].amax(-1).mean().item() for family, indices in families.items()}
    best = max(totals, key=lambda family: totals[family])  # the first one of equals
    indices = torch.tensor(sorted(families[best]), device=score.device)
    chosen = score[:, indices]
    places = torch.arange(len(indices), device=score.device).expand(chosen.shape)
    return indices[places.where(chosen == chosen.amax(-1, keepdim=True), len(indices) - 1).amin(-1)]


def _fit(
    head: ClassificationHead, task: Task, points: list[dict[str, Any]], best: Tensor, groups: list[Group]
) -> FittedClassifier:
    """The head fitted with the chosen values."""
    chosen, batch = best.tolist(), task.batch
    used = [group for group in groups if not set(group.indices).isdisjoint(chosen)] or groups[:1]
    fits = []
    for group in used:
        configured = copy.deepcopy(head).set_params(**group.settings)
        # Tasks that have chosen another group are fitted with the first value, and are not used.
        own = [points[index if index in group.indices else group.indices[0]] for index in chosen]
        for name in group.batched:
            values = torch.tensor([point[name] for point in own], dtype=torch.float64).reshape(batch)
            configured.set_params(**{name: PerTask(values) if batch else values.item()})
        fits.append(configured.fit(*task.arguments, **task.options))
    fitted = fits[0]
    for group, other in zip(used[1:], fits[1:], strict=True):
        is_other = torch.tensor([index in group.indices for index in chosen], device=best.device).reshape(batch)
        new = other.expansion.tensors()

        def select(name: str, value: Tensor, new=new, is_other=is_other) -> Tensor:
            is_per_task = value.shape[: len(batch)] == batch and value.ndim > len(batch)
            mask = is_other.reshape(*batch, *[1] * (value.ndim - len(batch))) if is_per_task else is_other
            return torch.where(mask, new[name], value) if value.ndim >= len(batch) else value

        fitted = replace(fitted, expansion=fitted.expansion.map(select))
    return fitted
