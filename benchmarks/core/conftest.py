"""Lets `bench_core.py` measure two versions of the package in one process, in turn."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--base`."""
    parser.addoption(
        "--base", help="folder that holds another version of the package, under the name `base_convexheads`"
    )


@pytest.fixture(scope="session")
def base(request: pytest.FixtureRequest) -> ModuleType | None:
    """The other version; None where there is none."""
    folder = request.config.getoption("--base")
    if folder is None:
        return None
    sys.path.append(folder)
    return importlib.import_module("base_convexheads")
