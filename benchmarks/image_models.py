"""Compare the image models of the command `convexheads` on photos: an ImageNet model and our Conv-4, frozen.

python -m benchmarks.image_models --data-root DIR
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import pandas
import torch
from PIL import Image
from rich.table import Table
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

import convexheads as ch
from benchmarks import experiment, report
from benchmarks.data import ImageSet, load
from convexheads.cli import _images
from convexheads.evaluation import evaluate
from convexheads.models import unit_scale_logistic, unit_scale_ridge, unit_scale_svm

MODELS: dict[str, Callable[[], _images.ImageModel]] = {
    "images": _images.packaged,
    _images.FALLBACK: lambda: _images.own(_images.FALLBACK),
}
"""The models by their names for `--features`."""
SHOTS = (1, 5, 20)
DATASETS = {"cifar-fs": "CIFAR-FS", "miniimagenet": "miniImageNet"}
HEADS: dict[str, Callable[[], ch.ClassificationHead]] = {
    "prototypes": ch.PrototypeHead,
    "SVMHead()": ch.SVMHead,
    "RidgeHead()": ch.RidgeHead,
    "LogisticHead()": ch.LogisticHead,
    "SVM": unit_scale_svm,
    "ridge": unit_scale_ridge,
    "logistic": unit_scale_logistic,
}
"""The heads; the last three are those that need no tuning."""


def features(name: str, dataset: str, data: ImageSet, cache: Path | None) -> Tensor:
    """The features of all images, of length one; they are read from a file of the cache, or written to it."""
    file = cache / f"{name}-{dataset}.pt" if cache else None
    if file and file.is_file():
        saved = torch.load(file, weights_only=True)
        assert torch.equal(saved["labels"], data.labels)
        found = saved["features"]
    else:
        model, batches = MODELS[name](), []
        for batch in tqdm(data.images.split(64), f"{dataset}, {name}", leave=False):
            with torch.no_grad():
                batches.append(model([Image.fromarray(image.permute(1, 2, 0).numpy()) for image in batch]))
        found = torch.cat(batches)
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"features": found, "labels": data.labels}, file)
    return functional.normalize(found.double(), dim=-1)


def compare(data: dict[str, ImageSet], episodes: int, seed: int, cache: Path | None) -> pandas.DataFrame:
    """One row per data set, model, number of shots and head; the episodes of a data set are the same for all."""
    rows = []
    for dataset, images in data.items():
        for model in MODELS:
            found = features(model, dataset, images, cache)
            for shots in SHOTS:
                made = {name: make() for name, make in HEADS.items()}
                results = evaluate(made, found, images.labels, shots=shots, episodes=episodes, seed=seed)
                for head, result in results.items():
                    row = {"data": dataset, "features": model, "shots": shots, "head": head}
                    row |= {"accuracy": result.accuracy, "interval": result.confidence_interval}
                    rows.append(row | {"calibration error": result.expected_calibration_error})
    return pandas.DataFrame(rows)


def show(rows: pandas.DataFrame, title: str) -> Table:
    """The rows as a table with a column for each head: its accuracy, and its calibration error, in percent."""
    cases = ["data", "features", "shots"]
    table = report.new_table(title, (*cases, *HEADS), left=["data", "features"], no_wrap=True)
    for case, own in rows.groupby(cases, sort=False):
        dataset, model, shots = cast("tuple", case)
        cells = {
            row[
                "head"
            ]: f"{100 * row['accuracy']:.1f} ± {100 * row['interval']:.1f} ({100 * row['calibration error']:.0f})"
            for row in own.to_dict("records")
        }
        table.add_row(DATASETS[str(dataset)], str(model), str(shots), *(cells[head] for head in HEADS))
    return table


def main() -> None:
    """The command line."""
    parser = experiment.parser("image_models", __doc__, "data_root", "seed", "threads", "output")
    parser.add_argument("--episodes", type=int, default=2000, help="test episodes, the same for all models and heads")
    parser.add_argument("--cache", type=Path | None, help="folder that keeps the features, for a second run")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with experiment.input_errors_end_the_script():
        data = {name: load(name, options.data_root, splits=["test"], progress=True)["test"] for name in DATASETS}
        rows = compare(data, options.episodes, options.seed, options.cache)
    origin = report.provenance()
    note = (
        "5-way accuracy on the test classes and, in parentheses, the expected calibration error, in percent, with "
        f"features of length one: mean over {options.episodes:,} episodes with 15 queries per class, ± half the 95 % "
        "confidence interval. `SVM`, `ridge` and `logistic` are the heads that need no tuning, such as "
        "`unit_scale_svm()`; the others have their default settings. `images` is a MobileNetV3-small that was trained "
        "on the 1,000 classes of ImageNet with all their images and labels. All test classes of miniImageNet are among "
        "these, and many of CIFAR-FS, so its accuracies say how well it describes everyday objects, and must not be "
        f"compared with those of few-shot learning from scratch. `{_images.FALLBACK}` has seen the 64 training classes "
        f"of CIFAR-FS only. {experiment.place(origin)}. Made by `python -m benchmarks.image_models`."
    )
    experiment.write(
        options.output,
        "image_models",
        show(rows, "Frozen features of images"),
        note,
        record={
            "settings": {"episodes": options.episodes, "seed": options.seed},
            "results": report.records(rows),
            **origin,
        },
        rows=rows,
        width=170,
    )


if __name__ == "__main__":
    main()
