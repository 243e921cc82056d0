"""Scripts that train, evaluate and measure. "Benchmarks" in CONTRIBUTING.md lists them with their results.

- `train.py` meta-trains a backbone through a head. `recipes.py` has the options of all committed training runs.
- `table1.py` to `table4.py`, `figure2.py`, `figure3.py`, `omniglot.py`, `fast.py`: tables and figures.
- `solvers.py`, `overhead.py`, `many_classes.py`, `warm_start.py`, `core_speed.py`: speed. `heads.py`,
  `head_settings.py`: accuracy. `float32.py`: accuracy and speed in float32.
- `honesty/`: reliability on hard tasks. `gpu/`: everything that needs a GPU. `quickstart.py`: `make quickstart`.
- `experiment.py`, `report.py`, `tables.py`: the shared code for command lines, result files and tables.
- `options.py`, `loop.py`, `processes.py`, `data/`: the parts of a training run.

The scripts need the extra `bench`; importing this package needs only the core of convexheads.
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
        "jsonargparse",
        "matplotlib",
        "numpy",
        "pandas",
        "PIL",
        "rich",
        "safetensors",
        "scipy",
        "tqdm",
        "yaml",
    )
    if "benchmarks.quickstart" not in sys.orig_argv:  # its extra, `quickstart`, has nothing else
        require_modules("sklearn")
