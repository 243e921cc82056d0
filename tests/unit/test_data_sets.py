"""Heads on whole data sets, over a grid of regularizations, compared with the objectives of scikit-learn and CVXPY."""

from __future__ import annotations

import warnings

import cvxpy as cp
import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch.nn import functional

from convexheads import LogisticHead, OneVsRestSVMHead, RidgeHead
from convexheads.hyperparameters import PerTask
from convexheads.solvers import NativeSolver

GRID = 10.0 ** torch.arange(-6, 6, dtype=torch.float64)
LOADERS = {"iris": load_iris, "wine": load_wine, "breast cancer": load_breast_cancer, "digits": load_digits}


@pytest.fixture(params=LOADERS)
def data(request):
    """Standardized features, labels, and weights of at most 300 examples."""
    x, y = LOADERS[request.param](return_X_y=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:300]
    x, y = StandardScaler().fit_transform(x[order]), torch.from_numpy(y)[order]
    weight = 0.2 + torch.rand(len(y), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.from_numpy(x), y.long(), weight


def fit_grid(make, x, y, is_grid, **options):
    """Fits for each value of the grid, as `tune` does it or with gradients, and the weights and biases."""
    with torch.set_grad_enabled(not is_grid):
        fitted = make(PerTask(GRID)).fit(x.expand(len(GRID), *x.shape), y, **options)
    bias = torch.zeros_like(fitted.weight[..., 0]) if fitted.bias is None else fitted.bias
    return fitted, fitted.weight.detach(), bias.detach()


def fit_reference(estimator, x, y, weight):
    """A fit by scikit-learn, and whether it has converged."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", ConvergenceWarning)
        estimator.fit(x.numpy(), y.numpy(), weight.numpy())
    W, b = torch.tensor(estimator.coef_), torch.as_tensor(estimator.intercept_, dtype=torch.float64).reshape(-1)
    return W, b, not seen


def balanced(y, weight):
    """scikit-learn's balanced weights, from their definition."""
    totals = torch.zeros(int(y.max()) + 1, dtype=weight.dtype).index_add(0, y, weight)
    return weight * (weight.sum() / len(totals) / totals)[y]


@pytest.mark.parametrize("is_grid", [False, True], ids=["with gradients", "grid"])
@pytest.mark.parametrize(("intercept", "class_weight"), [(False, None), (True, "balanced")])
def test_logistic_regression(data, intercept, class_weight, is_grid):
    x, y, weight = data
    used = weight if class_weight is None else balanced(y, weight)
    ways = int(y.max()) + 1

    def make(values):
        return LogisticHead(values, intercept=intercept, class_weight=class_weight)

    fitted, W, b = fit_grid(make, x, y, is_grid, sample_weight=weight)
    assert fitted.solution.gap.max() < (1e-11 if is_grid else 1e-12)

    def objective(penalty, W, b):
        losses = functional.cross_entropy(x @ W.mT + b, y, reduction="none")
        return penalty / 2 * W.square().sum() + used @ losses

    converged = 0
    for number in range(0, len(GRID), 1 if len(x) < 200 else 3):
        penalty = GRID[number]
        reference = LogisticRegression(
            C=(2 if ways == 2 else 1) / penalty.item(),
            fit_intercept=intercept,
            class_weight=class_weight,
            solver="newton-cholesky",
            tol=1e-13,
            max_iter=1000,
        )
        expected_W, expected_b, has_converged = fit_reference(reference, x, y, weight)
        if ways == 2:  # one vector, the difference between those of both classes
            expected_W, expected_b = torch.cat([-expected_W, expected_W]) / 2, torch.cat([-expected_b, expected_b]) / 2
        found, expected = objective(penalty, W[number], b[number]), objective(penalty, expected_W, expected_b)
        assert found <= expected * (1 + 1e-9)
        if has_converged:
            assert abs(found - expected) < 1e-7 * expected
            converged += 1
    assert converged > 2


@pytest.mark.parametrize(("intercept", "class_weight"), [(False, None), (True, "balanced")])
def test_ridge_regression(data, intercept, class_weight):
    x, y, weight = data
    used = weight if class_weight is None else balanced(y, weight)
    targets = functional.one_hot(y).to(x.dtype)

    def make(values):
        return RidgeHead(values, intercept=intercept, class_weight=class_weight)

    _, W, b = fit_grid(make, x, y, False, sample_weight=weight)
    for penalty, own, bias in zip(GRID, W, b, strict=True):
        reference = Ridge(penalty.item(), fit_intercept=intercept, solver="cholesky")
        reference.fit(x.numpy(), targets.numpy(), used.numpy())
        expected = torch.from_numpy(reference.coef_), torch.as_tensor(reference.intercept_)

        def objective(W, b, penalty=penalty):
            return penalty * W.square().sum() + used @ (x @ W.mT + b - targets).square().sum(-1)

        value, best = objective(own, bias), objective(*expected)
        assert abs(value - best) < 1e-9 * best


def test_squared_hinge(data):
    x, y, weight = data
    signs = 2 * functional.one_hot(y).to(x.dtype) - 1
    _, W, _ = fit_grid(lambda C: OneVsRestSVMHead(C, squared_hinge=True), x, y, False, sample_weight=weight)
    for C, own in zip(GRID[2:9], W[2:9], strict=True):

        def objective(W, C=C):
            return W.square().sum(-1) / 2 + C * weight @ (1 - signs * (x @ W.mT)).clamp_min(0).square()

        for label, found in enumerate(objective(own)):
            reference = LinearSVC(C=C.item(), dual=False, fit_intercept=False, tol=1e-10, max_iter=10_000)
            expected = objective(fit_reference(reference, x, (y == label).long(), weight)[0])[label]
            assert abs(found - expected) < 1e-7 * expected


def test_hinge_with_intercept(data):
    """Compared with CVXPY, because LIBSVM keeps its kernel in float32."""
    x, y, weight = data
    ways = int(y.max()) + 1
    signs = 2 * functional.one_hot(y).to(x.dtype) - 1
    W, b, C = cp.Variable((ways, x.shape[-1])), cp.Variable((1, ways)), cp.Parameter(nonneg=True)
    slack = cp.pos(1 - cp.multiply(signs.numpy(), x.numpy() @ W.T + np.ones((len(x), 1)) @ b))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(W) / 2 + C * cp.sum(weight.numpy() @ slack)))
    for value in (1e-3, 1.0, 100.0):
        C.value = value
        problem.solve(solver="CLARABEL", tol_gap_rel=1e-11, tol_gap_abs=1e-11, tol_feas=1e-11)
        fitted = OneVsRestSVMHead(value, intercept=True, solver=NativeSolver(tolerance=1e-8)).fit(
            x, y, sample_weight=weight
        )
        own = weight @ (1 - signs * (x @ fitted.weight.mT + fitted.bias)).clamp_min(0)
        found = fitted.weight.square().sum() / 2 + value * own.sum()
        assert abs(found - problem.value) < 1e-7 * problem.value
