"""Training episodes, drawn from samples in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Integer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from convexheads._validation import (
    check_bool,
    check_positive_ints,
    check_seed,
    describe,
    describe_type,
    is_dense,
    is_integer_tensor,
)
from convexheads.errors import InputError

if TYPE_CHECKING:
    from numpy.random import Generator


class EpisodeLoader:
    """A batch of episodes for every training step.

    An episode depends on the seed, the step and its place in the step alone. So a training that is resumed
    (`state_dict` holds the position, Lightning keeps it in its checkpoints), or spread over several processes, sees
    what one that runs alone and without a break would see. Classes and samples are drawn without replacement, as by
    learn2learn's tasksets. A pass has `steps` batches, and the next pass draws others.

    Yields samples `(tasks, ways * (shots + queries), *sample)` and labels, int64, `(tasks, ways * (shots + queries))`,
    class by class, for `split_task` or `EpisodicModule`. Needs NumPy.

    Args:
        samples: `(n, *sample)`, of any dtype, such as images as uint8.
        labels: their classes, `(n,)`, any integers.
        ways: classes of an episode. Default 5.
        shots: support samples a class. Default 5.
        queries: query samples a class. Default 15.
        tasks: episodes of a step, over all processes. Default 8.
        steps: batches of a pass. Default 1,000.
        seed: of all the draws. Default 0.
        augment: a random transform, applied to every sample anew; what it draws from PyTorch depends on the seed too.
            None (default) for none.
        classes: names for the error messages, in the order of the sorted labels; None (default): the labels.
        fixed: whether every pass has the same episodes, as for validation. Default False.
        rank: which of the processes this one is; it gets every `processes`-th episode. Default 0.
        processes: how many there are. Default 1.
        workers: processes of this one that draw and augment the next batches meanwhile, by PyTorch's `DataLoader`; the
            batches are the same. Default 0, none: worth it where augmenting takes as long as training does.

    Raises:
        InputError: a size is not positive, an argument is of another type, samples and labels don't go together, there
            are too few classes, a class has too few samples, episodes cannot be shared out evenly, or there are workers
            for samples on another device than the CPU.

    Example:
        `for samples, labels in EpisodeLoader(images, classes, ways=5, shots=1): ...`
    """

    def __init__(
        self,
        samples: Tensor,
        labels: Integer[Tensor, " n"],
        *,
        ways: int = 5,
        shots: int = 5,
        queries: int = 15,
        tasks: int = 8,
        steps: int = 1000,
        seed: int = 0,
        augment: Callable[[Tensor], Tensor] | None = None,
        classes: Sequence[str] | None = None,
        fixed: bool = False,
        rank: int = 0,
        processes: int = 1,
        workers: int = 0,
    ) -> None:
        check_positive_ints(ways=ways, shots=shots, queries=queries, tasks=tasks, steps=steps, processes=processes)
        check_seed(seed)
        check_bool("fixed", fixed)
        if isinstance(rank, bool) or not isinstance(rank, int) or rank not in range(processes):
            raise InputError("rank", f"an integer from 0 to processes - 1 = {processes - 1}", repr(rank))
        if augment is not None and not callable(augment):
            raise InputError("augment", "a function from a sample to a sample, or None", repr(augment))
        if not is_dense(samples):
            raise InputError("samples", "a tensor, (n, *sample)", describe_type(samples))
        if not is_integer_tensor(labels):
            raise InputError("labels", "a tensor of integers", describe_type(labels))
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
            raise InputError("workers", "a number of processes, 0 for none", describe(workers))
        if workers and samples.device.type != "cpu":
            raise InputError("samples", "the CPU, or workers=0", f"device {samples.device}")
        labels = labels.cpu().long()
        if labels.shape != samples.shape[:1] or not labels.ndim:
            got = f"shapes {tuple(samples.shape)} and {tuple(labels.shape)}"
            raise InputError("samples, labels", "(n, *sample) and (n,)", got)
        present = labels.unique().tolist()
        self.members = [(labels == label).nonzero().flatten().numpy() for label in present]
        if len(self.members) < ways:
            raise InputError("ways", f"at most the {len(self.members)} classes of the data", ways)
        if classes is not None and (not isinstance(classes, Sequence) or len(classes) != len(present)):
            raise InputError("classes", f"a name for each of the {len(present)} classes, or None", repr(classes))
        self.each = shots + queries
        if short := [number for number, own in enumerate(self.members) if len(own) < self.each]:
            name, count = (classes or present)[short[0]], len(self.members[short[0]])
            expected = f"at least {self.each}, for support and query of an episode"
            raise InputError("labels", expected, f"{count} samples of class {name!r}")
        if tasks % processes:
            raise InputError("tasks", f"a multiple of the {processes} processes", tasks)
        self.samples, self.ways, self.tasks, self.steps, self.seed = samples, ways, tasks, steps, seed
        self.augment, self.fixed, self.rank, self.processes = augment, fixed, rank, processes
        self.workers = workers
        self.step = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        labels = torch.arange(self.ways).repeat_interleave(self.each)
        if self.fixed:
            self.step = 0
        pass_of_steps = range(self.step, self.step + self.steps - self.step % self.steps)
        for samples in self._ahead(pass_of_steps) if self.workers else map(self._batch, pass_of_steps):
            self.step += 1
            yield samples, labels.expand(len(samples), -1)

    def _ahead(self, steps: range) -> Iterable[Tensor]:
        # With a generator of its own, or it would draw from that of the training.
        generator, settings = torch.Generator(), {"batch_size": None, "num_workers": self.workers}
        return DataLoader(_Batches(self._batch), sampler=steps, generator=generator, **settings)

    def _batch(self, step: int) -> Tensor:
        return torch.stack([self._episode(step, task) for task in range(self.rank, self.tasks, self.processes)])

    def state_dict(self) -> dict[str, int]:
        """The position, for a checkpoint: the number of steps taken."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a position.

        Args:
            state: what `state_dict` returned.

        Raises:
            KeyError: it is something else.
        """
        self.step = state["step"]

    def indices(self, step: int) -> Integer[Tensor, "tasks n"]:
        """Which samples the episodes of a step have, for samples that lie elsewhere, such as on a GPU.

        Args:
            step: counted from 0 over all passes.

        Returns:
            Indices into the samples, int64 on the CPU, `(tasks, ways * (shots + queries))`, class by class; of several
                processes, this one's tasks.
        """
        return torch.stack([self._draw(step, task)[0] for task in range(self.rank, self.tasks, self.processes)])

    def _draw(self, step: int, task: int) -> tuple[Tensor, Generator]:
        """The samples of an episode, and the generator for what else is drawn for it."""
        import numpy as np

        draw = np.random.default_rng([self.seed, step, task])
        classes = draw.choice(len(self.members), self.ways, replace=False)
        chosen = [draw.choice(self.members[label], self.each, replace=False) for label in classes]
        return torch.from_numpy(np.concatenate(chosen)), draw

    def _episode(self, step: int, task: int) -> Tensor:
        chosen, draw = self._draw(step, task)
        samples = self.samples[chosen]
        if self.augment is None:
            return samples
        with torch.random.fork_rng(devices=[]):  # which torchvision draws from
            torch.manual_seed(int(draw.integers(2**63)))
            return torch.stack([self.augment(sample) for sample in samples])


class _Batches(Dataset[Tensor]):
    """The samples of each step, for `DataLoader`."""

    def __init__(self, batch: Callable[[int], Tensor]) -> None:
        self.batch = batch

    def __getitem__(self, step: int) -> Tensor:
        return self.batch(step)
