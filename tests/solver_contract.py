"""The contract of all solvers: these tests run once per solver, see unit/test_solvers.py and integration/test_other_solvers.py.

Both files import everything from here and define the fixture `name`, the name of a solver in `SOLVERS`.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, example
from problems import known, known_problem
from tasks import close, crammer_singer, examples, task

from convexheads import InputError, SolverError, SolverWarning, SVMHead
from convexheads.solvers import SOLVERS, DualProblem, Status, get_solver

OWN = tuple(name for name, solver in SOLVERS.items() if solver.package is None)
KNOWN_SOLUTION = dict.fromkeys(OWN, 1e-8) | {"qpth": 1e-5, "cvxpylayers": 1e-4, "moreau": 1e-6}
BATCH = dict.fromkeys(OWN, 1e-10) | {"qpth": 1e-6, "cvxpylayers": 1e-6, "moreau": 1e-8}
DIFFERENCES = dict.fromkeys(OWN, (1e-6, 1e-6)) | {
    "qpth": (1e-5, 1e-4),
    "cvxpylayers": (1e-3, 2e-2),
    "moreau": (1e-6, 1e-4),
}
"""The step of central differences, and the largest relative error of a derivative."""


@example(n=2, k=2, seed=0, bounds="upper", smoothing="none", rows_sum_to_zero=True)  # whose optimal value is below zero
@examples(25, nightly=250)
@known
def test_finds_the_known_solution(name, n, k, seed, bounds, smoothing, rows_sum_to_zero):
    assume(
        rows_sum_to_zero or smoothing == "all" or bounds == "both"
    )  # otherwise no gap can be certified, see DualProblem
    qp, coef, pull = known_problem(
        2, n, k, seed=seed, bounds=bounds, smoothing=smoothing, rows_sum_to_zero=rows_sum_to_zero
    )
    solution = get_solver(name).solve(qp)
    tolerance = KNOWN_SOLUTION[name]
    assert solution.converged.all()
    assert close(solution.coef, coef, 1.0) < tolerance
    # The multipliers, too, up to what the gap leaves open.
    assert (solution.bound_multipliers - pull).abs().max() < 100 * tolerance


def test_missing_bounds_may_be_infinite(name):
    qp, coef, _ = known_problem(2, 5, 3, seed=1, bounds="both", smoothing="none", rows_sum_to_zero=True)
    loose = (coef - qp.lower > 0.05) & (torch.arange(3) > 0)
    holey = DualProblem(qp.gram, qp.linear, lower=torch.where(loose, -torch.inf, qp.lower), upper=qp.upper)
    assert close(get_solver(name).solve(holey).coef, coef) < 1e-4


def test_batch_equals_loop(name):
    support, labels, _, _ = task(2, 3, shots=(2, 2, 2))
    qp = crammer_singer(support, labels, C=0.5)
    together = get_solver(name).solve(qp)
    assert together.coef.shape == qp.linear.shape
    assert together.gap.shape == together.status.shape == together.residual.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            alone = get_solver(name).solve(crammer_singer(support[i, j], labels[i, j], C=0.5))
            assert alone.gap.shape == ()
            assert close(together.coef[i, j], alone.coef) < BATCH[name]


def test_failed_task_leaves_its_neighbours_alone(name):
    support, labels, _, _ = task(3)
    qp = crammer_singer(support, labels, C=0.5)
    qp.gram[1] = -qp.gram[1]  # not a Gram matrix at all
    solver = SOLVERS[name](on_failure="return")
    solution = solver.solve(qp)
    assert solution.status.tolist() == [Status.CONVERGED, Status.FAILED, Status.CONVERGED]
    for i in (0, 2):
        alone = solver.solve(crammer_singer(support[i], labels[i], C=0.5))
        assert close(solution.coef[i], alone.coef) < 1e-5


def test_on_failure(name):
    support, labels, _, _ = task(2, 2)
    qp = crammer_singer(support, labels, C=0.5)
    qp.gram[1, 0] = torch.nan
    make = SOLVERS[name]
    with pytest.raises(SolverError, match=rf"{make.__name__}: 1 of 4 tasks .*task \(1, 0\)") as caught:
        make().solve(qp)
    assert caught.value.solution.converged.tolist() == [[True, True], [False, True]]
    with pytest.warns(SolverWarning, match=r"task \(1, 0\)"):
        make(on_failure="warn").solve(qp)
    assert make(on_failure="return").solve(qp).status[1, 0] == Status.FAILED


def test_early_stopping_is_a_choice(name):
    if name in ("native", "active-set", "admm"):
        pytest.skip("its first iterates are as good as the last one, or it has no iterates")
    support, labels, query, _ = task(2, shots=(5, 5, 5), d=30)
    exact = SVMHead(0.5).fit(support, labels)
    gaps = []
    for iterations in (2, 4, 30):
        fitted = SVMHead(0.5, solver=SOLVERS[name](max_iterations=iterations)).fit(support, labels)
        gaps.append(fitted.solution.gap.max().item())
        assert (fitted.solution.status != Status.FAILED).all()
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-4 < gaps[0]
    assert fitted.solution.converged.all()
    assert close(fitted(query), exact(query)) < 1e-4


def test_solves_in_float64_whatever_comes(name):
    support, labels, _, _ = task(2)
    exact = get_solver(name).solve(crammer_singer(support.float().double(), labels, C=0.5))
    qp = crammer_singer(support.float(), labels, C=0.5)
    qp = DualProblem(support.float().double() @ support.float().double().mT, qp.linear, upper=qp.upper)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = get_solver(name).solve(qp)
    assert solution.coef.dtype == torch.float64
    assert close(solution.coef, exact.coef) < 1e-7


def test_solves_no_tasks(name):
    support, *_ = task(3)
    qp = DualProblem(support[:0] @ support[:0].mT, torch.zeros(0, 6, 3), upper=torch.ones(0, 6, 3))
    assert get_solver(name).solve(qp).coef.shape == (0, 6, 3)


def test_infeasible_problems_are_not_certified(name):
    qp = crammer_singer(*task()[:2], C=0.1)
    below = DualProblem(qp.gram, qp.linear, upper=qp.upper - 1)  # no row can sum to zero
    solution = SOLVERS[name](on_failure="return").solve(below)
    assert solution.status == Status.FAILED
    with pytest.raises(
        InputError, match=r"DualProblem\(lower, upper\): expected lower <= upper.*, got 1 above 0 at \(0, \d\)"
    ):
        get_solver(name).solve(DualProblem(qp.gram, qp.linear, lower=torch.ones_like(qp.linear), upper=0 * qp.linear))
    with pytest.raises(InputError, match=r"expected .*, got None for both"):
        get_solver(name).solve(DualProblem(qp.gram, qp.linear))


def test_gradient_reaches_every_part_of_the_problem(name):
    qp, *_ = known_problem(2, 4, 3, seed=3, bounds="both", smoothing="all", rows_sum_to_zero=True)
    leaves = {part: getattr(qp, part).clone().requires_grad_() for part in ("linear", "lower", "upper", "smoothing")}
    root = torch.linalg.cholesky(qp.gram).requires_grad_()

    def weighted(root, linear, lower, upper, smoothing):
        solution = get_solver(name).solve(
            DualProblem(root @ root.mT, linear, lower=lower, upper=upper, smoothing=smoothing)
        )
        return (solution.coef * torch.linspace(-1, 1, 24, dtype=torch.float64).view(2, 4, 3)).sum()

    leaves = {"root": root, **leaves}
    gradients = torch.autograd.grad(weighted(**leaves), list(leaves.values()))
    for (part, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        along = torch.randn_like(leaf) * (torch.tril(torch.ones(4, 4)) if part == "root" else 1)
        step, tolerance = DIFFERENCES[name]
        values = [weighted(**(leaves | {part: (leaf + s * step * along).detach()})).item() for s in (1, -1)]
        numeric = (values[0] - values[1]) / (2 * step)
        assert numeric == pytest.approx((gradient * along).sum().item(), rel=tolerance, abs=tolerance), part
