"""Faults in training and data: killed processes, damaged and foreign files, steps that are not finite."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from tasks import clusters
from torch import nn

import convexheads as ch
from benchmarks import report, train
from benchmarks.data import ImageSet
from benchmarks.data.sources import archives, open_image
from convexheads import QP, InputError, Learnable, NativeSolver, RidgeHead, SolverError, SVMHead, storage
from convexheads.integrations.folder import FewShotClassifier
from convexheads.integrations.lightning import EpisodicDataModule, EpisodicModule, WholeCheckpointIO
from convexheads.pretrained import make_untrained, save_pretrained

pytestmark = pytest.mark.filterwarnings(
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning",
    "ignore:.* have no `val_dataloader`",
    "ignore:.* does not have many workers",  # where there are more than two cores
)

ROOT = Path(__file__).parent.parent
SMALL = [
    *["--steps", "4", "--tasks", "1", "--queries", "2", "--test-episodes", "2", "--test-queries", "2"],
    *["--checkpoint-every", "1", "--validate-every", "1", "--validation-episodes", "4", "--learning-rate", "1"],
    *["--device", "cpu", "--threads", "1"],
]
BEST = ["before write_bytes .best.ckpt.part", "before write_bytes best.ckpt"]
LAST = ["before write_bytes .last.ckpt.part", "before write_bytes last.ckpt"]
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}


# Killed at any moment


def small_data(*_: object, **__: object) -> dict[str, ImageSet]:
    """A part of the digits, with validation classes."""
    data = train.load_all("digits")
    few = {name: ImageSet(part.images[::5], part.labels[::5], part.classes) for name, part in data.items()}
    return {"train": few["train"], "val": few["test"], "test": few["test"]}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def watched(events: list[str], moment: int | None) -> None:
    """Kills this process at the `moment`-th event, in the middle of it if it writes."""

    def watch(owner: Any, name: str, begin: Callable[..., object] = lambda *_: None) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any, **settings: Any) -> Any:
            for phase in ("before", "after"):
                events.append(" ".join([phase, name, *(each.name for each in arguments[:1] if isinstance(each, Path))]))
                if len(events) - 1 == moment:
                    if phase == "before":
                        begin(*arguments)
                    die()
                if phase == "before":
                    result = original(*arguments, **settings)
            return result

        setattr(owner, name, call)

    def half(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])

    train.load_all, train.load = train.load, small_data  # pyright: ignore[reportAttributeAccessIssue]
    watch(Path, "write_bytes", half)
    watch(Path, "replace")
    watch(Path, "unlink")
    watch(os, "fsync")
    watch(torch, "save")
    watch(shutil, "rmtree")
    watch(EpisodicModule, "training_step")
    watch(EpisodicModule, "backward")
    watch(torch.optim.SGD, "step")
    watch(train, "save_pretrained")
    watch(report, "draw")


def child(arguments: list[str], log: str, moment: int | None) -> None:
    events: list[str] = []
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    watched(events, moment)
    try:
        train.main(arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    Path(log).with_suffix(".events").write_text("\n".join(events))
    os._exit(0)


@pytest.fixture(scope="module")
def server() -> multiprocessing.context.ForkServerContext:
    """Starts processes that have all imports done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_faults", "sklearn.datasets", "matplotlib.pyplot", "torch.utils.tensorboard"])
    return context


def trained(server: Any, folder: Path, moment: int | None = None, seconds: float | None = None) -> int:
    """The exit code of a training, or of its resumption where there is something to resume."""
    resume = ["--resume"] if (folder / "checkpoints" / "last.ckpt").is_file() else []
    log = str(folder.parent / f"{folder.name}.log")
    process = server.Process(target=child, args=([*SMALL, "--output", str(folder), *resume], log, moment))
    process.start()
    process.join(120 if seconds is None else seconds)
    if process.is_alive():
        process.kill()
    process.join()
    return process.exitcode


def what_remains(folder: Path) -> dict[str, Any]:
    """All that a run leaves behind that doesn't depend on the time."""
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    result = json.loads((folder / "result.json").read_text())
    pickled = {
        name: pickle.dumps(plain(checkpoint[name])) for name in ("state_dict", "optimizer_states", "lr_schedulers")
    }
    files = {name: (folder / name).read_bytes() for name in ("model.safetensors", "metrics.csv", "config.yaml")}
    return {"results": result["results"], "steps": checkpoint["global_step"], **pickled, **files}


def plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


