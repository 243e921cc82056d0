"""The solvers of the library: the contract of all solvers, the certificate and the gradient."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from operator import getitem, mul

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from solver_contract import *  # noqa: F403
from tasks import close, crammer_singer, examples, gap_without_rounding, task, tasks

from convexheads import InputError, Learnable, OneVsRestSVMHead, SVMHead
from convexheads.solvers import ActiveSetSolver, ADMMSolver, DualProblem, InteriorPointSolver, NativeSolver, Status
from convexheads.solvers.certificate import account_for_rounding, certify
from convexheads.solvers.native import active_set
from convexheads.solvers.rescaling import rescale


@pytest.fixture(scope="module", params=OWN)  # noqa: F405
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_native_counts_iterations_per_task():
    support, labels, _, _ = task(4, shots=(5, 5, 5), d=30)
    solution = NativeSolver().solve(crammer_singer(support, labels, C=torch.tensor([1e-3, 1, 1e3, 1e5])[:, None, None]))
    assert solution.iterations.shape == (4,)
    assert 1 <= solution.iterations.min() < solution.iterations.max() < 60
    stopped = InteriorPointSolver(max_iterations=3).solve(crammer_singer(support, labels, C=1.0))
    assert (stopped.iterations == 3).all()


# The certificate ------------------------------------------------------------------------------------------------------


@examples(30, nightly=600)
@given(tasks(), st.floats(-12, 0), st.integers(0, 2**31))
def test_certificate_bounds_the_true_error(drawn, magnitude, seed):
    """For coefficients spoilt by any amount: the certified bound of the weights' error holds."""
    (support, labels, _, ways), C = drawn
    targets = torch.nn.functional.one_hot(labels, ways).double()
    qp, *_ = rescale(DualProblem(support @ support.mT, targets, upper=C * targets))
    best = qp.project(NativeSolver().solve(qp).coef)
    noise = torch.randn(best.shape, generator=torch.Generator().manual_seed(seed), dtype=best.dtype)
    spoilt = qp.project(best + 10**magnitude * noise)

    def norm(coef):
        return (coef * (qp.gram @ coef)).sum().clamp_min(0).sqrt()

    assume(norm(best) > 0)  # or relative errors say nothing
    certificate = certify(qp, spoilt)
    own = certify(qp, best)
    rounding = 1e-7 * (qp.gram.diagonal().max().sqrt() * (best.abs().sum() + 1e-3))
    allowed = certificate.primal_error_bound * norm(spoilt) + own.primal_error_bound * norm(best) + rounding
    assert norm(spoilt - best) <= allowed
    assert certificate.gap >= 0


def test_certificate_tells_good_from_bad():
    support, labels, _, _ = task(shots=(5, 5, 5))
    qp, *_ = rescale(crammer_singer(support, labels, C=0.5))
    coef = NativeSolver().solve(qp).coef
    assert certify(qp, coef).gap < 1e-13
    assert certify(qp, 0.999 * coef).gap > 1e-8
    assert certify(qp, torch.zeros_like(coef)).gap == 1
    off = coef.clone()
    off[0, 0] += 1e-3
    assert certify(qp, off).residual > 1e-5


def test_an_indefinite_gram_matrix_proves_nothing():
    """A corner that no single step improves, although another corner is better: without convexity, no duality."""
    gram, linear = torch.diag(torch.tensor([-1.0, -10.0])).double(), torch.tensor([[1.0], [-1.0]]).double()
    qp = DualProblem(
        gram, linear, lower=torch.zeros_like(linear), upper=torch.ones_like(linear), rows_sum_to_zero=False
    )
    corner, better = torch.tensor([[1.0], [0.0]]).double(), torch.tensor([[1.0], [1.0]]).double()

    def objective(coef):
        return (coef * (gram @ coef)).sum() / 2 - (linear * coef).sum()

    assert objective(better) < objective(corner)
    assert certify(qp, corner).gap == torch.inf


