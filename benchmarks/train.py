"""Meta-train a backbone through a head, then evaluate every head on unseen classes.

python -m benchmarks.train                                                       # scikit-learn's digits: minutes
python -m benchmarks.train --dataset glyphs                                      # letters of many scripts: minutes
python -m benchmarks.train --recipe table2/cifar-fs/conv4/ridge --data-root DIR
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from itertools import product
from typing import Any

import torch
import yaml
from rich.console import Console
from torch import Tensor, nn

import convexheads as ch
from benchmarks import report
from benchmarks.data import Episodes, ImageSet, every_turn, load
from benchmarks.data import join as concatenate
from benchmarks.loop import KIND, Training, train
from benchmarks.options import Options, read_settings
from benchmarks.processes import Processes, join, leave
from convexheads import _storage
from convexheads.evaluation import embed, evaluate
from convexheads.models import build_head, build_model, save_pretrained

HEADS = ("svm", "ridge", "prototypes")
"""The heads that every run evaluates."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The errors of a full disk, quota or file."""


class Pixels(nn.Module):
    """Takes the place of a backbone and flattens uint8 images (n, channels, height, width) into rows from 0 to 1.

    A backbone should beat the accuracy of a head on these.
    """

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) / 255


def episodes(data: ImageSet, options: Options, processes: Processes) -> Episodes:
    """The training episodes of a run, or this process's share of them."""
    return Episodes(
        data,
        ways=options.ways,
        shots=options.shots,
        queries=options.queries,
        tasks=options.tasks,
        seed=options.seed,
        augment=options.augmentation,
        device=device(options),
        rank=processes.rank,
        processes=processes.count,
    )


def device(options: Options) -> torch.device:
    """The device of a run."""
    return torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")


def test(options: Options, data: ImageSet, backbones: Mapping[str, nn.Module]) -> list[report.Row]:
    """Evaluate all heads on the features of the first backbone, and `options.head` on those of the others."""
    tasks, rows = [(options.ways, shots) for shots in options.test_shots], []
    for name, backbone in backbones.items():
        heads = {head: build_head(head) for head in ([options.head] if rows else [options.head, *HEADS])}
        rows += measure(options, data, name, backbone, heads, tasks)
    return rows


def measure(
    options: Options,
    data: ImageSet,
    name: str,
    backbone: nn.Module,
    heads: Mapping[str, ch.ClassificationHead],
    tasks: Iterable[tuple[int, int]],
) -> list[report.Row]:
    """The accuracy of each head on the features of a backbone, for each pair of ways and shots in `tasks`."""
    where = device(options)
    features, labels, rows = embed(backbone.to(where), data.images.to(where)), data.labels.to(where), []
    for (head_name, head), (ways, shots) in product(heads.items(), tasks):
        result = evaluate(
            head,
            features,
            labels,
            ways=ways,
            shots=shots,
            queries=options.test_queries,
            episodes=options.test_episodes,
            seed=options.seed,
        )
        gap = None if result.gaps is None else result.gaps.max().item()
        rows.append(
            report.Row(name, head_name, ways, shots, result.accuracy, result.confidence_interval, result.episodes, gap)
        )
    return rows


def run(
    options: Options,
    test: Callable[..., list[report.Row]] = test,
    *,
    deadline: float = math.inf,
) -> list[report.Row]:
    """Train, evaluate by `test`, and write everything to the output folder.

    Args:
        options: the options of the run.
        test: evaluates heads on the features of each backbone.
        deadline: when to stop early, by `time.monotonic()`; the run can be resumed later. Default: never.

    Returns:
        The accuracies, empty if training stopped early or if this is not the first of several processes.

    Raises:
        InputError: an option is unusable, or the data is missing.
    """
    start = time.perf_counter()
    if options.threads:
        torch.set_num_threads(options.threads)
        os.environ["OMP_NUM_THREADS"] = str(options.threads)  # for the other processes
    provenance = report.provenance()
    processes = join(options.processes, device(options))
    try:
        if processes.first:
            prepare(options)
        data = load(options.dataset, options.root, progress=processes.first)
        if options.trainval and "val" in data:
            data["train"] = concatenate(data["train"], data.pop("val"))
        if options.rotations:
            data["train"] = every_turn(data["train"])
        images = data["train"].images
        torch.manual_seed(options.seed)
        backbone, head = build_model(options.record(), images)
        untrained = deepcopy(backbone)
        training = Training(options, backbone, head, episodes(data["train"], options, processes), processes)
        if options.resume:
            training.load(options.checkpoint)
        train(options, data, training, deadline=deadline)
    finally:
        leave()
    if not processes.first or training.step < options.total_steps:
        return []
    settings = options.record() | {"image_size": images.shape[-1]}
    save_pretrained(options.folder / "model.safetensors", training.backbone, training.head, settings)
    begin = time.perf_counter()
    rows = test(
        options, data["test"], {"meta-trained": training.backbone, "untrained": untrained, "none: pixels": Pixels()}
    )
    now = time.perf_counter()
    seconds = {"training": training.seconds, "evaluation": now - begin, "all": now - start}
    rounded = {name: round(value, 1) for name, value in seconds.items()}
    write(options, rows, rounded, provenance, training.failures)
    return rows


