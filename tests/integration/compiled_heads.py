"""Heads in `torch.compile`: one graph without checks, a gap in the graph with them, and the results of eager mode.

`test_compile.py` runs this file in a process of its own.
"""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
import torch._dynamo as dynamo
from tasks import close, task
from torch.nn.functional import cross_entropy

import convexheads as ch
from convexheads.heads._primal import strategy
from convexheads.kernels import RBF, UnitScale
from convexheads.solvers import ActiveSetSolver, Fallback, InteriorPointSolver, NativeSolver

pytestmark = [  # torch's own warnings, while it compiles
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
HEADS = {
    "svm": lambda: ch.SVMHead(ch.Learnable(0.3), validate=False),
    "smoothed svm": lambda: ch.SVMHead(0.3, smoothing=ch.Learnable(0.5), squared_hinge=True, validate=False),
    "weston-watkins": lambda: ch.WestonWatkinsSVMHead(ch.Learnable(0.3), kernel=UnitScale(), validate=False),
    "one-vs-rest": lambda: ch.OneVsRestSVMHead(ch.Learnable(0.3), validate=False),
    "simplified": lambda: ch.SimplifiedSVMHead(0.3, solver=InteriorPointSolver(), validate=False),
    "logistic": lambda: ch.LogisticHead(ch.Learnable(0.5), validate=False),
    "newton steps": lambda: ch.LogisticHead(steps=3, validate=False),
    "ridge": lambda: ch.RidgeHead(ch.Learnable(0.5), scale=ch.Learnable(2.0), validate=False),
    "prototypes": lambda: ch.PrototypeHead(validate=False),
    "discriminant": lambda: ch.LinearDiscriminantHead(validate=False),
    "mahalanobis": lambda: ch.MahalanobisHead(ch.Learnable(0.5), kernel=RBF(), validate=False),
}
REGRESSORS = {
    "gaussian process": lambda: ch.GaussianProcessHead(ch.Learnable(0.2), validate=False),
    "support vector regression": lambda: ch.SupportVectorRegressionHead(epsilon=0.05, validate=False),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dynamo.reset()


class Graphs:
    """A backend that runs the graphs as they are, and keeps them."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, _):
        self.graphs.append(graph)
        return graph.forward

    def operators(self):
        return {node.target for graph in self.graphs for node in graph.graph.nodes if node.op.startswith("call")}


def gradients(function, head, *tensors):
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    value = function(*tensors)
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view_as(value)
    return value, torch.autograd.grad((weights * value).sum(), [*tensors, *head.parameters()])


def assert_same(function, head, *tensors, **options):
    found, found_gradients = gradients(torch.compile(function, **options), head, *tensors)
    expected, expected_gradients = gradients(function, head, *tensors)
    assert close(found, expected) < 1e-10
    for gradient, reference in zip(found_gradients, expected_gradients, strict=True):
        assert close(gradient, reference) < 1e-8


@pytest.mark.parametrize("name", HEADS)
def test_a_head_without_checks_is_one_graph(name):
    support, labels, query, ways = task(2, shots=(2, 3, 2))
    head = HEADS[name]()
    assert_same(
        lambda s, q: head(s, labels, q, ways=ways), head, support, query, fullgraph=True, backend=(graphs := Graphs())
    )
    assert len(graphs.graphs) == 1


def test_rows_of_a_table_are_scored_in_one_graph():
    support, labels, query, ways = task(2, shots=(2, 3, 2))
    fitted = ch.SVMHead(validate=False).fit(support, labels, ways=ways)
    table, rows = query.flatten(0, 1), torch.arange(8).view(2, 4).flip(0)
    scores = torch.compile(fitted.score_rows, fullgraph=True, backend="eager")(table, rows)
    torch.testing.assert_close(scores, fitted(table[rows]))


def test_many_episodes_without_a_gradient_are_one_graph():
    """Elsewhere, compiled code computes their Gram matrices."""
    support, query, labels = torch.randn(100, 25, 640), torch.randn(100, 5, 640), torch.arange(25) % 5
    head = ch.RidgeHead(validate=False)
    with torch.no_grad():
        found = torch.compile(head, fullgraph=True, backend="eager")(support, labels, query, ways=5)
        torch.testing.assert_close(found, head(support, labels, query, ways=5))


@pytest.mark.parametrize("name", REGRESSORS)
def test_a_regressor_without_checks_is_one_graph(name):
    support, labels, query, _ = task(2, shots=(2, 3, 2))
    head, targets = REGRESSORS[name](), labels.double()
    assert_same(lambda s, q: head(s, targets, q), head, support, query, fullgraph=True, backend="eager")


@pytest.mark.parametrize("name", ["svm", "weston-watkins", "logistic"])
def test_the_backward_pass_is_compiled_too(name):
    """Here, unlike above, the compiler traces the gradient, with the shapes that the operators state."""
    support, labels, query, ways = task(2, shots=(2, 3, 2))
    mask = torch.ones_like(labels, dtype=torch.bool)
    mask[0, 1] = False
    head = HEADS[name]()
    assert_same(
        lambda s, q: head(s, labels, q, ways=ways, mask=mask),
        head, support, query, fullgraph=True, backend="aot_eager",
    )  # fmt: skip


@pytest.mark.parametrize("limit", [256, 0], ids=["factorized", "conjugate gradients"])
def test_logistic_regression_in_its_weights_is_one_graph(limit, monkeypatch):
    monkeypatch.setattr(strategy, "MAX_UNKNOWNS", limit)
    support, labels, query, ways = task(2, shots=(4, 3, 4), d=4)
    head = ch.LogisticHead(ch.Learnable(0.5), validate=False)
    assert_same(lambda s, q: head(s, labels, q, ways=ways), head, support, query, fullgraph=True, backend="aot_eager")


@pytest.mark.slow
def test_a_training_step_by_inductor():
    images, labels, query_labels = torch.randn(2, 9, 6), torch.arange(3).repeat(2, 2), torch.arange(3).expand(2, 3)
    model = torch.nn.ModuleList([torch.nn.Linear(6, 5), ch.SVMHead(0.3, scale=ch.Learnable(2.0), validate=False)])

    def step(x):
        backbone, head = model
        features = backbone(x)
        logits = head(features[:, :6], labels, features[:, 6:], ways=3)
        return cross_entropy(logits.flatten(0, 1), query_labels.flatten())

    found = torch.autograd.grad(torch.compile(step, fullgraph=True)(images), list(model.parameters()))
    for gradient, expected in zip(found, torch.autograd.grad(step(images), list(model.parameters())), strict=True):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("name", ["checks", "classes unknown", "relaxed"])
def test_a_head_that_cannot_be_traced_runs_between_two_graphs(name):
    support, labels, query, ways = task(2, shots=(2, 3, 2))
    relaxed = InteriorPointSolver(gradient="relaxed", on_failure="return")
    head = {
        "checks": ch.SVMHead(),
        "classes unknown": ch.RidgeHead(validate=False),
        "relaxed": ch.SVMHead(solver=Fallback(ActiveSetSolver(), relaxed), validate=False),
    }[name]
    known = None if name == "classes unknown" else ways
    graphs = Graphs()
    assert_same(lambda s, q: head(s.sin(), labels, q.cos(), ways=known).tanh(), head, support, query, backend=graphs)
    assert len(graphs.graphs) == 2
    assert graphs.operators() == {"sin", "cos", "tanh"}


def test_a_fit_and_its_call_run_outside_graphs():
    support, labels, query, _ = task(2)
    head, graphs = ch.LogisticHead(), Graphs()
    assert_same(lambda s, q: head.fit(s.sin(), labels)(q.cos()).tanh(), head, support, query, backend=graphs)
    assert graphs.operators() == {"sin", "cos", "tanh"}


def test_a_whole_graph_of_checks_is_refused_with_a_reason():
    support, labels, query, ways = task()
    head = ch.SVMHead()
    with pytest.raises(dynamo.exc.Unsupported, match="validate=False"):
        torch.compile(lambda s: head(s, labels, query, ways=ways), fullgraph=True, backend="eager")(support)


@pytest.mark.parametrize("head", [ch.SVMHead(0.3, validate=False), ch.LogisticHead(kernel=RBF(), validate=False)])
def test_a_fit_from_an_earlier_solution_is_one_graph(head):
    support, labels, query, ways = task(3, shots=(3, 4, 2), d=10)
    init = head.fit(support + 0.01, labels, ways=ways).solution.detach()
    options = {"fullgraph": True, "backend": "aot_eager"}
    assert_same(lambda s, q: head.fit(s, labels, ways=ways, init=init)(q), head, support, query, **options)


@pytest.mark.parametrize("make", [ch.SVMHead, ch.LogisticHead])
def test_failures_are_reported_when_the_graph_runs(make):
    support, labels, query, ways = task(3)
    broken = support.clone()
    broken[1, 0] = torch.nan

    def compiled(on_failure):
        options = {"solver": NativeSolver(on_failure=on_failure)} if make is ch.SVMHead else {"on_failure": on_failure}
        head = make(validate=False, **options)
        call = torch.compile(lambda s: head(s, labels, query, ways=ways), fullgraph=True, backend="aot_eager")
        return call, head(support, labels, query, ways=ways)

    call, expected = compiled("raise")
    assert close(call(support), expected) < 1e-10
    with pytest.raises(ch.SolverError, match=r"1 of 3 tasks not solved \(task \(1,\)") as caught:
        call(broken)
    assert caught.value.solution.converged.tolist() == [True, False, True]
    call, _ = compiled("warn")
    with pytest.warns(ch.SolverWarning, match="1 of 3 tasks not solved"):
        logits = call(broken)
    assert logits[1].isnan().all()
    assert close(logits[::2], expected[::2]) < 1e-10


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda head: pickle.loads(pickle.dumps(head))])
def test_a_graph_calls_the_solver_of_its_head(duplicate):
    """Graphs name solvers by a number, which a copy must not share."""
    support, labels, query, ways = task()
    first = ch.SVMHead(solver=InteriorPointSolver(max_iterations=2), validate=False)
    second = duplicate(first)
    assert first.solver._number != second.solver._number
    expected = first(support, labels, query, ways=ways)
    del first
    gc.collect()
    call = torch.compile(lambda s: second(s, labels, query, ways=ways), fullgraph=True, backend="eager")
    assert close(call(support), expected) < 1e-12
    other = ch.SVMHead(validate=False)
    call = torch.compile(lambda s: other(s, labels, query, ways=ways), fullgraph=True, backend="eager")
    assert close(call(support), other(support, labels, query, ways=ways)) < 1e-12
    assert close(call(support), expected) > 1e-3


def test_bounds_in_the_wrong_order_are_refused_when_the_graph_runs():
    """A custom problem, which only the solver checks."""
    from convexheads.solvers import DualProblem

    lower = -torch.ones(1, 4, 2, dtype=torch.float64)
    gram = torch.eye(4, dtype=torch.float64)[None]

    solver = NativeSolver()

    def solve(upper):
        return solver.solve(DualProblem(gram, torch.ones_like(lower), lower, upper)).coef

    compiled = torch.compile(solve, fullgraph=True, backend="eager")
    assert close(compiled(-lower), solve(-lower)) < 1e-12
    with pytest.raises(ch.InputError, match="lower <= upper"):
        compiled(2 * lower)
