"""Heads that do not check their input read nothing from the device of the features, so that a GPU never waits.

Most machines have no GPU, so these tests look for the operations that would read from one.
"""

from __future__ import annotations

import pytest
import torch
from tasks import close, crammer_singer, indefinite, task
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("numba")
from simulated_team import on_this_gpu

from convexheads import (
    ConvexHeadsError,
    GaussianProcessHead,
    InputError,
    LinearDiscriminantHead,
    LogisticHead,
    MahalanobisHead,
    OneVsRestSVMHead,
    PrototypeHead,
    RidgeHead,
    RidgeRegressionHead,
    SimplifiedSVMHead,
    SolverError,
    SolverWarning,
    SVMHead,
    WestonWatkinsSVMHead,
    _looks,
)
from convexheads._validation import check_finite
from convexheads.heads.base import fitted
from convexheads.kernels import Linear
from convexheads.solvers import ActiveSetSolver, Fallback, InteriorPointSolver, NativeSolver

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
    "SVM": lambda validate=False: SVMHead(validate=validate, **ON_GPU),
    "class weights": lambda validate=False: SVMHead(validate=validate, class_weight=[0.5, 1.0, 2.0], **ON_GPU),
    "one-vs-rest": lambda validate=False: OneVsRestSVMHead(validate=validate, **ON_GPU),
    "Weston-Watkins": lambda validate=False: WestonWatkinsSVMHead(validate=validate, **ON_GPU),
    "simplified": lambda validate=False: SimplifiedSVMHead(validate=validate, **ON_GPU),
    "ridge": lambda validate=False: RidgeHead(validate=validate),
    "logistic": lambda validate=False: LogisticHead(validate=validate, steps=5, on_failure="return"),
    "prototypes": lambda validate=False: PrototypeHead(validate=validate),
    "discriminant": lambda validate=False: LinearDiscriminantHead(validate=validate),
    "Mahalanobis": lambda validate=False: MahalanobisHead(validate=validate),
}


def outcome(head, support, labels, query):
    support, query = (value.clone().requires_grad_() for value in (support, query))
    logits = head(support, labels, query, ways=3)
    logits.logsumexp(-1).sum().backward()
    return logits.detach(), support.grad, query.grad


@pytest.fixture
def looks(monkeypatch):
    """The numbers of flags that are read together, of each read."""
    numbers, read = [], _looks._read
    monkeypatch.setattr(_looks, "_read", lambda flags: numbers.append(len(flags)) or read(flags))
    return numbers


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_forward_and_backward_pass_read_nothing_or_once(head, validate, looks):
    """With checks, all flags are read at the end of the call, by one copy."""
    support, labels, query, _ = task(4, shots=(2, 3, 2))
    with on_this_gpu(), HostReads() as reads:
        found = outcome(head(validate), support, labels, query)
    assert reads.found == []
    assert len(looks) == validate
    expected = outcome(head(validate), support, labels, query)
    for one, other in zip(found, expected, strict=True):
        assert close(one, other) < 1e-8


def test_backward_pass_of_a_graph_reads_nothing():
    """There, the system is factorized again."""
    support, labels, *_ = task(4, shots=(2, 3, 2))
    problem = crammer_singer(support, labels, 0.3)
    at_upper = torch.rand_like(problem.linear) > 0.5
    active = at_upper, torch.zeros_like(at_upper)
    right = problem.linear.mT, problem.linear[..., 0]
    with on_this_gpu(), HostReads() as reads:
        found = NativeSolver(backend="cuda").factorize(problem, *active).solve(*right, refinements=1)
    assert reads.found == []
    expected = NativeSolver(backend="torch").factorize(problem, *active).solve(*right, refinements=1)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_rows_of_a_table_are_read_once(looks, monkeypatch):
    support, labels, query, _ = task(4, shots=(2, 3, 2))
    found, rows = SVMHead(**ON_GPU).fit(support, labels), torch.arange(16).view(4, 4).flip(0)
    table = query.flatten(0, 1)
    monkeypatch.setattr(fitted, "is_readable", lambda _: False)
    with on_this_gpu(), HostReads() as reads:
        scores = found.score_rows(table, rows)
    assert reads.found == []
    assert len(looks) == 1
    with on_this_gpu(), pytest.raises(InputError, match=r"rows.*task \(1,\)"):
        found.score_rows(table, rows.index_fill(0, torch.tensor(1), -1))
    torch.testing.assert_close(scores, found(table[rows]))


