"""The images of a split, in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset


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
