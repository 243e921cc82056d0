"""Meta-training with PyTorch Lightning 2: a backbone and a head, trained on episodes.

This needs the package `pytorch_lightning`, on which learn2learn builds too; the classes of `lightning.pytorch` are
different ones.
"""

from __future__ import annotations

from convexheads.integrations import require_version

require_version(
    "pytorch_lightning",
    "pytorch-lightning",
    "2",
    "3",
    extra="lightning",
    needed_by="convexheads.integrations.lightning",
)

from convexheads.integrations.lightning.checkpoint import AtomicCheckpointIO
from convexheads.integrations.lightning.data import EpisodicDataModule
from convexheads.integrations.lightning.module import EpisodicModule

__all__ = ["AtomicCheckpointIO", "EpisodicDataModule", "EpisodicModule"]
