"""What every solver promises, on problems with known answers; and all of them against each other."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tasks import COMFORTABLE, PRECISION, close, crammer_singer, task, tasks

from convexheads import (
    QP,
    CvxpylayersSolver,
    InputError,
    Learnable,
    NativeSolver,
    OneVsRestHead,
    QpthSolver,
    Solver,
    SolverError,
    SolverWarning,
    Status,
    SVMHead,
)
from convexheads.solvers import SOLVERS, active_set, get_solver

solvers = pytest.mark.parametrize("name", SOLVERS)


def known_problem(
    tasks: int, n: int, k: int, *, seed: int, bounds: str, smoothing: str, row_sum: bool, rank: int | None = None
):
    """A random QP built around a solution chosen beforehand, with strictly complementary multipliers."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.rand(tasks, *shape, generator=generator, dtype=torch.float64)

    root = torch.randn(tasks, n, rank or n + 3, generator=generator, dtype=torch.float64)
    gram = root @ root.mT / n
    coef = 2 * random(n, k) - 1
    if row_sum:
        coef = coef - coef.mean(-1, keepdim=True)
    side = torch.randint(0, 3, (tasks, n, k), generator=generator)
    side[..., 0] = 0  # an entry in each row is free
    held_above = (side == 1) & (bounds != "lower")
    held_below = (side == 2) & (bounds != "upper")
    upper = coef + torch.where(held_above, 0.0, 0.1 + random(n, k))
    lower = coef - torch.where(held_below, 0.0, 0.1 + random(n, k))
    pull = torch.where(held_above, 0.1 + random(n, k), 0.0) - torch.where(held_below, 0.1 + random(n, k), 0.0)
    smoothed = None if smoothing == "none" else 0.1 + random(n, k)
    if smoothed is not None and smoothing == "some":
        smoothed = smoothed * (random(n, k) < 0.5)
    linear = gram @ coef + pull
    if smoothed is not None:
        linear = linear + smoothed * coef
    if row_sum:
        linear = linear + torch.randn(tasks, n, 1, generator=generator, dtype=torch.float64)
    qp = QP(
        gram,
        linear,
        lower=None if bounds == "upper" else lower,
        upper=None if bounds == "lower" else upper,
        smoothing=smoothed,
        row_sum=row_sum,
    )
    return qp, coef, pull


known = given(
    n=st.integers(1, 8),
    k=st.integers(2, 5),
    seed=st.integers(0, 2**31),
    bounds=st.sampled_from(["upper", "lower", "both"]),
    smoothing=st.sampled_from(["none", "some", "all"]),
    row_sum=st.booleans(),
)


@solvers
@example(n=2, k=2, seed=0, bounds="upper", smoothing="none", row_sum=True)  # whose optimal value is below zero
@settings(max_examples=25)
@known
def test_finds_the_known_solution(name, n, k, seed, bounds, smoothing, row_sum):
    assume(row_sum or smoothing == "all" or bounds == "both")  # otherwise no gap can be certified, see QP
    qp, coef, pull = known_problem(2, n, k, seed=seed, bounds=bounds, smoothing=smoothing, row_sum=row_sum)
    solution = get_solver(name).solve(qp)
    tolerance = {"native": 1e-8, "qpth": 1e-5, "cvxpylayers": 1e-4, "moreau": 1e-6}[name]
    assert solution.converged.all()
    assert close(solution.coef, coef, 1.0) < tolerance
    # The multipliers, too, up to what the gap leaves open.
    assert (solution.bound_multipliers - pull).abs().max() < 100 * tolerance


@solvers
def test_missing_bounds_may_be_infinite(name):
    qp, coef, _ = known_problem(2, 5, 3, seed=1, bounds="both", smoothing="none", row_sum=True)
    loose = (coef - qp.lower > 0.05) & (torch.arange(3) > 0)
    holey = QP(qp.gram, qp.linear, lower=torch.where(loose, -torch.inf, qp.lower), upper=qp.upper)
    assert close(get_solver(name).solve(holey).coef, coef) < 1e-4