def exact_gap(support: torch.Tensor, labels: list[int], coef: torch.Tensor, C: float) -> float:
    """The relative duality gap of Crammer and Singer's SVM in rational numbers, from the features themselves."""
    features = [[Fraction(value) for value in row] for row in support.tolist()]
    rows = [[min(Fraction(value), Fraction(0)) for value in row] for row in coef.tolist()]
    for row, label in zip(rows, labels, strict=True):
        row[label] = Fraction(0)
        row[label] = -sum(row)
        assert row[label] <= Fraction(C) * (1 + Fraction(1, 10**12))
    weights = [[sum(map(mul, column, x)) for x in zip(*features, strict=True)] for column in zip(*rows, strict=True)]
    scores = [[sum(map(mul, x, weight)) for weight in weights] for x in features]
    squares = sum(value * value for weight in weights for value in weight)
    losses = sum(
        max((c != label) + score - own[label] for c, score in enumerate(own))
        for own, label in zip(scores, labels, strict=True)
    )
    primal, dual = squares / 2 + Fraction(C) * losses, sum(map(getitem, rows, labels)) - squares / 2
    return float((primal - dual) / primal)


@pytest.mark.parametrize("C", [1e10, 1e12])
def test_certificate_allows_for_what_rounding_hides(C):
    """Where C is so large that the Gram matrix's rounding counts, the certificate alone takes the gap for smaller."""
    hidden = False
    for seed in range(3):
        support, labels, _, _ = task(shots=(6, 5, 6), d=2, seed=seed)  # no weights separate them
        qp = crammer_singer(support, labels, C)
        rescaled, coef_scale, _ = rescale(qp)
        solution = NativeSolver(on_failure="return", backend="torch").solve(qp)
        certificate = certify(rescaled, solution.coef / coef_scale)
        exact = exact_gap(support, labels.tolist(), coef_scale * certificate.feasible, C)
        hidden |= (certificate.gap < exact / 100).item()
        found = account_for_rounding(rescaled, certificate)
        assert exact <= found.gap + found.rounding < 1e4 * exact
        assert solution.status == Status.FAILED
    assert hidden


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize(("d", "C"), [(2, 1e-3), (2, 1.0), (2, 1e3), (2, 1e6), (20, 1e-3), (20, 1.0), (20, 1e3)])
def test_gap_is_at_least_the_exact_one(d, C, backend):
    """Also where the certificate, which is computed in float64, finds a gap of zero."""
    for seed in range(3):
        support, labels, _, _ = task(shots=(3, 2, 4), d=d, seed=seed)
        solution = NativeSolver(backend=backend).solve(crammer_singer(support, labels, C))
        exact = exact_gap(support, labels.tolist(), solution.coef, C)
        assert exact - 1e-16 <= solution.gap < 1e-8  # the exact gap is that of coefficients whose sum is exactly zero


def test_gap_bounds_the_error_of_the_weights():
    """Those that the coefficients stand for, not only a multiple of them: |w - w*|^2 is at most twice gap times P."""
    support, labels, _, _ = task(6, shots=(5, 4, 6), d=8)
    for C in (1e-2, 1.0, 100.0):
        problem = crammer_singer(support, labels, C)
        best = NativeSolver().solve(problem).coef
        optimum = support.mT @ best
        for noise in (1e-6, 1e-3, 1.0):
            generator = torch.Generator().manual_seed(1)
            coef = problem.project(best + noise * C * torch.randn(best.shape, generator=generator, dtype=best.dtype))
            rescaled, coef_scale, _ = rescale(problem)
            gap = certify(rescaled, coef / coef_scale[:, None, None]).gap
            weight = support.mT @ coef
            dual = (problem.linear * coef).sum((-2, -1)) - weight.square().sum((-2, -1)) / 2
            is_usable = gap < 1
            error = (weight - optimum).square().sum((-2, -1))
            assert (error <= 2 * gap * dual / (1 - gap) * (1 + 1e-9))[is_usable].all()
            assert noise > 1e-6 or is_usable.all()


