"""Bad input: an error of the library's own that names the argument, the expected and the received value."""

from __future__ import annotations

from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from installing import installs, requirements_of
from tasks import crammer_singer, indefinite, task

from convexheads import (
    ClassificationHead,
    ConvexHeadsError,
    InputError,
    Learnable,
    LinearDiscriminantHead,
    LogisticHead,
    MahalanobisHead,
    MissingDependencyError,
    OneVsRestSVMHead,
    PrototypeHead,
    RidgeHead,
    SolverError,
    SVMHead,
)
from convexheads._validation import check_definite
from convexheads.heads import KernelExpansion
from convexheads.kernels import RBF, Polynomial, Product, Sum
from convexheads.solvers import InteriorPointSolver, NativeSolver

pytestmark = pytest.mark.usefixtures("unchecked")

GOOD = task(2)
SUPPORT, LABELS, QUERY, WAYS = GOOD
HEADS = pytest.mark.parametrize("head", [SVMHead(), RidgeHead(), PrototypeHead()], ids=["svm", "ridge", "prototype"])


def spoilt(value: torch.Tensor, number: float) -> torch.Tensor:
    value = value.clone()
    value[1, 2, 3] = number
    return value


BAD_CALLS = {
    "support of one dimension": (
        (SUPPORT[0, 0], LABELS, QUERY),
        {},
        r"support: expected at least two.*, got shape \(12,\)",
    ),
    "support of text": (("features", LABELS, QUERY), {}, r"support: expected a tensor of float.*, got str"),
    "support of uneven lists": (
        ([[1.0, 2.0], [3.0]], LABELS, QUERY),
        {},
        r"support: expected a tensor of float.*, got list \(.*length 2.*\)",
    ),
    "support of integers": (
        (SUPPORT.long(), LABELS, QUERY),
        {},
        r"support: expected .*floating.*, got a tensor of torch.int64",
    ),
    "empty support": (
        (SUPPORT[:, :0], LABELS[:, :0], QUERY),
        {},
        r"support: expected at least one.*, got shape \(2, 0, 12\)",
    ),
    "no features": (
        (SUPPORT[..., :0], LABELS, QUERY[..., :0]),
        {},
        r"support: expected at least one.*, got shape \(2, 6, 0\)",
    ),
    "float labels": (
        (SUPPORT, LABELS.float(), QUERY),
        {},
        r"labels: expected .*integers.*, got a tensor of torch.float32",
    ),
    "bool labels": ((SUPPORT, LABELS.bool(), QUERY), {}, r"labels: expected .*integers.*, got a tensor of torch.bool"),
    "floats in a list": (
        (SUPPORT, LABELS.double().tolist(), QUERY),
        {},
        r"labels: .*integers.*, got list of .*float32",
    ),
    "array of objects": (
        (SUPPORT, np.array([None] * 6), QUERY),
        {},
        r"labels: expected a tensor of integers.*, got ndarray \(.*object.*\)",
    ),
    "too few labels": ((SUPPORT, LABELS[:, :4], QUERY), {}, r"labels: expected .*\(2, 6\).*, got shape \(2, 4\)"),
    "labels of one batch": ((SUPPORT, LABELS[:1], QUERY), {}, r"labels: expected .*\(2, 6\).*, got shape \(1, 6\)"),
    "labels from 10": (
        (SUPPORT, LABELS + 10, QUERY),
        {},
        r"labels: .*, got no example of class 0 in task \(0,\).*labels.unique\(return_inverse=True\)",
    ),
    "labels from 10 and ways": (
        (SUPPORT, LABELS + 10, QUERY),
        {"ways": 3},
        r"labels: expected values 0..2, got 1\d in task \(0,\).*labels.unique\(return_inverse=True\)",
    ),
    "negative label": ((SUPPORT, LABELS - 1, QUERY), {}, r"labels: expected values 0..ways-1.*, got -1 in task \(0,\)"),
    "label too large": ((SUPPORT, LABELS, QUERY), {"ways": 2}, r"labels: expected values 0..1.*, got 2 in task \(0,\)"),
    "no ways": ((SUPPORT, LABELS, QUERY), {"ways": 0}, r"ways: expected an integer of at least 1.*, got 0"),
    "fractional ways": ((SUPPORT, LABELS, QUERY), {"ways": 5.0}, r"ways: expected an integer.*, got 5.0"),
    "nan in support": (
        (spoilt(SUPPORT, torch.nan), LABELS, QUERY),
        {},
        r"support: expected .*, got non-finite .*row 2 of task \(1,\)",
    ),
    "infinity in query": (
        (SUPPORT, LABELS, spoilt(QUERY, torch.inf)),
        {},
        r"query: expected .*, got non-finite .*row 2 of task \(1,\)",
    ),
    "query of other width": (
        (SUPPORT, LABELS, QUERY[..., :5]),
        {},
        r"query: expected the feature size.*, got shape \(2, 4, 5\)",
    ),
    "query of other tasks": (
        (SUPPORT, LABELS, QUERY[:1]),
        {},
        r"query: expected the task dimensions.*, got shape \(1, 4, 12\)",
    ),
    "query of one dimension": (
        (SUPPORT, LABELS, QUERY[0, 0]),
        {},
        r"query: expected at least two.*, got shape \(12,\)",
    ),
    "integer query": ((SUPPORT, LABELS, QUERY.long()), {}, r"query: expected .*, got a tensor of torch.int64"),
    "mask of numbers": (
        (SUPPORT, LABELS, QUERY),
        {"mask": LABELS},
        r"mask: expected .*bool.*, got a tensor of torch.int64",
    ),
    "mask of other shape": (
        (SUPPORT, LABELS, QUERY),
        {"mask": LABELS[:1] > 0},
        r"mask: expected .*\(2, 6\).*, got shape \(1, 6\)",
    ),
    "mask without examples": (
        (SUPPORT, LABELS, QUERY),
        {"mask": torch.tensor([[True] * 6, [False] * 6])},
        r"mask: expected .*, got none in task \(1,\)",
    ),
    "labels elsewhere": ((SUPPORT, LABELS.to("meta"), QUERY), {}, r"labels: expected .* cpu.*, got device meta"),
    "images": (
        (SUPPORT.unflatten(-1, (-1, 1)), LABELS, QUERY),
        {},
        r"support: expected flat features, \(2, 6, d\).*, got shape .*",
    ),
    "ways of each task, too few": (
        GOOD[:3],
        {"ways": torch.tensor([3, 2])},
        r"labels: expected values 0..ways-1.*, got 2 in task \(1,\)",
    ),
    "ways of each task, float": (
        GOOD[:3],
        {"ways": torch.tensor([3.0, 3.0])},
        r"ways: expected integers.*, got a tensor of torch.float32.*",
    ),
    "ways of each task, zero": (
        GOOD[:3],
        {"ways": torch.tensor([0, 3])},
        r"ways: expected at least 1.*, got 0 in task \(0,\)",
    ),
    "ways in a list of another length": (GOOD[:3], {"ways": [3]}, r"ways: expected .*\(2,\), got shape \(1,\)"),
    "ways in a list of floats": (GOOD[:3], {"ways": [3.0, 3.0]}, r"ways: expected integers.*, got list of .*float32"),
    "missing classes allowed by a number": (
        GOOD[:3],
        {"allow_missing_classes": 1},
        r"allow_missing_classes: expected True or False, got 1",
    ),
    "feature maps of as many rows as examples": (
        (torch.randn(6, 4, 6, 6), LABELS[0], QUERY),
        {},
        r"support: expected flat features, \(6, d\)",
    ),
    "query elsewhere": ((SUPPORT, LABELS, QUERY.to("meta")), {}, r"query: expected .* cpu.*, got device meta"),
}