@pytest.fixture(scope="module")
def undisturbed(server: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert trained(server, folder) == 0, folder.with_suffix(".log").read_text()
    return folder


def happened(undisturbed: Path) -> list[str]:
    return undisturbed.with_suffix(".events").read_text().splitlines()


def check_killed(server: Any, undisturbed: Path, folder: Path, *moments: int) -> None:
    for moment in moments:
        code = trained(server, folder, moment=moment)
        assert code in (-signal.SIGKILL, 0), folder.with_suffix(".log").read_text()
        if code == 0:  # a resumption has fewer moments
            break
    assert trained(server, folder) == 0, folder.with_suffix(".log").read_text()
    expected, found = what_remains(undisturbed), what_remains(folder)
    for name, value in expected.items():
        assert found[name] == value, name


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_a_random_moment_it_ends_as_if_nothing_had_been(server, undisturbed, tmp_path, seed) -> None:
    moment = random.Random(seed).randrange(len(happened(undisturbed)))
    check_killed(server, undisturbed, tmp_path / "run", moment)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 22))
def test_killed_at_twenty_random_moments(server, undisturbed, tmp_path, seed) -> None:
    """Half of them in the middle of some call, a write above all, and again in the resumption; half by the clock."""
    draws, folder = random.Random(seed), tmp_path / "run"
    if seed % 2:
        start = time.monotonic()
        assert trained(server, tmp_path / "timed") == 0
        trained(server, folder, seconds=draws.uniform(0, time.monotonic() - start))
    moments = draws.choices(range(len(happened(undisturbed))), k=0 if seed % 2 else 2)
    check_killed(server, undisturbed, folder, *moments)


def test_killed_before_the_best_weights_are_written_they_are_found_again(server, undisturbed, tmp_path) -> None:
    *_, moment = (number for number, event in enumerate(happened(undisturbed)) if event in BEST)
    check_killed(server, undisturbed, tmp_path / "run", moment)


def test_killed_while_a_checkpoint_is_written_the_old_one_is_there(server, undisturbed, tmp_path) -> None:
    folder = tmp_path / "run"
    writes = [number for number, event in enumerate(happened(undisturbed)) if event in LAST]
    assert len(writes) == 5  # of each step, and at the end
    assert trained(server, folder, moment=writes[1]) == -signal.SIGKILL
    assert storage.load_torch(folder / "checkpoints" / "last.ckpt")["global_step"] == 1
    part = folder / "checkpoints" / ".last.ckpt.part"
    assert 0 < part.stat().st_size < (folder / "checkpoints" / "last.ckpt").stat().st_size


def test_what_is_left_of_a_finished_run_is_never_taken_for_another(undisturbed, tmp_path, monkeypatch) -> None:
    """Killed while a new run clears away the old one, nothing is there to resume."""
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main([*SMALL, "--output", str(folder)])
    with pytest.raises(SystemExit, match="without a checkpoint"):
        train.main([*SMALL, "--output", str(folder), "--resume"])


# Damaged and foreign files


class Malicious:
    def __reduce__(self):
        return os.mkdir, (os.environ["MALICIOUS"],)


