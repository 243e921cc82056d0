"""`EpisodicModule` and `EpisodicDataModule` in Lightning's trainer, its command line and its callbacks."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.cli import LightningCLI
from tasks import ROOT, clusters
from torch import nn

from convexheads import InputError, Learnable, PrototypeHead, RidgeHead, SVMHead, split_task
from convexheads._validation import describe_type
from convexheads.integrations.lightning import EpisodicDataModule, EpisodicModule

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}


def part(classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return clusters(classes, each=20, noise=0.5, seed=seed)


def data(**changes) -> EpisodicDataModule:
    settings = {"ways": 3, "shots": 2, "queries": 4, "batch_size": 2, "steps_per_epoch": 4, "eval_steps": 3} | changes
    return EpisodicDataModule(part(8), part(5, seed=1), part(4, seed=2), **settings)


def module(backbone: nn.Module | None = None, **changes) -> EpisodicModule:
    settings = {"ways": 3, "shots": 2, "total_steps": 8} | changes
    return EpisodicModule(backbone or nn.Linear(6, 5), SVMHead(C=0.1, scale=Learnable(1.0)), **settings)


def test_validates_and_tests_in_evaluation_mode() -> None:
    """learn2learn's modules have the backbone in training mode there: statistics of the test batch leak in."""
    seen = set()

    class Backbone(nn.Sequential):
        def forward(self, samples: torch.Tensor) -> torch.Tensor:
            seen.add((trainer.state.fn.value, trainer.validating or trainer.sanity_checking, self.training))
            return super().forward(samples)

    trainer = pl.Trainer(max_epochs=2, enable_checkpointing=False, num_sanity_val_steps=0, **QUIET)
    network = module(Backbone(nn.Linear(6, 5), nn.BatchNorm1d(5)))
    trainer.fit(network, data())
    validated = {name: value.item() for name, value in trainer.callback_metrics.items()}
    before = {name: value.clone() for name, value in network.backbone.state_dict().items()}
    (tested,) = trainer.test(network, data(), verbose=False)
    assert {(fn, validating) for fn, validating, training in seen if training} == {("fit", False)}
    assert ("fit", True, False) in seen
    assert ("test", False, False) in seen
    for name, value in network.backbone.state_dict().items():
        assert torch.equal(value, before[name])
    assert {"loss", "accuracy", "certified", "val_loss", "val_accuracy"} <= validated.keys()
    assert set(tested) == {"test_loss", "test_accuracy"}

    # the accuracy is the mean over the very episodes of the loader
    network.backbone.eval()
    accuracies = []
    with torch.no_grad():
        for samples, labels in data().test_dataloader():
            episode = split_task(network.backbone(samples.flatten(0, 1)).unflatten(0, labels.shape), labels, shots=2)
            guess = network.head(*episode[:3], ways=3).argmax(-1)
            accuracies.append((guess == episode.query_labels).double().mean())
    assert tested["test_accuracy"] == pytest.approx(torch.stack(accuracies).mean().item())


def test_callbacks_go_by_what_is_logged(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val_accuracy", mode="max")
    stop = EarlyStopping("val_loss", patience=1, min_delta=1e9)  # no improvement is large enough
    trainer = pl.Trainer(max_epochs=9, callbacks=[best, stop], **QUIET)
    trainer.fit(module(), data())
    assert trainer.current_epoch == 2
    assert best.best_model_score is not None
    assert torch.load(best.best_model_path, weights_only=True)["state_dict"].keys() == module().state_dict().keys()


def test_a_resumed_training_sees_the_episodes_that_were_left(tmp_path: Path) -> None:
    def train(epochs: int, **settings) -> dict[str, torch.Tensor]:
        pl.seed_everything(0, verbose=False)
        own, trainer = module(), pl.Trainer(max_epochs=epochs, enable_checkpointing=False, **QUIET)
        trainer.fit(own, data(), **settings)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return own.state_dict()

    whole = train(2)
    train(1)
    resumed = train(2, ckpt_path=tmp_path / "1.ckpt", weights_only=True)
    for name, value in whole.items():
        assert torch.equal(resumed[name], value)


def test_without_validation_there_is_none() -> None:
    own = EpisodicDataModule(part(8), ways=3, shots=2, queries=4, batch_size=2, steps_per_epoch=2)
    trainer = pl.Trainer(max_epochs=1, enable_checkpointing=False, **QUIET)
    with pytest.warns(UserWarning, match="have no `val_dataloader`"):
        trainer.fit(module(), own)
    assert "val_loss" not in trainer.callback_metrics


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"
)
def test_on_lightnings_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py"])
    torch.save(part(8), tmp_path / "train.pt")
    torch.save(part(5, seed=1), tmp_path / "val.pt")
    arguments = ["fit", f"--data.train={tmp_path / 'train.pt'}", f"--data.val={tmp_path / 'val.pt'}"]
    arguments += [
        "--data.ways=3",
        "--data.shots=2",
        "--data.queries=4",
        "--data.steps_per_epoch=4",
        "--data.eval_steps=2",
    ]
    arguments += ["--model.ways=3", "--model.shots=2", "--model.total_steps=4", "--model.backbone=torch.nn.Linear"]
    arguments += ["--model.backbone.in_features=6", "--model.backbone.out_features=5"]
    arguments += ["--model.head=convexheads.RidgeHead", "--model.head.regularization=3.5", "--trainer.max_epochs=1"]
    arguments += [f"--trainer.{name}={str(value).lower()}" for name, value in QUIET.items()]
    arguments += ["--trainer.enable_checkpointing=false"]
    cli = LightningCLI(EpisodicModule, EpisodicDataModule, args=arguments, save_config_callback=None)
    assert isinstance(cli.model.head, RidgeHead)
    assert cli.model.head.regularization == 3.5
    assert cli.trainer.global_step == 4
    assert 0 < cli.trainer.callback_metrics["val_accuracy"] <= 1


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("paper", [1, 1, 0.06, 0.06, 0.012, 0.0024] + [0.0024] * 9),
        ("cosine", [1, 0.9330127, 0.75, 0.5, 0.25, 0.0669873] + [0] * 9),
        ("constant", [1.0] * 15),
    ],
)
def test_schedules(schedule: str, expected: list[float]) -> None:
    """They stay at their last value if training takes more than `total_steps`."""
    own = EpisodicModule(nn.Linear(2, 2), RidgeHead(), ways=2, shots=1, total_steps=6, schedule=schedule)
    found = own.configure_optimizers()
    optimizer, scheduler = found["optimizer"], found["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(15):
        rates.append(optimizer.param_groups[0]["lr"] / 0.1)
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["paper", "cosine"])
def test_training_may_take_more_steps_than_its_schedule(schedule: str) -> None:
    own = module(total_steps=4, schedule=schedule)
    trainer = pl.Trainer(max_epochs=3, limit_val_batches=0, enable_checkpointing=False, **QUIET)
    trainer.fit(own, data())
    assert trainer.global_step == 12


