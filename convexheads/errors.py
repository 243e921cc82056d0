"""The exceptions of convexheads, and the warning for tasks that could not be solved."""

from __future__ import annotations

import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convexheads.solvers.problem import Solution


class ConvexHeadsError(Exception):
    """Base class of all convexheads exceptions.

    It is raised directly if no subclass fits, as for a second derivative of a solver that supports only the first.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies are made from the message and the attributes, because constructors of subclasses have other arguments.
        return type(self).__new__, (type(self), *self.args), vars(self)


class InputError(ConvexHeadsError, ValueError):
    """An argument is unusable (also a `ValueError`). The message names it, the expected value and the received value.

    Args:
        argument: the name of the argument, which is also an attribute of the error.
        expected: the expected value, in words.
        got: the received value, as the message shows it.
    """

    def __init__(self, argument: str, expected: str, got: Any) -> None:
        self.argument = argument
        super().__init__(f"{argument}: expected {expected}, got {got}")


class SolverError(ConvexHeadsError, RuntimeError):
    """At least one task of a batch could not be solved to the tolerance (also a `RuntimeError`).

    Args:
        message: the failed tasks, with their gap and residual.
        solution: the `Solution` of the whole batch, with the status of each task, so that the tasks that succeeded are
            not lost; also an attribute of the error. Defaults to None, for a closed form or a `CvxpyHead` that failed.
    """

    def __init__(self, message: str, solution: Solution | None = None) -> None:
        self.solution = solution
        super().__init__(message)


class MissingDependencyError(ConvexHeadsError, ImportError):
    """An optional package is not installed, or the installed version is unsupported (also an `ImportError`).

    Args:
        package: the name of the package.
        extra: the extra of convexheads that the package belongs to, or "". The message says how to install the extra.
        needed_by: the class or function that needs it.
    """

    def __init__(self, package: str, extra: str, needed_by: str) -> None:
        super().__init__(f"{needed_by} needs the package {package!r}: {_install_command(package, extra)}")


def _install_command(package: str, extra: str) -> str:
    """The pip command that installs an extra, quoted for the shells of every system."""
    if extra == "bench":  # only a checkout contains the benchmarks
        return 'pip install ".[bench]"'
    # learn2learn 0.2.0 ships C files that do not compile on Python 3.11; with this option it builds from its sources.
    options = ["--use-pep517", "--config-settings=--build-option=build_ext"] if extra == "learn2learn" else []
    requirements: list[str] = []
    with suppress(PackageNotFoundError):  # for convexheads itself, when it is on the path but not installed
        pattern = re.compile(rf"([^;]+?)\s*;.*extra\s*==\s*['\"]{extra}['\"]")
        requirements = [match[1] for line in requires("convexheads") or () if (match := pattern.match(line))]
    quoted = (f'"{requirement}"' for requirement in requirements or re.findall(r"^[\w.-]+", package))
    return " ".join(["pip install", *options, *quoted])


class SolverWarning(UserWarning):
    """At least one task of a batch could not be solved to the tolerance, and `on_failure` is "warn"."""
