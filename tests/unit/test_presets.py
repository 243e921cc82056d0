"""Heads with settings: those of the literature, and those that need no tuning."""

from __future__ import annotations

import pytest
import torch
from tasks import close, task

from convexheads import InputError, RidgeHead
from convexheads.models import (
    metaoptnet_ridge,
    metaoptnet_svm,
    protonet,
    r2d2,
    unit_scale_logistic,
    unit_scale_ridge,
    unit_scale_svm,
)


def test_hyper_parameters():
    assert repr(metaoptnet_svm()) == "SVMHead(C=0.1, scale=Learnable(1.0))"
    assert repr(metaoptnet_svm("reference_code")) == "SVMHead(C=0.1, smoothing=1.0, scale=Learnable(1.0))"
    assert repr(metaoptnet_ridge()) == "RidgeHead(regularization=50.0, scale=Learnable(1.0))"
    assert repr(protonet()) == "PrototypeHead(kernel=Linear(normalize=True), scale=Learnable(1.0))"
    learnt = "RidgeHead(regularization=Learnable(1.0), scale=Learnable(0.0001))"
    assert repr(r2d2()) == learnt
    assert repr(r2d2("reference_code")) == "RidgeHead(regularization=50.0, scale=Learnable(1.0))"


def test_ridge_of_the_reference_code_returns_twice_the_scores():
    support, labels, query, _ = task()
    assert (
        close(metaoptnet_ridge("reference_code")(support, labels, query), 2 * RidgeHead(50.0)(support, labels, query))
        < 1e-6
    )


def test_r2d2_learns_everything():
    support, labels, query, _ = task()
    head = r2d2()
    head(support, labels, query).square().sum().backward()
    assert len(list(head.parameters())) == 2
    assert all(parameter.grad.abs() > 0 for parameter in head.parameters())


@pytest.mark.parametrize("preset", [metaoptnet_svm, metaoptnet_ridge, r2d2])
@pytest.mark.usefixtures("unchecked")
def test_unknown_variant(preset):
    with pytest.raises(InputError, match=r"variant: expected one of paper, reference_code, got 'v2'"):
        preset("v2")


@pytest.mark.parametrize("preset", [unit_scale_svm, unit_scale_ridge, unit_scale_logistic])
def test_the_length_of_the_features_has_no_effect(preset):
    support, labels, query, _ = task(2)
    logits = preset()(support, labels, query)
    assert logits.std() > 0.1
    for factor in (1e-3, 1e3):
        torch.testing.assert_close(preset()(factor * support, labels, factor * query), logits, rtol=1e-6, atol=1e-8)
    assert [name for name, _ in preset().named_parameters()] == ["scale.raw_value"]
