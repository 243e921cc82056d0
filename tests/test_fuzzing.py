"""Whatever comes: the documented result, or an error of the library's own; and a head that remembers nothing."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
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
from tasks import clusters, task
from torch import Tensor

import convexheads as ch
from convexheads.pretrained import ZOO, make_head, save_pretrained
from convexheads.solvers import SOLVERS, get_solver

pytestmark = pytest.mark.usefixtures("unchecked")

# 200 examples of all tests together in the ordinary suite, 10,000 in the slow one.
times = pytest.mark.parametrize("times", [1, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])


def quietly(call: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ch.SolverWarning)
        return call()


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns; None where it raises an error of the library."""
    try:
        return quietly(call)
    except ch.InputError as error:
        told = str(error)
    except ch.ConvexHeadsError:
        return None
    for part in (": got ", ", wanted "):
        assert part in told, told
    return None


# What is drawn --------------------------------------------------------------------------------------------------------

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
OTHERS = [torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn]
FILLS = [0.0, 1.0, -1.0, 1e-30, 1e30, 1e300, math.nan, math.inf, -math.inf]
HUGE = [2**31, 2**40, 2**62]
NO_TENSORS = [
    *(None, True, False, 0, 1, 2, -1, 3, 10**400, 0.0, -0.0, 0.5, 2.5, -0.5, 5e-324, 1e-320, 1e-50, 1e50, 1e308),
    *(math.nan, math.inf, -math.inf, 1j, "", "text", "native", "raise", "paper", "svm", b"raw", "\0", "x" * 300),
    *([], [0.5], (), (0, 1), {}, {1}, range(3), object(), slice(None), ch.Status.FAILED, SimpleNamespace(), Path("x")),
    *(
        torch.float32,
        torch.device("cpu"),
        np.float16(0.5),
        np.float32(0.5),
        np.float64(0.5),
        np.int64(2),
        np.bool_(True),
    ),
    *(np.str_("native"), np.array(0.5), np.ones(2), np.ones((2, 3, 4)), np.array(["raise", "x"])),
]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
    "with gaps": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand_as(x) if x.ndim else x,
    "with gradient": lambda x: x.clone().requires_grad_() if x.is_floating_point() else x,
    "parameter": lambda x: torch.nn.Parameter(x, requires_grad=x.is_floating_point()),
}


def contents(shape: tuple[int, ...], dtype: torch.dtype, fill: float | None = None, seed: int = 0) -> Tensor:
    if fill is None:
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    else:
        values = torch.full(shape, fill, dtype=torch.float64)
    return (values if dtype.is_floating_point else values.nan_to_num(0, 1, -1).clamp(-9, 9)).to(dtype)


@st.composite
def any_tensor(draw) -> Tensor:
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    dtype, fill = draw(st.sampled_from(FLOATS + INTEGERS + OTHERS)), draw(st.sampled_from([*FILLS, None]))
    value = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](contents(shape, dtype, fill, draw(st.integers(0, 9))))
    return value.to("meta") if draw(st.integers(0, 19)) == 0 else value


anything = st.sampled_from(NO_TENSORS) | any_tensor()


def of_other_shape(value: Tensor, how: int) -> Tensor:
    if not value.ndim:
        return value
    return [value.unsqueeze(0), value.flatten(), value[:1], value[..., :0], value.movedim(0, -1)][how]


def of_other_value(value: Tensor, number: float) -> Tensor:
    value = value.clone()
    if value.numel() and value.is_floating_point():
        value[(-1,) * value.ndim] = torch.tensor(number, dtype=torch.float64).to(value.dtype)
    elif value.numel() and value.dtype != torch.bool:
        most = torch.iinfo(value.dtype).max
        value[(-1,) * value.ndim] = int(number) if 0 <= number <= most else most
    return value


@st.composite
def spoilt(draw, value: Any) -> Any:
    """What an argument may have become on its way."""
    how = draw(st.sampled_from(["anything", "dtype", "shape", "value", "list", "array", "sparse"]))
    if not isinstance(value, Tensor) or how == "anything":
        return draw(anything | st.sampled_from(HUGE))
    value = value.detach()
    match how:
        case "dtype":
            return value.to(draw(st.sampled_from(FLOATS + INTEGERS + OTHERS)))
        case "shape":
            return of_other_shape(value, draw(st.integers(0, 4)))
        case "value":
            return of_other_value(value, draw(st.sampled_from([*FILLS, 7, *HUGE])))
        case "list":
            return value.tolist()
    return value.float().numpy() if how == "array" else value.float().to_sparse()


