"""List the data sets, verify a copy of one (classes, numbers of images, sizes, checksums), or pack it into few files.

python -m benchmarks.data list
python -m benchmarks.data verify cifar-fs --data-root DIR
python -m benchmarks.data verify miniimagenet --splits '[test]' --data-root DIR
python -m benchmarks.data pack --dataset cifar-fs --data-root DIR --output PACKED
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Literal

import jsonargparse
from jsonargparse.typing import PositiveInt
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from benchmarks.data.datasets import CATALOG, LISTS, SPLITS, Entry, check_splits, look, present, split_classes
from benchmarks.data.sheets import pack
from benchmarks.data.sources import Source, open_image
from convexheads.errors import InputError

FAULTS_SHOWN = 20


@dataclass
class Survey:
    """The contents of a split.

    Attributes:
        wanted: how many classes it should have.
        counts: the number of images by class, of the classes that have any.
        sizes: the number of images by width and height, as stored.
        digests: checksum of each undamaged group of classes; see `survey`.
        faults: descriptions of what is missing or damaged.
    """

    wanted: int
    counts: dict[str, int] = field(default_factory=dict)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    digests: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def survey(entry: Entry, source: Source, split: str, *, progress: bool = False) -> Survey:
    """Decode every image of a split and compute checksums.

    An image's digest is the SHA-256 of its pixels as stored, before any resizing: bytes in the order height, width,
    channel. The digest of a group of classes is the SHA-256 of the sorted digests of each class's images, one class
    after another. So neither the file format nor the order of images matters. A group is one class of CIFAR, or those
    characters of an Omniglot alphabet that belong to the split.
    """
    classes = split_classes(entry.name, split)
    result, groups, unsound = Survey(len(classes)), defaultdict(hashlib.sha256), set()
    for name in tqdm(sorted(classes), desc=f"{entry.name}, {split}", unit="class", disable=not progress, leave=False):
        alphabet, slash, _ = name.partition("/")
        group, digests, faults = f"{split}/{alphabet}" if slash else name, [], []
        files = source.images.get(name, [])
        if files:
            result.counts[name] = len(files)
        if not entry.complete(len(files)):
            least = "" if entry.exact else "at least "
            faults.append(
                f"{split}: expected {least}{entry.images_per_class} images of class {name!r}, got {len(files)}"
            )
        for file in files:
            try:
                image = open_image(name, file, entry.mode)
            except InputError as error:
                faults.append(f"{split}: {error}")
                continue
            result.sizes[image.size] += 1
            if entry.resampling is None and image.size != (entry.size, entry.size):
                size = f"{image.width} x {image.height}"
                faults.append(f"{split}: expected images of {entry.size} x {entry.size} in class {name!r}, got {size}")
            digests.append(hashlib.sha256(image.tobytes()).digest())
        groups[group].update(b"".join(sorted(digests)))
        if faults:
            unsound.add(group)
        result.faults += dict.fromkeys(faults)  # a damaged sheet has the same fault in every image
    result.digests = {group: digest.hexdigest() for group, digest in groups.items() if group not in unsound}
    return result


def known_digests(entry: Entry) -> dict[str, str]:
    """The known checksums of a data set, by group of classes; none if the pixels differ between copies."""
    if entry.checksums is None:
        return {}
    return dict(line.split() for line in (LISTS / entry.checksums).read_text(encoding="utf-8").splitlines())


def verify(
    entry: Entry, root: Path | None, *, splits: Sequence[str] = SPLITS, progress: bool = False
) -> tuple[Table, list[str]]:
    """A table of the splits' contents, and descriptions of everything that is missing or wrong.

    Raises:
        InputError: `splits` is empty or has an unknown split, or there is nothing usable below `root`.
    """
    check_splits(splits)
    source, known, faults = look(entry, root), known_digests(entry), []
    there = present(entry, source)
    table = Table(title=f"{entry.name} in {root}", title_justify="left")
    for column in ("split", "classes", "images", "size", "checksums"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split in splits:
        if split not in there:
            table.add_row(split, f"0 of {len(split_classes(entry.name, split))}", "0", "", "")
            continue
        result = survey(entry, source, split, progress=progress)
        wrong = [group for group, digest in result.digests.items() if known and known.get(group) != digest]
        sound = f"{len(result.digests) - len(wrong)} ok" + (f", {len(wrong)} differ" if wrong else "")
        table.add_row(
            split,
            f"{len(result.counts)} of {result.wanted}",
            f"{sum(result.counts.values()):,}",
            _sizes(entry, result.sizes),
            sound if known else "none known",
        )
        faults += result.faults
        faults += [f"{split}: the pixels of {group!r} differ from the known ones" for group in wrong]
    if missing := [split for split in splits if split not in there]:
        faults.append(f"nothing of {' and '.join(missing)}; there is {' and '.join(there) or 'no split'}")
    for first, second in combinations(SPLITS, 2):
        if shared := set(split_classes(entry.name, first)) & set(split_classes(entry.name, second)):
            faults.append(f"{first} and {second} share the classes {', '.join(sorted(shared))}")
    return table, faults


def _sizes(entry: Entry, sizes: Counter[tuple[int, int]]) -> str:
    stored = " x ".join(map(str, *sizes)) if len(sizes) == 1 else f"{len(sizes)} sizes"
    resized = entry.resampling is not None and set(sizes) != {(entry.size, entry.size)}
    return f"{stored}, made {entry.size} x {entry.size}" if resized else stored


def listing() -> tuple[Table, str]:
    """A table of all data sets, and the file layouts of each."""
    table = Table(
        "data set", "classes", "images per class", "size", "checksums", title="Data sets", title_justify="left"
    )
    table.add_row("digits", "40, 0, 5", "174 or more", "32 x 32", "comes with scikit-learn")
    table.add_row("glyphs", "561, 91, 295", "20", "28 x 28", "drawn from matplotlib's fonts")
    for entry in CATALOG.values():
        table.add_row(
            entry.name,
            ", ".join(str(len(split_classes(entry.name, split))) for split in SPLITS)
            + (", each in 4 turns" if entry.finish else ""),
            f"{entry.images_per_class}{'' if entry.exact else ' or more'}",
            f"{entry.size} x {entry.size}",
            "known" if entry.checksums else "none known",
        )
    return table, "\n\n".join(dict.fromkeys(entry.layouts for entry in CATALOG.values()))


def _parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(prog="python -m benchmarks.data", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subcommands(dest="command")
    text = "list the data sets and what to put where"
    commands.add_subcommand("list", jsonargparse.ArgumentParser(description=text), help=text)
    text = "check that a copy of a data set is complete and undamaged: exit status 0 if so, else 1"
    command = jsonargparse.ArgumentParser(description=text)
    commands.add_subcommand("verify", command, help=text)
    command.add_argument("dataset", type=Literal[tuple(CATALOG)], help="the data set")
    text = "folder of the data (read-only); default: the environment variable CONVEXHEADS_DATA"
    command.add_argument("--data-root", type=Path | None, default=None, help=text)
    text = "the splits to check, as in '[test]'"
    command.add_argument("--splits", type=tuple[Literal[SPLITS], ...], default=SPLITS, help=text)
    text = "pack a data set's images losslessly into few files of limited size, which are read like the originals"
    command = jsonargparse.ArgumentParser(description=text)
    commands.add_subcommand("pack", command, help=text)
    command.add_argument("--dataset", type=Literal[tuple(CATALOG)], required=True, help="the data set")
    text = "folder of the data (read-only); default: the environment variable CONVEXHEADS_DATA"
    command.add_argument("--data-root", type=Path | None, default=None, help=text)
    command.add_argument("--output", type=Path, required=True, help="folder to write to; the data set gets a subfolder")
    text = "the splits to write, as in '[test]'"
    command.add_argument("--splits", type=tuple[Literal[SPLITS], ...], default=SPLITS, help=text)
    text = "maximum size of a file, in MB of 1,000,000 bytes"
    command.add_argument("--part-size", type=PositiveInt, default=40, help=text)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; raises SystemExit with a nonzero status if anything is missing or wrong."""
    options, console = _parser().parse_args(arguments), Console()
    if options.command == "list":
        table, layouts = listing()
        console.print(table)
        console.print(layouts, markup=False, highlight=False, soft_wrap=True)
        return
    chosen = options[options.command]
    root = chosen.data_root or os.environ.get("CONVEXHEADS_DATA")
    root = Path(root).expanduser() if root else None
    try:
        (_pack if options.command == "pack" else _verify)(console, chosen, root)
    except (InputError, OSError) as error:  # the latter of a full disk, say
        raise SystemExit(f"error: {error}") from error


