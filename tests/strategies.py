"""Strategies for fuzzing: usable calls of heads, and arguments of any kind."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

import convexheads as ch


def quietly(call: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ch.SolverWarning)
        return call()


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns; None where it raises an error of the library."""
    try:
        return quietly(call)
    except ch.ConvexHeadsError:
        return None


FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64]


OTHERS = [torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn]


FILLS = [0.0, 1.0, -1.0, 1e-30, 1e30, 1e300, math.nan, math.inf, -math.inf]


HUGE = [2**31, 2**40, 2**62]


NO_TENSORS = [
    *(None, True, False, 0, 1, 2, -1, 3, 10**400, 0.0, -0.0, 0.5, 2.5, -0.5, 5e-324, 1e-320, 1e-50, 1e50, 1e308),
    *(math.nan, math.inf, -math.inf, 1j, "", "text", "native", "raise", "paper", "svm", b"raw", "\0", "x" * 300),
    *(
        [],
        [0.5],
        (),
        (0, 1),
        {},
        {1},
        range(3),
        object(),
        slice(None),
        ch.solvers.Status.FAILED,
        SimpleNamespace(),
        Path("x"),
    ),
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
    st.builds(ch.kernels.Linear, normalize=st.booleans()),
    st.builds(ch.kernels.Cosine),
    st.builds(ch.kernels.RBF, st.none() | hyper),
    st.builds(ch.kernels.Polynomial, st.integers(1, 3), offset=hyper, scale=hyper),
    st.just(lambda x, y: x @ y.mT + 1),
    st.builds(
        lambda factor, constant: factor * ch.kernels.RBF() + ch.kernels.Linear() * ch.kernels.Cosine() + constant,
        hyper,
        hyper,
    ),
)


solvers = st.one_of(
    st.just("native"),
    st.builds(
        ch.solvers.NativeSolver,
        on_failure=st.sampled_from(["raise", "warn", "return"]),
        backend=st.sampled_from(["auto", "torch"]),
    ),
    st.builds(ch.solvers.InteriorPointSolver, max_iterations=st.none() | st.integers(1, 5)),
    st.builds(ch.solvers.InteriorPointSolver, gradient=st.just("relaxed"), complementarity=number),
    st.builds(ch.solvers.InteriorPointSolver, gradient=st.just("last_iterate"), max_iterations=st.integers(1, 5)),
)


own = {"kernel": kernels, "scale": hyper}


SVMS = [ch.SVMHead, ch.WestonWatkinsSVMHead, ch.OneVsRestSVMHead, ch.SimplifiedSVMHead]


svms = [
    st.builds(kind, hyper, squared_hinge=st.booleans(), smoothing=st.just(0.0) | hyper, solver=solvers, **own)
    for kind in SVMS
]


classifiers = st.one_of(
    *svms,
    st.builds(ch.LogisticHead, hyper, steps=st.none() | st.integers(1, 5), **own),
    st.builds(ch.RidgeHead, hyper, **own),
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


def certain(head: ch.ClassificationHead | ch.RegressionHead) -> bool:
    """Whether what the head returns is always the optimum, so that it is finite."""
    solver = getattr(head, "solver", ch.solvers.NativeSolver())
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
    if draw(st.booleans()):
        call["allow_missing_classes"] = True
    if ways != "none":
        call["ways"] = k if ways == "int" else sizes.to(draw(st.sampled_from(INTEGERS)))
    if ways == "int" or not labels.numel():
        return call, k if ways == "int" else 1
    known = labels.masked_fill(~call.get("mask", torch.tensor(True)), 0)
    return call, int(sizes.max() if ways == "tensor" else known.max() + 1)
