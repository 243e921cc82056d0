"""Episodes of a data set in memory, for Lightning's trainer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor

from convexheads._validation import describe_type
from convexheads.errors import InputError
from convexheads.loader import EpisodeLoader


class EpisodicDataModule(pl.LightningDataModule):
    """Episodes for `EpisodicModule`, drawn by `EpisodeLoader` from samples in memory and shared among processes.

    Each data set is a pair of samples `(n, *sample)` and labels `(n,)`, or the path of a file that
    `torch.save((samples, labels), path)` wrote, which is read without unpickling anything else.

    Use it when you train `EpisodicModule` on samples in memory, or from the command line with `LightningCLI`.

    Args:
        train: The data set to train on.
        val: The data set to validate on, with other classes; optional.
        test: The data set to test on; optional.
        eval_steps: Number of steps per validation and per test, which have the same episodes every time.
        ways: See `EpisodeLoader`, also for `shots`, `queries`, `batch_size` and `seed`.
        steps_per_epoch: See `EpisodeLoader`, also for `transform` and `num_workers`; for training only.

    Example:
        `data = EpisodicDataModule((images, classes), ways=5, shots=1)`, then `trainer.fit(module, data)`
    """

    def __init__(
        self,
        train: tuple[Tensor, Tensor] | str | Path,
        val: tuple[Tensor, Tensor] | str | Path | None = None,
        test: tuple[Tensor, Tensor] | str | Path | None = None,
        *,
        ways: int = 5,
        shots: int = 5,
        queries: int = 15,
        batch_size: int = 8,
        steps_per_epoch: int = 1000,
        eval_steps: int = 25,
        seed: int = 0,
        transform: Callable[[Tensor], Tensor] | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        load = partial(EpisodeLoader, ways=ways, shots=shots, queries=queries, batch_size=batch_size, seed=seed)
        self._load_training = partial(
            load, *_read("train", train), steps_per_epoch=steps_per_epoch, transform=transform, num_workers=num_workers
        )
        self._load_training()  # raises now if an argument is unusable, and not only when training starts
        self._state, self._train = {"step": 0}, None
        for name, part in (("val", val), ("test", test)):
            if part is not None:  # an optional method, whose existence Lightning checks
                evaluation = partial(load, *_read(name, part), steps_per_epoch=eval_steps, resample_each_epoch=False)
                evaluation()
                setattr(self, f"{name}_dataloader", partial(self._make_loader, evaluation))

    def train_dataloader(self) -> EpisodeLoader:
        """Return the training episodes of this process, from the position that `load_state_dict` set."""
        previous, self._train = self._train, self._make_loader(self._load_training)
        if previous is not None and self.trainer is not None and self.trainer.current_epoch:
            self._train.step = previous.step  # the trainer reloads the loader during training
        else:
            self._train.load_state_dict(self._state)
        return self._train

    def state_dict(self) -> dict[str, int]:
        """Return the position of the training episodes, which Lightning itself restores only within an epoch."""
        return dict(self._state) if self._train is None else self._train.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue from the position of a checkpoint, which the method `state_dict` returned."""
        self._state = {"step": state_dict["step"]}

    def _make_loader(self, load: Callable[..., EpisodeLoader]) -> EpisodeLoader:
        trainer = self.trainer
        return load() if trainer is None else load(rank=trainer.global_rank, world_size=trainer.world_size)


def _read(name: str, part: object) -> tuple[Tensor, Tensor]:
    expected, got = "two tensors (samples, labels), or a path", describe_type(part)
    if isinstance(part, str | Path):
        expected, got = "a file written by torch.save((samples, labels), path)", str(part)
        try:
            part = torch.load(part, weights_only=True, map_location="cpu")
        except Exception as error:  # damaged files raise many types of errors
            raise InputError(name, expected, f"{got} ({error})") from error
        got += " (it does not contain two tensors)"
    match part:
        case Tensor() as samples, Tensor() as labels:
            return samples, labels
    raise InputError(name, expected, got)
