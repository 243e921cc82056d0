"""Leaving one out, temperatures and prediction sets from held-out examples."""

from __future__ import annotations

import pytest
import torch
from tasks import close, task
from torch.nn import functional

from convexheads import (
    ConvexHeadsError,
    GaussianProcessHead,
    InputError,
    LinearDiscriminantHead,
    LogisticHead,
    OneVsRestSVMHead,
    PrototypeHead,
    RidgeHead,
    SVMHead,
    evaluate,
)
from convexheads.heads.base import held_out
from convexheads.kernels import RBF, Cosine, UnitScale

HEADS = {
    "ridge": RidgeHead(0.5),
    "ridge with intercept": RidgeHead(0.5, intercept=True, class_weight=[1.0, 2.0, 0.5]),
    "balanced ridge": RidgeHead(0.5, class_weight="balanced"),
    "ridge with a kernel": RidgeHead(0.5, kernel=RBF(3.0), intercept=True),
    "ridge in units": RidgeHead(0.5, kernel=UnitScale()),
    "prototypes": PrototypeHead(scale=2.0),
    "prototypes with a kernel": PrototypeHead(kernel=Cosine()),
    "logistic": LogisticHead(0.5, intercept=True),
    "svm": SVMHead(0.5),
    "balanced svm": SVMHead(0.5, class_weight="balanced"),
    "one-vs-rest svm": OneVsRestSVMHead(0.5, squared_hinge=True),
    "lda": LinearDiscriminantHead(),
}


