"""The training loop's parts: augmentation as torchvision has it, episodes, steps that fail, and what a GPU needs."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency, chisquare, ks_2samp
from tasks import images_of_step
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from benchmarks import loop
from benchmarks.data import Episodes, ImageSet, augmentation
from benchmarks.data.augmentation import BRIGHTNESS, COLUMNS, CONTRAST, SATURATION, Augmentation
from benchmarks.loop import KIND, Training
from benchmarks.options import Options
from benchmarks.processes import Processes
from benchmarks.train import episodes
from convexheads import (
    EpisodeLoader,
    InputError,
    Learnable,
    SolverError,
    SVMHead,
    WestonWatkinsSVMHead,
    _storage,
    split_task,
)
from convexheads.models import build_head, build_model
from convexheads.training import SCHEDULES, episode_loss

ADJUST = {
    BRIGHTNESS: functional.adjust_brightness,
    CONTRAST: functional.adjust_contrast,
    SATURATION: functional.adjust_saturation,
}
JITTER = Augmentation(jitter=True)
FACTORS, ORDER = slice(3, 6), slice(6, 9)


def noise(count: int, channels: int, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


def draws_of(count: int, height: int = 32, width: int = 32, *, seed: int = 0, own: Augmentation = JITTER) -> Tensor:
    draws = own.draw(count, height, width, np.random.default_rng(seed))
    assert draws.shape == (count, len(COLUMNS))
    assert draws.dtype == torch.float64
    return draws


def column(draws: Tensor, name: str) -> Tensor:
    return draws[:, COLUMNS.index(name)]


def unchanged(count: int, height: int = 32) -> Tensor:
    """Draws that change nothing."""
    corner = height // 8
    return torch.tensor([[corner, corner, 0, 1, 1, 1, 0, 1, 2]], dtype=torch.float64).repeat(count, 1)


def by_torchvision(images: Tensor, draws: Tensor) -> Tensor:
    """Each image for itself, with the same draws."""
    changed, padding = [], images.shape[-2] // 8
    for image, (top, left, flipped, *rest) in zip(images, draws.tolist(), strict=True):
        factors, order = rest[:3], map(int, rest[3:])
        image = functional.pad(image, [padding] * 4)
        image = functional.crop(image, int(top), int(left), *images.shape[-2:])
        for change in order:
            image = ADJUST[change](image, factors[change])
        changed.append(functional.horizontal_flip(image) if flipped else image)
    return torch.stack(changed)


# Augmentation


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("operation", ["nothing", "crop", "flip", "brightness", "contrast", "saturation", "all"])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (28, 20)])
def test_same_images_as_torchvisions(operation: str, channels: int, height: int, width: int) -> None:
    images, drawn = noise(96, channels, height, width), draws_of(96, height, width)
    draws = unchanged(96, height)
    changed = {"nothing": (), "crop": ("top", "left"), "flip": ("flipped",), "all": COLUMNS}
    for name in changed.get(operation, (operation,)):
        draws[:, COLUMNS.index(name)] = column(drawn, name)
    found = JITTER(images, draws)
    assert found.dtype == torch.uint8
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found, by_torchvision(images, draws))
    changes = operation != "nothing" and (channels, operation) != (1, "saturation")
    assert torch.equal(found, images) != changes
    if operation in ("nothing", "crop", "flip"):
        assert torch.equal(found, Augmentation(jitter=False)(images, draws))


def test_same_images_as_torchvisions_in_every_order() -> None:
    images, draws = noise(60, 3), draws_of(60)
    orders = torch.tensor(list(permutations(range(3)))).repeat(10, 1)
    draws[:, ORDER] = orders.double()
    found = JITTER(images, draws)
    assert torch.equal(found, by_torchvision(images, draws))
    draws[:, ORDER] = orders.flip(1).double()
    assert not torch.equal(found, JITTER(images, draws))


def same_counts(ours: list[Any], theirs: list[Any]) -> bool:
    keys = sorted({*ours, *theirs})
    table = [[Counter(values)[key] for key in keys] for values in (ours, theirs)]
    assert min(map(min, table)) > 10
    result: Any = chi2_contingency(table)
    return bool(result.pvalue > 0.01)


def test_same_distributions_as_torchvisions() -> None:
    count, image = 3000, torch.zeros(3, 32, 24, dtype=torch.uint8)
    draws = draws_of(count, 32, 24, seed=1)
    torch.manual_seed(1)
    crop, jitter = v2.RandomCrop((32, 24), padding=4), v2.ColorJitter(0.4, 0.4, 0.4)
    flip, sides = v2.RandomHorizontalFlip(), torch.tensor([[[0, 1]]], dtype=torch.uint8)
    crops = [crop.make_params([image]) for _ in range(count)]
    jitters = [jitter.make_params([image]) for _ in range(count)]
    flips = [bool(flip(sides)[0, 0, 0]) for _ in range(count)]
    for name in ("top", "left"):
        assert same_counts(column(draws, name).tolist(), [each[name] for each in crops])
    assert same_counts(column(draws, "flipped").bool().tolist(), flips)
    orders = [tuple(number for number in each["fn_idx"].tolist() if number < 3) for each in jitters]
    assert same_counts(list(map(tuple, draws[:, ORDER].int().tolist())), orders)
    for name in ("brightness", "contrast", "saturation"):
        theirs = [each[f"{name}_factor"] for each in jitters]
        result: Any = ks_2samp(column(draws, name).numpy(), theirs)
        assert result.pvalue > 0.01


def test_every_image_has_its_own_draw_of_everything() -> None:
    """And what is drawn of one thing says nothing of another, nor of the next image."""
    draws = draws_of(4000)
    assert len(draws[:, FACTORS].unique(dim=0)) == 4000
    _, counts = draws[:, :3].unique(dim=0, return_counts=True)
    assert len(counts) == 9 * 9 * 2
    result: Any = chisquare(counts.numpy())
    assert result.pvalue > 0.01
    columns = draws[:, :8]  # the third place of an order follows from the other two
    own = torch.corrcoef(columns.T)
    own[-2:, -2:] = 0  # the places of an order depend on each other
    assert own.triu(1).abs().max() < 0.06
    assert torch.corrcoef(torch.cat([columns[1:], columns[:-1]], 1).T)[:8, 8:].abs().max() < 0.06
    image = noise(1, 3).expand(50, -1, -1, -1)
    assert len(JITTER(image, draws_of(50)).flatten(1).unique(dim=0)) == 50


def test_without_jitter_no_factor_is_drawn_and_small_images_are_not_cropped() -> None:
    draws = draws_of(50, own=Augmentation(jitter=False))
    assert draws[:, FACTORS].eq(1).all()
    assert draws[:, ORDER].eq(torch.arange(3)).all()
    small = draws_of(50, 7, 7)
    assert not column(small, "top").any()
    assert not column(small, "left").any()


# Episodes


def set_of(count: int = 120, classes: int = 6, channels: int = 3, size: int = 16) -> ImageSet:
    return ImageSet(noise(count, channels, size, size), torch.arange(count) % classes, tuple("abcdef"[:classes]))


SIZES: dict[str, Any] = {"ways": 3, "shots": 2, "queries": 3, "tasks": 4, "seed": 5}


def test_episodes_are_those_of_the_library() -> None:
    data = set_of()
    own = Episodes(data, **SIZES, augment="none")
    settings = {"batch_size" if name == "tasks" else name: value for name, value in SIZES.items()}
    for step, (samples, labels) in enumerate(EpisodeLoader(data.images, data.labels, steps_per_epoch=4, **settings)):
        assert torch.equal(images_of_step(own, step), samples)
        drawn = own.draw(step)
        assert drawn.shape == (4 * 15, 1)
        assert drawn.dtype == torch.float64
        assert torch.equal(data.images[drawn[:, 0].long()], samples.flatten(0, 1))
        assert torch.equal(own.labels, labels)
        features = samples.double().flatten(2)
        for found, expected in zip(own.split(features), split_task(features, labels, shots=2), strict=True):
            assert torch.equal(found, expected)


def test_a_draw_has_the_images_and_what_is_done_to_them() -> None:
    data = set_of()
    plain = Episodes(data, **SIZES, augment="none")
    for augment in ("flip-crop", "flip-crop-jitter"):
        own = Episodes(data, **SIZES, augment=augment)
        drawn = own.draw(3)
        assert drawn.shape == (4 * 15, 1 + len(COLUMNS))
        assert drawn.dtype == torch.float64
        assert torch.equal(drawn[:, :1], plain.draw(3))
        images = data.images[drawn[:, 0].long()]
        assert own.augmentation is not None
        assert torch.equal(own(drawn), own.augmentation(images, drawn[:, 1:]))
        assert not torch.equal(own(drawn), images)


@pytest.mark.parametrize("augment", ["none", "flip-crop", "flip-crop-jitter"])
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_episodes_of_a_step(augment: str, processes: int) -> None:
    """Whatever each of them drew before."""
    whole = images_of_step(Episodes(set_of(), **SIZES, augment=augment), 7)
    found = torch.empty_like(whole)
    for rank in range(processes):
        own = Episodes(set_of(), **SIZES, augment=augment, rank=rank, processes=processes)
        for step in range(rank):
            images_of_step(own, step)
        found[rank::processes] = images_of_step(own, 7)
        assert len(own.labels) == 4 // processes
    assert torch.equal(found, whole)


def test_steps_tasks_and_seeds_have_other_augmentations() -> None:
    same = ImageSet(noise(1, 3, 16, 16).expand(60, -1, -1, -1).contiguous(), torch.arange(60) % 6, tuple("abcdef"))
    seen = [
        images_of_step(Episodes(same, **(SIZES | {"seed": seed, "augment": "flip-crop-jitter"})), step).flatten(2)
        for seed in (0, 1)
        for step in (0, 1)
    ]
    assert len(torch.cat(seen).flatten(0, 1).unique(dim=0)) == 4 * 4 * 15


# Steps that fail

NAN, HUGE = 255, 254  # the brightest pixel of an image that has such features


class Network(nn.Module):
    """With statistics, and with features that are not finite or too large for images that say so."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(64, 12), nn.BatchNorm1d(12), nn.Dropout(0.1)

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.flatten(1)
        most = pixels.amax(1, keepdim=True)
        features = self.dropout(self.norm(self.linear(pixels / 255)))
        return torch.where(most == NAN, torch.nan, torch.where(most == HUGE, 1e9, features))


