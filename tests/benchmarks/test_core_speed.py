"""The benchmark that compares the speed of two versions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import core_speed
from benchmarks.core_speed import Change, Ratios, changes

SIZES = ("5w1s", "5w5s", "20w5s")
NAMES = {f"{head}-{size}-{way}" for head in ("ridge", "svm") for size in SIZES for way in ("forward", "backward")}


def noisy(ratio: float, spread: float, seed: int, count: int = 5) -> list[float]:
    return (ratio * np.exp(spread * np.random.default_rng(seed).standard_normal(count))).tolist()


def verdicts(found: list[Change], threshold: float = 3.0) -> dict[str, str]:
    return {each.name: each.verdict(threshold) for each in found if each.name != "all"}


FACTORS = {"slow": 1.1, "fast": 0.9, "same": 1.01, "wild": 1.05}
SPREADS = {"slow": 1e-3, "fast": 1e-3, "same": 1e-3, "wild": 0.2}


@pytest.mark.parametrize("with_reference", [True, False])
def test_a_change_is_told_from_noise(with_reference: bool) -> None:
    before: Ratios | None = None
    if with_reference:
        before = {name: noisy(2.0, spread, seed) for seed, (name, spread) in enumerate(SPREADS.items())}
    unit = 2.0 if with_reference else 1.0
    now = {name: noisy(unit * factor, SPREADS[name], 20 + seed) for seed, (name, factor) in enumerate(FACTORS.items())}
    found = changes(now, before)
    assert verdicts(found) == {"slow": "slower", "fast": "faster", "same": "not slower", "wild": "unclear"}
    for each in found[:3]:
        assert abs(each.percent - 100 * (FACTORS[each.name] - 1)) <= 2 * each.noise < 1
    assert verdicts(found[:3], threshold=12) == dict.fromkeys(("slow", "fast", "same"), "not slower")
    faster = Change("a", percent=-2.5, noise=4.0)  # may be so by chance, but a slowdown is excluded
    assert [faster.verdict(threshold) for threshold in (1, 3)] == ["unclear", "not slower"]


@pytest.mark.parametrize("with_reference", [True, False])
def test_noise_is_a_95_percent_interval(with_reference: bool) -> None:
    """Of measurements without a change, one in twenty is further from zero than its noise."""
    outside = 0
    for seed in range(400):
        before = {"a": noisy(1, 0.02, 2 * seed)} if with_reference else None
        found = changes({"a": noisy(1, 0.02, 2 * seed + 1)}, before)[0]
        outside += abs(found.percent) > found.noise
    assert 8 <= outside <= 32


def test_all_together_is_the_geometric_mean() -> None:
    before = {"a": [1.0, 1.01, 0.99], "b": [2.0, 2.02, 1.98]}
    now = {"a": [2 * value for value in before["a"]], "b": [value / 2 for value in before["b"]]}
    assert [each.name for each in changes(now, before)] == ["a", "b", "all"]
    assert changes(now, before)[-1].percent == pytest.approx(0, abs=1e-9)
    assert changes({"a": [2.0, 2.1], "b": [2.0, 2.1]})[-1].percent == pytest.approx(105, abs=1)


@pytest.fixture(autouse=True)
def outside_of_xdist(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest-benchmark times nothing in a process that looks like one of xdist's workers."""
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        monkeypatch.delenv(name)


@pytest.mark.slow
def test_measures_every_benchmark() -> None:
    """In another process, with as few rounds as there can be."""
    found = core_speed.measure(0)
    assert set(found) == NAMES
    for values in found.values():
        assert min(values.values()) > 0
    assert set(json.loads(core_speed.REFERENCE.read_text())["ratios"]) == NAMES


