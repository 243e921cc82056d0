"""SECURITY.md, point by point: files from elsewhere run no code and write nothing, and nothing opens a connection."""

from __future__ import annotations

import ast
import io
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from tasks import ROOT

from benchmarks import train
from benchmarks.data import load
from benchmarks.data.sources import Source, archives, csv_lists, open_image
from benchmarks.options import Options
from convexheads import InputError, _storage, load_pretrained
from convexheads.cli.folder import FolderClassifier
from convexheads.integrations.lightning import EpisodicDataModule
from convexheads_cli import main


class Trap:
    """Whoever unpickles it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.path),)


def legacy_tar(trap: Trap) -> bytes:
    """As PyTorch saved before 0.2: what `weights_only=True` let through before version 2.6 (CVE-2025-32434)."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            part = pickle.dumps(1) + pickle.dumps(trap)
            member = tarfile.TarInfo(name)
            member.size = len(part)
            archive.addfile(member, io.BytesIO(part))
    return content.getvalue()


def saved(write: Callable[[io.BytesIO], None]) -> bytes:
    content = io.BytesIO()
    write(content)
    return content.getvalue()


def objects(trap: Trap) -> np.ndarray:
    array = np.empty(1, object)
    array[0] = trap
    return array


LEGACY = "torch, before 0.2"
FILES: dict[str, Callable[[Trap], bytes]] = {
    "pickle": pickle.dumps,
    "torch": lambda trap: saved(lambda file: torch.save(trap, file)),
    "torch, beside tensors": lambda trap: saved(lambda file: torch.save((torch.zeros(9, 4), trap), file)),
    "torch, in a checkpoint": lambda trap: saved(lambda file: torch.save({"state_dict": {}, "callbacks": trap}, file)),
    "torch, before 1.6": lambda trap: saved(lambda file: torch.save(trap, file, _use_new_zipfile_serialization=False)),
    LEGACY: legacy_tar,
    "npy": lambda trap: saved(lambda file: np.save(file, objects(trap), allow_pickle=True)),
    "npz": lambda trap: saved(lambda file: np.savez(file, arr_0=objects(trap))),
}


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def resume(folder: Path, content: bytes) -> None:
    put(folder / "checkpoints" / "last.safetensors", content)
    put(folder / "config.yaml", yaml.safe_dump(Options(output=folder).record()).encode())
    with pytest.raises(SystemExit, match=r"^error: resume: expected .*, got .*last\.safetensors, damaged") as ended:
        train.main(["--resume", "--output", str(folder)])
    assert ended.value.__cause__ is not None
    raise ended.value.__cause__


def in_class_folders(folder: Path, content: bytes, *, features: str, suffix: str) -> None:
    for name in "ab":
        put(folder / name / f"x.{suffix}", content)
    FolderClassifier.from_folder(folder, features=features)


def cifar(folder: Path, content: bytes) -> None:
    for name in ("train", "test", "meta"):
        put(folder / "cifar-100-python" / name, content)
    load("cifar-fs", folder)


def archive(folder: Path, content: bytes) -> None:
    with ZipFile(put(folder / "x.zip", b""), "w") as file:
        file.writestr("a/x.png", content)
    read_all(archives(["x.zip"], folder, {"test": ["a"]}))


def read_all(source: Source) -> None:
    for name, reads in source.images.items():
        for read in reads:
            open_image(name, read, "RGB")


READERS: dict[str, Callable[[Path, bytes], object]] = {
    "EpisodicDataModule": lambda folder, content: EpisodicDataModule(str(put(folder / "x.pt", content))),
    "load_pretrained": lambda folder, content: load_pretrained(put(folder / "x.safetensors", content)),
    "FolderClassifier.load": lambda folder, content: FolderClassifier.load(put(folder / "x.safetensors", content)),
    "vectors": lambda folder, content: in_class_folders(folder, content, features="npy", suffix="npy"),
    "images": lambda folder, content: in_class_folders(folder, content, features="conv4-cifar-fs-ridge", suffix="png"),
    "benchmarks.train --resume": resume,
    "torchvision's CIFAR-100": cifar,
    "an archive of images": archive,
}


