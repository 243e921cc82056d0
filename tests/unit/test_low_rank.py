"""Many more examples than features: the interior point and splitting in r x r instead of n x n."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from problems import known_problem
from tasks import close, examples, task

from convexheads import SVMHead
from convexheads.solvers import NativeSolver, native
from convexheads.solvers import kkt as systems
from convexheads.solvers.interior_point import interior_point
from convexheads.solvers.kkt import BlockKKT, LowRankKKT, find_root
from convexheads.solvers.splitting import splitting


def gram_of(*shape: int, seed: int = 0) -> torch.Tensor:
    features = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return features @ features.mT


def test_root_is_found_where_the_rank_is_small():
    gram = gram_of(3, 256, 40)
    gram[1] *= 1e-6
    gram[2] = gram_of(256, 7)  # of another rank than its neighbours
    root = find_root(gram, most=64)
    assert 40 <= root.shape[-1] <= 64
    for found, expected in zip(root @ root.mT, gram, strict=True):
        assert close(found, expected) < 1e-13


def test_root_of_any_kernel():
    """Duplicates and smooth kernels have a small rank too, whatever the number of features."""
    few = gram_of(32, 500).repeat(1, 9, 9)
    root = find_root(few, most=72)
    assert close(root @ root.mT, few) < 1e-13
    points = torch.linspace(0, 1, 300, dtype=torch.float64)
    smooth = (-(points[:, None] - points).square()).exp()
    root = find_root(smooth.unsqueeze(0), most=75)
    assert root.shape[-1] <= 32
    assert close(root @ root.mT, smooth) < 1e-12


def test_no_root_where_it_would_not_pay():
    assert find_root(gram_of(1, 300, 76), most=75) is None
    assert find_root(torch.cat([gram_of(1, 300, 4), gram_of(1, 300, 300)]), most=75) is None  # one of the batch
    assert find_root(torch.zeros(1, 300, 300, dtype=torch.float64), most=75).shape == (1, 300, 16)
    for n, found in ((300, True), (255, False)):
        qp = native.QP(gram_of(1, n, 3), torch.zeros(1, n, 2), upper=torch.zeros(1, n, 2))
        assert (native._with_root(qp).root is not None) is found


@pytest.mark.parametrize("row_sum", [True, False])
def test_system_is_that_of_the_blocks(row_sum):
    features = torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.manual_seed(2)
    diagonal = 10 ** (6 * torch.rand(2, 3, 30, dtype=torch.float64) - 3)
    right, sums = torch.randn(2, 3, 30, dtype=torch.float64), torch.randn(2, 30, dtype=torch.float64)
    settings = {"diagonal": diagonal, "row_sum": row_sum, "regulariser": 1e-12}
    gram = features @ features.mT
    expected = BlockKKT.factorise(gram, **settings).solve(right, sums, refinements=2)
    system = LowRankKKT.factorise(gram, features, **settings)
    for one, other in zip(system.solve(right, sums, refinements=2), expected, strict=True):
        assert close(one, other) < 1e-10
    broken = LowRankKKT.factorise(
        gram, features, **(settings | {"diagonal": diagonal * torch.tensor([-1.0, 1.0])[:, None, None]})
    )
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
    row_sum=st.booleans(),
)
def test_interior_point_finds_the_known_solution(n, k, seed, bounds, smoothing, row_sum):
    assume(row_sum or smoothing == "all" or bounds == "both")  # otherwise no gap can be certified, see QP
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(systems, "_LOOK_EVERY", 1)
        patch.setattr(BlockKKT, "factorise", None)
        problem, coef, _ = known_problem(
            2, n, k, seed=seed, bounds=bounds, smoothing=smoothing, row_sum=row_sum, rank=n // 4
        )
        qp, unit, _ = problem.in_units()
        root = find_root(qp.gram, most=n // 4)
        assert root is not None
        qp = type(qp)(**(vars(qp) | {"root": root}))
        found = interior_point(qp, tolerance=1e-9, max_iterations=100)
    assert qp.certify(found.point).gap.max() < 1e-8  # which knows nothing of the root
    # the coefficients are not unique, the weights are
    assert close(problem.gram @ (found.point * unit[:, None, None]), problem.gram @ coef, 1.0) < 1e-3


def test_splitting_takes_the_same_steps():
    support, labels, *_ = task(2, shots=(6, 7, 5), d=4)
    targets = torch.nn.functional.one_hot(labels).double()
    qp = native.QP(support @ support.mT, targets, upper=0.1 * targets)
    rooted = native.QP(support @ support.mT, targets, upper=0.1 * targets, root=support)
    one, other = (next(splitting(problem.in_units()[0], steps=20)) for problem in (qp, rooted))
    for found, expected in zip(other, one, strict=True):
        assert close(found, expected) < 1e-11


@pytest.mark.parametrize("way", ["fallback", "early", "truncated", "smoothed", "splitting"])
def test_every_way_through_the_solver(way, monkeypatch):
    """On small problems, with the low-rank form wherever it can be, and without it."""
    support, labels, query, ways = task(2, shots=(30, 25, 28), d=9, seed=4)
    early = {"early": {"max_iterations": 30}, "truncated": {"max_iterations": 5, "gradient": "truncated"}}
    head = SVMHead(
        0.05,
        solver=NativeSolver(compiled=False, **early.get(way, {"gradient": "smoothed"} if way == "smoothed" else {})),
    )

    def run():
        attached = support.clone().requires_grad_()
        logits = head(attached, labels, query, ways=ways)
        return logits.detach(), torch.autograd.grad(logits.square().sum(), attached)[0]

    expected, found = run(), []
    if way == "fallback":
        monkeypatch.setattr(native, "_ENOUGH_ROUNDS", 1)
    if way == "splitting":  # there is room for the low-rank form only, and the search leads nowhere here
        monkeypatch.setattr(native, "_LARGEST_BLOCKS", 3 * 83 * 40)
    monkeypatch.setattr(native, "_WORTH_A_ROOT", 1)
    monkeypatch.setattr(native, "find_root", lambda gram, most: found.append(find_root(gram, most=most)) or found[-1])
    for one, other in zip(run(), expected, strict=True):
        assert close(one, other) < 1e-7
    assert found
    assert found[0].shape[-1] < 20
