"""Measure the speed of ridge regression and of the SVM, and compare it with a reference or with another revision.

python -m benchmarks.core_speed                  # relative to a fixed workload, compared with the stored reference
python -m benchmarks.core_speed --against main   # both versions alternately in one run: far less noise
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import stats
from tqdm.auto import tqdm

from benchmarks import experiment, report

ROOT = Path(__file__).parent.parent
CORE = Path(__file__).parent / "core"
REFERENCE = CORE / "reference.json"
THRESHOLD = 3.0
Ratios = dict[str, list[float]]
"""For each benchmark, ratios of two times, one ratio per process that measured them."""


class Change(NamedTuple):
    """The change in the time of one benchmark.

    Attributes:
        name: the name of the benchmark.
        percent: the change, positive if the benchmark is slower now.
        noise: half the width of the 95 % confidence interval of the change, in percent.
    """

    name: str
    percent: float
    noise: float

    def verdict(self, threshold: float) -> str:
        """The change in words.

        Args:
            threshold: the change that matters, in percent.

        Returns:
            "slower" or "faster" if the change exceeds both threshold and noise; "not slower" if the interval excludes a
                slowdown that matters; "unclear" otherwise, because there is too much noise to tell.
        """
        if abs(self.percent) > max(threshold, self.noise):
            return "slower" if self.percent > 0 else "faster"
        return "not slower" if self.percent + self.noise <= threshold else "unclear"


def changes(now: Ratios, before: Ratios | None = None) -> list[Change]:
    """The change of each benchmark, and the change of all together by the geometric mean.

    Args:
        now: ratios to the workload or, without `before`, to the other version.
        before: ratios to the workload in the reference. Default None (no reference).
    """
    logs = {name: [np.log(ratios), *([np.log(before[name])] if before else [])] for name, ratios in now.items()}
    logs["all"] = [np.mean(every, 0) for every in zip(*logs.values(), strict=True)]
    return [_change(name, *values) for name, values in logs.items()]


def _change(name: str, now: np.ndarray, before: np.ndarray | None = None) -> Change:
    """The change, by Student's t-test (Welch's for two samples) on logarithms, because times differ by factors."""
    test = stats.ttest_1samp(now, 0) if before is None else stats.ttest_ind(now, before, equal_var=False)
    low, high = test.confidence_interval(0.95)
    return Change(name, percent=100 * np.expm1((low + high) / 2).item(), noise=100 * np.sinh((high - low) / 2).item())


def measure(seconds: float, base: Path | None = None) -> dict[str, dict[str, float]]:
    """Run all benchmarks once, in a new process.

    Args:
        seconds: how long each benchmark takes.
        base: the folder of another version of the package, which is measured instead of the workload. Default None
            (the workload).

    Returns:
        For each benchmark, the ratio of the two times, and the median of each, in seconds.
    """
    with TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        options = [f"--benchmark-json={result}", f"--benchmark-max-time={seconds}"]
        options += [] if base is None else [f"--base={base}"]
        command = [sys.executable, "-m", "pytest", str(CORE), "--quiet", *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"error: the benchmarks failed\n{done.stdout}{done.stderr}")
        found = json.loads(result.read_text())["benchmarks"]
    return {each["param"]: each["extra_info"] for each in found}


def measure_repeatedly(repeats: int, seconds: float, base: Path | None = None) -> dict[str, list[dict[str, float]]]:
    """Run all benchmarks in each of several processes. The first process compiles the kernels, which is not timed."""
    found: dict[str, list[dict[str, float]]] = {}
    for _ in tqdm(range(repeats), unit="process", leave=False):
        for name, values in measure(seconds, base).items():
            found.setdefault(name, []).append(values)
    return found


@contextmanager
def other_version(revision: str) -> Iterator[Path]:
    """A temporary folder with the package of a revision, under another name, so that one process can import both."""
    command = ["git", "-C", str(ROOT), "archive", revision, "convexheads"]
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        raise SystemExit(f"error: --against: {done.stderr.decode().strip()}")
    with TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
            archive.extractall(folder, filter="data")
        package = (Path(folder) / "convexheads").rename(Path(folder) / "base_convexheads")
        for file in package.rglob("*.py"):
            imports = re.compile(r"^( *(?:from|import) )convexheads\b", re.MULTILINE)
            file.write_text(imports.sub(r"\1base_convexheads", file.read_text(encoding="utf-8")), encoding="utf-8")
        yield Path(folder)


def origin() -> dict[str, str | None]:
    """What the ratios depend on besides the package. They can be compared if all of this is the same."""
    made = report.provenance()
    packages = {name: made["versions"][name] for name in ("python", "torch", "numpy")} | {"numba": version("numba")}
    benchmark = hashlib.sha256((CORE / "bench_core.py").read_bytes()).hexdigest()
    return {"processor": made["machine"]["processor"], **packages, "benchmark": benchmark}


def read(here: dict[str, str | None], console: Console) -> Ratios:
    """The stored reference, with a warning if it was made elsewhere, and an error if it can't be compared."""
    stored = json.loads(REFERENCE.read_text())
    there = stored["origin"]
    if there["benchmark"] != here["benchmark"]:
        raise SystemExit(
            "error: the benchmarks have changed since the reference was made; make another one with --save"
        )
    for name in (name for name in here if there.get(name) != here[name]):
        console.print(f"The reference was made with a different {name}: {there.get(name)} then, {here[name]} now.")
    return stored["ratios"]


