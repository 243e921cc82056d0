"""Weights of examples and classes, intercepts and priors, compared with scikit-learn and CVXPY."""

from __future__ import annotations

from functools import partial

import cvxpy as cp
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.svm import LinearSVC
from sklearn.utils.class_weight import compute_class_weight
from tasks import close, task

from convexheads import (
    InputError,
    Learnable,
    LogisticHead,
    OneVsRestSVMHead,
    PrototypeHead,
    RidgeHead,
    SimplifiedSVMHead,
    SVMHead,
    WestonWatkinsSVMHead,
)
from convexheads.heads._losses import LOSSES
from convexheads.kernels import RBF

SIZES = {
    "dual": {"shots": (4, 9, 5), "d": 30},
    "few weights": {"shots": (9, 17, 8), "d": 4},
    "many weights": {"shots": (12, 9, 11, 30, 8, 12), "d": 50},
    "many features": {"shots": (30, 50, 40), "d": 150},
}
HEADS = [RidgeHead, LogisticHead, SVMHead, WestonWatkinsSVMHead, OneVsRestSVMHead, SimplifiedSVMHead]


def through_the_dual(x, y):
    """The linear kernel, as a function that a head does not know."""
    return x @ y.mT


def weights_of(labels: torch.Tensor, seed: int = 1) -> torch.Tensor:
    return 0.2 + torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kernel", [None, through_the_dual], ids=["linear", "unknown"])
