"""Meta-training with PyTorch Lightning 2: a backbone and a head, trained on episodes.

Needs the package `pytorch_lightning`, whose classes are not those of `lightning.pytorch`: learn2learn builds on it too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, distributed, nn, optim

from convexheads import storage
from convexheads.episodes import split_task
from convexheads.errors import InputError, SolverError
from convexheads.heads import ClassificationHead
from convexheads.integrations import require
from convexheads.loader import EpisodeLoader
from convexheads.training import (
    SCHEDULES,
    EpisodeLoss,
    OnFailure,
    episode_loss,
    refuse,
    tasks_with_bad_values,
    where,
)

require(
    "pytorch_lightning",
    "pytorch-lightning",
    "2",
    "3",
    extra="lightning",
    needed_by="convexheads.integrations.lightning",
)

import pytorch_lightning as pl
from pytorch_lightning.plugins.io import TorchCheckpointIO

_log = logging.getLogger(__name__)


class _Step(NamedTuple):
    """Where a training stands: the step, counted from 0 over all passes, and this process among the others."""

    number: int
    rank: int
    processes: int


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

    A step fails if its loss or a gradient is not finite, or if the head could not be fitted (`SolverError`, or
    `InputError` for features that are not finite). Then `on_failure` says what happens, in all processes alike: the
    gradient of a failed step is NaN, and the reduction of gradients brings that to every process.

    - "raise": the error names the step and, where they can be told apart, the tasks.
    - "skip": parameters, the optimizer's state and the backbone's buffers, such as the statistics of BatchNorm, stay as
      they were before the step. It counts as taken all the same: the learning rate and the episodes go on. With
      gradient accumulation, the batches that would have made this step are all left out. A line in the log of the
      logger "convexheads.integrations.lightning" and an entry in `failures` say which step, which tasks and why, and
      "skipped" is logged, the number of such steps so far.
    - "stop": likewise, and the training ends after this step, as by Lightning's `EarlyStopping`: a checkpoint that is
      saved then holds what there was before the step.

    Steps count from 0 over all passes, and tasks from 0 over all processes, as `EpisodeLoader` shares them out. So the
    loader of the training draws the episodes again after `loader.load_state_dict({"step": step})`.

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
        on_failure: what happens when a step fails, "raise" (default), "skip" or "stop". What a task does that is not
            certified is a matter of the head's solver: with "warn" or "return" it counts, and is no failure.

    Attributes:
        failures: the steps that were skipped, in order, each a dictionary of "step", "tasks" (all of the step, if they
            can't be told apart) and "cause". Checkpoints keep them.

    Raises:
        InputError: no such schedule or `on_failure`, or a label smoothing out of range.

    Example:
        With `batches` a list of such pairs, `loader = DataLoader(batches, batch_size=None)`, then
        `Trainer(max_epochs=1).fit(EpisodicModule(backbone, SVMHead(), ways=5, shots=5, steps=len(loader)), loader)`
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: ClassificationHead,
        *,
        ways: int,
        shots: int,
        steps: int,
        learning_rate: float = 0.1,
        schedule: str = "cosine",
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        label_smoothing: float = 0.0,
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__()
        if schedule not in SCHEDULES:
            raise InputError("schedule", f"one of {', '.join(SCHEDULES)}", repr(schedule))
        if not 0 <= label_smoothing < 1:
            raise InputError("label_smoothing", "a number from 0 to below 1", label_smoothing)
        if on_failure not in get_args(OnFailure):
            raise InputError("on_failure", f"one of {', '.join(get_args(OnFailure))}", repr(on_failure))
        self.backbone = backbone
        self.head = head
        self.ways, self.shots, self.steps = ways, shots, steps
        self.learning_rate, self.momentum, self.weight_decay = learning_rate, momentum, weight_decay
        self.schedule, self.label_smoothing, self.on_failure = schedule, label_smoothing, on_failure
        self.failures: list[dict[str, Any]] = []
        self._failed: dict[str, Any] | None = None  # this process's, in the step that is under way
        self._before: dict[str, Tensor] | None = None  # the buffers as they were before it

    def forward(self, samples: Tensor) -> Tensor:
        """Features of samples.

        Args:
            samples: `(m, *sample)`.

        Returns:
            `(m, d)`.
        """
        return self.backbone(samples)

    def training_step(self, batch: Sequence[Tensor], batch_index: int) -> Tensor:
        """The loss of a batch of episodes, a scalar `()`; logs it with what the class says.

        Args:
            batch: samples `(*tasks, n, *sample)` and labels `(*tasks, n)`.
            batch_index: counts as the step where there is no trainer.

        Returns:
            The loss `()`. Of a step that failed, and with another `on_failure` than "raise", it is NaN.

        Raises:
            InputError: labels that are unusable, or a class with too few samples; or the step failed, and
                `on_failure="raise"`.
            SolverError: likewise, an episode could not be solved (see the solver's `on_failure`).
        """
        if self.on_failure != "raise" and self._before is None:
            self._before = {name: value.clone() for name, value in self.named_buffers()}
        features, error = self._features(batch), None
        try:
            loss, metrics, logits = self._episodes(features, batch[1])
            if loss.isfinite():
                self.log_dict(metrics, prog_bar=True, batch_size=batch[1].shape[:-1].numel())
                return loss
            cause, tasks = f"a loss of {loss.item()}", _unusable(batch[1], batch[0], features, logits)
        except InputError as unusable:
            if not (tasks := _unusable(batch[1], batch[0], features)):
                raise  # not the values
            cause, error = str(unusable), unusable
        except SolverError as unsolved:
            solution = unsolved.solution
            tasks = [] if solution is None else (~solution.converged).flatten().nonzero().flatten().tolist()
            cause, error = str(unsolved), unsolved
        step = self._step(batch_index)
        tasks = [step.rank + task * step.processes for task in tasks or range(batch[1].shape[:-1].numel())]
        self._failed = self._failed or {"step": step.number, "tasks": tasks, "cause": cause}
        if self.on_failure == "raise":
            refuse(self._failed, error)
        # Through the backbone, where other processes may wait for this one, and straight to every parameter.
        return torch.nan * sum(
            (value.sum() for value in (features, *self.parameters()) if value.requires_grad), features.new_zeros(())
        )

    def on_before_optimizer_step(self, optimizer: optim.Optimizer) -> None:
        """Does as `on_failure` says if the gradients are not finite, which all processes see alike.

        Args:
            optimizer: whose step it is. Without gradients, it takes none.

        Raises:
            InputError: a gradient is not finite, and `on_failure="raise"`.
        """
        own, before, self._failed, self._before = self._failed, self._before, None, None
        gradients = {name: value.grad for name, value in self.named_parameters() if value.grad is not None}
        if gradients and not torch.stack([gradient.isfinite().all() for gradient in gradients.values()]).all():
            found: list[Any] = [own]
            if self.trainer.world_size > 1:
                found = [None] * self.trainer.world_size
                distributed.all_gather_object(found, own)
            failures = [each for each in found if each is not None]
            if not failures and getattr(self.trainer.precision_plugin, "scaler", None) is not None:
                return  # float16 has overflowed, which is what the scaler is there for
            if not failures:
                name = next(name for name, gradient in gradients.items() if not gradient.isfinite().all())
                failures = [{"step": self._step(0).number, "tasks": [], "cause": f"the gradient of {name}"}]
            self._fail(failures, before or {}, optimizer)
        if self.on_failure == "skip":
            self.log("skipped", float(len({failure["step"] for failure in self.failures})))

    def _fail(self, failures: list[dict[str, Any]], before: dict[str, Tensor], optimizer: optim.Optimizer) -> None:
        if self.on_failure == "raise":
            refuse(failures[0])
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, value in self.named_buffers():
                if name in before:
                    value.copy_(before[name])
        self.failures += failures
        for failure in failures if self.trainer.is_global_zero else ():
            does = "the training stops before" if self.on_failure == "stop" else "skipped"
            _log.warning("%s %s (%s)", does, where(failure), failure["cause"])
        if self.on_failure == "stop":
            self.trainer.should_stop = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Puts `failures` into a checkpoint.

        Args:
            checkpoint: as Lightning makes it.
        """
        checkpoint["failures"] = [dict(failure) for failure in self.failures]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes `failures` from a checkpoint, where there are any.

        Args:
            checkpoint: as Lightning reads it.
        """
        self.failures = [dict(failure) for failure in checkpoint.get("failures", [])]

    def _step(self, batch_index: int) -> _Step:
        if self._trainer is None:
            return _Step(batch_index, 0, 1)
        trainer = self.trainer
        return _Step(trainer.fit_loop.epoch_loop.total_batch_idx, trainer.global_rank, trainer.world_size)

    def validation_step(self, batch: Sequence[Tensor], batch_index: int) -> None:
        """Logs "val_loss" and "val_accuracy"; Lightning has the backbone in evaluation mode.

        Args:
            batch: as in `training_step`, `(*tasks, n, *sample)` and `(*tasks, n)`.
            batch_index: not used.
        """
        self._log_evaluation("val", batch)

    def test_step(self, batch: Sequence[Tensor], batch_index: int) -> None:
        """Logs "test_loss" and "test_accuracy"; Lightning has the backbone in evaluation mode.

        Args:
            batch: as in `training_step`, `(*tasks, n, *sample)` and `(*tasks, n)`.
            batch_index: not used.
        """
        self._log_evaluation("test", batch)

    def _log_evaluation(self, part: str, batch: Sequence[Tensor]) -> None:
        _, metrics, _ = self._episodes(self._features(batch), batch[1])
        values = {f"{part}_{name}": metrics[name] for name in ("loss", "accuracy")}
        self.log_dict(values, prog_bar=True, batch_size=batch[1].shape[:-1].numel(), sync_dist=True)

    def _features(self, batch: Sequence[Tensor]) -> Tensor:
        samples, labels = batch
        features = self(samples.flatten(0, labels.ndim - 1)).unflatten(0, labels.shape)
        # Of a trainer with mixed precision: logits are as precise as features.
        return features.float() if features.dtype.itemsize < 4 else features

    def _episodes(self, features: Tensor, labels: Tensor) -> EpisodeLoss:
        episode = split_task(features, labels, shots=self.shots)
        return episode_loss(self.head, episode, ways=self.ways, label_smoothing=self.label_smoothing)

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


def _unusable(labels: Tensor, *values: Tensor) -> list[int]:
    """The tasks with values that are not finite, in the first of several tensors `(*tasks, ...)` that has any."""
    found = (tasks_with_bad_values(each, labels.ndim - 1) for each in values)
    return next(filter(None, found), [])


class WholeCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are complete or not there, and refused when they are damaged, for `Trainer(plugins=...)`.

    Lightning on its own writes to the system's folder for temporary files and moves the file to its place. If that is
    on another disk, a training that is killed while the file is copied has lost its last good checkpoint; and a file
    with altered bytes is read as if nothing were wrong. Here a file gets its name when all of it is on the disk, and
    its checksums are compared before it is read. Nothing is unpickled. For paths of this machine's file system.

    Example:
        `Trainer(plugins=[WholeCheckpointIO()])`, then `trainer.fit(module, data, ckpt_path="last.ckpt")`
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint in the place of the last one, if there is one.

        Args:
            checkpoint: tensors, numbers, text and containers of them; anything else is written, but can't be read.
            path: of the file.
            storage_options: not used.

        Raises:
            OSError: it can't be written; the file that was there is unchanged.
        """
        content, path = BytesIO(), Path(path)
        torch.save(checkpoint, content)
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.write(path, content.getbuffer())

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint that this class, or Lightning's own, wrote.

        Args:
            path: of the file.
            map_location: not used: tensors come on the CPU, from where Lightning moves them.
            weights_only: not used: it is always true.

        Returns:
            The checkpoint.

        Raises:
            InputError: there is no such file, it is damaged, or it holds objects.
        """
        expected = "a complete checkpoint of tensors, numbers and text"
        try:
            checkpoint = storage.load_torch(Path(path))
            if not isinstance(checkpoint, dict):
                raise TypeError(f"it holds a {type(checkpoint).__name__}")
        except (OSError, TypeError, ValueError) as error:
            raise InputError("checkpoint", expected, f"{path} ({error})") from error
        return checkpoint


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
        workers: processes that draw and augment training batches ahead. Default 0, none.

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
        workers: int = 0,
    ) -> None:
        super().__init__()
        self.parts = {name: _read(name, part) for name, part in (("train", train), ("val", val), ("test", test))}
        self.sizes: dict[str, Any] = {"ways": ways, "shots": shots, "queries": queries, "tasks": tasks, "seed": seed}
        self.steps, self.augment, self.classes, self.workers = steps, augment, classes, workers
        self._step, self._train = 0, None
        for name in ("val", "test"):  # Lightning goes by whether there is such a method
            if self.parts[name] is not None:
                setattr(self, f"{name}_dataloader", partial(self._loader, name, steps=val_steps, fixed=True))

    def train_dataloader(self) -> EpisodeLoader:
        """Training episodes, from where `load_state_dict` says; of several processes, this one's share.

        Raises:
            InputError: as `EpisodeLoader`.
        """
        settings: dict[str, Any] = {"augment": self.augment, "classes": self.classes, "workers": self.workers}
        self._train = self._loader("train", steps=self.steps, **settings)
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
    expected = "a file of torch.save((samples, labels), path)"
    try:
        samples, labels = storage.load_torch(Path(part))
        if not isinstance(samples, Tensor) or not isinstance(labels, Tensor):
            raise TypeError("it holds something else than two tensors")
    except (OSError, TypeError, ValueError) as error:
        raise InputError(name, expected, f"{part} ({error})") from error
    return samples, labels
