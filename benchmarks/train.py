"""Meta-train a backbone through a head, then evaluate every head on unseen classes.

python -m benchmarks.train                                                       # scikit-learn's digits: minutes
python -m benchmarks.train --dataset glyphs                                      # letters of many scripts: minutes
python -m benchmarks.train --config benchmarks/configs/conv4/cifar-fs_ridge.yaml --data-root DIR
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from importlib.util import find_spec
from itertools import product
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import ModelCheckpoint, Timer
from pytorch_lightning.loggers import TensorBoardLogger
from rich.console import Console
from torch import Tensor, nn

import convexheads as ch
from benchmarks import report
from benchmarks.callbacks import Log, ProgressBar, SaveWhenStopped, StepSeeds, Validation
from benchmarks.data import ImageSet, augmentation, join, load
from benchmarks.options import Options, read_settings
from convexheads import storage
from convexheads.episodes import embed, evaluate
from convexheads.integrations.lightning import EpisodicDataModule, EpisodicModule, WholeCheckpointIO
from convexheads.pretrained import make_head, make_untrained, save_pretrained

HEADS = ("svm", "ridge", "prototypes")
"""The heads that every run evaluates."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says when a disk, a quota or a file is full."""

FIRST_PROCESS = "CONVEXHEADS_FIRST_PROCESS"
"""In this variable the process that starts the others gives them its number."""

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
        workers=options.workers,
    )


def train(options: Options, data: dict[str, ImageSet], module: EpisodicModule) -> float:
    """Train the module's backbone and head; returns the seconds that took, over all resumptions.

    Where there are validation classes, the module ends with the weights that were best on them.

    Raises:
        ConvexHeadsError: a step failed and `options.on_failure` is not "skip".
    """
    output, interval = options.folder, min(10, options.total_steps)
    timer, log = Timer(), Log(options, interval)
    settings: dict[str, Any] = {"dirpath": str(options.checkpoint.parent), "enable_version_counter": False}
    last = ModelCheckpoint(filename="last", every_n_train_steps=options.checkpoint_every, **settings)
    callbacks = [timer, StepSeeds(options.seed), ProgressBar(refresh_rate=5)]
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
    callbacks += [log, last, SaveWhenStopped(options.checkpoint)]  # what is saved last knows of the best
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="gpu" if options.device == "cuda" else options.device,
        devices=options.processes,
        precision="bf16-mixed" if options.precision == "bfloat16" else "32-true",
        strategy="ddp" if options.processes > 1 else "auto",
        benchmark=True,  # the sizes are those of every step: cuDNN may look for its fastest way
        sync_batchnorm=options.processes > 1 and options.device != "cpu" and torch.cuda.is_available(),
        logger=TensorBoardLogger(output, name="tensorboard") if find_spec("tensorboard") else False,
        log_every_n_steps=interval,
        callbacks=callbacks,
        plugins=[WholeCheckpointIO()],
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        for message in LIGHTNING_NOISE:
            warnings.filterwarnings("ignore", message)
        trainer.fit(module, episodes(data["train"], options), ckpt_path=options.checkpoint if options.resume else None)
    if trainer.should_stop:
        if trainer.is_global_zero:
            why = f"step {module.failures[-1]['step']} failed ({module.failures[-1]['cause']}), training has stopped"
            raise ch.ConvexHeadsError(f"{why}; {options.checkpoint} is from before the step, --resume goes on after it")
        return timer.time_elapsed("train")
    trainer.save_checkpoint(options.checkpoint)
    if trainer.is_global_zero and best is not None and best.best_model_path:
        weights = WholeCheckpointIO().load_checkpoint(best.best_model_path)
        module.load_state_dict(weights["state_dict"])
    return timer.time_elapsed("train")


def test(options: Options, data: ImageSet, backbones: Mapping[str, nn.Module]) -> list[report.Row]:
    """Evaluate heads on the features of each backbone: all heads on the first, the trained one's on the others."""
    tasks, rows = [(options.ways, shots) for shots in options.test_shots], []
    for name, backbone in backbones.items():
        heads = {head: make_head(head) for head in ([options.head] if rows else [options.head, *HEADS])}
        rows += measure(options, data, name, backbone, heads, tasks)
    return rows


def measure(
    options: Options,
    data: ImageSet,
    name: str,
    backbone: nn.Module,
    heads: Mapping[str, ch.Head],
    tasks: Iterable[tuple[int, int]],
) -> list[report.Row]:
    """The accuracy of each head on the features of the backbone of that name, for each of the tasks' ways and shots."""
    device = torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")
    features, labels, rows = embed(backbone.to(device), data.images.to(device)), data.labels.to(device), []
    for (head, own), (ways, shots) in product(heads.items(), tasks):
        result = evaluate(
            own,
            features,
            labels,
            ways=ways,
            shots=shots,
            queries=options.test_queries,
            episodes=options.test_episodes,
            seed=options.seed,
        )
        gap = None if result.gaps is None else result.gaps.max().item()
        rows.append(report.Row(name, head, ways, shots, result.mean, result.interval, result.episodes, gap))
    return rows


