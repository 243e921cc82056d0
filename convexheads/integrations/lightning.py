"""Meta-training with PyTorch Lightning 2: a backbone and a head, trained on episodes.

Needs the package `pytorch_lightning`, whose classes are not those of `lightning.pytorch`: learn2learn builds on it too.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.nn import functional

from convexheads.episodes import split_task
from convexheads.errors import InputError
from convexheads.heads.base import Head
from convexheads.integrations import require
from convexheads.loader import EpisodeLoader

require(
    "pytorch_lightning",
    "pytorch-lightning",
    "2",
    "3",
    extra="lightning",
    needed_by="convexheads.integrations.lightning",
)
require("torchmetrics", "torchmetrics", "1", "2", extra="lightning", needed_by="convexheads.integrations.lightning")

import pytorch_lightning as pl
from torchmetrics.functional.classification import multiclass_accuracy


def _paper(progress: float) -> float:
    return next(factor for end, factor in ((1 / 3, 1.0), (2 / 3, 0.06), (5 / 6, 0.012), (2, 0.0024)) if progress < end)


SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "paper": _paper,
    "constant": lambda _: 1.0,
}
"""By what to multiply the learning rate, from the share of the training that is done.

"cosine" falls to zero along one cosine, "constant" stays. "paper" is that of Lee et al. 2019 (Section 4.1), whose 0.1,
0.006, 0.0012 and 0.00024 change after 20, 40 and 50 of 60 epochs.
"""


class EpisodicModule(pl.LightningModule):
    """Trains a backbone so that a head fitted to an episode's support set classifies its query set.

    The loss is the cross-entropy of the query logits (Eq. 12 of Lee et al., "Meta-Learning with Differentiable Convex
    Optimization", CVPR 2019), the mean over the queries of all the episodes of a batch. What differs: support and query
    images pass the backbone in one call, hence share their batch statistics; the published code passes them in two.

    A batch is a pair of samples, shape (*tasks, n, *sample), and labels, integers 0 to ways - 1 of shape (*tasks, n),
    in any order, with more than `shots` samples of every class: the first `shots` of each are its support.

    Logs "loss" and "accuracy" (0 to 1) of the queries and, where the head solves iteratively, "gap", the largest
    relative duality gap that its solutions certify, "certified", the share of tasks whose gap is within the solver's
    tolerance, and "iterations", the mean over tasks, where the solver tells. Validation and test batches are episodes
    too; to evaluate on thousands of them, embed the images once and use `convexheads.episodes.evaluate`.

    Args:
        backbone: maps samples (m, *sample) to features (m, d).
        head: fitted to every episode; its learnable parameters train along.
        ways: classes of an episode.
        shots: support samples a class.
        steps: training steps of the whole schedule.
        learning_rate: of SGD with Nesterov momentum, at the start. Default 0.1.
        schedule: how it changes, one of `SCHEDULES`; "cosine", the default, falls to zero along one cosine.
        momentum: of SGD. Default 0.9.
        weight_decay: on every parameter. Default 5e-4.
        label_smoothing: of the cross-entropy, from 0 (default) up to 1; the paper has 0.1 on miniImageNet with
            ResNet-12.

    Raises:
        InputError: no such schedule, or a label smoothing out of range.

    Example:
        With `batches` a list of such pairs, `loader = DataLoader(batches, batch_size=None)`, then
        `Trainer(max_epochs=1).fit(EpisodicModule(backbone, SVMHead(), ways=5, shots=5, steps=len(loader)), loader)`
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: Head,
        *,
        ways: int,
        shots: int,
        steps: int,
        learning_rate: float = 0.1,
        schedule: str = "cosine",
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if schedule not in SCHEDULES:
            raise InputError("schedule", repr(schedule), f"one of {', '.join(SCHEDULES)}")
        if not 0 <= label_smoothing < 1:
            raise InputError("label_smoothing", label_smoothing, "a number from 0 to below 1")
        self.backbone = backbone
        self.head = head
        self.ways, self.shots, self.steps = ways, shots, steps
        self.learning_rate, self.momentum, self.weight_decay = learning_rate, momentum, weight_decay
        self.schedule, self.label_smoothing = schedule, label_smoothing

    def forward(self, samples: Tensor) -> Tensor:
        """Features of samples.

        Args:
            samples: `(m, *sample)`.

        Returns:
            `(m, d)`. What the backbone raises passes through.
        """
        return self.backbone(samples)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        """The loss of a batch of episodes, a scalar `()`; logs it with what the class says.

        Args:
            batch: samples `(*tasks, n, *sample)` and labels `(*tasks, n)`.
            batch_index: not used.

        Raises:
            InputError: labels or features that are unusable, or a class with too few samples.
            SolverError: an episode could not be solved (see the solver's `on_failure`).
        """
        loss, metrics, tasks = self._episodes(batch)
        self.log_dict(metrics, prog_bar=True, batch_size=tasks)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Logs "val_loss" and "val_accuracy"; Lightning has the backbone in evaluation mode.

        Args:
            batch: as in `training_step`, `(*tasks, n, *sample)` and `(*tasks, n)`, and so are the errors.
            batch_index: not used.
        """
        self._log_evaluation("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        """Logs "test_loss" and "test_accuracy"; Lightning has the backbone in evaluation mode.

        Args:
            batch: as in `training_step`, `(*tasks, n, *sample)` and `(*tasks, n)`, and so are the errors.
            batch_index: not used.
        """
        self._log_evaluation("test", batch)

    def _log_evaluation(self, part: str, batch: tuple[Tensor, Tensor]) -> None:
        _, metrics, tasks = self._episodes(batch)
        values = {f"{part}_{name}": metrics[name] for name in ("loss", "accuracy")}
        self.log_dict(values, prog_bar=True, batch_size=tasks, sync_dist=True)

    def _episodes(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor], int]:
        """The loss, what is logged, and the number of episodes."""
        samples, labels = batch
        features = self(samples.flatten(0, labels.ndim - 1)).unflatten(0, labels.shape)
        if features.dtype.itemsize < 4:
            features = features.float()  # of a trainer with mixed precision: logits are as precise as features
        episode = split_task(features, labels, shots=self.shots)
        fitted = self.head.fit(episode.support, episode.support_labels, ways=self.ways)
        logits, targets = fitted(episode.query).flatten(0, -2), episode.query_labels.flatten()
        loss = functional.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        metrics = {"loss": loss, "accuracy": multiclass_accuracy(logits, targets, self.ways, average="micro")}
        if fitted.solution is not None:
            metrics["gap"] = fitted.solution.gap.max()
            metrics["certified"] = fitted.solution.converged.float().mean()
            if fitted.solution.iterations is not None:
                metrics["iterations"] = fitted.solution.iterations.float().mean()
        return loss, metrics, labels.shape[:-1].numel()

    def configure_optimizers(self) -> Any:
        """SGD with Nesterov momentum on all parameters, and the schedule, step by step."""
        optimizer = optim.SGD(
            self.parameters(),
            lr=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.momentum > 0,
        )
        # The trainer's estimate of the steps would set up the data before a checkpoint's loader state is restored.
        factor = SCHEDULES[self.schedule]
        schedule = optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step / self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class EpisodicDataModule(pl.LightningDataModule):
    """Episodes for `EpisodicModule`, drawn by `EpisodeLoader` from samples in memory and shared out among processes.

    Each part is samples `(n, *sample)` and labels `(n,)`, or a file that `torch.save((samples, labels), path)` wrote,
    which is read without unpickling anything else (for `LightningCLI`, say).

    Args:
        train: the part to train on, `(n, *sample)` and `(n,)`, or a file.
        val: likewise the part to validate on, `(n, *sample)` and `(n,)`, whose classes are others; None (default) for
            none.
        test: likewise the part to test on, `(n, *sample)` and `(n,)`; None (default) for none.
        ways: classes of an episode. Default 5.
        shots: support samples a class; what `EpisodicModule` has. Default 5.
        queries: query samples a class. Default 15.
        tasks: episodes of a step, over all processes. Default 8.
        steps: training steps of an epoch. Default 1,000.
        val_steps: steps of a validation, the same episodes every time; and of a test. Default 25.
        seed: of all the draws. Default 0.
        augment: a random transform of a training sample; None (default) for none.
        classes: names of the training classes for error messages; None (default): their labels.

    Raises:
        InputError: a file that can't be read. What `EpisodeLoader` raises comes when a loader is asked for.
    """

    def __init__(
        self,
        train: tuple[Tensor, Tensor] | str,
        val: tuple[Tensor, Tensor] | str | None = None,
        test: tuple[Tensor, Tensor] | str | None = None,
        *,
        ways: int = 5,
        shots: int = 5,
        queries: int = 15,
        tasks: int = 8,
        steps: int = 1000,
        val_steps: int = 25,
        seed: int = 0,
        augment: Callable[[Tensor], Tensor] | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.parts = {name: _read(name, part) for name, part in (("train", train), ("val", val), ("test", test))}
        self.sizes: dict[str, Any] = {"ways": ways, "shots": shots, "queries": queries, "tasks": tasks, "seed": seed}
        self.steps, self.augment, self.classes = steps, augment, classes
        self._step, self._train = 0, None
        for name in ("val", "test"):  # Lightning goes by whether there is such a method
            if self.parts[name] is not None:
                setattr(self, f"{name}_dataloader", partial(self._loader, name, steps=val_steps, fixed=True))

    def train_dataloader(self) -> EpisodeLoader:
        """Training episodes, from where `load_state_dict` says; of several processes, this one's share.

        Raises:
            InputError: as `EpisodeLoader`.
        """
        self._train = self._loader("train", steps=self.steps, augment=self.augment, classes=self.classes)
        self._train.load_state_dict({"step": self._step})
        return self._train

    def state_dict(self) -> dict[str, int]:
        """The position of the training episodes: Lightning restores that of a loader within an epoch only."""
        return {"step": self._step if self._train is None else self._train.step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue from the position of a checkpoint.

        Args:
            state_dict: what `state_dict` returned.

        Raises:
            KeyError: it is something else.
        """
        self._step = state_dict["step"]

    def _loader(self, name: str, **settings: Any) -> EpisodeLoader:
        part, trainer = self.parts[name], self.trainer
        assert part is not None
        if trainer is not None:
            settings |= {"rank": trainer.global_rank, "processes": trainer.world_size}
        return EpisodeLoader(*part, **self.sizes, **settings)


def _read(name: str, part: tuple[Tensor, Tensor] | str | None) -> tuple[Tensor, Tensor] | None:
    if not isinstance(part, str):
        return part
    wanted = "a file of torch.save((samples, labels), path)"
    try:
        samples, labels = torch.load(part, weights_only=True)
    except (OSError, RuntimeError, EOFError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise InputError(name, f"{part} ({error})", wanted) from error
    return samples, labels
