"""Train a plain ProtoNet loop, and the same loop with another head in place of the prototypes.

python -m benchmarks.swap --data-root DIR
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
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
from convexheads.kernels import UnitScale
from convexheads.models import Conv4

HEADS: dict[str, Callable[[], ClassificationHead]] = {
    "prototypes": ch.PrototypeHead,
    "ridge": lambda: ch.RidgeHead(scale=Learnable(1.0)),
    "logistic": lambda: ch.LogisticHead(scale=Learnable(1.0)),
    "SVM": lambda: ch.SVMHead(C=30.0, smoothing=0.3, kernel=UnitScale(), scale=Learnable(10.0)),
    "SVM of the paper": lambda: ch.SVMHead(C=0.1, scale=Learnable(1.0)),
    "SVM of the paper, scale from 10": lambda: ch.SVMHead(C=0.1, scale=Learnable(10.0)),
}
"""The heads, as the documentation advises them for training."""

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


class Loop(NamedTuple):
    """The data of a training loop, and the sizes of its episodes.

    Attributes:
        test: the split with unseen classes.
        steps: number of training steps.
        tasks: number of episodes per step.
        ways: number of classes per episode, also in the test.
        shots: number of support images per class.
        queries: number of query images per class.
    """

    test: str
    steps: int
    tasks: int
    ways: int
    shots: int
    queries: int


LOOPS = {
    "digits": Loop("test", steps=300, tasks=1, ways=5, shots=5, queries=10),
    "glyphs": Loop("test", steps=120, tasks=4, ways=10, shots=1, queries=3),
    "cifar-fs": Loop("val", steps=500, tasks=8, ways=5, shots=5, queries=6),
}
"""The training loops by data set."""


def train(head: ClassificationHead, optimizer: str, images: ImageSet, loop: Loop, seed: int) -> tuple[nn.Module, float]:
    """Train a Conv-4 through a head; return it with the training accuracy of the second half of the steps.

    This is the loop of a ProtoNet, with a learning rate that follows one cosine. Nothing in it depends on the head.
    """
    torch.manual_seed(seed)
    backbone = Conv4.from_images(images.images)
    sizes: dict[str, Any] = {"ways": loop.ways, "shots": loop.shots, "queries": loop.queries, "batch_size": loop.tasks}
    batches = EpisodeLoader(images.images, images.labels, steps_per_epoch=loop.steps, seed=seed, **sizes)
    optimize = OPTIMIZERS[optimizer]([*backbone.parameters(), *head.parameters()])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimize, loop.steps)
    accuracies = []
    for samples, labels in tqdm(batches, leave=False, mininterval=1):
        features = backbone(samples.flatten(0, 1)).unflatten(0, labels.shape)
        support, support_labels, query, query_labels = ch.split_task(features, labels, shots=loop.shots)
        logits = head(support, support_labels, query, ways=loop.ways)
        loss = functional.cross_entropy(logits.flatten(0, 1), query_labels.flatten())
        optimize.zero_grad()
        loss.backward()
        optimize.step()
        schedule.step()
        accuracies.append((logits.argmax(-1) == query_labels).float().mean().item())
    return backbone, sum(accuracies[loop.steps // 2 :]) / (loop.steps - loop.steps // 2)


def measure(data: dict[str, ImageSet], name: str, head_name: str, optimizer: str, seed: int, episodes: int) -> dict:
    """Train through a head, and evaluate it and prototypes on unseen classes."""
    loop, head, begin = LOOPS[name], HEADS[head_name](), time.perf_counter()
    backbone, accuracy = train(head, optimizer, data["train"], loop, seed)
    seconds, unseen = time.perf_counter() - begin, data[loop.test]
    features = embed(backbone, unseen.images, progress=False)
    row: dict[str, Any] = {"data": name, "optimizer": optimizer, "head": head_name, "seed": seed}
    row |= {"training": 100 * accuracy, "scale": as_tensor(head.scale, features).item(), "seconds": seconds}
    for tested, own in (("itself", head), ("prototypes", ch.PrototypeHead())):
        for shots in (1, 5):
            sizes = {"ways": loop.ways, "shots": shots, "episodes": episodes}
            found = evaluate(own, features, unseen.labels, **sizes, progress=False)
            row[f"{tested}, {shots}-shot"] = 100 * found.accuracy
    return row


def summarize(rows: pandas.DataFrame, shots: int) -> Table:
    """The mean accuracy of each head over the seeds, with its standard error, by data set and optimizer."""
    heads, left = [head for head in HEADS if head in set(rows["head"])], ["data", "optimizer"]
    table = report.new_table(f"{shots}-shot accuracy on unseen classes, %", [*left, *heads], left=left)
    for data, optimizer in dict.fromkeys(zip(rows["data"].tolist(), rows["optimizer"].tolist(), strict=True)):
        cells = []
        for head in heads:
            own = (rows["data"] == data) & (rows["optimizer"] == optimizer) & (rows["head"] == head)
            values = rows.loc[own, f"itself, {shots}-shot"]
            error = f" ± {values.std() / math.sqrt(len(values)):.1f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.1f}{error}" if len(values) else "")
        table.add_row(data, optimizer, *cells)
    return table


def main() -> None:
    """The command line."""
    parser = experiment.parser("swap", __doc__, "data_root", "threads", "output")
    for option, known in (("data", LOOPS), ("optimizers", OPTIMIZERS), ("heads", HEADS)):
        parser.add_argument(f"--{option}", type=list[str], default=list(known), help="default: all")
    parser.add_argument(
        "--seeds", type=list[int], default=[0, 1, 2, 3, 4], help="seeds of the weights and the episodes"
    )
    parser.add_argument("--episodes", type=int, default=1000, help="test episodes")
    parser.add_argument("--minutes", type=float, default=1e6, help="time limit, after which no training run starts")
    chosen = parser.parse_args()
    for option, known in (("data", LOOPS), ("optimizers", OPTIMIZERS), ("heads", HEADS)):
        experiment.refuse_unknown(option, getattr(chosen, option), known)
    torch.set_num_threads(chosen.threads)
    end, path = time.monotonic() + 60 * chosen.minutes, chosen.output / "swap.json"
    rows = _saved(path, chosen.episodes)
    done = {(row["data"], row["optimizer"], row["head"], row["seed"]) for row in rows}
    for name in chosen.data:
        with experiment.input_errors_end_the_script():
            data = load(name, chosen.data_root, splits=["train", LOOPS[name].test], progress=False)
        for seed in chosen.seeds:
            for optimizer in chosen.optimizers:
                for head in chosen.heads:
                    if (name, optimizer, head, seed) not in done and time.monotonic() < end:
                        rows.append(measure(data, name, head, optimizer, seed, chosen.episodes))
                        record = {"episodes": chosen.episodes, "results": rows, **report.provenance()}
                        report.write_json(record, path)
    if not rows:
        raise SystemExit("error: minutes: expected enough for one training run, got no finished run")
    frame, origin = pandas.DataFrame(rows), report.provenance()
    note = (
        f"Mean over seeds {', '.join(map(str, sorted(set(frame['seed']))))} ± standard error, each over "
        f"{chosen.episodes:,} episodes. A Conv-4 is trained by a plain loop: Adam and AdamW with learning rate 0.001, "
        "SGD with 0.1 and momentum 0.9, one cosine. The heads are those of `HEADS` in `benchmarks/swap.py`. "
        f"{experiment.place(origin)}. Made by `python -m benchmarks.swap`."
    )
    record = {"episodes": chosen.episodes, "results": rows, **origin}
    more = [(summarize(frame, 5), "")]
    experiment.write(chosen.output, "swap", summarize(frame, 1), note, record=record, more=more, rows=frame, width=160)


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