def training(head: str = "ridge", **changes: Any) -> Training:
    settings: dict[str, Any] = {"steps": 5, "tasks": 3, "ways": 3, "shots": 2, "queries": 2, "schedule": "constant"}
    settings |= {"head": head, "learning_rate": 0.05, "device": "cpu"}
    options = Options(**(settings | changes))
    images = noise(60, 1, 8, 8) // 2
    data = ImageSet(images, torch.arange(60) % 6, tuple("abcdef"))
    torch.manual_seed(3)
    return Training(options, Network(), build_head(head), episodes(data, options, Processes()), Processes())


def state(own: Training) -> dict[str, Tensor]:
    momentum = {
        f"momentum.{name}": own.optimizer.state[value]["momentum_buffer"] for name, value in own.parameters.items()
    }
    averages = {f"average.{name}": value for name, value in own.averages.items()}
    parts = own.parameters | own.buffers | momentum | averages
    return {name: value.detach().clone() for name, value in parts.items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def nothing(_: Tensor) -> None:
    pass


def poisoned(value: int, task: int = 1) -> Callable[[Tensor], None]:
    def spoil(images: Tensor) -> None:
        images[task, 4 if value == NAN else slice(None), 0, 3, 3] = value

    return spoil


def take_spoiled(own: Training, step: int, spoil: Callable[[Tensor], None]) -> None:
    """Take a step whose images, `(tasks, n, ...)`, are spoiled after they were gathered."""
    shape = tuple(own.episodes.labels.shape)
    hook = own.episodes.register_forward_hook(lambda _, __, images: spoil(images.unflatten(0, shape)))
    with hook:
        own.take(own.episodes.draw(step))


def take(own: Training, steps: range | tuple[int, ...], spoil: Callable[[Tensor], None] = nothing) -> Training:
    """Take steps, of which that with number 2 is spoiled."""
    for step in steps:
        own.step = step
        take_spoiled(own, step, spoil if step == 2 else nothing)
    return own


HEADS = ("svm", "ridge", "prototypes")


@pytest.fixture(params=["the head says", "the loss says"])
def quiet(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a NaN shows in: values are looked at on the CPU, and not on a GPU, where it goes through to the loss."""
    loss = loop.episode_loss

    def unchecked(head: Any, episode: Any, **settings: Any) -> Any:
        bad = ~torch.cat([episode.support, episode.query], 1).isfinite().flatten(1).all(1)
        found = loss(
            head, episode._replace(support=episode.support.nan_to_num(), query=episode.query.nan_to_num()), **settings
        )
        logits = found.logits + torch.where(bad, torch.nan, 0.0)[:, None, None]
        return found._replace(loss=found.loss + 0 * logits.sum(), logits=logits)

    if request.param == "the loss says":
        monkeypatch.setattr(loop, "episode_loss", unchecked)
    return (
        "a loss of nan"
        if request.param == "the loss says"
        else "support: expected finite values, got non-finite values"
    )


@pytest.mark.parametrize("head", HEADS)
def test_a_failed_step_raises_when_it_is_read(head: str, quiet: str) -> None:
    """And no step after it has changed anything."""
    own = take(training(head), range(2))
    before = {name: value for name, value in state(own).items() if name not in own.buffers}
    take(own, range(2, 5), poisoned(NAN))
    with pytest.raises(
        InputError, match=rf"batch: expected finite values.*, got non-finite values in step 2, task 1 \({quiet}"
    ) as caught:
        own.read()
    assert "'skip'" in str(caught.value)
    assert_same(before, {name: value for name, value in state(own).items() if name not in own.buffers})


@pytest.mark.parametrize("average", [0.0, 0.9])
@pytest.mark.parametrize("head", HEADS)
def test_a_failed_step_is_left_out(head: str, average: float, quiet: str, caplog: pytest.LogCaptureFixture) -> None:
    own = take(training(head, on_failure="skip", average=average), range(5), poisoned(NAN))
    own.read()
    other = take(training(head, average=average), (0, 1, 3, 4))
    other.read()
    assert_same(state(own), state(other))
    assert state(own)["backbone.norm.num_batches_tracked"] == 4
    (failure,) = own.failures
    assert (failure["step"], failure["tasks"]) == (2, [1])
    assert quiet in failure["cause"]
    assert f"skipped step 2, task 1 ({quiet}" in caplog.text
    assert not own.stopped
    assert own.step == 5
    assert own.rows[4].pop("skipped") == 1
    assert own.rows == other.rows


@pytest.mark.parametrize("head", HEADS)
def test_a_failed_step_stops_the_training_before_it(
    head: str, quiet: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = take(training(head, on_failure="stop"), range(5), poisoned(NAN))
    own.read()
    assert own.stopped
    assert own.step == 3
    assert [(each["step"], each["tasks"]) for each in own.failures] == [(2, [1])]
    assert f"training ends at step 2, task 1 ({quiet}" in caplog.text
    assert_same(state(own), state(take(training(head), range(2))))
    own.save(tmp_path / "last.safetensors")
    resumed = training(head, on_failure="skip")
    resumed.load(tmp_path / "last.safetensors")
    assert resumed.step == 3
    assert resumed.failures == own.failures
    take(resumed, range(3, 5)).read()
    skipped = take(training(head, on_failure="skip"), range(5), poisoned(NAN))
    skipped.read()
    assert_same(state(resumed), state(skipped))
    assert resumed.rows == skipped.rows
    assert resumed.failures == skipped.failures


@pytest.mark.parametrize("on_failure", ["raise", "skip", "stop"])
def test_a_head_that_can_not_be_fitted_fails_the_step(on_failure: str) -> None:
    own = training(on_failure=on_failure)
    with pytest.raises(SolverError, match="RidgeHead"):
        loop.episode_loss(own.head, own.episodes.split(torch.full((3, 12, 12), 1e9)), ways=3)
    take(own, range(5), poisoned(HUGE))
    if on_failure == "raise":
        with pytest.raises(InputError, match=r"step 2, task .*RidgeHead"):
            own.read()
        return
    own.read()
    (failure,) = own.failures
    assert failure["step"] == 2
    assert 1 in failure["tasks"]
    assert "RidgeHead" in failure["cause"]
    assert_same(state(own), state(take(training(), (0, 1) if own.stopped else (0, 1, 3, 4))))


NAMES = [*training("svm").parameters]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("on_failure", ["raise", "skip", "stop"])
def test_a_gradient_that_is_not_finite_is_named(name: str, on_failure: str) -> None:
    own = training("svm", on_failure=on_failure)
    own.parameters[name].register_hook(lambda gradient: gradient * (torch.inf if own.step == 2 else 1))
    take(own, range(5))
    if on_failure == "raise":
        with pytest.raises(
            InputError, match=rf"batch: expected .*, got non-finite values in step 2 \(the gradient of {name}\)"
        ):
            own.read()
        return
    own.read()
    assert own.failures == [{"step": 2, "tasks": [], "cause": f"the gradient of {name}"}]
    assert_same(state(own), state(take(training("svm"), (0, 1) if own.stopped else (0, 1, 3, 4))))


def test_of_several_processes_the_one_with_the_gradient_names_it() -> None:
    own = take(training(on_failure="skip"), range(1))
    fine: dict[str, Any] = {"loss": 1.0, "failed": True, "gradient": -1}
    own._fail(0, [fine, fine | {"gradient": 1}])
    assert own.failures == [{"step": 0, "tasks": [], "cause": f"the gradient of {[*own.parameters][1]}"}]
    own._fail(3, [fine, fine | {"gradient": 0, "tasks": [1, 3], "cause": "a loss of inf"}])
    assert own.failures[1:] == [{"step": 3, "tasks": [1, 3], "cause": "a loss of inf"}]


def test_several_failed_steps_between_two_readings() -> None:
    own = training(on_failure="skip")
    for step in range(5):
        take_spoiled(own, step, poisoned(NAN, task=step % 2) if step in (0, 3) else nothing)
    own.read()
    assert [(each["step"], each["tasks"]) for each in own.failures] == [(0, [0]), (3, [1])]
    assert_same(state(own), state(take(training(), (1, 2, 4))))
    assert own.rows[4]["skipped"] == 2


def test_what_is_no_matter_of_values_is_never_skipped() -> None:
    own = training(on_failure="skip")
    own.episodes.labels = own.episodes.labels.clone().fill_(7)
    with pytest.raises(InputError, match="labels"):
        take(own, range(1))


# Steps, logs and checkpoints


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_learning_rate_follows_its_schedule(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own, rates, step = training(steps=12, schedule=schedule, learning_rate=0.5), [], torch.optim.SGD.step

    def watched(self: Any, *rest: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *rest)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    take(own, range(12))
    assert rates == pytest.approx([0.5 * SCHEDULES[schedule](each / 12) for each in range(12)])


def test_averages_are_torchs() -> None:
    """Whose decay is constant; ours begins lower, so that the initial weights don't count for long."""
    own = training("svm", average=0.2)  # reached after two steps
    model = nn.ModuleDict({"backbone": own.backbone, "head": own.head})
    reference = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.1), use_buffers=True)
    for step in range(5):
        take(own, (step,))
        reference.multi_avg_fn = get_ema_multi_avg_fn([0.1, 2 / 11, 0.2, 0.2, 0.2][step])
        if not step:
            reference.n_averaged += 1  # else torch's first average would be the first weights
        reference.update_parameters(model)
    assert {"backbone.linear.weight", "backbone.norm.running_var", "head.scale.raw_value"} <= own.averages.keys()
    for name, value in own.averages.items():
        torch.testing.assert_close(value, reference.module.state_dict()[name])
        assert not torch.equal(value, own._state()[name])


