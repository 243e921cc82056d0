"""The library's own errors: every message names the argument, what came and what was wanted."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires
from operator import index
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from convexheads.solvers.problem import Solution


class ConvexHeadsError(Exception):
    """Base of every error that convexheads raises on purpose.

    Raised as such where none of the others fits: for the probabilities of a regression head, and for a second
    derivative through a solver that has only the first.
    """


class InputError(ConvexHeadsError, ValueError):
    """An argument is unusable; a `ValueError` too. The message names it, what came and what was wanted.

    Args:
        argument: its name.
        got: what came, as the message is to show it.
        wanted: what would do.

    Attributes:
        argument: its name.
    """

    def __init__(self, argument: str, got: Any, wanted: str) -> None:
        self.argument = argument
        super().__init__(f"{argument}: got {got}, wanted {wanted}")


def described(value: object) -> str:
    """The `value` as an error shows it: as Python writes it, with the type where that is not Python's own."""
    kind = type(value)
    plain = kind.__module__ == "builtins" or kind.__name__ in repr(value)
    return repr(value) if plain else f"{value!r} ({kind.__module__}.{kind.__name__})"


def is_count(value: object) -> TypeGuard[int]:
    """Whether the `value` is an integer of at least 1, and not True."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_counts(**counts: object) -> None:
    """Raise `InputError` unless each is an integer of at least 1.

    Args:
        counts: by the name that the error is to show.

    Raises:
        InputError: one is no integer, is a bool, or is below 1.
    """
    for name, count in counts.items():
        if not is_count(count):
            raise InputError(name, described(count), "an integer of at least 1")


def check_seed(seed: object) -> None:
    """Raise `InputError` unless it is a seed of PyTorch's and NumPy's generators.

    Args:
        seed: anything.

    Raises:
        InputError: it is no integer, is a bool, is negative, or has more than 63 bits.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise InputError("seed", described(seed), "an integer from 0 to 2**63 - 1")


def check_rank(rank: object, world_size: object) -> None:
    """Raise `InputError` unless a process with this rank exists.

    Args:
        rank: Rank of the process.
        world_size: Number of processes.

    Raises:
        InputError: `world_size` is no positive integer, or `rank` is no integer from 0 to `world_size - 1`.
    """
    check_counts(world_size=world_size)
    if as_integer(rank) not in range(size := as_integer(world_size) or 0):
        raise InputError("rank", described(rank), f"an integer from 0 to world_size - 1 = {size - 1}")


def as_integer(value: Any) -> int | None:
    """Convert an integer of any kind, such as NumPy's, to one of Python.

    Args:
        value: The value to convert.

    Returns:
        The integer, or None if the value is a boolean or no integer.
    """
    try:
        return None if isinstance(value, bool) else index(value)
    except (TypeError, RuntimeError):  # a RuntimeError of tensors without values
        return None


def check_flag(name: str, value: object) -> None:
    """Raise `InputError` unless it is True or False.

    Args:
        name: of the argument, for the error.
        value: anything.

    Raises:
        InputError: it is neither.
    """
    if not isinstance(value, bool):
        raise InputError(name, described(value), "True or False")


class SolverError(ConvexHeadsError, RuntimeError):
    """At least one task of a batch could not be solved to the tolerance asked for; a `RuntimeError` too.

    Args:
        message: which tasks, and how far they came.
        solution: as below; None by default.

    Attributes:
        solution: the whole batch's `Solution`, with its per-task status, so that the tasks that succeeded are not lost.
            None where a closed form failed.
    """

    def __init__(self, message: str, solution: Solution | None = None) -> None:
        self.solution = solution
        super().__init__(message)


class MissingDependencyError(ConvexHeadsError, ImportError):
    """An optional package is needed and not installed, or not in a supported version; an `ImportError` too.

    The message ends with the pip command that installs what is needed. The command names the packages themselves,
    so it works whether convexheads was installed from a checkout or from a package index.

    Args:
        package: its name.
        extra: the extra of convexheads that the package belongs to; the command installs all requirements of the extra.
        needed_by: what needs it.
    """

    def __init__(self, package: str, extra: str, needed_by: str) -> None:
        super().__init__(f"{needed_by} needs the package {package!r}: {_install_command(package, extra)}")


def _install_command(package: str, extra: str) -> str:
    """The pip command that installs an extra; quoted so that shells of every system take it."""
    if extra == "bench":  # the benchmarks are part of a checkout only
        return 'pip install ".[bench]"'
    # learn2learn 0.2.0 ships C files that do not compile on Python 3.11; with this option it builds from its sources.
    options = ["--use-pep517", "--config-settings=--build-option=build_ext"] if extra == "learn2learn" else []
    requirements = _requirements(extra) or re.findall(r"^[\w.-]+", package)
    return " ".join(["pip install", *options, *(f'"{requirement}"' for requirement in requirements)])


def _requirements(extra: str) -> list[str]:
    """The requirements of an extra, from the metadata of the installed package; none where it is not installed."""
    try:
        pairs = [requirement.partition(";") for requirement in requires("convexheads") or ()]
    except PackageNotFoundError:
        return []
    marker = re.compile(rf"extra\s*==\s*['\"]{re.escape(extra)}['\"]")
    return [requirement.strip() for requirement, _, condition in pairs if marker.search(condition)]


class SolverWarning(UserWarning):
    """What `on_failure="warn"` emits where "raise" would raise `SolverError`; a `UserWarning`."""
