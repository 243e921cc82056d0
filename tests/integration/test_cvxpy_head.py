"""Base learners that users hand over as CVXPY problems."""

from __future__ import annotations

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import cvxpy
import pytest
import torch
from sklearn.linear_model import Lasso
from tasks import close, indefinite, task
from torch.nn import functional

from convexheads import (
    CvxpyHead,
    InputError,
    Learnable,
    LogisticHead,
    MissingDependencyError,
    OneVsRestSVMHead,
    RidgeHead,
    SolverError,
    SupportSet,
    SVMHead,
)
from convexheads.errors import ConvexHeadsError
from convexheads.solvers import CvxpylayersSolver
from convexheads.solvers.adapters import cvxpylayers


def hinge(task):
    margins = cvxpy.multiply(2 * task.targets - 1, task.scores)
    return task.parameters["lambda"] / 2 * task.squared_norm + cvxpy.sum(cvxpy.pos(1 - margins))


def squares(task):
    return task.parameters["lambda"] / 2 * task.squared_norm + cvxpy.sum_squares(task.targets - task.scores) / 2


def cross_entropy(task):
    loss = cvxpy.sum(cvxpy.log_sum_exp(task.scores, axis=1)) - cvxpy.sum(cvxpy.multiply(task.targets, task.scores))
    return cvxpy.Minimize(task.parameters["lambda"] / 2 * task.squared_norm + loss)


def hinge_huber(task):
    """Quadratic near the margin, linear far from it."""
    margins = cvxpy.multiply(2 * task.targets - 1, task.scores)
    return task.squared_norm / 2 + cvxpy.sum(cvxpy.huber(cvxpy.pos(1 - margins), 0.5))


def squares_to_maximize(task):
    return cvxpy.Problem(cvxpy.Maximize(-squares(task)))


SAME = {
    "hinge": (hinge, 8.0, OneVsRestSVMHead(Learnable(1 / 8.0))),
    "squares": (squares, 3.0, RidgeHead(Learnable(3.0))),
    "maximization": (squares_to_maximize, 3.0, RidgeHead(Learnable(3.0))),
    "cross-entropy": (cross_entropy, 3.0, LogisticHead(Learnable(3.0))),
}


@pytest.mark.parametrize(("build", "weight", "own"), SAME.values(), ids=SAME.keys())
def test_equals_our_own_heads_and_their_gradients(build, weight, own):
    support, labels, query, ways = task(2, d=20)
    head = CvxpyHead(build, hyperparameters={"lambda": Learnable(weight)}, scale=Learnable(1.3))
    found = []
    for each in (head, own):
        features = support.clone().requires_grad_()
        logits = each(features, labels, query, ways=ways)
        (parameter,) = [p for name, p in each.named_parameters() if "scale" not in name]
        gradients = torch.autograd.grad(logits.square().sum(), [features, parameter])
        found.append((logits, *gradients))
    (logits, of_features, of_parameter), (expected, own_features, own_parameter) = found
    assert close(logits, 1.3 * expected) < 1e-5
    assert close(of_features, 1.69 * own_features) < 1e-3
    # C is 1 / lambda, and what is learnt is the logarithm.
    assert close(of_parameter.abs(), 1.69 * own_parameter.abs()) < 1e-3


def test_hinge_huber_and_masks():
    support, labels, query, ways = task(2, shots=(2, 2, 2), d=10)
    head = CvxpyHead(hinge_huber)
    mask = torch.ones_like(labels, dtype=torch.bool)
    mask[0, 1] = False
    logits = head(support, labels, query, ways=ways, mask=mask)
    alone = head(support[0, mask[0]], labels[0, mask[0]], query[0], ways=ways)
    assert close(logits[0], alone) < 1e-4
    torch.testing.assert_close(copy.deepcopy(head)(support, labels, query, ways=ways, mask=mask), logits)


def test_l1_gives_scikit_learns_lasso():
    """An L1 norm of the coefficients is the lasso with the Gram matrix as features."""
    support, labels, *_ = task(shots=(3, 2, 4), d=30)

    def lasso(task):
        return cvxpy.sum_squares(task.targets - task.scores) / 2 + 0.9 * cvxpy.norm1(task.coef)

    fitted = CvxpyHead(lasso).fit(support, labels)
    gram, targets = (support @ support.mT).numpy(), functional.one_hot(labels).double().numpy()
    reference = Lasso(alpha=0.9 / len(gram), fit_intercept=False, tol=1e-12, max_iter=100_000).fit(gram, targets)
    expected = torch.from_numpy(reference.coef_.T)
    assert (expected == 0).any()
    assert close(fitted.expansion.coef, expected) < 1e-5


NONE = {
    "infeasible": lambda task: cvxpy.Problem(
        cvxpy.Minimize(task.squared_norm), [task.coef >= 1, task.coef <= -1, cvxpy.sum(task.targets) >= 0]
    ),
    "unbounded": lambda task: cvxpy.sum(task.scores) + 0 * cvxpy.sum(task.targets),
    "unbounded, far": lambda task: cvxpy.sum(task.coef),
}