@pytest.mark.parametrize("on_failure", ["raise", "warn", "return"])
def test_solver_with_fallback_is_read_once(on_failure, looks):
    support, labels, query, _ = task(4, shots=(2, 3, 2))
    head = SVMHead(solver=NativeSolver(backend="cuda", on_failure=on_failure))
    with on_this_gpu(), HostReads() as reads:
        outcome(head, support, labels, query)
    assert reads.found == []
    assert len(looks) == 1


BAD = {
    "support": lambda s, y, q: (s.where(torch.arange(4).view(-1, 1, 1) != 2, torch.nan), y, q),
    "label too large": lambda s, y, q: (s, y.where(torch.arange(4).view(-1, 1) != 1, 7), q),
    "negative label": lambda s, y, q: (s, y - 1, q),
    "class without examples": lambda s, y, q: (s, y.clamp_max(1), q),
    "query": lambda s, y, q: (s, y, q / 0),
    "overflow": lambda s, y, q: (1e200 * s, y, 1e200 * q),
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_errors_are_those_of_checks_at_once(head, change):
    support, labels, query = change(*task(4, shots=(2, 3, 2))[:3])
    with pytest.raises(ConvexHeadsError) as expected:
        head(True)(support, labels, query, ways=3)
    with on_this_gpu(), pytest.raises(ConvexHeadsError) as found:
        head(True)(support, labels, query, ways=3)
    assert type(found.value) is type(expected.value)
    assert str(found.value) == str(expected.value)


def test_indefinite_kernel_is_explained():
    """Also where a solver fails, and its failure is noticed after the head has returned."""
    support, labels, query, _ = task(4, shots=(2, 3, 2))
    head = SVMHead(C=10.0, solver=NativeSolver(backend="cuda"), kernel=indefinite)
    with on_this_gpu(), pytest.raises(InputError, match="eigenvalue"):
        head(support, labels, query, ways=3)


@pytest.mark.parametrize("max_rounds", [1, 12])
def test_call_is_repeated_if_the_first_solver_fails(max_rounds, looks, monkeypatch):
    """The assumption that it solves all tasks was then wrong."""
    support, labels, query, _ = task(4, shots=(2, 3, 2))
    numbers, solve = [], InteriorPointSolver.solve_batch

    def counted(solver, problem):
        numbers.append(len(problem.linear))
        return solve(solver, problem)

    monkeypatch.setattr(InteriorPointSolver, "solve_batch", counted)
    first = ActiveSetSolver(backend="cuda", max_rounds=max_rounds)
    head = SVMHead(C=10.0, solver=Fallback(first, InteriorPointSolver()))
    with on_this_gpu():
        logits = head(support, labels, query, ways=3)
    assert len(looks) == 1
    assert bool(numbers) == (max_rounds == 1)
    assert close(logits, SVMHead(C=10.0)(support, labels, query)) < 1e-6


def test_failed_task_warns_once():
    support, labels, query, _ = task(3, shots=(2, 3, 2))
    head = RidgeHead(1e-17, on_failure="warn", kernel=Linear() + 1.0)
    with on_this_gpu(), pytest.warns(SolverWarning) as caught:
        head(support[..., :2].repeat(1, 3, 1), labels.repeat(1, 3), query[..., :2])
    assert len(caught) == 1


def test_nothing_is_left_of_a_call_that_is_interrupted():
    support, labels, query, _ = task(3, shots=(2, 3, 2))

    def interrupted(x, y):
        raise KeyboardInterrupt

    with on_this_gpu():
        with pytest.raises(KeyboardInterrupt):
            RidgeHead(kernel=interrupted)(support, labels, query)
        with pytest.raises(InputError):
            check_finite("gram", torch.full((3, 2, 2), torch.nan))


def test_checks_outside_of_a_call_are_done_at_once():
    """Also after a call that raised an error."""
    support, labels, query, _ = task(3, shots=(2, 3, 2))
    with on_this_gpu():
        with pytest.raises(InputError):
            RidgeHead()(support, labels - 1, query, ways=3)
        with pytest.raises(InputError):  # outside of a call
            check_finite("gram", torch.full((3, 2, 2), torch.nan))
        RidgeHead()(support, labels, query, ways=3)


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
