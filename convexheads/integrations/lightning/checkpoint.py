"""Checkpoints of Lightning that are written atomically and verified when they are read."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from convexheads import _storage
from convexheads.errors import InputError


class AtomicCheckpointIO(TorchCheckpointIO):
    """A plugin for `Trainer(plugins=...)` that writes checkpoints atomically and refuses damaged ones.

    Without it, Lightning writes a checkpoint to the system's temporary folder and then moves it into place. If that
    folder is on another disk, killing the training during the copy destroys the last good checkpoint. Lightning also
    reads a file with altered bytes without an error. This plugin renames a file only when it is complete on the disk,
    and verifies its checksums before it is read. Nothing is unpickled. Paths are on the local file system.

    Use it when a training run may be killed at any moment.

    Example:
        `Trainer(plugins=[AtomicCheckpointIO()])`, then `trainer.fit(module, data, ckpt_path="last.ckpt")`
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a `checkpoint` to `path`; after an `OSError`, an older file is unchanged.

        Only tensors, numbers, text and containers of these can be read again. `storage_options` are not used.
        """
        content, path = BytesIO(), Path(path)
        torch.save(checkpoint, content)
        path.parent.mkdir(parents=True, exist_ok=True)
        _storage.atomic_write(path, content.getbuffer())

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint of this class, or of Lightning's own class, from `path` onto the CPU.

        `map_location` and `weights_only` are not used. A file that is damaged or contains objects raises `InputError`.
        """
        try:
            checkpoint = _storage.load_torch(path)
            if not isinstance(checkpoint, dict):
                raise TypeError(f"it contains a {type(checkpoint).__name__}")
        except (OSError, TypeError, ValueError) as error:
            expected = "a complete checkpoint of tensors, numbers and text"
            raise InputError("checkpoint", expected, f"{path} ({error})") from error
        return checkpoint
