"""Custom solvers, which return coefficients only; and how solvers, problems and solutions are put together."""

from __future__ import annotations

import inspect

import pytest
import torch
from tasks import close, crammer_singer, task
from torch.func import grad, vmap

from convexheads import (
    ConvexHeadsError,
    InputError,
    KernelExpansion,
    LinearDiscriminantHead,
    RidgeHead,
    SolverError,
    SolverWarning,
    SVMHead,
)
from convexheads.heads import _logistic_newton
from convexheads.solvers import (
    ActiveSetSolver,
    ADMMSolver,
    DualProblem,
    Fallback,
    InteriorPointSolver,
    NativeSolver,
    Plan,
    Solver,
    Status,
    implicit,
)
from convexheads.solvers.best_iterate import BestIterate


class ProjectedGradientSolver(Solver):
    """Accelerated projected gradient (Beck & Teboulle 2009), with coefficients that have no gradient."""

    @torch.no_grad()
    def solve_batch(self, problem):
        step = 1 / torch.linalg.eigvalsh(problem.gram)[:, -1, None, None]
        coef = previous = torch.zeros_like(problem.linear)
        for number in range(self.max_iterations or 2000):
            ahead = coef + number / (number + 3) * (coef - previous)
            previous, coef = coef, problem.project(ahead + step * (problem.linear - problem.gradient(ahead)))
        return coef


class Zeros(Solver):
    def solve_batch(self, problem):
        return torch.zeros_like(problem.linear)


class OddTasksSolver(ProjectedGradientSolver):
    """Solves every second task only."""

    def solve_batch(self, problem):
        odd = torch.arange(len(problem.linear)) % 2 == 1
        return super().solve_batch(problem).masked_fill(~odd[:, None, None], torch.nan)


def logits_and_gradients(solver, support, labels, query):
    """Logits, first and second derivatives with respect to the support."""
    support = support.clone().requires_grad_()
    logits = SVMHead(0.3, solver=solver)(support, labels, query)
    (first,) = torch.autograd.grad(logits.square().sum(), support, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), support)
    return logits, first, second


def test_coefficients_without_a_gradient_get_the_exact_one():
    drawn = task(2, 3, shots=(3, 2, 3), d=12)[:3]
    found = logits_and_gradients(ProjectedGradientSolver(), *drawn)
    for one, other in zip(found, logits_and_gradients(NativeSolver(), *drawn), strict=True):
        assert close(one, other) < 1e-6


def test_through_transforms():
    support, labels, query, _ = task(3, shots=(3, 2, 3), d=12)

    def gradients(solver):
        head = SVMHead(0.3, solver=solver)
        return vmap(lambda s, y, q: grad(lambda x: head(x, y, q, ways=3).square().sum())(s))(support, labels, query)

    expected = gradients(NativeSolver())
    for solver in (ProjectedGradientSolver(), Fallback(OddTasksSolver(), NativeSolver())):
        assert close(gradients(solver), expected) < 1e-6


def test_status_is_that_of_the_certificate():
    qp = crammer_singer(*task(2, shots=(3, 2, 3))[:2], C=0.3)
    solution = ProjectedGradientSolver(max_iterations=3).solve(qp)
    assert (solution.status == Status.STOPPED).all()
    solution = OddTasksSolver(on_failure="return").solve(qp)
    assert solution.status.tolist() == [Status.FAILED, Status.CONVERGED]
    assert solution.iterations is None


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("value", [None, [0.0], torch.zeros(2, 5, 3), (torch.zeros(2, 6, 3),)], ids=repr)
def test_anything_but_coefficients_is_refused(value):
    class Wrong(Solver):
        def solve_batch(self, problem):
            return value

    with pytest.raises(
        InputError, match=r"Wrong.solve_batch: expected a tensor of coefficients .*\(2, 6, 3\).*, got .*"
    ):
        Wrong().solve(crammer_singer(*task(2)[:2], C=0.3))


def test_a_promised_gradient_that_is_missing_is_an_error():
    class Promised(ProjectedGradientSolver):
        provides_gradient = True

    qp = crammer_singer(*task(2)[:2], C=0.3)
    assert Promised().solve(qp).converged.all()  # nobody asks for a gradient
    with pytest.raises(ConvexHeadsError, match="provides_gradient"):
        Promised().solve(qp.map(lambda _, value: value.requires_grad_()))


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad])
def test_a_solver_with_its_own_gradient_refuses_transforms(transform):
    class Promised(ProjectedGradientSolver):
        provides_gradient = True

    support, labels, query, ways = task(2)
    head = SVMHead(0.3, solver=Promised())
    with pytest.raises(ConvexHeadsError, match=r"torch.func: expected .*, got Promised"):
        transform(lambda value: head(value, labels[0], query[0], ways=ways).sum())(
            support if transform is torch.func.vmap else support[0]
        )


