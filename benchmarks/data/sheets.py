"""Data sets packed into few files: one losslessly compressed sheet per class."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from zipfile import ZipFile, ZipInfo

from PIL import Image
from tqdm.auto import tqdm

from benchmarks.data.datasets import CATALOG, SPLITS, Entry, check_splits, fit, look_for, split_classes
from benchmarks.data.sources import Source, grid, open_image
from convexheads.errors import InputError

_METHOD = 4  # one class of CIFAR-100: methods 0, 2, 4, 6 make 1.12, 1.03, 1.02, 1.01 MB in 0.1, 0.4, 0.5, 1.3 s
_END = 22  # bytes of a zip file's end record


def pack(
    dataset: str,
    root: Path | None,
    output: Path,
    *,
    splits: Sequence[str] = SPLITS,
    part_size: int = 40_000_000,
    progress: bool = False,
) -> list[Path]:
    """Pack a data set to copy it to another machine, where `output` serves as the data root.

    The files, <output>/<dataset>/part-<number>.zip, contain whole classes, those of the training split first. A class
    is one sheet, <class>/<number of images>.webp, with its images in order. It is lossless: images of data sets with
    known checksums keep their original pixels and size; others are resized to the data set's size, as in `load`.

    Args:
        dataset: a name in `CATALOG`.
        root: folder that holds the data; only read, never written to.
        output: folder to write to; created if necessary.
        splits: which of "train", "val" and "test" to write; the others may be missing.
        part_size: the maximum size of a file in bytes.
        progress: show a progress bar on the terminal.

    Returns:
        The files.

    Raises:
        InputError: the data set or a split is unknown, `splits` is empty, a split in `root` is incomplete, an image is
            damaged, the sheet of a class is larger than a part, or `output` contains parts already.
    """
    if dataset not in CATALOG:
        raise InputError("dataset", f"one of {', '.join(CATALOG)}", repr(dataset))
    check_splits(splits)
    entry = CATALOG[dataset]
    source, folder = look_for(entry, root, splits), output / dataset
    if old := sorted(folder.glob("part-*.zip")):
        raise InputError("output", "a folder without packed files", f"{folder}, which holds {old[0].name} already")
    folder.mkdir(parents=True, exist_ok=True)
    names = [name for split in SPLITS if split in splits for name in split_classes(dataset, split)]
    parts, members, used = [], {}, _END
    for name in tqdm(names, desc=f"packing {dataset}", unit="class", disable=not progress):
        member, content = f"{name}/{len(source.images[name])}.webp", _sheet(entry, source, name)
        size = len(content) + 76 + 2 * len(member.encode())  # including the headers of a zip member
        if _END + size > part_size:
            raise InputError("part size", f"at least {_END + size:,}, for class {name!r}", f"{part_size:,} bytes")
        if used + size > part_size:
            parts.append(_write(folder / f"part-{len(parts)}.zip", members))
            members, used = {}, _END
        members[member] = content
        used += size
    return [*parts, _write(folder / f"part-{len(parts)}.zip", members)]


def _sheet(entry: Entry, source: Source, name: str) -> bytes:
    images = [open_image(name, file, entry.mode) for file in source.images[name]]
    if entry.checksums is None:
        images = [fit(entry, name, image) for image in images]
    if len(sizes := {image.size for image in images}) > 1:
        got = f"images of {len(sizes)} sizes of class {name!r}"
        raise InputError("data root", f"one size, as {entry.name} has it", got)
    columns, rows = grid(len(images))
    width, height = images[0].size
    sheet = Image.new(entry.mode, (columns * width, rows * height))
    for place, image in enumerate(images):
        sheet.paste(image, (place % columns * width, place // columns * height))
    sheet.save(buffer := BytesIO(), "webp", lossless=True, method=_METHOD)
    return buffer.getvalue()


def _write(path: Path, members: dict[str, bytes]) -> Path:
    with ZipFile(path, "x") as archive:
        for member, content in members.items():
            archive.writestr(ZipInfo(member), content)  # with the date 1980, so that the same images give the same file
    return path