def test_averages_are_what_is_validated_and_kept() -> None:
    own = take(training(average=0.9, validation_episodes=20, test_queries=2, validation_shots=2), range(5))
    other = training(validation_episodes=20, test_queries=2, validation_shots=2)
    other.load_weights(own.weights())
    before = state(own)
    data = ImageSet(noise(60, 1, 8, 8, seed=1) // 2, torch.arange(60) % 6, tuple("abcdef"))
    accuracies = []
    for each in (own, other):
        assert each.validate(data)
        accuracies.append(each.best)
    assert accuracies[0] == accuracies[1] > 0
    assert_same(state(own), before)
    assert {name: value.tolist() for name, value in own.weights().items() if name in own.averages} == {
        name: value.tolist() for name, value in own.averages.items()
    }


@pytest.mark.parametrize(("head", "stop"), [("svm", 3), ("ridge", 1), ("ridge", 10), ("prototypes", 14)])
def test_a_resumed_training_is_the_same(head: str, stop: int, tmp_path: Path) -> None:
    """With its log, though the checkpoint falls between two rows of it."""
    path = tmp_path / "new" / "last.safetensors"
    settings = {"steps": 20, "average": 0.9 if stop == 3 else 0.0}
    whole = take(training(head, **settings), range(20))
    whole.read()
    first = take(training(head, **settings), range(stop))
    first.read()
    first.best, first.seconds = 0.25, 7.5
    first.save(path)
    resumed = training(head, **settings)
    torch.manual_seed(99)  # on which nothing depends
    resumed.load(path)
    assert (resumed.step, resumed.best, resumed.seconds) == (stop, 0.25, 7.5)
    take(resumed, range(stop, 20)).read()
    assert_same(state(resumed), state(whole))
    assert list(whole.rows) == [9, 19]
    assert [*resumed.rows] == [*whole.rows]
    for step, row in whole.rows.items():
        assert row.keys() == ({*loop.METRICS} if head == "svm" else {*loop.METRICS} - {"iterations"})
        assert resumed.rows[step] == pytest.approx(row, rel=1e-12)


def test_a_checkpoint_has_all_that_there_is(tmp_path: Path) -> None:
    own = take(training("svm", steps=20, average=0.9), range(3))
    own.read()
    own.save(tmp_path / "last.safetensors")
    tensors, record = _storage.load(tmp_path / "last.safetensors", **KIND)
    assert_same(tensors, state(own))
    assert record["options"] == own.options.record()
    assert len(record["_pending"]) == 3


def test_rows_are_means_and_the_largest_gap() -> None:
    """However often the steps are read."""
    own, other = (training("svm", steps=6) for _ in range(2))
    take(own, range(6)).read()
    told = []
    for step in range(6):
        take(other, (step,)).read()
        told += other._pending[-1:]
    (row,) = own.rows.values()
    assert [len(told), row["certified"]] == [5, 1]
    assert row == pytest.approx(other.rows[5], rel=1e-12)
    assert row["gap"] >= max(each["gap"] for each in told)
    assert min(each["loss"] for each in told) < row["loss"] < max(each["loss"] for each in told)


def test_the_loss_is_that_of_the_options() -> None:
    """With label smoothing, of the head's logits of the batch."""
    for smoothing in (0.0, 0.3):
        own = training(label_smoothing=smoothing, steps=1)
        own.backbone.dropout = nn.Identity()
        batch, labels = images_of_step(own.episodes, 0), own.episodes.labels
        episode = split_task(own.backbone(batch.flatten(0, 1)).unflatten(0, labels.shape), labels, shots=2)
        logits = own.head(episode.support, episode.support_labels, episode.query)
        targets = episode.query_labels.flatten()
        expected = nn.functional.cross_entropy(logits.flatten(0, 1), targets, label_smoothing=smoothing)
        take(own, (0,)).read()
        assert own.rows[0]["loss"] == pytest.approx(expected.item())
        assert own.rows[0]["accuracy"] == pytest.approx((logits.argmax(-1).flatten() == targets).double().mean().item())


# Heads of which the CPU does all but the Gram matrix

ON_HOST = {
    "svm": lambda: SVMHead(scale=Learnable(2.0)),
    "svm, smoothed": lambda: SVMHead(C=0.5, smoothing=1.0, scale=Learnable(2.0)),
    "Weston-Watkins": lambda: WestonWatkinsSVMHead(scale=Learnable(2.0)),
}


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
@pytest.mark.parametrize("name", ON_HOST)
def test_the_same_loss_from_gram_matrices(
    name: str, dtype: torch.dtype, tolerance: float, label_smoothing: float
) -> None:
    """Whose gradients are those of the features and of what the head learns."""
    own, head = Episodes(set_of(), **SIZES, augment="none"), ON_HOST[name]()
    kernel = head.kernel
    values = torch.randn(4, 15, 20, dtype=dtype, generator=torch.Generator().manual_seed(2)).requires_grad_()
    settings: dict[str, Any] = {"ways": 3, "label_smoothing": label_smoothing}
    expected = episode_loss(head, own.split(values), **settings)
    found = loop._loss_on_host(head, values, own, **settings)
    assert head.kernel is kernel
    close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance, check_dtype=False)
    close(found.loss, expected.loss)
    close(found.logits, expected.logits)
    assert found.metrics.keys() == expected.metrics.keys() >= {*loop.METRICS}
    for metric, value in expected.metrics.items():
        close(found.metrics[metric], value)
    learned = (values, *head.parameters())
    assert len(learned) == 2
    for one, other in zip(*(torch.autograd.grad(each.loss, learned) for each in (found, expected)), strict=True):
        assert one.dtype == other.dtype
        assert other.abs().max() > 1e-3
        close(one, other)


