"""Short trainings that differ in the head alone: what is measured, that it goes on, and how the settings are made."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import head_settings
from benchmarks.data import ImageSet
from benchmarks.head_settings import RECIPE, SETTINGS, Apart, UnitLength
from benchmarks.loop import Training
from benchmarks.options import Options
from benchmarks.processes import Processes
from benchmarks.train import episodes
from convexheads import SVMHead
from convexheads.kernels import Linear

PLAIN, APART, UNIT = "SVM, C = 0.1", "ridge, statistics apart", "SVM, unit length, C = 30"


def images_of(classes: int = 6, each: int = 21) -> ImageSet:
    count, generator = classes * each, torch.Generator().manual_seed(classes)
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.arange(count) % classes, tuple("abcdefgh"[:classes]))


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """The command with two steps on few images, which returns the rows of its result."""
    monkeypatch.setattr(head_settings, "load", lambda *_, **__: {"train": images_of(6, 12), "val": images_of(5)})
    read = Options.from_recipe
    few = {"tasks": 1, "shots": 2, "queries": 2, "device": "cpu"}
    monkeypatch.setattr(head_settings.Options, "from_recipe", lambda name, **changes: read(name, **(changes | few)))

    def call(*settings: str, **changes: Any) -> list[dict[str, Any]]:
        sizes = {"steps": 2, "episodes": 3, "threads": torch.get_num_threads(), "output": tmp_path / "out"} | changes
        words = [f"--{name}={value}" for name, value in sizes.items()]
        monkeypatch.setattr(sys, "argv", ["head_settings", f"--settings={json.dumps(settings)}", *words])
        head_settings.main()
        return json.loads((tmp_path / "out" / "head_settings.json").read_text())["results"]

    return call


def test_every_setting_is_trained_and_evaluated(command: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> None:
    assert (SETTINGS[PLAIN].training, SETTINGS[APART].training) == (Training, Apart)
    assert isinstance(SETTINGS[UNIT].make().kernel, UnitLength)
    rows = command(PLAIN, APART, UNIT)
    assert [row["setting"] for row in rows] == [PLAIN, APART, UNIT]
    accuracies = {f"{head}, {shots}-shot" for head in ("itself", "ridge", "prototypes") for shots in (1, 5)}
    for row in rows:
        assert row.keys() == accuracies | {
            *("setting", "seed", "training accuracy", "squared length", "scale", "failures", "seconds")
        }
        assert all(math.isfinite(value) for name, value in row.items() if name != "setting"), row
        assert all(0 < row[name] <= 100 for name in accuracies), row
        assert 0 <= row["training accuracy"] <= 1
        assert min(row["squared length"], row["scale"], row["seconds"]) > 0
        assert (row["failures"], row["seed"]) == (0, 0)
    table = (tmp_path / "out" / "head_settings.md").read_text()
    assert all(name in table for name in (PLAIN, APART, UNIT))


def test_what_is_measured_is_not_measured_again(
    command: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, measured = head_settings.measure, []
    monkeypatch.setattr(head_settings, "measure", lambda name, *rest: measured.append(name) or measure(name, *rest))
    first = command(PLAIN)
    assert command(PLAIN) == first
    assert measured == [PLAIN]
    both = command(PLAIN, UNIT)
    assert both[:1] == first
    assert measured == [PLAIN, UNIT]
    assert [row["seed"] for row in command(UNIT, seeds="[0,1]")] == [0, 0, 1]
    assert measured == [PLAIN, UNIT, UNIT]
    for sizes in ({"steps": 3}, {"episodes": 4}, {"dataset": "fc100"}):
        with pytest.raises(SystemExit, match=r"error: output: expected results with .*got .*head_settings\.json"):
            command(PLAIN, **sizes)
    assert len(measured) == 3


def test_says_that_no_time_was_left(command: Callable[..., list[dict[str, Any]]]) -> None:
    with pytest.raises(SystemExit, match="minutes: expected enough for one training"):
        command(PLAIN, minutes=0)


def test_refuses_an_unknown_setting(command: Callable[..., list[dict[str, Any]]]) -> None:
    with pytest.raises(SystemExit, match=r"settings: expected some of .*got .*forest"):
        command("forest")


class Normed(nn.Module):
    """Features by the statistics of what is passed together."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(images.float().mean((2, 3)))


def training(kind: type[Training]) -> Training:
    options = Options.from_recipe(RECIPE, dataset="cifar-fs", steps=2, tasks=2, shots=2, queries=3, device="cpu")
    data = images_of()
    return kind(options, Normed(), SVMHead(), episodes(data, options, Processes()), Processes())


def test_apart_is_support_and_query_one_after_the_other() -> None:
    own = training(Apart)
    drawn = own.episodes.draw(1)
    found = own.episodes.split(own.features(drawn))
    images = own.episodes(drawn)
    passed = own.episodes.split(images.unflatten(0, tuple(own.episodes.labels.shape)).flatten(2))
    for features, pixels in ((found.support, passed.support), (found.query, passed.query)):
        expected = own.backbone(pixels.flatten(0, 1).unflatten(1, images.shape[1:])).unflatten(0, pixels.shape[:2])
        torch.testing.assert_close(features, expected)
        mean = features.flatten(0, 1).mean(0)
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-4)
    together = own.episodes.split(training(Training).features(drawn))
    assert not torch.allclose(found.support, together.support, atol=1e-2)


def test_unit_length_does_not_depend_on_the_scale_of_features() -> None:
    support, query = torch.randn(2, 10, 7, dtype=torch.float64), torch.randn(2, 4, 7, dtype=torch.float64)
    kernel, scaled = (UnitLength().condition_on(factor * support, None) for factor in (1, 30))
    torch.testing.assert_close(scaled(30 * query, 30 * support), kernel(query, support))
    torch.testing.assert_close(scaled(30 * support, 30 * support), kernel(support, support))
    gram = kernel(support, support)
    torch.testing.assert_close(gram.diagonal(dim1=-2, dim2=-1).mean(-1), torch.ones(2, dtype=torch.float64))
    for task in range(2):  # each by its own
        unit = Linear()(support[task], support[task]).diagonal().mean()
        torch.testing.assert_close(gram[task], Linear()(support[task], support[task]) / unit)
    head = SETTINGS[UNIT].make()
    labels = torch.arange(10).expand(2, -1) % 5
    logits = [head(factor * support, labels, factor * query) for factor in (1, 30)]
    torch.testing.assert_close(logits[0], logits[1])
