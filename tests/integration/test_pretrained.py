"""Weights of the package and of users: complete, harmless, and those of the right network."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.utils import prune

from convexheads import InputError, Learnable, RidgeHead, SVMHead, _storage, embed, evaluate, load_pretrained
from convexheads.kernels import RBF
from convexheads.models import TRAINING_HEADS, ResNet12, build_head, build_model, list_pretrained, save_pretrained
from convexheads.models.pretrained import WEIGHTS_DIR
from convexheads.solvers import NativeSolver


def settings(backbone: str = "conv4", head: str = "svm", **more: object) -> dict[str, object]:
    return {"backbone": backbone, "head": head, "image_size": 32, "dropblock": "none"} | more


@pytest.mark.parametrize("name", list_pretrained())
def test_what_comes_with_the_package(name: str) -> None:
    trained = load_pretrained(name)
    assert name == f"{trained.settings['backbone']}-{trained.settings['dataset']}-{trained.settings['head']}"
    assert not trained.backbone.training
    assert (WEIGHTS_DIR / f"{name}.safetensors").stat().st_size < 1_000_000
    size, channels = trained.settings["image_size"], trained.backbone.mean.shape[1]
    images = torch.randint(256, (10, channels, size, size), dtype=torch.uint8)
    features = trained.backbone(images)
    logits = trained.head(features, torch.arange(10) % 5, features)
    assert logits.shape == (10, 5)
    assert {type(build_head(trained.settings["head"]))} == {type(trained.head)}
    assert trained.head.scale.value.item() != 1  # it was learned


def test_there_are_some() -> None:
    assert {"conv4-cifar-fs-ridge", "conv4-cifar-fs-svm"} <= set(list_pretrained())


def test_they_are_trained(data_root: Path) -> None:
    """Far above the same network before its training, on unseen classes of real images."""
    from benchmarks.data import load

    data = load("cifar-fs", data_root, splits=("test",))["test"]
    images, labels = data.images[::12], data.labels[::12]
    trained = load_pretrained("conv4-cifar-fs-ridge")
    untrained, head = build_model(trained.settings, images[:500])
    options = {"shots": 5, "episodes": 200, "progress": False}
    means = [
        evaluate(head, embed(backbone, images, progress=False), labels, **options).accuracy
        for backbone in (trained.backbone, untrained)
    ]
    assert means[0] > 0.74
    assert means[0] > means[1] + 0.2


@pytest.mark.parametrize("head", TRAINING_HEADS)
@pytest.mark.parametrize("backbone", ["conv4", "r2d2", pytest.param("resnet12", marks=pytest.mark.slow)])
def test_what_is_saved_comes_back(tmp_path: Path, backbone: str, head: str) -> None:
    examples = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    network, own = build_model(settings(backbone, head), examples)
    network(examples)  # statistics
    with torch.no_grad():
        own.scale.raw_value.fill_(0.5)
    save_pretrained(tmp_path / "model.safetensors", network, own, settings(backbone, head, note="mine"))
    for place in (tmp_path, str(tmp_path), tmp_path / "model.safetensors"):
        trained = load_pretrained(place)
        assert trained.settings == settings(backbone, head, note="mine")
        for before, after in ((network, trained.backbone), (own, trained.head)):
            assert before.state_dict().keys() == after.state_dict().keys()
            for key, value in before.state_dict().items():
                assert torch.equal(value, after.state_dict()[key])
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_unknown_names_list_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"name: expected .*conv4-cifar-fs-ridge, conv4-cifar-fs-svm.*, got 'conv4-mnist-svm'"
    ):
        load_pretrained("conv4-mnist-svm")
    with pytest.raises(InputError, match=r"expected a file or folder of trained weights"):
        load_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"head: expected one of svm, .*ridge, prototypes.*, got 'forest'"):
        build_head("forest")


@pytest.mark.usefixtures("unchecked")  # settings that are no dictionary
def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    examples = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    path, whole = tmp_path / "own.safetensors", tmp_path / "whole.safetensors"
    save_pretrained(whole, *build_model(settings(), examples), settings())
    content = whole.read_bytes()
    malicious = pickle.dumps({"settings": settings()})
    for damaged in (content[:-1000], content[:100], b"", b"no weights", malicious):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"name: expected a complete file.*, got .*own\.safetensors"):
            load_pretrained(path)
    save_file({"layer.weight": torch.zeros(3)}, path)  # without settings
    with pytest.raises(InputError, match=r"expected a complete file"):
        load_pretrained(path)
    for wrong in (settings(backbone="vgg"), settings(head="forest"), {"backbone": "conv4", "head": "svm"}, "conv4"):
        _storage.save(path, {"backbone.mean": torch.zeros(1, 3, 1, 1)}, wrong, key="settings", needed_by="the test")
        with pytest.raises(InputError, match=r"expected a complete file"):
            load_pretrained(path)


def test_images_of_another_range_or_shape_are_refused() -> None:
    """Standardized pixels, say, would give other features without an error."""
    backbone = load_pretrained("conv4-cifar-fs-svm").backbone
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(backbone(images / 255), backbone(images), rtol=1e-4, atol=1e-4)
    for wrong in (images.float(), torch.randn(2, 3, 32, 32), images[:, :1], images[0]):
        with pytest.raises(InputError, match=r"^images: expected"):
            backbone(wrong)


@pytest.mark.parametrize("kind", [str, Path])
def test_paths_may_be_strings(tmp_path: Path, kind: type) -> None:
    path = kind(tmp_path / "own.safetensors")
    save_pretrained(path, *build_model(settings()), settings())
    assert load_pretrained(path).settings == settings()


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    examples = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    state = torch.nn.ModuleDict(dict(zip(("backbone", "head"), build_model(settings(), examples), strict=True)))
    path = tmp_path / "own.safetensors"
    _storage.save(path, state.state_dict(), settings("r2d2"), key="settings", needed_by="the test")
    with pytest.raises(InputError, match=r"own\.safetensors \(not the weights of a r2d2\)"):
        load_pretrained(tmp_path / "own.safetensors")


def test_what_would_not_come_back_is_not_saved(tmp_path: Path) -> None:
    """Arguments are not in the file: a head with another C was once loaded with that of its name."""
    path, (backbone, head) = tmp_path / "own.safetensors", build_model(settings())
    resnet = {"backbone": "resnet12", "head": "svm", "image_size": 32}
    for argument, *wrong in (
        ("head", backbone, SVMHead(C=5.0, scale=Learnable(1.0)), settings()),
        ("head", backbone, SVMHead(C=0.1), settings()),
        ("head", backbone, SVMHead(C=0.1, scale=Learnable(1.0), kernel=RBF(1.0)), settings()),
        ("head", backbone, head, settings(head="ridge")),
        ("backbone", backbone, head, settings("r2d2")),
        ("backbone", backbone, head, settings() | {"image_size": 48}),
        ("backbone", ResNet12(average_pool=True), head, resnet),
        ("backbone", ResNet12(dropblock="none", block_size=3), head, resnet),
    ):
        with pytest.raises(InputError, match=rf"^{argument}: expected"):
            save_pretrained(path, *wrong)
    assert not path.exists()
    generator = torch.get_rng_state()
    save_pretrained(path, backbone, head, settings())
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.usefixtures("unchecked")
def test_errors_of_saving_name_the_wrong_argument(tmp_path: Path) -> None:
    backbone, head = build_model(settings())
    pruned, _ = build_model(settings())
    prune.identity(pruned.layers[0].conv, "weight")
    for argument, *wrong in (
        ("backbone", torch.nn.DataParallel(backbone), head, settings()),
        ("backbone", torch.compile(backbone), head, settings()),
        ("backbone", torch.nn.Linear(2, 2), head, settings()),
        ("backbone", lambda images: images, head, settings()),
        ("backbone", pruned, head, settings()),
        ("backbone", head, backbone, settings()),
        ("head", backbone, "svm", settings()),
        ("settings", backbone, head, {"backbone": "conv4", "head": "svm"}),
        ("settings", backbone, head, {"image_size": 32}),
        ("settings", backbone, head, None),
    ):
        with pytest.raises(InputError, match=rf"^{argument}: expected"):
            save_pretrained(tmp_path / "own.safetensors", *wrong)
    for config in ({"backbone": "conv4"}, None, "conv4"):
        with pytest.raises(InputError, match=r"^config: expected"):
            build_model(config)


def test_another_class_of_the_same_name_is_not_saved(tmp_path: Path) -> None:
    """Its `forward` would be lost: weights of the class in the library were once loaded without an error."""
    backbone, head = build_model(settings())
    other = type("Conv4", (type(backbone),), {"forward": lambda self, images: images.flatten(1)})()
    other_block = build_model(settings())[0]
    other_block.layers[0].relu = type("ReLU", (torch.nn.ReLU,), {"forward": lambda self, value: -value})()
    for own in (other, other_block):
        with pytest.raises(InputError, match=r"^backbone: expected"):
            save_pretrained(tmp_path / "own.safetensors", own, head, settings())
    other_head = type("SVMHead", (SVMHead,), {"solve": RidgeHead.solve})(C=0.1, scale=Learnable(1.0))
    with pytest.raises(InputError, match=r"^head: expected"):
        save_pretrained(tmp_path / "own.safetensors", backbone, other_head, settings())


def test_loading_draws_no_random_numbers() -> None:
    generator = torch.get_rng_state()
    load_pretrained("conv4-cifar-fs-svm")
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("name", ["svm", "ridge"])
def test_settings_that_do_not_belong_to_the_model_may_differ(tmp_path: Path, name: str) -> None:
    """On a GPU, a training switches off the checks of its head, and several processes share batch statistics."""
    backbone, head = build_model(settings(head=name))
    backbone, head.validate = torch.nn.SyncBatchNorm.convert_sync_batchnorm(backbone), False
    if name == "svm":
        head.solver = NativeSolver(on_failure="warn")
    save_pretrained(tmp_path / "own.safetensors", backbone, head, settings(head=name))
    loaded = load_pretrained(tmp_path / "own.safetensors")
    assert repr(loaded[:2]) == repr(build_model(settings(head=name)))
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(loaded.backbone(images), backbone.eval()(images))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    path = tmp_path / "own.safetensors"
    save_pretrained(path, *build_model(settings(), examples), settings())
    before = path.read_bytes()

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:1000])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(path, *build_model(settings(), examples), settings())
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["own.safetensors"]
