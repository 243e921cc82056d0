"""What is done between the steps of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint, TQDMProgressBar

from benchmarks.data import ImageSet
from benchmarks.options import Options
from convexheads.episodes import embed, evaluate
from convexheads.integrations.lightning import EpisodicModule
from convexheads.storage import write


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
        pl_module.log("val_accuracy", result.mean, logger=False, sync_dist=True)
        for logger in trainer.loggers:  # at every validation, whatever else is logged when; steps count from 0 there
            value = trainer.callback_metrics["val_accuracy"].item()
            logger.log_metrics({"val_accuracy": value}, step=trainer.global_step - 1)


class Log(pl.Callback):
    """Writes what is logged every so many steps, and with every validation, into metrics.csv.

    Checkpoints keep it, with the options of the run. So what is resumed has every step once, whenever it was killed,
    and a checkpoint of another run is known as such.
    """

    def __init__(self, options: Options, every: int) -> None:
        self.options, self.every = options, every
        self.rows: dict[int, dict[str, float]] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        assert isinstance(pl_module, EpisodicModule)
        step, values = trainer.global_step - 1, dict(trainer.callback_metrics)
        validation = values.pop("val_accuracy", None)
        row = {}
        if trainer.global_step % self.every == 0:
            failed = any(failure["step"] == step for failure in pl_module.failures)  # it has no loss of its own
            row = {name: value.item() for name, value in values.items() if name == "skipped" or not failed}
        if validation is not None and trainer.global_step % self.options.validate_every == 0:
            row["val_accuracy"] = validation.item()
        if row:
            self.rows[step] = row

    def on_save_checkpoint(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            self.write(self.options.folder / "metrics.csv")

    def write(self, path: Path) -> None:
        """Write a line for each step that has values, with the steps in order."""
        rows = pandas.DataFrame.from_dict(self.rows, orient="index").sort_index().sort_index(axis="columns")
        write(path, rows.to_csv(index_label="step").encode())

    def state_dict(self) -> dict[str, Any]:
        return {"options": self.options.record(), "rows": dict(self.rows)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = dict(state_dict["rows"])


class SaveWhenStopped(Checkpoint):
    """Writes a checkpoint in the middle of the pass if something stops it, so that it can be resumed from there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if trainer.should_stop:
            trainer.save_checkpoint(self.path)


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
