"""A call that `torch.compile` does not trace. This module loads the compiler, so it is imported only where one runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


_REASON = "a head of convexheads is part of the graph only with validate=False and, for a classifier, ways= as a number"
_has_reason = "reason" in inspect.signature(torch.compiler.disable).parameters  # since torch 2.7
_options: Any = {"reason": _REASON} if _has_reason else {}
call_untraced: Callable[..., Any] = torch.compiler.disable(_call, **_options)
