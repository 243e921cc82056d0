"""The built documentation, for the tests marked `site`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def site() -> Path:
    """The documentation, built as by `make docs`: from the cache, where it is up to date."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr
    return root / "site"
