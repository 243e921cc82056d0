"""Few-shot image data in memory as uint8 tensors, with augmentation, episodes and learn2learn's tasks."""

from __future__ import annotations

from benchmarks import require_modules

require_modules("numpy", "PIL", "tqdm")

from benchmarks.data.augmentation import AUGMENTATIONS, augmentation
from benchmarks.data.datasets import DATASETS, load, split_classes
from benchmarks.data.episodes import Episodes, taskset
from benchmarks.data.images import ImageSet, every_turn, join

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "Episodes",
    "ImageSet",
    "augmentation",
    "every_turn",
    "join",
    "load",
    "split_classes",
    "taskset",
]