@solvers
def test_batch_equals_loop(name):
    support, labels, _, _ = task(2, 3, shots=(2, 2, 2))
    qp = crammer_singer(support, labels, C=0.5)
    together = get_solver(name).solve(qp)
    assert together.coef.shape == qp.linear.shape
    assert together.gap.shape == together.status.shape == together.residual.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            alone = get_solver(name).solve(crammer_singer(support[i, j], labels[i, j], C=0.5))
            assert alone.gap.shape == ()
            assert (
                close(together.coef[i, j], alone.coef)
                < {"native": 1e-10, "qpth": 1e-6, "cvxpylayers": 1e-6, "moreau": 1e-8}[name]
            )


@solvers
def test_failed_task_leaves_its_neighbours_alone(name):
    support, labels, _, _ = task(3)
    qp = crammer_singer(support, labels, C=0.5)
    qp.gram[1] = -qp.gram[1]  # not a Gram matrix at all
    solver = get_solver(name)
    solver.on_failure = "return"
    solution = solver.solve(qp)
    assert solution.status.tolist() == [Status.CONVERGED, Status.FAILED, Status.CONVERGED]
    for i in (0, 2):
        alone = solver.solve(crammer_singer(support[i], labels[i], C=0.5))
        assert close(solution.coef[i], alone.coef) < 1e-5


@solvers
def test_on_failure(name):
    support, labels, _, _ = task(2, 2)
    qp = crammer_singer(support, labels, C=0.5)
    qp.gram[1, 0] = torch.nan
    make = SOLVERS[name]
    with pytest.raises(SolverError, match=rf"{make.__name__}: 1 of 4 tasks .*task \(1, 0\)") as caught:
        make().solve(qp)
    assert caught.value.solution.converged.tolist() == [[True, True], [False, True]]
    with pytest.warns(SolverWarning, match=r"task \(1, 0\)"):
        make(on_failure="warn").solve(qp)
    assert make(on_failure="return").solve(qp).status[1, 0] == Status.FAILED


@solvers
def test_early_stopping_is_a_choice(name):
    support, labels, query, _ = task(2, shots=(5, 5, 5), d=30)
    exact = SVMHead(0.5).fit(support, labels)
    gaps = []
    for iterations in (2, 4, 30):
        fitted = SVMHead(0.5, solver=SOLVERS[name](max_iterations=iterations)).fit(support, labels)
        gaps.append(fitted.solution.gap.max().item())
        assert (fitted.solution.status != Status.FAILED).all()
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-4 < gaps[0]
    assert fitted.solution.converged.all()
    assert close(fitted(query), exact(query)) < 1e-4


def test_native_counts_iterations_per_task():
    support, labels, _, _ = task(4, shots=(5, 5, 5), d=30)
    solution = NativeSolver().solve(crammer_singer(support, labels, C=torch.tensor([1e-3, 1, 1e3, 1e5])[:, None, None]))
    assert solution.iterations.shape == (4,)
    assert 1 <= solution.iterations.min() < solution.iterations.max() < 60
    stopped = NativeSolver(max_iterations=3).solve(crammer_singer(support, labels, C=1.0))
    assert (stopped.iterations == 3).all()


@solvers
def test_solves_in_float64_whatever_comes(name):
    support, labels, _, _ = task(2)
    exact = get_solver(name).solve(crammer_singer(support.float().double(), labels, C=0.5))
    qp = crammer_singer(support.float(), labels, C=0.5)
    qp = QP(support.float().double() @ support.float().double().mT, qp.linear, upper=qp.upper)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = get_solver(name).solve(qp)
    assert solution.coef.dtype == torch.float64
    assert close(solution.coef, exact.coef) < 1e-7


@solvers
def test_solves_no_tasks(name):
    support, *_ = task(3)
    qp = QP(support[:0] @ support[:0].mT, torch.zeros(0, 6, 3), upper=torch.ones(0, 6, 3))
    assert get_solver(name).solve(qp).coef.shape == (0, 6, 3)


