"""A folder for each class in, a saved classifier out: on real text and images, from Python and as a command."""

from __future__ import annotations

import csv
import importlib
import inspect
import io
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from tasks import ROOT
from torch.nn import functional

import convexheads
from convexheads import InputError, PrototypeHead
from convexheads.cli import FolderClassifier
from convexheads.cli._features import extract_features, load_feature_extractor
from convexheads.cli.folder import FOLDER_HEADS
from convexheads.models import build_model, save_pretrained, unit_scale_logistic
from convexheads_cli import main


def docstrings(module: str, count: int) -> list[str]:
    """The documentation of the first functions and classes of a module: real text that comes with a dependency."""
    members = inspect.getmembers(importlib.import_module(module), lambda member: callable(member))
    texts = [inspect.getdoc(member) or "" for _, member in members]
    return [text for text in texts if len(text) > 200][:count]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six docstrings of each of four libraries to fit on, ten to predict."""
    root = tmp_path_factory.mktemp("texts")
    for module in ("numpy.linalg", "pandas", "torch.optim", "sklearn.metrics"):
        for number, text in enumerate(docstrings(module, 16)):
            folder = root / ("train" if number < 6 else "test") / module
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize("head", FOLDER_HEADS)
def test_text_is_told_apart_after_a_few_examples(texts: Path, head: str) -> None:
    classifier = FolderClassifier.from_folder(texts / "train", features="text", head=head)
    assert classifier.classes == ("numpy.linalg", "pandas", "sklearn.metrics", "torch.optim")
    files = sorted((texts / "test").rglob("*.txt"))
    predictions = classifier.predict(files)
    right = [prediction.label == prediction.path.parent.name for prediction in predictions]
    assert sum(right) / len(right) > 0.85  # chance is 0.25
    for path, label, probabilities in predictions:
        assert path in files
        assert sum(probabilities.values()) == pytest.approx(1)
        assert label == max(probabilities, key=lambda name: probabilities[name])
    assert classifier.scale is not None
    loss = -sum(math.log(p.probabilities[p.path.parent.name]) for p in predictions) / len(predictions)
    assert loss < math.log(4) / 2


def test_saved_and_loaded_it_predicts_the_same(texts: Path, tmp_path: Path) -> None:
    classifier = FolderClassifier.from_folder(texts / "train", features="text", head="svm")
    classifier.save(tmp_path / "own.safetensors")
    files = sorted((texts / "test").rglob("*.txt"))
    assert FolderClassifier.load(tmp_path / "own.safetensors").predict(files) == classifier.predict(files)
    assert [path.name for path in tmp_path.iterdir()] == ["own.safetensors"]


def test_the_head_sees_features_of_length_one(tmp_path: Path) -> None:
    rows = torch.tensor([[1.0, 2.0], [2.0, 1.0], [3.0, 5.0]])
    for name, row in zip("abc", rows, strict=True):
        (tmp_path / "train" / name).mkdir(parents=True)
        np.save(tmp_path / "train" / name / "x.npy", row.numpy())
    classifier = FolderClassifier.from_folder(tmp_path / "train", features="npy")
    assert classifier.scale is None
    query = tmp_path / "train" / "b" / "x.npy"
    (prediction,) = classifier.predict([query])
    unit = functional.normalize(rows.double(), dim=-1)
    expected = unit_scale_logistic()(unit, torch.arange(3), unit[1:2]).softmax(-1)
    assert list(prediction.probabilities.values()) == pytest.approx(expected[0].tolist())
    assert classifier.predict([]) == []


def test_a_calibration_of_many_classes_has_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some heads need an n x n matrix per class of each episode; for 50 episodes of these classes that is 10 GB."""
    entries = []

    class Recording(PrototypeHead):
        def fit(self, support: torch.Tensor, *args: Any, ways: int, **kwargs: Any) -> Any:
            entries.append(support[..., 0].numel() * support.shape[-2] * ways)
            return super().fit(support, *args, ways=ways, **kwargs)

    monkeypatch.setitem(FOLDER_HEADS, "prototypes", Recording)
    generator = np.random.default_rng(0)
    for name in map(str, range(100)):
        (tmp_path / name).mkdir()
        center = generator.normal(size=256)
        for number in range(6):
            np.save(tmp_path / name / f"{number}.npy", center + 2 * generator.normal(size=256))
    classifier = FolderClassifier.from_folder(tmp_path, features="npy", head="prototypes")
    assert classifier.scale is not None
    *episodes, last = (8 * count for count in entries)  # bytes; the last fit is that of all files
    assert max(episodes) <= last / 4
    assert sum(episodes) <= last


