"""Training steps that are not finite or cannot be solved: raised, skipped or stopped at, in one process and in two."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from tasks import ROOT, clusters
from torch import nn

import convexheads as ch
from convexheads import InputError, Learnable, RidgeHead, SolverError, SVMHead
from convexheads.integrations.lightning import EpisodicModule

pytestmark = pytest.mark.filterwarnings(
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning",
    "ignore:.* have no `val_dataloader`",
    "ignore:.* does not have many workers",  # where there are more than two cores
)
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}


def poisoned(rank: int = 0, processes: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Five steps of four tasks; of the third step, task 2 has a NaN."""
    steps = []
    for step in range(5):
        tasks = [clusters(3, each=6, noise=0.5, seed=10 * step + task)[0] for task in range(4)]
        if step == 2:
            tasks[2][4, 1] = torch.nan
        steps.append((torch.stack(tasks)[rank::processes], (torch.arange(18) // 6).expand(4 // processes, -1)))
    return steps


def learner(on_failure: str, head: ch.ClassificationHead | None = None, normed: bool = True) -> EpisodicModule:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5) if normed else nn.Identity())
    head = head or SVMHead(C=0.1, scale=Learnable(1.0))
    return EpisodicModule(
        backbone, head, ways=3, shots=2, total_steps=5, schedule="constant", on_failed_step=on_failure
    )


def fit(module: EpisodicModule, batches: list, **settings: Any) -> pl.Trainer:
    trainer = pl.Trainer(max_epochs=1, enable_checkpointing=False, **(QUIET | settings))
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None, collate_fn=tuple))
    return trainer


