"""Solve millions of small tasks, through `evaluate` and from several threads, and watch memory and results.

python -m benchmarks.load
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from tqdm.auto import tqdm

import convexheads as ch
from benchmarks import experiment, report

HEADS: dict[str, Callable[[], ch.ClassificationHead]] = {
    "PrototypeHead": ch.PrototypeHead,
    "RidgeHead": lambda: ch.RidgeHead(1.0),
    "SVMHead": ch.SVMHead,
    "LogisticHead": ch.LogisticHead,
}
THREADS = 8
"""Threads that call a head at the same time."""
FEATURES = 16
TASKS_PER_CALL = 1000


def data(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping clusters of 20 classes, `(2000, FEATURES)`, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(2000) % 20
    centers = torch.randn(20, FEATURES, generator=generator)
    return centers[labels] + torch.randn(2000, FEATURES, generator=generator), labels


def memory() -> float:
    """The memory of this process in use, in MB; its peak where the system reports only that."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * resource.getpagesize() / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def through_evaluate(head: ch.ClassificationHead, tasks: int, seed: int) -> tuple[int, float]:
    """Evaluate on `tasks` episodes; how many were not certified, and the sum of all accuracies."""
    result = ch.evaluate(head, *data(0), ways=5, shots=1, queries=1, episodes=tasks, seed=seed, progress=False)
    return 0 if result.converged is None else int((~result.converged).sum()), result.accuracies.double().sum().item()


def from_threads(head: ch.ClassificationHead, tasks: int, seed: int) -> tuple[int, float]:
    """Fit the same head in several threads, on other tasks in each; what `through_evaluate` returns."""

    def work(number: int) -> tuple[int, float]:
        generator = torch.Generator().manual_seed(seed * THREADS + number)
        support = torch.randn(TASKS_PER_CALL, 5, FEATURES, generator=generator)
        labels = torch.arange(5).expand(TASKS_PER_CALL, -1)
        fitted = head.fit(support, labels, ways=5)
        assert fitted.solution is not None
        right = (fitted(support[:, :1]).argmax(-1) == labels[:, :1]).double().sum().item()
        return int((~fitted.solution.converged).sum()), right

    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(work, range(tasks // TASKS_PER_CALL)))
    return sum(failed for failed, _ in results), sum(right for _, right in results)


WAYS: dict[str, Callable[[ch.ClassificationHead, int, int], tuple[int, float]]] = {
    "evaluate": through_evaluate,
    f"{THREADS} threads": from_threads,
}


def measure(*, tasks: int, at_once: int) -> list[dict[str, Any]]:
    """For each head and way to call it: failures, the drift of memory, and whether the first part can be repeated."""
    found = []
    for how, name in tqdm([(how, name) for how in WAYS for name in HEADS], leave=False):
        head, run, share = HEADS[name](), WAYS[how], tasks // (len(WAYS) * len(HEADS))
        first = run(head, at_once, 0)
        run(head, at_once, 1)  # memory that is used for the first time is no drift
        before, begin = memory(), time.perf_counter()
        done, failed, largest = 0, 0, before
        for seed in tqdm(range(2, 2 + max(1, share // at_once)), f"{name}, {how}", leave=False):
            failed += run(head, at_once, seed)[0]
            done, largest = done + at_once, max(largest, memory())
        row = {"head": name, "through": how, "tasks": done, "failed": failed, "seconds": time.perf_counter() - begin}
        row |= {"drift": memory() - before, "largest": largest - before, "repeated": run(head, at_once, 0) == first}
        found.append(row)
    return found


def show(found: list[dict[str, Any]]) -> Table:
    """A row per head and way to call it."""
    columns = [
        "head",
        "through",
        "tasks",
        "not certified",
        "drift, MB",
        "largest, MB",
        "same again",
        "tasks per second",
    ]
    table = report.new_table("Millions of small tasks", columns, left=["head", "through"])
    for row in found:
        rate = f"{row['tasks'] / row['seconds']:,.0f}"
        sizes = f"{row['drift']:.0f}", f"{row['largest']:.0f}"
        again = "yes" if row["repeated"] else "no"
        table.add_row(row["head"], row["through"], f"{row['tasks']:,}", str(row["failed"]), *sizes, again, rate)
    return table


def main() -> None:
    """The command line."""
    parser = experiment.parser("load", __doc__, "threads", "output")
    parser.add_argument("--tasks", type=int, default=10_000_000, help="tasks, over all heads and ways to call them")
    parser.add_argument("--at-once", type=int, default=50_000, help="tasks after which memory is looked at")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = {name: options[name] for name in ("tasks", "at_once")}
    found, origin = measure(**settings), report.provenance()
    note = (
        f"{sum(row['tasks'] for row in found):,} tasks with 5 ways, 1 shot and {FEATURES} features. Drift: the memory "
        f"of the process at the end, minus that after the first {2 * options.at_once:,} tasks; largest: the same for "
        f"the largest memory, looked at every {options.at_once:,} tasks. Same again: at the end, the first "
        f"{options.at_once:,} tasks give the same results. {experiment.place(origin)}, torch "
        f"{origin['versions']['torch']}. Made by `python -m benchmarks.load`."
    )
    experiment.write(
        options.output, "load", show(found), note, record={"settings": settings, "results": found, **origin}
    )


if __name__ == "__main__":
    main()
