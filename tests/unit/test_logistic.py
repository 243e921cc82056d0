"""Logistic regression in its weights: with more examples than features, and with many examples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from tasks import close, task
from torch.nn import functional

from convexheads import InputError, Learnable, LogisticHead, RidgeHead
from convexheads.heads import _logistic_newton, _primal
from convexheads.heads._primal import minimize, steps, strategy
from convexheads.heads._primal import problem as problem_module
from convexheads.kernels import Kernel, Linear, UnitScale, condition
from convexheads.solvers import Status
from convexheads.solvers.failures import certified

FEW, MANY = {"shots": (9, 7, 8), "d": 4}, {"shots": (12, 9, 11, 10, 8, 12), "d": 50}
"""Up to 256 weights, and more: the Hessian is factorized, or conjugate gradients are used."""


def through_the_dual(x, y):
    """The linear kernel, as a function that a head does not know."""
    return x @ y.mT


def newton_in_long_double(x, y, regularization: float, weight: np.ndarray, ways: int) -> np.ndarray:
    """The optimal weights, `(d, k)`: Newton's method from weights nearby, with gradients in extended precision."""
    x, (d, k) = x.numpy().astype(np.longdouble), weight.shape
    targets, weight = np.eye(ways)[y.numpy()].astype(np.longdouble), weight.astype(np.longdouble)
    for _ in range(8):
        scores = x @ weight
        p = np.exp(scores - scores.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        gradient = regularization * weight + x.T @ (p - targets)
        hessian = np.kron(np.full((k, k), 1 / k), np.eye(d)) + regularization * np.eye(d * k)
        for a in range(k):
            for b in range(k):
                curvature = p[:, a] * ((a == b) - p[:, b])
                hessian[a * d : (a + 1) * d, b * d : (b + 1) * d] += (x.T @ (curvature[:, None] * x)).astype(float)
        step = np.linalg.solve(hessian, gradient.T.reshape(-1).astype(float))
        weight = weight - step.reshape(k, d).T
    return weight


@pytest.mark.skipif(np.finfo(np.longdouble).eps > 1e-18, reason="long double is no more precise than double here")
@pytest.mark.parametrize("regularization", [1.0, 1e-2, 1e-4, 1e-6, 1e-8])
def test_no_digits_are_lost_with_a_tiny_regularization(regularization):
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x, labels = torch.randn(25, 2, generator=generator, dtype=torch.float64), torch.arange(25) % 5
        fitted = LogisticHead(regularization).fit(x, labels)
        assert fitted.solution.gap < 1e-15
        exact = newton_in_long_double(x, labels, regularization, fitted.weight.numpy().T, ways=5)
        assert np.abs(fitted(x).numpy() - (x.numpy() @ exact).astype(float)).max() < 1e-9


@pytest.mark.parametrize("regularization", [1.0, 1e-6])
@pytest.mark.parametrize("sizes", [FEW, MANY], ids=["few", "many"])
def test_gradients_agree_with_central_differences(sizes, regularization):
    support, labels, query, _ = task(**sizes)
    direction = torch.randn(support.shape, generator=torch.Generator().manual_seed(1), dtype=support.dtype)

    def loss(step: float, factor: float = 1.0) -> torch.Tensor:
        head = LogisticHead(factor * regularization)
        return head(support + step * direction, labels, query).square().mean()

    support.requires_grad_()
    head = LogisticHead(Learnable(regularization))
    by_support, by_log = torch.autograd.grad(
        head(support, labels, query).square().mean(), [support, *head.parameters()]
    )
    step = 1e-5
    with torch.no_grad():
        expected = (loss(step) - loss(-step)) / (2 * step)
        by_factor = (loss(0, 1 + step) - loss(0, 1 - step)) / (2 * step)
    assert close((by_support * direction).sum(), expected) < 1e-6
    assert close(by_log, by_factor, scale=1e-3) < 1e-6  # a `Learnable` holds a logarithm


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("sizes", [FEW, MANY], ids=["few", "many"])
def test_the_same_as_in_the_dual(sizes, masked):
    support, labels, query, ways = task(2, **sizes)
    mask = torch.ones_like(labels, dtype=torch.bool)
    mask[0, -3:] = not masked
    found = []
    for kernel in (None, through_the_dual):
        head = LogisticHead(Learnable(0.5), kernel=kernel)
        x, q = support.clone().requires_grad_(), query.clone().requires_grad_()
        fitted = head.fit(x, labels, ways=ways, mask=mask if masked else None)
        weights = torch.linspace(0.5, 1.5, ways, dtype=x.dtype)
        loss = (fitted(q).softmax(-1) * weights).sum() + (fitted.solution.coef * mask.unsqueeze(-1)).square().sum()
        found.append([fitted(q), *torch.autograd.grad(loss, [x, q, *head.parameters()])])
        assert (fitted.expansion.weight is None) == (kernel is not None)
    for primal, dual in zip(*found, strict=True):
        assert close(primal, dual) < 1e-6


def test_second_derivatives():
    support, labels, query, _ = task(shots=(3, 4), d=3)
    head = LogisticHead(Learnable(0.5)).double()
    ((name, parameter),) = head.named_parameters()

    def loss(support, query, parameter):
        return torch.func.functional_call(head, {name: parameter}, (support, labels, query)).square().sum()

    arguments = [value.requires_grad_() for value in (support, query, parameter.detach().clone())]
    with pytest.MonkeyPatch.context() as patch:
        for limit in (strategy.MAX_UNKNOWNS, 0):
            patch.setattr(strategy, "MAX_UNKNOWNS", limit)
            assert torch.autograd.gradgradcheck(loss, arguments, atol=1e-6)


def test_many_examples_are_fitted_as_by_scikit_learn():
    """More examples than features, and more features than examples."""
    for shots, d in ((60,) * 8, 40), ((45,) * 6, 300):
        support, labels, query, _ = task(shots=shots, d=d)
        reference = LogisticRegression(C=0.5, fit_intercept=False, tol=1e-9, max_iter=10_000).fit(support, labels)
        fitted = LogisticHead(2.0).fit(support, labels)
        assert fitted.expansion.weight is not None
        assert close(fitted(query), torch.from_numpy(reference.decision_function(query.numpy()))) < 1e-5
        values = [
            weight.square().sum() + functional.cross_entropy(support @ weight.mT, labels, reduction="sum")
            for weight in (fitted.weight, torch.from_numpy(reference.coef_))
        ]
        assert values[0] <= values[1] * (1 + 1e-12)


def test_tasks_of_a_batch_do_not_depend_on_each_other():
    support, labels, query, ways = task(3, **MANY)
    support = support * torch.tensor([1.0, 1e-3, 1e3], dtype=support.dtype)[:, None, None]
    together = LogisticHead(1e-3)(support, labels, query, ways=ways)
    for number in range(3):
        alone = LogisticHead(1e-3)(support[number], labels[number], query[number], ways=ways)
        assert close(together[number], alone) < 1e-7
    broken = support.clone()
    broken[1, 0] = torch.nan
    found = LogisticHead(1e-3, validate=False, on_failure="return").fit(broken, labels, ways=ways)
    assert found.solution.converged.tolist() == [True, False, True]
    assert found(query)[1].isnan().all()
    assert close(found(query)[::2], together[::2]) < 1e-7


def test_under_vmap():
    support, labels, query, ways = task(3, **FEW)
    head = LogisticHead(0.5)
    found = torch.func.vmap(lambda s, y, q: head(s, y, q, ways=ways))(support, labels, query)
    assert close(found, head(support, labels, query, ways=ways)) < 1e-12

    def loss(support, labels, query):
        return head(support, labels, query, ways=ways).square().sum()

    expected = torch.stack([torch.func.grad(loss)(*each) for each in zip(support, labels, query, strict=True)])
    assert close(torch.func.vmap(torch.func.grad(loss))(support, labels, query), expected) < 1e-9


@pytest.mark.parametrize("size", [1e-4, 100.0])  # the bound of the weights is tight where the penalty dominates
@pytest.mark.parametrize("sizes", [FEW, MANY], ids=["few", "many"])
def test_the_gap_bounds_the_distance_to_the_optimum(sizes, size):
    support, labels, _, ways = task(**sizes)
    targets = functional.one_hot(labels, ways).to(support.dtype)
    used, penalty = torch.ones(1, len(labels), dtype=support.dtype), torch.tensor([size], dtype=support.dtype)

    def objective(weight):
        return penalty / 2 * weight.square().sum() + functional.cross_entropy(support @ weight, labels, reduction="sum")

    problem = support[None], targets[None], used, torch.zeros_like(targets[None]), penalty
    options = {"loss": "cross-entropy", "intercept": False, "tolerance": 1e-20}
    best = _primal.solve(*problem, **options, max_steps=100)[0][0]
    for most in range(1, 8):
        (weight,), (gap,), (error,), _ = _primal.solve(*problem, **options, max_steps=most)
        assert objective(weight) - objective(best) <= 1.001 * gap * objective(weight) + 1e-13
        assert (weight - best).square().sum() <= 1.001 * error * weight.square().sum() + 1e-20


@pytest.mark.parametrize("intercept", [False, True], ids=["through the origin", "intercept"])
@pytest.mark.parametrize("penalty", [1e-3, 300.0])
def test_the_gap_in_the_dual_bounds_the_distance_to_the_optimum(penalty, intercept):
    support, labels, _, ways = task(**MANY)
    seen = []
    weight = torch.linspace(0.5, 2, len(labels), dtype=support.dtype)

    def objective(fitted):
        losses = functional.cross_entropy(fitted(support), labels, reduction="none")
        return penalty / 2 * fitted.weight.square().sum() + weight @ losses

    for count in (1, 2, 3, 4, 5, 6, 30):
        head = LogisticHead(penalty, steps=count, intercept=intercept, on_failure="return")
        fitted = head.fit(support, labels, ways=ways, sample_weight=weight)
        seen.append((objective(fitted), fitted.solution.gap))
    optimum, last = seen[-1]
    assert last < 1e-14
    for value, gap in seen[:-1]:
        assert (value - optimum) / value <= 1.001 * gap + 1e-13
    if penalty > 1:  # where the bound is tight
        value, gap = seen[0]
        assert (value - optimum) / value > 0.3 * gap


class Unknown(Kernel):
    """The same kernel, of which a head does not know whether it is linear."""

    def __init__(self, kernel):
        super().__init__()
        self.kernel = kernel

    def condition_on(self, features, mask):
        conditioned = condition(self.kernel, features, mask)
        return lambda x, y: conditioned(x, y)


@pytest.mark.parametrize("head", [RidgeHead, LogisticHead])
@pytest.mark.parametrize(
    "kernel", [UnitScale(), Linear(normalize=True), 0.3 * Linear(), UnitScale(2.0 * Linear())], ids=repr
)
def test_multiples_of_the_dot_product_have_a_primal(kernel, head):
    support, labels, query, ways = task(2, **FEW)
    mask = torch.ones_like(labels, dtype=torch.bool)
    mask[1, :2] = False
    found = []
    for each in (kernel, Unknown(kernel)):
        x = support.clone().requires_grad_()
        fitted = head(0.5, kernel=each).fit(x, labels, ways=ways, mask=mask)
        assert (fitted.expansion.weight is None) == (each is not kernel)
        loss = fitted(query).softmax(-1).square().sum()
        found.append([fitted(query), *torch.autograd.grad(loss, x)])
    for primal, dual in zip(*found, strict=True):
        assert close(primal, dual) < 1e-6
    fitted = head(0.5, kernel=kernel).fit(support, labels, ways=ways)
    assert close(query @ fitted.weight.mT + fitted.bias.unsqueeze(-2), fitted(query)) < 1e-12


@pytest.mark.parametrize("is_compiled", [False, True], ids=["torch", "compiled"])
def test_what_conjugate_gradients_do_not_solve_is_factorized(is_compiled, monkeypatch):
    if not is_compiled:
        monkeypatch.setattr(minimize, "numba_is_installed", lambda: False)
    support, labels, query, ways = task(2, **MANY)
    mask = torch.ones_like(labels, dtype=torch.bool)
    mask[0, :5] = False
    expected = LogisticHead(1e-2)(support, labels, query, ways=ways, mask=mask)
    monkeypatch.setattr(steps, "MAX_INNER", 1)
    fitted = LogisticHead(1e-2).fit(support, labels, ways=ways, mask=mask)
    assert (fitted.solution.gap < 1e-8).all()
    assert close(fitted(query), expected) < 1e-3
    monkeypatch.setattr(strategy, "_MAX_ENTRIES", 10)
    without = LogisticHead(1e-2, on_failure="return").fit(support, labels, ways=ways, mask=mask)
    assert without.solution.gap.max() > 1e-8


@pytest.mark.parametrize("intercept", [False, True], ids=["through the origin", "intercept"])
@pytest.mark.parametrize("is_compiled", [False, True], ids=["torch", "compiled"])
def test_kernels_that_are_not_positive_semi_definite_are_refused(is_compiled, intercept, monkeypatch):
    if not is_compiled:
        monkeypatch.setattr(_logistic_newton, "_MAX_COMPILED", 0)
    support, labels, query, _ = task(shots=(3, 3, 3))
    for kernel in (lambda x, y: -0.1 * x @ y.mT, lambda x, y: -3 * x @ y.mT, lambda x, y: (x @ y.mT - 4).tanh()):
        with pytest.raises(InputError, match="semi-definite"):
            LogisticHead(0.1, intercept=intercept, kernel=kernel)(support, labels, query)


def test_a_single_class_needs_no_bias():
    support, _, query, _ = task(shots=(5,))
    head = LogisticHead(0.1, intercept=True, kernel=through_the_dual)
    fitted = head.fit(support, torch.zeros(5, dtype=torch.long))
    assert torch.equal(fitted(query), torch.zeros_like(fitted(query)))
    assert torch.equal(
        fitted.bias if fitted.expansion.weight is not None else fitted.expansion.bias, torch.zeros(1).double()
    )


@pytest.mark.parametrize("penalty", [1e6, 1e12, 1e18])
@pytest.mark.parametrize("is_compiled", [False, True], ids=["torch", "compiled"])
def test_a_huge_penalty_has_precise_weights(is_compiled, penalty, monkeypatch):
    """Their part of the objective is tiny, so a small gap alone does not prove them."""
    if not is_compiled:
        monkeypatch.setattr(_logistic_newton, "_MAX_COMPILED", 0)
    support, labels, _, ways = task(shots=(3, 4, 5))
    expected = (functional.one_hot(labels, ways).double() - 1 / ways).mT @ support / penalty  # up to second order
    assert (
        close(LogisticHead(penalty).fit(support, labels).weight, expected, scale=1e-30) < 1e-3 * (1e6 / penalty) + 1e-9
    )


def test_a_small_gap_is_not_enough_if_the_weights_may_be_wrong():
    gap, error = (torch.tensor(values, dtype=torch.float64) for values in ([1e-9, 1e-9, 1e-4, 0.0], [1e-9, 1, 1e-9, 1]))
    found = certified(torch.zeros(4, 2, 3), gap, error, 1e-6, Status.STOPPED, None)
    assert found.status.tolist() == [Status.CONVERGED, Status.STOPPED, Status.STOPPED, Status.CONVERGED]


@pytest.mark.parametrize("has_numba", [True, False])
def test_a_hopeless_task_ends_when_no_step_can_be_taken(monkeypatch, has_numba):
    """Its neighbor goes on."""
    if not has_numba:
        monkeypatch.setattr(_logistic_newton, "numba_is_installed", lambda: False)
    x = torch.randn(2, 10, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.cat([x, x], 1)
    x[0] *= torch.logspace(0, -6, 30, dtype=torch.float64)
    x[1] *= 1e-13
    found = LogisticHead(1e-26, on_failure="return").fit(x, torch.arange(20) % 3).solution
    assert found.status.tolist() == [Status.FAILED, Status.CONVERGED]
    assert found.iterations[0] == 1
    assert found.iterations[1] > 1


def test_weights_that_no_step_improves_are_the_last():
    support, labels, _, ways = task(**FEW)
    one_hot, ones = functional.one_hot(labels, ways).double(), torch.ones(1, 1, len(labels), dtype=torch.float64)
    loss, penalty = _primal.LOSSES["cross-entropy"], torch.ones(1, 1, dtype=torch.float64)
    parts = support[None, None], one_hot[None, None], ones, torch.zeros_like(one_hot)[None, None]
    problem = problem_module.Problem(*parts, penalty, loss, intercept=False)
    start = torch.zeros(1, 1, support.shape[-1], ways, dtype=torch.float64)
    weight, taken = minimize.minimize(problem, start, lambda _, point: point.gradient, 1e-12, 100)  # uphill
    assert taken == 1
    assert torch.equal(weight, start)
