"""The benchmarks of frozen features: heads on image models, and heads as estimators of scikit-learn."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_iris

from benchmarks import estimators, image_models, probe
from benchmarks.data import ImageSet


def test_every_head_on_every_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of the same class have the same brightness. One model sees it, and the other one does not."""
    labels = torch.arange(60) % 6
    images = ImageSet((40 * labels)[:, None, None, None].expand(-1, 3, 8, 8).to(torch.uint8), labels, tuple("abcdef"))

    def sees(pictures: Any) -> torch.Tensor:
        levels = torch.tensor([picture.getpixel((0, 0))[0] // 40 for picture in pictures])
        return torch.nn.functional.one_hot(levels, 6).float() + 0.1

    models = {"sees": lambda: sees, "blind": lambda: lambda pictures: torch.ones(len(pictures), 3)}
    monkeypatch.setattr(image_models, "MODELS", models)
    monkeypatch.setattr(image_models, "load", lambda *_, **__: {"test": images})
    monkeypatch.setattr(image_models, "SHOTS", (1, 2))
    evaluate = image_models.evaluate
    monkeypatch.setattr(image_models, "evaluate", lambda *args, **options: evaluate(*args, **options, queries=3))
    options = ["--episodes", "4", "--threads", "1", "--cache", str(tmp_path / "cache"), "--output", str(tmp_path)]
    for _ in range(2):  # the second run reads the features from the cache
        monkeypatch.setattr(sys, "argv", ["image_models", *options])
        image_models.main()
        rows = json.loads((tmp_path / "image_models.json").read_text())["results"]
        assert len(rows) == 2 * 2 * 2 * len(image_models.HEADS)
        for row in rows:
            assert row["accuracy"] == pytest.approx(1.0 if row["features"] == "sees" else 0.2)
            assert 0 <= row["calibration error"] <= 1
    assert "| miniImageNet | blind" in (tmp_path / "image_models.md").read_text(encoding="utf-8")


def test_calibration_and_times_of_estimators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimators, "DATA", {"iris": load_iris})
    monkeypatch.setattr(estimators, "load_digits", load_iris)
    monkeypatch.setattr(
        sys, "argv", ["estimators", *["--halves", "2", "--repeats", "1", "--threads", "1"], "--output", str(tmp_path)]
    )
    estimators.main()
    rows = json.loads((tmp_path / "calibration.json").read_text())["results"]
    assert [row["head"] for row in rows] == 2 * [*estimators.HEADS]
    ridge = [row for row in rows if row["head"] == "RidgeHead()"]
    for measure in ("calibration error", "log-loss"):
        assert all(row[f"{measure} after"] < row[f"{measure} before"] for row in ridge)
    times = json.loads((tmp_path / "times.json").read_text())["results"]
    assert [row["classifier"] for row in times] == [*estimators.WHOLE]
    assert all(row["seconds"] > 0 for row in times)


def test_times_of_linear_probes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "C", torch.tensor([1e-2, 1.0, 1e2], dtype=torch.float64))
    monkeypatch.setitem(probe.SYNTHETIC, "small", 12)
    sizes = ["--ways", "3", "--tries", "2", "--shots", "1", "6", "--repeats", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["probe", "--data", "small", *sizes, "--output", str(tmp_path)])
    probe.main()
    rows = json.loads((tmp_path / "probe.json").read_text())["results"]
    assert [row["shots"] for row in rows if row["protocol"] == "logistic, 5 folds"] == [6, 6]
    validated = [row for row in rows if row["protocol"] == "logistic, validation set"]
    assert [row["method"] for row in validated[:4]] == [*probe.methods(intelex=False)["logistic, validation set"]]
    for row in validated:
        if row["method"] == probe.OURS:
            assert row["certified gap"] < 1e-9
        elif "tol=1e-12" in row["method"]:
            assert -1e-9 < row["below"] <= row["excess"] < 1e-3
    assert (tmp_path / "probe.png").stat().st_size > 5000
    assert "| small | ridge, leave one out" in (tmp_path / "probe.md").read_text()
    # A second run replaces the rows of its own protocol only.
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--append", "--protocols", probe.ONE_FIT])
    probe.main()
    again = json.loads((tmp_path / "probe.json").read_text())["results"]
    assert len(again) == len(rows)
    assert [row for row in again if row["protocol"] != probe.ONE_FIT] == [
        row for row in rows if row["protocol"] != probe.ONE_FIT
    ]
    assert len({row["method"] for row in again if row["protocol"] == probe.ONE_FIT}) == 3
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--tries", "1"])
    with pytest.raises(SystemExit):
        probe.main()
