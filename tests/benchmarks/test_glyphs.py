"""The letters: the same everywhere, split by script, cached; and the quickstart, which learns to read them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

import convexheads as ch
from benchmarks import quickstart
from benchmarks.data import ImageSet, glyphs, load
from benchmarks.data.glyphs import choose_letters, draw_class, load_glyphs
from benchmarks.loop import Training

ROOT = Path(__file__).parents[2]
BLOCKS = {
    "train": [(0x41, 0x24F), (0x400, 0x52F), (0x600, 0x6FF), (0x1400, 0x167F)],
    "val": [(0x370, 0x3FF), (0xE80, 0xEFF), (0x1D00, 0x1D7F)],
    "test": [(0x10A0, 0x10FF), (0x2D00, 0x2D2F), (0x530, 0x58F), (0x590, 0x5FF), (0x2D30, 0x2D7F), (0x7C0, 0x7FF)],
}
"""Unicode's blocks of the scripts of each split."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for the cache."""
    for variable in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(variable, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, ImageSet]]:
    """`load_glyphs` with few letters, which `load("glyphs")` takes as well."""
    few = partial(load_glyphs, max_per_script=8, images_per_class=20)
    monkeypatch.setattr(glyphs, "load_glyphs", few)
    return few


@pytest.fixture(scope="module")
def letters() -> dict[str, list[str]]:
    return choose_letters(150)


def assert_same(first: dict[str, ImageSet], second: dict[str, ImageSet]) -> None:
    assert first.keys() == second.keys()
    for split, data in first.items():
        assert torch.equal(data.images, second[split].images)
        assert torch.equal(data.labels, second[split].labels)
        assert data.classes == second[split].classes


def test_images_depend_on_the_letter_and_the_seed_alone() -> None:
    script = "import sys; from benchmarks.data.glyphs import draw_class; sys.stdout.buffer.write(bytes(draw_class('ა', 6, 3).numpy()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, timeout=120, cwd=ROOT)
    images = draw_class("ა", 6, 3)
    assert done.stdout == bytes(images.numpy())
    assert torch.equal(draw_class("ა", 4, 3), images[:4])
    assert not torch.equal(draw_class("ა", 6, 4), images)


def test_splits_have_their_scripts_and_share_no_letter(letters: dict[str, list[str]]) -> None:
    assert {split: len(own) for split, own in letters.items()} == {"train": 561, "val": 91, "test": 295}
    assert len(set().union(*letters.values())) == 561 + 91 + 295
    for split, own in letters.items():
        for first, last in BLOCKS[split]:
            assert any(first <= ord(letter) <= last for letter in own), hex(first)
        for letter in own:
            assert any(first <= ord(letter) <= last for first, last in BLOCKS[split]), letter
            assert unicodedata.category(letter).startswith("L")
            assert not unicodedata.decomposition(letter)


def test_letters_that_look_alike_are_one_class(letters: dict[str, list[str]]) -> None:
    everything = set().union(*letters.values())
    assert "A" in everything
    assert not {"\u0410", "\u0391"} & everything  # the Cyrillic and the Greek A
    assert "\u042f" in everything  # the Cyrillic Ya


def test_images_are_distinct_and_show_something(small: Callable[..., dict[str, ImageSet]]) -> None:
    data = small()
    assert {split: len(own.classes) for split, own in data.items()} == {"train": 32, "val": 16, "test": 40}
    assert "GEORGIAN CAPITAL LETTER AN" in data["test"].classes
    for own in data.values():
        assert own.images.dtype == torch.uint8
        assert own.images.shape == (20 * len(own.classes), 1, 28, 28)
        assert own.labels.bincount().tolist() == [20] * len(own.classes)
        ink = (own.images > 127).sum((1, 2, 3))
        assert ink.min() >= 5  # white on black
        assert ink.max() < 28 * 28 / 2
        assert len({bytes(image.numpy()) for image in own.images}) > 0.99 * len(own.images)


def test_no_letter_reaches_beyond_its_image_by_much(letters: dict[str, list[str]]) -> None:
    wide = draw_class(max(letters["test"], key=lambda letter: draw_class(letter, 1, 0).float().mean().item()), 20, 0)
    border = torch.cat([wide[..., 0, :], wide[..., -1, :], wide[..., 0], wide[..., -1]], -1)
    assert (border > 127).float().mean() < 0.2


