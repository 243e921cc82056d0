"""Adapters to other libraries; each is imported by its name and needs its library installed."""

from __future__ import annotations

from importlib import util
from importlib.metadata import PackageNotFoundError, version

from convexheads.errors import MissingDependencyError


def require_version(module: str, requirement: str, *, extra: str, needed_by: str = "") -> None:
    """Raise `MissingDependencyError` unless a supported version of the package of a `module` is installed.

    The `requirement` is the name by which pip installs it, with the supported versions: "scikit-learn>=1.6,<2". The
    object that the message names, `needed_by`, defaults to the adapter with the name of the `extra`.
    """
    needed_by = needed_by or f"convexheads.integrations.{extra}"
    try:
        from packaging.requirements import Requirement
    except ImportError as error:
        raise MissingDependencyError("packaging", extra, needed_by) from error
    supported = Requirement(requirement)
    try:
        installed = version(supported.name) if util.find_spec(module) else None
    except PackageNotFoundError:
        installed = None
    if installed is None:
        raise MissingDependencyError(supported.name, extra, needed_by)
    if not supported.specifier.contains(installed, prereleases=True):
        raise MissingDependencyError(f"{requirement} (version {installed} is installed)", extra, needed_by)
