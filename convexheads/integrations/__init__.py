"""Adapters to other libraries; each is imported by name and needs its library installed."""

from __future__ import annotations

import re
from importlib import util
from importlib.metadata import PackageNotFoundError, version

from convexheads.errors import MissingDependencyError


def require(module: str, package: str, least: str, below: str, *, extra: str, needed_by: str) -> None:
    """Raise `MissingDependencyError` unless a version of a package is installed from `least` on and before `below`."""
    try:
        found = version(package) if util.find_spec(module) else None
    except PackageNotFoundError:
        found = None
    if found is None:
        raise MissingDependencyError(package, extra, needed_by)
    if not _numbers(least) <= _numbers(found) < _numbers(below):
        raise MissingDependencyError(f"{package}>={least},<{below}, not {found}", extra, needed_by)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.match(r"[\d.]*", text).group().split(".") if number)  # pyright: ignore[reportOptionalMemberAccess]