@pytest.mark.parametrize("build", NONE.values(), ids=NONE.keys())
@pytest.mark.parametrize("gradient", [False, True])
def test_problems_without_a_solution(build, gradient):
    """diffcp returns numbers for them."""
    support, labels, query, _ = task(2)
    with pytest.raises(
        SolverError, match=r"CvxpyHead: 2 of 2 tasks not solved \(task \(0,\); task \(1,\)\): infeasible"
    ):
        CvxpyHead(build)(support.requires_grad_(gradient), labels, query)


def test_a_gram_matrix_that_is_not_finite_fails_in_its_task():
    """Without validation, nothing has checked the features."""
    targets = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    features = targets.clone()
    features[1, 0, 0] = torch.nan
    with pytest.raises(SolverError, match=r"1 of 2 tasks not solved \(task \(1,\)\)"):
        CvxpyHead(squares, hyperparameters={"lambda": 1.0}).solve(SupportSet(features, targets, validate=False))


def test_indefinite_kernel():
    with pytest.raises(InputError, match=r"kernel: expected .*, got a Gram matrix with the eigenvalue -"):
        CvxpyHead(squares, hyperparameters={"lambda": 1.0}, kernel=indefinite)(*task()[:3])


BAD = {
    "not convex": (lambda task: -task.squared_norm, r"build: expected .*, got a problem that is not convex"),
    "not DPP": (
        lambda task: task.squared_norm + task.parameters["a"] * cvxpy.sum_squares(task.targets - task.scores),
        r"build: expected a DPP problem, got a problem that is convex but not DPP",
    ),
    "nothing": (lambda task: None, r"build: expected an expression.*, got a NoneType from it"),
}


@pytest.mark.parametrize(("build", "message"), BAD.values(), ids=BAD.keys())
@pytest.mark.usefixtures("unchecked")
def test_bad_problems(build, message):
    with pytest.raises(InputError, match=message):
        CvxpyHead(build, hyperparameters={"a": 1.0})(*task()[:3])


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_and_limits(monkeypatch):
    with pytest.raises(InputError, match=r"build: expected a hashable function.*, got 3"):
        CvxpyHead(3)
    unhashable = type("Unhashable", (), {"__call__": squares, "__hash__": None})
    with pytest.raises(InputError, match=r"build: expected a hashable function.*, got .*Unhashable"):
        CvxpyHead(unhashable())
    with pytest.raises(InputError, match=r"hyperparameters\['a'\]: expected a positive.*, got -1"):
        CvxpyHead(squares, hyperparameters={"a": -1})
    support, labels, query, _ = task()
    logits = CvxpyHead(squares, hyperparameters={"lambda": 1.0})(support.requires_grad_(), labels, query)
    (gradient,) = torch.autograd.grad(logits.sum(), support, create_graph=True)
    with pytest.raises(ConvexHeadsError, match=r"second derivative.*CvxpyHead"):
        gradient.sum().backward()
    monkeypatch.setattr("convexheads.heads.cvxpy.find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match="CvxpyHead needs the package 'cvxpylayers'"):
        CvxpyHead(squares)


def test_the_cache_of_compiled_problems_keeps_no_function():
    support, labels, query, _ = task()

    def make():
        weight = 0.5
        return lambda task: cvxpy.sum_squares(task.targets - task.scores) + weight * task.squared_norm

    head = CvxpyHead(make())
    head(support, labels, query)
    function = weakref.ref(head.build)
    assert CvxpyHead(head.build)(support, labels, query).equal(head(support, labels, query))
    del head
    gc.collect()
    assert function() is None


def test_threads_share_a_compiled_problem():
    """Every task is checked in variables that belong to the problem; with a lambda so different, a mix-up shows."""
    build = lambda task: task.parameters["lambda"] * task.squared_norm + cvxpy.sum_squares(task.targets - task.scores)  # noqa: E731
    tasks = [task(4, seed=seed) for seed in range(12)]
    heads = [CvxpyHead(build, hyperparameters={"lambda": 10.0 ** (seed % 6 - 3)}) for seed in range(12)]
    expected = [head(*data[:3]) for head, data in zip(heads, tasks, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            found = pool.map(lambda head, data: head(*data[:3]), heads, tasks)
            for logits, other in zip(found, expected, strict=True):
                torch.testing.assert_close(logits, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad])
def test_transforms_of_torch_func_are_refused(transform):
    support, labels, query, _ = task(2)
    value = support if transform is torch.func.vmap else support[0]
    head = CvxpyHead(squares, hyperparameters={"lambda": 1.0})
    with pytest.raises(ConvexHeadsError, match=r"torch.func: expected .*, got CvxpyHead"):
        transform(lambda x: head(x, labels[0], query[0], ways=3).sum())(value)


def test_problems_of_several_shapes_are_compiled_in_threads():
    """CVXPY itself fails in some of many threads, unless it compiles one problem at a time."""
    cvxpylayers._layer.cache_clear()

    def fit(number: int) -> torch.Tensor:
        support, labels, query, _ = task(shots=(1 + number % 3,) * (2 + number // 3))
        if number % 2:
            return CvxpyHead(squares, hyperparameters={"lambda": 1.0})(support, labels, query)
        return SVMHead(solver=CvxpylayersSolver())(support, labels, query)

    with ThreadPoolExecutor(6) as pool:
        assert all(logits.isfinite().all() for logits in pool.map(fit, range(12)))
