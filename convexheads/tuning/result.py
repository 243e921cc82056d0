"""The scores of all points of a grid, as text and as a picture, and the head fitted with the best one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Bool, Float, Integer
from torch import Tensor

from convexheads.errors import ConvexHeadsError, MissingDependencyError
from convexheads.heads import FittedClassifier

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
