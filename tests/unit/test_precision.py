"""Results have at least float32, so that features of low precision do not overflow."""

from __future__ import annotations

import pytest
import torch

from convexheads import (
    GaussianProcessHead,
    InputError,
    LinearDiscriminantHead,
    MahalanobisHead,
    PrototypeHead,
    RidgeHead,
    RidgeRegressionHead,
    SVMHead,
    evaluate,
    use_float32,
)

HEADS = [PrototypeHead, RidgeHead, SVMHead, MahalanobisHead, LinearDiscriminantHead]


def clusters():
    """Features whose squared distances exceed the largest number of float16."""
    generator = torch.Generator().manual_seed(0)
    centers = 20 * torch.randn(5, 640, generator=generator)
    labels = torch.arange(200) % 5
    return centers[labels] + 10 * torch.randn(200, 640, generator=generator), labels


@pytest.mark.parametrize("make", HEADS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_distances_do_not_overflow(make, dtype):
    features, labels = clusters()
    logits = make()(features[:25].to(dtype), labels[:25], features[25:].to(dtype))
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()
    assert (logits.argmax(-1) == labels[25:]).all()
    result = evaluate(make(), features.to(dtype), labels, episodes=20, progress=False)
    assert result.accuracy == 1


def test_float32_is_used_until_the_end_of_the_block_or_from_now_on():
    features, labels = clusters()

    def dtype():
        return RidgeHead().fit(features[:25], labels[:25]).expansion.coef.dtype

    with use_float32():
        assert dtype() == torch.float32
        with use_float32(False):
            assert dtype() == torch.float64
        assert dtype() == torch.float32
    assert dtype() == torch.float64
    try:
        use_float32()
        assert dtype() == torch.float32
    finally:
        use_float32(False)
    assert dtype() == torch.float64
    with pytest.raises(InputError, match="enabled"):
        use_float32(1)
    assert dtype() == torch.float64
    with pytest.raises(ZeroDivisionError), use_float32():
        _ = 1 / 0
    assert dtype() == torch.float64


def test_losses_of_float16_features_are_finite():
    features, labels = clusters()
    support = features[:25].half().requires_grad_()
    loss = torch.nn.functional.cross_entropy(
        PrototypeHead(scale=1e-3)(support, labels[:25], features[25:].half()), labels[25:]
    )
    (gradient,) = torch.autograd.grad(loss, support)
    assert loss.isfinite()
    assert gradient.dtype == torch.float16
    assert gradient.isfinite().all()


def test_predictions_and_likelihoods_do_not_overflow():
    features, labels = clusters()
    targets = 1e4 * labels.float()
    for head in (RidgeRegressionHead(), GaussianProcessHead()):
        fitted = head.fit(features[:100].half(), targets[:100].half())
        assert fitted(features[100:].half()).isfinite().all()
    likelihood = GaussianProcessHead().fit(features[:100].half(), targets[:100].half()).log_marginal_likelihood
    value = likelihood()
    assert value.dtype == torch.float32
    assert value.isfinite().all()