def _pack(console: Console, chosen: jsonargparse.Namespace, root: Path | None) -> None:
    output, size = chosen.output.expanduser(), chosen.part_size * 1_000_000
    parts = pack(chosen.dataset, root, output, splits=chosen.splits, part_size=size, progress=True)
    for part in parts:
        console.print(f"{part}: {part.stat().st_size / 1e6:.1f} MB", highlight=False, soft_wrap=True)
    text = f"To read or verify them: --data-root {output}. Any other data root works too, with the files in"
    console.print(f"{text} {chosen.dataset}/ below it.", markup=False, highlight=False, soft_wrap=True)


def _verify(console: Console, chosen: jsonargparse.Namespace, root: Path | None) -> None:
    entry = CATALOG[chosen.dataset]
    table, faults = verify(entry, root, splits=chosen.splits, progress=True)
    console.print(table)
    if not entry.checksums:
        console.print("No checksums: copies of this data set differ in how its images were resized.", soft_wrap=True)
    if faults:
        more = [f"and {len(faults) - FAULTS_SHOWN:,} more"] if len(faults) > FAULTS_SHOWN else []
        hint = "What to put where: python -m benchmarks.data list"
        raise SystemExit("\n".join(["Missing or wrong:", *faults[:FAULTS_SHOWN], *more, hint]))
    console.print("Complete and right.")


if __name__ == "__main__":
    main()
