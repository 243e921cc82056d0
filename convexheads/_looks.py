"""When values of tensors are looked at: at once on a CPU and, on a GPU, together at the end of a call.

A look at a value waits until a GPU has done all work before it. During a call of a method with `look_once`, checks
therefore note a flag each, and all flags are read at once when the result is ready.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial, wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

_C = TypeVar("_C", bound=Callable[..., Any])
_T = TypeVar("_T")


class _Look(NamedTuple):
    """A check that is not done yet: `report` raises an error or warns if the flag is set."""

    flag: Tensor
    report: Callable[[], object]


class _RepeatError(Exception):
    """An assumption was wrong, and the call has to be repeated without any."""


_pending: ContextVar[list[_Look] | None] = ContextVar("pending", default=None)
"""The checks to do at the end of the call; None to do each at once."""
_is_inside: ContextVar[bool] = ContextVar("is_inside", default=False)
"""Whether a call that looks once is in progress."""


is_inside_call: Callable[[], bool] = _is_inside.get


def look_once(method: _C) -> _C:
    """Decorate a method such that its checks, and those of what it calls, are done together at the end, on a GPU."""

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or _is_inside.get():
            return method(*args, **kwargs)
        token = _is_inside.set(True)
        try:
            return _call_and_look(method, *args, **kwargs)
        except _RepeatError:
            return method(*args, **kwargs)
        finally:
            _is_inside.reset(token)

    return call  # pyright: ignore[reportReturnType]


def check(flag: Tensor, report: Callable[[], object]) -> None:
    """Call `report`, now or at the end of the call, if a `flag` `()` is True, or is a number that is not finite."""
    looks = _pending.get()
    if looks is not None and _waits(flag):
        looks.append(_Look(flag, report))
    elif _is_set(flag.item(), flag.dtype):
        report()


def refuse(wrong: Tensor, error: Callable[[], Exception]) -> None:
    """Raise the `error`, now or at the end of the call, if an entry of `wrong` is True."""

    def report() -> None:
        raise error()

    check(wrong.any(), report)


def assume_not(flag: Tensor) -> bool:
    """Whether the caller may go on as if a `flag` `()` were False. If it is not, the whole call is repeated.

    Where this returns False, the caller has to read the flag.
    """
    looks = _pending.get()
    if looks is None or not _waits(flag):
        return False
    looks.append(_Look(flag, _repeat))
    return True


def can_look(flag: Tensor) -> bool:
    """Whether a flag can be looked at at once: it is not in a graph, and looking at it waits for no other work."""
    return not (torch.compiler.is_compiling() or _waits(flag))


def call_explained(function: Callable[[], _T], kind: type[Exception], explain: Callable[[], object]) -> _T:
    """Call a function, and `explain` if it raises an error of this kind, also in a check that is done later.

    `explain` may raise an error that says more.
    """
    looks = _pending.get()
    begin = 0 if looks is None else len(looks)
    try:
        result = function()
    except kind:
        explain()
        raise
    if looks:
        for number, look in enumerate(looks[begin:], begin):
            looks[number] = look._replace(report=partial(call_explained, look.report, kind, explain))
    return result


def _call_and_look(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    token = _pending.set(looks := [])
    try:
        try:
            result = method(*args, **kwargs)
        finally:
            _pending.reset(token)
    except Exception:
        _report(looks)  # an earlier check may say what is wrong
        raise
    _report(looks)
    return result


def _repeat() -> None:
    raise _RepeatError


def _report(looks: list[_Look]) -> None:
    """Read all flags at once, and report those that are set, in the order of the checks."""
    if not looks:
        return
    for value, (flag, report) in zip(_read([look.flag.detach() for look in looks]), looks, strict=True):
        if _is_set(value, flag.dtype):
            report()


def _read(flags: list[Tensor]) -> list[float]:
    """The values of all flags, by a single copy from their device."""
    dtype = torch.float32 if flags[0].device.type == "mps" else torch.float64
    return torch.stack([flag.to(dtype) for flag in flags]).tolist()


def _is_set(value: float, dtype: torch.dtype) -> bool:
    return bool(value) if dtype == torch.bool else not math.isfinite(value)


def _waits(flag: Tensor) -> bool:
    """Whether reading the flag waits for other work."""
    return not flag.is_cpu
