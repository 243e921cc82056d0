"""The command `convexheads`: few-shot classification of files."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from io import TextIOWrapper
from pathlib import Path

from convexheads import __version__
from convexheads.cli._features import FEATURES, list_files
from convexheads.cli.folder import FOLDER_HEADS, FolderClassifier
from convexheads.errors import ConvexHeadsError, InputError
from convexheads.models.pretrained import list_pretrained


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line with these `arguments`, by default those of the process.

    Raises:
        SystemExit: With a message and status 1 after an error of convexheads or the file system, with status 2 for
            unusable arguments, and with 0 after `--help` and `--version`.
    """
    parser = argparse.ArgumentParser(prog="convexheads", description=__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    text = "fit a classifier on a folder that contains one folder per class"
    fit = commands.add_parser("fit", help=text, description=f"F{text[1:]}.")
    fit.add_argument("folder", type=Path, help="folder that contains one folder per class, with a few files in each")
    text = f"{', '.join(FEATURES)}; for images {', '.join(list_pretrained())} or a file of weights; or MODULE:FUNCTION"
    fit.add_argument("--features", default="text", help=f"{text} (default: %(default)s)")
    fit.add_argument("--head", default="logistic", choices=FOLDER_HEADS, help="head to fit (default: %(default)s)")
    fit.add_argument("--output", type=Path, default="classifier.safetensors", help="output file (default: %(default)s)")

    text = "classify files: print a line of CSV per file, with the probability of each class"
    predict = commands.add_parser("predict", help=text, description=f"C{text[1:]}.")
    predict.add_argument("classifier", type=Path, help="file that `convexheads fit` wrote")
    predict.add_argument("files", type=Path, nargs="+", help="files or folders")
    text = "if the features of the classifier are MODULE:FUNCTION: repeat the name to allow importing it"
    predict.add_argument("--features", help=text)
    predict.add_argument("--output", type=Path, help="output file (default: the terminal)")

    options = parser.parse_args(arguments)
    if isinstance(sys.stdout, TextIOWrapper):  # whose encoding may lack characters of a name
        sys.stdout.reconfigure(errors="backslashreplace")
    if ":" in (options.features or ""):
        sys.path.append("")  # finds MODULE in the current folder; at the end, so that it hides no installed package
    try:
        if (output := options.output) and (output.is_dir() or not output.parent.is_dir()):
            raise InputError("output", "a file in a folder that exists", output)
        if options.command == "fit":
            classifier = FolderClassifier.from_folder(options.folder, features=options.features, head=options.head)
            classifier.save(output)
            hint = "" if classifier.scale else " (probabilities are not calibrated: a class has a single file)"
            print(f"{output}: {len(classifier.classes)} classes, {', '.join(classifier.classes)}{hint}")
        else:
            classifier = FolderClassifier.load(options.classifier, features=options.features)
            _predict(classifier, options.files, output)
    except (ConvexHeadsError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def _predict(classifier: FolderClassifier, places: Sequence[Path], output: Path | None) -> None:
    lists = (list_files(place, recursive=True) if place.is_dir() else [place] for place in places)
    files = [file for found in lists for file in found]
    if not files:
        raise InputError("files", "at least one", f"no file in {', '.join(map(str, places))}")
    predictions = classifier.predict(files)
    with output.open("w", encoding="utf-8", errors="backslashreplace") if output else nullcontext(sys.stdout) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file", "label", *classifier.classes])
        for path, label, probabilities in predictions:
            writer.writerow([path, label, *(f"{value:.4f}" for value in probabilities.values())])
