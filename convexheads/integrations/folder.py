"""Few-shot classification of files: a folder for each class in, a saved classifier out.

Features are frozen: those of a text encoder, of a pretrained backbone, or of a function of one's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from convexheads import storage
from convexheads.episodes import calibrate, embed
from convexheads.errors import InputError, MissingDependencyError
from convexheads.heads import (
    ClassificationHead,
    LinearDiscriminantHead,
    LogisticHead,
    PrototypeHead,
    RidgeHead,
    SVMHead,
)
from convexheads.pretrained import load_pretrained, names

HEADS: dict[str, Callable[[], ClassificationHead]] = {
    "logistic": lambda: LogisticHead(regularization=0.1),
    "svm": lambda: SVMHead(C=10.0),
    "ridge": lambda: RidgeHead(regularization=0.1),
    "prototypes": lambda: PrototypeHead(),
    "discriminant": lambda: LinearDiscriminantHead(shrinkage=0.5, variance=0.01),
}
"""By name, for `FewShotClassifier`; with hyper-parameters for features of length one."""

T = TypeVar("T")

Features = Callable[[Sequence[Path]], Tensor]
"""From files to one row of features for each, floating-point `(n, d)`."""


class Prediction(NamedTuple):
    """What a file is taken for. `FewShotClassifier.predict` makes it.

    Attributes:
        path: of the file.
        label: the likeliest class.
        probabilities: of every class, by name, from 0 to 1.
    """

    path: Path
    label: str
    probabilities: dict[str, float]


class FewShotClassifier:
    """A head fitted on the features of a few files of each class.

    Make one with `from_folder` or `load`.

    Args:
        classes: their names.
        features: by what name the features are known (see `from_folder`).
        head: likewise.
        support: features of the files, of length one, `(n, d)`.
        labels: which of the classes each file is of, `(n,)`, from 0 to k - 1.
        scale: of the logits, positive; None, the default, for the head's own, which is not calibrated.
        embed: the function from files to features; None, the default: that of the name.

    Attributes:
        classes: their names, as they came: sorted, from `from_folder`.
        features: by what name the features are known.
        head: by what name the head is known.
        scale: of the logits; None where probabilities are not calibrated.
        calibrated: whether they are, which takes two files of every class.

    Raises:
        InputError: features or head are unknown, or support and labels are unusable.
        MissingDependencyError: what the features need is not installed.
        SolverError: the head's problem could not be solved.
    """

    def __init__(
        self,
        classes: Sequence[str],
        features: str,
        head: str,
        *,
        support: Tensor,
        labels: Tensor,
        scale: float | None = None,
        embed: Features | None = None,
    ) -> None:
        self.classes, self.features, self.head, self.scale = tuple(classes), features, head, scale
        self._support, self._labels, self._embed = support, labels, embed or find_features(features)
        fitted = make_head(head)
        if scale is not None:
            fitted.scale = scale
        with torch.no_grad():
            self._fitted = fitted.fit(support, labels, ways=len(self.classes))

    @property
    def calibrated(self) -> bool:
        """Whether probabilities are calibrated."""
        return self.scale is not None

    @classmethod
    def from_folder(cls, folder: str | Path, *, features: str, head: str = "logistic") -> FewShotClassifier:
        """Fit on a folder that holds a folder of files for each class; one file of each is enough.

        Features are brought to length one. With two files of each class or more, the probabilities are calibrated:
        the head is fitted on all but one file of each class, many times over, and its scale is the one that makes the
        left-out files likeliest.

        Args:
            folder: whose subfolders are the classes. Names that begin with a dot are passed over.
            features: "text", the encoder that the package wordllama ships, for text files in UTF-8; a name or a file of
                `load_pretrained`, for images; "npy", a vector in each file; or "MODULE:FUNCTION", from a list of
                paths to features `(n, d)`.
            head: one of `HEADS`: "logistic" (default), "svm", "ridge", "prototypes", "discriminant".

        Returns:
            The classifier.

        Raises:
            InputError: the folder is none or has fewer than two classes, a class has no file, a file is unusable, or
                features or head are unknown. The message says which.
            MissingDependencyError: what the features need is not installed.
            SolverError: the head's problem could not be solved.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError("folder", "a folder that holds a folder for each class", folder)
        files = {part.name: _files(part) for part in sorted(folder.iterdir()) if part.is_dir() and part.name[0] != "."}
        if len(files) < 2:
            raise InputError("folder", "at least 2", f"{folder} with {len(files)} class folders in it")
        if empty := [name for name, own in files.items() if not own]:
            raise InputError("folder", "one file at least of each class", f"class {empty[0]!r} without any file")
        make_head(head)  # before the work
        embed = find_features(features)
        support = _features(embed, [path for own in files.values() for path in own])
        counts = torch.tensor([len(own) for own in files.values()])
        labels = torch.arange(len(files)).repeat_interleave(counts)
        scale = None
        if (shots := int(counts.min()) - 1) > 0:
            settings = {"ways": len(files), "shots": shots, "queries": 1, "progress": False}
            scale = calibrate(make_head(head), support, labels, **settings).scale
            assert isinstance(scale, float)  # so `calibrate` says
        return cls(tuple(files), features, head, support=support, labels=labels, scale=scale, embed=embed)

    def predict(self, paths: Sequence[str | Path]) -> list[Prediction]:
        """Classify files.

        Args:
            paths: of the files.

        Returns:
            Of each file its path, the likeliest class, and the probabilities, in the order of `paths`.

        Raises:
            InputError: a file is missing or unusable; the message names it. Or features of another size than the
                support's.
        """
        files = [Path(path) for path in paths]
        if not files:
            return []
        with torch.no_grad():
            probabilities = self._fitted.probabilities(_features(self._embed, files).to(self._support.dtype)).tolist()
        rows = [dict(zip(self.classes, row, strict=True)) for row in probabilities]
        return [Prediction(path, max(row, key=row.__getitem__), row) for path, row in zip(files, rows, strict=True)]

    def save(self, path: str | Path) -> None:
        """Write the classifier as safetensors: the features of the support, not the files.

        The file is complete or not there at all: it is written under another name first.

        Args:
            path: of the file, in a folder that exists.

        Raises:
            OSError: the file cannot be written.
            MissingDependencyError: safetensors is not installed.
        """
        settings = {"classes": self.classes, "features": self.features, "head": self.head, "scale": self.scale}
        tensors = {"support": self._support, "labels": self._labels}
        storage.save(Path(path), tensors, settings, key="classifier", needed_by="FewShotClassifier")

    @classmethod
    def load(cls, path: str | Path, *, features: str | None = None) -> FewShotClassifier:
        """Read what `save` wrote. Nothing is unpickled, and no code is imported because the file names it.

        Args:
            path: of the file.
            features: where they are a function, "MODULE:FUNCTION" as in the file, which is then imported and called;
                None, the default: no function.

        Returns:
            The classifier, which gives what the saved one gave.

        Raises:
            InputError: there is no such file, it is damaged, its features are not to be found, or they are a function
                and `features` says something else.
            MissingDependencyError: safetensors, or what the features need, is not installed.
        """
        try:
            tensors, settings = storage.load(Path(path), key="classifier", needed_by="FewShotClassifier")
            support, labels = tensors["support"], tensors["labels"]
            values = {name: settings[name] for name in ("classes", "features", "head", "scale")}
            named = values["features"] = str(values["features"])
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                "classifier", "a complete file of `FewShotClassifier.save`", f"{path} ({error})"
            ) from error
        if features is None and _names_code(named):
            wish = f"features={named!r} (--features): the file names code, which runs only if you name it too"
            raise InputError("features", wish, f"nothing, for {path}")
        if features not in (None, named):
            raise InputError("features", f"{named!r}, as in {path}", repr(features))
        return cls(**values, support=support, labels=labels)


