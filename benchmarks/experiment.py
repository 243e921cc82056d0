"""The command line of the scripts that measure, and the files that they write."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import pandas
import torch
from rich.console import Console
from rich.table import Table

import convexheads as ch
from benchmarks import report


def parser(name: str, description: str | None, *common: str) -> jsonargparse.ArgumentParser:
    """The parser of `python -m benchmarks.NAME`.

    Args:
        name: the module.
        description: what `--help` shows; only the first line, for instance of a docstring, is used.
        common: the shared options to add, chosen from data_root, seed, threads, device and output.
    """
    made = jsonargparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=(description or "").partition("\n")[0]
    )
    known: dict[str, dict[str, Any]] = {
        "data_root": {"type": Path | None, "help": "folder of the data; default: the variable CONVEXHEADS_DATA"},
        "seed": {"type": int, "default": 0, "help": "seed of the test episodes"},
        "threads": {"type": int, "default": torch.get_num_threads(), "help": "processor threads"},
        "device": {"type": Literal["cpu", "cuda"], "default": "cpu", "help": "device to measure on"},
        "output": {"type": Path, "default": Path("runs") / name, "help": "folder for the result"},
    }
    for each in common:
        made.add_argument("--" + each.replace("_", "-"), **known[each])
    return made


def refuse_unknown(option: str, given: Iterable[str], known: Iterable[str]) -> None:
    """End the script with an error if an option has a value that isn't among the known ones."""
    names = list(known)
    if unknown := sorted(set(given) - set(names)):
        raise SystemExit(f"error: {option}: expected some of {', '.join(names)}, got {', '.join(unknown)}")


@contextmanager
def input_errors_end_the_script() -> Iterator[None]:
    """Show an `InputError`, such as one for missing data, without a traceback."""
    try:
        yield
    except ch.InputError as error:
        raise SystemExit(f"error: {error}") from error


def place(origin: dict[str, Any], device: str = "cpu") -> str:
    """The processor with its number of threads, or the GPU; `origin` is the result of `report.provenance`."""
    machine = origin["machine"]
    return machine["accelerator"] if device == "cuda" else f"{machine['processor']}, {machine['threads']} threads"


def write(
    output: Path,
    name: str,
    table: Table,
    note: str,
    *,
    record: dict[str, Any],
    more: Sequence[tuple[Table, str]] = (),
    rows: pandas.DataFrame | None = None,
    draw: Callable[[Path], None] | None = None,
    width: int = 100,
) -> None:
    """Show a result, and write it to a folder.

    Args:
        output: the folder.
        name: names the files NAME.md, NAME.json and, with `rows` and `draw`, NAME.csv and NAME.png.
        table: the result as a table.
        note: the text below it.
        record: the result for JSON, with `report.provenance`.
        more: further tables, each with a text (possibly empty) below it.
        rows: the result for CSV.
        draw: draws the result, and writes the picture to a path.
        width: the smallest width of the console, in characters.
    """
    shown = [table, note, *(each for pair in more for each in pair if each), f"All results are in {output}"]
    Console(width=max(width, Console().width)).print(*shown, sep="\n")
    output.mkdir(parents=True, exist_ok=True)
    if rows is not None:
        rows.to_csv(output / f"{name}.csv", index=False)
    report.write_json(record, output / f"{name}.json")
    for number, (further, text) in enumerate(more, 2):
        note += f"\n\n## {further.title}\n\n{report.snippet(further, number)}" + (f"\n\n{text}" if text else "")
    report.write_markdown(table, note, output / f"{name}.md")
    if draw is not None:
        draw(output / f"{name}.png")
