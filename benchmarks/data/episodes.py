"""Training episodes, drawn from images in memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from learn2learn.data import MetaDataset, Taskset
from learn2learn.data.transforms import ConsecutiveLabels, FusedNWaysKShots, LoadData, RemapLabels
from torch import Tensor
from torchvision.transforms import v2

from benchmarks.data.images import ImageSet
from convexheads.errors import InputError

AUGMENTATIONS = ("none", "flip-crop", "flip-crop-jitter")
"""What is done to training images; the last is Section 4.1 of Lee et al. 2019."""


def augmentation(name: str, size: tuple[int, int]) -> v2.Transform | None:
    """The random transform of that name for images of that height and width; None for none.

    Flips to left and right, crops from a frame of zeros an eighth of the image wide, and changes of brightness,
    contrast and saturation by up to 40 % (the strength is that of the authors' published code).

    Raises:
        InputError: no such augmentation.
    """
    if name not in AUGMENTATIONS:
        raise InputError("augment", repr(name), f"one of {', '.join(AUGMENTATIONS)}")
    if name == "none":
        return None
    jitter = [v2.ColorJitter(0.4, 0.4, 0.4)] if name.endswith("jitter") else []
    return v2.Compose([v2.RandomCrop(size, padding=size[0] // 8), *jitter, v2.RandomHorizontalFlip()])


class EpisodeLoader:
    """A batch of episodes for every training step.

    An episode depends on the seed, the step and its place in the step alone. So a training that is resumed
    (`state_dict` holds the position, Lightning keeps it in its checkpoints), or spread over several processes, sees
    what one that runs alone and without a break would see. Classes and images are drawn without replacement, as by
    learn2learn's tasksets.
    Yields images, uint8 (tasks, ways * samples, channels, height, width), and labels, int64 (tasks, ways * samples).

    Args:
        data: the classes and images to draw from.
        ways: classes of an episode.
        samples: images a class, support and query together.
        tasks: episodes of a step, over all processes.
        steps: how many batches there are.
        seed: of all the draws.
        augment: one of `AUGMENTATIONS`, anew for every image.
        rank: which of the processes this one is; it gets every `processes`-th episode.
        processes: how many there are.

    Raises:
        InputError: too few classes, a class with too few images, no such augmentation, or episodes that cannot be
            shared out evenly.
    """

    def __init__(
        self,
        data: ImageSet,
        *,
        ways: int,
        samples: int,
        tasks: int,
        steps: int,
        seed: int,
        augment: str = "none",
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.members = [(data.labels == label).nonzero().flatten().numpy() for label in range(len(data.classes))]
        if len(self.members) < ways:
            raise InputError("ways", ways, f"at most the {len(self.members)} classes of the data")
        if short := [label for label, own in enumerate(self.members) if len(own) < samples]:
            name, count = data.classes[short[0]], len(self.members[short[0]])
            raise InputError("data", f"{count} images of class {name!r}", f"{samples}, support and query of an episode")
        if tasks % processes:
            raise InputError("tasks", tasks, f"a multiple of the {processes} processes")
        self.images, self.transform = data.images, augmentation(augment, tuple(data.images.shape[-2:]))
        self.ways, self.samples, self.tasks, self.steps, self.seed = ways, samples, tasks, steps, seed
        self.rank, self.processes = rank, processes
        self.step = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        labels = torch.arange(self.ways).repeat_interleave(self.samples)
        while self.step < self.steps:
            tasks = [self._episode(task) for task in range(self.rank, self.tasks, self.processes)]
            self.step += 1
            yield torch.stack(tasks), labels.expand(len(tasks), -1)

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]

    def _episode(self, task: int) -> Tensor:
        draw = np.random.default_rng([self.seed, self.step, task])
        classes = draw.choice(len(self.members), self.ways, replace=False)
        chosen = [draw.choice(self.members[label], self.samples, replace=False) for label in classes]
        images = self.images[torch.from_numpy(np.concatenate(chosen))]
        if self.transform is None:
            return images
        with torch.random.fork_rng(devices=[]):  # which torchvision draws from
            torch.manual_seed(int(draw.integers(2**63)))
            return torch.stack([self.transform(image) for image in images])


def taskset(data: ImageSet, *, ways: int, samples: int) -> Taskset:
    """learn2learn's way to the same episodes: `taskset(...).sample()` is a task's images and labels.

    Args:
        data: the classes and images to draw from.
        ways: classes of a task.
        samples: images a class, support and query together.
    """
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
