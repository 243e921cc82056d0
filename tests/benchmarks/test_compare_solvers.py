"""The benchmark that times the solvers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pandas
import pytest
import torch

from benchmarks import float32, load, many_classes, overhead, report, solvers, warm_start
from convexheads import RidgeHead, SVMHead
from convexheads.solvers import base

SMALL: dict[str, Any] = {"device": "cpu", "features": 12, "queries": 2, "repeats": 2, "threads": 1}


def test_times_errors_and_memory_of_every_contender(tmp_path: Path):
    names = list(solvers.contenders())
    rows = solvers.measure(sizes=["5w1s"], tasks=[2], precisions=["float64"], names=names, **SMALL)
    assert list(rows["contender"]) == names
    assert (rows["forward"] > 0).all()
    assert (rows["both"] > rows["forward"]).all()
    assert (rows["repeats"] == 2).all()
    assert (rows["memory"].dropna() >= 0).all()
    errors = rows.set_index("contender")["gradient_error"]
    assert errors[["native", "native in torch"]].max() < 1e-8
    assert errors.filter(["qpth", "cvxpylayers", "interior point"]).max() < 1e-2
    assert errors.filter(["ridge", "learn2learn", "published code"]).isna().all()
    assert solvers.show(rows, "title").row_count == len(rows)
    solvers.draw(rows, "title", tmp_path / "solvers.png")
    assert (tmp_path / "solvers.png").stat().st_size > 10_000


def test_the_published_way_of_calling_qpth_solves_the_smoothed_svm():
    support, labels, query = solvers.episode(3, 4, 2, 12, 2)
    logits = solvers.as_published(support, labels, query, 4)
    expected = SVMHead(solvers.C, smoothing=1.0)(support, labels, query)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-3, atol=1e-5)


def test_every_combination():
    rows = solvers.measure(
        sizes=["5w1s"], tasks=[1, 3], precisions=["float64", "float32"], names=["ridge", "native"], **SMALL
    )
    assert len(rows) == 8
    errors = rows[rows["contender"] == "native"].groupby("precision")["gradient_error"].max()
    assert errors["float64"] < 1e-8 < errors["float32"] < 1e-4


def test_no_gradient_error_where_the_peer_has_no_exact_gradient(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(solvers, "_OWN_GRADIENTS", 0)
    rows = solvers.measure(sizes=["5w1s"], tasks=[2], precisions=["float64"], names=["native"], **SMALL)
    assert rows["gradient_error"].isna().all()
    assert rows["logits_error"].max() < 1e-8


def test_growth_is_the_exponent_of_a_power_law():
    nk = [10, 100, 1000]
    rows = [{"contender": "a", "nk": n, "both": n**1.5, "memory": 2.0**23 * n**2} for n in nk]
    rows += [{"contender": "b", "nk": n, "both": 1.0, "memory": None} for n in nk]
    rows += [{"contender": "c", "nk": n, "both": 1.0, "memory": 1.0} for n in nk[:2]]
    found = solvers.growth(pandas.DataFrame(rows)).set_index("contender")
    assert found.loc["a"].tolist() == pytest.approx([1.5, 2.0])
    assert found.loc["b", "time"] == pytest.approx(0)
    assert pandas.isna(found.loc["b", "memory"])
    assert list(found.index) == ["a", "b"]


def test_memory_is_seen():
    def run():
        torch.ones(64 * 2**20, dtype=torch.uint8)  # and touched

    torch.ones(30 * 2**20, dtype=torch.uint8)  # from here on glibc takes less than this from its heap
    freed = [torch.ones(16 * 2**20, dtype=torch.uint8) for _ in range(8)]  # which C's library keeps for reuse
    top = torch.ones(2**18, dtype=torch.uint8)
    del freed
    found = solvers.peak_memory(run, "cpu")
    assert found is None or 60 * 2**20 < found < 90 * 2**20
    del top


def test_large_problems_leave_out_what_would_take_minutes():
    slow = {name for name, each in solvers.contenders().items() if each.largest < 2000}
    assert slow == {"cvxpylayers", "learn2learn"} - {*solvers.missing()}


def test_unknown_size(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["solvers", "--sizes", "[3w3s]"])
    with pytest.raises(SystemExit, match=r"error: sizes: expected some of 5w1s.*, got 3w3s"):
        solvers.main()


def test_contenders_whose_package_is_missing_are_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Without Moreau, which is the reference too, there are no errors."""
    found = base.find_spec
    monkeypatch.setattr(base, "find_spec", lambda name: None if name in ("qpth", "moreau") else found(name))
    assert {"qpth", "moreau"} <= {*solvers.missing()}
    command = ["solvers", "--sizes", "[5w1s]", "--tasks", "[1]", "--features", "8", "--queries", "2", "--repeats", "1"]
    command += ["--threads", "1", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*command, "--names", "[ridge,qpth,native]"])
    solvers.main()
    said = capsys.readouterr().err
    assert f"qpth {report.LEFT_OUT}" in said
    assert "pip install" in said
    assert f"moreau {report.LEFT_OUT}" not in said  # it was not asked for
    record = json.loads((tmp_path / "solvers.json").read_text())
    assert record["settings"]["names"] == ["ridge", "native"]
    assert [row["contender"] for row in record["results"]] == ["ridge", "native"]
    assert all(row["both"] > 0 and row["logits_error"] is None for row in record["results"])
    monkeypatch.setattr("sys.argv", [*command, "--names", "[qpth,moreau]"])
    with pytest.raises(SystemExit, match="error: names"):
        solvers.main()


