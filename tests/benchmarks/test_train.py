"""`python -m benchmarks.train`: a short run leaves everything it promises, resumes exactly, and says what is wrong."""

from __future__ import annotations

import csv
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from tasks import ROOT

import convexheads as ch
from benchmarks import train
from benchmarks.data import ImageSet
from benchmarks.loop import KIND, Training
from benchmarks.options import Options
from convexheads import _storage
from convexheads.models import Conv4, build_head

SHORT = [
    "--steps",
    "6",
    "--tasks",
    "2",
    "--test-episodes",
    "40",
    "--checkpoint-every",
    "2",
    "--device",
    "cpu",
    "--threads",
    "1",
]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """What the last checkpoint holds: weights, statistics and momentum."""
    return _storage.load(folder / "checkpoints" / "last.safetensors", **KIND)[0]


@pytest.fixture(scope="module", autouse=True)
def _few_images() -> Iterator[None]:
    """Every third of the digits: what these runs take is the time that their images take."""
    load = train.load

    def every_third(*arguments: Any, **settings: Any) -> dict[str, ImageSet]:
        data = load(*arguments, **settings)
        if arguments[0] != "digits":
            return data
        return {name: ImageSet(part.images[::3], part.labels[::3], part.classes) for name, part in data.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load", every_third)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a short run."""
    folder = tmp_path_factory.mktemp("run") / "digits"
    train.main([*SHORT, "--output", str(folder)])
    return folder


def test_result_is_complete(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert {(row["backbone"], row["head"], row["shots"]) for row in result["results"]} == {
        *(("meta-trained", head, shots) for head in train.HEADS for shots in (1, 5)),
        *((backbone, "svm", shots) for backbone in ("untrained", "none: pixels") for shots in (1, 5)),
    }
    for row in result["results"]:
        assert 0.3 < row["accuracy"] <= 1  # chance is 0.2
        assert 0 < row["interval"] < 0.1
        assert row["episodes"] == 40
        assert 0 <= row["largest_gap"] < 1e-6
    assert result["seconds"]["training"] > 0
    assert result["seconds"]["evaluation"] > 0
    assert result["seed"] == 0
    assert result["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert result["machine"]["threads"] == torch.get_num_threads()


def test_table_and_picture_show_every_head(finished: Path) -> None:
    lines = [line for line in (finished / "result.md").read_text().splitlines() if line.startswith("|")]
    result = json.loads((finished / "result.json").read_text())
    for row in result["results"]:
        line = next(line for line in lines if row["backbone"] in line and row["head"] in line)
        assert f"{100 * row['accuracy']:.2f} ± {100 * row['interval']:.2f}" in line
    with Image.open(finished / "accuracy.png") as picture:
        assert min(picture.size) > 300
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 4


def test_log_covers_the_training(finished: Path) -> None:
    with (finished / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[-1]["step"] == "5"
    for row in rows:
        assert float(row["loss"]) > 0
        assert 0 <= float(row["accuracy"]) <= 1
        assert 0 <= float(row["gap"]) < 1e-6


def test_config_repeats_the_run(finished: Path, tmp_path: Path) -> None:
    config = (finished / "config.yaml").read_text()
    assert yaml.safe_load(config)["steps"] == 6
    assert config.startswith("# python -m benchmarks.train --steps 6 --tasks 2")
    train.main(["--config", str(finished / "config.yaml"), "--device", "cpu", "--output", str(tmp_path / "again")])
    for name, value in weights(finished).items():
        assert torch.equal(value, weights(tmp_path / "again")[name]), name


def test_no_file_names_a_folder_of_this_machine(finished: Path) -> None:
    for path in finished.glob("*.*"):
        assert str(finished.parent).encode() not in path.read_bytes(), path.name


def test_resumed_run_ends_where_an_uninterrupted_one_does(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = Training.take

    def stop_at_the_fourth(self, drawn):
        if self.step == 3:
            raise RuntimeError("the power is cut")
        take(self, drawn)

    arguments = [*SHORT, "--output", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(Training, "take", stop_at_the_fourth)
        with pytest.raises(RuntimeError, match="the power is cut"):
            train.main(arguments)
    with pytest.raises(SystemExit, match="holds an unfinished run"):
        train.main(arguments)
    with pytest.raises(SystemExit, match="different values of seed"):
        train.main([*arguments, "--resume", "--seed", "1"])
    assert not (tmp_path / "result.json").exists()

    train.main([*arguments, "--resume"])
    expected, found = weights(finished), weights(tmp_path)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    results = [json.loads((folder / "result.json").read_text())["results"] for folder in (finished, tmp_path)]
    assert results[0] == results[1]


def test_a_finished_run_resumes_to_the_same_result(finished: Path) -> None:
    before = json.loads((finished / "result.json").read_text())["results"]
    train.main([*SHORT, "--output", str(finished), "--resume"])
    assert json.loads((finished / "result.json").read_text())["results"] == before


def test_a_run_of_an_earlier_version_had_the_defaults_of_new_options() -> None:
    record = Options(steps=6).record()
    earlier = {name: value for name, value in record.items() if name != "backend"}
    assert train._changed(record, earlier) == []
    assert train._changed(record | {"backend": "cuda", "steps": 7}, earlier) == ["backend", "steps"]


def test_says_that_there_is_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="without a checkpoint"):
        train.main([*SHORT, "--output", str(tmp_path), "--resume"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "mnist"], "cifar-fs"),
        (["--head", "forest"], "prototypes"),
        (["--steps", "many"], "steps"),
        (["--color", "red"], "color"),
    ],
)
def test_refuses_unusable_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        train.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--test-shots", "[1,-5]"], ["--seed", "-1"]])
def test_refuses_numbers_out_of_range(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match=arguments[0].strip("-").replace("-", "_") + r": expected .*, got "):
        train.main(arguments)


def test_missing_data_leaves_no_traceback(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"cifar100/cifar100\.zip"):
        train.main(["--dataset", "cifar-fs", "--data-root", str(tmp_path), "--output", str(tmp_path / "run")])


def test_the_environment_names_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVEXHEADS_DATA", str(tmp_path))
    assert train.Options().root == tmp_path
    assert train.Options(data_root=Path("elsewhere")).root == Path("elsewhere")


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        train.main(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "--data-root DATA_ROOT folder of the data",
        "--threads THREADS processor threads",
        "--resume continue",
    ):
        assert words in text


def test_backbone_standardises_pixels_and_gives_256_features() -> None:
    images = torch.randint(256, (50, 3, 32, 32), dtype=torch.uint8)
    backbone = Conv4.from_images(images)
    assert backbone(images).shape == (50, 256)
    assert backbone.mean.flatten().tolist() == pytest.approx(images.double().mean((0, 2, 3)).tolist())
    assert {"mean", "std"} < backbone.state_dict().keys()


def test_refuses_an_unknown_head() -> None:
    with pytest.raises(ch.InputError, match=r"svm, .*ridge, prototypes"):
        build_head("forest")


def run_as_a_command(*arguments: str, script: str = "-m benchmarks.train") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *script.split(), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT, env=environment)


@pytest.mark.slow
def test_two_processes_train_as_one_with_all_episodes(tmp_path: Path) -> None:
    """By gloo on the CPU, from the command line; 4 episodes per step, of which each of two processes has 2."""
    for processes in ("1", "2"):
        done = run_as_a_command(
            *["--steps", "3", "--tasks", "4", "--test-episodes", "10", "--device", "cpu", "--threads", "1"],
            *["--processes", processes, "--output", str(tmp_path / processes)],
            script="tests/two_processes.py",
        )
        assert done.returncode == 0, done.stderr
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    for name, value in one.items():  # the logits' scale is in float32
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-8)
    results = [json.loads((tmp_path / name / "result.json").read_text())["results"] for name in ("1", "2")]
    assert [row["accuracy"] for row in results[0]] == pytest.approx([row["accuracy"] for row in results[1]], abs=0.01)


@pytest.mark.slow
def test_killed_at_any_moment_it_resumes_to_the_same_weights(finished: Path, tmp_path: Path) -> None:
    arguments = [*SHORT[:-6], "--checkpoint-every", "1", "--device", "cpu", "--threads", "1", "--output", str(tmp_path)]
    checkpoint = tmp_path / "checkpoints" / "last.safetensors"
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.train", *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not checkpoint.is_file() and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (tmp_path / "result.json").exists()
    done = run_as_a_command(*arguments, "--resume")
    assert done.returncode == 0, done.stderr
    expected, found = weights(finished), weights(tmp_path)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_full_disk_leaves_the_last_checkpoint(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file may grow beyond 300 kB from the second checkpoint on, as if there were no more room."""
    arguments, save = [*SHORT, "--output", str(tmp_path)], Training.save
    limits, saves = resource.getrlimit(resource.RLIMIT_FSIZE), []

    def fill_up(self, path):
        saves.append(path)
        if len(saves) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
        save(self, path)

    checkpoint = tmp_path / "checkpoints" / "last.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(Training, "save", fill_up)
        try:
            with pytest.raises(
                SystemExit, match=r"output: expected .*the last checkpoint is complete, --resume.*, got .*too large"
            ):
                train.main(arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert _storage.load(checkpoint, **KIND)[1]["step"] == 2
    assert [path.name for path in checkpoint.parent.iterdir()] == ["last.safetensors"]
    train.main([*arguments, "--resume"])
    expected, found = weights(finished), weights(tmp_path)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_full_disk_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Training, "save", full)
    with pytest.raises(SystemExit, match=r"expected room to write, got .*\(No space left on device\)$"):
        train.main([*SHORT, "--output", str(tmp_path)])


@pytest.mark.slow
def test_in_bfloat16_the_backbone_is_cast_and_the_head_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes, forward, fit = {"backbone": [], "head": []}, Conv4.forward, ch.SVMHead.fit

    def watched_forward(self, images):
        features = forward(self, images)
        dtypes["backbone"] += [features.dtype] if self.training else []
        return features

    def watched_fit(self, support, *rest, **more):
        dtypes["head"].append(support.dtype)
        return fit(self, support, *rest, **more)

    monkeypatch.setattr(Conv4, "forward", watched_forward)
    monkeypatch.setattr(ch.SVMHead, "fit", watched_fit)
    train.main([*SHORT, "--steps", "2", "--precision", "bfloat16", "--output", str(tmp_path)])
    assert dtypes["backbone"] == [torch.bfloat16] * 2
    assert set(dtypes["head"]) == {torch.float32}
    trained = ch.load_pretrained(tmp_path)
    assert trained.settings["precision"] == "bfloat16"
    assert {value.dtype for value in trained.backbone.parameters()} == {torch.float32}


def test_a_damaged_checkpoint_is_named_and_left_alone(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "last.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-5000])
    with pytest.raises(SystemExit, match=r"resume: expected a complete checkpoint.*, got .*last\.safetensors, damaged"):
        train.main([*SHORT, "--output", str(tmp_path / "run"), "--resume"])


@pytest.fixture
def with_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digits, two of whose unseen classes validate."""
    data = train.load("digits")
    unseen = data["test"]
    parts = {"train": data["train"], "test": unseen, "val": ImageSet(unseen.images, unseen.labels, unseen.classes)}
    monkeypatch.setattr(train, "load", lambda *_, **__: dict(parts))


@pytest.mark.usefixtures("with_validation")
def test_the_best_weights_on_validation_classes_are_kept(tmp_path: Path) -> None:
    options = ["--validate-every", "2", "--validation-episodes", "20", "--learning-rate", "1"]
    train.main([*SHORT, *options, "--output", str(tmp_path)])
    with (tmp_path / "metrics.csv").open() as file:
        accuracies = {int(row["step"]): row["val_accuracy"] for row in csv.DictReader(file) if row["val_accuracy"]}
    assert list(accuracies) == [1, 3, 5]
    best, record = _storage.load(tmp_path / "checkpoints" / "best.safetensors", **KIND)
    assert record["step"] - 1 == max(accuracies, key=lambda step: float(accuracies[step]))
    saved = ch.load_pretrained(tmp_path)
    for name, value in saved.backbone.state_dict().items():
        assert torch.equal(value, best[f"backbone.{name}"]), name


@pytest.mark.usefixtures("with_validation")
def test_trainval_trains_on_validation_classes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    episodes = train.episodes
    monkeypatch.setattr(train, "episodes", lambda data, *rest: seen.append(data) or episodes(data, *rest))
    train.main([*SHORT, "--trainval", "--output", str(tmp_path)])
    assert len(seen[0].classes) == 45
    assert not (tmp_path / "checkpoints" / "best.safetensors").exists()


def test_rotated_classes_and_averaged_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    episodes = train.episodes
    monkeypatch.setattr(train, "episodes", lambda data, *rest: seen.append(data) or episodes(data, *rest))
    train.main([*SHORT, "--rotations", "--average", "0.9", "--output", str(tmp_path)])
    plain = train.load("digits")["train"]
    assert len(seen[0].classes) == 4 * len(plain.classes)
    for turns in range(4):
        of = slice(turns * len(plain), (turns + 1) * len(plain))
        assert torch.equal(seen[0].images[of].rot90(-turns, (-2, -1)), plain.images)
        assert torch.equal(seen[0].labels[of] - turns * len(plain.classes), plain.labels)
    tensors, saved = weights(tmp_path), ch.load_pretrained(tmp_path)
    for name, value in saved.backbone.state_dict().items():
        assert torch.equal(value, tensors.get(f"average.backbone.{name}", tensors[f"backbone.{name}"])), name
    assert not torch.equal(tensors["average.backbone.layers.0.conv.weight"], tensors["backbone.layers.0.conv.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("head", ["ridge", "svm"])
def test_the_papers_own_recipe_runs(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: str
) -> None:
    """A few steps of Table 2's ResNet-12, on the CPU; saved, resumed and evaluated, on every tenth image."""
    load = train.load

    def every_tenth(*arguments, **settings):
        return {
            part: ImageSet(data.images[::10], data.labels[::10], data.classes)
            for part, data in load(*arguments, **settings).items()
        }

    monkeypatch.setattr(train, "load", every_tenth)
    arguments = ["--recipe", f"table2/cifar-fs/resnet12/{head}", "--data-root", str(data_root)]
    arguments += ["--output", str(tmp_path), "--device", "cpu"]
    short = ["--steps", "2", "--tasks", "1", "--validate-every", "2", "--validation-episodes", "4"]
    command, take = [*arguments, *short, "--test-episodes", "4", "--checkpoint-every", "1"], Training.take
    with monkeypatch.context() as patch:
        patch.setattr(Training, "take", lambda self, drawn: take(self, drawn) if self.step == 0 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.main(command)
    train.main([*command, "--resume"])
    trained = ch.load_pretrained(tmp_path)
    assert trained.backbone(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 2560)
    assert trained.settings["augment"] == "flip-crop-jitter"
    result = json.loads((tmp_path / "result.json").read_text())
    assert f"--backbone resnet12 {'' if head == 'svm' else '--head ridge '}" in result["command"]
