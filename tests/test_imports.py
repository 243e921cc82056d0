"""The core stands alone: no optional package is imported, and none that is missing breaks anything else."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from importlib.metadata import metadata
from pathlib import Path

import convexheads

OPTIONAL = (
    "qpth", "cvxpy", "cvxpylayers", "moreau", "learn2learn", "pytorch_lightning", "torchmetrics", "torchvision", "sklearn",
    "matplotlib", "pandas", "numba", "tqdm", "rich", "safetensors", "scipy", "yaml",
)  # fmt: skip


def run(script: str) -> str:
    """Run a script in a new interpreter; returns what it prints."""
    command = [sys.executable, "-W", "error", "-W", "ignore:Failed to initialize NumPy", "-c", textwrap.dedent(script)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


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
    assert [line.rpartition("pip install ")[2] for line in lines[1:]] == [
        "'convexheads[qpth]'",
        "'convexheads[cvxpylayers]'",
        "'convexheads[moreau]'",
        "'convexheads[lightning]'",
        "'convexheads[pretrained]'",
    ]


def test_the_extras_that_messages_name_exist():
    source = Path(convexheads.__file__).parent
    text = "".join(path.read_text() for path in source.rglob("*.py"))
    named = set(re.findall(r'MissingDependencyError\(\s*"[^"]+",\s*"([^"]+)"', text)) | set(
        re.findall(r'extra="(\w+)"', text)
    )
    assert {"lightning", "pretrained", "text"} <= named
    assert named <= set(metadata("convexheads").get_all("Provides-Extra"))


def test_adapters_import_without_their_packages():
    assert run("from convexheads import QpthSolver, CvxpylayersSolver; print(QpthSolver.__name__)") == "QpthSolver\n"
