"""Time the solvers of one head against each other, interleaved in one process, with their errors beside the times.

python -m benchmarks.solvers
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jsonargparse
import pandas
import torch
from learn2learn.nn import SVClassifier
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm

import convexheads as ch
from benchmarks import report

SIZES = {"5w1s": (5, 1), "5w5s": (5, 5), "5w15s": (5, 15), "20w1s": (20, 1), "20w5s": (20, 5)}
C = 0.1
# qpth solves larger problems task by task, which is fastest on one thread.
_ONE_THREAD = 150
# Moreau, the reference, solves larger problems by an interior point, whose gradients are good to one digit there.
_REFERENCE = 500


class Contender(NamedTuple):
    """Something to time: from support, labels and query to logits.

    Attributes:
        call: the function.
        largest: the n * k above which it is left out, as it would take minutes.
        exact: whether its answer is that of the paper's SVM, so that it has an error.
    """

    call: Callable[[Tensor, Tensor, Tensor, int], Tensor]
    largest: float = math.inf
    exact: bool = True


def contenders() -> dict[str, Contender]:
    """The paper's SVM on each solver, learn2learn's smoothed one in a loop, and ridge regression as the floor."""

    def of(head: ch.Head) -> Callable[[Tensor, Tensor, Tensor, int], Tensor]:
        return lambda support, labels, query, ways: head(support, labels, query, ways=ways)

    def looped(support: Tensor, labels: Tensor, query: Tensor, ways: int) -> Tensor:
        logits = []
        for x, y, q in zip(support.float(), labels, query.float(), strict=True):
            classifier = SVClassifier()
            classifier.fit_(x, y, ways)
            logits.append(classifier(q))
        return torch.stack(logits)

    return {
        "ridge": Contender(of(ch.RidgeHead()), exact=False),
        "native": Contender(of(ch.SVMHead(C))),
        "native in torch": Contender(of(ch.SVMHead(C, solver=ch.NativeSolver(compiled=False)))),
        "moreau": Contender(of(ch.SVMHead(C, solver=ch.MoreauSolver()))),
        "qpth": Contender(of(ch.SVMHead(C, solver=ch.QpthSolver(max_iterations=15))), largest=400),
        "cvxpylayers": Contender(of(ch.SVMHead(C, solver=ch.CvxpylayersSolver(on_failure="return"))), largest=375),
        "learn2learn": Contender(looped, largest=375, exact=False),
    }


def episode(tasks: int, ways: int, shots: int, features: int, queries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Support, labels and query of random tasks with a little structure, in float64."""
    torch.manual_seed(0)
    labels = torch.arange(ways).repeat_interleave(shots).expand(tasks, -1)
    centres = torch.randn(tasks, ways, features, dtype=torch.float64) / features**0.5
    noise = torch.randn(tasks, ways * shots, features, dtype=torch.float64) / features**0.5
    query = torch.randn(tasks, ways * queries, features, dtype=torch.float64) / features**0.5
    return centres.repeat_interleave(shots, 1) + noise, labels, query


def once(call: Callable[..., Tensor], support: Tensor, labels: Tensor, query: Tensor, ways: int):
    """Seconds of the forward pass and of both passes, the logits, and the gradient of the support."""
    support = support.detach().requires_grad_()
    begin = time.perf_counter()
    logits = call(support, labels, query, ways)
    forward = time.perf_counter() - begin
    (gradient,) = torch.autograd.grad(logits.square().sum(), support)
    return forward, time.perf_counter() - begin, logits.detach(), gradient


def measure(
    *, sizes: list[str], tasks: int, features: int, queries: int, repeats: int, threads: int
) -> pandas.DataFrame:
    """One row for each size and contender: median seconds, and the largest relative errors.

    Errors are those of logits and of the support's gradient against Moreau at a tight tolerance, where that is exact.
    """
    rows = []
    for size in (bar := tqdm(sizes, unit="size")):
        bar.set_description(size)
        ways, shots = SIZES[size]
        data = episode(tasks, ways, shots, features, queries)
        nk = ways * ways * shots
        taking_part = {name: each for name, each in contenders().items() if nk <= each.largest}
        forward: dict[str, list[float]] = {name: [] for name in taking_part}
        both: dict[str, list[float]] = {name: [] for name in taking_part}
        errors: dict[str, tuple[float, float]] = {}
        reference = ch.SVMHead(C, solver=ch.MoreauSolver(tolerance=1e-8))
        _, _, logits, gradient = once(lambda s, y, q, k, head=reference: head(s, y, q, ways=k), *data, ways)
        for repeat in range(repeats + 1):
            for name, each in taking_part.items():
                if repeat > 3 and nk > _ONE_THREAD and statistics.median(both[name]) > 0.3:
                    continue  # three repeats of what takes long
                torch.set_num_threads(1 if name == "qpth" and nk > _ONE_THREAD else threads)
                first, second, found, slope = once(each.call, *data, ways)
                if repeat:  # the first of each warms up
                    forward[name].append(first)
                    both[name].append(second)
                elif each.exact and nk <= _REFERENCE:
                    errors[name] = _error(found, logits), _error(slope, gradient)
        for name in taking_part:
            row = {"size": size, "nk": nk, "contender": name, "forward": statistics.median(forward[name])}
            row |= {"both": statistics.median(both[name]), "repeats": len(both[name])}
            rows.append(
                row | dict(zip(("logits_error", "gradient_error"), errors.get(name, (None, None)), strict=True))
            )
    torch.set_num_threads(threads)
    return pandas.DataFrame(rows)


