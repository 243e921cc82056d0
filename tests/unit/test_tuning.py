"""Tuning, compared with loops of scikit-learn and with single fits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import PredefinedSplit, cross_val_score
from tasks import close, task

from convexheads import (
    InputError,
    LinearDiscriminantHead,
    LogisticHead,
    OneVsRestSVMHead,
    PrototypeHead,
    RidgeHead,
    SVMHead,
    TunedHead,
    evaluate,
    tune,
)
from convexheads.heads.base import held_out
from convexheads.kernels import RBF, Linear

PENALTIES = 10.0 ** torch.linspace(-4, 3, 8, dtype=torch.float64)
HEADS = {
    "ridge": (RidgeHead, "regularization", {}),
    "ridge with intercept": (RidgeHead, "regularization", {"intercept": True, "class_weight": "balanced"}),
    "logistic": (LogisticHead, "regularization", {}),
    "logistic with intercept": (LogisticHead, "regularization", {"intercept": True, "class_weight": "balanced"}),
    "svm": (SVMHead, "C", {}),
    "one-vs-rest svm": (OneVsRestSVMHead, "C", {"squared_hinge": True}),
    "svm with a kernel": (SVMHead, "C", {"kernel": RBF(3.0)}),
    "lda": (LinearDiscriminantHead, "shrinkage", {}),
}
SIZES = {
    "small": {"shots": (6, 8, 7), "d": 10},
    "many examples": {"shots": (60, 50, 40), "d": 12},
    "many weights": {"shots": (30, 40, 35, 31), "d": 150},
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("head", "name", "options"), HEADS.values(), ids=HEADS)
def test_scores_are_those_of_single_fits(head, name, options, sizes):
    support, labels, query, ways = task(2, **sizes)
    values = (PENALTIES / PENALTIES.max()).tolist() if name == "shrinkage" else PENALTIES.tolist()
    mask = torch.ones_like(labels, dtype=torch.bool)
    mask[0, 1] = False
    support[0, 1] = torch.nan
    tuned = tune(head(**options), {name: values}, support, labels, cv=3, mask=mask, progress=False)
    assert tuned.accuracy.shape == tuned.log_loss.shape == (2, len(values))
    assert tuned.converged is None or tuned.converged.all()
    for number in range(2):
        folds = tuned.folds[number]
        assert folds[~mask[number]].eq(-1).all()
        for place, value in list(enumerate(values))[::3]:
            found = []
            for fold in range(3):
                train, held_out = (folds != fold) & mask[number], folds == fold
                logits = head(**{name: value}, **options)(
                    support[number, train], labels[number, train], support[number, held_out], ways=ways
                )
                truth = labels[number, held_out]
                loss = torch.nn.functional.cross_entropy(logits, truth)
                found.append(((logits.argmax(-1) == truth).double().mean(), loss))
            accuracy, loss = (torch.stack(part).mean() for part in zip(*found, strict=True))
            assert tuned.accuracy[number, place] == pytest.approx(accuracy.item())
            assert tuned.log_loss[number, place] == pytest.approx(loss.item(), rel=1e-5, abs=1e-7)
        chosen = tuned.values[name][number]
        assert chosen == values[int(tuned.accuracy[number].argmax())]
        kept = mask[number]
        alone = head(**{name: chosen}, **options)(support[number, kept], labels[number, kept], query[number], ways=ways)
        assert close(tuned.fitted(query)[number], alone) < 1e-6


@pytest.mark.parametrize("scoring", ["accuracy", "log_loss"])
def test_the_choice_is_that_of_scikit_learn(scoring):
    support, labels, _, _ = task(shots=(20, 25, 30), d=15)
    tuned = tune(
        LogisticHead(intercept=True), {"regularization": PENALTIES}, support, labels, scoring=scoring, progress=False
    )
    split = PredefinedSplit(tuned.folds.numpy())
    name = "accuracy" if scoring == "accuracy" else "neg_log_loss"
    means = [
        cross_val_score(
            LogisticRegression(C=1 / penalty, tol=1e-9, max_iter=10_000), support, labels, cv=split, scoring=name
        ).mean()
        for penalty in PENALTIES.tolist()
    ]
    expected = torch.tensor(means)
    found = tuned.accuracy if scoring == "accuracy" else -tuned.log_loss
    assert close(found, expected.double()) < 1e-5
    assert tuned.values["regularization"] == PENALTIES[int(np.argmax(means))]
    assert tuned.score == pytest.approx(abs(max(means)), rel=1e-5)
    assert tuned.fitted.solution.converged


@pytest.mark.parametrize("head", [RidgeHead(), LogisticHead(), SVMHead(), PrototypeHead()], ids=repr)
def test_leaving_one_out_equals_refits(head):
    support, labels, _, ways = task(shots=(3, 4, 5), d=6)
    name = {RidgeHead: "regularization", LogisticHead: "regularization", SVMHead: "C"}.get(type(head), "scale")
    tuned = tune(head, {name: [0.3, 2.0]}, support, labels, cv="loo", progress=False)
    for place, value in enumerate((0.3, 2.0)):
        head.set_params(**{name: value})
        right = [
            head(support[kept], labels[kept], support[[out]], ways=ways).argmax().item() == labels[out].item()
            for out in range(len(labels))
            for kept in [torch.arange(len(labels)) != out]
        ]
        assert tuned.accuracy[place] == pytest.approx(np.mean(right))


def test_a_validation_set_and_settings_of_every_kind():
    support, labels, query, ways = task(2, shots=(6, 8, 7), d=10)
    truth = torch.arange(query.shape[1]) % ways
    grid = {"kernel": [Linear(), RBF(2.0)], "C": [0.1, 1.0], "squared_hinge": [False, True]}
    tuned = tune(SVMHead(), grid, support, labels, cv=(query, truth.expand(2, -1)), progress=False)
    assert len(tuned.points) == 8
    assert tuned.folds is None
    for place, point in enumerate(tuned.points):
        logits = SVMHead(**point)(support, labels, query)
        assert close(tuned.accuracy[:, place], (logits.argmax(-1) == truth).double().mean(-1)) < 1e-9
    chosen = tuned.values
    assert chosen["kernel"][0] is chosen["kernel"][1]
    nested = tune(SVMHead(kernel=RBF()), {"kernel__length_scale": [1.0, 3.0]}, support, labels, cv=3, progress=False)
    assert nested.accuracy.shape == (2, 2)
    assert "kernel__length_scale" in repr(nested)


def test_parts_give_the_same_scores(monkeypatch):
    support, labels, _, _ = task(3, shots=(9, 8, 7), d=10)
    grid = {"regularization": PENALTIES}
    expected = tune(LogisticHead(), grid, support, labels, cv=4, progress=False)
    for limit in (2000, 20_000):
        monkeypatch.setattr(held_out, "MAX_ENTRIES", limit)
        found = tune(LogisticHead(), grid, support, labels, cv=4, progress=False)
        assert close(found.log_loss, expected.log_loss) < 1e-6
        assert torch.equal(found.accuracy, expected.accuracy)


def test_probabilities_of_scikit_learn_have_the_same_log_loss():
    support, labels, query, ways = task(shots=(20, 25, 30), d=15)
    truth = torch.arange(query.shape[0]) % ways
    tuned = tune(LogisticHead(), {"regularization": [0.5]}, support, labels, cv=(query, truth), progress=False)
    reference = LogisticRegression(C=2.0, fit_intercept=False, tol=1e-9, max_iter=10_000).fit(support, labels)
    assert tuned.log_loss[0] == pytest.approx(log_loss(truth, reference.predict_proba(query)), rel=1e-6)


def test_the_final_fit_has_gradients():
    support, labels, query, _ = task(2, shots=(6, 8, 7), d=10)
    support.requires_grad_()
    tuned = tune(RidgeHead(), {"regularization": [0.1, 10.0]}, support, labels, cv=3, progress=False)
    (gradient,) = torch.autograd.grad(tuned.fitted(query).square().sum(), support)
    assert gradient.abs().sum() > 0


def test_tuned_in_every_episode():
    labels = torch.arange(180) % 6
    features = torch.eye(6)[labels] + 0.3 * torch.randn(180, 6, generator=torch.Generator().manual_seed(0))
    head = TunedHead(RidgeHead(), {"regularization": [1e-3, 1.0, 1e3]}, cv=2)
    found = evaluate(head, features, labels, ways=4, shots=4, queries=5, episodes=20, progress=False)
    assert found.accuracy > 0.7
    one = TunedHead(RidgeHead(), {"regularization": [1.0]}, cv=2)
    support, query = features[:48], features[48:60]
    assert torch.equal(one(support, labels[:48], query), RidgeHead(1.0)(support, labels[:48], query))
    for name, value in (("calibrate", "loo"), ("allow_missing_classes", True)):
        with pytest.raises(InputError, match=name):
            one.fit(support, labels[:48], **{name: value})
    expected = evaluate(RidgeHead(1.0), features, labels, ways=4, shots=4, queries=5, episodes=20, progress=False)
    found = evaluate(one, features, labels, ways=4, shots=4, queries=5, episodes=20, progress=False)
    assert torch.equal(found.accuracies, expected.accuracies)


def test_the_path_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    support, labels, _, _ = task(2, shots=(6, 8, 7), d=10)
    grid = {"regularization": PENALTIES, "intercept": [False, True]}
    tuned = tune(RidgeHead(), grid, support, labels, cv=3, progress=False)
    figure = tuned.plot(tmp_path / "path.png")
    assert (tmp_path / "path.png").stat().st_size > 5000
    assert [axes.get_xscale() for axes in figure.axes] == ["log", "log"]
    assert len(figure.axes[0].lines) == 2 + len(set(tuned.best.tolist()))


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("grid", {"grid": {}}),
        ("grid", {"grid": {"other": [1.0]}}),
        ("grid", {"grid": {"C": []}}),
        ("C", {"grid": {"C": [1.0, -1.0]}}),
        ("cv", {"cv": 1}),
        ("cv", {"cv": 7}),
        ("cv", {"cv": "other"}),
        ("cv", {"cv": (torch.zeros(3, 4), torch.zeros(3, dtype=torch.long))}),
        ("scoring", {"scoring": "f1"}),
        ("ways", {"ways": torch.tensor([3, 3])}),
    ],
)
def test_unusable_arguments_are_named(argument, change):
    support, labels, _, _ = task(2, shots=(6, 8, 7), d=10)
    arguments = {"grid": {"C": [0.1, 1.0]}} | change
    with pytest.raises(InputError, match=argument):
        tune(SVMHead(), arguments.pop("grid"), support, labels, progress=False, **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize(("head", "name", "options"), list(HEADS.values())[:6], ids=list(HEADS)[:6])
@pytest.mark.parametrize("cv", [3, "loo"])
def test_cuda_equals_cpu(head, name, options, cv, cuda):
    support, labels, query, _ = task(2, shots=(9, 8, 7), d=10)
    here = tune(head(**options), {name: PENALTIES}, support, labels, cv=cv, progress=False)
    there = tune(head(**options), {name: PENALTIES}, support.to(cuda), labels.to(cuda), cv=cv, progress=False)
    assert there.accuracy.is_cuda
    torch.testing.assert_close(there.accuracy.cpu(), here.accuracy)
    torch.testing.assert_close(there.log_loss.cpu(), here.log_loss, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(there.fitted(query.to(cuda)).cpu(), here.fitted(query), rtol=1e-5, atol=1e-6)
