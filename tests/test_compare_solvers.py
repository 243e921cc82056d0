"""The benchmark that times the solvers."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import solvers


def test_times_and_errors_of_every_contender(tmp_path: Path):
    rows = solvers.measure(sizes=["5w1s"], tasks=2, features=12, queries=2, repeats=2, threads=1)
    assert list(rows["contender"]) == list(solvers.contenders())
    assert (rows["forward"] > 0).all()
    assert (rows["both"] > rows["forward"]).all()
    assert (rows["repeats"] == 2).all()
    errors = rows.set_index("contender")["gradient_error"]
    assert errors[["native", "native in torch"]].max() < 1e-8
    assert errors[["qpth", "cvxpylayers"]].max() < 1e-2
    assert errors[["ridge", "learn2learn"]].isna().all()
    assert solvers.show(rows, "title").row_count == len(rows)
    solvers.draw(rows, "title", tmp_path / "solvers.png")
    assert (tmp_path / "solvers.png").stat().st_size > 10_000


def test_large_problems_leave_out_what_would_take_minutes():
    slow = {name for name, each in solvers.contenders().items() if each.largest < 2000}
    assert slow == {"qpth", "cvxpylayers", "learn2learn"}


def test_unknown_size(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["solvers", "--sizes", "[3w3s]"])
    with pytest.raises(SystemExit, match="error: sizes: got 3w3s, wanted some of 5w1s"):
        solvers.main()