def _error(value: Tensor, reference: Tensor) -> float:
    return ((value - reference).abs().max() / reference.abs().max()).item()


def show(rows: pandas.DataFrame, title: str) -> Table:
    """Milliseconds of both passes with errors, and how many times the native solver's and ridge's time that is."""
    table = Table(title=title, title_justify="left")
    columns = ("size", "", "forward, ms", "both, ms", "/ native", "/ ridge", "logits error", "gradient error")
    for column in columns:
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for size, own in rows.groupby("size", sort=False):
        floor, native = (own[own["contender"] == name]["both"].item() for name in ("ridge", "native"))
        for row in own.to_dict("records"):
            errors = ["" if pandas.isna(row[e]) else f"{row[e]:.0e}" for e in ("logits_error", "gradient_error")]
            times = [f"{1e3 * row[t]:.1f}" for t in ("forward", "both")]
            ratios = [f"{row['both'] / native:.1f}", f"{row['both'] / floor:.1f}"]
            table.add_row(str(size), str(row["contender"]), *times, *ratios, *errors)
    return table


def draw(rows: pandas.DataFrame, title: str, path: Path) -> None:
    """Draw time against n * k, both logarithmic, and gradient error against time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, own in rows.groupby("contender", sort=False):
        own = own.sort_values("nk")
        left.loglog(own["nk"], 1e3 * own["both"], "o-", label=name)
        known = own.dropna(subset="gradient_error")
        right.loglog(1e3 * known["both"], known["gradient_error"].clip(lower=1e-17), "o", label=name)
    left.set(xlabel="examples x classes", ylabel="forward and backward, ms")
    right.set(xlabel="forward and backward, ms", ylabel="relative error of the gradient")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(linewidth=0.3)
    left.legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)


def main() -> None:
    """The command line."""
    parser = jsonargparse.ArgumentParser(
        prog="python -m benchmarks.solvers", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--sizes", type=list[str], default=list(SIZES), help=f"of {', '.join(SIZES)}")
    parser.add_argument("--tasks", type=int, default=8, help="tasks solved at once")
    parser.add_argument("--features", type=int, default=640, help="feature dimension")
    parser.add_argument("--queries", type=int, default=15, help="query examples a class")
    parser.add_argument("--repeats", type=int, default=15, help="timed repeats, after one that warms up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="processor threads")
    parser.add_argument("--output", type=Path, default=Path("runs/solvers"), help="folder for the result")
    options = parser.parse_args()
    if unknown := set(options.sizes) - set(SIZES):
        raise SystemExit(f"error: sizes: got {', '.join(sorted(unknown))}, wanted some of {', '.join(SIZES)}")
    torch.set_num_threads(options.threads)
    names = ("sizes", "tasks", "features", "queries", "repeats", "threads")
    settings: dict[str, Any] = {name: options[name] for name in names}
    rows = measure(**settings)
    title = f"One pass of an SVM head over {options.tasks} tasks, median of {options.repeats} (3 where slow), float64"
    table = show(rows, title)
    origin = report.provenance()
    machine = f"{origin['machine']['processor']}, {options.threads} threads, torch {origin['versions']['torch']}"
    note = (
        f"C = {C}, {options.features} features, {options.queries} queries a class; {machine}. Errors: the largest, "
        f"relative to the largest entry, against Moreau at tolerance 1e-8, up to n k = {_REFERENCE}: above that, its "
        "own gradients are good to one digit only. qpth with the 15 iterations of the paper's code, on one thread "
        f"above n k = {_ONE_THREAD}, where it solves task by task; learn2learn's `SVClassifier` is smoothed and in "
        "float32; what would take minutes is left out. Made by `python -m benchmarks.solvers`."
    )
    Console(width=max(100, Console().width)).print(table, note, f"All of it is in {options.output}", sep="\n")
    options.output.mkdir(parents=True, exist_ok=True)
    record = {"settings": settings, "results": json.loads(rows.to_json(orient="records") or ""), **origin}
    (options.output / "solvers.json").write_text(json.dumps(record, indent=2) + "\n")
    report.write_markdown(table, note, options.output / "solvers.md")
    draw(rows, title, options.output / "solvers.png")


if __name__ == "__main__":
    main()
