"""`torch.func` over heads on the native solver: the leading dimensions by another name, and derivatives of any kind."""

from __future__ import annotations

import pytest
import torch
from tasks import close, task
from torch.func import functional_call, grad, hessian, jacrev, vmap
from torch.nn.functional import one_hot

import convexheads as ch

HEADS = {
    "svm": ch.SVMHead(0.3),
    "svm in torch": ch.SVMHead(0.3, solver=ch.solvers.NativeSolver(backend="torch")),
    "smoothed svm": ch.SVMHead(0.3, smoothing=0.5, squared_hinge=True, kernel=ch.kernels.RBF()),
    "early-stopped svm": ch.SVMHead(0.3, solver=ch.solvers.InteriorPointSolver(max_iterations=4)),
    "weston-watkins": ch.WestonWatkinsSVMHead(0.3),
    "one-vs-rest": ch.OneVsRestSVMHead(0.3),
    "simplified": ch.SimplifiedSVMHead(0.3),
    "logistic": ch.LogisticHead(),
    "ridge": ch.RidgeHead(),
    "prototypes": ch.PrototypeHead(),
    "discriminant": ch.LinearDiscriminantHead(),
    "mahalanobis": ch.MahalanobisHead(),
}
heads = pytest.mark.parametrize("name", HEADS)


def loss(head, labels, ways):
    def value(support, query):
        return head(support, labels, query, ways=ways).square().sum()

    return value


@heads
def test_vmap_is_a_leading_dimension(name):
    support, labels, query, ways = task(3, 2, shots=(2, 3, 2))
    head = HEADS[name]
    expected = head(support, labels, query, ways=ways)
    found = vmap(lambda s, y, q: head(s, y, q, ways=ways))(support, labels, query)
    assert close(found, expected) < 1e-12
    nested = vmap(vmap(head))(support, labels, query)  # ways read off the labels
    assert close(nested, expected) < 1e-12
    one_query = vmap(head, in_dims=(1, 1, None), out_dims=1)(support, labels, query[:, 0])
    assert close(one_query, head(support, labels, query[:, :1].expand_as(query))) < 1e-12


@heads
def test_gradients_of_each_task(name):
    support, labels, query, ways = task(3, shots=(2, 3, 2))
    head = HEADS[name]
    attached = support.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(head, labels, ways)(attached, query), attached)
    assert close(grad(loss(head, labels, ways))(support, query), expected) < 1e-10
    mapped = vmap(lambda s, y, q: grad(loss(head, y, ways))(s, q))(support, labels, query)
    assert close(mapped, expected) < 1e-10


@heads
def test_jacobian(name):
    support, labels, query, ways = task(shots=(2, 1, 2), d=6, queries=2)
    head = HEADS[name]
    expected = torch.autograd.functional.jacobian(lambda s: head(s, labels, query, ways=ways), support)
    assert close(jacrev(lambda s: head(s, labels, query, ways=ways))(support), expected) < 1e-10


@pytest.mark.parametrize("name", ["svm", "svm in torch", "logistic", "ridge"])
def test_jacobians_of_as_many_tasks_as_outputs(name):
    """Where the sizes of both mapped dimensions agree, nothing but the rules can tell them apart."""
    support, labels, query, ways = task(6, shots=(2, 1, 2), d=6, queries=2)
    head = HEADS[name]

    def jacobian(s, y, q):
        return jacrev(lambda value: head(value, y, q, ways=ways).flatten())(s)

    found = vmap(jacobian)(support, labels, query)
    expected = torch.stack([jacobian(*one) for one in zip(support, labels, query, strict=True)])
    assert close(found, expected) < 1e-10


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, from its forward mode
@pytest.mark.parametrize("name", ["svm", "svm in torch", "smoothed svm", "logistic"])
def test_second_derivatives(name):
    support, labels, query, ways = task(shots=(2, 1), d=3, queries=1)
    head = HEADS[name]
    value = loss(head, labels, ways)
    expected = torch.autograd.functional.hessian(lambda s: value(s, query), support)
    # forward over reverse isn't there: no rule for forward mode
    assert close(jacrev(jacrev(value))(support, query), expected) < 1e-8
    with pytest.raises(RuntimeError, match="forward"):
        hessian(value)(support, query)


def test_hyperparameters_of_each_task():
    """An ensemble of heads, in one call."""
    support, labels, query, ways = task(shots=(3, 3, 3))
    head = ch.SVMHead(ch.Learnable(0.3))

    def logits(value):
        return functional_call(head, {"C.raw_value": value}, (support, labels, query), {"ways": ways})

    values = torch.tensor([0.01, 0.1, 1.0], dtype=torch.float64).log()
    expected = torch.stack([ch.SVMHead(value.exp().item())(support, labels, query) for value in values])
    assert close(vmap(logits)(values), expected) < 1e-10


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("transform", [vmap, lambda f: f])
def test_errors_come_through(transform):
    support, labels, query, _ = task(3)
    head = ch.SVMHead()
    wrong, broken = labels.clone(), support.clone()
    wrong[1, 0], broken[2, 0] = 7, torch.nan
    with pytest.raises(ch.InputError, match=r"labels: expected .*, got 7 in task \(1,\)"):
        transform(lambda s, y, q: head(s, y, q, ways=3))(support, wrong, query)
    with pytest.raises(ch.InputError, match=r"support: expected .*, got non-finite values in row 0 of task \(2,\)"):
        transform(head)(broken, labels, query)
    gram = support @ support.mT
    gram[1] = -gram[1]
    with pytest.raises(ch.SolverError, match=r"NativeSolver: 1 of \d tasks .*task \(1,\)"):
        transform(lambda k, m: ch.solvers.NativeSolver().solve(ch.solvers.DualProblem(k, m, upper=m)).coef)(
            gram, one_hot(labels).to(gram)
        )
