"""Weights, classifiers and data files that are damaged or foreign are refused, and nothing in them is run."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import damaged, foreign, plain, refusals, refused_or_same
from tasks import clusters

import convexheads as ch
from convexheads import InputError
from convexheads.cli.folder import FolderClassifier
from convexheads.integrations.lightning import AtomicCheckpointIO, EpisodicDataModule
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


def test_damaged_and_foreign_checkpoints_of_lightning_are_refused(tmp_path, monkeypatch) -> None:
    path, files = tmp_path / "checkpoints" / "own.ckpt", AtomicCheckpointIO()
    files.save_checkpoint({"state_dict": {"weight": torch.randn(40, 30)}, "global_step": 3, "name": "own"}, path)

    def load() -> Any:
        return files.load_checkpoint(path)

    assert refusals(path, load, f"got {path}") > 30  # a bit of padding alters nothing
    for content in foreign(tmp_path, monkeypatch):
        path.write_bytes(content)
        assert refused_or_same(load, {"state_dict": {}}, f"got {path}") or b"state_dict" in content
    assert not (tmp_path / "unpickled").exists()


def test_a_checkpoint_of_lightning_that_can_not_be_written_leaves_the_old_one(tmp_path, monkeypatch) -> None:
    path, files = tmp_path / "own.ckpt", AtomicCheckpointIO()
    files.save_checkpoint({"global_step": 3}, path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            files.save_checkpoint({"global_step": 4}, path)
    assert files.load_checkpoint(path) == {"global_step": 3}
    assert [each.name for each in tmp_path.iterdir()] == ["own.ckpt"]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_damaged_and_foreign_data_files_are_refused(tmp_path, monkeypatch) -> None:
    path = tmp_path / "train.pt"
    torch.save(clusters(4, each=10), path)

    def load() -> Any:
        return EpisodicDataModule(str(path)).parts["train"]

    whole, expected = path.read_bytes(), plain(load())
    assert refusals(path, load, f"got {path}", flips=300) > 200
    for place in range(whole.index(b"PK\x01\x02"), len(whole)):  # flags, with which PyTorch returns any memory
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        refused_or_same(load, expected, f"got {path}")
    for content in foreign(tmp_path, monkeypatch):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"train: expected .*, got .*train\.pt"):
            load()
    assert not (tmp_path / "unpickled").exists()
