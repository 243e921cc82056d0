"""Arguments that are refused at once, each by an error that begins with its name, and texts that describe objects."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import convexheads as ch
from convexheads import EpisodeLoader, InputError, MissingDependencyError
from convexheads.models import DropBlock
from convexheads.solvers import DualProblem, NativeSolver

pytestmark = pytest.mark.usefixtures("unchecked")

SAMPLES, LABELS = torch.zeros(8, 3), torch.arange(8) % 2
FEATURES = torch.eye(8)


def loader(samples: Any = SAMPLES, labels: Any = LABELS, **settings: Any) -> EpisodeLoader:
    settings = {"ways": 2, "shots": 1, "queries": 1} | settings
    return EpisodeLoader(samples, labels, **settings)


def problem(**changes: Any) -> DualProblem:
    parts: dict[str, Any] = {"gram": torch.eye(3), "linear": torch.ones(3, 2), "upper": torch.ones(3, 2)}
    return DualProblem(**(parts | changes))


REFUSED: dict[str, Callable[[], object]] = {
    "rank": lambda: loader(batch_size=4, world_size=2, rank=2),
    "transform": lambda: loader(transform="flip"),
    "samples": lambda: loader(samples=[1, 2]),
    "labels": lambda: loader(labels=LABELS.float()),
    "num_workers": lambda: loader(num_workers=-1),
    "samples, labels": lambda: loader(labels=LABELS[:5]),
    r"labels: expected .*, got shape": lambda: ch.split_task(
        torch.zeros(0, 4, 3), torch.zeros(0, 4, dtype=torch.long), shots=1
    ),
    "backbone": lambda: ch.embed(nn.Flatten(0), torch.zeros(4, 3), progress=False),
    "features": lambda: ch.evaluate(ch.RidgeHead(), FEATURES.long(), LABELS, ways=2, shots=1, queries=1),
    "features, labels": lambda: ch.evaluate(ch.RidgeHead(), FEATURES, LABELS[:5], ways=2, shots=1, queries=1),
    "ways": lambda: ch.RidgeHead().fit(FEATURES, LABELS * 2**21),
    "Learnable": lambda: ch.Learnable(1e-40),
    "DualProblem\\(upper": lambda: NativeSolver().solve(problem(upper=torch.ones(3, 2, device="meta"))),
    "name": lambda: ch.load_pretrained("x" * 5000),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_error_begins_with_the_name_of_the_argument(name: str) -> None:
    with pytest.raises(InputError, match=f"^{name}"):
        REFUSED[name]()


@pytest.mark.parametrize("copied", [lambda error: pickle.loads(pickle.dumps(error)), copy.deepcopy, copy.copy])
def test_errors_can_be_sent_to_another_process(copied: Callable[[Exception], Exception]) -> None:
    solution = NativeSolver().solve(problem())
    errors = (
        ch.ConvexHeadsError("a message"),
        InputError("C", "a positive number", torch.tensor(-1.0)),
        ch.SolverError("task 0", solution),
        MissingDependencyError("rich", "bench", "benchmarks"),
    )
    assert {type(error) for error in errors[1:]} == set(ch.ConvexHeadsError.__subclasses__())
    for error in errors:
        again = copied(error)
        assert (type(again), str(again)) == (type(error), str(error))
        assert vars(again).keys() == vars(error).keys()
    assert copied(errors[1]).argument == "C"
    assert torch.equal(copied(errors[2]).solution.coef, solution.coef)


def test_messages_name_the_extra_to_install() -> None:
    assert "bench" in str(MissingDependencyError("rich", "bench", "benchmarks"))


def test_objects_describe_themselves() -> None:
    assert repr(DropBlock(2, warmup_steps=9)) == "DropBlock(2, drop_prob=0.1, warmup_steps=9)"
    head = ch.SupportVectorRegressionHead(solver=NativeSolver(tolerance=1e-4))
    assert "tolerance=0.0001" in repr(head)


def test_a_kernel_can_be_called_by_itself() -> None:
    x, y = torch.randn(4, 3), torch.randn(5, 3)
    torch.testing.assert_close(ch.kernels.Polynomial(2)(x, y), (x @ y.mT + 1) ** 2)