def test_the_kernel_is_back_when_the_head_raises() -> None:
    own, head = Episodes(set_of(), **SIZES, augment="none"), SVMHead()
    kernel, values = head.kernel, torch.randn(4, 15, 20)
    values[1, 4, 3] = torch.nan
    with pytest.raises((InputError, SolverError)):
        loop._loss_on_host(head, values, own, ways=3)
    assert head.kernel is kernel


def test_a_training_from_gram_matrices_is_the_same() -> None:
    """With a failed step, which is left out, and whose cause is said."""
    own, other = (training("svm", on_failure="skip") for _ in range(2))
    own.gram_on_host = True
    assert not other.gram_on_host
    for each in (own, other):
        take(each, range(5), poisoned(NAN)).read()
    assert [(each["step"], each["tasks"]) for each in own.failures] == [(2, [1])]
    assert "non-finite" in own.failures[0]["cause"]
    torch.testing.assert_close(state(own), state(other), rtol=1e-4, atol=1e-6)
    assert own.rows[4] == pytest.approx(other.rows[4], rel=1e-5, abs=1e-9)


def test_the_solver_of_an_svm_has_the_backend_of_the_options() -> None:
    own, other = training("svm", backend="torch"), training("svm")
    assert [each.head.solver.backend for each in (own, other)] == ["torch", "auto"]
    for each in (own, other):
        take(each, range(2)).read()
    torch.testing.assert_close(state(own), state(other), rtol=1e-4, atol=1e-6)
    assert training("ridge", backend="torch").head.state_dict().keys() == training("ridge").head.state_dict().keys()


