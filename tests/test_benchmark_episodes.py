"""Training episodes: what is drawn, that it can be resumed and shared out, and that it is what learn2learn draws."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from scipy.stats import chi2_contingency

from benchmarks.data import AUGMENTATIONS, ImageSet, taskset
from benchmarks.data.episodes import augmentation
from benchmarks.data.images import join
from convexheads import EpisodeLoader, InputError


def images(classes: int = 6, each: int = 10) -> ImageSet:
    """Image i is all of value i, and of class i modulo `classes`."""
    count = classes * each
    pixels = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 1, 16, 16).contiguous()
    return ImageSet(pixels, torch.arange(count) % classes, tuple("abcdefghij"[:classes]))


def loader(augment: str = "none", **changes) -> EpisodeLoader:
    data, settings = images(), {"ways": 3, "shots": 1, "queries": 3, "tasks": 4, "steps": 5, "seed": 0} | changes
    transform = augmentation(augment, (16, 16))
    return EpisodeLoader(data.images, data.labels, augment=transform, classes=data.classes, **settings)


def test_episodes_hold_distinct_images_of_few_classes() -> None:
    batches = list(loader())
    assert len(batches) == len(loader()) == 5
    pairs = set()
    for pixels, labels in batches:
        assert pixels.shape == (4, 12, 1, 16, 16)
        assert pixels.dtype == torch.uint8
        for task, answers in zip(pixels[:, :, 0, 0, 0].long(), labels, strict=True):
            assert len(set(task.tolist())) == 12
            assert answers.bincount().tolist() == [4, 4, 4]
            own = {(int(answer), int(image) % 6) for answer, image in zip(answers, task, strict=True)}
            assert len(own) == 3  # each label stands for one class
            pairs |= own
    assert len(pairs) == 18  # and for another one in the next episode


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of Python 3.12, wherever a thread was started before
def test_workers_change_nothing() -> None:
    """But the time: the batches, their order, the position and the training's own draws stay."""
    expected, ahead = list(loader(augment="flip-crop-jitter")), loader(augment="flip-crop-jitter", workers=2)
    torch.manual_seed(99)
    before, iterator = torch.get_rng_state(), iter(ahead)
    found = [next(iterator), next(iterator)]
    assert ahead.state_dict() == {"step": 2}  # however far they are ahead
    iterator.close()
    found += list(ahead)
    assert torch.equal(before, torch.get_rng_state())
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for workers, got in ((-1, "-1"), (True, "True")):
        with pytest.raises(InputError, match=f"workers: got {got}, wanted a number of processes, 0 for none"):
            loader(workers=workers)
    meta = images().images.to("meta")
    with pytest.raises(InputError, match=r"samples: got device meta, wanted the CPU, or workers=0"):
        EpisodeLoader(meta, images().labels, ways=2, shots=1, queries=1, workers=1)


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_a_resumed_loader_continues_where_it_stood(augment: str) -> None:
    whole = list(loader(augment=augment))
    first = loader(augment=augment)
    iterator = iter(first)
    for _ in range(2):
        next(iterator)
    resumed = loader(augment=augment)
    resumed.load_state_dict(first.state_dict())
    random.seed(99)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    rest = list(resumed)
    assert torch.equal(before, torch.get_rng_state())  # nothing else draws differently for it
    assert len(rest) == 3
    for (pixels, labels), (expected, answers) in zip(rest, whole[2:], strict=True):
        assert torch.equal(pixels, expected)
        assert torch.equal(labels, answers)
    assert not torch.equal(next(iter(loader(seed=1)))[0], next(iter(loader()))[0])


def test_every_pass_has_other_episodes_unless_they_are_fixed() -> None:
    for fixed in (False, True):
        own = loader(fixed=fixed)
        passes = [torch.stack([pixels for pixels, _ in own]) for _ in range(2)]
        assert len(passes[0]) == len(passes[1]) == 5
        assert torch.equal(*passes) is fixed


def test_processes_share_the_episodes_of_a_step() -> None:
    whole = list(loader(augment="flip-crop"))
    parts = [list(loader(augment="flip-crop", rank=rank, processes=2)) for rank in (0, 1)]
    for (pixels, labels), *own in zip(whole, *parts, strict=True):
        for rank, (part, answers) in enumerate(own):
            assert torch.equal(part, pixels[rank::2])
            assert torch.equal(answers, labels[rank::2])


def test_same_distribution_as_learn2learns_tasksets() -> None:
    data = join(images(4, 8), images(2, 13))  # classes of different sizes
    ours, theirs = Counter(), Counter()
    for pixels, labels in EpisodeLoader(data.images, data.labels, ways=3, shots=1, queries=3, steps=150, seed=1):
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
    assert chi2_contingency(table).pvalue > 0.01


def test_every_image_is_flipped_and_shifted_on_its_own() -> None:
    generator = torch.Generator().manual_seed(1)
    before = torch.randint(1, 256, (200, 2, 16, 16), generator=generator, dtype=torch.uint8)
    transform = augmentation("flip-crop", (16, 16))
    seen = set()
    for image in before:
        after = transform(image)
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
    image = torch.full((3, 32, 32), 100, dtype=torch.uint8)
    means = torch.stack([augmentation("flip-crop-jitter", (32, 32))(image).double().amax() for _ in range(200)])
    assert means.min() < 70
    assert means.max() > 130
    assert augmentation("none", (32, 32)) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps: got 0, wanted an integer of at least 1"),
        ({"ways": 7}, "ways: got 7, wanted at most the 6 classes"),
        ({"queries": 10}, "labels: got 10 samples of class 'a', wanted at least 11"),
        ({"processes": 3}, "tasks: got 4, wanted a multiple of the 3 processes"),
        ({"processes": 0}, "processes: got 0, wanted an integer of at least 1"),
        ({"rank": 1}, "rank: got 1, wanted an integer from 0 to processes - 1 = 0"),
        ({"augment": "blur"}, "augment: got 'blur', wanted one of none, flip-crop"),
    ],
)
def test_says_what_cannot_be_drawn(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        loader(**changes)


def test_joined_sets_keep_their_classes_apart() -> None:
    both = join(images(2, 3), images(3, 2))
    assert both.classes == ("a", "b", "a", "b", "c")
    assert both.labels.tolist() == [0, 1, 0, 1, 0, 1, 2, 3, 4, 2, 3, 4]
    assert len(both) == len(both.images) == 12