# The certificate ------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(tasks(), st.floats(-12, 0), st.integers(0, 2**31))
def test_certificate_bounds_the_true_error(drawn, magnitude, seed):
    """For coefficients spoilt by any amount: the certified bound of the weights' error holds."""
    (support, labels, _, ways), C = drawn
    qp, *_ = QP(
        support @ support.mT,
        torch.nn.functional.one_hot(labels, ways).double(),
        upper=C * torch.nn.functional.one_hot(labels, ways).double(),
    ).in_units()
    best = qp.project(NativeSolver().solve(qp).coef)
    noise = torch.randn(best.shape, generator=torch.Generator().manual_seed(seed), dtype=best.dtype)
    spoilt = qp.project(best + 10**magnitude * noise)

    def norm(coef):
        return (coef * (qp.gram @ coef)).sum().clamp_min(0).sqrt()

    assume(norm(best) > 0)  # or relative errors say nothing
    certificate = qp.certify(spoilt)
    own = qp.certify(best)
    rounding = 1e-7 * (qp.gram.diagonal().max().sqrt() * (best.abs().sum() + 1e-3))
    allowed = certificate.weight_error * norm(spoilt) + own.weight_error * norm(best) + rounding
    assert norm(spoilt - best) <= allowed
    assert certificate.gap >= 0


@solvers
def test_infeasible_problems_are_not_certified(name):
    qp = crammer_singer(*task()[:2], C=0.1)
    below = QP(qp.gram, qp.linear, upper=qp.upper - 1)  # no row can sum to zero
    solution = SOLVERS[name](on_failure="return").solve(below)
    assert solution.status == Status.FAILED
    with pytest.raises(InputError, match=r"QP\(lower, upper\): got 1 above 0 at \(0, \d\), wanted lower <= upper"):
        get_solver(name).solve(QP(qp.gram, qp.linear, lower=torch.ones_like(qp.linear), upper=0 * qp.linear))
    with pytest.raises(InputError, match="got None for both"):
        get_solver(name).solve(QP(qp.gram, qp.linear))


def test_certificate_tells_good_from_bad():
    support, labels, _, _ = task(shots=(5, 5, 5))
    qp, *_ = crammer_singer(support, labels, C=0.5).in_units()
    coef = NativeSolver().solve(qp).coef
    assert qp.certify(coef).gap < 1e-13
    assert qp.certify(0.999 * coef).gap > 1e-8
    assert qp.certify(torch.zeros_like(coef)).gap == 1
    off = coef.clone()
    off[0, 0] += 1e-3
    assert qp.certify(off).residual > 1e-5


@settings(max_examples=100)
@given(st.integers(1, 6), st.integers(0, 2**31), st.sampled_from(["upper", "lower", "both"]), st.booleans())
def test_projection_is_the_nearest_feasible_row(k, seed, bounds, row_sum):
    """Optimality: no feasible direction leads closer."""
    generator = torch.Generator().manual_seed(seed)
    value, lower, upper = torch.randn(3, 4, k, generator=generator, dtype=torch.float64)
    lower, upper = -lower.abs(), upper.abs() * 10.0 ** torch.randint(0, 12, (4, k), generator=generator)
    qp = QP(
        torch.eye(4, dtype=torch.float64),
        value,
        lower=None if bounds == "upper" else lower,
        upper=None if bounds == "lower" else upper,
        row_sum=row_sum,
    )
    nearest = qp.project(value)
    if row_sum:
        assert nearest.sum(-1).abs().max() < 1e-12
    if bounds != "upper":
        assert (nearest >= lower).all()
    if bounds != "lower":
        assert (nearest <= upper).all()
    # (value - nearest) must be a multiplier: constant where free, above it at an upper bound, below it at a lower one.
    pull = value - nearest
    room_above = torch.full_like(pull, torch.inf) if bounds == "lower" else upper - nearest
    room_below = torch.full_like(pull, torch.inf) if bounds == "upper" else nearest - lower
    if row_sum:  # entries that could rise must not want to more than entries that could fall
        wants_up = torch.where(room_above > 1e-12, pull, -torch.inf).amax(-1)
        wants_down = torch.where(room_below > 1e-12, pull, torch.inf).amin(-1)
        assert (wants_up <= wants_down + 1e-12).all()
    else:
        assert (torch.where(room_above > 1e-12, pull, -1.0) <= 1e-12).all()
        assert (torch.where(room_below > 1e-12, pull, 1.0) >= -1e-12).all()


