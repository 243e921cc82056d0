"""The scripts of the paper's tables: published values, recipes, and ours measured, paired and written."""

from __future__ import annotations

import json
import math
import random
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import get_args, get_type_hints

import pandas
import pytest
import torch
from learn2learn.nn import SVClassifier
from PIL import Image

from benchmarks import figure2, figure3, report, table3, tables
from benchmarks.data import AUGMENTATIONS, DATASETS, ImageSet, load, taskset
from benchmarks.options import Options, read_settings
from benchmarks.recipes import RECIPES
from benchmarks.tables import Row, Table
from benchmarks.train import Pixels
from convexheads import InputError, SVMHead, embed, evaluate, load_pretrained, split_task

SCRIPTS = ("table1", "table2", "table3", "table4", "figure2", "omniglot", "fast")
TABLES = {name: import_module(f"benchmarks.{name}").TABLE for name in SCRIPTS}


@pytest.mark.parametrize(
    ("table", "model", "backbone", "dataset", "shots", "expected"),
    [
        ("table1", "MetaOptNet-SVM", "ResNet-12", "miniimagenet", 1, (62.64, 0.61)),
        ("table1", "LEO", "WRN-28-10", "tieredimagenet", 5, (81.44, 0.09)),
        ("table2", "Prototypical Networks", "64-64-64-64", "fc100", 5, (48.6, 0.6)),
        ("table2", "MetaOptNet-SVM-trainval", "ResNet-12", "cifar-fs", 5, (85.0, 0.5)),
        ("table3", "MetaOptNet-RR", "64-64-64-64", "tieredimagenet", 5, (72.11, 0.59)),
        ("table4", "augmentation, weight decay", "ResNet-12", "miniimagenet", 5, (76.61, None)),
        ("omniglot", "Prototypical Networks", "64-64-64-64", "omniglot", 1, (96.0, None)),
    ],
)
def test_published_values_are_the_papers(table, model, backbone, dataset, shots, expected) -> None:
    rows = tables.published(table)
    own = rows.query("model == @model and backbone == @backbone and dataset == @dataset and shots == @shots")
    assert [(row["accuracy"], row["interval"]) for row in report.records(own)] == [expected]
    assert not rows.duplicated(["model", "backbone", "dataset", "shots"]).any()


def test_the_paper_has_no_svm_with_conv4_on_cifar() -> None:
    rows = tables.published("table2").query("backbone == '64-64-64-64'")
    assert set(rows["model"]) == {"Prototypical Networks"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_what_its_name_says(name: str) -> None:
    options = Options.from_recipe(name)
    table, dataset, backbone, head = name.split("/")
    assert (options.dataset, options.backbone) == (dataset, backbone)
    assert head.removeprefix(options.head)[:1] in ("", "-")
    if table != "fast" and backbone == "resnet12":
        assert (options.total_steps, options.schedule) == (60_000, "paper")
    if table == "figure2":
        assert head == f"{options.head}-{options.shots}-shot"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "table1/miniimagenet/resnet12/svm-trainval",
            {"dataset": "miniimagenet", "backbone": "resnet12", "head": "svm", "steps": 60_000, "tasks": 8, "shots": 15}
            | {"queries": 6, "schedule": "paper", "weight_decay": 5e-4, "augment": "flip-crop-jitter", "trainval": True}
            | {"label_smoothing": 0.1, "validate_every": 1000, "validation_episodes": 2000, "checkpoint_every": 500}
            | {"test_episodes": 10_000},
        ),
        (
            "table2/fc100/conv4/ridge",
            {"dataset": "fc100", "head": "ridge", "steps": 2500, "augment": "flip-crop", "test_episodes": 10_000},
        ),
        (
            "table4/cifar-fs/conv4/svm-none",
            {"dataset": "cifar-fs", "steps": 1000, "tasks": 4, "precision": "bfloat16", "validate_every": 250}
            | {"augment": "none", "weight_decay": 0.0, "test_episodes": 1000},
        ),
        (
            "omniglot/omniglot/conv4/prototypes",
            {"dataset": "omniglot", "head": "prototypes", "steps": 1000, "tasks": 4, "ways": 20, "queries": 3}
            | {"precision": "bfloat16", "validate_every": 250, "augment": "none", "test_episodes": 1000},
        ),
        (
            "table3/tieredimagenet/conv4/prototypes-1-shot",
            {"dataset": "tieredimagenet", "head": "prototypes", "steps": 60_000, "shots": 1, "schedule": "paper"}
            | {"augment": "flip-crop-jitter", "validate_every": 1000, "validation_episodes": 2000}
            | {"checkpoint_every": 500, "test_shots": (1,), "test_episodes": 10_000},
        ),
        (
            "fast/cifar-fs/resnet12/svm",
            {"dataset": "cifar-fs", "backbone": "resnet12", "steps": 20_000, "augment": "flip-crop-jitter"}
            | {"rotations": True, "average": 0.999, "validate_every": 1000, "validation_episodes": 2000}
            | {"checkpoint_every": 500, "test_episodes": 10_000},
        ),
    ],
)
def test_recipes_set_exactly_these_options(name: str, expected: dict[str, object]) -> None:
    assert Options.from_recipe(name) == Options(**expected)


