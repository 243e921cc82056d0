"""The compiled active-set search is the one in torch, which every other test of the native solver then covers too."""

from __future__ import annotations

import os
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from problems import known, known_problem
from tasks import close, crammer_singer, examples, task, tasks

from convexheads import InputError
from convexheads.solvers import NativeSolver, active_set, compiled
from convexheads.solvers.native import can_be_compiled
from convexheads.solvers.splitting import proximal_step

AIM = 1e-9


def solve(qp):
    assert can_be_compiled(qp)
    return compiled.solve(qp, aim=AIM, max_rounds=12)


def test_same_active_sets_solutions_and_adjoints():
    shares = []

    @examples(40, nightly=1000)
    @known
    def check(n, k, seed, bounds, smoothing, row_sum):
        assume(row_sum or smoothing == "all" or bounds == "both")  # otherwise no gap can be certified, see QP
        qp, coef, pull = known_problem(3, n, k, seed=seed, bounds=bounds, smoothing=smoothing, row_sum=row_sum)
        units, *_ = qp.in_units()
        expected, _ = active_set.search(units, proximal_step(units), max_rounds=12)
        solution, scale, found = solve(qp)
        certificate = units.certify(expected.coef)
        proven = solution.converged & certificate.within(AIM) & certificate.shows_active_set()
        shares.append(proven.double().mean().item())
        for one, other in zip(expected[1:3], found[1:3], strict=True):
            assert torch.equal(one[proven], other[proven])
        assert close(solution.coef[proven], coef[proven], 1.0) < 1e-8
        assert close(solution.bound_multipliers[proven], pull[proven], 1.0) < 1e-6
        free = ~(found.at_upper | found.at_lower)
        right = torch.where(free, torch.randn(3, n, k, dtype=torch.float64), 0).mT
        sums = torch.where(free.any(-1), torch.randn(3, n, dtype=torch.float64), 0)
        adjoints = [x.kkt.solve(right, sums, refinements=3) for x in (expected, found)]
        again = compiled.CompiledKKT.like(expected.kkt, ~(expected.at_upper | expected.at_lower))
        adjoints.append(again.solve(right, sums, refinements=3))
        for other in adjoints[1:]:
            for one, two in zip(adjoints[0], other, strict=True):
                assert close(two[proven], one[proven], 1e-3) < 1e-8
        assert close(scale[:, None, None] * qp.gram, found.kkt.gram) < 1e-12

    check()
    assert sum(shares) > 0.8 * len(shares)  # most tasks are proven, or the comparison would be empty


@examples(40, nightly=1000)
@known
def test_proves_what_the_certificate_proves(n, k, seed, bounds, smoothing, row_sum):
    assume(row_sum or smoothing == "all" or bounds == "both")
    qp, *_ = known_problem(3, n, k, seed=seed, bounds=bounds, smoothing=smoothing, row_sum=row_sum)
    solution, *_ = solve(qp)
    units, unit, size = qp.in_units()
    certificate = units.certify(solution.coef / unit[:, None, None])
    proven = solution.converged
    assert (certificate.gap[proven] <= 2 * AIM).all()
    assert close(certificate.gap[proven], solution.gap[proven], 1e-6) < 1e-6
    multipliers = certificate.bound_multipliers * size[:, None, None]
    assert close(multipliers[proven], solution.bound_multipliers[proven], 1.0) < 1e-6


def test_proves_nothing_that_is_wrong():
    """Stopped after one round, most tasks don't have their active set yet, and say so."""
    support, labels, *_ = task(30, shots=(8, 9, 7, 8), d=40)
    qp = crammer_singer(support, labels, 0.5)
    exact = NativeSolver(compiled=False).solve(qp)
    solution, *_ = compiled.solve(qp, aim=AIM, max_rounds=1)
    assert 0 < solution.converged.sum() < 30
    assert close(solution.coef[solution.converged], exact.coef[solution.converged]) < 1e-9
    wrong = (solution.coef - exact.coef).abs().amax((1, 2)) > 1e-6
    assert wrong.any()
    assert not (wrong & solution.converged).any()


