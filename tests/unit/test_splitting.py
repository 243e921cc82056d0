"""Splitting, on its own and as the way to many classes."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from problems import known, known_problem
from tasks import close, crammer_singer, examples, task

from convexheads import SVMHead
from convexheads.solvers import NativeSolver, native, rows
from convexheads.solvers.kkt import BlockKKT
from convexheads.solvers.splitting import splitting


@examples(8, nightly=600)
@known
def test_converges_to_the_known_solution(n, k, seed, bounds, smoothing, row_sum):
    assume(row_sum or smoothing == "all" or bounds == "both")
    qp, coef, pull = known_problem(2, n, k, seed=seed, bounds=bounds, smoothing=smoothing, row_sum=row_sum)
    units, unit, size = qp.in_units()
    start = next(splitting(units, steps=1500))
    certificate = units.certify(start.coef)
    assert certificate.residual.max() < 1e-12  # always feasible
    # How fast depends on the Gram matrix; the multipliers go with the gap.
    assert certificate.gap.max() < 1e-4
    slow = certificate.gap.max() > 1e-12
    assert slow or close(start.coef * unit[:, None, None], coef, 1.0) < 1e-4
    assert slow or close(start.bound_multipliers * size[:, None, None], pull, 1.0) < 1e-3


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
    row, _ = rows.proximal(target, *limits, weight=weight, smoothing=smoothing, row_sum=True, guess=guess)
    infinite = torch.full_like(bound, torch.inf)
    both = (-infinite, bound) if upper else (-bound, infinite)
    expected, _ = rows.proximal(target, *both, weight=weight, smoothing=smoothing, row_sum=True)
    assert close(row, expected, 1.0) < 1e-12
    assert row.sum(-1).abs().max() < 1e-12


def many(ways: int, tasks: int = 2):
    return task(tasks, shots=(2,) * ways, d=3 * ways, queries=5)


def gradient(head, support, labels, query):
    support = support.clone().requires_grad_()
    return torch.autograd.grad(head(support, labels, query).square().sum(), support)[0]


def test_carries_on_until_certified(monkeypatch):
    """The way to very many classes, on few enough to compare it with the others."""
    support, labels, query, _ = many(25)
    head = SVMHead(0.3, solver=NativeSolver(compiled=False))
    expected, expected_gradient = head(support, labels, query), gradient(head, support, labels, query)
    monkeypatch.setattr(native, "_LARGEST_BLOCKS", 0)
    monkeypatch.setattr(native, "interior_point", None)  # needs a block of n x n for each class
    monkeypatch.setattr(native, "_FEW_ROUNDS", 1)
    fitted = head.fit(support, labels)
    assert fitted.solution.gap.max() < 1e-12
    assert close(fitted(query), expected) < 1e-10
    assert close(gradient(head, support, labels, query), expected_gradient) < 1e-8


def test_gives_up_in_the_end(monkeypatch):
    support, labels, *_ = many(25)
    monkeypatch.setattr(native, "_LARGEST_BLOCKS", 0)
    monkeypatch.setattr(native, "_ENOUGH_STARTS", 1)
    monkeypatch.setattr(native, "_STEPS", 1)
    monkeypatch.setattr(native, "_FEW_ROUNDS", 1)
    solution = NativeSolver(compiled=False, on_failure="return").solve(crammer_singer(support, labels, 1e3))
    assert not solution.converged.any()
    assert torch.isfinite(solution.coef).all()
    assert (solution.gap > 1e-6).all()


def test_more_steps_come_closer():
    support, labels, *_ = many(6)
    qp, *_ = crammer_singer(support, labels, 0.3).in_units()
    gaps = [qp.certify(start.coef).gap.max() for start in islice(splitting(qp, steps=10), 4)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-3 * gaps[0]


@pytest.mark.parametrize("row_sum", [True, False])
def test_gathered_blocks_are_the_whole_ones(row_sum, monkeypatch):
    """Of most classes, few rows are free."""
    torch.manual_seed(1)
    root = torch.randn(3, 12, 15, dtype=torch.float64)
    gram, free = root @ root.mT, torch.rand(3, 7, 12) < 0.3
    diagonal = torch.rand(3, 7, 12, dtype=torch.float64)
    right, sums = torch.randn(3, 7, 12, dtype=torch.float64), torch.randn(3, 12, dtype=torch.float64)
    sums = torch.where(free.any(1), sums, 0)
    found = {}
    for share in (0.0, 0.9):
        monkeypatch.setattr("convexheads.solvers.kkt._WORTH_GATHERING", share)
        kkt = BlockKKT.factorise(gram, diagonal=diagonal, free=free, row_sum=row_sum, regulariser=1e-12)
        assert (kkt.index is None) is (share == 0)
        found[share] = kkt, *kkt.solve(right, sums, refinements=2)
    for one, other in zip(found[0.0][1:], found[0.9][1:], strict=True):
        assert close(other, one) < 1e-10
    # some tasks of one, some of the other
    mixed = found[0.9][0].with_tasks(torch.tensor([True, False, True]), found[0.0][0].tasks(slice(0, 3, 2)))
    for one, other in zip(found[0.0][1:], mixed.solve(right, sums, refinements=2), strict=True):
        assert close(other, one) < 1e-10