@pytest.mark.parametrize("intercept", [False, True], ids=["through the origin", "intercept"])
@pytest.mark.parametrize("class_weight", [None, "balanced", "numbers"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_logistic_regression_agrees_with_scikit_learn(sizes, class_weight, intercept, kernel):
    support, labels, query, ways = task(**sizes)
    sample_weight = weights_of(labels)
    if class_weight == "numbers":
        class_weight = {label: 0.5 + label for label in range(ways)}
    reference = LogisticRegression(
        C=0.5, class_weight=class_weight, fit_intercept=intercept, tol=1e-10, max_iter=100_000
    ).fit(support, labels, sample_weight)
    head = LogisticHead(2.0, class_weight=class_weight, intercept=intercept, kernel=kernel)
    fitted = head.fit(support, labels, sample_weight=sample_weight)
    assert fitted.solution.gap < 1e-12
    scores = torch.from_numpy(reference.decision_function(query.numpy()))
    scores = scores - scores.mean(-1, keepdim=True)
    found = fitted(query)
    assert close(found - found.mean(-1, keepdim=True), scores) < 1e-5
    if kernel is None:
        assert close(fitted.bias.sum(), torch.zeros((), dtype=torch.float64), scale=1.0) < 1e-9
        assert close(query @ fitted.weight.mT + fitted.bias, found) < 1e-12


@pytest.mark.parametrize("kernel", [None, through_the_dual], ids=["linear", "unknown"])
@pytest.mark.parametrize("intercept", [False, True], ids=["through the origin", "intercept"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_ridge_regression_agrees_with_scikit_learn(sizes, intercept, kernel):
    support, labels, query, ways = task(**sizes)
    targets, sample_weight = torch.nn.functional.one_hot(labels, ways).double(), weights_of(labels)
    balanced = compute_class_weight(
        "balanced", classes=np.arange(ways), y=labels.numpy(), sample_weight=sample_weight.numpy()
    )
    for class_weight, weight in (
        (None, sample_weight),
        ("balanced", sample_weight * torch.from_numpy(balanced)[labels]),
    ):
        reference = Ridge(2.0, fit_intercept=intercept, tol=1e-12).fit(support, targets, weight)
        head = RidgeHead(2.0, class_weight=class_weight, intercept=intercept, kernel=kernel)
        fitted = head.fit(support, labels, sample_weight=sample_weight)
        assert close(fitted(query), torch.from_numpy(reference.predict(query.numpy()))) < 1e-9
        assert close(query @ fitted.weight.mT + fitted.bias, fitted(query)) < 1e-9 if kernel is None else True


def value_of(head, support, labels, weight, prior, C, W, b):
    """The objective of the primal problem."""
    y = torch.nn.functional.one_hot(labels).to(W.dtype)
    scores = support @ W.mT + b
    own = (y * scores).sum(-1, keepdim=True)
    losses = {
        SVMHead: (1 - y + scores - own).amax(-1),
        WestonWatkinsSVMHead: ((1 - y) * (2 - own + scores).clamp_min(0)).sum(-1),
        OneVsRestSVMHead: (1 - (2 * y - 1) * scores).clamp_min(0).sum(-1),
        SimplifiedSVMHead: (1 - ((y - (1 - y) / (y.shape[-1] - 1)) * scores).sum(-1)).clamp_min(0),
    }
    return (W - prior).square().sum() / 2 + C * weight @ losses[head]


def primal_of(head, x, labels, weight, prior, C, intercept):
    """The weights and biases of the primal problem, by CVXPY."""
    n, d = x.shape
    k = int(labels.max()) + 1
    W, b = cp.Variable((k, d)), cp.Variable((1, k))
    y = np.eye(k)[labels]
    scores = x @ W.T + np.ones((n, 1)) @ b if intercept else x @ W.T
    own = cp.sum(cp.multiply(y, scores), axis=1, keepdims=True) @ np.ones((1, k))
    if head is SVMHead:
        losses = cp.max(1 - y + scores - own, axis=1)
    elif head is WestonWatkinsSVMHead:
        losses = cp.sum(cp.multiply(1 - y, cp.pos(2 - own + scores)), axis=1)
    elif head is OneVsRestSVMHead:
        losses = cp.sum(cp.pos(1 - cp.multiply(2 * y - 1, scores)), axis=1)
    else:
        code = y - (1 - y) / (k - 1)
        losses = cp.pos(1 - cp.sum(cp.multiply(code, scores), axis=1))
    objective = cp.sum_squares(W - prior) / 2 + C * weight @ losses
    cp.Problem(cp.Minimize(objective)).solve(solver="CLARABEL", tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    return W.value, (b.value[0] if intercept else np.zeros(k))


@pytest.mark.parametrize("head", [SVMHead, WestonWatkinsSVMHead, OneVsRestSVMHead, SimplifiedSVMHead])
@pytest.mark.parametrize("squared", [False, True], ids=["hinge", "squared hinge"])
def test_weights_and_priors_agree_with_cvxpy(head, squared):
    support, labels, query, ways = task(shots=(4, 6, 3), d=5)
    weight, prior = weights_of(labels), torch.randn(ways, 5, generator=torch.Generator().manual_seed(2)).double()
    if squared:
        # The squared hinge of weight w is the same problem as the squared hinge of weight one at a larger C.
        double = head(0.7, squared_hinge=True).fit(support, labels, sample_weight=torch.full_like(weight, 2.0))
        assert close(double(query), head(1.4, squared_hinge=True)(support, labels, query)) < 1e-6
        return
    for intercept in (False, True):
        for C in (0.7, 1e-3, 20.0):
            W, b = primal_of(head, support.numpy(), labels.numpy(), weight.numpy(), prior.numpy(), C, intercept)
            fitted = head(C, intercept=intercept).fit(support, labels, sample_weight=weight, prior=prior)
            assert close(fitted.weight, torch.from_numpy(W)) < 1e-5
            # Biases are not unique where no coefficient is free.
            objective = partial(value_of, head, support, labels, weight, prior, C)
            assert objective(fitted.weight, fitted.bias) <= objective(*map(torch.from_numpy, (W, b))) * (1 + 1e-7)


def test_priors_of_logistic_and_ridge_regression():
    for sizes in SIZES.values():
        support, labels, query, ways = task(**sizes)
        prior = torch.randn(ways, support.shape[-1], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        assert close(RidgeHead(1e9)(support, labels, query, prior=prior), query @ prior.mT) < 1e-5
        ridge = RidgeHead(0.5).fit(support, labels, prior=prior)
        targets = torch.nn.functional.one_hot(labels, ways).double()
        gradient = 0.5 * (ridge.weight - prior) + (support @ ridge.weight.mT - targets).mT @ support
        assert gradient.abs().max() < 1e-9
        logistic = LogisticHead(0.5).fit(support, labels, prior=prior)
        error = (support @ logistic.weight.mT).softmax(-1) - targets
        assert (0.5 * (logistic.weight - prior) + error.mT @ support).abs().max() < 1e-6


@pytest.mark.parametrize("intercept", [False, True], ids=["through the origin", "intercept"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("sizes", [SIZES["dual"], SIZES["few weights"]], ids=["dual", "few weights"])
def test_gradients_agree_with_central_differences(sizes, head, intercept):
    support, labels, query, ways = task(2, **sizes)
    generator = torch.Generator().manual_seed(5)
    prior = torch.randn(ways, support.shape[-1], generator=generator, dtype=torch.float64)
    mask = torch.ones_like(labels, dtype=torch.bool)
    mask[1, 2:4] = False
    values = [support, query, weights_of(labels), prior]
    directions = [torch.randn(value.shape, generator=generator, dtype=value.dtype) for value in values]
    module = head(Learnable(0.6), intercept=intercept).double()

    def loss(*parts):
        x, q, sample_weight, prior = parts
        logits = module(x, labels, q, ways=ways, mask=mask, sample_weight=sample_weight, prior=prior)
        return logits.softmax(-1).square().sum()

    for value in values:
        value.requires_grad_()
    gradients = torch.autograd.grad(loss(*values), values)
    step = 1e-6
    with torch.no_grad():
        for number, (gradient, direction) in enumerate(zip(gradients, directions, strict=True)):
            moved = [[*values[:number], values[number] + h * direction, *values[number + 1 :]] for h in (step, -step)]
            expected = (loss(*moved[0]) - loss(*moved[1])) / (2 * step)
            assert close((gradient * direction).sum(), expected, scale=1e-3) < 1e-5


@pytest.mark.parametrize("head", HEADS)
def test_a_weight_of_zero_is_a_mask_and_a_weight_of_two_a_copy(head):
    support, labels, query, ways = task(shots=(4, 6, 3), d=20)
    weight = torch.ones_like(labels)
    weight[[0, 5]], weight[7] = 0, 2
    kept = torch.arange(len(labels)).repeat_interleave(weight)
    for kernel in (None, RBF(3.0)):
        expected = head(0.5, kernel=kernel)(support[kept], labels[kept], query)
        assert close(head(0.5, kernel=kernel)(support, labels, query, sample_weight=weight), expected) < 1e-6
    balanced = torch.tensor([len(labels) / (ways * count) for count in (4, 6, 3)], dtype=torch.float64)
    found = head(0.5, class_weight="balanced")(support, labels, query)
    assert close(found, head(0.5)(support, labels, query, sample_weight=balanced[labels])) < 1e-9


@pytest.mark.parametrize("kernel", [None, through_the_dual], ids=["linear", "unknown"])
@pytest.mark.parametrize("size", [1.0, 30.0, 3000.0])
@pytest.mark.parametrize("sizes", [SIZES["few weights"], SIZES["many features"]], ids=["few weights", "many features"])
def test_priors_that_are_far_off_are_corrected_or_refused(sizes, size, kernel):
    """A huge prior saturates all probabilities, so that the intercept has no curvature at the start."""
    support, labels, _, ways = task(**sizes)
    prior = size * torch.randn(ways, support.shape[-1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    head = LogisticHead(1.0, intercept=True, on_failure="return", kernel=kernel)
    fitted = head.fit(support, labels, prior=prior)
    targets = torch.nn.functional.one_hot(labels, ways).double()
    if fitted.solution.converged:
        error = fitted(support).softmax(-1) - targets
        assert error.sum(0).abs().max() < 1e-4
        if kernel is None:
            assert (fitted.weight - prior + error.mT @ support).abs().max() < 1e-3
    else:
        assert size == 3000


def test_slopes_are_balanced():
    """What a dual with an intercept needs, and what it costs, by definition."""
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(4, 30, 5, generator=generator, dtype=torch.float64)
    targets = torch.nn.functional.one_hot(torch.arange(30) % 5, 5).double().expand(4, -1, -1)
    weight = torch.rand(4, 30, generator=generator, dtype=torch.float64)
    for name, loss in LOSSES.items():
        found = loss.evaluate(targets, scores)
        change, cost = loss.balance(scores, found, weight)
        slopes = found.slope + change
        assert (weight.unsqueeze(-1) * slopes).sum(-2).abs().max() < 1e-9
        assert (cost > 0).all()
        if name == "cross-entropy":
            assert change.sum(-1).abs().max() < 1e-12
            p = scores.softmax(-1)
            expected = (weight.unsqueeze(-1) * (p + change) * ((p + change) / p).log()).sum((-2, -1))
            assert close(cost, expected) < 1e-9
            assert (p + change >= 0).all()


def test_tasks_with_different_numbers_of_classes_have_their_own_weights():
    support, labels, query, _ = task(2, shots=(4, 6, 3), d=6)
    labels[1] = labels[1] % 2
    weight, prior = weights_of(labels), torch.randn(3, 6, dtype=torch.float64)
    head = SVMHead(0.5, class_weight="balanced")
    found = head(support, labels, query, ways=[3, 2], sample_weight=weight, prior=prior)
    for number, ways in enumerate((3, 2)):
        one = head(support[number], labels[number], query[number], sample_weight=weight[number], prior=prior[:ways])
        assert close(found[number, :, :ways], one) < 1e-6


def test_unusable_weights_are_named():
    support, labels, query, _ = task()
    for name, value in (
        ("sample_weight", -torch.ones_like(labels)),
        ("sample_weight", torch.full(labels.shape, torch.nan)),
        ("sample_weight", torch.zeros_like(labels)),
        ("sample_weight", torch.ones(3)),
        ("prior", torch.ones(2, support.shape[-1])),
        ("prior", torch.full((3, support.shape[-1]), torch.inf)),
    ):
        with pytest.raises(InputError, match=name):
            SVMHead()(support, labels, query, **{name: value})
    with pytest.raises(InputError, match="sample_weight"):
        PrototypeHead()(support, labels, query, sample_weight=torch.ones_like(labels))
    with pytest.raises(InputError, match="class_weight"):
        SVMHead(class_weight=[1.0, 2.0])(support, labels, query)
    for value in ("other", [1.0, -1.0], {1: 2.0}, 3.0):
        with pytest.raises(InputError, match="class_weight"):
            SVMHead(class_weight=value)


def several_labels(n: int, k: int, seed: int = 3) -> torch.Tensor:
    return torch.rand(n, k, generator=torch.Generator().manual_seed(seed)) < 0.4


@pytest.mark.parametrize("intercept", [False, True], ids=["through the origin", "intercept"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_several_labels_per_example_agree_with_scikit_learn(sizes, intercept):
    support, labels, query, _ = task(**sizes)
    y, weight = several_labels(len(labels), 4), weights_of(labels)
    logistic = LogisticHead(2.0, intercept=intercept).fit(support, y, sample_weight=weight)
    ridge = RidgeHead(2.0, intercept=intercept).fit(support, y, sample_weight=weight)
    for kernel in (None, RBF(3.0)):
        svm = OneVsRestSVMHead(0.5, squared_hinge=True, intercept=intercept, kernel=kernel)
        both = svm.fit(support, y, sample_weight=weight)(query)
        for label in range(4):
            alone = svm.fit(support, y[:, label].long(), ways=2, sample_weight=weight)(query)
            assert close(both[:, label], alone[:, 1]) < 1e-6
    for label in range(4):
        reference = LogisticRegression(C=0.5, fit_intercept=intercept, tol=1e-10, max_iter=100_000)
        reference.fit(support, y[:, label], weight)
        expected = torch.from_numpy(reference.decision_function(query.numpy()))
        assert close(logistic(query)[:, label], expected) < 1e-5
        probability = torch.from_numpy(reference.predict_proba(query.numpy())[:, 1])
        assert close(logistic.probabilities(query)[:, label], probability) < 1e-5
        classifier = Ridge(2.0, fit_intercept=intercept).fit(support, 2.0 * y[:, label] - 1, weight)
        assert close(ridge(query)[:, label], torch.from_numpy(classifier.predict(query.numpy()))) < 1e-8


@pytest.mark.parametrize("head", [RidgeHead, LogisticHead, OneVsRestSVMHead])
def test_gradients_with_several_labels(head):
    for sizes in ({"shots": (4, 5), "d": 12}, {"shots": (60, 55), "d": 4}):
        support, labels, query, _ = task(2, **sizes)
        y = torch.stack([several_labels(labels.shape[1], 3, seed) for seed in range(2)])
        options = {"squared_hinge": True} if head is OneVsRestSVMHead else {}
        module = head(0.5, intercept=True, **options)
        direction = torch.randn(support.shape, generator=torch.Generator().manual_seed(1), dtype=support.dtype)

        def loss(x, module=module, y=y, query=query):
            return module(x, y, query).sigmoid().square().sum()

        support.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(support), support)
        with torch.no_grad():
            expected = (loss(support + 1e-6 * direction) - loss(support - 1e-6 * direction)) / 2e-6
        assert close((gradient * direction).sum(), expected, scale=1e-3) < 1e-5


def test_unusable_matrices_of_labels_are_named():
    support, labels, query, _ = task()
    y = several_labels(len(labels), 4)
    with pytest.raises(InputError, match="labels"):
        SVMHead()(support, y, query)
    with pytest.raises(InputError, match="labels"):
        RidgeHead()(support, y[:-1], query)
    with pytest.raises(InputError, match="ways"):
        RidgeHead()(support, y, query, ways=3)
    with pytest.raises(InputError, match="class_weight"):
        RidgeHead(class_weight="balanced")(support, y, query)


@pytest.mark.parametrize("intercept", [False, True], ids=["through the origin", "intercept"])
@pytest.mark.parametrize("C", [0.3, 300.0])
@pytest.mark.parametrize(
    "sizes",
    [
        {"shots": (700, 600, 500, 400), "d": 60},
        {"shots": (140, 120, 100, 60), "d": 300},
        {"shots": (70, 60, 50, 40), "d": 300},
    ],
    ids=["many examples", "as many examples as features", "many features"],
)
def test_many_examples_of_a_squared_hinge_agree_with_scikit_learn(sizes, C, intercept):
    support, labels, query, ways = task(**sizes)
    weight = weights_of(labels)
    weight[3] = 0
    found = OneVsRestSVMHead(C, squared_hinge=True, intercept=intercept).fit(support, labels, sample_weight=weight)
    assert found.expansion.weight is not None
    assert found.solution.gap < 1e-12
    if C < 1 and not intercept:  # LIBLINEAR does not converge otherwise, or regularizes the intercept
        reference = LinearSVC(C=C, fit_intercept=False, dual=False, tol=1e-10, max_iter=100_000)
        reference.fit(support, labels, weight)
        assert close(found(query), torch.from_numpy(reference.decision_function(query.numpy()))) < 1e-5
    # The optimality conditions.
    signs = 2 * torch.nn.functional.one_hot(labels, ways) - 1
    slack = (1 - signs * found(support)).clamp_min(0)
    slope = -2 * C * weight.unsqueeze(-1) * signs * slack
    assert (found.weight + slope.mT @ support).abs().max() < 1e-7
    if intercept:
        assert slope.sum(0).abs().max() < 1e-7


@pytest.mark.gpu
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_cuda_equals_cpu(head, sizes, cuda):
    support, labels, query, ways = task(2, **sizes)
    generator = torch.Generator().manual_seed(5)
    prior = torch.randn(ways, support.shape[-1], generator=generator, dtype=torch.float64)
    module = head(0.6, intercept=True, class_weight="balanced")
    found = []
    for device in ("cpu", cuda):
        values = [part.to(device).detach().requires_grad_() for part in (support, weights_of(labels), prior)]
        x, weight, W = values
        logits = module(x, labels.to(device), query.to(device), sample_weight=weight, prior=W)
        gradients = torch.autograd.grad(logits.softmax(-1).square().sum(), values)
        found.append([part.cpu() for part in (logits, *gradients)])
    for here, there in zip(*found, strict=True):
        assert close(there, here, scale=1e-3) < 1e-5
