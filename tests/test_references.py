"""Heads against solvers that nobody here wrote: scikit-learn, learn2learn, CVXPY."""

from __future__ import annotations

import warnings
from functools import partial

import cvxpy
import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Ridge
from sklearn.svm import LinearSVC
from tasks import close, task
from torch.nn import functional

from convexheads import CvxpylayersSolver, PrototypeHead, QpthSolver, RidgeHead, SVMHead


def primal_objective(weights: np.ndarray, x: np.ndarray, y: np.ndarray, C: float) -> float:
    """Eq. 4 of the paper: weights (k, d)."""
    scores = x @ weights.T
    margins = 1 - np.eye(len(weights))[y] + scores - scores[np.arange(len(y)), y][:, None]
    return (weights**2).sum() / 2 + C * margins.max(1).sum()


@pytest.mark.parametrize("scale", [1e-2, 1.0, 30.0])
@pytest.mark.parametrize("C", [1e-2, 0.1, 1.0, 100.0])
@pytest.mark.parametrize(("shots", "d"), [((1,) * 5, 64), ((5,) * 5, 64), ((3, 1, 4), 20), ((8, 7, 9), 4)], ids=str)
def test_svm_equals_scikit_learn(shots, d, C, scale):
    support, labels, _, _ = task(shots=shots, d=d, scale=scale)
    x, y = support.numpy(), labels.numpy()
    reference = LinearSVC(
        multi_class="crammer_singer", fit_intercept=False, C=C, tol=1e-12, max_iter=10_000_000, random_state=0
    ).fit(x, y)
    fitted = SVMHead(C).fit(support, labels)
    weights = (fitted.dual.coef.mT @ support).numpy()
    ours, theirs = (primal_objective(w, x, y, C) for w in (weights, reference.coef_))
    assert ours <= theirs * (1 + 1e-8)
    # scikit-learn stops on a tolerance of its own: where it has stopped short, our lower objective says so, and by
    # strong convexity the distance of the weights is at most this.
    slack = np.sqrt(2 * max(theirs - ours, 0)) / np.linalg.norm(weights)
    error = np.linalg.norm(weights - reference.coef_) / np.linalg.norm(reference.coef_)
    assert error <= max(1e-6, 1.01 * slack)


def test_scikit_learn_converges_on_most_of_the_grid():
    """So that the comparison above cannot hide behind its exception."""
    errors = []
    for C in (1e-2, 0.1, 1.0):
        for shots, d in (((1,) * 5, 64), ((5,) * 5, 64), ((3, 1, 4), 20)):
            support, labels, _, _ = task(shots=shots, d=d)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                svc = LinearSVC(multi_class="crammer_singer", fit_intercept=False, C=C, tol=1e-12, max_iter=10_000_000)
                reference = torch.from_numpy(svc.fit(support.numpy(), labels.numpy()).coef_)
            weights = SVMHead(C).fit(support, labels).dual.coef.mT @ support
            errors.append(((weights - reference).norm() / reference.norm()).item())
    assert max(errors) < 1e-6, errors


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
    ours = (fitted.dual.coef.mT @ support).numpy()
    assert np.linalg.norm(ours - weights.value) < 1e-5 * np.linalg.norm(weights.value)


@pytest.mark.parametrize("C", [0.1, 1.0])
def test_smoothed_svm_equals_learn2learn(C, monkeypatch):
    from learn2learn.nn import SVClassifier

    support, labels, query, ways = task(shots=(5,) * 5, d=64)
    monkeypatch.setattr(torch, "zeros", partial(torch.zeros, dtype=torch.float64))
    monkeypatch.setattr(torch, "ones", partial(torch.ones, dtype=torch.float64))
    monkeypatch.setattr(torch, "eye", partial(torch.eye, dtype=torch.float64))  # its constants are float32
    reference = SVClassifier(C_reg=C, max_iters=100)
    reference.fit_(support, labels, ways)
    expected = reference(query)
    monkeypatch.undo()
    for solver, tolerance in (("native", 1e-9), (QpthSolver(), 1e-9), (CvxpylayersSolver(), 1e-4)):
        assert close(SVMHead(C, smoothing=1.0, solver=solver)(support, labels, query), expected) < tolerance


@pytest.mark.parametrize("regularization", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize(("shots", "d"), [((5,) * 5, 64), ((8, 7, 9), 4)], ids=str)
def test_ridge_equals_scikit_learn(shots, d, regularization):
    support, labels, query, _ = task(shots=shots, d=d)
    targets = functional.one_hot(labels).double().numpy()
    reference = Ridge(alpha=regularization, fit_intercept=False, solver="cholesky").fit(support.numpy(), targets)
    expected = torch.from_numpy(reference.predict(query.numpy()))
    assert close(RidgeHead(regularization)(support, labels, query), expected) < 1e-9


def test_prototypes_equal_learn2learn():
    from learn2learn.nn import PrototypicalClassifier

    support, labels, query, _ = task(shots=(3, 1, 4, 2), d=20)
    expected = PrototypicalClassifier(support, labels)(query)
    torch.testing.assert_close(PrototypeHead()(support, labels, query), expected)
