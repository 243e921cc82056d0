"""Find images below the data root: in archives, class folders, CSV lists, torchvision's files, or packed files.

Images are decoded only when they are read. Archives are read in place, never extracted, and no file is unpickled unless
its checksum is the published one.
"""

from __future__ import annotations

import csv
import math
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from io import BytesIO
from pathlib import Path, PurePath
from typing import Literal, NamedTuple
from zipfile import BadZipFile, ZipFile

from PIL import Image

from convexheads.errors import InputError

Read = Callable[[], Image.Image]
"""Opens one image."""
Splits = Mapping[str, Sequence[str]]
"""The names of the classes to find, by split."""


class Source(NamedTuple):
    """The archives, folders and lists that were found, and the images of each class, sorted by file name.

    Classes without images may be absent.
    """

    places: list[Path]
    images: dict[str, list[Read]]


_LARGEST = 2**26  # bytes of an image file, uncompressed
_SHEET = re.compile(r"(?P<name>.+)/(?P<count>[1-9][0-9]{0,4})\.webp")
# The errors of damaged, encrypted, unusually compressed and oversized files.
_DAMAGE = (
    *(OSError, SyntaxError, ValueError, EOFError, RuntimeError, BadZipFile, zlib.error),
    Image.DecompressionBombError,
)

Form = Callable[[Path, Splits], Source]
"""Finds images of some classes below a data root."""


def find(forms: Iterable[Form], root: Path, splits: Splits) -> Source:
    """Find the images of some classes, each class by the first form that has it.

    Raises:
        InputError: an archive, a list or torchvision's files are damaged.
    """
    places, images = [], {}
    for form in forms:
        rest = {split: [name for name in names if not images.get(name)] for split, names in splits.items()}
        if any(rest.values()):
            source = form(root, rest)
            places += source.places
            images |= source.images
    return Source(places, images)


def open_image(name: str, read: Read, mode: Literal["L", "RGB"]) -> Image.Image:
    """Decode an image of the named class.

    Raises:
        InputError: its file is missing or damaged.
    """
    try:
        return read().convert(mode)
    except _DAMAGE as error:
        raise InputError(
            "data root", "whole files", f"a missing or damaged image of class {name!r}: {error}"
        ) from error


def archives(names: Sequence[str], root: Path, splits: Splits) -> Source:
    """Find images in zip files, with members whose paths end in <class>/<file>; the first file that has a class wins.

    Raises:
        InputError: a zip file is incomplete or damaged.
    """
    wanted = {name for names in splits.values() for name in names}
    depth = 1 + next(iter(wanted)).count("/")
    paths = [path for path in (root / name for name in names) if path.is_file()]
    images = {}
    for path in paths:
        archive, found = _open_archive(path), defaultdict(list)
        for member in sorted(archive.namelist()):
            *folders, file = member.split("/")
            if _is_image(file) and (name := "/".join(folders[-depth:])) in wanted:
                found[name].append(partial(_decode, partial(_unpack, archive, member)))
        images = found | images
    return Source(paths, images)


def class_folders(parents: Sequence[str], root: Path, splits: Splits) -> Source:
    """Find one folder per class below `parents`, where `{split}` is the split; the first that has a class wins."""
    places, images = {}, {}
    for split, names in splits.items():
        folders = [root / parent.format(split=split) for parent in parents]
        for name in names:
            folder = next((folder for folder in folders if (folder / name).is_dir()), None)
            if folder is not None:
                files = sorted(path for path in (folder / name).iterdir() if _is_image(path.name))
                places[folder] = None
                images[name] = [partial(_decode, path.read_bytes) for path in files]
    return Source(list(places), images)