# On a GPU


def on_gpu(head: str, device: str = "cuda", **changes: Any) -> Training:
    """A Conv-4 on images of noise, with the paper's augmentation."""
    settings: dict[str, Any] = {
        "head": head,
        "device": device,
        "compile": "none",
        "steps": 12,
        "tasks": 2,
        "shots": 2,
        "queries": 3,
        "augment": "flip-crop-jitter",
    }
    options = Options(**(settings | changes))
    data = ImageSet(noise(300, 3), torch.arange(300) % 10, tuple("abcdefghij"))
    torch.manual_seed(0)
    parts = build_model(options.record(), data.images)
    return Training(options, *parts, episodes(data, options, Processes()), Processes())


def assert_nearly_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Single values may differ: the sums of a GPU have no fixed order, and steps amplify the difference."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        difference, size = (each.double().norm().item() for each in (value - other[name], other[name]))
        assert difference <= 0.03 * size + 1e-3, name


def mean_of(own: Training) -> Tensor:
    return cast("Tensor", own.backbone.mean)


@contextmanager
def synchronizing_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings(action="ignore"):  # that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
@pytest.mark.parametrize("on_failure", ["raise", "skip"])
@pytest.mark.parametrize("head", ["prototypes", "ridge", "svm"])
def test_steps_do_not_wait_for_the_gpu(head: str, on_failure: str, cuda: torch.device) -> None:
    """Those of an SVM need the backend for GPUs; otherwise, they wait for the Gram matrix, which the CPU needs."""
    own = on_gpu(head, on_failure=on_failure, backend="cuda")
    for step in range(2):
        own.take(own.episodes.draw(step))
    with synchronizing_is_an_error():
        for step in range(2, 12):
            own.take(own.episodes.draw(step))
    own.read()
    assert list(own.rows) == [9]
    assert 0 < own.rows[9]["loss"] < 10
    with pytest.raises(RuntimeError, match="synchroniz"), synchronizing_is_an_error():
        mean_of(own).sum().item()


