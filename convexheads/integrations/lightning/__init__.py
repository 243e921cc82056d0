"""Meta-training with PyTorch Lightning 2: a backbone and a head, trained on episodes.

This needs the package `pytorch_lightning`, as learn2learn does; it does not accept the classes of `lightning.pytorch`.
"""

from __future__ import annotations

from convexheads.integrations import require_version

require_version("pytorch_lightning", "pytorch-lightning>=2,<3", extra="lightning")

from convexheads.integrations.lightning.data import EpisodicDataModule
from convexheads.integrations.lightning.module import EpisodicModule

__all__ = ["EpisodicDataModule", "EpisodicModule"]
