"""The core stands alone: no optional package is imported, and none that is missing breaks anything else."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path

import pytest
from installing import ROOT, installs, parsed, project, requirements_of

import convexheads

OPTIONAL = (
    "qpth", "cvxpy", "cvxpylayers", "moreau", "learn2learn", "pytorch_lightning", "torchmetrics", "torchvision", "sklearn",
    "matplotlib", "pandas", "numba", "tqdm", "rich", "safetensors", "scipy", "yaml",
)  # fmt: skip
SOURCES = sorted(Path(convexheads.__file__).parent.rglob("*.py"))
NAMED = {
    extra
    for text in (path.read_text(encoding="utf-8") for path in SOURCES)
    for pattern in (r'MissingDependencyError\(\s*"[^"]+",\s*"([^"]+)"', r'extra="([\w-]+)"')
    for extra in re.findall(pattern, text)
} | {"qpth", "cvxpylayers", "moreau"}
"""Extras that messages name; those of solvers are named as their packages."""


def run(script: str, *options: str) -> str:
    """Run a script in a new interpreter; returns what it prints."""
    command = [sys.executable, "-W", "error", "-W", "ignore:Failed to initialize NumPy", *options]
    command += ["-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_no_optional_package():
    # torch itself may load some of them; the import of convexheads must not add any.
    script = f"""
        import sys, torch, jaxtyping
        before = set(sys.modules)
        import convexheads
        print(sorted({set(OPTIONAL)!r} & (set(sys.modules) - before)))
    """
    assert run(script).strip() == "[]"


def test_everything_else_works_without_optional_packages():
    script = f"""
        import sys
        class Missing:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in {OPTIONAL!r}:
                    raise ModuleNotFoundError(name)
        import torch
        sys.meta_path.insert(0, Missing())
        from importlib import util
        found = util.find_spec
        util.find_spec = lambda name, package=None: None if name in {OPTIONAL!r} else found(name, package)
        import convexheads as ch
        support, labels, query = torch.randn(2, 10, 8), torch.arange(10).expand(2, 10) % 5, torch.randn(2, 3, 8)
        for head in (ch.SVMHead(C=0.1), ch.RidgeHead(), ch.PrototypeHead()):
            assert head(support, labels, query).shape == (2, 3, 5)
        print(ch.evaluate(ch.SVMHead(), torch.randn(200, 8), torch.arange(200) % 10, episodes=20))
        for name in ("qpth", "cvxpylayers", "moreau"):
            try:
                ch.SVMHead(solver=name)
            except ch.MissingDependencyError as error:
                print(error)
        try:
            import convexheads.integrations.lightning
        except ch.MissingDependencyError as error:
            print(error)
        try:
            ch.load_pretrained("conv4-cifar-fs-svm")
        except ch.MissingDependencyError as error:
            print(error)
    """
    lines = run(script).splitlines()
    assert lines[0].endswith("(20 episodes)")
    extras = ("qpth", "cvxpylayers", "moreau", "lightning", "pretrained")
    assert list(map(installs, lines[1:])) == list(map(requirements_of, extras))


def test_messages_name_every_library_extra():
    for_a_checkout = {"bench", "docs", "dev"}
    assert set(project()["optional-dependencies"]) - for_a_checkout >= NAMED > {"lightning", "pretrained", "text"}


@pytest.mark.parametrize("extra", sorted(NAMED))
def test_the_command_of_a_message_installs_the_extra(extra: str):
    assert installs(str(convexheads.MissingDependencyError("a package", extra, "a head"))) == requirements_of(extra)


def test_the_command_of_learn2learn_has_the_documented_options():
    options, _ = parsed(str(convexheads.MissingDependencyError("learn2learn", "learn2learn", "it")))
    documented = re.findall(
        r"`(pip install [^`]*learn2learn[^`]*)`", (ROOT / "docs" / "installation.md").read_text("utf-8")
    )
    assert documented
    assert options
    for line in documented:
        assert parsed(line) == (options, ["learn2learn", ".[learn2learn]"])


def test_the_command_names_the_package_where_convexheads_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> list[str]:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("convexheads.errors.requires", missing)
    for package in ("easyfsl", "easyfsl>=1.5,<2 (version 1.2.0 is installed)"):
        _, requirements = parsed(str(convexheads.MissingDependencyError(package, "easyfsl", "it")))
        assert requirements == ["easyfsl"]


def test_adapters_import_without_their_packages():
    assert (
        run("from convexheads.solvers import QpthSolver, CvxpylayersSolver; print(QpthSolver.__name__)")
        == "QpthSolver\n"
    )


@pytest.mark.parametrize("name", ["learn2learn", "easyfsl", "sklearn", "lightning"])
def test_an_adapter_names_its_extra_where_nothing_is_installed(name: str):
    script = f"""
        import sys, convexheads
        hidden = ("numpy", "packaging", "learn2learn", "easyfsl", "sklearn", "pytorch_lightning")
        sys.modules.update(dict.fromkeys(hidden))  # None: an import of it fails
        try:
            import convexheads.integrations.{name}
        except convexheads.MissingDependencyError as error:
            print(error)
    """
    assert installs(run(script)) == requirements_of(name)


def test_a_loader_of_episodes_says_that_it_needs_numpy():
    script = """
        import sys, torch, convexheads
        sys.modules["numpy"] = None  # an import of it fails
        try:
            convexheads.EpisodeLoader(torch.zeros(60, 2), torch.arange(60) % 6, shots=1, queries=1)
        except convexheads.MissingDependencyError as error:
            print(error)
    """
    assert parsed(run(script)) == ([], ["numpy"])


def test_importing_benchmarks_imports_nothing_else():
    script = """
        import sys, convexheads
        before = set(sys.modules)
        import benchmarks
        print(set(sys.modules) - before)
    """
    assert run(script).strip() == "{'benchmarks'}"


needs_bench = pytest.mark.skipif(
    not all(map(find_spec, ("jsonargparse", "mpmath", "PIL", "pandas", "pebble", "rich", "yaml"))),
    reason="needs the packages of the extra bench",
)
MODULES = """
import pkgutil, sys
from importlib import import_module
import benchmarks
modules = [found.name for found in pkgutil.walk_packages(benchmarks.__path__, "benchmarks.")]
for name in modules:
    import_module(name)
