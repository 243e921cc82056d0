"""The heads of the code that Lee et al. 2019 published, written anew from their quadratic programs.

Each program is solved by qpth, as in that code, but to optimality; scores and gradients have to be ours. The head "WW" is
missing, because qpth refuses its matrix, which is not symmetric.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tasks import close
from torch import Tensor

from convexheads import PrototypeHead, RidgeHead, SimplifiedSVMHead, SVMHead
from convexheads.kernels import Linear
from convexheads.models import metaoptnet_ridge, metaoptnet_svm, protonet, r2d2

pytest.importorskip("qpth")

EPISODES, WAYS, SHOTS, QUERIES, D = 30, 5, 5, 3, 40


def episodes() -> tuple[Tensor, Tensor, Tensor]:
    """Episodes with classes in turn, as in that code: 0, 1, 2, 3, 4, 0, 1, ..."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(EPISODES, 1, WAYS, D, generator=generator, dtype=torch.float64)
    noise = torch.randn(EPISODES, SHOTS + QUERIES, WAYS, D, generator=generator, dtype=torch.float64)
    support, query = ((centers + 2 * noise) / D**0.5).split([SHOTS, QUERIES], 1)
    labels = torch.arange(WAYS).repeat(SHOTS).expand(EPISODES, -1)
    return support.flatten(1, 2), labels, query.flatten(1, 2)


def by_qpth(*program: Tensor) -> Tensor:
    """The minimizer of `z'Qz / 2 + p'z` subject to `Gz <= h` and `Az = b`, with its gradient."""
    from qpth.qp import QPFunction

    return QPFunction(verbose=False, maxIter=40, eps=1e-14)(*program)


def crammer_singer(support: Tensor, own: Tensor, query: Tensor) -> Tensor:
    """SVM-CS with C = 0.1: Eq. 10 with 1 added to the diagonal."""
    n = WAYS * SHOTS
    eye, targets = torch.eye(n * WAYS).to(support), own.flatten(1)
    blocks = torch.einsum("tij,kl->tikjl", support @ support.mT, torch.eye(WAYS).to(support)).reshape(-1, *eye.shape)
    sums = torch.kron(torch.eye(n), torch.ones(1, WAYS)).to(support)
    coef = by_qpth(blocks + eye, -targets, eye, 0.1 * targets, sums, torch.zeros(n).to(support))
    return query @ support.mT @ coef.reshape(-1, n, WAYS)


def ridge(support: Tensor, own: Tensor, query: Tensor) -> Tensor:
    """Ridge with lambda = 50: the program has a linear term of twice the targets, and no constraint."""
    gram = support @ support.mT + 50 * torch.eye(WAYS * SHOTS).to(support)
    return query @ support.mT @ torch.linalg.solve(gram, 2 * own)


def r2d2_head(support: Tensor, own: Tensor, query: Tensor) -> Tensor:
    """R2D2 with lambda = 50: the dual form of the weights."""
    inverse = torch.linalg.inv(support @ support.mT + 50 * torch.eye(WAYS * SHOTS).to(support))
    return query @ (support.mT @ inverse @ own)


def he(support: Tensor, own: Tensor, query: Tensor) -> Tensor:
    """SVM-He with C = 0.01: one variable per example, and a class scored by its own examples alone."""
    n = WAYS * SHOTS
    code = (WAYS * own - 1) / (WAYS - 1)
    eye, one = torch.eye(n).to(support), torch.ones(EPISODES, n).to(support)
    hessian = support @ support.mT * (code @ code.mT) + 1e-12 * eye  # qpth wants a definite matrix
    limits = torch.cat([0.01 * one, 0 * one], 1)
    coef = by_qpth(hessian, -one, torch.cat([eye, -eye]), limits, one.new_empty(0), one.new_empty(0))
    return query @ support.mT @ (coef.unsqueeze(-1) * own)


def prototypes(support: Tensor, own: Tensor, query: Tensor) -> Tensor:
    """ProtoNet: minus the squared distance, divided by the number of features."""
    means = own.mT @ support / SHOTS
    return -(query.unsqueeze(-2) - means.unsqueeze(-3)).square().sum(-1) / D


def own_scores(support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
    """The simplified SVM, with the scores of the published code."""
    coef = SimplifiedSVMHead(C=0.01).fit(support, labels).expansion.coef
    return query @ support.mT @ coef.clamp_min(0)  # the negative ones are those of examples of other classes


PAIRS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "SVM-CS": (crammer_singer, SVMHead(C=0.1, smoothing=1.0)),
    "SVM-CS, preset": (crammer_singer, metaoptnet_svm("reference_code")),
    "Ridge": (ridge, RidgeHead(50.0, scale=2.0)),
    "Ridge, preset": (ridge, metaoptnet_ridge("reference_code")),
    "R2D2": (r2d2_head, r2d2("reference_code")),
    "SVM-He": (he, own_scores),
    "ProtoNet": (prototypes, PrototypeHead(kernel=Linear(normalize=True))),
    "ProtoNet, preset": (prototypes, protonet()),
}


@pytest.mark.parametrize(("published", "head"), PAIRS.values(), ids=PAIRS)
def test_scores_and_gradients_are_those_of_the_published_heads(published, head):
    support, labels, query = episodes()
    own = torch.nn.functional.one_hot(labels, WAYS).double()
    support, query = support.requires_grad_(), query.requires_grad_()
    direction = torch.randn(EPISODES, WAYS * QUERIES, WAYS, dtype=torch.float64)
    expected, found = published(support, own, query), head(support, labels, query)
    assert close(found, expected) < 1e-6
    for one, other in zip(
        torch.autograd.grad((found * direction).sum(), (support, query)),
        torch.autograd.grad((expected * direction).sum(), (support, query)),
        strict=True,
    ):
        assert close(one, other) < 1e-3  # qpth differentiates near the optimum, not at it
