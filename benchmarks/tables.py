"""The common code of the scripts for tables: published values, our measurements, and tables of both.

A table is a list of cells. Those with a recipe are measured, on weights that come with the package, that are in
`benchmarks/results/trainings/RECIPE`, that a training run has left in `runs/RECIPE`, or that are trained now. All heads
on a data set see the same episodes. A figure that draws such cells is also a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import pandas
from rich.table import Table as RichTable
from torch import Tensor
from tqdm.auto import tqdm

import convexheads as ch
from benchmarks import experiment, report, require_modules
from benchmarks.data import ImageSet, load
from benchmarks.options import Options
from convexheads.evaluation import Evaluation
from convexheads.models.pretrained import WEIGHTS_DIR

HERE = Path(__file__).parent
TITLES = {
    "cifar-fs": "CIFAR-FS",
    "fc100": "FC100",
    "miniimagenet": "miniImageNet",
    "tieredimagenet": "tieredImageNet",
    "omniglot": "Omniglot",
}
HEADS = {"prototypes": "Prototypical Networks", "ridge": "MetaOptNet-RR", "svm": "MetaOptNet-SVM"}
"""The names of heads in `convexheads.models.list_pretrained`, and their names in the paper."""

Scale = Literal["paper", "laptop"]


@dataclass(frozen=True)
class Row:
    """One of our methods.

    Attributes:
        model: its name, as in the published table if it is there.
        backbone: the name of its backbone, likewise.
        recipes: for each test data set and number of test shots, the recipe with which the weights were trained,
            possibly on another data set.
    """

    model: str
    backbone: str
    recipes: dict[tuple[str, int], str]


def published(name: str) -> pandas.DataFrame:
    """The published accuracies of a table in percent, one per line, and the text as printed in the paper.

    There are no lines if the paper has only a picture.
    """
    file = HERE / "published" / f"{name}.csv"
    source = file if file.is_file() else StringIO("model,backbone,dataset,shots,accuracy,interval,note")
    rows = pandas.read_csv(source, keep_default_na=False, dtype=str)
    interval = (" ± " + rows["interval"]).where(rows["interval"] != "", "")
    rows["text"] = rows["accuracy"] + interval
    rows["interval"] = pandas.to_numeric(rows["interval"])
    return rows.astype({"shots": int, "accuracy": float, "interval": float})


def bars(table: Table, ours: pandas.DataFrame, path: Path) -> None:
    """Draw our values as bars with intervals, and published values of the same model and backbone as diamonds."""
    theirs = published(table.name).set_index(["model", "backbone", "dataset", "shots"])
    columns = list(dict.fromkeys(zip(ours["dataset"], ours["shots"], strict=True)))
    names = list(dict.fromkeys(zip(ours["model"], ours["backbone"], strict=True)))
    figure, (axes,) = report.panels(width=2 + 2.2 * len(columns), height=4.4)
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
    axes.axhline(100 / table.ways, color="gray", linestyle="--", linewidth=1, label="chance")
    axes.set_xticks(range(len(columns)), [f"{TITLES[dataset]}\n{shots}-shot" for dataset, shots in columns])
    axes.set_ylabel("accuracy on unseen classes, %")
    longest = max(len(model) for model, _ in names)
    figure.legend(loc="outside lower center", ncols=1 if longest > 25 else 2, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


@dataclass(frozen=True)
class Table:
    """A table of the paper, or a figure.

    Attributes:
        name: the name, such as "table2", also of the file of published values, if there are any.
        title: the text above it.
        datasets: its columns, each with 1 and 5 shots.
        rows: our rows, by scale. Differences are from the first row with the same backbone, paired by episode.
        ways: classes of an episode.
        draw: draws our measurements.
    """

    name: str
    title: str
    datasets: tuple[str, ...]
    rows: dict[Scale, list[Row]]
    ways: int = 5
    draw: Callable[[Table, pandas.DataFrame, Path], None] = bars

    @property
    def columns(self) -> list[tuple[str, int]]:
        """The data set and the shots of each column."""
        return [(dataset, shots) for dataset in self.datasets for shots in (1, 5)]


def find_weights(recipe: str) -> Path | None:
    """The weights of a finished training run by a recipe: the committed ones, otherwise those below `runs/`."""
    table, dataset, backbone, head = recipe.split("/")
    packaged = WEIGHTS_DIR / f"{backbone}-{dataset}-{head}.safetensors"
    files = [packaged] if table in ("table2", "omniglot") else []
    folders = (HERE / "results" / "trainings" / recipe, Path("runs") / recipe)
    files += [folder / "model.safetensors" for folder in folders]
    return next((file for file in files if file.is_file()), None)


def features(
    recipe: str, dataset: str, *, root: Path | None, train: bool
) -> tuple[Tensor, Tensor, ch.models.Pretrained]:
    """Features and labels of the test classes of a data set, by the backbone of a recipe, and the trained model.

    If the images have another size than those the backbone was trained on, they are resized to that size.

    Raises:
        InputError: there are no weights and `train` is false, or the data is missing.
    """
    found, trained = _features(_weights(recipe, root, train), dataset, root)
    return found, _test_classes(dataset, root).labels, trained


def evaluate(
    recipe: str, dataset: str, shots: int, *, root: Path | None, train: bool, **settings: Any
) -> tuple[Evaluation, dict[str, Any]]:
    """Accuracies of a trained backbone with the head that it was trained through, and the options of that run.

    Raises:
        InputError: there are no weights and `train` is false, or the data is missing.
    """
    found, labels, trained = features(recipe, dataset, root=root, train=train)
    return ch.evaluate(trained.head, found, labels, shots=shots, **settings), trained.settings


def _weights(recipe: str, root: Path | None, train: bool) -> Path:
    if weights := find_weights(recipe):
        return weights
    if not train:
        command = f"python -m benchmarks.train --recipe {recipe} --data-root DIR"
        raise ch.InputError("weights", f"--train, or the result of {command}", f"no weights for {recipe}")
    from benchmarks.train import run

    options = Options.from_recipe(recipe, data_root=root, output=Path("runs") / recipe)
    run(replace(options, resume=options.checkpoint.is_file()))
    return options.folder / "model.safetensors"


@cache
def _test_classes(dataset: str, root: Path | None) -> ImageSet:
    return load(dataset, root, splits=("test",), progress=True)["test"]


@cache
def _features(weights: Path, dataset: str, root: Path | None) -> tuple[Tensor, ch.models.Pretrained]:
    trained, images = ch.load_pretrained(weights), _test_classes(dataset, root).images
    if images.shape[-1] != (size := trained.settings["image_size"]):
        require_modules("torchvision")
        from torchvision.transforms.v2.functional import resize  # only for images of another size

        images = resize(images, [size, size])
    return ch.embed(trained.backbone, images), trained


def measure(
    table: Table, scale: Scale, *, root: Path | None, train: bool, episodes: int, queries: int, seed: int
) -> pandas.DataFrame:
    """One line per cell that we measure: accuracy, interval, and paired difference from the backbone's first row.

    Without `train`, cells without weights are left out.

    Raises:
        InputError: the data is missing.
    """
    found: list[dict[str, Any]] = []
    reference: dict[tuple[str, str, int], Tensor] = {}
    jobs = [(row, dataset, shots) for row in table.rows[scale] for dataset, shots in row.recipes]
    jobs = [job for job in jobs if train or find_weights(job[0].recipes[job[1:]])]
    for row, dataset, shots in (bar := tqdm(jobs, unit="cell", disable=not jobs)):
        bar.set_description(f"{row.model}, {dataset}, {shots}-shot")
        settings = {"ways": table.ways, "episodes": episodes, "queries": queries, "seed": seed}
        recipe = row.recipes[dataset, shots]
        result, trained = evaluate(recipe, dataset, shots, root=root, train=train, **settings)
        first = reference.setdefault((row.backbone, dataset, shots), result.accuracies)
        difference = 100 * (result.accuracies - first)
        found.append(
            {
                "model": row.model,
                "backbone": row.backbone,
                "dataset": dataset,
                "shots": shots,
                "accuracy": 100 * result.accuracy,
                "interval": 100 * result.confidence_interval,
                "difference": difference.mean().item(),
                "difference interval": 1.96 * difference.std().item() / math.sqrt(len(difference)),
                "largest gap": None if result.gaps is None else result.gaps.max().item(),
                "text": f"{100 * result.accuracy:.2f} ± {100 * result.confidence_interval:.2f}",
                "configuration": recipe,
                "trained on": trained["dataset"],
                "training shots": trained["shots"],
                "training episodes": trained["steps"] * trained["tasks"],
                "training seed": trained["seed"],
                **settings,
            }
        )
    return pandas.DataFrame(found)


def show(
    table: Table, ours: pandas.DataFrame, scale: Scale, more: dict[str, dict[tuple[str, str, str], str]] | None = None
) -> RichTable:
    """Published values and ours in one table, with n/a if nothing was published for that backbone.

    `more` has further columns: for each header, texts by "published" or "ours", model and backbone.
    """
    more = more or {}
    left = ("model", "backbone", "by")
    columns = [*left, *(f"{TITLES[dataset]} {shots}-shot, %" for dataset, shots in table.columns), *more]
    result = report.new_table(f"{table.title}, {scale} scale", columns, left=left)
    texts = {
        (by, row["model"], row["backbone"], row["dataset"], row["shots"]): row["text"]
        for by, frame in (("published", published(table.name)), ("ours", ours))
        for row in report.records(frame)
    }
    own = [(row.model, row.backbone) for row in table.rows[scale]]
    theirs = list(dict.fromkeys([key[1:3] for key in texts if key[0] == "published"] + own))
    rows = [("published", "n/a", theirs)] if any(key[0] == "published" for key in texts) else []
    for by, absent, methods in [*rows, ("ours", "not trained", own)]:
        for model, backbone in methods:
            there = {column for row in table.rows[scale] if row.model == model for column in row.recipes}
            cells = (
                texts.get((by, model, backbone, *column), absent if by == "published" or column in there else "")
                for column in table.columns
            )
            further = (column.get((by, model, backbone), "n/a") for column in more.values())
            result.add_row(model, backbone, by, *cells, *further)
    return result


def differences(table: Table, ours: pandas.DataFrame) -> RichTable:
    """The difference of each of our rows from the first row with the same backbone, paired by episode."""
    columns = [column for column in table.columns if column in set(zip(ours["dataset"], ours["shots"], strict=True))]
    headers = ["model", *(f"{TITLES[dataset]} {shots}-shot" for dataset, shots in columns)]
    result = report.new_table("Our rows minus the first of the backbone, in %, paired", headers, left=["model"])
    for model, own in ours.groupby("model", sort=False):
        cells = {
            (row["dataset"], row["shots"]): f"{row['difference']:+.2f} ± {row['difference interval']:.2f}"
            for row in report.records(own)
            if row["difference interval"]
        }
        if cells:
            result.add_row(str(model), *(cells.get(column, "") for column in columns))
    return result


def write(table: Table, ours: pandas.DataFrame, scale: Scale, output: Path) -> None:
    """Show the table, and write it as Markdown, CSV, JSON and picture."""
    shown, paired = show(table, ours, scale), differences(table, ours)
    origin = report.provenance()
    note = (
        f"{describe(table, ours)} torch {origin['versions']['torch']}. Made by "
        f"`python -m benchmarks.{table.name} --scale {scale} --data-root DIR`."
    )
    experiment.write(
        output,
        table.name,
        shown,
        note,
        more=[(paired, "")] if paired.row_count else [],
        record={"scale": scale, "results": report.records(ours), **origin},
        rows=ours,
        draw=partial(table.draw, table, ours),
        width=150,
    )


def describe(table: Table, ours: pandas.DataFrame) -> str:
    """The conditions of our measurements, and notes on the published values."""
    budgets: dict[str, list[str]] = {}
    for row in report.records(ours):
        own = budgets.setdefault(f"{row['training episodes']:,}", [])
        if (name := f"{row['model']} on {TITLES[row['trained on']]}") not in own:
            own.append(name)
    trained = "; ".join(f"{count}: {', '.join(names)}" for count, names in budgets.items())
    if len(budgets) == 1:
        (trained,) = budgets
    return (
        f"Ours: mean over {ours['episodes'].iloc[0]:,} episodes of unseen classes, {ours['queries'].iloc[0]} queries "
        f"per class, seed {ours['seed'].iloc[0]}, the same ones for all heads, ± half the 95 % confidence interval; "
        f"one training run each, seed {ours['training seed'].iloc[0]}. Training episodes: {trained}. "
        f"{describe_published(table)}"
    )


def describe_published(table: Table) -> str:
    """Notes on the published values."""
    theirs = published(table.name)
    if theirs.empty:
        return "The paper gives no numbers."
    notes = [f"{', '.join(dict.fromkeys(own['model']))}: {note}" for note, own in theirs.groupby("note") if note]
    return "; ".join(["Published: as printed in the paper; n/a if it has no value for that backbone", *notes]) + "."


def parser(table: Table, description: str | None) -> jsonargparse.ArgumentParser:
    """The command line of a table, without the option for the folder of the result."""
    made = experiment.parser(table.name, description, "data_root", "seed")
    scales, text = tuple(table.rows), "paper: its own networks; laptop: Conv-4"
    made.add_argument("--scale", type=Literal[scales], default=scales[-1], help=text)
    made.add_argument("--train", action="store_true", help="train networks without weights; takes hours or days")
    made.add_argument("--episodes", type=int, default=10_000, help="test episodes")
    made.add_argument("--queries", type=int, default=15, help="query images per class")
    return made


def measure_by_options(table: Table, options: Any) -> pandas.DataFrame:
    """Call `measure` with the options of the command line."""
    names = ("train", "episodes", "queries", "seed")
    root = Options(data_root=options.data_root).root
    return measure(table, options.scale, root=root, **{name: options[name] for name in names})


def main(table: Table, description: str | None, arguments: Sequence[str] | None = None) -> None:
    """Measure a table from the command line."""
    command, text = parser(table, description), f"folder for the result; default: runs/{table.name}-SCALE"
    command.add_argument("--output", type=Path | None, help=text)
    options = command.parse_args(arguments)
    with experiment.input_errors_end_the_script():
        ours = measure_by_options(table, options)
        if ours.empty:
            first = next(iter(table.rows[options.scale][0].recipes.values()))
            _weights(first, None, train=False)  # its error says what to do
    write(table, ours, options.scale, options.output or Path("runs") / f"{table.name}-{options.scale}")
