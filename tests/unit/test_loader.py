"""Training episodes: what is drawn, that a loader resumes where it stood, and that processes share the episodes of a step."""

from __future__ import annotations

import random

import pytest
import torch

from convexheads import EpisodeLoader, InputError

CLASSES = tuple("abcdef")


def brightened(image: torch.Tensor) -> torch.Tensor:
    """An augmentation that draws from torch's generator; the image stays recognizable by its last pixel."""
    altered = image.clone()
    altered[..., :-1] += torch.randint(0, 100, (1,), dtype=torch.uint8)
    return altered


def loader(**changes) -> EpisodeLoader:
    """Episodes of images of 16 x 16; image i has the value i everywhere and belongs to class i modulo 6."""
    settings = {"ways": 3, "shots": 1, "queries": 3, "tasks": 4, "steps": 5, "seed": 0, "classes": CLASSES}
    images = torch.arange(60, dtype=torch.uint8)[:, None, None, None].expand(60, 1, 16, 16).contiguous()
    return EpisodeLoader(images, torch.arange(60) % 6, **settings | changes)


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


@pytest.mark.parametrize("processes", [1, 2])
def test_indices_are_those_of_the_samples(processes) -> None:
    for rank in range(processes):
        own = loader(rank=rank, processes=processes)
        for step, (samples, _) in enumerate(own):
            indices = own.indices(step)
            assert indices.dtype == torch.int64
            assert torch.equal(own.samples[indices], samples)
            assert torch.equal(loader(rank=rank, processes=processes, augment=brightened).indices(step), indices)
        assert own.step == 5  # which asking for indices does not change


@pytest.mark.parametrize("augment", [None, brightened])
def test_a_resumed_loader_continues_where_it_stood(augment) -> None:
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
    whole = list(loader(augment=brightened))
    parts = [list(loader(augment=brightened, rank=rank, processes=2)) for rank in (0, 1)]
    for (pixels, labels), *own in zip(whole, *parts, strict=True):
        for rank, (part, answers) in enumerate(own):
            assert torch.equal(part, pixels[rank::2])
            assert torch.equal(answers, labels[rank::2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, r"steps: expected an integer of at least 1.*, got 0"),
        ({"ways": 7}, r"ways: expected at most the 6 classes.*, got 7"),
        ({"queries": 10}, r"labels: expected at least 11.*, got 10 samples of class 'a'"),
        ({"processes": 3}, r"tasks: expected a multiple of the 3 processes.*, got 4"),
        ({"processes": 0}, r"processes: expected an integer of at least 1.*, got 0"),
        ({"rank": 1}, r"rank: expected an integer from 0 to processes - 1 = 0.*, got 1"),
    ],
)
def test_says_what_cannot_be_drawn(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        loader(**changes)
