"""What every head promises, whatever its base learner and kernel: one table, all properties."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from tasks import close, task
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

from convexheads import (
    ClassificationHead,
    GaussianProcessHead,
    Learnable,
    LinearDiscriminantHead,
    LogisticHead,
    MahalanobisHead,
    OneVsRestSVMHead,
    PrototypeHead,
    RidgeHead,
    RidgeRegressionHead,
    SimplifiedSVMHead,
    SolverError,
    SupportVectorRegressionHead,
    SVMHead,
    WestonWatkinsSVMHead,
    use_float32,
)
from convexheads.kernels import RBF, Constant, Cosine, Linear, Polynomial, Product, Sum, UnitScale
from convexheads.solvers import InteriorPointSolver, NativeSolver

KERNELS = {
    "linear": lambda: Linear(),
    "normalized": lambda: Linear(normalize=True),
    "cosine": lambda: Cosine(),
    "rbf": lambda: RBF(Learnable(3.0)),
    "polynomial": lambda: Polynomial(2, offset=Learnable(1.0), scale=Learnable(0.1)),
    "median": lambda: RBF(),
    "unit": lambda: UnitScale(Linear() + Learnable(0.3) * RBF(2.0)),
    "combined": lambda: Learnable(0.5) * RBF() + Linear() * Cosine() + Constant(Learnable(0.3)),
    "function": lambda: lambda x, y: x @ y.mT + 1,
}
HEADS: dict[str, Callable[..., ClassificationHead]] = {
    "svm": lambda **kw: SVMHead(Learnable(0.3), scale=Learnable(1.5), **kw),
    "svm-in-torch": lambda **kw: SVMHead(0.3, solver=NativeSolver(backend="torch"), **kw),
    "svm-hard": lambda **kw: SVMHead(100.0, **kw),
    "svm-smooth": lambda **kw: SVMHead(Learnable(0.3), smoothing=1.0, **kw),
    "svm-learnable-smoothing": lambda **kw: SVMHead(0.3, smoothing=Learnable(0.5), **kw),
    "svm-squared": lambda **kw: SVMHead(Learnable(0.3), squared_hinge=True, **kw),
    "weston-watkins": lambda **kw: WestonWatkinsSVMHead(Learnable(0.1), **kw),
    "weston-watkins-squared": lambda **kw: WestonWatkinsSVMHead(Learnable(0.1), squared_hinge=True, **kw),
    "one-vs-rest": lambda **kw: OneVsRestSVMHead(Learnable(0.2), **kw),
    "one-vs-rest-squared": lambda **kw: OneVsRestSVMHead(Learnable(0.2), squared_hinge=True, **kw),
    "simplified": lambda **kw: SimplifiedSVMHead(Learnable(0.1), **kw),
    "simplified-squared": lambda **kw: SimplifiedSVMHead(Learnable(0.1), squared_hinge=True, **kw),
    "logistic": lambda **kw: LogisticHead(Learnable(0.5), scale=Learnable(1.5), **kw),
    "logistic-steps": lambda **kw: LogisticHead(Learnable(0.5), steps=5, **kw),
    "ridge": lambda **kw: RidgeHead(Learnable(2.0), scale=Learnable(1.5), **kw),
    "discriminant": lambda **kw: LinearDiscriminantHead(0.3, variance=Learnable(1.0), **kw),
    "discriminant-shrunk": lambda **kw: LinearDiscriminantHead(0.3, scale=Learnable(1.5), **kw),
    "mahalanobis": lambda **kw: MahalanobisHead(Learnable(0.7), scale=Learnable(1.5), **kw),
    "prototype": lambda **kw: PrototypeHead(scale=Learnable(1.5), **kw),
}

heads = pytest.mark.parametrize("make", HEADS.values(), ids=HEADS.keys())


def combination(head: str, kernel: str) -> pytest.ParameterSet:
    """Every head with two kernels and a few heads with every kernel; the other combinations are slow tests."""
    usual = kernel in ("linear", "rbf") or head in ("svm", "logistic", "ridge", "mahalanobis", "prototype")
    return pytest.param(HEADS[head], KERNELS[kernel], id=f"{head}-{kernel}", marks=[] if usual else pytest.mark.slow)


heads_and_kernels = pytest.mark.parametrize(
    ("make", "kernel"), [combination(head, kernel) for head in HEADS for kernel in KERNELS]
)


@heads_and_kernels
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)], ids=str)
def test_shapes_and_dtype(make, kernel, batch):
    support, labels, query, ways = task(2, 3, dtype=torch.float32)
    flat = (x.flatten(0, 1) for x in (support, labels, query))
    support, labels, query = (x[: torch.Size(batch).numel()].reshape(*batch, *x.shape[1:]) for x in flat)
    logits = make(kernel=kernel())(support, labels, query, ways=ways)
    assert logits.shape == (*batch, query.shape[-2], ways)
    assert logits.dtype == torch.float32
    assert logits.view(-1, ways).shape == logits.reshape(-1, ways).shape  # which needs contiguous logits


@heads_and_kernels
def test_batch_equals_loop(make, kernel):
    support, labels, query, ways = task(2, 3)
    head = make(kernel=kernel())
    logits = head(support, labels, query, ways=ways)
    for i in range(2):
        for j in range(3):
            alone = head(support[i, j], labels[i, j], query[i, j], ways=ways)
            torch.testing.assert_close(logits[i, j], alone, rtol=1e-9, atol=1e-9)


DEGENERATE = {
    "zero": lambda x: torch.zeros_like(x),
    "duplicates": lambda x: x[:1].expand_as(x).clone(),
    "pairs": lambda x: torch.cat([x[: len(x) // 2]] * 2 + [x[-1:]])[: len(x)],
    "rank-one": lambda x: x[:, :1] * torch.ones_like(x),
    "huge": lambda x: 1e6 * x,
    "tiny": lambda x: 1e-6 * x,
}


# Without `variance=`, a task in which no class has two different examples is an input error: see test_inputs.py.
@pytest.mark.parametrize("make", [h for n, h in HEADS.items() if n != "discriminant-shrunk"])
@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(spoil, id=name, marks=[] if name in ("zero", "duplicates", "huge") else pytest.mark.slow)
        for name, spoil in DEGENERATE.items()
    ],
)
def test_degenerate_task_leaves_its_neighbours_alone(make, spoil):
    support, labels, query, ways = task(3, d=20)
    support[1] = spoil(support[1])
    head = make()
    if isinstance(head, LinearDiscriminantHead):  # the variance is tiny compared with huge features
        head.on_failure = "return"
    support.requires_grad_()
    logits = head(support, labels, query, ways=ways)
    assert torch.isfinite(logits).all()
    (gradient,) = torch.autograd.grad(logits.square().sum(), support)
    assert torch.isfinite(gradient).all()
    for i in range(3):
        alone = support[i].detach().requires_grad_()
        scores = head(alone, labels[i], query[i], ways=ways)
        torch.testing.assert_close(logits[i], scores, rtol=1e-8, atol=1e-10)
        if i != 1:
            (expected,) = torch.autograd.grad(scores.square().sum(), alone)
            torch.testing.assert_close(gradient[i], expected, rtol=1e-7, atol=1e-9)


@heads
def test_more_examples_than_features(make):
    support, labels, query, ways = task(4, shots=(5, 4, 6), d=2)
    head = make()
    logits = head(support, labels, query, ways=ways)
    for i in range(4):
        torch.testing.assert_close(logits[i], head(support[i], labels[i], query[i]), rtol=1e-7, atol=1e-9)


@heads_and_kernels
def test_order_of_support_does_not_matter(make, kernel):
    support, labels, query, ways = task()
    head, order = make(kernel=kernel()), torch.randperm(len(labels))
    shuffled = head(support[order], labels[order], query, ways=ways)
    torch.testing.assert_close(shuffled, head(support, labels, query, ways=ways), rtol=1e-8, atol=1e-9)


@heads
def test_relabelling_permutes_columns(make):
    support, labels, query, ways = task()
    permutation = torch.randperm(ways)
    relabeled = make()(support, permutation[labels], query, ways=ways)
    expected = make()(support, labels, query, ways=ways)
    torch.testing.assert_close(relabeled[:, permutation], expected, rtol=1e-8, atol=1e-9)


@heads_and_kernels
def test_queries_are_independent(make, kernel):
    support, labels, query, ways = task()
    fitted = make(kernel=kernel()).fit(support, labels, ways=ways)
    torch.testing.assert_close(torch.cat([fitted(row[None]) for row in query]), fitted(query))
    assert fitted(query[:0]).shape == (0, ways)


@heads_and_kernels
def test_mask_equals_leaving_out(make, kernel):
    support, labels, query, ways = task(3, shots=(3, 3, 3))
    mask = torch.ones_like(labels, dtype=torch.bool)
    mask[0, 2] = mask[1, 0] = mask[1, 5] = False
    hidden = support.clone()
    hidden[~mask] = torch.nan
    head = make(kernel=kernel())
    hidden.requires_grad_()
    logits = head(hidden, labels, query, ways=ways, mask=mask)
    (gradient,) = torch.autograd.grad(logits.square().sum(), hidden)
    assert (gradient[~mask] == 0).all()
    for i in range(3):
        kept = support[i, mask[i]].requires_grad_()
        alone = head(kept, labels[i, mask[i]], query[i], ways=ways)
        torch.testing.assert_close(logits[i], alone, rtol=1e-8, atol=1e-9)
        (expected,) = torch.autograd.grad(alone.square().sum(), kept)
        torch.testing.assert_close(gradient[i, mask[i]], expected, rtol=1e-7, atol=1e-9)


@heads
@pytest.mark.parametrize("kernel", [Linear(), pytest.param(RBF(), marks=pytest.mark.slow)], ids=str)
def test_different_ways_in_one_batch(make, kernel):
    """Tasks of 2, 4 and 3 classes, masked to size: as each alone, gradients included."""
    ways = torch.tensor([2, 4, 3])
    support, query = torch.randn(3, 8, 12, dtype=torch.float64), torch.randn(3, 5, 12, dtype=torch.float64)
    labels = torch.arange(8) % ways.unsqueeze(-1)
    mask = torch.arange(8) < torch.tensor([[5], [8], [7]])
    head = make(kernel=kernel)
    truth = torch.tensor([0, 1, 1, 0, 1]).expand(3, 5)

    def loss(logits, truth):
        return functional.cross_entropy(logits.flatten(0, -2), truth.flatten(), reduction="sum")

    together = support.clone().requires_grad_()
    logits = head(together, labels, query, ways=ways, mask=mask)
    assert logits.shape == (3, 5, 4)
    wanted = [together, *head.parameters()]
    gradient, *of_parameters = torch.autograd.grad(loss(logits, truth), wanted)
    total = [torch.zeros_like(p) for p in head.parameters()]
    for i, k in enumerate(ways.tolist()):
        kept = support[i, mask[i]].requires_grad_()
        alone = head(kept, labels[i, mask[i]], query[i], ways=k)
        torch.testing.assert_close(logits[i, :, :k], alone, rtol=1e-8, atol=1e-9)
        assert (logits[i, :, k:] == -torch.inf).all()
        expected, *of_these = torch.autograd.grad(loss(alone, truth[i]), [kept, *head.parameters()])
        torch.testing.assert_close(gradient[i, mask[i]], expected, rtol=1e-7, atol=1e-9)
        total = [a + b for a, b in zip(total, of_these, strict=True)]
    torch.testing.assert_close(of_parameters, total)
    one = head(support[0, mask[0]], labels[0, mask[0]], query[0], ways=torch.tensor(2))
    torch.testing.assert_close(one, logits[0, :, :2])


def gradient_is_right(head, *, fast_mode: bool) -> bool:
    """Against central differences: of all outputs by all inputs, or in fast mode of one random combination."""
    support, labels, query, _ = task(shots=(2, 1, 2), queries=2, d=5)
    head = head.double()
    names, parameters = zip(*head.named_parameters(), strict=True) if list(head.parameters()) else ((), ())

    def logits(support, query, *values):
        return torch.func.functional_call(head, dict(zip(names, values, strict=True)), (support, labels, query))

    inputs = [x.detach().requires_grad_() for x in (support, query, *parameters)]
    return gradcheck(logits, inputs, eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=fast_mode)


@heads_and_kernels
@pytest.mark.usefixtures("unchecked")
def test_gradient(make, kernel):
    assert gradient_is_right(make(kernel=kernel()), fast_mode=True)


@pytest.mark.slow
@heads_and_kernels
@pytest.mark.usefixtures("unchecked")
def test_every_partial_derivative(make, kernel):
    assert gradient_is_right(make(kernel=kernel()), fast_mode=False)


@heads
@pytest.mark.usefixtures("unchecked")
def test_second_derivative(make):
    support, labels, query, ways = task(shots=(2, 1, 2), queries=2, d=5)
    head = make().double()

    def logits(support, query):
        return head(support, labels, query, ways=ways)

    inputs = [support.requires_grad_(), query.requires_grad_()]
    assert gradgradcheck(logits, inputs, atol=1e-5, rtol=1e-4, fast_mode=True)


@pytest.mark.parametrize("make", [h for n, h in HEADS.items() if n != "svm-hard"])
def test_every_learnable_learns(make):
    support, labels, query, ways = task(2)
    head = make(kernel=RBF(Learnable(3.0)))
    head(support, labels, query, ways=ways)[..., 0].sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs() > 0, name


@heads
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 1e-5), pytest.param(torch.float16, 1e-5, marks=pytest.mark.slow)],
)
def test_low_precision_features(make, dtype, tolerance):
    support, labels, query, ways = task(2)
    support, query = support.to(dtype), query.to(dtype)
    head = make()
    logits = head(support, labels, query, ways=ways)
    exact = head(support.double(), labels, query.double(), ways=ways)
    assert logits.dtype == torch.float32
    assert close(logits.double(), exact) < tolerance


@heads
@pytest.mark.parametrize("kernel", [Linear(), pytest.param(RBF(3.0), marks=pytest.mark.slow)], ids=str)
def test_autocast_changes_nothing(make, kernel):
    support, labels, query, ways = task(2, dtype=torch.float32)
    head = make(kernel=kernel)
    support.requires_grad_()
    expected = head(support, labels, query, ways=ways)
    (gradient,) = torch.autograd.grad(expected.square().sum(), support)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(support, labels, query, ways=ways)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(logits.square().sum(), support)[0], gradient)


@heads
def test_float32(make):
    """What `use_float32` gives, and a device without float64."""
    support, labels, query, ways = task(4, dtype=torch.float32)
    support.requires_grad_()
    exact = make()(support.double(), labels, query.double(), ways=ways)
    (gradient,) = torch.autograd.grad(exact.square().sum(), support)
    with use_float32():
        fitted = make().fit(support, labels, ways=ways)
        logits = fitted(query)
    assert fitted.expansion.coef.dtype == torch.float32
    assert fitted.solution is None or fitted.solution.converged.all()
    assert close(logits.double(), exact) < 1e-3
    assert close(torch.autograd.grad(logits.square().sum(), support)[0], gradient) < 1e-2
    assert torch.equal(fitted(query), logits)
    assert make().fit(support, labels, ways=ways).expansion.coef.dtype == torch.float64


@heads
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, pytest.param(torch.int32, marks=pytest.mark.slow)])
def test_any_integer_labels(make, dtype):
    support, labels, query, ways = task()
    expected = make()(support, labels, query, ways=ways)
    torch.testing.assert_close(make()(support, labels.to(dtype), query), expected)
    each = torch.full(labels.shape[:-1], ways)
    torch.testing.assert_close(make()(support, labels.to(dtype), query, ways=each), expected)


@heads
def test_nothing_is_kept_on_the_head(make):
    first, second = task(seed=1), task(seed=2)
    head = make()
    before = repr(vars(head))
    fitted = head.fit(first.support, first.labels)
    logits = fitted(first.query)
    other = head.fit(second.support, second.labels)
    torch.testing.assert_close(fitted(first.query), logits)
    torch.testing.assert_close(copy.deepcopy(head)(*second[:3]), other(second.query))
    assert repr(vars(head)) == before


@heads_and_kernels
def test_state_dict_round_trip(make, kernel):
    head, other = make(kernel=kernel()), make(kernel=kernel())
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3)
    other.load_state_dict(head.state_dict())
    t = task()
    torch.testing.assert_close(head(*t[:3]), other(*t[:3]))


def test_repr_is_the_constructor_call():
    for head in (
        SVMHead(C=0.1),
        SVMHead(C=Learnable(0.5), smoothing=1.0, kernel=RBF(Learnable(2.0)), scale=Learnable(1.0)),
        RidgeHead(regularization=3.0, kernel=Polynomial(3)),
        PrototypeHead(kernel=Linear(normalize=True)),
        SVMHead(kernel=UnitScale(RBF(2.0))),
        SVMHead(kernel=Sum(Linear(), Product(RBF(), Constant(Learnable(2.0))))),
        WestonWatkinsSVMHead(0.2, squared_hinge=True, solver=NativeSolver(on_failure="warn")),
        OneVsRestSVMHead(0.5),
        SimplifiedSVMHead(0.5, smoothing=0.1),
        LogisticHead(2.0, steps=5, on_failure="return"),
        LinearDiscriminantHead(0.2, variance=3.0),
        MahalanobisHead(Learnable(2.0)),
        RidgeRegressionHead(0.5),
        GaussianProcessHead(0.2, kernel=RBF(2.0)),
        SupportVectorRegressionHead(0.5, epsilon=0.3),
    ):
        assert repr(eval(repr(head))) == repr(head)


@pytest.mark.parametrize("kernel", [Linear(), Linear(normalize=True)], ids=str)
@pytest.mark.parametrize("regularization", [1e-6, 1.0])
def test_ridge_primal_equals_dual(kernel, regularization):
    """With fewer features than examples the d x d system is solved; a kernel that hides what it is gets the n x n."""
    support, labels, query, _ = task(2, shots=(6, 8, 7), d=4)
    head = RidgeHead(regularization, kernel=kernel)
    hidden = RidgeHead(regularization, kernel=lambda x, y: kernel(x, y))
    support.requires_grad_()
    logits, expected = head(support, labels, query), hidden(support, labels, query)
    assert close(logits, expected) < 1e-8
    gradient, wanted = (torch.autograd.grad(x.square().sum(), support)[0] for x in (logits, expected))
    assert close(gradient, wanted) < 1e-7


@pytest.mark.gpu
@heads_and_kernels
def test_cuda_equals_cpu(make, kernel, cuda):
    support, labels, query, ways = task(3)
    head = make(kernel=kernel()).double()  # in float32 the exponential of a `Learnable` differs in its last digit
    support.requires_grad_()
    logits = head(support, labels, query, ways=ways)
    (gradient,) = torch.autograd.grad(logits.square().sum(), support)
    head, there = head.to(cuda), support.detach().to(cuda).requires_grad_()
    logits_there = head(there, labels.to(cuda), query.to(cuda), ways=ways)
    (gradient_there,) = torch.autograd.grad(logits_there.square().sum(), there)
    torch.testing.assert_close(logits_there.cpu(), logits, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(gradient_there.cpu(), gradient, rtol=1e-6, atol=1e-8)


@heads
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_without_validation_what_is_not_finite_fails_in_its_task(make, device, request):
    """No error is torch's own, and no other task is touched."""
    device = request.getfixturevalue("cuda") if device == "cuda" else device
    support, labels, query, ways = (value.to(device) if torch.is_tensor(value) else value for value in task(3))
    head = make(validate=False).to(device)
    expected = head(support, labels, query, ways=ways)
    for where in (support, query):
        kept, where[1, 0, 0] = where[1, 0, 0].item(), torch.nan
        with contextlib.suppress(SolverError):
            logits = head(support, labels, query, ways=ways)
            assert logits[1].isnan().any()
            torch.testing.assert_close(logits[[0, 2]], expected[[0, 2]])
        where[1, 0, 0] = kept