@examples(100, nightly=1000)
@given(st.integers(1, 6), st.integers(0, 2**31), st.sampled_from(["upper", "lower", "both"]), st.booleans())
def test_projection_is_the_nearest_feasible_row(k, seed, bounds, rows_sum_to_zero):
    """Optimality: no feasible direction leads closer."""
    generator = torch.Generator().manual_seed(seed)
    value, lower, upper = torch.randn(3, 4, k, generator=generator, dtype=torch.float64)
    lower, upper = -lower.abs(), upper.abs() * 10.0 ** torch.randint(0, 12, (4, k), generator=generator)
    qp = DualProblem(
        torch.eye(4, dtype=torch.float64),
        value,
        lower=None if bounds == "upper" else lower,
        upper=None if bounds == "lower" else upper,
        rows_sum_to_zero=rows_sum_to_zero,
    )
    nearest = qp.project(value)
    if rows_sum_to_zero:
        assert nearest.sum(-1).abs().max() < 1e-12
    if bounds != "upper":
        assert (nearest >= lower).all()
    if bounds != "lower":
        assert (nearest <= upper).all()
    # (value - nearest) must be a multiplier: constant where free, above it at an upper bound, below it at a lower one.
    pull = value - nearest
    room_above = torch.full_like(pull, torch.inf) if bounds == "lower" else upper - nearest
    room_below = torch.full_like(pull, torch.inf) if bounds == "upper" else nearest - lower
    if rows_sum_to_zero:  # entries that could rise must not want to more than entries that could fall
        wants_up = torch.where(room_above > 1e-12, pull, -torch.inf).amax(-1)
        wants_down = torch.where(room_below > 1e-12, pull, torch.inf).amin(-1)
        assert (wants_up <= wants_down + 1e-12).all()
    else:
        assert (torch.where(room_above > 1e-12, pull, -1.0) <= 1e-12).all()
        assert (torch.where(room_below > 1e-12, pull, 1.0) >= -1e-12).all()


# Gradients -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("smoothing", [0.0, 1.0])
def test_native_gradient_equals_central_differences(seed, smoothing):
    """To 1e-6, in support and C, over the range of C and scale in which differences are themselves that precise."""
    C, scale = 10.0 ** (seed % 4 - 2), 10.0 ** (seed % 3 - 1)
    support, labels, query, ways = task(shots=(3, 2, 1, 3), d=(3, 12)[seed % 2], scale=scale, seed=seed)
    direction = torch.randn(len(query), ways, dtype=torch.float64)

    def value(support, C):
        targets = torch.nn.functional.one_hot(labels, ways).double()
        smoothed = torch.full_like(targets, smoothing) if smoothing else None
        qp = DualProblem(support @ support.mT, targets, upper=C * targets, smoothing=smoothed)
        return ((query @ support.mT @ NativeSolver().solve(qp).coef) * direction).sum() / scale**2 / C

    variable = [support.requires_grad_(), torch.tensor(C, dtype=torch.float64, requires_grad=True)]
    gradients = torch.autograd.grad(value(*variable), variable)
    point = [x.detach() for x in variable]
    for index, gradient in enumerate(gradients):
        for _ in range(2):
            along = torch.randn_like(point[index])
            step = 1e-6 * point[index].abs().max()
            moved = [[p + sign * step * along if i == index else p for i, p in enumerate(point)] for sign in (1, -1)]
            numeric = (value(*moved[0]) - value(*moved[1])) / (2 * step)
            scale_of_it = (gradient.abs() * along.abs()).sum().item()
            assert abs(numeric - (gradient * along).sum()) <= 1e-6 * max(scale_of_it, value(*point).abs().item())


def test_weakly_active_bound_gives_a_one_sided_derivative():
    """Where a bound is about to become active the solution has two one-sided derivatives; ours is one of them."""
    gram, linear = torch.eye(1, dtype=torch.float64), torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    bound = torch.tensor([[1.0, 5.0]], dtype=torch.float64, requires_grad=True)  # exactly the free solution
    solution = NativeSolver().solve(DualProblem(gram, linear, upper=bound))
    torch.testing.assert_close(solution.coef, linear)
    (gradient,) = torch.autograd.grad(solution.coef[0, 0], bound)
    assert min(abs(gradient[0, 0]), abs(gradient[0, 0] - 1)) < 1e-6


def test_no_matrix_of_nk_by_nk_is_formed(monkeypatch):
    """The native solver's largest tensor grows with n * n * k, not with (n k)^2."""
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    support, labels, query, _ = task(shots=(2,) * 12, d=40)
    n, k = len(labels), 12
    support.requires_grad_()
    with Watch():
        SVMHead(0.1, solver=NativeSolver(backend="torch"))(support, labels, query).sum().backward()
    assert n * n * k <= largest < (n * k) ** 2 / 4


def test_hard_margins_and_any_scale_are_certified():
    """A dual SVM depends on C times the Gram matrix alone, so any feature scale must do."""
    reference = None
    for exponent in range(-4, 5):
        support, labels, query, _ = task(shots=(4, 3, 5), d=30)
        scale = 10.0**exponent
        fitted = SVMHead(C=0.1 / scale**2).fit(scale * support, labels)
        assert fitted.solution.gap < 1e-12
        logits = fitted(scale * query)
        reference = logits if reference is None else reference
        assert close(logits, reference) < 1e-9
    for C in (1e-6, 1e-3, 1e3, 1e6):
        assert SVMHead(C).fit(support, labels).solution.gap < 1e-9


