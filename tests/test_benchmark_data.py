"""The benchmark's data: every form of CIFAR-100 read alike, missing data named, augmentation and episodes as stated."""

from __future__ import annotations

import hashlib
import pickle
import random
import shutil
from collections import Counter
from io import BytesIO
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR100

from benchmarks.data import EpisodeLoader, ImageSet, flip_and_shift, load, load_cifar_fs, load_digits, split_classes
from convexheads import InputError

SPLITS = ("train", "val", "test")
CLASSES = [name for split in SPLITS for name in split_classes("cifar-fs", split)]
COUNT = 3


@pytest.fixture(scope="session")
def pictures() -> dict[str, torch.Tensor]:
    """A few random images of every class, uint8 (n, 3, 32, 32)."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randint(256, (COUNT, 3, 32, 32), generator=generator, dtype=torch.uint8) for name in sorted(CLASSES)
    }


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


def assert_holds(data: dict[str, ImageSet], pictures: dict[str, torch.Tensor]) -> None:
    assert tuple(data) == SPLITS
    for split, images in data.items():
        assert images.classes == split_classes("cifar-fs", split)
        assert images.images.dtype == torch.uint8
        for label, name in enumerate(images.classes):
            torch.testing.assert_close(images.images[images.labels == label], pictures[name], rtol=0, atol=0)
        assert len(images) == COUNT * len(images.classes)


def test_the_split_has_64_16_and_20_of_the_100_classes() -> None:
    assert [len(split_classes("cifar-fs", split)) for split in SPLITS] == [64, 16, 20]
    assert len(set(CLASSES)) == 100


@pytest.mark.parametrize("folder", ["", "cifar100/data", "cifarfs/cifar100/data"])
def test_reads_a_tree_of_class_folders(tmp_path: Path, pictures: dict[str, torch.Tensor], folder: str) -> None:
    write_tree(tmp_path / folder, pictures)
    assert_holds(load_cifar_fs(tmp_path, images_per_class=COUNT), pictures)


def test_reads_the_zip(tmp_path: Path, pictures: dict[str, torch.Tensor]) -> None:
    write_zip(tmp_path, pictures)
    assert_holds(load_cifar_fs(tmp_path, images_per_class=COUNT), pictures)


def test_reads_torchvisions_files(
    tmp_path: Path, pictures: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_torchvision(tmp_path, pictures, monkeypatch)
    assert_holds(load_cifar_fs(tmp_path, images_per_class=COUNT), pictures)


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
        load_cifar_fs(tmp_path, images_per_class=COUNT)
    assert not witness.exists()


@pytest.mark.parametrize("write", [write_tree, write_zip])
def test_reads_without_writing(tmp_path: Path, pictures: dict[str, torch.Tensor], write) -> None:
    write(tmp_path, pictures)
    before = {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.rglob("*")]}
    for path in before:  # root may write all the same, hence the comparison
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        load_cifar_fs(tmp_path, images_per_class=COUNT)
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
    with pytest.raises(InputError, match=r"2 images of class 'whale'.*wanted 3 images"):
        load_cifar_fs(tmp_path, images_per_class=COUNT)
    for leftover in tmp_path.iterdir():
        shutil.rmtree(leftover)
    write(tmp_path, {name: images for name, images in pictures.items() if name != "baby"})
    with pytest.raises(InputError, match="0 images of class 'baby'"):
        load_cifar_fs(tmp_path, images_per_class=COUNT)


def test_names_a_broken_archive_and_a_broken_image(tmp_path: Path, pictures: dict[str, torch.Tensor]) -> None:
    write_zip(tmp_path, pictures)
    archive = tmp_path / "cifar100" / "cifar100.zip"
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(InputError, match="download cut off"):
        load_cifar_fs(tmp_path, images_per_class=COUNT)
    archive.unlink()
    write_tree(tmp_path, pictures)
    (tmp_path / "baby" / "baby_1.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="damaged image of class 'baby'"):
        load_cifar_fs(tmp_path, images_per_class=COUNT)
    (tmp_path / "baby" / "baby_1.png").write_bytes(png(torch.zeros(3, 16, 16, dtype=torch.uint8)))
    with pytest.raises(InputError, match="32 x 32"):
        load_cifar_fs(tmp_path, images_per_class=COUNT)


def test_refuses_an_unknown_data_set() -> None:
    with pytest.raises(InputError, match="digits, cifar-fs"):
        load("mnist")


def test_same_classes_and_images_as_learn2learn(data_root: Path, tmp_path: Path) -> None:
    from learn2learn.vision.datasets import CIFARFS

    archive = data_root / "cifar100" / "cifar100.zip"
    if not archive.is_file():
        pytest.skip("needs cifar100/cifar100.zip below CONVEXHEADS_DATA")

    def digest(image: np.ndarray) -> bytes:
        return hashlib.sha256(np.ascontiguousarray(image)).digest()

    ours = load_cifar_fs(data_root)
    with ZipFile(archive) as opened:
        opened.extractall(tmp_path / "cifarfs")
    for split, images in ours.items():
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


def test_every_image_is_flipped_and_shifted_on_its_own() -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(1, 256, (200, 2, 9, 7), generator=generator, dtype=torch.uint8)
    result = flip_and_shift(images, padding=2, generator=generator)
    assert result.shape == images.shape
    assert result.dtype == torch.uint8
    seen = set()
    for before, after in zip(images, result, strict=True):
        matches = []
        for flipped in (False, True):
            frame = torch.zeros(2, 13, 11, dtype=torch.uint8)
            frame[:, 2:-2, 2:-2] = before.flip(-1) if flipped else before
            matches += [
                (flipped, top, left)
                for top in range(5)
                for left in range(5)
                if torch.equal(frame[:, top : top + 9, left : left + 7], after)
            ]
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) >= 45  # of 50 possible draws


def make_loader(**changes: int | bool) -> EpisodeLoader:
    images = torch.arange(60).repeat_interleave(4).reshape(60, 1, 2, 2).to(torch.uint8)
    data = ImageSet(images, torch.arange(6).repeat(10), tuple("abcdef"))
    return EpisodeLoader(data, **{"ways": 3, "samples": 4, "tasks": 2, "steps": 5, "seed": 0, **changes})


def test_episodes_hold_distinct_images_of_few_classes() -> None:
    batches = list(make_loader())
    assert len(batches) == len(make_loader()) == 5
    pairs = set()
    for images, labels in batches:
        assert images.shape == (2, 12, 1, 2, 2)
        assert images.dtype == torch.uint8
        for task, answers in zip(images[:, :, 0, 0, 0].long(), labels, strict=True):
            assert len(set(task.tolist())) == 12
            assert answers.bincount().tolist() == [4, 4, 4]
            own = {(int(answer), int(image) % 6) for answer, image in zip(answers, task, strict=True)}
            assert len(own) == 3  # each label stands for one class
            pairs |= own
    assert len(pairs) > 12  # and for another one in the next episode


def test_a_resumed_loader_continues_where_it_stood() -> None:
    whole = list(make_loader(augment=True))
    loader = make_loader(augment=True)
    iterator = iter(loader)
    for _ in range(2):
        next(iterator)
    resumed = make_loader(augment=True)
    resumed.load_state_dict(loader.state_dict())
    random.seed(99)
    torch.manual_seed(99)
    rest = list(resumed)
    assert len(rest) == 3
    for (images, labels), (expected, answers) in zip(rest, whole[2:], strict=True):
        assert torch.equal(images, expected)
        assert torch.equal(labels, answers)
    assert not torch.equal(next(iter(make_loader(seed=1)))[0], next(iter(make_loader()))[0])
