"""Table 3 of the paper, its times: what an episode of miniImageNet's size costs with each head on each backbone.

python -m benchmarks.table3                     # Conv-4 and ResNet-12 on 84 x 84 images, one episode at a time
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import pandas
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm

import convexheads as ch
from benchmarks import report
from benchmarks.backbones import make_backbone
from benchmarks.models import make_head
from benchmarks.tables import HERE

BACKBONES = {"conv4": "64-64-64-64", "resnet12": "ResNet-12"}
MODELS = {"prototypes": "Prototypical Networks", "ridge": "MetaOptNet-RR", "svm": "MetaOptNet-SVM"}
WAYS = 5


def measure(
    *, backbones: Sequence[str], shots: Sequence[int], queries: int, size: int, repeats: int, device: str
) -> pandas.DataFrame:
    """Median milliseconds of the forward pass of one episode, and of the head's share of it; heads in turn."""
    rows = []
    for name in backbones:
        images = torch.randint(256, (WAYS * (max(shots) + queries), 3, size, size), dtype=torch.uint8, device=device)
        backbone = make_backbone(name, images.cpu()).eval().to(device)
        heads = {head: make_head(head) for head in MODELS}
        for n in shots:
            labels = torch.arange(WAYS, device=device).repeat_interleave(n)
            batch = images[: WAYS * (n + queries)]
            seconds: dict[str, list[tuple[float, float]]] = {head: [] for head in heads}
            for repeat in tqdm(range(-1, repeats), desc=f"{BACKBONES[name]}, {n}-shot", leave=False):
                for head, module in heads.items():
                    taken = _once(backbone, module, batch, labels)
                    if repeat >= 0:
                        seconds[head].append(taken)
            for head, taken in seconds.items():
                whole, own = (1e3 * statistics.median(part) for part in zip(*taken, strict=True))
                row = {"model": MODELS[head], "backbone": BACKBONES[name], "shots": n}
                rows.append(row | {"milliseconds": whole, "head milliseconds": own})
    return pandas.DataFrame(rows)


@torch.no_grad()
def _once(backbone: torch.nn.Module, head: ch.Head, images: Tensor, labels: Tensor) -> tuple[float, float]:
    begin = _now(images)
    features = backbone(images)
    middle = _now(images)
    head(features[: len(labels)], labels, features[len(labels) :], ways=WAYS)
    end = _now(images)
    return end - begin, end - middle


def _now(value: Tensor) -> float:
    if value.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def show(rows: pandas.DataFrame, title: str) -> Table:
    """Published and ours, a line for each model and backbone."""
    published = pandas.read_csv(HERE / "published" / "table3_times.csv").set_index(["model", "backbone", "shots"])
    table = Table(title=title, title_justify="left")
    shots = list(dict.fromkeys(rows["shots"]))
    for column in ("model", "backbone"):
        table.add_column(column)
    for n in shots:
        for column in ("published", "ours", "of that the head"):
            table.add_column(f"{n}-shot {column}, ms", justify="right")
    ours = {(row["model"], row["backbone"], row["shots"]): row for row in report.records(rows)}
    for model, backbone in dict.fromkeys((key[0], key[1]) for key in ours):
        cells = []
        for n in shots:
            row = ours[model, backbone, n]
            known = (model, backbone, n) in published.index
            cells += [f"{published.loc[(model, backbone, n), 'milliseconds']:.0f}" if known else "n/a"]
            cells += [f"{row['milliseconds']:.1f}", f"{row['head milliseconds']:.2f}"]
        table.add_row(model, backbone, *cells)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = jsonargparse.ArgumentParser(
        prog="python -m benchmarks.table3", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--backbones", type=list[str], default=list(BACKBONES), help=f"of {', '.join(BACKBONES)}")
    parser.add_argument("--shots", type=list[int], default=[1, 5], help="support images a class")
    parser.add_argument("--queries", type=int, default=15, help="query images a class")
    parser.add_argument("--size", type=int, default=84, help="height and width of the images")
    parser.add_argument("--repeats", type=int, default=15, help="timed episodes of each head")
    parser.add_argument("--device", type=Literal["cpu", "cuda"], default="cpu", help="where to compute")
    parser.add_argument("--output", type=Path, default=Path("runs/table3"), help="folder for the result")
    options = parser.parse_args(arguments)
    if unknown := set(options.backbones) - set(BACKBONES):
        raise SystemExit(f"error: backbones: got {', '.join(sorted(unknown))}, wanted some of {', '.join(BACKBONES)}")
    names = ("backbones", "shots", "queries", "size", "repeats", "device")
    settings: dict[str, Any] = {name: options[name] for name in names}
    rows = measure(**settings)
    origin = report.provenance()
    machine = origin["machine"]
    where = (
        machine["accelerator"] if options.device == "cuda" else f"{machine['processor']}, {machine['threads']} threads"
    )
    title = "Table 3: milliseconds of the forward pass of an episode"
    note = (
        f"Ours: {where}; one episode at a time, {options.queries} queries a class, {options.size} x {options.size} "
        f"pixels, medians of {options.repeats}, the heads in turn; untrained weights, on which times don't depend. "
        "Published: on a GPU of 2019, so only the differences between heads compare. "
        f"torch {origin['versions']['torch']}. Made by `python -m benchmarks.table3`."
    )
    table = show(rows, title)
    Console(width=max(130, Console().width)).print(table, note, f"All of it is in {options.output}", sep="\n")
    options.output.mkdir(parents=True, exist_ok=True)
    rows.to_csv(options.output / "table3.csv", index=False)
    record = {"settings": settings, "results": report.records(rows), **origin}
    (options.output / "table3.json").write_text(json.dumps(record, indent=2) + "\n")
    report.write_markdown(table, note, options.output / "table3.md")


if __name__ == "__main__":
    main()
