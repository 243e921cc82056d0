"""The images of a split, in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

TURNS = tuple(f"{degrees} degrees" for degrees in (0, 90, 180, 270))


@dataclass(frozen=True, eq=False)
class ImageSet(Dataset[tuple[Tensor, int]]):
    """The images of one split, in memory.

    Attributes:
        images: uint8 of shape (n, channels, height, width), 0 black to 255.
        labels: int64 of shape (n,), indices into `classes`.
        classes: the names of the split's classes.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


def join(first: ImageSet, second: ImageSet) -> ImageSet:
    """A set with the classes of both, those of the first one before those of the second."""
    labels = torch.cat([first.labels, second.labels + len(first.classes)])
    return ImageSet(torch.cat([first.images, second.images]), labels, (*first.classes, *second.classes))


def every_turn(data: ImageSet) -> ImageSet:
    """Every class turned by each multiple of 90 degrees as a class of its own: four times as many to learn from.

    Args:
        data: square images (n, channels, size, size) of c classes.

    Returns:
        Images (4 n, channels, size, size) of 4 c classes, those not turned in front.

    Source: Santoro et al., "Meta-Learning with Memory-Augmented Neural Networks" (ICML 2016).
    """
    return ImageSet(
        torch.cat([data.images.rot90(turns, (-2, -1)) for turns in range(len(TURNS))]),
        torch.cat([data.labels + turns * len(data.classes) for turns in range(len(TURNS))]),
        tuple(f"{name}, {turn}" for turn in TURNS for name in data.classes),
    )
