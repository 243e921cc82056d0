"""Unusual tensors, kernels and sizes of numbers give the right result or a clear error."""

from __future__ import annotations

import warnings

import pytest
import torch
from tasks import close, task

from convexheads import (
    InputError,
    LinearDiscriminantHead,
    LogisticHead,
    MahalanobisHead,
    OneVsRestSVMHead,
    PrototypeHead,
    RidgeHead,
    SimplifiedSVMHead,
    SVMHead,
    evaluate,
    split_task,
)
from convexheads.kernels import RBF, Cosine

HEADS = [
    LinearDiscriminantHead,
    LogisticHead,
    MahalanobisHead,
    OneVsRestSVMHead,
    PrototypeHead,
    RidgeHead,
    SVMHead,
    SimplifiedSVMHead,
]
heads = pytest.mark.parametrize("make", HEADS)


def nested():
    return torch.nested.nested_tensor([torch.randn(2, 3)] * 2)


def masked():
    from torch.masked import masked_tensor

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return masked_tensor(torch.randn(2, 3), torch.ones(2, 3, dtype=torch.bool))


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.randn(2, 3), 0.1, 0, torch.qint8)


def meta():
    return torch.randn(2, 3, device="meta")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("unusual", [nested, masked, quantized, meta])
def test_unusual_tensors_are_refused(unusual):
    value, usual, labels = unusual(), torch.randn(2, 3), torch.tensor([0, 1])
    name = unusual.__name__
    with pytest.raises(InputError, match=f"support: .*{name}"):
        SVMHead()(value, labels, usual)
    with pytest.raises(InputError, match=f"query: .*{name}"):
        RidgeHead(validate=False)(usual, labels, value, ways=2)
    with pytest.raises(InputError, match="labels"):
        SVMHead()(usual, value, usual)
    with pytest.raises(InputError, match="features"):
        evaluate(RidgeHead(), value, labels, progress=False)
    with pytest.raises(InputError, match="data"):
        split_task(value, labels, shots=1)


@heads
@pytest.mark.parametrize("change", [torch.Tensor.to_sparse, lambda gram: gram.to("meta")], ids=["sparse", "meta"])
def test_kernels_return_dense_matrices(make, change):
    support, labels, query, _ = task()
    with pytest.raises(InputError, match="kernel"):
        make(kernel=lambda x, y: change(x @ y.mT))(support, labels, query)


@heads
def test_kernels_are_symmetric(make):
    support, labels, query, _ = task()
    upper = torch.triu(torch.ones(support.shape[-1], support.shape[-1], dtype=support.dtype))
    with pytest.raises(InputError, match="kernel: expected a symmetric kernel"):
        make(kernel=lambda x, y: x @ upper @ y.mT + 10 * x @ y.mT)(support, labels, query)


@heads
@pytest.mark.parametrize("sign", [1, -1])
def test_kernels_are_no_distances(make, sign):
    """Ridge regression and others would take them silently."""
    support, labels, query, _ = task()
    head = make(kernel=lambda x, y: sign * torch.cdist(x, y))
    if isinstance(head, PrototypeHead):
        head(support, labels, query)
        return
    with pytest.raises(InputError, match="kernel"):
        head(support, labels, query)


def test_prototypes_of_the_squared_distance_are_ordinary_ones():
    """It differs from the dot product by terms that depend on one argument alone, which cancel."""
    support, labels, query, _ = task()
    logits = PrototypeHead(kernel=lambda x, y: -torch.cdist(x, y).square() / 2)(support, labels, query)
    assert close(logits, PrototypeHead()(support, labels, query)) < 1e-9


@heads
def test_kernels_may_be_zero_for_some_examples(make):
    """And tiny for others, up to rounding."""
    support, labels, query, _ = task()
    support = support.clone()
    support[..., 0, :], support[..., 1, :] = 0, 1e-8 * support[..., 1, :]
    make(kernel=lambda x, y: x @ y.mT)(support, labels, query)


@heads
@pytest.mark.parametrize("kernel", [None, RBF(3.0)], ids=str)
def test_a_fit_shares_no_memory_with_the_caller(make, kernel):
    support, labels, query, ways = task(2)
    mask = torch.ones_like(labels, dtype=torch.bool)
    mask[:, -1] = False
    own = support.clone(), labels.clone(), mask.clone()
    for arguments in ({}, {"mask": own[2]}):
        fitted = make(kernel=kernel).fit(*own[:2], ways=ways, **arguments)
        expected = fitted(query)
        for value in own:
            value.zero_()
        assert torch.equal(fitted(query), expected)
        for value, given in zip(own, (support, labels, mask), strict=True):
            value.copy_(given)


def test_a_fit_shares_no_memory_with_the_prior():
    support, labels, query, ways = task()
    prior = torch.randn(ways, support.shape[-1], dtype=support.dtype)
    fitted = RidgeHead().fit(support, labels, prior=prior)
    expected = fitted(query)
    prior.zero_()
    assert torch.equal(fitted(query), expected)


@pytest.mark.parametrize("size", [1e160, 1e-200])
def test_the_median_heuristic_does_not_depend_on_the_size(size):
    x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(6) % 3
    head = RidgeHead(kernel=RBF())
    assert close(head(size * x, labels, size * x), head(x, labels, x)) < 1e-9


@pytest.mark.parametrize("size", [1e160, 1e-200, 1e-310])
def test_the_cosine_does_not_depend_on_the_size(size):
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert close(Cosine()(size * x, x), Cosine()(x, x)) < 1e-6
    given = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(Cosine()(given, x).square().sum(), given)
    assert torch.autograd.gradcheck(lambda value: Cosine()(value, x), given)
    assert gradient.isfinite().all()
