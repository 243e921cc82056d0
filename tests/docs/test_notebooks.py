"""The notebooks run from top to bottom, and what they contain and the site shows is their output."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from docs.notebooks import to_markdown

ROOT = Path(__file__).parents[2]
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))}
NEEDED = {
    "frozen_features": ("matplotlib", "wordllama"),
    "protonet": ("matplotlib", "PIL"),
    "your_own_data": ("matplotlib", "PIL", "safetensors"),
}
"""The optional packages that each notebook imports."""
# There is no network: a connection would fail at once.
OFFLINE = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}


def cells(name: str) -> list[dict[str, Any]]:
    found = json.loads(NOTEBOOKS[name].read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


def printed(name: str) -> str:
    outputs = [output for cell in cells(name) for output in cell["outputs"]]
    return "\n".join("".join(output.get("text", "")) for output in outputs)


def shape(text: str) -> list[str]:
    """The words of an output, without its numbers, which differ between machines."""
    return re.findall(r"[A-Za-z]{3,}", text)


def accuracies(text: str, name: str) -> list[float]:
    """The first two percentages in the row of that name."""
    (row,) = (line for line in text.splitlines() if line.startswith(f"{name}  "))
    return [float(value) for value in re.findall(r"(\d+\.\d)%", row)[:2]]


def run(name: str, folder: Path) -> str:
    """Execute the cells of a notebook in a new process, as one script; return what they print."""
    for package in NEEDED[name]:
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    script = folder / f"{name}.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in cells(name)), encoding="utf-8")
    settings = {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    environment = os.environ | settings | OFFLINE
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=280, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_notebooks_are_tested() -> None:
    assert NOTEBOOKS.keys() == NEEDED.keys()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_cells_run_in_order_and_print_what_is_committed(name: str, tmp_path: Path) -> None:
    now = run(name, tmp_path)
    assert shape(now)[:5] == shape(printed(name))[:5]
    if name == "protonet":
        for text in (now, printed(name)):
            prototypes, svm = (accuracies(text, head) for head in ("prototypes", "SVM"))
            assert all(ours >= theirs - 1 for ours, theirs in zip(svm, prototypes, strict=True))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_are_complete_and_contain_no_error_and_no_path(name: str) -> None:
    numbers = [cell["execution_count"] for cell in cells(name)]
    assert numbers == list(range(1, len(numbers) + 1))  # all were executed, once and in order
    outputs = [output for cell in cells(name) for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not re.search(r"(?:^|[\s'\"(])(?:/[a-z]+/|[A-Z]:\\)", printed(name))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_page_shows_every_cell_and_output(name: str) -> None:
    text = NOTEBOOKS[name].read_text(encoding="utf-8")
    page = to_markdown(text, f"notebooks/{name}.ipynb")
    assert page.startswith("# ")
    assert all("".join(cell["source"]) in page for cell in cells(name))
    assert page.count("<img ") == text.count('"image/png"')
    assert all(line in page for line in printed(name).splitlines())
    assert "colab" not in page.partition("\n## ")[0].partition("```")[0]


def test_the_page_links_to_colab_where_the_repository_is_known() -> None:
    text = NOTEBOOKS["protonet"].read_text(encoding="utf-8")
    page = to_markdown(text, "notebooks/protonet.ipynb", "https://github.com/someone/somewhere/")
    address = "https://colab.research.google.com/github/someone/somewhere/blob/main/docs/notebooks/protonet.ipynb"
    assert f"[Open in Colab]({address})" in page
