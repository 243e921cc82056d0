"""What the scripts of the paper's tables have in common: published values, ours beside them, and how ours come about.

A table is a list of cells. Those with a configuration are measured: its weights are taken from `benchmarks/results/`,
or from where a training left them, or trained; then all heads of a data set see the same episodes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import pandas
from rich.console import Console
from rich.table import Table as RichTable
from torch import Tensor
from tqdm.auto import tqdm

import convexheads as ch
from benchmarks import report
from benchmarks.data import ImageSet, load
from benchmarks.models import Trained, load_weights
from benchmarks.options import Options

HERE = Path(__file__).parent
TITLES = {
    "cifar-fs": "CIFAR-FS",
    "fc100": "FC100",
    "miniimagenet": "miniImageNet",
    "tieredimagenet": "tieredImageNet",
}
Scale = Literal["paper", "laptop"]


@dataclass(frozen=True)
class Row:
    """A method of ours.

    Attributes:
        model: its name, as in the published table where that has it.
        backbone: likewise.
        configurations: by data set and test shots, the configuration below `benchmarks/configs` without its ending.
    """

    model: str
    backbone: str
    configurations: dict[tuple[str, int], str]


@dataclass(frozen=True)
class Table:
    """A table of the paper.

    Attributes:
        name: such as "table2", which also names the file of published values.
        title: what stands above it.
        datasets: its columns, each with 1 and 5 shots.
        rows: ours, by scale. Differences are paired with those of the first row of a backbone.
    """

    name: str
    title: str
    datasets: tuple[str, ...]
    rows: dict[Scale, list[Row]]


def published(name: str) -> pandas.DataFrame:
    """The published accuracies of a table, in per cent, a line for each; and as they are printed there (`text`)."""
    rows = pandas.read_csv(HERE / "published" / f"{name}.csv", keep_default_na=False, dtype=str)
    rows["text"] = rows["accuracy"] + " ± " + rows["interval"]
    return rows.astype({"shots": int, "accuracy": float, "interval": float})


def find_weights(configuration: str) -> Path | None:
    """The weights of a finished training with that configuration: the committed ones, else those below `runs/`."""
    folders = (parent / run_name(configuration) for parent in (HERE / "results", Path("runs")))
    return next((file for folder in folders if (file := folder / "model.safetensors").is_file()), None)


def run_name(configuration: str) -> str:
    """The folder that a configuration's results are in."""
    return configuration.replace("/", "_")


def features(configuration: str, *, root: Path | None, train: bool) -> tuple[Tensor, Tensor, Trained]:
    """Features and labels of a data set's test classes by the backbone of that configuration, and its weights.

    Raises:
        InputError: there are no weights and `train` is false, or the data is missing.
    """
    trained, path = _trained(configuration, root, train)
    data = _test_classes(trained.settings["dataset"], root)
    return _features(path, trained.settings["dataset"], root), data.labels, trained


def evaluate(
    configuration: str, shots: int, *, root: Path | None, train: bool, **settings: Any
) -> tuple[ch.Evaluation, dict[str, Any]]:
    """Accuracies of a trained backbone with the head that it was trained through, and what it was trained with.

    Raises:
        InputError: there are no weights and `train` is false, or the data is missing.
    """
    found, labels, trained = features(configuration, root=root, train=train)
    return ch.evaluate(trained.head, found, labels, ways=5, shots=shots, **settings), trained.settings


def _trained(configuration: str, root: Path | None, train: bool) -> tuple[Trained, Path]:
    weights = find_weights(configuration)
    if weights is None:
        if not train:
            command = f"python -m benchmarks.train --config benchmarks/configs/{configuration}.yaml --data-root DIR"
            raise ch.InputError(
                "weights", f"none of {configuration}", f"--train, or what this leaves behind: {command}"
            )
        from benchmarks.train import run

        options = Options.read(HERE / "configs" / f"{configuration}.yaml", data_root=root)
        options = replace(options, output=Path("runs") / run_name(configuration))
        run(replace(options, resume=options.checkpoint.is_file()))
        weights = options.folder / "model.safetensors"
    return load_weights(weights), weights