number = st.floats(-3, 3).map(lambda exponent: 10.0**exponent)
hyper = number | number.map(ch.Learnable)
kernels = st.one_of(
    st.none(),
    st.builds(ch.Linear, normalize=st.booleans()),
    st.builds(ch.Cosine),
    st.builds(ch.RBF, st.none() | hyper),
    st.builds(ch.Polynomial, st.integers(1, 3), offset=hyper, scale=hyper),
    st.just(lambda x, y: x @ y.mT + 1),
    st.builds(lambda factor, constant: factor * ch.RBF() + ch.Linear() * ch.Cosine() + constant, hyper, hyper),
)
solvers = st.one_of(
    st.just("native"),
    st.builds(
        ch.NativeSolver,
        on_failure=st.sampled_from(["raise", "warn", "return"]),
        compiled=st.sampled_from([None, False]),
        max_iterations=st.none() | st.integers(1, 5),
    ),
    st.builds(ch.NativeSolver, gradient=st.just("smoothed"), relaxation=number),
    st.builds(ch.NativeSolver, gradient=st.just("truncated"), max_iterations=st.integers(1, 5)),
)
own = {"kernel": kernels, "scale": hyper}
SVMS = [ch.SVMHead, ch.WestonWatkinsHead, ch.OneVsRestHead, ch.SimplifiedSVMHead]
svms = [
    st.builds(kind, hyper, squared_hinge=st.booleans(), smoothing=st.just(0.0) | hyper, solver=solvers, **own)
    for kind in SVMS
]
classifiers = st.one_of(
    *svms,
    st.builds(ch.LogisticHead, hyper, steps=st.none() | st.integers(1, 5), **own),
    st.builds(ch.RidgeHead, hyper, bias=st.floats(-9, 9), **own),
    st.builds(ch.PrototypeHead, **own),
    st.builds(ch.MahalanobisHead, hyper, **own),
    st.builds(ch.LinearDiscriminantHead, st.floats(0.01, 1), variance=st.none() | hyper, **own),
)
regressors = st.one_of(
    st.builds(ch.RidgeRegressionHead, hyper, kernel=kernels),
    st.builds(ch.GaussianProcessHead, hyper, kernel=kernels),
    st.builds(ch.SupportVectorRegressionHead, hyper, epsilon=hyper, solver=solvers, kernel=kernels),
)
modes = st.sampled_from([torch.enable_grad, torch.no_grad, torch.inference_mode])


def certain(head: ch.Head | ch.RegressionHead) -> bool:
    """Whether what the head returns is always the optimum, so that it is finite."""
    solver = getattr(head, "solver", ch.NativeSolver())
    return solver.on_failure == "raise" and solver.max_iterations is None


@st.composite
def good_calls(draw, *, regression: bool = False) -> tuple[dict[str, Any], int]:
    """The arguments of a head's call, all of them usable, and the number of classes or outputs."""
    batch = draw(st.sampled_from([(), (1,), (3,), (2, 2), (0,)]))
    n, q, d, k = (draw(st.integers(least, most)) for least, most in ((1, 7), (0, 4), (1, 6), (1, 4)))
    seed, dtype = draw(st.integers(0, 99)), draw(st.sampled_from(FLOATS))
    layout = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))]
    call = {
        "support": layout(contents((*batch, n, d), dtype, draw(st.sampled_from([None, None, None, 0.0, 1.0])), seed)),
        "query": LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](contents((*batch, q, d), dtype, seed=seed + 1)),
    }
    generator = torch.Generator().manual_seed(seed)
    if draw(st.booleans()):
        mask = torch.rand((*batch, n), generator=generator) < 0.7
        call["mask"] = mask.index_fill(-1, torch.tensor(0), True)
    if regression:
        shape = draw(st.sampled_from([(*batch, n), (*batch, n, k)]))
        return call | {"targets": layout(contents(shape, draw(st.sampled_from(FLOATS)), seed=seed + 2))}, k
    ways = draw(st.sampled_from(["int", "tensor", "none"]))
    sizes = torch.randint(1, k + 1, batch, generator=generator) if ways == "tensor" else torch.full(batch, k)
    labels = torch.arange(n).expand(*batch, n) % sizes.unsqueeze(-1)
    call["labels"] = labels.to(draw(st.sampled_from(INTEGERS)))
    if ways != "none":
        call["ways"] = k if ways == "int" else sizes.to(draw(st.sampled_from(INTEGERS)))
    if ways == "int" or not labels.numel():
        return call, k if ways == "int" else 1
    known = labels.masked_fill(~call.get("mask", torch.tensor(True)), 0)
    return call, int(sizes.max() if ways == "tensor" else known.max() + 1)


