"""Figure 3 of the paper: accuracy of the SVM against the iterations of its solver, on qpth and on ours.

python -m benchmarks.figure3 --data-root DIR                          # Conv-4 on CIFAR-FS, from the weights at hand
python -m benchmarks.figure3 --data-root DIR --scale paper --train    # ResNet-12 on miniImageNet: needs GPUs

Ours, stopped, is the interior point; at the optimum it is the solver as it comes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import pandas
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm

import convexheads as ch
from benchmarks import report, tables
from benchmarks.options import Options
from convexheads.solvers import Solver

ITERATIONS = (1, 2, 3, 5, 10, 15)
SCALES: dict[tables.Scale, tuple[str, str]] = {
    "paper": ("table1/miniimagenet/resnet12/svm", "miniimagenet"),
    "laptop": ("table2/cifar-fs/conv4/svm", "cifar-fs"),
}
"""Recipe of the weights, and data set."""


def solvers(iterations: int) -> dict[str, Solver]:
    """The solvers that are compared, each stopped after `iterations` iterations."""
    return {
        "qpth": ch.solvers.QpthSolver(max_iterations=iterations, on_failure="return"),
        "ours": ch.solvers.InteriorPointSolver(max_iterations=iterations, on_failure="return"),
    }


def measure(
    features: Tensor, labels: Tensor, *, shots: Sequence[int], iterations: Sequence[int], episodes: int, seed: int
) -> pandas.DataFrame:
    """One line for each solver, number of iterations and of shots; the optimum's has infinitely many iterations.

    All see the same episodes, so the difference from the optimum is paired. Milliseconds are those of the whole head
    for one episode, of 50 solved at once.
    """
    rows: list[dict[str, Any]] = []
    settings: dict[str, Any] = {"episodes": episodes, "seed": seed, "progress": False}
    warm_up: dict[str, Any] = settings | {"episodes": min(episodes, 50)}  # compiles what is compiled
    optimum: dict[int, Tensor] = {}
    jobs = [(n, count) for n in shots for count in (math.inf, *iterations)]
    for n, count in (bar := tqdm(jobs, unit="point")):
        bar.set_description(f"{n}-shot, {count} iterations")
        contenders = {"ours": ch.solvers.NativeSolver()} if count == math.inf else solvers(int(count))
        for name, solver in contenders.items():
            ch.evaluate(ch.SVMHead(C=0.1, solver=solver), features, labels, shots=n, **warm_up)
            begin = time.perf_counter()
            result = ch.evaluate(ch.SVMHead(C=0.1, solver=solver), features, labels, shots=n, **settings)
            seconds = time.perf_counter() - begin
            optimum.setdefault(n, result.accuracies)
            assert result.gaps is not None
            rows.append(
                {
                    "shots": n,
                    "solver": name,
                    "iterations": count,
                    "accuracy": 100 * result.accuracy,
                    "interval": 100 * result.confidence_interval,
                    "difference": 100 * (result.accuracies - optimum[n]).mean().item(),
                    "median gap": result.gaps.median().item(),
                    "milliseconds": 1e3 * seconds / episodes,
                }
            )
    return pandas.DataFrame(rows)


def show(rows: pandas.DataFrame, title: str) -> Table:
    """A line for each point."""
    table = Table(title=title, title_justify="left")
    for column in ("shots", "solver", "iterations", "accuracy, %", "minus optimum", "median gap", "ms an episode"):
        table.add_column(column, justify="left" if column == "solver" else "right")
    for row in rows.to_dict("records"):
        count = "optimum" if row["iterations"] == math.inf else f"{row['iterations']:.0f}"
        accuracy = f"{row['accuracy']:.2f} ± {row['interval']:.2f}"
        table.add_row(
            str(row["shots"]),
            row["solver"],
            count,
            accuracy,
            f"{row['difference']:+.2f}",
            f"{row['median gap']:.0e}",
            f"{row['milliseconds']:.2f}",
        )
    return table


def draw(rows: pandas.DataFrame, path: Path) -> None:
    """Accuracy against iterations, a panel for each number of shots, the optimum as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shots = rows["shots"].unique().tolist()
    figure = Figure(figsize=(4.4 * len(shots), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, n in zip(figure.subplots(1, len(shots), squeeze=False)[0], shots, strict=True):
        own = rows[rows["shots"] == n]
        for name in dict.fromkeys(own["solver"]):
            points = own[(own["solver"] == name) & (own["iterations"] < math.inf)]
            axes.errorbar(
                points["iterations"], points["accuracy"], points["interval"], marker="o", capsize=3, label=name
            )
        optimum = own.loc[own["iterations"] == math.inf, "accuracy"].item()
        axes.axhline(optimum, color="gray", linestyle="--", linewidth=1, label="optimum")
        axes.set(xlabel="iterations", ylabel="accuracy, %", title=f"5-way {n}-shot")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = jsonargparse.ArgumentParser(
        prog="python -m benchmarks.figure3", description=(__doc__ or "").partition("\n")[0]
    )
    text = "paper: ResNet-12 on miniImageNet; laptop: Conv-4 on CIFAR-FS"
    parser.add_argument("--scale", type=tables.Scale, default="laptop", help=text)
    parser.add_argument("--train", action="store_true", help="train what has no weights yet; hours, or days")
    parser.add_argument("--data-root", type=Path | None, help="folder of the data; else variable CONVEXHEADS_DATA")
    parser.add_argument("--shots", type=list[int], default=[1, 5], help="support images per class")
    parser.add_argument("--iterations", type=list[int], default=list(ITERATIONS), help="where the solvers are stopped")
    parser.add_argument("--episodes", type=int, default=2000, help="test episodes")
    parser.add_argument("--seed", type=int, default=0, help="of the test episodes")
    parser.add_argument("--output", type=Path, default=Path("runs/figure3"), help="folder for the result")
    options = parser.parse_args(arguments)
    settings: dict[str, Any] = {name: options[name] for name in ("shots", "iterations", "episodes", "seed")}
    recipe, dataset = SCALES[options.scale]
    try:
        root = Options(data_root=options.data_root).root
        features, labels, trained = tables.features(recipe, dataset, root=root, train=options.train)
    except ch.InputError as error:
        raise SystemExit(f"error: {error}") from error
    budget = trained.settings["steps"] * trained.settings["tasks"]
    network = f"{tables.TITLES[dataset]}, {trained.settings['backbone']}"
    rows = measure(features, labels, **settings)
    origin = report.provenance()
    title = f"Figure 3: the SVM's accuracy against its solver's iterations, {network}"
    note = (
        f"Mean over {options.episodes:,} episodes of unseen classes, the same ones everywhere, ± half the 95 % "
        f"confidence interval; C = 0.1. Weights: {recipe}, {budget:,} "
        f"training episodes. Times: {origin['machine']['processor']}, {torch.get_num_threads()} threads, 50 episodes "
        "at once. Made by `python -m benchmarks.figure3 --scale {options.scale} --data-root DIR`."
    )
    Console(width=max(110, Console().width)).print(
        show(rows, title), note, f"All of it is in {options.output}", sep="\n"
    )
    options.output.mkdir(parents=True, exist_ok=True)
    rows.to_csv(options.output / "figure3.csv", index=False)
    record = {
        "configuration": recipe,
        "settings": settings,
        "results": report.records(rows),
        **origin,
    }
    (options.output / "figure3.json").write_text(json.dumps(record, indent=2) + "\n")
    report.write_markdown(show(rows, title), note, options.output / "figure3.md")
    draw(rows, options.output / "figure3.png")


if __name__ == "__main__":
    main()
