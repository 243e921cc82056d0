"""Scores of rows of a table of features."""

from __future__ import annotations

import threading
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tasks import examples, task

from convexheads import (
    GaussianProcessHead,
    InputError,
    Learnable,
    LinearDiscriminantHead,
    LogisticHead,
    MahalanobisHead,
    PerTask,
    PrototypeHead,
    RidgeHead,
    RidgeRegressionHead,
    SVMHead,
    use_float32,
)
from convexheads.heads.base import _rows_numba, fitted, support_set
from convexheads.kernels import RBF, Constant, Linear, UnitScale

LINEAR = {
    "svm": lambda: SVMHead(scale=Learnable(2.5)),
    "intercept": lambda: SVMHead(intercept=True),
    "ridge": lambda: RidgeHead(kernel=Linear(normalize=True)),
    "logistic": lambda: LogisticHead(kernel=Linear() + Constant(Learnable(0.6))),
    "discriminant": lambda: LinearDiscriminantHead(),
    "prototypes": lambda: PrototypeHead(scale=Learnable(0.3)),
    "prototypes with a constant": lambda: PrototypeHead(kernel=UnitScale(Linear() + 0.5)),
    "regression": lambda: RidgeRegressionHead(),
}
OTHERS = {
    "RBF": lambda: SVMHead(kernel=RBF()),
    "function": lambda: RidgeHead(kernel=lambda x, y: x @ y.mT),
    "quadratic": lambda: MahalanobisHead(),
    "Gaussian process": lambda: GaussianProcessHead(),
}


def fit_and_table(head, *batch, dtype=torch.float64, d=7, shots=(2, 3, 1), **options):
    """A fit without gradients, a table of features, and rows for each task."""
    support, labels, _, _ = task(*batch, shots=shots, d=d, dtype=dtype)
    is_regression = not hasattr(head, "scale")
    with torch.no_grad():
        found = head.fit(support, labels.to(dtype) if is_regression else labels, **options)
    return found, torch.randn(30, d, dtype=dtype), torch.randint(30, (*batch, 9))


def spy():
    return patch.object(_rows_numba, "score", wraps=_rows_numba.score)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("d", [2, 7], ids="d={}".format)  # fewer features than examples, and more
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize("make", (LINEAR | OTHERS).values(), ids=LINEAR | OTHERS)
def test_rows_have_the_scores_of_a_call(make, batch, d, dtype):
    found, features, rows = fit_and_table(make(), *batch, dtype=dtype, d=d)
    with torch.no_grad(), spy() as kernel:
        scores = found.score_rows(features, rows)
        expected = found(features[rows])
    assert kernel.called == (make in LINEAR.values())
    assert scores.dtype == dtype
    torch.testing.assert_close(scores, expected, rtol=1e-10 if dtype == torch.float64 else 1e-6, atol=1e-9)


def test_no_task_has_no_scores():
    found, features, rows = fit_and_table(SVMHead(), 4)
    assert found[:0].score_rows(features, rows[:0]).shape == (0, 9, 3)


@given(data=st.data())
@examples(20, nightly=200)
def test_rows_of_all_sizes(data):
    sizes = {"tasks": (1, 4), "k": (1, 9), "d": (1, 40), "q": (0, 12), "shots": (1, 3), "examples": (1, 20)}
    tasks, k, d, q, shots, count = (data.draw(st.integers(*limits), label=name) for name, limits in sizes.items())
    labels = torch.arange(k).repeat(shots).expand(tasks, -1)
    features, rows = torch.randn(count, d), torch.randint(count, (tasks, q))
    with torch.no_grad():
        found = PrototypeHead().fit(torch.randn(tasks, k * shots, d), labels)
        torch.testing.assert_close(found.score_rows(features, rows), found(features[rows]))


def test_all_options_of_a_fit_count():
    support, labels, _, _ = task(3, d=7)
    mask = torch.ones_like(labels, dtype=torch.bool)
    mask[0, 1] = False
    prior, weight = torch.randn(3, 3, 7, dtype=torch.float64), torch.rand(3, support.shape[1], dtype=torch.float64)
    options = [
        {"prior": prior, "sample_weight": weight, "mask": mask, "allow_missing_classes": True},
        {"ways": torch.tensor([3, 5, 4])},
        {"calibrate": "loo"},
    ]
    features, rows = torch.randn(30, 7, dtype=torch.float64), torch.randint(30, (3, 9))
    for each in options:
        for head in (SVMHead(PerTask(torch.tensor([0.1, 1.0, 2.0]))), RidgeHead(kernel=Linear() + 1.0)):
            if "ways" in each:
                head = RidgeHead(kernel=Linear() + 1.0)
            with torch.no_grad(), spy() as kernel:
                found = head.fit(support, labels, **each)
                torch.testing.assert_close(found.score_rows(features, rows), found(features[rows]))
            assert kernel.called