@pytest.mark.parametrize("kind", [kind for kind in FILES if kind != LEGACY])  # which nothing reads any more
def test_the_trap_springs_where_it_is_unpickled(kind: str, tmp_path: Path) -> None:
    trap = Trap(tmp_path / "sprung")
    content = FILES[kind](trap)
    if kind.startswith("np"):
        found = np.load(io.BytesIO(content), allow_pickle=True)
        assert kind == "npy" or found["arr_0"] is not None
    elif kind.startswith("torch"):
        torch.load(io.BytesIO(content), weights_only=False)
    else:
        pickle.loads(content)
    assert trap.path.is_dir()


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("reader", READERS)
def test_nothing_is_unpickled(reader: str, kind: str, tmp_path: Path) -> None:
    content = FILES[kind](Trap(tmp_path / "sprung"))
    with pytest.raises(InputError):
        READERS[reader](tmp_path / "given", content)
    assert not (tmp_path / "sprung").exists()


def test_torch_and_numpy_are_told_not_to_unpickle() -> None:
    """`make lint` sees everything else that is unsafe; its rules don't cover these arguments."""
    calls = [
        (f"{path.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.func), {k.arg: k.value for k in node.keywords})
        for folder in ("convexheads", "benchmarks", "docs")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]
    loads = [(at, named.get("weights_only")) for at, function, named in calls if function == "torch.load"]
    assert loads
    assert not [at for at, value in loads if not (isinstance(value, ast.Constant) and value.value is True)]
    pickles = [(at, named["allow_pickle"]) for at, _, named in calls if "allow_pickle" in named]
    assert not [at for at, value in pickles if not (isinstance(value, ast.Constant) and value.value is False)]


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.mkdir ['{0}']",
        "steps: !!python/object/apply:os.mkdir ['{0}']",
        "? !!python/object/new:os.mkdir ['{0}']\n: 1",
        "steps: !!python/name:os.mkdir",
    ],
)
def test_a_configuration_runs_no_code(text: str, tmp_path: Path) -> None:
    config = put(tmp_path / "config.yaml", text.format(tmp_path / "sprung").encode())
    with pytest.raises(
        SystemExit, match=r"(?s)^error: config: expected a YAML file of options.*, got .*config\.yaml.*"
    ) as found:
        train.main(["--config", str(config)])
    assert "could not determine a constructor" in str(found.value)
    assert not (tmp_path / "sprung").exists()


def test_the_configuration_of_a_run_to_resume_runs_no_code(tmp_path: Path) -> None:
    save_file({}, put(tmp_path / "checkpoints" / "last.safetensors", b""))
    put(tmp_path / "config.yaml", f"!!python/object/apply:os.mkdir ['{tmp_path / 'sprung'}']".encode())
    with pytest.raises(SystemExit, match=r"^error: (config|resume): expected .*, got"):
        train.main(["--resume", "--output", str(tmp_path)])
    assert not (tmp_path / "sprung").exists()


def test_a_configuration_of_great_depth_is_refused(tmp_path: Path) -> None:
    config = put(tmp_path / "own.yaml", b"[" * 100_000)
    with pytest.raises(SystemExit, match=r"(?s)config: expected a YAML file of options.*, got .*"):
        train.main(["--config", str(config)])


def png(size: int = 4) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (size, size)).save(content, "PNG")
    return content.getvalue()


