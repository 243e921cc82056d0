"""The rule by which iterative solvers stop where rounding keeps the certified gap from falling."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Far from the optimum, gaps may stay the same for a while.
_SMALL_GAP = 1e-4


class StallDetector:
    """Tells which tasks have made no progress for `patience` iterations in a row.

    A gap makes progress when it is half of the last one that made progress. A gap that falls slowly, but steadily,
    halves now and then. Gaps above 1e-4 never count as stalled.

    Args:
        gap: the gap of each task before the first iteration, `(tasks,)`.
        patience: the number of iterations.
    """

    def __init__(self, gap: Float[Tensor, " tasks"], *, patience: int) -> None:
        self.patience = patience
        self._best = self._last_progress = gap
        self._without_progress = torch.zeros_like(gap, dtype=torch.long)

    def update(self, gap: Float[Tensor, " tasks"]) -> Bool[Tensor, " tasks"]:
        """Which tasks have stalled, `(tasks,)` of bool.

        Args:
            gap: the gap of each task after one more iteration, `(tasks,)`.
        """
        halved = gap < self._last_progress / 2
        self._last_progress = torch.where(halved, gap, self._last_progress)
        self._without_progress = torch.where(halved | (self._best > _SMALL_GAP), 0, self._without_progress + 1)
        self._best = self._best.fmin(gap)
        return self._without_progress >= self.patience
