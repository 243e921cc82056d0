"""Heads with a closed form are right, or their status says that they are not.

References are computed in extended precision, with mpmath, from the definitions of the heads.
"""

from __future__ import annotations

from functools import partial

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tasks import close, examples, task

from convexheads import (
    GaussianProcessHead,
    LinearDiscriminantHead,
    MahalanobisHead,
    PerTask,
    PrototypeHead,
    RidgeHead,
    RidgeRegressionHead,
    SolverError,
    SolverWarning,
)
from convexheads.heads import KernelExpansion, shifted_cholesky
from convexheads.heads._closed_form import (
    CholeskySystem,
    SpectralSystem,
    errors_of_dual,
    errors_of_system,
    errors_of_weights,
)
from convexheads.kernels import Linear
from convexheads.solvers.certificate import ZERO_GAP


def dot(left, right):
    """A linear kernel of which the library does not know that it is linear."""
    return left @ right.mT


CLASSIFIERS = {
    "ridge": lambda strength, **options: RidgeHead(strength, **options),
    "ridge with intercept": lambda strength, **options: RidgeHead(strength, intercept=True, **options),
    "discriminant": lambda strength, **options: LinearDiscriminantHead(0.5, variance=strength, **options),
    "Mahalanobis": lambda strength, **options: MahalanobisHead(strength, **options),
}
REGRESSORS = {
    "ridge regression": lambda strength, **options: RidgeRegressionHead(strength, **options),
    "Gaussian process": lambda strength, **options: GaussianProcessHead(strength, **{"kernel": Linear()} | options),
}
HEADS = CLASSIFIERS | REGRESSORS
SIZES = {"n < d": {"shots": (2, 3), "d": 7, "queries": 2}, "n > d": {"shots": (5, 6, 4), "d": 3, "queries": 2}}


def call(name, head, support, labels, query):
    values = labels if name in CLASSIFIERS else torch.nn.functional.one_hot(labels).to(support)
    fitted = head.fit(support, values)
    return fitted, fitted(query)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kernel", [Linear(), dot], ids=["linear", "function"])
@pytest.mark.parametrize("name", HEADS)
def test_ordinary_tasks_are_certified(name, kernel, sizes):
    support, labels, query, _ = task(5, **sizes)
    fitted, _ = call(name, HEADS[name](1.0, kernel=kernel), support, labels, query)
    assert fitted.solution.converged.all()
    assert fitted.solution.gap.max() < 1e-11
    assert fitted.solution.gap.shape == fitted.solution.residual.shape == (5,)


def test_prototypes_are_exact():
    solution = PrototypeHead().fit(*task(5)[:2]).solution
    assert solution.converged.all()
    assert (solution.gap == 0).all()


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kernel", [Linear(normalize=True), 2.5 * Linear()], ids=["normalized", "scaled"])
@pytest.mark.parametrize("name", HEADS)
def test_primal_and_dual_are_the_same(name, kernel, sizes):
    """Logits, coefficients and gradients; the dual is what an unknown kernel gets."""
    support, labels, query, _ = task(3, **sizes)
    results = []
    for each in (kernel, lambda left, right: kernel(left, right)):
        x, q = support.clone().requires_grad_(), query.clone().requires_grad_()
        fitted, logits = call(name, HEADS[name](0.7, kernel=each), x, labels, q)
        results.append((logits, fitted.expansion.coef, *torch.autograd.grad(logits.logsumexp(-1).sum(), (x, q))))
        assert isinstance(fitted.expansion, KernelExpansion)
    for one, other in zip(*results, strict=True):
        assert close(one, other) < 1e-9


# The certificate ------------------------------------------------------------------------------------------------------


def exact_ridge(support, targets, penalty, query):
    x, y = mpmath.matrix(support.tolist()), mpmath.matrix(targets.tolist())
    inverse = (x.T * x + mpmath.mpf(penalty) * mpmath.eye(x.cols)) ** -1
    return mpmath.matrix(query.tolist()) * (inverse * (x.T * y))


