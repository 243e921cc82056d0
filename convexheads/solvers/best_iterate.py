"""When an iteration ends, and which of its iterates is returned."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SMALL_GAP = 1e-4
"""Above this gap, tasks do not count as stalled."""


class BestIterate:
    """The iterate of each task with the smallest certified gap so far, and whether the task is done.

    A task is done when it is solved, when its gap is NaN, or when its gap, because of rounding, has not fallen for
    `patience` iterations in a row. The gap counts as fallen once it is below half of a reference value, which is then
    set to the current gap, so that slow but steady progress counts. Gaps above 1e-4 never count as stalled, because far
    from the optimum a gap may stay the same for a while.
    """

    def __init__(self, *start: Tensor, patience: int) -> None:
        self.tensors, self.patience = start, patience
        self.gap = self._last_progress = torch.full_like(start[0][..., 0, 0], torch.inf)
        self.iterations = self._without_progress = torch.zeros_like(self.gap, dtype=torch.long)
        self.done = torch.zeros_like(self.gap, dtype=torch.bool)

    def update(self, iteration: int, gap: Tensor, solved: Tensor, *tensors: Tensor) -> None:
        """Take the iterate with this number and these tensors, `(*tasks, ...)`, into account.

        Tasks that are `solved`, or for some other reason cannot improve, are done.
        """
        halved = gap < self._last_progress / 2
        self._last_progress = torch.where(halved, gap, self._last_progress)
        self._without_progress = torch.where(halved | (self.gap > SMALL_GAP), 0, self._without_progress + 1)
        better = (gap < self.gap) & ~self.done
        pairs = zip(tensors, self.tensors, strict=True)
        self.tensors = tuple(
            torch.where(better.reshape(*better.shape, *[1] * (new.ndim - better.ndim)), new, old) for new, old in pairs
        )
        self.gap = torch.where(better, gap, self.gap)
        self.iterations = torch.where(self.done, self.iterations, iteration)
        self.done = self.done | solved | (self._without_progress >= self.patience) | torch.isnan(gap)

    def select(self, choose: Callable[[Tensor], Tensor]) -> None:
        """Forget all tasks but those that `choose` returns of a tensor with their dimensions in front."""
        self.tensors = tuple(map(choose, self.tensors))
        self.gap, self._last_progress = choose(self.gap), choose(self._last_progress)
        self.iterations, self._without_progress = choose(self.iterations), choose(self._without_progress)
        self.done = choose(self.done)
