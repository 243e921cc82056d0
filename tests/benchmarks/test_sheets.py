"""Packed data sets: read back to the bit, in parts of limited size, and refused where they are incomplete or damaged."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import pytest
import torch
from damage import refusals
from PIL import Image

import benchmarks.data.datasets
from benchmarks.data.__main__ import main
from benchmarks.data.datasets import CATALOG, SPLITS, look, read, split_classes
from benchmarks.data.images import ImageSet
from benchmarks.data.sheets import pack
from benchmarks.data.sources import grid, open_image, sheets
from convexheads import InputError

PLACES = {"cifar-fs": "", "miniimagenet": "miniimagenet", "omniglot": "omniglot/images_background"}
ODD = {
    "train": ("Atemayar_Qelisayer/character01", "Atemayar_Qelisayer/character02", "N'Ko.webp/7.webp"),
    "val": ("Ge_ez/Ünï-100%", "part-0.zip/#[1]"),
    "test": ("Tifinagh/character01", "a__b--c/d%2Fe"),
}
PLAIN = {"train": ("apple", "bear", "cat"), "val": ("dog", "emu"), "test": ("fox", "gnu")}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a small data set of a few classes in place of a real one and writes its images; returns their folder."""

    def write(dataset: str, count: int = 7, sizes: tuple[tuple[int, int], ...] = ()) -> Path:
        lists, root = tmp_path / "lists", tmp_path / "originals"
        (lists / dataset).mkdir(parents=True)
        for split, names in (ODD if dataset == "omniglot" else PLAIN).items():
            (lists / dataset / f"{split}.txt").write_text("\n".join(names), encoding="utf-8")
        monkeypatch.setattr(benchmarks.data.datasets, "LISTS", lists)
        entry = replace(CATALOG[dataset], images_per_class=count)
        monkeypatch.setitem(CATALOG, dataset, entry)
        draws = np.random.default_rng(0)
        sizes = sizes or ((entry.size, entry.size),)
        for name in (name for split in SPLITS for name in split_classes(dataset, split)):
            folder = root / PLACES[dataset] / name
            folder.mkdir(parents=True)
            for number in range(count):
                width, height = sizes[number % len(sizes)]
                shape = (height, width) if entry.channels == 1 else (height, width, 3)
                pixels = draws.integers(256, size=shape, dtype=np.uint8)
                pixels.flat[:256] = np.arange(256)  # every gray level at least
                Image.fromarray(pixels).save(folder / f"{number}.png")
        return root

    return write


def assert_same(found: dict[str, ImageSet], wanted: dict[str, ImageSet]) -> None:
    assert list(found) == list(wanted)
    for split, data in wanted.items():
        assert found[split].classes == data.classes
        assert torch.equal(found[split].images, data.images)
        assert torch.equal(found[split].labels, data.labels)


@pytest.mark.parametrize("count", [1, 3, 20])
@pytest.mark.parametrize(
    ("dataset", "sizes"),
    [
        ("cifar-fs", ()),
        ("omniglot", ()),
        ("omniglot", ((105, 90),)),
        ("miniimagenet", ((84, 84), (100, 90), (90, 100))),
    ],
)
def test_a_packed_data_set_is_read_as_the_originals_are(tmp_path: Path, write, dataset: str, sizes, count: int) -> None:
    root = write(dataset, count, sizes)
    parts = pack(dataset, root, tmp_path / "packed")
    assert parts == [tmp_path / "packed" / dataset / "part-0.zip"]
    assert_same(read(CATALOG[dataset], tmp_path / "packed"), read(CATALOG[dataset], root))


def test_pixels_of_known_checksums_are_kept_as_they_are_stored(tmp_path: Path, write) -> None:
    root, entry = write("omniglot", sizes=((105, 90),)), CATALOG["omniglot"]
    pack("omniglot", root, tmp_path / "packed")
    for split in SPLITS:
        for name in split_classes("omniglot", split):
            files = [look(entry, place).images[name] for place in (root, tmp_path / "packed")]
            originals, packed = ([open_image(name, file, "L") for file in each] for each in files)
            assert [(image.size, image.tobytes()) for image in packed] == [
                (image.size, image.tobytes()) for image in originals
            ]


def test_images_of_several_sizes_are_refused_where_none_is_resized(tmp_path: Path, write) -> None:
    root = write("omniglot", sizes=((105, 105), (105, 90)))
    with pytest.raises(InputError, match=r"expected one size.*2 sizes of class 'Atemayar_Qelisayer/character01'"):
        pack("omniglot", root, tmp_path / "packed")


@pytest.mark.parametrize(
    ("count", "wanted"), [(1, (1, 1)), (2, (2, 1)), (5, (3, 2)), (9, (3, 3)), (20, (5, 4)), (600, (25, 24))]
)
def test_sheets_are_nearly_square(count: int, wanted: tuple[int, int]) -> None:
    assert grid(count) == wanted


