"""The paper's experiments: `python -m benchmarks.train` meta-trains a backbone through a head and evaluates it.

They need the extra `bench`; importing this package itself needs the core of convexheads only.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

from convexheads.errors import MissingDependencyError


def require_modules(*modules: str) -> None:
    """Look for modules without importing them.

    Args:
        modules: top-level modules of the extra `bench`.

    Raises:
        MissingDependencyError: one of them is not installed.
    """
    for module in modules:
        if find_spec(module) is None:
            raise MissingDependencyError(module, "bench", "benchmarks")


if sys.argv[0] == "-m":  # Python is looking for a command, `python -m benchmarks.NAME`
    require_modules(
        "jsonargparse", "matplotlib", "numpy", "pandas", "PIL", "rich", "safetensors", "scipy", "tqdm", "yaml"
    )
