"""Each adapter with the real package: the same answers, and a few steps of its own training loop."""

from __future__ import annotations

import pickle
import random
from importlib import metadata

import learn2learn as l2l
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from easyfsl.methods import PrototypicalNetworks
from easyfsl.utils import evaluate as easyfsl_evaluate
from installing import installs, requirements_of
from learn2learn.algorithms import LightningMetaOptNet, LightningPrototypicalNetworks
from learn2learn.nn import PrototypicalClassifier, SVClassifier
from scipy.special import softmax
from scipy.stats import loguniform
from sklearn import config_context
from sklearn.base import clone
from sklearn.datasets import load_digits, load_iris
from sklearn.exceptions import NotFittedError
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, RandomizedSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import (
    check_array_api_input,
    check_sample_weight_equivalence_on_dense_data,
    parametrize_with_checks,
)
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from convexheads import InputError, Learnable, LogisticHead, MissingDependencyError, PrototypeHead, RidgeHead, SVMHead
from convexheads.integrations import easyfsl, learn2learn, require_version, sklearn
from convexheads.kernels import RBF


def task(ways: int = 4, shots: int = 3, queries: int = 5, d: int = 12, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(ways, d, generator=generator, dtype=torch.float64)
    labels = torch.arange(ways)
    support, query = (
        (centers.repeat_interleave(n, 0) + torch.randn(ways * n, d, generator=generator)).requires_grad_()
        for n in (shots, queries)
    )
    return support, labels.repeat_interleave(shots), query, labels.repeat_interleave(queries)


@pytest.fixture
def float64():
    """The precision of what learn2learn allocates."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("ways", [None, 4])
def test_in_the_place_of_learn2learns_svm(ways: int | None, float64: None) -> None:
    """Which learn2learn smooths by 1; gradients too."""
    support, labels, query, _ = task()
    theirs, ours = SVClassifier(C_reg=0.1, max_iters=50), learn2learn.HeadClassifier(SVMHead(C=0.1, smoothing=1.0))
    logits, grads = [], []
    for classifier in (theirs, ours):
        classifier.fit_(support, labels, ways)
        logits.append(classifier(query))
        grads.append(torch.autograd.grad(logits[-1].log_softmax(-1)[:, 0].sum(), (support, query)))
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-6)
    for mine, other in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_in_the_place_of_learn2learns_prototypes() -> None:
    support, labels, query, _ = task()
    labels = 10 * labels + 3  # which learn2learn renumbers
    theirs, ours = PrototypicalClassifier(support, labels), learn2learn.HeadClassifier(PrototypeHead())
    ours.fit_(support, labels)
    torch.testing.assert_close(ours(query).log_softmax(-1), theirs(query).log_softmax(-1))


def test_several_tasks_at_once_in_learn2learns_protocol() -> None:
    tasks = [task(seed=seed) for seed in range(3)]
    support, labels, query = (torch.stack([one[part] for one in tasks]) for part in range(3))
    classifier, single = learn2learn.HeadClassifier(RidgeHead()), learn2learn.HeadClassifier(RidgeHead())
    classifier.fit_(support, labels)
    for number, (one, own, queries, _) in enumerate(tasks):
        single.fit_(one, own)
        torch.testing.assert_close(classifier(query)[number], single(queries))


def test_learn2learns_protocol_says_what_is_missing() -> None:
    support, labels, query, _ = task()
    with pytest.raises(InputError, match=r"expected a call to fit_.*a query before any support"):
        learn2learn.HeadClassifier(SVMHead())(query)
    with pytest.raises(InputError, match="labels"):
        learn2learn.HeadClassifier(SVMHead()).fit_(support, labels, ways=2)


class Batches(pl.LightningDataModule):
    """Tasks of clusters, one per batch, as learn2learn's EpisodicBatcher gives them."""

    def train_dataloader(self) -> DataLoader:
        tasks = [task(shots=3, queries=5, seed=seed) for seed in range(6)]
        pairs = [(torch.cat([s, q]).detach().float(), torch.cat([a, b])) for s, a, q, b in tasks]
        return DataLoader(pairs, batch_size=1)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("module", [LightningPrototypicalNetworks, LightningMetaOptNet])
def test_learn2learns_lightning_modules_train_with_it(module: type[LightningPrototypicalNetworks]) -> None:
    torch.manual_seed(0)
    network = nn.Linear(12, 8)
    trained = module(network, train_ways=4, train_shots=3, train_queries=5, lr=0.01)
    trained.classifier = learn2learn.HeadClassifier(SVMHead(C=0.1, scale=Learnable(1.0)))
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    settings = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", logger=False, **settings)
    trainer.fit(trained, Batches())
    assert trainer.callback_metrics["train_accuracy"] > 0.5
    changed = {name for name, value in trained.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"features.weight", "features.bias", "classifier.head.scale.raw_value"}


def test_a_head_in_the_inner_loop_of_maml() -> None:
    """The features adapt through the head's fit, and the outer gradient goes through that: as central differences say."""
    support, labels, query, query_labels = task(ways=3, shots=4, d=5)
    first, second = support[::2].detach(), support[1::2].detach()
    network = nn.Linear(5, 4, dtype=torch.float64)
    head = SVMHead(C=0.1)

    def outer(weight: torch.Tensor) -> torch.Tensor:
        model = nn.Linear(5, 4, dtype=torch.float64)
        model.load_state_dict(network.state_dict())
        maml = l2l.algorithms.MAML(model, lr=0.1, first_order=False)
        maml.module.weight.data = weight.detach()
        learner = maml.clone()
        inner = head(learner(first), labels[::2], learner(second), ways=3)
        learner.adapt(functional.cross_entropy(inner, labels[1::2]))
        logits = head(learner(support.detach()), labels, learner(query.detach()), ways=3)
        loss = functional.cross_entropy(logits, query_labels)
        (gradient,) = torch.autograd.grad(loss, maml.module.weight)
        return torch.stack([loss.detach(), (gradient * direction).sum()])

    torch.manual_seed(0)
    direction = torch.randn(4, 5, dtype=torch.float64)
    weight, step = network.weight.detach(), 1e-5
    _, found = outer(weight)
    up, down = (outer(weight + sign * step * direction)[0] for sign in (1, -1))
    assert found.item() == pytest.approx(((up - down) / (2 * step)).item(), rel=1e-5)


class Clusters(TensorDataset):
    """Features with the labels that easyfsl's sampler asks for."""

    def get_labels(self) -> list[int]:
        return self.tensors[1].tolist()

    def __getitem__(self, index):
        sample, label = super().__getitem__(index)
        return sample, int(label)


@pytest.fixture
def clusters() -> Clusters:
    support, labels, query, query_labels = task(ways=8, shots=5, queries=15)
    return Clusters(torch.cat([support, query]).detach().float(), torch.cat([labels, query_labels]))


def test_with_easyfsls_sampler_and_evaluation(clusters: Clusters) -> None:
    sampler = easyfsl.TaskSampler(clusters, n_way=5, n_shot=3, n_query=5, n_tasks=20)
    loader = DataLoader(clusters, batch_sampler=sampler, collate_fn=sampler.episodic_collate_fn)
    random.seed(0)
    tasks = list(loader)
    accuracy = easyfsl_evaluate(easyfsl.HeadClassifier(SVMHead(C=0.1)), tasks, device="cpu", use_tqdm=False)
    assert accuracy > 0.7  # chance is 0.2
    # squared distances to prototypes order classes as easyfsl's distances do
    ours = easyfsl_evaluate(easyfsl.HeadClassifier(PrototypeHead()), tasks, device="cpu", use_tqdm=False)
    assert ours == easyfsl_evaluate(PrototypicalNetworks(), tasks, device="cpu", use_tqdm=False)


def test_easyfsls_settings_and_gradients() -> None:
    support, labels, query, _ = task()
    backbone = nn.Linear(12, 6, dtype=torch.float64)
    center = torch.randn(6, dtype=torch.float64)
    settings = {"feature_centering": center, "feature_normalization": 2.0, "use_softmax": True}
    classifier = easyfsl.HeadClassifier(LogisticHead(0.1), backbone, **settings)
    classifier.process_support_set(support, labels)
    found = classifier(query)
    features = [functional.normalize(backbone(images) - center) for images in (support, query)]
    torch.testing.assert_close(found, LogisticHead(0.1)(features[0], labels, features[1]).softmax(-1))
    found[:, 0].sum().backward()
    assert backbone.weight.grad.abs().max() > 0
    assert not classifier.is_transductive()


def test_easyfsls_protocol_says_what_is_missing() -> None:
    support, labels, query, _ = task()
    with pytest.raises(InputError, match=r"expected a call to process_support_set first"):
        easyfsl.HeadClassifier(SVMHead())(query)
    with pytest.raises(InputError, match=r"support_labels: expected 0 to k - 1.*, got classes \[1, 2, 3, 4\]"):
        easyfsl.HeadClassifier(SVMHead()).process_support_set(support, labels + 1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32])