def test_without_a_gradient_the_gradient_of_a_fit_does_not_matter():
    support, labels, *_ = task(4, d=7)
    found = SVMHead(scale=Learnable(2.5)).fit(support.requires_grad_(), labels)
    features, rows = torch.randn(30, 7, dtype=torch.float64), torch.randint(30, (4, 9))
    expected = found(features[rows])
    with torch.no_grad(), spy() as kernel:
        scores = found.score_rows(features.requires_grad_(), rows)
    assert kernel.called
    torch.testing.assert_close(scores, expected)


def test_examples_that_tasks_share_are_not_copied():
    support, labels, *_ = task(d=7, shots=(3, 3, 3))
    heads = SVMHead(PerTask(torch.tensor([0.1, 1.0, 10.0, 100.0])))
    with torch.no_grad(), spy() as kernel:
        found = heads.fit(support.expand(4, -1, -1), labels.expand(4, -1))
        features, rows = torch.randn(30, 7, dtype=torch.float64), torch.randint(30, (4, 9))
        torch.testing.assert_close(found.score_rows(features, rows), found(features[rows]))
    coef, basis = kernel.call_args.args[2:4]
    assert (coef.shape, basis.shape) == ((4, 0, 3), (4, 3, 7))  # the weights of each task


@pytest.mark.parametrize("shots", [(1, 1), (2, 1), (2, 2), (3, 2, 2)], ids=str)
def test_weights_are_formed_from_any_number_of_examples(shots):
    found, features, rows = fit_and_table(RidgeHead(), 4, shots=shots)
    with torch.no_grad(), spy() as kernel:
        torch.testing.assert_close(found.score_rows(features, rows), found(features[rows]))
    assert kernel.call_args.args[2].shape == (4, sum(shots), len(shots))


def test_weights_of_large_tasks_are_left_to_pytorch(monkeypatch):
    results = []
    for limit, m in ((7 * 6 * 3, 6), (7 * 6 * 3 - 1, 0)):
        monkeypatch.setattr(fitted, "_OPERATIONS_IN_KERNEL", limit)
        torch.manual_seed(0)
        found, features, rows = fit_and_table(SVMHead(), 4)
        with torch.no_grad(), spy() as kernel:
            results.append(found.score_rows(features, rows))
        assert kernel.call_args.args[2].shape[1] == m
    torch.testing.assert_close(*results)


def test_numbers_may_be_shared_arrays_or_lists():
    found, features, rows = fit_and_table(SVMHead(), 4)
    expected = found(features[rows[0]])
    for shared in (rows[0], rows[0].numpy(), rows[0].tolist(), rows[0].to(torch.uint8)):
        torch.testing.assert_close(found.score_rows(features, shared), expected)
    torch.testing.assert_close(found.score_rows(features.numpy(), rows), found(features[rows]))


def test_scores_have_gradients_where_they_are_needed():
    support, labels, _, _ = task(4, d=7)
    rows = torch.randint(30, (4, 9))
    for learns in ("support", "features", "scale"):
        head = SVMHead(scale=Learnable(2.0) if learns == "scale" else 1.0)
        features = torch.randn(30, 7, dtype=torch.float64, requires_grad=learns == "features")
        found = head.fit(support.detach().clone().requires_grad_(learns == "support"), labels)
        inputs = {"support": found.support.features, "features": features, "scale": found.scale}[learns]
        gradients = [
            torch.autograd.grad(scores.square().sum(), inputs, retain_graph=True)[0]
            for scores in (found.score_rows(features, rows), found(features[rows]))
        ]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("has_unit", [False, True])
def test_gradients_reach_a_kernel_with_parameters(has_unit):
    support, labels, _, _ = task(4, d=7)
    features, rows = torch.randn(30, 7, dtype=torch.float64), torch.randint(30, (4, 9))
    kernel = _Weighted(has_unit)
    with patch.object(fitted, "_ENTRIES_IN_CACHE", 7 * 9):  # too little for two tasks
        found = RidgeHead(kernel=kernel).fit(support, labels)
        scores = found.score_rows(features, rows), torch.stack([found[t](features[rows[t]]) for t in range(4)])
    expected = torch.autograd.grad(found(features[rows]).square().sum(), kernel.weight, retain_graph=True)[0]
    for each in scores:
        gradient = torch.autograd.grad(each.square().sum(), kernel.weight, retain_graph=True)[0]
        torch.testing.assert_close(gradient, expected)


