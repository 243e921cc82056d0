"""Gradients that are not those of the optimum, but of a point inside the barrier."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from tasks import close, crammer_singer, task
from torch.func import grad, vmap

from convexheads import ConvexHeadsError, InputError, Learnable, OneVsRestSVMHead, SVMHead
from convexheads.solvers import DualProblem, InteriorPointSolver, NativeSolver
from convexheads.solvers.native.interior_point import central_path
from convexheads.solvers.rescaling import rescale


def gradients(head, support, labels, query):
    support = support.clone().requires_grad_()
    value = head(support, labels, query).square().sum()
    return torch.autograd.grad(value, [support, *head.parameters()])


def problem(support, labels, C, smoothing):
    """Bounds on both sides, and some of them infinite."""
    qp = crammer_singer(support, labels, C, smoothing)
    lower = torch.where(torch.arange(qp.linear.shape[-1]) == 0, -torch.inf, torch.full_like(qp.linear, -0.2))
    return DualProblem(qp.gram, qp.linear, lower=lower, upper=qp.upper, smoothing=qp.smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_relaxed_gradient_is_that_of_the_central_path(smoothing):
    """Against central differences of the relaxed point itself, by all data of the problem."""
    support, labels, *_ = task(2, shots=(3, 2, 3), d=6)
    qp = problem(support, labels, 0.4, smoothing)
    weights = torch.randn_like(qp.linear)

    attached = qp.map(lambda _, value: value.clone().requires_grad_())
    scaled, unit, size = rescale(qp)
    solver = InteriorPointSolver(gradient="relaxed", complementarity=1e-2)
    coef = solver.solve(attached).coef
    names = list(attached.tensors())
    found = torch.autograd.grad((weights * coef).sum(), list(attached.tensors().values()))
    for name, own in zip(names, found, strict=True):
        direction = torch.randn_like(own)
        if name == "gram":
            direction = direction + direction.mT
        factor = {"gram": unit / size, "smoothing": unit / size, "linear": 1 / size}.get(name, 1 / unit)
        change = factor.view(-1, 1, 1) * direction

        def moved(step, name=name, change=change):
            return scaled.map(lambda n, value: value + step * change if n == name else value)

        step = 1e-5
        parts = [torch.stack([relaxed_task(moved(sign * step), weights, t) for t in range(2)]) for sign in (1, -1)]
        expected = unit * (parts[0] - parts[1]) / (2 * step)
        own = own.masked_fill(~torch.isfinite(getattr(qp, name)), 0)
        torch.testing.assert_close((own * direction).sum((1, 2)), expected, rtol=1e-5, atol=1e-8)


def relaxed_task(problem, weights, t):
    point, _ = central_path(problem, complementarity=1e-2)
    return (weights[t] * point[t]).sum()


def test_relaxed_gradient_becomes_exact():
    support, labels, query, _ = task(3, shots=(4, 5, 3), d=20)
    exact = gradients(SVMHead(Learnable(0.3)), support, labels, query)
    errors = []
    for complementarity in (1e-1, 1e-3, 1e-5, 1e-8):
        solver = InteriorPointSolver(gradient="relaxed", complementarity=complementarity)
        head = SVMHead(Learnable(0.3), solver=solver)
        torch.testing.assert_close(head(support, labels, query), SVMHead(0.3)(support, labels, query))
        errors.append([close(*pair) for pair in zip(gradients(head, support, labels, query), exact, strict=True)])
    for worse, better in pairwise(errors):
        assert all(b < w for b, w in zip(better, worse, strict=True))
    assert max(errors[-1]) < 1e-2


def test_relaxed_gradient_has_no_kink_where_a_bound_is_weakly_active():
    """Two examples so far apart that both sit at C for small C, and the optimum has a kink where they come free."""
    support = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    labels = torch.tensor([0, 1])

    def slopes(C, solver):
        head = OneVsRestSVMHead(C, solver=solver)

        def value(x):
            return head(x, labels, support).square().sum()

        return grad(value)(support)

    relaxed = InteriorPointSolver(gradient="relaxed", complementarity=1e-2)
    jump = {}
    for name, solver in (("exact", NativeSolver()), ("relaxed", relaxed)):
        below, above = slopes(1 - 1e-6, solver), slopes(1 + 1e-6, solver)
        jump[name] = close(below, above)
    assert jump["exact"] > 0.1
    assert jump["relaxed"] < 1e-3


def test_through_transforms_and_other_tasks():
    support, labels, query, _ = task(3, shots=(2, 3, 2))
    head = SVMHead(0.3, solver=InteriorPointSolver(gradient="relaxed"))
    together = gradients(head, support, labels, query)[0]
    for t in range(3):
        assert close(gradients(head, support[t], labels[t], query[t])[0], together[t]) < 1e-6
    mapped = vmap(lambda s, y, q: grad(lambda x: head(x, y, q, ways=3).square().sum())(s))(support, labels, query)
    assert close(mapped, together) < 1e-10


@pytest.mark.parametrize("loss", [torch.sum, lambda logits: logits.square().sum()])
def test_second_derivatives_are_refused(loss):
    support, labels, query, _ = task()
    support.requires_grad_()
    head = SVMHead(0.3, solver=InteriorPointSolver(gradient="relaxed"))
    (first,) = torch.autograd.grad(loss(head(support, labels, query)), support, create_graph=True)
    with pytest.raises(ConvexHeadsError, match=r"second derivative.* InteriorPointSolver whose"):
        first.sum().backward()


@pytest.mark.usefixtures("unchecked")
def test_arguments():
    assert repr(InteriorPointSolver(gradient="relaxed")) == "InteriorPointSolver(gradient='relaxed')"
    solver = InteriorPointSolver(max_iterations=3, gradient="last_iterate")
    assert repr(solver) == "InteriorPointSolver(max_iterations=3, gradient='last_iterate')"
    with pytest.raises(InputError, match=r"Solver\(gradient\): expected one of exact, relaxed.*, got 'sharp'"):
        InteriorPointSolver(gradient="sharp")
    with pytest.raises(
        InputError, match=r"max_iterations\): expected a number with gradient='last_iterate'.*, got None"
    ):
        InteriorPointSolver(gradient="last_iterate")
    with pytest.raises(InputError, match=r"max_iterations\): expected None with gradient='relaxed'.*, got 3"):
        InteriorPointSolver(gradient="relaxed", max_iterations=3)
    with pytest.raises(InputError, match=r"InteriorPointSolver\(complementarity\): expected .*, got 0"):
        InteriorPointSolver(gradient="relaxed", complementarity=0)
