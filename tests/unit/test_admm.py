"""ADMM, its steps and the solver for many classes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from problems import known, known_problem
from tasks import close, crammer_singer, examples, gap_without_rounding, task

from convexheads import SVMHead
from convexheads.solvers import ADMMSolver, DualProblem, NativeSolver, Status, kkt
from convexheads.solvers.certificate import certify
from convexheads.solvers.feasible_rows import FeasibleRows
from convexheads.solvers.kkt import BlockKKT
from convexheads.solvers.native.admm_steps import admm
from convexheads.solvers.rescaling import rescale


@examples(8, nightly=600)
@known
def test_converges_to_the_known_solution(n, k, seed, bounds, smoothing, rows_sum_to_zero):
    assume(rows_sum_to_zero or smoothing == "all" or bounds == "both")
    qp, coef, pull = known_problem(
        2, n, k, seed=seed, bounds=bounds, smoothing=smoothing, rows_sum_to_zero=rows_sum_to_zero
    )
    rescaled, coef_scale, multiplier_scale = rescale(qp)
    start = next(admm(rescaled, [1500]))
    certificate = certify(rescaled, start.coef)
    assert certificate.residual.max() < 1e-12  # always feasible
    # How fast depends on the Gram matrix; the multipliers go with the gap.
    assert certificate.gap.max() < 1e-4
    slow = certificate.gap.max() > 1e-12
    assert slow or close(start.coef * coef_scale[:, None, None], coef, 1.0) < 1e-4
    assert slow or close(start.bound_multipliers * multiplier_scale[:, None, None], pull, 1.0) < 1e-3


@examples(200, nightly=2000)
@given(st.integers(1, 6), st.integers(0, 2**31), st.booleans(), st.booleans(), st.booleans())
def test_proximal_step_without_sorting(k, seed, upper, smoothed, guessed):
    """Where bounds are on one side, against the general search for the multiplier."""
    generator = torch.Generator().manual_seed(seed)
    target, bound = torch.randn(2, 5, k, generator=generator, dtype=torch.float64)
    bound = torch.where(torch.rand(5, k, generator=generator) < 0.2, torch.inf, bound.abs())
    bound[0, :] = 0  # a row that can only be zero
    weight = 0.1 + torch.rand(5, 1, generator=generator, dtype=torch.float64)
    smoothing = torch.rand(5, k, generator=generator, dtype=torch.float64) if smoothed else None
    limits = (None, bound) if upper else (-bound, None)
    guess = 3 * torch.randn(5, 1, generator=generator, dtype=torch.float64) if guessed else None
    row, _ = FeasibleRows(*limits, smoothing, True).proximal(target, weight, guess)
    infinite = torch.full_like(bound, torch.inf)
    both = (-infinite, bound) if upper else (-bound, infinite)
    expected, _ = FeasibleRows(*both, smoothing, True).proximal(target, weight)
    assert close(row, expected, 1.0) < 1e-12
    assert row.sum(-1).abs().max() < 1e-12


def many(ways: int, tasks: int = 2):
    return task(tasks, shots=(2,) * ways, d=3 * ways, queries=5)


def gradient(head, support, labels, query):
    support = support.clone().requires_grad_()
    return torch.autograd.grad(head(support, labels, query).square().sum(), support)[0]


def test_goes_on_until_certified():
    support, labels, query, _ = many(25)
    expected_head = SVMHead(0.3, solver=NativeSolver(backend="torch"))
    head = SVMHead(0.3, solver=ADMMSolver(max_rounds=1))
    fitted = head.fit(support, labels)
    assert fitted.solution.gap.max() < 1e-10  # with what rounding may hide
    assert gap_without_rounding(crammer_singer(support, labels, 0.3), fitted.solution.coef).max() < 1e-12
    assert close(fitted(query), expected_head(support, labels, query)) < 1e-10
    expected = gradient(expected_head, support, labels, query)
    assert close(gradient(head, support, labels, query), expected) < 1e-8


def test_a_task_does_not_depend_on_the_batch():
    """The tasks are found by searches at different iterations, and the last one belongs to the slowest task."""
    support, labels, *_ = many(10, tasks=6)
    problem = crammer_singer(support, labels, torch.logspace(-3, 2, 6, dtype=torch.float64)[:, None, None])
    solver = ADMMSolver(steps=3, max_rounds=1, on_failure="return")
    batch = solver.solve(problem)
    assert len(batch.iterations.unique()) > 2
    for number in range(6):
        alone = solver.solve(problem.select(slice(number, number + 1)))
        assert alone.iterations == batch.iterations[number]
        assert close(alone.coef[0], batch.coef[number]) < 1e-12


def test_a_linear_problem_has_a_solution():
    """The Gram matrix of features that are all zero."""
    labels = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)
    support = torch.stack([torch.zeros(6, 4), torch.eye(6, 4)]).double()
    problem = crammer_singer(support, labels, 0.3)
    solution, expected = ADMMSolver().solve(problem), NativeSolver().solve(problem)
    assert close(solution.coef, expected.coef) < 1e-10


def test_stops_at_its_last_iterate():
    support, labels, *_ = many(25)
    solver = ADMMSolver(max_iterations=1, max_rounds=1, on_failure="return")
    solution = solver.solve(crammer_singer(support, labels, 1e3))
    assert (solution.status == Status.STOPPED).all()
    assert torch.isfinite(solution.coef).all()
    assert (solution.gap > 1e-6).all()


def test_more_steps_come_closer():
    support, labels, *_ = many(6)
    qp, *_ = rescale(crammer_singer(support, labels, 0.3))
    gaps = [certify(qp, start.coef).gap.max() for start in admm(qp, [10] * 4)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-3 * gaps[0]


@pytest.mark.parametrize("rows_sum_to_zero", [True, False])
def test_gathered_blocks_are_the_whole_ones(rows_sum_to_zero, monkeypatch):
    """Of most classes, few rows are free."""
    torch.manual_seed(1)
    root = torch.randn(3, 12, 15, dtype=torch.float64)
    free, linear = torch.rand(3, 7, 12) < 0.3, torch.zeros(3, 12, 7, dtype=torch.float64)
    problem = DualProblem(root @ root.mT, linear, rows_sum_to_zero=rows_sum_to_zero)
    diagonal = torch.rand(3, 7, 12, dtype=torch.float64)
    right, sums = torch.randn(3, 7, 12, dtype=torch.float64), torch.randn(3, 12, dtype=torch.float64)
    sums = torch.where(free.any(1), sums, 0)
    found = {}
    for share in (0.0, 0.9):
        monkeypatch.setattr(kkt, "_MAX_FREE_FRACTION_TO_GATHER", share)
        system = BlockKKT.factorize(problem, diagonal=diagonal, free=free, regularization=1e-12)
        assert (system.index is None) is (share == 0)
        found[share] = system.solve(right, sums, refinements=2)
    for one, other in zip(found[0.0], found[0.9], strict=True):
        assert close(other, one) < 1e-10


@pytest.mark.parametrize("limit", [1, 5, 15])
def test_takes_as_many_steps_as_allowed(limit):
    qp = crammer_singer(*task(2, shots=(5,) * 5)[:2], C=0.3)
    solution = ADMMSolver(max_iterations=limit, max_rounds=1, on_failure="return").solve(qp)
    assert (solution.iterations <= limit).all()
    stopped = solution.iterations[~solution.converged]
    assert (stopped == limit).all()
