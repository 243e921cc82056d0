"""The data sets: the classes of each split, where to find their images, and the errors for missing images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL.Image import Image, Resampling
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from benchmarks.data.images import ImageSet, every_turn, join
from benchmarks.data.sources import (
    Form,
    Read,
    Source,
    archives,
    class_folders,
    csv_lists,
    find,
    open_image,
    sheets,
    torchvision_cifar,
)
from convexheads.errors import InputError

SPLITS = ("train", "val", "test")
LISTS = Path(__file__).parent.parent / "splits"
CIFAR_LAYOUTS = """CIFAR-100 in one of these forms below the data root:
  cifar100/cifar100.zip                  one PNG per image, named cifar100/data/<class>/<image>.png
  cifar-100-python/                      as torchvision.datasets.CIFAR100(root, download=True) leaves it
  <class>/<image>.png                    one folder per class, 600 images each; also below cifar100/data/
                                         or, as in learn2learn, below cifarfs/cifar100/data/
  cifar-fs/part-<number>.zip             (or fc100/) as python -m benchmarks.data pack writes them"""
FOLDERS_AND_LISTS = """
  <split>/<synset>/<image>.jpg           one folder per class; <split> is train, val or test; also <synset>/<image>.jpg
  <split>.csv and images/<filename>      lists with the columns filename,label, and the images that they name"""
MINI_LAYOUTS = f"""\
miniImageNet, or the splits that are needed, in one of these forms below miniimagenet/ in the data root:
  miniimagenet_<split>.zip               one JPEG per image, named miniimagenet/<split>/<synset>/<image>.jpg\
{FOLDERS_AND_LISTS}
  part-<number>.zip                      as python -m benchmarks.data pack writes them"""
TIERED_LAYOUTS = f"""\
tieredImageNet, or the splits that are needed, in one of these forms below tieredimagenet/ in the data root:\
{FOLDERS_AND_LISTS}
  part-<number>.zip                      as python -m benchmarks.data pack writes them"""
OMNIGLOT_PLACES = [
    f"{folder}/images_{part}" for folder in ("omniglot", "omniglot-py") for part in ("background", "evaluation")
]
OMNIGLOT_LAYOUTS = """Omniglot's background and evaluation sets in one of these forms below the data root:
  omniglot/images_background.zip         and omniglot/images_evaluation.zip, the authors' files
  omniglot/images_background/<alphabet>/characterNN/<image>.png
                                         and images_evaluation/ beside it: the same, extracted
  omniglot-py/                           in place of omniglot/, as torchvision.datasets.Omniglot leaves it
  omniglot/part-<number>.zip             as python -m benchmarks.data pack writes them"""


@dataclass(frozen=True)
class Entry:
    """The description of a data set that is read from files.

    Attributes:
        name: its name in `load`, and the folder of its class lists.
        channels: 1 or 3.
        size: height and width of the returned images.
        images_per_class: images of a complete class.
        layouts: the supported file layouts, as text for users.
        forms: functions that find the images, the preferred one first; packed files are tried after them.
        exact: whether every class has exactly `images_per_class` images, or at least that many.
        resampling: filter that resizes images to `size`; None if all images must have that size.
        checksums: file of checksums beside the class lists, for data sets whose pixels are the same in every copy.
        finish: applied to each split after reading.
    """

    name: str
    channels: Literal[1, 3]
    size: int
    images_per_class: int
    layouts: str
    forms: tuple[Form, ...]
    exact: bool = True
    resampling: Resampling | None = None
    checksums: str | None = None
    finish: Callable[[ImageSet], ImageSet] | None = None

    @property
    def mode(self) -> Literal["L", "RGB"]:
        """Pillow's mode of the images."""
        return "L" if self.channels == 1 else "RGB"

    def complete(self, count: int) -> bool:
        """Whether a class may have that many images."""
        return count == self.images_per_class if self.exact else count >= self.images_per_class


def white_on_black(data: ImageSet) -> ImageSet:
    """White ink on black paper, with every rotation of a character as a separate class (see `every_turn`)."""
    return every_turn(ImageSet(255 - data.images, data.labels, data.classes))


