"""Meta-train a backbone through a head, then evaluate every head on unseen classes.

python -m benchmarks.train                                                       # scikit-learn's digits: minutes
python -m benchmarks.train --config benchmarks/configs/conv4/cifar-fs_ridge.yaml --data-root DIR
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import shlex
import shutil
import time
import warnings
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import jsonargparse
import pandas
import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import ModelCheckpoint, Timer
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console
from torch import nn

import convexheads as ch
from benchmarks import report
from benchmarks.callbacks import ProgressBar, StepSeeds, Validation
from benchmarks.data import AUGMENTATIONS, DATASETS, EpisodeLoader, ImageSet, join, load
from benchmarks.models import HEADS, Pixels, make_backbone, make_head, save_weights
from convexheads.episodes import embed, evaluate
from convexheads.integrations.lightning import EpisodicModule

LIGHTNING_NOISE = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # its own call into PyTorch
    r"Checkpoint directory .* exists and is not empty",  # as it should when resuming
)


@dataclass(frozen=True)
class Options:
    """The options of a run, each with the text that `--help` shows."""

    dataset: Annotated[Literal[DATASETS], "digits need nothing, the others DATA_ROOT"] = "digits"
    data_root: Annotated[Path | None, "folder of the data, only read; else variable CONVEXHEADS_DATA"] = None
    backbone: Annotated[Literal["conv4", "r2d2", "resnet12", "wrn28"], "network to train"] = "conv4"
    head: Annotated[
        Literal["svm", "svm-smoothed", "ridge", "prototypes"],
        "head to train through; svm, ridge and prototypes are evaluated in any case",
    ] = "svm"
    steps: Annotated[int | None, "training steps; unless given 60 for digits, 5000 for the others"] = None
    tasks: Annotated[int, "episodes of a training step"] = 8
    ways: Annotated[int, "classes of an episode, in training and in evaluation"] = 5
    shots: Annotated[int, "support images a class in training and validation"] = 5
    queries: Annotated[int, "query images a class in training"] = 6
    learning_rate: Annotated[float, "of SGD with Nesterov momentum 0.9, at the start"] = 0.1
    schedule: Annotated[Literal["cosine", "paper", "constant"], "how the learning rate falls"] = "cosine"
    weight_decay: Annotated[float, "of SGD"] = 5e-4
    label_smoothing: Annotated[float, "of the cross-entropy"] = 0.0
    augment: Annotated[Literal[AUGMENTATIONS] | None, "of training images; unless given none for digits"] = None
    trainval: Annotated[bool, "train on the validation classes too, and take the last weights"] = False
    validate_every: Annotated[int, "training steps between validations, the best of which chooses the weights"] = 500
    validation_episodes: Annotated[int, "episodes of a validation"] = 500
    validation_shots: Annotated[int, "support images a class in validation"] = 5
    checkpoint_every: Annotated[int, "training steps between checkpoints"] = 100
    test_shots: Annotated[tuple[int, ...], "support images a class in evaluation, as in [1,5]"] = (1, 5)
    test_queries: Annotated[int, "query images a class in evaluation and validation"] = 15
    test_episodes: Annotated[int, "episodes of the evaluation, the same ones for every head"] = 2000
    seed: Annotated[int, "of the weights and of every draw"] = 0
    threads: Annotated[int | None, "processor threads; PyTorch's choice unless given"] = None
    device: Annotated[Literal["auto", "cpu", "cuda"], "where to compute"] = "auto"
    processes: Annotated[int, "processes that share every training step, one a device"] = 1
    output: Annotated[Path | None, "folder for checkpoints and results; runs/DATASET-HEAD unless given"] = None
    resume: Annotated[bool, "continue the unfinished run in the output folder"] = False

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            for number in value if isinstance(value, tuple) else (value,):
                if name in ("seed", "weight_decay", "label_smoothing"):
                    if number < 0:
                        raise ch.InputError(name, number, "0 or more")
                elif isinstance(number, int | float) and not isinstance(number, bool) and number <= 0:
                    raise ch.InputError(name, number, "more than 0")

    @property
    def total_steps(self) -> int:
        return self.steps or (60 if self.dataset == "digits" else 5000)

    @property
    def augmentation(self) -> str:
        return self.augment or ("none" if self.dataset == "digits" else "flip-crop")

    @property
    def root(self) -> Path | None:
        root = self.data_root or os.environ.get("CONVEXHEADS_DATA")
        return Path(root).expanduser() if root else None

    @property
    def folder(self) -> Path:
        return self.output or Path("runs") / f"{self.dataset}_{self.backbone}_{self.head}"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / "last.ckpt"

    def record(self) -> dict[str, Any]:
        """What shapes the result, ready for YAML: no path of this machine, nothing of the resumption."""
        record = asdict(self) | {"steps": self.total_steps, "augment": self.augmentation}
        for name in ("data_root", "output", "resume", "threads", "device", "processes"):
            del record[name]
        return record | {"test_shots": list(self.test_shots)}

    def record_of_dataset(self) -> dict[str, Any]:
        """What goes without saying once the data set is known."""
        return {name: self.record()[name] for name in ("dataset", "steps", "augment")}

    def command(self) -> str:
        """The command that repeats the run, with DIR for the folder of the data."""
        words = ["python", "-m", "benchmarks.train"]
        if self.dataset != "digits":
            words += ["--dataset", self.dataset, "--data-root", "DIR"]
        plain = Options().record() | replace(self, steps=None, augment=None).record_of_dataset()
        for name, value in self.record().items():
            if value != plain[name]:
                words += ["--" + name.replace("_", "-"), str(value).replace(" ", "")]
        return shlex.join(words)


class Episodes(pl.LightningDataModule):
    """The training episodes of a run, shared out among its processes."""

    def __init__(self, data: ImageSet, options: Options) -> None:
        super().__init__()
        self.data, self.options = data, options

    def train_dataloader(self) -> EpisodeLoader:
        assert self.trainer is not None
        return EpisodeLoader(
            self.data,
            ways=self.options.ways,
            samples=self.options.shots + self.options.queries,
            tasks=self.options.tasks,
            steps=self.options.total_steps,
            seed=self.options.seed,
            augment=self.options.augmentation,
            rank=self.trainer.global_rank,
            processes=self.trainer.world_size,
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
        strategy="ddp" if options.processes > 1 else "auto",
        logger=[CSVLogger(output, flush_logs_every_n_steps=10), TensorBoardLogger(output, name="tensorboard")],
        log_every_n_steps=min(10, options.total_steps),
        callbacks=callbacks,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        for message in LIGHTNING_NOISE:
            warnings.filterwarnings("ignore", message)
        trainer.fit(module, Episodes(data["train"], options), ckpt_path=options.checkpoint if options.resume else None)
    trainer.save_checkpoint(options.checkpoint)
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
    provenance = report.provenance()
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    prepare(options)
    data = load(options.dataset, options.root, progress=True)
    if options.trainval and "val" in data:
        data["train"] = join(data["train"], data.pop("val"))
    pl.seed_everything(options.seed, verbose=False)
    head = make_head(options.head, learn_scale=True)
    module = EpisodicModule(
        make_backbone(options.backbone, data["train"].images),
        head,
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
    save_weights(module, options.record(), options.folder / "model.safetensors")
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
    parser = jsonargparse.ArgumentParser(prog="python -m benchmarks.train", description=description)
    parser.add_argument("--config", action="config", help="read options from a YAML file, such as a run's config.yaml")
    kinds, annotated = get_type_hints(Options), get_type_hints(Options, include_extras=True)
    for each in fields(Options):
        kind: dict[str, Any] = {"type": kinds[each.name]}
        if kinds[each.name] is bool:
            kind = {"action": "store_true"}
        (text,) = annotated[each.name].__metadata__
        parser.add_argument("--" + each.name.replace("_", "-"), default=each.default, help=text, **kind)
    values = parser.parse_args(arguments)
    try:
        run(Options(**{each.name: values[each.name] for each in fields(Options)}))
    except ch.InputError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
