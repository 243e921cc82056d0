"""Figure 3 of the paper: accuracy of the SVM against the iterations of its solver, for qpth and for our solver.

python -m benchmarks.figure3 --data-root DIR                          # Conv-4 on CIFAR-FS, from packaged weights
python -m benchmarks.figure3 --data-root DIR --scale paper --train    # ResNet-12 on miniImageNet: needs GPUs

Our solver is the interior-point solver if it is stopped early, and the default solver of `SVMHead` at the optimum.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm

import convexheads as ch
from benchmarks import experiment, report, tables
from benchmarks.options import Options
from convexheads.solvers import Solver

ITERATIONS = (1, 2, 3, 5, 10, 15)
SCALES: dict[tables.Scale, tuple[str, str]] = {
    "paper": ("table1/miniimagenet/resnet12/svm", "miniimagenet"),
    "laptop": ("table2/cifar-fs/conv4/svm", "cifar-fs"),
}
"""Recipe of the weights, and data set."""


def solvers(iterations: int) -> dict[str, Solver]:
    """The solvers to compare, each stopped after a number of iterations."""
    return {
        "qpth": ch.solvers.QpthSolver(max_iterations=iterations, on_failure="return"),
        "ours": ch.solvers.InteriorPointSolver(max_iterations=iterations, on_failure="return"),
    }


def measure(
    features: Tensor, labels: Tensor, *, shots: Sequence[int], iterations: Sequence[int], episodes: int, seed: int
) -> pandas.DataFrame:
    """One row per solver, number of iterations and number of shots; the optimum has infinitely many iterations.

    All solvers see the same episodes, so the difference from the optimum is paired. Milliseconds are the time of the
    whole head per episode, when 50 episodes are solved at once.
    """
    rows: list[dict[str, Any]] = []
    settings: dict[str, Any] = {"episodes": episodes, "seed": seed, "progress": False}
    warm_up: dict[str, Any] = settings | {"episodes": min(episodes, 50)}  # compiles the kernels
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
    columns = ("shots", "solver", "iterations", "accuracy, %", "minus optimum", "median gap", "ms per episode")
    table = report.new_table(title, columns, left=["solver"])
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
    """Draw accuracy against iterations, with a panel per number of shots and the optimum as a line."""
    shots = rows["shots"].unique().tolist()
    figure, panels = report.panels(len(shots), width=4.4 * len(shots), height=3.8)
    for axes, n in zip(panels, shots, strict=True):
        own = rows[rows["shots"] == n]
        for name in dict.fromkeys(own["solver"]):
            points = own[(own["solver"] == name) & (own["iterations"] < math.inf)]
            axes.errorbar(
                points["iterations"], points["accuracy"], points["interval"], marker="o", capsize=3, label=name
            )
        optimum = own.loc[own["iterations"] == math.inf, "accuracy"].item()
        axes.axhline(optimum, color="gray", linestyle="--", linewidth=1, label="optimum")
        axes.set(xlabel="iterations", ylabel="accuracy, %", title=f"5-way {n}-shot")
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = experiment.parser("figure3", __doc__, "data_root", "seed", "output")
    text = "paper: ResNet-12 on miniImageNet; laptop: Conv-4 on CIFAR-FS"
    parser.add_argument("--scale", type=tables.Scale, default="laptop", help=text)
    parser.add_argument("--train", action="store_true", help="train networks without weights; takes hours or days")
    parser.add_argument("--shots", type=list[int], default=[1, 5], help="support images per class")
    parser.add_argument(
        "--iterations",
        type=list[int],
        default=list(ITERATIONS),
        help="numbers of iterations after which the solvers are stopped",
    )
    parser.add_argument("--episodes", type=int, default=2000, help="test episodes")
    options = parser.parse_args(arguments)
    settings: dict[str, Any] = {name: options[name] for name in ("shots", "iterations", "episodes", "seed")}
    recipe, dataset = SCALES[options.scale]
    with experiment.input_errors_end_the_script():
        root = Options(data_root=options.data_root).root
        features, labels, trained = tables.features(recipe, dataset, root=root, train=options.train)
    budget = trained.settings["steps"] * trained.settings["tasks"]
    network = f"{tables.TITLES[dataset]}, {trained.settings['backbone']}"
    rows = measure(features, labels, **settings)
    origin = report.provenance()
    title = f"Figure 3: the SVM's accuracy against its solver's iterations, {network}"
    note = (
        f"Mean over {options.episodes:,} episodes of unseen classes, the same for all solvers, ± half the 95 % "
        f"confidence interval; C = 0.1. Weights: {recipe}, {budget:,} "
        f"training episodes. Times: {experiment.place(origin)}, 50 episodes "
        f"at once. Made by `python -m benchmarks.figure3 --scale {options.scale} --data-root DIR`."
    )
    experiment.write(
        options.output,
        "figure3",
        show(rows, title),
        note,
        record={"configuration": recipe, "settings": settings, "results": report.records(rows), **origin},
        rows=rows,
        draw=partial(draw, rows),
        width=110,
    )


if __name__ == "__main__":
    main()