def prepare(options: Options) -> None:
    """Prepare the output folder for a new run, or check that it contains the run to resume."""
    folder, config = options.folder, options.folder / "config.yaml"
    if options.resume:
        if not options.checkpoint.is_file() or not config.is_file():
            raise ch.InputError("resume", "a folder that an earlier run wrote to", f"{folder} without a checkpoint")
        saved, record = read_settings(config), options.record()
        if changed := _changed(record, saved):
            raise ch.InputError("resume", f"the options of {config}", f"different values of {', '.join(changed)}")
        _check_checkpoint(options)
        if record != saved:
            write_config(options)
        return
    result, resumable = folder / "result.json", options.checkpoint.is_file()
    if resumable and not result.is_file():
        raise ch.InputError("output", "--resume, or another --output", f"{folder}, which holds an unfinished run")
    options.checkpoint.unlink(missing_ok=True)  # first, because leftovers must not look like a run to resume
    result.unlink(missing_ok=True)
    if resumable:
        for logs in ("tensorboard", "checkpoints"):
            shutil.rmtree(folder / logs, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_config(options)


def write_config(options: Options) -> None:
    """Write the options to the output folder, for `--config` and `--resume`."""
    text = f"# {options.command()}\n{yaml.safe_dump(options.record(), sort_keys=False)}"
    _storage.atomic_write(options.folder / "config.yaml", text.encode())


def _check_checkpoint(options: Options) -> None:
    path, expected = options.checkpoint, "a complete checkpoint of this run"
    try:
        _, record = _storage.load(path, **KIND)
        saved = dict(record["options"])
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise ch.InputError("resume", expected, f"{path}, damaged or not a checkpoint: {error}") from error
    if changed := _changed(options.record(), saved):
        raise ch.InputError("resume", expected, f"{path}, which belongs to another run ({', '.join(changed)})")


def _changed(record: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    """The names of options with other values. What an earlier version did not have had the value of today's default."""
    saved = Options().record() | saved
    # A run that stopped at a failed step may be resumed with such steps skipped.
    return sorted(name for name in record if name != "on_failure" and record[name] != saved[name])


def write(
    options: Options,
    rows: list[report.Row],
    seconds: dict[str, float],
    provenance: dict[str, Any],
    failures: list[dict[str, Any]],
) -> None:
    """Show the table of results; write it as Markdown, as a figure and, last, as JSON."""
    title = f"{options.dataset}, accuracy in %: {options.backbone} meta-trained through {options.head}"
    note = (
        f"Mean over {options.test_episodes:,} episodes of unseen classes, the same for every line, "
        f"± half the 95 % confidence interval."
    )
    if gaps := [row.largest_gap for row in rows if row.largest_gap is not None]:
        largest = max(1e-15, *gaps)  # the resolution of rounding
        note += f" Solutions of solvers are certified: the relative duality gap is at most {largest:.0e}."
    result = {"command": options.command(), "results": [row._asdict() for row in rows], "seconds": seconds}
    result |= {"seed": options.seed, **provenance} | ({"skipped": failures} if failures else {})
    details = report.details(options.command(), options.seed, seconds, provenance)
    table = report.table(rows, title)
    console = Console()
    console.print(table, note, f"All results are in {options.folder}", sep="\n")
    report.write_markdown(table, f"{note}\n\n{details}", options.folder / "result.md")
    report.draw(rows, title, options.folder / "accuracy.png")
    report.write_json(result, options.folder / "result.json")


def main(
    arguments: Sequence[str] | None = None,
    *,
    kind: type[Options] = Options,
    run: Callable[[Any], object] = run,
    description: str = (__doc__ or "").partition("\n")[0],
) -> None:
    """The command line: `run` with options of the class `kind`."""
    try:
        options = kind.parse(arguments, description=description)
        try:
            run(options)
        except KeyboardInterrupt:
            advice = "; --resume continues from the last checkpoint" if options.checkpoint.is_file() else ""
            raise SystemExit(f"interrupted{advice}") from None
        except OSError as error:
            if error.errno not in FULL:
                raise
            advice = (
                "; the last checkpoint is complete, --resume continues from it" if options.checkpoint.is_file() else ""
            )
            got = f"{options.folder} ({error.strerror})"
            raise ch.InputError("output", f"room to write{advice}", got) from error
    except ch.ConvexHeadsError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