@pytest.mark.parametrize("kind", [str, Path])
def test_paths_may_be_strings(tmp_path: Path, kind: type) -> None:
    for name, row in zip("ab", np.eye(2), strict=True):
        (tmp_path / "train" / name).mkdir(parents=True)
        np.save(tmp_path / "train" / name / "x.npy", row)
    saved, query = kind(tmp_path / "own.safetensors"), kind(tmp_path / "train" / "b" / "x.npy")
    FolderClassifier.from_folder(kind(tmp_path / "train"), features="npy").save(saved)
    (prediction,) = FolderClassifier.load(saved).predict([query])
    assert prediction.label == "b"


def test_images_by_a_pretrained_backbone(tmp_path: Path) -> None:
    digits = load_digits(n_class=4)
    for number, (pixels, label) in enumerate(zip(digits.images[:120], digits.target[:120], strict=True)):
        folder = tmp_path / ("train" if number < 60 else "test") / f"digit {label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15).astype(np.uint8)).save(folder / f"{number}.png")
    classifier = FolderClassifier.from_folder(tmp_path / "train", features="conv4-cifar-fs-ridge")
    predictions = classifier.predict(sorted((tmp_path / "test").rglob("*.png")))
    right = [prediction.label == prediction.path.parent.name for prediction in predictions]
    assert sum(right) / len(right) > 0.9


def test_weights_from_a_path_for_images_that_are_not_square(tmp_path: Path) -> None:
    settings = {"backbone": "conv4", "head": "prototypes", "image_size": [16, 32]}  # height, width
    weights = tmp_path / "own.safetensors"
    save_pretrained(weights, *build_model(settings, torch.randint(256, (4, 3, 16, 32), dtype=torch.uint8)), settings)
    for name, box in {"left": (0, 0, 32, 32), "right": (32, 0, 64, 32)}.items():
        for number in range(2):
            image = Image.new("RGB", (64, 32))
            image.paste((200, 100, 50 + number), box)
            (tmp_path / "train" / name).mkdir(parents=True, exist_ok=True)
            image.save(tmp_path / "train" / name / f"{number}.png")
    classifier = FolderClassifier.from_folder(tmp_path / "train", features=weights)
    classifier.save(tmp_path / "classifier.safetensors")
    loaded = FolderClassifier.load(tmp_path / "classifier.safetensors")
    (prediction,) = loaded.predict([tmp_path / "train" / "right" / "0.png"])
    assert prediction.label == "right"
    weights.unlink()
    expected = (
        r"features: expected one of text, npy.*, an existing file of weights, or MODULE.*, got .*own\.safetensors"
    )
    with pytest.raises(InputError, match=expected):
        FolderClassifier.load(tmp_path / "classifier.safetensors")
    with pytest.raises(InputError, match=expected):
        FolderClassifier.from_folder(tmp_path / "train", features=weights)


