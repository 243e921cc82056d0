"""Splitting tasks and evaluating heads."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from tasks import clusters
from torch import nn

from convexheads import (
    InputError,
    Learnable,
    LogisticHead,
    PrototypeHead,
    RidgeHead,
    RidgeRegressionHead,
    SVMHead,
    _sampling,
    calibrate,
    embed,
    evaluate,
    split_task,
)
from convexheads.heads.base import fitted, support_set
from convexheads.training import episode_loss


def test_splits_batches_with_labels_in_any_order():
    labels = torch.stack([torch.tensor([0, 0, 0, 1, 1, 2, 2])[torch.randperm(7)] for _ in range(6)]).view(2, 3, 7)
    data = torch.randn(2, 3, 7, 1, 4, 4)
    episode = split_task(data, labels, shots=1)
    assert episode.support.shape == (2, 3, 3, 1, 4, 4)
    assert episode.query.shape == (2, 3, 4, 1, 4, 4)
    for i in range(2):
        for j in range(3):
            alone = split_task(data[i, j], labels[i, j], shots=1)
            for part, whole in zip(alone, episode, strict=True):
                assert torch.equal(part, whole[i, j])


@pytest.mark.parametrize(
    ("labels", "shots", "message"),
    [
        ([0, 0, 1, 1], 2, r"labels: expected more than shots=2.*, got 2 of class 0 in the task"),
        ([0, 0, 1, 1], 0, r"shots: expected an integer of at least 1.*, got 0"),
        ([[0, 0, 1, 1], [0, 0, 0, 0]], 1, r"labels: expected .*, got tasks with different numbers of classes"),
        ([0, 0, 1], 1, r"data: expected .*\(3,\).*, got shape \(4, 2\)"),
    ],
)
def test_tasks_that_cannot_be_split(labels, shots, message):
    labels = torch.tensor(labels)
    data = torch.zeros(*labels.shape, 2) if labels.shape[-1] == 4 else torch.zeros(4, 2)
    with pytest.raises(InputError, match=message):
        split_task(data, labels, shots=shots)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16])
def test_labels_of_a_loss_may_have_any_integer_dtype(dtype):
    labels = torch.arange(3).repeat_interleave(4).expand(2, -1)
    data, expected = torch.randn(2, 12, 5), None
    for kind in (torch.int64, dtype):
        episode = split_task(data, labels.to(kind), shots=2)
        loss = episode_loss(RidgeHead(), episode, ways=3, label_smoothing=0.1)
        expected = expected or loss
        assert loss.loss == expected.loss
        assert loss.metrics["accuracy"] == expected.metrics["accuracy"]
    with pytest.raises(InputError, match="label_smoothing: expected a number"):
        episode_loss(RidgeHead(), episode, ways=3, label_smoothing=2.0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("label", [-100, 3, 1.5])
def test_query_labels_of_a_loss_are_checked(label):
    episode = split_task(torch.randn(12, 5), torch.arange(3).repeat_interleave(4), shots=2)
    wrong = episode._replace(query_labels=torch.full((6,), label))
    with pytest.raises(InputError, match=r"query_labels: expected .*0\.\."):
        episode_loss(RidgeHead(), wrong, ways=3)
    with pytest.raises(InputError, match="query_labels: expected one label per query"):
        episode_loss(RidgeHead(), episode._replace(query_labels=torch.zeros(5, dtype=torch.long)), ways=3)
    with pytest.raises(InputError, match="head: expected a classification head"):
        episode_loss(RidgeRegressionHead(), episode, ways=3)


def test_evaluates_as_a_plain_loop_does():
    """Mean, interval and certificates against the same episodes solved one by one."""
    features, labels = clusters()
    result = evaluate(SVMHead(), features, labels, ways=4, shots=2, queries=5, episodes=30, seed=3, progress=False)
    from convexheads._sampling import sample_episodes

    accuracies = []
    for (chosen,) in sample_episodes(labels, 4, 7, 30, 3):
        assert len({labels[row[0]].item() for row in chosen}) == 4
        assert chosen.unique().numel() == 4 * 7
        episode = split_task(features[chosen.flatten()], torch.arange(4).repeat_interleave(7), shots=2)
        logits = SVMHead()(episode.support, episode.support_labels, episode.query)
        accuracies.append((logits.argmax(-1) == episode.query_labels).double().mean())
    torch.testing.assert_close(result.accuracies, torch.stack(accuracies))
    assert result.episodes == 30
    assert result.accuracy == pytest.approx(torch.stack(accuracies).mean().item())
    assert result.confidence_interval == pytest.approx(1.96 * torch.stack(accuracies).std().item() / math.sqrt(30))
    assert result.gaps.shape == (30,)
    assert result.gaps.max() < 1e-9
    assert str(result) == f"{100 * result.accuracy:.2f} ± {100 * result.confidence_interval:.2f}% (30 episodes)"


def test_episodes_depend_on_the_seed_only():
    features, labels = clusters(noise=2.0)
    options = {"shots": 1, "episodes": 40, "progress": False}
    first = evaluate(RidgeHead(), features, labels, **options)
    for size in (7, 2**63):
        result = evaluate(RidgeHead(), features, labels, batch_size=size, **options)
        assert torch.equal(first.accuracies, result.accuracies)
    assert not torch.equal(first.accuracies, evaluate(RidgeHead(), features, labels, seed=1, **options).accuracies)
    # The same class structure under other names: the same episodes.
    assert torch.equal(first.accuracies, evaluate(RidgeHead(), features, 10 * labels + 3, **options).accuracies)
    assert evaluate(RidgeHead(), features, labels, **options).gaps.max() < 1e-12


@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("head", [PrototypeHead(), RidgeHead(1.0), SVMHead(), LogisticHead()], ids=repr)
def test_accuracies_depend_neither_on_batches_nor_on_threads(head, gathers, monkeypatch):
    features, labels = clusters(noise=2.0)
    results = []
    monkeypatch.setattr(
        support_set, "numba_is_installed", lambda: not gathers
    )  # whether queries are read where they are
    for count, size, entries in ((1, 40, 2**30), (1, 7, 1), (2, 40, 6 * 75 * features.shape[1]), (3, 7, 2**30)):
        torch.set_num_threads(count)
        monkeypatch.setattr(fitted, "_ENTRIES_IN_CACHE", entries)  # of the queries that are scored at once
        results.append(evaluate(head, features, labels, shots=2, episodes=60, batch_size=size, progress=False))
    for result in results[1:]:
        assert torch.equal(result.accuracies, results[0].accuracies)
        torch.testing.assert_close(result.gaps, results[0].gaps, rtol=0, atol=1e-9)


def test_chance_level_on_noise_and_certainty_on_clean_clusters():
    features, labels = clusters(noise=0.0)
    assert evaluate(PrototypeHead(), features, labels, shots=1, episodes=20, progress=False).accuracy == 1
    noise = torch.randn(400, 5)
    result = evaluate(PrototypeHead(), noise, torch.arange(400) % 10, shots=1, episodes=400, progress=False)
    assert abs(result.accuracy - 0.2) < 0.015  # the same 400 examples in all episodes


def test_uneven_classes():
    features, labels = clusters(classes=6, each=30)
    keep = (labels != 2) | (torch.arange(len(labels)) < 100)
    result = evaluate(
        RidgeHead(), features[keep], labels[keep], ways=3, shots=2, queries=5, episodes=50, progress=False
    )
    assert result.episodes == 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": 9}, r"labels: expected at least ways=9.*, got 8 classes"),
        ({"ways": 2**50}, r"labels: expected at least ways=1125899906842624, got 8 classes"),
        ({"shots": 20}, r"labels: expected at least shots \+ queries = 35.*, got 30 of class 0"),
        ({"episodes": 0}, r"episodes: expected an integer of at least 1.*, got 0"),
    ],
)
def test_impossible_evaluations(options, message):
    with pytest.raises(InputError, match=message):
        evaluate(RidgeHead(), *clusters(), **options)


@pytest.mark.parametrize("function", [evaluate, calibrate])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x.long().numpy(), y), r"features: expected a tensor of floating-point values.*, got ndarray"),
        (lambda x, y: (x, y.float()), r"labels: expected a tensor of integers, got a tensor of torch.float32"),
        (
            lambda x, y: (x.index_fill(0, torch.tensor([17]), torch.nan), y),
            r"features: expected .*, got non-finite values in row 17",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_unusable_features(function, change, message):
    with pytest.raises(InputError, match=message):
        function(RidgeHead(), *change(*clusters()), progress=False)


@pytest.mark.parametrize(
    "head", [SVMHead(scale=Learnable(30.0)), RidgeHead(1.0, scale=20.0), PrototypeHead(scale=0.01)], ids=str
)
def test_calibrates_on_other_classes(head):
    features, labels = clusters(classes=80, each=20)
    seen, unseen = labels < 40, labels >= 40
    options = {"shots": 2, "episodes": 100, "progress": False}
    calibrated = calibrate(head, features[seen], labels[seen], **options)
    before, after = (evaluate(h, features[unseen], labels[unseen], **options) for h in (head, calibrated))
    assert torch.equal(before.accuracies, after.accuracies)
    assert after.expected_calibration_error < 0.07 < 0.15 < before.expected_calibration_error
    # Calibrating twice changes nothing, wherever one starts.
    again = calibrate(calibrated, features[seen], labels[seen], **options)
    assert again.scale.value.item() == pytest.approx(calibrated.scale.value.item(), rel=1e-4)


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5))

    def forward(self, images):
        return self.layers(images.float())


@pytest.mark.parametrize("training", [True, False])
def test_embeds_in_evaluation_mode(training):
    backbone = Backbone().train(training)
    statistics = backbone.layers[1].running_mean.clone()
    images = torch.randint(255, (10, 1, 6, 6), dtype=torch.uint8)
    features = embed(backbone, images, batch_size=4, progress=False)
    assert features.shape == (10, 3 * 4 * 4)
    assert not features.requires_grad
    assert backbone.training == training
    assert torch.equal(backbone.layers[1].running_mean, statistics)
    torch.testing.assert_close(features, backbone.eval()(images).flatten(1))


def test_embed_restores_the_mode_after_an_error():
    backbone = Backbone().train()
    backbone.layers[1].eval()  # frozen
    with pytest.raises(RuntimeError):
        embed(backbone, torch.zeros(2, 2, 6, 6), progress=False)
    assert [module.training for module in backbone.modules()] == [True, True, True, False, True]
    embed(backbone, torch.zeros(2, 1, 6, 6), progress=False)
    assert [module.training for module in backbone.modules()] == [True, True, True, False, True]


@pytest.mark.gpu
def test_evaluates_on_cuda(cuda):
    features, labels = clusters()
    there = evaluate(SVMHead(), features.to(cuda), labels.to(cuda), shots=1, episodes=50, progress=False)
    here = evaluate(SVMHead(), features, labels, shots=1, episodes=50, progress=False)
    torch.testing.assert_close(there.accuracies, here.accuracies, rtol=0, atol=1e-12)


def test_processes_share_an_evaluation():
    features, labels = clusters()
    settings = {"ways": 4, "shots": 2, "queries": 3, "episodes": 11, "batch_size": 2, "progress": False}
    whole = evaluate(RidgeHead(), features, labels, **settings)
    parts = [evaluate(RidgeHead(), features, labels, rank=rank, world_size=3, **settings) for rank in range(3)]
    assert [part.episodes for part in parts] == [4, 4, 3]
    for rank, part in enumerate(parts):
        assert torch.equal(part.accuracies, whole.accuracies[rank::3])
    for rank, world_size, name in ((3, 3, "rank"), (-1, 2, "rank"), (0, 0, "world_size"), (0, 12, "world_size")):
        with pytest.raises(InputError, match=f"^{name}: expected"):
            evaluate(RidgeHead(), features, labels, rank=rank, world_size=world_size, **settings)


def test_differences_are_paired():
    features, labels = clusters(noise=2.0)
    settings = {"shots": 1, "episodes": 200, "progress": False}
    first, second = (evaluate(RidgeHead(), each, labels, **settings) for each in (features, features + 0.1))
    difference = first.compare(second)
    assert difference.mean == pytest.approx(first.accuracy - second.accuracy)
    assert difference.confidence_interval < min(first.confidence_interval, second.confidence_interval)
    errors = (first.accuracies - second.accuracies).std() / math.sqrt(200)
    assert difference.confidence_interval == pytest.approx(1.96 * errors.item())
    assert first == first
    assert first != second
    assert first.compare(evaluate(SVMHead(), features, labels.int(), batch_size=7, **settings)).mean != 0
    shares = [{"episodes": 400, "world_size": 2, "rank": rank} for rank in range(2)]
    for changes in ({"episodes": 10}, {"seed": 1}, {"shots": 2}, {"queries": 10}, {"ways": 4}, *shares):
        with pytest.raises(InputError, match=f"^other: expected .* same episodes, got different {next(iter(changes))}"):
            first.compare(evaluate(RidgeHead(), features, labels, **settings | changes))
    with pytest.raises(InputError, match="got different labels"):
        first.compare(evaluate(RidgeHead(), features, labels.flip(0), **settings))


@pytest.mark.parametrize("scale", [7.0, Learnable(7.0)], ids=str)
def test_a_calibrated_scale_is_part_of_the_state(scale):
    features, labels = clusters()
    calibrated = calibrate(RidgeHead(1.0, scale=scale), features, labels, shots=2, episodes=20, progress=False)
    assert calibrated.scale.value.item() != pytest.approx(7.0, rel=0.01)
    assert not any(parameter.requires_grad for parameter in calibrated.parameters())
    loaded = RidgeHead(1.0, scale=Learnable(1.0))
    loaded.load_state_dict(calibrated.state_dict())
    task = features[:10], labels[:10] * 0 + torch.arange(10) % 2, features[10:]
    assert torch.equal(loaded(*task), calibrated(*task))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_calibrates_in_every_gradient_mode(mode):
    features, labels = clusters()
    options = {"shots": 2, "episodes": 20, "progress": False}
    expected = calibrate(RidgeHead(), features, labels, **options)
    with mode():
        found = calibrate(RidgeHead(), features + 0, labels + 0, **options)
    assert found.scale.value == expected.scale.value


class Failing(RidgeHead):
    """The first task of each batch, or every task, has coefficients like those of a task that was not solved."""

    failed: slice = slice(1)

    def solve(self, support):
        expansion = super().solve(support)
        coef = expansion.coef.clone()
        coef[self.failed] = torch.nan
        return dataclasses.replace(expansion, coef=coef, weight=None)


def test_tasks_that_were_not_solved_are_left_out():
    features, labels = clusters(noise=2.0)
    options = {"shots": 2, "episodes": 20, "batch_size": 10, "progress": False}
    head = Failing(validate=False)
    found, expected = (evaluate(each, features, labels, **options) for each in (head, RidgeHead()))
    failed = torch.arange(20) % 10 == 0
    assert torch.equal(found.accuracies[~failed], expected.accuracies[~failed])
    assert (found.accuracies[failed] == 0.2).all()
    assert found.expected_calibration_error == pytest.approx(expected.expected_calibration_error, abs=0.02)
    scales = [calibrate(each, features, labels, **options).scale.value.item() for each in (head, RidgeHead())]
    assert scales[0] == pytest.approx(scales[1], rel=0.2)
    head.failed = slice(None)
    assert math.isnan(evaluate(head, features, labels, **options).expected_calibration_error)
    with pytest.raises(InputError, match="logits: expected"):
        calibrate(head, features, labels, **options)


def test_any_scale_gives_the_same_accuracies():
    features, labels = clusters()
    options = {"shots": 1, "episodes": 20, "progress": False}
    expected = evaluate(RidgeHead(), features, labels, **options)
    found = evaluate(RidgeHead(scale=1e-30), features, labels, **options)
    assert torch.equal(found.accuracies, expected.accuracies)
    with pytest.raises(InputError, match="other: expected an Evaluation"):
        found.compare(0.5)


@pytest.mark.parametrize("options", [{"ways": 1}, {"ways": 1, "queries": 1, "episodes": 1}, {"ways": 3}])
def test_logits_without_any_difference_leave_the_scale_as_it_is(options):
    features, labels = torch.ones(60, 4), torch.arange(6).repeat_interleave(10)
    options = {"shots": 1, "queries": 2, "episodes": 10, "progress": False} | options
    calibrated = calibrate(RidgeHead(scale=3.0), features, labels, **options)
    assert calibrated.scale.value.item() == pytest.approx(3.0)


def test_separable_classes_have_a_finite_scale():
    """The probability of each of n correct predictions is (n + 1) / (n + 2), as in Platt 1999, for two classes."""
    features, labels = torch.eye(2).repeat_interleave(10, 0), torch.arange(2).repeat_interleave(10)
    options = {"ways": 2, "shots": 1, "queries": 1, "episodes": 20, "progress": False}
    fitted = calibrate(RidgeHead(), features, labels, **options).fit(torch.eye(2), torch.arange(2))
    n = 2 * 20
    torch.testing.assert_close(fitted.probabilities(torch.eye(2)).diagonal(), torch.full((2,), 1 - 1 / (n + 2) / 2))


def test_the_scale_of_a_head_worse_than_chance_stays_positive():
    features, labels = clusters(noise=0.0)
    contrary = RidgeHead(1.0, kernel=lambda x, y: x @ y.mT if x is y else -x @ y.mT)
    calibrated = calibrate(contrary, features, labels, shots=2, episodes=20, progress=False)
    assert 0 < calibrated.scale.value.item() < 1e-3


def test_several_heads_share_their_episodes():
    features, labels = clusters(noise=2.0)
    options = {"shots": 1, "episodes": 60, "batch_size": 25, "progress": False}
    heads = {"SVM": SVMHead(), "ridge": RidgeHead(), "prototypes": PrototypeHead()}
    together = evaluate(heads, features, labels, **options)
    assert list(together) == list(heads)
    for name, head in heads.items():
        alone = evaluate(head, features, labels, **options)
        assert torch.equal(together[name].accuracies, alone.accuracies)
        assert together[name].expected_calibration_error == alone.expected_calibration_error
        assert (together[name].gaps is None) == (alone.gaps is None)
        assert together["ridge"].compare(alone) == together["ridge"].compare(together[name])
    differences = together.compare("ridge")
    assert differences == {name: together[name].compare(together["ridge"]) for name in ("SVM", "prototypes")}
    assert list(together.compare()) == ["ridge", "prototypes"]
    table = str(together).splitlines()
    assert len(table) == 4
    assert len({len(line) for line in table}) == 1
    for name, line in zip(heads, table[1:], strict=True):
        assert line.startswith(name)
        assert f"{100 * together[name].accuracy:.2f} ± {100 * together[name].confidence_interval:.2f}%" in line
        assert name == "SVM" or str(together[name].compare(together["SVM"])) in line
    with pytest.raises(InputError, match=r"reference: expected one of the names \['SVM'"):
        together.compare("svm")


def test_a_list_of_heads_is_named_by_their_settings():
    features, labels = clusters()
    options = {"shots": 1, "episodes": 5, "progress": False}
    assert list(evaluate([SVMHead(0.5), RidgeHead()], features, labels, **options)) == [
        repr(SVMHead(0.5)),
        repr(RidgeHead()),
    ]
    (alone,) = evaluate((RidgeHead(),), features, labels, **options).values()
    assert alone.episodes == 5
    for wrong in ([], {}, [RidgeHead(), RidgeHead()]):
        with pytest.raises(InputError, match="head: expected one or more different heads"):
            evaluate(wrong, features, labels, **options)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrong", ["svm", ["svm"], {"SVM": SVMHead}, SVMHead, None])
def test_only_heads_are_evaluated(wrong):
    with pytest.raises(InputError, match="head: expected a classification head"):
        evaluate(wrong, *clusters(), progress=False)


class Recorder(RidgeHead):
    """Records the number of threads of each fit, and fails at the second batch."""

    def __init__(self):
        super().__init__()
        self.threads = []

    def solve(self, support):
        self.threads.append(torch.get_num_threads())
        if len(self.threads) == 2:
            raise RuntimeError
        return super().solve(support)


@pytest.mark.parametrize(("queries", "threads"), [(15, 1), (28, 3)])
def test_small_episodes_use_one_thread_each(queries, threads):
    features, labels = clusters(each=40)
    before = torch.get_num_threads()
    options = {"shots": 2, "queries": queries, "batch_size": 3, "progress": False}
    torch.set_num_threads(3)
    try:
        head = Recorder()
        evaluate(head, features, labels, episodes=3, **options)
        assert head.threads == [threads]
        assert torch.get_num_threads() == 3
        with pytest.raises(RuntimeError):
            evaluate(head, features, labels, episodes=6, **options)
        assert set(head.threads) == {threads}
        assert len(head.threads) > 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 3])
def test_episodes_are_drawn_while_the_bar_runs(threads, monkeypatch):
    """The bar counts batches, whatever the heads, and few batches are drawn before the first one is done."""
    events = []

    def track(batches, title, progress, *, total):
        assert total == 20
        for batch in batches:
            events.append("batch")
            yield batch

    draw = _sampling.sample_episodes

    def watched(*arguments, **options):
        for indices in draw(*arguments, **options):
            events.append("draw")
            yield indices

    monkeypatch.setattr(_sampling, "track", track)
    monkeypatch.setattr(_sampling, "sample_episodes", watched)
    features, labels = clusters()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        evaluate([RidgeHead(), PrototypeHead()], features, labels, episodes=39, batch_size=2)
    finally:
        torch.set_num_threads(before)
    assert events.count("batch") == events.count("draw") == 20
    assert events.index("batch") <= threads + 1


def test_draws_without_replacement_are_uniform():
    generator = torch.Generator().manual_seed(0)
    drawn = _sampling._draw_different(torch.full((60_000,), 5), 3, generator)
    counts = torch.bincount((drawn * torch.tensor([25, 5, 1])).sum(-1), minlength=125)
    counts = counts[counts > 0]
    assert len(counts) == 5 * 4 * 3
    assert ((counts - 1000).square() / 1000).sum() < 105  # the quantile 0.9998 of chi-squared with 59 degrees
    many = _sampling._draw_different(torch.tensor([[50, 40], [60, 33]]), 33, generator)
    assert many.shape == (2, 2, 33)
    assert (many.sort(-1).values.diff(dim=-1) > 0).all()
    assert (many.amax(-1) < torch.tensor([[50, 40], [60, 33]])).all()
    uneven = torch.tensor([7, 9, 30]).repeat(50)
    drawn = _sampling._draw_different(uneven, 7, generator)
    assert (drawn.sort(-1).values.diff(dim=-1) > 0).all()
    assert (drawn >= 0).all()
    assert (drawn < uneven.unsqueeze(-1)).all()
    assert [drawn[place::3].max().item() for place in range(3)] == [6, 8, 29]


def test_first_episodes_do_not_depend_on_their_number():
    labels = torch.arange(300) % 10
    many = torch.cat(list(_sampling.sample_episodes(labels, 3, 4, 2500, 1, batch_size=100)))
    assert many.shape == (2500, 3, 4)
    few = torch.cat(list(_sampling.sample_episodes(labels, 3, 4, 30, 1, batch_size=7)))
    assert torch.equal(many[:30], few)
    ranks = [torch.cat(list(_sampling.sample_episodes(labels, 3, 4, 2500, 1, rank=r, world_size=3))) for r in range(3)]
    for rank, part in enumerate(ranks):
        assert torch.equal(part, many[rank::3])
