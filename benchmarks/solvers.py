"""Time the solvers of one head against each other: forward and backward, interleaved in one process.

python -m benchmarks.solvers
"""

from __future__ import annotations

import json
import statistics
import time
import warnings
from pathlib import Path

import jsonargparse
import torch
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from benchmarks import report
from convexheads import Head, QpthSolver, RidgeHead, SVMHead

SIZES = {"5w1s": (5, 1), "5w5s": (5, 5), "5w15s": (5, 15)}


def heads() -> dict[str, Head]:
    """What is compared: the paper's SVM on each solver, and ridge regression as the floor."""
    return {
        "ridge": RidgeHead(),
        "native": SVMHead(C=0.1, scale=1.0),
        "qpth": SVMHead(C=0.1, solver=QpthSolver(max_iterations=15)),
    }


def seconds(head: Head, support: torch.Tensor, labels: torch.Tensor, query: torch.Tensor, ways: int) -> float:
    """Wall time of one forward and backward pass through the head."""
    support = support.detach().requires_grad_()
    begin = time.perf_counter()
    head(support, labels, query, ways=ways).square().sum().backward()
    return time.perf_counter() - begin


def measure(*, tasks: int, features: int, queries: int, repeats: int, threads: int) -> dict[str, dict[str, float]]:
    """Median seconds by size and head; qpth on one thread where it solves task by task, its best setting there."""
    result: dict[str, dict[str, float]] = {}
    for name, (ways, shots) in tqdm(SIZES.items(), desc="sizes", unit="size"):
        torch.manual_seed(0)
        labels = torch.arange(ways).repeat_interleave(shots).expand(tasks, -1)
        centres = torch.randn(tasks, ways, features, dtype=torch.float64) / features**0.5
        noise = torch.randn(tasks, ways * shots, features, dtype=torch.float64) / features**0.5
        support = centres.repeat_interleave(shots, 1) + noise
        query = torch.randn(tasks, ways * queries, features, dtype=torch.float64) / features**0.5
        times: dict[str, list[float]] = {head: [] for head in heads()}
        for repeat in range(repeats + 1):
            for key, head in heads().items():
                torch.set_num_threads(1 if key == "qpth" and ways * ways * shots > 125 else threads)
                elapsed = seconds(head, support, labels, query, ways)
                if repeat:  # the first of each warms up
                    times[key].append(elapsed)
        result[name] = {key: statistics.median(values) for key, values in times.items()}
    torch.set_num_threads(threads)
    return result


def main() -> None:
    """The command line."""
    parser = jsonargparse.ArgumentParser(
        prog="python -m benchmarks.solvers", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--tasks", type=int, default=8, help="tasks solved at once")
    parser.add_argument("--features", type=int, default=640, help="feature dimension")
    parser.add_argument("--queries", type=int, default=15, help="query examples a class")
    parser.add_argument("--repeats", type=int, default=11, help="timed repeats, after one that warms up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="processor threads")
    parser.add_argument("--output", type=Path, default=Path("runs/solvers"), help="folder for the result")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(options.threads)
    settings = {name: options[name] for name in ("tasks", "features", "queries", "repeats", "threads")}
    times = measure(**settings)

    title = f"One forward and backward pass over {options.tasks} tasks, median of {options.repeats}, float64"
    table = Table(title=title, title_justify="left")
    for column in ("size", "ridge, ms", "SVM native, ms", "SVM qpth, ms", "native / ridge", "qpth / native"):
        table.add_column(column, justify="right")
    for size, by in times.items():
        ratios = (f"{by['native'] / by['ridge']:.1f}", f"{by['qpth'] / by['native']:.1f}")
        table.add_row(size, *(f"{1e3 * by[key]:.1f}" for key in ("ridge", "native", "qpth")), *ratios)
    Console().print(table)
    options.output.mkdir(parents=True, exist_ok=True)
    origin = report.provenance()
    record = {"settings": settings, "seconds": times, **origin}
    (options.output / "solvers.json").write_text(json.dumps(record, indent=2) + "\n")
    machine = f"{origin['machine']['processor']}, {options.threads} threads, torch {origin['versions']['torch']}"
    note = (
        f"C = 0.1, {options.features} features, {options.queries} queries a class; {machine}; qpth with 15 iterations, "
        "on one thread where it solves task by task. Made by `python -m benchmarks.solvers`."
    )
    report.write_markdown(table, note, options.output / "solvers.md")


if __name__ == "__main__":
    main()
