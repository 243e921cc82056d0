"""Heads against solvers that nobody here wrote: scikit-learn, learn2learn, CVXPY."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process import kernels as gp_kernels
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.svm import SVC, SVR, LinearSVC
from tasks import close, task
from torch.nn import functional

from convexheads import (
    GaussianProcessHead,
    LinearDiscriminantHead,
    LogisticHead,
    MahalanobisHead,
    OneVsRestSVMHead,
    RidgeHead,
    RidgeRegressionHead,
    SimplifiedSVMHead,
    SupportVectorRegressionHead,
    SVMHead,
)
from convexheads.kernels import RBF, Polynomial

# Whether it gets to a tolerance of 1e-12 is a matter of the last bit, and no matter here: the tests ask how near it is.
pytestmark = pytest.mark.filterwarnings("ignore:Liblinear failed to converge")


def primal_objective(weights: np.ndarray, x: np.ndarray, y: np.ndarray, C: float) -> float:
    """Eq. 4 of the paper: weights (k, d)."""
    scores = x @ weights.T
    margins = 1 - np.eye(len(weights))[y] + scores - scores[np.arange(len(y)), y][:, None]
    return (weights**2).sum() / 2 + C * margins.max(1).sum()


@pytest.mark.parametrize("scale", [1.0, *(pytest.param(scale, marks=pytest.mark.slow) for scale in (1e-2, 30.0))])
@pytest.mark.parametrize("C", [1e-2, 0.1, 1.0, 100.0])
@pytest.mark.parametrize(("shots", "d"), [((1,) * 5, 64), ((5,) * 5, 64), ((3, 1, 4), 20), ((8, 7, 9), 4)], ids=str)
def test_svm_equals_scikit_learn(shots, d, C, scale):
    support, labels, _, _ = task(shots=shots, d=d, scale=scale)
    x, y = support.numpy(), labels.numpy()
    reference = LinearSVC(
        multi_class="crammer_singer", fit_intercept=False, C=C, tol=1e-12, max_iter=1_000_000, random_state=0
    ).fit(x, y)
    fitted = SVMHead(C).fit(support, labels)
    weights = (fitted.expansion.coef.mT @ support).numpy()
    ours, theirs = (primal_objective(w, x, y, C) for w in (weights, reference.coef_))
    assert ours <= theirs * (1 + 1e-8)
    # scikit-learn stops on a tolerance of its own: where it has stopped short, our lower objective says so, and by
    # strong convexity the distance of the weights is at most this.
    slack = np.sqrt(2 * max(theirs - ours, 0)) / np.linalg.norm(weights)
    error = np.linalg.norm(weights - reference.coef_) / np.linalg.norm(reference.coef_)
    converges = scale == 1 and C <= 1 and d >= 20  # so that no comparison hides behind its slack
    assert error <= (1e-6 if converges else max(1e-6, 1.01 * slack))


@pytest.mark.parametrize("regularization", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize(("shots", "d"), [((5,) * 5, 64), ((8, 7, 9), 4)], ids=str)
def test_ridge_equals_scikit_learn(shots, d, regularization):
    support, labels, query, _ = task(shots=shots, d=d)
    targets = functional.one_hot(labels).double().numpy()
    reference = Ridge(alpha=regularization, fit_intercept=False, solver="cholesky").fit(support.numpy(), targets)
    expected = torch.from_numpy(reference.predict(query.numpy()))
    assert close(RidgeHead(regularization)(support, labels, query), expected) < 1e-9


@pytest.mark.parametrize("C", [0.01, 1.0])
@pytest.mark.parametrize("loss", ["hinge", "squared_hinge"])
def test_one_vs_rest_equals_scikit_learn(loss, C):
    support, labels, query, _ = task(shots=(5, 4, 6), d=20)
    reference = LinearSVC(
        loss=loss, dual=True, fit_intercept=False, C=C, tol=1e-9, max_iter=10_000_000, random_state=0
    ).fit(support.numpy(), labels.numpy())
    expected = torch.from_numpy(reference.decision_function(query.numpy()))
    assert close(OneVsRestSVMHead(C, squared_hinge=loss == "squared_hinge")(support, labels, query), expected) < 1e-6


@pytest.mark.parametrize(
    ("kernel", "reference"),
    [
        (RBF(2.0), {"kernel": "rbf", "gamma": 1 / 8}),
        (Polynomial(3, offset=0.0), {"kernel": "poly", "degree": 3, "gamma": 1}),
    ],
    ids=["rbf", "polynomial"],
)
@pytest.mark.parametrize("head", [OneVsRestSVMHead, SVMHead, SimplifiedSVMHead])
def test_two_classes_equal_svc(head, kernel, reference):
    """SVC has a bias, which is zero where every example has its mirror image in the other class."""
    points = torch.randn(9, 4, dtype=torch.float64)
    support, labels = torch.cat([points, -points]), torch.arange(2).repeat_interleave(9)
    query = torch.randn(30, 4, dtype=torch.float64)
    # Two classes: w_1 = -w_0, and the squared norms of both count.
    C, factor = {OneVsRestSVMHead: (0.7, 1.0), SVMHead: (0.35, 0.5), SimplifiedSVMHead: (0.35, 0.5)}[head]
    svc = SVC(C=0.7, tol=1e-10, **reference).fit(support.numpy(), labels.numpy())
    assert abs(svc.intercept_.item()) < 1e-9
    expected = torch.from_numpy(svc.decision_function(query.numpy()))
    assert close(head(C, kernel=kernel)(support, labels, query)[:, 1], factor * expected) < 1e-6


@pytest.mark.parametrize("regularization", [1e-2, 1.0, 30.0])
@pytest.mark.parametrize(("shots", "d"), [((1,) * 5, 64), ((5,) * 5, 64), ((8, 7, 9), 4)], ids=str)
def test_logistic_regression_equals_scikit_learn(shots, d, regularization):
    support, labels, query, _ = task(shots=shots, d=d)
    reference = LogisticRegression(fit_intercept=False, C=1 / regularization, tol=1e-12, max_iter=100_000)
    reference.fit(support.numpy(), labels.numpy())
    expected = torch.from_numpy(reference.decision_function(query.numpy()))
    fitted = LogisticHead(regularization).fit(support, labels)
    assert fitted.solution.gap < 1e-12
    weights = fitted.expansion.coef.mT @ support

    def objective(weights):
        return regularization * weights.square().sum() / 2 + functional.cross_entropy(
            support @ weights.mT, labels, reduction="sum"
        )

    theirs = torch.from_numpy(reference.coef_)
    assert objective(weights) <= objective(theirs) * (1 + 1e-12)
    # scikit-learn stops where its gradient is small: by strong convexity its weights are no further away than this.
    slack = (2 * (objective(theirs) - objective(weights)).clamp_min(0) / regularization).sqrt() / weights.norm()
    assert (weights - theirs).norm() / weights.norm() < max(1e-6, 1.01 * slack)
    assert close(fitted(query), expected) < 1e-5


@pytest.mark.parametrize("shrinkage", [0.01, 0.3, 1.0])
@pytest.mark.parametrize(("shots", "d"), [((5, 3, 8), 30), ((8, 7, 9), 4)], ids=str)
def test_discriminant_equals_scikit_learn(shots, d, shrinkage):
    support, labels, query, _ = task(shots=shots, d=d)
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(support.numpy(), labels.numpy())
    expected = torch.from_numpy(reference.decision_function(query.numpy()))
    assert close(LinearDiscriminantHead(shrinkage)(support, labels, query), expected) < 1e-9


@pytest.mark.parametrize(("shots", "d"), [((5, 3, 1), 30), ((8, 7, 9), 4)], ids=str)
def test_mahalanobis_equals_scipy(shots, d):
    """With the covariances of Simple CNAPS formed explicitly, d x d, by numpy."""
    support, labels, query, ways = task(shots=shots, d=d)
    x, expected = support.numpy(), torch.empty(len(query), ways, dtype=torch.float64)
    for c in range(ways):
        own = x[labels == c]
        share = len(own) / (len(own) + 1)
        of_class = np.cov(own, rowvar=False) if len(own) > 1 else np.zeros((d, d))
        covariance = share * of_class + (1 - share) * np.cov(x, rowvar=False) + np.eye(d)
        for q in range(len(query)):
            distance = mahalanobis(query[q].numpy(), own.mean(0), np.linalg.inv(covariance))
            expected[q, c] = -(distance**2) / 2
    assert close(MahalanobisHead()(support, labels, query), expected) < 1e-10


@pytest.mark.parametrize("noise", [1e-3, 0.3])
def test_gaussian_process_equals_scikit_learn(noise):
    x, y, query = (torch.randn(*shape, dtype=torch.float64) for shape in ((12, 3), (12,), (7, 3)))
    kernel = gp_kernels.RBF(1.7, length_scale_bounds="fixed")
    reference = GaussianProcessRegressor(kernel, alpha=noise, optimizer=None).fit(x.numpy(), y.numpy())
    mean, deviation = reference.predict(query.numpy(), return_std=True)
    fitted = GaussianProcessHead(noise, kernel=RBF(1.7)).fit(x, y)
    torch.testing.assert_close(fitted(query), torch.from_numpy(mean), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(fitted.variance(query), torch.from_numpy(deviation**2), rtol=1e-7, atol=1e-9)
    assert fitted.log_marginal_likelihood().item() == pytest.approx(reference.log_marginal_likelihood_value_, rel=1e-9)


@pytest.mark.parametrize("shape", [(30, 4), (8, 20)], ids=str)
def test_ridge_regression_equals_scikit_learn(shape):
    x, y, query = (torch.randn(*size, dtype=torch.float64) for size in (shape, (shape[0], 2), (7, shape[1])))
    linear = Ridge(alpha=0.3, fit_intercept=False).fit(x.numpy(), y.numpy()).predict(query.numpy())
    assert close(RidgeRegressionHead(0.3)(x, y, query), torch.from_numpy(linear)) < 1e-9
    gaussian = KernelRidge(alpha=0.3, kernel="rbf", gamma=1 / 8).fit(x.numpy(), y.numpy()).predict(query.numpy())
    assert close(RidgeRegressionHead(0.3, kernel=RBF(2.0))(x, y, query), torch.from_numpy(gaussian)) < 1e-9


def test_support_vector_regression_equals_svr_where_the_bias_is_zero():
    points, values = torch.randn(10, 3, dtype=torch.float64), torch.randn(10, dtype=torch.float64)
    x, y = torch.cat([points, -points]), torch.cat([values, -values])
    query = torch.randn(7, 3, dtype=torch.float64)
    reference = SVR(kernel="poly", degree=1, gamma=1, C=0.8, epsilon=0.2, tol=1e-10).fit(x.numpy(), y.numpy())
    assert abs(reference.intercept_.item()) < 1e-9
    expected = torch.from_numpy(reference.predict(query.numpy()))
    assert close(SupportVectorRegressionHead(0.8, epsilon=0.2)(x, y, query), expected) < 1e-6


@pytest.mark.parametrize(("size", "regularization"), [(1e3, 1e-3), (1e3, 1e-8), (1e4, 1e-6)])
def test_ridge_with_a_tiny_penalty_and_few_features(size, regularization):
    """Scores of the dual coefficients would lose all digits here."""
    torch.manual_seed(0)
    support, query = size * torch.randn(100, 5, dtype=torch.float64), size * torch.randn(20, 5, dtype=torch.float64)
    targets = support @ torch.randn(5, dtype=torch.float64) / size + 0.1 * torch.randn(100, dtype=torch.float64)
    reference = Ridge(regularization, fit_intercept=False, solver="cholesky").fit(support.numpy(), targets.numpy())
    fitted = RidgeRegressionHead(regularization).fit(support, targets)
    assert close(fitted(query), torch.from_numpy(reference.predict(query.numpy())), 1.0) < 1e-10
    assert close(size * fitted.weight[0], size * torch.from_numpy(reference.coef_), 1.0) < 1e-10