@pytest.mark.parametrize("adapter", [easyfsl, learn2learn])
def test_labels_may_have_any_integer_dtype(adapter, dtype: torch.dtype) -> None:
    support, labels, query, _ = task()
    logits = []
    for given in (labels, labels.to(dtype)):
        classifier = adapter.HeadClassifier(RidgeHead())
        (classifier.process_support_set if adapter is easyfsl else classifier.fit_)(support, given)
        logits.append(classifier(query))
    assert torch.equal(*logits)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("convert", [torch.Tensor.double, lambda labels: labels.double().numpy()])
def test_labels_that_are_no_integer_tensors_are_refused(convert) -> None:
    support, labels, _, _ = task()
    with pytest.raises(InputError, match="support_labels: expected a tensor of integers"):
        easyfsl.HeadClassifier(RidgeHead()).process_support_set(support, convert(labels))
    with pytest.raises(InputError, match="labels: expected a tensor of integers"):
        learn2learn.HeadClassifier(RidgeHead()).fit_(support, convert(labels))


@pytest.mark.parametrize("adapter", [easyfsl, learn2learn])
def test_a_classifier_can_be_copied_in_training(adapter) -> None:
    """As for an average of its weights. The copy is fitted on no task."""
    support, labels, query, _ = task()
    classifier = adapter.HeadClassifier(RidgeHead(Learnable(2.0)))
    (classifier.process_support_set if adapter is easyfsl else classifier.fit_)(support, labels)
    average = torch.optim.swa_utils.AveragedModel(classifier)
    assert repr(average.module.head) == repr(classifier.head)
    with pytest.raises(InputError, match="a query before any support set"):
        average(query)
    assert classifier(query).requires_grad