NATIVE = [NativeSolver(), NativeSolver(backend="torch"), ADMMSolver()]


@pytest.mark.parametrize("solver", NATIVE, ids=["native", "torch", "admm"])
def test_entry_whose_bounds_are_equal_does_not_depend_on_the_linear_term(solver):
    """Its multiplier is zero here, so that it would count as free."""
    zero = torch.zeros(2, 1, dtype=torch.float64)
    linear = zero.clone().requires_grad_()
    upper = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    problem = DualProblem(torch.eye(2, dtype=torch.float64), linear, lower=-upper, upper=upper, rows_sum_to_zero=False)
    (gradient,) = torch.autograd.grad(solver.solve(problem).coef.sum(), linear)
    assert gradient.flatten().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("solver", NATIVE, ids=["native", "torch", "admm"])
@pytest.mark.parametrize("smoothing", [0.0, 1.0])
def test_gradient_is_exact_for_any_c(solver, smoothing):
    """If C is so small that no score reaches a margin, scores are proportional to C, and so are their gradients."""
    support, labels, query, _ = task(shots=(3, 3, 3), d=16)
    weights, reference = torch.randn(len(query), 3, dtype=torch.float64), None
    for C in (1e-5, 1e-8, 1e-11):
        x = support.clone().requires_grad_()
        logits = SVMHead(C, smoothing=smoothing, solver=solver)(x, labels, query)
        (gradient,) = torch.autograd.grad((weights * logits / C).sum(), x)
        reference = gradient if reference is None else reference
        assert close(gradient, reference) < 1e-9


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("tolerance", [1e-6, 1e-10, 1e-12, 1e-15])
def test_active_sets_are_proven_to_any_tolerance(backend, tolerance):
    support, labels, *_ = task(20, shots=(5,) * 5, d=64)
    problem = crammer_singer(support, labels, 1.0)
    solution = ActiveSetSolver(backend=backend, tolerance=tolerance).solve(problem)
    assert solution.converged.all()
    assert solution.gap.max() < 1e-11  # with what rounding may hide
    assert gap_without_rounding(problem, solution.coef).max() < 1e-13


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_a_linear_problem_has_an_active_set(backend):
    labels = torch.eye(5, dtype=torch.float64).unsqueeze(0)
    problem = DualProblem(torch.zeros_like(labels), labels, upper=0.1 * labels)
    solution = ActiveSetSolver(backend=backend).solve(problem)
    assert close(solution.coef, InteriorPointSolver().solve(problem).coef) < 1e-9


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_gaps_that_rounding_causes_count_like_others(backend):
    torch.manual_seed(0)
    x = torch.randn(60, 12, 12, dtype=torch.float64)
    x = 1e4 * torch.cat([x, x + 1e-4 * torch.randn_like(x)], 1)
    labels = torch.randint(0, 3, (60, 24))
    for tolerance in (1e-6, 1e-2):
        solver = ActiveSetSolver(backend=backend, tolerance=tolerance, on_failure="return")
        solution = SVMHead(C=1.0, smoothing=1.0, solver=solver).fit(x, labels, ways=3).solution
        assert (solution.converged & (solution.gap > 1e-6)).any() == (tolerance > 1e-6)


@pytest.mark.parametrize("solver", [ActiveSetSolver(), InteriorPointSolver(), ADMMSolver()], ids=repr)
def test_solvers_in_float32(solver, monkeypatch):
    """What a device without float64 gives, tried on the CPU."""
    support, labels, query, _ = task(20, shots=(5,) * 5, d=64, dtype=torch.float32)
    exact = SVMHead(1.0)(support.double(), labels, query.double())
    for module in ("heads.base.classification", "heads.base.head", "solvers.base"):
        monkeypatch.setattr(f"convexheads.{module}.working_dtype", lambda _: torch.float32)
    fitted = SVMHead(1.0, solver=solver).fit(support, labels)
    assert fitted.solution.gap.max() < 5e-4  # with what rounding may hide
    assert gap_without_rounding(crammer_singer(support, labels, 1.0), fitted.solution.coef).max() < 1e-4
    assert close(fitted(query).double(), exact) < 1e-3


