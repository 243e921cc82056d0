"""Bad input: an error of the library's own that names the argument, what came and what was wanted."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from installing import installs, requirements_of
from tasks import crammer_singer, task

from convexheads import (
    RBF,
    ConvexHeadsError,
    Dual,
    Head,
    InputError,
    InteriorPointSolver,
    Learnable,
    LinearDiscriminantHead,
    LogisticHead,
    MahalanobisHead,
    MissingDependencyError,
    NativeSolver,
    OneVsRestHead,
    Polynomial,
    Product,
    PrototypeHead,
    RidgeHead,
    SolverError,
    Sum,
    SVMHead,
)
from convexheads.heads.inputs import failing_on_indefinite

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
        r"support: got shape \(12,\), wanted at least two",
    ),
    "support that is no tensor": ((SUPPORT.tolist(), LABELS, QUERY), {}, "support: got list, wanted a tensor of float"),
    "support of integers": (
        (SUPPORT.long(), LABELS, QUERY),
        {},
        "support: got a tensor of torch.int64, wanted .*floating",
    ),
    "empty support": (
        (SUPPORT[:, :0], LABELS[:, :0], QUERY),
        {},
        r"support: got shape \(2, 0, 12\), wanted at least one",
    ),
    "no features": (
        (SUPPORT[..., :0], LABELS, QUERY[..., :0]),
        {},
        r"support: got shape \(2, 6, 0\), wanted at least one",
    ),
    "float labels": ((SUPPORT, LABELS.float(), QUERY), {}, "labels: got a tensor of torch.float32, wanted .*integers"),
    "bool labels": ((SUPPORT, LABELS.bool(), QUERY), {}, "labels: got a tensor of torch.bool, wanted .*integers"),
    "labels in a list": ((SUPPORT, LABELS.tolist(), QUERY), {}, "labels: got list, wanted a tensor of integers"),
    "too few labels": ((SUPPORT, LABELS[:, :4], QUERY), {}, r"labels: got shape \(2, 4\), wanted .*\(2, 6\)"),
    "labels of one task": ((SUPPORT, LABELS[0], QUERY), {}, r"labels: got shape \(6,\), wanted .*\(2, 6\)"),
    "negative label": ((SUPPORT, LABELS - 1, QUERY), {}, r"labels: got -1 in task \(0,\), wanted values 0..ways-1"),
    "label too large": ((SUPPORT, LABELS, QUERY), {"ways": 2}, r"labels: got 2 in task \(0,\), wanted values 0..1"),
    "no ways": ((SUPPORT, LABELS, QUERY), {"ways": 0}, "ways: got 0, wanted an integer of at least 1"),
    "fractional ways": ((SUPPORT, LABELS, QUERY), {"ways": 5.0}, "ways: got 5.0, wanted an integer"),
    "nan in support": (
        (spoilt(SUPPORT, torch.nan), LABELS, QUERY),
        {},
        r"support: got non-finite .*row 2 of task \(1,\)",
    ),
    "infinity in query": (
        (SUPPORT, LABELS, spoilt(QUERY, torch.inf)),
        {},
        r"query: got non-finite .*row 2 of task \(1,\)",
    ),
    "query of other width": (
        (SUPPORT, LABELS, QUERY[..., :5]),
        {},
        r"query: got shape \(2, 4, 5\), wanted the feature size",
    ),
    "query of other tasks": (
        (SUPPORT, LABELS, QUERY[:1]),
        {},
        r"query: got shape \(1, 4, 12\), wanted the task dimensions",
    ),
    "query of one dimension": ((SUPPORT, LABELS, QUERY[0, 0]), {}, r"query: got shape \(12,\), wanted at least two"),
    "integer query": ((SUPPORT, LABELS, QUERY.long()), {}, "query: got a tensor of torch.int64"),
    "mask of numbers": ((SUPPORT, LABELS, QUERY), {"mask": LABELS}, "mask: got a tensor of torch.int64, wanted .*bool"),
    "mask of other shape": (
        (SUPPORT, LABELS, QUERY),
        {"mask": LABELS[0] > 0},
        r"mask: got shape \(6,\), wanted .*\(2, 6\)",
    ),
    "mask without examples": (
        (SUPPORT, LABELS, QUERY),
        {"mask": torch.tensor([[True] * 6, [False] * 6])},
        r"mask: got no example left in task \(1,\)",
    ),
    "labels elsewhere": ((SUPPORT, LABELS.to("meta"), QUERY), {}, "labels: got device meta, wanted .* cpu"),
    "images": (
        (SUPPORT.unflatten(-1, (-1, 1)), LABELS, QUERY),
        {},
        r"support: got shape .*, wanted flat features, \(2, 6, d\)",
    ),
    "ways of each task, too few": (
        GOOD[:3],
        {"ways": torch.tensor([3, 2])},
        r"labels: got 2 in task \(1,\), wanted values 0..ways-1",
    ),
    "ways of each task, float": (
        GOOD[:3],
        {"ways": torch.tensor([3.0, 3.0])},
        "ways: got a tensor of torch.float32.*, wanted integers",
    ),
    "ways of each task, zero": (
        GOOD[:3],
        {"ways": torch.tensor([0, 3])},
        r"ways: got 0 in task \(0,\), wanted at least 1",
    ),
    "query elsewhere": ((SUPPORT, LABELS, QUERY.to("meta")), {}, "query: got device meta, wanted .* cpu"),
}


@HEADS
@pytest.mark.parametrize(("arguments", "options", "message"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_bad_call(head, arguments, options, message):
    with pytest.raises(InputError, match=message) as caught:
        head(*arguments, **options)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, ConvexHeadsError)
    assert caught.value.argument in ("support", "labels", "query", "ways", "mask")


BAD_ARGUMENTS = {
    "C zero": (lambda: SVMHead(C=0), "C: got 0, wanted a positive finite number"),
    "C negative": (lambda: SVMHead(C=-0.1), "C: got -0.1, wanted a positive"),
    "C infinite": (lambda: SVMHead(C=torch.inf), "C: got inf, wanted a positive"),
    "C text": (lambda: SVMHead(C="1"), "C: got '1', wanted a positive"),
    "smoothing negative": (lambda: SVMHead(smoothing=-1), "smoothing: got -1, wanted a non-negative"),
    "lambda zero": (lambda: RidgeHead(0), "regularization: got 0, wanted a positive"),
    "scale nan": (lambda: PrototypeHead(scale=torch.nan), "scale: got nan, wanted a positive"),
    "learnable zero": (lambda: Learnable(0), r"Learnable\(initial\): got 0, wanted a positive"),
    "width": (lambda: RBF(-1.0), r"RBF\(width\): got -1.0, wanted a positive"),
    "degree": (lambda: Polynomial(1.5), r"Polynomial\(degree\): got 1.5, wanted an integer"),
    "offset": (lambda: Polynomial(offset=-1), r"Polynomial\(offset\): got -1, wanted a non-negative"),
    "kernel": (lambda: SVMHead(kernel="rbf"), r"kernel: got 'rbf', wanted a callable"),
    "solver name": (
        lambda: SVMHead(solver="cplex"),
        "solver: got 'cplex', wanted .*'native', .*'qpth', 'cvxpylayers', 'moreau'",
    ),
    "solver class": (lambda: SVMHead(solver=NativeSolver), "solver: got <class .*, wanted a Solver or one of"),
    "kernel class": (lambda: SVMHead(kernel=RBF), r"kernel: got <class .*RBF'>, wanted a callable"),
    "tolerance learnable": (
        lambda: NativeSolver(tolerance=Learnable(1.0)),
        r"\(tolerance\): .*, wanted a positive finite number$",
    ),
    "signed C": (lambda: SVMHead(C=Learnable(-1.0, signed=True)), "C: got Learnable.*, wanted a positive"),
    "bias": (lambda: RidgeHead(bias=torch.nan), "bias: got nan, wanted a finite number"),
    "squared hinge": (lambda: SVMHead(squared_hinge=1), "squared_hinge: got 1, wanted True or False"),
    "steps": (lambda: LogisticHead(steps=0), "steps: got 0, wanted an integer of at least 1"),
    "shrinkage": (lambda: LinearDiscriminantHead(1.5), "shrinkage: got 1.5, wanted a number above 0 and at most 1"),
    "iterations": (
        lambda: InteriorPointSolver(max_iterations=0),
        r"InteriorPointSolver\(max_iterations\): got 0, wanted an integer",
    ),
    "tolerance": (lambda: NativeSolver(tolerance=0), r"NativeSolver\(tolerance\): got 0, wanted a positive"),
    "on_failure": (lambda: NativeSolver(on_failure="ignore"), r"\(on_failure\): got 'ignore', wanted one of .*'warn'"),
}


@pytest.mark.parametrize(("make", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_bad_argument(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_dual_that_is_no_dual():
    class Wrong(SVMHead):
        def dual(self, gram, targets):
            return targets

    with pytest.raises(InputError, match=r"Wrong\.dual: got a result of Tensor, wanted a Dual"):
        Wrong()(*GOOD[:3])


def test_mask_that_leaves_a_class_empty():
    mask = LABELS != 1
    for head in (PrototypeHead(), MahalanobisHead(), LinearDiscriminantHead(variance=1.0)):
        with pytest.raises(InputError, match=r"labels: got no example of class 1 in task \(0,\)"):
            head(*GOOD[:3], mask=mask)
    assert torch.isfinite(SVMHead()(*GOOD[:3], mask=mask)).all()


def test_class_without_examples_where_the_head_needs_one():
    with pytest.raises(InputError, match=r"labels: got no example of class 3 in task \(0,\), wanted one .* 4 classes"):
        PrototypeHead()(*GOOD[:3], ways=4)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (lambda x, y: x.sum(-1), r"kernel: got a result of shape \(2, 6\), wanted .*\(2, 6, 6\)"),
        (lambda x, y: None, "kernel: got a result of NoneType"),
        (lambda x, y: (x @ y.mT).float(), "kernel: got a result of torch.float32, wanted .*torch.float64"),
        (lambda x, y: (x @ y.mT).log(), r"kernel: got non-finite values in row 0 of task \(0,\)"),
    ],
)
def test_bad_kernel(kernel, message):
    with pytest.raises(InputError, match=message):
        SVMHead(kernel=kernel)(*GOOD[:3])


@pytest.mark.parametrize(
    "head",
    [SVMHead, RidgeHead, LogisticHead, OneVsRestHead, MahalanobisHead, partial(LinearDiscriminantHead, variance=1.0)],
    ids=lambda head: getattr(head, "__name__", "LinearDiscriminantHead"),
)
def test_kernel_that_is_not_positive_semi_definite(head):
    with pytest.raises(
        InputError, match=r"kernel: got a Gram matrix with the eigenvalue -\S+ in task \(0,\), wanted a pos"
    ):
        head(kernel=lambda x, y: -1000 * (x @ y.mT))(*GOOD[:3])


def test_covariance_that_cannot_be_inverted():
    support, labels = torch.randn(2, 3, 5), torch.tensor([[0, 1, 2]] * 2)
    with pytest.raises(InputError, match=r"support: got a within-class covariance of zero in task \(0,\), .*variance="):
        LinearDiscriminantHead()(support, labels, support)
    assert LinearDiscriminantHead(variance=1.0)(support, labels, support).argmax(-1).equal(labels)


@pytest.mark.parametrize("name", ["qpth", "cvxpylayers", "moreau"])
def test_missing_package(name, monkeypatch):
    monkeypatch.setattr("convexheads.solvers.base.find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match=f"the package '{name}'") as caught:
        SVMHead(solver=name)
    assert isinstance(caught.value, ImportError)
    assert installs(str(caught.value)) == requirements_of(name)


@pytest.mark.gpu
def test_label_out_of_range_on_a_device_shows_in_its_task(cuda):
    """With `ways` given nothing waits for the device, so a bad label can't raise; it must not pass for a good one."""
    support, labels, query = (x.to(cuda) for x in GOOD[:3])
    labels[1, 0] = 7
    logits = RidgeHead()(support, labels, query, ways=WAYS)
    assert torch.isfinite(logits[0]).all()
    assert logits[1].isnan().all()


