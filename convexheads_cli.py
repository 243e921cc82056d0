"""The command `convexheads`: few-shot classification of files.

This module is outside of the package because importing any module of `convexheads` imports torch, which takes seconds.
So `--help`, `--version` and wrong usage are answered at once. `convexheads.cli._command` does the rest.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HEADS = ("logistic", "svm", "ridge", "prototypes", "discriminant")
FIT = """\
Fit a classifier on a folder that contains one folder per class. One file per class is enough; with two or more, the
probabilities are calibrated. The kind of the files decides the features, unless --features names them:

     text                        text files in UTF-8, by wordllama's encoder      convexheads[text]
     images                      pictures, by a MobileNetV3 trained on ImageNet  convexheads[images]
     npy                         files that contain one vector each
     conv4-cifar-fs-ridge, ...   pictures, by a small network that comes along   convexheads[pretrained]
     timm:NAME                   pictures, by a model of timm                    convexheads[timm]
     hf:NAME                     pictures, by a model of transformers            convexheads[hf]
     open_clip:NAME/WEIGHTS      pictures, by a model of open_clip               convexheads[open-clip]
     sentence-transformers:NAME  text files, by a model of that package          convexheads[sentence-transformers]
     FILE                        pictures, by weights that `save_pretrained` wrote
     MODULE:FUNCTION             your own function, from a list of paths to a tensor with one row per file

The last column is the extra that installs what is needed. A model of timm, transformers, open_clip or
sentence-transformers is downloaded once, unless NAME is a folder (timm:local-dir:FOLDER, open_clip:local-dir:FOLDER).
"""
FIT_EXAMPLE = """\
example: photos/cat/*.jpg and photos/dog/*.jpg are a few pictures of each class
  convexheads fit photos --output pets.safetensors
  convexheads predict pets.safetensors new_photos
"""
PREDICT = "Classify files, and print a line of CSV for each: the file, its class, and the probability of every class."
PREDICT_EXAMPLE = """\
example:
  convexheads predict pets.safetensors new_photos one_more.jpg --output result.csv
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line with these `arguments`, by default those of the process.

    Raises:
        SystemExit: With a message and status 1 after an error of convexheads or the file system, with status 2 for
            unusable arguments, and with 0 after `--help` and `--version`.
    """
    options = _parser().parse_args(arguments)
    from convexheads.cli._command import run  # imports torch

    run(options)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        try:
            found = version("convexheads")
        except PackageNotFoundError:  # on the path but not installed
            from convexheads import __version__ as found
        print(parser.prog, found)
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convexheads",
        description="Few-shot classification of files: fit on a few examples per class, then classify other files.",
        epilog="`convexheads COMMAND --help` describes a command.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    layout = argparse.RawDescriptionHelpFormatter

    text = "fit a classifier on a folder that contains one folder per class"
    fit = commands.add_parser("fit", help=text, description=FIT, epilog=FIT_EXAMPLE, formatter_class=layout)
    fit.add_argument("folder", type=Path, help="folder that contains one folder per class, with a few files in each")
    fit.add_argument("--features", help="features, one of those above (default: decided by the kind of the files)")
    text = "head to fit (default: %(default)s; for hundreds of classes, prototypes or ridge are faster)"
    fit.add_argument("--head", default="logistic", choices=HEADS, help=text)
    fit.add_argument("--output", type=Path, default="classifier.safetensors", help="output file (default: %(default)s)")

    text = "classify files: print a line of CSV per file, with the probability of each class"
    predict = commands.add_parser(
        "predict", help=text, description=PREDICT, epilog=PREDICT_EXAMPLE, formatter_class=layout
    )
    predict.add_argument("classifier", type=Path, help="file that `convexheads fit` wrote")
    predict.add_argument("files", type=Path, nargs="+", help="files, or folders that contain files")
    text = "if the classifier's features contain a colon, as in timm:NAME: repeat them, to allow loading that code"
    predict.add_argument("--features", help=text)
    predict.add_argument("--output", type=Path, help="output file (default: the terminal)")
    return parser
