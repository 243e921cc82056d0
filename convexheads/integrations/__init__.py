"""Adapters to other libraries; each is imported by its name and needs its library installed."""

from __future__ import annotations

from importlib import util
from importlib.metadata import PackageNotFoundError, version

from convexheads.errors import MissingDependencyError


def require_version(
    module: str, package: str, min_version: str, max_version: str, *, extra: str, needed_by: str
) -> None:
    """Raise an error unless a supported version of a package is installed.

    Args:
        module: Name by which the package is imported.
        package: Name by which the package is installed.
        min_version: Oldest supported version.
        max_version: First version that is not supported any more.
        extra: The extra of convexheads that the package belongs to.
        needed_by: The module that needs the package, for the message.

    Raises:
        MissingDependencyError: The package is missing, or of another version.
    """
    try:
        found = version(package) if util.find_spec(module) else None
    except PackageNotFoundError:
        found = None
    if found is None:
        raise MissingDependencyError(package, extra, needed_by)
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError as error:
        raise MissingDependencyError("packaging", extra, needed_by) from error
    supported = f">={min_version},<{max_version}"
    if not SpecifierSet(supported).contains(found, prereleases=True):
        raise MissingDependencyError(f"{package}{supported}, not {found}", extra, needed_by)
