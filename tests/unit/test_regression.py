"""What every regression head promises."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from tasks import close
from torch import nn
from torch.autograd import gradcheck

from convexheads import (
    ClassificationHead,
    GaussianProcessHead,
    Head,
    InputError,
    Learnable,
    RegressionHead,
    RidgeRegressionHead,
    SupportVectorRegressionHead,
    evaluate,
)
from convexheads.kernels import RBF, Constant, Linear
from convexheads.solvers import InteriorPointSolver, Status

HEADS: dict[str, Callable[..., RegressionHead]] = {
    "ridge": lambda **kw: RidgeRegressionHead(Learnable(0.5), **kw),
    "gaussian-process": lambda **kw: GaussianProcessHead(Learnable(0.3), **kw),
    "support-vector": lambda **kw: SupportVectorRegressionHead(Learnable(0.5), epsilon=Learnable(0.1), **kw),
}
heads = pytest.mark.parametrize("make", HEADS.values(), ids=HEADS.keys())
kernels = pytest.mark.parametrize("kernel", [Linear(), RBF(Learnable(2.0)), RBF() + Constant(0.5)], ids=str)


def task(*batch: int, n: int = 7, q: int = 4, d: int = 3, outputs: tuple[int, ...] = (), dtype=torch.float64):
    return (
        torch.randn(*batch, n, d, dtype=dtype),
        torch.randn(*batch, n, *outputs, dtype=dtype),
        torch.randn(*batch, q, d, dtype=dtype),
    )


@heads
@kernels
@pytest.mark.parametrize("outputs", [(), (1,), (2,)], ids=str)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)], ids=str)
def test_shapes_and_dtype(make, kernel, batch, outputs):
    support, targets, query = task(*batch, outputs=outputs, dtype=torch.float32)
    values = make(kernel=kernel)(support, targets, query)
    assert values.shape == (*batch, 4, *outputs)
    assert values.dtype == torch.float32


@heads
@kernels
def test_batch_equals_loop_and_mask_equals_leaving_out(make, kernel):
    support, targets, query = task(3, outputs=(2,))
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[0, 6] = mask[2, 1] = mask[2, 3] = False
    head, hidden, blank = make(kernel=kernel), support.clone(), targets.clone()
    hidden[~mask] = torch.nan
    blank[~mask] = torch.nan
    hidden.requires_grad_()
    values = head(hidden, blank, query, mask=mask)
    (gradient,) = torch.autograd.grad(values.square().sum(), hidden)
    for i in range(3):
        kept = support[i, mask[i]].requires_grad_()
        alone = head(kept, targets[i, mask[i]], query[i])
        torch.testing.assert_close(values[i], alone, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(
            gradient[i, mask[i]], torch.autograd.grad(alone.square().sum(), kept)[0], rtol=1e-6, atol=1e-8
        )


@heads
@kernels
def test_order_of_support_does_not_matter(make, kernel):
    support, targets, query = task()
    order = torch.randperm(7)
    shuffled = make(kernel=kernel)(support[order], targets[order], query)
    torch.testing.assert_close(shuffled, make(kernel=kernel)(support, targets, query), rtol=1e-7, atol=1e-9)


@heads
@pytest.mark.parametrize("spoil", [lambda x: 0 * x, lambda x: x[:1].expand_as(x).clone(), lambda x: 1e4 * x])
def test_degenerate_task_leaves_its_neighbours_alone(make, spoil):
    support, targets, query = task(3)
    support[1] = spoil(support[1])
    support.requires_grad_()
    values = make()(support, targets, query)
    (gradient,) = torch.autograd.grad(values.square().sum(), support)
    assert torch.isfinite(values).all()
    assert torch.isfinite(gradient).all()
    for i in (0, 2):
        torch.testing.assert_close(values[i], make()(support[i], targets[i], query[i]), rtol=1e-7, atol=1e-9)


@heads
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
def test_low_precision_features(make, dtype, tolerance):
    support, targets, query = (x.to(dtype) for x in task(2))
    values = make()(support, targets, query)
    assert values.dtype == torch.float32
    assert close(values.double(), make()(support.double(), targets.double(), query.double())) < tolerance


@heads
@kernels
@pytest.mark.usefixtures("unchecked")
def test_gradcheck(make, kernel):
    support, targets, query = task(n=5, q=2)
    head = make(kernel=kernel).double()
    names, parameters = zip(*head.named_parameters(), strict=True)

    def values(support, targets, query, *given):
        return torch.func.functional_call(head, dict(zip(names, given, strict=True)), (support, targets, query))

    inputs = [x.detach().requires_grad_() for x in (support, targets, query, *parameters)]
    assert gradcheck(values, inputs, eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=True)


@pytest.mark.usefixtures("unchecked")
def test_variance_and_likelihood():
    support, targets, query = task(2, n=5, q=3)
    head = GaussianProcessHead(0.2, kernel=RBF(Learnable(1.5)))
    assert gradcheck(lambda s, q: head.fit(s, targets).variance(q), [support.requires_grad_(), query.requires_grad_()])
    assert gradcheck(lambda s, t: head.fit(s, t).log_marginal_likelihood(), [support, targets.requires_grad_()])
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    fitted, alone = head.fit(support, targets, mask=mask), head.fit(support[1, :3], targets[1, :3])
    torch.testing.assert_close(fitted.variance(query)[1], alone.variance(query[1]))
    torch.testing.assert_close(fitted.log_marginal_likelihood()[1], alone.log_marginal_likelihood())
    assert (fitted.variance(support)[0] < 0.2).all()
    assert (fitted.variance(100 + query) > 0.99).all()


def test_median_width_is_that_of_each_task():
    support, targets, query = task(2)
    support[1] *= 30
    head = GaussianProcessHead()
    assert head.fit(support, targets).variance(query).shape == (2, 4)
    for i in range(2):
        width = torch.pdist(support[i]).median().item()
        expected = GaussianProcessHead(kernel=RBF(width))(support[i], targets[i], query[i])
        torch.testing.assert_close(head(support, targets, query)[i], expected)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, t: (s, t.long()), r"targets: expected .*floating-point.*, got a tensor of torch.int64"),
        (lambda s, t: (s, t[:, :-1]), r"targets: expected .*\(2, 7\), got shape \(2, 6\)"),
        (lambda s, t: (s, t.masked_fill(t == t, torch.inf)), r"targets: expected .*, got non-finite values"),
    ],
)
def test_bad_input(change, message):
    support, targets, query = task(2)
    with pytest.raises(InputError, match=message):
        RidgeRegressionHead()(*change(support, targets), query)


@pytest.mark.usefixtures("unchecked")
def test_predictions_are_in_the_units_of_the_targets():
    """A scale of the mean alone would contradict the variance, and no constructor takes one."""
    support, targets, query = torch.randn(6, 3), torch.randn(6), torch.randn(4, 3)
    head = GaussianProcessHead()
    expected = head(support, targets, query)
    head.scale = 3.0
    assert torch.equal(head(support, targets, query), expected)


@pytest.mark.usefixtures("unchecked")
def test_regression_is_no_classification():
    support, targets, _ = task()
    assert not hasattr(RidgeRegressionHead().fit(support, targets), "probabilities")
    assert isinstance(RidgeRegressionHead(), Head)
    assert not isinstance(RidgeRegressionHead(), ClassificationHead)
    with pytest.raises(
        InputError, match=r"head: expected a classification head of convexheads.*, got RidgeRegressionHead"
    ):
        evaluate(RidgeRegressionHead(), torch.randn(40, 3), torch.arange(40) % 2, ways=2, shots=1, queries=2)


def sinusoids(tasks: int, points: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The task distribution of Finn et al. (2017): amplitude 0.1 to 5, phase 0 to pi, inputs in -5 to 5."""
    amplitude, phase = 0.1 + 4.9 * torch.rand(tasks, 1), math.pi * torch.rand(tasks, 1)
    x = 10 * torch.rand(tasks, points) - 5
    return x.unsqueeze(-1), amplitude * (x - phase).sin()


def test_stopped_early_where_nothing_is_to_be_learnt():
    """All targets within epsilon: the objective is zero, and a gap relative to that is still a number."""
    for support in (torch.tensor([[1.5]]), torch.randn(4, 6)):
        head = SupportVectorRegressionHead(1.0, epsilon=1.0, solver=InteriorPointSolver(max_iterations=1))
        solution = head.fit(support.double(), torch.full((len(support),), 0.4, dtype=torch.float64)).solution
        assert (solution.status == Status.STOPPED).all()
        assert solution.gap.isfinite().all()


@pytest.mark.slow
@heads
def test_sinusoids_are_learnt(make):
    """Features that 300 steps through the head have learnt predict unseen sinusoids from ten points."""
    network = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh())
    head = make(kernel=Linear())
    optimizer = torch.optim.Adam([*network.parameters(), *head.parameters()], lr=5e-3)

    def error() -> torch.Tensor:
        x, y = sinusoids(64, 20)
        features = network(x)
        return (head(features[:, :10], y[:, :10], features[:, 10:]) - y[:, 10:]).square().mean()

    before = error().item()
    for _ in range(300):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    with torch.no_grad():
        after = sum(error().item() for _ in range(10)) / 10
    assert after < 0.25
    assert after < before / 5
