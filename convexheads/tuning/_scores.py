"""The scores of all points on held-out examples, computed in parts that fit into memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from convexheads.heads import ClassificationHead
from convexheads.heads.base import held_out
from convexheads.heads.base.held_out import closed_form, lenient, refit, without_left_out
from convexheads.hyperparameters import PerTask
from convexheads.tuning._folds import Split, Task
from convexheads.tuning._grid import Group


class Part(NamedTuple):
    """What is solved at once."""

    tasks: slice
    folds: slice
    group: Group


@dataclass(frozen=True, eq=False, repr=False)
class Scores:
    """The scores of each task, fold and point."""

    accuracy: Tensor
    log_loss: Tensor
    gap: Tensor
    converged: Tensor

    @classmethod
    def empty(cls, tasks: int, folds: int, points: int, device: torch.device) -> Scores:
        zero = torch.zeros(tasks, folds, points, dtype=torch.float64, device=device)
        return cls(zero, zero.clone(), zero.clone(), zero.bool())

    def put(self, part: Part, *values: Tensor) -> None:
        for own, value in zip(vars(self).values(), values, strict=True):
            own[part.tasks, part.folds, part.group.indices] = value.to(own.dtype)


def divide(head: ClassificationHead, task: Task, split: Split, group: Group) -> Iterator[Part]:
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
                some = Group(
                    group.indices[chosen],
                    group.settings,
                    {name: values[chosen] for name, values in group.batched.items()},
                    group.family,
                )
                yield Part(
                    slice(task_start, task_start + tasks_at_once), slice(fold_start, fold_start + folds_at_once), some
                )


def score_part(head: ClassificationHead, task: Task, split: Split, part: Part) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
        solution = expansion.certificate
    elif split.index is not None:
        index = split.index[tasks, folds]
        query = examples.features.unsqueeze(1).expand(*index.shape[:2], *examples.features.shape[1:])
        query = query.gather(2, index.unsqueeze(-1).expand(*index.shape, query.shape[-1]))
        if split.leaves_one_out:
            _, expansion = refit(configured, examples, examples.used.unsqueeze(1), examples.features[:, None, :1])
            init = without_left_out(expansion, train)
        logits, expansion = refit(configured, examples, train, query, init)
        solution = expansion.certificate
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
