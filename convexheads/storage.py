"""Tensors with settings beside them, as safetensors: a file is complete or not there, and nothing is unpickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from convexheads.errors import MissingDependencyError


def save(path: Path, tensors: dict[str, Tensor], settings: dict[str, Any], *, key: str, needed_by: str) -> None:
    """Write a file, under another name first; `key` says what kind of file it is."""
    safetensors = _safetensors(needed_by)
    content = safetensors.torch.save(
        {name: value.contiguous() for name, value in tensors.items()}, {key: json.dumps(settings)}
    )
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load(path: Path, *, key: str, needed_by: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the settings of a file of that kind.

    Raises:
        OSError: there is no such file.
        KeyError: it is of another kind.
        ValueError: it is damaged.
        MissingDependencyError: safetensors is not installed.
    """
    safetensors = _safetensors(needed_by)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            settings = json.loads((file.metadata() or {})[key])
            return {name: file.get_tensor(name) for name in list(file.keys())}, settings
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from error


def _safetensors(needed_by: str) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise MissingDependencyError("safetensors", "pretrained", needed_by) from error
    return safetensors
