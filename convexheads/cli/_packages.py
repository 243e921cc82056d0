"""How models of other packages are loaded: each error is one of ours, and says what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from convexheads.errors import ConvexHeadsError, InputError, MissingDependencyError


@contextmanager
def loading(features: str, *, package: str, extra: str) -> Iterator[None]:
    """Turn errors of a `package` that loads these features into `MissingDependencyError` or `InputError`."""
    try:
        yield
    except ConvexHeadsError:
        raise
    except ImportError as error:
        raise MissingDependencyError(package, extra, f"FolderClassifier(features={features!r})") from error
    except Exception as error:  # an unknown name, no network, a damaged file: each package has its own errors
        raise InputError("features", f"a model that {package} can load", f"{features!r} ({error})") from error
