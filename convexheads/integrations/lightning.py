"""Meta-training with PyTorch Lightning: a backbone and a head, trained on episodes.

Needs the package `pytorch_lightning`, whose classes are not those of `lightning.pytorch`: learn2learn builds on it too.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn, optim
from torch.nn import functional

from convexheads.episodes import split_task
from convexheads.errors import MissingDependencyError
from convexheads.heads.base import Head

try:
    import pytorch_lightning as pl
    from torchmetrics.functional.classification import multiclass_accuracy
except ImportError as error:
    raise MissingDependencyError("pytorch_lightning", "lightning", "EpisodicModule") from error


class EpisodicModule(pl.LightningModule):
    """Trains a backbone so that a head fitted to an episode's support set classifies its query set.

    The loss is the cross-entropy of the query logits (Eq. 12 of Lee et al., "Meta-Learning with Differentiable Convex
    Optimization", CVPR 2019), the mean over the queries of all the episodes of a batch. Support and query images pass
    the backbone in one call, hence share their batch statistics; the paper's code passes them in two.

    A batch is a pair of samples, shape (*tasks, n, *sample), and labels, integers 0 to ways - 1 of shape (*tasks, n),
    in any order, with more than `shots` samples of every class: the first `shots` of each are its support.

    Logs "loss" and "accuracy" (0 to 1) of the queries and, where the head solves iteratively, "gap": the largest
    relative duality gap that its solutions certify. To validate or test, embed the images once and use
    `convexheads.episodes.evaluate`.

    Args:
        backbone: maps samples (m, *sample) to features (m, d).
        head: fitted to every episode; its learnable parameters train along.
        ways: classes of an episode.
        shots: support samples a class.
        steps: training steps after which the learning rate has fallen to zero.
        learning_rate: of SGD with Nesterov momentum; falls along one cosine.
        momentum: of SGD.
        weight_decay: on every parameter.

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
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.ways, self.shots, self.steps = ways, shots, steps
        self.learning_rate, self.momentum, self.weight_decay = learning_rate, momentum, weight_decay

    def forward(self, samples: Tensor) -> Tensor:
        """The features (m, d) of samples (m, *sample)."""
        return self.backbone(samples)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        samples, labels = batch
        features = self(samples.flatten(0, labels.ndim - 1)).unflatten(0, labels.shape)
        episode = split_task(features, labels, shots=self.shots)
        fitted = self.head.fit(episode.support, episode.support_labels, ways=self.ways)
        logits, targets = fitted(episode.query).flatten(0, -2), episode.query_labels.flatten()
        loss = functional.cross_entropy(logits, targets)
        metrics = {"loss": loss, "accuracy": multiclass_accuracy(logits, targets, self.ways, average="micro")}
        if fitted.solution is not None:
            metrics["gap"] = fitted.solution.gap.max()
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
        schedule = optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