"""


@needs_bench
@pytest.mark.slow
def test_no_module_of_benchmarks_imports_what_it_only_compares_with():
    peers = {"cvxpy", "cvxpylayers", "easyfsl", "gym", "gym_notices", "learn2learn", "moreau", "qpth", "wordllama"}
    others = {"pytorch_lightning", "torchmetrics", "torchvision"}  # which trainings do without
    assert run(f"{MODULES}\nprint({peers | others} & set(sys.modules))", "-W", "default").strip() == "set()"


@needs_bench
@pytest.mark.slow
def test_commands_of_benchmarks_say_which_package_is_missing():
    """Each package that their modules import is hidden in turn; `python -m` has "-m" as the first argument meanwhile."""
    script = """
        foreign = {
            (getattr(value, "__module__", None) or value.__name__).partition(".")[0]
            for name in modules
            for value in vars(sys.modules[name]).values()
            if hasattr(value, "__module__") or hasattr(value, "__name__")
        } - sys.stdlib_module_names - {"benchmarks", "convexheads", "torch", "jaxtyping"}
        assert {"PIL", "jsonargparse", "mpmath", "pandas", "pebble", "rich", "tqdm", "yaml"} <= foreign, foreign
        sys.argv = ["-m"]
        for package in sorted(foreign):
            for name in [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]:
                del sys.modules[name]
            hidden = {name: sys.modules[name] for name in sys.modules if name.partition(".")[0] == package}
            sys.modules.update(dict.fromkeys(hidden))  # None: an import of it fails
            refused = set()
            for name in modules:
                try:
                    import_module(name)
                except MissingDependencyError as error:
                    refused.add(str(error))
            sys.modules.update(hidden)
            print(*refused, sep="\\n")
            assert len(refused) == 1, (package, refused)
    """
    preamble = f"{MODULES}\nfrom convexheads import MissingDependencyError\n"
    lines = run(preamble + textwrap.dedent(script), "-W", "default").splitlines()
    assert len(lines) >= 10
    for line in lines:
        assert parsed(line) == ([], [".[bench]"])