_cifar = partial(
    Entry,
    channels=3,
    size=32,
    images_per_class=600,
    layouts=CIFAR_LAYOUTS,
    forms=(
        partial(archives, ["cifar100/cifar100.zip"]),
        torchvision_cifar,
        partial(class_folders, ["", "cifar100/data", "cifarfs/cifar100/data"]),
    ),
    checksums="cifar100.sha256",
)
_entries = (
    # Bertinetto et al., "Meta-learning with differentiable closed-form solvers" (ICLR 2019): classes split at random
    _cifar("cifar-fs"),
    # Oreshkin et al., "TADAM" (NeurIPS 2018): split by superclass
    _cifar("fc100"),
    # Vinyals et al., "Matching Networks for One Shot Learning" (NeurIPS 2016), with Ravi and Larochelle's split
    Entry(
        "miniimagenet",
        channels=3,
        size=84,
        images_per_class=600,
        layouts=MINI_LAYOUTS,
        forms=(
            partial(archives, [f"miniimagenet/miniimagenet_{split}.zip" for split in SPLITS]),
            partial(class_folders, ["miniimagenet/{split}", "miniimagenet"]),
            partial(csv_lists, "miniimagenet"),
        ),
        resampling=Resampling.BILINEAR,
    ),
    # Ren et al., "Meta-Learning for Semi-Supervised Few-Shot Classification" (ICLR 2018)
    Entry(
        "tieredimagenet",
        channels=3,
        size=84,
        images_per_class=30,
        exact=False,
        layouts=TIERED_LAYOUTS,
        forms=(
            partial(class_folders, ["tieredimagenet/{split}", "tieredimagenet"]),
            partial(csv_lists, "tieredimagenet"),
        ),
        resampling=Resampling.BILINEAR,
    ),
    # Lake et al., "Human-level concept learning through probabilistic program induction" (Science 350, 2015), with
    # the split of Vinyals et al. 2016
    Entry(
        "omniglot",
        channels=1,
        size=28,
        images_per_class=20,
        layouts=OMNIGLOT_LAYOUTS,
        forms=(
            partial(archives, [f"{place}.zip" for place in OMNIGLOT_PLACES]),
            partial(class_folders, OMNIGLOT_PLACES),
        ),
        resampling=Resampling.LANCZOS,
        checksums="omniglot.sha256",
        finish=white_on_black,
    ),
)
CATALOG = {entry.name: entry for entry in _entries}
"""The data sets that are read from files, by name."""
DATASETS = ("digits", "glyphs", *CATALOG)


def load(
    dataset: str, root: Path | None = None, *, splits: Sequence[str] = SPLITS, progress: bool = False
) -> dict[str, ImageSet]:
    """Read splits of a data set; no two splits share a class.

    Args:
        dataset: "digits" (comes with scikit-learn and has no validation classes), "glyphs" (drawn from matplotlib's
            fonts) or a name in `CATALOG`.
        root: folder that holds the data; only read, never written to. Digits and glyphs need none.
        splits: which of "train", "val" and "test" to read; the others may be missing.
        progress: show a progress bar on the terminal.

    Raises:
        InputError: the data set or a split is unknown, `splits` is empty, or a split in `root` is incomplete.
    """
    check_splits(splits)
    if dataset == "digits":
        digits = load_digits()
        return {split: digits[split] for split in splits if split in digits}
    if dataset == "glyphs":
        from benchmarks.data.glyphs import load_glyphs  # needs matplotlib

        glyphs = load_glyphs(progress=progress)
        return {split: glyphs[split] for split in splits}
    if dataset not in CATALOG:
        raise InputError("dataset", f"one of {', '.join(DATASETS)}", repr(dataset))
    return read(CATALOG[dataset], root, splits=splits, progress=progress)


def read(
    entry: Entry, root: Path | None, *, splits: Sequence[str] = SPLITS, progress: bool = False
) -> dict[str, ImageSet]:
    """The same as `load`, for a data set that is read from files.

    Raises:
        InputError: nothing usable below `root`, a split is missing, or a class of it is missing or incomplete.
    """
    source = look_for(entry, root, splits)
    total = sum(len(split_classes(entry.name, split)) for split in splits)
    with tqdm(total=total, desc=f"reading {entry.name}", unit="class", disable=not progress) as bar:
        return {split: _read_split(entry, source, split_classes(entry.name, split), bar) for split in splits}


def look_for(entry: Entry, root: Path | None, splits: Sequence[str]) -> Source:
    """Find all images of these splits.

    Raises:
        InputError: nothing usable below `root`, a split is missing, or a class of it is missing or incomplete.
    """
    source = look(entry, root)
    there = present(entry, source)
    if there and (missing := [split for split in splits if split not in there]):
        got = f"nothing of {' and '.join(missing)}, only {' and '.join(there)} of {entry.name}, in {root}"
        raise InputError("data root", entry.layouts, got)
    for name in (name for split in splits for name in split_classes(entry.name, split)):
        if not entry.complete(count := len(source.images.get(name, ()))):
            got = f"{count} images of class {name!r} in {' and '.join(map(str, source.places))}"
            least = "" if entry.exact else "at least "
            raise InputError("data root", f"{least}{entry.images_per_class} images of every class", got)
    return source


