"""Train a plain ProtoNet loop, and the same loop with another head in place of the prototypes.

python -m benchmarks.swap --data-root DIR
"""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pandas
import torch
from rich.table import Table
from torch import nn
from torch.nn import functional
from tqdm.auto import tqdm

import convexheads as ch
from benchmarks import experiment, report
from benchmarks.data import ImageSet, load
from convexheads import ClassificationHead, EpisodeLoader, Learnable
from convexheads.evaluation import embed, evaluate
from convexheads.hyperparameters import as_tensor
from convexheads.kernels import RBF
from convexheads.models import (
    Conv4,
    metaoptnet_svm,
    protonet,
    unit_scale_logistic,
    unit_scale_ridge,
    unit_scale_svm,
)

HEADS: dict[str, Callable[[], ClassificationHead]] = {
    "prototypes": ch.PrototypeHead,
    "prototypes, scaled": protonet,
    "ridge": lambda: ch.RidgeHead(scale=Learnable(1.0)),
    "logistic": lambda: ch.LogisticHead(scale=Learnable(1.0)),
    "SVM": unit_scale_svm,
    "SVM of the paper": metaoptnet_svm,
}
"""The heads, as the documentation advises them for training, and the paper's SVM."""

VARIANTS: dict[str, Callable[[], ClassificationHead]] = {
    "ridge, unit scale": unit_scale_ridge,
    "logistic, unit scale": unit_scale_logistic,
    "SVM, RBF kernel": lambda: ch.SVMHead(C=30.0, smoothing=0.3, kernel=RBF(), scale=Learnable(10.0)),
}
"""More heads, which are trained only where they are asked for."""

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


class Loop(NamedTuple):
    """The data of a training loop, and the sizes of its episodes.

    Attributes:
        steps: number of training steps.
        tasks: number of episodes per step.
        ways: number of classes per episode, also in the test.
        shots: number of support images per class.
        queries: number of query images per class.
    """

    steps: int
    tasks: int
    ways: int
    shots: int
    queries: int


LOOPS = {
    "digits": Loop(steps=300, tasks=1, ways=5, shots=5, queries=10),
    "digits, 1-shot": Loop(steps=300, tasks=1, ways=5, shots=1, queries=10),
    "glyphs": Loop(steps=120, tasks=4, ways=10, shots=1, queries=3),
    "cifar-fs": Loop(steps=500, tasks=8, ways=5, shots=5, queries=6),
}
"""The training loops by data set, with what distinguishes loops on the same data."""