def damaged(content: bytes, draws: random.Random, flips: int = 30) -> Iterator[bytes]:
    """Cut off at several lengths, and with one bit altered at several places, those of the values above all."""
    for length in (0, 1, 100, len(content) // 2, len(content) - 1000, len(content) - 1):
        yield content[:length]
    for place in (8, 30, len(content) - 20, *draws.sample(range(len(content)), flips)):
        altered = bytearray(content)
        altered[place] ^= 1 << draws.randrange(8)
        yield bytes(altered)


def foreign(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[bytes]:
    """Text, pickles that run something, a zip of something else, tensors without the rest."""
    monkeypatch.setenv("MALICIOUS", str(folder / "unpickled"))
    yield b"no checkpoint"
    yield pickle.dumps(Malicious())
    for content in (Malicious(), {"state_dict": Malicious()}, torch.zeros(3), {"state_dict": {}}, [1, 2]):
        torch.save(content, folder / "foreign")
        yield (folder / "foreign").read_bytes()
    with ZipFile(folder / "foreign", "w") as archive:
        archive.writestr("data.pkl", b"nothing")
    yield (folder / "foreign").read_bytes()


def refused_or_same(load: Callable[[], Any], expected: Any, message: str) -> bool:
    """Whether it is refused by that message; else it has to be the same."""
    try:
        found = load()
    except (InputError, SystemExit) as error:
        told = str(error)
    else:
        assert plain(found) == expected
        return False
    assert message in told
    return True


def test_damaged_and_foreign_checkpoints_are_refused(undisturbed, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    checkpoint = folder / "checkpoints" / "last.ckpt"
    whole, before = checkpoint.read_bytes(), (folder / "config.yaml").read_bytes()
    options = train.Options.parse([*SMALL, "--output", str(folder), "--resume"], prog="", description="")

    def resume() -> Any:
        train.prepare(options)
        return WholeCheckpointIO().load_checkpoint(checkpoint)

    expected, refused = plain(resume()), 0
    for content in damaged(whole, random.Random(0)):
        checkpoint.write_bytes(content)
        refused += refused_or_same(resume, expected, f"resume: got {checkpoint}, damaged")
        assert checkpoint.read_bytes() == content
    assert refused > 30  # a bit of padding alters nothing
    other = torch.load(undisturbed / "checkpoints" / "best.ckpt", weights_only=True)  # weights only
    torch.save(other, tmp_path / "other")
    for content in (*foreign(tmp_path, monkeypatch), (tmp_path / "other").read_bytes()):
        checkpoint.write_bytes(content)
        with pytest.raises(InputError, match=r"resume: got .*last\.ckpt"):
            train.prepare(options)
    state = storage.load_torch(undisturbed / "checkpoints" / "last.ckpt")
    state["callbacks"]["Log"]["options"]["seed"] = 5
    torch.save(state, checkpoint)
    with pytest.raises(InputError, match=r"last\.ckpt, that of another run \(seed\)"):
        train.prepare(options)
    assert not (tmp_path / "unpickled").exists()
    assert (folder / "config.yaml").read_bytes() == before


def test_damaged_and_foreign_weights_are_refused(tmp_path, monkeypatch) -> None:
    settings = {"backbone": "conv4", "head": "ridge", "image_size": 32}
    path = tmp_path / "own.safetensors"
    save_pretrained(path, *make_untrained(settings, torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)), settings)

    def load() -> Any:
        backbone, head, told = ch.load_pretrained(path)
        return backbone.state_dict(), head.state_dict(), told

    whole, expected = path.read_bytes(), plain(list(load()))
    for content in (*damaged(whole, random.Random(0)), *foreign(tmp_path, monkeypatch)):
        path.write_bytes(content)
        assert refused_or_same(load, expected, f"name: got {path}")
    assert not (tmp_path / "unpickled").exists()


def test_damaged_and_foreign_classifiers_are_refused(tmp_path, monkeypatch) -> None:
    support, labels = clusters(3, each=4)
    settings = {"classes": ["a", "b", "c"], "features": "npy", "head": "ridge", "scale": 1.0}
    path = tmp_path / "own.classifier"
    FewShotClassifier(**settings, support=support, labels=labels).save(path)
    whole = path.read_bytes()
    for content in (*damaged(whole, random.Random(0)), *foreign(tmp_path, monkeypatch)):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"classifier: got .*own\.classifier"):
            FewShotClassifier.load(path)
    assert not (tmp_path / "unpickled").exists()


def test_weights_of_older_versions_have_no_checksum_and_load() -> None:
    from safetensors import safe_open

    path = ch.pretrained.ZOO / "conv4-cifar-fs-ridge.safetensors"
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["settings"].startswith("{")
    ch.load_pretrained(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_damaged_and_foreign_data_files_are_refused(tmp_path, monkeypatch) -> None:
    path = tmp_path / "train.pt"
    torch.save(clusters(4, each=10), path)

    def load() -> Any:
        return EpisodicDataModule(str(path)).parts["train"]

    whole, expected = path.read_bytes(), plain(load())
    refused = 0
    for content in damaged(whole, random.Random(0), flips=300):
        path.write_bytes(content)
        refused += refused_or_same(load, expected, f"train: got {path}")
    assert refused > 200
    for place in range(whole.index(b"PK\x01\x02"), len(whole)):  # flags, with which PyTorch returns any memory
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        refused_or_same(load, expected, f"train: got {path}")
    for content in foreign(tmp_path, monkeypatch):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"train: got .*train\.pt"):
            load()
    assert not (tmp_path / "unpickled").exists()


def test_damaged_archives_of_images_are_refused(tmp_path) -> None:
    path, splits = tmp_path / "images.zip", {"train": ("cat", "dog")}
    pixels = torch.randint(256, (6, 8, 8, 3), dtype=torch.uint8).numpy()
    with ZipFile(path, "w", ZIP_STORED) as archive:
        for number, image in enumerate(pixels):
            Image.fromarray(image).save(tmp_path / "one.png")
            archive.write(tmp_path / "one.png", f"data/{'cat' if number < 3 else 'dog'}/{number}.png")

    def load() -> list[bytes]:
        found = archives(["images.zip"], tmp_path, splits).images
        if Counter({name: len(each) for name, each in found.items()}) != {"cat": 3, "dog": 3}:
            raise InputError("data root", path, "three images of each")  # as `read` does
        return [open_image(name, each, "RGB").tobytes() for name in found for each in found[name]]

    whole, expected = path.read_bytes(), load()
    refused = sum(
        refused_or_same(load, expected, "data root: got")
        for content in damaged(whole, random.Random(0), 400)
        if path.write_bytes(content)
    )
    assert refused > 250


# Steps that are not finite


def poisoned(rank: int = 0, processes: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Five steps of four tasks; of the third step, task 2 has a NaN."""
    steps = []
    for step in range(5):
        tasks = [clusters(3, each=6, noise=0.5, seed=10 * step + task)[0] for task in range(4)]
        if step == 2:
            tasks[2][4, 1] = torch.nan
        steps.append((torch.stack(tasks)[rank::processes], (torch.arange(18) // 6).expand(4 // processes, -1)))
    return steps


def learner(on_failure: str, head: ch.Head | None = None, normed: bool = True) -> EpisodicModule:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5) if normed else nn.Identity())
    head = head or SVMHead(C=0.1, scale=Learnable(1.0))
    return EpisodicModule(backbone, head, ways=3, shots=2, steps=5, schedule="constant", on_failure=on_failure)


def fit(module: EpisodicModule, batches: list, **settings: Any) -> pl.Trainer:
    trainer = pl.Trainer(max_epochs=1, enable_checkpointing=False, **(QUIET | settings))
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None, collate_fn=tuple))
    return trainer


def same_state(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_a_failed_step_raises_by_default() -> None:
    with pytest.raises(InputError, match=r"batch: got step 2, task 2 \(support: got non-finite.*wanted finite values"):
        fit(learner("raise"), poisoned())
    assert EpisodicModule(nn.Identity(), RidgeHead(), ways=2, shots=1, steps=1).on_failure == "raise"


@pytest.mark.usefixtures("unchecked")
def test_there_are_three_ways_to_go_on() -> None:
    with pytest.raises(InputError, match="on_failure: got 'ignore', wanted one of raise, skip, stop"):
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
    assert "skipped step 2, task 2 (support: got non-finite values" in caplog.text
    assert trainer.callback_metrics["skipped"] == 1


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
    assert "the training stops before step 2, task 2" in caplog.text
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
    causes = {"gradient": "the gradient of backbone.0.weight", "head": "not positive definite", "loss": "a loss of inf"}
    for on_failure in ("raise", "skip"):
        module = learner(on_failure, RidgeHead() if what == "head" else None, normed=False)
        step = EpisodicModule._episodes

        def altered(self, features, labels, step=step):
            if what == "gradient" and self._step(0).number == 2 and features.requires_grad:
                features = features + 0
                features.register_hook(lambda gradient: gradient * torch.inf)
            loss, *rest = step(self, features, labels)
            return loss * (torch.inf if what == "loss" and self._step(0).number == 2 else 1), *rest

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
from test_faults import QUIET, learner, poisoned
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
    command = [sys.executable, str(script), "2", str(tmp_path / "rank"), str(ROOT), str(ROOT / "tests")]
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


@pytest.fixture
def with_a_failure(monkeypatch) -> None:
    """The digits, whose third step has a loss of NaN."""
    loss = EpisodicModule._episodes

    def altered(self, features, labels):
        found, *rest = loss(self, features, labels)
        return found * (torch.nan if self.training and self._step(0).number == 2 else 1), *rest

    monkeypatch.setattr(train, "load_all", train.load, raising=False)
    monkeypatch.setattr(train, "load", small_data)
    monkeypatch.setattr(EpisodicModule, "_episodes", altered)


@pytest.mark.usefixtures("with_a_failure")
def test_the_benchmark_does_as_configured(tmp_path, caplog) -> None:
    arguments = [*SMALL, "--output"]
    folders = {name: tmp_path / name for name in ("raise", "skip", "stop")}
    with pytest.raises(SystemExit, match=r"error: batch: got step 2, task 0 \(a loss of nan\)"):
        train.main([*arguments, str(folders["raise"])])
    with pytest.raises(SystemExit, match=r"error: step 2 failed \(a loss of nan\), training has stopped; .*--resume"):
        train.main([*arguments, str(folders["stop"]), "--on-failure", "stop"])
    assert storage.load_torch(folders["stop"] / "checkpoints" / "last.ckpt")["global_step"] == 3
    train.main([*arguments, str(folders["skip"]), "--on-failure", "skip"])
    for name in ("raise", "stop"):
        assert not (folders[name] / "result.json").exists()
        train.main([*arguments, str(folders[name]), "--on-failure", "skip", "--resume"])
    found = {name: what_remains(folder) for name, folder in folders.items()}
    for name in ("raise", "stop"):
        assert found[name]["state_dict"] == found["skip"]["state_dict"]
        assert found[name]["config.yaml"] == found["skip"]["config.yaml"]
    result = json.loads((folders["skip"] / "result.json").read_text())
    assert result["skipped"] == [{"step": 2, "tasks": [0], "cause": "a loss of nan"}]
    assert "skipped step 2, task 0" in caplog.text


@pytest.mark.parametrize("gradient", ["exact", "smoothed"])
@pytest.mark.parametrize("kind", ["nan", "indefinite"])
@pytest.mark.parametrize("smoothed", [False, True])
def test_a_failed_task_that_the_loss_leaves_out_has_no_gradient(kind, gradient, smoothed) -> None:
    """Zero, not zero times NaN; and the good task's gradient is what it is alone."""

    def gradients(tasks: int) -> list[torch.Tensor]:
        features = torch.randn(2, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        gram = features @ features.mT
        gram[1] = torch.nan if kind == "nan" else -gram[1]
        gram, shared = gram[:tasks].clone().requires_grad_(), torch.ones((), dtype=torch.float64, requires_grad=True)
        linear = torch.nn.functional.one_hot(torch.arange(8) % 3).double().expand(tasks, -1, -1) * shared
        smoothing = 0.1 * shared + 0 * linear if smoothed else None
        solver = NativeSolver(on_failure="return", gradient=gradient)
        solution = solver.solve(QP(gram, linear=linear, upper=0.1 * linear, smoothing=smoothing))
        assert solution.converged.tolist() == [True, False][:tasks]
        solution.coef[0].square().sum().backward()
        return [gram.grad, shared.grad]

    (both, shared), (alone, shared_alone) = gradients(2), gradients(1)
    torch.testing.assert_close(both[0], alone[0])
    torch.testing.assert_close(shared, shared_alone)
    assert (both[1] == 0).all()


# One of two processes is killed

HANGING = """
import os, sys, time
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
import two_processes as script
from benchmarks import train
rank, flags = os.environ.get("LOCAL_RANK", "0"), Path(sys.argv[3])
step = train.EpisodicModule.training_step
def hang(self, batch, batch_index):
    (flags / f"{rank}.pid").write_text(str(os.getpid()))
    if batch_index == 1 and (flags / f"hang{rank}").exists():
        (flags / f"{rank}.hangs").touch()
        time.sleep(600)
    return step(self, batch, batch_index)
train.EpisodicModule.training_step = hang
train.make_untrained = lambda settings, examples: (script.Linear(), script.make_head(settings["head"]))
train.main(sys.argv[4:])
"""


def alive(process: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_for(what: Callable[[], bool], seconds: float) -> float:
    start = time.monotonic()
    while not what():
        assert time.monotonic() - start < seconds
        time.sleep(0.05)
    return time.monotonic() - start


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at processes in /proc")
@pytest.mark.parametrize("hangs", [False, True], ids=["in a reduction", "elsewhere"])
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_of_two_processes_is_killed_the_other_ends_too(tmp_path, victim, hangs) -> None:
    """While it waits for the other's gradients, and while it waits for something that has nothing to do with it."""
    script = tmp_path / "script.py"
    script.write_text(HANGING)
    other = 1 - victim
    (tmp_path / f"hang{other if hangs else victim}").touch()
    options = ["--steps", "9", "--tasks", "2", "--device", "cpu", "--threads", "1", "--processes", "2"]
    command = [sys.executable, str(script), str(ROOT), str(ROOT / "tests"), str(tmp_path), *options]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--output", str(tmp_path / "run")], stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for((tmp_path / f"{other if hangs else victim}.hangs").exists, 120)
        wait_for((tmp_path / f"{other}.pid").exists, 60)
        numbers = [int((tmp_path / f"{rank}.pid").read_text()) for rank in range(2)]
        os.kill(numbers[victim], signal.SIGKILL)
        wait_for(lambda: not alive(numbers[other]), 60)
        assert process.wait(10) != 0
        if hangs and other == 1:
            assert "the first process is gone" in (tmp_path / "log").read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