# Composition ----------------------------------------------------------------------------------------------------------


def test_fallback_solves_what_the_first_leaves():
    drawn = task(5, shots=(3, 2, 3), d=12)[:3]
    expected = logits_and_gradients(NativeSolver(), *drawn)
    for solver in (Fallback(OddTasksSolver(), NativeSolver()), Fallback(NativeSolver(), OddTasksSolver())):
        for one, other in zip(logits_and_gradients(solver, *drawn), expected, strict=True):
            assert close(one, other) < 1e-6


def test_fallback_hands_on_no_other_task(monkeypatch):
    qp, seen = crammer_singer(*task(5, shots=(3, 2, 3))[:2], C=0.3), []
    solve_batch = InteriorPointSolver.solve_batch
    monkeypatch.setattr(
        InteriorPointSolver, "solve_batch", lambda self, qp: seen.append(len(qp.linear)) or solve_batch(self, qp)
    )
    assert Fallback(OddTasksSolver(), InteriorPointSolver()).solve(qp).converged.all()
    assert Fallback(ActiveSetSolver(), InteriorPointSolver()).solve(qp).converged.all()
    assert seen == [3]


@pytest.mark.parametrize("made", [lambda s: s, lambda s: Fallback(s, Zeros()), lambda s: Fallback(OddTasksSolver(), s)])
def test_a_composition_may_be_part_of_another_one(made):
    class BySize(Solver):
        def plan(self, problem):
            return Plan(problem, (NativeSolver() if problem.linear.shape[-1] < 100 else ADMMSolver(),))

    drawn = task(5, shots=(3, 2, 3), d=12)[:3]
    expected = logits_and_gradients(NativeSolver(), *drawn)
    for one, other in zip(logits_and_gradients(made(BySize()), *drawn), expected, strict=True):
        assert close(one, other) < 1e-6


def test_a_solver_may_come_second_in_its_own_plan():
    class Second(ProjectedGradientSolver):
        def plan(self, problem):
            return Plan(problem, (OddTasksSolver(), self))

    qp = crammer_singer(*task(4)[:2], C=0.3)
    assert Second().solve(qp).converged.all()


def test_a_divided_batch_of_which_a_part_has_no_iterations():
    labels = torch.eye(5, dtype=torch.float64).repeat(2, 1).expand(4, 10, 5)
    features = torch.randn(4, 10, 8, dtype=torch.float64)
    gram = features @ features.mT
    gram[2, 0, 0] = torch.nan
    solver = Fallback(NativeSolver(max_block_entries=1000), Zeros(), on_failure="return")
    solution = solver.solve(DualProblem(gram, labels, upper=0.1 * labels))
    assert solution.converged.tolist() == [True, True, False, True]
    assert solution.iterations is None


def test_fallback_reports_what_neither_solves():
    qp = crammer_singer(*task(4)[:2], C=0.3)
    solution = Fallback(OddTasksSolver(), OddTasksSolver(), on_failure="return").solve(qp)
    assert solution.status.tolist() == [Status.FAILED, Status.CONVERGED, Status.CONVERGED, Status.CONVERGED]


def test_tolerance_of_a_fallback_is_one_that_every_task_reaches():
    qp = crammer_singer(*task(4)[:2], C=0.3)
    for solvers in ((OddTasksSolver(tolerance=0.1), NativeSolver()), (NativeSolver(), OddTasksSolver(tolerance=0.1))):
        solver = Fallback(*solvers)
        solution = solver.solve(qp)
        assert solution.converged.all()
        assert (solution.gap <= solver.tolerance).all()


def test_solver_that_does_not_keep_its_arguments_is_shown():
    class Forgetful(Solver):
        def __init__(self, steps, *, tolerance=1e-3):
            super().__init__(tolerance=tolerance)

    assert repr(SVMHead(solver=Forgetful(3))) == "SVMHead(C=0.1, solver=Forgetful(tolerance=0.001))"


@pytest.mark.usefixtures("unchecked")
def test_solvers_are_shown_as_they_were_made():
    solver = Fallback(ActiveSetSolver(max_rounds=3), InteriorPointSolver(tolerance=1e-4), on_failure="warn")
    shown = "Fallback(first=ActiveSetSolver(max_rounds=3), then=InteriorPointSolver(tolerance=0.0001), "
    assert repr(solver) == shown + "on_failure='warn')"
    with pytest.raises(InputError, match=r"Fallback\(then\)"):
        Fallback(ActiveSetSolver(), "native")


