"""Compare all heads on the features of a trained Conv-4: accuracy, calibration, time, certificates.

python -m benchmarks.heads --data-root DIR                        # with weights that come with the package
python -m benchmarks.heads --data-root DIR --weights runs/FOLDER  # with weights from `python -m benchmarks.train`
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas
import torch
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm

import convexheads as ch
from benchmarks import experiment, report
from benchmarks.data import ImageSet, load
from convexheads.calibration import calibrate
from convexheads.evaluation import embed, evaluate

SLACK = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
WEIGHT = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)


def _kernel() -> ch.kernels.Linear:
    return ch.kernels.Linear(normalize=True)  # the diagonal of the Gram matrix is about 1


FAMILIES: dict[str, tuple[Callable[[float], ch.ClassificationHead], tuple[float, ...]]] = {
    "SVM": (lambda C: ch.SVMHead(C, kernel=_kernel()), SLACK),
    "SVM, squared hinge": (lambda C: ch.SVMHead(C, squared_hinge=True, kernel=_kernel()), SLACK),
    "SVM, smoothing 1": (lambda C: ch.SVMHead(C, smoothing=1.0, kernel=_kernel()), SLACK),
    "SVM, RBF kernel": (lambda C: ch.SVMHead(C, kernel=ch.kernels.RBF()), SLACK),
    "Weston-Watkins SVM": (lambda C: ch.WestonWatkinsSVMHead(C, kernel=_kernel()), SLACK),
    "one-vs-rest SVM": (lambda C: ch.OneVsRestSVMHead(C, kernel=_kernel()), SLACK),
    "simplified SVM": (lambda C: ch.SimplifiedSVMHead(C, kernel=_kernel()), SLACK),
    "logistic regression": (lambda weight: ch.LogisticHead(weight, kernel=_kernel()), WEIGHT),
    "ridge": (lambda weight: ch.RidgeHead(weight, kernel=_kernel()), WEIGHT),
    "ridge, RBF kernel": (lambda weight: ch.RidgeHead(weight, kernel=ch.kernels.RBF()), WEIGHT),
    "linear discriminant": (
        lambda shrinkage: ch.LinearDiscriminantHead(shrinkage, variance=1.0, kernel=_kernel()),
        (0.01, 0.03, 0.1, 0.3, 0.6, 1.0),
    ),
    "Mahalanobis": (lambda beta: ch.MahalanobisHead(beta, kernel=_kernel()), (0.0001, 0.001, 0.01, 0.1, 1.0, 10.0)),
    "prototypes": (lambda _: ch.PrototypeHead(kernel=_kernel()), (1.0,)),
}
"""Each head as a function of its hyperparameter, and the values from which one is chosen on validation classes."""


def features(data: dict[str, ImageSet], weights: str) -> dict[str, Tensor]:
    """The features of the validation and the test classes from a trained backbone.

    Raises:
        InputError: there are no such weights.
    """
    backbone = ch.load_pretrained(weights).backbone
    return {part: embed(backbone, data[part].images) for part in ("val", "test")}


def compare(
    data: dict[str, ImageSet],
    found: dict[str, Tensor],
    *,
    shots: tuple[int, ...],
    episodes: int,
    validation_episodes: int,
    seed: int,
) -> pandas.DataFrame:
    """One row per head and number of shots.

    The hyperparameter is the one with the highest accuracy over episodes of validation classes, which also serve to fit
    the temperature. Accuracies and calibration errors are measured on test classes, with the same episodes for all
    heads.
    """
    rows, reference = [], {}
    options: dict[str, Any] = {"seed": seed, "progress": False}
    val, test = (found["val"], data["val"].labels), (found["test"], data["test"].labels)
    jobs = [(n, name) for n in shots for name in FAMILIES]
    for n, name in (bar := tqdm(jobs, unit="head")):
        bar.set_description(f"{n}-shot {name}")
        make, grid = FAMILIES[name]
        scores = {
            value: evaluate(make(value), *val, shots=n, episodes=validation_episodes, **options).accuracy
            for value in grid
        }
        value = max(scores, key=scores.__getitem__)
        head = calibrate(make(value), *val, shots=n, episodes=validation_episodes, **options)
        begin = time.perf_counter()
        result = evaluate(head, *test, shots=n, episodes=episodes, **options)
        seconds = time.perf_counter() - begin
        reference.setdefault(n, result.accuracies)
        difference = result.accuracies - reference[n]
        raw = evaluate(make(value), *test, shots=n, episodes=min(episodes, 200), **options)
        rows.append(
            {
                "shots": n,
                "head": name,
                "value": value,
                "accuracy": result.accuracy,
                "interval": result.confidence_interval,
                "difference": difference.mean().item(),
                "difference_interval": 1.96 * difference.std().item() / math.sqrt(episodes),
                "calibration_error": result.expected_calibration_error,
                "uncalibrated_error": raw.expected_calibration_error,
                "milliseconds": 1e3 * seconds / episodes,
                "certified": None if result.converged is None else result.converged.double().mean().item(),
            }
        )
    return pandas.DataFrame(rows)


def show(rows: pandas.DataFrame, title: str) -> Table:
    """The rows as a table."""
    columns = ("shots", "head", "chosen", "accuracy, %", "minus SVM, %", "calibration error, %", "ms", "certified, %")
    table = report.new_table(title, columns, left=["head"], no_wrap=True)
    for row in rows.to_dict("records"):
        table.add_row(
            str(row["shots"]),
            str(row["head"]),
            f"{row['value']:g}",
            f"{100 * row['accuracy']:.2f} ± {100 * row['interval']:.2f}",
            f"{100 * row['difference']:+.2f} ± {100 * row['difference_interval']:.2f}",
            f"{100 * row['uncalibrated_error']:.1f} → {100 * row['calibration_error']:.1f}",
            f"{row['milliseconds']:.2f}",
            "closed form" if pandas.isna(row["certified"]) else f"{100 * row['certified']:.1f}",
        )
    return table


def draw(rows: pandas.DataFrame, title: str, path: Path) -> None:
    """Draw the accuracies as points with their 95 % intervals, with a panel for each number of shots."""
    groups = list(rows.groupby("shots"))
    figure, panels = report.panels(len(groups), width=3 + 2.6 * len(groups), height=4.6, sharey=True)
    for axes, (n, own) in zip(panels, groups, strict=True):
        axes.errorbar(100 * own["accuracy"], own["head"], xerr=100 * own["interval"], fmt="o", capsize=3)
        axes.grid(axis="y", linewidth=0.4)
        axes.set_title(f"{n}-shot", fontsize=10)
        axes.set_xlabel("accuracy, %")
    panels[0].invert_yaxis()
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)


def main() -> None:
    """The command line."""
    parser = experiment.parser("heads", __doc__, "seed", "threads", "output")
    parser.add_argument("--data-root", type=Path, required=True, help="folder of CIFAR-100 (read-only)")
    text = "weights of a Conv-4 trained on CIFAR-FS: a name, folder or file that `convexheads.load_pretrained` knows"
    parser.add_argument("--weights", default="conv4-cifar-fs-ridge", help=text)
    parser.add_argument(
        "--shots", type=tuple[int, ...], default=(1, 5, 20), help="support images per class, as in [1,5]"
    )
    parser.add_argument("--episodes", type=int, default=2000, help="test episodes, the same for all heads")
    parser.add_argument(
        "--validation-episodes", type=int, default=300, help="validation episodes, to choose and to calibrate heads"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with experiment.input_errors_end_the_script():
        data = load("cifar-fs", options.data_root, progress=True)
        found = features(data, options.weights)
    settings = {name: options[name] for name in ("shots", "episodes", "validation_episodes", "seed")}
    rows = compare(data, found, **settings)
    title = "All heads on features of one Conv-4, for the 20 test classes of CIFAR-FS, 5-way"
    origin = report.provenance()
    machine = f"{experiment.place(origin)}, torch {origin['versions']['torch']}"
    note = (
        f"Features: {options.weights}. "
        f"Mean over {options.episodes:,} episodes, the same for all heads, ± half the 95 % confidence interval; the "
        "difference from the first head is paired. Chosen: C of SVMs, lambda, shrinkage or beta of the others, by "
        f"accuracy over {options.validation_episodes} episodes of validation classes; the temperature is fitted on "
        "these too. Expected calibration error: before (200 episodes) and after. Milliseconds per episode: fit and 75 "
        f"queries, in batches of 50; {machine}. Made by `python -m benchmarks.heads`."
    )
    results = json.loads(rows.to_json(orient="records") or "")
    experiment.write(
        options.output,
        "heads",
        show(rows, title),
        note,
        record={"weights": options.weights, "settings": settings, "results": results, **origin},
        draw=partial(draw, rows, title),
        width=110,
    )


if __name__ == "__main__":
    main()