def csv_lists(parent: str, root: Path, splits: Splits) -> Source:
    """Find images by one list per split, <split>.csv with the columns filename and label, beside a folder `images`.

    The lists may name missing images: a class without any image counts as not found.

    Raises:
        InputError: a list can't be read, or names a file outside of that folder.
    """
    places, images = [], {}
    for split, names in splits.items():
        if not (path := root / parent / f"{split}.csv").is_file():
            continue
        listed = defaultdict(list)
        try:
            with path.open(encoding="utf-8", newline="") as lines:
                for row in csv.DictReader(lines):
                    file = PurePath(row["filename"])
                    if file.is_absolute() or ".." in file.parts:
                        raise InputError(
                            "data root", "files of the folder images beside it", f"{path}, which names {file}"
                        )
                    listed[row["label"]].append(root / parent / "images" / file)
        except (KeyError, TypeError, UnicodeDecodeError, csv.Error) as error:
            raise InputError("data root", "columns filename and label", f"{path}, which can't be read") from error
        for name in names:
            if any(file.is_file() for file in listed[name]):
                images[name] = [partial(_decode, file.read_bytes) for file in sorted(listed[name])]
                places += [path] if path not in places else []
    return Source(places, images)


def torchvision_cifar(root: Path, splits: Splits) -> Source:
    """Find the pickles that torchvision.datasets.CIFAR100 writes to cifar-100-python; images stay in their order.

    Raises:
        InputError: they are not the published files.
    """
    if not (folder := root / "cifar-100-python").is_dir():
        return Source([], {})
    from torchvision.datasets import CIFAR100  # needed here only

    try:  # torchvision compares the files' MD5 with the published one before unpickling them
        parts = [CIFAR100(root, train=train, download=False) for train in (True, False)]
    except RuntimeError as error:
        raise InputError("data root", "torchvision's download, whole", f"{folder}, incomplete or altered") from error
    wanted = {name for names in splits.values() for name in names}
    images = defaultdict(list)
    for part in parts:
        for pixels, label in zip(part.data, part.targets, strict=True):
            if (name := part.classes[label]) in wanted:
                images[name].append(partial(Image.fromarray, pixels))
    return Source([folder], images)


def sheets(dataset: str, root: Path, splits: Splits) -> Source:
    """Find the parts that `benchmarks.data.sheets.pack` writes, <dataset>/part-<number>.zip, with one sheet per class.

    A sheet is named <class>/<number of images>.webp. The last decoded sheet of each part is cached, so that reading all
    images of a class in a row decodes its sheet once.

    Raises:
        InputError: a part is an incomplete or damaged zip file.
    """
    wanted = {name for names in splits.values() for name in names}
    paths, images = sorted((root / dataset).glob("part-*.zip")), {}
    for path in paths:
        archive, found = _open_archive(path), {}
        decoded = lru_cache(maxsize=1)(partial(_sheet, archive))
        for member in archive.namelist():
            if (match := _SHEET.fullmatch(member)) and (name := match["name"]) in wanted:
                count = int(match["count"])
                found[name] = [partial(_tile, decoded, member, count, place) for place in range(count)]
        images = found | images
    return Source(paths, images)


def grid(count: int) -> tuple[int, int]:
    """Columns and rows of a nearly square sheet of `count` images, which are placed row by row."""
    columns = math.ceil(math.sqrt(count))
    return columns, math.ceil(count / columns)


def _sheet(archive: ZipFile, member: str) -> Image.Image:
    image = _decode(partial(_unpack, archive, member))
    image.load()
    return image


def _tile(decoded: Callable[[str], Image.Image], member: str, count: int, place: int) -> Image.Image:
    sheet, (columns, rows) = decoded(member), grid(count)
    (width, rest), (height, remainder) = divmod(sheet.width, columns), divmod(sheet.height, rows)
    if rest or remainder:
        raise ValueError(f"{member} of {sheet.width} x {sheet.height}")
    row, column = divmod(place, columns)
    return sheet.crop((column * width, row * height, (column + 1) * width, (row + 1) * height))


def _open_archive(path: Path) -> ZipFile:
    try:
        return ZipFile(path)
    except _DAMAGE as error:
        wish = "a complete one (was the download cut off?)"
        raise InputError("data root", wish, f"{path}, no zip file") from error


def _unpack(archive: ZipFile, member: str) -> bytes:
    if (size := archive.getinfo(member).file_size) > _LARGEST:  # zipfile never unpacks more than this size
        raise ValueError(f"{member} of {size:,} bytes")
    return archive.read(member)


def _decode(read: Callable[[], bytes]) -> Image.Image:
    return Image.open(BytesIO(read()))


def _is_image(file: str) -> bool:
    return file.lower().endswith((".png", ".jpg", ".jpeg")) and not file.startswith(".")
