"""The benchmark that compares all heads on cached features."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import heads
from benchmarks.data import ImageSet
from convexheads import RidgeHead, embed, evaluate
from convexheads.models import Conv4, build_head, save_pretrained


@pytest.fixture(scope="module")
def data() -> dict[str, ImageSet]:
    """Noisy colors, a class each."""
    generator = torch.Generator().manual_seed(0)
    parts = {}
    for part in ("train", "val", "test"):
        labels = torch.arange(6).repeat(25)
        colors = torch.randint(80, 176, (6, 3, 1, 1), generator=generator)[labels]
        noise = torch.randint(-80, 80, (150, 3, 16, 16), generator=generator)
        parts[part] = ImageSet((colors + noise).to(torch.uint8), labels, tuple("abcdef"))
    return parts


def test_features_are_those_of_the_weights(data, tmp_path: Path):
    backbone = Conv4.from_images(data["train"].images).eval()
    settings = {"backbone": "conv4", "head": "svm", "image_size": 16}
    save_pretrained(tmp_path / "own.safetensors", backbone, build_head("svm"), settings)
    found = heads.features(data, str(tmp_path / "own.safetensors"))
    assert set(found) == {"val", "test"}
    torch.testing.assert_close(found["test"], embed(backbone, data["test"].images, progress=False))


@pytest.mark.slow
def test_every_head_is_compared_on_the_same_episodes(data, tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    found = {
        part: torch.randn(6, 16, generator=generator)[data[part].labels] + torch.randn(150, 16, generator=generator)
        for part in ("val", "test")
    }
    rows = heads.compare(data, found, shots=(1, 3), episodes=20, validation_episodes=10, seed=0)
    assert list(rows["head"]) == 2 * list(heads.FAMILIES)
    assert rows["accuracy"].between(0.3, 1).all()
    assert rows["certified"].dropna().eq(1).all()
    first = rows[rows["head"] == next(iter(heads.FAMILIES))]
    assert (first["difference"] == 0).all()
    differences = rows.groupby("shots")["accuracy"].transform(lambda own: own - own.iloc[0])
    assert (rows["difference"] - differences).abs().max() < 1e-12

    ridge = rows[(rows["head"] == "ridge") & (rows["shots"] == 3)].iloc[0]
    head = RidgeHead(ridge["value"] * found["test"].shape[-1])  # the kernel divided by d
    again = evaluate(head, found["test"], data["test"].labels, shots=3, episodes=20, progress=False)
    assert again.accuracy == pytest.approx(ridge["accuracy"])

    table = heads.show(rows, "title")
    assert table.row_count == len(rows)
    heads.draw(rows, "title", tmp_path / "heads.png")
    assert (tmp_path / "heads.png").stat().st_size > 10_000
