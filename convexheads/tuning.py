"""Tuning: all tasks, values of hyperparameters and folds of cross-validation solved in one batch."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from convexheads import _validation
from convexheads._sampling import track
from convexheads._validation import ArrayLike, Check
from convexheads.errors import ConvexHeadsError, InputError, MissingDependencyError, SolverWarning
from convexheads.heads import ClassificationHead, FittedClassifier, KernelExpansion, LossHead, SupportSet
from convexheads.heads.base import held_out
from convexheads.heads.base.classification import check_head
from convexheads.heads.base.held_out import Examples, closed_form, has_closed_form, lenient, refit, without_left_out
from convexheads.hyperparameters import PerTask
from convexheads.precision import full_precision

Folds = int | Literal["loo"] | tuple[Any, Any]
"""The type of `cv`: a number of folds, "loo", or features and labels of a validation set."""
Scoring = Literal["accuracy", "log_loss"]


@dataclass(frozen=True, eq=False, repr=False)
class Tuned:
    """The scores of all points of a grid, and the head fitted with the best one, as `tune` returns it.

    Printed, it is a table of the points with the mean scores of all tasks.

    Attributes:
        points: the values of each point of the grid, by name; the first name varies slowest.
        accuracy: accuracy of each point on held-out examples, the mean over the folds, in [0, 1], `(*batch, points)`.
        log_loss: cross-entropy of the probabilities of held-out examples, the mean over the folds, in nats,
            `(*batch, points)`.
        gap: largest certified relative duality gap of the fits of each point, `(*batch, points)`; None if the head has
            a closed form.
        converged: whether all fits of each point are certified, `(*batch, points)`; None as for `gap`. Points that are
            not certified are chosen only if no point is.
        best: the chosen point of each task, `(*batch,)`.
        fitted: the head, fitted with the chosen values on all examples of the support set.
        folds: the fold of each example, `(*batch, n)`, and -1 for masked examples; None for a validation set.
        scoring: the score that decided.
    """

    points: list[dict[str, Any]]
    accuracy: Float[Tensor, "*batch points"]
    log_loss: Float[Tensor, "*batch points"]
    gap: Float[Tensor, "*batch points"] | None
    converged: Bool[Tensor, "*batch points"] | None
    best: Integer[Tensor, "*batch"]
    fitted: FittedClassifier
    folds: Integer[Tensor, "*batch n"] | None
    scoring: Scoring

    @property
    def values(self) -> dict[str, Any]:
        """The chosen value of each name; for a batch of tasks, a list in the order of the flattened batch."""
        chosen = [self.points[index] for index in self.best.flatten().tolist()]
        if not self.best.ndim:
            return dict(chosen[0])
        return {name: [point[name] for point in chosen] for name in self.points[0]}

    @property
    def score(self) -> Float[Tensor, "*batch"]:
        """The accuracy or the log-loss of the chosen points, whichever decided, `(*batch,)`."""
        scores = self.accuracy if self.scoring == "accuracy" else self.log_loss
        return scores.gather(-1, self.best.unsqueeze(-1)).squeeze(-1)

    def plot(self, path: Any = None) -> Any:
        """Draw the mean accuracy and log-loss of all tasks over the grid; the figure, which matplotlib has to draw.

        Args:
            path: where to save the picture, in the format of its suffix. Defaults to None (it is not saved).

        Raises:
            MissingDependencyError: matplotlib is not installed.
            ConvexHeadsError: the grid has more than two names.

        Example:
            `tuned.plot("path.png")`
        """
        return _draw(self, path)

    def __repr__(self) -> str:
        flat = (len(self.points),)
        accuracy = self.accuracy.reshape(-1, *flat).mean(0).tolist()
        log_loss = self.log_loss.reshape(-1, *flat).mean(0).tolist()
        chosen = self.best.flatten().bincount(minlength=len(self.points)).tolist()
        certified = None if self.converged is None else self.converged.reshape(-1, *flat).double().mean(0).tolist()
        rows = [[*self.points[0], "accuracy", "log-loss", "chosen", *([] if certified is None else ["certified"])]]
        for number, point in enumerate(self.points):
            row = [_describe(value) for value in point.values()]
            row += [f"{100 * accuracy[number]:.2f}%", f"{log_loss[number]:.4f}", str(chosen[number])]
            rows.append(row if certified is None else [*row, f"{100 * certified[number]:.0f}%"])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _describe(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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
    values = _check_grid(head, grid)
    points = [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]
    task = _prepare(head, support, labels, ways, mask=mask, sample_weight=sample_weight, prior=prior)
    groups = _group(head, points)
    variants = (copy.deepcopy(head).set_params(**group.settings) for group in groups)
    is_closed = all(has_closed_form(variant, task.examples) for variant in variants)
    split = _split(cv, task, _validation.check_seed(seed), is_closed=is_closed)
    parts = [part for group in groups for part in _divide(head, task, split, group)]
    scores = _Scores.empty(len(task.labels), split.train.shape[1], len(points), task.examples.features.device)
    for part in track(parts, f"tuning {type(head).__name__}, {len(points)} points", progress):
        with torch.no_grad(), full_precision(task.examples.features.device):
            scores.put(part, *_score(head, task, split, part))
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
        _check_grid(head, grid)

    def fit(self, support: Any, labels: Any, **options: Any) -> FittedClassifier:
        """Tune and fit on a batch of tasks; `support`, `labels`, the `options` and the errors are those of `tune`."""
        for name, default in (("allow_missing_classes", False), ("calibrate", None)):
            if (value := options.pop(name, default)) != default:
                raise InputError(name, f"{default} for TunedHead", repr(value))
        settings = {"cv": self.cv, "scoring": self.scoring, "progress": False}
        return tune(self.head, self.grid, support, labels, **settings, **options).fitted

    def solve(self, support: SupportSet) -> KernelExpansion:
        return self.head.solve(support)


class _Task(NamedTuple):
    """The checked arguments of `tune`: `arguments` and `options` of the final fit, and flat tensors."""

    arguments: tuple[Any, Any]
    options: dict[str, Any]
    batch: torch.Size
    examples: Examples
    labels: Integer[Tensor, "tasks n"]


class _Split(NamedTuple):
    """Which examples are for training, and which others are held out, padded where folds differ in size."""

    train: Bool[Tensor, "tasks folds n"]
    features: Float[Tensor, "tasks folds m d"] | None  # None: those of the support set at `index`
    index: Integer[Tensor, "tasks folds m"] | None
    labels: Integer[Tensor, "tasks folds m"]
    used: Bool[Tensor, "tasks folds m"]
    folds: Integer[Tensor, "tasks n"] | None
    leaves_one_out: bool = False


class _Group(NamedTuple):
    """Points of a grid that differ only in settings that can be solved in one batch.

    Groups of the same family differ only in settings that each task may choose for itself.
    """

    indices: list[int]
    settings: dict[str, Any]
    batched: dict[str, list[float]]
    family: int


class _Part(NamedTuple):
    """What is solved at once."""

    tasks: slice
    folds: slice
    group: _Group


@dataclass(frozen=True, eq=False, repr=False)
class _Scores:
    """The scores of each task, fold and point."""

    accuracy: Tensor
    log_loss: Tensor
    gap: Tensor
    converged: Tensor

    @classmethod
    def empty(cls, tasks: int, folds: int, points: int, device: torch.device) -> _Scores:
        zero = torch.zeros(tasks, folds, points, dtype=torch.float64, device=device)
        return cls(zero, zero.clone(), zero.clone(), zero.bool())

    def put(self, part: _Part, *values: Tensor) -> None:
        for own, value in zip(vars(self).values(), values, strict=True):
            own[part.tasks, part.folds, part.group.indices] = value.to(own.dtype)


def _check_grid(head: ClassificationHead, grid: object) -> dict[str, list[Any]]:
    """The values of each setting, as lists."""
    expected = "a dictionary from the names of settings to one or more values, such as {'C': [0.1, 1.0]}"
    if not isinstance(grid, Mapping) or not grid:
        raise InputError("grid", expected, _validation.describe(grid))
    known, found = head.get_params(), {}
    for name, values in grid.items():
        if name not in known:
            raise InputError("grid", f"names among {sorted(known)}", repr(name))
        if isinstance(values, Tensor) or hasattr(values, "tolist"):
            values = values.tolist()
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise InputError("grid", expected, f"{name}: {values!r}")
        trial = copy.deepcopy(head)
        for value in values:
            trial.set_params(**{name: value})  # raises an `InputError` for an unusable value
        found[name] = list(values)
    return found


def _is_own_number(name: str, values: Sequence[Any]) -> bool:
    """Whether a setting is a positive number of the head, which each task may choose for itself."""
    if name == "scale" or "__" in name:
        return False
    return all(isinstance(value, int | float) and not isinstance(value, bool) and value > 0 for value in values)


def _is_batched(head: ClassificationHead, name: str) -> bool:
    """Whether the values of such a setting can differ between the tasks of one batch."""
    if not isinstance(head, LossHead):
        return False
    try:
        return isinstance(head.checks[name](name, PerTask(torch.ones(1))), PerTask)
    except InputError:
        return False


def _group(head: ClassificationHead, points: list[dict[str, Any]]) -> list[_Group]:
    own = [name for name in points[0] if _is_own_number(name, [point[name] for point in points])]
    batched = [name for name in own if _is_batched(head, name)]
    groups: list[_Group] = []
    places: dict[tuple[Any, ...], int] = {}
    known: dict[tuple[Any, ...], int] = {}
    for number, point in enumerate(points):
        # Values such as kernels are the same objects in all points that share them.
        keys = [
            tuple(id(value) if callable(value) else repr(value) for name, value in point.items() if name not in names)
            for names in (batched, own)
        ]
        settings = {name: value for name, value in point.items() if name not in batched}
        known.setdefault(keys[1], len(known))
        if keys[0] not in places:
            places[keys[0]] = len(groups)
            groups.append(_Group([], settings, {name: [] for name in batched}, known[keys[1]]))
        group = groups[places[keys[0]]]
        group.indices.append(number)
        for name in batched:
            group.batched[name].append(float(point[name]))
    return [_in_order(group) for group in groups]


def _in_order(group: _Group) -> _Group:
    """The group from the largest C to the smallest one, because SVMs begin each point at the solution of the last."""
    names = sorted(group.batched, key=lambda name: name == "C")
    columns = [group.batched[name] for name in names]
    order = sorted(range(len(group.indices)), key=lambda place: [column[place] for column in columns], reverse=True)
    batched = {name: [values[place] for place in order] for name, values in group.batched.items()}
    return group._replace(indices=[group.indices[place] for place in order], batched=batched)


def _prepare(head: ClassificationHead, support: Any, labels: Any, ways: Any, **options: Any) -> _Task:
    if not isinstance(ways, int | None):
        raise InputError("ways", "an integer or None; tune tasks with other numbers of classes apart", repr(ways))
    found = head._check(support, labels, ways=ways, **options)
    targets = found.examples.targets
    if found.examples.is_multilabel:
        raise InputError("labels", "one label per example, because tune does not support several", "a matrix of bool")
    examples = Examples.of(found.examples, found.sample_weight)
    options["ways"] = targets.shape[-1]
    return _Task((support, labels), options, targets.shape[:-2], examples, examples.targets.argmax(-1))


def _split(cv: object, task: _Task, seed: int, *, is_closed: bool) -> _Split:
    tasks, n = task.labels.shape
    device = task.labels.device
    if isinstance(cv, tuple | list) and len(cv) == 2:
        return _validation_set(cv, task)
    used, ways = task.examples.used, task.examples.targets.shape[-1]
    if cv == "loo":
        count = n
        folds = torch.where(used, torch.arange(n, device=device), -1)
        if is_closed:
            return _Split(used[:, None], None, None, task.labels[:, None], used[:, None], folds)
    else:
        expected = "a number of folds from 2 on, 'loo', or a pair of validation features and labels"
        if isinstance(cv, bool) or not isinstance(cv, int) or cv < 2:
            raise InputError("cv", expected, _validation.describe(cv))
        count = cv
        counts = task.examples.targets.sum(1).long()
        if (counts < count).any():
            row, label = (counts < count).nonzero()[0].tolist()
            got = f"{counts[row, label].item()} of class {label}; pass fewer folds, cv='loo' or a validation set"
            raise InputError("cv", f"at least {count} examples of every class for {count} folds", got)
        # The examples of a class, in random order, go to one fold after the other; the next class continues there.
        generator = torch.Generator().manual_seed(seed)
        keys = task.labels.where(used, ways).cpu() + torch.rand(tasks, n, generator=generator).double()
        folds = torch.empty_like(task.labels)
        folds.scatter_(1, keys.argsort(dim=1).to(device), (torch.arange(n, device=device) % count).expand(tasks, n))
        folds = folds.where(used, -1)
    left_out = folds.unsqueeze(1) == torch.arange(count, device=device).unsqueeze(-1)  # (tasks, folds, n)
    size = int(left_out.sum(-1).amax())
    index = left_out.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :size]
    labels = task.labels.unsqueeze(1).expand(-1, count, -1).gather(-1, index)
    used_in_folds = left_out.gather(-1, index)
    return _Split(used.unsqueeze(1) & ~left_out, None, index, labels, used_in_folds, folds, leaves_one_out=cv == "loo")


def _validation_set(pair: Sequence[Any], task: _Task) -> _Split:
    examples = task.examples
    tasks, d, ways = len(task.labels), examples.features.shape[-1], examples.targets.shape[-1]
    query = _validation.check_tensor("cv", pair[0], "features of a validation set", _validation.is_float_tensor)
    labels = _validation.check_tensor("cv", pair[1], "labels of a validation set", _validation.is_integer_tensor)
    query, labels = query.detach().to(examples.features), labels.to(task.labels)
    q = query.shape[-2] if query.ndim > 1 else 0
    for shape, expand in (((*task.batch, q, d), False), ((q, d), True)):
        if query.shape == shape and labels.shape == shape[:-1] and q:
            query, labels = query.reshape(-1, q, d), labels.reshape(-1, q)
            query, labels = (part.expand(tasks, *part.shape[1:]) if expand else part for part in (query, labels))
            _validation.check_finite("cv", query)
            _validation.check_range("cv", labels, ways, ways - 1)
            used = torch.ones_like(labels, dtype=torch.bool)
            return _Split(examples.used[:, None], query.unsqueeze(1), None, labels[:, None], used[:, None], None)
    got = f"shapes {tuple(query.shape)} and {tuple(labels.shape)}"
    raise InputError("cv", f"features {(*task.batch, 'q', d)} and labels {(*task.batch, 'q')}".replace("'", ""), got)


def _divide(head: ClassificationHead, task: _Task, split: _Split, group: _Group) -> Iterator[_Part]:
    """Divide the work of a group so that each part fits into memory."""
    tasks, folds, n = split.train.shape
    m, d, k = split.labels.shape[-1], task.examples.features.shape[-1], task.examples.targets.shape[-1]
    points, per_point = len(group.indices), head.entries_per_task(n, d, k) + 2 * m * k
    per_fold = n * (n + d) + m * (n + d)
    points_at_once = max(1, min(points, (held_out.MAX_ENTRIES - per_fold) // per_point))
    each = per_fold + points_at_once * per_point
    folds_at_once = max(1, min(folds, held_out.MAX_ENTRIES // each))
    tasks_at_once = max(1, min(tasks, held_out.MAX_ENTRIES // (each * folds_at_once))) if folds_at_once == folds else 1
    for task_start in range(0, tasks, tasks_at_once):
        for fold_start in range(0, folds, folds_at_once):
            for start in range(0, points, points_at_once):
                chosen = slice(start, start + points_at_once)
                some = _Group(
                    group.indices[chosen],
                    group.settings,
                    {name: values[chosen] for name, values in group.batched.items()},
                    group.family,
                )
                yield _Part(
                    slice(task_start, task_start + tasks_at_once), slice(fold_start, fold_start + folds_at_once), some
                )


def _score(head: ClassificationHead, task: _Task, split: _Split, part: _Part) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Accuracy, log-loss, gap and status of each task, fold and point of a part, `(tasks, folds, points)`."""
    tasks, folds, group = part
    examples, train = task.examples.select(tasks), split.train[tasks, folds]
    dtype = examples.features.dtype
    batched = {name: PerTask(torch.tensor(values, dtype=dtype)) for name, values in group.batched.items()}
    configured = lenient(copy.deepcopy(head).set_params(**group.settings, **batched))
    truth, used = split.labels[tasks, folds].unsqueeze(2), split.used[tasks, folds].unsqueeze(2)
    solution = init = None
    if split.features is not None:
        logits, expansion = refit(configured, examples, train, split.features[tasks, folds])
        solution = expansion.solution
    elif split.index is not None:
        index = split.index[tasks, folds]
        query = examples.features.unsqueeze(1).expand(*index.shape[:2], *examples.features.shape[1:])
        query = query.gather(2, index.unsqueeze(-1).expand(*index.shape, query.shape[-1]))
        if split.leaves_one_out:
            _, expansion = refit(configured, examples, examples.used.unsqueeze(1), examples.features[:, None, :1])
            init = without_left_out(expansion, train)
        logits, expansion = refit(configured, examples, train, query, init)
        solution = expansion.solution
    else:
        logits = closed_form(configured, examples)
    count = used.sum(-1).clamp_min(1).double()
    correct = (logits.argmax(-1) == truth) & used
    log_loss = logits.logsumexp(-1) - logits.gather(-1, truth.expand(logits.shape[:-1]).unsqueeze(-1)).squeeze(-1)
    log_loss = log_loss.masked_fill(~used, 0).sum(-1) / count
    shape = torch.Size((*train.shape[:2], len(group.indices)))
    if solution is None:
        gap, converged = logits.new_full(shape, torch.nan), torch.ones(shape, dtype=torch.bool, device=logits.device)
    else:
        gap, converged = solution.gap.expand(shape), solution.converged.expand(shape)
    return (correct.sum(-1) / count).expand(shape), log_loss.expand(shape), gap, converged


