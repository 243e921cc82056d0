"""What a pip command installs, and what pyproject.toml says that it should."""

from __future__ import annotations

import shlex
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements_of(extra: str) -> set[Requirement]:
    return {Requirement(text) for text in project()["optional-dependencies"][extra]}


def parsed(message: str) -> tuple[list[str], list[str]]:
    """The options and the requirements of the pip command that a message ends with."""
    _, command, words = message.rpartition("pip install ")
    assert command, message
    options = [word for word in shlex.split(words) if word.startswith("-")]
    return options, [word for word in shlex.split(words) if not word.startswith("-")]


def installs(message: str) -> set[Requirement]:
    """What the command at the end of a message installs, in any folder and from any index."""
    return set(map(Requirement, parsed(message)[1]))