# All against each other -----------------------------------------------------------------------------------------------


def logits_and_gradients(solver: Solver, drawn, C: float, smoothing: float):
    support, labels, query, ways = drawn
    support = support.clone().requires_grad_()
    head = SVMHead(C, smoothing=smoothing, solver=solver)
    fitted = head.fit(support, labels, ways=ways)
    logits = fitted(query)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=logits.dtype)
    (gradient,) = torch.autograd.grad((logits * direction).sum(), support)
    return fitted, logits.detach(), gradient, direction


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "native"])
@settings(max_examples=60)
@given(tasks(), st.sampled_from([0.0, 1.0]))
def test_solvers_agree(name, drawn, smoothing):
    (support, labels, query, ways), C = drawn
    if len(labels) * ways > 100:  # nk x nk matrices: a minute each
        return
    native, expected, gradient, direction = logits_and_gradients(NativeSolver(), drawn[0], C, smoothing)
    assert native.solution.converged.all()
    other, logits, other_gradient, _ = logits_and_gradients(SOLVERS[name](on_failure="return"), drawn[0], C, smoothing)
    coef = native.dual.coef.detach()
    # Sizes below which differences are rounding: of a sum of terms that cancel.
    size = ((query @ support.mT).abs() @ coef.abs()).max().clamp_min(1e-3 * C)
    slope = (coef.abs() @ direction.abs().mT @ query.abs()).max().clamp_min(1e-3 * C)
    curvature = C * support.square().sum(-1).mean()
    unique = len(labels) <= support.shape[-1] or smoothing > 0
    if unique and COMFORTABLE[0] <= curvature <= COMFORTABLE[1]:
        precision = PRECISION[name]
        assert other.solution.converged.all()
        assert close(other.dual.coef.detach(), coef, C * 1e-3) < precision.coef
        assert close(logits, expected, size) < precision.logits
        assert close(other_gradient, gradient, slope) < precision.gradient
    elif other.solution.converged.all() and smoothing == 0:
        # Elsewhere: no further from our weights than the two certificates allow.
        gram = support @ support.mT
        difference = other.dual.coef.detach() - coef
        distance = (difference * (gram @ difference)).sum().clamp_min(0)
        objective = (coef * (gram @ coef)).sum() / 2 + C * len(labels)
        allowed = objective * (other.solution.gap + native.solution.gap + 4 * other.solution.residual + 1e-9)
        assert distance <= 2 * allowed * 2


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
        qp = QP(support @ support.mT, targets, upper=C * targets, smoothing=smoothed)
        return ((query @ support.mT @ NativeSolver().solve(qp).coef) * direction).sum() / scale**2 / C

    variable = [support.requires_grad_(), torch.tensor(C, dtype=torch.float64, requires_grad=True)]
    gradients = torch.autograd.grad(value(*variable), variable)
    point = [x.detach() for x in variable]
    for index, gradient in enumerate(gradients):
        for _ in range(6):
            along = torch.randn_like(point[index])
            step = 1e-6 * point[index].abs().max()
            moved = [[p + sign * step * along if i == index else p for i, p in enumerate(point)] for sign in (1, -1)]
            numeric = (value(*moved[0]) - value(*moved[1])) / (2 * step)
            scale_of_it = (gradient.abs() * along.abs()).sum().item()
            assert abs(numeric - (gradient * along).sum()) <= 1e-6 * max(scale_of_it, value(*point).abs().item())


