"""What is done between the steps of a training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import TQDMProgressBar

from benchmarks.data import ImageSet
from convexheads.episodes import embed, evaluate
from convexheads.integrations.lightning import EpisodicModule

if TYPE_CHECKING:
    from benchmarks.train import Options


class StepSeeds(pl.Callback):
    """Makes what a step draws at random (dropout, say) a function of the seed, the process and the step alone.

    So a resumed training needs no state of a generator, on any device.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        sequence = np.random.SeedSequence([self.seed, trainer.global_step, trainer.global_rank])
        torch.manual_seed(int(sequence.generate_state(1)[0]))


class Validation(pl.Callback):
    """Logs the accuracy on validation classes, 0 to 1, every so many steps."""

    def __init__(self, data: ImageSet, options: Options) -> None:
        self.data, self.options = data, options

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        assert isinstance(pl_module, EpisodicModule)
        if trainer.global_step % self.options.validate_every:
            return
        # Every process evaluates its share of the same episodes; Lightning averages.
        result = evaluate(
            pl_module.head,
            embed(pl_module.backbone, self.data.images.to(pl_module.device), progress=False),
            self.data.labels.to(pl_module.device),
            ways=self.options.ways,
            shots=self.options.validation_shots,
            queries=self.options.test_queries,
            episodes=self.options.validation_episodes,
            seed=self.options.seed,
            part=(trainer.global_rank, trainer.world_size),
            progress=False,
        )
        self.log("val_accuracy", result.mean, sync_dist=True)


class ProgressBar(TQDMProgressBar):
    """Lightning's bar without the words that say nothing in a training of one pass."""

    def on_train_start(self, *arguments: Any) -> None:
        super().on_train_start(*arguments)
        self.on_train_epoch_start(*arguments)  # Lightning leaves that out when it resumes

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description("meta-training")

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}
