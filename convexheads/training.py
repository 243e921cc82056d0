"""What all episodic training shares: the loss, learning-rate schedules, and the errors of failed steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, NoReturn

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from convexheads.episodes import Episode
from convexheads.errors import InputError, SolverError
from convexheads.heads.base import Head


def _paper(progress: float) -> float:
    return next(factor for end, factor in ((1 / 3, 1.0), (2 / 3, 0.06), (5 / 6, 0.012), (2, 0.0024)) if progress < end)


SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "paper": _paper,
    "constant": lambda _: 1.0,
}
"""Factors of the learning rate as functions of the training progress, from 0 to 1.

"cosine" falls to zero along half a cosine, and "constant" is 1. "paper" is the schedule of Lee et al. 2019 (Section
4.1): learning rates of 0.1, 0.006, 0.0012 and 0.00024, which change after 20, 40 and 50 of 60 epochs.
"""


OnFailure = Literal["raise", "skip", "stop"]
"""What to do about a step with a non-finite loss or gradient, or with episodes that could not be solved."""


class EpisodeLoss(NamedTuple):
    """The loss of a batch of episodes, and metrics for the log. `episode_loss` computes it.

    Attributes:
        loss: the mean cross-entropy of the query logits over all episodes, a scalar `()`.
        metrics: scalars by name: "loss" and "accuracy" (0 to 1) of the queries; where the head solves iteratively,
            "gap", the largest certified relative duality gap, and "certified", the share of tasks whose gap is within
            the solver's tolerance; and "iterations", the mean over the tasks, where the solver reports them.
        logits: the query logits, `(*tasks, q, ways)`.
    """

    loss: Float[Tensor, ""]
    metrics: dict[str, Tensor]
    logits: Float[Tensor, "*tasks q ways"]


def episode_loss(head: Head, episode: Episode, *, ways: int, label_smoothing: float = 0.0) -> EpisodeLoss:
    """The loss that trains a backbone through a head: fit the head to each support set, score each query set.

    Only the head may wait for the device.

    Args:
        head: fitted to every episode of the batch.
        episode: features and labels, integers from 0 to ways - 1, of support and query; any leading dimensions.
        ways: classes per episode.
        label_smoothing: label smoothing of the cross-entropy, from 0 (default) to below 1.

    Returns:
        The loss, the metrics and the logits.

    Raises:
        InputError: the labels are unusable, or (on the CPU) the features are non-finite.
        SolverError: an episode could not be solved (see the solver's `on_failure`).

    Source: Eq. 12 of Lee et al., "Meta-Learning with Differentiable Convex Optimization" (CVPR 2019).
    """
    fitted = head.fit(episode.support, episode.support_labels, ways=ways)
    logits, targets = fitted(episode.query), episode.query_labels.flatten()
    flat = logits.flatten(0, -2)
    loss = functional.cross_entropy(flat, targets, label_smoothing=label_smoothing)
    metrics = {"loss": loss.detach(), "accuracy": (flat.argmax(-1) == targets).float().mean()}
    if fitted.solution is not None:
        metrics["gap"] = fitted.solution.gap.max()
        metrics["certified"] = fitted.solution.converged.float().mean()
        if fitted.solution.iterations is not None:
            metrics["iterations"] = fitted.solution.iterations.float().mean()
    return EpisodeLoss(loss, metrics, logits)


def where(failure: dict[str, Any]) -> str:
    """The step and the tasks of a failure as text.

    Args:
        failure: with the keys "step", "tasks" (their numbers; empty if they are unknown) and "cause".
    """
    tasks = ", ".join(map(str, failure["tasks"]))
    return f"step {failure['step']}" + (f", task {tasks}" if tasks else "")


def refuse(failure: dict[str, Any], error: Exception | None = None) -> NoReturn:
    """Raise the error of a failed step for `on_failure="raise"`.

    Args:
        failure: as for `where`.
        error: the exception of the head, if it raised one.

    Raises:
        SolverError: the head raised a `SolverError`.
        InputError: otherwise.
    """
    if isinstance(error, SolverError):
        raise SolverError(f"{where(failure)}: {error}", error.solution) from error
    wanted = "finite values, or another on_failure: 'skip' continues without the step, 'stop' stops before it"
    raise InputError("batch", f"{where(failure)} ({failure['cause']})", wanted) from error


def tasks_with_bad_values(values: Tensor, dimensions: int) -> list[int]:
    """The flat indices of the tasks that have a non-finite value.

    Args:
        values: `(*tasks, ...)`.
        dimensions: the number of task dimensions.
    """
    nonfinite = (~values.isfinite()).flatten(dimensions).any(-1)
    return nonfinite.flatten().nonzero().flatten().tolist()
