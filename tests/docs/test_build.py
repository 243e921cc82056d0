"""The hooks of the documentation's build: blocks are executed when something changed that they depend on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import copy

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGE = """# Page

```python exec="on" session="one"
import json
from pathlib import Path
from convexheads import FACTOR

with Path("log").open("a") as file:
    file.write("first ")
number = json.loads(Path("benchmarks/results/numbers.json").read_text())
```

```python exec="on" session="one"
with Path("log").open("a") as file:
    file.write("second ")
print(f"result {FACTOR * number}.")
```
"""
CONFIGURATION = """
site_name: test
plugins: [markdown-exec]
markdown_extensions: [pymdownx.superfences]
hooks: [docs/hooks.py]
exclude_docs: "*.py"
"""


class Project:
    """A documentation of one page, with a package and a committed result that the page's blocks use."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("mkdocs.yml", CONFIGURATION)
        self.write("docs/index.md", PAGE)
        self.write("convexheads/__init__.py", "FACTOR = 2")
        self.write("benchmarks/results/numbers.json", "21")
        for name in ("hooks.py", "blocks.py", "notebooks.py"):
            copy(DOCS / name, root / "docs")

    def write(self, name: str, text: str) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(text)

    def build(self) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
        environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
        return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=self.root, env=environment)

    def result(self) -> tuple[str, str]:
        """The text on the built page, and which blocks have been executed so far."""
        done = self.build()
        assert done.returncode == 0, done.stderr
        html = (self.root / "site" / "index.html").read_text()
        return html.partition("result ")[2].partition(".")[0], (self.root / "log").read_text()

    def cached(self) -> set[str]:
        return {path.name for path in (self.root / ".cache" / "docs").iterdir()}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_nothing_is_executed_again_when_nothing_changed(project: Project) -> None:
    assert project.result() == ("42", "first second ")
    project.write("docs/index.md", PAGE + "\nMore text, and no other code.")
    assert project.result() == ("42", "first second ")


@pytest.mark.parametrize(
    ("change", "result"),
    [
        (lambda project: project.write("docs/index.md", PAGE.replace("result {", "result 1{")), "142"),
        (lambda project: project.write("docs/index.md", PAGE.replace("number = ", "number = 10 * ")), "420"),
        (lambda project: project.write("convexheads/__init__.py", "FACTOR = 100"), "2100"),
        (lambda project: project.write("benchmarks/results/numbers.json", "5"), "10"),
        (lambda project: project.write("docs/figures.py", ""), "42"),
    ],
    ids=["code", "an earlier block", "package", "data", "figures"],
)
def test_what_depends_on_a_change_is_executed_again(
    project: Project, change: Callable[[Project], None], result: str
) -> None:
    project.result()
    before = project.cached()
    change(project)
    assert project.result() == (result, "first second first second ")
    assert len(project.cached()) == 2
    assert not project.cached() >= before  # what is stale is gone


def test_a_block_that_fails_stops_each_build(project: Project) -> None:
    project.write("docs/index.md", PAGE.replace("print(", "print(1 / 0, "))
    for _ in range(2):
        done = project.build()
        assert done.returncode != 0
        assert "A block of index.md failed." in done.stderr
        assert "ZeroDivisionError" in done.stderr
        assert 'print(1 / 0, f"result' in done.stderr
    project.write("docs/index.md", PAGE)
    assert project.result()[0] == "42"
