"""Meta-train a backbone through a head, then evaluate every head on unseen classes.

python -m benchmarks.train                                                       # scikit-learn's digits: minutes
python -m benchmarks.train --config benchmarks/configs/conv4/cifar-fs_ridge.yaml --data-root DIR
"""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import shutil
import time
import warnings
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pandas
import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import ModelCheckpoint, Timer
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console
from torch import Tensor, nn

import convexheads as ch
from benchmarks import report
from benchmarks.callbacks import ProgressBar, StepSeeds, Validation
from benchmarks.data import ImageSet, augmentation, join, load
from benchmarks.options import Options
from convexheads.episodes import embed, evaluate
from convexheads.integrations.lightning import EpisodicDataModule, EpisodicModule
from convexheads.pretrained import make_head, make_untrained, save_pretrained

HEADS = ("svm", "ridge", "prototypes")
"""The heads that every run evaluates."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says when a disk, a quota or a file is full."""

LIGHTNING_NOISE = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # its own call into PyTorch
    r"You defined a `validation_step` but have no `val_dataloader`",  # `Validation` has its own way
    r"Checkpoint directory .* exists and is not empty",  # as it should when resuming
)


class Pixels(nn.Module):
    """No backbone at all: uint8 images (n, channels, height, width) as rows of numbers from 0 to 1.

    What a head reaches on these is the level that a backbone has to beat.
    """

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) / 255


def episodes(data: ImageSet, options: Options) -> EpisodicDataModule:
    """The training episodes of a run, shared out among its processes."""
    return EpisodicDataModule(
        (data.images, data.labels),
        ways=options.ways,
        shots=options.shots,
        queries=options.queries,
        tasks=options.tasks,
        steps=options.total_steps,
        seed=options.seed,
        augment=augmentation(options.augmentation, (data.images.shape[-2], data.images.shape[-1])),
        classes=data.classes,
    )


def train(options: Options, data: dict[str, ImageSet], module: EpisodicModule) -> float:
    """Train the module's backbone and head; returns the seconds that took, over all resumptions.

    Where there are validation classes, the module ends with the weights that were best on them.
    """
    output = options.folder
    timer = Timer()
    settings: dict[str, Any] = {"dirpath": str(options.checkpoint.parent), "enable_version_counter": False}
    last = ModelCheckpoint(filename="last", every_n_train_steps=options.checkpoint_every, **settings)
    callbacks = [timer, StepSeeds(options.seed), ProgressBar(refresh_rate=5), last]
    best = None
    if "val" in data:
        best = ModelCheckpoint(
            filename="best",
            monitor="val_accuracy",
            mode="max",
            save_weights_only=True,
            every_n_train_steps=options.validate_every,
            **settings,
        )
        callbacks += [Validation(data["val"], options), best]
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="gpu" if options.device == "cuda" else options.device,
        devices=options.processes,
        precision="bf16-mixed" if options.precision == "bfloat16" else "32-true",
        strategy="ddp" if options.processes > 1 else "auto",
        sync_batchnorm=options.processes > 1 and options.device != "cpu" and torch.cuda.is_available(),
        logger=[CSVLogger(output, flush_logs_every_n_steps=10), TensorBoardLogger(output, name="tensorboard")],
        log_every_n_steps=min(10, options.total_steps),
        callbacks=callbacks,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        for message in LIGHTNING_NOISE:
            warnings.filterwarnings("ignore", message)
        trainer.fit(module, episodes(data["train"], options), ckpt_path=options.checkpoint if options.resume else None)
    trainer.save_checkpoint(options.checkpoint)
    if not trainer.is_global_zero:
        return timer.time_elapsed("train")
    logs = [pandas.read_csv(path) for path in sorted(output.glob("lightning_logs/*/metrics.csv"), key=_log_number)]
    pandas.concat(logs).drop(columns="epoch").groupby("step").last().to_csv(output / "metrics.csv")
    if best is not None and best.best_model_path:
        weights = torch.load(best.best_model_path, weights_only=True, map_location="cpu")
        module.load_state_dict(weights["state_dict"])
    return timer.time_elapsed("train")


def test(options: Options, data: ImageSet, backbones: dict[str, nn.Module]) -> list[report.Row]:
    """Evaluate heads on the features of each backbone: all heads on the first, the trained one's on the others."""
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    labels, rows = data.labels.to(device), []
    for number, (name, backbone) in enumerate(backbones.items()):
        features = embed(backbone.to(device), data.images.to(device))
        for head in [options.head] if number else dict.fromkeys([options.head, *HEADS]):
            for shots in options.test_shots:
                result = evaluate(
                    make_head(head),
                    features,
                    labels,
                    ways=options.ways,
                    shots=shots,
                    queries=options.test_queries,
                    episodes=options.test_episodes,
                    seed=options.seed,
                )
                gap = None if result.gaps is None else result.gaps.max().item()
                rows.append(report.Row(name, head, shots, result.mean, result.interval, result.episodes, gap))
    return rows