def test_weight_decay_leaves_learnables_alone() -> None:
    own = module(weight_decay=0.5, momentum=0.0)
    weight = own.backbone.weight.detach().clone()
    weight, head = own.backbone.weight.detach().clone(), repr(own.head)
    own.head.scale = Learnable(3.0)
    head = repr(own.head)
    for parameter in own.parameters():
        parameter.grad = torch.zeros_like(parameter)
    found = own.configure_optimizers()
    found["optimizer"].step()
    assert repr(own.head) == head
    torch.testing.assert_close(own.backbone.weight, (1 - 0.1 * 0.5) * weight)


@pytest.mark.usefixtures("unchecked")
def test_label_smoothing_and_what_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    samples, labels = torch.randn(2, 8, 5), torch.arange(8).expand(2, -1) % 2
    logged = {}
    for smoothing in (0.0, 0.2):
        own = EpisodicModule(nn.Identity(), SVMHead(), ways=2, shots=2, total_steps=1, label_smoothing=smoothing)
        monkeypatch.setattr(own, "log_dict", lambda values, **_: logged.update(values))
        loss = own.training_step((samples, labels), 0)
        episode = split_task(samples, labels, shots=2)
        logits = own.head(episode.support, episode.support_labels, episode.query)
        expected = nn.functional.cross_entropy(
            logits.flatten(0, 1), episode.query_labels.flatten(), label_smoothing=smoothing
        )
        assert loss.item() == pytest.approx(expected.item())
    assert logged["certified"] == 1
    assert logged["iterations"] >= 1


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "wrong",
    [
        *({"backbone": "conv4"}, {"backbone": nn.Identity}),
        *({"head": "svm"}, {"head": SVMHead}, {"ways": -1}, {"shots": 1.5}, {"total_steps": 0}),
        *({"learning_rate": "0.1"}, {"learning_rate": -0.1}, {"momentum": 1.0}, {"weight_decay": None}),
        *({"schedule": "linear"}, {"label_smoothing": 1.0}, {"label_smoothing": "0.1"}, {"on_failed_step": "retry"}),
    ],
    ids=str,
)
def test_unusable_settings_are_refused(wrong: dict) -> None:
    settings = {"backbone": nn.Identity(), "head": SVMHead(), "ways": 2, "shots": 2, "total_steps": 1}
    with pytest.raises(InputError, match=rf"^{next(iter(wrong))}: expected"):
        EpisodicModule(**(settings | wrong))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        *(({name: -5}, name) for name in ("ways", "queries", "seed", "num_workers", "eval_steps")),
        ({"shots": "a"}, "shots"),
    ],
    ids=str,
)
def test_unusable_episodes_are_refused_before_training(wrong: dict, name: str) -> None:
    with pytest.raises(InputError, match=rf"^{'steps_per_epoch' if name == 'eval_steps' else name}: expected"):
        data(**wrong)