def test_arrays_may_have_negative_strides() -> None:
    X, y = load_digits(n_class=3, return_X_y=True)
    classifier, reversed_ = sklearn.HeadClassifier(RidgeHead()), sklearn.HeadClassifier(RidgeHead())
    reversed_.fit(X[::-1], y[::-1])
    expected = classifier.fit(X, y).decision_function(X[::-1].copy())
    np.testing.assert_allclose(reversed_.decision_function(X[::-1]), expected, rtol=1e-6, atol=1e-9)


def test_a_failed_fit_is_no_fit() -> None:
    X, y = load_digits(n_class=3, return_X_y=True)
    classifier = sklearn.HeadClassifier(RidgeHead())
    with pytest.raises(ValueError, match="two classes"):
        classifier.fit(X, np.zeros(len(X), int))
    with pytest.raises(NotFittedError):
        classifier.predict(X)
    before = classifier.fit(X, y).predict(X)
    with pytest.raises(ValueError, match="two classes"):
        classifier.fit(X, np.zeros(len(X), int))
    np.testing.assert_array_equal(classifier.predict(X), before)


def not_with_calibration(_) -> dict[str, str]:
    return {"check_sample_weight_equivalence_on_dense_data": "copies of a sample may be in other folds of calibration"}


@parametrize_with_checks([sklearn.HeadClassifier()], expected_failed_checks=not_with_calibration)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
def test_all_of_scikit_learns_checks(estimator, check) -> None:
    check(estimator)


