"""What all tests share: one thread, one seed, Hypothesis profiles, and annotated shapes, which are checked."""

from __future__ import annotations

import os

# Before torch is imported, here and in every process that a test starts: small factorizations on several threads wait
# for each other. A test about threads asks for them by itself.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1"

import random
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

# Tests are rewritten for pytest's explanations of failed assertions; these modules hold assertions too.
pytest.register_assert_rewrite("solver_contract", "tasks", "strategies")

# The checks of internal modules double the time of the tests, so they are left to `make test-all` and `make test-core`.
PUBLIC = ["heads", "kernels", "models", "calibration", "episodes", "evaluation", "loader", "training"]
if find_spec("beartype"):
    everywhere = os.environ.get("CONVEXHEADS_CHECK_SHAPES") == "everywhere"
    checked = "convexheads" if everywhere else [f"convexheads.{name}" for name in PUBLIC]
    jaxtyping.install_import_hook(checked, "beartype.beartype")

# `ci` draws the same examples on every machine, `nightly` draws new ones, and more (see `examples` in tasks.py). None of
# them limits the time of an example: compiling a reference takes seconds. `brief` does not look for the smallest example
# that fails (see mutations.py).
settings.register_profile(
    "ci", deadline=None, derandomize=True, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("nightly", settings.get_profile("ci"), derandomize=False)
settings.register_profile("brief", settings.get_profile("ci"), phases=[Phase.explicit, Phase.generate])
settings.load_profile("ci")


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


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")
