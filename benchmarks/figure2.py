"""Figure 2 of the paper: accuracy against the shots in meta-training, for the SVM and for prototypes.

python -m benchmarks.figure2 --data-root DIR                          # Conv-4, trained for a short time
python -m benchmarks.figure2 --data-root DIR --scale paper --train    # ResNet-12, as in the paper: needs GPUs

The paper shows only a picture, without numbers.
"""

from __future__ import annotations

from pathlib import Path

import pandas

from benchmarks import report, tables
from benchmarks.tables import TITLES, Row, Scale, Table, main

TRAINING_SHOTS = (1, 5, 10, 15)
DATASETS = ("miniimagenet", "tieredimagenet", "cifar-fs", "fc100")
HEADS = {name: tables.HEADS[name] for name in ("svm", "prototypes")}


def curves(table: Table, ours: pandas.DataFrame, path: Path) -> None:
    """Draw accuracy against training shots, with a panel per data set and a line per head and number of test shots."""
    groups = list(ours.groupby("dataset", sort=False))
    figure, panels = report.panels(len(groups), width=4.6 * len(groups), height=4.6)
    for axes, (dataset, found) in zip(panels, groups, strict=True):
        found = found.assign(head=[str(model).partition(",")[0] for model in found["model"]])
        for head, shots in dict.fromkeys(zip(found["head"], found["shots"], strict=True)):
            own = found.query("head == @head and shots == @shots").sort_values(by="training shots")
            color = f"C{list(HEADS.values()).index(head)}"
            style = {1: "--", 5: "-"}[shots]
            axes.errorbar(
                own["training shots"],
                own["accuracy"],
                own["interval"],
                color=color,
                linestyle=style,
                marker="o",
                capsize=3,
                label=f"{head}, {shots}-shot",
            )
        axes.set(xlabel="training shots", ylabel="accuracy on unseen classes, %", xticks=TRAINING_SHOTS)
        axes.set_title(f"{TITLES[str(dataset)]}, {table.ways}-way")
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def rows(datasets: tuple[str, ...], backbone: str, network: str) -> list[Row]:
    """A row for each head and number of training shots."""
    return [
        Row(
            f"{name}, {n}-shot training",
            backbone,
            {(data, shots): f"figure2/{data}/{network}/{head}-{n}-shot" for data in datasets for shots in (1, 5)},
        )
        for head, name in HEADS.items()
        for n in TRAINING_SHOTS
    ]


SCALES: dict[Scale, list[Row]] = {
    "paper": rows(DATASETS, "ResNet-12", "resnet12"),
    "laptop": rows(("cifar-fs", "fc100"), "64-64-64-64", "conv4"),
}
TABLE = Table("figure2", "Figure 2: 5-way accuracy by number of training shots", DATASETS, SCALES, draw=curves)

if __name__ == "__main__":
    main(TABLE, __doc__)