@solvers
def test_gradient_reaches_every_part_of_the_problem(name):
    qp, *_ = known_problem(2, 4, 3, seed=3, bounds="both", smoothing="all", row_sum=True)
    leaves = {part: getattr(qp, part).clone().requires_grad_() for part in ("linear", "lower", "upper", "smoothing")}
    root = torch.linalg.cholesky(qp.gram).requires_grad_()

    def weighted(root, linear, lower, upper, smoothing):
        solution = get_solver(name).solve(QP(root @ root.mT, linear, lower=lower, upper=upper, smoothing=smoothing))
        return (solution.coef * torch.linspace(-1, 1, 24, dtype=torch.float64).view(2, 4, 3)).sum()

    leaves = {"root": root, **leaves}
    gradients = torch.autograd.grad(weighted(**leaves), list(leaves.values()))
    for (part, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        along = torch.randn_like(leaf) * (torch.tril(torch.ones(4, 4)) if part == "root" else 1)
        step = {"native": 1e-6, "qpth": 1e-5, "cvxpylayers": 1e-3, "moreau": 1e-6}[name]
        values = [weighted(**(leaves | {part: (leaf + s * step * along).detach()})).item() for s in (1, -1)]
        numeric = (values[0] - values[1]) / (2 * step)
        tolerance = {"native": 1e-6, "qpth": 1e-4, "cvxpylayers": 2e-2, "moreau": 1e-4}[name]
        assert numeric == pytest.approx((gradient * along).sum().item(), rel=tolerance, abs=tolerance), part


def test_weakly_active_bound_gives_a_one_sided_derivative():
    """Where a bound is about to become active the solution has two one-sided derivatives; ours is one of them."""
    gram, linear = torch.eye(1, dtype=torch.float64), torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    bound = torch.tensor([[1.0, 5.0]], dtype=torch.float64, requires_grad=True)  # exactly the free solution
    solution = NativeSolver().solve(QP(gram, linear, upper=bound))
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
        SVMHead(0.1, solver=NativeSolver(compiled=False))(support, labels, query).sum().backward()
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


def test_names_and_objects_are_interchangeable():
    for name, kind in SOLVERS.items():
        assert type(SVMHead(solver=name).solver) is kind
    solver = QpthSolver(max_iterations=3)
    assert SVMHead(solver=solver).solver is solver
    assert repr(solver) == "QpthSolver(max_iterations=3)"
    assert repr(CvxpylayersSolver(tolerance=1e-2, on_failure="warn")) == (
        "CvxpylayersSolver(tolerance=0.01, on_failure='warn')"
    )
    assert math.isclose(NativeSolver().tolerance, 1e-6)


def test_an_optimal_projection_does_not_prove_an_active_set(monkeypatch):
    """A search that ends astray, but whose projection happens to be optimal: values right, gradient not its own."""
    support, labels, query, _ = task(3, shots=(3, 3, 3), d=10)
    solver = NativeSolver(compiled=False)
    head = OneVsRestHead(Learnable(1e-4), solver=solver)  # all coefficients end at their bounds
    expected = head(support, labels, query)
    gradient = torch.autograd.grad(expected.square().sum(), list(head.parameters()))
    search = active_set.search

    def astray(qp, start, *, max_rounds):
        found, rounds = search(qp, start, max_rounds=max_rounds)
        if max_rounds == 1:  # the interior point's polish
            return found, rounds
        nowhere = torch.zeros_like(found.at_upper)
        return found._replace(coef=1e3 * found.coef, at_upper=nowhere, at_lower=nowhere), rounds

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
        ({"linear": torch.ones(2)}, r"QP\(linear\): got shape \(2,\), wanted"),
        ({"linear": torch.ones(4, 0)}, r"QP\(linear\): got shape \(4, 0\), wanted"),
        ({"gram": torch.eye(3)}, r"QP\(gram\): got shape \(3, 3\), wanted \(4, 4\)"),
        ({"upper": torch.ones(4, 1)}, r"QP\(upper\): got shape \(4, 1\), wanted \(4, 2\)"),
        ({"smoothing": torch.ones(2)}, r"QP\(smoothing\): got shape \(2,\), wanted \(4, 2\)"),
        ({"root": torch.ones(3, 2)}, r"QP\(root\): got shape \(3, 2\), wanted \(4, 2\)"),
    ],
    ids=["vector", "no column", "gram", "upper", "smoothing", "root"],
)
def test_shapes_that_do_not_go_together(changed, message, unchecked):
    """Compiled loops would read beyond them."""
    qp = QP(**{"gram": torch.eye(4), "linear": torch.ones(4, 2), "upper": torch.ones(4, 2)} | changed)
    with pytest.raises(InputError, match=message):
        NativeSolver().solve(qp)
