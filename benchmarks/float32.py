"""Measure what `use_float32` costs in accuracy, and what it saves in time on this device.

python -m benchmarks.float32
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

import convexheads as ch
from benchmarks import experiment, report

SIZES = {
    "5-way 1-shot": (5, 1, 640),
    "5-way 5-shot": (5, 5, 640),
    "20-way 5-shot": (20, 5, 640),
    "5-way 30-shot, 64 features": (5, 30, 64),
}
"""Ways, shots and features."""
QUERIES = 15
_SOLVER: dict[str, Any] = {"solver": ch.solvers.NativeSolver(on_failure="return")}
HEADS: dict[str, Callable[[], ch.ClassificationHead]] = {
    "SVMHead(C=0.1)": lambda: ch.SVMHead(0.1, **_SOLVER),
    "SVMHead(C=100)": lambda: ch.SVMHead(100.0, **_SOLVER),
    "OneVsRestSVMHead()": lambda: ch.OneVsRestSVMHead(**_SOLVER),
    "LogisticHead()": lambda: ch.LogisticHead(on_failure="return"),
    "LogisticHead(1e-3)": lambda: ch.LogisticHead(1e-3, on_failure="return"),
    "RidgeHead()": lambda: ch.RidgeHead(on_failure="return"),
    "RidgeHead(1e-3)": lambda: ch.RidgeHead(1e-3, on_failure="return"),
    "PrototypeHead()": ch.PrototypeHead,
    "MahalanobisHead()": lambda: ch.MahalanobisHead(on_failure="return"),
}


def episodes(tasks: int, ways: int, shots: int, size: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Overlapping clusters whose examples have a length of about three, in float32: support and query with labels."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(tasks, ways, 1, size, generator=generator)
    noise = 2 * torch.randn(tasks, ways, shots + QUERIES, size, generator=generator)
    examples = (centers + noise) * 3 / (5 * size) ** 0.5
    labels = (torch.arange(ways).repeat_interleave(count).expand(tasks, -1) for count in (shots, QUERIES))
    support_labels, query_labels = labels
    return examples[:, :, :shots].flatten(1, 2), support_labels, examples[:, :, shots:].flatten(1, 2), query_labels


def step(head: ch.ClassificationHead, data: Sequence[Tensor], ways: int) -> Any:
    """The logits, the gradient of the support, the fraction of certified tasks or None, and the seconds of both."""
    support, labels, query, truth = data
    support = support.clone().requires_grad_()
    begin = report.now(support)
    fitted = head.fit(support, labels, ways=ways)
    logits = fitted(query)
    loss = functional.cross_entropy(logits.flatten(0, 1), truth.flatten(), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, support)
    seconds = report.now(support) - begin
    solution = fitted.solution
    return logits, gradient, None if solution is None else solution.converged.double().mean().item(), seconds


def difference(found: Tensor, exact: Tensor) -> float:
    """The largest relative difference over the tasks."""
    change, size = ((part.double()).flatten(1).norm(dim=1) for part in (found - exact, exact))
    return (change / size.clamp_min(1e-30)).max().item()


def measure(
    *, tasks: int, repeats: int, seed: int, device: str, sizes: Sequence[str] = tuple(SIZES)
) -> list[dict[str, Any]]:
    """For each head and size: differences between float32 and float64, certificates, and the ratio of the times."""
    found = []
    for size, name in tqdm([(size, name) for size in sizes or SIZES for name in HEADS], leave=False):
        ways, shots, features = SIZES[size]
        data = [part.to(device) for part in episodes(tasks, ways, shots, features, seed)]
        head, ratios = HEADS[name](), []
        exact = single = step(head, data, ways)
        for _ in range(repeats):
            exact = step(head, data, ways)
            with ch.use_float32():
                single = step(head, data, ways)
            ratios.append(exact[-1] / single[-1])
        row = {"size": size, "head": name, "certified": single[2], "times as fast": statistics.median(ratios)}
        found.append(row | {"logits": difference(single[0], exact[0]), "gradient": difference(single[1], exact[1])})
    return found


def show(found: list[dict[str, Any]]) -> Table:
    """A row per head: the largest differences and the certified tasks over all sizes, and the range of the times."""
    columns = ["head", "logits", "gradients", "certified, %", "times as fast"]
    result = report.new_table("Results of float32 relative to float64", columns, left=["head"])
    for name in dict.fromkeys(each["head"] for each in found):
        own = [each for each in found if each["head"] == name]
        worst = (f"{max(each[part] for each in own):.0e}" for part in ("logits", "gradient"))
        certified = [each["certified"] for each in own if each["certified"] is not None]
        times = [each["times as fast"] for each in own]
        share = f"{100 * min(certified):.0f}" if certified else ""
        result.add_row(name, *worst, share, f"{min(times):.1f} to {max(times):.1f}")
    return result


def main() -> None:
    """The command line."""
    parser = experiment.parser("float32", __doc__, "device", "seed", "threads", "output")
    parser.add_argument("--tasks", type=int, default=64, help="tasks of a batch")
    parser.add_argument("--repeats", type=int, default=5, help="repeats, of which the median counts")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = {name: options[name] for name in ("tasks", "repeats", "seed", "device")}
    found, origin = measure(**settings), report.provenance()
    note = (
        f"The largest relative differences of the logits and of the gradient of a task, over {options.tasks} tasks of "
        f"{', '.join(SIZES)}, and the smallest share of certified tasks. Features are clusters that overlap, of length "
        f"three, in float32. The times are those of a step forward and backward: float64 divided by float32, medians "
        f"over {options.repeats} repeats, the range over the sizes. {experiment.place(origin, options.device)}, torch "
        f"{origin['versions']['torch']}. Made by `python -m benchmarks.float32`."
    )
    record = {"settings": settings, "results": found, **origin}
    experiment.write(options.output, "float32", show(found), note, record=record)


if __name__ == "__main__":
    main()
