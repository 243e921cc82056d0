"""Weights, classifiers and data files that are damaged or foreign are refused, and nothing in them is run."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from damage import damaged, foreign, plain, refused_or_same
from tasks import clusters

import convexheads as ch
from convexheads import InputError
from convexheads.integrations.folder import FewShotClassifier
from convexheads.integrations.lightning import EpisodicDataModule
from convexheads.pretrained import make_untrained, save_pretrained


def test_damaged_and_foreign_weights_are_refused(tmp_path, monkeypatch) -> None:
    settings = {"backbone": "conv4", "head": "ridge", "image_size": 32}
    path = tmp_path / "own.safetensors"
    save_pretrained(path, *make_untrained(settings, torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)), settings)

    def load() -> Any:
        backbone, head, told = ch.load_pretrained(path)
        return backbone.state_dict(), head.state_dict(), told

    whole, expected = path.read_bytes(), plain(list(load()))
    for content in (*damaged(whole, random.Random(0)), *foreign(tmp_path, monkeypatch)):
        path.write_bytes(content)
        assert refused_or_same(load, expected, f"name: got {path}")
    assert not (tmp_path / "unpickled").exists()


def test_damaged_and_foreign_classifiers_are_refused(tmp_path, monkeypatch) -> None:
    support, labels = clusters(3, each=4)
    settings = {"classes": ["a", "b", "c"], "features": "npy", "head": "ridge", "scale": 1.0}
    path = tmp_path / "own.classifier"
    FewShotClassifier(**settings, support=support, labels=labels).save(path)
    whole = path.read_bytes()
    for content in (*damaged(whole, random.Random(0)), *foreign(tmp_path, monkeypatch)):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"classifier: got .*own\.classifier"):
            FewShotClassifier.load(path)
    assert not (tmp_path / "unpickled").exists()


def test_weights_of_older_versions_have_no_checksum_and_load() -> None:
    from safetensors import safe_open

    path = ch.pretrained.ZOO / "conv4-cifar-fs-ridge.safetensors"
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["settings"].startswith("{")
    ch.load_pretrained(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_damaged_and_foreign_data_files_are_refused(tmp_path, monkeypatch) -> None:
    path = tmp_path / "train.pt"
    torch.save(clusters(4, each=10), path)

    def load() -> Any:
        return EpisodicDataModule(str(path)).parts["train"]

    whole, expected = path.read_bytes(), plain(load())
    refused = 0
    for content in damaged(whole, random.Random(0), flips=300):
        path.write_bytes(content)
        refused += refused_or_same(load, expected, f"train: got {path}")
    assert refused > 200
    for place in range(whole.index(b"PK\x01\x02"), len(whole)):  # flags, with which PyTorch returns any memory
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        refused_or_same(load, expected, f"train: got {path}")
    for content in foreign(tmp_path, monkeypatch):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"train: got .*train\.pt"):
            load()
    assert not (tmp_path / "unpickled").exists()
