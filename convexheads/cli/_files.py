"""The files of a folder: which are examples, of which kind they are, and how errors name them."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Literal, TypeVar

from convexheads.errors import InputError

Kind = Literal["text", "images", "npy"]
"""Kinds of files; each is also the name of the features that are the default for it."""

T = TypeVar("T")

_IMAGES = frozenset(
    {".avif", ".bmp", ".gif", ".heic", ".heif", ".jpeg", ".jpg"}
    | {".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
_JUNK = ("thumbs.db", "desktop.ini")  # which Windows adds by itself
_NAMED = 3  # files that one message names


def kind_of(path: Path) -> Kind | None:
    """Return the kind of a file, by its suffix or, for text, by its first bytes; None for all other files."""
    if (suffix := path.suffix.lower()) in _IMAGES:
        return "images"
    if suffix == ".npy":
        return "npy"
    with path.open("rb") as file:
        return None if b"\0" in file.read(8192) else "text"  # as git tells them apart


def list_files(folder: Path, *, recursive: bool = False) -> tuple[list[Path], list[Path]]:
    """List the files of a folder, sorted: the visible ones, and hidden ones and those that Windows adds by itself.

    Hidden folders are ignored.
    """
    found = sorted(path for path in (folder.rglob("*") if recursive else folder.iterdir()) if path.is_file())
    found = [path for path in found if all(part[0] != "." for part in path.relative_to(folder).parts[:-1])]
    stray = {path for path in found if path.name[0] == "." or path.name.lower() in _JUNK}
    return [path for path in found if path not in stray], sorted(stray)


def select(files: Sequence[Path], stray: Sequence[Path], kind: Kind | None) -> tuple[list[Path], list[Path]]:
    """Split files into those of a kind and all others; without any of that kind, or with kind None, take all `files`.

    Where no file is of the kind, reading the first one gives an error that says why.
    """
    own = {path for path in files if kind_of(path) == kind} if kind else set()
    kept = own or set(files)
    return sorted(kept), sorted({*files, *stray} - kept)


def find_kind(classes: Mapping[str, Sequence[Path]]) -> Kind:
    """Return the kind of most files, which every class has; raise `InputError` where there is none."""
    kinds: dict[Path, Kind | None] = {path: kind_of(path) for path in chain.from_iterable(classes.values())}
    counts: Counter[Kind | None] = Counter(kinds.values())
    kind, count = counts.most_common(1)[0]
    without = [name for name, files in classes.items() if all(kinds[path] != kind for path in files)]
    if kind is not None and 2 * count > len(kinds) and not without:
        return kind
    examples: dict[Kind | None, Path] = {}
    for path, each in kinds.items():
        examples.setdefault(each, path)
    parts = (f"{counts[each]} {_describe(each)} ({example})" for each, example in examples.items())
    got = " and ".join(parts) + (f"; none of the {_describe(kind)} is in class {without[0]!r}" if without else "")
    raise InputError("features", "a name (features=, --features), because no kind of files is that of all classes", got)


def warn_of_skipped(skipped: Sequence[Path]) -> None:
    """Warn of files that are not used, if there are any, in one line."""
    if skipped:
        more = f" and {len(skipped) - _NAMED} more" if len(skipped) > _NAMED else ""
        names = ", ".join(map(str, skipped[:_NAMED]))
        text = f"{len(skipped)} files of other kinds are skipped" if len(skipped) > 1 else "a file is skipped"
        warnings.warn(f"{text}: {names}{more}", UserWarning, stacklevel=3)


def read(path: Path, read: Callable[[Path], T], expected: str = "a file that can be read") -> T:
    """Read a file by a function that may raise anything; the error names the file."""
    try:
        return read(path)
    except Exception as error:  # damaged files raise many types of errors
        raise InputError("file", expected, f"{path} ({error})") from error


def check_widths(paths: Sequence[Path], widths: Sequence[int]) -> None:
    """Check that all files have as many values as the first one."""
    for path, width in zip(paths, widths, strict=True):
        if width != widths[0]:
            raise InputError("file", f"{widths[0]} values, as in {paths[0]}", f"{path} with {width} values")


def _describe(kind: Kind | None) -> str:
    return {"text": "text files", "images": "images", "npy": "npy files", None: "other files"}[kind]