def same_state(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_a_failed_step_raises_by_default() -> None:
    with pytest.raises(
        InputError,
        match=r"batch: expected finite values.*, got non-finite values in step 2, task 2 \(support: expected .*, got non-finite",
    ):
        fit(learner("raise"), poisoned())
    assert EpisodicModule(nn.Identity(), RidgeHead(), ways=2, shots=1, total_steps=1).on_failed_step == "raise"


def test_a_caught_failure_is_not_reported_again() -> None:
    module, bad = learner("raise"), poisoned()[2]
    for step in (2, 7):
        with pytest.raises(InputError, match=rf"in step {step}, "):
            module.training_step(bad, step)


@pytest.mark.usefixtures("unchecked")
def test_there_are_three_ways_to_go_on() -> None:
    with pytest.raises(InputError, match=r"on_failed_step: expected one of raise, skip, stop.*, got 'ignore'"):
        learner("ignore")


def test_a_failed_step_is_skipped_as_if_it_had_not_been_there(caplog) -> None:
    """With weights, momentum and statistics of those without it; the schedule is constant here."""
    batches, module, other = poisoned(), learner("skip"), learner("raise")
    trainer = fit(module, batches)
    fit(other, batches[:2] + batches[3:])
    assert same_state(module, other)
    assert module.state_dict()["backbone.1.num_batches_tracked"] == 4
    assert trainer.global_step == 5
    assert [(each["step"], each["tasks"]) for each in module.failures] == [(2, [2])]
    assert "skipped step 2, task 2 (support: expected finite values, got non-finite values" in caplog.text
    assert trainer.callback_metrics["skipped"] == 1


def test_the_policy_is_for_training_steps_only() -> None:
    batches, module = poisoned(), learner("skip")
    trainer = pl.Trainer(**QUIET)
    with pytest.raises(InputError, match="non-finite values"):
        trainer.validate(module, torch.utils.data.DataLoader(batches, batch_size=None, collate_fn=tuple))
    assert not module.failures


@pytest.mark.gpu
@pytest.mark.parametrize(
    "head", [SVMHead(C=0.1), ch.RidgeHead(), ch.PrototypeHead()], ids=lambda head: type(head).__name__
)
def test_a_failed_step_on_cuda_is_skipped_too(head, cuda) -> None:
    """Values are not looked at there before they are used."""
    batches, module, other = poisoned(), learner("skip", head), learner("raise", head)
    fit(module, batches, accelerator="gpu")
    fit(other, batches[:2] + batches[3:], accelerator="gpu")
    assert [each["step"] for each in module.failures] == [2]
    for one, two in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_a_failed_step_stops_the_training_before_it(tmp_path, caplog) -> None:
    batches, module, other = poisoned(), learner("stop"), learner("raise")
    trainer = fit(module, batches)
    fit(other, batches[:2])
    assert same_state(module, other)
    assert trainer.global_step == 3
    assert "training ends at step 2, task 2" in caplog.text
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["failures"] == module.failures


@pytest.mark.parametrize("what", ["gradient", "head", "loss"])
def test_other_reasons_for_a_failed_step(what) -> None:
    """A gradient that overflows, a head that can't be fitted, and a loss that is infinite though all else is finite."""
    batches = poisoned()
    samples = torch.nan_to_num(batches[2][0])
    batches[2] = (samples, batches[2][1])
    if what == "head":
        samples[0] = 1e9
    causes = {"gradient": "the gradient of backbone.0.weight", "head": "RidgeHead", "loss": "a loss of inf"}
    for on_failure in ("raise", "skip"):
        module = learner(on_failure, RidgeHead() if what == "head" else None, normed=False)
        step = EpisodicModule._episodes

        def altered(self, features, labels, step=step):
            if what == "gradient" and self._step(0) == 2 and features.requires_grad:
                features = features + 0
                features.register_hook(lambda gradient: gradient * torch.inf)
            loss, *rest = step(self, features, labels)
            return loss * (torch.inf if what == "loss" and self._step(0) == 2 else 1), *rest

        module._episodes = altered.__get__(module)
        if on_failure == "raise":
            with pytest.raises((InputError, SolverError), match=rf"step 2.*{causes[what]}"):
                fit(module, batches)
        else:
            fit(module, batches)
            other = learner("raise", RidgeHead() if what == "head" else None, normed=False)
            fit(other, batches[:2] + batches[3:])
            assert same_state(module, other)
            assert [each["step"] for each in module.failures] == [2]
            assert causes[what] in module.failures[0]["cause"]


def test_what_is_no_matter_of_values_is_never_skipped() -> None:
    batches = poisoned()
    batches[1] = (batches[1][0], torch.zeros_like(batches[1][1]) + torch.arange(18) // 9)
    batches[1][1][:, -1] = 2
    with pytest.raises(InputError, match="more than shots=2"):
        fit(learner("skip"), batches)


PROCESSES = """
import sys, torch, pytorch_lightning as pl
sys.path[:0] = sys.argv[3:]
from test_failed_steps import QUIET, learner, poisoned
module, processes = learner("skip", normed=False), int(sys.argv[1])
trainer = pl.Trainer(max_epochs=1, devices=processes, strategy="ddp", enable_checkpointing=False,
                     use_distributed_sampler=False, **QUIET)
class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return torch.utils.data.DataLoader(poisoned(self.trainer.global_rank, processes), batch_size=None, collate_fn=tuple)
trainer.fit(module, Data())
torch.save((module.state_dict(), module.failures), f"{sys.argv[2]}{trainer.global_rank}")
"""


def test_two_processes_skip_the_same_step(tmp_path) -> None:
    """The NaN is in one process's task; both know of it, and go on as one process does."""
    script = tmp_path / "script.py"
    script.write_text(PROCESSES)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        str(script),
        "2",
        str(tmp_path / "rank"),
        *map(str, (ROOT, ROOT / "tests", Path(__file__).parent)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("skipped step 2, task 2") == 1
    alone = learner("skip", normed=False)
    fit(alone, poisoned())
    for rank in range(2):
        state, failures = torch.load(tmp_path / f"rank{rank}", weights_only=True)
        assert [(each["step"], each["tasks"]) for each in failures] == [(2, [2])]
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6)
