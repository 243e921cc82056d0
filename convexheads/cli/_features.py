"""Feature extractors for files, by name."""

from __future__ import annotations

import os.path
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from convexheads._sampling import track
from convexheads.cli import _images, _texts
from convexheads.cli._files import Kind, check_widths, read
from convexheads.errors import InputError
from convexheads.models.pretrained import list_pretrained

FeatureExtractor = Callable[[Sequence[Path]], Tensor]
"""A function from files to one row of features per file, floating point, `(n, d)`."""

_BATCH = 64  # files that are in memory at a time


class Features(NamedTuple):
    """What a name of features stands for: the kind of files, None for any, and how to load the extractor."""

    kind: Kind | None
    load: Callable[[], FeatureExtractor]
    is_trusted: bool
    """Whether the package contains it; else its code or its model may be those of somebody else."""


def find_features(features: str | Path) -> Features:
    """Find the features that `FolderClassifier.from_folder` calls by this name or path; nothing is loaded."""
    name = str(features)
    if name in FEATURES:
        return Features(*FEATURES[name], is_trusted=True)
    if name in list_pretrained() or os.path.exists(name):
        return Features("images", partial(_images.extractor, _images.own, name), is_trusted=True)
    prefix, colon, rest = name.partition(":")
    if not colon:
        packages = [f"{package}:NAME" for package in PACKAGES]
        names = ", ".join([*FEATURES, *list_pretrained(), *packages])
        raise InputError("features", f"one of {names}, an existing file of weights, or MODULE:FUNCTION", repr(features))
    if prefix in PACKAGES:
        kind, load = PACKAGES[prefix]
        return Features(kind, partial(load, rest), is_trusted=False)
    return Features(None, partial(_import_function, prefix, rest), is_trusted=False)


def load_feature_extractor(features: str | Path, *, allow_import: bool = True) -> FeatureExtractor:
    """Load the feature extractor of that name or path; with `allow_import=False`, only what the package contains."""
    found = find_features(features)
    if not (found.is_trusted or allow_import):
        expected = f"features={str(features)!r} again (--features {features}), to allow loading that code or model"
        raise InputError("features", expected, "nothing")
    return found.load()


def extract_features(extractor: FeatureExtractor, paths: Sequence[Path], *, progress: bool = False) -> Tensor:
    """Return the features of files, scaled to length one, in float64, `(n, d)`; errors name the file."""
    if missing := [path for path in paths if not path.is_file()]:
        raise InputError("file", "a file", f"{missing[0]}, which is not a file")
    batches = [paths[first : first + _BATCH] for first in range(0, len(paths), _BATCH)]
    found = [_extract(extractor, batch) for batch in track(batches, "extracting features", progress)]
    check_widths([batch[0] for batch in batches], [len(rows[0]) for rows in found])
    return torch.cat(found)


def _extract(extractor: FeatureExtractor, paths: Sequence[Path]) -> Tensor:
    found = extractor(paths)
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.ndim != 2 or len(found) != len(paths):
        got = f"shape {tuple(found.shape)} of {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
        raise InputError("features", f"a row of floating-point values for each of {len(paths)} files", got)
    usable = found.isfinite().all(-1) & found.any(-1)
    if not usable.all():
        got = f"{paths[int(usable.int().argmin())]}, whose features are zero or not finite"
        raise InputError("file", "features that are finite and not all zero", got)
    return functional.normalize(found.double(), dim=-1)


def _vectors() -> FeatureExtractor:
    import numpy as np

    def vector(path: Path) -> Tensor:
        with path.open("rb") as file:  # NumPy would leave a damaged .npz file open
            return torch.from_numpy(np.load(file, allow_pickle=False)).flatten()

    def vectors(paths: Sequence[Path]) -> Tensor:
        rows = [read(path, vector) for path in paths]
        check_widths(paths, [len(row) for row in rows])
        return torch.stack(rows)

    return vectors


def _import_function(module: str, function: str) -> FeatureExtractor:
    try:
        extractor: FeatureExtractor = getattr(import_module(module), function)
        if not callable(extractor):
            raise TypeError(f"{type(extractor).__name__} is not callable")
        return extractor
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        expected, got = "a function of a module that can be imported", f"'{module}:{function}' ({error})"
        raise InputError("features", expected, got) from error


FEATURES: Mapping[str, tuple[Kind, Callable[[], FeatureExtractor]]] = {
    "text": ("text", _texts.packaged),
    "npy": ("npy", _vectors),
    "images": ("images", partial(_images.extractor, _images.packaged, "images")),
}
"""Features that need no choice of a model, by name."""

PACKAGES: Mapping[str, tuple[Kind, Callable[[str], FeatureExtractor]]] = {
    "timm": ("images", partial(_images.extractor, _images.timm)),
    "hf": ("images", partial(_images.extractor, _images.hf)),
    "open_clip": ("images", partial(_images.extractor, _images.open_clip)),
    "sentence-transformers": ("text", _texts.sentence_transformers),
}
"""Models of other packages, by the part of a name before the colon; the argument is the part after it."""