def everything(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def from_archive(folder: Path, members: dict[str | ZipInfo, bytes]) -> Source:
    with ZipFile(put(folder / "x.zip", b""), "w", ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return archives(["x.zip"], folder, {"test": ["a"]})


@pytest.mark.parametrize("outside", ["../../a/x.png", "/{0}/a/x.png", "..\\..\\a/x.png", "a/../../../a/x.png"])
def test_an_archive_is_read_and_never_extracted(outside: str, tmp_path: Path) -> None:
    source = from_archive(tmp_path / "one" / "two", {outside.format(tmp_path): png(), "a/y.png": png()})
    before = everything(tmp_path)
    read_all(source)
    assert source.images["a"]
    assert everything(tmp_path) == before


def test_a_link_in_an_archive_leads_nowhere(tmp_path: Path) -> None:
    secret = put(tmp_path / "secret.png", png())
    link = ZipInfo("a/x.png")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with pytest.raises(InputError, match="a missing or damaged image of class 'a'"):
        read_all(from_archive(tmp_path / "data", {link: str(secret).encode()}))


def test_an_archive_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    source = from_archive(tmp_path, {"a/x.png": png() + bytes(2**27)})
    assert (tmp_path / "x.zip").stat().st_size < 2**20
    with pytest.raises(InputError, match=r"damaged image of class 'a': a/x.png of 134,217,[0-9]+ bytes"):
        read_all(source)
    # It may say that it holds less: no more is unpacked.
    content = (tmp_path / "x.zip").read_bytes()
    size = len(png()) + 2**27
    put(tmp_path / "x.zip", content.replace(size.to_bytes(4, "little"), (100).to_bytes(4, "little")))
    with pytest.raises(InputError, match="damaged image of class 'a': Bad CRC"):
        read_all(archives(["x.zip"], tmp_path, {"test": ["a"]}))


def test_an_archive_with_a_password_is_refused(tmp_path: Path) -> None:
    from_archive(tmp_path, {"a/x.png": png()})
    content = bytearray((tmp_path / "x.zip").read_bytes())
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    put(tmp_path / "x.zip", bytes(content))
    with pytest.raises(InputError, match=r"damaged image of class 'a': .*encrypted"):
        read_all(archives(["x.zip"], tmp_path, {"test": ["a"]}))


def huge_image() -> bytes:
    """A PNG that says that it has 10 ** 10 pixels."""
    import zlib

    content = bytearray(png())
    content[16:24] = (100_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


def test_an_image_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"damaged image of class 'a': .*decompression bomb"):
        read_all(from_archive(tmp_path, {"a/x.png": huge_image()}))
    with pytest.raises(InputError, match=r"file: expected .*, got .*x\.png \(.*decompression bomb"):
        in_class_folders(tmp_path / "own", huge_image(), features="conv4-cifar-fs-ridge", suffix="png")


@pytest.mark.parametrize("name", ["../../secret.png", "{0}/secret.png", "a/../../../secret.png"])
def test_a_list_names_images_of_its_own_folder_only(name: str, tmp_path: Path) -> None:
    put(tmp_path / "secret.png", png())
    list_ = f"filename,label\nx.png,a\n{name.format(tmp_path)},a\n"
    put(tmp_path / "root" / "own" / "test.csv", list_.encode())
    put(tmp_path / "root" / "own" / "images" / "x.png", png())
    with pytest.raises(InputError, match=r"data root: expected .*, got .*test\.csv, which names .*secret\.png"):
        csv_lists("own", tmp_path / "root", {"test": ["a"]})


def foreign_classifier(folder: Path, features: str) -> Path:
    """A classifier whose features are a function of a module that says when it is imported."""
    code = f"""
        from pathlib import Path
        import torch
        Path({str(folder / "imported")!r}).touch()
        def f(paths):
            return torch.eye(len(paths), 2)
    """
    put(folder / "theirs.py", dedent(code).encode())
    settings = {"classes": ["a", "b"], "features": features, "head": "ridge", "scale": None}
    tensors = {"support": torch.eye(2, dtype=torch.float64), "labels": torch.arange(2)}
    _storage.save(folder / "own.safetensors", tensors, settings, key="classifier", needed_by="the test")
    return folder / "own.safetensors"


@pytest.fixture
def _own_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "theirs", raising=False)


@pytest.mark.usefixtures("_own_modules")
def test_a_classifier_imports_nothing_that_only_its_file_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = foreign_classifier(tmp_path, "theirs:f")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"features: expected features='theirs:f' again .*, got nothing"):
        FolderClassifier.load(path)
    with pytest.raises(InputError, match=r"features: expected 'theirs:f', as in.*, got 'os:system'"):
        FolderClassifier.load(path, features="os:system")
    assert not (tmp_path / "imported").exists()
    (found,) = FolderClassifier.load(path, features="theirs:f").predict([path])
    assert found.label == "a"
    assert (tmp_path / "imported").exists()
    with pytest.raises(InputError, match=r"features: expected .*, got nothing"):
        FolderClassifier.load(foreign_classifier(tmp_path, "os:system"))


