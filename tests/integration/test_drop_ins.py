"""The examples that put a head in the place of another library's classifier, with tiny models: nothing is downloaded."""

from __future__ import annotations

import runpy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convexheads import LogisticHead

linear_model = pytest.importorskip("sklearn.linear_model")

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"

pytestmark = pytest.mark.filterwarnings("default")  # of the packages, about themselves


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request to the Hugging Face Hub is an error, also where its package has been imported before."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if find_spec("huggingface_hub"):
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def run(name: str) -> dict[str, Any]:
    """The variables of an example after its last line."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return (logits.argmax(-1) == labels).double().mean().item()


def test_mteb_scores_a_head_as_scikit_learns_logistic_regression(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mteb")
    evaluators = run("mteb_evaluator")["evaluators"]
    assert isinstance(evaluators["scikit-learn"], linear_model.LogisticRegression)
    scores = [float(line.split(": ")[1].rstrip("%")) for line in capsys.readouterr().out.splitlines()]
    assert len(scores) == len(evaluators) == 3
    assert scores[1] == pytest.approx(scores[0], abs=0.3)  # of 1000 predictions; rounding may decide a tie
    assert 45 < min(scores) < max(scores) < 95  # chance is 33


def test_setfit_fits_saves_and_loads_a_head() -> None:
    pytest.importorskip("setfit")
    found = run("setfit_head")
    model, loaded, labels = found["model"], found["loaded"], np.array(found["labels"])
    assert torch.equal(loaded.predict_proba(found["texts"]), model.predict_proba(found["texts"]))
    assert (loaded.predict(found["texts"]) == labels).mean() > 0.9  # of the texts of the fit; chance is 0.33
    assert loaded.labels == sorted(set(labels))
    torch.testing.assert_close(found["layer"], found["probabilities"], rtol=0, atol=1e-5)
    # it is scikit-learn's classifier with the same settings
    embeddings = model.encode(found["texts"]).astype(np.float64)
    theirs = linear_model.LogisticRegression(class_weight="balanced", tol=1e-10, max_iter=10_000)
    expected = theirs.fit(embeddings, labels).decision_function(embeddings)
    ours = found["classifier"].decision_function(embeddings)
    ours -= ours.mean(-1, keepdims=True)  # the same for all classes, so probabilities do not have it
    np.testing.assert_allclose(ours, expected - expected.mean(-1, keepdims=True), atol=1e-3)


def test_dinos_values_of_c_are_chosen_as_by_scikit_learn() -> None:
    found = run("dino_log_regression")
    shots = 10
    features, labels = found["train"]
    scores, best = found["log_regression"](found["train"], found["validation"], found["test"], shots)
    subsets = found["few_shot_subsets"](labels, shots)
    assert len(subsets) == len(scores) == len(best) == found["TRIES"]
    assert len({tuple(subset.tolist()) for subset in subsets}) == found["TRIES"]
    assert (labels[subsets].sort(-1).values == torch.arange(10).repeat_interleave(shots)).all()
    assert len(found["C"]) == 45
    assert [found["C"][index].log10().item() for index in (0, 22, 44)] == pytest.approx([-6, -0.5, 5])
    values = found["C"][12:33:4].tolist()  # of the 45, without those for which scikit-learn needs long
    for subset, score, chosen in zip(subsets[:3], scores, best, strict=False):
        # DINO's tolerance; with the default one, scikit-learn's accuracies differ by several percent
        models = [linear_model.LogisticRegression(C=C, tol=1e-12, max_iter=10_000) for C in (*values, chosen.item())]
        fits = [model.fit(features[subset], labels[subset]) for model in models]
        validated = [model.score(*found["validation"]) for model in fits]
        assert validated[-1] >= max(validated) - 0.004  # one of 300, which rounding may decide
        assert score.item() == pytest.approx(fits[-1].score(*found["test"]), abs=0.0021)  # one of 500
    assert scores.mean() > 0.8  # chance is 0.1


def test_a_classifier_from_a_folder_of_the_hub_has_the_same_logits() -> None:
    pytest.importorskip("huggingface_hub")
    pytest.importorskip("safetensors")
    found = run("hub_classifier")
    loaded, features = found["loaded"], found["features"]
    assert loaded is not found["classifier"]
    torch.testing.assert_close(loaded(features), found["classifier"](features), rtol=0, atol=0)
    torch.testing.assert_close(loaded(features), found["fitted"](features), rtol=1e-4, atol=1e-4)
    assert accuracy(loaded(features), found["labels"]) > 0.7  # chance is 0.1
    assert loaded.classes == [f"digit {label}" for label in range(10)]


def test_few_shots_move_the_weights_away_from_clips_zero_shot_weights() -> None:
    pytest.importorskip("open_clip")
    found = run("open_clip_prior")
    labels = found["query_labels"]
    torch.testing.assert_close(found["strong"], found["zero_shot"], rtol=0, atol=1e-3)
    assert accuracy(found["tuned"].fitted(found["query"]), labels) > max(0.7, accuracy(found["zero_shot"], labels))
    task = found["support"], found["labels"], found["query"]
    distances = []
    for regularization in (1e6, 1e2, 1.0, 1e-2):
        moved = LogisticHead(regularization)(*task, prior=found["prior"]) - found["zero_shot"]
        distances.append(moved.square().mean().item())
    assert distances == sorted(distances)  # the weaker the regularizer, the further