@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_scikit_learns_check_with_tensors(dtype, with_weights, monkeypatch) -> None:
    """With `array_api_dispatch`, results are tensors with the values of those for arrays."""
    monkeypatch.setenv("SCIPY_ARRAY_API", "1")
    options = {"check_values": True, "check_sample_weight": with_weights}
    check_array_api_input("HeadClassifier", sklearn.HeadClassifier(RidgeHead(1.0)), "torch", "cpu", dtype, **options)


@pytest.mark.parametrize("names", [False, True])
def test_tensors_stay_tensors(names, monkeypatch) -> None:
    monkeypatch.setenv("SCIPY_ARRAY_API", "1")
    X, y = load_iris(return_X_y=True)
    y = np.array(["setosa", "versicolor", "virginica"])[y] if names else y
    expected = sklearn.HeadClassifier().fit(X, y)
    with config_context(array_api_dispatch=True):
        classifier = sklearn.HeadClassifier().fit(torch.tensor(X), y if names else torch.tensor(y))
        found = classifier.predict_proba(torch.tensor(X)), classifier.decision_function(torch.tensor(X))
        labels = classifier.predict(torch.tensor(X))
    assert all(isinstance(each, torch.Tensor) for each in found)
    np.testing.assert_allclose(found[0], expected.predict_proba(X), atol=1e-9)
    np.testing.assert_array_equal(labels, expected.predict(X))


@pytest.mark.parametrize("head", [SVMHead(1.0), LogisticHead(0.5, intercept=True), RidgeHead()], ids=repr)
def test_a_weight_is_a_number_of_copies(head) -> None:
    check_sample_weight_equivalence_on_dense_data("HeadClassifier", sklearn.HeadClassifier(head, calibrate=False))


