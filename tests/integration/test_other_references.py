"""Heads against references that need more than scikit-learn: CVXPY on the primal problems, and learn2learn."""

from __future__ import annotations

from functools import partial

import cvxpy
import numpy as np
import pytest
import torch
from tasks import close, task
from torch.nn import functional

from convexheads import (
    LogisticHead,
    OneVsRestSVMHead,
    PrototypeHead,
    RidgeRegressionHead,
    SimplifiedSVMHead,
    SupportVectorRegressionHead,
    SVMHead,
    WestonWatkinsSVMHead,
)
from convexheads.solvers import SOLVERS, CvxpylayersSolver, QpthSolver


@pytest.mark.parametrize("smoothing", [0.0, 1.0])
def test_svm_equals_its_cvxpy_primal(smoothing):
    """The primal of Eq. 4, with the loss smoothed by its Moreau envelope where asked for."""
    support, labels, _, ways = task(shots=(3, 2, 4), d=10)
    x, targets, C = support.numpy(), functional.one_hot(labels).double().numpy(), 0.7
    weights = cvxpy.Variable((ways, x.shape[1]))
    shift = cvxpy.Variable(x.shape[0]) if smoothing else None
    scores = x @ weights.T
    if smoothing:
        # max_a <g, a> - s/2 |a|^2 over {a <= C y, sum a = 0} = min_{v, z >= 0} C <z, y> + |g - v - z|^2 / (2 s)
        multiplier = cvxpy.Variable(targets.shape, nonneg=True)
        rest = targets - scores - cvxpy.reshape(shift, (len(x), 1), order="C") @ np.ones((1, ways)) - multiplier
        loss = C * cvxpy.sum(cvxpy.multiply(multiplier, targets)) + cvxpy.sum_squares(rest) / (2 * smoothing)
    else:
        own = cvxpy.sum(cvxpy.multiply(targets, scores), axis=1)
        loss = C * cvxpy.sum(cvxpy.max(1 - targets + scores, axis=1) - own)
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(weights) / 2 + loss))
    problem.solve(solver=cvxpy.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    fitted = SVMHead(C, smoothing=smoothing).fit(support, labels)
    ours = (fitted.expansion.coef.mT @ support).numpy()
    assert np.linalg.norm(ours - weights.value) < 1e-5 * np.linalg.norm(weights.value)


def _by_learn2learn(support, labels, query, ways, *, C, iterations, monkeypatch):
    from learn2learn.nn import SVClassifier

    monkeypatch.setattr(torch, "zeros", partial(torch.zeros, dtype=torch.float64))
    monkeypatch.setattr(torch, "ones", partial(torch.ones, dtype=torch.float64))
    monkeypatch.setattr(torch, "eye", partial(torch.eye, dtype=torch.float64))  # its constants are float32
    reference = SVClassifier(C_reg=C, max_iters=iterations)
    reference.fit_(support, labels, ways)
    scores = reference(query)
    monkeypatch.undo()
    return scores


@pytest.mark.parametrize("C", [0.1, 1.0])
def test_smoothed_svm_equals_learn2learn(C, monkeypatch):
    support, labels, query, ways = task(shots=(5,) * 5, d=64)
    expected = _by_learn2learn(support, labels, query, ways, C=C, iterations=100, monkeypatch=monkeypatch)
    for solver, tolerance in (("native", 1e-9), (QpthSolver(), 1e-9), (CvxpylayersSolver(), 1e-4)):
        assert close(SVMHead(C, smoothing=1.0, solver=solver)(support, labels, query), expected) < tolerance


@pytest.mark.parametrize("iterations", [1, 3, 15])
@pytest.mark.parametrize("size", [0.1, 1.0, 10.0])
def test_qpth_stopped_early_has_the_iterates_of_learn2learn(size, iterations, monkeypatch):
    """Iterates depend on how the problem is scaled: here, as in the paper's code, it isn't."""
    support, labels, query, ways = task(shots=(5,) * 5, d=64)
    data = size * support, labels, size * query
    expected = _by_learn2learn(*data, ways, C=0.1, iterations=iterations, monkeypatch=monkeypatch)
    head = SVMHead(0.1, smoothing=1.0, solver=QpthSolver(max_iterations=iterations))
    assert close(head(*data), expected) < 1e-9


def test_prototypes_equal_learn2learn():
    from learn2learn.nn import PrototypicalClassifier

    support, labels, query, _ = task(shots=(3, 1, 4, 2), d=20)
    expected = PrototypicalClassifier(support, labels)(query)
    torch.testing.assert_close(PrototypeHead()(support, labels, query), expected)


def crammer_singer(scores, targets):
    own = cvxpy.sum(cvxpy.multiply(targets, scores), axis=1)
    return cvxpy.pos(cvxpy.max(1 - targets + scores, axis=1) - own)  # which it is; CVXPY has to be told


def weston_watkins(scores, targets):
    own = cvxpy.sum(cvxpy.multiply(targets, scores), axis=1, keepdims=True) @ np.ones((1, targets.shape[1]))
    return cvxpy.multiply(1 - targets, cvxpy.pos(2 - own + scores))


def one_vs_rest(scores, targets):
    return cvxpy.pos(1 - cvxpy.multiply(2 * targets - 1, scores))


def simplified(scores, targets):
    code = targets - (1 - targets) / (targets.shape[1] - 1)
    return cvxpy.pos(1 - cvxpy.sum(cvxpy.multiply(code, scores), axis=1))


SLACKS = {
    SVMHead: crammer_singer,
    WestonWatkinsSVMHead: weston_watkins,
    OneVsRestSVMHead: one_vs_rest,
    SimplifiedSVMHead: simplified,
}


@pytest.mark.parametrize("C", [0.03, 1.0])
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("head", SLACKS, ids=lambda head: head.__name__)
def test_svms_equal_their_cvxpy_primals(head, solver, squared, C):
    """The primal of each docstring, written in CVXPY: our weights reach its optimum, and are not below it."""
    support, labels, _, ways = task(shots=(3, 2, 4), d=10)
    x, targets = support.numpy(), functional.one_hot(labels).double().numpy()
    weights = cvxpy.Variable((ways, x.shape[1]))
    slacks = SLACKS[head](x @ weights.T, targets)
    loss = cvxpy.sum_squares(slacks) if squared else cvxpy.sum(slacks)
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(weights) / 2 + C * loss))
    precision = 1e-8 if squared else 1e-13  # Clarabel goes no further
    problem.solve(solver=cvxpy.CLARABEL, **dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), precision))
    optimum, found = problem.value, weights.value
    fitted = head(C, squared_hinge=squared, solver=solver).fit(support, labels)
    weights.value = (fitted.expansion.coef.mT @ support).numpy()
    precise = 1e-7 if solver == "native" else 1e-5
    assert problem.objective.value == pytest.approx(optimum, rel=precise)
    assert np.linalg.norm(weights.value - found) < precise**0.5 * np.linalg.norm(found)
    assert fitted.solution.converged.all()