def test_photos_are_turned_as_their_cameras_say(tmp_path: Path) -> None:
    """The pixels of a photo that was taken upright are stored sideways, with an orientation in the metadata."""
    upright = Image.fromarray(np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8))
    upright.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[274] = 6  # turn clockwise by 90 degrees to view it
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "stored.png", exif=exif)
    extractor = load_feature_extractor("conv4-cifar-fs-ridge")
    expected, found = extract_features(extractor, [tmp_path / "upright.png", tmp_path / "stored.png"])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_images_that_would_be_clipped_to_8_bits_are_refused(tmp_path: Path, kind: type) -> None:
    Image.fromarray(np.full((32, 32), 1000, dtype=kind)).save(tmp_path / "x.tiff")
    extractor = load_feature_extractor("conv4-cifar-fs-ridge")
    with pytest.raises(InputError, match=r"file: expected .*, got .*x\.tiff \(.*mode [IF]"):
        extract_features(extractor, [tmp_path / "x.tiff"])


def test_as_a_command(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classifier = tmp_path / "own.safetensors"
    main(["fit", str(texts / "train"), "--output", str(classifier)])
    assert "own.safetensors: 4 classes, numpy.linalg, pandas, sklearn.metrics, torch.optim\n" in capsys.readouterr().out
    main(["predict", str(classifier), str(texts / "test")])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    main(["predict", str(classifier), *(row["file"] for row in rows), "--output", str(tmp_path / "out.csv")])
    with (tmp_path / "out.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == rows
    predictions = FolderClassifier.load(classifier).predict([row["file"] for row in rows])
    assert [row["label"] for row in rows] == [prediction.label for prediction in predictions]
    assert len(rows) == len(list((texts / "test").rglob("*.txt")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"files: expected .*, got no file in .*empty"):
        main(["predict", str(classifier), str(tmp_path / "empty")])
    one = dict.fromkeys(("a", "b"))
    for name in one:
        (tmp_path / "one" / name).mkdir(parents=True)
        (tmp_path / "one" / name / "x.txt").write_text(name)
    main(["fit", str(tmp_path / "one"), "--output", str(classifier)])
    assert "probabilities are not calibrated" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "{0}/nowhere"], r"folder: expected a folder that contains.*, got .*nowhere"),
        (["fit", "{0}/train/pandas"], r"expected at least 2 class folders, got .* with 0 of them"),
        (
            ["fit", "{0}/train", "--features", "vgg"],
            r"features: expected one of text, npy, images, conv4-cifar-fs-prototypes.*, got 'vgg'",
        ),
        (["fit", "{0}/train", "--features", "nowhere:f"], r"expected a function of a module that can be imported"),
        (
            ["fit", "{0}/train", "--features", "math:pi"],
            r"expected a function of a module.*, got 'math:pi' \(.*callable",
        ),
        (["fit", "{0}/train", "--features", ":f"], r"expected a function of a module that can be imported, got ':f'"),
        (["fit", "{0}/train", "--features", ".x:f"], r"expected a function of a module that can be imported"),
        (["fit", "{0}/train", "--features", "npy"], r"file: expected a file that can be read.*, got .*0\.txt \("),
        (["fit", "{0}/train", "--output", "{0}/nowhere/x"], r"output: expected a file in a folder.*, got .*nowhere/x"),
        (["fit", "{0}/train", "--output", "{0}/train"], r"output: expected a file in a folder.*, got .*train"),
        (["predict", "{0}/nowhere", "x.txt"], r"classifier: expected .*, got .*nowhere"),
    ],
)
def test_errors_say_what_is_wrong(texts: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main([argument.format(texts) for argument in arguments])


def test_images_without_a_backbone_are_an_error_that_says_so(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "x.png")
    with pytest.raises(InputError, match=r"--features.*x\.png"):
        FolderClassifier.from_folder(tmp_path, features="text")


@pytest.mark.filterwarnings("always")
def test_files_that_windows_adds_are_no_examples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "x.npy", np.eye(2)["ab".index(name)])
        for junk in ("Thumbs.db", "desktop.ini", ".DS_Store"):
            (tmp_path / name / junk).write_bytes(b"junk")
    with pytest.warns(UserWarning, match=r"6 files"):
        FolderClassifier.from_folder(tmp_path, features="npy").save(tmp_path / "own.safetensors")
    main(["predict", str(tmp_path / "own.safetensors"), str(tmp_path / "a"), str(tmp_path / "b")])
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_files_in_hidden_folders_are_not_classified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / ".hidden"  # the folder that the user names may be hidden itself
    for name in "ab":
        for folder in (root / name, root / name / ".ipynb_checkpoints" / "deep"):
            folder.mkdir(parents=True)
            np.save(folder / "x.npy", np.eye(2)["ab".index(name)])
    FolderClassifier.from_folder(root, features="npy").save(tmp_path / "own.safetensors")
    main(["predict", str(tmp_path / "own.safetensors"), str(root)])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["file"] for row in rows] == [str(root / name / "x.npy") for name in "ab"]