def test_an_optimal_projection_does_not_prove_an_active_set(monkeypatch):
    """A search that ends astray, but whose projection happens to be optimal: values right, gradient not its own."""
    support, labels, query, _ = task(3, shots=(3, 3, 3), d=10)
    solver = NativeSolver(backend="torch")
    head = OneVsRestSVMHead(Learnable(1e-4), solver=solver)  # all coefficients end at their bounds
    expected = head(support, labels, query)
    gradient = torch.autograd.grad(expected.square().sum(), list(head.parameters()))
    search = active_set.search

    def astray(qp, start, *, max_rounds):
        found = search(qp, start, max_rounds=max_rounds)
        if max_rounds == 1:  # the interior point's polish
            return found
        coef, active_set, rounds = found
        nowhere = torch.zeros_like(active_set.at_upper)
        return 1e3 * coef, replace(active_set, at_upper=nowhere, at_lower=nowhere), rounds

    monkeypatch.setattr(active_set, "search", astray)
    fitted = head.fit(support, labels)
    assert fitted.solution.converged.all()
    assert fitted.solution.residual.max() < 1e-12
    torch.testing.assert_close(fitted(query), expected)
    found = torch.autograd.grad(fitted(query).square().sum(), list(head.parameters()))
    torch.testing.assert_close(found, gradient)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"linear": torch.ones(2)}, r"DualProblem\(linear\): expected .*, got shape \(2,\)"),
        ({"linear": torch.ones(4, 0)}, r"DualProblem\(linear\): expected .*, got shape \(4, 0\)"),
        ({"gram": torch.eye(3)}, r"DualProblem\(gram\): expected \(4, 4\).*, got shape \(3, 3\)"),
        ({"upper": torch.ones(4, 1)}, r"DualProblem\(upper\): expected \(4, 2\).*, got shape \(4, 1\)"),
        ({"smoothing": torch.ones(2)}, r"DualProblem\(smoothing\): expected \(4, 2\).*, got shape \(2,\)"),
        ({"gram_factor": torch.ones(4, 0)}, r"DualProblem\(gram_factor\): expected .*r at least 1, got shape \(4, 0\)"),
        ({"gram_factor": torch.ones(3, 2)}, r"DualProblem\(gram_factor\): expected \(4, 2\).*, got shape \(3, 2\)"),
    ],
    ids=["vector", "no column", "gram", "upper", "smoothing", "empty factor", "gram factor"],
)
def test_shapes_that_do_not_go_together(changed, message, unchecked):
    """Compiled loops would read beyond them."""
    qp = DualProblem(**{"gram": torch.eye(4), "linear": torch.ones(4, 2), "upper": torch.ones(4, 2)} | changed)
    with pytest.raises(InputError, match=message):
        NativeSolver().solve(qp)


@pytest.mark.parametrize(
    "solver",
    [NativeSolver(on_failure="return"), InteriorPointSolver(on_failure="return", gradient="relaxed")],
    ids=["exact", "relaxed"],
)
@pytest.mark.parametrize("kind", ["nan", "indefinite"])
@pytest.mark.parametrize("smoothed", [False, True])
def test_a_failed_task_that_the_loss_leaves_out_has_no_gradient(kind, solver, smoothed) -> None:
    """Zero, not zero times NaN; and the good task's gradient is what it is alone."""

    def gradients(tasks: int) -> list[torch.Tensor]:
        features = torch.randn(2, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        gram = features @ features.mT
        gram[1] = torch.nan if kind == "nan" else -gram[1]
        gram, shared = gram[:tasks].clone().requires_grad_(), torch.ones((), dtype=torch.float64, requires_grad=True)
        linear = torch.nn.functional.one_hot(torch.arange(8) % 3).double().expand(tasks, -1, -1) * shared
        smoothing = 0.1 * shared + 0 * linear if smoothed else None
        solution = solver.solve(DualProblem(gram, linear=linear, upper=0.1 * linear, smoothing=smoothing))
        assert solution.converged.tolist() == [True, False][:tasks]
        solution.coef[0].square().sum().backward()
        return [gram.grad, shared.grad]

    (both, shared), (alone, shared_alone) = gradients(2), gradients(1)
    torch.testing.assert_close(both[0], alone[0])
    torch.testing.assert_close(shared, shared_alone)
    assert (both[1] == 0).all()