class _Weighted(torch.nn.Module):
    """A kernel with a parameter, and either with a number per task or with what cannot be copied."""

    def __init__(self, has_unit, weight=None, unit=1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(7, dtype=torch.float64)) if weight is None else weight
        self.has_unit, self.unit = has_unit, unit
        if not has_unit:
            self.lock = threading.Lock()

    def condition_on(self, features, mask):
        unit = features.square().mean((-2, -1), keepdim=True)
        return _Weighted(True, self.weight, unit) if self.has_unit else self

    def forward(self, x, y):
        return (x * self.weight.square()) @ y.mT / self.unit


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning")  # PyTorch's own
def test_tangents_of_forward_mode_are_kept():
    found, features, rows = fit_and_table(SVMHead(), 4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(features, torch.ones_like(features))
        tangents = [
            torch.autograd.forward_ad.unpack_dual(scores).tangent
            for scores in (found.score_rows(dual, rows), found(dual[rows]))
        ]
    torch.testing.assert_close(*tangents)


def test_autocast_does_not_change_the_scores():
    with use_float32():
        found, features, rows = fit_and_table(SVMHead(), 4, dtype=torch.float32)
    expected = found(features[rows])
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(found.score_rows(features, rows), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("change", ["half", "strided", "negated", "shared", "no Numba", "parts", "vmap"])
def test_other_ways_to_the_same_scores(change, monkeypatch):
    found, features, rows = fit_and_table(SVMHead(), 4)
    if change == "half":
        features = features.bfloat16()
    elif change == "strided":
        features = features.repeat(1, 2)[:, ::2]
    elif change == "negated":
        features = torch._neg_view(features)
    elif change == "shared":
        rows = rows[0]
    elif change != "vmap":
        monkeypatch.setattr(support_set, "numba_is_installed", lambda: False)
    if change == "parts":
        monkeypatch.setattr(fitted, "_ENTRIES_IN_CACHE", 3 * 9 * 7)
    with torch.no_grad(), spy() as kernel:
        if change == "vmap":
            scores = torch.func.vmap(found.score_rows)(features.expand(2, -1, -1), rows.expand(2, -1, -1))[1]
        else:
            scores = found.score_rows(features, rows)
    assert not kernel.called
    torch.testing.assert_close(scores, found(features[rows]))


def test_a_row_that_is_not_finite_is_named():
    found, features, rows = fit_and_table(SVMHead(), 4)
    features[7, 3], rows[:] = torch.nan, 1
    found.score_rows(features, rows)  # it is not read
    rows[2, 5] = 7
    with pytest.raises(InputError, match=r"^features.*row 7"):
        found.score_rows(features, rows)
    unchecked, _, _ = fit_and_table(SVMHead(validate=False), 4)
    scores = unchecked.score_rows(features, rows)
    assert not scores[2, 5].isfinite().any()
    scores[2, 5] = 0
    assert scores.isfinite().all()


def test_a_failed_task_leaves_the_others_alone():
    support, labels, _, _ = task(4, d=7)
    support[1, 2] = torch.inf
    features, rows = torch.randn(30, 7, dtype=torch.float64), torch.randint(30, (4, 9))
    with torch.no_grad():
        found = RidgeHead(validate=False).fit(support, labels, ways=3)
        scores = found.score_rows(features, rows)
    assert scores[1].isnan().all()
    torch.testing.assert_close(scores[[0, 2, 3]], found(features[rows])[[0, 2, 3]])


@pytest.mark.parametrize("validate", [True, False])
def test_unusable_rows_and_tables(validate):
    found, features, rows = fit_and_table(SVMHead(validate=validate), 4)
    for value in (-1, 30, 2**40):
        wrong = rows.clone()
        wrong[3, 1] = value
        with pytest.raises(InputError, match=r"^rows.*task \(3,\)"):
            found.score_rows(features, wrong)
    for wrong in (rows.double(), rows > 3, rows[:3], rows[None], torch.tensor(3), "rows", [["a"]]):
        with pytest.raises(InputError, match="rows"):
            found.score_rows(features, wrong)
    for wrong in (
        features[:, :6],
        features[:0],
        features[0],
        features[None],
        features.long(),
        features.to("meta"),
        "features",
    ):
        with pytest.raises(InputError, match="features"):
            found.score_rows(wrong, rows)


@pytest.mark.gpu
def test_rows_on_a_gpu(cuda):
    found, features, rows = fit_and_table(SVMHead(), 4)
    scores = found.to(cuda).score_rows(features.to(cuda), rows.to(cuda))
    torch.testing.assert_close(scores.cpu(), found(features[rows]))
    with pytest.raises(InputError, match="rows"):
        found.to(cuda).score_rows(features.to(cuda), rows.to(cuda) + 30)