def test_names_do_not_depend_on_the_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, row in zip(("日", "本"), np.eye(2), strict=True):
        (tmp_path / "train" / name).mkdir(parents=True)
        np.save(tmp_path / "train" / name / "x.npy", row)

    def run(*arguments: str) -> bytes:
        command = [sys.executable, "-m", "convexheads", *arguments]
        environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, check=True).stdout

    assert rb"\u65e5, \u672c" in run("fit", "train", "--features", "npy")
    shown = run("predict", "classifier.safetensors", "train").splitlines(keepends=True)
    assert shown[0] == rb"file,label,\u65e5,\u672c" + os.linesep.encode()
    monkeypatch.chdir(tmp_path)
    main(["predict", "classifier.safetensors", "train", "--output", "out.csv"])
    assert (tmp_path / "out.csv").read_text(encoding="utf-8").startswith("file,label,日,本\n")


def test_the_command_tells_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.split() == ["convexheads", convexheads.__version__]


def test_unusable_files_are_named(texts: Path, tmp_path: Path) -> None:
    classifier = FolderClassifier.from_folder(texts / "train", features="text")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(InputError, match=r"file: expected .*, got .*latin\.txt"):
        classifier.predict([tmp_path / "latin.txt"])
    (tmp_path / "empty.txt").write_text(" ")
    with pytest.raises(InputError, match=r"file: expected .*, got .*empty\.txt without any text"):
        classifier.predict([tmp_path / "empty.txt"])
    with pytest.raises(InputError, match=r"missing\.txt, which is not a file"):
        classifier.predict([tmp_path / "missing.txt"])
    (tmp_path / "classes" / "a").mkdir(parents=True)
    (tmp_path / "classes" / "b").mkdir()
    (tmp_path / "classes" / "a" / "x.npy").write_bytes(pickle.dumps([1.0]))
    with pytest.raises(InputError, match="class 'b' without any file"):
        FolderClassifier.from_folder(tmp_path / "classes", features="npy")
    (tmp_path / "classes" / "b" / "x.npy").write_bytes(pickle.dumps([1.0]))
    with pytest.raises(InputError, match=r"file: expected .*, got .*a/x\.npy"):  # nothing is unpickled
        FolderClassifier.from_folder(tmp_path / "classes", features="npy")
    (tmp_path / "classes" / "a" / "x.npy").write_bytes(b"")
    with pytest.raises(InputError, match=r"file: expected .*, got .*a/x\.npy"):
        FolderClassifier.from_folder(tmp_path / "classes", features="npy")
    np.save(tmp_path / "classes" / "a" / "x.npy", np.ones(3))
    np.save(tmp_path / "classes" / "b" / "x.npy", np.zeros(3))
    with pytest.raises(
        InputError,
        match=r"file: expected features that are finite.*, got .*b/x\.npy, whose features are zero or not finite",
    ):
        FolderClassifier.from_folder(tmp_path / "classes", features="npy")
    np.save(tmp_path / "classes" / "b" / "x.npy", np.zeros(4))
    with pytest.raises(InputError, match=r"expected 3 values, as in.*b/x\.npy with 4 values"):
        FolderClassifier.from_folder(tmp_path / "classes", features="npy")
    with pytest.raises(InputError, match=r"head: expected .*, got 'forest'"):
        FolderClassifier.from_folder(tmp_path / "classes", features="npy", head="forest")


