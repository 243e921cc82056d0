"""Each Numba kernel computes what its twin in PyTorch does, and the compiled solver gives the same results."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from problems import known, known_problem
from tasks import close, crammer_singer, examples, task, tasks

from convexheads import InputError, MissingDependencyError
from convexheads.solvers import ActiveSetSolver, DualProblem, NativeSolver, certificate, feasible_rows
from convexheads.solvers.implicit import REGULARIZATION, active_entries, factorize_free
from convexheads.solvers.native import active_set, admm_steps, numba_backend, numba_kernels, numba_kkt
from convexheads.solvers.problem import ZERO_MULTIPLIER, WarmStart
from convexheads.solvers.rescaling import rescale

TOLERANCE = 1e-6


def solve(qp, max_rounds=active_set.MAX_ROUNDS):
    limits = {"max_rounds": max_rounds, "warm_rounds": active_set.WARM_ROUNDS}
    return numba_backend.solve(qp, TOLERANCE, **limits, refinements=active_set.REFINEMENTS)


# Pairs of a kernel and its twin ---------------------------------------------------------------------------------------


def arrays(qp):
    """The data of the first task, as kernels take it."""
    return tuple(value[0].numpy() for value in numba_backend._tensors(qp))


def sides(at_upper, at_lower):
    return (at_upper[0].to(torch.int8) - at_lower[0].to(torch.int8)).numpy()


def allocate(qp):
    return tuple(value[0] for value in numba_backend.allocate_factors(1, *qp.linear.shape[1:]))


MEMORY = np.empty(1)


def work(qp):
    """Memory for ADMM and for the search."""
    _, n, k = qp.linear.shape
    matrices, vectors = np.empty((numba_kernels.MATRICES, n, k)), np.empty((numba_kernels.VECTORS, n))
    inverse = np.empty((n, n))
    return numba_kernels.divide_memory(matrices, vectors, np.empty((1, n)), inverse.reshape(-1), inverse, MEMORY)[3:5]


def near_solution(qp, seed):
    """Coefficients and row multipliers close to the optimum, some of them outside their bounds."""
    start = next(admm_steps.admm(qp, [30]))
    noise = 1e-3 * torch.randn(qp.linear.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return replace(start, coef=start.coef + noise)


def rescaling(qp, seed):
    problem, coef_scale, multiplier_scale = rescale(qp)
    inner = tuple(np.empty_like(value) for value in arrays(qp))
    *scales, curvature = numba_kernels.rescale(arrays(qp), inner, MEMORY)
    yield scales, [coef_scale[0], multiplier_scale[0]]
    yield curvature, problem.curvature()[0]
    for found, expected in zip(inner, arrays(problem), strict=True):
        finite = np.isfinite(expected)
        assert (np.isfinite(found) == finite).all()
        yield found[finite], expected[finite]


def certification(qp, seed):
    qp, *_ = rescale(qp)
    feasible = qp.project(near_solution(qp, seed).coef)
    found = certificate.certify(qp, feasible)
    coef, multipliers = feasible[0].clone().numpy(), found.row_multipliers[0].clone().numpy()
    bound_multipliers = np.empty_like(coef)
    gap, error, moved, violation, rounding = numba_kernels.certify(
        arrays(qp),
        qp.rows_sum_to_zero,
        coef,
        multipliers,
        bound_multipliers,
        numba_backend._LIMITS,
        np.empty_like(coef),
        MEMORY,
    )
    # The kernel does not look for a better scaling of the weights.
    scores = qp.gram @ feasible
    one, quadratic = torch.ones(1, 1, 1, dtype=torch.float64), (feasible * scores).sum((1, 2)).clamp_min(0)
    difference, primal, _ = certificate._gap(qp, feasible, scores, quadratic, one, None)
    yield gap, difference[0] / primal[0].abs()
    yield error * quadratic[0], 2 * difference[0]
    yield moved, 0.0
    yield violation, found.violation[0]
    yield coef, feasible[0]
    yield bound_multipliers, found.bound_multipliers[0]
    yield multipliers, found.row_multipliers[0]
    assert 0 <= rounding < 1e-6


def projection(qp, seed):
    assume(qp.rows_sum_to_zero and (qp.lower is None or qp.upper is None))  # where Newton's method is exact
    weight = torch.tensor([[[0.7]]], dtype=torch.float64)
    target = torch.randn(qp.linear.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected, multipliers = qp.rows.proximal(target, weight)
    _, _, lower, upper, smoothing = arrays(qp)
    for i, row in enumerate(expected[0]):
        for guess in (0.0, multipliers[0, i].item(), *np.random.default_rng(seed).normal(size=2)):
            found = np.empty(len(row))
            settings = 0.7, smoothing[i], feasible_rows.NEWTON_TOLERANCE
            numba_kernels.proximal(found, target[0, i].numpy(), lower[i], upper[i], *settings, guess)
            yield found, row


def admm_step(qp, seed):
    assume(qp.lower is None or qp.upper is None or not qp.rows_sum_to_zero)
    qp, *_ = rescale(qp)
    expected = next(admm_steps.admm(qp, [4]))
    coef, side = np.empty(qp.linear.shape[1:]), np.empty(qp.linear.shape[1:], np.int8)
    penalty = admm_steps.PENALTY * qp.curvature()[0].item()
    settings = 4, 99, admm_steps.OVER_RELAXATION, feasible_rows.NEWTON_TOLERANCE
    numba_kernels.admm(arrays(qp), qp.rows_sum_to_zero, penalty, settings, coef, side, work(qp)[0], MEMORY)
    yield coef, expected.coef[0]


def warm_start(qp, seed):
    shape = 2, *qp.linear.shape
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    start = WarmStart(values[0], values[1].where(values[1].abs() > 0.3, 0), values[0, ..., 0])
    problem, *scales = rescale(replace(qp, start=start))
    expected = problem.start.at_bounds(problem)
    coef, bound_multipliers, row_multipliers = (value[0].clone().numpy() for value in vars(start).values())
    side, factors = np.empty(qp.linear.shape[1:], np.int8), tuple(scale.item() for scale in scales)
    own = coef, bound_multipliers, row_multipliers
    numba_kernels.begin_at(*own, arrays(problem), factors, ZERO_MULTIPLIER, side, MEMORY)
    found = sides(*active_entries(problem, expected.coef, expected.bound_multipliers))
    yield side, found
    yield coef * (found == 0), expected.coef[0] * torch.from_numpy(found == 0)
    yield row_multipliers, expected.row_multipliers[0]


def active_set_round(qp, seed):
    qp, *_ = rescale(qp)
    start = near_solution(qp, seed)
    at_upper, at_lower = active_entries(qp, start.coef, start.bound_multipliers)
    coef, multipliers = start.coef[0].clone().numpy(), start.row_multipliers[0].clone().numpy()
    side = sides(at_upper, at_lower)
    for max_rounds in (1, 2):
        expected, expected_set, expected_rounds = active_set.search(qp, start, max_rounds=max_rounds)
        own = coef.copy(), multipliers.copy(), side.copy()
        settings = REGULARIZATION, active_set.REFINEMENTS, max_rounds
        memory = allocate(qp), work(qp)[1], MEMORY
        rounds = numba_kernels.search(arrays(qp), qp.rows_sum_to_zero, settings, *own, *memory)
        yield own[0], expected[0]
        assert rounds == expected_rounds[0]
        assert (own[2] == sides(expected_set.at_upper, expected_set.at_lower)).all()


def some_active_set(qp, seed):
    generator = torch.Generator().manual_seed(seed)
    at_upper = torch.rand(qp.linear.shape, generator=generator) < (0.3 if qp.upper is not None else 0)
    at_lower = torch.rand(qp.linear.shape, generator=generator) < (0.3 if qp.lower is not None else 0)
    return at_upper, at_lower & ~at_upper


def factorization(qp, seed):
    """Each column of the inverse."""
    at_upper, at_lower = some_active_set(qp, seed)
    free = ~(at_upper | at_lower)
    kkt, factors = factorize_free(qp, at_upper, at_lower), allocate(qp)
    gram, _, _, _, smoothing = arrays(qp)
    solve_work = work(qp)[1][-1]
    chosen = qp.rows_sum_to_zero, sides(at_upper, at_lower), factors, REGULARIZATION
    numba_kkt.factorize(gram, smoothing, *chosen, solve_work[0])
    for i, c in free[0].nonzero().tolist():
        right, sums = torch.zeros_like(qp.linear), torch.zeros_like(qp.linear[..., 0])
        right[0, i, c] = 1
        x, multipliers = np.zeros(right.shape[1:]), np.zeros(sums.shape[1])
        equations = right[0].numpy(), sums[0].numpy(), x, multipliers
        numba_kkt.solve_factorized(qp.rows_sum_to_zero, *equations, factors, solve_work)
        expected = kkt.solve(right.mT, sums, refinements=0)
        yield x, expected[0][0].mT
        yield multipliers, expected[1][0]


def adjoint(qp, seed):
    found = solve(qp)
    assume(found.solution.converged.all())
    problem, *_ = rescale(qp)
    generator = torch.Generator().manual_seed(seed)
    linearization = found.linearization
    expected = factorize_free(problem, linearization.at_upper, linearization.at_lower)
    free = ~(linearization.at_upper | linearization.at_lower)
    right = torch.where(free, torch.randn(free.shape, generator=generator, dtype=torch.float64), 0).mT
    sums = torch.randn(free.shape[:2], generator=generator, dtype=torch.float64) * free.any(-1)
    sums = sums if qp.rows_sum_to_zero else 0 * sums
    pairs = (kkt.solve(right, sums, refinements=3) for kkt in (linearization.kkt, expected))
    yield from zip(*pairs, strict=True)


TWINS = {
    "rescaling": rescaling,
    "certificate": certification,
    "projection": projection,
    "ADMM step": admm_step,
    "warm start": warm_start,
    "active-set round": active_set_round,
    "factorization": factorization,
    "adjoint": adjoint,
}


@pytest.mark.parametrize("pairs", TWINS.values(), ids=TWINS)
def test_kernel_equals_its_twin(pairs):
    compared = 0

    @examples(30, nightly=500)
    @known
    def check(n, k, seed, bounds, smoothing, rows_sum_to_zero):
        nonlocal compared
        assume(
            rows_sum_to_zero or smoothing == "all" or bounds == "both"
        )  # otherwise no gap can be certified, see DualProblem
        qp, *_ = known_problem(
            1, n, k, seed=seed, bounds=bounds, smoothing=smoothing, rows_sum_to_zero=rows_sum_to_zero
        )
        for found, expected in pairs(qp, seed):
            found, expected = (torch.as_tensor(value, dtype=torch.float64).flatten() for value in (found, expected))
            assert not len(expected) or close(found, expected, 1.0) < 1e-8
            compared += 1

    check()
    assert compared >= 20


# The solver -----------------------------------------------------------------------------------------------------------


def test_same_active_sets_and_solutions():
    proven = []

    @examples(40, nightly=1000)
    @known
    def check(n, k, seed, bounds, smoothing, rows_sum_to_zero):
        assume(rows_sum_to_zero or smoothing == "all" or bounds == "both")
        qp, coef, bound_multipliers = known_problem(
            3, n, k, seed=seed, bounds=bounds, smoothing=smoothing, rows_sum_to_zero=rows_sum_to_zero
        )
        found = solve(qp)
        expected = ActiveSetSolver(backend="torch")._solve_numerically(qp)
        both = found.solution.converged & expected.solution.converged
        proven.extend(both.tolist())
        for side in ("at_upper", "at_lower"):
            one, other = (getattr(each.linearization, side)[both] for each in (found, expected))
            assert torch.equal(one, other)
        assert close(found.solution.coef[both], coef[both], 1.0) < 1e-8
        assert close(found.solution.bound_multipliers[both], bound_multipliers[both], 1.0) < 1e-6
        assert found.solution.coef[~found.solution.converged].isnan().all()
        assert close(found.hessian_scale, expected.hessian_scale) < 1e-12

    check()
    assert sum(proven) > 0.8 * len(proven)  # most tasks are proven, or the comparison would be empty


def test_proves_nothing_that_is_wrong():
    """After one round, most tasks do not have their active set yet, and are not certified."""
    support, labels, *_ = task(30, shots=(8, 9, 7, 8), d=40)
    qp = crammer_singer(support, labels, 0.5)
    exact = NativeSolver(backend="torch").solve(qp)
    solution = solve(qp, max_rounds=1).solution
    assert 0 < solution.converged.sum() < 30
    assert close(solution.coef[solution.converged], exact.coef[solution.converged]) < 1e-9


@examples(40, nightly=1000)
@given(drawn=tasks())
def test_same_certified_result_on_any_task(drawn):
    """Also if the search ends without a solution: then both leave the task to the interior point."""
    (support, labels, *_), C = drawn
    qp = crammer_singer(support, labels, C)
    expected, found = (NativeSolver(backend=backend).solve(qp) for backend in ("torch", "numba"))
    assert torch.equal(expected.status, found.status)
    weights = [support.mT @ solution.coef for solution in (expected, found)]
    assert close(weights[1], weights[0], 1e-6 * C * support.norm()) < 1e-6


@examples(5, nightly=100)
@given(seed=st.integers(0, 1000))
def test_threads_change_nothing(seed):
    support, labels, *_ = task(24, shots=(20, 19, 21, 18, 22), d=120, seed=seed)
    qp = crammer_singer(support, labels, 0.3)
    torch.set_num_threads(1)
    expected = solve(qp)
    right, sums = torch.randn(24, 5, 100, dtype=torch.float64), torch.zeros(24, 100, dtype=torch.float64)
    adjoint = expected.linearization.kkt.solve(right, sums, refinements=3)
    torch.set_num_threads(3)
    with patch.object(numba_backend, "_pool", wraps=numba_backend._pool) as pool:
        found = solve(qp)
        again = expected.linearization.kkt.solve(right, sums, refinements=3)
        assert pool.call_count == 4  # two helpers each
    assert torch.equal(expected.solution.coef, found.solution.coef)
    assert all(map(torch.equal, adjoint, again))


def test_there_is_one_pool_of_threads():
    """Whatever the number of threads that PyTorch has at the time."""
    support, labels, *_ = task(24, shots=(20, 19, 21, 18, 22), d=120)
    qp = crammer_singer(support, labels, 0.3)
    numba_backend._pool.cache_clear()
    for threads in (2, 3, 4, 3):
        torch.set_num_threads(threads)
        solve(qp)
    assert numba_backend._pool.cache_info().misses == 1


def test_thousands_of_ways_are_proven_by_the_kernels():
    """The sums of their rows are larger by rounding."""
    support = torch.randn(2, 10, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = torch.nn.functional.one_hot(torch.arange(10) * 400, 4000).to(support).expand(2, -1, -1)
    qp = DualProblem(support @ support.mT, targets, upper=0.1 * targets)
    assert solve(qp).solution.converged.all()


def test_singular_and_non_finite_tasks_leave_their_neighbors_alone():
    support, labels, *_ = task(3, shots=(3, 3, 3), d=2)
    qp = crammer_singer(support, labels, 1e4)
    qp.gram[1] = -qp.gram[1]
    found = solve(qp).solution
    assert not found.converged[1]
    for i in (0, 2):
        alone = solve(qp.select(slice(i, i + 1))).solution
        torch.testing.assert_close(found.coef[i], alone.coef[0], rtol=0, atol=0, equal_nan=True)


def test_many_small_tasks_are_compiled(monkeypatch):
    """However large the batch is: it is divided."""
    support, labels, *_ = task(10, shots=(1, 1, 1), d=5)
    qp = crammer_singer(support, labels, 0.3)
    expected, sizes = NativeSolver().solve(qp), []
    compiled = numba_backend.solve
    monkeypatch.setattr(active_set, "search", None)

    def count(qp, *args, **settings):
        sizes.append(len(qp.linear))
        return compiled(qp, *args, **settings)

    monkeypatch.setattr(numba_backend, "solve", count)
    found = NativeSolver(max_block_entries=4 * 27).solve(qp)
    assert sizes == [4, 4, 2]
    assert torch.equal(found.coef, expected.coef)
    assert found.gap.shape == (10,)


def test_backends(monkeypatch):
    qp = crammer_singer(*task()[:2], 0.1)
    assert repr(NativeSolver(backend="torch")) == "NativeSolver(backend='torch')"
    assert repr(NativeSolver(tolerance=1e-8, backend="numba")) == "NativeSolver(tolerance=1e-08, backend='numba')"
    monkeypatch.setattr(numba_backend, "solve", None)
    with pytest.raises(TypeError):
        NativeSolver(backend="numba").solve(qp)
    assert NativeSolver(backend="torch").solve(qp).converged.all()
    monkeypatch.setattr(active_set, "numba_is_installed", lambda: False)
    assert NativeSolver().solve(qp).converged.all()
    for backend in ("numba", "cuda"):
        with pytest.raises(MissingDependencyError, match="needs the package 'numba'"):
            NativeSolver(backend=backend)


def test_missing_numba_cuda(monkeypatch):
    monkeypatch.setattr(active_set, "find_spec", lambda name: None if name == "numba_cuda" else object())
    with pytest.raises(MissingDependencyError, match="numba-cuda"):
        NativeSolver(backend="cuda")


@pytest.mark.parametrize("solver", [ActiveSetSolver(), NativeSolver(), ActiveSetSolver(backend="torch")], ids=repr)
@pytest.mark.parametrize("has_smoothing", [False, True])
def test_systems_of_compiled_graphs_are_factorized_by_the_backend(solver, has_smoothing):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 9, 20, generator=generator, dtype=torch.float64)
    gram, right = x @ x.mT, torch.randn(3, 4, 9, generator=generator, dtype=torch.float64)
    at_upper, at_lower = (torch.rand(2, 3, 9, 4, generator=generator) < 0.2).unbind(0)
    at_lower &= ~at_upper
    at_upper[1, 2], at_lower[1, 2] = True, False  # an example without a free entry
    smoothing = torch.rand(3, 9, 4, generator=generator, dtype=torch.float64) if has_smoothing else None
    problem, sums = DualProblem(gram, right.mT, smoothing=smoothing), torch.zeros(3, 9, dtype=torch.float64)
    expected = factorize_free(problem, at_upper, at_lower).solve(right, sums, refinements=3)
    kkt = solver.factorize(problem, at_upper, at_lower)
    assert isinstance(kkt, numba_backend.NumbaKKT) == (solver.backend != "torch")
    for found, value in zip(kkt.solve(right, sums, refinements=3), expected, strict=True):
        assert close(found, value) < 1e-10


@pytest.mark.usefixtures("unchecked")
def test_unknown_backend():
    for kind in (NativeSolver, ActiveSetSolver):
        with pytest.raises(InputError, match=r"Solver\(backend\): expected one of auto, torch, numba.*, got 'opencl'"):
            kind(backend="opencl")


@pytest.mark.slow
def test_machine_code_is_found_again_by_the_next_process(tmp_path):
    code = (
        "import torch\n"
        "from convexheads import SVMHead\n"
        "support, labels = torch.randn(6, 9, requires_grad=True), torch.arange(6) % 2\n"
        "SVMHead()(support, labels, torch.randn(3, 9)).sum().backward()\n"
        "from convexheads.solvers.native.numba_kernels import solve_tasks\n"
        "from convexheads.solvers.native.numba_kkt import solve_systems\n"
        "print(sum(sum(f.stats.cache_misses.values()) for f in (solve_tasks, solve_systems)))\n"
    )
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = [subprocess.run(command, env=environment, capture_output=True, text=True, check=True) for _ in range(2)]
    assert [int(each.stdout) > 0 for each in done] == [True, False]