# Heads ----------------------------------------------------------------------------------------------------------------


def check_logits(logits: Any, call: dict[str, Any], outputs: int, *, finite: bool) -> None:
    support, query, ways = call["support"], call["query"], call.get("ways")
    flat = "targets" in call and call["targets"].ndim < support.ndim
    assert logits.shape == (query.shape[:-1] if flat else (*query.shape[:-1], outputs))
    assert logits.dtype == support.dtype
    assert logits.device == support.device
    if isinstance(ways, Tensor):
        absent = (torch.arange(outputs) >= ways.long()[..., None, None]).expand_as(logits)
        assert (logits[absent] == -torch.inf).all()
        logits = logits[~absent]
    assert logits.isfinite().all() or not finite


@times
def test_good_calls_of_classification_heads(times):
    """They are never refused as unusable, but for what a head documents."""

    @settings(max_examples=25 * times)
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
                assert head.needs_every_class
                assert "no example of class" in told or "covariance of zero" in told
                return
            finite = certain(head) and call["support"].dtype != torch.float16  # in which large logits are infinite
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


@times
def test_bad_calls_of_classification_heads(times):
    @settings(max_examples=60 * times)
    @given(classifiers, good_calls(), st.data())
    def check(head, drawn, data):
        call, _ = drawn
        for name in data.draw(
            st.sets(st.sampled_from(["support", "query", "labels", "ways", "mask"]), min_size=1, max_size=2)
        ):
            call[name] = data.draw(spoilt(call.get(name)), label=name)
        logits = outcome(lambda: head(**call))
        if logits is not None:
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


@times
def test_calls_of_regression_heads(times):
    @settings(max_examples=30 * times)
    @given(regressors, good_calls(regression=True), st.data())
    def check(head, drawn, data):
        call, outputs = drawn
        names = data.draw(st.sets(st.sampled_from(["support", "query", "targets", "mask"]), max_size=1))
        for name in names:
            call[name] = data.draw(spoilt(call.get(name)), label=name)
        values = outcome(lambda: head(**call))
        if values is None:
            return
        if call["targets"].ndim == call["support"].ndim:
            outputs = call["targets"].shape[-1]
        check_logits(values, call, outputs, finite=False)
        fitted = head.fit(**{name: value for name, value in call.items() if name != "query"})
        with pytest.raises(ch.ConvexHeadsError):
            fitted.probabilities(call["query"])
        if isinstance(fitted, ch.FittedGaussianProcess):
            assert fitted.variance(call["query"]).shape == call["query"].shape[:-1]
            assert fitted.log_marginal_likelihood().shape == call["support"].shape[:-2]
            outcome(lambda: fitted.variance(data.draw(spoilt(call["query"]))))

    check()