HEADER = b"\x93NUMPY\x01\x00\x0e\x00{'shape': (4,\n"


@pytest.mark.parametrize(
    ("features", "content"),
    [("npy", b"PK\x03\x04aaa"), ("npy", HEADER), ("conv4-cifar-fs-ridge", b"DDS |\x00\x00\x00" + bytes(120))],
    ids=["zip", "header", "dds"],
)
def test_damaged_files_are_named(tmp_path: Path, features: str, content: bytes) -> None:
    """NumPy and Pillow raise `BadZipFile`, `TokenError` and `NotImplementedError` here."""
    (tmp_path / "damaged").write_bytes(content)
    with pytest.raises(InputError, match=r"file: expected a file that can be read, got .*damaged \("):
        extract_features(load_feature_extractor(features), [tmp_path / "damaged"])


@pytest.fixture
def vectors(tmp_path: Path) -> FolderClassifier:
    """Two classes of vectors of length 2, each with one file `x.npy`."""
    for name, row in zip("ab", np.eye(2), strict=True):
        (tmp_path / "train" / name).mkdir(parents=True)
        np.save(tmp_path / "train" / name / "x.npy", row)
    return FolderClassifier.from_folder(tmp_path / "train", features="npy")


@pytest.mark.parametrize("kind", [str, Path])
def test_a_single_file_needs_no_list(tmp_path: Path, vectors: FolderClassifier, kind: type) -> None:
    path = tmp_path / "train" / "b" / "x.npy"
    assert vectors.predict(kind(path)) == vectors.predict([path])


def test_vectors_of_another_length_than_those_of_the_classifier_are_named(
    tmp_path: Path, vectors: FolderClassifier
) -> None:
    np.save(tmp_path / "long.npy", np.ones(7))
    with pytest.raises(InputError, match=r"file: expected 2 values, as in .*, got .*long\.npy with 7 values"):
        vectors.predict([tmp_path / "long.npy"])


def test_features_may_be_a_path_when_a_classifier_is_loaded(tmp_path: Path, vectors: FolderClassifier) -> None:
    vectors.save(tmp_path / "own.safetensors")
    assert FolderClassifier.load(tmp_path / "own.safetensors", features=Path("npy")).classes == ("a", "b")
    with pytest.raises(InputError, match="features: expected 'npy', as in"):
        FolderClassifier.load(tmp_path / "own.safetensors", features=Path("text"))


def test_classes_have_different_names() -> None:
    with pytest.raises(InputError, match="classes: expected different names"):
        FolderClassifier(["a", "a"], "npy", "ridge", support=torch.eye(2), labels=torch.arange(2))


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_name_of_features_is_shown_as_it_is() -> None:
    with pytest.raises(InputError, match=r"features: expected .*, got None$"):
        load_feature_extractor(None)  # pyright: ignore[reportArgumentType]


def test_features_of_ones_own(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n\ndef f(paths):\n    return torch.stack([torch.tensor([1.0, p.stat().st_size]) for p in paths])\n"
        "\ndef g(paths):\n    return [1.0 for path in paths]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    classifier = FolderClassifier.from_folder(texts / "train", features="mine:f")
    assert classifier.predict(sorted((texts / "train" / "pandas").iterdir()))
    with pytest.raises(
        InputError, match=r"features: expected a row of floating-point values for each of 24.*, got list"
    ):
        FolderClassifier.from_folder(texts / "train", features="mine:g")


def test_damaged_classifiers_are_refused(texts: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    FolderClassifier.from_folder(texts / "train", features="text").save(path)
    content = path.read_bytes()
    for damaged in (content[:-100], b"", pickle.dumps({})):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"classifier: expected .*, got .*own\.safetensors"):
            FolderClassifier.load(path)
    path.unlink()
    save_file({"support": torch.zeros(2, 2)}, path)
    with pytest.raises(InputError, match=r"expected a complete file"):
        FolderClassifier.load(path)
