"""Training episodes, assembled on the training device; and the same kind of episodes by learn2learn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.data.augmentation import augmentation
from benchmarks.data.images import ImageSet
from convexheads.episodes import Episode
from convexheads.integrations import require_version
from convexheads.loader import EpisodeLoader

if TYPE_CHECKING:
    from learn2learn.data import Taskset


class Episodes(nn.Module):
    """A batch of episodes for each training step, gathered and augmented on the training device.

    All images are stored on the device, and `forward` gathers and augments a batch there. `draw` draws the random
    numbers on the CPU, and they depend on the seed and the step only: any device, any number of processes and any
    resumed run sees the same episodes with the same augmentation. Both are asynchronous: they never wait for a GPU.

    Args:
        data: images and labels to draw from.
        ways: classes per episode.
        shots: support images per class.
        queries: query images per class.
        tasks: episodes per step, over all processes.
        seed: of all random numbers.
        augment: one of `AUGMENTATIONS`.
        device: the training device. Default: the CPU.
        rank: the rank of this process. Default 0.
        processes: the number of processes that share each step. Default 1.

    Attributes:
        labels: the same for every step, class by class, int64 `(tasks, ways * (shots + queries))`.

    Raises:
        InputError: a size is not positive, the augmentation is unknown, or `data` has too few classes or images.
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
            rank=rank,
            world_size=processes,
        )
        labels = torch.arange(ways, device=self.device).repeat_interleave(shots + queries)
        self.register_buffer("labels", labels.expand(tasks // processes, -1), persistent=False)

    def draw(self, step: int) -> Tensor:
        """The random numbers of a step: one row per image, float64 `(tasks * n, numbers)`, on the device."""
        indices = self.loader.indices(step)
        columns = [indices.flatten()[:, None]]
        if self.augmentation is not None:
            loader, (height, width) = self.loader, self.images.shape[-2:]
            # The loader draws tasks with the numbers below `batch_size`.
            random = np.random.default_rng([loader.seed, step, loader.batch_size])
            draws = self.augmentation.draw(loader.batch_size * indices.shape[1], height, width, random)
            local = draws.unflatten(0, (loader.batch_size, -1))[loader.rank :: loader.world_size]
            columns.append(local.flatten(0, 1))
        return _to_device(torch.cat(columns, 1).double(), self.device)

    def forward(self, drawn: Tensor) -> Tensor:
        """The images of a step, uint8 `(tasks * n, channels, height, width)`, task by task and class by class.

        Args:
            drawn: what `draw` returned.
        """
        images = self.images.index_select(0, drawn[:, 0].long())  # on the CPU ten times as fast as by brackets
        return images if self.augmentation is None else self.augmentation(images, drawn[:, 1:])

    def split(self, features: Tensor) -> Episode:
        """Split the features of a batch, `(tasks, ways * (shots + queries), d)`, into support and query."""
        parts = []
        for values in (features, self.labels):
            by_class = values.unflatten(1, (self.ways, -1))
            parts += [by_class[:, :, : self.shots].flatten(1, 2), by_class[:, :, self.shots :].flatten(1, 2)]
        support, query, support_labels, query_labels = parts
        return Episode(support, support_labels, query, query_labels)


def _to_device(value: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the CPU to a device without waiting for the device."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


def taskset(data: ImageSet, *, ways: int, samples: int) -> Taskset:
    """Tasks by learn2learn, of the same distribution: `taskset(...).sample()` is a task's images and labels.

    Args:
        data: the classes and images to draw from.
        ways: classes per task.
        samples: images per class, support and query together.

    Raises:
        MissingDependencyError: learn2learn is not installed.
    """
    require_version("learn2learn", "learn2learn>=0.2,<0.3", extra="learn2learn", needed_by="taskset")
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
