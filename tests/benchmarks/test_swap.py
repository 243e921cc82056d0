"""Heads in a plain training loop: what is trained and reported, and that a run goes on."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import swap
from benchmarks.data import ImageSet
from benchmarks.swap import HEADS, Loop


def images_of(classes: int, each: int = 12) -> ImageSet:
    """Images whose class shows in their brightness."""
    labels = torch.arange(classes * each) % classes
    noise = torch.randint(30, (classes * each, 1, 16, 16), generator=torch.Generator().manual_seed(classes))
    images = (labels[:, None, None, None] * (220 // classes) + noise).to(torch.uint8)
    return ImageSet(images, labels, tuple("abcdefgh"[:classes]))


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """The command with a short loop on few images, which returns the rows of its result."""
    monkeypatch.setattr(swap, "load", lambda *_, **__: {"train": images_of(6), "test": images_of(3)})
    swap._load.cache_clear()
    monkeypatch.setattr(swap, "LOOPS", {"digits": Loop(steps=3, tasks=2, ways=3, shots=2, queries=2)})
    evaluate = swap.evaluate
    monkeypatch.setattr(swap, "evaluate", lambda *args, **options: evaluate(*args, **options | {"queries": 2}))

    def call(**changes: Any) -> list[dict[str, Any]]:
        options = {"seeds": [0], "episodes": 3, "output": tmp_path} | changes
        words = [f"--{name}={value if name == 'output' else json.dumps(value)}" for name, value in options.items()]
        monkeypatch.setattr(sys, "argv", ["swap", *words])
        swap.main()
        return json.loads((tmp_path / "swap.json").read_text())["results"]

    return call


def test_every_head_is_trained_with_every_optimizer(command: Callable[..., list[dict[str, Any]]]) -> None:
    rows = command()
    assert {(row["optimizer"], row["head"]) for row in rows} == {(o, h) for o in swap.OPTIMIZERS for h in HEADS}
    for row in rows:
        for tested in ("itself", "prototypes"):
            assert all(0 <= row[f"test, {tested}, {shots}-shot"] <= 100 for shots in (1, 5))
    assert len({row["scale"] for row in rows if row["head"] == "SVM"}) == len(swap.OPTIMIZERS)  # it is trained


def test_a_run_goes_on(command: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> None:
    heads, optimizers = ["prototypes", "ridge"], ["Adam"]
    first = command(heads=heads[:1], optimizers=optimizers)
    both = command(heads=heads, optimizers=optimizers, seeds=[0, 1])
    assert both[0] == first[0]
    assert [(row["head"], row["seed"]) for row in both] == [(h, s) for s in (0, 1) for h in heads]
    table = (tmp_path / "swap.md").read_text(encoding="utf-8")
    assert "| digits | Adam" in table
    assert " ± " in table
    with pytest.raises(SystemExit, match="output: expected results of 4 episodes, got 3"):
        command(episodes=4)


@pytest.mark.parametrize("option", ["data", "heads", "optimizers"])
def test_unknown_names_are_refused(command: Callable[..., list[dict[str, Any]]], option: str) -> None:
    with pytest.raises(SystemExit, match=f"{option}: expected some of .*, got none-such"):
        command(**{option: ["none-such"]})


@pytest.mark.slow
def test_several_runs_at_a_time_give_the_same_results() -> None:
    loop = Loop(steps=2, tasks=1, ways=4, shots=1, queries=1)
    runs = [swap.Run("digits", loop, "SGD", head, 0, 5, None, "cpu") for head in ("prototypes", "ridge")]
    alone = {row["head"]: row for row in swap._results(runs, 1, time.monotonic() + 1e6)}
    together = {row["head"]: row for row in swap._results(runs, 2, time.monotonic() + 1e6)}
    for rows in (alone, together):
        for row in rows.values():
            row.pop("seconds")
    assert together == alone
    assert list(swap._results(runs, 2, time.monotonic() - 1)) == []
