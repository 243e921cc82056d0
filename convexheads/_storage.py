"""Atomic, checksummed files that are read without unpickling."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convexheads.errors import MissingDependencyError


def atomic_write(path: str | Path, content: bytes | memoryview) -> None:
    """Replace a file with a complete new one; after an `OSError`, the old one is unchanged."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")  # unlike `tempfile`, with the usual permissions
    try:
        part.write_bytes(content)
        with part.open("rb+") as file:
            os.fsync(file.fileno())  # otherwise a crash may leave the new name without the content
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def save(path: str | Path, tensors: dict[str, Tensor], settings: dict[str, Any], *, key: str, needed_by: str) -> None:
    """Write tensors and settings as safetensors; `key` names the kind of file.

    One key holds both the checksum and the settings, because the order of two keys is not deterministic.
    """
    safetensors, text = _safetensors(needed_by), json.dumps(settings)
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    atomic_write(path, safetensors.torch.save(tensors, {key: f"{_digest(tensors, text)} {text}"}))


def load(path: str | Path, *, key: str, needed_by: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the settings of a file of the kind `key`.

    Raises `KeyError` if the file is of another kind, and `ValueError` if it is damaged.
    """
    safetensors = _safetensors(needed_by)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {})[key]
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from error
    digest, _, text = text.partition(" ")
    if digest != _digest(tensors, text):
        raise ValueError("its content does not match its checksum")
    return tensors, json.loads(text)


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
