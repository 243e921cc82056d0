"""The script that breaks the library on purpose, on a library of two lines."""

from __future__ import annotations

from pathlib import Path

import mutations
import pytest
from mutations import MUTATIONS, Mutation, run, unusable
from tasks import ROOT

FILES = {
    "pyproject.toml": "[tool.pytest.ini_options]\npythonpath = ['.']\n",
    "convexheads/__init__.py": "",
    "convexheads/sums.py": "def add(a, b):\n    return a + b\n\n\ndef double(a):\n    return 2 * a  # twice\n",
    "tests/conftest.py": "from hypothesis import settings\nsettings.register_profile('brief', settings())\n",
    "tests/unit/test_add.py": "from convexheads.sums import add\n\n\ndef test_add():\n    assert add(2, 3) == 5\n",
    "tests/unit/test_double.py": "from convexheads.sums import double\n\n\ndef test_double():\n    assert double(2) == 4\n",
}
NOTICED = Mutation("sign", "sums.py", "a + b", "a - b", "test_add.py")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_the_list_fits_the_code() -> None:
    assert unusable(MUTATIONS, ROOT) == []
    assert len(MUTATIONS) >= 15
    places = (
        "solvers/",
        "solvers/certificate",
        "solvers/implicit",
        "solvers/native/numba",
        "heads/",
        "loader",
        "_storage",
    )
    assert all(any(mutation.file.startswith(place) for mutation in MUTATIONS) for place in places)


@pytest.mark.slow
def test_every_mutation_is_noticed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the tests that are named, or by others; and the code itself stays as it is."""
    others = Mutation("factor", "sums.py", "return 2 * a", "return 3 * a", "test_add.py")
    syntax = Mutation("syntax", "sums.py", "return 2 * a", "return 2 * (a", "test_double.py")
    assert run([NOTICED, others, syntax], root, jobs=2)
    lines = capsys.readouterr().out.splitlines()
    tests = ["tests/unit/test_add.py::test_add", "tests/unit/test_double.py::test_double", "tests/unit/test_double.py"]
    assert [line.split()[-1] for line in lines] == tests
    assert {name: (root / name).read_text() for name in FILES} == FILES


@pytest.mark.slow
def test_a_survivor_is_an_error(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    comment = Mutation("comment", "sums.py", "# twice", "# thrice", "test_double.py")
    assert not run([NOTICED, comment], root, jobs=1)
    assert "comment" in capsys.readouterr().out.splitlines()[-1]


def test_a_test_that_fails_anyway_notices_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "tests" / "unit" / "test_add.py").write_text("def test_add():\n    raise AssertionError\n")
    assert not run([NOTICED], root, jobs=1)
    assert "tests/unit/test_add.py::test_add" in capsys.readouterr().out.splitlines()[-1]


def test_what_was_compiled_before_does_not_hide_a_mutation(root: Path) -> None:
    """Even though Python compares no more than the size of a file and the second in which it was written."""
    cache = root / "convexheads" / "__pycache__"
    cache.mkdir()
    (cache / "sums.stale.pyc").touch()
    (cache / "others.pyc").touch()
    with mutations.copied(root, NOTICED) as copy:
        assert [path.name for path in (copy / "convexheads" / "__pycache__").iterdir()] == ["others.pyc"]
        assert "a - b" in (copy / "convexheads" / "sums.py").read_text()


@pytest.mark.parametrize(
    "changes",
    [
        {"code": "a * b"},
        {"code": "def"},
        {"code": "a + b\n", "mistake": "b\n"},
        {"mistake": "a + b"},
        {"noticed_by": "test_gone.py"},
    ],
)
def test_the_list_can_not_rot(root: Path, changes: dict[str, str]) -> None:
    assert unusable([NOTICED], root) == []
    assert unusable([NOTICED, NOTICED], root)
    assert len(unusable([NOTICED._replace(**changes)], root)) == 1


def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    monkeypatch.setattr(mutations, "run", lambda chosen, root, jobs: seen.append([each.name for each in chosen]))
    assert mutations.main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert all(mutation.name in shown and mutation.mistake in shown for mutation in MUTATIONS)
    name = MUTATIONS[3].name
    assert mutations.main([name]) == 1  # as `run` returned nothing
    assert seen == [[name]]
    with pytest.raises(SystemExit):
        mutations.main(["no-such-mutation"])
