"""The parts that all episodic training loops share: the loss, the learning rate, and the report of a failed step."""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, NoReturn

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from convexheads._functorch import inspect_values
from convexheads._looks import look_once
from convexheads._validation import check_fraction, check_range, check_tensor, describe_shape, is_integer_tensor
from convexheads.episodes import Episode
from convexheads.errors import InputError, SolverError
from convexheads.heads import ClassificationHead
from convexheads.heads.base.classification import check_head

SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: (1 + math.cos(math.pi * min(progress, 1))) / 2,
    "paper": lambda progress: (1.0, 0.06, 0.012, 0.0024)[bisect((1 / 3, 2 / 3, 5 / 6), progress)],
    "constant": lambda _: 1.0,
}
"""The factor of the learning rate as a function of the completed fraction of the training; constant after its end.

"paper" is that of Lee et al. 2019 (Section 4.1): factors 1, 0.06, 0.012 and 0.0024 for 20, 20, 10 and 10 epochs.
"""

OnFailedStep = Literal["raise", "skip", "stop"]
"""Policy for a step whose loss or gradient is not finite, or whose episodes could not be solved."""


class EpisodeLoss(NamedTuple):
    """The loss of a batch of episodes and the metrics to log, as `episode_loss` returns them.

    Attributes:
        loss: The mean cross-entropy of the query logits over all episodes, a scalar `()`.
        metrics: Scalars by name: "loss" and "accuracy", and "gap", "certified" and "iterations" if the fitted
            head has a `solution`, as `EpisodicModule` describes them.
        logits: Logits of the queries, `(*tasks, q, ways)`.
    """

    loss: Float[Tensor, ""]
    metrics: dict[str, Tensor]
    logits: Float[Tensor, "*tasks q ways"]


@look_once
def episode_loss(head: ClassificationHead, episode: Episode, *, ways: int, label_smoothing: float = 0.0) -> EpisodeLoss:
    """Compute the loss for training a backbone with a head: fit on each support set, score each query set.

    Args:
        head: The head, which is fitted on every episode of the batch.
        episode: Features and labels of support and query sets, `(*tasks, ...)`; labels are integers from 0 to ways - 1.
        ways: Number of classes per episode.
        label_smoothing: Label smoothing of the cross-entropy, at least 0 and below 1.

    Source: Eq. 12 of Lee et al., "Meta-Learning with Differentiable Convex Optimization" (CVPR 2019).
    """
    fitted = check_head(head).fit(episode.support, episode.support_labels, ways=ways)
    expected = "a tensor of integers 0..ways-1"
    labels = check_tensor("query_labels", episode.query_labels, expected, is_integer_tensor, like=fitted.scale).long()
    logits = fitted(episode.query)
    if labels.shape != logits.shape[:-1]:
        raise InputError("query_labels", f"one label per query, {tuple(logits.shape[:-1])}", describe_shape(labels))
    if head.validate:
        inspect_values(check_range, "query_labels", labels, ways, ways - 1)
    flat, targets = logits.flatten(0, -2), labels.flatten()
    loss = functional.cross_entropy(flat, targets, label_smoothing=check_fraction("label_smoothing", label_smoothing))
    metrics = {"loss": loss.detach(), "accuracy": (flat.argmax(-1) == targets).float().mean()}
    if fitted.solution is not None:
        metrics["gap"] = fitted.solution.gap.max()
        metrics["certified"] = fitted.solution.converged.float().mean()
        if fitted.solution.iterations is not None:
            metrics["iterations"] = fitted.solution.iterations.float().mean()
    return EpisodeLoss(loss, metrics, logits)


def format_step(failure: dict[str, Any]) -> str:
    """Name the step and the tasks of a `failure`, a dictionary of "step", "tasks" and "cause"."""
    tasks = ", ".join(map(str, failure["tasks"]))
    return f"step {failure['step']}" + (f", task {tasks}" if tasks else "")


def raise_failure(failure: dict[str, Any], error: Exception | None = None) -> NoReturn:
    """Raise the error of a failed step: `SolverError` if that is the error of the head, or else `InputError`."""
    if isinstance(error, SolverError):
        raise SolverError(f"{format_step(failure)}: {error}", error.solution) from error
    hint = "on_failed_step='skip' goes on without such a step, and 'stop' ends the training"
    got = f"non-finite values in {format_step(failure)} ({failure['cause']}); {hint}"
    raise InputError("batch", "finite values", got) from error


def non_finite_tasks(dimensions: int, *values: Tensor) -> list[int]:
    """Return the tasks with non-finite values in the first of the `values` that has any.

    A task is given by its flat index over the first `dimensions` dimensions.
    """
    found = ((~each.isfinite()).flatten(dimensions).any(-1).flatten().nonzero().flatten() for each in values)
    return next((tasks.tolist() for tasks in found if len(tasks)), [])
