"""The benchmark's data: every form of a data set read alike, missing, short and altered data named."""

from __future__ import annotations

import csv
import hashlib
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from zipfile import ZIP_STORED, ZipFile

import numpy as np
import pytest
import torch
from damage import refusals
from PIL import Image
from tasks import ROOT
from torchvision.datasets import CIFAR100

from benchmarks.data.__main__ import main
from benchmarks.data.datasets import CATALOG, SPLITS, Entry, load, load_digits, read, split_classes
from benchmarks.data.images import ImageSet
from benchmarks.data.sources import archives, open_image
from convexheads import InputError

CLASSES = [name for split in SPLITS for name in split_classes("cifar-fs", split)]
COUNT = 3


@pytest.fixture(scope="session")
def pictures() -> dict[str, torch.Tensor]:
    """A few random images of every class, uint8 (n, 3, 32, 32)."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randint(256, (COUNT, 3, 32, 32), generator=generator, dtype=torch.uint8) for name in sorted(CLASSES)
    }


def small(dataset: str, count: int = COUNT) -> Entry:
    return replace(CATALOG[dataset], images_per_class=count)


def png(image: torch.Tensor) -> bytes:
    buffer = BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "png")
    return buffer.getvalue()


def write_tree(folder: Path, pictures: dict[str, torch.Tensor]) -> None:
    for name, images in pictures.items():
        (folder / name).mkdir(parents=True)
        for number in reversed(range(len(images))):
            (folder / name / f"{name}_{number}.png").write_bytes(png(images[number]))


def write_zip(root: Path, pictures: dict[str, torch.Tensor]) -> None:
    (root / "cifar100").mkdir()
    with ZipFile(root / "cifar100" / "cifar100.zip", "w") as archive:
        archive.writestr("cifar100/splits/bertinetto/test.txt", "baby\n")
        for name, images in pictures.items():
            for number in reversed(range(len(images))):
                archive.writestr(f"cifar100/data/{name}/{name}_{number}.png", png(images[number]))


def write_torchvision(root: Path, pictures: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR-100's own files: the first two images of a class in the training part, the third in the test part."""
    folder = root / "cifar-100-python"
    folder.mkdir()
    sums = {}

    def dump(name: str, content: object) -> None:
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()

    for part, chosen in (("train", (0, 1)), ("test", (2,))):
        # Image after image, so that the classes are interleaved as in the original.
        rows = [(images[number], label) for number in chosen for label, images in enumerate(pictures.values())]
        data = np.stack([image.flatten().numpy() for image, _ in rows])
        dump(part, {"data": data, "fine_labels": [label for _, label in rows]})
    dump("meta", {"fine_label_names": list(pictures)})
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": sums["meta"]})


def assert_holds(data: dict[str, ImageSet], pictures: dict[str, torch.Tensor], dataset: str = "cifar-fs") -> None:
    assert tuple(data) == SPLITS
    for split, images in data.items():
        assert images.classes == split_classes(dataset, split)
        assert images.images.dtype == torch.uint8
        for label, name in enumerate(images.classes):
            torch.testing.assert_close(images.images[images.labels == label], pictures[name], rtol=0, atol=0)
        assert len(images) == COUNT * len(images.classes)


@pytest.mark.parametrize(
    ("dataset", "counts"),
    [
        ("cifar-fs", [64, 16, 20]),
        ("fc100", [60, 20, 20]),
        ("miniimagenet", [64, 16, 20]),
        ("tieredimagenet", [351, 97, 160]),
        ("omniglot", [1028, 172, 423]),
    ],
)
def test_splits_have_the_papers_numbers_of_classes_and_share_none(dataset: str, counts: list[int]) -> None:
    splits = [split_classes(dataset, split) for split in SPLITS]
    assert [len(split) for split in splits] == counts
    assert len(set().union(*splits)) == sum(counts)


def test_fc100_has_cifar_fs_classes() -> None:
    assert {name for split in SPLITS for name in split_classes("fc100", split)} == set(CLASSES)