def make_head(name: str) -> ClassificationHead:
    """The head of that name.

    Args:
        name: one of `HEADS`.

    Returns:
        A new head.

    Raises:
        InputError: there is none.
    """
    if name not in HEADS:
        raise InputError("head", f"one of {', '.join(HEADS)}", repr(name))
    return HEADS[name]()


def find_features(name: str) -> Features:
    """The features of that name, as `FewShotClassifier.from_folder` knows them.

    Args:
        name: one of `FEATURES`, a name or a file of `load_pretrained`, or "MODULE:FUNCTION".

    Returns:
        The function from files to features `(n, d)`.

    Raises:
        InputError: there are none.
        MissingDependencyError: what they need is not installed.
    """
    if name in FEATURES:
        return FEATURES[name]()
    if name in names() or _exists(name):
        return _backbone(name)
    module, _, function = name.partition(":")
    if not function:
        raise InputError("features", f"one of {', '.join([*FEATURES, *names()])}, or MODULE:FUNCTION", repr(name))
    try:
        return getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError("features", "a function of a module that can be imported", f"{name!r} ({error})") from error


def _names_code(name: str) -> bool:
    """Whether features of that name are a function to import, and not the library's own or a file of weights."""
    return ":" in name and name not in [*FEATURES, *names()] and not _exists(name)


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except OSError:  # too long for a name
        return False


