"""Solve an SVM with very many classes, and measure its time, its relative gap and its memory.

python -m benchmarks.many_classes
"""

from __future__ import annotations

import time
from typing import Any

import torch
from rich.console import Console

import convexheads as ch
from benchmarks import experiment, report
from benchmarks.solvers import C, episode, peak_memory


def measure(*, ways: int, shots: int, tasks: int, features: int, repeats: int, interior_point: bool) -> dict[str, Any]:
    """Seconds of the forward pass and of both passes, largest certified gap, memory, and interior-point seconds."""
    support, labels, query = episode(tasks, ways, shots, features, 1)
    found: dict[str, Any] = {}

    def run(solver: ch.solvers.Solver) -> tuple[float, float]:
        attached = support.requires_grad_()
        begin = time.perf_counter()
        fitted = ch.SVMHead(C, solver=solver).fit(attached, labels, ways=ways)
        logits = fitted(query)
        forward = time.perf_counter() - begin
        torch.autograd.grad(logits.square().sum(), attached)
        assert fitted.solution is not None
        found["gap"] = fitted.solution.gap.max().item()
        found["iterations"] = fitted.solution.iterations.max().item()  # pyright: ignore[reportOptionalMemberAccess]
        return forward, time.perf_counter() - begin

    def best(solver: ch.solvers.Solver) -> tuple[float, float]:
        return min((run(solver) for _ in range(repeats)), key=lambda seconds: seconds[1])

    solver = ch.solvers.NativeSolver(on_failure="return")
    if repeats > 1:
        run(solver)  # warms up
    found["memory"] = peak_memory(lambda: found.update(zip(("forward", "both"), best(solver), strict=True)), "cpu")
    native = dict(found)
    if interior_point:
        native["interior point"] = best(ch.solvers.InteriorPointSolver(max_iterations=100))[1]
    return native


def main() -> None:
    """The command line."""
    parser = experiment.parser("many_classes", __doc__, "output")
    parser.add_argument("--ways", type=int, default=1000, help="classes")
    parser.add_argument("--shots", type=int, default=5, help="support examples per class")
    parser.add_argument("--tasks", type=int, default=1, help="tasks solved at once")
    parser.add_argument("--features", type=int, default=640, help="feature dimension")
    parser.add_argument("--repeats", type=int, default=1, help="repeats, of which the fastest is reported")
    parser.add_argument("--interior-point", type=bool, default=False, help="also time our own interior-point solver")
    options = parser.parse_args()
    names = ("ways", "shots", "tasks", "features", "repeats", "interior_point")
    settings = {name: options[name] for name in names}
    with Console().status(f"{options.ways}-way {options.shots}-shot, which takes minutes for a thousand ways"):
        found = measure(**settings)
    memory = "" if found["memory"] is None else f", {found['memory'] / 2**30:.1f} GB"
    slower = (
        f"; our interior-point solver takes {found['interior point'] / found['both']:.0f} times as long"
        if "interior point" in found
        else ""
    )
    print(
        f"{options.ways}-way {options.shots}-shot, {options.tasks} task(s): forward {found['forward']:.2f} s, "
        f"both passes {found['both']:.2f} s, relative gap {found['gap']:.0e}{memory}{slower}"
    )
    record = {"settings": settings, "results": found, **report.provenance()}
    report.write_json(record, options.output / f"{options.ways}w{options.shots}s.json")


if __name__ == "__main__":
    main()