@pytest.mark.usefixtures("_own_modules")
def test_the_command_asks_for_code_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = str(foreign_classifier(tmp_path, "theirs:f"))
    with pytest.raises(SystemExit, match=r"error: features: expected .*, got nothing"):
        main(["predict", path, path])
    assert not (tmp_path / "imported").exists()
    main(["predict", path, path, "--features", "theirs:f", "--output", "out.csv"])
    assert (tmp_path / "out.csv").read_text().splitlines()[1].split(",")[1] == "a"


def test_the_command_imports_nothing_of_the_current_folder(tmp_path: Path) -> None:
    for name in ("wordllama", "safetensors", "numba", "numpy", "torch", "theirs", "PIL"):
        put(tmp_path / f"{name}.py", f"open({str(tmp_path / 'imported')!r}, 'w')".encode())
    for name in ("sea", "sky"):
        put(tmp_path / "texts" / name / "one.txt", f"of the {name}".encode())
    command = Path(sys.executable).with_name("convexheads")
    if not command.exists():
        pytest.skip("the command is not installed")
    for arguments in (["fit", "texts"], ["predict", "classifier.safetensors", "texts"]):
        done = subprocess.run([command, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    assert not (tmp_path / "imported").exists()


# Also refuses to look up names; what C or Rust code does on its own is not seen.
WITHOUT_NETWORK = """
import sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname"):
        address = arguments[0] if event in ("socket.getaddrinfo", "socket.gethostbyname") else arguments[-1]
        host = address[0] if isinstance(address, tuple) else address
        if host not in ("127.0.0.1", "::1", "localhost", None):
            sys.stderr.write(f"network: {event} {arguments}\\n")
            sys.stderr.flush()
            raise PermissionError(f"{event} {arguments}")

sys.addaudithook(refuse)
"""

OFFLINE = {
    "core": """
        import torch
        import convexheads as ch
        head = ch.SVMHead(C=0.1)
        features, labels = torch.randn(200, 8), torch.arange(200) % 10
        head.fit(features[:50], labels[:50])(features)
        ch.evaluate(head, features, labels, ways=5, shots=5, episodes=10, progress=False)
    """,
    "pretrained": """
        import torch
        import convexheads as ch
        from convexheads.models import list_pretrained
        for name in list_pretrained():
            backbone, _, settings = ch.load_pretrained(name)
            size = settings["image_size"]
            backbone(torch.zeros(2, backbone.mean.shape[1], size, size, dtype=torch.uint8))
    """,
    "text": """
        from convexheads_cli import main
        main(["fit", "texts"])
        main(["predict", "classifier.safetensors", "texts"])
    """,
    "training": """
        from benchmarks import train
        train.main("--steps 2 --tasks 2 --test-episodes 10 --device cpu --threads 1 --output run".split())
    """,
}


@pytest.mark.parametrize(
    "part",
    [pytest.param(part, marks=pytest.mark.slow if part in ("pretrained", "training") else []) for part in OFFLINE],
)
def test_nothing_asks_the_network(part: str, tmp_path: Path) -> None:
    for name in ("sea", "sky"):
        put(tmp_path / "texts" / name / "one.txt", f"of the {name}".encode())
    done = run_without_network(OFFLINE[part], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "network:" not in done.stderr


def test_a_question_to_the_network_would_be_seen(tmp_path: Path) -> None:
    for attempt in (
        "import urllib.request; urllib.request.urlopen('http://example.invalid')",
        "import socket; socket.create_connection(('192.0.2.1', 80))",
        "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'', ('192.0.2.1', 80))",
    ):
        done = run_without_network(attempt, tmp_path)
        assert done.returncode != 0
        assert "network: socket." in done.stderr


def run_without_network(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "HOME": str(folder),  # where nothing was downloaded before
        "HF_HOME": str(folder),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    if find_spec("matplotlib"):
        import matplotlib

        environment["MPLCONFIGDIR"] = matplotlib.get_configdir()
    command = [sys.executable, "-c", WITHOUT_NETWORK + dedent(script)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
