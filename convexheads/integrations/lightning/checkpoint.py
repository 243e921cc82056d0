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

    Lightning alone writes a checkpoint to the system's folder for temporary files and moves it to its destination. If
    that is on another disk, killing the training during the copy destroys the last good checkpoint. Lightning also
    reads a file with altered bytes without an error. This plugin renames a file only when it is complete on the disk,
    and verifies its checksums before it is read. Nothing is unpickled. Paths are on the local file system.

    Use it when a training may be killed at any moment.

    Example:
        `Trainer(plugins=[AtomicCheckpointIO()])`, then `trainer.fit(module, data, ckpt_path="last.ckpt")`
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint, in place of an older one if there is one.

        Args:
            checkpoint: Tensors, numbers, text and containers of them; anything else is written, but cannot be read.
            path: Path of the file.
            storage_options: Not used.

        Raises:
            OSError: The file cannot be written; an older one is unchanged.
        """
        content, path = BytesIO(), Path(path)
        torch.save(checkpoint, content)
        path.parent.mkdir(parents=True, exist_ok=True)
        _storage.atomic_write(path, content.getbuffer())

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint that this class, or Lightning's own, wrote.

        Args:
            path: Path of the file.
            map_location: Not used: tensors are read to the CPU, from where Lightning moves them.
            weights_only: Not used: it is always True.

        Returns:
            The checkpoint.

        Raises:
            InputError: There is no such file, it is damaged, or it contains objects.
        """
        expected = "a complete checkpoint of tensors, numbers and text"
        try:
            checkpoint = _storage.load_torch(path)
            if not isinstance(checkpoint, dict):
                raise TypeError(f"it contains a {type(checkpoint).__name__}")
        except (OSError, TypeError, ValueError) as error:
            raise InputError("checkpoint", expected, f"{path} ({error})") from error
        return checkpoint