@cache
def _test_classes(dataset: str, root: Path | None) -> ImageSet:
    return load(dataset, root, splits=("test",), progress=True)["test"]


@cache
def _features(weights: Path, dataset: str, root: Path | None) -> Tensor:
    return ch.embed(load_weights(weights).backbone, _test_classes(dataset, root).images)


def measure(
    rows: Sequence[Row], *, root: Path | None, train: bool, episodes: int, queries: int, seed: int
) -> pandas.DataFrame:
    """One line for each cell of ours: accuracy, interval, and the paired difference from the backbone's first row.

    Without `train`, what has no weights yet is left out.

    Raises:
        InputError: nothing has weights and `train` is false, or the data is missing.
    """
    found: list[dict[str, Any]] = []
    reference: dict[tuple[str, str, int], Tensor] = {}
    jobs = [(row, dataset, shots) for row in rows for dataset, shots in row.configurations]
    there = [job for job in jobs if train or find_weights(job[0].configurations[job[1:]])]
    jobs = there or jobs[:1]  # whose error says what to do
    for row, dataset, shots in (bar := tqdm(jobs, unit="cell")):
        bar.set_description(f"{row.model}, {dataset}, {shots}-shot")
        settings = {"episodes": episodes, "queries": queries, "seed": seed}
        configuration = row.configurations[dataset, shots]
        result, trained = evaluate(configuration, shots, root=root, train=train, **settings)
        first = reference.setdefault((row.backbone, dataset, shots), result.accuracies)
        difference = 100 * (result.accuracies - first)
        found.append(
            {
                "model": row.model,
                "backbone": row.backbone,
                "dataset": dataset,
                "shots": shots,
                "accuracy": 100 * result.mean,
                "interval": 100 * result.interval,
                "difference": difference.mean().item(),
                "difference interval": 1.96 * difference.std().item() / math.sqrt(len(difference)),
                "largest gap": None if result.gaps is None else result.gaps.max().item(),
                "text": f"{100 * result.mean:.2f} ± {100 * result.interval:.2f}",
                "configuration": configuration,
                "training episodes": trained["steps"] * trained["tasks"],
                "training seed": trained["seed"],
                **settings,
            }
        )
    return pandas.DataFrame(found)


def show(table: Table, ours: pandas.DataFrame, scale: Scale) -> RichTable:
    """Published and ours in one table; n/a where nothing was published for that very backbone."""
    result = RichTable(title=f"{table.title}, {scale} scale", title_justify="left")
    for column in ("model", "backbone", "by"):
        result.add_column(column)
    columns = [(dataset, shots) for dataset in table.datasets for shots in (1, 5)]
    for dataset, shots in columns:
        result.add_column(f"{TITLES[dataset]} {shots}-shot, %", justify="right")
    rows = {"published": report.records(published(table.name)), "ours": report.records(ours)}
    methods = {by: dict.fromkeys((row["model"], row["backbone"]) for row in own) for by, own in rows.items()}
    methods["published"] |= methods["ours"]
    for by, absent in (("published", "n/a"), ("ours", "not trained")):
        for model, backbone in methods[by]:
            own = [row for row in rows[by] if (row["model"], row["backbone"]) == (model, backbone)]
            cells = {(row["dataset"], row["shots"]): row for row in own}
            texts = (cells[column]["text"] if column in cells else absent for column in columns)
            result.add_row(model, backbone, by, *texts)
    return result


