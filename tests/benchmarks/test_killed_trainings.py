"""Trainings that are killed at any moment, resumed from damaged checkpoints, or have steps that are not finite."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import multiprocessing.context
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import foreign, refusals
from tasks import ROOT

from benchmarks import loop, report, train
from benchmarks.data import ImageSet
from benchmarks.loop import KIND, Training
from convexheads import InputError, _storage

SMALL = [
    *["--steps", "4", "--tasks", "1", "--queries", "2", "--test-episodes", "2", "--test-queries", "2"],
    *["--checkpoint-every", "1", "--validate-every", "1", "--validation-episodes", "4", "--learning-rate", "1"],
    *["--device", "cpu", "--threads", "1"],
]
BEST = re.compile(r"before write_bytes \.?best\.safetensors(\.\w+\.part)?")
LAST = re.compile(r"before write_bytes \.?last\.safetensors(\.\w+\.part)?")


# Killed at any moment


def small_data(*_: object, **__: object) -> dict[str, ImageSet]:
    """A part of the digits, with validation classes."""
    data = train.load_all("digits")  # pyright: ignore[reportAttributeAccessIssue] # it is there while `load` is this
    few = {name: ImageSet(part.images[::5], part.labels[::5], part.classes) for name, part in data.items()}
    return {"train": few["train"], "val": few["test"], "test": few["test"]}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def watched(events: list[str], moment: int | None) -> None:
    """Kills this process at the `moment`-th event, in the middle of it if it writes."""

    def watch(owner: Any, name: str, begin: Callable[..., object] = lambda *_: None) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any, **settings: Any) -> Any:
            result = None
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
    watch(shutil, "rmtree")
    watch(torch.Tensor, "backward")
    watch(torch.optim.SGD, "step")
    for name in ("take", "read", "validate", "save", "load"):
        watch(Training, name)
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
    context.set_forkserver_preload(
        ["test_killed_trainings", "sklearn.datasets", "matplotlib.pyplot", "torch.utils.tensorboard"]
    )
    return context


def trained(server: Any, folder: Path, moment: int | None = None, seconds: float | None = None) -> int:
    """The exit code of a training, or of its resumption where there is something to resume."""
    resume = ["--resume"] if checkpoint_of(folder).is_file() else []
    log = str(folder.parent / f"{folder.name}.log")
    process = server.Process(target=child, args=([*SMALL, "--output", str(folder), *resume], log, moment))
    process.start()
    process.join(120 if seconds is None else seconds)
    if process.is_alive():
        process.kill()
    process.join()
    return process.exitcode


def checkpoint_of(folder: Path) -> Path:
    return folder / "checkpoints" / "last.safetensors"


def what_remains(folder: Path) -> dict[str, Any]:
    """All that a run leaves behind that doesn't depend on the time."""
    tensors, record = _storage.load(checkpoint_of(folder), **KIND)
    del record["seconds"]
    result = json.loads((folder / "result.json").read_text())
    values = {name: (value.dtype, value.tolist()) for name, value in tensors.items()}
    names = ("model.safetensors", "metrics.csv", "config.yaml", "checkpoints/best.safetensors")
    files = {name: (folder / name).read_bytes() for name in names}
    return {"results": result["results"], "names": [*values], **values, **record, **files}


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


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
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


@pytest.mark.slow
def test_killed_before_the_best_weights_are_written_they_are_found_again(server, undisturbed, tmp_path) -> None:
    *_, moment = (number for number, event in enumerate(happened(undisturbed)) if BEST.fullmatch(event))
    check_killed(server, undisturbed, tmp_path / "run", moment)


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written_the_old_one_is_there(server, undisturbed, tmp_path) -> None:
    folder = tmp_path / "run"
    writes = [number for number, event in enumerate(happened(undisturbed)) if LAST.fullmatch(event)]
    assert len(writes) == 4  # of each step
    assert trained(server, folder, moment=writes[1]) == -signal.SIGKILL
    assert _storage.load(checkpoint_of(folder), **KIND)[1]["step"] == 1
    (part,) = (folder / "checkpoints").glob(".last.safetensors.*.part")
    assert 0 < part.stat().st_size < checkpoint_of(folder).stat().st_size


def test_what_is_left_of_a_finished_run_is_never_taken_for_another(undisturbed, tmp_path, monkeypatch) -> None:
    """Killed while a new run clears away the old one, nothing is there to resume."""
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main([*SMALL, "--output", str(folder)])
    with pytest.raises(SystemExit, match="without a checkpoint"):
        train.main([*SMALL, "--output", str(folder), "--resume"])


# Damaged and foreign checkpoints