def test_a_contender_without_enough_memory_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def exhaust(support: torch.Tensor, *_: object) -> torch.Tensor:
        if len(support) > 1:
            raise torch.OutOfMemoryError
        return support

    made = solvers.contenders()
    fail = solvers.Contender(exhaust, exact=False)
    monkeypatch.setattr(solvers, "contenders", lambda: {"ridge": made["ridge"], "large": fail})
    settings: dict[str, Any] = {"precisions": ["float64"], "device": "cpu", "features": 4, "queries": 1}
    rows = solvers.measure(sizes=["5w1s"], tasks=[2], names=["ridge", "large"], repeats=1, threads=1, **settings)
    assert list(rows["contender"]) == ["ridge"]
    assert f"large {report.LEFT_OUT}" in capsys.readouterr().err


def test_without_any_result_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def exhaust(support: torch.Tensor, *_: object) -> torch.Tensor:
        if len(support) > 1:
            raise torch.OutOfMemoryError
        return support

    monkeypatch.setattr(solvers, "contenders", lambda: {"ridge": solvers.Contender(exhaust, exact=False)})
    names = ["--names", f"[ridge,{solvers.ON_GPU}]", "--sizes", "[5w1s]", "--tasks", "[2]", "--repeats", "1"]
    monkeypatch.setattr("sys.argv", ["solvers", *names, "--output", str(tmp_path / "out")])
    monkeypatch.setattr(solvers, "missing", lambda: {solvers.ON_GPU: ""})
    with pytest.raises(SystemExit, match="contender"):
        solvers.main()
    assert f"{solvers.ON_GPU} {report.LEFT_OUT}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_many_classes():
    found = many_classes.measure(ways=12, shots=2, tasks=2, features=40, repeats=2, interior_point=True)
    assert found["gap"] < 1e-9
    assert 0 < found["forward"] < found["both"]
    assert found["interior point"] > 0


def test_overhead_of_a_head_in_training_and_in_evaluation():
    steps = overhead.training(backbone="conv4", device="cpu", episodes=1, queries=1, repeats=2)
    assert set(steps) == {*overhead.HEADS, "svm / prototypes", "svm / ridge"}
    assert min(steps.values()) > 0
    sizes = {"episodes": 20, "evaluations": 1, "queries": 2, "features": 8}
    evaluations = overhead.evaluation(device="cpu", threads=2, **sizes)
    assert set(evaluations) == {*overhead.HEADS, "logistic", overhead.SCIKIT_LEARN}
    assert all(min(seconds) > 0 for seconds in evaluations.values())
    table = report.markdown(overhead.show(steps, evaluations, [1, 2], "title")).splitlines()[2:]
    assert len(table) == len(overhead.HEADS) + 2
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[3:-1]] for line in table}
    assert [len(seconds) for seconds in evaluations.values()] == [2, 2, 2, 2, 1]
    assert cells[overhead.SCIKIT_LEARN][0] == ""  # it has no line for one thread
    assert cells["ridge"] == [f"{seconds:.1f}" for seconds in evaluations["ridge"]]


