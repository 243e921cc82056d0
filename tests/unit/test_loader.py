"""Training episodes: what is drawn, that a loader resumes where it stood, and that processes share the episodes of a step."""

from __future__ import annotations

import random

import pytest
import torch

from convexheads import EpisodeLoader, InputError


def brightened(image: torch.Tensor) -> torch.Tensor:
    """An transformation that draws from torch's generator; the image stays recognizable by its last pixel."""
    altered = image.clone()
    altered[..., :-1] += torch.randint(0, 100, (1,), dtype=torch.uint8)
    return altered


def loader(**changes) -> EpisodeLoader:
    """Episodes of images of 16 x 16; image i has the value i everywhere and belongs to class i modulo 6."""
    settings = {
        "ways": 3,
        "shots": 1,
        "queries": 3,
        "batch_size": 4,
        "steps_per_epoch": 5,
        "seed": 0,
    }
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


@pytest.mark.parametrize("world_size", [1, 2])
def test_indices_are_those_of_the_samples(world_size) -> None:
    for rank in range(world_size):
        own = loader(rank=rank, world_size=world_size)
        for step, (samples, _) in enumerate(own):
            indices = own.indices(step)
            assert indices.dtype == torch.int64
            assert torch.equal(own.samples[indices], samples)
            assert torch.equal(loader(rank=rank, world_size=world_size, transform=brightened).indices(step), indices)
        assert own.step == 5  # which asking for indices does not change


@pytest.mark.parametrize("transform", [None, brightened])
def test_a_resumed_loader_continues_where_it_stood(transform) -> None:
    whole = list(loader(transform=transform))
    first = loader(transform=transform)
    iterator = iter(first)
    for _ in range(2):
        next(iterator)
    resumed = loader(transform=transform)
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


def test_generators_of_gpus_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, seeds = next(iter(loader(transform=brightened)))[0], []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    assert torch.equal(next(iter(loader(transform=brightened)))[0], expected)
    assert not seeds


@pytest.mark.parametrize("resample", [True, False])
def test_every_epoch_has_other_episodes_unless_they_are_not_resampled(resample: bool) -> None:
    own = loader(resample_each_epoch=resample)
    epochs = [torch.stack([pixels for pixels, _ in own]) for _ in range(2)]
    assert len(epochs[0]) == len(epochs[1]) == 5
    assert torch.equal(*epochs) is not resample


@pytest.mark.parametrize("resample", [True, False])
def test_an_iteration_that_was_left_early_is_not_continued(resample: bool) -> None:
    own, undisturbed = loader(resample_each_epoch=resample), loader(resample_each_epoch=resample)
    epochs = [[pixels for pixels, _ in undisturbed] for _ in range(2)]
    assert torch.equal(next(iter(own))[0], epochs[0][0])
    again = [pixels for pixels, _ in own]
    assert len(again) == len(own)
    for found, expected in zip(again, epochs[1], strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_transform_may_be_a_module_with_parameters(workers: int) -> None:
    norm = torch.nn.BatchNorm1d(4).eval()
    samples = torch.randn(60, 4, requires_grad=True)
    options = {"ways": 3, "shots": 1, "queries": 1, "batch_size": 2, "steps_per_epoch": 2, "num_workers": workers}
    batches = EpisodeLoader(samples, torch.arange(60) % 6, transform=lambda x: norm(x[None])[0], **options)
    assert [(tuple(batch.shape), batch.requires_grad) for batch, _ in batches] == [((2, 6, 4), False)] * 2


def test_workers_draw_other_numbers_in_every_epoch() -> None:
    def noise(image: torch.Tensor) -> torch.Tensor:
        return torch.full_like(image, random.randrange(256))

    augmented = loader(num_workers=1, transform=noise)
    assert not torch.equal(*(torch.stack([batch for batch, _ in augmented]) for _ in range(2)))


def test_iterators_are_independent() -> None:
    own = loader()
    epochs = [[pixels for pixels, _ in undisturbed] for undisturbed in [loader()] for _ in range(2)]
    for first, second, *expected in zip(own, own, *epochs, strict=True):
        assert torch.equal(first[0], expected[0])
        assert torch.equal(second[0], expected[1])


def test_a_state_is_resumed_once() -> None:
    own = loader(resample_each_epoch=False)
    whole = [pixels for pixels, _ in own]
    own.load_state_dict({"step": 3})
    assert [len(list(own)) for _ in range(3)] == [2, 5, 5]
    own.load_state_dict({"step": 3})
    for (pixels, _), expected in zip(own, whole[3:], strict=True):
        assert torch.equal(pixels, expected)


@pytest.mark.usefixtures("unchecked")
def test_integers_are_what_has_an_index() -> None:
    own = loader(rank=torch.tensor(1), world_size=2, num_workers=torch.tensor(0))
    assert torch.equal(own.indices(0), loader().indices(0)[1::2])
    assert own.state_dict() == {"step": 0}
    for wrong in (True, 1.0, torch.tensor(1.0), torch.tensor([0, 1]), torch.tensor(0, device="meta"), "0", None):
        for name in ("rank", "num_workers"):
            with pytest.raises(InputError, match=name):
                loader(**{name: wrong}, world_size=2)


def test_processes_share_the_episodes_of_a_step() -> None:
    whole = list(loader(transform=brightened))
    parts = [list(loader(transform=brightened, rank=rank, world_size=2)) for rank in (0, 1)]
    for (pixels, labels), *own in zip(whole, *parts, strict=True):
        for rank, (part, answers) in enumerate(own):
            assert torch.equal(part, pixels[rank::2])
            assert torch.equal(answers, labels[rank::2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps_per_epoch": 0}, r"steps_per_epoch: expected an integer of at least 1.*, got 0"),
        ({"ways": 7}, r"labels: expected at least ways=7, got 6 classes"),
        ({"queries": 10}, r"labels: expected at least shots \+ queries = 11.*, got 10 of class 0"),
        ({"world_size": 3}, r"batch_size: expected a multiple of world_size=3, got 4"),
        ({"world_size": 0}, r"world_size: expected an integer of at least 1.*, got 0"),
        ({"rank": 1}, r"rank: expected an integer from 0 to world_size - 1 = 0.*, got 1"),
    ],
)
def test_says_what_cannot_be_drawn(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        loader(**changes)


@pytest.mark.parametrize("step", [-5, 1.5, "1", True])
@pytest.mark.usefixtures("unchecked")
def test_steps_count_from_zero(step: object) -> None:
    for use in (loader().indices, lambda step: loader().load_state_dict({"step": step})):
        with pytest.raises(InputError, match=r"^step: expected a non-negative integer, got"):
            use(step)
