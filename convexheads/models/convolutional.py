"""Backbones without residual connections: Conv-4 and the network of R2D2."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from convexheads.models.backbone import NEGATIVE_SLOPE, Backbone


class Conv4(Backbone):
    """Four blocks of 3 x 3 convolution with 64 filters, batch normalization, ReLU and 2 x 2 max pooling.

    This is the network of Vinyals et al. 2016 and Snell et al. 2017. It has 256 features for images of 32 x 32 pixels
    and 1,600 for 84 x 84. The layers and their names are those of learn2learn's `CNN4Backbone`. What differs: the
    initial weights are PyTorch's; learn2learn draws the scale of the normalization between 0 and 1, which nearly
    switches off some channels.

    Use it when training has to be fast, or to compare with published results for Conv-4. The arguments `in_channels`,
    `image_size` (at least 16), `mean` and `std` are those of `Backbone`.

    Example:
        `features = Conv4(in_channels=1)(torch.rand(8, 1, 32, 32))`
    """

    def make_layers(self) -> tuple[nn.Module, int]:
        blocks = [
            nn.Sequential(
                OrderedDict(
                    conv=nn.Conv2d(before, 64, 3, padding=1),
                    normalize=nn.BatchNorm2d(64),
                    pool=nn.MaxPool2d(2),
                    relu=nn.ReLU(),  # after the pooling: the same values and gradients, from a quarter of the numbers
                )
            )
            for before in (self.in_channels, 64, 64, 64)
        ]
        return nn.Sequential(*blocks).to(memory_format=torch.channels_last), 64 * self._positions(4)


class R2D2Network(Backbone):
    """The network of R2D2 (Bertinetto et al. 2019): 96, 192, 384 and 512 filters, outputs of the last two blocks.

    A block is a 3 x 3 convolution, batch normalization, 2 x 2 max pooling and a leaky ReLU, in this order. As in the
    code of Lee et al. 2019, the last two blocks have dropout of 0.1 and 0.3, and there is no activation after the last
    block, as R2D2's accuracy requires. The network has 8,192 features for images of 32 x 32 pixels and 51,200 for
    84 x 84. What differs: the code of Bertinetto et al. has that activation and the same rate of dropout in both
    blocks, and it pools both outputs with stride 1 instead, which gives 8,064 and 72,576 features.

    Use it when you compare with published results for R2-D2. The arguments `in_channels`, `image_size` (at least 16),
    `mean` and `std` are those of `Backbone`.

    Example:
        `features = R2D2Network()(torch.rand(8, 3, 32, 32))`
    """

    def make_layers(self) -> tuple[nn.Module, int]:
        blocks = [
            nn.Sequential(
                nn.Conv2d(before, after, 3, padding=1),
                nn.BatchNorm2d(after),
                nn.MaxPool2d(2),
                nn.LeakyReLU(NEGATIVE_SLOPE) if after < 512 else nn.Identity(),
                nn.Dropout(rate),
            )
            for before, after, rate in ((self.in_channels, 96, 0.0), (96, 192, 0.0), (192, 384, 0.1), (384, 512, 0.3))
        ]
        return _ConcatLastTwo(*blocks), 384 * self._positions(3) + 512 * self._positions(4)


class _ConcatLastTwo(nn.Sequential):
    """Applies modules in turn and concatenates the flattened outputs of the last two."""

    def forward(self, value: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        *first, last = self
        for module in first:
            value = module(value)
        return torch.cat([value.flatten(1), last(value).flatten(1)], 1)