def test_what_a_call_costs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "compile", lambda head, **_: head)  # tests check shapes, which compilers cannot trace
    monkeypatch.setattr(overhead, "CALLED", {"ridge": RidgeHead})
    monkeypatch.setattr(overhead, "BLOCK", 1)
    found = overhead.calls(device="cpu", tasks=2, queries=1, features=3, repeats=1)
    assert list(found) == ["ridge, forward", "ridge, forward and backward"]
    for seconds in found.values():
        assert list(seconds) == list(overhead.VARIANTS[:4])
        assert min(seconds.values()) > 0
    times = {"ridge, forward": {"as it is": 0.001, "captured": 0.00025}, "SVM, forward": {"as it is": 0.002}}
    lines = report.markdown(overhead.show_calls(times, "title")).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert cells == [["ridge, forward", "1.00", "0.25"], ["SVM, forward", "2.00", ""]]


@pytest.mark.parametrize("name", overhead.BY_HAND)
def test_what_is_written_by_hand_is_the_same(name: str):
    support, labels, query = torch.randn(2, 10, 8), torch.arange(5).repeat(2, 2), torch.randn(2, 7, 8)
    expected = overhead.CALLED[name]()(support, labels, query)
    torch.testing.assert_close(overhead.BY_HAND[name](support, labels, query, ways=5), expected)


def test_calls_that_fail_are_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def compiled(head: Any, **_: Any) -> Any:
        return MagicMock(side_effect=RuntimeError("no compiler"))

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(overhead, "CALLED", {"ridge": RidgeHead})
    found = overhead.calls(device="cpu", tasks=2, queries=1, features=3, repeats=1)
    assert {name for seconds in found.values() for name in seconds} == set(overhead.VARIANTS[:2]) | {"by hand"}
    assert f"ridge, forward, compiled, {report.LEFT_OUT} RuntimeError: no compiler" in capsys.readouterr().err
    monkeypatch.setattr(overhead, "BY_HAND", {})
    monkeypatch.setattr(overhead, "CALLED", {"ridge": lambda **_: MagicMock(side_effect=RuntimeError("no head"))})
    assert overhead.calls(device="cpu", tasks=2, queries=1, features=3, repeats=1) == {}