def exact_gaussians(support, labels, query, covariance_of, constant_of):
    """The scores of Gaussian classes up to a constant of each query."""
    classes, rows = [], [mpmath.matrix([row]) for row in support.tolist()]
    for label in range(int(labels.max()) + 1):
        own = [row for row, other in zip(rows, labels.tolist(), strict=True) if other == label]
        classes.append((sum(own[1:], own[0]) / len(own), own))
    scores = []
    for mean, own in classes:
        inverse = covariance_of(classes, rows, own) ** -1
        parts = [mpmath.matrix([q]) - mean for q in query.tolist()]
        scores.append([constant_of(own, rows) - (part * inverse * part.T)[0] / 2 for part in parts])
    return mpmath.matrix(scores).T


def scatter(rows):
    center = sum(rows[1:], rows[0]) / len(rows)
    parts = [(row - center).T * (row - center) for row in rows]
    return sum(parts[1:], parts[0])


def exact_discriminant(support, labels, strength, query):
    def covariance(classes, rows, own):
        within = [scatter(part) for _, part in classes]
        pooled = sum(within[1:], within[0]) / len(rows)
        return pooled / 2 + mpmath.mpf(strength) / 2 * mpmath.eye(pooled.rows)

    return exact_gaussians(
        support, labels, query, covariance, lambda own, rows: mpmath.log(len(own) / mpmath.mpf(len(rows)))
    )


def exact_mahalanobis(support, labels, strength, query):
    def covariance(classes, rows, own):
        share = mpmath.mpf(len(own)) / (len(own) + 1)
        of_class = scatter(own) / max(len(own) - 1, 1)
        whole = scatter(rows) / (len(rows) - 1)
        return share * of_class + (1 - share) * whole + mpmath.mpf(strength) * mpmath.eye(whole.rows)

    return exact_gaussians(support, labels, query, covariance, lambda own, rows: mpmath.mpf(0))


