"""The data sets: which classes each split has, where their images are found, and what to say when they are not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path, PurePosixPath
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision.datasets import CIFAR100
from tqdm.auto import tqdm

from benchmarks.data.images import ImageSet
from convexheads.errors import InputError

DATASETS = ("digits", "cifar-fs", "fc100")
VIEWS = tuple(f"{turn} degrees{mirrored}" for mirrored in ("", ", mirrored") for turn in (0, 90, 180, 270))
CIFAR_FOLDERS = ("", "cifar100/data", "cifarfs/cifar100/data")
CIFAR_LAYOUTS = """CIFAR-100 in one of these forms below the data root:
  cifar100/cifar100.zip                  one PNG an image, named cifar100/data/<class>/<image>.png
  cifar-100-python/                      as torchvision.datasets.CIFAR100(root, download=True) leaves it
  <class>/<image>.png                    a folder a class, 600 images each; also below cifar100/data/
                                         or, as learn2learn has it, below cifarfs/cifar100/data/"""


def load(dataset: str, root: Path | None = None, *, progress: bool = False) -> dict[str, ImageSet]:
    """Read a data set's splits: "train", "test" and, where there is one, "val"; no two share a class.

    Args:
        dataset: "digits" (comes with scikit-learn), "cifar-fs" or "fc100" (which need `root`).
        root: folder that holds the data; only read, never written to.
        progress: show a progress bar on the terminal.

    Raises:
        InputError: the data set is unknown, or `root` does not hold it completely.
    """
    if dataset == "digits":
        return load_digits()
    if dataset in ("cifar-fs", "fc100"):
        return load_cifar(dataset, root, progress=progress)
    raise InputError("dataset", repr(dataset), f"one of {', '.join(DATASETS)}")


def load_digits() -> dict[str, ImageSet]:
    """scikit-learn's 1,797 handwritten digits: 0 to 4 to train, 5 to 9 to test.

    Five classes are too few to learn from how classes differ: a backbone trained on them is worse on the others than
    its initial weights. So every digit, turned by a multiple of 90 degrees or mirrored, counts as a training class of
    its own, 40 in all, after the rotated characters of Santoro et al., "Meta-Learning with Memory-Augmented Neural
    Networks" (ICML 2016). The 8 x 8 images are enlarged to CIFAR's 32 x 32.
    """
    from sklearn import datasets  # slow to import, and needed here only

    pixels, digits = datasets.load_digits(return_X_y=True)
    grey = torch.from_numpy(pixels).reshape(-1, 1, 8, 8) * (255 / 16)
    images = functional.interpolate(grey, size=(32, 32), mode="bilinear").round().to(torch.uint8)
    labels = torch.from_numpy(digits).long()
    train = labels < 5
    turned = [images[train].rot90(turns, (-2, -1)) for turns in range(4)]
    views = turned + [view.flip(-1) for view in turned]
    return {
        "train": ImageSet(
            torch.cat(views),
            torch.cat([labels[train] + 5 * view for view in range(len(views))]),
            tuple(f"{digit}, {view}" for view in VIEWS for digit in range(5)),
        ),
        "test": ImageSet(images[~train], labels[~train] - 5, tuple("56789")),
    }


def load_cifar(
    dataset: str, root: Path | None, *, images_per_class: int = 600, progress: bool = False
) -> dict[str, ImageSet]:
    """The 100 classes of CIFAR-100, split as CIFAR-FS (64, 16, 20 at random) or FC100 (60, 20, 20 by superclass).

    Within a class, images stand in the order of their file names, or in torchvision's where its files are read.

    Args:
        dataset: "cifar-fs" or "fc100".
        root: folder that holds CIFAR-100 in one of the forms that an error lists; only read.
        images_per_class: how many a complete class has.
        progress: show a progress bar on the terminal.

    Raises:
        InputError: nothing usable below `root`, or a class is missing or incomplete.

    Source: Bertinetto et al., "Meta-learning with differentiable closed-form solvers" (ICLR 2019); Oreshkin et al.,
    "TADAM: Task dependent adaptive metric for improved few-shot learning" (NeurIPS 2018).
    """
    splits = {split: split_classes(dataset, split) for split in ("train", "val", "test")}
    classes = [name for names in splits.values() for name in names]
    origin, found = _find_cifar(root, classes)
    for name in classes:
        if (count := len(found.get(name, ()))) != images_per_class:
            raise InputError(
                "data root",
                f"{count} images of class {name!r} in {origin}",
                f"{images_per_class} images of every class",
            )
    images = {
        name: _decode(name, found[name])
        for name in tqdm(classes, desc=f"reading {dataset}", unit="class", disable=not progress)
    }
    return {
        split: ImageSet(
            torch.cat([images[name] for name in names]),
            torch.arange(len(names)).repeat_interleave(images_per_class),
            names,
        )
        for split, names in splits.items()
    }


def split_classes(dataset: str, split: str) -> tuple[str, ...]:
    """The class names of a split, in the order of their labels."""
    return tuple((Path(__file__).parent.parent / "splits" / dataset / f"{split}.txt").read_text().split())


Source = Mapping[str, Tensor | Sequence[Callable[[], bytes]]]
"""By class: its decoded images (n, 3, 32, 32), or a function for each image that reads its file."""


def _find_cifar(root: Path | None, classes: Sequence[str]) -> tuple[Path, Source]:
    if root is None:
        raise InputError("data root", "none (neither --data-root nor CONVEXHEADS_DATA is set)", CIFAR_LAYOUTS)
    if (archive := root / "cifar100" / "cifar100.zip").is_file():
        return archive, _zip_files(archive)
    if (python := root / "cifar-100-python").is_dir():
        return python, _torchvision_images(root)
    for folder in (root / name for name in CIFAR_FOLDERS):
        if any((folder / name).is_dir() for name in classes):
            return folder, {name: [p.read_bytes for p in sorted((folder / name).glob("*.png"))] for name in classes}
    raise InputError("data root", f"{root} ({'nothing usable' if root.is_dir() else 'no such folder'})", CIFAR_LAYOUTS)


def _zip_files(path: Path) -> Source:
    try:
        archive = ZipFile(path)
    except BadZipFile as error:
        raise InputError("data root", f"{path}, no zip file", "a complete one (was the download cut off?)") from error
    files = defaultdict(list)
    for name in sorted(archive.namelist()):
        if name.endswith(".png"):
            files[PurePosixPath(name).parent.name].append(partial(archive.read, name))
    return files


def _torchvision_images(root: Path) -> Source:
    try:  # These files are pickles: torchvision compares their md5 with the published one before it opens them.
        parts = [CIFAR100(root, train=train, download=False) for train in (True, False)]
    except RuntimeError as error:
        raise InputError("data root", f"{root / 'cifar-100-python'}, incomplete or altered", CIFAR_LAYOUTS) from error
    images = torch.from_numpy(np.concatenate([part.data for part in parts])).permute(0, 3, 1, 2)
    labels = torch.tensor([label for part in parts for label in part.targets])
    return {name: images[labels == label] for label, name in enumerate(parts[0].classes)}


def _decode(name: str, source: Tensor | Sequence[Callable[[], bytes]]) -> Tensor:
    if isinstance(source, Tensor):
        return source
    try:
        pixels = np.stack([np.asarray(Image.open(BytesIO(read())).convert("RGB")) for read in source])
        return torch.from_numpy(pixels.reshape(-1, 32, 32, 3)).permute(0, 3, 1, 2).contiguous()
    except (OSError, SyntaxError, ValueError, BadZipFile) as error:
        raise InputError("data root", f"a damaged image of class {name!r}: {error}", "32 x 32 PNG images") from error