def check_splits(splits: Sequence[str]) -> None:
    """Check the names of splits.

    Raises:
        InputError: a split is unknown, or there is none.
    """
    if not splits or set(splits) - set(SPLITS):
        raise InputError("splits", f"some of {', '.join(SPLITS)}", list(splits))


def look(entry: Entry, root: Path | None) -> Source:
    """Find a data set's images, which may be incomplete.

    Raises:
        InputError: there is nothing usable below `root`.
    """
    if root is None:
        raise InputError("data root", entry.layouts, "none (neither --data-root nor CONVEXHEADS_DATA is set)")
    forms = (*entry.forms, partial(sheets, entry.name))
    source = find(forms, root, {split: split_classes(entry.name, split) for split in SPLITS})
    if not source.places:
        got = f"{root} ({'nothing usable' if root.is_dir() else 'no such folder'})"
        raise InputError("data root", entry.layouts, got)
    return source


def present(entry: Entry, source: Source) -> list[str]:
    """The splits that have at least one image."""
    return [split for split in SPLITS if any(source.images.get(name) for name in split_classes(entry.name, split))]


def split_classes(dataset: str, split: str) -> tuple[str, ...]:
    """The class names of a split, in the order of their labels."""
    return tuple((LISTS / dataset / f"{split}.txt").read_text(encoding="utf-8").split())


def _read_split(entry: Entry, source: Source, classes: tuple[str, ...], bar: tqdm) -> ImageSet:
    counts = torch.tensor([len(source.images[name]) for name in classes])
    images = torch.empty(int(counts.sum()), entry.channels, entry.size, entry.size, dtype=torch.uint8)
    for name, of_class in zip(classes, images.split(counts.tolist()), strict=True):
        for place, file in zip(of_class, source.images[name], strict=True):
            place.copy_(_pixels(entry, name, file))
        bar.update()
    data = ImageSet(images, torch.arange(len(classes)).repeat_interleave(counts), classes)
    return entry.finish(data) if entry.finish else data


def _pixels(entry: Entry, name: str, file: Read) -> Tensor:
    image = fit(entry, name, open_image(name, file, entry.mode))
    return torch.from_numpy(np.array(image).reshape(entry.size, entry.size, entry.channels)).permute(2, 0, 1)


def fit(entry: Entry, name: str, image: Image) -> Image:
    """An image of the named class, resized to the data set's size.

    Raises:
        InputError: it has another size, and the data set allows no resizing.
    """
    if image.size == (entry.size, entry.size):
        return image
    if entry.resampling is None:
        got = f"an image of class {name!r} that is {image.width} x {image.height}"
        raise InputError("data root", f"{entry.size} x {entry.size} for all of {entry.name}", got)
    return image.resize((entry.size, entry.size), entry.resampling)


def load_digits() -> dict[str, ImageSet]:
    """scikit-learn's 1,797 handwritten digits: 0 to 4 to train, 5 to 9 to test.

    Five training classes are too few: a backbone trained on them is worse on the other digits than its initial weights.
    So every digit, rotated by a multiple of 90 degrees or mirrored, is a separate training class, 40 in total, after
    the rotated characters of Santoro et al., "Meta-Learning with Memory-Augmented Neural Networks" (ICML 2016). The
    8 x 8 images are enlarged to CIFAR's 32 x 32.
    """
    from sklearn import datasets  # slow to import, and needed here only

    pixels, digits = datasets.load_digits(return_X_y=True)
    gray = torch.from_numpy(pixels).reshape(-1, 1, 8, 8) * (255 / 16)
    images = functional.interpolate(gray, size=(32, 32), mode="bilinear").round().to(torch.uint8)
    labels = torch.from_numpy(digits).long()
    train = labels < 5
    turned = every_turn(ImageSet(images[train], labels[train], tuple("01234")))
    mirrored = tuple(f"{name}, mirrored" for name in turned.classes)
    return {
        "train": join(turned, ImageSet(turned.images.flip(-1), turned.labels, mirrored)),
        "test": ImageSet(images[~train], labels[~train] - 5, tuple("56789")),
    }