def _text() -> Features:
    try:
        import wordllama
    except ImportError as error:
        raise MissingDependencyError("wordllama", "text", "FewShotClassifier(features='text')") from error

    (own,) = map(Path, wordllama.__path__)

    class Packaged(wordllama.WordLlama):
        """The model that the package holds: nothing is downloaded. Before version 0.4 it looked elsewhere."""

        @staticmethod
        def get_cache_dir(is_tokenizer_config: bool = False) -> Path:
            return own / ("tokenizers" if is_tokenizer_config else "weights")

    model = Packaged.load(cache_dir=own, disable_download=True)

    def text(paths: Sequence[Path]) -> Tensor:
        documents = [_read(path, lambda path: path.read_text(encoding="utf-8")) for path in paths]
        if empty := [path for path, document in zip(paths, documents, strict=True) if not document.strip()]:
            raise InputError("file", "a file with some text in it", f"{empty[0]} without any text")
        return torch.from_numpy(model.embed(documents))

    return text


def _npy() -> Features:
    import numpy as np

    def vector(path: Path) -> Tensor:
        return torch.from_numpy(np.load(path, allow_pickle=False)).flatten()

    def npy(paths: Sequence[Path]) -> Tensor:
        rows = [_read(path, vector) for path in paths]
        for path, row in zip(paths, rows, strict=True):
            if row.shape != rows[0].shape:
                raise InputError("file", f"{len(rows[0])}, as in {paths[0]}", f"{path} with {len(row)} values")
        return torch.stack(rows)

    return npy


def _backbone(name: str) -> Features:
    try:
        import numpy as np
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError("pillow", "pretrained", f"FewShotClassifier(features={name!r})") from error
    trained = load_pretrained(name)
    size, mode = trained.settings["image_size"], "L" if trained.backbone.mean.shape[1] == 1 else "RGB"

    def image(path: Path) -> Tensor:
        try:
            with Image.open(path) as picture:
                pixels = np.array(picture.convert(mode).resize((size, size), Image.Resampling.BICUBIC))
        except (SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(str(error)) from error
        return torch.from_numpy(pixels).reshape(size, size, -1).permute(2, 0, 1)

    return lambda paths: embed(trained.backbone, torch.stack([_read(path, image) for path in paths]), progress=False)


FEATURES: Mapping[str, Callable[[], Features]] = {"text": _text, "npy": _npy}
"""By name: what makes the function from files to features."""


def _read(path: Path, read: Callable[[Path], T]) -> T:
    try:
        return read(path)
    except (OSError, TypeError, ValueError) as error:
        raise InputError("file", "one that can be read", f"{path} ({error})") from error


def _features(embed: Features, paths: Sequence[Path]) -> Tensor:
    if missing := [path for path in paths if not path.is_file()]:
        raise InputError("file", "a file", f"{missing[0]}, which is no file")
    found = embed(paths)
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.ndim != 2 or len(found) != len(paths):
        got = f"shape {tuple(found.shape)} of {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
        raise InputError("features", f"a row of floating-point values for each of {len(paths)} files", got)
    usable = found.isfinite().all(-1) & found.any(-1)
    if not usable.all():
        raise InputError(
            "file", "finite ones, not all zero", f"{paths[int(usable.int().argmin())]}, with unusable features"
        )
    return functional.normalize(found.double(), dim=-1)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name[0] != ".")
