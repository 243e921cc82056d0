"""Files that are complete or not there, and that tell when they are damaged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from convexheads import _storage


def test_a_file_is_replaced_only_when_the_new_one_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, done = tmp_path / "file", []

    def note(name: str, function):
        def noted(*arguments, **options):
            done.append((name, path.read_bytes()))
            return function(*arguments, **options)

        return noted

    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", note("fsync", os.fsync))
    monkeypatch.setattr(Path, "replace", note("replace", Path.replace))
    _storage.atomic_write(path, b"new")
    assert done == [("fsync", b"old"), ("replace", b"old")]
    assert path.read_bytes() == b"new"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_write_that_is_cut_off_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = tmp_path / "file", Path.write_bytes
    path.write_bytes(b"old")

    def full(self: Path, content: bytes) -> None:
        write(self, content[:1])
        raise OSError("no space left on the device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        _storage.atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_two_processes_that_write_one_file_do_not_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, fsync = tmp_path / "file", os.fsync

    def write_in_between(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        _storage.atomic_write(path, b"second")
        assert path.read_bytes() == b"second"
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", write_in_between)
    _storage.atomic_write(path, b"first")
    assert path.read_bytes() == b"first"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_every_part_of_a_file_is_in_its_checksum() -> None:
    def digest(value: torch.Tensor, name: str = "weight", text: str = "{}") -> str:
        return _storage._digest({name: value, "bias": torch.zeros(2)}, text)

    value = torch.arange(6, dtype=torch.float32)
    digests = [
        digest(value),
        digest(value.view(2, 3)),
        digest(value.view(torch.int32)),
        digest(value + torch.tensor([0.0, 0, 0, 0, 0, 1e-6])),
        digest(value, name="weights"),
        digest(value, text='{"ways": 5}'),
    ]
    assert len(set(digests)) == len(digests)
    assert digest(value.clone()) == digests[0]
