"""What is done to images in training, and learn2learn's way to the same episodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks import require_modules
from benchmarks.data.images import ImageSet
from convexheads.errors import InputError
from convexheads.integrations import require

if TYPE_CHECKING:
    from learn2learn.data import Taskset
    from torchvision.transforms import v2

AUGMENTATIONS = ("none", "flip-crop", "flip-crop-jitter")
"""What is done to training images; the last is Section 4.1 of Lee et al. 2019."""


def augmentation(name: str, size: tuple[int, int]) -> v2.Transform | None:
    """The random transform of that name for images of that height and width; None for none.

    Flips to left and right, crops from a frame of zeros an eighth of the image wide, and changes of brightness,
    contrast and saturation by up to 40 % (the strength is that of the authors' published code).

    Raises:
        InputError: no such augmentation.
        MissingDependencyError: torchvision is not installed.
    """
    if name not in AUGMENTATIONS:
        raise InputError("augment", repr(name), f"one of {', '.join(AUGMENTATIONS)}")
    if name == "none":
        return None
    require_modules("torchvision")  # the quickstart does without it
    from torchvision.transforms import v2

    jitter = [v2.ColorJitter(0.4, 0.4, 0.4)] if name.endswith("jitter") else []
    return v2.Compose([v2.RandomCrop(size, padding=size[0] // 8), *jitter, v2.RandomHorizontalFlip()])


def taskset(data: ImageSet, *, ways: int, samples: int) -> Taskset:
    """learn2learn's way to the same episodes: `taskset(...).sample()` is a task's images and labels.

    Args:
        data: the classes and images to draw from.
        ways: classes of a task.
        samples: images a class, support and query together.

    Raises:
        MissingDependencyError: learn2learn is not installed.
    """
    require("learn2learn", "learn2learn", "0.2", "0.3", extra="learn2learn", needed_by="taskset")
    from learn2learn.data import MetaDataset, Taskset
    from learn2learn.data.transforms import ConsecutiveLabels, FusedNWaysKShots, LoadData, RemapLabels

    indices = {label: (data.labels == label).nonzero().flatten().tolist() for label in range(len(data.classes))}
    source = MetaDataset(data, labels_to_indices=indices)
    return Taskset(
        source,
        [
            FusedNWaysKShots(source, n=ways, k=samples),  # NWays and KShots at once, and faster
            LoadData(source),
            RemapLabels(source),
            ConsecutiveLabels(source),
        ],
    )
