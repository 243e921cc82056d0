"""The documentation says what is true: its code runs, and its table is the tests' own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
from tasks import PRECISION

from docs.figures import speed_table

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Also inside of tabs, where it is indented; what the build of the site executes is left to it.
_BLOCK = re.compile(r"^( *)```python(?![^\n]*exec=)[^\n]*\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


def _blocks(page: Path) -> list[str]:
    return [dedent(code) for _, code in _BLOCK.findall(page.read_text())]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if _blocks(page)], ids=lambda path: str(path.relative_to(ROOT))
)
def test_python_blocks_run(page):
    """All blocks of a page in one interpreter, in order."""
    script = "\n".join(_blocks(page))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "processes"), [("plain_pytorch", 1), ("plain_pytorch", 2), ("learn2learn_protonet", 1)]
)
def test_examples_run(name, processes):
    script = str(ROOT / "docs" / "examples" / f"{name}.py")
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    accuracy = float(done.stdout.partition("unseen digits: ")[2].split()[0])
    assert 60 < accuracy < 100  # chance is 33


def test_there_are_pages_with_code():
    assert {"README.md", "training.md", "extending.md", "svm.md"} <= {path.name for path in PAGES if _blocks(path)}


def test_table_in_the_readme_is_that_of_the_results():
    assert speed_table() in (ROOT / "README.md").read_text()


def test_precision_table_is_the_one_that_the_tests_use():
    text = (ROOT / "docs" / "solvers.md").read_text().partition("<!-- precision table")[2]
    rows = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")
    ]
    stated = {name: tuple(map(float, numbers)) for name, *numbers in rows if name in PRECISION}
    assert stated == {name: tuple(values) for name, values in PRECISION.items() if name != "native"}