@examples(40, nightly=1000)
@given(drawn=tasks())
def test_same_certified_result_on_any_task(drawn):
    """Also where the search ends without a solution: then both leave the task to the interior point."""
    (support, labels, *_), C = drawn
    qp = crammer_singer(support, labels, C)
    expected, found = (NativeSolver(compiled=choice).solve(qp) for choice in (False, None))
    assert torch.equal(expected.status, found.status)
    weights = [support.mT @ solution.coef for solution in (expected, found)]
    assert close(weights[1], weights[0], 1e-6 * C * support.norm()) < 1e-6


@examples(20, nightly=200)
@given(seed=st.integers(0, 1000))
def test_threads_change_nothing(seed):
    support, labels, *_ = task(8, shots=(12, 9, 11, 8, 10), d=60, seed=seed)
    qp = crammer_singer(support, labels, 0.3)
    torch.set_num_threads(1)
    expected, _, kkt = solve(qp)
    right, sums = torch.randn(8, 5, 50, dtype=torch.float64), torch.zeros(8, 50, dtype=torch.float64)
    adjoint = kkt.kkt.solve(right, sums, refinements=3)
    torch.set_num_threads(3)
    with patch.object(compiled, "_WORTH_THREADS", 0), patch.object(compiled, "_pool", wraps=compiled._pool) as pool:
        found, *_ = solve(qp)
        again = kkt.kkt.solve(right, sums, refinements=3)
        assert pool.call_count == 4  # two helpers each
    assert torch.equal(expected.coef, found.coef)
    assert all(map(torch.equal, adjoint, again))


def test_singular_and_broken_tasks_leave_their_neighbours_alone():
    support, labels, *_ = task(3, shots=(3, 3, 3), d=2)
    qp = crammer_singer(support, labels, 1e4)
    qp.gram[1] = -qp.gram[1]
    found, *_ = solve(qp)
    assert not found.converged[1]
    for i in (0, 2):
        alone, *_ = solve(qp.tasks(slice(i, i + 1)))
        assert torch.equal(found.coef[i], alone.coef[0])


def test_only_where_it_is_possible(monkeypatch):
    qp = crammer_singer(*task()[:2], 0.1).map(lambda _, value: value.unsqueeze(0))
    assert can_be_compiled(qp)
    assert not can_be_compiled(qp.map(lambda _, value: value.float()))
    assert not can_be_compiled(qp.map(lambda _, value: value.to("meta")))
    monkeypatch.setattr("convexheads.solvers.native.numba_is_installed", lambda: False)
    assert not can_be_compiled(qp)
    assert NativeSolver().solve(qp).converged.all()


@pytest.mark.usefixtures("unchecked")
def test_argument():
    assert repr(NativeSolver(compiled=False)) == "NativeSolver(compiled=False)"
    assert repr(NativeSolver(tolerance=1e-8, compiled=False)) == "NativeSolver(tolerance=1e-08, compiled=False)"
    with pytest.raises(InputError, match=r"NativeSolver\(compiled\): expected False, or None.*, got True"):
        NativeSolver(compiled=True)


@pytest.mark.slow
def test_machine_code_is_found_again_by_the_next_process(tmp_path):
    code = (
        "import torch\n"
        "from convexheads import SVMHead\n"
        "support, labels = torch.randn(6, 9, requires_grad=True), torch.arange(6) % 2\n"
        "SVMHead()(support, labels, torch.randn(3, 9)).sum().backward()\n"
        "from convexheads.solvers import loops\n"
        "print(sum(sum(f.stats.cache_misses.values()) for f in (loops.solve_all, loops.adjoint_all)))\n"
    )
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = [subprocess.run(command, env=environment, capture_output=True, text=True, check=True) for _ in range(2)]
    assert [int(each.stdout) > 0 for each in done] == [True, False]
