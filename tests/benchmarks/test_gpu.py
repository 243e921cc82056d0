"""The command for machines with a GPU: its queue, packing and unpacking of its results, and that it may be killed."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import tarfile
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tasks import ROOT

import convexheads as ch
from benchmarks.gpu import archive, queue, speed, stages
from benchmarks.gpu import machine as gpu_machine
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.session import Session
from benchmarks.options import Options
from benchmarks.report import LEFT_OUT
from benchmarks.solvers import ON_GPU
from convexheads.models import build_model, save_pretrained
from convexheads.solvers.native import active_set


def test_every_training_of_the_queue_can_begin() -> None:
    entries = [*queue.QUEUE, *queue.SMOKE_QUEUE]
    names = [entry.name for entry in entries]
    assert len(names) == len(set(names)) > 30
    for entry in queue.QUEUE:
        options = entry.options(precision="bfloat16", data_root=Path("data"), output=Path("out") / entry.name)
        assert isinstance(options, Options)
        assert options.folder == Path("out") / entry.name
        assert isinstance(options.test_shots, tuple)
        assert options.precision == "bfloat16"
        build_model(options.record(), torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8))
    for entry in entries:
        options = queue.shrink(entry.options())
        assert (options.dataset, options.total_steps, options.checkpoint_every) == ("digits", 4, 1)


def test_nothing_is_trained_twice() -> None:
    records = {entry.name: json.dumps(entry.options().record(), sort_keys=True) for entry in queue.QUEUE}
    twice = [name for name, record in records.items() if [*records.values()].count(record) > 1]
    assert not twice


def test_rows_of_table_4_add_what_their_names_say() -> None:
    rows = {entry.name.partition("svm-")[2]: entry.options().record() for entry in queue._table4()}
    names = ["augmentation", "decay", "dropblock", "smoothing", "trainval"]
    assert list(rows) == ["none", "decay", *("-".join(names[:count]) for count in range(1, 6))]
    for name, record in rows.items():
        parts = name.split("-")
        assert (record["augment"] != "none") == ("augmentation" in parts)
        assert (record["weight_decay"] > 0) == ("decay" in parts)
        assert (record["dropblock"] != "none") == ("dropblock" in parts)
        assert (record["label_smoothing"] > 0) == ("smoothing" in parts)
        assert record["trainval"] == ("trainval" in parts)


def finished(folder: Path) -> Path:
    """Results of a training with its weights, and what stays behind."""
    images = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    settings = {"backbone": "conv4", "head": "svm", "image_size": 32}
    folder.mkdir(parents=True)
    save_pretrained(folder / "model.safetensors", *build_model(settings, images), settings)
    (folder / "result.json").write_text(json.dumps({"seed": 0}))
    for name in ("checkpoints/last.safetensors", "tensorboard/events"):
        (folder / name).parent.mkdir()
        (folder / name).write_bytes(bytes(1000))
    (folder / ".model.safetensors.4f2a.part").write_bytes(bytes(1000))  # as a process leaves it that is killed
    return folder


def test_packed_results_have_weights_of_half_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "PART", 100_000)
    folder = finished(tmp_path / "out" / "one")
    before = (folder / "model.safetensors").read_bytes()
    home = tmp_path / "out" / "home"
    parts = archive.pack_results(tmp_path / "out", home)
    (home / "part-99").write_bytes(b"of a longer archive")
    again = archive.pack_results(tmp_path / "out", home)
    assert again == parts  # which takes the place of the first, and leaves it out
    assert len(parts) > 1
    assert sorted(home.iterdir()) == parts
    assert all(part.stat().st_size <= 100_000 for part in parts)
    assert sum(part.stat().st_size for part in parts) < 0.6 * len(before)
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == [
        ".model.safetensors.4f2a.part",
        "checkpoints",
        "model.safetensors",
        "result.json",
        "tensorboard",
    ]

    names = archive.unpack_results(tmp_path / "out" / "home", tmp_path / "home")
    assert names == ["one/model.safetensors", "one/result.json"]
    assert json.loads((tmp_path / "home" / "one" / "result.json").read_text()) == {"seed": 0}
    backbone, head, settings = ch.load_pretrained(folder)
    own, own_head, own_settings = ch.load_pretrained(tmp_path / "home" / "one")
    assert own_settings == settings
    assert own_head.state_dict() == head.state_dict()
    for name, value in backbone.state_dict().items():
        found = own.state_dict()[name]
        assert found.dtype == value.dtype
        rounded = value.half().to(value.dtype) if value.ndim > 1 and value.is_floating_point() else value
        assert torch.equal(found, rounded), name
    images = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(own.eval()(images), backbone.eval()(images), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("home", [".", "packed"])
def test_packed_results_are_not_packed_again(home: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "result.txt").write_text("found")
    for _ in range(2):
        archive.pack_results(output, output / home)
    assert archive.unpack_results(output / home, tmp_path / "unpacked") == ["result.txt"]
    with pytest.raises(SystemExit, match="error"):
        archive.unpack_results(tmp_path, tmp_path / "unpacked")


def test_unpacking_writes_nothing_outside_the_folder(tmp_path: Path) -> None:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        member = tarfile.TarInfo("../outside")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"code"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "part-00").write_bytes(content.getvalue())
    with pytest.raises(tarfile.TarError):
        archive.unpack_results(tmp_path / "home", tmp_path / "here")
    assert not (tmp_path / "outside").exists()


def test_an_unfinished_training_is_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--smoke", "--stages", "[trainings]", "--minutes", "0", "--output", str(tmp_path)]
    main(arguments)
    said = capsys.readouterr().out
    assert "trainings: no time left" in said
    assert "Next: smoke_svm" in said


def test_without_time_the_speed_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the stages that follow go on with the time that there is."""
    monkeypatch.setattr(speed, "_peak", lambda *_: 1e12)
    session = Session(tmp_path, None, time.monotonic() + 30, smoke=False, queue=queue.QUEUE)
    assert speed.speed(session) == "nothing was measured"
    assert not list(tmp_path.iterdir())


