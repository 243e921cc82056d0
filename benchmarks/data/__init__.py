"""Few-shot image data in memory as uint8 tensors, and training episodes drawn from it."""

from __future__ import annotations

from benchmarks.data.datasets import DATASETS, load, split_classes
from benchmarks.data.episodes import AUGMENTATIONS, EpisodeLoader, taskset
from benchmarks.data.images import ImageSet, join

__all__ = ["AUGMENTATIONS", "DATASETS", "EpisodeLoader", "ImageSet", "join", "load", "split_classes", "taskset"]
