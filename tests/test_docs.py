"""The documentation says what is true: its code runs, and its table is the tests' own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tasks import PRECISION

ROOT = Path(__file__).parent.parent
PAGES = [
    path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if "```python\n" in path.read_text()
]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_python_blocks_run(page):
    """All blocks of a page in one interpreter, in order."""
    blocks = [block.partition("```")[0] for block in page.read_text().split("```python\n")[1:]]
    script = "\n".join(blocks)
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
    assert {"README.md", "training.md", "extending.md", "solvers.md"} <= {path.name for path in PAGES}


def test_precision_table_is_the_one_that_the_tests_use():
    text = (ROOT / "docs" / "solvers.md").read_text().partition("<!-- precision table")[2]
    rows = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")
    ]
    stated = {name: tuple(map(float, numbers)) for name, *numbers in rows if name in PRECISION}
    assert stated == {name: tuple(values) for name, values in PRECISION.items() if name != "native"}


def test_every_public_name_has_a_docstring_and_a_page():
    import convexheads

    pages = "\n".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    for name in convexheads.__all__:
        public = getattr(convexheads, name)
        if isinstance(public, type):
            assert public.__doc__, name
            assert name in pages or public.__module__ in pages, name