@pytest.mark.slow
def test_ratio_is_that_of_this_version_to_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that the heads advance: by a second; the SVM of this version, but not of the other, by two."""
    clock = "import time\ntime.now = 0.0\ndef tick(seconds=1e-9):\n    time.now += seconds\n    return time.now\n"
    (tmp_path / "sitecustomize.py").write_text(f"{clock}time.process_time = time.tick = tick\n")
    for name, seconds in (("convexheads", 2), ("base_convexheads", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(
            "import time\n"
            "class RidgeHead:\n"
            "    seconds = 1\n"
            "    def __call__(self, support, labels, query, ways):\n"
            "        time.tick(self.seconds)\n"
            "        return support.sum()\n"
            "class SVMHead(RidgeHead):\n"
            f"    seconds = {seconds}\n"
            "    def __init__(self, C):\n"
            "        pass\n"
        )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(core_speed, "ROOT", tmp_path)
    found = core_speed.measure(0, tmp_path)
    for size in SIZES:
        assert found[f"svm-{size}-forward"] == pytest.approx({"ratio": 2, "own": 2, "other": 1})
        assert found[f"ridge-{size}-forward"] == pytest.approx({"ratio": 1, "own": 1, "other": 1})


@pytest.mark.slow
def test_failed_benchmarks_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_speed, "ROOT", tmp_path)
    (tmp_path / "convexheads").mkdir()
    (tmp_path / "convexheads" / "__init__.py").write_text("raise RuntimeError('unusable version')\n")
    with pytest.raises(SystemExit, match="unusable version"):
        core_speed.measure(0)


def test_the_other_version_never_uses_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its modules import each other, even where they do so on use only."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for file in (core_speed.ROOT / "convexheads").rglob("*.py"):
        copy = tmp_path / file.relative_to(core_speed.ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    for command in (["init"], ["add", "convexheads"], ["commit", "--message", "one"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    monkeypatch.setattr(core_speed, "ROOT", tmp_path)
    with core_speed.other_version("HEAD") as folder:
        code = (
            f"import sys\nsys.modules['convexheads'] = None\nsys.path.insert(0, {str(folder)!r})\n"
            "import torch, base_convexheads as ch\n"
            "support, labels = torch.randn(6, 9, requires_grad=True), torch.arange(6) % 2\n"
            "for head in (ch.RidgeHead(), ch.SVMHead(0.1)):\n"
            "    head(support, labels, torch.randn(3, 9)).sum().backward()\n"
        )
        environment = os.environ | {"NUMBA_DISABLE_JIT": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert not folder.exists()
    with pytest.raises(SystemExit, match="no-such-revision"), core_speed.other_version("no-such-revision"):
        pass


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Save a reference, compare with it, and fail where the speed got worse."""
    speed, jitter = {"svm": 1.0}, iter(range(1000))

    def measure(seconds: float, base: Path | None = None) -> dict[str, dict[str, float]]:
        return {"svm": {"ratio": speed["svm"] * (1 + 1e-4 * next(jitter)), "own": 2e-3, "other": 1e-3}}

    monkeypatch.setattr(core_speed, "REFERENCE", tmp_path / "reference.json")
    monkeypatch.setattr(core_speed, "measure", measure)
    core_speed.main(["--save"])
    core_speed.main(["--fail-above", "3"])
    assert "│ not slower │" in capsys.readouterr().out
    speed["svm"] = 1.1
    core_speed.main([])
    assert "│ slower │" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        core_speed.main(["--fail-above", "3"])
    assert stopped.value.code == 1
    core_speed.main(["--against", "HEAD"])
    assert "│ slower │" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"repeats: expected at least 2.*, got 1"):
        core_speed.main(["--repeats", "1"])
    stored = json.loads((tmp_path / "reference.json").read_text())
    stored["origin"]["torch"] = "1.0"
    (tmp_path / "reference.json").write_text(json.dumps(stored))
    core_speed.main([])
    assert "different torch: 1.0" in capsys.readouterr().out
    stored["origin"]["benchmark"] = "0"
    (tmp_path / "reference.json").write_text(json.dumps(stored))
    with pytest.raises(SystemExit, match="--save"):
        core_speed.main([])
