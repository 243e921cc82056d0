"""What all tests share. Shapes in the package's annotations are executed: see `addopts` in pyproject.toml."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator
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


class PartialModule(pytest.Module):
    """A file of tests that is passed over where a package that it imports is not installed."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        try:
            return super().collect()
        except self.CollectError as error:
            _skip_if_missing(error.__cause__)
            raise


def _skip_if_missing(error: BaseException | None) -> None:
    """`MissingDependencyError` has the package's extra; a broken import, or one of the library's own, fails."""
    foreign = isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith(
        ("convexheads", "benchmarks")
    )
    if foreign or type(error).__name__ == "MissingDependencyError":
        pytest.skip(str(error), allow_module_level=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--without-extras", action="store_true", help="skip what needs a package that is not installed")


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return PartialModule.from_parent(parent, path=module_path) if parent.config.getoption("--without-extras") else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    try:
        return (yield)
    except ImportError as error:
        if item.config.getoption("--without-extras"):
            _skip_if_missing(error)
        raise


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


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation, built in strict mode, which executes its pages."""
    folder = tmp_path_factory.mktemp("documentation") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")
