"""The scripts of the paper's tables: published values, configurations, and ours measured, paired and written."""

from __future__ import annotations

import json
import math
import random
from importlib import import_module
from pathlib import Path
from typing import get_args, get_type_hints

import pandas
import pytest
import torch
from learn2learn.nn import SVClassifier

from benchmarks import figure3, table3, tables
from benchmarks.backbones import Pixels
from benchmarks.data import AUGMENTATIONS, DATASETS, load, taskset
from benchmarks.models import load_weights
from benchmarks.options import Options, read_settings
from benchmarks.tables import Row, Table
from convexheads import InputError, SVMHead, embed, evaluate, split_task

TABLES = {name: import_module(f"benchmarks.{name}").TABLE for name in ("table1", "table2")}
CONFIGURATIONS = sorted((Path(tables.__file__).parent / "configs").glob("*/*.yaml"))


@pytest.mark.parametrize(
    ("table", "model", "backbone", "dataset", "shots", "expected"),
    [
        ("table1", "MetaOptNet-SVM", "ResNet-12", "miniimagenet", 1, (62.64, 0.61)),
        ("table1", "LEO", "WRN-28-10", "tieredimagenet", 5, (81.44, 0.09)),
        ("table2", "Prototypical Networks", "64-64-64-64", "fc100", 5, (48.6, 0.6)),
        ("table2", "MetaOptNet-SVM-trainval", "ResNet-12", "cifar-fs", 5, (85.0, 0.5)),
        ("table3", "MetaOptNet-RR", "64-64-64-64", "tieredimagenet", 5, (72.11, 0.59)),
    ],
)
def test_published_values_are_the_papers(table, model, backbone, dataset, shots, expected) -> None:
    rows = tables.published(table)
    own = rows.query("model == @model and backbone == @backbone and dataset == @dataset and shots == @shots")
    assert [tuple(pair) for pair in own[["accuracy", "interval"]].to_numpy()] == [expected]
    assert not rows.duplicated(["model", "backbone", "dataset", "shots"]).any()


def test_the_paper_has_no_svm_with_conv4_on_cifar() -> None:
    rows = tables.published("table2").query("backbone == '64-64-64-64'")
    assert set(rows["model"]) == {"Prototypical Networks"}


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_configuration_is_usable(path: Path) -> None:
    if path.parent.name == "parts":
        assert read_settings(path)
        return
    options = Options.read(path)
    assert options.head in path.stem
    assert options.dataset in path.stem
    assert "laptop" in path.read_text() or (options.total_steps, options.schedule) == (60_000, "paper")


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_every_cell_has_its_configuration(table: Table) -> None:
    for rows in table.rows.values():
        for row in rows:
            for (dataset, shots), name in row.configurations.items():
                options = Options.read(tables.HERE / "configs" / f"{name}.yaml")
                assert options.dataset == dataset
                assert dataset in table.datasets
                assert shots in options.test_shots


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Table:
    """A table of two heads on digits, whose files lie in a folder of their own."""
    for head in ("ridge", "prototypes"):
        file = tmp_path / "configs" / "small" / f"digits_{head}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"dataset: digits\nhead: {head}\nsteps: 2\ntasks: 2\ntest_episodes: 10\n")
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "small.csv").write_text(
        "model,backbone,dataset,shots,accuracy,interval,note\nRidge,Conv,digits,1,61.5,0.7,\nOther,Big,digits,5,99.0,0.1,\n"
    )
    monkeypatch.setattr(tables, "HERE", tmp_path)
    monkeypatch.setitem(tables.TITLES, "digits", "Digits")
    monkeypatch.chdir(tmp_path)
    tables._test_classes.cache_clear()
    tables._features.cache_clear()
    rows = [
        Row(name, "Conv", {("digits", 1): f"small/digits_{head}", ("digits", 5): f"small/digits_{head}"})
        for name, head in (("Prototypes", "prototypes"), ("Ridge", "ridge"))
    ]
    return Table("small", "Small table", ("digits",), {"laptop": rows})