def run(options: Options, test: Callable[..., list[report.Row]] = test) -> list[report.Row]:
    """Train, evaluate as `test` does, and write everything into the output folder.

    Raises:
        InputError: an option is unusable, or the data is missing.
    """
    start = time.perf_counter()
    if options.threads:
        torch.set_num_threads(options.threads)
        os.environ["OMP_NUM_THREADS"] = str(options.threads)  # or Lightning would set another number for DDP
    provenance = report.provenance()
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # as Lightning tells the processes that it starts
    if first:
        os.environ[FIRST_PROCESS] = str(os.getpid())
    elif FIRST_PROCESS in os.environ:
        end_with(int(os.environ[FIRST_PROCESS]))
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
        on_failure=options.on_failure,
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
    rounded = {name: round(value, 1) for name, value in seconds.items()}
    write(options, rows, rounded, provenance, module.failures)
    return rows


def end_with(process: int) -> None:
    """End this process soon after its parent ends, whatever it is waiting for: nobody else would end it."""

    def watch() -> None:
        while os.getppid() == process:
            time.sleep(1)
        print("error: the first process is gone, and so this one ends", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def prepare(options: Options) -> None:
    """Make the output folder ready for a new run, or check that it holds the run to resume."""
    folder, config = options.folder, options.folder / "config.yaml"
    if options.resume:
        if not options.checkpoint.is_file() or not config.is_file():
            raise ch.InputError("resume", f"{folder} without a checkpoint", "a folder that an earlier run wrote to")
        saved, record = read_settings(config), options.record()
        if changed := _changed(record, saved):
            raise ch.InputError("resume", f"another value of {', '.join(changed)}", f"the options of {config}")
        _check_checkpoint(options)
        if record != saved:
            write_config(options)
        return
    result, resumable = folder / "result.json", options.checkpoint.is_file()
    if resumable and not result.is_file():
        raise ch.InputError("output", f"{folder}, which holds an unfinished run", "--resume, or another --output")
    options.checkpoint.unlink(missing_ok=True)  # first: what is left over must not look like a run to resume
    result.unlink(missing_ok=True)
    if resumable:
        for logs in ("tensorboard", "checkpoints"):
            shutil.rmtree(folder / logs, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_config(options)


def write_config(options: Options) -> None:
    """Write the options into the output folder, for `--config` and for `--resume`."""
    text = f"# {options.command()}\n{yaml.safe_dump(options.record(), sort_keys=False)}"
    storage.write(options.folder / "config.yaml", text.encode())


def _check_checkpoint(options: Options) -> None:
    path, wanted = options.checkpoint, "a complete checkpoint of this run"
    try:
        checkpoint = storage.load_torch(path)
    except (OSError, ValueError) as error:
        raise ch.InputError("resume", f"{path}, damaged: {error}", wanted) from error
    parts = {"state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks", EpisodicDataModule.__qualname__}
    if not isinstance(checkpoint, dict) or not parts <= checkpoint.keys():
        raise ch.InputError("resume", f"{path}, which is none, or not a complete one", wanted)
    if changed := _changed(options.record(), checkpoint["callbacks"].get(Log.__qualname__, {}).get("options", {})):
        raise ch.InputError("resume", f"{path}, that of another run ({', '.join(changed)})", wanted)


def _changed(record: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    # A training that a failed step has ended may go on without it.
    return sorted(name for name in record if name != "on_failure" and record[name] != saved.get(name))


def write(
    options: Options,
    rows: list[report.Row],
    seconds: dict[str, float],
    provenance: dict[str, Any],
    failures: list[dict[str, Any]],
) -> None:
    """Write the result as table, picture and, when all else is there, JSON; and show the table."""
    title = f"{options.dataset}, accuracy in %: {options.backbone} meta-trained through {options.head}"
    note = (
        f"Mean over {options.test_episodes:,} episodes of unseen classes, the same for every line, "
        f"± half the 95 % confidence interval."
    )
    if gaps := [row.largest_gap for row in rows if row.largest_gap is not None]:
        largest = max(1e-15, *gaps)  # which is as much as rounding can show
        note += f" Solutions of solvers are certified: the relative duality gap is at most {largest:.0e}."
    result = {"command": options.command(), "results": [row._asdict() for row in rows], "seconds": seconds}
    result |= {"seed": options.seed, **provenance} | ({"skipped": failures} if failures else {})
    details = report.details(options.command(), options.seed, seconds, provenance)
    table = report.table(rows, title)
    console = Console()
    console.print(table, note, f"All of it is in {options.folder}", sep="\n")
    report.write_markdown(table, f"{note}\n\n{details}", options.folder / "result.md")
    report.draw(rows, title, options.folder / "accuracy.png")
    storage.write(options.folder / "result.json", (json.dumps(result, indent=2) + "\n").encode())


def main(
    arguments: Sequence[str] | None = None,
    *,
    kind: type[Options] = Options,
    run: Callable[[Any], object] = run,
    description: str = (__doc__ or "").partition("\n")[0],
) -> None:
    """The command line: `run` with options of that `kind`."""
    try:
        options = kind.parse(arguments, description=description)
        try:
            run(options)
        except OSError as error:
            if error.errno not in FULL:
                raise
            hope = "; the last checkpoint is whole, --resume continues from it" if options.checkpoint.is_file() else ""
            got = f"{options.folder} ({error.strerror})"
            raise ch.InputError("output", got, f"room to write{hope}") from error
    except ch.ConvexHeadsError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
