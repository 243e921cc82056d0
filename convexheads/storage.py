"""Files that are complete or not there, that tell when they are damaged, and of which nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import torch
from torch import Tensor

from convexheads.errors import MissingDependencyError


def write(path: Path, content: bytes | memoryview) -> None:
    """Write a file under another name first, and wait for the disk: whenever this is cut off, the old file is there.

    Raises:
        OSError: it can't be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(content)
        with part.open("rb+") as file:
            os.fsync(file.fileno())  # or a crash of the machine may leave the new name without the content
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def save(path: Path, tensors: dict[str, Tensor], settings: dict[str, Any], *, key: str, needed_by: str) -> None:
    """Write tensors with settings beside them as safetensors; `key` says what kind of file it is.

    Under the key stand the checksum of all else and the settings. (Another key would make the order of the two, and so
    the file, another one each time.)
    """
    safetensors = _safetensors(needed_by)
    tensors, text = {name: value.contiguous() for name, value in tensors.items()}, json.dumps(settings)
    write(path, safetensors.torch.save(tensors, {key: f"{_digest(tensors, text)} {text}"}))


def load(path: Path, *, key: str, needed_by: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the settings of a file of that kind. One without a checksum is from an older version.

    Raises:
        OSError: there is no such file.
        KeyError: it is of another kind.
        ValueError: it is damaged.
        MissingDependencyError: safetensors is not installed.
    """
    safetensors = _safetensors(needed_by)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {})[key]
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from error
    if not text.startswith("{"):
        digest, _, text = text.partition(" ")
        if digest != _digest(tensors, text):
            raise ValueError("its content does not match its checksum")
    return tensors, json.loads(text)


def load_torch(path: Path) -> Any:
    """What `torch.save` wrote, on the CPU; tensors, numbers, text and containers of them only.

    `torch.load` alone takes altered bytes for values: it passes over the checksums that are in the file.

    Raises:
        OSError: there is no such file.
        ValueError: it is damaged, or holds something else.
    """
    try:
        with ZipFile(path) as archive:
            if not all(map(_is_stored, archive.infolist())) or archive.testzip() is not None:
                raise ValueError("its content does not match its checksum")
        return torch.load(path, weights_only=True, map_location="cpu")
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except pickle.UnpicklingError as error:
        raise ValueError("it holds more than tensors, numbers and text") from error
    except Exception as error:  # the two readers have as many errors as there are ways to damage a file
        raise ValueError(str(error) or type(error).__name__) from error


def _is_stored(member: ZipInfo) -> bool:
    """Whether PyTorch reads just the bytes that `testzip` looks at; with other flags it may return any memory."""
    size_is_right = (member.compress_type, member.file_size) == (ZIP_STORED, member.compress_size)
    return size_is_right and not member.external_attr & 0x10  # which says that it is a folder


def _digest(tensors: dict[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name, value in sorted(tensors.items()):
        digest.update(repr((name, value.dtype, tuple(value.shape))).encode())
        digest.update(memoryview(value.detach().cpu().flatten().view(torch.uint8).numpy().data))
    return digest.hexdigest()


def _safetensors(needed_by: str) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise MissingDependencyError("safetensors", "pretrained", needed_by) from error
    return safetensors