def _choose(score: Tensor, converged: Tensor, groups: list[_Group]) -> Integer[Tensor, " tasks"]:
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
    head: ClassificationHead, task: _Task, points: list[dict[str, Any]], best: Tensor, groups: list[_Group]
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


def _draw(tuned: Tuned, path: Any) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("matplotlib", extra="", needed_by="Tuned.plot") from error
    names = list(tuned.points[0])
    if len(names) > 2:
        raise ConvexHeadsError(f"Tuned.plot: expected a grid with one or two names, got {len(names)}")
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    lines: dict[Any, list[int]] = {}
    for number, point in enumerate(tuned.points):
        lines.setdefault(_describe(point[names[1]]) if len(names) == 2 else None, []).append(number)
    count = len(tuned.points)
    panels = (("accuracy, %", 100 * tuned.accuracy.reshape(-1, count)), ("log-loss", tuned.log_loss.reshape(-1, count)))
    for axes, (label, values) in zip(figure.subplots(1, 2), panels, strict=True):
        for name, indices in lines.items():
            x = [tuned.points[index][names[0]] for index in indices]
            is_number = all(isinstance(value, int | float) for value in x)
            y = values[:, indices].cpu()
            mean = y.mean(0)
            places = x if is_number else [_describe(value) for value in x]
            axes.plot(places, mean, marker=".", label=None if name is None else f"{names[1]} = {name}")
            if len(y) > 1:
                half = 1.96 * y.std(0) / math.sqrt(len(y))
                axes.fill_between(places, mean - half, mean + half, alpha=0.2)
            if is_number and min(x) > 0 and max(x) > 10 * min(x):
                axes.set_xscale("log")
        axes.set_xlabel(names[0])
        axes.set_ylabel(label)
        if len(names) == 2:
            axes.legend()
    for index in set(tuned.best.flatten().tolist()):
        value: Any = tuned.points[index][names[0]]
        for axes in figure.axes:
            axes.axvline(value if isinstance(value, int | float) else _describe(value), color="0.6", lw=0.8, ls=":")  # pyright: ignore[reportArgumentType]
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
