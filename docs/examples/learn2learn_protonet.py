"""A prototypical network on learn2learn's tasks, and the same loop with an SVM in place of the prototypes.

python docs/examples/learn2learn_protonet.py      # the digits are scikit-learn's

Six digits teach a network little: prototypes on the pixels of the unseen digits reach 94%. This example shows what to
change in a loop; the quickstart in the documentation trains on enough classes.
"""

import random

import learn2learn as l2l
import torch
from learn2learn.data.transforms import ConsecutiveLabels, KShots, LoadData, NWays, RemapLabels
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from convexheads import ClassificationHead, PrototypeHead, split_task
from convexheads.models import unit_scale_svm

WAYS, SHOTS, QUERIES = 3, 5, 5


def tasks(images: torch.Tensor, labels: torch.Tensor) -> l2l.data.Taskset:
    """Tasks of some of the digits."""
    dataset = l2l.data.MetaDataset(TensorDataset(images, labels))
    transforms = [NWays(dataset, WAYS), KShots(dataset, SHOTS + QUERIES), LoadData(dataset)]
    return l2l.data.Taskset(dataset, [*transforms, RemapLabels(dataset), ConsecutiveLabels(dataset)])


def fast_adapt(task, backbone: nn.Module, head: ClassificationHead) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and the accuracy of one task."""
    data, labels = task
    support, support_labels, query, labels = split_task(backbone(data), labels, shots=SHOTS)
    # was: prototypes = support.reshape(WAYS, SHOTS, -1).mean(dim=1)
    # was: logits = pairwise_distances_logits(query, prototypes)
    logits = head(support, support_labels, query, ways=WAYS)
    return nn.functional.cross_entropy(logits, labels), l2l.utils.accuracy(logits, labels)


def accuracy_on_unseen_digits(head: ClassificationHead) -> float:
    """Train a network through the head on six digits, and test it on the other four."""
    torch.manual_seed(0)
    random.seed(0)  # for learn2learn, which draws its tasks with this module
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    optimizer = torch.optim.Adam([*backbone.parameters(), *head.parameters()], lr=1e-3)
    train, test = tasks(images[known], labels[known]), tasks(images[~known], labels[~known])
    for _ in range(200):
        loss, _ = fast_adapt(train.sample(), backbone, head)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        accuracies = torch.stack([fast_adapt(test.sample(), backbone, head)[1] for _ in range(200)])
    return 100 * accuracies.mean().item()


digits = load_digits()
images, labels = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)
known = labels < 6
for name, head in {"prototypes": PrototypeHead(), "SVM": unit_scale_svm()}.items():
    print(f"unseen digits, {name}: {accuracy_on_unseen_digits(head):.1f}%")