@mpmath.workdps(50)
def error_of(name, support, labels, strength, query, logits):
    """The largest error of a logit, except for what all classes have in common, relative to the largest logit."""
    one_hot = torch.nn.functional.one_hot(labels).to(support)
    if name in ("discriminant", "Mahalanobis"):
        exact = {"discriminant": exact_discriminant, "Mahalanobis": exact_mahalanobis}[name]
        wanted = torch.tensor(exact(support, labels, strength, query).tolist(), dtype=torch.float64)
        off = logits - wanted
        off = off - off[:, :1]
    else:
        wanted = torch.tensor(exact_ridge(support, one_hot, strength, query).tolist(), dtype=torch.float64)
        off = logits - wanted
    return (off.abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kernel", [Linear(), dot], ids=["linear", "function"])
@pytest.mark.parametrize("name", [name for name in HEADS if name != "ridge with intercept"])
def test_right_or_flagged(name, kernel, sizes):
    """For a regularizer from about a tenth to 1e-18 of the squared length of the features."""
    flagged = []

    @examples(25, nightly=500)
    @given(exponent=st.floats(-16, 1), seed=st.integers(0, 10_000))
    def check(exponent, seed):
        support, labels, query, _ = task(**sizes, seed=seed)
        strength = 10.0**exponent
        fitted, logits = call(name, HEADS[name](strength, kernel=kernel, on_failure="return"), support, labels, query)
        flagged.append(not fitted.solution.converged)
        if fitted.solution.converged:
            assert error_of(name, support, labels, strength, query, logits) < 1e-5
        if exponent > -4:
            assert fitted.solution.converged

    check()
    if sizes is SIZES["n > d"]:  # the primal system stays well conditioned, and the dual one does not
        assert any(flagged) == (kernel is dot or name == "Gaussian process")


@pytest.mark.parametrize("name", ["ridge", "discriminant", "Mahalanobis", "ridge regression"])
@pytest.mark.parametrize("strength", [1e-9, 1e-11, 1e-13])
def test_weights_of_many_examples_keep_all_digits(name, strength):
    support, labels, query, _ = task(**SIZES["n > d"])
    fitted, logits = call(name, HEADS[name](strength), support, labels, query)
    assert fitted.solution.converged
    assert error_of(name, support, labels, strength, query, logits) < 1e-11


@pytest.mark.parametrize("name", HEADS)
def test_a_hopeless_task_fails_alone(name):
    support, labels, query, _ = task(4, **SIZES["n > d"])
    support[2] = 1e9 * support[2]
    expected = call(name, HEADS[name](1e-3, kernel=dot), support[:2], labels[:2], query[:2])[1]
    for on_failure in ("raise", "warn", "return"):
        head = HEADS[name](1e-3, kernel=dot, on_failure=on_failure)
        if on_failure == "raise":
            with pytest.raises(SolverError) as caught:
                call(name, head, support, labels, query)
            solution = caught.value.solution
        elif on_failure == "warn":
            with pytest.warns(SolverWarning):
                fitted, logits = call(name, head, support, labels, query)
            solution = fitted.solution
        else:
            fitted, logits = call(name, head, support, labels, query)
            solution = fitted.solution
        assert solution.converged.tolist() == [True, True, False, True]
        assert solution.coef.isfinite().all((-2, -1))[[0, 1, 3]].all()
    assert close(logits[:2], expected) < 1e-9
    unchecked = HEADS[name](1e-3, kernel=dot, validate=False)
    fitted, _ = call(name, unchecked, support, labels, query)  # raises no error: it would have to read the status
    assert not fitted.solution.converged[2]


@pytest.mark.parametrize("per_class", [False, True])
def test_a_matrix_without_a_factor_is_an_error_or_nan(per_class):
    matrices, shift = torch.eye(3, dtype=torch.float64).repeat(4, 2, 1, 1), torch.tensor(0.5, dtype=torch.float64)
    matrices[2, 1, 2, 2] = -1.0

    def factors(matrices, validate=True):
        return shifted_cholesky(matrices, shift, name="the matrix", validate=validate, per_class=per_class)

    with pytest.raises(
        SolverError, match=r"the matrix .* task \(2,\)" if per_class else r"the matrix .* task \(2, 1\)"
    ):
        factors(matrices)
    expected = torch.linalg.cholesky(matrices[:2] + 0.5 * torch.eye(3))
    torch.testing.assert_close(factors(matrices[:2]), expected)
    for found in (factors(matrices, validate=False), torch.vmap(partial(factors, validate=False))(matrices)):
        assert found.isnan().all((-2, -1)).tolist() == [[False] * 2] * 2 + [[False, True], [False] * 2]
        torch.testing.assert_close(found[:2], expected)


def test_a_grid_of_penalties_has_a_certificate_for_each():
    support, labels, *_ = task(2, **SIZES["n < d"])
    penalties = torch.tensor([1e-2, 1.0, 100.0], dtype=torch.float64)
    many = support.unsqueeze(1).expand(2, 3, *support.shape[1:]), labels.unsqueeze(1).expand(2, 3, -1)
    solution = RidgeHead(PerTask(penalties)).fit(*many).solution
    assert solution.gap.shape == (2, 3)
    assert solution.converged.all()


def test_gap_is_that_of_the_dual():
    """At coefficients with a known error, the gap is the difference of the two objectives, computed from them."""
    support, labels, *_ = task(3, **SIZES["n < d"])
    targets, gram = torch.nn.functional.one_hot(labels).to(support), support @ support.mT
    coef = RidgeHead(2.0).fit(support, labels).expansion.coef
    coef = coef + 1e-3 * torch.randn(coef.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = support.mT @ coef
    primal = ((targets - support @ weight).square().sum((-2, -1)) + 2 * weight.square().sum((-2, -1))) / 2
    dual = 2 * ((targets * coef).sum((-2, -1)) - (coef * (gram @ coef + 2 * coef)).sum((-2, -1)) / 2)
    gap, error = errors_of_dual(gram, torch.tensor(2.0, dtype=torch.float64), targets, coef)
    assert close(gap, (primal - dual) / primal) < 1e-6
    exact = support.mT @ RidgeHead(2.0).fit(support, labels).expansion.coef
    actual = (weight - exact).square().sum((-2, -1)) / weight.square().sum((-2, -1))
    assert (actual <= error).all()


@pytest.mark.parametrize("which", ["ridge regression", "a system"])
def test_errors_of_weights_bound_the_actual_ones(which):
    """At weights with a known error: from above, and not by orders of magnitude."""
    rows, labels, *_ = task(3, **SIZES["n > d"])
    targets = torch.nn.functional.one_hot(labels).to(rows)
    shift, right = torch.full((3,), 0.5, dtype=torch.float64), rows.mT @ targets
    hessian = rows.mT @ rows + 0.5 * torch.eye(3, dtype=torch.float64)
    noise = torch.randn(right.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = torch.linalg.solve(hessian, right)
    values, vectors = torch.linalg.eigh(hessian)
    weight, system = exact + 1e-3 * noise, SpectralSystem(vectors, values)
    if which == "ridge regression":
        gap, error = errors_of_weights(rows, shift, targets - rows @ weight, weight, system)
        objective = ((targets - rows @ weight).square().sum((-2, -1)) + 0.5 * weight.square().sum((-2, -1))) / 2
    else:
        gap, error = errors_of_system(rows, shift, right, weight, system)
        objective = (right * weight).sum((-2, -1)) / 2
    excess = ((weight - exact) * (hessian @ (weight - exact))).sum((-2, -1)) / 2
    distance = (weight - exact).square().sum((-2, -1)) / weight.square().sum((-2, -1))
    for bound, actual in ((gap, excess / objective), (error, distance)):
        assert (actual <= bound).all()
        assert (bound < 1e3 * actual).all()
    assert errors_of_weights(rows, shift, targets - rows @ exact, exact, system)[0].max() < 1e-20


# When it is computed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kernel", [Linear(), dot], ids=["linear", "function"])
@pytest.mark.parametrize("name", HEADS)
def test_an_error_is_raised_exactly_where_the_certificate_says_failed(name, kernel, sizes):
    """Fits do not measure errors where the matrix proves that they are small, and otherwise measure them at once."""
    failed = []

    @examples(25, nightly=500)
    @given(exponent=st.floats(-18, 1), size=st.floats(-6, 6), tasks=st.integers(1, 3), seed=st.integers(0, 10_000))
    def check(exponent, size, tasks, seed):
        support, labels, query, _ = task(tasks, **sizes, seed=seed)
        support, strength = 10.0**size * support, 10.0 ** (exponent + 2 * size)
        support[0] *= 2
        fitted, _ = call(name, HEADS[name](strength, kernel=kernel, on_failure="return"), support, labels, query)
        converged = fitted.solution.converged
        failed.append(not converged.all())
        if converged.all():
            fitted, _ = call(name, HEADS[name](strength, kernel=kernel), support, labels, query)
            assert fitted.solution.converged.all()
        else:
            with pytest.raises(SolverError) as caught:
                call(name, HEADS[name](strength, kernel=kernel), support, labels, query)
            assert (caught.value.solution.converged == converged).all()

    check()
    assert not all(failed)
    if sizes is SIZES["n > d"] and kernel is dot:
        assert any(failed)


@pytest.mark.parametrize("name", HEADS)
def test_a_matrix_proves_a_gap_of_zero_or_nothing(name):
    """Wherever the flag is not set, the gap that is measured is below the one that counts as zero."""
    trusted = []

    @examples(50, nightly=500)
    @given(exponent=st.floats(-12, 1), sizes=st.sampled_from(list(SIZES.values())), seed=st.integers(0, 10_000))
    def check(exponent, sizes, seed):
        support, labels, query, _ = task(2, **sizes, seed=seed)
        flags = []
        with pytest.MonkeyPatch.context() as patch:
            original = CholeskySystem.may_lose_digits
            patch.setattr(CholeskySystem, "may_lose_digits", lambda self: flags.append(original(self)) or flags[-1])
            try:
                fitted, _ = call(name, HEADS[name](10.0**exponent), support, labels, query)
            except SolverError:
                assert flags == [] or flags[0]
                return
        if flags and not flags[0]:
            trusted.append(exponent)
            assert fitted.solution.gap.max() <= ZERO_GAP

    check()
    assert bool(trusted) == (name != "Mahalanobis")  # which has no such proof


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", REGRESSORS)
def test_units_of_the_targets_do_not_matter(name, sizes):
    """Squares of these numbers are infinite or zero."""
    support, labels, *_ = task(2, **sizes)
    targets = torch.nn.functional.one_hot(labels).to(support)
    gaps = [REGRESSORS[name](0.1).fit(support, unit * targets).solution.gap for unit in (1.0, 2.0**600, 2.0**-600)]
    assert gaps[0].max() < 1e-20
    assert gaps[0].equal(gaps[1])
    assert gaps[0].equal(gaps[2])