def draw(table: Table, ours: pandas.DataFrame, path: Path) -> None:
    """Ours as bars with their intervals, published values of the same model and backbone as diamonds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    theirs = published(table.name).set_index(["model", "backbone", "dataset", "shots"])
    columns = list(dict.fromkeys(zip(ours["dataset"], ours["shots"], strict=True)))
    names = list(dict.fromkeys(zip(ours["model"], ours["backbone"], strict=True)))
    figure = Figure(figsize=(2 + 2.2 * len(columns), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.8 / len(names)
    for number, (model, backbone) in enumerate(names):
        own = [row for row in report.records(ours) if (row["model"], row["backbone"]) == (model, backbone)]
        place = [columns.index((row["dataset"], row["shots"])) + (number + 0.5) * width - 0.4 for row in own]
        heights = [row["accuracy"] for row in own]
        errors = [row["interval"] for row in own]
        axes.bar(place, heights, 0.9 * width, yerr=errors, capsize=3, label=f"{model}, {backbone}")
        keys = [(model, backbone, row["dataset"], row["shots"]) for row in own]
        marks = [(at, theirs.loc[key, "accuracy"]) for at, key in zip(place, keys, strict=True) if key in theirs.index]
        if marks:
            axes.plot(*zip(*marks, strict=True), "kD", markersize=5, label="published" if not number else None)
    axes.axhline(20, color="grey", linestyle="--", linewidth=1, label="chance")
    axes.set_xticks(range(len(columns)), [f"{TITLES[dataset]}\n{shots}-shot" for dataset, shots in columns])
    axes.set_ylabel("accuracy on unseen classes, %")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def write(table: Table, ours: pandas.DataFrame, scale: Scale, output: Path) -> None:
    """Show the table, and write it as Markdown, CSV, JSON and picture."""
    shown = show(table, ours, scale)
    origin = report.provenance()
    budgets = "; ".join(
        dict.fromkeys(
            f"{row['model']} on {TITLES[row['dataset']]} {row['training episodes']:,}" for row in report.records(ours)
        )
    )
    paired = "; ".join(
        f"{row['model']} on {TITLES[row['dataset']]} {row['shots']}-shot {row['difference']:+.2f} ± "
        f"{row['difference interval']:.2f}"
        for row in report.records(ours)
        if row["difference interval"]
    )
    note = (
        f"Ours: mean over {ours['episodes'].iloc[0]:,} episodes of unseen classes, {ours['queries'].iloc[0]} queries a "
        f"class, seed {ours['seed'].iloc[0]}, the same ones for all heads, ± half the 95 % confidence interval; one "
        f"training each, seed {ours['training seed'].iloc[0]}. Training episodes: {budgets}. Differences from the "
        f"first of ours, paired by episode, in points: {paired or 'none'}. Published: as in the paper; n/a where it "
        f"has no value for that backbone. torch {origin['versions']['torch']}. Made by "
        f"`python -m benchmarks.{table.name} --scale {scale} --data-root DIR`."
    )
    Console(width=max(150, Console().width)).print(shown, note, f"All of it is in {output}", sep="\n")
    output.mkdir(parents=True, exist_ok=True)
    ours.to_csv(output / f"{table.name}.csv", index=False)
    record = {"scale": scale, "results": report.records(ours), **origin}
    (output / f"{table.name}.json").write_text(json.dumps(record, indent=2) + "\n")
    report.write_markdown(shown, note, output / f"{table.name}.md")
    draw(table, ours, output / f"{table.name}.png")


def main(table: Table, description: str, arguments: Sequence[str] | None = None) -> None:
    """The command line of a table."""
    parser = jsonargparse.ArgumentParser(prog=f"python -m benchmarks.{table.name}", description=description)
    scales = tuple(table.rows)
    text = "paper: its own networks; laptop: Conv-4"
    parser.add_argument("--scale", type=Literal[scales], default=scales[-1], help=text)
    parser.add_argument("--data-root", type=Path | None, help="folder of the data; else variable CONVEXHEADS_DATA")
    parser.add_argument("--train", action="store_true", help="train what has no weights yet; hours, or days")
    parser.add_argument("--episodes", type=int, default=10_000, help="test episodes")
    parser.add_argument("--queries", type=int, default=15, help="query images a class")
    parser.add_argument("--seed", type=int, default=0, help="of the test episodes")
    parser.add_argument(
        "--output", type=Path | None, help=f"folder for the result; runs/{table.name}-SCALE if not given"
    )
    options = parser.parse_args(arguments)
    settings = {name: options[name] for name in ("train", "episodes", "queries", "seed")}
    try:
        ours = measure(table.rows[options.scale], root=Options(data_root=options.data_root).root, **settings)
    except ch.InputError as error:
        raise SystemExit(f"error: {error}") from error
    write(table, ours, options.scale, options.output or Path("runs") / f"{table.name}-{options.scale}")