def structured(*batch, seed: int = 0, d: int = 6, ways: int = 3, shots: int = 8):
    """Classes that overlap, so that calibration matters."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(ways * shots) % ways
    means = torch.randn(*batch, ways, d, generator=generator, dtype=torch.float64)
    noise = torch.randn(*batch, ways * shots, d, generator=generator, dtype=torch.float64)
    return means[..., labels, :] + 1.5 * noise, labels.expand(*batch, -1), means


@pytest.mark.parametrize("sizes", [{"shots": (5, 6, 4), "d": 20}, {"shots": (5, 6, 9), "d": 4}], ids=["n<d", "n>d"])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_leaving_one_out_equals_refits(head, sizes):
    support, labels, _, ways = task(2, **sizes)
    generator = torch.Generator().manual_seed(2)
    mask = torch.ones_like(labels, dtype=torch.bool)
    mask[0, 2] = False
    options = {}
    if head.accepts_weights:
        options["sample_weight"] = 0.5 + torch.rand(labels.shape, generator=generator, dtype=torch.float64)
        options["prior"] = torch.randn(ways, support.shape[-1], generator=generator, dtype=torch.float64)
    found = head.leave_one_out(support, labels, mask=mask, **options)
    for out in range(labels.shape[1]):
        others = mask.clone()
        others[:, out] = False
        expected = head(support, labels, support[:, [out]], ways=ways, mask=others, **options).squeeze(1)
        kept = mask[:, out]
        assert close(found[kept, out], expected[kept]) < 1e-6
        assert (found[~kept, out] == 0).all()


def test_a_class_whose_only_example_is_left_out():
    support, labels, _, _ = task(shots=(1, 4))
    for head in (PrototypeHead(), LinearDiscriminantHead(variance=1.0)):
        found = head.leave_one_out(support, labels)
        alone = found[labels == 0].squeeze(0)
        assert alone[0] == -torch.inf
        assert found[labels == 1].isfinite().all()
    assert RidgeHead().leave_one_out(support, labels).isfinite().all()


def test_parts_give_the_same_scores(monkeypatch):
    support, labels, _, _ = task(3, shots=(5, 6, 4))
    for head in (RidgeHead(), SVMHead(), LogisticHead()):
        expected = head.leave_one_out(support, labels)
        with monkeypatch.context() as patch:
            patch.setattr(held_out, "MAX_ENTRIES", 3000)
            assert close(head.leave_one_out(support, labels), expected) < 1e-6


@pytest.mark.parametrize(
    "head", [RidgeHead(0.1), SVMHead(1.0), LogisticHead(0.01), PrototypeHead(scale=0.01)], ids=repr
)
def test_calibration_improves_the_cross_entropy_of_new_examples(head):
    support, labels, means = structured(20)
    query, truth, _ = structured(20)
    generator = torch.Generator().manual_seed(9)
    truth = torch.arange(300) % 3
    query = means[:, truth] + 1.5 * torch.randn(20, 300, 6, generator=generator, dtype=torch.float64)
    plain, fitted = head.fit(support, labels), head.fit(support, labels, calibrate="loo")
    assert torch.equal(plain(query).argmax(-1), fitted(query).argmax(-1))

    def loss(fit):
        return functional.cross_entropy(fit(query).flatten(0, 1), truth.repeat(20))

    assert loss(fitted) < loss(plain)
    assert loss(fitted) < 1.1
    assert fitted.scale.shape == (20,)
    if not isinstance(head, PrototypeHead):
        assert close(query @ fitted.weight.mT + fitted.bias.unsqueeze(-2), fitted(query)) < 1e-9
    held = plain.calibrate(query, truth.expand(20, -1))
    assert loss(held) <= loss(fitted)


def test_the_temperature_is_that_of_a_general_optimizer():
    support, labels, _ = structured(4)
    logits = RidgeHead(0.1).leave_one_out(support, labels)
    fitted = RidgeHead(0.1).fit(support, labels, calibrate="loo")
    for number in range(4):
        factor = torch.ones((), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [factor], max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def step(number=number, factor=factor, optimizer=optimizer):
            optimizer.zero_grad()
            value = functional.cross_entropy(
                factor * logits[number], labels[number], label_smoothing=1 / (labels.shape[1] + 2)
            )
            value.backward()
            return value

        optimizer.step(step)
        assert fitted.scale[number].item() == pytest.approx(factor.item(), rel=1e-5)


@pytest.mark.parametrize("way", ["loo", "held out"])
def test_prediction_sets_cover_the_right_class(way):
    """On average over 300 tasks; the standard error of the mean is half a percent."""
    support, labels, means = structured(300, shots=10)
    generator = torch.Generator().manual_seed(4)
    truth = torch.arange(90) % 3
    query = means[:, truth] + 1.5 * torch.randn(300, 90, 6, generator=generator, dtype=torch.float64)
    if way == "loo":
        fitted = RidgeHead(1.0).fit(support, labels, calibrate="loo")
    else:
        fitted = RidgeHead(1.0).fit(support, labels).calibrate(query[:, :30], truth[:30].expand(300, -1))
        query, truth = query[:, 30:], truth[30:]
    for coverage in (0.7, 0.9):
        sets = fitted.prediction_sets(query, coverage)
        covered = sets.gather(-1, truth.expand(300, -1).unsqueeze(-1)).double().mean().item()
        assert coverage - 0.02 < covered < coverage + 0.08
        assert sets.any(-1).all()
    assert fitted.prediction_sets(query, 0.99).all()  # 30 examples do not prove that


def test_evaluate_reports_prediction_sets():
    labels = torch.arange(240) % 8
    generator = torch.Generator().manual_seed(0)
    features = torch.eye(8)[labels] + 0.7 * torch.randn(240, 8, generator=generator)
    plain = evaluate(RidgeHead(0.1), features, labels, shots=8, episodes=200, progress=False)
    found = evaluate(RidgeHead(0.1), features, labels, shots=8, episodes=200, calibrate="loo", progress=False)
    assert torch.equal(found.accuracies, plain.accuracies)
    assert found.expected_calibration_error < plain.expected_calibration_error
    assert plain.coverage is None
    assert 0.87 < found.coverage < 0.95
    assert 1 < found.set_size < 5
    assert "prediction sets" in str(found)
    wider = evaluate(
        RidgeHead(0.1), features, labels, shots=8, episodes=200, calibrate="loo", coverage=0.95, progress=False
    )
    assert wider.coverage > found.coverage
    assert wider.set_size > found.set_size


def test_several_labels_are_calibrated():
    support, _, means = structured(shots=20)
    generator = torch.Generator().manual_seed(4)
    y = (support @ means.mT + torch.randn(60, 3, generator=generator, dtype=torch.float64)) > 0
    plain, fitted = RidgeHead(0.1).fit(support, y), RidgeHead(0.1).fit(support, y, calibrate="loo")
    logits = RidgeHead(0.1).leave_one_out(support, y)
    before = functional.binary_cross_entropy_with_logits(logits, y.double())
    after = functional.binary_cross_entropy_with_logits(fitted.scale * logits, y.double())
    assert after < before
    assert torch.equal(plain(support) > 0, fitted(support) > 0)
    with pytest.raises(ConvexHeadsError):
        fitted.prediction_sets(support)


def test_a_gaussian_process_without_one_example():
    support, _, _, _ = task(2, shots=(4, 5))
    values = torch.randn(2, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    head = GaussianProcessHead(0.3, kernel=RBF(2.0))
    mean, variance = head.fit(support, values).leave_one_out()
    for out in range(9):
        kept = [index for index in range(9) if index != out]
        alone = head.fit(support[:, kept], values[:, kept])
        assert close(mean[:, out], alone(support[:, [out]]).squeeze(-1)) < 1e-8
        assert close(variance[:, out], alone.variance(support[:, [out]]).squeeze(-1) + 0.3) < 1e-8


def test_unusable_arguments_are_named():
    support, labels, query, _ = task(2, shots=(4, 5, 6))
    with pytest.raises(InputError, match="calibrate"):
        SVMHead().fit(support, labels, calibrate="cv")
    with pytest.raises(InputError, match="calibrate"):
        SVMHead().fit(support, labels, ways=[3, 3], calibrate="loo")
    fitted = RidgeHead().fit(support, labels)
    with pytest.raises(ConvexHeadsError, match="calibrated"):
        fitted.prediction_sets(query)
    with pytest.raises(InputError, match="labels"):
        fitted.calibrate(query, labels)
    with pytest.raises(InputError, match="labels"):
        fitted.calibrate(query, torch.full(query.shape[:-1], 3))
    with pytest.raises(InputError, match="coverage"):
        RidgeHead().fit(support, labels, calibrate="loo").prediction_sets(query, 1.0)
