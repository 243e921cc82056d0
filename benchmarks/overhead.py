"""What a head costs where it is used: in a training step of a network, and in an evaluation on cached features.

python -m benchmarks.overhead
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

import convexheads as ch
from benchmarks import report
from convexheads.backbones import BACKBONES, make_backbone
from convexheads.pretrained import make_head

HEADS = ("prototypes", "ridge", "svm")
WAYS, SHOTS = 5, 5


def step(
    backbone: nn.Module, head: ch.ClassificationHead, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> float:
    """Seconds of one training step: forward, backward and update, support and query in one batch."""
    begin = report.now(images)
    features = backbone(images.flatten(0, 1)).unflatten(0, labels.shape)
    support, support_labels, query, query_labels = ch.split_task(features, labels, shots=SHOTS)
    logits = head(support, support_labels, query, ways=WAYS)
    loss = functional.cross_entropy(logits.flatten(0, 1), query_labels.flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return report.now(images) - begin


def training(*, backbone: str, device: str, episodes: int, queries: int, repeats: int) -> dict[str, float]:
    """Median seconds of a training step through each head, interleaved, and of the SVM's step relative to others.

    The relative ones are medians over repeats of the ratio of two steps that ran one after the other.
    """
    torch.manual_seed(0)
    images = torch.randint(0, 256, (episodes, WAYS * (SHOTS + queries), 3, 32, 32), dtype=torch.uint8)
    labels = (torch.arange(images.shape[1]) % WAYS).expand(episodes, -1).to(device)
    parts: dict[str, tuple[nn.Module, ch.ClassificationHead, torch.optim.Optimizer]] = {}
    for name in HEADS:
        network, head = make_backbone(backbone, images.flatten(0, 1)).to(device), make_head(name).to(device)
        parameters = [*network.parameters(), *head.parameters()]
        parts[name] = network, head, torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, nesterov=True)
    images = images.to(device)
    seconds: dict[str, list[float]] = {name: [] for name in HEADS}
    for repeat in tqdm(range(-2, repeats), desc="training steps", leave=False):
        for name, each in parts.items():
            taken = step(*each, images, labels)
            if repeat >= 0:
                seconds[name].append(taken)
    found = {name: statistics.median(taken) for name, taken in seconds.items()}
    for name in ("prototypes", "ridge"):
        ratios = [svm / other for svm, other in zip(seconds["svm"], seconds[name], strict=True)]
        found[f"svm / {name}"] = statistics.median(ratios)
    return found


def evaluation(*, device: str, episodes: int, queries: int, features: int) -> dict[str, float]:
    """Seconds of `convexheads.evaluate` for each head, over the same episodes of random clustered features."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(20).repeat_interleave(600)
    centres = torch.randn(20, features, generator=generator)
    cached = (centres[labels] + 2 * torch.randn(len(labels), features, generator=generator)).to(device)
    labels = labels.to(device)
    settings: dict[str, Any] = {"ways": WAYS, "shots": SHOTS, "queries": queries}
    found = {}
    for name in HEADS:
        head = make_head(name)
        ch.evaluate(head, cached, labels, episodes=100, progress=False, **settings)  # warms up
        begin = time.perf_counter()
        ch.evaluate(head, cached, labels, episodes=episodes, **settings)
        found[name] = time.perf_counter() - begin
    return found


def show(steps: dict[str, float], evaluations: dict[str, float], title: str) -> Table:
    """A line for each head."""
    table = Table(title=title, title_justify="left")
    for column in ("head", "training step, ms", "evaluation, s"):
        table.add_column(column, justify="left" if column == "head" else "right")
    for name in HEADS:
        table.add_row(name, f"{1e3 * steps[name]:.1f}", f"{evaluations[name]:.1f}")
    return table


def main() -> None:
    """The command line."""
    parser = jsonargparse.ArgumentParser(
        prog="python -m benchmarks.overhead", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--backbone", type=Literal[tuple(BACKBONES)], default="conv4", help="network that is trained")
    parser.add_argument("--device", type=Literal["cpu", "cuda"], default="cpu", help="where to compute")
    parser.add_argument(
        "--tasks", type=int, default=8, help="episodes of a training step, 5-way 5-shot, 32 x 32 pixels"
    )
    parser.add_argument("--train-queries", type=int, default=6, help="query images a class in a training step")
    parser.add_argument("--repeats", type=int, default=25, help="timed training steps of each head")
    parser.add_argument("--episodes", type=int, default=10_000, help="episodes of the evaluation, 5-way 5-shot")
    parser.add_argument("--queries", type=int, default=15, help="query examples a class in the evaluation")
    parser.add_argument("--features", type=int, default=256, help="feature dimension in the evaluation")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="processor threads")
    parser.add_argument("--output", type=Path, default=Path("runs/overhead"), help="folder for the result")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = {"device": options.device}
    network = {"backbone": options.backbone} | where
    steps = training(**network, episodes=options.tasks, queries=options.train_queries, repeats=options.repeats)
    evaluations = evaluation(**where, episodes=options.episodes, queries=options.queries, features=options.features)
    origin = report.provenance()
    names = ("backbone", "device", "tasks", "train_queries", "repeats", "episodes", "queries", "features", "threads")
    settings = {name: options[name] for name in names}
    machine = f"{origin['machine']['processor']}, {options.threads} threads"
    if options.device == "cuda":
        machine = origin["machine"]["accelerator"]
    table = show(steps, evaluations, "What a head costs, 5-way 5-shot")
    note = (
        f"Training step: a {options.backbone} on {options.tasks} episodes of 32 x 32 images, {options.train_queries} "
        f"queries a class, SGD; medians of {options.repeats} steps, the heads in turn. Of two steps in a row, the "
        f"SVM's takes {steps['svm / prototypes']:.3f} times as long as prototypes' and {steps['svm / ridge']:.3f} "
        f"times as long as ridge regression's (medians). Evaluation: `convexheads.evaluate` over {options.episodes:,} "
        f"episodes of {options.features} cached features, {options.queries} queries a class. "
        f"{machine}, torch {origin['versions']['torch']}. "
        "Made by `python -m benchmarks.overhead`."
    )
    Console(width=max(100, Console().width)).print(table, note, f"All of it is in {options.output}", sep="\n")
    options.output.mkdir(parents=True, exist_ok=True)
    record = {"settings": settings, "training": steps, "evaluation": evaluations, **origin}
    (options.output / "overhead.json").write_text(json.dumps(record, indent=2) + "\n")
    report.write_markdown(table, note, options.output / "overhead.md")


if __name__ == "__main__":
    main()