def test_trains_what_is_missing_and_writes_the_same_table_again(small: Table, tmp_path: Path) -> None:
    arguments = ["--episodes", "30", "--output", "result"]
    with pytest.raises(SystemExit, match=r"weights: got none of small/digits_prototypes, wanted --train, or"):
        tables.main(small, "", arguments)
    tables.main(small, "", [*arguments, "--train"])
    files = {path.name: path.read_bytes() for path in (tmp_path / "result").iterdir()}
    assert set(files) == {"small.md", "small.csv", "small.json", "small.png"}
    # What has no weights is left out, and said to be.
    moved = tmp_path / "runs" / "small_digits_ridge"
    moved.rename(tmp_path / "moved")
    tables.main(small, "", [*arguments[:2], "--output", "part"])
    assert set(pandas.read_csv(tmp_path / "part" / "small.csv")["model"]) == {"Prototypes"}
    (tmp_path / "moved").rename(moved)
    # Committed weights are found first, and give the same table.
    (tmp_path / "results").mkdir()
    for run in (tmp_path / "runs").iterdir():
        run.rename(tmp_path / "results" / run.name)
    tables._features.cache_clear()
    tables.main(small, "", arguments)
    assert (tmp_path / "result" / "small.csv").read_bytes() == files["small.csv"]
    assert (tmp_path / "result" / "small.md").read_bytes() == files["small.md"]

    lines = files["small.md"].decode().splitlines()
    row = {tuple(cell.strip() for cell in line.split("|")[1:4]): line for line in lines if line.startswith("| ")}
    assert "61.5 ± 0.7" in row["Ridge", "Conv", "published"]
    assert "n/a" in row["Ridge", "Conv", "published"]
    assert row["Prototypes", "Conv", "published"].count("n/a") == 2
    frame = pandas.read_csv(tmp_path / "result" / "small.csv")
    own = frame[frame["model"] == "Ridge"].iloc[0]
    assert f"{own['accuracy']:.2f} ± {own['interval']:.2f}" in row["Ridge", "Conv", "ours"]
    assert (frame["training episodes"] == 4).all()
    # paired: what the differences of the episodes' accuracies say
    data = load("digits")["test"]
    accuracies = []
    for head in ("prototypes", "ridge"):
        trained = load_weights(tmp_path / "results" / f"small_digits_{head}" / "model.safetensors")
        features = embed(trained.backbone, data.images, progress=False)
        accuracies.append(
            evaluate(trained.head, features, data.labels, shots=1, episodes=30, progress=False).accuracies
        )
    difference = 100 * (accuracies[1] - accuracies[0])
    assert own["difference"] == pytest.approx(difference.mean().item())
    assert own["difference interval"] == pytest.approx(1.96 * difference.std().item() / 30**0.5)
    record = json.loads(files["small.json"])
    assert len(record["results"]) == 4
    assert record["versions"]["torch"]


def test_damaged_weights_are_named(tmp_path: Path, small: Table) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(InputError, match=r"weights: got .*model\.safetensors"):
        load_weights(path)
    tables.evaluate("small/digits_ridge", 1, root=None, train=True, episodes=5, progress=False)
    whole = (tmp_path / "runs" / "small_digits_ridge" / "model.safetensors").read_bytes()
    for damaged in (whole[:-1000], whole[:100], b"", b"no weights"):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"wanted a complete model\.safetensors"):
            load_weights(path)
    path.write_bytes(whole)
    assert load_weights(path).settings["head"] == "ridge"


def test_agrees_with_learn2learns_tasks_and_classifier() -> None:
    """200 episodes each, drawn and solved by code that nobody here wrote, within the intervals."""
    data = load("digits")["test"]
    features = embed(Pixels(), data.images, progress=False)
    ours = evaluate(SVMHead(C=0.1, smoothing=1.0), features, data.labels, shots=1, episodes=200, progress=False)
    tasks, accuracies = taskset(data, ways=5, samples=16), []
    random.seed(0)
    for _ in range(200):
        pixels, labels = tasks.sample()
        episode = split_task(Pixels()(pixels), labels, shots=1)
        classifier = SVClassifier()
        classifier.fit_(episode.support, episode.support_labels, 5)
        guess = classifier(episode.query).argmax(-1)
        accuracies.append((guess == episode.query_labels).double().mean())
    theirs = torch.stack(accuracies)
    interval = 1.96 * (theirs.var() / 200 + ours.accuracies.var() / 200).sqrt()
    assert abs(theirs.mean() - ours.mean) < interval
    assert ours.mean > 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: [", r"(?s)config: got .*wanted a YAML file"),
        ("- 1", "which holds a list"),
        ("stepps: 3", "with stepps, wanted options of"),
        ("parts: [nowhere.yaml]", r"nowhere\.yaml"),
    ],
)
def test_unusable_configurations(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        Options.read(path)


def test_options_know_every_data_set_and_augmentation() -> None:
    kinds = get_type_hints(Options)
    assert get_args(kinds["dataset"]) == DATASETS
    assert get_args(get_args(kinds["augment"])[0]) == AUGMENTATIONS


def test_figure3_sweeps_the_iterations_of_both_solvers(tmp_path: Path) -> None:
    data = load("digits")["test"]
    features = embed(Pixels(), data.images, progress=False)
    rows = figure3.measure(features, data.labels, shots=[2], iterations=[1, 15], episodes=20, seed=0)
    assert list(zip(rows["solver"], rows["iterations"], strict=True)) == [
        ("ours", math.inf),
        *((name, count) for count in (1, 15) for name in ("qpth", "ours")),
    ]
    gaps = rows.set_index(["solver", "iterations"])["median gap"]
    assert gaps["qpth", 15] < 1e-6 < gaps["qpth", 1]
    assert gaps["ours", 15] < 1e-9 < gaps["ours", 1]
    assert rows["difference"].iloc[0] == 0
    assert rows.query("iterations == 15")["difference"].abs().max() < 0.5
    assert figure3.show(rows, "title").row_count == len(rows)
    figure3.draw(rows, tmp_path / "figure3.png")
    assert (tmp_path / "figure3.png").stat().st_size > 10_000


def test_table3_times_every_head_on_every_backbone() -> None:
    rows = table3.measure(backbones=["conv4", "resnet12"], shots=[1, 2], queries=1, size=32, repeats=2, device="cpu")
    assert len(rows) == 2 * 2 * len(table3.MODELS)
    assert (rows["milliseconds"] > rows["head milliseconds"]).all()
    assert (rows["head milliseconds"] > 0).all()
    assert table3.show(rows, "title").row_count == 6
