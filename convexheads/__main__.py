"""The command `convexheads`: few-shot classification of files.

convexheads fit DIR --features text          # a folder for each class, with a few files in each
convexheads predict classifier.safetensors FILES
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from convexheads import ConvexHeadsError, InputError
from convexheads.integrations.folder import FEATURES, HEADS, FewShotClassifier
from convexheads.pretrained import names


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line.

    Args:
        arguments: words of the command; None, the default: those of the process.

    Raises:
        SystemExit: with a message and status 1 for whatever convexheads or the file system refuses, with status 2 for
            arguments that the command doesn't have, and with 0 after `--help`.
    """
    description, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(prog="convexheads", description=description)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    fit = commands.add_parser("fit", help="fit a classifier on a folder of folders", description="Fit a classifier.")
    fit.add_argument("folder", type=Path, help="holds a folder for each class, with a few files in each")
    text = f"{', '.join(FEATURES)}; for images {', '.join(names())}; or MODULE:FUNCTION, of yours (default: text)"
    fit.add_argument("--features", default="text", help=text)
    fit.add_argument("--head", default="logistic", choices=HEADS, help="(default: logistic)")
    text = "file to write (default: classifier.safetensors)"
    fit.add_argument("--output", type=Path, default=Path("classifier.safetensors"), help=text)

    text = "classify files: a line of CSV for each, with the probability of every class"
    predict = commands.add_parser("predict", help=text, description=f"C{text[1:]}.")
    predict.add_argument("classifier", type=Path, help="what `convexheads fit` wrote")
    predict.add_argument("files", type=Path, nargs="+", help="to classify; of a folder, all its files")
    text = "of a classifier whose features are MODULE:FUNCTION: the same again, to say that it may run"
    predict.add_argument("--features", help=text)
    predict.add_argument("--output", type=Path, help="file to write (default: the terminal)")

    options = parser.parse_args(arguments)
    if ":" in (options.features or ""):
        sys.path.append("")  # MODULE:FUNCTION may be in the current folder, which takes the place of nothing installed
    try:
        _check_output(options.output)
        if options.command == "fit":
            classifier = FewShotClassifier.from_folder(options.folder, features=options.features, head=options.head)
            classifier.save(options.output)
            hint = "" if classifier.calibrated else " (a class has one file only: probabilities are not calibrated)"
            print(f"{options.output}: {len(classifier.classes)} classes, {', '.join(classifier.classes)}{hint}")
        else:
            classifier = FewShotClassifier.load(options.classifier, features=options.features)
            _predict(classifier, options.files, options.output)
    except (ConvexHeadsError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def _check_output(path: Path | None) -> None:
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise InputError("output", "a file in a folder that exists", path)


def _predict(classifier: FewShotClassifier, places: Sequence[Path], output: Path | None) -> None:
    files = [file for place in places for file in (_files(place) if place.is_dir() else [place])]
    if not files:
        raise InputError("files", "one at least", f"no file in {', '.join(map(str, places))}")
    predictions = classifier.predict(files)
    with output.open("w", newline="") if output else nullcontext(sys.stdout) as target:
        writer = csv.writer(target)
        writer.writerow(["file", "label", *classifier.classes])
        for path, label, probabilities in predictions:
            writer.writerow([path, label, *(f"{value:.4f}" for value in probabilities.values())])


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")


if __name__ == "__main__":
    main()