def test_images_come_from_the_cache(
    small: Callable[..., dict[str, ImageSet]], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = small()
    (file,) = (cache / "convexheads").iterdir()
    monkeypatch.setattr(glyphs, "draw_class", lambda *_: pytest.fail("drawn again"))
    assert_same(small(), first)
    assert list(load("glyphs", splits=("val",))) == ["val"]
    assert list((cache / "convexheads").iterdir()) == [file]


@pytest.mark.parametrize("damage", ["cut", "altered", "another"])
def test_a_damaged_cache_is_made_again(small: Callable[..., dict[str, ImageSet]], cache: Path, damage: str) -> None:
    first = small()
    (file,) = (cache / "convexheads").iterdir()
    sound = file.read_bytes()
    altered = sound[:-100] + bytes([sound[-100] ^ 1]) + sound[-99:]
    file.write_bytes({"cut": sound[:-1000], "altered": altered, "another": b"a file"}[damage])
    assert_same(small(), first)
    assert file.read_bytes() == sound


def test_other_options_have_another_cache(cache: Path) -> None:
    first, second = (load_glyphs(max_per_script=1, images_per_class=1, seed=seed) for seed in (0, 1))
    assert not torch.equal(first["test"].images, second["test"].images)
    assert len(list((cache / "convexheads").iterdir())) == 2


def test_works_without_a_cache(small: Callable[..., dict[str, ImageSet]], cache: Path) -> None:
    cache.write_text("no folder")
    assert len(small()["test"].classes) == 40


TINY = [
    *("--steps", "4", "--tasks", "1", "--ways", "5", "--validate-every", "2", "--validation-episodes", "4"),
    *("--checkpoint-every", "1", "--test-episodes", "6", "--device", "cpu", "--threads", "1"),
]


@pytest.mark.usefixtures("small")
def test_quickstart_leaves_table_pictures_and_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    quickstart.main([*TINY, "--output", str(folder)])
    result = json.loads((folder / "result.json").read_text())
    assert {(row["backbone"], row["head"], row["ways"], row["shots"]) for row in result["results"]} == {
        (backbone, head, ways, shots)
        for backbone in ("meta-trained", "untrained", "none: pixels")
        for head in (("prototypes",) if backbone == "untrained" else ("svm", "ridge", "prototypes"))
        for ways, shots in ((5, 1), (5, 5), (20, 1))
    }
    for row in result["results"]:
        assert 1 / row["ways"] < row["accuracy"] < 1
    table = (folder / "result.md").read_text()
    for row in result["results"]:
        assert f"{100 * row['accuracy']:.2f} ± {100 * row['interval']:.2f}" in table
    assert "| 20.00 | 20.00 | 5.00 |" in " ".join(table.split())  # chance
    for name in ("letters.png", "accuracy.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 400
            assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 50
    backbone, _, settings = ch.load_pretrained(folder)
    assert settings["dataset"] == "glyphs"
    assert backbone(load("glyphs")["test"].images[:3]).shape == (3, 64)
    said = "".join(capsys.readouterr().out.split())
    for name in ("result.md", "letters.png", "accuracy.png", "model.safetensors"):
        assert "".join(str(folder / name).split()) in said
    assert result["command"].startswith(
        "python -m benchmarks.quickstart --steps 4 --tasks 1 --ways 5 --validate-every 2"
    )


@pytest.mark.usefixtures("small")
@pytest.mark.slow
def _distributions(name: str, extra: str, found: set[str]) -> set[str]:
    """The normalized names of a distribution and of all that it requires here, with an extra."""
    for text in importlib.metadata.requires(name) or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        other = canonicalize_name(requirement.name)
        for each in ["", *requirement.extras]:
            if f"{other}[{each}]" not in found:
                found |= {f"{other}[{each}]", other}
                _distributions(other, each, found)
    return found


HIDE = """
import os, sys

class Some:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        hidden = name.partition(".")[0] in os.environ["HIDDEN_MODULES"].split(",")
        return None if hidden else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path = [Some(finder) if hasattr(finder, "find_spec") else finder for finder in sys.meta_path]
"""


def test_the_quickstart_needs_the_packages_of_its_extra_only(tmp_path: Path) -> None:
    """`make quickstart` has an environment of its own, which lacks most of what is installed here."""
    present = _distributions("convexheads", "quickstart", {"convexheads"})
    assert "matplotlib" in present
    assert "scikit-learn" not in present
    hidden = [
        module
        for module, names in importlib.metadata.packages_distributions().items()
        if not present & set(map(canonicalize_name, names)) and not module.startswith("_")
    ]
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    environment = os.environ | {"HIDDEN_MODULES": ",".join(hidden), "PYTHONPATH": str(tmp_path)}
    arguments = [*TINY, "--output", str(tmp_path / "found")]
    command = [sys.executable, "-m", "benchmarks.quickstart", *arguments]
    subprocess.run(command, env=environment, check=True, cwd=ROOT)
    assert list((tmp_path / "found").iterdir())


def test_quickstart_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take, steps = Training.take, []

    def stop_at_the_third(self, drawn):
        steps.append(self.step)
        if steps == [0, 1, 2]:
            raise RuntimeError("the power is cut")
        take(self, drawn)

    monkeypatch.setattr(Training, "take", stop_at_the_third)
    arguments = [*TINY, "--output", str(tmp_path / "run")]
    with pytest.raises(RuntimeError, match="the power is cut"):
        quickstart.main(arguments)
    quickstart.main(arguments)
    assert steps == [0, 1, 2, 2, 3]
    assert (tmp_path / "run" / "letters.png").is_file()