@times
def test_constructors(times):
    """Whatever they accept prints, is copied, and serves."""
    made = [
        *SVMS,
        *(ch.LogisticHead, ch.RidgeHead, ch.PrototypeHead, ch.MahalanobisHead, ch.LinearDiscriminantHead),
        *(ch.RidgeRegressionHead, ch.GaussianProcessHead, ch.SupportVectorRegressionHead),
        *(ch.Learnable, ch.Linear, ch.Constant, ch.Cosine, ch.RBF, ch.Polynomial, ch.Sum, ch.Product),
        *(SOLVERS.values()),
        *(get_solver, make_head, ch.metaoptnet_svm, ch.metaoptnet_ridge, ch.protonet, ch.r2d2, ch.CvxpyHead),
    ]
    own = [ch.Learnable(0.5), ch.Learnable(-0.5, signed=True), ch.RBF(), ch.RBF, ch.NativeSolver(), ch.NativeSolver]
    support, labels, query, _ = task(2)
    targets = torch.randn(2, 6, 2)

    @settings(max_examples=40 * times)
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
        if isinstance(result, ch.Head) and make is not ch.CvxpyHead:
            outcome(lambda: result(support, labels, query))
        if isinstance(result, ch.RegressionHead):
            outcome(lambda: result(support, targets, query))

    check()


# Problems and functions -----------------------------------------------------------------------------------------------


@times
def test_problems(times):
    some = ["native", ch.NativeSolver(compiled=False), ch.NativeSolver(max_iterations=3), "qpth", "moreau"]

    @settings(max_examples=20 * times)
    @given(st.sampled_from(some), st.integers(0, 9), st.booleans(), st.data())
    def check(solver, seed, row_sum, data):
        support, labels, *_ = task(2, seed=seed)
        targets = torch.nn.functional.one_hot(labels).double()
        fields = {
            "gram": support @ support.mT,
            "linear": targets,
            "lower": targets - 1,
            "upper": 0.5 * targets,
            "smoothing": torch.ones_like(targets),
            "row_sum": row_sum,
        }
        for name in data.draw(st.sets(st.sampled_from([*fields, "root"]), max_size=2)):
            fields[name] = data.draw(spoilt(fields.get(name)), label=name)
        solution = outcome(lambda: get_solver(solver).solve(ch.QP(**fields)))
        if solution is not None:
            batch = fields["linear"].shape[:-2]
            assert solution.coef.shape == fields["linear"].shape
            assert solution.coef.dtype == solution.gap.dtype == torch.float64
            assert solution.gap.shape == solution.status.shape == solution.residual.shape == batch
            assert solution.coef[solution.converged].isfinite().all()
        outcome(lambda: get_solver(solver).solve(data.draw(anything)))

    check()


def check_episode(episode: ch.Episode, call: dict[str, Any]) -> None:
    data, labels = call["data"], call["labels"]
    assert episode.support.shape[: labels.ndim] == episode.support_labels.shape
    assert episode.query.shape[: labels.ndim] == episode.query_labels.shape
    assert episode.support.shape[labels.ndim - 1] + episode.query.shape[labels.ndim - 1] == labels.shape[-1]
    assert episode.support.dtype == data.dtype
    assert episode.query_labels.dtype == labels.dtype


def check_evaluation(evaluation: ch.Evaluation, call: dict[str, Any]) -> None:
    assert evaluation.accuracies.shape[0] == evaluation.episodes <= call["episodes"]
    assert 0 <= evaluation.mean <= 1
    assert 0 <= evaluation.calibration_error <= 1
    assert "%" in str(evaluation)


def check_calibrated(head: ch.Head, call: dict[str, Any]) -> None:
    assert type(head) is type(call["head"])
    assert math.isfinite(head.scale)
    assert head.scale > 0


def check_features(features: Tensor, call: dict[str, Any]) -> None:
    assert features.ndim == 2
    assert len(features) == len(call["images"])


def check_batches(loader: ch.EpisodeLoader, call: dict[str, Any]) -> None:
    samples, labels = next(iter(loader))
    assert samples.dtype == call["samples"].dtype
    assert samples.shape[:2] == labels.shape
    assert samples.shape[2:] == call["samples"].shape[1:]


def check_pretrained(loaded: ch.Pretrained, call: dict[str, Any]) -> None:
    assert isinstance(loaded.backbone, torch.nn.Module)
    assert isinstance(loaded.head, ch.Head)


