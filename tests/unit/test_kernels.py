"""Kernels: the classes of the library, their sums and products, and any other callable."""

from __future__ import annotations

import copy

import pytest
import torch
from tasks import close, task
from torch import nn

from convexheads import (
    GaussianProcessHead,
    InputError,
    Learnable,
    LogisticHead,
    MahalanobisHead,
    PrototypeHead,
    RidgeHead,
    RidgeRegressionHead,
    SVMHead,
)
from convexheads.kernels import RBF, Constant, Cosine, Kernel, Linear, Polynomial, Sum, UnitScale

pytestmark = pytest.mark.usefixtures("unchecked")


def test_sums_and_products_of_kernels():
    x, y = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
    linear, rbf = Linear()(x, y), RBF(2.0)(x, y)
    torch.testing.assert_close((Linear() + RBF(2.0))(x, y), linear + rbf)
    torch.testing.assert_close(sum([Linear(), RBF(2.0)])(x, y), linear + rbf)
    torch.testing.assert_close((Linear() * RBF(2.0))(x, y), linear * rbf)
    torch.testing.assert_close((0.5 * Linear() + Constant(3.0))(x, y), linear / 2 + 3)
    torch.testing.assert_close(((lambda x, y: x @ y.mT) + RBF(2.0) * Learnable(2.0))(x, y), linear + 2 * rbf)
    kernel = Learnable(2.0) * Linear() + RBF(Learnable(3.0))
    assert len(list(kernel.parameters())) == 2
    assert len(list(copy.deepcopy(kernel).parameters())) == 2
    torch.testing.assert_close((Linear() + 2.0)(x, y), linear + 2)
    with pytest.raises(InputError, match=r"value: expected a positive.*, got -3"):
        Linear() + -3
    with pytest.raises(InputError, match=r"kernels: expected .*, got 3"):
        Sum(Linear(), 3)


def test_cosine_of_a_zero_vector():
    x = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    gram = Cosine()(x, torch.eye(3, dtype=torch.float64))
    gram.sum().backward()
    assert (gram == 0).all()
    assert (x.grad == 0).all()


@pytest.mark.parametrize("shots", [(2, 1, 2), (6, 8, 7)], ids=["few examples", "more than features"])
def test_a_subclass_of_the_linear_kernel_is_itself(shots):
    """Ridge regression takes a short cut for the linear kernel with few features, which a subclass may not be."""

    class Shifted(Linear):
        def forward(self, x, y):
            return x @ y.mT + 3

    support, labels, query, _ = task(2, shots=shots, d=4)
    expected = lambda x, y: x @ y.mT + 3  # noqa: E731
    assert (
        close(RidgeHead(kernel=Shifted())(support, labels, query), RidgeHead(kernel=expected)(support, labels, query))
        < 1e-12
    )
    targets = labels.double()
    found = RidgeRegressionHead(kernel=Shifted())(support, targets, query)
    assert close(found, RidgeRegressionHead(kernel=expected)(support, targets, query)) < 1e-12


class MeanLength:
    """A kernel of nobody's class, in units of the support's mean squared length."""

    def __call__(self, x, y):
        return x @ y.mT

    def condition_on(self, features, mask):
        lengths = features.square().sum(-1)
        used = torch.ones_like(lengths) if mask is None else mask
        unit = ((lengths * used).sum(-1) / used.sum(-1))[..., None, None]
        return lambda x, y: x @ y.mT / unit


@pytest.mark.parametrize("combine", [lambda kernel: kernel, lambda kernel: Sum(kernel, Constant(0.5))])
def test_any_kernel_may_take_something_from_the_support(combine):
    support, labels, query, _ = task(3)
    mask = torch.ones_like(labels, dtype=torch.bool)
    mask[0, 0] = False
    head = SVMHead(kernel=combine(MeanLength()))
    logits = head(support, labels, query, mask=mask)
    torch.testing.assert_close(head(100 * support, labels, 100 * query, mask=mask), logits)
    used = support[0, mask[0]]
    length = used.square().sum(-1).mean().sqrt()
    alone = SVMHead(kernel=combine(Linear()))(used / length, labels[0, mask[0]], query[0] / length)
    torch.testing.assert_close(logits[0], alone)