def show(
    title: str, columns: tuple[str, str], times: dict[str, tuple[float, float]], found: list[Change], threshold: float
) -> Table:
    """A line for each benchmark, with its times before and now from `times`."""
    table = report.new_table(title, ("", *columns, "change, %", "noise, %", ""), left=[""])
    for each in found:
        cells = [f"{time:.3f}" for time in times[each.name]] if each.name in times else ["", ""]
        verdict = each.verdict(threshold)
        style = {"slower": "red", "faster": "green", "unclear": "yellow"}.get(verdict)
        table.add_row(each.name, *cells, f"{each.percent:+.1f}", f"± {each.noise:.1f}", verdict, style=style)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    description = (
        "Measure the speed of ridge regression and of the SVM (5-way 1-shot, 5-way 5-shot, 20-way 5-shot; forward and "
        "backward; processor time on one thread), and report what changed since the stored reference."
    )
    parser = experiment.parser("core_speed", description)
    parser.add_argument("--against", type=str | None, help="revision to compare with, measured in the same run")
    parser.add_argument("--save", action="store_true", help="store the result as the reference, and compare nothing")
    parser.add_argument("--repeats", type=int | None, help="number of processes; default: 3, or 5 with --against")
    parser.add_argument(
        "--seconds", type=float, default=0.15, help="seconds for each of the 12 benchmarks in each process"
    )
    parser.add_argument(
        "--fail-above", type=float | None, help="percentage of slowdown, beyond noise, above which the exit code is 1"
    )
    options = parser.parse_args(arguments)
    repeats = options.repeats if options.repeats is not None else 3 if options.against is None else 5
    if repeats < 2:
        raise SystemExit(f"error: --repeats: expected at least 2, to tell changes from noise, got {repeats}")
    settings = {"repeats": repeats, "seconds": options.seconds}
    threshold = THRESHOLD if options.fail_above is None else options.fail_above
    console = Console(width=max(100, Console().width))
    if options.against is not None:
        with other_version(options.against) as base:
            measured = measure_repeatedly(base=base, **settings)
        found = changes(_ratios(measured))
        title, columns = f"Speed compared with {options.against}, in the same run", ("before, ms", "now, ms")
        times = {name: (1e3 * _median(each, "other"), 1e3 * _median(each, "own")) for name, each in measured.items()}
    else:
        before = {} if options.save else read(origin(), console)
        measured = _ratios(measure_repeatedly(**settings))
        if options.save:
            REFERENCE.write_text(json.dumps({"origin": origin(), "ratios": measured}, indent=2) + "\n")
            return
        found = changes(measured, before)
        title, columns = "Speed compared with the reference, in multiples of the workload's time", ("before", "now")
        times = {name: (np.median(before[name]).item(), np.median(measured[name]).item()) for name in measured}
    note = (
        "Noise: half the 95 % confidence interval, over processes. Not slower: the interval excludes a slowdown by "
        f"{threshold:g} %. Unclear: too much noise to tell; increase --repeats, on a machine that does nothing else."
    )
    console.print(show(title, columns, times, found, threshold), note)
    if options.fail_above is not None and any(each.verdict(threshold) == "slower" for each in found):
        raise SystemExit(1)


def _ratios(measured: dict[str, list[dict[str, float]]]) -> Ratios:
    return {name: [values["ratio"] for values in each] for name, each in measured.items()}


def _median(each: list[dict[str, float]], name: str) -> float:
    return np.median([values[name] for values in each]).item()


if __name__ == "__main__":
    main()
