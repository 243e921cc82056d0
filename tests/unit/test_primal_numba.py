"""Each Numba kernel of the primal computes what its twin in PyTorch does, with the same results."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tasks import close, examples

from convexheads import LogisticHead, tune
from convexheads.heads._losses import CrossEntropy
from convexheads.heads._primal import compiled, minimize, steps
from convexheads.heads._primal.problem import Problem, evaluate

TINY = torch.finfo(torch.float64).tiny


@st.composite
def problems(draw):
    """Groups of tasks, some examples of which are ignored, and noise with the shape of their weights."""
    groups, members, k = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(2, 5))
    n, d = draw(st.integers(max(2, k), 20)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    intercept = draw(st.booleans())

    def random(*shape, own=1):
        return torch.randn(groups, own, *shape, generator=generator, dtype=torch.float64)

    own = draw(st.sampled_from([1, members]))
    features = 10.0 ** draw(st.integers(-1, 1)) * random(n, d)
    if intercept:
        features = torch.cat([features, torch.ones_like(features[..., :1])], -1)
    targets = torch.nn.functional.one_hot((torch.arange(n) % k).expand(groups, 1, n), k).double()
    weight = 0.2 + random(n, own=own).abs()
    weight[(random(n, own=own) > 1.5) & (torch.arange(n) >= k)] = 0  # every class keeps an example
    penalty = 10.0 ** (2 * torch.randn(groups, members, generator=generator, dtype=torch.float64).clamp(-1.5, 1.5))
    offset = draw(st.sampled_from([0.0, 1.0])) * random(n, k, own=own)
    noise = torch.randn(groups, members, features.shape[-1], k, generator=generator, dtype=torch.float64)
    return Problem(features, targets, weight, offset, penalty, CrossEntropy(), intercept), noise


def near_optimum(problem, noise):
    centered = noise - noise.mean(-1, keepdim=True)  # the same weights for all classes have no effect, and stay
    return on_torch(problem, torch.zeros_like(noise), 1e-20, 3)[0] + 1e-3 * centered


def on_torch(problem, start, tolerance, max_steps):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minimize, "numba_is_installed", lambda: False)
        return minimize.minimize(problem, start, steps.by_conjugate_gradients, tolerance, max_steps)


@examples(60, nightly=1000)
@given(problems())
def test_kernels_equal_their_twins(drawn):
    problem, weight = drawn[0], near_optimum(*drawn)
    (n, d), k = problem.features.shape[-2:], problem.targets.shape[-1]
    point = evaluate(problem, weight)
    parts = problem.features, problem.targets, problem.sample_weight, problem.offset
    # The last member of the last group; what all members share has one.
    task = (*(part[-1, -1].numpy() for part in parts), problem.penalty[-1, -1].item())
    p, gradient = np.empty((n, k)), np.empty((d, k))
    value, gap, error = compiled.evaluate(task, problem.intercept, weight[-1, -1].numpy(), (p, gradient), TINY)
    expected = (part[-1, -1] for part in (point.value, point.gap, point.error))
    for found, twin in zip((value, gap, error), expected, strict=True):
        assert abs(found - twin) < 1e-9 * abs(twin) + 1e-13
    assert close(torch.from_numpy(p), point.curvature[-1, -1], 1e-3) < 1e-9
    assert close(torch.from_numpy(gradient), point.gradient[-1, -1], 1e-3) < 1e-9
    right = point.gradient - point.gradient.mean(-1, keepdim=True)
    damped, tolerance = problem.damped(point.gap), torch.full_like(point.gap, 1e-3)
    change = steps.conjugate_gradients(damped, point.curvature, right, tolerance, 3)
    rows = damped.penalties()[-1, -1, :, 0].contiguous().numpy()
    solution, given_right = np.empty((d, k)), right[-1, -1].contiguous().numpy().copy()
    squares = task[0] * task[0]
    compiled.conjugate_gradients(task, squares, rows, p, given_right, 1e-3, 3, TINY, solution)
    if torch.isfinite(change[-1, -1]).all():
        assert close(torch.from_numpy(solution), change[-1, -1], 1e-6) < 1e-6


@examples(60, nightly=1000)
@given(problems())
def test_same_solutions(drawn):
    problem, start = drawn[0], near_optimum(*drawn)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minimize, "_MAX_COMPILED", 2**30)
        weight, taken = minimize.minimize(problem, start, steps.by_conjugate_gradients, 1e-20, 100)
    expected, others = on_torch(problem, start, 1e-20, 100)
    assert weight.shape == expected.shape
    assert taken.shape == others.shape
    gap, twin = evaluate(problem, weight).error, evaluate(problem, expected).error
    assert ((gap < 1e-8) == (twin < 1e-8)).all()
    good = twin < 1e-14
    if good.any():
        assert close(weight[good], expected[good], 1e-3) < 1e-6


@pytest.mark.parametrize("intercept", [False, True], ids=["through the origin", "intercept"])
def test_non_finite_tasks_leave_their_neighbors_alone_and_threads_change_nothing(intercept, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 120, 150, generator=generator, dtype=torch.float64)  # several blocks for BLAS
    labels = torch.arange(120) % 20
    features[1, 2, 1] = torch.nan
    head = LogisticHead(3.0, intercept=intercept, on_failure="return", validate=False)
    torch.set_num_threads(1)
    expected = head.fit(features, labels, ways=20)
    assert expected.solution.converged.tolist() == [True, False, True]
    torch.set_num_threads(3)
    found = head.fit(features, labels, ways=20)
    assert close(found.weight[[0, 2]], expected.weight[[0, 2]]) < 1e-12
    assert close(head.fit(features[2:], labels, ways=20).weight[0], expected.weight[2]) < 1e-12
    monkeypatch.setattr(minimize, "numba_is_installed", lambda: False)
    assert close(head.fit(features[2], labels, ways=20).weight, expected.weight[2]) < 1e-9


def test_grids_are_solved_as_without_kernels(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 60, 40, generator=generator, dtype=torch.float64)
    labels = torch.arange(60) % 10
    penalties = 10.0 ** torch.linspace(-4, 4, 9, dtype=torch.float64)
    found = tune(LogisticHead(intercept=True), {"regularization": penalties}, features, labels.expand(2, -1), cv=3)
    monkeypatch.setattr(minimize, "numba_is_installed", lambda: False)
    twin = tune(LogisticHead(intercept=True), {"regularization": penalties}, features, labels.expand(2, -1), cv=3)
    assert close(found.log_loss, twin.log_loss) < 1e-6
    assert torch.equal(found.accuracy, twin.accuracy)