def test_the_speed_is_measured_with_one_thread_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    def timed(*_: object, **__: object) -> tuple[float, float]:
        used.append(torch.get_num_threads())
        return 10.0, 1.0

    monkeypatch.setattr(speed, "_time", timed)
    monkeypatch.setattr(speed, "find_spec", lambda _: None)  # as without the solver on the GPU
    monkeypatch.setattr(speed, "VARIANTS", speed.VARIANTS[-1:])
    session = Session(tmp_path, None, time.monotonic() + 600, smoke=True, queue=queue.SMOKE_QUEUE)
    torch.set_num_threads(2)
    said = speed.speed(session)
    assert torch.get_num_threads() == 2
    assert used == [1, 1, 1]
    assert said.startswith("100.0 steps per second")
    record = json.loads((tmp_path / "speed" / "speed.json").read_text())
    assert [row["threads"] for row in record["results"]] == used
    assert record["machine"]["threads"] == 1


def test_the_stage_of_solvers_names_what_was_left_out(tmp_path: Path) -> None:
    (tmp_path / "solvers-1.end").write_text("exit status 0: done\n")  # as an earlier call left it
    (tmp_path / "solvers-1.txt").write_text(f"qpth {LEFT_OUT} its package\nanother line\n")
    session = Session(tmp_path, None, time.monotonic() + 600, smoke=True, queue=queue.SMOKE_QUEUE)
    assert stages.solvers(session) == f"1 tasks: exit status 0: done; qpth {LEFT_OUT} its package"


def test_compute_sanitizer_runs_each_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(tmp_path / "out", None, time.monotonic() + 600, smoke=True, queue=queue.SMOKE_QUEUE)
    session.output.mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(stages, "find_spec", lambda _: None)
    assert "not installed" in stages.sanitizer(session)
    package = tmp_path / "nvidia" / "cu13" / "bin"
    package.mkdir(parents=True)
    tool = package / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "$@"\n[ "$2" != synccheck ] && echo 1 passed\n[ "$2" != racecheck ]\n')
    tool.chmod(0o755)
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(stages, "find_spec", lambda _: found)
    said = stages.sanitizer(session)
    checks = [part.partition(":")[2] for part in said.split("; ")]
    assert [check.split()[2] for check in checks] == ["0:", "1:", "0:"]
    assert ["no test has run" in check for check in checks] == [False, False, True]
    assert [path.name for path in session.output.glob("*.end")] == ["memcheck.end"]  # the others run again
    command = (session.output / "memcheck.txt").read_text().split()
    assert command[:2] == ["--tool", "memcheck"]
    assert command.index("--error-exitcode") < command.index(sys.executable) < command.index("pytest")


def test_a_stage_ends_at_its_own_limit(tmp_path: Path) -> None:
    session = Session(tmp_path, None, time.monotonic() + 600, smoke=True, queue=queue.SMOKE_QUEUE)
    assert session.command("sleep", "-c", "import time; time.sleep(60)", limit=1) == "stopped at the time limit"
    assert not (tmp_path / "sleep.end").exists()


def test_only_a_command_that_ended_well_is_not_run_again(tmp_path: Path) -> None:
    session = Session(tmp_path, None, time.monotonic() + 600, smoke=True, queue=queue.SMOKE_QUEUE)
    code = "import os, sys; print(os.environ['WORD']); sys.exit(os.environ['WORD'] == 'first')"
    for word, said in (("first", "1: first"), ("second", "0: second"), ("third", "0: second")):
        assert session.command("name", "-c", code, variables={"WORD": word}) == f"exit status {said}"
    assert "No such file" in session.command("other", "-c", "", under=[str(tmp_path / "missing")])
    session.forget("name")
    assert session.command("name", "-c", code, variables={"WORD": "third"}) == "exit status 0: third"


