"""Training episodes, sampled from a tensor in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Integer
from torch import Tensor
from torch.utils.data import DataLoader

from convexheads import _validation
from convexheads._sampling import check_labels, group_by_class
from convexheads.errors import InputError, MissingDependencyError

if TYPE_CHECKING:
    from numpy.random import Generator


class EpisodeLoader:
    """An iterable over batches of episodes, one batch per training step.

    An episode depends only on the seed, the step and its index in the batch, even if a training run is resumed or
    spread over several processes. Classes and samples are drawn without replacement, as in learn2learn's tasksets.

    Each pass over the loader is an epoch of `steps_per_epoch` batches. A new pass starts a new epoch with new episodes,
    even if the previous pass was interrupted. `state_dict` and `load_state_dict`, which Lightning calls, resume within
    an epoch.

    A batch is a pair of samples `(tasks, n, *sample)` and labels `(tasks, n)`, int64 and sorted by class, with
    n = ways * (shots + queries), for `split_task` or `EpisodicModule`. NumPy has to be installed.

    Use it when all samples fit into memory, such as images in uint8.

    Args:
        samples: Samples of any dtype, `(n, *sample)`; a tensor, a NumPy array (not copied if it is writable) or lists.
        labels: The class of each sample, any integers, `(n,)`; a tensor, a NumPy array or a list.
        ways: Number of classes per episode.
        shots: Number of support samples per class.
        queries: Number of query samples per class.
        batch_size: Number of episodes per batch, over all processes.
        steps_per_epoch: Number of batches per epoch.
        seed: Random seed.
        transform: A random transform of a sample, called without autograd. What it draws from PyTorch's CPU generator
            depends on `seed` too.
        resample_each_epoch: Whether each epoch has new episodes. Pass False for validation.
        rank: Rank of this process, which gets every `world_size`-th episode.
        world_size: Number of processes.
        num_workers: Number of worker processes. They pay off if `transform` takes about as long as a training step. The
            number does not change the batches, unless `transform` draws from NumPy or `random`.

    Raises:
        InputError: An argument is unusable: for example, `batch_size` is not a multiple of `world_size`.
        MissingDependencyError: NumPy is not installed.

    Example:
        `for samples, labels in EpisodeLoader(images, classes, ways=5, shots=1): ...`
    """

    def __init__(
        self,
        samples: Tensor | _validation.ArrayLike,
        labels: Integer[Tensor, " n"] | _validation.ArrayLike,
        *,
        ways: int = 5,
        shots: int = 5,
        queries: int = 15,
        batch_size: int = 8,
        steps_per_epoch: int = 1000,
        seed: int = 0,
        transform: Callable[[Tensor], Tensor] | None = None,
        resample_each_epoch: bool = True,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
    ) -> None:
        if find_spec("numpy") is None:
            raise MissingDependencyError("numpy", "", "EpisodeLoader")
        self.ways, shots, queries, self.batch_size, self.steps_per_epoch = _validation.check_positive_ints(
            ways=ways, shots=shots, queries=queries, batch_size=batch_size, steps_per_epoch=steps_per_epoch
        )
        self.seed = _validation.check_seed(seed)
        self.rank, self.world_size = _validation.check_rank(rank, world_size)
        self.resample_each_epoch = _validation.check_bool("resample_each_epoch", resample_each_epoch)
        if transform is not None and not callable(transform):
            raise InputError("transform", "a function from a sample to a sample, or None", repr(transform))
        samples = _validation.check_tensor("samples", samples, "a tensor, (n, *sample)")
        self.num_workers = _check_count("num_workers", num_workers)
        if self.num_workers and samples.device.type != "cpu":
            raise InputError("samples", "a tensor on the CPU, or num_workers=0", f"device {samples.device}")
        labels = check_labels(labels, samples, name="samples", expected="(n, *sample) and (n,)")
        self.samples_per_class = shots + queries
        if self.batch_size % self.world_size:
            raise InputError("batch_size", f"a multiple of world_size={self.world_size}", batch_size)
        self.members = [indices.numpy() for indices in group_by_class(labels, self.ways, self.samples_per_class)]
        self.samples, self.transform = samples, transform
        self.step, self._resume_within_epoch = 0, False

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        steps = self.steps_per_epoch
        epoch, done = divmod(self.step, steps)
        if not self._resume_within_epoch:
            epoch, done = epoch + (done > 0), 0
        self._resume_within_epoch = False
        first = epoch * steps if self.resample_each_epoch else 0
        labels = torch.arange(self.ways).repeat_interleave(self.samples_per_class)
        epoch_steps: Any = range(first + done, first + steps)
        batches: Iterable[Tensor] = map(self._batch, epoch_steps)
        if self.num_workers:
            # From it, the workers seed `random` and NumPy. The default generator is left to the training loop.
            generator = torch.Generator().manual_seed(int(self._draw(first + done, self.rank)[1].integers(2**63)))
            settings: Any = {"collate_fn": self._batch, "num_workers": self.num_workers, "generator": generator}
            batches = DataLoader(epoch_steps, batch_size=None, **settings)
        for step, samples in zip(epoch_steps, batches, strict=True):
            self.step = step + 1 if self.resample_each_epoch else (step + 1) % steps
            yield samples, labels.expand(len(samples), -1)

    def _tasks_of_rank(self) -> range:
        return range(self.rank, self.batch_size, self.world_size)

    @torch.no_grad()
    def _batch(self, step: int) -> Tensor:
        return torch.stack([self._episode(step, task) for task in self._tasks_of_rank()])

    def state_dict(self) -> dict[str, int]:
        """Return the position for a checkpoint: the number of steps taken."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue the next iteration from the position in `state`, which `state_dict` returned."""
        self.step, self._resume_within_epoch = _check_count("step", state.get("step")), True

    def indices(self, step: int) -> Integer[Tensor, "tasks n"]:
        """Return the indices of the samples in the tasks of this process at a `step`.

        Steps count from 0 over all epochs or, with `resample_each_epoch=False`, within an epoch. The indices are int64
        on the CPU, `(tasks, ways * (shots + queries))`. Use them for samples that are stored elsewhere.
        """
        step = _check_count("step", step)
        return torch.stack([self._draw(step, task)[0] for task in self._tasks_of_rank()])

    def _draw(self, step: int, task: int) -> tuple[Tensor, Generator]:
        """Draw the indices of an episode; also return the generator for its further random numbers."""
        import numpy as np

        draw = np.random.default_rng([self.seed, step, task])
        classes = draw.choice(len(self.members), self.ways, replace=False)
        chosen = [draw.choice(self.members[label], self.samples_per_class, replace=False) for label in classes]
        return torch.from_numpy(np.concatenate(chosen)), draw

    def _episode(self, step: int, task: int) -> Tensor:
        chosen, draw = self._draw(step, task)
        samples = self.samples[chosen]
        if self.transform is None:
            return samples
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the default generator
            # `torch.manual_seed` would also seed the GPUs, whose generators are not restored here.
            torch.default_generator.manual_seed(int(draw.integers(2**63)))
            return torch.stack([self.transform(sample) for sample in samples])


def _check_count(name: str, value: object) -> int:
    if (number := _validation.as_integer(value)) is None or number < 0:
        raise InputError(name, "a non-negative integer", _validation.describe(value))
    return number
