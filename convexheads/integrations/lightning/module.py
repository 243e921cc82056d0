"""Meta-training of a backbone and a head as a `LightningModule`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, get_args

import pytorch_lightning as pl
import torch
from torch import Tensor, distributed, nn, optim

from convexheads import training
from convexheads._validation import check_choice, check_fraction, check_positive_ints, check_real, describe
from convexheads.episodes import split_task
from convexheads.errors import InputError, SolverError
from convexheads.heads import ClassificationHead
from convexheads.heads.base.classification import check_head
from convexheads.hyperparameters import parameter_groups
from convexheads.training import SCHEDULES, EpisodeLoss, OnFailedStep

_log = logging.getLogger("convexheads.integrations.lightning")


class EpisodicModule(pl.LightningModule):
    """Trains a backbone so that a head fitted on an episode's support set classifies its query set.

    The loss is the mean cross-entropy of all queries (Eq. 12 of Lee et al., "Meta-Learning with Differentiable Convex
    Optimization", CVPR 2019). Difference from the reference code: support and query images pass through the
    backbone in one call and share their batch statistics.

    A batch is a pair of samples `(*tasks, n, *sample)` and labels `(*tasks, n)`, integers from 0 to ways - 1, as
    `EpisodeLoader` yields it and `split_task` splits it. Validation and test batches are episodes too.

    The module logs "loss" and "accuracy" (0 to 1) of the queries. If a fit has a `solution`, it also logs "gap"
    (the largest certified relative duality gap), "certified" (the share of tasks whose gap is within the solver's
    tolerance) and "iterations" (their mean over tasks).

    A step fails if its loss or a gradient is not finite, or if the head could not be fitted (`SolverError`, or
    `InputError` for features that are not finite). All processes then apply the policy `on_failed_step`, because
    averaging the gradients spreads NaN to all processes. In validation and tests, errors are raised under any policy.

    - "raise": The error names the step, and also the tasks that failed, if these are known.
    - "skip": Parameters, optimizer state and buffers, such as the statistics of BatchNorm, stay as they were before
      the step, which still counts for the learning rate and the episodes. With gradient accumulation, all batches of
      the step are skipped. A warning from the logger "convexheads.integrations.lightning" and an entry in `failures`
      name the step, the tasks and the cause; the number of skipped steps is logged as "skipped".
    - "stop": The step is skipped too, and training ends with it, as with Lightning's `EarlyStopping`.

    Use it when you train with Lightning; `convexheads.training.episode_loss` is the same loss for a loop of your own.

    Args:
        backbone: The module from samples `(m, *sample)` to features `(m, d)`.
        head: The head, fitted on every episode; its learnable parameters are trained too.
        ways: Number of classes per episode.
        shots: Number of support samples per class.
        total_steps: Number of training steps of the whole schedule; afterward, the learning rate is constant.
        learning_rate: Initial learning rate of SGD with Nesterov momentum.
        schedule: The schedule of the learning rate, one of `SCHEDULES`: "cosine", "paper" or "constant".
        momentum: Momentum of SGD.
        weight_decay: Weight decay of all parameters but `Learnable`s (see `parameter_groups`).
        label_smoothing: Label smoothing, at least 0 and below 1; the paper uses 0.1 for ResNet-12 on miniImageNet.
        on_failed_step: The policy: "raise", "skip" or "stop". A task without a certificate is a failure only if the
            head's solver has `on_failure="raise"`.

    Attributes:
        failures: The skipped steps in order, each a dictionary of "step" (counted from 0 over all epochs), "tasks"
            (counted from 0 over all processes; all tasks of the step, if the cause names no task) and "cause".
            Checkpoints contain them.

    Example:
        `module = EpisodicModule(backbone, SVMHead(), ways=5, shots=5, total_steps=len(loader))`, then
        `Trainer(max_epochs=1).fit(module, loader)`, where `loader` is an `EpisodeLoader`
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: ClassificationHead,
        *,
        ways: int,
        shots: int,
        total_steps: int,
        learning_rate: float = 0.1,
        schedule: str = "cosine",
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        label_smoothing: float = 0.0,
        on_failed_step: OnFailedStep = "raise",
    ) -> None:
        super().__init__()
        if not isinstance(backbone, nn.Module):
            raise InputError("backbone", "a module", describe(backbone))
        check_choice("schedule", schedule, SCHEDULES)
        check_choice("on_failed_step", on_failed_step, get_args(OnFailedStep))
        self.backbone, self.head = backbone, check_head(head)
        self.ways, self.shots, self.total_steps = check_positive_ints(ways=ways, shots=shots, total_steps=total_steps)
        self.learning_rate = check_real("learning_rate", learning_rate, positive=True, allow_zero=True)
        self.weight_decay = check_real("weight_decay", weight_decay, positive=True, allow_zero=True)
        self.momentum = check_fraction("momentum", momentum)
        self.label_smoothing = check_fraction("label_smoothing", label_smoothing)
        self.schedule, self.on_failed_step = schedule, on_failed_step
        self.failures: list[dict[str, Any]] = []
        self._failed: dict[str, Any] | None = None  # the failure of this process in the current step
        self._before: dict[str, Tensor] | None = None  # the buffers before the current step

    def forward(self, samples: Tensor) -> Tensor:
        """Compute the features `(m, d)` of `samples` `(m, *sample)`."""
        return self.backbone(samples)

    def training_step(self, batch: Sequence[Tensor], batch_index: int) -> Tensor:
        """Compute and log the loss of a `batch` of episodes; NaN if the step failed and the policy is not "raise".

        Without a trainer, `batch_index` is the number of the step.
        """
        if self.on_failed_step != "raise" and self._before is None:
            self._before = {name: value.clone() for name, value in self.named_buffers()}
        features, error, task_dims = self._features(batch), None, batch[1].ndim - 1
        try:
            loss, metrics, logits = self._episodes(features, batch[1])
            if loss.isfinite():
                self.log_dict(metrics, prog_bar=True, batch_size=batch[1].shape[:-1].numel())
                return loss
            cause, tasks = f"a loss of {loss.item()}", training.non_finite_tasks(task_dims, batch[0], features, logits)
        except InputError as unusable:
            if not (tasks := training.non_finite_tasks(task_dims, batch[0], features)):
                raise  # the error has a cause other than the values
            cause, error = str(unusable), unusable
        except SolverError as unsolved:
            solution = unsolved.solution
            tasks = [] if solution is None else (~solution.converged).flatten().nonzero().flatten().tolist()
            cause, error = str(unsolved), unsolved
        rank, world_size = (0, 1) if self._trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        tasks = [rank + task * world_size for task in tasks or range(batch[1].shape[:-1].numel())]
        failure = {"step": self._step(batch_index), "tasks": tasks, "cause": cause}
        if self.on_failed_step == "raise":
            training.raise_failure(failure, error)
        self._failed = self._failed or failure
        # The gradient passes through the backbone, because other processes may wait for its reduction.
        differentiable = (value for value in (features, *self.parameters()) if value.requires_grad)
        return torch.nan * sum((value.sum() for value in differentiable), features.new_zeros(()))

    def on_before_optimizer_step(self, optimizer: optim.Optimizer) -> None:
        """Apply the policy, in all processes alike, if the reduced gradients for the `optimizer` are not finite."""
        own, before, self._failed, self._before = self._failed, self._before, None, None
        gradients = {name: value.grad for name, value in self.named_parameters() if value.grad is not None}
        if gradients and not torch.stack([gradient.isfinite().all() for gradient in gradients.values()]).all():
            found: list[Any] = [own]
            if self.trainer.world_size > 1:
                found = [None] * self.trainer.world_size
                distributed.all_gather_object(found, own)
            failures = [each for each in found if each is not None]
            if not failures and getattr(self.trainer.precision_plugin, "scaler", None) is not None:
                return  # float16 has overflowed, which the scaler handles
            if not failures:
                name = next(name for name, gradient in gradients.items() if not gradient.isfinite().all())
                failures = [{"step": self._step(0), "tasks": [], "cause": f"the gradient of {name}"}]
            self._fail(failures, before or {}, optimizer)
        if self.on_failed_step == "skip":
            self.log("skipped", float(len({failure["step"] for failure in self.failures})))

    def _fail(self, failures: list[dict[str, Any]], before: dict[str, Tensor], optimizer: optim.Optimizer) -> None:
        if self.on_failed_step == "raise":
            training.raise_failure(failures[0])
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, value in self.named_buffers():
                if name in before:
                    value.copy_(before[name])
        self.failures += failures
        for failure in failures if self.trainer.is_global_zero else ():
            action = "training ends at" if self.on_failed_step == "stop" else "skipped"
            _log.warning("%s %s (%s)", action, training.format_step(failure), failure["cause"])
        if self.on_failed_step == "stop":
            self.trainer.should_stop = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add `failures` to a `checkpoint`."""
        checkpoint["failures"] = [dict(failure) for failure in self.failures]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore `failures` from a `checkpoint`."""
        self.failures = [dict(failure) for failure in checkpoint.get("failures", [])]

    def _step(self, batch_index: int) -> int:
        return batch_index if self._trainer is None else self.trainer.fit_loop.epoch_loop.total_batch_idx

    def validation_step(self, batch: Sequence[Tensor], batch_index: int) -> None:
        """Log "val_loss" and "val_accuracy" of a `batch`, in evaluation mode; `batch_index` is not used."""
        self._log_evaluation("val", batch)

    def test_step(self, batch: Sequence[Tensor], batch_index: int) -> None:
        """Log "test_loss" and "test_accuracy" of a `batch`, in evaluation mode; `batch_index` is not used."""
        self._log_evaluation("test", batch)

    def _log_evaluation(self, part: str, batch: Sequence[Tensor]) -> None:
        metrics = self._episodes(self._features(batch), batch[1]).metrics
        values = {f"{part}_{name}": metrics[name] for name in ("loss", "accuracy")}
        self.log_dict(values, prog_bar=True, batch_size=batch[1].shape[:-1].numel(), sync_dist=True)

    def _features(self, batch: Sequence[Tensor]) -> Tensor:
        samples, labels = batch
        return self(samples.flatten(0, labels.ndim - 1)).unflatten(0, labels.shape)

    def _episodes(self, features: Tensor, labels: Tensor) -> EpisodeLoss:
        episode = split_task(features, labels, shots=self.shots)
        return training.episode_loss(self.head, episode, ways=self.ways, label_smoothing=self.label_smoothing)

    def configure_optimizers(self) -> Any:
        """Return SGD with Nesterov momentum on the groups of `parameter_groups`, and the schedule per step."""
        groups, momentum = parameter_groups(self, weight_decay=self.weight_decay), self.momentum
        optimizer = optim.SGD(groups, lr=self.learning_rate, momentum=momentum, nesterov=momentum > 0)
        # `trainer.estimated_stepping_batches` would set up the data before the loader's state is restored.
        factor = SCHEDULES[self.schedule]
        schedule = optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step / self.total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
