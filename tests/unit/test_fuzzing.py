"""Any input gives the documented result or an error of the library, and a head keeps no state."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from strategies import (
    SVMS,
    anything,
    certain,
    classifiers,
    good_calls,
    modes,
    outcome,
    quietly,
    regressors,
    spoilt,
)
from tasks import clusters, examples, task
from torch import Tensor

import convexheads as ch
from convexheads.models import build_head
from convexheads.solvers import SOLVERS, get_solver

pytestmark = [pytest.mark.usefixtures("unchecked"), pytest.mark.timeout(1800)]  # in the nightly profile


# Heads ----------------------------------------------------------------------------------------------------------------


def as_tensors(call: dict[str, Any]) -> dict[str, Any]:
    """The call with tensors in place of arrays and lists."""
    return {
        name: torch.as_tensor(value) if isinstance(value, list | np.ndarray) else value for name, value in call.items()
    }


def check_logits(logits: Any, call: dict[str, Any], outputs: int, *, finite: bool) -> None:
    call = as_tensors(call)
    support, query, ways = call["support"], call["query"], call.get("ways")
    flat = "targets" in call and call["targets"].ndim < support.ndim
    assert logits.shape == (query.shape[:-1] if flat else (*query.shape[:-1], outputs))
    assert logits.dtype == torch.promote_types(support.dtype, torch.float32)
    assert logits.device == support.device
    if isinstance(ways, Tensor):
        absent = (torch.arange(outputs) >= ways.long()[..., None, None]).expand_as(logits)
        assert (logits[absent] == -torch.inf).all()
        logits = logits[~absent]
    assert logits.isfinite().all() or not finite


def test_good_calls_of_classification_heads():
    """They are never refused as unusable, but for what a head documents."""

    @examples(25, nightly=1250)
    @given(classifiers, good_calls(), modes)
    def check(head, drawn, mode):
        call, ways = drawn
        fitted_on = {name: value for name, value in call.items() if name != "query"}
        with mode():
            try:
                fitted = quietly(lambda: head.fit(**fitted_on))
            except ch.SolverError:
                return
            except ch.InputError as error:
                told = str(error)
                fitted = None
            if fitted is None:
                assert head.requires_all_classes or "allow_missing_classes" not in call
                assert "no example of class" in told or "covariance of zero" in told
                return
            finite = certain(head)
            check_logits(logits := fitted(call["query"]), call, ways, finite=finite)
            shares = fitted.probabilities(call["query"])
        assert shares.shape == logits.shape
        if finite and logits.dtype == torch.float64:
            torch.testing.assert_close(shares.sum(-1), torch.ones_like(shares[..., 0]))
        wanted = [x for x in (call["support"], call["query"], *head.parameters()) if x.requires_grad]
        if logits.requires_grad and finite:
            present = logits.masked_fill(logits.isinf(), 0)
            gradients = torch.autograd.grad(present.double().sum(), wanted, allow_unused=True)
            assert all(x is None or x.isfinite().all() for x in gradients)

    check()


def test_bad_calls_of_classification_heads():
    @examples(60, nightly=3000)
    @given(classifiers, good_calls(), st.data())
    def check(head, drawn, data):
        call, _ = drawn
        for name in data.draw(
            st.sets(st.sampled_from(["support", "query", "labels", "ways", "mask"]), min_size=1, max_size=2)
        ):
            call[name] = data.draw(spoilt(call.get(name)), label=name)
        logits = outcome(lambda: head(**call))
        if logits is not None:
            call = as_tensors(call)
            known = call["labels"].long()
            if isinstance(call.get("mask"), Tensor):
                known = known.masked_fill(~call["mask"], 0)
            ways = call.get("ways")
            if isinstance(ways, Tensor):
                ways = int(ways.long().max()) if ways.numel() else 1
            elif ways is None:
                ways = int(known.max()) + 1 if known.numel() else 1
            check_logits(logits, call, ways, finite=False)

    check()


def test_calls_of_regression_heads():
    @examples(30, nightly=1500)
    @given(regressors, good_calls(regression=True), st.data())
    def check(head, drawn, data):
        call, outputs = drawn
        names = data.draw(st.sets(st.sampled_from(["support", "query", "targets", "mask"]), max_size=1))
        for name in names:
            call[name] = data.draw(spoilt(call.get(name)), label=name)
        values = outcome(lambda: head(**call))
        if values is None:
            return
        fitted = head.fit(**{name: value for name, value in call.items() if name != "query"})
        call = as_tensors(call)
        if call["targets"].ndim == call["support"].ndim:
            outputs = call["targets"].shape[-1]
        check_logits(values, call, outputs, finite=False)
        if isinstance(fitted, ch.heads.FittedGaussianProcess):
            assert fitted.variance(call["query"]).shape == call["query"].shape[:-1]
            assert fitted.log_marginal_likelihood().shape == call["support"].shape[:-2]
            outcome(lambda: fitted.variance(data.draw(spoilt(call["query"]))))

    check()


def test_constructors():
    """Whatever they accept prints, is copied, and serves."""
    made = [
        *SVMS,
        *(ch.LogisticHead, ch.RidgeHead, ch.PrototypeHead, ch.MahalanobisHead, ch.LinearDiscriminantHead),
        *(ch.RidgeRegressionHead, ch.GaussianProcessHead, ch.SupportVectorRegressionHead),
        *(
            ch.Learnable,
            ch.kernels.Linear,
            ch.kernels.Constant,
            ch.kernels.Cosine,
            ch.kernels.RBF,
            ch.kernels.Polynomial,
            ch.kernels.Sum,
            ch.kernels.Product,
        ),
        *(SOLVERS.values()),
        *(
            get_solver,
            build_head,
            ch.models.metaoptnet_svm,
            ch.models.metaoptnet_ridge,
            ch.models.protonet,
            ch.models.r2d2,
            ch.CvxpyHead,
        ),
    ]
    own = [
        ch.Learnable(0.5),
        ch.kernels.RBF(),
        ch.kernels.RBF,
        ch.solvers.NativeSolver(),
        ch.solvers.NativeSolver,
    ]
    support, labels, query, _ = task(2)
    targets = torch.randn(2, 6, 2)

    @examples(40, nightly=2000)
    @given(st.data())
    def check(data):
        make = data.draw(st.sampled_from(made))
        argument = anything | st.sampled_from(own)
        parameters = [p for p in inspect.signature(make).parameters.values() if p.name not in ("args", "kwargs")]
        needed = {p.name for p in parameters if p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD}
        names = (
            data.draw(st.sets(st.sampled_from(sorted(p.name for p in parameters)), max_size=2)) if parameters else ()
        )
        values = {name: data.draw(argument, label=name) for name in sorted({*names, *needed})}
        several = values.pop("kernels", ())
        several = several if isinstance(several, list | tuple) else [several, data.draw(st.sampled_from(own))]
        result = outcome(lambda: make(*several, **values))
        if result is None:
            return
        assert isinstance(repr(result), str)
        copy.deepcopy(result)
        if isinstance(result, torch.nn.Module) and make is not ch.Learnable:
            assert all(parameter.isfinite().all() for parameter in result.parameters())
        if isinstance(result, ch.ClassificationHead) and make is not ch.CvxpyHead:
            outcome(lambda: result(support, labels, query))
        if isinstance(result, ch.RegressionHead):
            outcome(lambda: result(support, targets, query))

    check()


# Problems and functions -----------------------------------------------------------------------------------------------


def test_problems():
    some = [
        "native",
        ch.solvers.NativeSolver(backend="torch"),
        ch.solvers.InteriorPointSolver(max_iterations=3),
        "qpth",
        "moreau",
    ]

    @examples(20, nightly=1000)
    @given(st.sampled_from(some), st.integers(0, 9), st.booleans(), st.data())
    def check(solver, seed, rows_sum_to_zero, data):
        support, labels, *_ = task(2, seed=seed)
        targets = torch.nn.functional.one_hot(labels).double()
        fields = {
            "gram": support @ support.mT,
            "linear": targets,
            "lower": targets - 1,
            "upper": 0.5 * targets,
            "smoothing": torch.ones_like(targets),
            "rows_sum_to_zero": rows_sum_to_zero,
        }
        for name in data.draw(st.sets(st.sampled_from([*fields, "gram_factor"]), max_size=2)):
            fields[name] = data.draw(spoilt(fields.get(name)), label=name)
        solution = outcome(lambda: get_solver(solver).solve(ch.solvers.DualProblem(**fields)))
        if solution is not None:
            batch = fields["linear"].shape[:-2]
            assert solution.coef.shape == fields["linear"].shape
            assert solution.coef.dtype == solution.gap.dtype == torch.float64
            assert solution.gap.shape == solution.status.shape == solution.residual.shape == batch
            assert solution.coef[solution.converged].isfinite().all()
        outcome(lambda: get_solver(solver).solve(data.draw(anything)))

    check()


def check_episode(episode: ch.episodes.Episode, call: dict[str, Any]) -> None:
    data, labels = (torch.as_tensor(call[name]) for name in ("data", "labels"))
    assert episode.support.shape[: labels.ndim] == episode.support_labels.shape
    assert episode.query.shape[: labels.ndim] == episode.query_labels.shape
    assert episode.support.shape[labels.ndim - 1] + episode.query.shape[labels.ndim - 1] == labels.shape[-1]
    assert episode.support.dtype == data.dtype
    assert episode.query_labels.dtype == (torch.int64 if call["relabel"] is True else labels.dtype)


def check_evaluation(evaluation: ch.evaluation.Evaluation, call: dict[str, Any]) -> None:
    assert evaluation.accuracies.shape[0] == evaluation.episodes <= call["episodes"]
    assert 0 <= evaluation.accuracy <= 1
    assert 0 <= evaluation.expected_calibration_error <= 1
    assert "%" in str(evaluation)


def check_calibrated(head: ch.ClassificationHead, call: dict[str, Any]) -> None:
    assert type(head) is type(call["head"])
    assert math.isfinite(head.scale.value.item())
    assert head.scale.value > 0


def check_features(features: Tensor, call: dict[str, Any]) -> None:
    assert features.ndim == 2
    assert len(features) == len(call["images"])


def check_batches(loader: ch.EpisodeLoader, call: dict[str, Any]) -> None:
    samples, labels = next(iter(loader))
    given_samples = torch.as_tensor(call["samples"])
    assert samples.dtype == given_samples.dtype
    assert samples.shape[:2] == labels.shape
    assert samples.shape[2:] == given_samples.shape[1:]


class Rows(torch.nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.reshape(len(images), -1) if images.numel() else images.new_zeros(len(images), 1)


FEATURES, CLASSES = clusters(classes=4, each=7)
SIZES = {"ways": 3, "shots": 2, "queries": 3}
EVALUATION = {"head": ch.RidgeHead(1.0), "features": FEATURES, "labels": CLASSES, **SIZES}
EVALUATION |= {"episodes": 3, "batch_size": 2, "seed": 0, "progress": False}
LOADER = {"samples": FEATURES, "labels": CLASSES, **SIZES, "batch_size": 2, "steps_per_epoch": 2, "seed": 0}
LOADER |= {"transform": None, "resample_each_epoch": True, "rank": 0, "world_size": 1}
FUNCTIONS: dict[str, tuple[Callable[..., Any], dict[str, Any], Callable[[Any, dict[str, Any]], None]]] = {
    "split_task": (ch.split_task, {"data": FEATURES, "labels": CLASSES, "shots": 2, "relabel": False}, check_episode),
    "evaluate": (ch.evaluate, EVALUATION | {"rank": 0, "world_size": 1}, check_evaluation),
    "calibrate": (ch.calibrate, EVALUATION, check_calibrated),
    "embed": (ch.embed, {"backbone": Rows(), "images": FEATURES, "batch_size": 9, "progress": False}, check_features),
    "EpisodeLoader": (ch.EpisodeLoader, LOADER, check_batches),
}
# Large values of these are valid, but take too long.
ENDLESS = {"episodes", "batch_size"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    function, good, check_result = FUNCTIONS[name]
    check_result(function(**good), good)

    @examples(5, nightly=250)
    @given(st.data())
    def check(data):
        call = dict(good)
        for argument in data.draw(st.sets(st.sampled_from(sorted(good)), min_size=1, max_size=2)):
            value = data.draw(spoilt(good[argument]), label=argument)
            call[argument] = good[argument] if argument in ENDLESS and type(value) is int and value > 99 else value
        result = outcome(lambda: function(**call))
        if result is not None:
            check_result(result, call)

    check()


# A head's life --------------------------------------------------------------------------------------------------------


LIVES = [
    lambda: ch.SVMHead(ch.Learnable(0.3), scale=ch.Learnable(2.0)),
    lambda: ch.SVMHead(0.3, smoothing=ch.Learnable(0.5), solver=ch.solvers.NativeSolver(backend="torch")),
    lambda: ch.WestonWatkinsSVMHead(0.3, kernel=ch.kernels.RBF(ch.Learnable(3.0))),
    lambda: ch.LogisticHead(ch.Learnable(0.5), kernel=ch.kernels.Linear() + ch.Learnable(0.5)),
    lambda: ch.RidgeHead(ch.Learnable(2.0), kernel=ch.kernels.RBF()),
    lambda: ch.MahalanobisHead(ch.Learnable(0.7)),
    lambda: ch.PrototypeHead(scale=ch.Learnable(1.0), kernel=ch.kernels.Cosine()),
    lambda: ch.LinearDiscriminantHead(variance=ch.Learnable(1.0)),
]


class Life(RuleBasedStateMachine):
    """Fits, gradients, copies and moves, in any order: earlier fits stay as they were, the module keeps nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.fits: list[tuple[ch.heads.Fitted, Tensor, Tensor]] = []
        self.differentiable: list[
            ch.heads.Fitted
        ] = []  # torch refuses gradients through a parameter that has changed since

    @initialize(make=st.sampled_from(LIVES))
    def create(self, make):
        self.head = make()
        self.kept = self.contents()

    def contents(self) -> list[tuple[str, str, Any]]:
        """What hangs on the module and its parts, by name, with the size or the type."""
        sizes = list, dict, tuple, set
        return [
            (
                name,
                key,
                value.shape if isinstance(value, Tensor) else len(value) if isinstance(value, sizes) else type(value),
            )
            for name, module in self.head.named_modules()
            for key, value in sorted(vars(module).items())
        ]

    @rule(seed=st.integers(0, 99), shots=st.sampled_from([(2, 2), (1, 3, 2), (2,)]), d=st.integers(2, 9))
    def fit(self, seed, shots, d):
        support, labels, query, ways = task(2, shots=shots, d=d, seed=seed)
        fitted = self.head.fit(support.requires_grad_(), labels, ways=ways)
        logits = fitted(query)
        for i in range(2):
            alone = self.head(support[i], labels[i], query[i], ways=ways)
            torch.testing.assert_close(logits[i], alone, rtol=1e-9, atol=1e-9)
        self.fits = [*self.fits[-4:], (fitted, query, logits.detach())]
        self.differentiable.append(fitted)

    @precondition(lambda self: self.differentiable)
    @rule(data=st.data())
    def gradient(self, data):
        fitted = data.draw(st.sampled_from(self.differentiable))
        query = torch.randn(2, 3, fitted.support.features.shape[-1], dtype=torch.float64, requires_grad=True)
        wanted = [query, *self.head.parameters()]
        found = torch.autograd.grad(fitted(query).square().sum(), wanted, allow_unused=True, retain_graph=True)
        assert all(gradient is None or gradient.isfinite().all() for gradient in found)
        assert found[0] is not None

    @rule()
    def step(self):
        support, labels, query, ways = task(2, seed=5)
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True), *self.head.parameters()], lr=0.01)
        torch.nn.functional.cross_entropy(self.head(support, labels, query, ways=ways).mT, labels[:, :4]).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in self.head.parameters())
        optimizer.step()
        optimizer.zero_grad()
        self.differentiable = []

    @rule(value=st.floats(-2, 2))
    def set_values(self, value):
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.fill_(value)
        self.differentiable = []

    @rule(how=st.sampled_from(["deepcopy", "pickle", "state_dict", "to", "train"]))
    def become(self, how):
        match how:
            case "deepcopy":
                self.head = copy.deepcopy(self.head)
            case "pickle":
                self.head = pickle.loads(pickle.dumps(self.head))
            case "state_dict":
                other = copy.deepcopy(self.head)
                other.load_state_dict(self.head.state_dict())
                self.head = other
            case "to":
                self.head = self.head.to(torch.float64).to(torch.float32)
            case "train":
                self.head.train(not self.head.training)

    @invariant()
    def earlier_fits_are_as_they_were(self):
        for fitted, query, logits in self.fits:
            assert torch.equal(fitted(query), logits)

    @invariant()
    def nothing_is_kept(self):
        assert self.contents() == self.kept


def test_a_head_s_life():
    run_state_machine_as_test(Life, settings=settings(examples(10, nightly=500), stateful_step_count=12))
