"""Weights, classifiers and data files that are damaged or foreign are refused, and nothing in them is run."""

from __future__ import annotations

import json
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import damaged, foreign, plain, refused_or_same
from tasks import clusters

import convexheads as ch
from convexheads import InputError
from convexheads.cli.folder import FolderClassifier
from convexheads.integrations.lightning import EpisodicDataModule
from convexheads.models import build_model, save_pretrained
from convexheads.models.pretrained import WEIGHTS_DIR

SETTINGS = {"backbone": "conv4", "head": "ridge", "image_size": 32}


def test_damaged_and_foreign_weights_are_refused(tmp_path, monkeypatch) -> None:
    path = tmp_path / "own.safetensors"
    save_pretrained(path, *build_model(SETTINGS, torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)), SETTINGS)

    def load() -> Any:
        backbone, head, told = ch.load_pretrained(path)
        return backbone.state_dict(), head.state_dict(), told

    whole, expected = path.read_bytes(), plain(list(load()))
    for content in (*damaged(whole, random.Random(0)), *foreign(tmp_path, monkeypatch)):
        path.write_bytes(content)
        assert refused_or_same(load, expected, f"got {path}")
    assert not (tmp_path / "unpickled").exists()


def test_damaged_and_foreign_classifiers_are_refused(tmp_path, monkeypatch) -> None:
    support, labels = clusters(3, each=4)
    settings = {"classes": ["a", "b", "c"], "features": "npy", "head": "ridge", "scale": 1.0}
    path = tmp_path / "own.classifier"
    FolderClassifier(**settings, support=support, labels=labels).save(path)
    whole = path.read_bytes()
    for content in (*damaged(whole, random.Random(0)), *foreign(tmp_path, monkeypatch)):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"classifier: expected .*, got .*own\.classifier"):
            FolderClassifier.load(path)
    assert not (tmp_path / "unpickled").exists()


def test_weights_without_a_checksum_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors, settings = load_file(WEIGHTS_DIR / "conv4-cifar-fs-ridge.safetensors"), json.dumps(SETTINGS)
    save_file(tensors, tmp_path / "own.safetensors", {"settings": settings})
    with pytest.raises(InputError, match="checksum"):
        ch.load_pretrained(tmp_path / "own.safetensors")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_damaged_and_foreign_data_files_are_refused(tmp_path, monkeypatch) -> None:
    """PyTorch notices neither altered values nor altered padding."""
    path = tmp_path / "train.pt"
    with pytest.raises(InputError, match=r"train: expected .*, got .*train\.pt"):
        EpisodicDataModule(str(path))
    torch.save(clusters(4, each=10), path)
    whole = path.read_bytes()
    truncated = (whole[:length] for length in (0, 1, 100, len(whole) // 2, len(whole) - 1))
    for content in (*truncated, *foreign(tmp_path, monkeypatch)):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"train: expected .*, got .*train\.pt"):
            EpisodicDataModule(str(path))
    for content in damaged(whole, random.Random(0), flips=300):
        path.write_bytes(content)
        with suppress(InputError):
            EpisodicDataModule(str(path))
    assert not (tmp_path / "unpickled").exists()
