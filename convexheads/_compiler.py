"""Which calls `torch.compile` and `torch.export` trace, and what happens to the others."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

from convexheads._looks import is_inside_call
from convexheads.errors import ConvexHeadsError

_C = TypeVar("_C", bound=Callable[..., Any])
is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # since torch 2.7


def traced_if(condition: Callable[..., bool], expected: str) -> Callable[[_C], _C]:
    """Decorate a method that can be traced only if it does not read the values of tensors.

    Where a graph is traced and `condition(self, **keyword_arguments)` is False, the graph ends in front of the call,
    the method runs as it does without a compiler, and another graph begins behind it. A graph for export has to be
    whole, so `torch.export` raises `ConvexHeadsError`, which says what is `expected` of the caller.
    """

    def decorate(method: _C) -> _C:
        @wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            # Where a graph ends, the frames around the method run as usual, and the compiler traces what they call.
            may_trace = torch.compiler.is_compiling() or ("torch._dynamo" in sys.modules and not is_inside_call())
            if not may_trace or condition(self, **kwargs):
                return method(self, *args, **kwargs)
            if is_exporting():
                raise ConvexHeadsError(f"torch.export: expected {expected}, got {self!r}")
            from convexheads._untraced import call_untraced  # loading the compiler takes seconds

            return call_untraced(method, self, *args, **kwargs)

        return call  # pyright: ignore[reportReturnType]

    return decorate


def custom_operator(name: str, schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a function that becomes an operator of the library in graphs, but not a part of CUDA graphs.

    The compiler's CUDA graphs (`mode="reduce-overhead"`) end before it, because it may wait for the GPU.
    """
    unsafe = getattr(torch.Tag, "cudagraph_unsafe", None)  # since torch 2.9
    tags = {} if unsafe is None else {"tags": [unsafe]}
    return torch.library.custom_op(f"convexheads::{name}", mutates_args=(), schema=schema, **tags)


def operator(name: str, schema: str, fake: Callable[..., Any]) -> Callable[[_C], _C]:
    """Decorate a function that compilers cannot trace, such as a loop whose length depends on values.

    Where a graph is traced, it becomes an operator with this `schema`, whose results have the shapes of those of
    `fake`. Elsewhere it is called as it is, because the first call of an operator loads the compiler, which takes a
    second.
    """

    def decorate(function: _C) -> _C:
        in_graph = custom_operator(name, schema)(function)
        in_graph.register_fake(fake)

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return (in_graph if torch.compiler.is_compiling() else function)(*args, **kwargs)

        return call  # pyright: ignore[reportReturnType]

    return decorate