@pytest.mark.usefixtures("unchecked")
def test_warning_points_to_the_code_that_called_the_head():
    class Zero(Solver):
        def solve_batch(self, problem):
            return torch.zeros_like(problem.linear)

    support, labels, query, _ = task(2)
    head = SVMHead(solver=Zero(on_failure="warn"))
    for call in (head, lambda *arguments: head.fit(*arguments[:2])):
        with pytest.warns(SolverWarning) as warned:
            call(support, labels, query)
        assert [warning.filename for warning in warned] == [__file__]


@pytest.mark.usefixtures("unchecked")
def test_failures_are_numbered_over_tasks_with_different_ways():
    """Tasks with the same number of classes are solved together, but there is one error or warning for the batch."""

    class FailsWithThreeClasses(Solver):
        def solve_batch(self, problem):
            solution = NativeSolver().solve(problem).coef
            return 0 * solution if problem.linear.shape[-1] == 3 else solution

    support, _, _, _ = task(4, shots=(4, 4, 4))
    ways = torch.tensor([3, 2, 3, 2])
    labels = torch.arange(12) % ways[:, None]
    with pytest.raises(SolverError, match=r"2 of 4 tasks.*task \(0,\).*task \(2,\)") as caught:
        SVMHead(solver=FailsWithThreeClasses()).fit(support, labels, ways=ways)
    expected = SVMHead(solver=FailsWithThreeClasses(on_failure="return")).fit(support, labels, ways=ways).solution
    assert caught.value.solution.status.tolist() == expected.status.tolist()
    assert torch.equal(caught.value.solution.coef, expected.coef)
    with pytest.warns(SolverWarning, match=r"2 of 2 tasks") as warned:  # counted among those with as many classes
        fitted = SVMHead(solver=FailsWithThreeClasses(on_failure="warn")).fit(support, labels, ways=ways)
    assert len(warned) == 1
    assert torch.equal(fitted.solution.status, expected.status)
    with pytest.raises(InputError, match="semi-definite"):
        SVMHead(kernel=lambda x, y: -(x @ y.mT)).fit(support, labels, ways=ways)
    support[2] = 1.0
    with pytest.raises(InputError, match="zero in task") as caught:
        LinearDiscriminantHead().fit(support, labels, ways=ways)
    assert "[(0,), (2,)]" in caught.value.__notes__[0]


@pytest.mark.parametrize("ways", [3, torch.tensor([3, 2])], ids=["number", "tensor"])
def test_errors_reach_a_head_that_handles_them(ways):
    """Whether tasks have the same number of classes, or are solved in groups."""

    class Robust(SVMHead):
        def solve(self, support):
            try:
                return super().solve(support)
            except SolverError:
                return RidgeHead(1.0).solve(support)

    class Forgetful(SVMHead):
        def solve(self, support):
            return KernelExpansion(super().solve(support).coef)

    support, labels, query = (
        torch.randn(2, 6, 4),
        torch.arange(6).expand(2, 6) % torch.tensor([[3], [2]]),
        torch.randn(2, 5, 4),
    )
    options = {"ways": ways, "allow_missing_classes": True}
    logits = Robust(solver=Zeros())(support, labels, query, **options)
    torch.testing.assert_close(logits, RidgeHead(1.0)(support, labels, query, **options))
    for head in (SVMHead, Forgetful):
        with pytest.raises(SolverError, match=r"2 of 2 tasks"):
            head(solver=Zeros())(support, labels, query, **options)


def test_solver_that_changes_its_problem_is_not_certified_by_it():
    class Careless(Solver):
        def solve_batch(self, problem):
            return problem.linear.zero_()

    solution = Careless(on_failure="return").solve(crammer_singer(*task(4)[:2], C=0.3))
    assert (solution.status == Status.FAILED).all()


def test_options_that_a_solver_passes_on_are_shown():
    class Own(ProjectedGradientSolver):
        def __init__(self, sweeps=7, **options):
            super().__init__(**options)
            self.sweeps = sweeps

    assert repr(Own(3, tolerance=1e-3)) == "Own(sweeps=3, tolerance=0.001)"
    assert repr(Own()) == "Own(sweeps=7)"


@pytest.mark.usefixtures("unchecked")
def test_integers_of_a_solver_may_be_tensors():
    five = torch.tensor(5)
    solver = ActiveSetSolver(max_rounds=five)
    assert repr(solver) == "ActiveSetSolver(max_rounds=5)"
    assert repr(ADMMSolver(steps=five, max_rounds=five)) == "ADMMSolver(steps=5, max_rounds=5)"
    assert repr(NativeSolver(max_block_entries=five)) == "NativeSolver(max_block_entries=5)"
    assert solver.solve(crammer_singer(*task(4)[:2], C=0.3)).converged.all()


