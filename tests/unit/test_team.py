"""The kernels in a team of several threads, as on a GPU: simulated, because most machines have no GPU.

`tests/simulated_team.py` runs the kernels as plain Python and looks for races. The machine code for GPUs is compiled.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import known_problem
from tasks import close, crammer_singer, task

pytest.importorskip("numba")
from simulated_team import RaceError, Team, on_this_gpu, simulated

from convexheads import LogisticHead, PrototypeHead, RidgeHead, SVMHead
from convexheads.solvers import ActiveSetSolver, DualProblem, NativeSolver
from convexheads.solvers.native import active_set, cuda_team, numba_backend, numba_kkt, team
from convexheads.solvers.problem import WarmStart

TEAMS = ((1, 4), (3, 1), (2, 3))
LIMITS = {"max_rounds": active_set.MAX_ROUNDS, "warm_rounds": active_set.WARM_ROUNDS}


def duplicates():
    support, labels, *_ = task(2, shots=(2, 3, 2), d=4)
    return crammer_singer(torch.cat([support, support[:, :2]], 1), torch.cat([labels, labels[:, :2]], 1), 0.5)


def uneven_masks():
    qp = crammer_singer(*task(2, shots=(3, 2, 2), d=9)[:2], 0.5)
    used = torch.arange(7) < torch.tensor([[5], [6]])
    gram = torch.where(used.unsqueeze(-1) & used.unsqueeze(-2), qp.gram, 0)
    linear, upper = (torch.where(used.unsqueeze(-1), value, 0) for value in (qp.linear, qp.upper))
    return DualProblem(gram, linear, torch.where(used.unsqueeze(-1), -torch.inf, torch.zeros_like(upper)), upper)


def one_not_finite():
    qp = crammer_singer(*task(3, d=8)[:2], 0.5)
    qp.gram[1, 0, 0] = torch.nan
    return qp


def with_start():
    qp = crammer_singer(*task(2, d=8)[:2], 0.5)
    return replace(qp, start=WarmStart.of(NativeSolver().solve(replace(qp, upper=0.8 * qp.upper))))


PROBLEMS = {
    "separable": lambda: crammer_singer(*task(2, shots=(2, 3, 1), d=12)[:2], 0.3),
    "n > d": lambda: crammer_singer(*task(2, shots=(3, 3, 3), d=2)[:2], 0.5),
    "squared hinge": lambda: crammer_singer(*task(2, shots=(2, 3, 1), d=12)[:2], 0.3, smoothing=0.5),
    "one class": lambda: crammer_singer(*task(2, shots=(4,), d=6)[:2], 0.3),
    "more ways than warps": lambda: crammer_singer(*task(1, shots=(1,) * 6, d=4)[:2], 0.3),
    "two bounds": lambda: known_problem(2, 4, 3, seed=0, bounds="both", smoothing="some", rows_sum_to_zero=False)[0],
    "lower bounds": lambda: known_problem(2, 4, 3, seed=1, bounds="lower", smoothing="none", rows_sum_to_zero=True)[0],
    "duplicates": duplicates,
    "uneven masks": uneven_masks,
    "not finite": one_not_finite,
    "warm start": with_start,
}


def solve(qp):
    return numba_backend.solve(qp, 1e-6, **LIMITS, refinements=active_set.REFINEMENTS)


def solve_on_gpu(qp, make_team=None):
    """The solution, and the solution of a system of the gradient, with the same factors and with new ones."""
    with on_this_gpu(make_team):
        found = solve(qp)
        return found, [each.solve(qp.linear.mT, qp.linear[..., 0], refinements=1) for each in factorized(qp, found)]


def factorized(qp, found):
    """The factors of a solution, and those of a compiled graph, which factorizes in its backward pass."""
    kkt, active = found.linearization.kkt, (found.linearization.at_upper, found.linearization.at_lower)
    rescaled = replace(qp, gram=kkt.gram, smoothing=kkt.smoothing, start=None)
    return kkt, numba_backend.factorize(rescaled, *active)


@pytest.mark.parametrize("shape", TEAMS, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_a_team_computes_what_one_thread_does(problem, shape):
    qp = problem()
    expected = solve(qp)
    found, adjoints = solve_on_gpu(qp, lambda: Team(*shape))
    proven = expected.solution.converged
    assert torch.equal(found.solution.converged, proven)
    assert torch.equal(found.solution.iterations, expected.solution.iterations)
    for name, value in expected.solution.tensors().items():
        if name != "gap":
            torch.testing.assert_close(found.solution.tensors()[name][proven], value[proven], rtol=1e-6, atol=1e-9)
    assert (found.solution.gap[proven] < 1e-9).all()
    for name in ("at_upper", "at_lower"):
        assert torch.equal(getattr(found.linearization, name)[proven], getattr(expected.linearization, name)[proven])
    reference = expected.linearization.kkt.solve(qp.linear.mT, qp.linear[..., 0], refinements=1)
    for adjoint in adjoints:
        for one, other in zip(adjoint, reference, strict=True):
            torch.testing.assert_close(one[proven], other[proven], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("missing", ["wait_for_team", "wait_for_warp"])
@pytest.mark.parametrize("kernel", ["cholesky", "cholesky_solve", "invert", "solve_tasks"])
def test_a_missing_barrier_is_a_race(kernel, missing):
    """The simulation finds races, or the test above would show nothing."""
    uses = {"cholesky": ["wait_for_team"], "cholesky_solve": ["wait_for_warp"], "invert": ["wait_for_warp"]}
    if missing not in uses.get(kernel, [missing]):
        pytest.skip("the kernel does not use this barrier")
    shape = (1, 4) if kernel == "invert" else (2, 2)  # there, each warp has a matrix of its own
    simulation, matrix = Team(*shape), np.eye(6) + 0.1
    simulation.primitives[missing] = lambda: None
    arguments = {
        "cholesky": (matrix, 6),
        "cholesky_solve": (matrix, np.ones(6), 6),
        "invert": (matrix.reshape(-1), 6, np.empty(6), False),
    }
    if kernel == "solve_tasks":
        with pytest.raises((RaceError, IndexError)):  # a wrong index may be read before it is written
            solve_on_gpu(PROBLEMS["separable"](), lambda: simulation)
    else:
        with simulated(simulation), pytest.raises(RaceError):
            simulation.run(getattr(numba_kkt, kernel), *arguments[kernel])


def test_threads_that_part_are_found():
    def kernel():
        if simulation.primitives["thread"]() == 0:
            simulation.primitives["wait_for_team"]()
        else:
            simulation.primitives["wait_for_team"]()

    simulation = Team(1, 2)
    with pytest.raises(RaceError, match="different barriers"):
        simulation.run(kernel)


def test_every_function_of_the_team_has_an_implementation_on_gpus():
    assert set(cuda_team.ON_GPU) == set(team.PRIMITIVES)


@pytest.mark.skipif(find_spec("numba_cuda") is None, reason="numba-cuda is not installed")
def test_small_batches_are_launched_without_a_warning():
    """Warnings are errors in tests."""
    before = list(warnings.filters), cuda_team.dispatcher.config.CUDA_LOW_OCCUPANCY_WARNINGS
    cuda_team.configure(cuda_team._solve_tasks, 8, 1, 0)
    assert (list(warnings.filters), cuda_team.dispatcher.config.CUDA_LOW_OCCUPANCY_WARNINGS) == before


def test_only_what_the_kernels_solve_is_left_to_them_alone():
    """Problems in float32, or with too many examples for a team, have another solver for the tasks that are left."""
    solver = NativeSolver(backend="cuda", on_failure="return", max_block_entries=3 * 3 * 6 * 6)
    small, large = (crammer_singer(*task(7, shots=(shots,) * 3, d=4)[:2], 0.3) for shots in (2, 43))
    with on_this_gpu():
        plan = solver.plan(small)
        assert (plan.solvers, plan.max_tasks) == ((solver.first,), 3)
        found, parts = solver.solve(small), [solver.solve(small.select(slice(i, i + 1))) for i in range(7)]
        for other in (large, small.map(lambda _, value: value.float())):
            assert len(NativeSolver(backend="cuda", on_failure="return").plan(other).solvers) == 2
    torch.testing.assert_close(found.coef, torch.cat([part.coef for part in parts]))


COMPILE = Path(__file__).parent.parent / "compile_for_gpu.py"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["8.0", "9.0", "10.0"])
def test_kernels_compile_for_gpus(architecture):
    if find_spec("numba_cuda") is None:
        pytest.skip("numba-cuda is not installed")
    command = [sys.executable, str(COMPILE), architecture]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": "ignore"})
    assert done.returncode == 0, done.stderr
    kernels = dict(line.split() for line in done.stdout.splitlines())
    assert set(kernels) == {"_solve_tasks", "_solve_systems", "_factorize_tasks"}
    assert all(int(registers) <= cuda_team.MAX_REGISTERS for registers in kernels.values())


# On a GPU ---------------------------------------------------------------------------------------------------------------


def on_device():
    return SVMHead(C=0.3, solver=NativeSolver(backend="cuda", on_failure="return"), validate=False)


@pytest.mark.gpu
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_gpu_equals_cpu(problem, cuda):
    qp = problem()
    expected, found = solve(qp), ActiveSetSolver(backend="cuda")._solve_numerically(qp.to(cuda))
    assert torch.equal(found.solution.converged.cpu(), expected.solution.converged)
    chosen = expected.solution.converged
    torch.testing.assert_close(found.solution.coef.cpu()[chosen], expected.solution.coef[chosen], rtol=1e-6, atol=1e-9)
    reference = expected.linearization.kkt.solve(qp.linear.mT, qp.linear[..., 0], refinements=1)
    on_gpu = qp.to(cuda)
    for kkt in factorized(on_gpu, found):
        adjoint = kkt.solve(on_gpu.linear.mT, on_gpu.linear[..., 0], refinements=1)
        for one, other in zip(adjoint, reference, strict=True):
            torch.testing.assert_close(one.cpu()[chosen], other[chosen], rtol=1e-6, atol=1e-9)


@pytest.mark.gpu
def test_a_thousand_tasks_on_gpu(cuda):
    """Of several sizes, some of them hard: near duplicates, and a C for which nothing is separated, or everything."""
    for shots, d, C in (((5,) * 5, 64, 0.1), ((3, 9, 1), 5, 10.0), ((2,) * 20, 30, 1.0), ((25,) * 5, 64, 0.01)):
        support, labels, *_ = task(250, shots=shots, d=d)
        support[:, 1] = support[:, 0] + 1e-7 * support[:, 2]
        qp = crammer_singer(support, labels, C)
        expected, found = NativeSolver().solve(qp), NativeSolver(backend="cuda").solve(qp.to(cuda))
        assert found.converged.all()
        weights = [support.mT @ solution.coef.cpu() for solution in (expected, found)]
        assert close(weights[1], weights[0], 1e-6 * C * support.norm()) < 1e-6


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_nothing_waits_for_the_gpu(cuda):
    support, labels, query, ways = task(8, shots=(5,) * 5, d=64)
    support, labels, query = support.to(cuda).requires_grad_(), labels.to(cuda), query.to(cuda)
    on_device()(support, labels, query, ways=ways).sum().backward()  # compiles the kernels
    try:
        torch.cuda.set_sync_debug_mode("error")
        on_device()(support, labels, query, ways=ways).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


NEVER_WAITING = {
    "SVM": on_device,
    "ridge": lambda: RidgeHead(validate=False),
    "prototypes": lambda: PrototypeHead(validate=False),
    "logistic": lambda: LogisticHead(validate=False, steps=3, on_failure="return"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("make", NEVER_WAITING.values(), ids=NEVER_WAITING)
def test_a_step_is_captured_and_replayed(make, cuda):
    head, ways = make(), 5
    support, labels, query, _ = task(8, shots=(5,) * ways, d=64)
    support, labels, query = support.to(cuda).requires_grad_(), labels.to(cuda), query.to(cuda)

    def step():
        logits = head(support, labels, query, ways=ways)
        return logits, *torch.autograd.grad(logits.logsumexp(-1).sum(), support)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # compiles the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    other, other_labels, *_ = task(8, shots=(5,) * ways, d=64, seed=1)
    with torch.no_grad():
        support.copy_(other)
    labels.copy_(other_labels)
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
