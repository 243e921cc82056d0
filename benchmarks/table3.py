"""Table 3 of the paper: accuracy and time of each head on each backbone, published values and ours.

python -m benchmarks.table3 --data-root DIR                          # Conv-4 trained on CIFAR-FS: across domains
python -m benchmarks.table3 --data-root DIR --scale paper --train    # as in the paper: needs GPUs

Times are measured on 84 x 84 images, one episode at a time.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas
import torch
from torch import Tensor
from tqdm.auto import tqdm

import convexheads as ch
from benchmarks import experiment, report, table1, tables
from benchmarks.tables import HEADS, HERE, Row, Scale, Table
from convexheads.models import build_backbone, build_head

BACKBONES = {"conv4": "64-64-64-64", "resnet12": "ResNet-12"}
DATASETS = ("miniimagenet", "tieredimagenet")


def recipe(dataset: str, backbone: str, head: str, shots: int) -> str:
    """The recipe of a cell. Prototypes are trained for each number of shots; some cells are also in Table 1."""
    if head == "prototypes":
        return f"table3/{dataset}/{backbone}/prototypes-{shots}-shot"
    return f"table{1 if backbone == 'resnet12' else 3}/{dataset}/{backbone}/{head}"


PAPER = [
    Row(
        name,
        network,
        {(data, shots): recipe(data, backbone, head, shots) for data in DATASETS for shots in (1, 5)},
    )
    for backbone, network in BACKBONES.items()
    for head, name in HEADS.items()
]
TABLE = Table(
    "table3",
    "Table 3: 5-way accuracy, and milliseconds of the forward pass of an episode",
    DATASETS,
    {"paper": PAPER, "laptop": [*table1.TABLE.rows["laptop"], *(row for row in PAPER if row.backbone == "ResNet-12")]},
)


def measure(
    *, backbones: Sequence[str], shots: Sequence[int], queries: int, size: int, repeats: int, device: str
) -> pandas.DataFrame:
    """Median milliseconds of the forward pass of one episode, and those of the head alone. The heads alternate."""
    rows = []
    for name in backbones:
        images = torch.randint(
            256, (TABLE.ways * (max(shots) + queries), 3, size, size), dtype=torch.uint8, device=device
        )
        backbone = build_backbone(name, images.cpu()).eval().to(device)
        heads = {head: build_head(head) for head in HEADS}
        for n in shots:
            labels = torch.arange(TABLE.ways, device=device).repeat_interleave(n)
            batch = images[: TABLE.ways * (n + queries)]
            seconds: dict[str, list[tuple[float, float]]] = {head: [] for head in heads}
            for repeat in tqdm(range(-1, repeats), desc=f"{BACKBONES[name]}, {n}-shot", leave=False):
                for head, module in heads.items():
                    taken = _once(backbone, module, batch, labels)
                    if repeat >= 0:
                        seconds[head].append(taken)
            for head, taken in seconds.items():
                whole, own = (1e3 * statistics.median(part) for part in zip(*taken, strict=True))
                row = {"model": HEADS[head], "backbone": BACKBONES[name], "shots": n}
                rows.append(row | {"milliseconds": whole, "head milliseconds": own})
    return pandas.DataFrame(rows)


@torch.no_grad()
def _once(
    backbone: torch.nn.Module, head: ch.ClassificationHead, images: Tensor, labels: Tensor
) -> tuple[float, float]:
    begin = report.now(images)
    features = backbone(images)
    middle = report.now(images)
    head(features[: len(labels)], labels, features[len(labels) :], ways=TABLE.ways)
    end = report.now(images)
    return end - begin, end - middle


def times(rows: pandas.DataFrame, scale: Scale) -> dict[str, dict[tuple[str, str, str], str]]:
    """Published times and ours as columns: for each header, texts by "published" or "ours", model and backbone."""
    found: dict[str, dict[tuple[str, str, str], str]] = {}
    for row in report.records(pandas.read_csv(HERE / "published" / "table3_times.csv")):
        own = found.setdefault(f"{row['shots']}-shot, ms", {})
        own["published", row["model"], row["backbone"]] = f"{row['milliseconds']:.0f} ± {row['interval']:g}"
    for row in report.records(rows):
        own = found.setdefault(f"{row['shots']}-shot, ms", {})
        text = f"{row['milliseconds']:.1f} (head {row['head milliseconds']:.2f})"
        for method in TABLE.rows[scale]:  # which may have more to its name, such as what it was trained on
            if (method.model.partition(",")[0], method.backbone) == (row["model"], row["backbone"]):
                own["ours", method.model, method.backbone] = text
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = tables.parser(TABLE, __doc__)
    text = f"backbones to time, some of {', '.join(BACKBONES)}"
    parser.add_argument("--backbones", type=list[str], default=list(BACKBONES), help=text)
    parser.add_argument("--shots", type=list[int], default=[1, 5], help="support images per class that are timed")
    parser.add_argument("--size", type=int, default=84, help="height and width of the timed images")
    parser.add_argument("--repeats", type=int, default=15, help="timed episodes of each head")
    parser.add_argument("--device", type=Literal["cpu", "cuda"], default="cpu", help="device to measure on")
    parser.add_argument("--output", type=Path, default=Path("runs/table3"), help="folder for the result")
    options = parser.parse_args(arguments)
    experiment.refuse_unknown("backbones", options.backbones, BACKBONES)
    names = ("backbones", "shots", "queries", "size", "repeats", "device")
    settings: dict[str, Any] = {name: options[name] for name in names}
    with experiment.input_errors_end_the_script():
        accuracies = tables.measure_by_options(TABLE, options)
    rows = measure(**settings)
    origin = report.provenance()
    note = (
        f"Our times: {experiment.place(origin, options.device)}; "
        f"one episode at a time, {options.queries} queries per class, {options.size} x "
        f"{options.size} pixels, medians of {options.repeats}, the heads in turn; the weights are untrained, because "
        "times don't depend on them; the head's share is in parentheses. Published times: measured on a GPU from 2019, "
        "so only the differences between heads are comparable. "
        f"{tables.describe_published(TABLE) if accuracies.empty else tables.describe(TABLE, accuracies)} "
        f"torch {origin['versions']['torch']}. Made by "
        f"`python -m benchmarks.table3 --scale {options.scale} --data-root DIR`."
    )
    table = tables.show(TABLE, accuracies, options.scale, times(rows, options.scale))
    experiment.write(
        options.output,
        "table3",
        table,
        note,
        record={"settings": settings, "results": report.records(accuracies), "times": report.records(rows), **origin},
        rows=None if accuracies.empty else accuracies,
        draw=None if accuracies.empty else partial(TABLE.draw, TABLE, accuracies),
        width=170,
    )
    rows.to_csv(options.output / "table3_times.csv", index=False)


if __name__ == "__main__":
    main()