@pytest.mark.slow
def test_two_processes_share_the_episodes(tmp_path: Path) -> None:
    """With `strategy="ddp"`, by gloo on the CPU: the weights of one process that has them all."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch, pytorch_lightning as pl\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "from test_lightning import QUIET, data, module\n"
        "pl.seed_everything(0, verbose=False)\n"
        "processes = int(sys.argv[1])\n"
        "own = module(torch.nn.Linear(6, 5, dtype=torch.float64).float())\n"
        "trainer = pl.Trainer(max_epochs=1, devices=processes, strategy='ddp', enable_checkpointing=False, **QUIET)\n"
        "trainer.fit(own, data())\n"
        "if trainer.is_global_zero:\n"
        "    torch.save((own.state_dict(), trainer.callback_metrics['val_accuracy']), sys.argv[3])\n"
    )
    here, found = Path(__file__).parent, []
    for processes in ("1", "2"):
        command = [sys.executable, str(script), processes, str(here), str(tmp_path / processes)]
        environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
        assert done.returncode == 0, done.stderr
        found.append(torch.load(tmp_path / processes, weights_only=True))
    for name, value in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], value, rtol=1e-4, atol=1e-6)
    assert found[0][1].item() == pytest.approx(found[1][1].item())


@pytest.mark.parametrize("kind", [str, Path])
def test_data_sets_are_read_from_files(tmp_path: Path, kind: type) -> None:
    torch.save(part(8), tmp_path / "train.pt")
    own = EpisodicDataModule(kind(tmp_path / "train.pt"), ways=3, shots=2, queries=4, batch_size=2, steps_per_epoch=4)
    for (samples, _), (expected, _) in zip(own.train_dataloader(), data().train_dataloader(), strict=True):
        assert torch.equal(samples, expected)


def test_an_epoch_that_is_limited_is_followed_by_other_episodes() -> None:
    seen = []

    class Recorded(EpisodicModule):
        def training_step(self, batch, batch_index):
            seen.append(batch[0])
            return super().training_step(batch, batch_index)

    own = Recorded(nn.Linear(6, 5), RidgeHead(), ways=3, shots=2, total_steps=4)
    trainer = pl.Trainer(max_epochs=2, limit_train_batches=2, limit_val_batches=0, enable_checkpointing=False, **QUIET)
    trainer.fit(own, data())
    loader = data().train_dataloader()
    epochs = [[samples for samples, _ in loader] for _ in range(2)]
    for found, expected in zip(seen, epochs[0][:2] + epochs[1][:2], strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("limits", [{}, {"limit_train_batches": 3}])
def test_reloaded_loaders_go_on_with_new_episodes(limits: dict) -> None:
    def trained(**options) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []

        class Backbone(nn.Linear):
            def forward(self, samples: torch.Tensor) -> torch.Tensor:
                seen.append(samples)
                return super().forward(samples)

        trainer = pl.Trainer(
            max_epochs=3, limit_val_batches=0, enable_checkpointing=False, **QUIET, **limits, **options
        )
        trainer.fit(module(Backbone(6, 5), total_steps=12), data())
        return seen

    expected, found = trained(), trained(reload_dataloaders_every_n_epochs=1)
    assert len(found) == 3 * limits.get("limit_train_batches", 4)
    assert all(map(torch.equal, found, expected))


def test_a_training_is_resumed_within_an_epoch(tmp_path: Path) -> None:
    def train(steps: int, **settings) -> dict[str, torch.Tensor]:
        pl.seed_everything(0, verbose=False)
        own = module()
        trainer = pl.Trainer(max_steps=steps, limit_val_batches=0, enable_checkpointing=False, **QUIET)
        trainer.fit(own, data(), **settings)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return own.state_dict()

    whole = train(7)
    train(2)
    resumed = train(7, ckpt_path=tmp_path / "2.ckpt", weights_only=True)
    for name, value in whole.items():
        assert torch.equal(resumed[name], value)


def test_unusable_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "train.pt"
    with pytest.raises(InputError, match=r"train: expected .*, got .*train\.pt"):
        EpisodicDataModule(path)
    path.write_bytes(pickle.dumps(PrototypeHead, protocol=2))
    with pytest.raises(InputError, match=r"expected a file written by torch.save"):
        EpisodicDataModule(str(path))
    with pytest.raises(InputError, match=r"labels: expected at least ways=9, got 8 classes"):
        data(ways=9).train_dataloader()


@pytest.mark.parametrize(
    "wrong", [torch.zeros(2, 6), torch.zeros(60, 6), (torch.zeros(60, 6),), ([1], [2]), None], ids=describe_type
)
@pytest.mark.usefixtures("unchecked")
def test_data_sets_are_pairs(wrong: object, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train: expected two tensors \(samples, labels\), or a path, got"):
        EpisodicDataModule(wrong)
    if wrong is not None:
        with pytest.raises(InputError, match="val: expected two tensors"):
            EpisodicDataModule(part(8), wrong)
    torch.save(wrong, tmp_path / "train.pt")
    with pytest.raises(InputError, match=r"train.pt \(it does not contain two tensors\)"):
        EpisodicDataModule(tmp_path / "train.pt")
