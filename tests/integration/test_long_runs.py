"""Long runs: memory, live objects and speed stay as they are, whatever shapes alternate."""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median

import cvxpy
import pytest
import torch
from tasks import task

import convexheads as ch

STATM = Path("/proc/self/statm")
pytestmark = pytest.mark.skipif(not STATM.exists(), reason="resident memory is read from /proc/self/statm")

NATIVE = [
    ch.SVMHead(ch.Learnable(0.3), kernel=ch.kernels.RBF()),
    ch.SVMHead(ch.Learnable(0.3), solver=ch.solvers.NativeSolver(backend="torch")),
    ch.RidgeHead(ch.Learnable(2.0)),
    ch.LogisticHead(ch.Learnable(0.5)),
]
SHAPES = [(1, 1, 1, 1, 1), (5, 5), (1, 4, 2), (3, 3, 3), (2, 5, 1, 3)]


def resident() -> int:
    """Bytes of this process in memory."""
    return int(STATM.read_text().split()[1]) * resource.getpagesize()


def alive() -> tuple[int, int]:
    """Objects and tensors that Python knows."""
    gc.collect()
    objects = gc.get_objects()
    return len(objects), sum(issubclass(type(value), torch.Tensor) for value in objects)


def train(head: ch.ClassificationHead, drawn: tuple) -> None:
    support, labels, query, ways = drawn
    logits = head(support.clone().requires_grad_(), labels, query, ways=ways)
    logits.square().mean().backward()
    for parameter in head.parameters():
        parameter.grad = None


def stays_flat(
    step: Callable[[int], None], rounds: int, warm_up: int, *, growth: float = 0.01, slower: float = 1.5
) -> None:
    """`step` is called so often, and after the warm-up nothing grows.

    Time is that of the processor, which other processes hardly change, and a median.
    """
    for number in range(warm_up):
        step(number)
    counted, before = alive(), resident()
    times = []
    for number in range(rounds):
        started = time.process_time()
        step(number)
        times.append(time.process_time() - started)
    more = [after - earlier for after, earlier in zip(alive(), counted, strict=True)]
    assert more[1] <= 0, f"{more[1]} more tensors"
    assert more[0] <= 200, f"{more[0]} more objects"  # `times` is one of them; Python and its libraries keep a few
    grown = resident() / before - 1
    assert grown < growth, f"resident memory grew by {grown:.2%} of {before / 2**20:.0f} MB"
    tenth = max(1, rounds // 10)
    ratio = median(times[-tenth:]) / median(times[:tenth])
    print(f"\nmemory {grown:+.3%} of {before / 2**20:.0f} MB, objects {more}, time x {ratio:.2f}, {sum(times):.0f} s")
    # A ratio of two single calls would be noise.
    assert tenth < 10 or ratio < slower, f"{ratio:.2f} times slower at the end"


# A round is a batch of 8 tasks of every shape for every head: 160 solves, both passes. The slow one is 100,000 of them.
@pytest.mark.parametrize(
    ("rounds", "warm_up"), [(4, 2), pytest.param(625, 40, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]
)
def test_native_heads(rounds, warm_up):
    drawn = [task(8, shots=shots, d=16 + len(shots)) for shots in SHAPES]

    def step(number: int) -> None:
        for head, one in product(NATIVE, drawn):
            train(head, one)

    stays_flat(step, rounds, warm_up)


def ridge(problem: ch.heads.CvxpyTask):
    return problem.squared_norm + cvxpy.sum_squares(problem.targets - problem.scores)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("solver", ["qpth", "cvxpylayers", "moreau", "cvxpy"])
def test_adapters(solver):
    """100 rounds of two shapes, with 2 tasks each."""
    head = ch.CvxpyHead(ridge) if solver == "cvxpy" else ch.SVMHead(ch.Learnable(0.3), solver=solver)
    drawn = [task(2, shots=shots, d=12) for shots in ((1, 1, 1), (2, 3))]

    def step(number: int) -> None:
        for one in drawn:
            train(head, one)

    stays_flat(step, rounds=100, warm_up=20)
