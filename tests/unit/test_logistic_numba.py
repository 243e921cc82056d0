"""Each Numba kernel of logistic regression computes what its twin in PyTorch does, with the same results."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tasks import close, examples

from convexheads import LogisticHead
from convexheads.heads import _logistic_newton, _logistic_numba
from convexheads.heads._losses import CrossEntropy, divergence
from convexheads.kernels import RBF


@st.composite
def problems(draw):
    """A batch of tasks, some examples of which are ignored, coefficients near the optimum, and whether to intercept."""
    k, tasks = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    n = draw(st.integers(max(2, k), 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def random(*shape):
        return torch.randn(tasks, *shape, generator=generator, dtype=torch.float64)

    x = random(n, draw(st.integers(1, 12)))
    targets = torch.nn.functional.one_hot((torch.arange(n) % k).expand(tasks, n), k).double()
    weight = 0.2 + random(n).abs()
    ignored = (random(n) > 1.5) & (torch.arange(n) >= k)  # every class keeps an example
    weight[ignored], targets[ignored] = 0, 0
    size = 10.0 ** draw(st.integers(-3, 3))
    data = _logistic_newton.Task(size * x @ x.mT, targets, weight, draw(st.sampled_from([0.0, 1.0])) * random(n, k))
    coef, bias, *_ = on_torch(data, intercept=k > 1, max_steps=2)
    return data, coef + 1e-3 * random(n, k), bias + 1e-3 * random(k), k > 1 and draw(st.booleans())


def on_torch(data, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_logistic_newton, "_MAX_COMPILED", 0)
        return _logistic_newton.solve(*data, **{"tolerance": 1e-15, "max_steps": 100, **options})


def arrays(data):
    return tuple(part[0].contiguous().numpy() for part in data)


@examples(60, nightly=1000)
@given(problems())
def test_kernels_equal_their_twins(problem):
    data, coef, bias, intercept = problem
    n, k = coef.shape[1:]
    expected = _logistic_newton.evaluate(data, coef, bias, intercept=intercept)
    point = np.empty((n, k)), np.empty((n, k)), np.empty((n, k))
    given = arrays(data), intercept, *arrays((coef, bias)), point, _logistic_numba.LIMITS
    value, gap, error = _logistic_numba.evaluate(*given)
    assert abs(value - expected.value[0]) < 1e-9 * value
    assert abs(gap - expected.gap[0]) < 1e-6 * gap + 1e-15
    assert abs(error * gap - expected.error[0] * expected.gap[0]) < 1e-6 * error * gap + 1e-15
    for found, twin in zip(point, (expected.p, expected.residual, expected.image), strict=True):
        assert close(torch.from_numpy(found), twin[0], 1e-3) < 1e-9
    memory = np.empty((k, n, n)), np.empty((n, n)), np.empty((k, n)), np.empty((k, n)), np.empty((k, k))
    change, bias_change = np.empty((n, k)), np.empty(k)
    _logistic_numba.newton_step(arrays(data), intercept, coef[0].numpy(), point, memory, change, bias_change)
    step = _logistic_newton.newton_step(data, expected, intercept=intercept)
    if torch.isfinite(step[0][0]).all() and torch.isfinite(step[1][0]).all():
        assert close(torch.from_numpy(change), step[0][0]) < 1e-6
        assert close(torch.from_numpy(bias_change), step[1][0], 1e-3) < 1e-6


@examples(60, nightly=1000)
@given(problems())
def test_same_solutions(problem):
    data, _, _, intercept = problem
    expected = on_torch(data, intercept=intercept)
    found = _logistic_newton.solve(*data, intercept=intercept, tolerance=1e-15, max_steps=100)
    assert ((found[2] < 1e-10) == (expected[2] < 1e-10)).all()
    good = expected[2] < 1e-10
    assert close(found[0][good], expected[0][good], 1.0) < 1e-6
    scores = [data.gram @ coef + bias.unsqueeze(-2) for coef, bias, *_ in (found, expected)]
    assert close(scores[0][good], scores[1][good], 1.0) < 1e-5
    assert [part.shape for part in found] == [part.shape for part in expected]


@pytest.mark.parametrize("p", [0.0, 1e-300, 1e-20, 0.3])
def test_divergence(p):
    for change in (-p, -p / 3, 0.0, 1e-3, 0.5):
        log_p = -800.0 if p == 0 else float(np.log(p))
        values = (torch.tensor(value, dtype=torch.float64) for value in (p, log_p, change))
        found = torch.tensor(_logistic_numba.divergence(p, log_p, change), dtype=torch.float64)
        assert close(found, divergence(*values), 1e-12) < 1e-12


def test_losses_of_extreme_scores():
    targets = torch.eye(3, dtype=torch.float64)
    scores = torch.tensor([[800.0, -800.0, 0.0], [1e-3, 40.0, -1e3], [1e5, 0.0, 1e5]], dtype=torch.float64)
    expected = CrossEntropy().evaluate(targets, scores)
    for i in range(3):
        p, slope = np.empty(3), np.empty(3)
        loss = _logistic_numba.evaluate_loss(targets[i].numpy(), scores[i].numpy(), p, slope)
        assert abs(loss - expected.value[i]) <= 1e-12 * abs(loss)
        assert close(torch.from_numpy(p), expected.curvature[i]) < 1e-12
        assert close(torch.from_numpy(slope), expected.slope[i], 1e-300) < 1e-12


def test_non_finite_tasks_leave_their_neighbors_alone_and_threads_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 25, 30, generator=generator, dtype=torch.float64)
    labels = torch.arange(25) % 5
    x[3, 2, 1] = torch.nan
    head = LogisticHead(0.5, intercept=True, kernel=RBF(3.0), on_failure="return", validate=False)
    torch.set_num_threads(1)
    gram, targets = RBF(3.0)(x, x) / 0.5, torch.eye(5, dtype=torch.float64)[labels].expand(40, -1, -1)
    data = gram, targets, torch.ones_like(gram[..., 0]), torch.zeros_like(targets)
    solve = partial(_logistic_newton.solve, intercept=True, tolerance=1e-20, max_steps=100)
    exact = solve(*data)[0]
    expected = head.fit(x, labels, ways=5)
    assert expected.solution.converged.tolist() == [number != 3 for number in range(40)]
    torch.set_num_threads(3)
    found = head.fit(x, labels, ways=5)
    others = [number for number in range(40) if number != 3]
    assert torch.equal(solve(*data)[0][others], exact[others])
    assert torch.equal(solve(*(part[7:8] for part in data))[0][0], exact[7])
    # PyTorch computes the Gram matrices of a fit, and may round differently with other threads, or in another batch.
    assert close(found.solution.coef[others], expected.solution.coef[others]) < 1e-12
    alone = head.fit(x[7:8], labels, ways=5)
    assert close(alone.solution.coef[0], expected.solution.coef[7]) < 1e-12
    monkeypatch.setattr(_logistic_newton, "numba_is_installed", lambda: False)
    without = head.fit(x, labels, ways=5)
    assert close(without.solution.coef[7], expected.solution.coef[7]) < 1e-9
