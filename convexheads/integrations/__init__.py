"""Adapters to other libraries; each is imported by its name and needs its library installed."""

from __future__ import annotations

import re
from importlib import util
from importlib.metadata import PackageNotFoundError, version

from convexheads.errors import MissingDependencyError


def require_version(module: str, requirement: str, *, extra: str, needed_by: str = "") -> None:
    """Raise `MissingDependencyError` unless a supported version of a package is installed.

    Args:
        module: Name by which the package is imported.
        requirement: Name by which the package is installed, with its supported versions: "scikit-learn>=1.6,<2".
        extra: The extra of convexheads that the package belongs to.
        needed_by: The object that needs the package, for the message; by default the adapter named after the extra.
    """
    needed_by = needed_by or f"convexheads.integrations.{extra}"
    package = re.split("[<>=]", requirement)[0]
    try:
        found = version(package) if util.find_spec(module) else None
    except PackageNotFoundError:
        found = None
    if found is None:
        raise MissingDependencyError(package, extra, needed_by)
    try:
        from packaging.requirements import Requirement
    except ImportError as error:
        raise MissingDependencyError("packaging", extra, needed_by) from error
    if not Requirement(requirement).specifier.contains(found, prereleases=True):
        raise MissingDependencyError(f"{requirement}, not {found}", extra, needed_by)
