"""Fits that begin at the solution of a similar problem: the same solution, in fewer iterations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume
from problems import known, known_problem
from tasks import close, examples, task

import convexheads as ch
from convexheads import InputError
from convexheads.hyperparameters import PerTask
from convexheads.solvers import (
    ActiveSetSolver,
    ADMMSolver,
    InteriorPointSolver,
    NativeSolver,
    Solution,
    Status,
    WarmStart,
)

SOLVERS = {
    "active set, numba": ActiveSetSolver(backend="numba", on_failure="return"),
    "active set, torch": ActiveSetSolver(backend="torch", on_failure="return"),
    "ADMM": ADMMSolver(on_failure="return"),
    "interior point": InteriorPointSolver(on_failure="return"),
    "native": NativeSolver(),
}
MULTICLASS = {"shots": (4, 5, 3, 6), "d": 40}
HEADS = {
    "Crammer-Singer": ch.SVMHead(0.1),
    "with an intercept": ch.SVMHead(0.1, intercept=True),
    "Weston-Watkins": ch.WestonWatkinsSVMHead(0.05),
    "one-vs-rest": ch.OneVsRestSVMHead(0.1),
    "squared hinge": ch.OneVsRestSVMHead(0.1, squared_hinge=True, kernel=ch.kernels.RBF()),
    "squared hinge, primal": ch.OneVsRestSVMHead(0.1, squared_hinge=True),
    "simplified": ch.SimplifiedSVMHead(0.1),
    "logistic": ch.LogisticHead(0.1, kernel=ch.kernels.RBF()),
    "logistic, intercept": ch.LogisticHead(0.1, intercept=True, kernel=ch.kernels.RBF()),
    "logistic, primal": ch.LogisticHead(0.1),
    "ridge": ch.RidgeHead(),
}
PRIMAL = ("squared hinge, primal", "logistic, primal")


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_any_start_leads_to_the_solution(solver):
    compared = []

    @examples(25, nightly=500)
    @known
    def check(n, k, seed, bounds, smoothing, rows_sum_to_zero):
        assume(rows_sum_to_zero or smoothing == "all" or bounds == "both")  # as in test_numba.py
        settings = {"bounds": bounds, "smoothing": smoothing, "rows_sum_to_zero": rows_sum_to_zero}
        qp, coef, pull = known_problem(3, n, k, seed=seed, **settings)
        solution = solver.solve(qp)
        near, far = WarmStart.of(solution), WarmStart.of(solution.map(lambda _, value: value.roll(1, 0)))
        broken = replace(near, coef=near.coef.index_fill(0, torch.tensor([1]), torch.nan))
        for start in (near, far, broken):
            found = solver.solve(replace(qp, start=start))
            # Alone, a search for the active set may fail, but no start may make it fail more often.
            assert (found.converged | ~solution.converged).all()
            good = found.converged
            assert close(found.coef[good], coef[good], 1.0) < 1e-8
            assert close(found.bound_multipliers[good], pull[good], 1.0) < 1e-6
            compared.append(int(good.sum()))
        if solution.iterations is not None:
            again = solver.solve(replace(qp, start=near))
            assert (again.iterations <= solution.iterations).all()

    check()
    assert sum(compared) > 200


@pytest.mark.parametrize("name", HEADS)
def test_init_changes_no_prediction_and_no_gradient(name):
    head = HEADS[name]
    shots = {"shots": (30, 25, 40, 31), "d": 40} if name in PRIMAL else MULTICLASS
    support, labels, query, _ = task(3, **shots)
    earlier = head.fit(support - 0.01 * support.roll(1, -1), labels).solution
    support.requires_grad_()
    for init in (earlier, None if earlier is None else earlier.map(lambda _, value: value.roll(1, 0))):
        fits = head.fit(support, labels), head.fit(support, labels, init=init)
        logits = [fit(query) for fit in fits]
        assert close(logits[1], logits[0]) < 1e-9
        gradients = [torch.autograd.grad(each.square().sum(), support)[0] for each in logits]
        assert close(gradients[1], gradients[0]) < 1e-7
        if init is earlier and init is not None:
            if name in ("logistic", "with an intercept", "squared hinge, primal"):
                assert fits[1].solution.iterations.sum() < fits[0].solution.iterations.sum()
            assert not fits[1].support.init.coef.requires_grad


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_the_same_problem_again_takes_the_fewest_iterations(solver):
    support, labels, *_ = task(4, shots=(12, 12, 12, 12), d=30)
    head = ch.SVMHead(0.1, solver=solver)
    first = head.fit(support, labels).solution
    again = head.fit(support, labels, init=first).solution
    assert (again.status == Status.CONVERGED).all()
    assert (again.iterations < first.iterations).any()
    assert (again.iterations <= first.iterations).all()


def test_regression_and_uneven_ways():
    support, labels, query, _ = task(2, **MULTICLASS)
    regression = ch.SupportVectorRegressionHead(0.5)
    fitted = regression.fit(support, support[..., 0])
    assert close(regression.fit(support, support[..., 0], init=fitted.solution)(query), fitted(query)) < 1e-9
    labels = labels.clone()
    labels[0, labels[0] == 3] = 0
    for head in (ch.SVMHead(0.1), ch.SimplifiedSVMHead(0.1), ch.LogisticHead(kernel=ch.kernels.RBF())):
        fitted = head.fit(support, labels, ways=[3, 4])
        again = head.fit(support, labels, ways=[3, 4], init=fitted.solution)
        assert close(again(query)[1], fitted(query)[1]) < 1e-9
        assert close(again(query)[0, :, :3], fitted(query)[0, :, :3]) < 1e-9


def test_labels_that_are_not_exclusive():
    support, labels, query, ways = task(2, **MULTICLASS)
    several = torch.nn.functional.one_hot(labels, ways).bool() | (torch.rand(*labels.shape, ways) < 0.3)
    for head in (ch.LogisticHead(kernel=ch.kernels.RBF()), ch.LogisticHead(), ch.OneVsRestSVMHead(0.1)):
        fitted = head.fit(support, several)
        again = head.fit(support, several, init=fitted.solution)
        assert close(again(query), fitted(query)) < 1e-9
        assert (again.solution.iterations <= fitted.solution.iterations).all()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("head", [ch.SVMHead(), ch.LogisticHead(), ch.OneVsRestSVMHead(squared_hinge=True)])
def test_unusable_init(head):
    support, labels, *_ = task(2, **MULTICLASS)
    solution = head.fit(support, labels).solution
    assert isinstance(solution, Solution)
    for init in (solution.coef, "text", solution.map(lambda _, value: value[:1])):
        with pytest.raises(InputError, match="init"):
            head.fit(support, labels, init=init)
    with pytest.raises(InputError, match="path_length"):
        NativeSolver().solve(replace(_problem(support, labels), path_length=0))
    problem = _problem(support, labels)
    with pytest.raises(InputError, match="start"):
        NativeSolver().solve(replace(problem, start=replace(WarmStart.of(solution), coef=solution.coef[:, 1:])))


def _problem(support, labels):
    targets = torch.nn.functional.one_hot(labels).double()
    return ch.solvers.DualProblem(support @ support.mT, targets, upper=0.1 * targets)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("head", "name"),
    [(ch.SVMHead(), "C"), (ch.LogisticHead(kernel=ch.kernels.RBF()), "regularization")],
    ids=["SVM", "logistic"],
)
def test_a_path_has_the_solutions_of_its_points(head, name, threads):
    torch.set_num_threads(threads)
    support, labels, query, _ = task(4, shots=(9, 9, 9, 9), d=20)
    grid = 10.0 ** torch.linspace(2, -4, 25, dtype=torch.float64)
    features, targets = support.unsqueeze(1).expand(-1, 25, -1, -1), labels.unsqueeze(1).expand(-1, 25, -1)
    queries = query.unsqueeze(1).expand(-1, 25, -1, -1)
    with torch.no_grad():
        path = head.set_params(**{name: PerTask(grid)}).fit(features, targets)
        points = [head.set_params(**{name: value.item()}).fit(support, labels) for value in grid]
        expected = torch.stack([fit(query) for fit in points], 1)
    assert path.solution.converged.all()
    assert close(path(queries), expected) < 1e-8
    if threads == 1:
        alone = sum(fit.solution.iterations.sum() for fit in points)
        assert path.solution.iterations.sum() < alone


@pytest.mark.parametrize("intercept", [False, True], ids=["through the origin", "intercept"])
@pytest.mark.parametrize("make", [ch.LogisticHead, ch.OneVsRestSVMHead], ids=["logistic", "squared hinge"])
def test_a_start_in_the_primal_takes_fewer_steps(make, intercept):
    support, labels, query, _ = task(2, shots=(30, 40, 50, 60, 30), d=120)
    settings = {"squared_hinge": True} if make is ch.OneVsRestSVMHead else {}
    head = make(0.5, intercept=intercept, **settings)
    first = head.fit(support, labels)
    again = head.fit(support, labels, init=first.solution)
    assert close(again(query), first(query)) < 1e-8
    assert again.solution.iterations.sum() < first.solution.iterations.sum()
