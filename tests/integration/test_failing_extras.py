"""What the parts with optional packages refuse, and how their solvers fail: the task that can't be solved, alone."""

from __future__ import annotations

import runpy
import sys
from threading import Lock
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import convexheads as ch
from convexheads import InputError, MissingDependencyError
from convexheads.cli._features import load_feature_extractor
from convexheads.heads.cvxpy import _is_solved
from convexheads.integrations.lightning import EpisodicModule
from convexheads.integrations.sklearn import HeadClassifier
from convexheads.solvers.adapters import cvxpylayers
from convexheads.solvers.adapters.qpth import QpthSolver

pytestmark = pytest.mark.usefixtures("unchecked")


def weighted(task):
    return task.parameters["lambda"] * task.squared_norm


def test_a_problem_of_cvxpy_is_checked_and_described() -> None:
    with pytest.raises(InputError, match=r"^build"):
        ch.CvxpyHead(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=r"^hyperparameters"):
        ch.CvxpyHead(weighted, hyperparameters={"not a name": 1.0})
    head = ch.CvxpyHead(weighted, hyperparameters={"lambda": 2.0})
    assert repr(eval(repr(head), vars(ch) | {"weighted": weighted})) == repr(head)


def test_values_that_are_not_finite_solve_no_problem() -> None:
    layer = cvxpylayers.Layer(None, None, [], [], Lock())
    assert not _is_solved(layer, [], [torch.tensor([1.0, torch.nan])])


def test_the_task_that_clarabel_refuses_fails_alone() -> None:
    """A layer that raises, like diffcp, when a task of the batch is negative."""

    def solve(values: torch.Tensor, **_: object) -> list[torch.Tensor]:
        if (values < 0).any():
            raise ValueError("no solution")
        return [2 * values]

    layer = cvxpylayers.Layer(solve, None, [], [SimpleNamespace(shape=(3,))], Lock())
    found = cvxpylayers.call(layer, torch.tensor([[1.0] * 3, [-1.0] * 3, [3.0] * 3]), tolerance=1e-8, max_iterations=9)
    assert found[0][[0, 2]].tolist() == [[2.0] * 3, [6.0] * 3]
    assert found[0][1].isnan().all()


def test_the_task_that_qpth_refuses_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import qpth.qp

    def refuse(*_: object, **__: object) -> object:
        def solve(*_: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("singular")

        return solve

    monkeypatch.setattr(qpth.qp, "QPFunction", refuse)
    assert QpthSolver()._attempt(*(torch.zeros(1, 2, 2) for _ in range(6))) is None


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = (
        ("wordllama", "wordllama", lambda: load_feature_extractor("text")),
        ("PIL", "pillow", lambda: load_feature_extractor("conv4-cifar-fs-svm")),
    )
    for module, package, make in cases:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(MissingDependencyError, match=package):
                make()
    with pytest.raises(InputError, match=r"^features"):  # a name that is too long for the file system
        load_feature_extractor("x" * 5000)


def test_one_class_and_what_is_no_head_are_refused() -> None:
    with pytest.raises(ValueError, match="two classes"):
        HeadClassifier().fit(np.eye(4), np.zeros(4))
    with pytest.raises(InputError, match="head"):
        HeadClassifier(head=3).fit(np.eye(4), np.arange(4) % 2)


def test_a_problem_may_leave_the_labels_out() -> None:
    """Then nothing is learned: all coefficients are zero."""
    fitted = ch.CvxpyHead(lambda task: task.squared_norm).fit(torch.eye(4), torch.arange(4) % 2)
    assert fitted.expansion.coef.abs().max() < 1e-6


def test_without_a_trainer_the_batch_counts_as_the_step() -> None:
    module = EpisodicModule(nn.Identity(), ch.RidgeHead(), ways=2, shots=1, total_steps=9)
    samples, labels = torch.full((1, 4, 3), torch.nan), torch.tensor([[0, 0, 1, 1]])
    with pytest.raises(InputError, match="step 7, task 0"):
        module.training_step((samples, labels), 7)


def test_the_package_is_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delitem(sys.modules, "convexheads.__main__", raising=False)
    monkeypatch.setattr(sys, "argv", ["convexheads", "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("convexheads", run_name="__main__")
    assert caught.value.code == 0
    assert "usage" in capsys.readouterr().out