def test_damaged_and_foreign_checkpoints_are_refused(undisturbed, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    checkpoint = checkpoint_of(folder)
    before = (folder / "config.yaml").read_bytes()
    options = train.Options.parse([*SMALL, "--output", str(folder), "--resume"], description="")

    def resume() -> Any:
        train.prepare(options)
        return _storage.load(checkpoint, **KIND)

    # A bit of padding alters nothing.
    assert refusals(checkpoint, resume, f"got {checkpoint}, damaged") > 30
    others = [undisturbed / name for name in ("checkpoints/best.safetensors", "model.safetensors")]  # weights only
    for content in (*foreign(tmp_path, monkeypatch), *(other.read_bytes() for other in others)):
        checkpoint.write_bytes(content)
        with pytest.raises(
            InputError, match=r"resume: expected .*, got .*last\.safetensors, damaged or not a checkpoint"
        ):
            train.prepare(options)
    tensors, record = _storage.load(checkpoint_of(undisturbed), **KIND)
    for options_of_it in ([], None, "seed"):
        _storage.save(checkpoint, tensors, record | {"options": options_of_it}, **KIND)
        with pytest.raises(InputError, match=r"resume: expected .*, got .*last\.safetensors"):
            train.prepare(options)
    record["options"]["seed"] = 5
    _storage.save(checkpoint, tensors, record, **KIND)
    with pytest.raises(InputError, match=r"last\.safetensors, which belongs to another run \(seed\)"):
        train.prepare(options)
    assert not (tmp_path / "unpickled").exists()
    assert (folder / "config.yaml").read_bytes() == before


# Steps that are not finite


@pytest.fixture
def with_a_failure(monkeypatch) -> None:
    """The digits, whose third step has a loss of NaN."""
    take, loss, number = Training.take, loop.episode_loss, []

    def watched_take(self, drawn):
        number[:] = [self.step]
        take(self, drawn)

    def altered(*arguments, **settings):
        found = loss(*arguments, **settings)
        return found._replace(loss=found.loss * torch.nan) if number == [2] else found

    monkeypatch.setattr(train, "load_all", train.load, raising=False)
    monkeypatch.setattr(train, "load", small_data)
    monkeypatch.setattr(Training, "take", watched_take)
    monkeypatch.setattr(loop, "episode_loss", altered)


@pytest.mark.slow
@pytest.mark.usefixtures("with_a_failure")
def test_the_benchmark_does_as_configured(tmp_path, caplog) -> None:
    arguments = [*SMALL, "--output"]
    folders = {name: tmp_path / name for name in ("raise", "skip", "stop")}
    with pytest.raises(
        SystemExit, match=r"error: batch: expected .*, got non-finite values in step 2, task 0 \(a loss of nan\)"
    ):
        train.main([*arguments, str(folders["raise"])])
    with pytest.raises(SystemExit, match=r"error: step 2 failed \(a loss of nan\), training has stopped; .*--resume"):
        train.main([*arguments, str(folders["stop"]), "--on-failure", "stop"])
    assert _storage.load(checkpoint_of(folders["stop"]), **KIND)[1]["step"] == 3
    assert _storage.load(checkpoint_of(folders["raise"]), **KIND)[1]["step"] == 2
    train.main([*arguments, str(folders["skip"]), "--on-failure", "skip"])
    for name in ("raise", "stop"):
        assert not (folders[name] / "result.json").exists()
        train.main([*arguments, str(folders[name]), "--on-failure", "skip", "--resume"])
    found = {name: what_remains(folder) for name, folder in folders.items()}
    for name in ("raise", "stop"):
        for key in found["skip"].keys() - {"rows", "metrics.csv"}:  # a stopped training has not validated there
            assert found[name][key] == found["skip"][key], (name, key)
    result = json.loads((folders["skip"] / "result.json").read_text())
    assert result["skipped"] == [{"step": 2, "tasks": [0], "cause": "a loss of nan"}]
    assert "skipped step 2, task 0" in caplog.text


# One of two processes is killed

HANGING = """
import os, sys, time
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
import two_processes as script
from benchmarks import train
rank, flags = os.environ.get("LOCAL_RANK", "0"), Path(sys.argv[3])
from benchmarks.loop import Training
take = Training.take
def hang(self, drawn):
    (flags / f"{rank}.pid").write_text(str(os.getpid()))
    if self.step == 1 and (flags / f"hang{rank}").exists():
        (flags / f"{rank}.hangs").touch()
        time.sleep(600)
    take(self, drawn)
Training.take = hang
train.build_model = lambda settings, examples: (script.Linear(), script.build_head(settings["head"]))
train.main(sys.argv[4:])
"""


FAILING = """
import os, sys, time
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
import torch, two_processes as script
from benchmarks import loop, train
from benchmarks.loop import Training
rank, found, save = os.environ.get("LOCAL_RANK", "0"), loop.episode_loss, Training.save
calls = []
def altered(*arguments, **settings):
    calls.append(0)
    loss = found(*arguments, **settings)
    return loss._replace(loss=loss.loss * torch.nan) if rank == "1" and len(calls) == 3 else loss
def slow(self, path):
    time.sleep(3)
    save(self, path)
loop.episode_loss, Training.save = altered, slow
train.build_model = lambda settings, examples: (script.Linear(), script.build_head(settings["head"]))
train.main(sys.argv[3:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("on_failure", ["raise", "stop"])
def test_when_a_step_of_two_processes_fails_the_first_one_says_so(tmp_path, on_failure) -> None:
    """And where the training stops, its checkpoint is there, however long it takes to write it."""
    script = tmp_path / "script.py"
    script.write_text(FAILING)
    options = ["--steps", "9", "--tasks", "4", "--device", "cpu", "--threads", "1", "--processes", "2"]
    command = [sys.executable, str(script), str(ROOT), str(ROOT / "tests"), *options, "--on-failure", on_failure]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "run")], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1, done.stderr
    said = (
        r"batch: expected .*, got non-finite values in step 2, task 1, 3"
        if on_failure == "raise"
        else "step 2 failed (a loss of nan), training has"
    )
    assert said in done.stderr
    assert "all end" not in done.stderr
    path = checkpoint_of(tmp_path / "run")
    assert path.is_file() == (on_failure == "stop")
    if on_failure == "stop":
        _, record = _storage.load(path, **KIND)
        assert record["step"] == 3
        assert record["failures"] == [{"step": 2, "tasks": [1, 3], "cause": "a loss of nan"}]


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
@pytest.mark.parametrize(
    ("victim", "hangs"),
    [
        pytest.param(0, True, id="first-elsewhere", marks=pytest.mark.slow),
        pytest.param(0, False, id="first-in a reduction", marks=pytest.mark.slow),
        pytest.param(1, False, id="second-in a reduction", marks=pytest.mark.slow),
        pytest.param(1, True, id="second-elsewhere", marks=pytest.mark.slow),
    ],
)
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
