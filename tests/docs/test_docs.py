"""The documentation says what is true: its code runs, and its tables are those of the results and of the tests."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from types import ModuleType

import pandas
import pytest
import torch
from tasks import PRECISION

from docs.figures import RESULTS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Blocks inside tabs are indented. The build of the site executes those with exec= itself.
_BLOCK = re.compile(r"^( *)```python(?![^\n]*exec=)[^\n]*\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


def _blocks(page: Path) -> Iterator[tuple[int, str]]:
    """The line at which each block's code begins, and the code."""
    text = page.read_text(encoding="utf-8")
    for found in _BLOCK.finditer(text):
        yield text.count("\n", 0, found.start(2)) + 1, dedent(found[2])


WITH_CODE = [page for page in PAGES if any(_blocks(page))]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """An empty module to execute a page in. Global settings that a page changes are restored."""
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dtype = torch.get_default_dtype()
    yield module
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(True)


@pytest.mark.filterwarnings("ignore:::pytorch_lightning")  # its advice on trainers, such as to have more workers
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_blocks_run(page: Path, module: ModuleType) -> None:
    """All blocks of a page, in order; a traceback shows the line of the page."""
    if page.name == "export.md":  # compilers cannot trace the checks of annotations, which these tests install
        code = "\n".join(code for _, code in _blocks(page))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return
    for line, code in _blocks(page):
        exec(compile("\n" * (line - 1) + code, page, "exec", dont_inherit=True), vars(module))


@pytest.mark.parametrize(
    ("name", "processes"),
    [("plain_pytorch", 1), ("plain_pytorch", 2), ("learn2learn_protonet", 1)],
)
@pytest.mark.slow
def test_examples_run(name: str, processes: int) -> None:
    script = str(ROOT / "docs" / "examples" / f"{name}.py")
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    accuracies = [float(text) for text in re.findall(r": (\d+\.\d+)", done.stdout)]  # chance is 33
    assert 60 < min(accuracies) < max(accuracies) < 100
    if name == "learn2learn_protonet":  # prototypes first, then the SVM
        assert accuracies[1] > accuracies[0]


def test_there_are_pages_with_code() -> None:
    assert {"README.md", "training.md", "extending.md", "svm.md"} <= {path.name for path in WITH_CODE}


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 110
    assert len(text.split()) <= 500


def test_figures_of_the_readme_are_those_of_the_results() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    rows = pandas.read_csv(RESULTS / "swap" / "laptop" / "swap.csv")
    means = rows[(rows["data"] == "cifar-fs") & (rows["optimizer"] == "Adam")].groupby("head").mean(numeric_only=True)
    for head in ("SVM", "prototypes", "prototypes, scaled"):
        one, five = (means.loc[head, f"test, itself, {shots}-shot"] for shots in (1, 5))
        assert f"{one:.1f} / {five:.1f}%" in text
    times = json.loads((RESULTS / "solvers" / "cpu" / "solvers.json").read_text())["results"]
    at = {row["contender"]: row["both"] for row in times if row["size"] == "5w5s"}
    assert f"{at['published code'] / at['native']:.0f} times" in text
    assert f"{at['native'] / at['ridge']:.1f} times" in text
    probes = pandas.read_csv(RESULTS / "probe" / "cpu" / "probe.csv")
    seconds = probes.set_index(["data", "shots", "protocol", "method"])["seconds"].unstack()
    ratios = (seconds["LogisticRegression(tol=1e-12)"] / seconds["tune"]).dropna()
    assert f"{ratios.min():.0f} to {ratios.max():.0f} times" in text


def test_precision_table_is_the_one_that_the_tests_use() -> None:
    text = (ROOT / "docs" / "solvers.md").read_text(encoding="utf-8").partition("<!-- precision table")[2]
    rows = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")
    ]
    stated = {name: tuple(map(float, numbers)) for name, *numbers in rows if name in PRECISION}
    assert stated == {name: tuple(values) for name, values in PRECISION.items() if name != "native"}