def run(options: Options) -> list[report.Row]:
    """Train, evaluate and write everything into the output folder.

    Raises:
        InputError: an option is unusable, or the data is missing.
    """
    start = time.perf_counter()
    if options.threads:
        torch.set_num_threads(options.threads)
        os.environ["OMP_NUM_THREADS"] = str(options.threads)  # or Lightning would set another number for DDP
    provenance = report.provenance()
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # as Lightning tells the processes that it starts
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    if first:
        prepare(options)
    data = load(options.dataset, options.root, progress=True)
    if options.trainval and "val" in data:
        data["train"] = join(data["train"], data.pop("val"))
    pl.seed_everything(options.seed, verbose=False)
    images = data["train"].images
    module = EpisodicModule(
        *make_untrained(options.record(), images),
        ways=options.ways,
        shots=options.shots,
        steps=options.total_steps,
        learning_rate=options.learning_rate,
        schedule=options.schedule,
        weight_decay=options.weight_decay,
        label_smoothing=options.label_smoothing,
    )
    backbones = {"meta-trained": module.backbone, "untrained": deepcopy(module.backbone), "none: pixels": Pixels()}
    training = train(options, data, module)
    if not first:
        return []  # the first process does the rest
    settings = options.record() | {"image_size": images.shape[-1]}
    save_pretrained(options.folder / "model.safetensors", module.backbone, module.head, settings)
    begin = time.perf_counter()
    rows = test(options, data["test"], backbones)
    now = time.perf_counter()
    seconds = {"training": training, "evaluation": now - begin, "all": now - start}
    write(options, rows, {name: round(value, 1) for name, value in seconds.items()}, provenance)
    return rows


def prepare(options: Options) -> None:
    """Make the output folder ready for a new run, or check that it holds the run to resume."""
    folder, config = options.folder, options.folder / "config.yaml"
    if options.resume:
        if not options.checkpoint.is_file() or not config.is_file():
            raise ch.InputError("resume", f"{folder} without a checkpoint", "a folder that an earlier run wrote to")
        try:
            torch.load(options.checkpoint, weights_only=True, map_location="cpu")
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise ch.InputError("resume", f"{options.checkpoint}, damaged: {error}", "a complete checkpoint") from error
        saved, record = yaml.safe_load(config.read_text()), options.record()
        if changed := sorted(name for name in record if record[name] != saved.get(name)):
            raise ch.InputError("resume", f"another value of {', '.join(changed)}", f"the options of {config}")
        return
    if options.checkpoint.is_file():
        if not (folder / "result.json").is_file():
            raise ch.InputError("output", f"{folder}, which holds an unfinished run", "--resume, or another --output")
        (folder / "result.json").unlink()
        for logs in ("lightning_logs", "tensorboard", "checkpoints"):
            shutil.rmtree(folder / logs, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    config.write_text(f"# {options.command()}\n{yaml.safe_dump(options.record(), sort_keys=False)}")


def write(options: Options, rows: list[report.Row], seconds: dict[str, float], provenance: dict[str, Any]) -> None:
    """Write the result as JSON, table and picture, and show the table."""
    title = f"{options.dataset}: {options.ways}-way, {options.backbone} meta-trained through {options.head}"
    note = (
        f"Mean over {options.test_episodes:,} episodes of unseen classes, the same for every line, "
        f"± half the 95 % confidence interval."
    )
    result = {"command": options.command(), "results": [row._asdict() for row in rows], "seconds": seconds}
    result |= {"seed": options.seed, **provenance}
    (options.folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    details = report.details(options.command(), options.seed, seconds, provenance)
    table = report.table(rows, title)
    console = Console()
    console.print(table, note, f"All of it is in {options.folder}", sep="\n")
    report.write_markdown(table, f"{note}\n\n{details}", options.folder / "result.md")
    report.draw(rows, title, options.ways, options.folder / "accuracy.png")


def _log_number(path: Path) -> int:
    return int(path.parent.name.removeprefix("version_"))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see `Options`."""
    description, _, _ = (__doc__ or "").partition("\n")
    try:
        options = Options.parse(arguments, prog="python -m benchmarks.train", description=description)
        try:
            run(options)
        except OSError as error:
            if error.errno not in FULL:
                raise
            hope = "; the last checkpoint is whole, --resume continues from it" if options.checkpoint.is_file() else ""
            got = f"{options.folder} ({error.strerror})"
            raise ch.InputError("output", got, f"room to write{hope}") from error
    except ch.InputError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
