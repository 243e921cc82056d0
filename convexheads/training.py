"""What every episodic training has in common: its loss, its learning rate, and what is said of a step that failed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, NoReturn

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from convexheads.episodes import Episode
from convexheads.errors import InputError, SolverError
from convexheads.heads import ClassificationHead


def _paper(progress: float) -> float:
    return next(factor for end, factor in ((1 / 3, 1.0), (2 / 3, 0.06), (5 / 6, 0.012), (2, 0.0024)) if progress < end)


SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "paper": _paper,
    "constant": lambda _: 1.0,
}
"""By what to multiply the learning rate, from the share of the training that is done.

"cosine" falls to zero along one cosine, "constant" stays. "paper" is that of Lee et al. 2019 (Section 4.1), whose 0.1,
0.006, 0.0012 and 0.00024 change after 20, 40 and 50 of 60 epochs.
"""


OnFailure = Literal["raise", "skip", "stop"]
"""What is done about a step whose loss or gradient is not finite, or whose episodes could not be solved."""


class EpisodeLoss(NamedTuple):
    """The loss of a batch of episodes and what there is to log. `episode_loss` makes it.

    Attributes:
        loss: the mean cross-entropy of the query logits over all episodes, a scalar `()`.
        metrics: scalars by name: "loss" and "accuracy" (0 to 1) of the queries; where the head solves iteratively,
            "gap", the largest certified relative duality gap, and "certified", the share of tasks whose gap is within
            the solver's tolerance; and "iterations", the mean over the tasks, where the solver tells.
        logits: of the queries, `(*tasks, q, ways)`.
    """

    loss: Float[Tensor, ""]
    metrics: dict[str, Tensor]
    logits: Float[Tensor, "*tasks q ways"]


def episode_loss(head: ClassificationHead, episode: Episode, *, ways: int, label_smoothing: float = 0.0) -> EpisodeLoss:
    """The loss by which a backbone is trained through a head: fit on each support set, score each query set.

    Nothing is read from the device, except by the head.

    Args:
        head: fitted to every episode of the batch.
        episode: features and labels, integers from 0 to ways - 1, of support and query; any leading dimensions.
        ways: classes of an episode.
        label_smoothing: of the cross-entropy, from 0 (default) to below 1.

    Returns:
        The loss, what there is to log, and the logits.

    Raises:
        InputError: labels that are unusable, or (on the CPU) features that are not finite.
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
    """The step and the tasks of a failure, in words.

    Args:
        failure: with the keys "step", "tasks" (numbers, or none where they can't be told apart) and "cause".
    """
    tasks = ", ".join(map(str, failure["tasks"]))
    return f"step {failure['step']}" + (f", task {tasks}" if tasks else "")


def refuse(failure: dict[str, Any], error: Exception | None = None) -> NoReturn:
    """Raise what `on_failure="raise"` has for a step that failed.

    Args:
        failure: as for `where`.
        error: what the head raised, if it did.

    Raises:
        SolverError: the head raised one.
        InputError: in all other cases.
    """
    if isinstance(error, SolverError):
        raise SolverError(f"{where(failure)}: {error}", error.solution) from error
    expected = "finite values, or another on_failure: 'skip' goes on without the step, 'stop' ends before it"
    raise InputError("batch", expected, f"{where(failure)} ({failure['cause']})") from error


def tasks_with_bad_values(values: Tensor, dimensions: int) -> list[int]:
    """The tasks of which a value is not finite, numbered through.

    Args:
        values: `(*tasks, ...)`.
        dimensions: how many dimensions the tasks have.
    """
    bad = (~values.isfinite()).flatten(dimensions).any(-1)
    return bad.flatten().nonzero().flatten().tolist()
