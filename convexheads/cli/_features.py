"""Feature extractors for files, by name: text, vectors, images, or a user-defined function."""

from __future__ import annotations

import os.path
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from convexheads.errors import InputError, MissingDependencyError
from convexheads.evaluation import embed
from convexheads.models.pretrained import list_pretrained, load_pretrained

FeatureExtractor = Callable[[Sequence[Path]], Tensor]
"""A function from files to one row of features per file, floating point, `(n, d)`."""

_T = TypeVar("_T")


def load_feature_extractor(features: str | Path, *, allow_import: bool = True) -> FeatureExtractor:
    """Load the feature extractor that `FolderClassifier.from_folder` calls by this name or path."""
    name = str(features)
    if name in FEATURES:
        return FEATURES[name]()
    if name in list_pretrained() or os.path.exists(name):
        return _make_image_extractor(name)
    module, _, function = name.partition(":")
    if not function:
        names = ", ".join([*FEATURES, *list_pretrained()])
        raise InputError("features", f"one of {names}, an existing file of weights, or MODULE:FUNCTION", repr(features))
    if not allow_import:
        expected = f"features={name!r} (--features), to allow importing the code that the classifier refers to"
        raise InputError("features", expected, "nothing")
    try:
        extractor: FeatureExtractor = getattr(import_module(module), function)
        if not callable(extractor):
            raise TypeError(f"{type(extractor).__name__} is not callable")
        return extractor
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise InputError("features", "a function of a module that can be imported", f"{name!r} ({error})") from error


def extract_features(extractor: FeatureExtractor, paths: Sequence[Path]) -> Tensor:
    """Return the features of files, scaled to length one, in float64, `(n, d)`; errors name the file."""
    if missing := [path for path in paths if not path.is_file()]:
        raise InputError("file", "a file", f"{missing[0]}, which is not a file")
    found = extractor(paths)
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.ndim != 2 or len(found) != len(paths):
        got = f"shape {tuple(found.shape)} of {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
        raise InputError("features", f"a row of floating-point values for each of {len(paths)} files", got)
    usable = found.isfinite().all(-1) & found.any(-1)
    if not usable.all():
        got = f"{paths[int(usable.int().argmin())]}, whose features are zero or not finite"
        raise InputError("file", "features that are finite and not all zero", got)
    return functional.normalize(found.double(), dim=-1)


def list_files(folder: Path, *, recursive: bool = False) -> list[Path]:
    """List the files of a folder, sorted, except hidden files and folders and those that Windows adds by itself."""
    files = (path for path in (folder.rglob("*") if recursive else folder.iterdir()) if path.is_file())
    visible = (path for path in files if all(part[0] != "." for part in path.relative_to(folder).parts))
    return sorted(path for path in visible if path.name.lower() not in ("thumbs.db", "desktop.ini"))


def _make_text_extractor() -> FeatureExtractor:
    try:
        import wordllama
    except ImportError as error:
        raise MissingDependencyError("wordllama", "text", "FolderClassifier(features='text')") from error

    (folder,) = map(Path, wordllama.__path__)

    class Packaged(wordllama.WordLlama):
        """The model that the package contains, so that nothing is downloaded. Its path differs before version 0.4."""

        @staticmethod
        def get_cache_dir(is_tokenizer_config: bool = False) -> Path:
            return folder / ("tokenizers" if is_tokenizer_config else "weights")

    model = Packaged.load(cache_dir=folder, disable_download=True)
    expected = "text in UTF-8 (for images, set features, or --features, to the name of a pretrained backbone)"

    def text(paths: Sequence[Path]) -> Tensor:
        documents = [_read(path, lambda path: path.read_text(encoding="utf-8"), expected) for path in paths]
        if empty := [path for path, document in zip(paths, documents, strict=True) if not document.strip()]:
            raise InputError("file", "a file that contains text", f"{empty[0]} without any text")
        return torch.from_numpy(model.embed(documents))

    return text


def _make_vector_extractor() -> FeatureExtractor:
    import numpy as np

    def vector(path: Path) -> Tensor:
        with path.open("rb") as file:  # NumPy would leave a damaged .npz file open
            return torch.from_numpy(np.load(file, allow_pickle=False)).flatten()

    def vectors(paths: Sequence[Path]) -> Tensor:
        rows = [_read(path, vector) for path in paths]
        for path, row in zip(paths, rows, strict=True):
            if row.shape != rows[0].shape:
                raise InputError("file", f"{len(rows[0])} values, as in {paths[0]}", f"{path} with {len(row)} values")
        return torch.stack(rows)

    return vectors


def _make_image_extractor(name: str) -> FeatureExtractor:
    try:
        import numpy as np
        from PIL import Image, ImageOps
    except ImportError as error:
        raise MissingDependencyError("pillow", "pretrained", f"FolderClassifier(features={name!r})") from error
    backbone, _, _ = load_pretrained(name)
    (height, width), mode = backbone.image_size, "L" if backbone.in_channels == 1 else "RGB"

    def image(path: Path) -> Tensor:
        with Image.open(path) as picture:
            if picture.mode[0] in "IF":  # which `convert` would clip
                raise ValueError(f"expected 8 bits per channel, got mode {picture.mode}")
            upright = ImageOps.exif_transpose(picture).convert(mode)
            pixels = np.array(upright.resize((width, height), Image.Resampling.BICUBIC))
        return torch.from_numpy(pixels).reshape(height, width, -1).permute(2, 0, 1)

    return lambda paths: embed(backbone, torch.stack([_read(path, image) for path in paths]), progress=False)


def _read(path: Path, read: Callable[[Path], _T], expected: str = "a file that can be read") -> _T:
    try:
        return read(path)
    except Exception as error:  # damaged files raise many types of errors
        raise InputError("file", expected, f"{path} ({error})") from error


FEATURES: Mapping[str, Callable[[], FeatureExtractor]] = {"text": _make_text_extractor, "npy": _make_vector_extractor}