def test_each_machine_is_checked(tmp_path: Path) -> None:
    (tmp_path / "machine.end").write_text("exit status 0: of another machine\n")
    session = Session(tmp_path, None, time.monotonic() + 600, smoke=True, queue=queue.SMOKE_QUEUE)
    assert f"{ON_GPU}: the relative difference" in stages.machine(session)


def test_without_numba_cuda_a_machine_is_checked_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(active_set, "find_spec", lambda name: None if name == "numba_cuda" else find_spec(name))
    gpu_machine.main()
    printed = capsys.readouterr()
    assert f"{ON_GPU} {LEFT_OUT}" in printed.err
    assert "ridge: " in printed.out


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_what_a_command_started_ends_with_it(tmp_path: Path) -> None:
    session = Session(tmp_path, None, time.monotonic() + 600, smoke=True, queue=queue.SMOKE_QUEUE)
    code = (
        "import subprocess, sys; child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True); child.wait()"
    )
    assert session.command("parent", "-c", code, limit=2) == "stopped at the time limit"
    (child,) = session.output_of("parent")
    time.sleep(0.2)
    state = Path("/proc", child, "stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"  # which waits for a parent to read its status


def test_a_stage_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what they found is packed before the last stage ends, because the command may be killed."""

    def fail(session: Session) -> str:
        (session.output / "before.txt").write_text("found")
        raise RuntimeError("a broken kernel")

    def look(session: Session) -> str:
        return ", ".join(archive.unpack_results(tmp_path / "home", tmp_path / "unpacked"))

    monkeypatch.setattr("benchmarks.gpu.__main__.STAGES", {"speed": fail, "solvers": look})
    main(
        ["--smoke", "--stages", "[speed,solvers]", "--output", str(tmp_path / "out"), "--home", str(tmp_path / "home")]
    )
    printed = capsys.readouterr()
    assert "a broken kernel" in printed.err
    assert "speed: failed, RuntimeError" in printed.out
    assert "solvers: before.txt" in printed.out


def test_nothing_begins_on_a_machine_that_cannot_solve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.machine.CLOSE", -1.0)
    with pytest.raises(SystemExit, match="ridge"):
        gpu_machine.main()
    begun: list[str] = []
    found = {"machine": lambda _: "exit status 1: error", "tests": lambda _: begun.append("tests")}
    monkeypatch.setattr("benchmarks.gpu.__main__.STAGES", found)
    with pytest.raises(SystemExit):
        main(["--smoke", "--stages", "[machine,tests]", "--output", str(tmp_path)])
    assert not begun


def test_a_step_that_fails_does_not_stop_the_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(training: Any, *_: object, network_only: bool) -> tuple[float, float]:
        if not network_only:
            raise RuntimeError("overwritten by a subsequent run")
        return 10.0, 1.0

    monkeypatch.setattr(speed, "_time", timed)
    monkeypatch.setattr(speed, "VARIANTS", speed.VARIANTS[-1:])
    session = Session(tmp_path, None, time.monotonic() + 600, smoke=True, queue=queue.SMOKE_QUEUE)
    speed.speed(session)
    rows = json.loads((tmp_path / "speed" / "speed.json").read_text())["results"]
    assert [row["head"] for row in rows] == ["none: the network alone"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_at_a_random_moment_it_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--smoke", "--minutes", "20", "--output", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "inductor")  # nothing is compiled yet, as in a fresh clone
    for seconds in (random.Random(0).uniform(5, 70), None):
        with (tmp_path / "log").open("a") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                code = process.wait()
                time.sleep(1)
    said = (tmp_path / "log").read_text()
    assert code == 0, said
    assert "All training runs are finished" in said
    for entry in queue.SMOKE_QUEUE:
        folder = tmp_path / "out" / entry.name
        assert json.loads((folder / "result.json").read_text())["results"]
        for name in ("result.md", "metrics.csv", "config.yaml", "accuracy.png"):
            assert (folder / name).stat().st_size > 0
        assert ch.load_pretrained(folder).settings["backbone"] == "conv4"
    speed = json.loads((tmp_path / "out" / "speed" / "speed.json").read_text())
    assert len(speed["results"]) >= 4
    assert all(row["ms"] > 0 for row in speed["results"])
    for name in ("machine", "kernels", "tests", "overhead-calls", "overhead-steps", "solvers-1", "float32"):
        assert (tmp_path / "out" / f"{name}.end").read_text().startswith("exit status 0"), name
    timed = json.loads((tmp_path / "out" / "solvers-1" / "solvers.json").read_text())["results"]
    assert ("qpth" in {row["contender"] for row in timed}) == (find_spec("qpth") is not None)
    names = archive.unpack_results(tmp_path / "out" / "home", tmp_path / "home")
    assert {f"{entry.name}/model.safetensors" for entry in queue.SMOKE_QUEUE} <= set(names)
