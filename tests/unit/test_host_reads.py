"""Heads that do not check their input read nothing from the device of the features, so that a GPU never waits.

Most machines have no GPU, so these tests look for the operations that would read from one.
"""

from __future__ import annotations

import pytest
import torch
from tasks import close, task
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("numba")
from simulated_team import on_this_gpu

from convexheads import (
    GaussianProcessHead,
    LinearDiscriminantHead,
    LogisticHead,
    MahalanobisHead,
    OneVsRestSVMHead,
    PrototypeHead,
    RidgeHead,
    RidgeRegressionHead,
    SimplifiedSVMHead,
    SolverError,
    SVMHead,
    WestonWatkinsSVMHead,
)
from convexheads.solvers import NativeSolver

READING = {"_local_scalar_dense", "equal", "is_nonzero", "item", "masked_select", "nonzero", "repeat_interleave"}
READING |= {"_linalg_eigh", "_linalg_svd", "_unique2", "bincount", "lift_fresh", "linalg_cholesky", "unique_dim"}
"""Operations that wait for a GPU, or copy a number to it. Indexing with a mask does so too."""


class HostReads(TorchDispatchMode):
    """Collects the names of operations that read from the device of their arguments."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition("::")[2].partition(".")[0]
        has_mask = name.lstrip("_").startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in (*args[1:2], *_flat(args[1:2]))
        )
        if name in READING or has_mask:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def _flat(values):
    return [inner for value in values if isinstance(value, list | tuple) for inner in value]


ON_GPU = {"solver": NativeSolver(backend="cuda", on_failure="return")}
HEADS = {
    "SVM": lambda: SVMHead(validate=False, **ON_GPU),
    "one-vs-rest": lambda: OneVsRestSVMHead(validate=False, **ON_GPU),
    "Weston-Watkins": lambda: WestonWatkinsSVMHead(validate=False, **ON_GPU),
    "simplified": lambda: SimplifiedSVMHead(validate=False, **ON_GPU),
    "ridge": lambda: RidgeHead(validate=False),
    "logistic": lambda: LogisticHead(validate=False, steps=5, on_failure="return"),
    "prototypes": lambda: PrototypeHead(validate=False),
    "discriminant": lambda: LinearDiscriminantHead(validate=False),
    "Mahalanobis": lambda: MahalanobisHead(validate=False),
}


def outcome(head, support, labels, query):
    support, query = (value.clone().requires_grad_() for value in (support, query))
    logits = head(support, labels, query, ways=3)
    logits.logsumexp(-1).sum().backward()
    return logits.detach(), support.grad, query.grad


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_forward_and_backward_pass_read_nothing(head):
    support, labels, query, _ = task(4, shots=(2, 3, 2))
    with on_this_gpu(), HostReads() as reads:
        found = outcome(head(), support, labels, query)
    assert reads.found == []
    expected = outcome(head(), support, labels, query)
    for one, other in zip(found, expected, strict=True):
        assert close(one, other) < 1e-8


def test_reads_are_found():
    """Or the test above would show nothing."""
    values = torch.randn(3, dtype=torch.float64)
    for read in (
        lambda: values.sum().item(),
        lambda: bool((values > 0).any()),
        lambda: values[values > 0],
        lambda: values.index_put((values > 0,), values[:1]),
        lambda: (values > 0).nonzero(),
        lambda: torch.tensor(3.0),
    ):
        with HostReads() as reads:
            read()
        assert reads.found


def test_failed_task_is_reported_when_somebody_looks():
    """It does not disturb its neighbors, and its gradient is zero if it is not part of the loss."""
    support, labels, query, _ = task(3, shots=(2, 3, 2))
    support[1, 0, 0] = torch.nan
    head = HEADS["SVM"]()
    with on_this_gpu():
        fitted = head.fit(support, labels, ways=3)
    assert fitted.solution.converged.tolist() == [True, False, True]
    with pytest.raises(SolverError, match="1 of 3 tasks") as caught:
        fitted.solution.check()
    assert caught.value.solution is fitted.solution
    expected = SVMHead().fit(support[[0, 2]], labels[[0, 2]])(query[[0, 2]])
    assert close(fitted(query)[[0, 2]], expected) < 1e-9
    head.fit(support[:1], labels[:1], ways=3).solution.check()  # no task failed


@pytest.mark.parametrize("head", [GaussianProcessHead(validate=False), RidgeRegressionHead(validate=False)], ids=type)
def test_regression_reads_nothing(head):
    support, _, query, _ = task(4, shots=(2, 3, 2))
    targets = support[..., :2].clone()
    with HostReads() as reads:
        head(support.requires_grad_(), targets, query).sum().backward()
    assert reads.found == []