def test_a_gram_matrix_that_is_not_finite_is_no_indefinite_one():
    """On a GPU nobody has looked at its values, and torch would raise an error of its own over its eigenvalues."""
    gram = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    gram[1, 0, 0] = torch.nan
    with pytest.raises(SolverError, match="not solved"), failing_on_indefinite(gram):
        raise SolverError("not solved")
    gram[0] *= -1
    with pytest.raises(InputError, match=r"the eigenvalue -1 in task \(0,\)"), failing_on_indefinite(gram):
        raise SolverError("not solved")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
def test_with_ways_given_prototypes_do_not_wait_for_the_device(cuda):
    support, labels, query = (x.to(cuda) for x in GOOD[:3])
    PrototypeHead()(support, labels, query, ways=WAYS)
    try:
        torch.cuda.set_sync_debug_mode("error")
        PrototypeHead()(support, labels, query, ways=WAYS)
        with pytest.raises(RuntimeError, match="synchronizing"):
            PrototypeHead()(support, labels, query)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kernel", [Sum, Product])
def test_combination_of_no_kernels(kernel):
    with pytest.raises(InputError, match=rf"{kernel.__name__}\(kernels\): got none, wanted at least one kernel"):
        kernel()


def test_failures_name_the_task_and_its_own_value():
    """Of several faulty tasks, the first, with what is wrong in it."""
    labels = LABELS.clone()
    labels[1, 2] = -3
    with pytest.raises(InputError, match=r"labels: got -3 in task \(1,\), wanted values 0\.\.2"):
        SVMHead()(SUPPORT, labels, QUERY, ways=3)
    with pytest.raises(InputError, match=r"ways: got 0 in task \(0,\)"):
        SVMHead()(SUPPORT, LABELS, QUERY, ways=torch.tensor([0, -1]))
    labels = LABELS.clone()
    labels[:, 2] = torch.tensor([3, 9])
    with pytest.raises(InputError, match=r"labels: got 3 in task \(0,\)"):
        SVMHead()(SUPPORT, labels, QUERY, ways=3)
    qp = crammer_singer(torch.full_like(SUPPORT[0], torch.nan), LABELS[0], C=0.1)
    with pytest.raises(SolverError, match=r"NativeSolver: 1 of 1 tasks not solved .*\(the task: relative gap"):
        NativeSolver().solve(qp)


def test_numbers_that_are_not_pythons_own():
    with pytest.raises(
        InputError, match=r"C: got .*numpy.float32.*, wanted a positive finite number|C: got np.float32"
    ):
        SVMHead(C=np.float32(0.1))


@pytest.mark.parametrize(
    ("coef", "message"),
    [
        (lambda gram, targets: targets.mT, r"OwnHead.dual: got coef of shape \(2, 3, 6\) in torch.float64, wanted"),
        (lambda gram, targets: targets.float(), r"got coef of shape .* in torch.float32, wanted \(2, 6, 3\) in .*64"),
    ],
    ids=["transposed", "float32"],
)
def test_head_of_ones_own_with_wrong_coefficients(coef, message):
    class OwnHead(Head):
        def dual(self, gram, targets):
            return Dual(coef(gram, targets))

    with pytest.raises(InputError, match=message):
        OwnHead()(SUPPORT[:, :6], LABELS[:, :6], QUERY, ways=3)


def test_kernel_that_is_wrong_for_queries_only():
    with pytest.raises(InputError, match=r"kernel: got a result of shape .*, wanted a Gram matrix of shape"):
        RidgeHead(kernel=lambda x, y: y @ x.mT)(*GOOD[:3])
