"""`python -m benchmarks.train`: a short run leaves everything it promises, resumes exactly, and says what is wrong."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import convexheads as ch
from benchmarks import models, train

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
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a short run."""
    folder = tmp_path_factory.mktemp("run") / "digits"
    train.main([*SHORT, "--output", str(folder)])
    return folder


def test_result_is_complete(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert {(row["backbone"], row["head"], row["shots"]) for row in result["results"]} == {
        *(("meta-trained", head, shots) for head in models.HEADS for shots in (1, 5)),
        *((backbone, "svm", shots) for backbone in ("untrained", "none: pixels") for shots in (1, 5)),
    }
    for row in result["results"]:
        assert 0.3 < row["accuracy"] <= 1  # chance is 0.2
        assert 0 < row["interval"] < 0.1
        assert row["episodes"] == 40
        if row["head"] == "svm":
            assert 0 <= row["largest_gap"] < 1e-6
        else:
            assert row["largest_gap"] is None
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
    step = train.EpisodicModule.training_step

    def stop_at_the_fourth(self, batch, batch_index):
        if batch_index == 3:
            raise RuntimeError("the power is cut")
        return step(self, batch, batch_index)

    arguments = [*SHORT, "--output", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(train.EpisodicModule, "training_step", stop_at_the_fourth)
        with pytest.raises(RuntimeError, match="the power is cut"):
            train.main(arguments)
    with pytest.raises(SystemExit, match="holds an unfinished run"):
        train.main(arguments)
    with pytest.raises(SystemExit, match="another value of seed"):
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


def test_says_that_there_is_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="without a checkpoint"):
        train.main([*SHORT, "--output", str(tmp_path), "--resume"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "mnist"], "cifar-fs"),
        (["--head", "forest"], "prototypes"),
        (["--steps", "many"], "steps"),
        (["--colour", "red"], "colour"),
    ],
)
def test_refuses_unusable_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        train.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--test-shots", "[1,-5]"], ["--seed", "-1"]])
def test_refuses_numbers_out_of_range(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match=arguments[0].strip("-").replace("-", "_") + r": got .*wanted"):
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
    backbone = models.Conv4(images)
    assert backbone(images).shape == (50, 256)
    assert backbone.mean.flatten().tolist() == pytest.approx(images.double().mean((0, 2, 3)).tolist())
    assert {"mean", "deviation"} < backbone.state_dict().keys()


def test_refuses_an_unknown_head() -> None:
    with pytest.raises(ch.InputError, match="svm, ridge, prototypes"):
        models.make_head("forest")