class Rows(torch.nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.reshape(len(images), -1) if images.numel() else images.new_zeros(len(images), 1)


FEATURES, CLASSES = clusters(classes=4, each=7)
SIZES = {"ways": 3, "shots": 2, "queries": 3}
EVALUATION = {"head": ch.RidgeHead(1.0), "features": FEATURES, "labels": CLASSES, **SIZES}
EVALUATION |= {"episodes": 3, "batch_size": 2, "seed": 0, "progress": False}
LOADER = {"samples": FEATURES, "labels": CLASSES, **SIZES, "tasks": 2, "steps": 2, "seed": 0, "augment": None}
LOADER |= {"classes": None, "fixed": False, "rank": 0, "processes": 1}
FUNCTIONS: dict[str, tuple[Callable[..., Any], dict[str, Any], Callable[[Any, dict[str, Any]], None]]] = {
    "split_task": (ch.split_task, {"data": FEATURES, "labels": CLASSES, "shots": 2}, check_episode),
    "evaluate": (ch.evaluate, EVALUATION | {"part": (0, 1)}, check_evaluation),
    "calibrate": (ch.calibrate, EVALUATION, check_calibrated),
    "embed": (ch.embed, {"backbone": Rows(), "images": FEATURES, "batch_size": 9, "progress": False}, check_features),
    "EpisodeLoader": (ch.EpisodeLoader, LOADER, check_batches),
    "load_pretrained": (ch.load_pretrained, {"name": "conv4-cifar-fs-svm"}, check_pretrained),
}
# So many of these are not wrong, only too many to wait for.
ENDLESS = {"episodes", "tasks"}


@times
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name, times):
    function, good, check_result = FUNCTIONS[name]
    check_result(function(**good), good)

    @settings(max_examples=(5 if name != "load_pretrained" else 1) * times)
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


@times
def test_files_of_weights(times, tmp_path):
    """Whatever is loaded is what was saved, to the last bit."""
    backbone, head, told = ch.load_pretrained(ZOO / "conv4-cifar-fs-svm.safetensors")
    save_pretrained(tmp_path / "whole.safetensors", backbone, head, told)
    content = (tmp_path / "whole.safetensors").read_bytes()

    anywhere = st.integers(0, len(content) - 1)

    @settings(max_examples=12 * times)
    @given(anywhere, st.binary(max_size=9), st.booleans(), st.integers(0, 3000) | anywhere)
    def check(end, other, cut, start):
        spoilt = content[:end] if cut else content[:start] + other + content[start + len(other) :]
        (tmp_path / "spoilt.safetensors").write_bytes(spoilt)
        loaded = outcome(lambda: ch.load_pretrained(tmp_path / "spoilt.safetensors"))
        if loaded is not None:
            check_pretrained(loaded, {})
            assert loaded.settings == told
            for own, saved in ((loaded.backbone, backbone), (loaded.head, head)):
                torch.testing.assert_close(own.state_dict(), saved.state_dict(), rtol=0, atol=0, equal_nan=True)

    check()


# A head's life --------------------------------------------------------------------------------------------------------


LIVES = [
    lambda: ch.SVMHead(ch.Learnable(0.3), scale=ch.Learnable(2.0)),
    lambda: ch.SVMHead(0.3, smoothing=ch.Learnable(0.5), solver=ch.NativeSolver(compiled=False)),
    lambda: ch.WestonWatkinsHead(0.3, kernel=ch.RBF(ch.Learnable(3.0))),
    lambda: ch.LogisticHead(ch.Learnable(0.5), kernel=ch.Linear() + ch.Learnable(0.5)),
    lambda: ch.RidgeHead(ch.Learnable(2.0), bias=ch.Learnable(0.1, signed=True), kernel=ch.RBF()),
    lambda: ch.MahalanobisHead(ch.Learnable(0.7)),
    lambda: ch.PrototypeHead(scale=ch.Learnable(1.0), kernel=ch.Cosine()),
    lambda: ch.LinearDiscriminantHead(variance=ch.Learnable(1.0)),
]


class Life(RuleBasedStateMachine):
    """Fits, gradients, copies and moves, in any order: earlier fits stay as they were, the module keeps nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.fits: list[tuple[ch.Fitted, Tensor, Tensor]] = []
        self.differentiable: list[ch.Fitted] = []  # torch refuses gradients through a parameter that has changed since

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
        query = torch.randn(2, 3, fitted.support.shape[-1], dtype=torch.float64, requires_grad=True)
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


@times
def test_a_head_s_life(times):
    run_state_machine_as_test(Life, settings=settings(max_examples=10 * times, stateful_step_count=12))
