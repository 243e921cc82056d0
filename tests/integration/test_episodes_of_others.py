"""Splitting and evaluating episodes beside learn2learn's tasksets, torchmetrics and tqdm."""

from __future__ import annotations

import sys

import learn2learn as l2l
import pytest
import torch
from tasks import clusters
from torch import nn
from torchmetrics.classification import MulticlassCalibrationError

from convexheads import RidgeHead, SVMHead, calibrate, embed, evaluate, split_task
from convexheads._sampling import sample_episodes


def taskset(ways: int = 3, samples: int = 7):
    features, labels = clusters()
    dataset = l2l.data.MetaDataset(torch.utils.data.TensorDataset(features, labels))
    transforms = [
        l2l.data.transforms.NWays(dataset, ways),
        l2l.data.transforms.KShots(dataset, samples),
        l2l.data.transforms.LoadData(dataset),
        l2l.data.transforms.RemapLabels(dataset),
        l2l.data.transforms.ConsecutiveLabels(dataset),
    ]
    return l2l.data.Taskset(dataset, transforms)


def test_splits_a_learn2learn_task():
    data, labels = taskset().sample()
    episode = split_task(data, labels, shots=2)
    assert episode.support.shape == (6, 6)
    assert episode.query.shape == (15, 6)
    assert episode.support_labels.bincount().tolist() == [2, 2, 2]
    assert episode.query_labels.bincount().tolist() == [5, 5, 5]
    for c in range(3):
        members = data[labels == c]
        assert torch.equal(episode.support[episode.support_labels == c], members[:2])
        assert torch.equal(episode.query[episode.query_labels == c], members[2:])


def test_a_taskset_feeds_a_head():
    accuracies = []
    for data, labels in (taskset().sample() for _ in range(20)):
        episode = split_task(data, labels, shots=2)
        logits = SVMHead()(episode.support, episode.support_labels, episode.query, ways=3)
        accuracies.append((logits.argmax(-1) == episode.query_labels).double().mean())
    assert torch.stack(accuracies).mean() > 0.6  # guessing reaches one third


def test_calibration_error_is_torchmetrics():
    features, labels = clusters(noise=2.0)
    head = RidgeHead(1.0, scale=3.0)
    result = evaluate(head, features, labels, shots=2, queries=5, episodes=30, progress=False)
    reference = MulticlassCalibrationError(num_classes=5, n_bins=15, norm="l1")
    split = []
    for (index,) in sample_episodes(labels, 5, 7, 30, seed=0):
        support, query = features[index[:, :2]].flatten(0, 1), features[index[:, 2:]].flatten(0, 1)
        fitted = head.fit(support, torch.arange(5).repeat_interleave(2))
        split.append((fitted.probabilities(query), torch.arange(5).repeat_interleave(5)))
    reference.update(torch.cat([p for p, _ in split]), torch.cat([y for _, y in split]))
    assert result.expected_calibration_error == pytest.approx(reference.compute().item(), abs=1e-6)
    assert result.converged.all()
    assert evaluate(SVMHead(), features, labels, shots=1, episodes=9, progress=False).converged.all()


def test_progress_bar(capfd, monkeypatch):
    features, labels = clusters()
    evaluate(RidgeHead(), features, labels, shots=1, episodes=10, progress=True)
    assert capfd.readouterr().err == ""  # no terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    evaluate(RidgeHead(), features, labels, shots=1, episodes=10, progress=True)
    assert "RidgeHead, 5-way 1-shot" in capfd.readouterr().err
    calibrate(RidgeHead(), features, labels, shots=1, episodes=10, progress=True)
    assert "RidgeHead" in capfd.readouterr().err
    embed(nn.Flatten(), features, progress=True)
    assert "Flatten" in capfd.readouterr().err
    evaluate(RidgeHead(), features, labels, shots=1, episodes=10, progress=False)
    assert capfd.readouterr().err == ""
