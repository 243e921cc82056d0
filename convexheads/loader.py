"""Training episodes, drawn from samples in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Integer
from torch import Tensor

from convexheads.errors import InputError, check_counts, check_flag, check_seed
from convexheads.precision import is_dense, is_of_integers, kind


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

    Raises:
        InputError: a size is not positive, an argument is of another type, samples and labels don't go together, there
            are too few classes, a class has too few samples, or episodes cannot be shared out evenly.

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
    ) -> None:
        check_counts(ways=ways, shots=shots, queries=queries, tasks=tasks, steps=steps, processes=processes)
        check_seed(seed)
        check_flag("fixed", fixed)
        if isinstance(rank, bool) or not isinstance(rank, int) or rank not in range(processes):
            raise InputError("rank", repr(rank), f"an integer from 0 to processes - 1 = {processes - 1}")
        if augment is not None and not callable(augment):
            raise InputError("augment", repr(augment), "a function from a sample to a sample, or None")
        if not is_dense(samples):
            raise InputError("samples", kind(samples), "a tensor, (n, *sample)")
        if not is_of_integers(labels):
            raise InputError("labels", kind(labels), "a tensor of integers")
        labels = labels.cpu().long()
        if labels.shape != samples.shape[:1] or not labels.ndim:
            got = f"shapes {tuple(samples.shape)} and {tuple(labels.shape)}"
            raise InputError("samples, labels", got, "(n, *sample) and (n,)")
        present = labels.unique().tolist()
        self.members = [(labels == label).nonzero().flatten().numpy() for label in present]
        if len(self.members) < ways:
            raise InputError("ways", ways, f"at most the {len(self.members)} classes of the data")
        if classes is not None and (not isinstance(classes, Sequence) or len(classes) != len(present)):
            raise InputError("classes", repr(classes), f"a name for each of the {len(present)} classes, or None")
        self.each = shots + queries
        if short := [number for number, own in enumerate(self.members) if len(own) < self.each]:
            name, count = (classes or present)[short[0]], len(self.members[short[0]])
            wanted = f"at least {self.each}, for support and query of an episode"
            raise InputError("labels", f"{count} samples of class {name!r}", wanted)
        if tasks % processes:
            raise InputError("tasks", tasks, f"a multiple of the {processes} processes")
        self.samples, self.ways, self.tasks, self.steps, self.seed = samples, ways, tasks, steps, seed
        self.augment, self.fixed, self.rank, self.processes = augment, fixed, rank, processes
        self.step = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        labels = torch.arange(self.ways).repeat_interleave(self.each)
        if self.fixed:
            self.step = 0
        for _ in range(self.steps - self.step % self.steps):
            tasks = [self._episode(task) for task in range(self.rank, self.tasks, self.processes)]
            self.step += 1
            yield torch.stack(tasks), labels.expand(len(tasks), -1)

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

    def _episode(self, task: int) -> Tensor:
        import numpy as np

        draw = np.random.default_rng([self.seed, self.step, task])
        classes = draw.choice(len(self.members), self.ways, replace=False)
        chosen = [draw.choice(self.members[label], self.each, replace=False) for label in classes]
        samples = self.samples[torch.from_numpy(np.concatenate(chosen))]
        if self.augment is None:
            return samples
        with torch.random.fork_rng(devices=[]):  # which torchvision draws from
            torch.manual_seed(int(draw.integers(2**63)))
            return torch.stack([self.augment(sample) for sample in samples])
