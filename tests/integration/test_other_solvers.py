"""The solvers of other packages keep the contract of all solvers, and agree with the native one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from solver_contract import *  # noqa: F403
from tasks import COMFORTABLE, PRECISION, close, examples, tasks

from convexheads import SVMHead
from convexheads.solvers import SOLVERS, CvxpylayersSolver, NativeSolver, QpthSolver, Solver

OTHERS = [name for name, solver in SOLVERS.items() if solver.package is not None]


@pytest.fixture(scope="module", params=OTHERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def logits_and_gradients(solver: Solver, drawn, C: float, smoothing: float):
    support, labels, query, ways = drawn
    support = support.clone().requires_grad_()
    head = SVMHead(C, smoothing=smoothing, solver=solver)
    fitted = head.fit(support, labels, ways=ways)
    logits = fitted(query)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=logits.dtype)
    (gradient,) = torch.autograd.grad((logits * direction).sum(), support)
    return fitted, logits.detach(), gradient, direction


@examples(25, nightly=600)
@given(tasks(), st.sampled_from([0.0, 1.0]))
def test_agrees_with_the_native_solver(name, drawn, smoothing):
    (support, labels, query, ways), C = drawn
    assume(len(labels) * ways <= 100)  # these solvers form matrices of nk x nk
    native, expected, gradient, direction = logits_and_gradients(NativeSolver(), drawn[0], C, smoothing)
    assert native.solution.converged.all()
    other, logits, other_gradient, _ = logits_and_gradients(SOLVERS[name](on_failure="return"), drawn[0], C, smoothing)
    coef = native.expansion.coef.detach()
    # Sizes below which differences are rounding: of a sum of terms that cancel.
    size = ((query @ support.mT).abs() @ coef.abs()).max().clamp_min(1e-3 * C)
    slope = (coef.abs() @ direction.abs().mT @ query.abs()).max().clamp_min(1e-3 * C)
    curvature = C * support.square().sum(-1).mean()
    unique = len(labels) <= support.shape[-1] or smoothing > 0
    if unique and COMFORTABLE[0] <= curvature <= COMFORTABLE[1]:
        precision = PRECISION[name]
        assert other.solution.converged.all()
        assert close(other.expansion.coef.detach(), coef, C * 1e-3) < precision.coef
        assert close(logits, expected, size) < precision.logits
        assert close(other_gradient, gradient, slope) < precision.gradient
    elif other.solution.converged.all() and smoothing == 0:
        # Elsewhere: no further from our weights than the two certificates allow.
        gram = support @ support.mT
        difference = other.expansion.coef.detach() - coef
        distance = (difference * (gram @ difference)).sum().clamp_min(0)
        objective = (coef * (gram @ coef)).sum() / 2 + C * len(labels)
        allowed = objective * (other.solution.gap + native.solution.gap + 4 * other.solution.residual + 1e-9)
        assert distance <= 2 * allowed * 2


def test_names_and_objects_are_interchangeable():
    for name, kind in SOLVERS.items():
        assert type(SVMHead(solver=name).solver) is kind
    solver = QpthSolver(max_iterations=3)
    assert SVMHead(solver=solver).solver is solver
    assert repr(solver) == "QpthSolver(max_iterations=3)"
    assert repr(CvxpylayersSolver(tolerance=1e-2, on_failure="warn")) == (
        "CvxpylayersSolver(tolerance=0.01, on_failure='warn')"
    )
    assert NativeSolver().tolerance == 1e-6


def test_backend_that_solves_no_task_gives_gradients_of_nan(monkeypatch):
    monkeypatch.setattr(QpthSolver, "_attempt", lambda *_: None)
    support = torch.randn(2, 6, 4, requires_grad=True)
    labels = torch.arange(3).repeat(2).expand(2, -1)
    logits = SVMHead(solver=QpthSolver(on_failure="return"))(support, labels, torch.randn(2, 5, 4))
    assert logits.isnan().all()
    logits.sum().backward()
    assert support.grad.isnan().all()