def test_an_unknown_recipe_is_refused_with_the_closest_one() -> None:
    with pytest.raises(InputError) as error:
        Options.from_recipe("table2/cifar-fs/resnet-12/ridge")
    assert "table2/cifar-fs/resnet12/ridge, got" in str(error.value)
    assert all(name in str(error.value) for name in RECIPES)


def test_a_recipe_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its results have a folder of its name; a file of options and the command line override it."""
    name = "table4/cifar-fs/conv4/svm-none"
    own = tmp_path / "own.yaml"
    own.write_text("steps: 7\ntasks: 3\n")
    parse = partial(Options.parse, description="")
    assert parse(["--recipe", name]) == Options.from_recipe(name, output=Path("runs") / name)
    found = parse(["--recipe", name, "--config", str(own), "--tasks", "2", "--output", "out"])
    assert found == Options.from_recipe(name, steps=7, tasks=2, output=Path("out"))
    with pytest.raises(SystemExit) as end:
        parse(["--list-recipes"])
    assert not end.value.code
    assert capsys.readouterr().out.split() == list(RECIPES)


@pytest.mark.parametrize("recipe", ["table2/cifar-fs/conv4/svm", "table4/cifar-fs/conv4/svm-none"])
def test_weights_of_a_recipe_were_trained_by_it(recipe: str) -> None:
    """Those that come with the package and those of the committed results."""
    weights, options = tables.find_weights(recipe), Options.from_recipe(recipe)
    assert weights is not None
    settings = load_pretrained(weights).settings
    for name in ("dataset", "backbone", "head", "steps", "tasks", "shots", "weight_decay", "augment"):
        assert settings[name] == getattr(options, name), name


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_every_cell_has_its_recipe(table: Table) -> None:
    for rows in table.rows.values():
        for row in rows:
            for (dataset, shots), name in row.recipes.items():
                options = Options.from_recipe(name)
                assert options.dataset == dataset or row.model.endswith("cross-domain from CIFAR-FS")
                assert dataset in table.datasets
                assert options.ways == table.ways
                assert shots in options.test_shots


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Table:
    """A table of two heads on digits, whose files lie in a folder of their own."""
    for head in ("ridge", "prototypes"):
        settings = {"dataset": "digits", "head": head, "steps": 2, "tasks": 2, "test_episodes": 10}
        monkeypatch.setitem(RECIPES, f"small/digits/conv4/{head}", settings)
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "small.csv").write_text(
        "model,backbone,dataset,shots,accuracy,interval,note\nRidge,Conv,digits,1,61.5,0.7,\nOther,Big,digits,5,99.0,0.1,on more data\n"
    )
    monkeypatch.setattr(tables, "HERE", tmp_path)
    monkeypatch.setitem(tables.TITLES, "digits", "Digits")
    monkeypatch.chdir(tmp_path)
    tables._test_classes.cache_clear()
    tables._features.cache_clear()
    rows = [
        Row(name, "Conv", {("digits", 1): f"small/digits/conv4/{head}", ("digits", 5): f"small/digits/conv4/{head}"})
        for name, head in (("Prototypes", "prototypes"), ("Ridge", "ridge"))
    ]
    return Table("small", "Small table", ("digits",), {"laptop": rows})


def test_trains_what_is_missing_and_writes_the_same_table_again(small: Table, tmp_path: Path) -> None:
    arguments = ["--episodes", "30", "--output", "result"]
    with pytest.raises(SystemExit, match=r"weights: expected --train, or.*, got no weights for small/digits/conv4/"):
        tables.main(small, "", arguments)
    tables.main(small, "", [*arguments, "--train"])
    files = {path.name: path.read_bytes() for path in (tmp_path / "result").iterdir()}
    assert set(files) == {"small.md", "small.csv", "small.json", "small.png"}
    # What has no weights is left out, and said to be.
    moved = tmp_path / "runs" / "small" / "digits" / "conv4" / "ridge"
    moved.rename(tmp_path / "moved")
    tables.main(small, "", [*arguments[:2], "--output", "part"])
    assert set(pandas.read_csv(tmp_path / "part" / "small.csv")["model"]) == {"Prototypes"}
    (tmp_path / "moved").rename(moved)
    # Committed weights are found first, and give the same table.
    (tmp_path / "results").mkdir()
    (tmp_path / "runs").rename(tmp_path / "results" / "trainings")
    tables._features.cache_clear()
    tables.main(small, "", arguments)
    assert (tmp_path / "result" / "small.csv").read_bytes() == files["small.csv"]
    assert (tmp_path / "result" / "small.md").read_bytes() == files["small.md"]

    lines = files["small.md"].decode().splitlines()
    row = {tuple(cell.strip() for cell in line.split("|")[1:4]): line for line in lines if line.startswith("| ")}
    assert "61.5 ± 0.7" in row["Ridge", "Conv", "published"]
    assert "n/a" in row["Ridge", "Conv", "published"]
    assert row["Prototypes", "Conv", "published"].count("n/a") == 2
    assert "Other: on more data" in files["small.md"].decode()
    frame = pandas.read_csv(tmp_path / "result" / "small.csv")
    own = frame[frame["model"] == "Ridge"].iloc[0]
    assert f"{own['accuracy']:.2f} ± {own['interval']:.2f}" in row["Ridge", "Conv", "ours"]
    assert (frame["training episodes"] == 4).all()
    assert any(f"{own['difference']:+.2f} ± {own['difference interval']:.2f}" in line for line in lines[-3:])
    # paired: what the differences of the episodes' accuracies say
    data = load("digits")["test"]
    accuracies = []
    for head in ("prototypes", "ridge"):
        trained = load_pretrained(tmp_path / "results" / "trainings" / f"small/digits/conv4/{head}")
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


def test_agrees_with_learn2learns_tasks_and_classifier() -> None:
    """100 episodes each, drawn and solved by code that nobody here wrote, within the intervals."""
    data = load("digits")["test"]
    features = embed(Pixels(), data.images, progress=False)
    ours = evaluate(SVMHead(C=0.1, smoothing=1.0), features, data.labels, shots=1, episodes=100, progress=False)
    tasks, accuracies = taskset(data, ways=5, samples=16), []
    random.seed(0)
    for _ in range(100):
        pixels, labels = tasks.sample()
        episode = split_task(Pixels()(pixels), labels, shots=1)
        classifier = SVClassifier()
        classifier.fit_(episode.support, episode.support_labels, 5)
        guess = classifier(episode.query).argmax(-1)
        accuracies.append((guess == episode.query_labels).double().mean())
    theirs = torch.stack(accuracies)
    interval = 1.96 * (theirs.var() / 100 + ours.accuracies.var() / 100).sqrt()
    assert abs(theirs.mean() - ours.accuracy) < interval
    assert ours.accuracy > 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: [", r"(?s)config: expected a YAML file.*, got "),
        ("- 1", "which holds a list"),
        ("stepps: 3", r"expected options listed.*with stepps"),
    ],
)
def test_unusable_files_of_options(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_settings(path)


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


@pytest.mark.slow
def test_table3_shows_times_beside_accuracies(tmp_path: Path) -> None:
    rows = table3.measure(backbones=["conv4", "resnet12"], shots=[1, 5], queries=1, size=32, repeats=2, device="cpu")
    assert len(rows) == 2 * 2 * len(tables.HEADS)
    assert (rows["milliseconds"] > rows["head milliseconds"]).all()
    assert (rows["head milliseconds"] > 0).all()
    shown = tables.show(table3.TABLE, pandas.DataFrame(), "paper", table3.times(rows, "paper"))
    lines = {tuple(c.strip() for c in line.split("|")[1:4]): line for line in report.markdown(shown).splitlines()}
    assert "69.51 ± 0.48" in lines["MetaOptNet-RR", "64-64-64-64", "published"]
    assert "20 ± 0.03" in lines["MetaOptNet-RR", "64-64-64-64", "published"]
    line = lines["MetaOptNet-SVM", "ResNet-12", "ours"]
    assert line.count("not trained") == 4
    across = table3.times(rows, "laptop")["1-shot, ms"]
    assert across["ours", "MetaOptNet-RR, cross-domain from CIFAR-FS", "64-64-64-64"] in report.markdown(shown)
    own = rows.query("model == 'MetaOptNet-SVM' and backbone == 'ResNet-12'")
    for row in report.records(own):
        assert f"{row['milliseconds']:.1f} (head {row['head milliseconds']:.2f})" in line


def test_table3_from_the_command_line(tmp_path: Path) -> None:
    times = ["--backbones", "[conv4]", "--shots", "[1]", "--queries", "1", "--size", "32", "--repeats", "1"]
    table3.main(["--scale", "paper", *times, "--output", str(tmp_path)])
    assert "python -m benchmarks.table3 --scale paper" in (tmp_path / "table3.md").read_text()
    assert len(json.loads((tmp_path / "table3.json").read_text())["times"]) == len(tables.HEADS)


def test_figure2_draws_a_curve_for_each_head_and_number_of_shots(tmp_path: Path) -> None:
    rows = [
        {"model": row.model, "dataset": dataset, "shots": shots, "accuracy": 50.0 + n, "interval": 0.5}
        | {"training shots": figure2.TRAINING_SHOTS[n % 4]}
        for n, row in enumerate(figure2.TABLE.rows["laptop"])
        for dataset, shots in row.recipes
    ]
    figure2.curves(figure2.TABLE, pandas.DataFrame(rows), tmp_path / "figure2.png")
    with Image.open(tmp_path / "figure2.png") as picture:
        width, height = picture.size
    assert width > height  # two panels
    labels = {text for row in figure2.TABLE.rows["paper"] for text in row.recipes.values()}
    assert len(labels) == 4 * 2 * 4


@pytest.mark.slow
def test_images_of_another_size_are_brought_to_that_of_the_training(
    small: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Across domains: the backbone sees what it was trained on, and the number of ways is the table's."""
    tables.evaluate("small/digits/conv4/ridge", "digits", 1, root=None, train=True, episodes=5, progress=False)
    data = load("digits")["test"]
    larger = data.images.repeat_interleave(3, -1).repeat_interleave(3, -2)
    sizes, embed_ = [], tables.ch.embed
    monkeypatch.setattr(tables, "load", lambda *_, **__: {"test": ImageSet(larger, data.labels, data.classes)})
    monkeypatch.setattr(tables.ch, "embed", lambda net, images: sizes.append(images.shape[-1]) or embed_(net, images))
    tables._test_classes.cache_clear()
    tables._features.cache_clear()
    settings = {"episodes": 40, "progress": False}
    found, _ = tables.evaluate("small/digits/conv4/ridge", "other", 1, root=None, train=False, ways=3, **settings)
    assert sizes == [data.images.shape[-1]]
    same, _ = tables.evaluate("small/digits/conv4/ridge", "other", 1, root=None, train=False, ways=5, **settings)
    assert same.accuracy < found.accuracy  # of five classes it is harder


@pytest.mark.slow
@pytest.mark.parametrize("shots", [1, 5])
def test_the_committed_table_comes_out_again(data_root: Path, shots: int) -> None:
    """From the weights that come with the package, on real images, to the last digit that is printed."""
    committed = pandas.read_csv(tables.HERE / "results" / "table2" / "laptop" / "table2.csv")
    own = committed.query("model == 'MetaOptNet-RR' and dataset == 'cifar-fs' and shots == @shots").iloc[0]
    settings = {name: int(own[name]) for name in ("episodes", "queries", "seed")}
    result, _ = tables.evaluate(
        "table2/cifar-fs/conv4/ridge", "cifar-fs", shots, root=data_root, train=False, progress=False, **settings
    )
    assert f"{100 * result.accuracy:.2f} ± {100 * result.confidence_interval:.2f}" == own["text"]
