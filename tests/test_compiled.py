"""The compiled active-set search is the one in torch, which every other test of the native solver then covers too."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tasks import close, crammer_singer, task, tasks
from test_solvers import known, known_problem

from convexheads import InputError, NativeSolver, SVMHead
from convexheads.solvers import active_set, compiled
from convexheads.solvers.native import can_be_compiled


def both(qp, max_rounds: int = 12):
    assert can_be_compiled(qp)
    return active_set.search(qp, max_rounds=max_rounds), compiled.search(qp, max_rounds=max_rounds)


def held_to(expected, found, n: int, k: int):
    for one, other in zip(expected[0][1:3], found[0][1:3], strict=True):
        assert torch.equal(one, other)
    assert torch.equal(expected[1], found[1])
    assert close(found[0].coef, expected[0].coef, 1e-3) < 1e-9
    free = ~(found[0].at_upper | found[0].at_lower)
    right = torch.where(free, torch.randn(len(free), n, k, dtype=torch.float64), 0).mT
    sums = torch.where(free.any(-1), torch.randn(len(free), n, dtype=torch.float64), 0)
    for one, other in zip(*(x[0].kkt.solve(right, sums, refinements=3) for x in (expected, found)), strict=True):
        assert close(other, one) < 1e-8


@settings(max_examples=100)
@known
def test_same_active_sets_solutions_and_adjoints(n, k, seed, bounds, smoothing, row_sum):
    qp, *_ = known_problem(3, n, k, seed=seed, bounds=bounds, smoothing=smoothing, row_sum=row_sum)
    qp, *_ = qp.in_units()
    held_to(*both(qp), n, k)


@settings(max_examples=100)
@given(drawn=tasks())
def test_same_certified_result_on_any_task(drawn):
    """Also where the search ends without a solution: then both leave the task to the interior point."""
    (support, labels, *_), C = drawn
    qp = crammer_singer(support, labels, C)
    expected, found = (NativeSolver(compiled=choice).solve(qp) for choice in (False, None))
    assert torch.equal(expected.status, found.status)
    weights = [support.mT @ solution.coef for solution in (expected, found)]
    assert close(weights[1], weights[0], 1e-6 * C * support.norm()) < 1e-6


@settings(max_examples=20)
@given(seed=st.integers(0, 1000))
def test_threads_change_nothing(seed):
    support, labels, *_ = task(8, shots=(12, 9, 11, 8, 10), d=60, seed=seed)
    qp, *_ = crammer_singer(support, labels, 0.3).in_units()
    torch.set_num_threads(1)
    expected, _ = compiled.search(qp, max_rounds=12)
    torch.set_num_threads(3)
    found, _ = compiled.search(qp, max_rounds=12)
    assert qp.linear.numel() * qp.linear.shape[1] ** 2 > compiled._WORTH_THREADS
    assert torch.equal(expected.coef, found.coef)


def test_singular_and_broken_tasks_leave_their_neighbours_alone():
    support, labels, *_ = task(3, shots=(3, 3, 3), d=2)
    qp, *_ = crammer_singer(support, labels, 1e4).in_units()
    qp.gram[1] = -qp.gram[1]
    found, _ = compiled.search(qp, max_rounds=12)
    for i in (0, 2):
        alone, _ = compiled.search(qp.tasks(slice(i, i + 1)), max_rounds=12)
        assert torch.equal(found.coef[i], alone.coef[0])


def logits():
    support, labels, query, _ = task(4, shots=(5, 5, 5), seed=3)
    return SVMHead(0.3)(support, labels, query)


def _send(queue):
    queue.put(logits().numpy())


def test_works_from_threads_and_forked_processes():
    expected = logits()
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found, expected) for found in pool.map(lambda _: logits(), range(16)))
    queue = multiprocessing.get_context("fork").Queue()
    child = multiprocessing.get_context("fork").Process(target=_send, args=(queue,))
    child.start()
    assert torch.equal(torch.from_numpy(queue.get(timeout=60)), expected)
    child.join()


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
    with pytest.raises(InputError, match=r"NativeSolver\(compiled\): got True, wanted False, or None"):
        NativeSolver(compiled=True)
