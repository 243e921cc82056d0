"""The networks: feature sizes, parameters, what is random in training and what is kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from convexheads import InputError
from convexheads.models import BACKBONES, Backbone, Conv4, DropBlock, ResNet12, build_backbone


def pictures(n: int, size: int) -> torch.Tensor:
    return torch.randint(256, (n, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def parameters(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


@pytest.mark.parametrize(
    ("name", "size", "features"),
    [
        ("conv4", 84, 1600),  # the two sizes of Table 3
        pytest.param("resnet12", 84, 16000, marks=pytest.mark.slow),
        ("conv4", 32, 256),
        ("resnet12", 32, 2560),
        ("r2d2", 32, 384 * 16 + 512 * 4),
        ("r2d2", 84, 384 * 100 + 512 * 25),
    ],
)
def test_feature_sizes(name: str, size: int, features: int) -> None:
    images = pictures(2, size)
    backbone = build_backbone(name, images).eval()
    with torch.no_grad():
        found = backbone(images)
    assert found.shape == (2, features)
    assert backbone.num_features == features
    assert torch.isfinite(found).all()
    assert {"mean", "std"} < backbone.state_dict().keys()


@pytest.mark.parametrize("size", [32, pytest.param(84, marks=pytest.mark.slow)])
def test_average_pooling_is_the_mean_over_positions(size: int) -> None:
    images = pictures(2, size)
    backbone, pooled = ResNet12.from_images(images).eval(), ResNet12.from_images(images, average_pool=True).eval()
    pooled.load_state_dict(backbone.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(pooled(images), backbone(images).unflatten(1, (640, -1)).mean(2))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", BACKBONES)
def test_any_channels(name: str, channels: int) -> None:
    images = pictures(2, 32)[:, :channels]
    assert build_backbone(name, images).eval()(images).ndim == 2


def test_names_in_the_state_of_conv4() -> None:
    """Weights on disk are kept by these."""
    normalization = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    parts = [f"normalize.{name}" for name in normalization] + ["conv.weight", "conv.bias"]
    wanted = {"mean", "std"} | {f"layers.{number}.{part}" for number in range(4) for part in parts}
    assert Conv4().state_dict().keys() == wanted


def test_pixels_are_standardised_by_the_examples() -> None:
    images = pictures(8, 32)
    backbone = Conv4.from_images(images)
    backbone.layers = nn.Identity()
    values = backbone(images).unflatten(1, (3, 32, 32))
    torch.testing.assert_close(values.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(values.std((0, 2, 3)), torch.ones(3))
    torch.testing.assert_close(values[0, 1] * backbone.std[0, 1] + backbone.mean[0, 1], images[0, 1].float())


def test_float_images_are_pixels_from_0_to_1() -> None:
    images = pictures(4, 32)
    backbone, same = Conv4.from_images(images).eval(), Conv4.from_images(images / 255).eval()
    torch.testing.assert_close(same.mean, backbone.mean)
    torch.testing.assert_close(same.std, backbone.std)
    for dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(backbone((images / 255).to(dtype)), backbone(images), rtol=1e-4, atol=1e-4)
    overshooting = (images / 255).requires_grad_()
    (backbone(overshooting * 1.2 - 0.1)).sum().backward()
    assert overshooting.grad.abs().sum() > 0
    for wrong in (images.float(), (images - backbone.mean) / backbone.std, images.long(), images[0], images[:, :1]):
        with pytest.raises(InputError, match=r"^images: expected"):
            backbone(wrong)


def test_mean_and_std_are_those_of_torchvision() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    backbone = Conv4(image_size=16, mean=mean, std=std)
    assert backbone.mean.shape == backbone.std.shape == (1, 3, 1, 1)
    backbone.layers = nn.Identity()
    pixels = pictures(2, 16)
    expected = (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(backbone(pixels), expected.flatten(1), rtol=1e-5, atol=1e-5)
    for wrong in ({"mean": (0.5, 0.5)}, {"std": 0.0}, {"std": float("nan")}, {"in_channels": 0}, {"image_size": 0}):
        with pytest.raises(InputError):
            Conv4(**wrong)


def test_settings_replace_those_of_the_example_images() -> None:
    backbone = Conv4.from_images(pictures(2, 32), image_size=16, mean=0.5)
    assert backbone.image_size == (16, 16)
    assert backbone.mean.flatten().tolist() == [127.5] * 3
    assert torch.equal(backbone.std, Conv4.from_images(pictures(2, 32)).std)


@pytest.mark.parametrize("floats", [True, False])
@pytest.mark.parametrize("name", BACKBONES)
def test_export_vmap_and_the_meta_device(name: str, floats: bool) -> None:
    """None of them allows code that depends on values."""
    images = pictures(2, 16) / 255 if floats else pictures(2, 16)
    backbone = build_backbone(name, image_size=16).eval()
    exported = torch.export.export(backbone, (images,)).module()
    torch.testing.assert_close(exported(images), backbone(images))
    tasks = torch.stack([images, images.flip(0)])
    expected = torch.stack([backbone(task) for task in tasks])
    torch.testing.assert_close(torch.func.vmap(backbone)(tasks), expected, rtol=1e-4, atol=1e-4)
    with torch.device("meta"):
        shapes = build_backbone(name, image_size=16)(images.to("meta")).shape
    assert shapes == (2, backbone.num_features)


@pytest.mark.usefixtures("unchecked")
def test_images_that_are_no_tensor_and_maps_without_a_batch_are_refused() -> None:
    for wrong in (pictures(2, 32).numpy(), [1], None):
        with pytest.raises(InputError, match=r"^images: expected"):
            Conv4()(wrong)
    with pytest.raises(InputError, match=r"^value: expected"):
        DropBlock(2)(torch.rand(10, 10, 10))


def test_a_backbone_of_ones_own_has_one_method() -> None:
    class Pooled(Backbone):
        def make_layers(self) -> tuple[nn.Module, int]:
            return nn.AdaptiveAvgPool2d(1), self.in_channels

    backbone = Pooled.from_images(pictures(2, 16))
    assert backbone.num_features == 3
    torch.testing.assert_close(backbone(pictures(2, 16)).mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    with pytest.raises(NotImplementedError):
        Backbone()


def test_the_statistics_of_images_keep_their_bits() -> None:
    images = pictures(8, 32)
    std, mean = torch.std_mean(images.float(), dim=(0, 2, 3), keepdim=True)
    backbone = Conv4.from_images(images)
    assert torch.equal(backbone.mean, mean)
    assert torch.equal(backbone.std, std)
    assert torch.isfinite(Conv4.from_images(torch.zeros(2, 3, 32, 32)).eval()(images)).all()  # no division by zero


@pytest.mark.parametrize("name", BACKBONES)
def test_features_of_images_that_are_not_square(name: str) -> None:
    images = torch.randint(256, (2, 1, 48, 32), dtype=torch.uint8)
    backbone = build_backbone(name, images).eval()
    assert backbone(images).shape == (2, backbone.num_features)


def test_r2d2_computes_what_is_described() -> None:
    images = pictures(2, 84)
    backbone = build_backbone("r2d2", images).eval()
    value, outputs = (images - backbone.mean) / backbone.std, []
    with torch.no_grad():
        for number, block in enumerate(backbone.layers):
            value = functional.conv2d(value, block[0].weight, block[0].bias, padding=1)
            value = functional.max_pool2d(value / (1 + 1e-5) ** 0.5, 2)  # a new normalization
            value = value if number == 3 else torch.where(value > 0, value, 0.1 * value)
            outputs.append(value.flatten(1))
        torch.testing.assert_close(backbone(images), torch.cat(outputs[2:], 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BACKBONES)
def test_gradients_reach_every_parameter(name: str) -> None:
    images = pictures(4, 32)
    backbone = build_backbone(name, images)
    backbone(images).square().mean().backward()
    for parameter, value in backbone.named_parameters():
        assert value.grad is not None, parameter
        assert value.grad.abs().max() > 0 or parameter.endswith("bias"), parameter


def test_dropblock_drops_blocks_and_keeps_the_mean() -> None:
    layer, value = DropBlock(5, drop_prob=0.1), torch.ones(8, 16, 20, 20)
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dropblock_in_other_precisions(dtype: torch.dtype) -> None:
    dropped = DropBlock(2, drop_prob=0.1)(torch.ones(8, 64, 16, 16, dtype=dtype))
    assert dropped.dtype == dtype
    assert dropped.double().mean() == pytest.approx(1, abs=0.01)


def test_the_rate_of_the_reference_code_grows_with_training_steps_alone() -> None:
    layer, value = DropBlock(2, warmup_steps=40_000), torch.ones(16, 64, 16, 16)
    assert (layer(value) == 0).double().mean() < 1e-3
    layer.eval()(value)
    assert layer.state_dict()["steps"] == 1
    layer.load_state_dict({"steps": torch.tensor(20_000)})
    assert (layer.train()(value) == 0).double().mean() == pytest.approx(0.05, abs=0.01)
    layer.load_state_dict({"steps": torch.tensor(400_000)})
    assert (layer(value) == 0).double().mean() == pytest.approx(0.1, abs=0.01)


def test_the_rate_of_the_reference_code_goes_on_from_a_checkpoint() -> None:
    images = pictures(4, 32)
    backbone, resumed = (build_backbone("resnet12", images, dropblock="reference_code") for _ in range(2))
    for name, buffer in backbone.named_buffers():
        if name.endswith("steps"):
            buffer.fill_(30_000)
    backbone(images)
    resumed.load_state_dict(backbone.state_dict())
    assert [int(value) for name, value in resumed.named_buffers() if name.endswith("steps")] == [30_001, 30_001]
    outputs = []
    for network in (backbone, resumed):
        torch.manual_seed(1)
        outputs.append(network(images))
    assert torch.equal(*outputs)


def test_dropout_of_r2d2_in_training_only() -> None:
    images = pictures(4, 32)
    backbone = build_backbone("r2d2", images)
    assert not torch.equal(backbone(images), backbone(images))
    backbone.eval()
    assert torch.equal(backbone(images), backbone(images))


@pytest.mark.parametrize("dropblock", ["paper", "reference_code", "none"])
def test_random_in_training_only(dropblock: str) -> None:
    images = pictures(4, 32)
    backbone = build_backbone("resnet12", images, dropblock=dropblock)
    random = not torch.equal(backbone(images), backbone(images))
    assert random is (dropblock != "none")
    backbone.eval()
    assert torch.equal(backbone(images), backbone(images))
    sizes = [module.block_size for module in backbone.modules() if isinstance(module, DropBlock)]
    assert sizes == ([] if dropblock == "none" else [2, 2])


def test_the_size_of_blocks_follows_from_that_of_images_unless_given() -> None:
    def sizes(images: torch.Tensor, **settings: int) -> list[int]:
        return [
            layer.block_size
            for layer in ResNet12.from_images(images, **settings).modules()
            if isinstance(layer, DropBlock)
        ]

    assert sizes(pictures(2, 84)) == [5, 5]
    assert sizes(pictures(2, 32), block_size=3) == [3, 3]
    assert sizes(pictures(2, 32), block_size=1) == [1, 1]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrong", [0, 8, (32, 8), (32, 32, 3), (32,), [], "32", (32, None), 32.0, None], ids=repr)
def test_an_unusable_image_size_is_refused(wrong: object) -> None:
    for make in (Conv4, lambda image_size: ResNet12(image_size=image_size, average_pool=True)):
        with pytest.raises(InputError, match=r"^image_size: expected"):
            make(image_size=wrong)


def test_an_image_size_may_be_a_list() -> None:
    """YAML and JSON have no tuples."""
    assert Conv4(image_size=[32, 48]).image_size == (32, 48)


@pytest.mark.parametrize("name", BACKBONES)
def test_images_of_another_size_are_refused(name: str) -> None:
    """They once gave another number of features than `num_features`."""
    with pytest.raises(InputError, match=r"images: expected \(n, 3, 32, 32\) .*, got shape \(2, 3, 64, 64\)"):
        build_backbone(name, image_size=32)(pictures(2, 64))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrong", ["a", None, ["a", "b", "c"], torch.nan, [0.5, [0.5], 0.5], {}], ids=repr)
def test_what_is_no_number_is_refused(wrong: object) -> None:
    for name in ("mean", "std"):
        with pytest.raises(InputError, match=rf"^{name}: expected"):
            Conv4(**{name: wrong})
    with pytest.raises(InputError, match=r"^drop_prob: expected a number that is at least 0 and below 1, got"):
        DropBlock(3, drop_prob=wrong)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "wrong"), [("std", 1e-50), ("std", 1e300), ("mean", 1e300), pytest.param("mean", 10**400, id="mean-huge")]
)
def test_statistics_beyond_float32_are_refused(name: str, wrong: float) -> None:
    with pytest.raises(InputError, match=rf"^{name}: expected"):
        Conv4(**{name: wrong})


def test_refuses_what_there_is_not() -> None:
    images = pictures(2, 32)
    with pytest.raises(InputError, match=rf"expected one of {', '.join(BACKBONES)}"):
        build_backbone("vgg", images)
    with pytest.raises(InputError, match=r"^backbone: expected settings of conv4, got"):
        build_backbone("conv4", images, dropblock="paper")
    with pytest.raises(InputError, match=r"expected one of paper, reference_code, none"):
        build_backbone("resnet12", images, dropblock="some")
    with pytest.raises(InputError, match=r"block_size: expected .*, got 0"):
        build_backbone("resnet12", images, block_size=0)
