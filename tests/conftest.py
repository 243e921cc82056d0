"""What all tests share. Shapes in the package's annotations are executed: see `addopts` in pyproject.toml."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, settings

# The same examples on every machine, and no limit on the time of one: compiling a reference takes seconds.
settings.register_profile(
    "convexheads", deadline=None, derandomize=True, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("convexheads")


@pytest.fixture(autouse=True)
def _one_thread_one_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)  # of learn2learn's draws
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Shape checks off, so that wrong input reaches the library's own errors, as it does for users."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real images."""
    root = os.environ.get("CONVEXHEADS_DATA")
    if not root:
        pytest.skip("real images: set CONVEXHEADS_DATA to the folder that holds cifar100/cifar100.zip")
    return Path(root)


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")
