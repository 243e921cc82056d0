"""What a fit returns, and the support set that a head solves."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import pickle
import sys

import pytest
import torch
from tasks import task

from convexheads import (
    ClassificationHead,
    ConvexHeadsError,
    GaussianProcessHead,
    InputError,
    KernelExpansion,
    Learnable,
    LinearDiscriminantHead,
    LogisticHead,
    MahalanobisHead,
    PerTask,
    PrototypeHead,
    RidgeHead,
    RidgeRegressionHead,
    SupportSet,
    SVMHead,
)
from convexheads.evaluation import Evaluation
from convexheads.kernels import RBF, Constant, Linear, UnitScale
from convexheads.solvers import DualProblem

LINEAR = {
    "svm": lambda kernel: SVMHead(kernel=kernel, scale=Learnable(2.5)),
    "ridge": lambda kernel: RidgeHead(kernel=kernel, scale=0.3),
    "discriminant": lambda kernel: LinearDiscriminantHead(kernel=kernel),
    "logistic": lambda kernel: LogisticHead(kernel=kernel),
}
KERNELS = {
    "linear": lambda: Linear(),
    "normalized": lambda: Linear(normalize=True),
    "constant": lambda: Linear() + Constant(Learnable(0.6)),
    "unit": lambda: UnitScale(Linear() + 0.5) + 0.2 * Linear(),
    "weighted": lambda: 0.5 * (Linear() + 1.0) + Learnable(2.0) * Linear(),
}


@pytest.mark.parametrize("make", LINEAR.values(), ids=LINEAR)
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_weights_and_biases_give_the_logits(make, kernel):
    support, labels, query, _ = task(2, 3, shots=(2, 3, 2))
    mask = torch.ones_like(labels, dtype=torch.bool)
    mask[0, 0, 1] = False
    fitted = make(kernel()).fit(support.requires_grad_(), labels, mask=mask)
    logits = query @ fitted.weight.mT + fitted.bias.unsqueeze(-2)
    torch.testing.assert_close(logits, fitted(query))
    (expected,) = torch.autograd.grad(fitted(query).square().sum(), support, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(logits.square().sum(), support)[0], expected)


class _OfMeans(ClassificationHead):
    """A head that returns weights, and coefficients that are not used."""

    def solve(self, support):
        weight = support.targets.mT @ support.features
        return KernelExpansion(torch.full_like(support.targets, 7.0), weight=weight)


def test_weights_of_a_head_of_your_own_replace_its_coefficients():
    support, labels, query, _ = task(2)
    for kernel in (Linear(), Linear() + 1.0, _dot):
        fitted = _OfMeans(kernel=kernel).fit(support, labels)
        expected = query @ (torch.nn.functional.one_hot(labels).to(support).mT @ support).mT
        torch.testing.assert_close(fitted(query), expected)
        torch.testing.assert_close(fitted.score_rows(query[0], torch.arange(4)), fitted(query[0]))
        if kernel is not _dot:
            torch.testing.assert_close(query @ fitted.weight.mT + fitted.bias.unsqueeze(-2), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_linear_layer_gives_the_logits(dtype):
    support, labels, query, _ = task(dtype=dtype)
    fitted = SVMHead(kernel=Linear() + 1.0).fit(support, labels)
    layer = fitted.to_linear()
    assert isinstance(layer, torch.nn.Linear)
    torch.testing.assert_close(layer(query), fitted(query))
    values = RidgeRegressionHead().fit(support, labels.to(dtype))
    torch.testing.assert_close(values.to_linear()(query).squeeze(-1), values(query))


def test_absent_classes_stay_absent():
    support, labels, query, _ = task(2, shots=(2, 2, 2))
    ways = torch.tensor([3, 5])
    fitted = RidgeHead().fit(support, labels, ways=ways)
    torch.testing.assert_close(query @ fitted.weight.mT + fitted.bias.unsqueeze(-2), fitted(query))


def test_what_is_not_linear_has_no_weights():
    support, labels, _, _ = task()
    for head in (SVMHead(kernel=RBF()), SVMHead(kernel=Linear() * Linear()), PrototypeHead(), MahalanobisHead()):
        fitted = head.fit(support, labels)
        for read in (lambda f: f.weight, lambda f: f.bias, lambda f: f.to_linear()):
            with pytest.raises(ConvexHeadsError, match="linear"):
                read(fitted)
    batch = SVMHead().fit(support[None], labels[None])
    with pytest.raises(ConvexHeadsError, match="one task"):
        batch.to_linear()


HEADS = {
    "svm": lambda: SVMHead(Learnable(0.3), scale=Learnable(2.0), kernel=Learnable(0.5) * RBF() + Linear()),
    "function": lambda: RidgeHead(kernel=lambda x, y: x @ y.mT),
    "module": lambda: RidgeHead(kernel=_Module()),
    "mahalanobis": lambda: MahalanobisHead(Learnable(2.0)),
}


class _Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, x, y):
        return self.weight.to(x) * x @ y.mT


@pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
def test_a_detached_fit_has_no_gradients(make):
    support, labels, query, _ = task(2)
    fitted = make().fit(support.requires_grad_(), labels)
    detached = fitted.detach()
    assert fitted(query).requires_grad
    assert not detached(query).requires_grad
    assert type(detached) is type(fitted)
    torch.testing.assert_close(detached(query), fitted(query).detach())


class _UnitKernel(torch.nn.Module):
    """A kernel that keeps a parameter per task, with its gradient, in an attribute or a buffer."""

    def __init__(self, keep):
        super().__init__()
        self.keep = keep

    def condition_on(self, features, mask):
        conditioned = _UnitKernel(self.keep)
        self.keep(conditioned, "unit", features.square().mean((-2, -1), keepdim=True))
        return conditioned

    def forward(self, x, y):
        return x @ y.mT / self.unit


@pytest.mark.parametrize("keep", [setattr, torch.nn.Module.register_buffer], ids=["attribute", "buffer"])
def test_parameters_per_task_in_a_module_are_detached_and_moved(keep):
    support, labels, query, _ = task(2)
    fitted = RidgeHead(kernel=_UnitKernel(keep)).fit(support.requires_grad_(), labels)
    detached = fitted.detach()
    torch.testing.assert_close(detached(query), fitted(query))
    assert not detached(query).requires_grad
    assert fitted.support.kernel.unit.requires_grad
    assert fitted.to("meta").support.kernel.unit.is_meta


def _dot(x, y):
    return x @ y.mT


def _dot_by_axis(x, y, weight):
    return weight.to(x) * x @ y.mT


TASKS = {
    "one": (1, 2),
    "one of the first dimension": 1,
    "a slice": (slice(None), slice(1, 3)),
    "a mask": torch.tensor([[True, False, True], [False, False, True]]),
    "numbers": torch.tensor([1, 0, 1]),
    "none": slice(0, 0),
}
BATCHES = HEADS | {
    "unit": lambda: SVMHead(kernel=UnitScale(RBF()) + Learnable(0.5)),
    "attribute": lambda: RidgeHead(kernel=_UnitKernel(setattr)),
    "buffer": lambda: RidgeHead(kernel=_UnitKernel(torch.nn.Module.register_buffer)),
    "Gaussian process": lambda: GaussianProcessHead(),
    "scales": lambda: SVMHead(scale=PerTask(torch.tensor([0.5, 1.0, 2.0]))),
}


@pytest.mark.parametrize("tasks", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("make", BATCHES.values(), ids=BATCHES)
def test_tasks_of_a_fit_can_be_chosen(make, tasks):
    support, labels, query, _ = task(2, 3, d=2)
    support.requires_grad_()
    head = make()
    fitted = head.fit(support, labels.double() if isinstance(head, GaussianProcessHead) else labels)
    chosen = fitted[tasks]
    torch.testing.assert_close(chosen(query[tasks]), fitted(query)[tasks])
    torch.testing.assert_close(chosen.solution.gap, fitted.solution.gap[tasks])
    assert type(chosen) is type(fitted)
    if chosen.support.features.numel():
        expected, found = (
            torch.autograd.grad(scores.sum(), support, retain_graph=True)[0]
            for scores in (fitted(query)[tasks], chosen(query[tasks]))
        )
        torch.testing.assert_close(found, expected)


def test_arguments_of_a_kernel_that_hold_for_all_tasks_stay():
    """This one is a vector with as many numbers as there are tasks."""
    support, labels, query, _ = task(2, d=2)
    fitted = RidgeHead(kernel=functools.partial(_dot_by_axis, weight=torch.tensor([1.0, 2.0]))).fit(support, labels)
    torch.testing.assert_close(fitted[1](query[1]), fitted(query)[1])


def test_chosen_tasks_keep_masks_ways_and_calibration():
    support, labels, query, _ = task(4, shots=(3, 3, 3))
    mask = torch.ones_like(labels, dtype=torch.bool)
    mask[2, 0] = False
    fitted = SVMHead().fit(support, labels, mask=mask, ways=torch.tensor([3, 5, 4, 3]))
    torch.testing.assert_close(fitted[2:](query[2:]), fitted(query)[2:])
    fitted = RidgeHead().fit(support, labels, calibrate="loo")
    assert fitted[1].prediction_sets(query[1]).equal(fitted.prediction_sets(query)[1])
    torch.testing.assert_close(fitted[3].to_linear()(query[3]), fitted(query)[3])


def test_a_fit_of_tasks_is_a_sequence_and_that_of_one_task_is_not():
    support, labels, query, _ = task(2)
    fitted = SVMHead().fit(support, labels)
    assert len([each(query[0]) for each in fitted]) == 2
    with pytest.raises(IndexError):
        fitted[2]
    with pytest.raises(InputError, match="tasks"):
        fitted[0][0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch, for strings
@pytest.mark.parametrize(
    "tasks",
    [None, True, 1.5, "1", (0, 0), slice(None, None, -1), torch.ones(3) > 0, torch.tensor([2]), (0, None)],
    ids=str,
)
def test_an_index_that_is_none_is_an_error_of_input(tasks):
    support, labels, _, _ = task(2)
    with pytest.raises(InputError, match="tasks"):
        SVMHead().fit(support, labels)[tasks]


def test_a_fit_moves_to_another_device():
    support, labels, query, _ = task(2)
    fitted = HEADS["svm"]().fit(support, labels, ways=torch.tensor([3, 4])).to("meta")
    assert fitted.expansion.coef.is_meta
    assert fitted.support.features.is_meta
    assert fitted.solution.gap.is_meta
    assert fitted.scale.is_meta
    assert fitted.ways.is_meta
    _, linear = fitted.support.kernel.kernels
    assert linear(query.to("meta"), query.to("meta")).is_meta
    assert fitted.support.kernel(query.to("meta"), fitted.support.features).is_meta


def test_every_method_takes_queries_of_the_input_dtype():
    support, labels, query, _ = task(2, dtype=torch.float32)
    for fitted in (RidgeHead().fit(support, labels), GaussianProcessHead().fit(support, labels.float())):
        for name, method in inspect.getmembers(type(fitted), inspect.isfunction):
            if name == "prediction_sets":  # returns bool, after calibration only
                continue
            if "query" in inspect.signature(method).parameters and (name == "__call__" or name[0] != "_"):
                assert method(fitted, query).dtype == torch.float32, name


@pytest.mark.gpu
@pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
def test_a_fit_moves_to_a_gpu(make, cuda):
    support, labels, query, _ = task(2)
    fitted = make().fit(support, labels)
    torch.testing.assert_close(fitted.to(cuda)(query.to(cuda)).cpu(), fitted(query))


def test_objects_are_short_to_print_and_compare_by_identity():
    support, labels, _, _ = task(2, 3)
    for head, values in ((SVMHead(), labels), (GaussianProcessHead(), labels.double())):
        fitted, other = head.fit(support, values), head.fit(support, values)
        for one, two in ((fitted, other), (fitted.support, other.support), (fitted.expansion, other.expansion)):
            assert one != two
            assert len(repr(one)) < 200
    assert "tasks=(2, 3)" in repr(fitted)
    solution = SVMHead().fit(support, labels).solution
    problem = DualProblem(torch.eye(50), linear=torch.ones(50, 2), upper=torch.ones(50, 2))
    evaluation = Evaluation(torch.ones(500), 0.0, torch.ones(500), torch.ones(500) > 0, {})
    for record in (solution, problem, evaluation):
        assert record != copy.copy(record)
        assert len(repr(record)) < 200


def test_dataclasses_compare_by_identity():
    """Comparing tensors, the `==` of a dataclass would raise an error."""
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == "convexheads"]
    classes = {value for module in modules for value in vars(module).values() if isinstance(value, type)}
    records = {value for value in classes if dataclasses.is_dataclass(value)}
    assert len(records) > 10
    assert not [record for record in records if record.__eq__ is not object.__eq__]


def test_a_fit_is_pickled_without_the_gram_matrix():
    support, labels, query, _ = task(d=2, shots=(30, 30))
    fitted = SVMHead().fit(support, labels)
    assert "_gram" not in vars(fitted.support)
    torch.testing.assert_close(pickle.loads(pickle.dumps(fitted))(query), fitted(query))


@pytest.mark.parametrize("make", [make for name, make in HEADS.items() if name != "function"])
def test_a_fit_is_pickled_with_its_certificate(make):
    fitted = make().fit(*task(2, d=2, shots=(30, 30))[:2])
    sizes = [len(pickle.dumps(each)) for each in (fitted, fitted.detach())]
    assert sizes[0] < 1.1 * sizes[1]
    torch.testing.assert_close(pickle.loads(pickle.dumps(fitted)).solution.gap, fitted.solution.gap)


def test_the_certificate_of_a_closed_form_is_computed_once_and_for_all_copies():
    support, labels, *_ = task(3)
    fitted = RidgeHead(PerTask(torch.tensor([0.1, 1.0, 10.0]))).fit(support, labels)
    gap = fitted.solution.gap
    assert fitted.solution is fitted.solution
    for again in (fitted[1:], fitted.detach()[1:], fitted.to("cpu")[1:], copy.deepcopy(fitted)[1:]):
        torch.testing.assert_close(again.solution.gap, gap[1:], rtol=0, atol=0)


@pytest.mark.parametrize("head", [LinearDiscriminantHead(0.3), RidgeHead(), SVMHead(), PrototypeHead()], ids=str)
def test_solve_finds_what_a_fit_finds(head):
    """The mean variance of discriminant analysis, for one, is relative to the number of features."""
    support, labels, _, ways = task(2)
    found = head.solve(SupportSet(support, torch.nn.functional.one_hot(labels, ways).double()))
    torch.testing.assert_close(found.coef, head.fit(support, labels).expansion.coef)


def test_the_gram_matrix_is_computed_once_and_only_if_used():
    calls = []

    def kernel(x, y):
        calls.append(1)
        return x @ y.mT

    support = SupportSet(torch.eye(3), torch.eye(3), kernel=kernel)
    assert not calls
    assert support.gram is support.gram
    assert len(calls) == 1
