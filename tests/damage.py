"""Files that are damaged or foreign, and what has to become of them."""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch

from convexheads import InputError


def plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


class Malicious:
    def __reduce__(self):
        return os.mkdir, (os.environ["MALICIOUS"],)


def damaged(content: bytes, draws: random.Random, flips: int = 30) -> Iterator[bytes]:
    """Cut off at several lengths, and with one bit altered at several places, those of the values above all."""
    for length in (0, 1, 100, len(content) // 2, len(content) - 1000, len(content) - 1):
        yield content[:length]
    for place in (8, 30, len(content) - 20, *draws.sample(range(len(content)), flips)):
        altered = bytearray(content)
        altered[place] ^= 1 << draws.randrange(8)
        yield bytes(altered)


def foreign(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[bytes]:
    """Text, pickles that run something, a zip of something else, tensors without the rest."""
    monkeypatch.setenv("MALICIOUS", str(folder / "unpickled"))
    yield b"no checkpoint"
    yield pickle.dumps(Malicious())
    for content in (Malicious(), {"state_dict": Malicious()}, torch.zeros(3), {"state_dict": {}}, [1, 2]):
        torch.save(content, folder / "foreign")
        yield (folder / "foreign").read_bytes()
    with ZipFile(folder / "foreign", "w") as archive:
        archive.writestr("data.pkl", b"nothing")
    yield (folder / "foreign").read_bytes()


def refused_or_same(load: Callable[[], Any], expected: Any, message: str) -> bool:
    """Whether it is refused by that message; else it has to be the same."""
    try:
        found = load()
    except (InputError, SystemExit) as error:
        told = str(error)
    else:
        assert plain(found) == expected
        return False
    assert message in told
    return True


def refusals(path: Path, load: Callable[[], Any], message: str, flips: int = 30) -> int:
    """Damage a file in many ways; how often it is refused. Where it is not, all is as before; it is never written to."""
    whole, expected, count = path.read_bytes(), plain(load()), 0
    for content in damaged(whole, random.Random(0), flips):
        path.write_bytes(content)
        count += refused_or_same(load, expected, message)
        assert path.read_bytes() == content
    path.write_bytes(whole)
    return count
