"""The episodes of a training, made on the device that trains, and learn2learn's way to the same episodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.data.augmentation import augmentation, to_device
from benchmarks.data.images import ImageSet
from convexheads.episodes import Episode
from convexheads.integrations import require_version
from convexheads.loader import EpisodeLoader

if TYPE_CHECKING:
    from learn2learn.data import Taskset


class Episodes(nn.Module):
    """A batch of episodes for each training step, gathered and augmented on the device that trains.

    The images lie on the device, and `forward` makes a batch of them there. What is random, `draw` draws on the CPU,
    from the seed and the step alone: so every device, every number of processes and every resumption sees the same
    episodes with the same augmentation. Neither waits for the device.

    Args:
        data: images and labels to draw from.
        ways: classes of an episode.
        shots: support images per class.
        queries: query images per class.
        tasks: episodes of a step, over all processes.
        seed: of all draws.
        augment: one of `AUGMENTATIONS`.
        device: where the batches are made. Default: the CPU.
        rank: which of the processes this one is. Default 0.
        processes: how many share each step. Default 1.

    Attributes:
        labels: of the episodes of every step, class by class, int64 `(tasks, ways * (shots + queries))`.

    Raises:
        InputError: a size is not positive, there is no such augmentation, or `data` has too few classes or images.
    """

    images: Tensor
    labels: Tensor

    def __init__(
        self,
        data: ImageSet,
        *,
        ways: int,
        shots: int,
        queries: int,
        tasks: int,
        seed: int,
        augment: str,
        device: torch.device | str = "cpu",
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        super().__init__()
        self.device, self.ways, self.shots = torch.device(device), ways, shots
        self.register_buffer("images", data.images.to(self.device), persistent=False)
        self.augmentation = augmentation(augment)
        self.loader = EpisodeLoader(
            data.images,
            data.labels,
            ways=ways,
            shots=shots,
            queries=queries,
            batch_size=tasks,
            seed=seed,
            class_names=data.classes,
            rank=rank,
            world_size=processes,
        )
        labels = torch.arange(ways, device=self.device).repeat_interleave(shots + queries)
        self.register_buffer("labels", labels.expand(tasks // processes, -1), persistent=False)

    def draw(self, step: int) -> Tensor:
        """What is random in a step: a row of numbers for each image, float64 `(tasks * n, numbers)`, on the device."""
        indices = self.loader.indices(step)
        columns = [indices.flatten()[:, None]]
        if self.augmentation is not None:
            loader, (height, width) = self.loader, self.images.shape[-2:]
            random = np.random.default_rng([loader.seed, step, loader.batch_size])  # the tasks have the numbers below
            draws = self.augmentation.draw(loader.batch_size * indices.shape[1], height, width, random)
            own = draws.unflatten(0, (loader.batch_size, -1))[loader.rank :: loader.world_size]
            columns.append(own.flatten(0, 1))
        return to_device(torch.cat(columns, 1).double(), self.device)

    def forward(self, drawn: Tensor) -> Tensor:
        """The images of a step, uint8 `(tasks * n, channels, height, width)`, task by task and class by class.

        Args:
            drawn: what `draw` returned.
        """
        images = self.images[drawn[:, 0].long()]
        return images if self.augmentation is None else self.augmentation(images, drawn[:, 1:])

    def batch(self, step: int) -> Tensor:
        """The images of a step, uint8 `(tasks, ways * (shots + queries), channels, height, width)`."""
        return self(self.draw(step)).unflatten(0, tuple(self.labels.shape))

    def split(self, features: Tensor) -> Episode:
        """Split the features of a batch, `(tasks, ways * (shots + queries), d)`, into support and query."""
        parts = []
        for values in (features, self.labels):
            by_class = values.unflatten(1, (self.ways, -1))
            parts += [by_class[:, :, : self.shots].flatten(1, 2), by_class[:, :, self.shots :].flatten(1, 2)]
        support, query, support_labels, query_labels = parts
        return Episode(support, support_labels, query, query_labels)


def taskset(data: ImageSet, *, ways: int, samples: int) -> Taskset:
    """learn2learn's way to the same episodes: `taskset(...).sample()` is a task's images and labels.

    Args:
        data: the classes and images to draw from.
        ways: classes of a task.
        samples: images a class, support and query together.

    Raises:
        MissingDependencyError: learn2learn is not installed.
    """
    require_version("learn2learn", "learn2learn", "0.2", "0.3", extra="learn2learn", needed_by="taskset")
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