def test_a_part_holds_whole_classes_and_no_more_bytes_than_allowed(tmp_path: Path, write) -> None:
    root = write("omniglot")
    (whole,) = pack("omniglot", root, tmp_path / "whole")
    names = [f"{name}/7.webp" for split in SPLITS for name in split_classes("omniglot", split)]
    with ZipFile(whole) as archive:
        assert archive.namelist() == names
    size = whole.stat().st_size
    assert len(pack("omniglot", root, tmp_path / "just", part_size=size)) == 1
    for least, part_size in ((2, size - 1), (3, size // 2), (4, size // 3)):
        output = tmp_path / str(part_size)
        parts = pack("omniglot", root, output, part_size=part_size)
        assert len(parts) >= least
        assert all(part.stat().st_size <= part_size for part in parts)
        assert parts == sorted((output / "omniglot").iterdir())
        assert [member for part in parts for member in ZipFile(part).namelist()] == names
        assert_same(read(CATALOG["omniglot"], output), read(CATALOG["omniglot"], root))
    with pytest.raises(InputError, match=r"part size: expected at least .* for class 'Atem.*, got 1,000 bytes"):
        pack("omniglot", root, tmp_path / "none", part_size=1000)


def test_the_same_images_give_the_same_files(tmp_path: Path, write) -> None:
    root = write("cifar-fs")
    first, second = (pack("cifar-fs", root, tmp_path / name)[0].read_bytes() for name in ("one", "two"))
    assert first == second


def test_originals_are_preferred_and_packed_classes_complete_them(tmp_path: Path, write) -> None:
    root, entry = write("cifar-fs"), CATALOG["cifar-fs"]
    wanted = read(entry, root)
    pack("cifar-fs", root, root, splits=("val", "train"))
    (root / "cat").rename(tmp_path / "cat")
    assert_same(read(entry, root), wanted)
    Image.new("RGB", (32, 32), "red").save(root / "apple" / "0.png")
    assert read(entry, root, splits=("train",))["train"].images[0, :, 0, 0].tolist() == [255, 0, 0]


def test_names_the_split_and_the_class_that_is_not_there(tmp_path: Path, write) -> None:
    root, entry = write("cifar-fs"), CATALOG["cifar-fs"]
    parts = pack("cifar-fs", root, tmp_path / "packed", splits=("test", "train"), part_size=60_000)
    assert list(read(entry, tmp_path / "packed", splits=("train", "test"))) == ["train", "test"]
    with pytest.raises(InputError, match=r"benchmarks.data pack(.|\n)*nothing of val, only train and test of cifar-fs"):
        read(entry, tmp_path / "packed")
    assert len(parts) == 3
    parts[1].unlink()
    with pytest.raises(InputError, match=r"0 images of class 'cat' in .*part-0.zip and .*part-2.zip"):
        read(entry, tmp_path / "packed", splits=("train",))
    with ZipFile(parts[0]) as archive:
        contents = {member.replace("7", "6"): archive.read(member) for member in archive.namelist()}
    with ZipFile(parts[0], "w") as archive:
        for member, content in contents.items():
            archive.writestr(member, content)
    with pytest.raises(InputError, match=r"expected 7 images.*6 images of class 'apple'"):
        read(entry, tmp_path / "packed", splits=("train",))


def webp(width: int, height: int) -> bytes:
    Image.new("RGB", (width, height)).save(buffer := BytesIO(), "webp", lossless=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no image", "cannot identify"), (webp(97, 96), "97 x 96"), (webp(96, 97), "96 x 97"), (webp(1, 1), "1 x 1")],
    ids=["no image", "wide", "high", "tiny"],
)
def test_names_the_class_of_a_sheet_that_is_none(tmp_path: Path, write, content: bytes, message: str) -> None:
    write("cifar-fs")
    (tmp_path / "packed" / "cifar-fs").mkdir(parents=True)
    with ZipFile(tmp_path / "packed" / "cifar-fs" / "part-0.zip", "w", ZIP_DEFLATED) as archive:
        for name in PLAIN["train"]:
            archive.writestr(f"{name}/7.webp", content if name == "bear" else webp(96, 96))
    with pytest.raises(InputError, match=f"missing or damaged image of class 'bear': .*{message}"):
        read(CATALOG["cifar-fs"], tmp_path / "packed", splits=("train",))


def test_other_members_of_a_part_are_ignored(tmp_path: Path, write) -> None:
    root = write("cifar-fs")
    (part,) = pack("cifar-fs", root, tmp_path / "packed")
    with ZipFile(part, "a") as archive:
        for member in ("apple/99999999999.webp", "apple/0.webp", "apple/x.webp", "apple/7.png", "7.webp", "x/7.webp"):
            archive.writestr(member, b"nothing")
    assert_same(read(CATALOG["cifar-fs"], tmp_path / "packed"), read(CATALOG["cifar-fs"], root))


def test_a_class_is_decoded_once(tmp_path: Path, write, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write("cifar-fs")
    pack("cifar-fs", root, tmp_path / "packed")
    opened, decode = [], Image.open

    def counted(*arguments, **options):
        opened.append(arguments)
        return decode(*arguments, **options)

    monkeypatch.setattr(Image, "open", counted)
    read(CATALOG["cifar-fs"], tmp_path / "packed")
    assert len(opened) == 7  # one per class


def test_damaged_parts_are_refused(tmp_path: Path, write) -> None:
    root, entry = write("cifar-fs", 2), CATALOG["cifar-fs"]
    (part,) = pack("cifar-fs", root, tmp_path / "packed")
    classes = {split: split_classes("cifar-fs", split) for split in SPLITS}

    def load() -> list[bytes]:
        found = sheets("cifar-fs", tmp_path / "packed", classes).images
        images = read(entry, tmp_path / "packed")
        assert len(found) == 7
        return [data.images.numpy().tobytes() for data in images.values()]

    assert refusals(part, load, "data root: expected", flips=300) > 250


def test_refuses_what_can_not_be_packed(tmp_path: Path, write) -> None:
    root = write("cifar-fs")
    with pytest.raises(InputError, match=r"dataset: expected one of cifar-fs, fc100.*, got 'digits'"):
        pack("digits", root, tmp_path / "packed")
    with pytest.raises(InputError, match=r"splits: expected some of train, val, test.*, got .*"):
        pack("cifar-fs", root, tmp_path / "packed", splits=("validation",))
    with pytest.raises(InputError, match="nothing usable"):
        pack("cifar-fs", tmp_path / "lists", tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    (root / "gnu" / "6.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="missing or damaged image of class 'gnu'"):
        pack("cifar-fs", root, tmp_path / "packed")
    pack("cifar-fs", root, tmp_path / "packed", splits=("train",))
    with pytest.raises(InputError, match=r"output: expected .*, got .*, which holds part-0.zip already"):
        pack("cifar-fs", root, tmp_path / "packed", splits=("val",))
    (root / "gnu" / "6.png").unlink()
    with pytest.raises(InputError, match="6 images of class 'gnu'"):
        pack("cifar-fs", root, tmp_path / "other")


def test_the_command_says_what_it_wrote_and_its_parts_verify(
    tmp_path: Path, write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, packed = write("cifar-fs"), tmp_path / "packed"
    monkeypatch.setitem(CATALOG, "cifar-fs", replace(CATALOG["cifar-fs"], checksums=None))
    command = ["pack", "--dataset", "cifar-fs", "--data-root", str(root), "--output", str(packed)]
    main([*command, "--splits", "[val,test]", "--part-size", "1"])
    out = capsys.readouterr().out
    assert "part-0.zip: 0.1 MB" in out
    assert f"--data-root {packed}" in out
    main(["verify", "cifar-fs", "--data-root", str(packed), "--splits", "[val,test]"])
    assert "Complete and right" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"error: output: expected .*, got .* already"):
        main(command)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"error: .*file"):
        main([*command, "--output", str(tmp_path / "file")])


def test_verify_names_a_damaged_sheet_once(tmp_path: Path, write, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write("cifar-fs")
    monkeypatch.setitem(CATALOG, "cifar-fs", replace(CATALOG["cifar-fs"], checksums=None))
    (part,) = pack("cifar-fs", root, tmp_path / "packed")
    with ZipFile(part) as archive:
        place = archive.getinfo("cat/7.webp").header_offset + 5000
    content = bytearray(part.read_bytes())
    content[place] ^= 1
    part.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        main(["verify", "cifar-fs", "--data-root", str(tmp_path / "packed")])
    assert str(stop.value.code).count("damaged image of class 'cat': Bad CRC-32") == 1


def test_real_images_come_back_to_the_bit(data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (data_root / "cifar100" / "cifar100.zip").is_file():
        pytest.skip("needs cifar100/cifar100.zip below CONVEXHEADS_DATA")
    classes = split_classes("cifar-fs", "val")[:3]
    known = CATALOG["cifar-fs"].checksums
    sums = (benchmarks.data.datasets.LISTS / known).read_text() if known else ""
    (tmp_path / "lists" / "cifar-fs").mkdir(parents=True)
    for split, name in zip(SPLITS, classes, strict=True):
        (tmp_path / "lists" / "cifar-fs" / f"{split}.txt").write_text(name)
    (tmp_path / "lists" / "known.sha256").write_text(sums)
    for module in ("benchmarks.data.datasets", "benchmarks.data.__main__"):
        monkeypatch.setattr(f"{module}.LISTS", tmp_path / "lists")
    monkeypatch.setitem(CATALOG, "cifar-fs", replace(CATALOG["cifar-fs"], checksums="known.sha256"))
    parts = pack("cifar-fs", data_root, tmp_path / "packed", part_size=2_200_000)
    assert len(parts) == 2
    entry = CATALOG["cifar-fs"]
    assert_same(read(entry, tmp_path / "packed"), read(entry, data_root))
    main(["verify", "cifar-fs", "--data-root", str(tmp_path / "packed")])  # checksums as published