@HEADS
@pytest.mark.parametrize(("arguments", "options", "message"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_bad_call(head, arguments, options, message):
    with pytest.raises(InputError, match=message) as caught:
        head(*arguments, **options)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, ConvexHeadsError)
    assert caught.value.argument in ("support", "labels", "query", "ways", "mask", "allow_missing_classes")


BAD_ARGUMENTS = {
    "C zero": (lambda: SVMHead(C=0), r"C: expected a positive finite number.*, got 0"),
    "C negative": (lambda: SVMHead(C=-0.1), r"C: expected a positive.*, got -0.1"),
    "C infinite": (lambda: SVMHead(C=torch.inf), r"C: expected a positive.*, got inf"),
    "C text": (lambda: SVMHead(C="1"), r"C: expected a positive.*, got '1'"),
    "smoothing negative": (lambda: SVMHead(smoothing=-1), r"smoothing: expected a non-negative.*, got -1"),
    "lambda zero": (lambda: RidgeHead(0), r"regularization: expected a positive.*, got 0"),
    "scale nan": (lambda: PrototypeHead(scale=torch.nan), r"scale: expected a positive.*, got nan"),
    "learnable zero": (lambda: Learnable(0), r"Learnable\(value\): expected a positive.*, got 0"),
    "width": (lambda: RBF(-1.0), r"length_scale: expected a positive.*, got -1.0"),
    "degree": (lambda: Polynomial(1.5), r"degree: expected an integer.*, got 1.5"),
    "offset": (lambda: Polynomial(offset=-1), r"offset: expected a non-negative.*, got -1"),
    "kernel": (lambda: SVMHead(kernel="rbf"), r"kernel: expected a callable.*, got 'rbf'"),
    "solver name": (
        lambda: SVMHead(solver="cplex"),
        r"solver: expected .*'native', .*'qpth', 'cvxpylayers', 'moreau'.*, got 'cplex'",
    ),
    "solver class": (lambda: SVMHead(solver=NativeSolver), r"solver: expected a Solver or one of.*, got <class .*"),
    "kernel class": (lambda: SVMHead(kernel=RBF), r"kernel: expected a callable.*, got <class .*RBF'>"),
    "tolerance learnable": (
        lambda: NativeSolver(tolerance=Learnable(1.0)),
        r"\(tolerance\): expected a positive finite number, got",
    ),
    "squared hinge": (lambda: SVMHead(squared_hinge=1), r"squared_hinge: expected True or False.*, got 1"),
    "steps": (lambda: LogisticHead(steps=0), r"steps: expected an integer of at least 1.*, got 0"),
    "shrinkage": (
        lambda: LinearDiscriminantHead(1.5),
        r"shrinkage: expected a number that is above 0 and at most 1.*, got 1.5",
    ),
    "iterations": (
        lambda: InteriorPointSolver(max_iterations=0),
        r"InteriorPointSolver\(max_iterations\): expected an integer.*, got 0",
    ),
    "tolerance": (lambda: NativeSolver(tolerance=0), r"NativeSolver\(tolerance\): expected a positive.*, got 0"),
    "on_failure": (
        lambda: NativeSolver(on_failure="ignore"),
        r"\(on_failure\): expected one of .*warn.*, got 'ignore'",
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_bad_argument(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_solve_that_returns_no_expansion():
    class Wrong(ClassificationHead):
        def solve(self, support):
            return support.targets

    with pytest.raises(InputError, match=r"Wrong\.solve: expected a KernelExpansion.*, got a result of type Tensor"):
        Wrong()(*GOOD[:3])


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (lambda x, y: x.sum(-1), r"kernel: expected .*\(2, 6, 6\).*, got shape \(2, 6\)"),
        (lambda x, y: None, r"kernel: expected .*, got NoneType"),
        (lambda x, y: (x @ y.mT).float(), r"kernel: expected .*torch.float64.*, got a result of torch.float32"),
        (lambda x, y: (x @ y.mT).log(), r"kernel: expected .*, got non-finite values in row 0 of task \(0,\)"),
    ],
)
def test_bad_kernel(kernel, message):
    with pytest.raises(InputError, match=message):
        SVMHead(kernel=kernel)(*GOOD[:3])


@pytest.mark.parametrize(
    "head",
    [
        SVMHead,
        RidgeHead,
        LogisticHead,
        OneVsRestSVMHead,
        MahalanobisHead,
        partial(LinearDiscriminantHead, variance=1.0),
    ],
    ids=lambda head: getattr(head, "__name__", "LinearDiscriminantHead"),
)
def test_kernel_that_is_not_positive_semi_definite(head):
    with pytest.raises(
        InputError, match=r"kernel: expected a pos.*, got a Gram matrix with the eigenvalue -\S+ in task \(0,\)"
    ):
        head(kernel=lambda x, y: 1000 * indefinite(x, y))(*GOOD[:3])


def test_covariance_that_cannot_be_inverted():
    support, labels = torch.randn(2, 3, 5), torch.tensor([[0, 1, 2]] * 2)
    with pytest.raises(
        InputError, match=r"support: expected .*variance=.*, got a within-class covariance of zero in task \(0,\)"
    ):
        LinearDiscriminantHead()(support, labels, support)
    assert LinearDiscriminantHead(variance=1.0)(support, labels, support).argmax(-1).equal(labels)


@pytest.mark.parametrize("name", ["qpth", "cvxpylayers", "moreau"])
def test_missing_package(name, monkeypatch):
    monkeypatch.setattr("convexheads.solvers.base.find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match=f"the package '{name}'") as caught:
        SVMHead(solver=name)
    assert isinstance(caught.value, ImportError)
    assert installs(str(caught.value)) == requirements_of(name)


def test_without_validation_a_label_beyond_the_ways_of_its_task_shows_there():
    support, query = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    labels, ways = torch.tensor([[0, 1, 0, 1, 4], [0, 1, 2, 3, 4]]), torch.tensor([2, 5])
    logits = RidgeHead(validate=False)(support, labels, query, ways=ways)
    assert logits[0, :, :2].isnan().all()
    assert logits[1].isfinite().all()


def test_without_validation_a_bad_label_shows_in_its_task():
    """It can't raise, but it must not pass for a good one."""
    labels = LABELS.clone()
    labels[1, 0] = 7
    logits = RidgeHead(validate=False)(SUPPORT, labels, QUERY, ways=WAYS)
    assert torch.isfinite(logits[0]).all()
    assert logits[1].isnan().all()


@pytest.mark.parametrize("make", [partial(RidgeHead, 1e-300), LinearDiscriminantHead])
def test_without_validation_a_closed_form_that_fails_is_nan_in_its_task(make):
    support = SUPPORT.clone()
    support[1] = 1
    with pytest.raises((InputError, SolverError)):
        make()(support, LABELS, QUERY)
    logits = make(validate=False)(support, LABELS, QUERY, ways=WAYS)
    assert logits[1].isnan().any()
    assert logits[0].isfinite().all()


def test_a_matrix_without_a_factor_is_nan_in_its_task_if_the_status_is_returned():
    support = SUPPORT.clone()
    support[1] = 1
    logits = RidgeHead(1e-300, on_failure="return")(support, LABELS, QUERY)
    assert logits[1].isnan().all()
    assert logits[0].isfinite().all()


@pytest.mark.parametrize("make", [RidgeHead, PrototypeHead, MahalanobisHead, LinearDiscriminantHead])
def test_without_validation_no_value_is_read(make, monkeypatch):
    """Reading a value waits for the device; on the CPU it can be seen by what makes Python objects of tensors."""
    read = ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__")
    head = make(validate=False)
    for name in read:
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"read by {name}"))
    support = SUPPORT.clone().requires_grad_()
    head(support, LABELS, QUERY, ways=WAYS).sum().backward()
    with pytest.raises(pytest.fail.Exception, match="read by"):
        make()(SUPPORT, LABELS, QUERY, ways=WAYS)


@pytest.mark.gpu
def test_values_on_a_device_are_checked(cuda):
    support, labels, query = (x.to(cuda) for x in GOOD[:3])
    wrong, infinite = labels.clone(), query.clone()
    wrong[1, 0] = 7
    infinite[1, 2, 3] = torch.inf
    with pytest.raises(InputError, match=r"labels: .*task \(1,\)"):
        RidgeHead()(support, wrong, query, ways=WAYS)
    with pytest.raises(InputError, match=r"query: .*row 2 of task \(1,\)"):
        RidgeHead()(support, labels, infinite, ways=WAYS)


def test_a_gram_matrix_that_is_not_finite_is_no_indefinite_one():
    """Without validation nothing has checked its values, and torch would raise an error of its own over them."""
    gram = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    gram[1, 0, 0] = torch.nan
    check_definite(gram)
    gram[0] *= -1
    with pytest.raises(InputError, match=r"the eigenvalue -1 in task \(0,\)"):
        check_definite(gram)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
@pytest.mark.parametrize("make", [RidgeHead, PrototypeHead, MahalanobisHead, LinearDiscriminantHead])
def test_without_validation_closed_forms_do_not_wait_for_the_device(make, cuda):
    support, labels, query = (x.to(cuda) for x in GOOD[:3])
    head = make(validate=False)
    head(support, labels, query, ways=WAYS)
    try:
        torch.cuda.set_sync_debug_mode("error")
        head(support, labels, query, ways=WAYS)
        with pytest.raises(RuntimeError, match="synchronizing"):
            head(support, labels, query)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kernel", [Sum, Product])
def test_combination_of_no_kernels(kernel):
    with pytest.raises(InputError, match=r"kernels: expected at least one kernel.*, got none"):
        kernel()


def test_failures_name_the_task_and_its_own_value():
    """Of several faulty tasks, the first, with what is wrong in it."""
    labels = LABELS.clone()
    labels[1, 2] = -3
    with pytest.raises(InputError, match=r"labels: expected values 0\.\.2.*, got -3 in task \(1,\)"):
        SVMHead()(SUPPORT, labels, QUERY, ways=3)
    with pytest.raises(InputError, match=r"ways: expected .*, got 0 in task \(0,\)"):
        SVMHead()(SUPPORT, LABELS, QUERY, ways=torch.tensor([0, -1]))
    labels = LABELS.clone()
    labels[:, 2] = torch.tensor([3, 9])
    with pytest.raises(InputError, match=r"labels: expected .*, got 3 in task \(0,\)"):
        SVMHead()(SUPPORT, labels, QUERY, ways=3)
    qp = crammer_singer(torch.full_like(SUPPORT[0], torch.nan), LABELS[0], C=0.1)
    with pytest.raises(SolverError, match=r"NativeSolver: 1 of 1 tasks not solved .*\(the task: relative gap"):
        NativeSolver().solve(qp)


@pytest.mark.parametrize("number", [np.float32(0.5), np.int64(2), Fraction(1, 2), torch.tensor(0.5), torch.tensor(2)])
def test_all_real_numbers_are_numbers(number):
    assert float(number) == SVMHead(C=number).C
    assert type(SVMHead(C=number).C) is float
    assert Learnable(number).value.item() == pytest.approx(float(number))


@pytest.mark.parametrize("ways", [np.int64(3), torch.tensor(3), LABELS.max() + 1], ids=repr)
def test_all_integers_are_integers(ways):
    torch.testing.assert_close(RidgeHead()(*GOOD[:3], ways=ways), RidgeHead()(*GOOD[:3], ways=3))
    assert RidgeHead(kernel=Polynomial(ways)).kernel.degree == 3


@pytest.mark.parametrize(
    "value",
    [
        True,
        10**400,
        1j,
        "1",
        None,
        np.float64("nan"),
        torch.tensor([0.5]),
        torch.tensor(True),
        torch.ones((), device="meta"),
    ],
    ids=repr,
)
def test_what_is_no_number_is_refused(value):
    with pytest.raises(InputError, match=r"C: expected a positive finite number.*, got .*"):
        SVMHead(C=value)
    with pytest.raises(InputError, match="C: "):
        SVMHead(C=torch.ones((), requires_grad=True))  # it would not learn
    with pytest.raises(InputError, match="ways: "):
        RidgeHead()(*GOOD[:3], ways=2.5 if value is None or isinstance(value, torch.Tensor) else value)


@pytest.mark.parametrize(
    ("coef", "message"),
    [
        (lambda targets: targets.mT, r"OwnHead.solve: expected .*, got coef of shape \(2, 3, 6\) in torch.float64"),
        (lambda targets: targets.float(), r"expected \(2, 6, 3\) in .*64.*, got coef of shape .* in torch.float32"),
    ],
    ids=["transposed", "float32"],
)
def test_head_of_ones_own_with_wrong_coefficients(coef, message):
    class OwnHead(ClassificationHead):
        def solve(self, support):
            return KernelExpansion(coef(support.targets))

    with pytest.raises(InputError, match=message):
        OwnHead()(SUPPORT[:, :6], LABELS[:, :6], QUERY, ways=3)


@pytest.mark.parametrize("part", ["bias", "quadratic"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 1), (2, 6, 3), (2, 6, 6), (2, 1, 6, 6)])
def test_head_of_ones_own_with_other_terms_of_a_wrong_shape(part, shape):
    """Most of these shapes once broadcast, some to logits of another shape."""

    class OwnHead(ClassificationHead):
        def solve(self, support):
            return KernelExpansion(support.targets, **{part: support.targets.new_ones(shape)})

    with pytest.raises(InputError, match=rf"OwnHead.solve: expected .*, got {part} of shape"):
        OwnHead()(SUPPORT[:, :6], LABELS[:, :6], QUERY, ways=3)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"bias": 0.5}, r"OwnHead.solve: expected .*, got bias of float"),
        ({"self_similarity_weight": torch.ones(2)}, r"OwnHead.solve: expected .*, got shape \(2,\)"),
    ],
    ids=["number", "weight per task"],
)
def test_head_of_ones_own_with_other_terms_of_a_wrong_kind(terms, message):
    class OwnHead(ClassificationHead):
        def solve(self, support):
            return KernelExpansion(support.targets, **terms)

    with pytest.raises(InputError, match=message):
        OwnHead()(SUPPORT[:, :6], LABELS[:, :6], QUERY, ways=3)


def test_kernel_that_is_wrong_for_queries_only():
    with pytest.raises(InputError, match=r"kernel: expected a Gram matrix of shape.*, got shape .*"):
        RidgeHead(kernel=lambda x, y: y @ x.mT)(*GOOD[:3])
