"""Gram matrices by compiled code: the same as those of PyTorch, and only where nobody misses PyTorch's operations."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tasks import examples
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

pytest.importorskip("numba")

from convexheads import InputError, Learnable, RidgeHead, SVMHead
from convexheads.heads import SupportSet
from convexheads.heads.base import _gram_numba, support_set
from convexheads.kernels import RBF, Constant, Linear, UnitScale, condition

FEATURES = torch.randn(3, 2, 5, 7, dtype=torch.float64)


@pytest.fixture
def kernel(monkeypatch):
    """The compiled code, which is called for the smallest tasks too."""
    monkeypatch.setattr(support_set, "_MIN_OPERATIONS_TO_COMPILE", 1)
    with patch.object(_gram_numba, "gram_of", wraps=_gram_numba.gram_of) as called:
        yield called


def support_of(features, kernel=None, **options):
    targets = features.new_zeros(*features.shape[:-1], 2)
    return SupportSet(features, targets, kernel=condition(kernel or Linear(), features, None), **options)


@given(data=st.data())
@examples(30, nightly=300)
def test_matrices_of_all_sizes(data):
    limits = {"tasks": 3, "n": 9, "d": 40}
    tasks, n, d = (data.draw(st.integers(1, limit), label=name) for name, limit in limits.items())
    features = torch.randn(tasks, n, d, dtype=torch.float64)
    gram = _gram_numba.gram_of(features)
    torch.testing.assert_close(gram, features @ features.mT, rtol=1e-12, atol=1e-12)
    assert torch.equal(gram, gram.mT)


@pytest.mark.parametrize("batch", [(), (3,), (3, 2)], ids=str)
@pytest.mark.parametrize(
    "make",
    [Linear, lambda: Linear(normalize=True), lambda: 2.0 * Linear() + Constant(Learnable(0.6)), UnitScale],
    ids=["plain", "mean", "affine", "unit scale"],
)
def test_kernels_that_are_linear_up_to_a_constant(make, batch, kernel):
    features = FEATURES[(0,) * (2 - len(batch))]
    support = support_of(features, make())
    with torch.no_grad():
        torch.testing.assert_close(support.gram, support.kernel(features, features))
    assert kernel.called


def test_learned_parameters_of_a_kernel_get_their_gradient(kernel):
    made = Learnable(0.5) * Linear() + Learnable(2.0)
    support_of(FEATURES, made).gram.sum().backward()
    assert kernel.called
    found = [parameter.grad.clone() for parameter in made.parameters()]
    made.zero_grad()
    made(FEATURES, FEATURES).sum().backward()
    torch.testing.assert_close(found, [parameter.grad for parameter in made.parameters()])


def test_many_episodes_of_cached_features_use_it():
    features, labels = torch.randn(100, 25, 640), torch.arange(5).repeat(5).expand(100, -1)
    with torch.no_grad(), patch.object(_gram_numba, "gram_of", wraps=_gram_numba.gram_of) as called:
        RidgeHead().fit(features, labels, ways=5)
    assert called.called


@pytest.mark.parametrize("reason", ["gradient", "RBF", "float32", "many examples", "shared", "no Numba", "vmap"])
def test_otherwise_pytorch_computes_them(reason, kernel, monkeypatch):
    features, made = FEATURES[0], RBF() if reason == "RBF" else Linear()
    if reason == "gradient":
        features = features.clone().requires_grad_()
    elif reason == "float32":
        features = features.float()
    elif reason == "many examples":
        features = torch.randn(2, 129, 7, dtype=torch.float64)
    elif reason == "shared":
        features = features[:1].expand(2, -1, -1)
    elif reason == "no Numba":
        monkeypatch.setattr(support_set, "numba_is_installed", lambda: False)

    def gram(features):
        return support_of(features, made).gram

    found = torch.vmap(gram)(features) if reason == "vmap" else gram(features)
    assert not kernel.called
    torch.testing.assert_close(found, made(features, features))


@pytest.mark.filterwarnings("ignore")  # `torch.jit.trace` is deprecated
def test_recorded_graphs_contain_the_product(kernel):
    """Compiled code would be a constant in them."""

    def gram(features):
        return support_of(features, validate=False).gram

    first, second = FEATURES[0], FEATURES[1]
    for recorded in (make_fx(gram)(first), torch.jit.trace(gram, (first,), check_trace=False)):
        torch.testing.assert_close(recorded(second), second @ second.mT)
    with FakeTensorMode():
        assert gram(torch.empty(2, 5, 7, dtype=torch.float64)).shape == (2, 5, 5)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(first, second)
        tangent = torch.autograd.forward_ad.unpack_dual(gram(dual)).tangent
    torch.testing.assert_close(tangent, first @ second.mT + second @ first.mT)
    assert not kernel.called


def test_features_that_are_too_large_are_an_error(kernel):
    features, labels = FEATURES[0].clone(), torch.arange(5) % 2
    features[1, 3] = 1e200
    with torch.no_grad(), pytest.raises(InputError, match=r"kernel.*task \(1,\)"):
        SVMHead().fit(features, labels)
    assert kernel.called
