"""Meta-training with PyTorch Lightning: a backbone and a head, trained on episodes.

Needs the package `pytorch_lightning`, whose classes are not those of `lightning.pytorch`: learn2learn builds on it too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn, optim
from torch.nn import functional

from convexheads.episodes import split_task
from convexheads.errors import InputError, MissingDependencyError
from convexheads.heads.base import Head

try:
    import pytorch_lightning as pl
    from torchmetrics.functional.classification import multiclass_accuracy
except ImportError as error:
    raise MissingDependencyError("pytorch_lightning", "lightning", "EpisodicModule") from error


def _paper(progress: float) -> float:
    return next(factor for end, factor in ((1 / 3, 1.0), (2 / 3, 0.06), (5 / 6, 0.012), (2, 0.0024)) if progress < end)


SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "paper": _paper,
    "constant": lambda _: 1.0,
}
"""By what to multiply the learning rate, from the share of the training that is done. "paper" is that of Lee et al.
2019 (Section 4.1), whose 0.1, 0.006, 0.0012 and 0.00024 change after 20, 40 and 50 of 60 epochs."""


class EpisodicModule(pl.LightningModule):
    """Trains a backbone so that a head fitted to an episode's support set classifies its query set.

    The loss is the cross-entropy of the query logits (Eq. 12 of Lee et al., "Meta-Learning with Differentiable Convex
    Optimization", CVPR 2019), the mean over the queries of all the episodes of a batch. Support and query images pass
    the backbone in one call, hence share their batch statistics; the paper's code passes them in two.

    A batch is a pair of samples, shape (*tasks, n, *sample), and labels, integers 0 to ways - 1 of shape (*tasks, n),
    in any order, with more than `shots` samples of every class: the first `shots` of each are its support.

    Logs "loss" and "accuracy" (0 to 1) of the queries and, where the head solves iteratively, "gap", the largest
    relative duality gap that its solutions certify, "certified", the share of tasks whose gap is within the solver's
    tolerance, and "iterations", the mean over tasks, where the solver tells. To validate or test, embed the images once
    and use `convexheads.episodes.evaluate`.

    Args:
        backbone: maps samples (m, *sample) to features (m, d).
        head: fitted to every episode; its learnable parameters train along.
        ways: classes of an episode.
        shots: support samples a class.
        steps: training steps of the whole schedule.
        learning_rate: of SGD with Nesterov momentum, at the start.
        schedule: how it changes, one of `SCHEDULES`; "cosine", the default, falls to zero along one cosine.
        momentum: of SGD.
        weight_decay: on every parameter.
        label_smoothing: of the cross-entropy, from 0 (default) to 1; the paper has 0.1 on miniImageNet with ResNet-12.

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
            raise InputError("label_smoothing", label_smoothing, "from 0 up to 1")
        self.backbone = backbone
        self.head = head
        self.ways, self.shots, self.steps = ways, shots, steps
        self.learning_rate, self.momentum, self.weight_decay = learning_rate, momentum, weight_decay
        self.schedule, self.label_smoothing = schedule, label_smoothing

    def forward(self, samples: Tensor) -> Tensor:
        """The features (m, d) of samples (m, *sample)."""
        return self.backbone(samples)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
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
        tasks = labels.shape[:-1].numel()
        self.log_dict(metrics, prog_bar=True, batch_size=tasks)
        return loss

    def configure_optimizers(self) -> Any:
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