@pytest.mark.parametrize("C", [0.1, 5.0])
@pytest.mark.parametrize("solver", [name for name in SOLVERS if name not in ("active-set", "admm")])
def test_support_vector_regression_equals_its_cvxpy_primal(solver, C):
    """A degenerate problem, which the active set and ADMM leave to the interior point."""
    x, y = torch.randn(12, 5, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    weights = cvxpy.Variable(5)
    errors = cvxpy.pos(cvxpy.abs(y.numpy() - x.numpy() @ weights) - 0.1)
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(weights) / 2 + C * cvxpy.sum(errors)))
    problem.solve(solver=cvxpy.CLARABEL, tol_gap_abs=1e-13, tol_gap_rel=1e-13, tol_feas=1e-13)
    optimum = problem.value
    fitted = SupportVectorRegressionHead(C, solver=solver).fit(x, y)
    weights.value = (fitted.expansion.coef.mT @ x).squeeze(0).numpy()
    assert problem.objective.value == pytest.approx(optimum, rel=1e-7 if solver == "native" else 1e-5)


def test_gradient_of_least_squares_is_that_of_a_layer_of_cvxpylayers():
    """The problem with which cvxpylayers tests itself."""
    layers = pytest.importorskip("cvxpylayers.torch")
    matrix, vector, x = cvxpy.Parameter((100, 20)), cvxpy.Parameter(100), cvxpy.Variable(20)
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(matrix @ x - vector) + cvxpy.sum_squares(x)))
    layer = layers.CvxpyLayer(problem, [matrix, vector], [x])
    generator = torch.Generator().manual_seed(243)
    data = tuple(torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((100, 20), (100,)))
    support, targets = (each.requires_grad_() for each in data)
    expected = torch.autograd.grad(layer(support, targets, solver_args={"eps": 1e-10})[0].sum(), (support, targets))
    found = torch.autograd.grad(RidgeRegressionHead(1.0).fit(support, targets).weight.sum(), (support, targets))
    assert max(close(one, other) for one, other in zip(found, expected, strict=True)) < 1e-6


def test_gradient_of_logistic_regression_is_that_of_a_layer_of_cvxpylayers():
    """The problem with which cvxpylayers tests itself: two classes, one weight vector, the penalty 0.1 |a|^2."""
    layers = pytest.importorskip("cvxpylayers.torch")
    generator = torch.Generator().manual_seed(243)
    support = torch.randn(10, 2, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, 2, (10,), generator=generator)
    a, features = cvxpy.Variable((2, 1)), cvxpy.Parameter((10, 2))
    scores = features @ a
    likelihood = cvxpy.sum(cvxpy.multiply(labels.unsqueeze(-1).numpy(), scores) - cvxpy.logistic(scores))
    problem = cvxpy.Problem(cvxpy.Minimize(-likelihood + 0.1 * cvxpy.sum_squares(a)))
    weights = layers.CvxpyLayer(problem, [features], [a])(support, solver_args={"eps": 1e-12})[0].squeeze(-1)
    first, second = LogisticHead(0.4).fit(support, labels, ways=2).weight  # |W|^2 / 2 is |a|^2 / 4
    assert close(second - first, weights) < 1e-6
    for direction in torch.eye(2, dtype=torch.float64):
        (expected,) = torch.autograd.grad((weights * direction).sum(), support, retain_graph=True)
        (found,) = torch.autograd.grad(((second - first) * direction).sum(), support, retain_graph=True)
        assert close(found, expected) < 1e-5
