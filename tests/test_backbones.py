"""The networks: feature sizes, parameters, what is random in training and what is kept."""

from __future__ import annotations

import pytest
import torch
from learn2learn.vision.models import CNN4Backbone, ResNet12Backbone
from torch import nn

from benchmarks.backbones import BACKBONES, DropBlock, ResNet12, make_backbone
from convexheads import InputError


def pictures(n: int, size: int) -> torch.Tensor:
    return torch.randint(256, (n, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def parameters(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


@pytest.mark.parametrize(
    ("name", "size", "features"),
    [
        ("conv4", 84, 1600),  # the two sizes of Table 3
        ("resnet12", 84, 16000),
        ("conv4", 32, 256),
        ("resnet12", 32, 2560),
        ("r2d2", 32, 384 * 16 + 512 * 4),
        ("r2d2", 84, 384 * 100 + 512 * 25),
        ("wrn28", 84, 640),
    ],
)
def test_feature_sizes(name: str, size: int, features: int) -> None:
    images = pictures(2, size)
    backbone = make_backbone(name, images).eval()
    with torch.no_grad():
        found = backbone(images)
    assert found.shape == (2, features)
    assert torch.isfinite(found).all()
    assert {"mean", "deviation"} < backbone.state_dict().keys()


def test_as_many_parameters_as_learn2learns() -> None:
    assert parameters(make_backbone("conv4", pictures(2, 32))) == parameters(
        CNN4Backbone(hidden_size=64, channels=3, max_pool=True)
    )
    ours = parameters(make_backbone("resnet12", pictures(2, 32)))
    assert ours == parameters(ResNet12Backbone(avg_pool=False))


def test_resnet12_computes_what_learn2learns_does() -> None:
    """With its weights, in evaluation mode, where nothing is dropped."""
    images = pictures(2, 84)
    ours, theirs = ResNet12(images, average_pool=True), ResNet12Backbone(avg_pool=True)
    for module in theirs.modules():  # statistics that are not trivial
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    for kind in (nn.Conv2d, nn.BatchNorm2d):
        pairs = zip(*([m for m in net.modules() if isinstance(m, kind)] for net in (ours, theirs)), strict=True)
        for mine, other in pairs:
            mine.load_state_dict(other.state_dict())
    with torch.no_grad():
        expected = theirs.eval()((images - ours.mean) / ours.deviation)
        found = ours.eval()(images)
    torch.testing.assert_close(found, expected.flatten(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["conv4", "r2d2", "resnet12"])
def test_gradients_reach_every_parameter(name: str) -> None:
    images = pictures(4, 32)
    backbone = make_backbone(name, images)
    backbone(images).square().mean().backward()
    for parameter, value in backbone.named_parameters():
        assert value.grad is not None, parameter
        assert value.grad.abs().max() > 0 or parameter.endswith("bias"), parameter


def test_dropblock_drops_blocks_and_keeps_the_mean() -> None:
    layer, value = DropBlock(5, grow=False), torch.ones(8, 16, 20, 20)
    dropped = layer(value)
    share = (dropped == 0).double().mean()
    assert 0.05 < share < 0.15
    assert dropped.mean() == pytest.approx(1, abs=0.01)
    # every dropped unit lies in a block of 5 x 5 dropped ones
    gone = (dropped == 0).float()
    full = (nn.functional.avg_pool2d(gone, 5, stride=1) > 0.999).float()
    covered = nn.functional.max_pool2d(nn.functional.pad(full, [4] * 4), 5, stride=1)
    assert torch.equal(covered, gone)
    assert torch.equal(layer.eval()(value), value)


def test_the_official_share_grows_with_training_steps_alone() -> None:
    layer, value = DropBlock(2, grow=True), torch.ones(4, 8, 16, 16)
    assert (layer(value) == 0).double().mean() < 1e-3
    layer.eval()(value)
    assert layer.state_dict()["steps"] == 1
    layer.load_state_dict({"steps": torch.tensor(20_000)})
    assert (layer.train()(value) == 0).double().mean() == pytest.approx(0.05, abs=0.02)
    layer.load_state_dict({"steps": torch.tensor(400_000)})
    assert (layer(value) == 0).double().mean() == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize("dropblock", ["paper", "official", "none"])
def test_random_in_training_only(dropblock: str) -> None:
    images = pictures(4, 32)
    backbone = make_backbone("resnet12", images, dropblock=dropblock)
    random = not torch.equal(backbone(images), backbone(images))
    assert random is (dropblock != "none")
    backbone.eval()
    assert torch.equal(backbone(images), backbone(images))
    sizes = [module.size for module in backbone.modules() if isinstance(module, DropBlock)]
    assert sizes == ([] if dropblock == "none" else [2, 2])


def test_refuses_what_there_is_not() -> None:
    images = pictures(2, 32)
    with pytest.raises(InputError, match=f"wanted one of {', '.join(BACKBONES)}"):
        make_backbone("vgg", images)
    with pytest.raises(InputError, match="conv4 with"):
        make_backbone("conv4", images, dropblock="paper")
    with pytest.raises(InputError, match="wanted one of paper, official, none"):
        make_backbone("resnet12", images, dropblock="some")
    with pytest.raises(InputError, match=r"images of \(3, 32, 32\), wanted \(3, 84, 84\)"):
        make_backbone("wrn28", images)