@pytest.mark.slow
@parametrize_with_checks(
    [sklearn.HeadClassifier(LogisticHead(1.0, kernel=RBF(1.0)))], expected_failed_checks=not_with_calibration
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
def test_all_of_scikit_learns_checks_with_a_kernel(estimator, check) -> None:
    check(estimator)


def test_on_arrays_it_is_scikit_learns_crammer_singer_svm() -> None:
    X, y = load_digits(return_X_y=True)
    X, y = X[:300] / 16, np.array([f"digit {label}" for label in y[:300]])
    ours = sklearn.HeadClassifier(SVMHead(C=0.5)).fit(X, y)
    theirs = LinearSVC(C=0.5, multi_class="crammer_singer", fit_intercept=False, tol=1e-8, max_iter=10**6).fit(X, y)
    assert ours.classes_.tolist() == theirs.classes_.tolist()
    difference = ours.decision_function(X) - theirs.decision_function(X)
    assert np.abs(difference).max() < 1e-3
    assert (ours.predict(X) == theirs.predict(X)).mean() > 0.99
    assert ours.fitted_.solution.gap < 1e-6


def test_in_pipelines_searches_and_cross_validation() -> None:
    X, y = load_digits(return_X_y=True)
    X, y = X[:200], y[:200]
    grid = {"headclassifier__head": [SVMHead(C) for C in (1e-6, 0.01)]}
    classifier = sklearn.HeadClassifier(calibrate=False)
    search = GridSearchCV(make_pipeline(StandardScaler(), classifier), grid, cv=3).fit(X, y)
    assert search.best_params_["headclassifier__head"].C == 0.01
    assert cross_val_score(search.best_estimator_, X, y, cv=3).mean() > 0.85
    again = pickle.loads(pickle.dumps(search.best_estimator_))
    np.testing.assert_array_equal(again.predict_proba(X), search.predict_proba(X))
    np.testing.assert_allclose(search.predict_proba(X).sum(1), 1)


def test_settings_of_a_head_are_parameters_of_a_grid() -> None:
    X, y = load_digits(return_X_y=True)
    X, y = X[:200], y[:200]
    head = SVMHead(kernel=RBF(1.0), scale=Learnable(2.0))
    grid = {"head__C": [1e-6, 10.0], "head__kernel__length_scale": [0.01, 30.0]}
    search = GridSearchCV(sklearn.HeadClassifier(head, calibrate=False), grid, cv=3).fit(X, y)
    assert search.best_params_ == {"head__C": 10.0, "head__kernel__length_scale": 30.0}
    assert repr(search.best_estimator_.head) == repr(SVMHead(10.0, kernel=RBF(30.0), scale=Learnable(2.0)))
    assert repr(head) == repr(SVMHead(kernel=RBF(1.0), scale=Learnable(2.0)))
    sampled = RandomizedSearchCV(sklearn.HeadClassifier(SVMHead()), {"head__C": loguniform(1e-3, 10)}, n_iter=2, cv=2)
    assert 1e-3 < sampled.fit(X, y).best_estimator_.head.C < 10
    with pytest.raises(InputError):
        sklearn.HeadClassifier(head).set_params(head__C=-1)


def test_settings_of_the_default_head_are_parameters_too() -> None:
    X, y = load_digits(return_X_y=True)
    X, y = X[:200], y[:200]
    assert sklearn.HeadClassifier().get_params()["head__C"] == 1.0
    assert sklearn.HeadClassifier().get_params(deep=False) == {"head": None, "calibrate": True}
    pipeline = make_pipeline(StandardScaler(), sklearn.HeadClassifier(calibrate=False))
    search = GridSearchCV(pipeline, {"headclassifier__head__C": [1e-6, 0.01]}, cv=3).fit(X, y)
    assert search.best_params_ == {"headclassifier__head__C": 0.01}
    assert repr(search.best_estimator_[-1].head) == repr(SVMHead(0.01))
    assert pipeline[-1].head is None
    given = clone(search.best_estimator_[-1]).set_params(head=None, head__C=2.0)
    assert repr(given.head) == repr(SVMHead(2.0))
    grid = {"head__C": loguniform(1e-3, 10)}
    sampled = RandomizedSearchCV(sklearn.HeadClassifier(calibrate=False), grid, n_iter=2, cv=2)
    assert 1e-3 < sampled.fit(X, y).best_estimator_.head.C < 10
    with pytest.raises(ValueError, match="width"):
        sklearn.HeadClassifier().set_params(head__width=1)


@pytest.mark.parametrize("head", [None, RidgeHead(), SVMHead(1.0, scale=Learnable(1e-3))], ids=str)
def test_probabilities_are_calibrated_by_cross_validation(head) -> None:
    """Scikit-learn's log-loss on other samples; neither predictions nor scores change."""
    X, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(X))
    train, test = ((X[own] / 16, y[own]) for own in (order[:300], order[300:900]))
    plain, calibrated = (sklearn.HeadClassifier(head, calibrate=value).fit(*train) for value in (False, True))
    assert plain.scale_ == 1.0
    losses = [log_loss(test[1], each.predict_proba(test[0])) for each in (plain, calibrated)]
    assert losses[1] < 0.5 < losses[0]
    np.testing.assert_array_equal(plain.decision_function(test[0]), calibrated.decision_function(test[0]))
    best = min(
        np.logspace(-2, 2, 41) * calibrated.scale_,
        key=lambda scale: log_loss(test[1], softmax(scale * calibrated.decision_function(test[0]), axis=1)),
    )
    assert 0.5 < best / calibrated.scale_ < 2


