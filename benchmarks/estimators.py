"""Measure heads as scikit-learn's estimators: their probabilities with and without calibration, and the time of a fit.

python -m benchmarks.estimators
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas
import torch
from rich.table import Table
from sklearn.datasets import load_digits, load_iris, load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from tqdm.auto import tqdm

import convexheads as ch
from benchmarks import experiment, report
from convexheads.calibration import expected_calibration_error
from convexheads.integrations.sklearn import HeadClassifier

DATA: dict[str, Callable[..., Any]] = {"digits": load_digits, "wine": load_wine, "iris": load_iris}
HEADS: dict[str, ch.ClassificationHead] = {
    "SVMHead(C=1.0)": ch.SVMHead(C=1.0),
    "RidgeHead()": ch.RidgeHead(),
    "PrototypeHead()": ch.PrototypeHead(),
}
WHOLE: dict[str, Callable[[], Any]] = {
    "HeadClassifier(SVMHead(C=0.1))": lambda: HeadClassifier(ch.SVMHead(C=0.1)),
    "HeadClassifier(SVMHead(C=0.1), calibrate=False)": lambda: HeadClassifier(ch.SVMHead(C=0.1), calibrate=False),
    "HeadClassifier(RidgeHead())": lambda: HeadClassifier(ch.RidgeHead()),
    "LinearSVC(C=0.1), Crammer-Singer": lambda: LinearSVC(
        C=0.1, multi_class="crammer_singer", fit_intercept=False, max_iter=100_000
    ),
    "LinearSVC(C=0.1)": lambda: LinearSVC(C=0.1, max_iter=100_000),
    "LogisticRegression()": lambda: LogisticRegression(max_iter=1000),
}
"""The classifiers that are timed on all digits."""


def calibration(halves: int) -> pandas.DataFrame:
    """One row per data set, head and half: calibration error, log-loss and time of a fit, without and with it."""
    rows = []
    for name, loader in DATA.items():
        X, y = loader(return_X_y=True)
        splits = StratifiedShuffleSplit(halves, train_size=0.5, random_state=0).split(X, y)
        for half, (train, test) in enumerate(tqdm(list(splits), name)):
            for head_name, head in HEADS.items():
                row: dict[str, Any] = {"data": name, "samples": len(train), "head": head_name, "half": half}
                for key, calibrate in (("before", False), ("after", True)):
                    model = make_pipeline(StandardScaler(), HeadClassifier(head, calibrate=calibrate))
                    begin = time.perf_counter()
                    model.fit(X[train], y[train])
                    row[f"seconds {key}"] = time.perf_counter() - begin
                    probabilities = model.predict_proba(X[test])
                    confidence, found = probabilities.max(-1), probabilities.argmax(-1)
                    right = torch.from_numpy(found == y[test])
                    row[f"calibration error {key}"] = expected_calibration_error(torch.from_numpy(confidence), right)
                    row[f"log-loss {key}"] = log_loss(y[test], probabilities)
                rows.append(row)
    return pandas.DataFrame(rows)


def times(repeats: int) -> pandas.DataFrame:
    """The median time of a fit of each classifier on all digits, whose pixels are divided by 16."""
    X, y = load_digits(return_X_y=True)
    rows = []
    for name, make in tqdm(WHOLE.items(), "all digits"):
        seconds = []
        for _ in range(repeats):
            begin = time.perf_counter()
            make().fit(X / 16, y)
            seconds.append(time.perf_counter() - begin)
        rows.append({"classifier": name, "seconds": float(np.median(seconds))})
    return pandas.DataFrame(rows)


def show_calibration(rows: pandas.DataFrame) -> Table:
    """The means over the halves, before and after calibration."""
    measures = ("calibration error", "log-loss", "seconds")
    title = "Probabilities of HeadClassifier, without and with calibration"
    table = report.new_table(title, ("data", "samples", "head", *measures), left=["data", "head"])
    for case, own in rows.groupby(["data", "samples", "head"], sort=False):
        data, samples, head = cast("tuple", case)
        cells = [
            f"{own[f'{measure} before'].mean():.3f} → {own[f'{measure} after'].mean():.3f}" for measure in measures
        ]
        table.add_row(str(data), str(samples), str(head), *cells)
    return table


def show_times(rows: pandas.DataFrame) -> Table:
    """The times of a fit."""
    table = report.new_table("Time of a fit on all digits", ("classifier", "seconds"), left=["classifier"])
    for row in rows.to_dict("records"):
        table.add_row(str(row["classifier"]), f"{row['seconds']:.2f}")
    return table


def main() -> None:
    """The command line."""
    parser = experiment.parser("estimators", __doc__, "threads", "output")
    parser.add_argument("--halves", type=int, default=5, help="random halves of each data set")
    parser.add_argument("--repeats", type=int, default=3, help="fits that are timed")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    HeadClassifier().fit(np.eye(4), [0, 1, 0, 1])  # compiles the solver
    halves, whole = calibration(options.halves), times(options.repeats)
    write(halves, whole, options.halves, options.repeats, report.provenance(), options.output)


def write(
    halves: pandas.DataFrame, whole: pandas.DataFrame, count: int, repeats: int, origin: dict[str, Any], output: Path
) -> None:
    """Show the results, and write them as Markdown and JSON."""
    made = f"{experiment.place(origin)}. Made by `python -m benchmarks.estimators`."
    note = f"Means over {count} random halves of standardized data, without and with calibration. {made}"
    record = {"results": report.records(halves), **origin}
    experiment.write(output, "calibration", show_calibration(halves), note, record=record)
    note = f"Median of {repeats} fits on the 1,797 digits, whose pixels are divided by 16. {made}"
    experiment.write(output, "times", show_times(whole), note, record={"results": report.records(whole), **origin})


if __name__ == "__main__":
    main()