@pytest.mark.parametrize("queries", [3, 4])
@pytest.mark.parametrize("head", [PrototypeHead, MahalanobisHead, GaussianProcessHead])
def test_parameters_per_task_apply_to_the_queries_of_that_task(head, queries):
    support, labels, query, _ = task(3, shots=(3, 3, 3), queries=queries)
    support = support * torch.tensor([1.0, 2.0, 5.0])[:, None, None]

    def score(x, y, q):
        fitted = head(kernel=MeanLength()).fit(x, y.double() if head is GaussianProcessHead else y)
        return fitted.variance(q) if head is GaussianProcessHead else fitted(q)

    alone = torch.stack([score(*one) for one in zip(support, labels, query, strict=True)])
    torch.testing.assert_close(score(support, labels, query), alone)


def test_a_kernel_without_a_formula_says_so():
    class Empty(Kernel):
        pass

    with pytest.raises(NotImplementedError, match="Empty"):
        Empty()(torch.eye(2), torch.eye(2))


def test_an_unusable_condition_on_is_refused():
    kernel = Polynomial()
    kernel.condition_on = 3
    for make in (lambda: SVMHead(kernel=kernel), lambda: kernel + Linear()):
        with pytest.raises(InputError, match=r"expected a method condition_on.*, got 3"):
            make()


def test_all_parts_of_a_sum_are_its_modules():
    module = nn.Bilinear(3, 3, 1)
    kernel = (lambda x, y: x @ y.mT) + RBF(Learnable(2.0)) + Sum(module, Polynomial(offset=Learnable(1.0)))
    assert len(list(kernel.parameters())) == 4
    assert {parameter.dtype for parameter in copy.deepcopy(kernel).double().parameters()} == {torch.float64}


@pytest.mark.parametrize("combine", [lambda part: Linear() + part, lambda part: Linear() * part])
@pytest.mark.parametrize("part", [lambda x, y: (x @ y.mT).float(), lambda x, y: x @ x.mT, lambda x, y: None])
def test_every_part_has_to_be_a_gram_matrix(combine, part):
    support, labels, query, _ = task()
    with pytest.raises(InputError, match=r"kernel: expected .*, got "):
        RidgeHead(kernel=combine(part))(support, labels, query)


@pytest.mark.parametrize("head", [SVMHead(30.0, smoothing=0.3), RidgeHead(0.1), LogisticHead(0.1)], ids=repr)
def test_in_unit_scale_the_size_of_features_has_no_effect(head):
    support, labels, query, _ = task(3, shots=(3, 2, 3))
    mask = torch.ones_like(labels, dtype=torch.bool)
    mask[1, 2] = False
    head.kernel = UnitScale()
    expected = head(support, labels, query, mask=mask)
    size = torch.tensor([1e-3, 1.0, 1e4], dtype=torch.float64)[:, None, None]
    assert close(head(size * support, labels, size * query, mask=mask), expected) < 1e-9
    lengths = support.square().sum(-1)
    unit = ((lengths * mask).sum(-1) / mask.sum(-1)).sqrt()[:, None, None]
    head.kernel = Linear()
    assert close(head(support / unit, labels, query / unit, mask=mask), expected) < 1e-9


def test_a_kernel_without_scale_stays_as_it_is():
    support, labels, query, _ = task(2)
    head = RidgeHead(kernel=UnitScale())
    assert (head(0 * support, labels, query) == 0).all()


class Deep(torch.nn.Module):
    """A kernel with weights, as people write it."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(12, 5)

    def forward(self, x, y):
        return self.layer(x) @ self.layer(y).mT


def test_kernel_of_another_dtype():
    """PyTorch's own error does not say what to do."""
    support, labels, query, _ = task()
    head = RidgeHead(kernel=Deep())
    with pytest.raises(InputError, match=r"kernel: expected parameters of torch.float64, got torch.float32; .*double"):
        head(support, labels, query)
    assert head.double()(support, labels, query).isfinite().all()


def test_other_errors_of_a_kernel_are_its_own():
    support, labels, query, _ = task(d=7)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
        RidgeHead(kernel=Deep().double())(support, labels, query)