def test_held_out_samples_calibrate(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many folds as the smallest class allows, at most five; no fold beyond 500 held-out samples."""
    sizes: list[int] = []
    best = sklearn.best_scale
    monkeypatch.setattr(sklearn, "best_scale", lambda logits, labels: sizes.append(len(labels)) or best(logits, labels))
    X, y = load_digits(return_X_y=True)
    for n, expected in ((200, 200), (900, 540)):
        sklearn.HeadClassifier(RidgeHead()).fit(X[:n], y[:n])
        assert sizes.pop() == expected
    few = np.concatenate([np.flatnonzero(y == 0)[:2], np.flatnonzero(y == 1)[:9]])
    sklearn.HeadClassifier(RidgeHead()).fit(X[few], y[few])
    assert sizes.pop() == 11
    assert sklearn.HeadClassifier(RidgeHead()).fit(X[few[1:]], y[few[1:]]).scale_ == 1.0
    assert not sizes
    with pytest.raises(InputError, match="calibrate: expected"):
        sklearn.HeadClassifier(RidgeHead(), calibrate="cv").fit(X[:200], y[:200])


def test_errors_reach_the_caller_of_a_search_in_several_processes() -> None:
    X, y = load_digits(return_X_y=True)
    grid = {"head__regularization": [1.0, -1.0]}
    search = GridSearchCV(sklearn.HeadClassifier(RidgeHead()), grid, cv=2, n_jobs=2, error_score="raise")
    with pytest.raises(InputError, match=r"regularization: expected a positive"):
        search.fit(X[:100], y[:100])


def test_two_classes_have_one_decision() -> None:
    X, y = load_digits(n_class=2, return_X_y=True)
    classifier = sklearn.HeadClassifier(RidgeHead()).fit(X, y.astype(str))
    decision = classifier.decision_function(X)
    assert decision.shape == (len(X),)
    assert ((decision > 0) == (classifier.predict(X) == "1")).all()
    with pytest.raises(ValueError, match=r"at least two classes.*'0'"):
        classifier.fit(X[y == 0], y[y == 0].astype(str))


def test_versions_that_are_not_supported_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"easyfsl": "1.2.0"}
    monkeypatch.setattr("convexheads.integrations.version", lambda name: versions[name])
    with pytest.raises(MissingDependencyError, match=r"easyfsl>=1\.5,<2 \(version 1\.2\.0 is installed\)'") as caught:
        require_version("easyfsl", "easyfsl>=1.5,<2", extra="easyfsl", needed_by="it")
    assert installs(str(caught.value)) == requirements_of("easyfsl")
    for unsupported in ("2.0rc1", "2", "1.5rc1"):
        versions["easyfsl"] = unsupported
        with pytest.raises(MissingDependencyError, match=unsupported):
            require_version("easyfsl", "easyfsl>=1.5,<2", extra="easyfsl", needed_by="it")
    for supported in ("1.5", "1.5.0", "1.10.2rc1", "1.5.post1"):
        versions["easyfsl"] = supported
        require_version("easyfsl", "easyfsl>=1.5,<2", extra="easyfsl", needed_by="it")

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("convexheads.integrations.version", missing)
    with pytest.raises(MissingDependencyError, match="'easyfsl'") as caught:
        require_version("easyfsl", "easyfsl>=1.5,<2", extra="easyfsl", needed_by="it")
    assert installs(str(caught.value)) == requirements_of("easyfsl")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("adapter", [learn2learn.HeadClassifier, easyfsl.HeadClassifier])
def test_what_is_no_head_is_refused(adapter) -> None:
    with pytest.raises(InputError, match=r"expected a classification head of convexheads, such as SVMHead\(C=0\.1\)"):
        adapter(SVMHead)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_linear_classifier_has_the_attributes_of_scikit_learn(classes):
    X, y = load_iris(return_X_y=True)
    X, y = X[y < classes], y[y < classes]
    model = sklearn.HeadClassifier(LogisticHead(0.1, intercept=True)).fit(X, y)
    scores = X @ model.coef_.T + model.intercept_
    assert model.coef_.shape == ((1, 4) if classes == 2 else (3, 4))
    np.testing.assert_allclose(scores[:, 0] if classes == 2 else scores, model.decision_function(X), rtol=1e-6)
    probabilities = model.to_linear()(torch.tensor(X)).softmax(-1).detach().numpy()
    np.testing.assert_allclose(probabilities, model.predict_proba(X), rtol=1e-6)
    assert not hasattr(sklearn.HeadClassifier(SVMHead(kernel=RBF())).fit(X, y), "coef_")
