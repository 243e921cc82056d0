"""`python tests/two_processes.py ARGUMENTS`: benchmarks.train with a backbone without batch statistics.

A script of its own, because the first process starts the others by running the same command again.
"""

import sys

import torch
from torch import nn

from benchmarks import train
from convexheads.models import build_head


class Linear(nn.Module):
    """Sixteen features of the pixels, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32 * 32, 16, dtype=torch.float64)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(train.Pixels()(images).double())


if __name__ == "__main__":
    train.build_model = lambda settings, examples: (Linear(), build_head(settings["head"]))
    train.main(sys.argv[1:])