@pytest.mark.parametrize("dataset", ["cifar-fs", "fc100"])
@pytest.mark.parametrize("folder", ["", "cifar100/data", "cifarfs/cifar100/data"])
def test_reads_a_tree_of_class_folders(
    tmp_path: Path, pictures: dict[str, torch.Tensor], folder: str, dataset: str
) -> None:
    write_tree(tmp_path / folder, pictures)
    assert_holds(read(small(dataset), tmp_path), pictures, dataset)


@pytest.mark.parametrize("dataset", ["cifar-fs", "fc100"])
def test_reads_the_zip(tmp_path: Path, pictures: dict[str, torch.Tensor], dataset: str) -> None:
    write_zip(tmp_path, pictures)
    assert_holds(read(small(dataset), tmp_path), pictures, dataset)


@pytest.mark.parametrize("dataset", ["cifar-fs", "fc100"])
def test_reads_torchvisions_files(
    tmp_path: Path, pictures: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, dataset: str
) -> None:
    write_torchvision(tmp_path, pictures, monkeypatch)
    assert_holds(read(small(dataset), tmp_path), pictures, dataset)


def test_reads_only_the_splits_asked_for(tmp_path: Path, pictures: dict[str, torch.Tensor]) -> None:
    kept = split_classes("cifar-fs", "val")
    write_tree(tmp_path, {name: pictures[name] for name in kept})
    data = read(small("cifar-fs"), tmp_path, splits=("val",))
    assert list(data) == ["val"]
    assert data["val"].classes == kept
    with pytest.raises(InputError, match="nothing of train and test, only val of cifar-fs"):
        read(small("cifar-fs"), tmp_path)


@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_opens_no_altered_pickle(
    tmp_path: Path, pictures: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write_torchvision(tmp_path, pictures, monkeypatch)
    witness = tmp_path / "opened"

    class Opened:
        def __reduce__(self) -> tuple:
            return Path.touch, (witness,)

    (tmp_path / "cifar-100-python" / name).write_bytes(pickle.dumps(Opened()))
    with pytest.raises(InputError, match="incomplete or altered"):
        read(small("cifar-fs"), tmp_path)
    assert not witness.exists()


@pytest.mark.parametrize("write", [write_tree, write_zip])
def test_reads_without_writing(tmp_path: Path, pictures: dict[str, torch.Tensor], write) -> None:
    write(tmp_path, pictures)
    before = {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.rglob("*")]}
    for path in before:  # root may write all the same, hence the comparison
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        read(small("cifar-fs"), tmp_path)
    finally:
        for path in before:
            path.chmod(0o755 if path.is_dir() else 0o644)
    assert {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.rglob("*")]} == before


def test_says_what_to_put_where(tmp_path: Path) -> None:
    for root in (None, tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError) as caught:
            load("cifar-fs", root)
        for place in ("cifar100/cifar100.zip", "cifar-100-python/", "<class>/<image>.png", "cifarfs/cifar100/data/"):
            assert place in str(caught.value)
    with pytest.raises(InputError, match="no such folder"):
        load("cifar-fs", tmp_path / "nowhere")
    with pytest.raises(InputError, match="--data-root nor CONVEXHEADS_DATA"):
        load("cifar-fs", None)


@pytest.mark.parametrize("write", [write_tree, write_zip])
def test_names_the_class_that_is_missing_or_short(tmp_path: Path, pictures: dict[str, torch.Tensor], write) -> None:
    short = pictures | {"whale": pictures["whale"][:2]}
    write(tmp_path, short)
    with pytest.raises(InputError, match=r"expected 3 images.*2 images of class 'whale'"):
        read(small("cifar-fs"), tmp_path)
    for leftover in tmp_path.iterdir():
        shutil.rmtree(leftover)
    write(tmp_path, {name: images for name, images in pictures.items() if name != "baby"})
    with pytest.raises(InputError, match="0 images of class 'baby'"):
        read(small("cifar-fs"), tmp_path)


