"""Tables, pictures, JSON and provenance: functions for writing results."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from copy import copy
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from convexheads import _storage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEFT_OUT = "is left out:"
"""The words with which a script says that it goes on without something, and why."""
PACKAGES = ("convexheads", "torch", "torchvision", "learn2learn", "numpy")


class Row(NamedTuple):
    """The accuracy of one head on the features of one backbone.

    Attributes:
        backbone: the source of the features, such as "meta-trained" or "untrained".
        head: the head's name.
        ways: classes of an episode.
        shots: support images per class.
        accuracy: mean over the episodes, 0 to 1.
        interval: half the width of the 95 % confidence interval of the mean.
        episodes: the number of episodes.
        largest_gap: the largest certified relative gap of an episode; None for heads without certificates.
    """

    backbone: str
    head: str
    ways: int
    shots: int
    accuracy: float
    interval: float
    episodes: int
    largest_gap: float | None


def table(rows: Sequence[Row], title: str) -> Table:
    """The rows as a table, with a line per backbone and head, a line for chance, and a column per kind of episode."""
    tasks = sorted({(row.ways, row.shots) for row in rows})
    columns = [f"{ways}-way {shots}-shot" for ways, shots in tasks]
    result = new_table(title, ["backbone", "head", *columns], left=("backbone", "head"))
    for backbone, head in dict.fromkeys((row.backbone, row.head) for row in rows):
        own = {(row.ways, row.shots): row for row in rows if (row.backbone, row.head) == (backbone, head)}
        cells = [f"{100 * own[n].accuracy:.2f} ± {100 * own[n].interval:.2f}" if n in own else "" for n in tasks]
        result.add_row(backbone, head, *cells)
    result.add_row("chance", "", *(f"{100 / ways:.2f}" for ways, _ in tasks))
    return result


def new_table(title: str, columns: Iterable[str], *, left: Sequence[str] = (), no_wrap: bool = False) -> Table:
    """A table without rows. Its columns are right-justified, except those in `left`."""
    result = Table(title=title, title_justify="left")
    for column in columns:
        result.add_column(column, justify="left" if column in left else "right", no_wrap=no_wrap)
    return result


def write_json(record: dict[str, Any], path: Path) -> None:
    """Write a record atomically: after an interruption, the file is either the old one or the complete new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _storage.atomic_write(path, (json.dumps(record, indent=2) + "\n").encode())


def write_markdown(result: Table, note: str, path: Path) -> None:
    """Write the table, and a note below it, as Markdown."""
    path.write_text(f"# {result.title}\n\n{snippet(result)}\n\n{note}\n", encoding="utf-8")


def snippet(result: Table, number: int = 1) -> str:
    """The table in Markdown, as pages include it: by the name "table" or, further below, "table-2" and so on."""
    name = "table" if number == 1 else f"table-{number}"
    return f"<!-- --8<-- [start:{name}] -->\n{markdown(result)}\n<!-- --8<-- [end:{name}] -->"


def markdown(result: Table) -> str:
    """The table in Markdown, without its title."""
    plain = copy(result)
    plain.title, plain.box = None, box.MARKDOWN
    text = StringIO()
    Console(file=text, width=300).print(plain)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    return "\n".join(line for line in lines if line)


def panels(count: int = 1, *, width: float, height: float, **settings: Any) -> tuple[Figure, list[Axes]]:
    """A picture with panels side by side; sizes are in inches, and `settings` are those of `Figure.subplots`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    found = list(figure.subplots(1, count, squeeze=False, **settings)[0])
    for axes in found:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, found


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw the accuracies as bars with their 95 % intervals, with a group per kind of episode."""
    tasks = sorted({(row.ways, row.shots) for row in rows})
    series = list(dict.fromkeys((row.backbone, row.head) for row in rows))
    heads = list(dict.fromkeys(row.head for row in rows))
    backbones = list(dict.fromkeys(row.backbone for row in rows))
    width = 0.8 / len(series)
    figure, (axes,) = panels(width=2.2 + 0.37 * len(series) * len(tasks), height=4.2)
    for i, (backbone, head) in enumerate(series):
        own = [row for row in rows if (row.backbone, row.head) == (backbone, head)]
        places = [tasks.index((row.ways, row.shots)) + (i - (len(series) - 1) / 2) * width for row in own]
        heights = [100 * row.accuracy for row in own]
        bars = axes.bar(
            places,
            heights,
            0.92 * width,
            yerr=[100 * row.interval for row in own],
            capsize=3,
            color=f"C{heads.index(head)}",
            alpha=0.5 ** backbones.index(backbone),
            label=f"{head}, {backbone}",
        )
        axes.bar_label(bars, [f"{height:.1f}" for height in heights], padding=2, fontsize=8)
    chance, ends = [100 / ways for ways, _ in tasks], range(len(tasks))
    axes.hlines(
        chance, [x - 0.45 for x in ends], [x + 0.45 for x in ends], "gray", "dashed", linewidth=1, label="chance"
    )
    axes.set_xticks(ends, [f"{ways}-way {shots}-shot" for ways, shots in tasks])
    axes.set_ylim(0, 105)
    axes.set_ylabel("accuracy on unseen classes, %")
    axes.set_title(title, fontsize=10, loc="left")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def details(command: str, seed: int, seconds: dict[str, float], origin: dict[str, Any]) -> str:
    """The provenance of a result as a Markdown list; `origin` is the result of `provenance`."""
    machine = origin["machine"]
    device = machine["accelerator"] or f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores"
    times = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    versions = ", ".join(f"{name} {value}" for name, value in origin["versions"].items())
    lines = [f"Command: `{command}`", f"Seed: {seed}", f"Wall time: {times}", f"Machine: {device}"]
    return "\n".join(f"- {line}" for line in [*lines, f"Versions: {versions}", f"Commit: {origin['commit']}"])


def records(frame: pandas.DataFrame) -> list[dict[str, Any]]:
    """The rows of a frame for JSON, with all digits, None for missing values, and infinity as a word."""

    def plain(value: Any) -> Any:
        if pandas.isna(value):
            return None
        return str(value) if value in (math.inf, -math.inf) else getattr(value, "item", lambda: value)()

    rows: Any = frame.to_dict("records")
    return [{str(name): plain(value) for name, value in row.items()} for row in rows]


def leave_out(name: str, reason: object) -> None:
    """Say that the script goes on without something, and why; of an error, show also where it was raised."""
    kind = ""
    if isinstance(reason, Exception):
        traceback.print_exception(reason)
        kind = f"{type(reason).__name__}: "
    print(f"{name} {LEFT_OUT} {kind}{reason}".partition("\n")[0], file=sys.stderr)


def now(value: Tensor) -> float:
    """Seconds on a clock, after the device of `value` has finished its pending work."""
    if value.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def provenance() -> dict[str, Any]:
    """The versions, commit and machine needed to judge or repeat a result, without paths and host names."""
    return {
        "versions": {"python": platform.python_version()} | {name: installed(name) for name in PACKAGES},
        "commit": _commit(),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def installed(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