def test_settings_of_a_solver_do_not_change():
    solver = NativeSolver()
    for name in ("tolerance", "backend", "on_failure", "first"):
        with pytest.raises(AttributeError):
            setattr(solver, name, getattr(solver, name))


def test_tasks_with_different_ways_when_only_one_solver_reports_iterations():
    """The second solver, which reports none, is needed for some groups of tasks only."""
    ways = torch.tensor([1, 3, 1, 3, 1, 3, 3, 1])
    support, labels = torch.randn(8, 12, 3), torch.arange(12) % ways[:, None]
    solver = Fallback(ActiveSetSolver(max_rounds=1, backend="torch"), ProjectedGradientSolver(on_failure="return"))
    fitted = SVMHead(10.0, solver=Fallback(solver, NativeSolver())).fit(support, labels, ways=ways)
    assert fitted.solution.converged.all()
    assert fitted.solution.iterations is None


# Records of tensors ---------------------------------------------------------------------------------------------------


def test_problems_and_solutions_are_shown_in_a_line():
    qp = crammer_singer(*task(8, shots=(5,) * 5)[:2], C=0.3)
    solution = NativeSolver().solve(qp)
    assert repr(qp).startswith("DualProblem(gram=(8, 25, 25), linear=(8, 25, 5), upper=")
    assert "8 of 8 tasks converged" in repr(solution)
    for value in (qp, solution, solution.to("meta"), solution.select(slice(0, 0))):
        assert len(repr(value)) < 150
    vmap(
        lambda gram: torch.tensor(len(repr(NativeSolver().solve(DualProblem(gram, qp.linear[0], upper=qp.upper[0])))))
    )(qp.gram)


def test_solutions_are_moved_and_detached():
    qp = crammer_singer(*task(2)[:2], C=0.3)
    solution = NativeSolver().solve(DualProblem(qp.gram.requires_grad_(), qp.linear, upper=qp.upper))
    assert solution.coef.requires_grad
    assert not solution.detach().coef.requires_grad
    assert solution.to("meta").coef.is_meta
    assert solution.to("meta").gap.shape == (2,)
    assert solution != solution.detach()  # compared by identity, without an error about tensors
    assert len({solution, solution}) == 1


# Parts ----------------------------------------------------------------------------------------------------------------


def test_a_gap_that_falls_slowly_has_not_stalled():
    gap, steady, done = torch.tensor([1e-5, 1e-5, 1.0]), torch.tensor([0.6, 1.0, 1.0]), []
    best = BestIterate(torch.zeros(3, 1, 1), patience=3)
    for number in range(20):
        best.update(number, gap, gap < 0, torch.zeros(3, 1, 1))
        done.append(best.done.tolist())
        gap = gap * steady
    assert not any(slow or far for slow, _, far in done)
    assert [middle for _, middle, _ in done] == [False] * 3 + [True] * 17


def test_logistic_regression_goes_on_while_the_gap_falls(monkeypatch):
    """It used to stop where the gap fell by less than half, three times in a row."""
    support, labels, _, ways = task(shots=(3, 3, 3))
    targets = torch.nn.functional.one_hot(labels, ways).double()
    gaps = iter(1e-5 * 0.6 ** torch.arange(60, dtype=torch.float64))
    evaluate = _logistic_newton.evaluate

    def stub(*arguments, **options):
        return evaluate(*arguments, **options)._replace(error=next(gaps)[None])

    monkeypatch.setattr(_logistic_newton, "evaluate", stub)
    data = support @ support.mT, targets, torch.ones_like(support[:, 0]), torch.zeros_like(targets)
    *_, error, _ = _logistic_newton.solve(*data, intercept=False, tolerance=1e-10, max_steps=50)
    assert error <= 1e-10


def test_what_is_used_of_torch_s_internals(monkeypatch):
    """A test that fails when a new version of torch has changed them, and the ways without them."""
    from convexheads import _functorch

    assert hasattr(torch._C, "_are_functorch_transforms_active")
    assert hasattr(torch._C, "_len_torch_dispatch_stack")
    assert not _functorch.is_transforming()
    seen = []
    vmap(lambda x: seen.append(_functorch.is_transforming()) or x)(torch.ones(2))
    assert seen == [True]
    forward = implicit._ImplicitSolve.forward
    signature = inspect.signature(forward)
    monkeypatch.delattr(forward, "__signature__")
    assert inspect.signature(forward) == signature
    drawn = task(2, shots=(3, 2, 3))[:3]
    expected = logits_and_gradients(NativeSolver(), *drawn)
    for module in ("_functorch", "solvers.base", "solvers.implicit"):
        monkeypatch.setattr(f"convexheads.{module}.is_transforming", lambda: True)
    for one, other in zip(logits_and_gradients(NativeSolver(), *drawn), expected, strict=True):
        assert close(one, other) < 1e-12