def test_names_a_broken_archive_and_a_broken_image(tmp_path: Path, pictures: dict[str, torch.Tensor]) -> None:
    write_zip(tmp_path, pictures)
    archive = tmp_path / "cifar100" / "cifar100.zip"
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(InputError, match="download cut off"):
        read(small("cifar-fs"), tmp_path)
    archive.unlink()
    write_tree(tmp_path, pictures)
    (tmp_path / "baby" / "baby_1.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="damaged image of class 'baby'"):
        read(small("cifar-fs"), tmp_path)
    (tmp_path / "baby" / "baby_1.png").write_bytes(png(torch.zeros(3, 16, 16, dtype=torch.uint8)))
    with pytest.raises(InputError, match="32 x 32"):
        read(small("cifar-fs"), tmp_path)


def test_refuses_an_unknown_data_set() -> None:
    with pytest.raises(InputError, match="digits, glyphs, cifar-fs"):
        load("mnist")


@pytest.mark.parametrize("splits", [("validation",), ()])
def test_refuses_an_unknown_split_and_none(splits: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="train, val, test"):
        load("digits", splits=splits)


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_same_classes_and_images_as_learn2learn(data_root: Path, tmp_path: Path, split: str) -> None:
    from learn2learn.vision.datasets import CIFARFS

    archive = data_root / "cifar100" / "cifar100.zip"
    if not archive.is_file():
        pytest.skip("needs cifar100/cifar100.zip below CONVEXHEADS_DATA")

    def digest(image: np.ndarray) -> bytes:
        return hashlib.sha256(np.ascontiguousarray(image)).digest()

    images = load("cifar-fs", data_root, splits=(split,))[split]
    with ZipFile(archive) as opened:
        opened.extractall(tmp_path / "cifarfs")
    theirs = CIFARFS(str(tmp_path), mode="validation" if split == "val" else split)
    assert sorted(images.classes) == theirs.classes
    expected = Counter((theirs.classes[label], digest(np.asarray(image))) for image, label in theirs)
    pixels = images.images.permute(0, 2, 3, 1).numpy()
    found = Counter(
        (images.classes[label], digest(image)) for image, label in zip(pixels, images.labels.tolist(), strict=True)
    )
    assert found == expected


def test_digits_keep_the_unseen_classes_apart() -> None:
    data = load_digits()
    assert {name: (tuple(images.images.shape), len(images.classes)) for name, images in data.items()} == {
        "train": ((8 * 901, 1, 32, 32), 40),
        "test": ((896, 1, 32, 32), 5),
    }
    for images in data.values():
        assert images.labels.unique().tolist() == list(range(len(images.classes)))
    assert data["train"].images.max() == 255
    # A turned digit is the same digit, turned back.
    label = data["train"].classes.index("4, 90 degrees, mirrored")
    plain = data["train"].images[data["train"].labels == 4]
    turned = data["train"].images[data["train"].labels == label]
    torch.testing.assert_close(turned.flip(-1).rot90(-1, (-2, -1)), plain, rtol=0, atol=0)


def test_digits_come_in_the_splits_asked_for() -> None:
    assert list(load("digits")) == ["train", "test"]
    assert list(load("digits", splits=("test",))) == ["test"]


def flat(index: int, number: int, size: tuple[int, int] = (84, 84)) -> bytes:
    """An image of one color, which tells class and number."""
    buffer = BytesIO()
    Image.new("RGB", size, (index % 256, index // 256, number)).save(buffer, "png")
    return buffer.getvalue()


def synsets(dataset: str) -> dict[str, tuple[str, ...]]:
    return {split: split_classes(dataset, split) for split in SPLITS}


def write_split_folders(folder: Path, splits: dict[str, tuple[str, ...]]) -> None:
    for split, names in splits.items():
        write_class_folders(folder / split, {split: names})


def write_class_folders(folder: Path, splits: dict[str, tuple[str, ...]]) -> None:
    for names in splits.values():
        for index, name in enumerate(names):
            (folder / name).mkdir(parents=True)
            for number in range(2):
                (folder / name / f"{name}_{number}.jpg").write_bytes(flat(index, number))
            (folder / name / "._hidden.jpg").write_bytes(b"what archivers leave behind")


def write_lists(folder: Path, splits: dict[str, tuple[str, ...]]) -> None:
    (folder / "images").mkdir(parents=True)
    for split, names in splits.items():
        rows = [(f"{name}_{number}.jpg", name) for number in (1, 0) for name in names]
        (folder / f"{split}.csv").write_text("\n".join(["filename,label", *map(",".join, rows)]))
        for index, name in enumerate(names):
            for number in range(2):
                (folder / "images" / f"{name}_{number}.jpg").write_bytes(flat(index, number))


def write_split_zips(folder: Path, splits: dict[str, tuple[str, ...]]) -> None:
    folder.mkdir()
    for split, names in splits.items():
        with ZipFile(folder / f"miniimagenet_{split}.zip", "w") as archive:
            archive.writestr(f"miniimagenet/{split}.csv", "filename,label")
            for index, name in enumerate(names):
                for number in (1, 0):
                    member = f"miniimagenet/{split}/{name}/{name}_{number}.jpg"
                    archive.writestr(member, flat(index, number))


Write = Callable[[Path, dict[str, tuple[str, ...]]], None]
FORMS = [
    ("miniimagenet", write_split_zips),
    ("miniimagenet", write_split_folders),
    ("miniimagenet", write_class_folders),
    ("miniimagenet", write_lists),
    ("tieredimagenet", write_split_folders),
    ("tieredimagenet", write_class_folders),
    ("tieredimagenet", write_lists),
]


@pytest.mark.parametrize(("dataset", "write"), FORMS)
def test_reads_every_form_of_imagenets_subsets(tmp_path: Path, dataset: str, write: Write) -> None:
    write(tmp_path / dataset, synsets(dataset))
    data = read(small(dataset, 2), tmp_path)
    assert list(data) == list(SPLITS)
    for split, images in data.items():
        names = split_classes(dataset, split)
        assert images.classes == names
        labels = torch.arange(len(names)).repeat_interleave(2)
        assert torch.equal(images.labels, labels)
        colors = torch.stack([labels % 256, labels // 256, torch.tensor([0, 1]).repeat(len(names))], 1)
        assert torch.equal(images.images, colors[:, :, None, None].expand(-1, 3, 84, 84).to(torch.uint8))


@pytest.mark.parametrize("write", [write_split_zips, write_split_folders, write_lists])
def test_one_split_of_miniimagenet_is_enough_where_no_other_is_wanted(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "miniimagenet", {"test": split_classes("miniimagenet", "test")})
    assert len(read(small("miniimagenet", 2), tmp_path, splits=("test",))["test"]) == 40
    with pytest.raises(InputError, match=r"miniimagenet_<split>.zip(.|\n)*nothing of train, only test of miniimagenet"):
        read(small("miniimagenet", 2), tmp_path, splits=("train", "test"))


def test_lists_may_name_splits_that_have_no_images(tmp_path: Path) -> None:
    write_lists(tmp_path / "miniimagenet", synsets("miniimagenet"))
    for split in ("train", "val"):
        for name in split_classes("miniimagenet", split):
            for number in range(2):
                (tmp_path / "miniimagenet" / "images" / f"{name}_{number}.jpg").unlink()
    with pytest.raises(InputError, match="nothing of train and val, only test of miniimagenet"):
        read(small("miniimagenet", 2), tmp_path)


def test_forms_complete_each_other(tmp_path: Path) -> None:
    splits = synsets("miniimagenet")
    write_split_zips(tmp_path / "miniimagenet", {"test": splits.pop("test")})
    write_split_folders(tmp_path / "miniimagenet", splits)
    assert [len(images) for images in read(small("miniimagenet", 2), tmp_path).values()] == [128, 32, 40]


def test_classes_of_tieredimagenet_may_differ_in_size_but_not_fall_short(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "tieredimagenet", synsets("tieredimagenet"))
    name = split_classes("tieredimagenet", "val")[3]
    extra = tmp_path / "tieredimagenet" / name / "z.JPEG"
    extra.write_bytes(flat(7, 9))
    images = read(small("tieredimagenet", 2), tmp_path, splits=("val",))["val"]
    assert images.labels.bincount().tolist() == [2, 2, 2, 3] + [2] * 93
    assert images.images[8, :, 0, 0].tolist() == [7, 0, 9]  # the last of the fourth class
    with pytest.raises(InputError, match=r"expected at least 3 images.*2 images of class 'n\d+'"):
        read(small("tieredimagenet", 3), tmp_path, splits=("val",))
    with pytest.raises(InputError, match=r"expected 2 images"):
        read(replace(small("tieredimagenet", 2), exact=True), tmp_path, splits=("val",))


def test_resizes_what_is_larger(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "miniimagenet", synsets("miniimagenet"))
    name = split_classes("miniimagenet", "test")[0]
    picture = Image.effect_noise((130, 97), 90).convert("RGB")
    picture.save(tmp_path / "miniimagenet" / name / f"{name}_0.jpg", "png")
    found = read(small("miniimagenet", 2), tmp_path, splits=("test",))["test"].images[0]
    expected = np.asarray(picture.resize((84, 84), Image.Resampling.BILINEAR))
    assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)


def test_names_a_listed_image_that_is_missing_and_a_list_that_is_none(tmp_path: Path) -> None:
    folder = tmp_path / "tieredimagenet"
    write_lists(folder, synsets("tieredimagenet"))
    name = split_classes("tieredimagenet", "test")[5]
    (folder / "images" / f"{name}_1.jpg").unlink()
    with pytest.raises(InputError, match=f"missing or damaged image of class '{name}'.*{name}_1.jpg"):
        read(small("tieredimagenet", 2), tmp_path)
    (folder / "val.csv").write_text("nothing,of,the,kind\n1,2,3,4")
    with pytest.raises(InputError, match=r"columns filename and label.*val.csv"):
        read(small("tieredimagenet", 2), tmp_path)


def drawing(index: int, number: int) -> Image.Image:
    """Ink, which is 0, in a rectangle at the top left."""
    image = Image.new("1", (105, 105), 1)
    image.paste(0, (0, 0, 30 + index % 60, 15 + number))
    return image


@pytest.fixture(scope="session")
def characters() -> dict[str, list[bytes]]:
    """Two drawings of every character as files."""
    result = {}
    for index, name in enumerate(name for names in synsets("omniglot").values() for name in names):
        result[name] = []
        for number in range(2):
            drawing(index, number).save(buffer := BytesIO(), "png")
            result[name].append(buffer.getvalue())
    return result


def write_omniglot_zips(root: Path, characters: dict[str, list[bytes]]) -> None:
    (root / "omniglot").mkdir()
    alphabets = sorted({name.split("/")[0] for name in characters})
    for part, own in (("background", alphabets[::2]), ("evaluation", alphabets[1::2])):
        with ZipFile(root / "omniglot" / f"images_{part}.zip", "w") as archive:
            for name, files in characters.items():
                if name.split("/")[0] in own:
                    for number in (1, 0):
                        archive.writestr(f"images_{part}/{name}/00_{number}.png", files[number])


def extract(root: Path, folder: str) -> None:
    for path in (root / "omniglot").glob("*.zip"):
        with ZipFile(path) as archive:
            archive.extractall(root / folder)
        path.unlink()


@pytest.mark.parametrize(
    "folder", [None, *(pytest.param(name, marks=pytest.mark.slow) for name in ("omniglot", "omniglot-py"))]
)
def test_omniglot_has_every_turn_of_a_character_as_a_class(
    tmp_path: Path, characters: dict[str, list[bytes]], folder: str | None
) -> None:
    write_omniglot_zips(tmp_path, characters)
    if folder:
        extract(tmp_path, folder)
    data = read(small("omniglot", 2), tmp_path)
    assert {split: tuple(images.images.shape) for split, images in data.items()} == {
        "train": (2 * 4112, 1, 28, 28),
        "val": (2 * 688, 1, 28, 28),
        "test": (2 * 1692, 1, 28, 28),
    }
    for split, images in data.items():
        names = split_classes("omniglot", split)
        assert len(set(images.classes)) == 4 * len(names)
        assert images.labels.bincount().tolist() == [2] * 4 * len(names)
    first = split_classes("omniglot", "val")[7]
    images = data["val"]
    index, number = 1028 + 7, 1
    plain = images.images[images.labels == images.classes.index(f"{first}, 0 degrees")]
    reduced = drawing(index, number).convert("L").resize((28, 28), Image.Resampling.LANCZOS)
    assert np.array_equal(255 - plain[number, 0].numpy(), np.asarray(reduced))
    assert plain[:, 0, 1, 1].min() > 250  # ink
    assert plain[:, 0, 20, 25].max() == 0
    for turns in range(4):
        turned = images.images[images.labels == images.classes.index(f"{first}, {90 * turns} degrees")]
        assert torch.equal(turned, plain.rot90(turns, (-2, -1)))


def test_names_the_short_character(tmp_path: Path, characters: dict[str, list[bytes]]) -> None:
    write_omniglot_zips(tmp_path, characters)
    extract(tmp_path, "omniglot")
    next((tmp_path / "omniglot").glob("*/Greek/character03/00_0.png")).unlink()
    with pytest.raises(InputError, match=r"1 images of class 'Greek/character03' in .*omniglot"):
        read(small("omniglot", 2), tmp_path)


def digest_of(images: torch.Tensor) -> str:
    """The SHA-256 of the sorted SHA-256 digests of images (n, 3, height, width), bytes by row, column, channel."""
    digests = [hashlib.sha256(image.permute(1, 2, 0).numpy().tobytes()).digest() for image in images]
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


@pytest.fixture
def small_cifar(tmp_path: Path, pictures: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes the command believe that `pictures` were CIFAR-100; a folder for them."""
    known = tmp_path / "known.sha256"
    known.write_text("".join(f"{name} {digest_of(images)}\n" for name, images in pictures.items()))
    for dataset in ("cifar-fs", "fc100"):
        monkeypatch.setitem(CATALOG, dataset, replace(small(dataset), checksums=str(known)))
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def verify(*arguments: str | Path) -> str:
    """What the command says is wrong; empty if it ends well."""
    try:
        main(["verify", *map(str, arguments)])
    except SystemExit as stop:
        return str(stop.code)
    return ""


@pytest.mark.parametrize("dataset", ["cifar-fs", "fc100"])
@pytest.mark.parametrize("form", ["zip", "folders", "torchvision"])
def test_the_right_pixels_verify_in_every_form(
    small_cifar: Path,
    pictures: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    dataset: str,
    form: str,
) -> None:
    if form == "torchvision":
        write_torchvision(small_cifar, pictures, monkeypatch)
    else:
        (write_zip if form == "zip" else write_tree)(small_cifar, pictures)
    monkeypatch.setenv("CONVEXHEADS_DATA", str(small_cifar))
    assert verify(dataset) == ""
    out = capsys.readouterr().out
    assert "Complete and right" in out
    assert "20 of 20" in out
    assert "20 ok" in out


def test_verify_names_what_is_altered_short_damaged_or_of_the_wrong_size(
    small_cifar: Path, pictures: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    altered = pictures["whale"].clone()
    altered[2, 1, 30, 30] ^= 1
    write_tree(small_cifar, pictures | {"whale": altered, "bear": pictures["bear"][:2]})
    (small_cifar / "baby" / "baby_1.png").write_bytes(b"no image")
    (small_cifar / "rose" / "rose_0.png").write_bytes(png(torch.zeros(3, 16, 20, dtype=torch.uint8)))
    faults = verify("cifar-fs", "--data-root", small_cifar)
    for message in (
        "the pixels of 'whale' differ",
        "expected 3 images of class 'bear', got 2",
        "damaged image of class 'baby'",
        "expected images of 32 x 32 in class 'rose', got 20 x 16",
    ):
        assert faults.count(message) == 1
    assert faults.count("differ") == 1
    assert "Complete" not in capsys.readouterr().out


def test_verify_finds_images_exchanged_between_classes(small_cifar: Path, pictures: dict[str, torch.Tensor]) -> None:
    write_tree(small_cifar, pictures | {"bear": pictures["whale"], "whale": pictures["bear"]})
    faults = verify("fc100", "--data-root", small_cifar)
    assert "'bear' differ" in faults
    assert "'whale' differ" in faults


def test_verify_says_which_splits_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(CATALOG, "miniimagenet", small("miniimagenet", 2))
    write_split_zips(tmp_path / "miniimagenet", {"test": split_classes("miniimagenet", "test")})
    assert "nothing of train and val; there is test" in verify("miniimagenet", "--data-root", tmp_path)
    assert verify("miniimagenet", "--data-root", tmp_path, "--splits", "[test]") == ""
    assert "none known" in capsys.readouterr().out
    assert "train, val, test" in verify("miniimagenet", "--data-root", tmp_path, "--splits", "[]")


def test_verify_finds_a_drawing_moved_to_another_character(
    tmp_path: Path, characters: dict[str, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The alphabet as a whole holds the same drawings."""
    from benchmarks.data.__main__ import survey
    from benchmarks.data.datasets import look

    write_omniglot_zips(tmp_path, characters)
    entry, known = small("omniglot", 2), tmp_path / "known.sha256"
    digests = {k: v for s in SPLITS for k, v in survey(entry, look(entry, tmp_path), s).digests.items()}
    known.write_text("".join(f"{group} {digest}\n" for group, digest in digests.items()))
    monkeypatch.setitem(CATALOG, "omniglot", replace(entry, checksums=str(known)))
    assert verify("omniglot", "--data-root", tmp_path) == ""
    extract(tmp_path, "omniglot")
    assert verify("omniglot", "--data-root", tmp_path) == ""
    (one,) = (tmp_path / "omniglot").glob("*/Greek/character03/00_0.png")
    other = one.parent.parent / "character04" / one.name
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    faults = verify("omniglot", "--data-root", tmp_path)
    assert "'train/Greek' differ" in faults
    assert faults.count("differ") == 1


def test_the_program_exits_with_1_where_nothing_is_found_and_lists_the_layouts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.data", "verify", "omniglot", "--data-root", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "nothing usable" in done.stderr
    assert "omniglot/images_background.zip" in done.stderr


def test_list_shows_every_data_set_and_layout(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list"])
    out = capsys.readouterr().out
    for entry in CATALOG.values():
        assert f" {entry.name} " in out
        assert entry.layouts in out


@pytest.mark.parametrize(
    ("dataset", "file", "splits"),
    [
        ("cifar-fs", "cifar100/cifar100.zip", "[val]"),
        ("omniglot", "omniglot/images_evaluation.zip", "[val]"),
        ("miniimagenet", "miniimagenet/miniimagenet_test.zip", "[test]"),
        *(
            pytest.param(name, file, "[train,val,test]", marks=pytest.mark.slow)
            for name, file in (
                ("cifar-fs", "cifar100/cifar100.zip"),
                ("fc100", "cifar100/cifar100.zip"),
                ("omniglot", "omniglot/images_evaluation.zip"),
            )
        ),
    ],
)
def test_the_real_data_verifies(data_root: Path, dataset: str, file: str, splits: str) -> None:
    if not (data_root / file).is_file():
        pytest.skip(f"needs {file} below CONVEXHEADS_DATA")
    assert verify(dataset, "--data-root", data_root, "--splits", splits) == ""


def test_the_splits_of_cifar_are_those_of_the_real_datas_table(data_root: Path) -> None:
    if not (table := data_root / "cifar100" / "classes.csv").is_file():
        pytest.skip("needs cifar100/classes.csv below CONVEXHEADS_DATA")
    with table.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    for dataset, column in (("cifar-fs", "cifarfs_split"), ("fc100", "fc100_split")):
        for split in SPLITS:
            assert set(split_classes(dataset, split)) == {row["class"] for row in rows if row[column] == split}
    superclasses = [{row["superclass"] for row in rows if row["fc100_split"] == split} for split in SPLITS]
    assert [len(names) for names in superclasses] == [12, 4, 4]
    assert len(set().union(*superclasses)) == 20


def test_damaged_archives_of_images_are_refused(tmp_path) -> None:
    path, splits = tmp_path / "images.zip", {"train": ("cat", "dog")}
    pixels = torch.randint(256, (6, 8, 8, 3), dtype=torch.uint8).numpy()
    with ZipFile(path, "w", ZIP_STORED) as archive:
        for number, image in enumerate(pixels):
            Image.fromarray(image).save(tmp_path / "one.png")
            archive.write(tmp_path / "one.png", f"data/{'cat' if number < 3 else 'dog'}/{number}.png")

    def load() -> list[bytes]:
        found = archives(["images.zip"], tmp_path, splits).images
        if Counter({name: len(each) for name, each in found.items()}) != {"cat": 3, "dog": 3}:
            raise InputError("data root", "three images of each", path)  # as `read` does
        return [open_image(name, each, "RGB").tobytes() for name in found for each in found[name]]

    assert refusals(path, load, "data root: expected", flips=400) > 250
