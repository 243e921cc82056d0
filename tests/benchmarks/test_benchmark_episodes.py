"""Training episodes of the benchmarks: augmentation, the library's worker processes, and the distribution of learn2learn's tasksets.

That the augmentation is torchvision's: see test_loop.py.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Generator
from typing import Any, cast

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency
from tasks import images_of_step
from torchvision.transforms import v2

from benchmarks.data import AUGMENTATIONS, Episodes, ImageSet, augmentation, taskset
from benchmarks.data.images import join
from convexheads import EpisodeLoader, InputError


def images(classes: int = 6, each: int = 10) -> ImageSet:
    """Image i is all of value i, and of class i modulo `classes`."""
    count = classes * each
    pixels = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 1, 16, 16).contiguous()
    return ImageSet(pixels, torch.arange(count) % classes, tuple("abcdefghij"[:classes]))


TRANSFORM = v2.Compose([v2.RandomCrop(16, padding=2), v2.ColorJitter(0.4, 0.4, 0.4), v2.RandomHorizontalFlip()])


def loader(**changes: Any) -> EpisodeLoader:
    data = images()
    settings: dict[str, Any] = {
        "ways": 3,
        "shots": 1,
        "queries": 3,
        "batch_size": 4,
        "steps_per_epoch": 5,
        "seed": 0,
    } | changes
    return EpisodeLoader(data.images, data.labels, transform=TRANSFORM, **settings)


def augmented(images: torch.Tensor, name: str, seed: int = 0) -> torch.Tensor:
    own = augmentation(name)
    assert own is not None
    count, _, height, width = images.shape
    return own(images, own.draw(count, height, width, np.random.default_rng(seed)))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of Python 3.12, wherever a thread was started before
def test_workers_change_nothing() -> None:
    """But the time: the batches, their order, the position and the training's own draws stay."""
    expected, ahead = list(loader()), loader(num_workers=2)
    torch.manual_seed(99)
    before, iterator = torch.get_rng_state(), cast("Generator", iter(ahead))
    found = [next(iterator), next(iterator)]
    assert ahead.state_dict() == {"step": 2}  # however far they are ahead
    iterator.close()
    ahead.load_state_dict(ahead.state_dict())
    found += list(ahead)
    assert torch.equal(before, torch.get_rng_state())
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for workers, got in ((-1, "-1"), (True, "True")):
        with pytest.raises(InputError, match=rf"num_workers: expected a non-negative integer, got {got}"):
            loader(num_workers=workers)
    meta = images().images.to("meta")
    with pytest.raises(InputError, match=r"samples: expected a tensor on the CPU, or num_workers=0.*, got device meta"):
        EpisodeLoader(meta, images().labels, ways=2, shots=1, queries=1, num_workers=1)


def test_same_distribution_as_learn2learns_tasksets() -> None:
    data = join(images(4, 8), images(2, 13))  # classes of different sizes
    ours, theirs = Counter(), Counter()
    for pixels, labels in EpisodeLoader(
        data.images, data.labels, ways=3, shots=1, queries=3, steps_per_epoch=150, seed=1
    ):
        classes = [
            frozenset(zip(task[:, 0, 0, 0].tolist(), own.tolist(), strict=True))
            for task, own in zip(pixels, labels, strict=True)
        ]
        ours.update(pair for task in classes for pair in task)
    random.seed(1)
    tasks = taskset(data, ways=3, samples=4)
    for _ in range(1200):
        pixels, labels = tasks.sample()
        theirs.update(zip(pixels[:, 0, 0, 0].tolist(), labels.tolist(), strict=True))
    assert ours.total() == theirs.total()
    keys = sorted(ours | theirs)
    table = [[counts[key] for key in keys] for counts in (ours, theirs)]
    assert min(map(min, table)) > 10
    result: Any = chi2_contingency(table)
    assert result.pvalue > 0.01


def test_every_image_is_flipped_and_shifted_on_its_own() -> None:
    generator = torch.Generator().manual_seed(1)
    before = torch.randint(1, 256, (200, 2, 16, 16), generator=generator, dtype=torch.uint8)
    seen = set()
    for image, after in zip(before, augmented(before, "flip-crop"), strict=True):
        assert after.dtype == torch.uint8
        matches = []
        for flipped in (False, True):
            frame = torch.zeros(2, 20, 20, dtype=torch.uint8)
            frame[:, 2:-2, 2:-2] = image
            matches += [
                (flipped, top, left)
                for top in range(5)
                for left in range(5)
                if torch.equal(frame[:, top : top + 16, left : left + 16].flip(-1 if flipped else ()), after)
            ]
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) >= 45  # of 50 possible draws


def test_jitter_changes_colours_too() -> None:
    gray = torch.full((200, 3, 32, 32), 100, dtype=torch.uint8)
    largest = augmented(gray, "flip-crop-jitter").double().amax((1, 2, 3))
    assert largest.min() < 70
    assert largest.max() > 130
    assert augmentation("none") is None


def test_joined_sets_keep_their_classes_apart() -> None:
    both = join(images(2, 3), images(3, 2))
    assert both.classes == ("a", "b", "a", "b", "c")
    assert both.labels.tolist() == [0, 1, 0, 1, 0, 1, 2, 3, 4, 2, 3, 4]
    assert len(both) == len(both.images) == 12


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_a_resumed_training_sees_the_same_augmentations(augment: str) -> None:
    """Whatever was drawn before, by these episodes and by PyTorch."""
    settings = {"ways": 3, "shots": 1, "queries": 3, "tasks": 4, "seed": 0, "augment": augment}
    whole, resumed = (Episodes(images(), **settings) for _ in range(2))
    expected = [images_of_step(whole, step) for step in range(5)]
    torch.manual_seed(99)
    before = torch.get_rng_state()
    torch.testing.assert_close([images_of_step(resumed, step) for step in (3, 4)], expected[3:], rtol=0, atol=0)
    assert torch.equal(before, torch.get_rng_state())


def test_a_resumed_loader_draws_the_same_augmentations() -> None:
    """With torchvision's transforms, which draw from PyTorch."""
    whole, resumed = list(loader()), loader()
    resumed.load_state_dict({"step": 3})
    torch.testing.assert_close(list(resumed), whole[3:], rtol=0, atol=0)


def test_refuses_an_unknown_augmentation() -> None:
    with pytest.raises(InputError, match=r"augment: expected one of none, flip-crop.*, got 'blur'"):
        augmentation("blur")