def train(head: ClassificationHead, optimizer: str, images: ImageSet, loop: Loop, seed: int) -> tuple[nn.Module, float]:
    """Train a Conv-4 through a head; return it with the training accuracy of the second half of the steps.

    This is the loop of a ProtoNet, with a learning rate that follows one cosine. Nothing in it depends on the head.
    """
    torch.manual_seed(seed)
    device = images.images.device
    backbone = Conv4.from_images(images.images).to(device)
    sizes: dict[str, Any] = {"ways": loop.ways, "shots": loop.shots, "queries": loop.queries, "batch_size": loop.tasks}
    batches = EpisodeLoader(images.images, images.labels, steps_per_epoch=loop.steps, seed=seed, **sizes)
    optimize = OPTIMIZERS[optimizer]([*backbone.parameters(), *head.parameters()])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimize, loop.steps)
    right = []
    for samples, labels in batches:
        features = backbone(samples.flatten(0, 1)).unflatten(0, labels.shape)
        task = ch.split_task(features, labels.to(device), shots=loop.shots)
        support, support_labels, query, query_labels = task
        logits = head(support, support_labels, query, ways=loop.ways)
        loss = functional.cross_entropy(logits.flatten(0, 1), query_labels.flatten())
        optimize.zero_grad()
        loss.backward()
        optimize.step()
        schedule.step()
        right.append((logits.argmax(-1) == query_labels).double().mean())
    return backbone, torch.stack(right[loop.steps // 2 :]).mean().item()


class Run(NamedTuple):
    """A training run: the data, the optimizer, the head and the seed, and how to evaluate it.

    Attributes:
        data: name of the data set.
        loop: the sizes of the training loop.
        optimizer: name of the optimizer.
        head: name of the head.
        seed: seed of the weights and of the episodes.
        episodes: number of test episodes.
        data_root: folder of the data.
        device: the device to train on.
    """

    data: str
    loop: Loop
    optimizer: str
    head: str
    seed: int
    episodes: int
    data_root: Path | None
    device: str


@cache
def _load(name: str, data_root: Path | None, device: str) -> dict[str, ImageSet]:
    with experiment.input_errors_end_the_script():
        data = load(name, data_root, progress=False)
    return {split: ImageSet(each.images.to(device), each.labels, each.classes) for split, each in data.items()}


def measure(run: Run) -> dict[str, Any]:
    """Train through a head, and evaluate it and prototypes on unseen classes."""
    name, _, _ = run.data.partition(",")
    data, loop, head = _load(name, run.data_root, run.device), run.loop, (HEADS | VARIANTS)[run.head]()
    begin = time.perf_counter()
    backbone, accuracy = train(head.to(run.device), run.optimizer, data["train"], loop, run.seed)
    row: dict[str, Any] = {"data": run.data, "optimizer": run.optimizer, "head": run.head, "seed": run.seed}
    row["machine"] = experiment.place(report.provenance(), run.device)
    row |= {"training": 100 * accuracy, "seconds": time.perf_counter() - begin}
    head.cpu()
    row["scale"] = as_tensor(head.scale, torch.zeros(())).item()
    for split in ("val", "test"):
        if split not in data:
            continue
        features, labels = embed(backbone, data[split].images, progress=False).cpu(), data[split].labels
        row |= {f"squared length, {split}": features.square().sum(-1).mean().item()}
        for shots in (1, 5):
            heads = {"itself": head, "prototypes": ch.PrototypeHead()}
            sizes: dict[str, Any] = {"ways": loop.ways, "shots": shots, "episodes": run.episodes}
            for tested, found in evaluate(heads, features, labels, **sizes, progress=False).items():
                row[f"{split}, {tested}, {shots}-shot"] = 100 * found.accuracy
    return row


def summarize(rows: pandas.DataFrame) -> Table:
    """The mean accuracy of each head over the seeds, with its standard error, by data set, shots and optimizer."""
    heads, left = [head for head in HEADS | VARIANTS if head in set(rows["head"])], ["data", "optimizer"]
    title = "Accuracy on unseen classes, %, by the head that was trained"
    table = report.new_table(title, [*left, "shots", *heads], left=left)
    for data, shots, optimizer in product(dict.fromkeys(rows["data"]), (1, 5), OPTIMIZERS):
        cells = []
        for head in heads:
            own = (rows["data"] == data) & (rows["optimizer"] == optimizer) & (rows["head"] == head)
            values = rows.loc[own, f"test, itself, {shots}-shot"]
            error = f" ± {values.std() / math.sqrt(len(values)):.1f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.1f}{error}" if len(values) else "")
        if any(cells):
            table.add_row(data, optimizer, str(shots), *cells)
    return table


def main() -> None:
    """The command line."""
    parser = experiment.parser("swap", __doc__, "data_root", "device", "output")
    choices: dict[str, dict[str, Any]] = {"data": LOOPS, "optimizers": OPTIMIZERS, "heads": HEADS | VARIANTS}
    for option, known in choices.items():
        usual = [*HEADS] if option == "heads" else [*known]
        text = f"some of {', '.join(map(repr, known))}; default: {'all' if len(usual) == len(known) else usual}"
        parser.add_argument(f"--{option}", type=list[str], default=usual, help=text)
    parser.add_argument(
        "--seeds", type=list[int], default=[0, 1, 2, 3, 4], help="seeds of the weights and the episodes"
    )
    parser.add_argument("--episodes", type=int, default=1000, help="test episodes")
    parser.add_argument("--jobs", type=int, default=1, help="training runs at a time, each on one processor thread")
    parser.add_argument("--minutes", type=float, default=1e6, help="time limit, after which no training run starts")
    chosen = parser.parse_args()
    for option, known in choices.items():
        experiment.refuse_unknown(option, getattr(chosen, option), known)
    end, path = time.monotonic() + 60 * chosen.minutes, chosen.output / "swap.json"
    rows = _saved(path, chosen.episodes)
    done = {(row["data"], row["optimizer"], row["head"], row["seed"]) for row in rows}
    wanted = product(chosen.data, chosen.seeds, chosen.optimizers, chosen.heads)
    shared = (chosen.episodes, chosen.data_root, chosen.device)
    runs = [
        Run(data, LOOPS[data], optimizer, head, seed, *shared)
        for data, seed, optimizer, head in wanted
        if (data, optimizer, head, seed) not in done
    ]
    for row in tqdm(_results(runs, chosen.jobs, end), total=len(runs), desc="training", unit="run"):
        rows.append(row)
        report.write_json({"episodes": chosen.episodes, "results": rows, **report.provenance()}, path)
    if not rows:
        raise SystemExit("error: minutes: expected enough for one training run, got no finished run")
    frame, origin = pandas.DataFrame(rows), report.provenance()
    counts = frame.groupby(["data", "optimizer", "head"]).size()
    seeds = str(counts.max()) if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"
    note = (
        f"Mean over {seeds} seeds ± standard error, each over {chosen.episodes:,} episodes, 10-way for glyphs and "
        "5-way for the others. A Conv-4 is trained by a plain loop, with a learning rate that follows one cosine, from "
        "0.001 for Adam and AdamW and from 0.1 for SGD with momentum 0.9: 300 steps of one 5-shot episode on digits "
        "(or one 1-shot episode), 120 of four 1-shot episodes on glyphs, 500 of eight 5-shot episodes on CIFAR-FS. "
        "`prototypes` are those of Snell et al., `prototypes, scaled` is `protonet()`, and `SVM` is `unit_scale_svm()`."
        f" Trained on: {'; '.join(dict.fromkeys(frame['machine']))}. Made by `python -m benchmarks.swap`."
    )
    record = {"episodes": chosen.episodes, "results": rows, **origin}
    experiment.write(chosen.output, "swap", summarize(frame), note, record=record, rows=frame, width=160)


def _results(runs: list[Run], jobs: int, end: float) -> Iterator[dict[str, Any]]:
    """The rows of the runs in the order in which they end; after the time `end`, no run starts."""
    if jobs == 1:
        torch.set_num_threads(1)
        yield from (measure(run) for run in runs if time.monotonic() < end)
        return
    if time.monotonic() >= end:
        return  # processes take seconds to start
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(_measure_before, run, end - time.monotonic() + time.time()) for run in runs]
        yield from (row for future in as_completed(futures) if (row := future.result()))


def _measure_before(run: Run, end: float) -> dict[str, Any] | None:
    return measure(run) if time.time() < end else None


def _saved(path: Path, episodes: int) -> list[dict[str, Any]]:
    """The rows of an earlier run, which is continued."""
    if not path.is_file():
        return []
    saved = json.loads(path.read_text())
    if saved["episodes"] != episodes:
        raise SystemExit(f"error: output: expected results of {episodes} episodes, got {saved['episodes']} in {path}")
    return saved["results"]


if __name__ == "__main__":
    main()