@pytest.mark.gpu
@heads
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_on_cuda_changes_nothing(make, dtype, cuda):
    support, labels, query, ways = (value.to(cuda) if torch.is_tensor(value) else value for value in task(2))
    support, query, head = support.float().requires_grad_(), query.float(), make().to(cuda)
    expected = head(support, labels, query, ways=ways)
    (gradient,) = torch.autograd.grad(expected.square().sum(), support)
    with torch.autocast("cuda", dtype=dtype):
        logits = head(support, labels, query, ways=ways)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(torch.autograd.grad(logits.square().sum(), support)[0], gradient)


@pytest.mark.gpu
@pytest.mark.parametrize("make", [PrototypeHead, partial(SVMHead, solver=InteriorPointSolver(max_iterations=5))])
def test_many_tasks_on_cuda_are_those_of_one_at_a_time(make, cuda):
    """However the device splits its work; a batch as large as it takes to fill it."""
    support, labels, query, ways = task(512, shots=(5,) * 5, d=64)
    support, labels, query = support.to(cuda), labels.to(cuda), query.to(cuda)
    together = make()(support, labels, query, ways=ways)
    for chosen in (0, 255, 511):
        alone = make()(support[chosen], labels[chosen], query[chosen], ways=ways)
        torch.testing.assert_close(together[chosen], alone, rtol=1e-9, atol=1e-11)


def test_doubles_of_numpy_are_numbers():
    """Their comparisons give NumPy's bool, which the annotations refuse."""
    assert repr(SVMHead(C=np.float64(0.1))) == repr(SVMHead(C=0.1))
