"""All methods that find a step of Newton's method in the weights give the same step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tasks import close, examples

from convexheads.heads._losses import CrossEntropy, SquaredHingeLoss
from convexheads.heads._primal import steps
from convexheads.heads._primal.basis import Basis
from convexheads.heads._primal.problem import Problem, evaluate


@st.composite
def points(draw, loss):
    """Groups of tasks with weighted examples, and random weights."""
    groups, members, n, d = (draw(st.integers(*bounds)) for bounds in ((1, 2), (1, 3), (4, 20), (1, 8)))
    k = draw(st.integers(2, 4)) if loss.is_coupled else 1
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))

    def random(*shape):
        return torch.randn(groups, *shape, generator=generator, dtype=torch.float64)

    features, targets = random(1, n, d), torch.zeros(groups, 1, n, k, dtype=torch.float64)
    if loss.is_coupled:
        targets.scatter_(-1, (torch.arange(n) % k).expand(groups, 1, n).unsqueeze(-1), 1)
    else:
        targets[..., ::2, :] = 1
    intercept = draw(st.booleans())
    if intercept:
        features = torch.cat([features, torch.ones_like(features[..., :1])], -1)
    penalty = 10.0 ** random(members)
    problem = Problem(features, targets, 0.1 + random(1, n).abs(), random(1, n, k), penalty, loss, intercept)
    return problem, random(members, features.shape[-1], k)


def differences(step):
    """A step, without what all classes share, on which the cross-entropy does not depend."""
    return step - step.mean(-1, keepdim=True) if step.shape[-1] > 1 else step


@examples(60, nightly=1000)
@given(points(CrossEntropy()))
def test_steps_of_the_cross_entropy(drawn):
    problem, point = drawn[0], evaluate(*drawn)
    expected = differences(steps.by_cholesky(problem, point))
    # Without the damping of the intercept.
    assert close(differences(steps.by_cholesky_in_dual(problem, point)), expected) < 1e-4
    right = -(point.gradient - point.gradient.mean(-1, keepdim=True))
    tolerance = torch.full_like(point.gap, 1e-13)
    found = steps.conjugate_gradients(problem.damped(point.gap), point.curvature, right, tolerance, 1000)
    assert close(differences(found), expected) < 1e-6


@examples(60, nightly=1000)
@given(points(SquaredHingeLoss()))
def test_steps_of_the_squared_hinge(drawn):
    problem, point = drawn[0], evaluate(*drawn)
    expected = steps.by_cholesky(problem, point)
    assert close(steps.by_active_examples(problem, point), expected) < 1e-6


@pytest.mark.parametrize("intercept", [False, True], ids=["through the origin", "intercept"])
@pytest.mark.parametrize("n", [6, 30], ids=["few", "many"])
@pytest.mark.parametrize("penalty", [1e-3, 1e4])
def test_a_basis_changes_no_scores(n, penalty, intercept):
    generator = torch.Generator().manual_seed(0)
    features = 2 + torch.randn(2, 1, n, 9, generator=generator, dtype=torch.float64)
    if intercept:
        features = torch.cat([features, torch.ones_like(features[..., :1])], -1)
    targets = torch.eye(3, dtype=torch.float64)[torch.arange(n) % 3].expand(2, 1, n, 3)
    sizes = torch.full((2, 4), penalty, dtype=torch.float64)
    problem = Problem(
        features, targets, torch.ones_like(targets[..., 0]), 0 * targets, sizes, CrossEntropy(), intercept
    )
    basis = Basis.of(problem)
    assert (basis.columns is None) == (penalty == 1e4)
    changed = basis.change(features)
    inside = torch.randn(2, 4, changed.shape[-1], 3, generator=generator, dtype=torch.float64)
    weight = basis.leave(inside)
    assert close(changed @ inside, features @ weight) < 1e-12
    assert close(basis.enter(weight), inside) < 1e-12
    size = int(intercept)
    penalized = (part[..., : part.shape[-2] - size, :].square().sum((-2, -1)) for part in (inside, weight))
    assert close(*penalized) < 1e-12