@pytest.mark.gpu
def test_only_svms_run_from_gram_matrices(cuda: torch.device) -> None:
    heads = ("svm", "svm-smoothed", "ridge", "prototypes")
    assert [on_gpu(head).gram_on_host for head in heads] == [True, True, False, False]
    assert not on_gpu("svm", backend="cuda").gram_on_host
    assert not on_gpu("svm", device="cpu").gram_on_host


@pytest.mark.gpu
@pytest.mark.parametrize("augment", ["none", "flip-crop", "flip-crop-jitter"])
def test_a_gpu_sees_the_same_images(augment: str, cuda: torch.device) -> None:
    here, there = (Episodes(set_of(), **SIZES, augment=augment, device=device) for device in ("cpu", cuda))
    for step in range(20):
        expected, found = (images_of_step(each, step) for each in (here, there))
        assert found.device.type == "cuda"
        difference = (found.cpu().int() - expected.int()).abs()
        assert difference.max() <= (augment == "flip-crop-jitter")
        assert difference.double().mean() < 1e-3
    assert torch.equal(there.labels.cpu(), here.labels)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")  # of Inductor
def test_a_compiled_step_in_bfloat16(cuda: torch.device) -> None:
    own = on_gpu("svm", compile="default", precision="bfloat16", steps=2)
    for step in range(2):
        own.take(own.episodes.draw(step))
    own.read()
    assert 0 < own.rows[1]["loss"] < 10
    assert {value.dtype for value in own.parameters.values()} <= {torch.float32, torch.float64}


