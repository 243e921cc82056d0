"""Measure what a solver saves if it begins at an earlier solution: along a grid of C, and in successive training steps.

python -m benchmarks.warm_start
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm

import convexheads as ch
from benchmarks import experiment, report
from convexheads.solvers import ActiveSetSolver, ADMMSolver, InteriorPointSolver, Solution

SIZES = {"5-way 5-shot": (5, 5, 64), "5-way 20-shot": (5, 20, 64), "20-way 5-shot": (20, 5, 384)}
"""Ways, shots and features."""
SOLVERS: dict[str, Callable[[], Any]] = {
    "active set, compiled": lambda: ActiveSetSolver(backend="numba", on_failure="return"),
    "active set, PyTorch": lambda: ActiveSetSolver(backend="torch", on_failure="return"),
    "interior point": lambda: InteriorPointSolver(on_failure="return"),
    "ADMM": lambda: ADMMSolver(on_failure="return"),
    "logistic regression": lambda: None,
}
STEP = 1e-3
"""The change of the features between two training steps, relative to their size."""


def features(tasks: int, ways: int, shots: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Overlapping clusters of unit length, `(tasks, ways * shots, size)`, and labels."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(tasks, ways, 1, size, generator=generator, dtype=torch.float64)
    noise = torch.randn(tasks, ways, shots, size, generator=generator, dtype=torch.float64)
    support = (centers + 1.5 * noise).flatten(1, 2)
    labels = torch.arange(ways).repeat_interleave(shots).expand(tasks, -1)
    return support / support.norm(dim=-1, keepdim=True), labels


def make_head(solver: str, C: float) -> ch.ClassificationHead:
    """An SVM on a solver or, for a kernel that is not linear, logistic regression with the penalty 1 / C."""
    if solver == "logistic regression":
        return ch.LogisticHead(1 / C, kernel=ch.kernels.RBF(), on_failure="return")
    return ch.SVMHead(C, solver=SOLVERS[solver]())


def run(problems: list[tuple[ch.ClassificationHead, Tensor, Tensor]], *, warm: bool) -> dict[str, float]:
    """Fit one problem after the other; the seconds, the mean iterations, and the fraction of certified tasks."""
    solution: Solution | None = None
    iterations, certified = [], []
    begin = time.perf_counter()
    for head, support, labels in problems:
        solution = head.fit(support, labels, init=solution if warm else None).solution
        assert solution is not None
        iterations.append(solution.iterations)
        certified.append(solution.converged)
    seconds = time.perf_counter() - begin
    mean = torch.stack([each for each in iterations if each is not None]).double().mean().item()
    return {"seconds": seconds, "iterations": mean, "certified": torch.stack(certified).double().mean().item()}


def measure(*, tasks: int, points: int, repeats: int, seed: int, sizes: list[str]) -> list[dict[str, Any]]:
    """For each solver and size: the time without a start divided by the time with one, and the iterations."""
    found = []
    grid = (10.0 ** torch.linspace(3, -3, points, dtype=torch.float64)).tolist()
    for size, solver in tqdm([(size, solver) for size in sizes for solver in SOLVERS], leave=False):
        support, labels = features(tasks, *SIZES[size], seed)
        generator = torch.Generator().manual_seed(seed)
        moved = [support]
        for _ in range(9):
            noise = torch.randn(support.shape, generator=generator, dtype=torch.float64) / support.shape[-1] ** 0.5
            moved.append(moved[-1] + STEP * noise)
        work = {
            "grid of C": [(make_head(solver, C), support, labels) for C in grid],
            "training steps": [(make_head(solver, 1.0), each, labels) for each in moved],
        }
        for name, problems in work.items():
            run(problems[:2], warm=True)
            pairs = [(run(problems, warm=False), run(problems, warm=True)) for _ in range(repeats)]
            cold, warm = pairs[-1]
            found.append(
                {
                    "size": size,
                    "solver": solver,
                    "work": name,
                    "ratio": statistics.median(one["seconds"] / other["seconds"] for one, other in pairs),
                    "cold": cold | {"seconds": statistics.median(one["seconds"] for one, _ in pairs)},
                    "warm": warm | {"seconds": statistics.median(other["seconds"] for _, other in pairs)},
                }
            )
    return found


def show(found: list[dict[str, Any]]) -> Table:
    """A row per size and solver: how many times as fast it is, and the iterations without and with a start."""
    works = list(dict.fromkeys(each["work"] for each in found))
    columns = [column for name in works for column in (f"{name}: times as fast", "iterations")]
    result = report.new_table("Fits that begin at the solution of the fit before", ["size", "solver", *columns])
    for size, solver in dict.fromkeys((each["size"], each["solver"]) for each in found):
        own = {each["work"]: each for each in found if (each["size"], each["solver"]) == (size, solver)}
        cells = []
        for name in works:
            each = own[name]
            cells += [f"{each['ratio']:.1f}", f"{each['cold']['iterations']:.1f} to {each['warm']['iterations']:.1f}"]
        result.add_row(size, solver, *cells)
    return result


def main() -> None:
    """The command line."""
    parser = experiment.parser("warm_start", __doc__, "seed", "threads", "output")
    parser.add_argument("--tasks", type=int, default=8, help="tasks of a batch")
    parser.add_argument("--points", type=int, default=25, help="values of C, from 1,000 to 0.001")
    parser.add_argument("--repeats", type=int, default=3, help="repeats, of which the median is reported")
    parser.add_argument("--sizes", type=list[str], default=list(SIZES), help="which of the sizes to measure")
    options = parser.parse_args()
    experiment.refuse_unknown("sizes", options.sizes, SIZES)
    torch.set_num_threads(options.threads)
    names = ("tasks", "points", "repeats", "seed", "sizes")
    settings = {name: options[name] for name in names}
    found, origin = measure(**settings), report.provenance()
    note = (
        f"Batches of {options.tasks} tasks of features of unit length. Grid of C: {options.points} values from 1,000 "
        f"to 0.001, one after the other. Training steps: ten steps, between which the features change by {STEP:.1%} of "
        f"their length, with C = 1. Logistic regression has the kernel `RBF()` and the penalty 1/C. Medians over "
        f"{options.repeats} repeats, in which fits without and with `init=` alternate; the time is that of the whole "
        f"call of `fit`. {experiment.place(origin, 'cpu')}, torch {origin['versions']['torch']}. Made by "
        "`python -m benchmarks.warm_start`."
    )
    record = {"settings": settings, "results": found, **origin}
    experiment.write(options.output, "warm_start", show(found), note, record=record)


if __name__ == "__main__":
    main()