@pytest.mark.parametrize("parts", [["calls"], ["training"], ["evaluation"], ["training", "evaluation", "loops"]])
def test_parts_of_the_costs(parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    times = {"prototypes": 0.1, "ridge": 0.2, "svm": 0.3, "svm / prototypes": 3.0, "svm / ridge": 1.5}
    made = {
        "training": times,
        "evaluation": {"prototypes": [1.0], "logistic": [2.0]},
        "calls": {"ridge, forward": {"as it is": 0.001}},
        "loops": dict.fromkeys((overhead.ALONE, overhead.NEW_BATCH, overhead.PLAIN), 0.01),
    }
    for name, result in made.items():
        monkeypatch.setattr(overhead, name, lambda result=result, **_: result)
    command = ["overhead", "--parts", f"[{','.join(parts)}]", "--threads", "1", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", command)
    overhead.main()
    record = json.loads((tmp_path / "overhead.json").read_text())
    assert {name: record[name] for name in made if name in record} == {name: made[name] for name in parts}
    monkeypatch.setattr(overhead, parts[0], lambda **_: {})
    with pytest.raises(SystemExit, match="error"):
        overhead.main()
    text = (tmp_path / "overhead.md").read_text()
    for name, heading in (("training", "training step, ms"), ("evaluation", "1 thread, s"), ("loops", "ms per step")):
        assert (heading in text) == (name in parts)


LOOPS: dict[str, Any] = {"device": "cpu", "tasks": 2, "queries": 1, "steps": 3}


@pytest.mark.filterwarnings("ignore:.* have no `val_dataloader`")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
def test_the_step_alone_and_in_each_loop():
    seconds = overhead.loops(**LOOPS, repeats=1)
    assert list(seconds) == [overhead.ALONE, overhead.NEW_BATCH, overhead.PLAIN, overhead.LIGHTNING]
    assert min(seconds.values()) > 0


def test_without_lightning_there_is_no_line_for_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(overhead, "find_spec", lambda _: None)
    assert list(overhead.loops(**LOOPS, repeats=1)) == [overhead.ALONE, overhead.NEW_BATCH, overhead.PLAIN]


def test_what_a_loop_adds_is_told_beside_the_step_alone_and_a_new_batch():
    seconds = {overhead.ALONE: 0.01, overhead.NEW_BATCH: 0.012, overhead.PLAIN: 0.0125, overhead.LIGHTNING: 0.02}
    lines = report.markdown(overhead.show_loops(seconds, "title")).splitlines()[2:]
    assert [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines] == [
        ["10.00", "", ""],
        ["12.00", "2.00", ""],
        ["12.50", "2.50", "0.50"],
        ["20.00", "10.00", "8.00"],
    ]


@pytest.mark.filterwarnings("ignore:.* have no `val_dataloader`")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
def test_every_loop_takes_the_same_steps():
    """Each from the same weights, on the same batches."""
    plain, other, lightning = (overhead.one_layer_training(**LOOPS) for _ in range(3))
    begin = [value.clone() for value in plain.parameters.values()]
    overhead.in_the_plain_loop(plain, 3)
    overhead.with_a_new_batch(other, 3)
    overhead.in_lightning(lightning, 2)  # after a first one
    assert plain.step == 3
    for old, own, same, close in zip(
        begin, *(each.parameters.values() for each in (plain, other, lightning)), strict=True
    ):
        assert not torch.equal(own, old)
        assert torch.equal(own, same)
        torch.testing.assert_close(own - old, close - old, rtol=1e-3, atol=1e-7)  # whose optimizer isn't fused


def test_what_takes_very_long_runs_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(solvers, "_VERY_SLOW", 0.0)
    rows = solvers.measure(sizes=["5w1s"], tasks=[1], precisions=["float64"], names=["native"], **SMALL)
    assert rows["repeats"].item() == 1
    assert pandas.isna(rows["memory"].item())
    assert rows["gradient_error"].item() < 1e-8


def test_starts_change_no_result():
    found = warm_start.measure(tasks=2, points=3, repeats=1, seed=0, sizes=["5-way 5-shot"])
    assert len(found) == 2 * len(warm_start.SOLVERS)
    assert all(each[kind]["certified"] == 1 for each in found for kind in ("cold", "warm"))
    assert all(each["warm"]["iterations"] <= each["cold"]["iterations"] + 1 for each in found)
    assert warm_start.show(found).row_count == len(warm_start.SOLVERS)


def test_load_is_carried_without_failures():
    found = load.measure(tasks=8 * 2000, at_once=2000)
    assert [(row["head"], row["through"]) for row in found] == [(head, how) for how in load.WAYS for head in load.HEADS]
    assert all(row["tasks"] == 2000 and not row["failed"] and row["repeated"] for row in found)
    assert load.show(found).row_count == len(found)


def test_float32_is_close_to_float64():
    found = float32.measure(tasks=2, repeats=1, seed=0, device="cpu", sizes=["5-way 1-shot"])
    assert [each["head"] for each in found] == list(float32.HEADS)
    assert max(each["logits"] for each in found) < 1e-3
    assert max(each["gradient"] for each in found) < 1e-2
    assert min(each["logits"] for each in found) > 1e-9  # float32 was used
    assert {each["certified"] for each in found} == {1.0}
    assert float32.show(found).row_count == len(float32.HEADS)