@pytest.mark.gpu
@pytest.mark.parametrize("head", HEADS)
def test_a_failed_step_on_a_gpu_is_left_out(head: str, cuda: torch.device) -> None:
    """Values are not looked at there before they are used."""
    own, other = (on_gpu(head, on_failure="skip") for _ in range(2))
    for step in range(4):
        with torch.no_grad():
            good = mean_of(own).clone()
            mean_of(own).mul_(torch.nan if step == 2 else 1)
        own.take(own.episodes.draw(step))
        mean_of(own).copy_(good)
    for step in (0, 1, 3):
        other.step = step
        other.take(other.episodes.draw(step))
    own.read()
    assert [each["step"] for each in own.failures] == [2]
    assert_nearly_same(state(own), state(other))


@pytest.mark.gpu
@pytest.mark.parametrize("head", ["svm", "ridge"])
def test_a_resumed_training_on_a_gpu(head: str, cuda: torch.device, tmp_path: Path) -> None:
    whole, first = on_gpu(head), on_gpu(head)
    for step in range(6):
        whole.take(whole.episodes.draw(step))
    for step in range(3):
        first.take(first.episodes.draw(step))
    first.read()
    first.save(tmp_path / "last.safetensors")
    resumed = on_gpu(head)
    resumed.load(tmp_path / "last.safetensors")
    for step in range(3, 6):
        resumed.take(resumed.episodes.draw(step))
    assert_nearly_same(state(resumed), state(whole))


def test_refuses_an_unknown_augmentation() -> None:
    assert augmentation("flip-crop-jitter") == JITTER
    with pytest.raises(InputError, match="augment"):
        augmentation("jitter")
