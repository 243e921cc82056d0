"""The speed of ridge regression and of the SVM, forward and backward, relative to a fixed workload.

`python -m benchmarks.core_speed` runs this and says what changed. To see the times themselves, in processor time on one
thread: `python -m pytest benchmarks/core`. Tasks are those of `benchmarks/solvers.py`: 8 per batch, float64, 640
features, 15 queries per class; C is 0.1.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import convexheads

TASKS, FEATURES, QUERIES = 8, 640, 15
SIZES = {"5w1s": (5, 1), "5w5s": (5, 5), "20w5s": (20, 5)}
_WARM_UPS = 3


class Measured(NamedTuple):
    """Something to time.

    Attributes:
        prepare: makes the arguments, which is not timed.
        run: what is timed.
    """

    prepare: Callable[[], tuple[Tensor, ...]]
    run: Callable[..., object]


def tasks(ways: int, shots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Support, labels and query of random tasks whose classes differ by their centers."""
    generator = torch.Generator().manual_seed(0)

    def random(examples: int) -> Tensor:
        return torch.randn(TASKS, examples, FEATURES, generator=generator, dtype=torch.float64) / FEATURES**0.5

    labels = torch.arange(ways).repeat_interleave(shots).expand(TASKS, -1)
    support = random(ways).repeat_interleave(shots, 1) + random(ways * shots)
    return support, labels, random(ways * QUERIES)


def head(package: ModuleType, name: str, size: str, direction: str) -> Measured:
    """A pass through a head of a version of the package."""
    support, labels, query = tasks(*SIZES[size])
    support.requires_grad_()
    fit = package.RidgeHead() if name == "ridge" else package.SVMHead(0.1)

    def forward() -> Tensor:
        return fit(support, labels, query, ways=SIZES[size][0])

    def backward(loss: Tensor) -> object:
        return torch.autograd.grad(loss, support)

    if direction == "forward":
        return Measured(tuple, forward)
    return Measured(lambda: (forward().square().sum(),), backward)


def workload(size: str) -> Measured:
    """The fixed workload: matrix products, Cholesky factors and elementwise functions of the size of the tasks.

    It uses PyTorch alone, so that no change of the package changes its time. A stored reference is good for this
    workload only.
    """
    support, labels, query = tasks(*SIZES[size])
    ways, shots = SIZES[size]
    targets = torch.nn.functional.one_hot(labels, ways).to(support)
    eye = torch.eye(ways * shots, dtype=support.dtype)

    def run() -> Tensor:
        factor = torch.linalg.cholesky(support @ support.mT + eye)
        scores = query @ support.mT @ torch.cholesky_solve(targets, factor)
        return (scores.softmax(-1) - scores.tanh()).square().sum()

    return Measured(tuple, run)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["ridge", "svm"])
def test_speed(
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
    base: ModuleType | None,
    name: str,
    size: str,
    direction: str,
) -> None:
    """Each round times a pass and right before it the workload, or the same pass in the other version of the package.

    The result is the median ratio of the two times. With another version, it comes first in every second round only, as
    the second of two passes may find the processor's caches filled. All rounds together take about as many seconds as
    `--benchmark-max-time` says, but there are `--benchmark-min-rounds` at least.
    """
    assert Path(convexheads.__file__).is_relative_to(Path.cwd()), "run this in the folder that holds the package"
    torch.set_num_threads(1)
    own = head(convexheads, name, size, direction)
    other = workload(size) if base is None else head(base, name, size, direction)
    orders = [(other, own), (other, own) if base is None else (own, other)]
    first: list[float] = []

    def setup() -> tuple[tuple, dict]:
        now, later = orders[len(first) % 2]
        arguments, arguments_later = now.prepare(), later.prepare()
        begin = time.process_time()
        now.run(*arguments)
        first.append(time.process_time() - begin)
        return (later.run, *arguments_later), {}

    def target(run: Callable[..., object], *arguments: Tensor) -> object:
        return run(*arguments)

    begin = 0.0
    for _ in range(_WARM_UPS):
        begin = time.process_time()
        target(*setup()[0])
    first.clear()
    limit, least = (str(request.config.getoption(f"benchmark_{option}")) for option in ("max_time", "min_rounds"))
    rounds = max(int(least), int(float(limit) / (time.process_time() - begin)))
    benchmark.pedantic(target, setup=setup, rounds=rounds + rounds % 2)

    assert benchmark.stats is not None, "pytest-benchmark is switched off"
    second = benchmark.stats.stats.data
    ratios = [math.log(two / one) for one, two in zip(first, second, strict=True)]
    halves = statistics.median(ratios[::2]), statistics.median(ratios[1::2])
    swapped = -1 if orders[1][0] is own else 1
    benchmark.extra_info |= {
        "ratio": math.exp((halves[0] + swapped * halves[1]) / 2),
        "own": statistics.median(second[::2]),
        "other": statistics.median(first[::2]),
    }
