"""Many more examples than features: the interior point and ADMM with matrices of r x r instead of n x n."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from problems import known_problem
from tasks import close, clusters, crammer_singer, examples, task

from convexheads import SVMHead
from convexheads.solvers import ActiveSetSolver, ADMMSolver, DualProblem, Fallback, InteriorPointSolver, NativeSolver
from convexheads.solvers.certificate import certify
from convexheads.solvers.kkt import BlockKKT, LowRankKKT, pivoted_cholesky, with_gram_factor
from convexheads.solvers.native import active_set, default
from convexheads.solvers.native.admm_steps import admm
from convexheads.solvers.native.interior_point import interior_point
from convexheads.solvers.rescaling import rescale


def gram_of(*shape: int, seed: int = 0) -> torch.Tensor:
    features = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return features @ features.mT


def test_factor_is_found_where_the_rank_is_small():
    gram = gram_of(3, 256, 40)
    gram[1] *= 1e-6
    gram[2] = gram_of(256, 7)  # of another rank than its neighbors
    root = pivoted_cholesky(gram, max_rank=64)
    assert 40 <= root.shape[-1] <= 64
    for found, expected in zip(root @ root.mT, gram, strict=True):
        assert close(found, expected) < 1e-13


def test_factor_of_any_kernel():
    """Duplicates and smooth kernels have a small rank too, whatever the number of features."""
    few = gram_of(32, 500).repeat(1, 9, 9)
    root = pivoted_cholesky(few, max_rank=72)
    assert close(root @ root.mT, few) < 1e-13
    points = torch.linspace(0, 1, 300, dtype=torch.float64)
    smooth = (-(points[:, None] - points).square()).exp()
    root = pivoted_cholesky(smooth.unsqueeze(0), max_rank=75)
    assert root.shape[-1] <= 32
    assert close(root @ root.mT, smooth) < 1e-12


def test_no_factor_where_it_would_not_pay():
    assert pivoted_cholesky(gram_of(1, 300, 76), max_rank=75) is None
    assert (
        pivoted_cholesky(torch.cat([gram_of(1, 300, 4), gram_of(1, 300, 300)]), max_rank=75) is None
    )  # one of the batch
    assert pivoted_cholesky(torch.zeros(1, 300, 300, dtype=torch.float64), max_rank=75).shape == (1, 300, 16)
    for n, found in ((300, True), (255, False)):
        qp = DualProblem(gram_of(1, n, 3), torch.zeros(1, n, 2), upper=torch.zeros(1, n, 2))
        assert (with_gram_factor(qp).gram_factor is not None) is found


@pytest.mark.parametrize("rows_sum_to_zero", [True, False])
def test_system_is_that_of_the_blocks(rows_sum_to_zero):
    features = torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.manual_seed(2)
    diagonal = 10 ** (6 * torch.rand(2, 3, 30, dtype=torch.float64) - 3)
    right, sums = torch.randn(2, 3, 30, dtype=torch.float64), torch.randn(2, 30, dtype=torch.float64)
    problem = DualProblem(
        features @ features.mT, torch.zeros_like(diagonal.mT), rows_sum_to_zero=rows_sum_to_zero, gram_factor=features
    )
    settings = {"diagonal": diagonal, "regularization": 1e-12}
    expected = BlockKKT.factorize(problem, **settings).solve(right, sums, refinements=2)
    system = LowRankKKT.factorize(problem, **settings)
    for one, other in zip(system.solve(right, sums, refinements=2), expected, strict=True):
        assert close(one, other) < 1e-10
    settings["diagonal"] = diagonal * torch.tensor([-1.0, 1.0])[:, None, None]
    broken = LowRankKKT.factorize(problem, **settings)
    found, _ = broken.solve(right, sums, refinements=2)
    assert torch.isnan(found[0]).all()
    assert close(found[1], expected[0][1]) < 1e-10


@examples(20, nightly=600)
@given(
    n=st.integers(8, 24),
    k=st.integers(2, 5),
    seed=st.integers(0, 2**31),
    bounds=st.sampled_from(["upper", "lower", "both"]),
    smoothing=st.sampled_from(["none", "some", "all"]),
    rows_sum_to_zero=st.booleans(),
)
def test_interior_point_finds_the_known_solution(n, k, seed, bounds, smoothing, rows_sum_to_zero):
    assume(
        rows_sum_to_zero or smoothing == "all" or bounds == "both"
    )  # otherwise no gap can be certified, see DualProblem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockKKT, "factorize", None)
        problem, coef, _ = known_problem(
            2, n, k, seed=seed, bounds=bounds, smoothing=smoothing, rows_sum_to_zero=rows_sum_to_zero, rank=n // 4
        )
        qp, unit, _ = rescale(problem)
        factor = pivoted_cholesky(qp.gram, max_rank=n // 4)
        assert factor is not None
        qp = replace(qp, gram_factor=factor)
        point, *_ = interior_point(qp, tolerance=1e-9, max_iterations=100)
    assert certify(qp, point).gap.max() < 1e-8  # which does not use the factor
    # the coefficients are not unique, the weights are
    assert close(problem.gram @ (point * unit[:, None, None]), problem.gram @ coef, 1.0) < 1e-3


def test_admm_takes_the_same_steps():
    support, labels, *_ = task(2, shots=(6, 7, 5), d=4)
    targets = torch.nn.functional.one_hot(labels).double()
    qp = DualProblem(support @ support.mT, targets, upper=0.1 * targets)
    factored = replace(qp, gram_factor=support)
    one, other = (next(admm(rescale(problem)[0], [20])) for problem in (qp, factored))
    for found, expected in zip(other.tensors().values(), one.tensors().values(), strict=True):
        assert close(found, expected) < 1e-11


SOLVERS = {
    "fallback": Fallback(ActiveSetSolver(max_rounds=1, backend="torch"), InteriorPointSolver()),
    "early": InteriorPointSolver(max_iterations=30),
    "last iterate": InteriorPointSolver(max_iterations=5, gradient="last_iterate"),
    "relaxed": InteriorPointSolver(gradient="relaxed"),
    "admm": Fallback(ADMMSolver(max_iterations=50), InteriorPointSolver()),
}


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_every_solver_gives_the_same_result_in_the_low_rank_form(solver, monkeypatch):
    support, labels, query, _ = task(2, shots=(30, 25, 28), d=9, seed=4)
    factorize, ranks = LowRankKKT.factorize, []

    def run(gram_factor):
        attached = support.clone().requires_grad_()
        problem = replace(crammer_singer(attached, labels, 0.05), gram_factor=gram_factor)
        logits = query @ attached.mT @ solver.solve(problem).coef
        return logits.detach(), torch.autograd.grad(logits.square().sum(), attached)[0]

    def watched(problem, **settings):
        ranks.append(problem.gram_factor.shape[-1])
        return factorize(problem, **settings)

    monkeypatch.setattr(LowRankKKT, "factorize", watched)
    expected = run(None)
    assert not ranks
    for one, other in zip(run(support), expected, strict=True):
        assert close(one, other) < 1e-7
    assert ranks
    assert max(ranks) == 9


def test_tasks_too_large_for_blocks_of_all_classes_use_admm_and_the_low_rank_form(monkeypatch):
    """The limit leaves room for matrices of r x r only, or not even for these."""
    support, labels = clusters(classes=3, each=90, d=9)
    query, _ = clusters(classes=3, each=5, d=9, seed=1)
    support, query = support.double(), query.double()
    expected = SVMHead(0.05)(support, labels, query)
    monkeypatch.setattr(active_set.ActiveSetSolver, "_solve_alone", None)
    for rank in (40, 1):
        fitted = SVMHead(0.05, solver=NativeSolver(max_block_entries=3 * 270 * rank)).fit(support, labels)
        assert close(fitted(query), expected) < 1e-7


@pytest.fixture
def many(monkeypatch):
    """270 examples count as many."""
    monkeypatch.setattr(default, "_MIN_EXAMPLES_FOR_ADMM", 270)
    support, labels = clusters(classes=3, each=90, d=5, noise=2.0)
    return support.double(), labels


def test_many_examples_of_small_rank_use_admm(many, monkeypatch):
    """Against the interior point, with the gradient; with a larger rank or fewer examples, it is active-set Newton."""
    support, labels = many
    query, weights = support[::50], torch.arange(3, dtype=torch.float64)

    def run(solver):
        attached = support.clone().requires_grad_()
        fitted = SVMHead(0.05, solver=solver).fit(attached, labels)
        logits = fitted(query)
        return fitted.solution, logits.detach(), torch.autograd.grad((weights * logits).sum(), attached)[0]

    expected = run(InteriorPointSolver())
    monkeypatch.setattr(active_set.ActiveSetSolver, "_solve_alone", None)
    found = run(NativeSolver())
    assert found[0].gap < 1e-9
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert close(one, other) < 1e-6
    with torch.no_grad():
        assert close(SVMHead(0.05)(support, labels, query), expected[1]) < 1e-6
    for features in (torch.randn(270, 80, dtype=torch.float64), support[:269]):
        with pytest.raises(TypeError):  # the active-set solver is called
            SVMHead(0.05).fit(features, labels[: len(features)])


def test_tasks_of_many_examples_are_divided(many, monkeypatch):
    support, labels = many
    batch = torch.stack([support, support.flip(1), 2 * support])
    head = SVMHead(0.05)
    expected = torch.stack([head(each, labels, each[:4]) for each in batch])
    sizes, alone = [], ADMMSolver._solve_alone

    def watched(self, problem, **options):
        sizes.append(len(problem.linear))
        return alone(self, problem, **options)

    monkeypatch.setattr(ADMMSolver, "_solve_alone", watched)
    head = SVMHead(0.05, solver=NativeSolver(max_block_entries=2 * 3 * 270**2))
    assert close(head(batch, labels.expand(3, -1), batch[:, :4]), expected) < 1e-6
    assert sizes == [2, 1]
