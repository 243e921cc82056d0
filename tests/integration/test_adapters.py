"""Each known fault of qpth and cvxpylayers, and that the adapters keep it from the caller."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from functools import partial

import pytest
import torch
from qpth.qp import QPFunction
from tasks import close, crammer_singer, task

from convexheads import ConvexHeadsError, Learnable, SVMHead, WestonWatkinsSVMHead
from convexheads.solvers import CvxpylayersSolver, InteriorPointSolver, NativeSolver, QpthSolver, to_dense
from convexheads.solvers.adapters.cvxpylayers import _layer

adapters = pytest.mark.parametrize("solver", [QpthSolver, CvxpylayersSolver])


def test_qpth_itself_averages_the_gradient_of_a_shared_parameter():
    """The fault, so that the next test is known to test something."""
    Q, G, h = torch.eye(1).double(), torch.eye(1).double(), torch.ones(1, dtype=torch.float64, requires_grad=True)
    p = torch.full((4, 1), -5.0, dtype=torch.float64)
    nothing = torch.empty(0, dtype=torch.float64)
    solution = QPFunction(verbose=-1)(Q, p, G, h, nothing, nothing)  # each task's solution is h
    (gradient,) = torch.autograd.grad(solution.sum(), h)
    assert gradient.item() == pytest.approx(1, rel=1e-3)  # and not 4


@adapters
def test_shared_parameters_get_the_sum_of_their_gradients(solver):
    support, labels, query, _ = task(4, shots=(2, 2, 2))

    def gradient(solver):
        head = SVMHead(C=Learnable(0.05), solver=solver)
        head(support, labels, query)[..., 0].sum().backward()
        return head.C.raw_value.grad

    assert gradient(NativeSolver()).abs() > 0.01
    torch.testing.assert_close(gradient(solver()), gradient(NativeSolver()), rtol=1e-3, atol=1e-6)


@adapters
def test_a_second_derivative_is_refused(solver):
    support, labels, query, _ = task()
    support.requires_grad_()
    logits = SVMHead(solver=solver())(support, labels, query)
    (gradient,) = torch.autograd.grad(logits.square().sum(), support, create_graph=True)
    with pytest.raises(ConvexHeadsError, match=f"second derivative.*NativeSolver.*{solver.__name__}"):
        gradient.square().sum().backward()


def test_qpth_itself_gets_the_second_derivative_wrong():
    """The fault behind the refusal."""
    support, labels, _, _ = task(shots=(2, 2))
    along = torch.randn_like(support)

    def first(t, solve):
        qp = crammer_singer(support + t * along, labels, C=0.5)
        (gradient,) = torch.autograd.grad(solve(qp).square().sum(), t, create_graph=True)
        return gradient

    def qpth(qp):
        return QPFunction(verbose=-1)(*(x.unsqueeze(0) for x in to_dense(qp)))

    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    step = torch.tensor(1e-4, dtype=torch.float64)
    numeric = (first(t + step, qpth) - first(t - step, qpth)) / (2 * step)
    (silent,) = torch.autograd.grad(first(t, qpth), t)
    (ours,) = torch.autograd.grad(first(t, lambda qp: NativeSolver().solve(qp).coef), t)
    assert abs(silent - numeric) > 1e-2 * abs(numeric)
    assert abs(ours - numeric) < 1e-3 * abs(numeric)


@pytest.mark.slow
@pytest.mark.parametrize("shots", [10, 15])
def test_batches_on_several_threads_do_not_hang(shots):
    """5-way 10-shot through qpth hangs in torch's batched LU: in a process of its own, that a time limit can end."""
    script = f"""
        import torch
        from convexheads import SVMHead
        from convexheads.solvers import NativeSolver
        from convexheads.solvers import QpthSolver
        torch.set_num_threads(2)
        labels = torch.arange(5).repeat({shots}).expand(2, -1)
        support = torch.randn(2, {5 * shots}, 640, dtype=torch.float64, requires_grad=True)
        query = torch.randn(2, 3, 640, dtype=torch.float64)
        logits = SVMHead(solver=QpthSolver())(support, labels, query)
        logits.sum().backward()
        torch.testing.assert_close(logits, SVMHead()(support, labels, query), rtol=1e-4, atol=1e-4)
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)], check=True, timeout=120)


@adapters
def test_nothing_is_printed(solver, capfd):
    support, labels, query, _ = task(2, shots=(5, 5), d=3)
    qp = crammer_singer(support, labels, C=1e4)
    qp.gram[0] = -qp.gram[0]
    _layer.cache_clear()
    for iterations in (1, None):
        solver(max_iterations=iterations, on_failure="return").solve(qp)
        SVMHead(solver=solver(max_iterations=iterations))(support.requires_grad_(), labels, query).sum().backward()
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_cvxpylayers_compiles_once_per_shape():
    _layer.cache_clear()
    for seed in range(3):
        support, labels, _, _ = task(seed=seed)
        CvxpylayersSolver().solve(crammer_singer(support, labels, C=0.5))
    assert _layer.cache_info().misses == 1
    assert _layer.cache_info().hits == 2


@adapters
def test_tiny_incoming_gradients_are_not_taken_for_zero(solver):
    """diffcp does that below 1e-8; a loss that is averaged over many tasks and scaled down gets there."""
    support, labels, query, _ = task(2)
    support.requires_grad_()
    logits = SVMHead(0.5, solver=solver())(support, labels, query)
    (large,) = torch.autograd.grad(logits.square().sum(), support, retain_graph=True)
    (small,) = torch.autograd.grad(1e-12 * logits.square().sum(), support)
    assert close(1e12 * small, large) < 1e-6


@adapters
def test_singular_gram_matrices(solver):
    """n > d, duplicates and zeros: no "not SPD" and no wrong answer."""
    support, labels, query, _ = task(4, shots=(4, 4, 4), d=30)
    support[1] = support[1, :1]
    support[2, ::2] = 0
    support[3, :, 2:] = 0
    expected = SVMHead()(support, labels, query)
    assert close(SVMHead(solver=solver())(support, labels, query), expected) < 1e-4


@adapters
@pytest.mark.parametrize("make", [WestonWatkinsSVMHead, partial(SVMHead, squared_hinge=True)])
def test_a_single_class(solver, make):
    support, _, query, _ = task()
    labels = torch.zeros(len(support), dtype=torch.long)
    assert make(solver=solver())(support, labels, query).abs().max() < 1e-6


@adapters
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_features(solver, dtype):
    support, labels, query, _ = task(2, dtype=dtype)
    logits = SVMHead(solver=solver())(support, labels, query)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, SVMHead()(support, labels, query))


@adapters
def test_no_gradient_needed(solver):
    support, labels, query, _ = task(2)
    with torch.no_grad():
        logits = SVMHead(solver=solver())(support, labels, query)
    assert not logits.requires_grad
    assert close(logits, SVMHead()(support, labels, query)) < 1e-5


@adapters
def test_backward_twice_over_a_kept_graph(solver):
    support, labels, query, _ = task(2)
    support.requires_grad_()
    loss = SVMHead(solver=solver())(support, labels, query).square().sum()
    gradients = [torch.autograd.grad(loss, support, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*gradients)


def gradients(head, support, labels, query):
    support = support.clone().requires_grad_()
    value = head(support, labels, query).square().sum()
    return torch.autograd.grad(value, [support, *head.parameters()])


def test_last_iterate_gradient_is_that_of_qpth_early_stopped():
    """The same formula at iterates that are not the same: alike from the first, equal in the end."""
    support, labels, query, _ = task(3, shots=(5, 5, 5), d=60)
    exact = gradients(SVMHead(Learnable(0.1)), support, labels, query)[0]
    previous = 1.0
    for iterations in (3, 6, 12):
        ours, theirs = (
            gradients(SVMHead(Learnable(0.1), solver=solver), support, labels, query)[0]
            for solver in (
                InteriorPointSolver(max_iterations=iterations, gradient="last_iterate"),
                QpthSolver(max_iterations=iterations),
            )
        )
        assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), 0) > 0.9
        assert close(ours, exact) < previous
        previous = close(ours, exact)
    assert close(ours, exact) < 1e-3
    assert close(ours, theirs) < 1e-3
