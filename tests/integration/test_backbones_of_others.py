"""The networks compute what learn2learn's and torchvision's do."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from learn2learn.vision.models import CNN4Backbone, ResNet12Backbone
from torch import nn
from torchvision.ops import DropBlock2d

from convexheads.models import Conv4, DropBlock, ResNet12, build_backbone


def pictures(n: int, size: int) -> torch.Tensor:
    return torch.randint(256, (n, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def parameters(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


def test_as_many_parameters_as_learn2learns() -> None:
    images = pictures(2, 32)
    conv4 = CNN4Backbone(hidden_size=64, channels=3, max_pool=True)
    assert parameters(build_backbone("conv4", images)) == parameters(conv4) == 113_088
    assert parameters(build_backbone("resnet12", images)) == parameters(ResNet12Backbone(avg_pool=False)) == 12_424_320
    widths = (3, 96, 192, 384, 512)  # weights and biases of convolutions, scales and offsets of normalizations
    by_hand = sum(9 * before * after + 3 * after for before, after in pairwise(widths))
    assert parameters(build_backbone("r2d2", images)) == by_hand


def test_initial_weights_of_resnet12_are_those_of_the_published_code() -> None:
    """Of variance 2 over the outputs' connections: as for a slope of 0. So has learn2learn, which took over that code."""
    ours, theirs = ResNet12(), ResNet12Backbone()
    for network in (ours, theirs):
        weight = [module.weight for module in network.modules() if isinstance(module, nn.Conv2d)][-2]
        assert weight.shape == (640, 640, 3, 3)
        assert weight.std().item() == pytest.approx((2 / (640 * 9)) ** 0.5, rel=2e-3)


def test_resnet12_computes_what_learn2learns_does() -> None:
    """With its weights, in evaluation mode, where nothing is dropped."""
    images = pictures(2, 84)
    ours, theirs = ResNet12.from_images(images, average_pool=True), ResNet12Backbone(avg_pool=True)
    for module in theirs.modules():  # statistics that are not trivial
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    for kind in (nn.Conv2d, nn.BatchNorm2d):
        pairs = zip(*([m for m in net.modules() if isinstance(m, kind)] for net in (ours, theirs)), strict=True)
        for mine, other in pairs:
            mine.load_state_dict(other.state_dict())
    with torch.no_grad():
        expected = theirs.eval()((images - ours.mean) / ours.std)
        found = ours.eval()(images)
    torch.testing.assert_close(found, expected.flatten(1), rtol=1e-4, atol=1e-4)


def test_conv4_computes_what_learn2learns_does() -> None:
    """With its weights, which have the same names."""
    images = pictures(4, 32)
    ours, theirs = Conv4.from_images(images).eval(), CNN4Backbone(hidden_size=64, channels=3, max_pool=True).eval()
    for layer in theirs.modules():  # statistics that are not trivial
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    ours.layers.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        expected = theirs((images - ours.mean) / ours.std)
        torch.testing.assert_close(ours(images), expected.flatten(1), rtol=1e-4, atol=1e-4)


def test_dropblock_drops_as_much_as_torchvisions() -> None:
    """Which takes odd sizes only."""
    value = torch.ones(16, 64, 20, 20)
    ours, theirs = ((layer(value) == 0).double().mean().item() for layer in (DropBlock(5), DropBlock2d(0.1, 5)))
    assert ours == pytest.approx(theirs, abs=0.01)
