"""What the command `convexheads` does once its arguments are parsed (see `convexheads_cli`)."""

from __future__ import annotations

import argparse
import csv
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from convexheads.cli import _files
from convexheads.cli._features import PACKAGES
from convexheads.cli.folder import FolderClassifier, choose_features
from convexheads.errors import ConvexHeadsError, InputError


def run(options: argparse.Namespace) -> None:
    """Run `fit` or `predict` with parsed `options`; errors of convexheads and the file system end the process."""
    if isinstance(sys.stdout, TextIOWrapper):  # whose encoding may lack characters of a name
        sys.stdout.reconfigure(errors="backslashreplace")
    prefix, colon, _ = (options.features or "").partition(":")
    if colon and prefix not in PACKAGES:
        sys.path.append("")  # finds MODULE in the current folder; at the end, so that it hides no installed package
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            if (output := options.output) and (output.is_dir() or not output.parent.is_dir()):
                raise InputError("output", "a file in a folder that exists", output)
            _fit(options) if options.command == "fit" else _predict(options)
        except BrokenPipeError:  # the reader, such as `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None
        except (ConvexHeadsError, OSError) as error:
            raise SystemExit(f"error: {error}") from error


def _fit(options: argparse.Namespace) -> None:
    features = options.features
    if features is None:
        features = choose_features(options.folder)
        print(f"features: {features}, by the kind of the files (others: --features, see `convexheads fit --help`)")
    classifier = FolderClassifier.from_folder(options.folder, features=features, head=options.head)
    classifier.save(options.output)
    hint = "" if classifier.scale else " (probabilities are not calibrated: a class has a single file)"
    print(f"{options.output}: {len(classifier.classes)} classes, {', '.join(classifier.classes)}{hint}")


def _predict(options: argparse.Namespace) -> None:
    classifier = FolderClassifier.load(options.classifier, features=options.features)
    files = _list(options.files, classifier.kind)
    predictions = classifier.predict(files)
    output: Path | None = options.output
    with output.open("w", encoding="utf-8", errors="backslashreplace") if output else nullcontext(sys.stdout) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file", "label", *classifier.classes])
        for path, label, probabilities in predictions:
            writer.writerow([path, label, *(f"{value:.4f}" for value in probabilities.values())])


def _list(places: Sequence[Path], kind: _files.Kind | None) -> list[Path]:
    """The files at these places; of a folder, those that are of the classifier's kind."""
    files, skipped = [], []
    for place in places:
        kept, left = _files.select(*_files.list_files(place, recursive=True), kind) if place.is_dir() else ([place], [])
        files += kept
        skipped += left
    if not files:
        raise InputError("files", "at least one", f"no file in {', '.join(map(str, places))}")
    _files.warn_of_skipped(skipped)
    return files


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)
